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
    k.heads    None, or what makes the query's rows and the newest key of a token and kv head in the decode kernel: the text of a
               function `NAME_heads(pointers…, b, g)` and its pointers (see launches.heads); the kernel reads back what it stores

One query token of a sequence is a row; the R query heads that share a KV head are packed into the rows of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import schedule
from .schedule import REGISTERS, SHARED, padded

# Bytes of shared memory up to which Triton leaves a multiprocessor's split between L1 and shared memory alone. Beyond, it asks
# for the largest share, and to change the split may cost a wait: two kernels on different sides of this limit seem not to
# overlap (inferred, not isolated: docs/performance.md).
LITTLE = 48 << 10
SLACK = 8 << 10  # bytes of a program beside its tiles of history: the query, scores, what Triton converts
WHOLE = 228 << 10  # bytes of a multiprocessor's memory that can be shared memory


@dataclass(frozen=True)
class Launch:
    """One kernel's launch: `kernel[launch.grid](*buffers, **launch.constants, **launch.options)`, and
    `share_memory(what that gave back, launch.shared)`."""

    grid: tuple[int, ...]
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    shared: int | None = None  # percent of a multiprocessor's memory to be shared memory, the rest L1; None: left to the driver

    @property
    def options(self) -> dict[str, int | bool | None]:
        """What Triton's launcher takes besides the kernel's own parameters."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg, launch_pdl=self.constants["PDL"])


def decode_launch(
    batch: int,
    max_context: int,
    *,
    G: int,
    R: int,
    K: int,
    J: int,
    page: int,
    itemsize: int = 2,
    multiprocessors: int = 132,
    pdl: bool = False,
    gpu: str = schedule.DEFAULT,
) -> Launch:
    """The launch of the decode kernel for `batch` sequences (padding rows included) of at most `max_context` tokens.

    How many programs there are is fixed here, for a captured graph; which sequence each works on, and on how much of it, is
    computed on the device from the lengths of all.
    A row of the GPU's table (see schedule) answers first, then `decode_rule`.
    """
    rows = schedule.lookup(gpu, "decode", G, R, K, J, itemsize) or ()
    rows = [row for row in rows if (row["sequences"] == 1) == (batch == 1)]  # one sequence is another kind of work
    tile = next((row for row in rows if row["sequences"] >= batch and row["context"] >= max_context), None)
    if tile is None:
        width = max(padded(K), padded(J)) * itemsize
        tile = decode_rule(batch, max_context, G=G, R=R, width=width, multiprocessors=multiprocessors)
    constants = dict(G=G, R=R, K=K, J=J, PAGE=page, BLOCK_R=max(16, padded(R)), BLOCK_K=padded(K), BLOCK_J=padded(J), PDL=pdl)
    return with_tile(constants, tile, batch, max_context, itemsize, multiprocessors)


def with_tile(constants: dict, tile: dict, batch: int, max_context: int, itemsize: int, multiprocessors: int = 132) -> Launch:
    """The launch of the decode kernel with a tile: block_n, chunk, num_warps, num_stages, parts if there is one sequence, and
    registers, a thread's at most, if the compiler should not choose."""
    G, block_n, registers = constants["G"], tile["block_n"], tile.get("registers")
    warps = REGISTERS // (32 * (registers or 255))  # that find registers on a multiprocessor
    shared = 2 * block_n * max(constants["BLOCK_K"], constants["BLOCK_J"]) * itemsize * (tile["num_stages"] - 1)
    programs = multiprocessors * max(1, min(SHARED // shared, warps // tile["num_warps"]))  # by shared memory, by registers
    parts = tile["parts"]
    if batch > 1:  # more than the device will ever share out: see the template
        most = batch * -(-max_context // block_n) // max(1, tile["chunk"] // block_n)
        parts = batch + max(-(-programs // G), min(-(-4 * programs // G), most))
    constants = constants | dict(BLOCK_N=block_n, PARTS=parts, CHUNK=tile["chunk"], BATCH=padded(batch), PROGRAMS=programs)
    share = None
    if constants["PDL"]:  # neighbours may overlap: of one sequence, what its programs need; of more, what the kernels beside have
        wanted = -(-G * parts // multiprocessors) * (shared + SLACK) if batch == 1 else WHOLE
        share = min(100, -(-100 * wanted // WHOLE))
    return Launch((G, parts), constants, tile["num_warps"], tile["num_stages"], maxnreg=registers, shared=share)


def decode_rule(batch: int, max_context: int, *, G: int, R: int, width: int, multiprocessors: int) -> dict[str, int]:
    """The tile of decode attention without a table.  width: bytes of one position's keys.

    Measured on an H200 with 32 query heads, 8 KV heads of 128. One sequence's neighbours in a step are matrix-vector kernels, and
    what needs more than LITTLE shared memory cannot share a multiprocessor with them. With more sequences, small tiles of few
    warps win: several programs a multiprocessor hide each other's latency.
    """
    pairs = batch * G
    if batch == 1:  # long contexts: two programs a multiprocessor, as one keeps too few loads in flight
        several = 1 << (multiprocessors // pairs or 1).bit_length() - 1  # programs a pair that fill the GPU
        block_n, num_warps, num_stages, parts = 16384 // width, 4, 2, several * (2 if max_context > 1024 else 1)
    else:
        block_n, num_warps, num_stages, parts = 32, 2, 4, 0
    wide = (max(1, width // 256) if batch > 1 else 1) * max(1, padded(R) // 16)
    block_n = max(16, block_n // wide)
    num_warps = num_warps if wide == 1 else 4 if R <= 32 else 8
    chunk = block_n if batch == 1 else max(512 if pairs <= 2 * multiprocessors else 1024, block_n)
    parts = min(parts, 64, padded(-(-max_context // block_n)))
    return dict(block_n=block_n, parts=parts, chunk=chunk, num_warps=num_warps, num_stages=num_stages)


def decode_row(launch: Launch, sequences: int, context: int, itemsize: int) -> tuple[str, dict]:
    """(key, row) of the table that makes `decode_launch` answer `launch` for up to so many sequences of so many tokens."""
    c = launch.constants
    row = dict(sequences=sequences, context=context, block_n=c["BLOCK_N"], parts=c["PARTS"] if sequences == 1 else 0,
               chunk=c["CHUNK"], num_warps=launch.num_warps, num_stages=launch.num_stages)
    row |= {"registers": launch.maxnreg} if launch.maxnreg else {}
    return schedule.key("decode", c["G"], c["R"], c["K"], c["J"], itemsize), row


def decode_scratch(launch: Launch, sequences: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each scratch buffer of a decode launch; arrivals starts at zero, the others hold anything.

    Launches that run one after another may share them (buffers of the larger size).
    """
    G, parts = launch.grid
    R, J = launch.constants["R"], launch.constants["J"]
    return {
        "partial": ((G, parts, R, J), "float32"),
        "lse": ((G, parts, R), "float32"),
        "arrivals": ((sequences, G), "int32"),
    }


def prefill_launch(
    batch: int, max_query: int, *, G: int, R: int, K: int, J: int, page: int, itemsize: int = 2, pdl: bool = False
) -> Launch:
    """The launch of the prefill kernel for `batch` sequences of at most `max_query` query tokens each.

    Two programs a multiprocessor, at 128 registers a thread, hide each other's softmax: measured faster on an H200 than one
    program with the registers that it would like.
    """
    row = max(padded(K), padded(J)) * itemsize
    block_m = max(16, padded(R), min(128 if row <= 512 else 64, padded(max_query * R)))
    block_n = 64 if row <= 256 else 32 if row <= 512 else 16
    large, narrow = block_m == 128, row <= 256
    constants = dict(
        G=G, R=R, K=K, J=J, PAGE=page, BLOCK_M=block_m, BLOCK_K=padded(K), BLOCK_J=padded(J), BLOCK_N=block_n, PDL=pdl
    )
    return Launch(
        (G, batch, -(-max_query // (block_m // R))),
        constants,
        num_warps=8 if large else 4,
        num_stages=2 if large and narrow else 3,
        maxnreg=128 if large and narrow else None,
    )
