"""How the two attention kernels are launched: tiles, splits, warps and stages as pure functions of shapes.

The kernels are rendered from `templates/attention_decode.py.jinja` and `templates/attention_prefill.py.jinja` with an object `k`:

    k.name     the kernel's function name
    k.comment  lines for its head, such as the .fuse lines it implements
    k.score    code lines that read and update `s`, a float32 tile of q·k products before any scaling; they may read `q_pos` and
               `k_pos`, int32 tiles that broadcast to s. Scale, soft cap and position bias belong here
    k.mask     code lines that define `keep`, a bool tile, from q_pos and k_pos
    k.first    None, or an expression in q_pos: a lower bound, non-decreasing in q_pos, of the first position a query keeps
    k.causal   whether no position above q_pos is ever kept
    k.extra    names of further pointer parameters that score and mask lines read
    k.dense    optional: whether a query keeps exactly the positions from `first` (or 0) up to its own; lets the prefill kernel
               skip the mask of whole blocks. Without it, only the plain causal mask `keep = k_pos <= q_pos` counts as dense

One query token of a sequence is a row; the R query heads that share a KV head are packed into the rows of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel's launch: `kernel[grid](*buffers, **constants, num_warps=num_warps, num_stages=num_stages)`."""

    grid: tuple[int, int, int]
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int


def padded(n: int) -> int:
    """The smallest power of two that holds n."""
    return 1 << (n - 1).bit_length()


def decode_launch(batch: int, max_context: int, *, G: int, R: int, K: int, J: int, page: int, itemsize: int = 2,
                  multiprocessors: int = 132, pdl: bool = False) -> Launch:
    """The launch of the decode kernel for up to `batch` sequences of at most `max_context` tokens.

    Splits are fixed here, for a captured graph; each sequence's share of them is computed on the device from its own length.
    """
    size = max(padded(K), padded(J)) * itemsize  # bytes of a row of a tile
    block_n = 64 if size <= 256 else 32 if size <= 512 else 16
    rows = batch * G
    splits = 1
    while rows * splits < 2 * multiprocessors and splits < 32 and splits * block_n < max_context:
        splits *= 2
    constants = dict(G=G, R=R, K=K, J=J, PAGE=page, BLOCK_R=max(16, padded(R)), BLOCK_K=padded(K), BLOCK_J=padded(J),
                     BLOCK_N=block_n, SPLITS=splits, CHUNK=block_n, PDL=pdl)
    return Launch((G, batch, splits), constants, num_warps=4, num_stages=3)


def decode_scratch(launch: Launch) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each scratch buffer of `decode_launch`; arrivals starts at zero, the others hold anything."""
    G, batch, splits = launch.grid
    R, J = launch.constants["R"], launch.constants["J"]
    return {"partial": ((batch, G, splits, R, J), "float32"), "lse": ((batch, G, splits, R), "float32"),
            "arrivals": ((batch, G), "int32")}


def prefill_launch(batch: int, max_query: int, *, G: int, R: int, K: int, J: int, page: int, itemsize: int = 2,
                   pdl: bool = False) -> Launch:
    """The launch of the prefill kernel for `batch` sequences of at most `max_query` query tokens each."""
    size = max(padded(K), padded(J)) * itemsize
    block_m = max(16, padded(R), min(128, padded(max_query * R)))
    block_n = 64 if size <= 256 else 32 if size <= 512 else 16
    constants = dict(G=G, R=R, K=K, J=J, PAGE=page, BLOCK_M=block_m, BLOCK_K=padded(K), BLOCK_J=padded(J), BLOCK_N=block_n, PDL=pdl)
    tokens = block_m // R
    return Launch((G, batch, -(-max_query // tokens)), constants, num_warps=8 if block_m >= 128 else 4, num_stages=3)
