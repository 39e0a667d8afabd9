"""The kernel that ends a step, under Triton's interpreter: tests/runtime/test_graphs.py has it on a GPU, where it also draws."""

from types import SimpleNamespace

import pytest
import torch
from interpret import INTERPRETED, run_interpreted

if INTERPRETED:
    from fusec.runtime.draw import draw, settle
    from fusec.runtime.drawing import EMPTY, SPREAD
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
            tokens = draw(logits, greedy(rows), ours.context_lens[:rows], noise=False, thresholds=None, buffers=ours)
            assert tokens[rows - 1] == (17 if rows > 1 or step != 1 else -1)
            assert rows == 1 or tokens[0] == (-1 if step == 1 else 4097)
            theirs.advance(tokens)
            for name in STATE:
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert (ours.best == EMPTY).all() and not ours.arrivals.any()

    @pytest.mark.parametrize("rows", [2, 6])
    def test_rows_move_on_with_what_a_program_kept(rows):
        """Tokens from their places, several of which hold something; of equals the first, of NaN none."""
        ours, theirs = filled(), filled()
        generator = torch.Generator().manual_seed(rows)
        for step in range(RING + 2):
            logits = torch.randn(rows, SPREAD * 4, generator=generator)
            logits[rows - 1, [17, 90]] = 11
            logits[0, 5] = torch.nan if step == 1 else -20
            expected = torch.where(logits.isnan().any(1), -1, logits.argmax(1)).int()
            scores = torch.where(logits.isnan(), torch.inf, logits)
            bits = scores.view(torch.int32)
            tokens = torch.where(logits.isnan(), -1, torch.arange(SPREAD * 4))
            keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0x7FFFFFFF - tokens)
            ours.best[0, :, :rows] = keys.view(rows, 4, SPREAD).amax(1).T
            assert torch.equal(settle(ours.best, rows, ours), expected)
            theirs.advance(expected)
            for name in STATE:
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert (ours.best == EMPTY).all()

    def test_without_buffers_only_the_tokens_are_found():
        logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw(logits, greedy(5), torch.zeros(5), noise=False, thresholds=None), logits.argmax(1).int())

else:

    def test_interpreted():
        run_interpreted(__file__)
