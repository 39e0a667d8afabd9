"""The end of a step on the GPU: the best token of each row, from where the program kept it or from logits in memory, and then,
between two decode steps, what the next one starts from.

In torch the noise alone is thirty kernels; here it never leaves the registers. The arithmetic is that of sampling.gumbel, and of
StepBuffers.advance. Where the GPU can, a kernel is launched while the one before it drains, as the program's own are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fusec.runtime import drawing
from fusec.runtime.best_token import GREEDY_BELOW, LINE, SPREAD, keep_best, token_of
from fusec.runtime.capabilities import dependent_launch
from fusec.runtime.drawing import Drawing, places
from fusec.runtime.step_buffers import RING, StepBuffers

BLOCK = 4096  # logits of a row that a program reads
FEW_ROWS, SMALL_BLOCK = 4, 1024  # of so few rows, small blocks fill the GPU sooner
EMPTY = tl.constexpr(drawing.EMPTY)


@triton.jit
def _next(row, there, positions, context_lens, slots, tables, table_width, BLOCK_SIZE: tl.constexpr):
    """(context, position, slot) of rows when they have taken a token; a context of 1: the row is padding. Of what the last step
    wrote, and the host before this one began."""
    context = tl.load(context_lens + row, there, 0) + 1
    position = tl.load(positions + row, there, 0) + 1
    column = tl.minimum(position // BLOCK_SIZE, table_width - 1)  # as StepBuffers.slots_of
    block = tl.load(tables + row.to(tl.int64) * table_width + column, there, 0)
    return context, position, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _take(best, row, there, result):
    """The tokens of rows, -1 where a logit is NaN; their places are emptied."""
    place = best + (row // LINE * (SPREAD * LINE) + row % LINE)[None, :] + tl.arange(0, SPREAD)[:, None] * LINE
    chosen = token_of(tl.max(tl.load(place, there[None, :], EMPTY, cache_modifier=".cg"), 0))
    tl.debug_barrier()  # whoever empties a place comes after all who read it
    tl.store(place, EMPTY, there[None, :])
    tl.store(result + row, chosen, there)
    return chosen


@triton.jit
def _advance(row, there, chosen, context, position, slot, step, ids, positions, context_lens, slots, ring, cursor, ring_width,
             RING: tl.constexpr):  # fmt: skip
    """As StepBuffers.advance."""
    tl.store(ring + step * ring_width + row, chosen, there)
    alive = there & (context > 1)
    tl.store(ids + row, tl.maximum(chosen, 0), alive)
    tl.store(positions + row, position, alive)
    tl.store(context_lens + row, context, alive)
    tl.store(slots + row, slot, alive)
    tl.store(cursor, (step + 1) % RING)


@triton.jit(do_not_specialize=["rows"])
def _draw(logits, temperature, seed_low, seed_high, lengths, thresholds, V, row_stride, arrivals,
          best, result, ids, positions, context_lens, slots, tables, ring, cursor, rows, table_width, ring_width,
          DRAW: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
          ADVANCES: tl.constexpr, BLOCK_SIZE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """Of BLOCK logits of a row the best token. The last program to arrive ends the step for all rows, as _settle does.
    Nothing starts early either."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    own, row = tl.program_id(1) + tl.arange(0, 1), tl.arange(0, ROWS)
    there = row < rows
    if ADVANCES:
        step = tl.load(cursor)
        context, position, slot = _next(row, there, positions, context_lens, slots, tables, table_width, BLOCK_SIZE)
    if PDL:
        gdc_wait()
    score = tl.load(logits + own.to(tl.int64) * row_stride + token, token < V, -float("inf"))
    if FILTERS:  # divided exactly, as the thresholds were: the best token's score may be its own threshold
        heat = tl.load(temperature + own)
        dropped = (heat >= GREEDY_BELOW) & (tl.div_rn(score, heat) < tl.load(thresholds + own))
        score = tl.where(dropped, -float("inf"), score)
    keep_best(score, token, own, rows, best, temperature, seed_low, seed_high, lengths, DRAW, 1)
    tl.debug_barrier()  # what is kept comes before the one thread's release
    if tl.atomic_add(arrivals, 1, sem="acq_rel") != tl.num_programs(0) * tl.num_programs(1) - 1:
        return
    tl.store(arrivals, 0)
    chosen = _take(best, row, there, result)
    if ADVANCES:
        _advance(row, there, chosen, context, position, slot, step, ids, positions, context_lens, slots, ring, cursor, ring_width,
                 RING)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _settle(best, result, ids, positions, context_lens, slots, tables, ring, cursor, rows, table_width, ring_width,
            ADVANCES: tl.constexpr, BLOCK_SIZE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """One program: all rows take their tokens, and move on. It lets nothing start early: the next step reads contexts and history
    before it waits."""
    row = tl.arange(0, ROWS)
    there = row < rows
    if ADVANCES:
        step = tl.load(cursor)
        context, position, slot = _next(row, there, positions, context_lens, slots, tables, table_width, BLOCK_SIZE)
    if PDL:
        gdc_wait()
    chosen = _take(best, row, there, result)
    if ADVANCES:
        _advance(row, there, chosen, context, position, slot, step, ids, positions, context_lens, slots, ring, cursor, ring_width,
                 RING)  # fmt: skip


def draw(logits: torch.Tensor, params, lengths: torch.Tensor, *, noise: bool, thresholds: torch.Tensor | None,
         buffers: StepBuffers | None = None) -> torch.Tensor:  # fmt: skip
    """int32 [R]: the token of each row, -1 where its logits hold a NaN.

    logits: float32 [R, V], rows contiguous.  params, lengths, noise: as in Drawing.of.  thresholds: float32 [R], scores (logits
    over temperature) below which a row drops its tokens.  buffers: their first R rows take the tokens, as by StepBuffers.advance.
    """
    (rows, vocab_size), device = logits.shape, logits.device
    block = BLOCK if rows > FEW_ROWS else SMALL_BLOCK
    best = buffers.best if buffers else places(rows, device)
    how = Drawing.of(params, lengths, best, noise=noise)
    arrivals = buffers.arrivals if buffers else torch.zeros(1, dtype=torch.int32, device=device)
    result, arguments, named = _ending(best, rows, buffers)
    _draw[(triton.cdiv(vocab_size, block), rows)](
        logits, how.temperature, how.seed_low, how.seed_high, how.lengths, thresholds, vocab_size, logits.stride(0),
        arrivals, *arguments, DRAW=how.mode, FILTERS=thresholds is not None, BLOCK=block, **named,
    )  # fmt: skip
    return result


def settle(best: torch.Tensor, rows: int, buffers: StepBuffers | None = None) -> torch.Tensor:
    """The tokens of `rows` rows as by `draw`, when the best are kept in `best` (see Drawing); its places are empty again."""
    result, arguments, named = _ending(best, rows, buffers)
    _settle[(1,)](*arguments, **named, num_warps=min(16, max(1, named["ROWS"] // 4)))
    return result


def _ending(best: torch.Tensor, rows: int, b: StepBuffers | None) -> tuple[torch.Tensor, list, dict]:
    """(tokens to be, what both kernels take last, their last constants)."""
    result = torch.empty(rows, dtype=torch.int32, device=best.device)
    state = [b.ids, b.positions, b.context_lens, b.slots, b.tables, b.ring, b.cursor] if b else [None] * 7
    widths, block_size = ((b.tables.shape[1], b.ring.shape[1]), b.block_size) if b else ((0, 0), 1)
    pdl = dependent_launch(best.device)
    named = {"ADVANCES": b is not None, "BLOCK_SIZE": block_size, "RING": RING, "ROWS": triton.next_power_of_2(rows), "PDL": pdl}
    return result, [best, result, *state, rows, *widths], named | {"launch_pdl": pdl}
