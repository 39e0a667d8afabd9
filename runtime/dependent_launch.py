"""Whether a GPU can start a kernel while the one before it drains (CUDA's programmatic dependent launch)."""

from __future__ import annotations

import functools

import torch


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """From Hopper on; never where there is no GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
