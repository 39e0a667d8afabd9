"""What a program is given so that it draws the tokens of a step where it makes their logits, which then need no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GREEDY_BELOW = 1e-5  # a smaller temperature is greedy
SPREAD = 32  # places of each row: programs that find their best tokens at one time do not wait for one another
LINE = 16  # rows whose places lie side by side, in one line of the cache
EMPTY = -(2**63)  # in a place: nothing was found


@dataclass
class Drawing:
    """How the tokens of R rows are drawn, all tensors on the program's device. By default they are not: the logits are stored,
    as those of one row always are.

    mode       0: they are stored; 1: each row takes its best token; 2: scores over temperature, with Gumbel noise
    best       int64 [⌈R / LINE⌉, SPREAD, LINE], EMPTY before: the best that was found, in keep_best.key's order
    temperature   float32 [R]; a row below GREEDY_BELOW is greedy
    seed_low, seed_high, lengths   int32 [R], of sampling.gumbel
    """

    mode: int = 0
    best: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    seed_low: torch.Tensor | None = None
    seed_high: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @classmethod
    def of(cls, params, lengths: torch.Tensor, best: torch.Tensor, *, noise: bool) -> Drawing:
        """params: SamplingTensors.  noise: whether some row's temperature is not 0."""
        return cls(1 + noise, best, params.temperature, params.seed_low, params.seed_high, lengths)


NOTHING = Drawing()


def places(rows: int, device) -> torch.Tensor:
    """Drawing.best for up to `rows` rows."""
    import torch

    return torch.full((-(-rows // LINE), SPREAD, LINE), EMPTY, dtype=torch.int64, device=device)
