"""A plain reduction: nothing reads memory faster, so this is what a card's bandwidth is worth in practice."""

import triton
import triton.language as tl


@triton.jit
def read(x, out, n, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(start, n, PROGRAMS * BLOCK, num_stages=4):
        acc += tl.load(x + i + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(acc))
