"""The state of a decode step, kept on the device from one step to the next."""

from __future__ import annotations

import torch

from fusec.runtime.batch import Batch
from fusec.runtime.drawing import EMPTY, places

RING = 8  # steps whose tokens may wait to be read


class StepBuffers:
    """One row per running sequence: its newest token, where that token goes, and its blocks. The first n rows are a batch.

    A decode step reads these tensors, and `advance` writes the next step's values into them, so that steps of the same sequences
    follow one another with nothing from the host. The addresses never change, which is what a CUDA graph needs.

    tables   int32 [rows, M]    cache blocks
    ring     int32 [RING, rows] tokens sampled by the last steps; step `cursor % RING` is written next
    best     see Drawing        empty between steps
    arrivals int32 [1]          of draw.draw on a GPU: zero between its launches
    the others as in Batch
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device):
        def zeros(*shape, dtype=torch.int32):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.block_size = block_size
        self.ids, self.positions, self.context_lens = zeros(num_rows), zeros(num_rows), zeros(num_rows)
        self.slots = zeros(num_rows, dtype=torch.int64) - 1
        self.tables = zeros(num_rows, max_blocks)
        self.ring, self.cursor = zeros(RING, num_rows), zeros(1, dtype=torch.int64)
        self.best, self.arrivals = places(num_rows, device), zeros(1)
        self.query_starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self.rows = torch.arange(num_rows, dtype=torch.int32, device=device)

    def batch(self, count: int, max_context: int) -> Batch:
        """The decode step of the first `count` rows, as views."""
        return Batch(
            ids=self.ids[:count], positions=self.positions[:count], slots=self.slots[:count],
            query_starts=self.query_starts[: count + 1], context_lens=self.context_lens[:count],
            block_tables=self.tables[:count], rows=self.rows[:count], max_query=1, max_context=max_context,
            every=True,
        )

    def advance(self, tokens: torch.Tensor) -> None:
        """Make the tokens just sampled the input of the next step.  tokens: int32 [n], of the first n rows; -1 is no token.

        On a GPU draw.draw and draw.settle do the same."""
        n = len(tokens)
        alive = self.context_lens[:n] > 0
        self.ids[:n] = torch.where(alive, tokens.clamp(min=0), self.ids[:n])
        self.positions[:n] += alive
        self.context_lens[:n] += alive
        self.slots[:n] = torch.where(alive, self.slots_of(self.rows[:n], self.positions[:n]), -1)
        self.ring[self.cursor, :n] = tokens
        self.cursor.add_(1).remainder_(RING)

    def begin(self, rows: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Let rows decode: their newest tokens, and how many tokens came before.  All int32 [n]."""
        rows = rows.long()
        self.ids[rows] = tokens.clamp(min=0)
        self.positions[rows] = lengths
        self.context_lens[rows] = lengths + 1
        self.slots[rows] = self.slots_of(rows, lengths)

    def slots_of(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64: the cache slots of tokens, given their rows and positions."""
        # a sequence's last token is never computed, and may lie past the table
        column = (positions // self.block_size).clamp(max=self.tables.shape[1] - 1)
        return self.tables[rows.long(), column.long()].long() * self.block_size + positions % self.block_size

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Give the places of some rows to others, all at once.  Both int64 [n]."""
        for tensor in (self.ids, self.positions, self.context_lens, self.slots, self.tables):
            tensor[targets] = tensor[sources]

    def restart(self) -> None:
        """Every row is padding and nothing is under way, whatever a step that failed has left."""
        self.clear(slice(None))
        self.best.fill_(EMPTY)
        self.arrivals.zero_()

    def clear(self, row: int | slice) -> None:
        """Make a row padding."""
        self.context_lens[row] = 0
        self.positions[row] = 0
        self.ids[row] = 0
        self.slots[row] = -1
