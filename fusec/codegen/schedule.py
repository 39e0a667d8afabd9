"""Tiles: for each kernel and number of tokens, how its template is launched.

A table per GPU (`tables/*.json`, written by `fusec tune`) answers first; a shape it does not hold gets the choice of the cost rule here,
which needs no measurement. Keys are shapes, never model names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Gemv:
    """One token: rows and columns of a tile, warps a program, loads in flight."""

    block_n: int
    block_k: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class Matmul:
    """Several tokens, up to `tokens` of them (None: any number)."""

    tokens: int | None
    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    stages: int

    def as_dict(self):
        return asdict(self)


def gemv(rows: int, k: int, leaves: int, itemsize: int = 2) -> Gemv:
    """A tile of about 8 KB a warp group: a row is walked in few long steps, and small matrices are spread over all multiprocessors."""
    block_k = min(2048, padded(k)) if k <= 2048 else next((b for b in (2048, 1024, 512) if k % b == 0), 1024)
    per_program = 8192 if itemsize == 2 else 4096  # elements in flight
    block_n = max(1, per_program // (block_k * leaves))
    while block_n > 1 and rows // block_n < 4 * 132:
        block_n //= 2
    return Gemv(block_n, block_k, 4, 1)


def matmul(rows: int, k: int, leaves: int, itemsize: int = 2) -> tuple[Matmul, ...]:
    """Few tokens: narrow tiles, so that every multiprocessor reads weights. Many: square ones for the tensor cores."""
    def fit(block):
        return next(b for b in (block, 128, 64, 32, 16) if b <= block and (k % b == 0 or b == 16))

    narrow = 16 if rows < 64 * 132 else 32
    if itemsize == 4:
        return (Matmul(16, 16, narrow, fit(64), 1, 4, 3), Matmul(64, 32, 32, fit(32), 1, 4, 3), Matmul(None, 64, 64 // leaves, fit(32), 8, 4, 3))
    return (
        Matmul(16, 16, narrow, fit(256 if leaves == 1 else 128), 1, 4, 4),
        Matmul(64, 64, 64 // leaves if leaves > 1 else 32, fit(128), 1, 4, 4),
        Matmul(None, 128, 128 // min(leaves, 2), fit(64), 8, 8, 3),
    )


def padded(n: int) -> int:
    """The smallest power of two that holds n."""
    return 1 << (n - 1).bit_length()
