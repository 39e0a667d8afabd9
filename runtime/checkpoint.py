"""Checkpoints: where a model's config and weights come from, whatever the file format.

    checkpoint = open_checkpoint("SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint.config["hidden_size"]                            # 576
    checkpoint.load("model.norm.weight", torch.bfloat16)        # read, dequantised and converted now

Opening reads headers only, and checks every size against the file before anything is allocated. Nothing here unpickles.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fusec.errors import UserError

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """A model's config and weights.

    name: what to call it in messages.  path: the folder or file.  config: the keys of Hugging Face's config.json (for GGUF,
    mapped from its metadata).  Keys are Hugging Face parameter names, such as model.layers.0.self_attn.q_proj.weight.
    """

    name: str
    path: Path
    config: dict

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def load(self, key: str, dtype: torch.dtype = ...) -> torch.Tensor:
        """The tensor on the CPU, row-major, dequantised if need be; float32 unless told otherwise. UserError if there is none."""


def open_checkpoint(path) -> Checkpoint:
    """Opens a folder of safetensors files (sharded too) or a .gguf file; raises UserError if it is neither, or is damaged."""
    path = Path(path)
    if path.is_dir():
        from .safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        from .gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise UserError(
        f"cannot open the checkpoint {path}",
        expected="a folder with config.json and safetensors files, or a .gguf file",
        found="another kind of file" if path.exists() else "nothing there",
    )


def check_finite(tensor, key, source=None) -> None:
    """Raises UserError if `tensor` (any dtype) holds a NaN or an infinity.  source: the checkpoint's name, for the message.

    One pass at the speed of memory: a sum is finite only if every term is. Only a sum that is not is looked at closely.
    """
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:  # else the sum of finite values overflowed
        raise UserError(
            f"tensor {key}{f' of {source}' if source else ''} holds values that are not numbers",
            expected="finite weights",
            found=f"{wrong:,} of {tensor.numel():,} values are NaN or infinite",
            hint="the file is damaged, or a training run diverged: download it again",
        )


def no_such_tensor(checkpoint, key) -> UserError:
    """The error for a key that the checkpoint lacks, with the nearest one it has."""
    nearest = difflib.get_close_matches(key, checkpoint.keys(), n=1, cutoff=0.5)
    hint = f"the nearest name is {nearest[0]}" if nearest else None
    return UserError(f"{checkpoint.name} has no tensor {key}", hint=hint)
