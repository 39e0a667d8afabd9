"""A model stored as GGUF: tensors under their Hugging Face names, dequantised when they are read."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from fusec.errors import UserError

from .gguf_config import config_from_gguf
from .gguf_format import TensorInfo, read_gguf

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER = LAYER | {  # norms before and after each half of the layer
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"  # part of the config, not a parameter

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PIECE = 1 << 17  # values dequantised at once


class GGUFCheckpoint:
    """A .gguf file as a checkpoint (see checkpoint.py).  metadata: the file's own keys, tokenizer included."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.stem
        self._file = read_gguf(self.path)
        self.metadata = self._file.metadata
        factors = self._file.tensors.get(ROPE_FACTORS)
        self.config = config_from_gguf(self._file, self._read(factors, torch.float32).tolist() if factors else None)
        self._architecture = self.metadata["general.architecture"]
        self._tensors = {
            parameter_name(name, self._architecture): tensor
            for name, tensor in self._file.tensors.items()
            if name != ROPE_FACTORS
        }

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key) -> tuple[int, ...]:
        return self._tensor(key).shape

    def load(self, key, dtype=torch.float32) -> torch.Tensor:
        """The parameter `key` on the CPU, row-major, dequantised through float32, as Hugging Face stores it."""
        tensor = self._tensor(key)
        if self._architecture == "gemma2" and key.endswith("norm.weight"):
            return (self._read(tensor, torch.float32) - 1).to(dtype)  # Gemma scales by 1 + weight; the file stores the sum
        values = self._read(tensor, dtype)
        if self._architecture == "llama" and re.search(r"\.[qk]_proj\.", key):
            values = split_halves(values, self.config["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"])
        return values

    def _tensor(self, key) -> TensorInfo:
        if key not in self._tensors:
            from .checkpoint import no_such_tensor

            raise no_such_tensor(self, key)
        return self._tensors[key]

    def _read(self, tensor, dtype) -> torch.Tensor:
        stored = np.frombuffer(self._file.data, np.uint8, tensor.nbytes, tensor.start)
        if tensor.kind in PLAIN:
            return torch.from_numpy(stored).view(PLAIN[tensor.kind]).to(dtype, copy=True).reshape(tensor.shape)
        return dequantise(stored, tensor, dtype).reshape(tensor.shape)


def dequantise(stored, tensor, dtype) -> torch.Tensor:
    """Bytes of a quantised tensor (uint8 [nbytes]) -> its values in `dtype`, one after another.

    Works through float32 in pieces that stay in the CPU's cache: five times as fast as a tensor at once, and in little memory.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, block_bytes)
    values = torch.empty(len(blocks) * block, dtype=dtype)
    step = PIECE // block
    try:
        for start in range(0, len(blocks), step):
            piece = dequantize(blocks[start : start + step].reshape(1, -1), kind).reshape(-1)
            values[start * block : start * block + piece.size] = torch.from_numpy(piece)
    except NotImplementedError:
        raise UserError(
            f"tensor {tensor.name} cannot be dequantised",
            expected="a type that the gguf package reads, such as F16, Q8_0, Q4_K or Q6_K",
            found=tensor.kind,
        ) from None
    return values


def split_halves(rows, heads):
    """Undoes the row order of Llama's q and k: GGUF rotates neighbours (2i, 2i+1), Hugging Face rotates i with i + head_dim / 2.

    rows: [heads * head_dim, ...].
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def parameter_name(name, architecture):
    """GGUF's tensor name -> Hugging Face's parameter name; an unknown name stays as it is, so that it can be reported."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        part = (GEMMA_LAYER if architecture == "gemma2" else LAYER).get(match[2])
        if part:
            return f"model.layers.{match[1]}.{part}.{kind}"
    return name
