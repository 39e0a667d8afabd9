"""Tensors described to the bulk copy engine of a Hopper GPU, tile by tile."""

from __future__ import annotations

import functools

import torch
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def tiles(tensor: torch.Tensor, columns: int, rows_of_tile: int, columns_of_tile: int) -> TensorDescriptor:
    """A contiguous tensor as a matrix of `columns` columns, to be copied in tiles; what lies beyond its last row is zero."""
    matrix = tensor.view(-1, columns)
    block = [rows_of_tile, columns_of_tile]
    return TensorDescriptor.from_tensor(matrix, block, layout_of(tensor.dtype, *block))


@functools.cache
def layout_of(dtype: torch.dtype, rows: int, columns: int):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], KINDS[dtype])
