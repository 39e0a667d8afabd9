"""The end of a step on the GPU, in one kernel: noise, argmax and the check for NaN in one pass over the logits, and then, between
two decode steps, what the next one starts from.

In torch the noise alone is thirty kernels; here it never leaves the registers. The arithmetic is that of sampling.gumbel, and of
StepBuffers.advance. Where the GPU can, the kernel is launched while the one before it drains, as the program's own are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_wait

from fusec.runtime.capabilities import dependent_launch
from fusec.runtime.step_buffers import RING, StepBuffers

FEW_ROWS = 4  # up to so many, small blocks fill the GPU sooner; from then on, fewer programs finish earlier


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _draw(logits, temperature, thresholds, seed_low, seed_high, lengths, best_values, best_tokens, arrivals, result,
          ids, positions, context_lens, slots, tables, ring, cursor,
          V, row_stride, float_stride, int_stride, table_width, ring_width,
          DRAWS: tl.constexpr, FILTERS: tl.constexpr, GREEDY_BELOW: tl.constexpr, ADVANCES: tl.constexpr, SEVERAL: tl.constexpr,
          BLOCK_SIZE: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """Of BLOCK tokens of a row the best score, and its token; +inf and -1 where a logit is NaN. The last of a row's programs to
    arrive picks the best of them, and moves the row on. It lets nothing start early: the next step reads contexts and history
    before it waits."""
    block, row = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    if PDL and not ADVANCES:
        gdc_wait()  # the parameters may be as new as the logits
    if ADVANCES:  # what the last step wrote, and the host before this one began
        step = tl.load(cursor)
        context = tl.load(context_lens + row)
        position = tl.load(positions + row) + 1
        column = tl.minimum(position // BLOCK_SIZE, table_width - 1)  # as StepBuffers.slots_of
        slot = tl.load(tables + row.to(tl.int64) * table_width + column).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    if DRAWS:
        heat = tl.load(temperature + row * float_stride)
        length = tl.load(lengths + row).to(tl.uint32)
        low = tl.load(seed_low + row * int_stride).to(tl.uint32) + length * 0x85EBCA6B
        high = tl.load(seed_high + row * int_stride).to(tl.uint32) ^ (length * 0xC2B2AE35)
    if PDL and ADVANCES:
        gdc_wait()
    score = tl.load(logits + row.to(tl.int64) * row_stride + token, token < V, -float("inf"))
    missing = tl.max((score != score).to(tl.int32), 0)
    if DRAWS:
        if heat >= GREEDY_BELOW:
            score = score / heat
            if FILTERS:
                score = tl.where(score < tl.load(thresholds + row), -float("inf"), score)
            bits = _mix(_mix(token.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
            uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2 ** -31
            score = score - tl.log(-libdevice.log1p(-uniform))
    best, at = tl.max(score, 0, return_indices=True)
    blocks = tl.num_programs(0)
    tl.store(best_values + row * blocks + block, tl.where(missing > 0, float("inf"), best))
    tl.store(best_tokens + row * blocks + block, tl.where(missing > 0, -1, block * BLOCK + at))
    tl.debug_barrier()  # both stores come before the one thread's release
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") != blocks - 1:
        return
    tl.store(arrivals + row, 0)
    each = tl.arange(0, BLOCKS)
    value = tl.load(best_values + row * blocks + each, each < blocks, -float("inf"), cache_modifier=".cg")
    tokens = tl.load(best_tokens + row * blocks + each, each < blocks, 0, cache_modifier=".cg")
    _, at = tl.max(value, 0, return_indices=True)
    chosen = tl.sum(tl.where(each == at, tokens, 0), 0)
    tl.store(result + row, chosen)
    if ADVANCES:
        tl.store(ring + step * ring_width + row, chosen)
        if context > 0:
            tl.store(ids + row, tl.maximum(chosen, 0))
            tl.store(positions + row, position)
            tl.store(context_lens + row, context + 1)
            tl.store(slots + row, slot)
        if SEVERAL:  # rows: the step ends with the last of them
            rows = tl.num_programs(1)
            if tl.atomic_add(arrivals + rows, 1, sem="acq_rel") != rows - 1:
                return
            tl.store(arrivals + rows, 0)
        tl.store(cursor, (step + 1) % RING)


def draw(logits: torch.Tensor, params, positions: torch.Tensor, *, draws: bool, thresholds: torch.Tensor | None,
         buffers: StepBuffers | None = None) -> torch.Tensor:  # fmt: skip
    """int32 [R]: the token of each row, -1 where its logits hold a NaN.

    logits: float32 [R, V], rows contiguous.  params: SamplingTensors.  draws: some row's temperature is not 0.  thresholds:
    float32 [R], scores (logits over temperature) below which a row drops its tokens.  buffers: their first R rows take the
    tokens, as by StepBuffers.advance.
    """
    from fusec.runtime.sampling import GREEDY_BELOW

    (rows, vocab_size), device = logits.shape, logits.device
    block, pdl = 1024 if rows <= FEW_ROWS else 4096, dependent_launch(device)
    blocks = triton.cdiv(vocab_size, block)
    values = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    result = torch.empty(rows, dtype=torch.int32, device=device)
    if b := buffers:
        arrivals, state = b.arrivals, [b.ids, b.positions, b.context_lens, b.slots, b.tables, b.ring, b.cursor]
        widths, block_size = (b.tables.shape[1], b.ring.shape[1]), b.block_size
    else:
        arrivals, state = torch.zeros(rows, dtype=torch.int32, device=device), [None] * 7
        widths, block_size = (0, 0), 0
    _draw[(blocks, rows)](
        logits, params.temperature, thresholds, params.seed_low, params.seed_high, positions, values, tokens, arrivals, result,
        *state, vocab_size, logits.stride(0), params.temperature.stride(0), params.seed_low.stride(0), *widths,
        DRAWS=draws, FILTERS=thresholds is not None, GREEDY_BELOW=GREEDY_BELOW, ADVANCES=buffers is not None, SEVERAL=rows > 1,
        BLOCK_SIZE=block_size, RING=RING, BLOCK=block, BLOCKS=triton.next_power_of_2(blocks), PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return result
