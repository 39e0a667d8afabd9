"""Reading safetensors folders and GGUF files: the right values under the right names, and one clear error for a bad file."""

import json
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from tiny_models import CONFIG, HEAD_DIM, HIDDEN, parameters, smollm2, write_folder, write_gguf

from fusec.errors import UserError
from fusec.runtime.checkpoint import check_finite, open_checkpoint


@pytest.fixture(scope="module")
def weights():
    return parameters()


def error_of(action, *arguments):
    with pytest.raises(UserError) as caught:
        action(*arguments)
    return str(caught.value)


# --- safetensors ---


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_config_and_tensors(tmp_path, weights, shards):
    checkpoint = open_checkpoint(write_folder(tmp_path / "tiny", weights, shards))
    assert checkpoint.name == "tiny" and checkpoint.config == CONFIG
    assert set(checkpoint.keys()) == set(weights)
    for key, weight in weights.items():
        assert checkpoint.shape(key) == tuple(weight.shape)
        assert torch.equal(checkpoint.load(key), weight)
        assert torch.equal(checkpoint.load(key, torch.bfloat16), weight.bfloat16())


def test_a_folder_of_the_hub_cache_is_called_by_its_id(tmp_path, weights):
    folder = tmp_path / "models--org--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert open_checkpoint(write_folder(folder, weights)).name == "org/name"


def test_a_key_that_is_not_there_names_the_nearest(tmp_path, weights):
    checkpoint = open_checkpoint(write_folder(tmp_path / "tiny", weights))
    for action in (checkpoint.load, checkpoint.shape):
        assert "the nearest name is model.norm.weight" in error_of(action, "model.norms.weight")


def test_a_truncated_safetensors_file(tmp_path, weights):
    folder = write_folder(tmp_path / "tiny", weights)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 100, 3000, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = error_of(open_checkpoint, folder)
        assert ("truncated" in message or "damaged" in message) and f"{size:,} bytes" in message


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{not json",
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 399999999996]}}',
    ],
)
def test_a_damaged_header(tmp_path, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    message = error_of(open_checkpoint, tmp_path)
    assert "is damaged" in message or "is truncated" in message


def test_a_header_length_larger_than_any_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "is damaged" in error_of(open_checkpoint, tmp_path)


def test_a_missing_shard(tmp_path, weights):
    folder = write_folder(tmp_path / "tiny", weights, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = error_of(open_checkpoint, folder)
    assert "expected: 3 shards" in message and "missing: model-00002-of-00003.safetensors" in message


def test_a_shard_without_its_tensor(tmp_path, weights):
    folder = write_folder(tmp_path / "tiny", weights, shards=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    assert "no model.extra.weight" in error_of(open_checkpoint, folder)


def test_an_index_that_points_outside(tmp_path, weights):
    folder = write_folder(tmp_path / "tiny", weights, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "points outside its folder" in error_of(open_checkpoint, folder)


def test_folders_that_are_no_model(tmp_path):
    assert "expected: a file config.json" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1,}')
    assert "line 1" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "a JSON object" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no safetensors file" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin, a pickle" in error_of(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "the method gptq" in error_of(open_checkpoint, tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    assert "nothing there" in error_of(open_checkpoint, tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    assert "another kind of file" in error_of(open_checkpoint, tmp_path / "notes.txt")
    assert "cannot open" in error_of(open_checkpoint, tmp_path / "absent.gguf")


# --- GGUF ---

# type -> largest relative error of the whole tensor (None: the stored blocks are random)
KINDS = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2, "Q4_0": 0.12, "Q4_1": 0.1, "Q4_K": None, "Q6_K": None}


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_types(tmp_path, weights, kind):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", weights, kind))
    assert set(checkpoint.keys()) == set(weights)
    stored = gguf.GGUFReader(tmp_path / "tiny.gguf")
    plain = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in stored.tensors}
    assert np.array_equal(checkpoint.load("model.layers.1.mlp.down_proj.weight").numpy(), plain["blk.1.ffn_down.weight"])
    for key, weight in weights.items():
        loaded = checkpoint.load(key)
        assert checkpoint.shape(key) == tuple(loaded.shape) == tuple(weight.shape) and loaded.is_contiguous()
        assert torch.equal(checkpoint.load(key, torch.bfloat16), loaded.bfloat16())
        if KINDS[kind] is not None:
            assert (loaded - weight).norm() <= KINDS[kind] * weight.norm()


def test_gguf_biases_are_reordered_with_their_rows(tmp_path):
    weights = parameters(bias=True)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", weights))
    assert checkpoint.config["attention_bias"]
    assert all(torch.equal(checkpoint.load(key), weight) for key, weight in weights.items())


def test_gguf_config(tmp_path, weights):
    path = write_gguf(tmp_path / "tiny.gguf", weights, tokenizer={"tokenizer.ggml.eos_token_id": 7})
    assert open_checkpoint(path).config == CONFIG | {
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "head_dim": HEAD_DIM,
        "tie_word_embeddings": True, "attention_bias": False, "rope_theta": 100000.0,
    }  # fmt: skip


def test_gguf_head_of_its_own(tmp_path, weights):
    head = torch.ones_like(weights["model.embed_tokens.weight"])
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", weights | {"lm_head.weight": head}))
    assert checkpoint.config["tie_word_embeddings"] is False and torch.equal(checkpoint.load("lm_head.weight"), head)


def test_qwen3_rows_stay_and_norms_of_heads_are_named(tmp_path, weights):
    norm = np.arange(HEAD_DIM, dtype=np.float32)
    path = write_gguf(
        tmp_path / "tiny.gguf", weights, architecture="qwen3",
        metadata={"attention.key_length": HEAD_DIM}, raw=[("blk.0.attn_q_norm.weight", norm)],
    )  # fmt: skip
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["architectures"] == ["Qwen3ForCausalLM"] and checkpoint.config["head_dim"] == HEAD_DIM
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.load(key), weights[key])
    assert checkpoint.load("model.layers.0.self_attn.q_norm.weight").tolist() == norm.tolist()


def test_gemma2_names_and_norms(tmp_path, weights):
    extra = np.full(HIDDEN, 1.5, dtype=np.float32)
    path = write_gguf(
        tmp_path / "tiny.gguf", weights, architecture="gemma2",
        metadata={"attention.key_length": HEAD_DIM, "attn_logit_softcapping": 50.0, "attention.sliding_window": 4096},
        raw=[(f"blk.{i}.{name}.weight", extra) for i in range(2) for name in ("post_attention_norm", "post_ffw_norm")],
    )  # fmt: skip
    checkpoint = open_checkpoint(path)
    layer = "model.layers.1."
    assert torch.equal(checkpoint.load(layer + "post_attention_layernorm.weight"), torch.full((HIDDEN,), 0.5))
    assert torch.equal(checkpoint.load(layer + "post_feedforward_layernorm.weight"), torch.full((HIDDEN,), 0.5))
    assert torch.equal(
        checkpoint.load(layer + "pre_feedforward_layernorm.weight"), weights[layer + "post_attention_layernorm.weight"] - 1
    )
    assert checkpoint.config["attn_logit_softcapping"] == 50.0 and checkpoint.config["query_pre_attn_scalar"] == HEAD_DIM


def llama3_factors(factor, theta=500000.0):
    """What Llama 3.1's code divides each frequency by, as converters store it: by wavelength, over a context of 8192."""
    factors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / HEAD_DIM)
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    return np.array(factors, dtype=np.float32)


def test_llama3_rope_factors_become_config(tmp_path, weights):
    def write(factors):
        raw = [("rope_freqs.weight", factors)]
        return write_gguf(tmp_path / "tiny.gguf", weights, metadata={"rope.freq_base": 500000.0}, raw=raw)

    checkpoint = open_checkpoint(write(llama3_factors(32.0)))
    assert checkpoint.config["rope_scaling"]["factor"] == 32.0 and checkpoint.config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_freqs.weight" not in checkpoint.keys()
    assert "rope factors" in error_of(open_checkpoint, write(np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)))


def test_linear_rope_scaling(tmp_path, weights):
    path = write_gguf(tmp_path / "tiny.gguf", weights, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_truncated_gguf(tmp_path, weights):
    path = write_gguf(tmp_path / "tiny.gguf", weights, "Q8_0", tokenizer={"tokenizer.ggml.tokens": ["a", "b", "c"]})
    whole = path.read_bytes()
    for size in (24, 60, 300, 700, 1500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = error_of(open_checkpoint, path)
        assert "is truncated" in message and f"{size:,} bytes" in message
    for size in (0, 10):
        path.write_bytes(whole[:size])
        assert "is no GGUF file" in error_of(open_checkpoint, path)


def test_damaged_gguf_headers(tmp_path):
    path = tmp_path / "bad.gguf"

    def message(content):
        path.write_bytes(content + bytes(64))
        return error_of(open_checkpoint, path)

    header = struct.Struct("<4sIQQ")
    assert "is no GGUF file" in message(b"PK\x03\x04")
    assert "version 1" in message(header.pack(b"GGUF", 1, 0, 0))
    assert "big-endian" in message(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "truncated" in message(header.pack(b"GGUF", 3, 1 << 60, 1 << 60) + struct.pack("<Q", 1 << 62))
    key = struct.pack("<Q", 1) + b"k"
    assert "unknown type 77" in message(header.pack(b"GGUF", 3, 0, 1) + key + struct.pack("<I", 77))
    assert "truncated" in message(header.pack(b"GGUF", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, 1 << 50))
    assert "more than 4" in message(header.pack(b"GGUF", 3, 1, 0) + key + struct.pack("<I", 4_000_000))
    assert "unknown type 999" in message(header.pack(b"GGUF", 3, 1, 0) + key + struct.pack("<IQIQ", 1, 4, 999, 0))
    huge = struct.pack("<IQQIQ", 2, 1 << 62, 1 << 62, 0, 0)
    assert "truncated" in message(header.pack(b"GGUF", 3, 1, 0) + key + huge)


def test_gguf_files_that_hold_another_model(tmp_path, weights):
    path = tmp_path / "tiny.gguf"
    assert "found: 'bert'" in error_of(open_checkpoint, write_gguf(path, weights, architecture="bert"))
    assert "with experts" in error_of(open_checkpoint, write_gguf(path, weights, metadata={"expert_count": 8}))
    message = error_of(open_checkpoint, write_gguf(path, weights, metadata={"embedding_length": None}))
    assert "one positive number for llama.embedding_length" in message
    message = error_of(open_checkpoint, write_gguf(path, weights, metadata={"attention.head_count_kv": [2, 4]}))
    assert "a list (sizes that differ by layer)" in message
    message = error_of(open_checkpoint, write_gguf(path, weights, tokenizer={"split.count": 3, "split.no": 0}))
    assert "part 1 of 3" in message


# --- finite ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_reported(dtype):
    weight = torch.randn(64, 64).to(dtype)
    check_finite(weight, "w")
    check_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype), "w")  # a sum that overflows is no fault
    check_finite(torch.arange(3), "w")
    for value in (float("nan"), float("inf")):
        weight[3, 5] = value
        assert "tensor w of m" in error_of(check_finite, weight, "w", "m")
    assert "4 of 4 values" in error_of(check_finite, torch.full((4,), float("nan"), dtype=dtype), "w")


# --- the real model ---


def test_smollm2_opens_quickly_and_loads_what_gguf_reads():
    path = smollm2()
    began = time.perf_counter()
    checkpoint = open_checkpoint(path)
    assert time.perf_counter() - began < 1
    assert checkpoint.config["hidden_size"] == 576 and checkpoint.config["tie_word_embeddings"]
    assert len(checkpoint.keys()) == 272  # 30 layers of 9, the embedding and the last norm
    key = "model.layers.29.self_attn.k_proj.weight"
    loaded = checkpoint.load(key)
    check_finite(loaded, key)
    assert loaded.shape == (192, 576) and 0.01 < loaded.std() < 1
