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
    """SamplingTensors of all rows. What is as wide as the vocabulary is allocated when the first sequence needs it."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self.num_rows, self.vocab_size, self.device = num_rows, vocab_size, device
        self.floats = torch.zeros(num_rows, len(FLOATS), device=device)  # temperature 0: rows nobody has are greedy
        self.ints = torch.zeros(num_rows, len(INTS) + STOPS, dtype=torch.int32, device=device)
        self.wide: dict[str, torch.Tensor] = {}

    def seat(self, row: int, sequence: Sequence, upload) -> None:
        """Write the parameters of the sequence that now has `row`.  upload: numpy array -> device tensor."""
        params = sequence.params
        floats = (params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty,
                  params.frequency_penalty)
        stops = list(sequence.stops)[:STOPS]
        ints = (max(params.top_k, 0), *seed_words(sequence.seed), sequence.min_length, *stops, *[-1] * (STOPS - len(stops)))
        self.floats[row] = upload(np.array(floats, np.float32))
        self.ints[row] = upload(np.array(ints, np.int32))
        if params.variant.adjusted:
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

    def move(self, source: int, target: int) -> None:
        """Give row `source`'s parameters to row `target`."""
        for tensor in (self.floats, self.ints, *self.wide.values()):
            tensor[target] = tensor[source]

    def clear(self, row: int | slice) -> None:
        """Nobody has the row: neutral, whatever the others ask for."""
        self.floats[row, 0] = 0
        for tensor in self.wide.values():
            tensor[row] = 0

    def select(self, rows: slice | torch.Tensor, adjusted: bool) -> SamplingTensors:
        """The parameters of some rows: views for a slice, copies for an index tensor."""
        floats, ints = self.floats[rows], self.ints[rows]
        fields = {name: floats[:, column] for column, name in enumerate(FLOATS)}
        fields |= {name: ints[:, column] for column, name in enumerate(INTS)}
        if adjusted:
            fields |= {name: tensor[rows] for name, tensor in self.wide.items()}
            fields["stops"] = ints[:, len(INTS) :]
        return SamplingTensors(**fields)

    def count(self, rows: torch.Tensor, tokens: torch.Tensor, alive: torch.Tensor) -> None:
        """Note the tokens that were generated.  rows int64 [R], tokens int32 [R], alive bool [R]."""
        at = rows * self.vocab_size + tokens.clamp(min=0)
        self.wide["counts"].view(-1).scatter_add_(0, at, alive.int())
