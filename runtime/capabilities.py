"""What only some GPUs can do: generated programs ask before they launch."""

from __future__ import annotations

import functools

import torch


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it drains (CUDA's programmatic dependent launch): from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether there are the bulk copies and warpgroup products of compute capability 9; later GPUs have others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
