"""The benchmarks, as far as a machine without a GPU can tell: bytes, shapes, and what is printed."""

import json
import os
import random
import time
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from fusec.bench import clock, decode, kernels
from fusec.bench.attention import lengths_of
from fusec.bench.cli import bench
from fusec.bench.decode import case, decode_bytes, ramp
from fusec.bench.engine import compiled_for, make_llm, need_gpu, pick
from fusec.bench.limits import microseconds, proven_saving
from fusec.bench.shapes import MODELS, config_of
from fusec.codegen.traffic import Traffic
from fusec.errors import DeviceError, UsageError, UserError
from fusec.tune import Tuner

TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": True}


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_every_weight_once_and_the_history(name):
    """Against the sum over config.json's sizes. Norm weights are folded into matrices where they can be."""
    c = MODELS[name]
    h, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    weights = layers * (h * (q + 2 * kv) + q * h + 3 * h * f) + h * c["vocab_size"]
    compiled = compiled_for(c)
    for batch, context in ((1, 576), (8, 4096)):
        expected = 2 * weights + batch * context * layers * 2 * kv * 2
        assert decode_bytes(compiled, batch, context) == pytest.approx(expected, rel=1e-3)
        assert decode_bytes(compiled, batch, context) >= expected


def test_published_sizes():
    parameters = {"llama-3.1-8b": 8.03e9, "llama-3.2-1b": 1.236e9, "qwen3-0.6b": 0.596e9, "smollm2-135m": 0.1345e9}
    for name, count in parameters.items():
        c = MODELS[name]
        embedding = c["vocab_size"] * c["hidden_size"] * (1 if c["tie_word_embeddings"] else 2)
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        layer = c["hidden_size"] * (2 * q + 2 * kv + 3 * c["intermediate_size"] + 2)
        assert embedding + c["num_hidden_layers"] * layer == pytest.approx(count, rel=2e-3)


def test_a_case_relates_bytes_to_what_was_read():
    found = case("m", 2, 512, tpot_ms=4.0, mean_ms=5.0, step_ms=2.0, moved=4_000_000_000, read_gbps=4000.0)
    assert (found["GBps"], found["share"], found["step_share"], found["tok_s"]) == (1000.0, 0.25, 0.5, 400.0)


def run(*arguments):
    return CliRunner().invoke(bench, arguments)


def test_decode_prints_one_json_document(tiny):
    done = run("decode", "--model", tiny, "--device", "cpu", "--batch", "1,3", "--context", "24", "--steps", "4", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["command"] == "decode" and [c["batch"] for c in document["cases"]] == [1, 3]
    for found in document["cases"]:
        assert {"model", "batch", "context", "tpot_ms", "step_ms", "bytes", "GBps", "read_GBps", "share"} <= set(found)
        assert found["tpot_ms"] >= 0 and found["step_ms"] > 0 and found["context"] == 24  # a busy machine may hide four tokens


def test_prefill_prints_a_table(tiny):
    done = run("prefill", "--model", tiny, "--device", "cpu", "--tokens", "32")
    assert done.exit_code == 0, done.output
    assert "tokens" in done.stdout and "TFLOP/s" in done.stdout


@pytest.mark.slow
def test_startup_runs_twice(tiny):
    done = run("startup", "--model", tiny, "--device", "cpu", "--json")
    (found,) = json.loads(done.stdout)["cases"]
    assert found["first_s"] > 0 and found["again_s"] > 0


@pytest.mark.parametrize("arguments, error", [
    (("decode", "--model", "llama-3.1"), UsageError), (("decode", "--model", ","), UsageError),
    (("decode", "--model", "TINY", "--device", "cpu", "--context", "300"), UsageError),
    (("decode", "--model", "TINY", "--device", "tpu"), UsageError),
    (("decode", "--model", "TINY", "--device", "cpu", "--dtype", "int8"), UsageError),
    (("kernels", "--model", "TINY", "--device", "cpu"), DeviceError),
    (("attention", "--model", "TINY", "--device", "cpu"), DeviceError),
])
def test_mistakes_are_told(arguments, error, tiny):
    done = run(*(tiny if a == "TINY" else a for a in arguments))
    assert isinstance(done.exception, error), done.exception


@pytest.mark.parametrize("numbers", ["0", "1,x", "", "-1"])
def test_lists_of_numbers(numbers):
    done = run("decode", f"--batch={numbers}")
    assert done.exit_code == 2 and "no list of positive integers" in done.output


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        config_of(str(tmp_path))
    with pytest.raises(UsageError, match="did you mean"):
        config_of("smollm2-135")


def test_kernels_need_a_gpu():
    with pytest.raises(DeviceError, match="fusec bench kernels needs an NVIDIA GPU"):
        need_gpu("cpu", "fusec bench kernels")


def test_a_gpu_is_picked_with_its_number(monkeypatch):
    """torch.cuda.set_device takes no other."""
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert need_gpu("auto", "") == need_gpu("cuda", "") == pick("auto") == torch.device("cuda", 1)
    assert need_gpu("cuda:0", "") == torch.device("cuda", 0)


def test_what_is_measured_runs_in_inference_mode():
    """Scratch that a forward left behind can be written in no other."""
    with torch.inference_mode():
        product = torch.empty(2, 2)
    assert microseconds(lambda: torch.mm(torch.eye(2), torch.eye(2), out=product), torch.device("cpu")) > 0


def test_tuning_runs_in_inference_mode():
    modes = []
    module = SimpleNamespace(functions=[])
    note = lambda *size: modes.append(torch.is_inference_mode_enabled())  # noqa: E731
    program = SimpleNamespace(module=module, caches={}, allocate_cache=note)
    assert Tuner(program).run(1.0) == {}
    assert modes == [True]


def test_lengths_fall_with_the_rank():
    assert lengths_of(3, 100, False) == [100, 100, 100]
    skewed = lengths_of(64, 1024, True)
    assert skewed[:3] == [1024, 512, 341] and skewed[-1] == 64


def test_a_small_saving_is_told_from_noise():
    def pairs(saving, seed):
        noise = random.Random(seed)
        while True:
            drift = 1 + noise.random()  # a clock that falls and rises
            now, other = (drift * (1 + noise.gauss(0, 0.001)) for _ in range(2))
            taken.append(other)
            yield now * (3 if noise.random() < 0.03 else 1), other * (1 - saving)

    taken = []
    assert all(proven_saving(pairs(0.003, seed)) > 0 for seed in range(20))
    assert sum(proven_saving(pairs(0.0, seed)) > 0 for seed in range(200)) <= 5
    assert all(proven_saving(pairs(-0.003, seed)) < 0 for seed in range(20))
    taken.clear()
    assert 0.05 < proven_saving(pairs(0.1, 1)) < 0.1 and len(taken) == 12  # plain to see


# ---- kernels of a step ---------------------------------------------------------------------------------------------------------


def fake_program():
    """Two functions over two layers' weights, as a generated program.py has them."""
    space = SimpleNamespace(runs=[])
    weights = {f"layers.{i}": torch.full((4,), float(i)) for i in range(2)}

    def double(T, w, x):
        space.runs.append(("double", w))

    def step(m, b):
        for w in weights.values():
            space.double(1, w, b)

    space.double, space.step = double, step
    module = SimpleNamespace(functions=[SimpleNamespace(name="double")])
    return SimpleNamespace(program=space, module=module, weights=weights, caches={}, device=torch.device("cpu"),
                           forward=lambda batch: space.step(None, batch))


def test_watching_a_step_collects_each_call_and_lets_it_run():
    program = fake_program()
    real, batch = program.program.double, torch.zeros(1)
    calls = kernels.watch(program, batch)
    assert [arguments[1] for arguments in calls["double"]] == list(program.weights.values())
    assert len(program.program.runs) == 2 and program.program.double is real


def test_small_weights_are_copied_until_they_leave_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    program, shared = fake_program(), torch.zeros(1)
    calls = kernels.watch(program, shared)["double"]
    launches = kernels.rotate(program, calls, kernels.COLD // 16)
    assert len(launches) == 16 and launches[:2] == calls
    assert len({arguments[1].data_ptr() for arguments in launches}) == 16
    assert all(arguments[2] is shared for arguments in launches)
    assert len(kernels.rotate(program, calls, 1)) == kernels.MOST_LAUNCHES


def test_a_token_takes_the_median_of_steps_and_the_rate_is_of_the_mean(monkeypatch):
    llm = make_llm(TINY, device=torch.device("cpu"), dtype="float32", batch=2, longest=64, budget=16)
    ticks = iter([0.0, 1.0, 2.0, 3.0, 13.0, 14.0, 15.0, 16.0, *range(17, 99)])  # one step took ten times as long
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(ticks))
    median, mean, *_ = decode.time_per_token(llm, 2, 8, ramp(2, 8, 16) + 9)
    assert median == 1000.0 and mean > 1500.0


def test_the_clock_is_read_while_something_runs(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho \"$@\" > $(dirname $0)/asked\necho '[N/A], 700.0'\n"
                    "for i in 1 2 3; do echo \"198$i, 60$i.5\"; done\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(clock, "uuid", lambda device: "GPU-1")
    start = time.perf_counter()
    with clock.Clock(torch.device("cuda", 0)) as read:
        while len(read.readings) < 3 and time.perf_counter() < start + 20:
            time.sleep(0.01)
    assert read.process.poll() is not None  # it does not outlive its use
    assert read.between(start, time.perf_counter()) == {"clock_MHz": 1982.0, "power_W": 602.5}
    assert read.between(start - 2, start - 1) == {"clock_MHz": None, "power_W": None}
    assert f"--loop-ms={clock.EVERY} -i GPU-1" in (tmp_path / "asked").read_text()


def test_without_a_gpu_there_is_no_clock():
    with clock.Clock(torch.device("cpu")) as read:
        pass
    assert read.process is None and read.between(0.0, 1e9) == {"clock_MHz": None, "power_W": None}


def test_a_kernel_is_held_against_the_nearer_limit():
    slow = kernels.case("decode", "o_proj", 32, 10.0, Traffic(weights=22_725_000), read=4545.0, peak=700.0)
    assert (slow["limit"], slow["share"], slow["step_us"]) == ("bandwidth", 0.5, 320.0)
    wide = kernels.case("prefill", "o_proj", 32, 100.0, Traffic(weights=1000, flops=35_000_000_000), read=4545.0, peak=700.0)
    assert (wide["limit"], wide["share"]) == ("matmul rate", 0.5)


@pytest.mark.parametrize("batch, context", [(1, 8), (3, 20), (8, 33), (5, 64)])
def test_only_steps_in_which_all_decode_are_timed(batch, context, monkeypatch):
    budget, ticks, alone = min(64, batch * context), iter(range(1000)), []
    config = TINY | {"max_position_embeddings": 512}
    llm = make_llm(config, device=torch.device("cpu"), dtype="float32", batch=batch, longest=context + 60, budget=budget)
    real = llm.engine.runner.launch

    def launch(plan):
        alone.append(plan.decode_only and len(plan.work) == batch)
        return real(plan)

    llm.engine.runner.launch = launch
    monkeypatch.setattr(decode.time, "perf_counter", lambda: float(next(ticks)))
    count = ramp(batch, context, budget) + 9
    milliseconds, mean, slowest, had, began, ended = decode.time_per_token(llm, batch, context, count)
    assert milliseconds == mean == slowest == 1000.0  # a tick a step: no other step lies between
    assert 9 <= ended - began <= count
    assert sum(alone) >= 9
    assert count / 2 - 1 <= had <= count
    assert "step" not in vars(llm.engine)  # nothing is left behind
