"""Tiles: for each kernel and number of tokens, how its template is launched.

A table per GPU (`tables/*.json`, written by `fusec tune`) answers first; a shape it does not hold gets the choice of the cost
rule here, which needs no measurement. Keys are shapes, never model names.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

DEFAULT = "nvidia_h200"  # the table of a GPU that has none of its own


class Tile:
    """How one template is launched.  form: of the kernel that it is for (see contraction_kernel.FORMS)."""

    form: ClassVar[str]

    @property
    def table(self) -> str:
        """What its rows stand under in a GPU's table."""
        return type(self).__name__.lower()

    @property
    def pieces(self) -> tuple[int, ...]:
        """The rows of a tile of weights, as a kernel takes them."""
        return (self.block_n,)

    def constants(self, leaves: int, reductions: int) -> dict[str, int | bool]:
        """Launch constants of a kernel with so many leaves, that makes so many row reductions."""
        return {name.upper(): getattr(self, name) for name in ("block_m", "block_n", "block_k", "stages") if hasattr(self, name)}

    def options(self, leaves: int, reductions: int) -> dict[str, int]:
        """What Triton is told besides."""
        return {"num_warps": self.num_warps}


@dataclass(frozen=True)
class Gemv(Tile):
    """One token: rows and columns of a tile, warps a program, loads in flight.

    at_once: whether what the threads have of all leaves and row reductions is put together in one go. They meet less often, and
    the compiler spends fewer registers, for which it may delay loads.
    registers: a thread's, at most; 0 leaves it to the compiler, which may delay loads to save some. With a limit it takes what
    serves one program best, and fewer programs find room on a multiprocessor."""

    form = "gemv"
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    at_once: bool = False
    registers: int = 0

    def constants(self, leaves: int, reductions: int) -> dict[str, int | bool]:
        several = leaves + reductions > 1  # things to put together
        return super().constants(leaves, reductions) | ({"AT_ONCE": self.at_once} if several else {})

    def options(self, leaves: int, reductions: int) -> dict[str, int]:
        return super().options(leaves, reductions) | ({"maxnreg": self.registers} if self.registers else {})


@dataclass(frozen=True)
class Skinny(Tile):
    """A few tokens, up to `tokens`: tiles of tokens, rows and columns, programs that share a tile's K."""

    form = "skinny"
    tokens: int
    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    stages: int

    def constants(self, leaves: int, reductions: int) -> dict[str, int]:
        return super().constants(leaves, reductions) | {"SPLITS": self.splits}


@dataclass(frozen=True)
class Stream(Tile):
    """A few tokens on a Hopper GPU, up to `tokens`: rows and columns of a tile of weights, programs that share a tile's K,
    warps that multiply, places in the ring.

    The tensor cores take 64 of one operand at once and any multiple of eight of the other: of rows of weights the 64, and of
    tokens as many as the tile is for. Rows that are no power of two are for tokens as the 64 (the form "wide"), in pieces that
    are; it splits no K."""

    tokens: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    stages: int

    def __post_init__(self):
        if self.form == "wide" and (self.splits > 1 or len(self.pieces) > MOST_PIECES or self.pieces[-1] < 8):
            raise ValueError(f"a tile of {self.block_n} rows: expected a power of two, or a multiple of 8 that is the sum of at "
                             f"most {MOST_PIECES}, and then K in one part, found {self.splits}")  # fmt: skip

    @property
    def pieces(self) -> tuple[int, ...]:
        """The powers of two that the rows of a tile are multiplied in, the largest first."""
        return tuple(1 << bit for bit in reversed(range(self.block_n.bit_length())) if self.block_n >> bit & 1)

    @property
    def form(self) -> str:
        return "stream" if len(self.pieces) == 1 else "wide"

    @property
    def block_m(self) -> int:
        return self.tokens if self.form == "stream" else max(64, self.tokens)

    @property
    def least(self) -> int:
        """The fewest tokens it is for: fewer have a narrower tile. Of 8 and 16, that of 8 is asked first where there is one."""
        return 2 if self.tokens <= 16 else self.tokens // 2 + 1

    def place(self, leaves: int) -> int:
        """Bytes of a place of the ring."""
        return (leaves * self.block_n + self.block_m) * self.block_k * 2

    def constants(self, leaves: int, reductions: int) -> dict[str, int]:
        splits = {"SPLITS": self.splits} if self.form == "stream" else {}
        program = self.program(leaves, reductions)
        reducers = {"REDUCERS": program.reducers, "REDUCING": program.reducing} if program.reducers else {}
        return super().constants(leaves, reductions) | splits | reducers

    def options(self, leaves: int, reductions: int) -> dict[str, int]:
        return super().options(leaves, reductions) | {"maxnreg": self.program(leaves, reductions).registers}

    def accumulators(self, leaves: int) -> int:
        """float32 numbers of a thread that multiplies."""
        return leaves * self.block_n * self.block_m // (32 * self.num_warps)

    def program(self, leaves: int, reductions: int) -> StreamProgram:
        """What one of its programs consists of: no more registers than it needs, so that a neighbouring kernel finds room beside
        this one, and few enough for as many programs as there is shared memory for."""
        ring = self.stages * self.place(leaves)
        rooms = max(1, min(4, SHARED // (ring + 2048)))
        found = [StreamProgram(self, leaves, reductions, reducers, rooms) for reducers in ((4, 2) if reductions else (0,))]
        return next((p for p in found if p.registers * p.warps * 32 * rooms <= REGISTERS), found[0])


@dataclass(frozen=True)
class StreamProgram:
    """The warps of a stream's program, and their registers: `num_warps` of its tile multiply, one copies, and `reducers` make row
    reductions.  rooms: how many programs share a multiprocessor's memory."""

    tile: Stream
    leaves: int
    reductions: int
    reducers: int
    rooms: int

    @property
    def others(self) -> int:
        """Warps beside those that multiply, in whole warpgroups, in which all have as many registers."""
        return 8 if self.reducers == 4 else 4

    @property
    def warps(self) -> int:
        return self.tile.num_warps + self.others

    @property
    def reducing(self) -> int:
        """Registers of a thread that makes row reductions: what it has of a tile of x and of the results, and what it computes
        with."""
        part = self.tile.block_m * self.tile.block_k // (32 * max(1, self.reducers))
        return (part // 4 + self.reductions * max(1, part // 8) + 39) // 8 * 8 if self.reducers else 0

    @property
    def lent(self) -> int:
        """Registers times warps of those that do not multiply."""
        both = (COPY_REGISTERS + self.reducing) * 4
        return both if self.others == 8 else max(COPY_REGISTERS, self.reducing) * 4

    @property
    def registers(self) -> int:
        """A thread's, before the warps share them out."""
        t = self.tile
        wanted = (t.accumulators(self.leaves) + t.block_m + 64) * t.num_warps + self.lent
        width = t.block_m if t.form == "stream" else t.pieces[0]
        one = width // 2 + 32  # what an instruction needs that multiplies 64 of one operand by so many of the other
        return max(min(-(-wanted // self.warps) + 7, REGISTERS // (32 * self.warps * self.rooms)), one + 7) // 8 * 8

    @property
    def fits(self) -> bool:
        """Whether the threads that multiply have registers for their accumulators and what else there is, once the others have
        theirs."""
        if self.registers > 255 or self.registers * self.warps * 32 > REGISTERS:
            return False
        left = self.registers * self.warps - self.lent
        return self.tile.accumulators(self.leaves) + 56 <= min(255, left // self.tile.num_warps)


@dataclass(frozen=True)
class Matmul(Tile):
    """Many tokens: tiles of tokens, rows and columns; blocks of tokens that share weights in L2. tokens: up to how many
    (None: any)."""

    form = "matmul"
    tokens: int | None
    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    stages: int

    def constants(self, leaves: int, reductions: int) -> dict[str, int]:
        return super().constants(leaves, reductions) | {"GROUP": self.group}


def gemv(rows: int, k: int, leaves: int, itemsize: int = 2, gpu: str = DEFAULT) -> Gemv:
    """A tile of about 8 KB a warp group: a row is walked in few long steps, and small matrices are spread over all
    multiprocessors."""
    found = lookup(gpu, "gemv", rows, k, leaves, itemsize)
    if found:
        return Gemv(**found[0])
    block_k = min(2048, padded(k)) if k <= 2048 else next((b for b in (2048, 1024, 512) if k % b == 0), 1024)
    block_n = max(1, (8192 if itemsize == 2 else 4096) // (block_k * leaves))
    while block_n > 1 and rows // block_n < 4 * MULTIPROCESSORS:
        block_n //= 2
    return Gemv(block_n, block_k, 4, 1)


def skinny(rows: int, k: int, leaves: int, itemsize: int = 2, gpu: str = DEFAULT) -> tuple[Skinny, ...]:
    """Tall tiles of weights; K is split until every multiprocessor has a tile, and each program still has a few steps. A shape
    that was measured for some numbers of tokens has the rule for the others."""
    table = [Skinny(**row) for row in lookup(gpu, "skinny", rows, k, leaves, itemsize) or ()]
    for tokens in ruled(gpu, rows, k, leaves, itemsize):
        block_n = 32 if leaves == 1 else 16
        block_k = fit(k, 128 if tokens <= 32 and itemsize == 2 else 64)
        splits = 1
        while splits < 8 and -(-rows // block_n) * splits < MULTIPROCESSORS and k // (block_k * splits * 2) >= 4:
            splits *= 2
        table.append(Skinny(tokens, tokens, block_n, block_k, splits, 4, 4 if itemsize == 2 else 2))
    return tuple(sorted(table, key=lambda t: t.tokens))


def ruled(gpu: str, *shape: int) -> list[int]:
    """The numbers of tokens, of those that the rules of few have tiles for, that a shape was not measured for."""
    measured = {row["tokens"] for form in ("skinny", "stream") for row in lookup(gpu, form, *shape) or ()}
    return [tokens for tokens in (16, 32, 64) if tokens not in measured]


def stream(rows: int, k: int, leaves: int, itemsize: int = 2, gpu: str = DEFAULT) -> tuple[Stream, ...]:
    """Long steps along K; K is split until there are two programs a multiprocessor, a ring of half its shared memory each.
    Empty where K is no whole number of steps, which the copies must be. A number of tokens that a shape was measured for is
    streamed if that was faster than the skinny form."""
    if itemsize != 2 or k % 64:
        return ()
    table = [Stream(**row) for row in lookup(gpu, "stream", rows, k, leaves, itemsize) or ()]
    for tokens in ruled(gpu, rows, k, leaves, itemsize):
        block_n = 64
        block_k = fit(k, 128 if (leaves * block_n + tokens) * 128 * itemsize * 3 <= HALF else 64)
        steps, tiles = k // block_k, -(-rows // block_n)
        splits = max(1, min(2 * MULTIPROCESSORS // tiles, steps // 4))
        while splits > 1 and (splits - 1) * -(-steps // splits) >= steps:  # every program has a share
            splits -= 1
        place = (leaves * block_n + tokens) * block_k * itemsize
        stages = max(3, min(8, HALF // place))
        if stages * place > 2 * HALF:  # very many leaves: no ring fits
            continue
        table.append(Stream(tokens, block_n, block_k, splits, 4 if leaves * tokens < 64 else 8, stages))
    return tuple(sorted(table, key=lambda t: t.tokens))


def matmul(rows: int, k: int, leaves: int, itemsize: int = 2, gpu: str = DEFAULT) -> tuple[Matmul, ...]:
    """Square tiles for the tensor cores."""
    found = lookup(gpu, "matmul", rows, k, leaves, itemsize)
    if found:
        return tuple(Matmul(**row) for row in found)
    if itemsize == 4:
        return (Matmul(None, 64, max(16, 64 // leaves), fit(k, 32), 8, 4, 3),)
    return (Matmul(None, 128, max(16, 128 // leaves), fit(k, 64), 8, 8, 3),)


def vendor_from(rows: int, k: int, leaves: int, itemsize: int = 2, gpu: str = DEFAULT) -> int | None:
    """Above how many tokens the vendor's matmul, with what surrounds it in kernels of its own, is the faster one. None: never."""
    found = lookup(gpu, "vendor", rows, k, leaves, itemsize)
    return found[0]["tokens"] if found else VENDOR_FROM


VENDOR_FROM = 256
SHARED = 227 << 10  # bytes of a multiprocessor's memory that its programs may share
REGISTERS = 65536  # of a multiprocessor
MOST_PIECES = 3  # of a wide tile
COPY_REGISTERS = 40  # of a thread of the warp that copies, in a stream's program
HALF = 110 << 10  # bytes of shared memory of which a multiprocessor has room for two
MULTIPROCESSORS = 132


TABLES = Path(__file__).parent / "tables"


@functools.cache
def table(gpu: str) -> dict[str, list[dict]]:
    """A GPU's shipped table, else the default's: "form rows k leaves itemsize" -> rows of tiles, by number of tokens."""
    path = TABLES / f"{gpu}.json"
    return json.loads((path if path.is_file() else TABLES / f"{DEFAULT}.json").read_text())


def gpu_key(name: str) -> str:
    """"NVIDIA H200" -> nvidia_h200, the name of its table."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def lookup(gpu: str, form: str, *shape: int) -> list[dict] | None:
    return table(gpu).get(key(form, *shape))


def key(form: str, *shape: int) -> str:
    return " ".join(map(str, (form, *shape)))


def fit(k: int, block: int) -> int:
    """The largest power of two up to `block` that divides k, but at least 32 (then the last step is masked)."""
    while block > 32 and k % block:
        block //= 2
    return block


def padded(n: int) -> int:
    """The smallest power of two that holds n."""
    return 1 << (n - 1).bit_length()
