"""What `fusec tune` tries: tiles that could be the fastest for a shape, few enough to measure."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from . import schedule
from .attention_schedule import LITTLE, SLACK, Launch, decode_row, with_tile
from .schedule import MULTIPROCESSORS, REGISTERS, SHARED

FORMS = ("gemv", "skinny", "matmul")
TOKENS = {"gemv": (1,), "skinny": (8, 16, 32, 64, 128), "matmul": (4096,)}  # form -> numbers of tokens with tiles of their own
MOST, MOST_STREAMS = 36, 72  # tiles of a shape and number of tokens
LIMITS = (None, 128, 168, 200)  # registers of a thread of decode attention; up to four, three or two programs of four warps


def tiles_for(form: str, rows: int, k: int, leaves: int, itemsize: int, tokens: int, streams=False, beside: int = 0) -> list:
    """Tiles of a contraction kernel with a weight of leaves × [rows, k]. A few tokens may be streamed, if the kernel can be,
    and the most of them may want the next form.  streams: whether it can.  beside: row reductions that it has.

    The first is what the others' results are held to. The fewest tokens are streamed only: where no stream is for them, that for
    a few more stands before any other form."""
    if form == "skinny" and streams and tokens == min(TOKENS["skinny"]):
        return stream(rows, k, leaves, itemsize, tokens, beside)
    found = {"gemv": gemv, "skinny": skinny, "matmul": matmul}[form](rows, k, leaves, itemsize, tokens)
    if form == "skinny" and streams:
        streamed = stream(rows, k, leaves, itemsize, tokens, beside)
        streamed[12:12] = wide(rows, k, leaves, itemsize, tokens, beside)  # few shapes want it: behind the likeliest
        found = found[:1] + streamed + found[6::6]
    if form == "skinny" and tokens == max(TOKENS["skinny"]):
        found += [replace(tiles, tokens=2 * tokens) for tiles in matmul(rows, k, leaves, itemsize, tokens)]
    return found


def gemv(rows, k, leaves, itemsize, tokens) -> list[schedule.Gemv]:
    found = []
    for n, bk, warps, stages in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8), (1, 3)):
        elements, whole = n * bk * leaves / (warps * 32), bk >= k
        if bk > 2 * k or (whole and stages > 1) or not 16 <= elements <= 128 or (k % bk and not whole):
            continue
        found.append(schedule.Gemv(n, bk, warps, stages))
    return found


def variants(tile, leaves: int, beside: int) -> list:
    """A tile's own, to be tried where it is among the fastest: for one token how results are put together, and limits on
    registers, which decide how many programs share a multiprocessor and how many loads each has under way."""
    if tile.form != "gemv":
        return []
    ways = (False, True) if leaves + beside > 1 else (False,)
    found = [replace(tile, at_once=way, registers=limit) for way in ways for limit in (0, 64, 96, 128)]
    return [variant for variant in found if variant != tile]


def skinny(rows, k, leaves, itemsize, tokens) -> list[schedule.Skinny]:
    """Grids that run all at once, so that every program has an equal share of memory's bandwidth: a second, smaller wave would
    leave most multiprocessors idle."""
    found = []
    blocks = itertools.product((16, 32, 64, 128), (64, 128, 256), range(1, 17), (4, 8), (3, 4, 5))
    for n, bk, splits, warps, stages in blocks:
        tiles, threads = -(-rows // n), 32 * warps
        share = -(-k // (bk * splits)) * bk  # of k, a program
        # What Triton keeps: weights and x in every stage, x again where a reduction runs beside, and the accumulators.
        shared = stages * (n * leaves + 2 * tokens) * bk * itemsize
        registers = max(64, 2 * n * leaves * tokens // threads)
        resident = min(SHARED // shared, 2048 // threads, REGISTERS // (threads * registers))
        wave = MULTIPROCESSORS * resident
        fits = k % bk == 0 and 32 <= n * leaves <= 128 and (warps == 4 or n * leaves >= 64) and resident > 0
        splits_well = splits == 1 or share >= 2 * bk and (splits - 1) * share < k and tiles * splits <= wave
        enough = tiles * splits >= 0.7 * MULTIPROCESSORS or tiles * 16 < MULTIPROCESSORS
        # Many tokens are bound by arithmetic too, and a matrix of very many rows runs in many waves: the last is no matter there.
        one_wave = tiles <= wave or tiles > 4 * MULTIPROCESSORS or tokens > 32
        if fits and splits_well and enough and one_wave:
            found.append(schedule.Skinny(tokens, max(tokens, 16), n, bk, splits, warps, stages))
    found.sort(key=lambda t: (-t.block_n, t.splits, t.block_k))
    return found[:: -(-len(found) // MOST)] if found else []


def stream(rows, k, leaves, itemsize, tokens, beside) -> list[schedule.Stream]:
    """Rings of all of a multiprocessor's shared memory, or of a part, so that the next kernel finds room for its own; no second
    wave unless K is not split."""
    found = []
    heights = (16, 32, 64, 128, 256)
    widths = (64, 128, 256) if tokens <= 32 else (64, 128)
    parts = (SHARED, SHARED * 2 // 3, SHARED // 2)
    for n, bk, warps, room in itertools.product(heights, widths, (4, 8), parts):
        place, steps, tiles = (n * leaves + tokens) * bk * itemsize, k // bk, -(-rows // n)
        most = min((room - 4096) // place, 20 if place <= 10240 else 12)
        high = 64 if (leaves, n, bk) == (2, 32, 64) else n  # two leaves one below the other are multiplied as one
        if itemsize != 2 or k % bk or most < 2 or tokens * min(warps, high // 16) // warps < 8:
            continue
        if warps == 8 and n * leaves * tokens < 4096:  # nothing to share out
            continue
        for splits in sorted({1, 2, MULTIPROCESSORS // tiles, 2 * MULTIPROCESSORS // tiles} - {0}):
            share = -(-steps // splits)
            stages = min(most, share)
            slots = MULTIPROCESSORS * max(1, SHARED // (stages * place + 4096))
            idle = tiles * splits < 60 and splits < steps // 4
            if stages < 2 or (splits - 1) * share >= steps or tiles * splits > slots and splits > 1 or idle:
                continue
            tile = schedule.Stream(tokens, n, bk, splits, warps, stages)
            found += [tile] if tile.program(leaves, beside).fits and tile not in found else []
    found.sort(key=lambda t: (-t.stages * t.block_k * (leaves * t.block_n + tokens), t.block_n != 64, t.splits))
    return found[:MOST_STREAMS]


def wide(rows, k, leaves, itemsize, tokens, beside) -> list[schedule.Stream]:
    """As many rows a tile as make one wave of about as many programs as there are multiprocessors, where streams have no such
    tile; rings of all shared memory. Fewer than 32 tokens would be multiplied as 64."""
    found = []
    even = -(-rows // MULTIPROCESSORS)
    heights = sorted({-(-even // size) * size for size in (8, 16, 32)})
    heights = [n for n in heights if n < 512 and 2 <= n.bit_count() <= schedule.MOST_PIECES]  # no product is wider than 256
    for n, bk, warps in itertools.product(heights, (64, 128), (4, 8)):
        tile = schedule.Stream(tokens, n, bk, 1, warps, 2)
        stages = min((SHARED - 4096) // tile.place(leaves), k // bk, 12)
        tile = replace(tile, stages=stages)
        whole = itemsize == 2 and not k % bk and tokens >= 32 and stages >= 2
        shared_out = warps == 4 or tile.block_m == 128 or tile.pieces[-1] >= 16  # eight rows a warp at least
        if whole and shared_out and tile.program(leaves, beside).fits:
            found.append(tile)
    return found


def matmul(rows, k, leaves, itemsize, tokens) -> list[schedule.Matmul]:
    found = []
    for n, bk, warps, stages in itertools.product((64, 128, 256), (64,), (4, 8), (3, 4)):
        if not (k % bk or n == 256 and warps == 4 or n % leaves):
            found.append(schedule.Matmul(None, 128, n // leaves, bk, 8, warps, stages))
    return found


def decode_tiles(rule: Launch, sequences: int, context: int, itemsize: int) -> list[Launch]:
    """The rule's own launch of decode attention, then ways around it, the nearest first."""
    found, parts = [rule], rule.grid[1]
    row = max(rule.constants["BLOCK_K"], rule.constants["BLOCK_J"]) * itemsize
    for block_n, warps, stages in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8), (2, 3, 4)):
        shared = 2 * block_n * row * (stages - 1)  # keys and values
        # One token's neighbours are kernels with next to no shared memory: see attention_schedule.
        if shared > (LITTLE - SLACK if sequences == 1 else SHARED) or not 1024 <= block_n * row // warps <= 8192:
            continue
        alone = [(several, block_n) for several in (parts // 2, parts, 2 * parts) if several > 1]
        for several, chunk in alone if sequences == 1 else [(0, max(c, block_n)) for c in (256, 512, 1024)]:
            tile = dict(block_n=block_n, parts=several, chunk=chunk, num_warps=warps, num_stages=stages)
            launch = with_tile(rule.constants, tile, sequences, context, itemsize, MULTIPROCESSORS)
            found += [launch] if launch not in found else []
    return sorted(found, key=lambda launch: distance(launch, rule))


def decode_variants(launch: Launch, sequences: int, context: int, itemsize: int) -> list[Launch]:
    """A launch's own, as `variants` of a tile: with other limits on registers."""
    _, tile = decode_row(launch, sequences, context, itemsize)
    tiles = [tile | {"registers": limit} for limit in LIMITS]
    found = [with_tile(launch.constants, tile, sequences, context, itemsize, MULTIPROCESSORS) for tile in tiles]
    return [variant for variant in found if variant != launch]


def distance(launch: Launch, rule: Launch) -> float:
    """How many times a launch's tile, warps and parts would have to be doubled or halved, and a stage added, to be the rule's."""
    sizes = [(one.constants["BLOCK_N"], one.num_warps, one.grid[1], 2**one.num_stages) for one in (launch, rule)]
    return sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True))
