"""The kernel that ends a step, under Triton's interpreter: tests/runtime/test_graphs.py has it on a GPU, where it also draws."""

from types import SimpleNamespace

import pytest
import torch
from interpret import INTERPRETED, run_interpreted

if INTERPRETED:
    from fusec.runtime.draw import draw
    from fusec.runtime.drawing import NONE
    from fusec.runtime.step_buffers import RING, StepBuffers

    STATE = ("ids", "positions", "context_lens", "slots", "ring", "cursor")

    def filled():
        """Six rows whose tables are full, or nearly, or empty; the third is padding."""
        buffers = StepBuffers(6, 3, 4, torch.device("cpu"))
        buffers.tables.copy_(torch.arange(18).view(6, 3) + 7)
        buffers.begin(torch.arange(6), torch.arange(6, dtype=torch.int32), torch.tensor([3, 11, 0, 10, 0, 7], dtype=torch.int32))
        buffers.clear(2)
        return buffers

    def greedy(rows):
        zeros = torch.zeros(rows, dtype=torch.int32)
        return SimpleNamespace(temperature=torch.zeros(rows), seed_low=zeros, seed_high=zeros)

    @pytest.mark.parametrize("rows", [1, 3, 6])
    def test_rows_move_on_with_their_tokens(rows):
        ours, theirs = filled(), filled()
        generator = torch.Generator().manual_seed(rows)
        for step in range(RING + 2):
            logits = torch.randn(rows, 5000, generator=generator)
            logits[0, 4097] = torch.nan if step == 1 else 9
            logits[rows - 1, [17, 4500]] = 11  # the first of equals
            tokens = draw(logits, greedy(rows), ours.context_lens[:rows], draws=False, thresholds=None, buffers=ours)
            assert tokens[rows - 1] == (17 if rows > 1 or step != 1 else -1)
            assert rows == 1 or tokens[0] == (-1 if step == 1 else 4097)
            theirs.advance(tokens)
            for name in STATE:
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert (ours.best == NONE).all() and not ours.arrivals.any()

    def test_without_buffers_only_the_tokens_are_found():
        logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw(logits, greedy(5), torch.zeros(5), draws=False, thresholds=None), logits.argmax(1).int())

else:

    def test_interpreted():
        run_interpreted(__file__)
