"""The sampler's last step on the GPU: noise, argmax and the check for NaN in one pass over the logits.

In torch the noise alone is thirty kernels; here it never leaves the registers. The arithmetic is that of sampling.gumbel.
Where the GPU can, the kernels are launched while the one before them drains, as the program's own are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusec.runtime.capabilities import dependent_launch

BLOCK = 1024


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _best_of_blocks(logits, temperature, thresholds, seed_low, seed_high, positions, values, tokens,
                    V, blocks, row_stride, float_stride, int_stride,
                    DRAWS: tl.constexpr, FILTERS: tl.constexpr, GREEDY_BELOW: tl.constexpr, BLOCK: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """The best score of BLOCK tokens of a row, and its token; +inf and -1 where a logit is NaN."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, block = tl.program_id(1), tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row.to(tl.int64) * row_stride + token, token < V, -float("inf"))
    missing = tl.max((score != score).to(tl.int32), 0)
    if DRAWS:
        heat = tl.load(temperature + row * float_stride)
        if heat >= GREEDY_BELOW:
            score = score / heat
            if FILTERS:
                score = tl.where(score < tl.load(thresholds + row), -float("inf"), score)
            position = tl.load(positions + row).to(tl.uint32)
            low = tl.load(seed_low + row * int_stride).to(tl.uint32) + position * 0x85EBCA6B
            high = tl.load(seed_high + row * int_stride).to(tl.uint32) ^ (position * 0xC2B2AE35)
            bits = _mix(_mix(token.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
            uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2 ** -31
            score = score - tl.log(-libdevice.log1p(-uniform))
    best, at = tl.max(score, 0, return_indices=True)
    tl.store(values + row * blocks + block, tl.where(missing > 0, float("inf"), best))
    tl.store(tokens + row * blocks + block, tl.where(missing > 0, -1, block * BLOCK + at))


@triton.jit
def _best_of_rows(values, tokens, result, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    value = tl.load(values + row * blocks + block, block < blocks, -float("inf"))
    _, at = tl.max(value, 0, return_indices=True)
    tl.store(result + row, tl.load(tokens + row * blocks + at))


def draw(logits: torch.Tensor, params, positions: torch.Tensor, *, draws: bool, thresholds: torch.Tensor | None) -> torch.Tensor:
    """int32 [R]: the token of each row, -1 where its logits hold a NaN.

    logits: float32 [R, V], rows contiguous.  params: SamplingTensors.  draws: some row's temperature is not 0.  thresholds:
    float32 [R], scores (logits over temperature) below which a row drops its tokens.
    """
    from fusec.runtime.sampling import GREEDY_BELOW

    (rows, vocab_size), device = logits.shape, logits.device
    blocks, pdl = triton.cdiv(vocab_size, BLOCK), dependent_launch(device)
    values = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    result = torch.empty(rows, dtype=torch.int32, device=device)
    _best_of_blocks[(blocks, rows)](
        logits, params.temperature, thresholds, params.seed_low, params.seed_high, positions, values, tokens, vocab_size, blocks,
        logits.stride(0), params.temperature.stride(0), params.seed_low.stride(0), DRAWS=draws,
        FILTERS=thresholds is not None, GREEDY_BELOW=GREEDY_BELOW, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    _best_of_rows[(rows,)](values, tokens, result, blocks, BLOCKS=triton.next_power_of_2(blocks), PDL=pdl, launch_pdl=pdl)
    return result
