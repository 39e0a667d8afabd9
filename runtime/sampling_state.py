"""The sampling parameters of every row of the runner, kept on the device for as long as a sequence has that row."""

from __future__ import annotations

import numpy as np
import torch

from fusec.runtime.sampling import SamplingTensors, seed_words
from fusec.runtime.scheduler import Sequence

FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
INTS = ("top_k", "seed_low", "seed_high", "min_length")
STOPS = 64  # columns of SamplingTensors.stops


class SamplingState:
    """SamplingTensors of all rows, each field by itself. What is as wide as the vocabulary is allocated when the first sequence
    needs it."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self.num_rows, self.vocab_size, self.device = num_rows, vocab_size, device
        self.floats = torch.zeros(len(FLOATS), num_rows, device=device)  # temperature 0: rows nobody has are greedy
        self.ints = torch.zeros(len(INTS) + STOPS, num_rows, dtype=torch.int32, device=device)
        self.wide: dict[str, torch.Tensor] = {}

    def seat(self, rows: range, sequences: list[Sequence], upload) -> None:
        """Write the parameters of the sequences that now have `rows`.  upload: numpy array -> device tensor."""
        at = upload(np.array(rows, np.int64))
        self.floats[:, at] = upload(np.array([_floats(sequence) for sequence in sequences], np.float32)).T
        self.ints[:, at] = upload(np.array([_ints(sequence) for sequence in sequences], np.int32)).T
        for row, sequence in zip(rows, sequences, strict=True):
            if sequence.params.variant.adjusted:
                self._seat_wide(row, sequence, upload)

    def _seat_wide(self, row, sequence, upload):
        if not self.wide:
            kinds = {"counts": torch.int32, "prompted": torch.bool, "bias": torch.float32}
            self.wide = {name: torch.zeros(self.num_rows, self.vocab_size, dtype=kind, device=self.device)
                         for name, kind in kinds.items()}
        counts, prompted, bias = (self.wide[name][row].zero_() for name in ("counts", "prompted", "bias"))
        prompted[upload(np.array(sequence.prompt, np.int64))] = True
        generated = np.array(sequence.tokens[len(sequence.prompt) :], np.int64)
        if generated.size:  # it was preempted
            counts.scatter_add_(0, upload(generated), torch.ones(generated.size, dtype=torch.int32, device=self.device))
        if sequence.params.logit_bias:
            tokens, values = zip(*sequence.params.logit_bias.items(), strict=True)
            bias[upload(np.array(tokens, np.int64))] = upload(np.array(values, np.float32))

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Give the parameters of some rows to others, all at once.  Both int64 [n]."""
        for tensor in (self.floats.T, self.ints.T, *self.wide.values()):
            tensor[targets] = tensor[sources]

    def clear(self, row: int | slice) -> None:
        """Nobody has the row: neutral, whatever the others ask for."""
        self.floats[0, row] = 0
        for tensor in self.wide.values():
            tensor[row] = 0

    def select(self, rows: slice | torch.Tensor, adjusted: bool) -> SamplingTensors:
        """The parameters of some rows: views for a slice, copies for an index tensor."""
        floats, ints = self.floats[:, rows], self.ints[:, rows]
        fields = dict(zip(FLOATS, floats, strict=True)) | dict(zip(INTS, ints, strict=False))
        if adjusted:
            fields |= {name: tensor[rows] for name, tensor in self.wide.items()}
            fields["stops"] = ints[len(INTS) :].T
        return SamplingTensors(**fields)

    def count(self, rows: torch.Tensor, tokens: torch.Tensor, alive: torch.Tensor) -> None:
        """Note the tokens that were generated.  rows int64 [R], tokens int32 [R], alive bool [R]."""
        at = rows * self.vocab_size + tokens.clamp(min=0)
        self.wide["counts"].view(-1).scatter_add_(0, at, alive.int())


def _floats(sequence):
    """The row of FLOATS."""
    p = sequence.params
    return p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty


def _ints(sequence):
    """The row of INTS, then the tokens that end the sequence."""
    stops = list(sequence.stops)[:STOPS]
    k = max(sequence.params.top_k, 0)
    return k, *seed_words(sequence.seed), sequence.min_length, *stops, *[-1] * (STOPS - len(stops))
