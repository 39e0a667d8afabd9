"""StepBuffers.advance on the GPU, as one kernel: between two decode steps there is nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fusec.runtime.capabilities import dependent_launch


@triton.jit
def _advance(tokens, ids, positions, context_lens, slots, tables, ring, cursor, n, width, num_rows,
             BLOCK_SIZE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    here = row < n
    context = tl.load(context_lens + row, here, 0)
    alive = here & (context > 0)
    position = tl.load(positions + row, alive, 0) + 1
    block = tl.load(tables + row.to(tl.int64) * width + tl.minimum(position // BLOCK_SIZE, width - 1), alive, 0)
    step = tl.load(cursor)
    if PDL:  # all that was read so far is the last step's
        gdc_wait()  # but it lets nothing start early: the next step reads contexts and history before it waits
    token = tl.load(tokens + row, here, 0)
    tl.store(ids + row, tl.maximum(token, 0), alive)
    tl.store(positions + row, position, alive)
    tl.store(context_lens + row, context + 1, alive)
    tl.store(slots + row, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, alive)
    tl.store(ring + step * num_rows + row, token, here)
    tl.debug_barrier()
    tl.store(cursor, (step + 1) % RING)


def advance(buffers, tokens) -> None:
    """As StepBuffers.advance; tokens int32 [n] on the GPU."""
    from fusec.runtime.step_buffers import RING

    n, (num_rows, width), pdl = len(tokens), buffers.tables.shape, dependent_launch(tokens.device)
    _advance[(1,)](tokens, buffers.ids, buffers.positions, buffers.context_lens, buffers.slots, buffers.tables, buffers.ring,
                   buffers.cursor, n, width, num_rows, BLOCK_SIZE=buffers.block_size, RING=RING,
                   ROWS=triton.next_power_of_2(n), PDL=pdl, launch_pdl=pdl)  # fmt: skip
