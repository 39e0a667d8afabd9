"""Of scores that lie in registers, the best token of each row. Generated kernels call keep_best, in Triton and in Gluon, and so
does the kernel for logits in memory."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fusec.runtime import drawing

GREEDY_BELOW = tl.constexpr(drawing.GREEDY_BELOW)
SPREAD = tl.constexpr(drawing.SPREAD)
LINE = tl.constexpr(drawing.LINE)


@triton.jit
def keep_best(score, token, row, rows, best, temperature, seed_low, seed_high, lengths, DRAW: tl.constexpr, AXIS: tl.constexpr):
    """Of a tile of scores the best token of each row, kept if it is better than what other programs have found so far.

    score: float32, a tile whose tokens lie along AXIS; token: its tokens, int32 in a shape that broadcasts to the tile's; row:
    its rows, one-dimensional, those from `rows` on are none. The others as in Drawing, mode DRAW. NaN beats all.
    """
    there = row < rows
    if DRAW == 2:
        heat = tl.load(temperature + row, there, 0).expand_dims(AXIS)
        length = tl.load(lengths + row, there, 0).to(tl.uint32)
        low = (tl.load(seed_low + row, there, 0).to(tl.uint32) + length * 0x85EBCA6B).expand_dims(AXIS)
        high = (tl.load(seed_high + row, there, 0).to(tl.uint32) ^ (length * 0xC2B2AE35)).expand_dims(AXIS)
        # One value after another: the noise of a whole tile needs several times its registers.
        score = tl.map_elementwise(noisy, score, token, heat, low, high)
    missing = score != score
    score = tl.where(missing, float("inf"), score)
    token = tl.where(missing, -1, token)
    highest = tl.max(score, AXIS)
    first = tl.min(tl.where(score == highest.expand_dims(AXIS), token, 0x7FFFFFFF), AXIS)
    place = best + row // LINE * (SPREAD * LINE) + tl.program_id(0) % SPREAD * LINE + row % LINE
    tl.atomic_max(place, key(highest, first), there, sem="relaxed")


@triton.jit
def noisy(score, token, heat, low, high):
    """Score over temperature, with noise; as it is in a greedy row. All of one value: the branch keeps them apart."""
    if heat >= GREEDY_BELOW:
        score = tl.div_rn(score, heat) + gumbel(token, low, high)
    return score


@triton.jit
def gumbel(token, low, high):
    """As sampling.gumbel, whose hash of seed and length `low` and `high` begin, uint32."""
    bits = _mix(_mix(token.to(tl.uint32) * 0x9E3779B1 + low) ^ high)
    uniform = ((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2 ** -31
    return -tl.log(-libdevice.log1p(-uniform))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def key(score, token):
    """int64 that are in order as the scores (no NaN), and the first of tokens with equal ones is the largest."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.uint32).to(tl.int64)


@triton.jit
def token_of(key):
    """The token of a key."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
