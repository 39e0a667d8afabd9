"""`fusec run`: the answer, what is said beside it, and what is said when there can be none."""

import io
import json
import shutil
import struct

import pytest
import torch


@pytest.fixture
def run(fusec):
    def call(model, *arguments, prompt="hello"):
        return fusec("run", "--model", model, "--prompt", prompt, "--device", "cpu", "--max-tokens", "8", *arguments)

    return call


@pytest.fixture
def damaged(tiny_llama, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(tiny_llama, tmp_path / "damaged")


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(run, tiny_llama):
    result = run(tiny_llama)
    assert result.status == 0
    assert result.out.endswith("\n")
    model, program, device, *_, timing = result.err.splitlines()
    assert "M parameters, float32" in model and "llama.fuse" in program and "CPU: torch backend" in device
    assert "prompt tokens, first token after" in timing
    quiet = run(tiny_llama, "--quiet")
    assert (quiet.out, quiet.err) == (result.out, "")


def test_json(run, tiny_llama):
    result = run(tiny_llama, "--json")
    answer = json.loads(result.out)
    assert result.err == ""
    assert set(answer) == {
        "text", "token_ids", "finish_reason", "prompt_tokens", "model", "source", "backend", "device", "dtype", "timings",
    }  # fmt: skip
    assert len(answer["token_ids"]) <= 8 and answer["finish_reason"] in ("length", "stop")
    assert (answer["backend"], answer["dtype"]) == ("torch", "float32")
    assert answer["text"] == run(tiny_llama, "--quiet").out[:-1]
    assert {"load_s", "compile_s", "time_to_first_token_s", "decode_tokens_per_s"} <= set(answer["timings"])


def test_the_template_is_applied_unless_raw(run, tiny_llama):
    """The tokenizer has a token a byte, and one for each mark of the template."""
    count = lambda *flags: json.loads(run(tiny_llama, "--json", *flags).out)["prompt_tokens"]  # noqa: E731
    assert count("--raw") == 5
    assert count() == 5 + 3
    assert count("--system", "be brief") == 5 + 3 + 8 + 2


def test_sampling_with_a_seed_repeats(run, tiny_llama):
    flags = ("--quiet", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "50")
    one, again, other = (run(tiny_llama, *flags, "--seed", seed).out for seed in (1, 1, 2))
    assert one == again != other


def test_prompt_from_stdin(run, tiny_llama, monkeypatch):
    expected = run(tiny_llama, "--quiet").out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run(tiny_llama, "--quiet", prompt="-").out == expected


def test_bfloat16_and_a_program_of_ones_own(run, tiny_llama, tmp_path):
    from fusec.language import find_example

    source = tmp_path / "own.fuse"
    text = find_example("LlamaForCausalLM").read_text().replace("silu(", "gelu(")
    source.write_text(text)
    result = run(tiny_llama, "--dtype", "bfloat16", "--source", source)
    assert result.status == 0
    assert "bfloat16" in result.err and "own.fuse" in result.err and "warning" not in result.err
    source.write_text(text.replace("serves LlamaForCausalLM", "serves GeluForCausalLM"))
    result = run(tiny_llama, "--source", source)
    assert result.status == 0 and "does not serve LlamaForCausalLM" in result.err
    assert run(tiny_llama, "--source", source, "--quiet").err == ""


# ---- bad input: one error that says what to do ----


def refused(result, status, *texts):
    assert result.status == status, result.err
    assert result.out.strip() == ""
    assert result.err.count("error") == 1, result.err
    for text in texts:
        assert text in result.err, result.err


def test_no_prompt(fusec):
    refused(fusec("run"), 2, "there is no prompt")
    refused(fusec("run", "--prompt", " "), 2, "the prompt is empty")


def test_no_model(fusec, run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(fusec("run", "--prompt", "hello"), 1, "hint: fusec pull smollm2")
    refused(run(tmp_path / "nowhere"), 1, "no model at")
    refused(run(tmp_path), 1, "expected: config.json")


def test_no_gpu(fusec, tiny_llama):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refused(fusec("run", "--model", tiny_llama, "--prompt", "hello", "--device", "cuda"), 5, "cuda is not there", "--device cpu")


def test_unknown_device_and_numbers_out_of_range(fusec, run, tiny_llama):
    refused(fusec("run", "--model", tiny_llama, "--prompt", "hello", "--device", "abacus"), 2)
    refused(run(tiny_llama, "--temperature", "-1"), 2, "temperature")
    refused(run(tiny_llama, "--max-model-len", "100000"), 2, "max_model_len")


def test_prompt_longer_than_the_context(run, tiny_llama):
    refused(run(tiny_llama, prompt="a" * 1000), 1, "longer than the context", "255 tokens")
    refused(run(tiny_llama, "--max-model-len", "16", prompt="a" * 100), 1, "longer than the context", "15 tokens")


def test_truncated_safetensors(run, damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run(damaged), 1, "is truncated")
    weights.write_bytes(b"\x00")
    refused(run(damaged), 1, "model.safetensors")


def test_no_weights_and_pickles(run, damaged):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    refused(run(damaged), 1, "a pickle")


def test_truncated_gguf(run, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 100, 10))
    refused(run(file), 1, "model.gguf")
    file.write_bytes(b"not a model")
    refused(run(file), 1, "model.gguf")


def test_config_that_is_no_json_and_an_unknown_architecture(run, damaged):
    (damaged / "config.json").write_text("{")
    refused(run(damaged), 1, "config.json")
    (damaged / "config.json").write_text(json.dumps({"architectures": ["LamaForCausalLM"], "model_type": "lama"}))
    refused(run(damaged), 1, "LamaForCausalLM", "did you mean LlamaForCausalLM?")


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_weights_that_are_not_numbers(run, damaged):
    edit_weights(damaged, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    refused(run(damaged), 1, "model.layers.1.mlp.up_proj.weight", "NaN")


def test_missing_and_misshapen_tensors(run, damaged):
    edit_weights(damaged, lambda weights: weights.pop("model.norm.weight"))
    refused(run(damaged), 3, "model.norm.weight")


def test_a_tensor_of_another_shape(run, damaged):
    key = "model.layers.0.mlp.up_proj.weight"
    edit_weights(damaged, lambda weights: weights.update({key: torch.zeros(7, 64)}))
    refused(run(damaged), 3, key)


def test_no_tokenizer_and_no_template(run, damaged):
    (damaged / "tokenizer_config.json").write_text("{}")
    refused(run(damaged), 1, "no chat template", "--raw")
    assert run(damaged, "--raw").status == 0
    (damaged / "tokenizer.json").unlink()
    refused(run(damaged), 1, "tokenizer.json")


def test_offline(run, monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    result = run("nobody/nothing", "--offline")
    refused(result, 1, "while offline")
    assert "local_files_only" not in result.err
