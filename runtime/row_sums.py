"""Row reductions on their way from the kernel that stores a value to the one that reads it (see codegen/row_sums.py)."""

from __future__ import annotations

import torch


class RowSums:
    """place: float32 [parts, reductions, tokens], one part a tile of the row.  parts: how many the last launch that stored the
    value has left; 0: none."""

    def __init__(self, elements: int, device):
        self.place = torch.empty(elements, dtype=torch.float32, device=device)
        self.parts = 0
