"""Weights as the compiled program wants them: read from the checkpoint, combined, packed, on the device.

A module names each tensor it needs by the graph that computes it from checkpoint tensors (merged projections, folded norm
weights, tables of frequencies). That graph runs once, here, on the device; contraction weights are then packed row by row as
their kernel reads them.
"""

from __future__ import annotations

import functools
import math
import zlib

import torch

from fusec.errors import UserError
from fusec.ir.graph import Graph, Value
from fusec.ir.interpreter import dtypes, evaluate, storage_view
from fusec.passes.analysis import cone
from fusec.runtime.checkpoint import check_finite


class Loader:
    """Hands out checkpoint tensors as `weight` values ask for them, in the model's dtype, on the device."""

    def __init__(self, checkpoint, dtype: torch.dtype, device, *, total: int = 0, progress=None):
        """progress(done, total): called as each of `total` tensors is read."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, value: Value) -> torch.Tensor:
        shape = value.attrs["shape"]
        key = value.attrs["key"]
        if "{}" in key:
            storage = torch.stack([self.storage(key.format(i), shape[1:]) for i in range(shape[0])])
        else:
            storage = self.storage(key, shape)
        self.done += 1
        if self.progress:
            self.progress(min(self.done, self.total), self.total)
        return storage_view(storage, value)

    def storage(self, key: str, shape) -> torch.Tensor:
        tensor = self.checkpoint.load(key, self.dtype)
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"{key} has another shape than the program gives it", expected=str(tuple(shape)), found=str(tuple(tensor.shape))
            )
        tensor = tensor.to(self.device)
        check_finite(tensor, key, self.checkpoint.name)
        return tensor


class RandomWeights(Loader):
    """Weights drawn from a seed, of a scale that keeps activations of order one; the same for any dtype and device order."""

    def __init__(self, seed: int, dtype: torch.dtype, device, **progress):
        super().__init__(None, dtype, device, **progress)
        self.seed = seed

    def storage(self, key: str, shape) -> torch.Tensor:
        generator = torch.Generator(device=self.device).manual_seed((self.seed << 32) + zlib.crc32(key.encode()))
        if len(shape) == 1:
            base = 0.0 if key.endswith("bias") else 1.0
            return (base + 0.1 * torch.randn(shape, generator=generator, device=self.device)).to(self.dtype)
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(0, 0.02 if shape[-1] > 1024 else shape[-1] ** -0.5, generator=generator)


def prepare(weight, loader: Loader, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of a module (see codegen.module.Weight): float tensors in the dtypes that the kernels read, contiguous."""
    value = weight.value
    types = dtypes(dtype)
    (tensor,) = evaluate(Graph(weight.name, (), (value,)), {}, loader, types, device=loader.device)
    if tensor.dtype == torch.int64:
        tensor = tensor.to(torch.int32)
    if tensor.dtype == torch.float64:
        tensor = tensor.to(torch.float32)
    if weight.packing is not None:
        tensor = pack(tensor, value, weight.packing)
    return tensor.contiguous()


def pack(tensor: torch.Tensor, value: Value, packing: dict) -> torch.Tensor:
    """[LEAVES, ROWS, K] from a matrix with axes `value.dims` (see codegen.contraction)."""
    names, k = list(value.names), packing["k"]
    tensor = tensor.permute([names.index(n) for n in (*packing["n_dims"], *packing["k_dims"])])
    matrix = tensor.reshape(math.prod(tensor.shape[: len(packing["n_dims"])]), k)
    columns = tuple(tuple(column) for column in packing["packing"])
    rows, missing = packed_rows(columns, packing["rows"], tensor.device)
    packed = matrix.index_select(0, rows)
    return (packed.index_fill_(0, missing, 0) if len(missing) else packed).view(packing["leaves"], packing["rows"], k)


@functools.lru_cache(maxsize=64)
def packed_rows(columns: tuple, rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(the row of the matrix that each packed row is, the packed rows that are none), int64. Like layers ask for the same."""
    found = torch.full((len(columns), rows), -1)
    for leaf, column in enumerate(columns):
        at = 0
        for offset, strides, sizes, first, count in column:
            flat = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(sizes, strides, strict=True):
                flat = flat[..., None] + torch.arange(size) * stride
            chosen = flat.reshape(-1)[first : first + count] + offset
            found[leaf, at : at + len(chosen)] = chosen
            at += count
    found = found.reshape(-1)
    return found.clamp(min=0).to(device), (found < 0).nonzero()[:, 0].to(device)


def checkpoint_shapes(values) -> dict[str, tuple[int, ...]]:
    """key -> storage shape of every checkpoint tensor that `values` are computed from."""
    table = {}
    for value in values:
        for v in cone(value, lambda v: False):
            if v.op == "weight":
                key, shape = v.attrs["key"], v.attrs["shape"]
                for i in range(shape[0]) if "{}" in key else (None,):
                    table[key if i is None else key.format(i)] = shape if i is None else shape[1:]
    return table
