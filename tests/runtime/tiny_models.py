"""Checkpoints small enough to be written for each test, and the real default model where it is on this machine."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fusec.errors import UserError
from fusec.runtime.hub import resolve

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY, LAYERS = 256, 4, 2, 64, 512, 300, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
    "eos_token_id": 7,
}  # fmt: skip


def smollm2() -> Path:
    """The default model's file, from $FUSEC_SMOLLM2 or where `fusec pull` puts it; skips the test if there is none."""
    if path := os.environ.get("FUSEC_SMOLLM2"):
        return Path(path)
    try:
        return resolve()
    except UserError:
        pytest.skip("SmolLM2 is not on this machine: fusec pull smollm2")


def parameters(seed=0, bias=False) -> dict[str, torch.Tensor]:
    """A small Llama's parameters in float32, under their Hugging Face names."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (HIDDEN,), layer + "post_attention_layernorm": (HIDDEN,),
            layer + "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), layer + "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), layer + "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            layer + "mlp.gate_proj": (FFN, HIDDEN), layer + "mlp.up_proj": (FFN, HIDDEN), layer + "mlp.down_proj": (HIDDEN, FFN),
        }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    if bias:
        weights |= {
            f"{name}.bias": torch.randn(shape[0], generator=random)
            for name, shape in shapes.items()
            if name.endswith(("q_proj", "k_proj", "v_proj"))
        }
    return weights


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def to_gguf_name(key):
    stem, kind = key.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(rows, heads):
    """The order in which converters write Llama's q and k: row i and row i + head_dim / 2 of a head become neighbours."""
    order = [head * HEAD_DIM + half * HEAD_DIM // 2 + i for head in range(heads) for i in range(HEAD_DIM // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(path, weights, kind="F32", architecture="llama", metadata=None, tokenizer=None, raw=()) -> Path:
    """Writes parameters as a converter would: renamed, q and k interleaved for llama, matrices in the ggml type `kind`.

    metadata: keys after the architecture's prefix, instead of or besides the usual.  tokenizer: tokenizer.* keys.
    raw: (name, array) tensors written as they are.
    """
    writer = gguf.GGUFWriter(path, architecture)
    usual = {
        "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FFN, "block_count": LAYERS,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100000.0, "rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
    keys = {f"{architecture}.{key}": value for key, value in (usual | (metadata or {})).items()} | (tokenizer or {})
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    quantisation = gguf.GGMLQuantizationType[kind]
    for key, weight in weights.items():
        if architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
            weight = interleave(weight, HEADS if ".q_proj." in key else KV_HEADS)
        values = weight.numpy()
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(to_gguf_name(key), values)
        else:
            writer.add_tensor(to_gguf_name(key), quantised(values, quantisation), raw_dtype=quantisation)
    for name, values in raw:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def quantised(values, kind):
    """Values in a ggml type; for the types that `gguf` only reads, random blocks with small finite scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = np.random.default_rng(0).integers(0, 256, (len(values), values.shape[1] // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        for start in {"Q4_K": (0, 2), "Q6_K": (size - 2,)}[kind.name]:
            rows[..., start : start + 2] = scale
        return rows.reshape(len(values), -1)


def write_folder(folder, weights, shards=1) -> Path:
    """Writes config.json and safetensors as Hugging Face does, with an index when there is more than one shard."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key in weights if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
