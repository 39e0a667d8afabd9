"""The torch backend: the compiled graph, evaluated by torch with a paged cache.

The default where there is no GPU, and the reference for the other backend.
"""

from __future__ import annotations

import torch

from fusec.compiler import Compiled
from fusec.ir.graph import Value
from fusec.ir.interpreter import Evaluator, dtypes
from fusec.runtime.batch import Batch
from fusec.runtime.program import cache_bytes, cache_sizes
from fusec.runtime.torch_idioms import Attention, idioms


class TorchProgram:
    """See Program. Everything outside attention runs on the packed tokens at once; each sequence's attention runs on its own
    history."""

    supports_graphs = False
    draws = False

    def __init__(self, compiled: Compiled, loader, dtype: torch.dtype, device: torch.device):
        self.compiled, self.dtype, self.device = compiled, dtype, device
        self.vocab_size = compiled.graph.outputs[0].dims[-1].size
        self.cache_bytes_per_token = cache_bytes(compiled, dtype)
        self.sizes = cache_sizes(compiled)
        self.caches: dict[str, torch.Tensor] = {}
        types = dtypes(dtype)
        graph, self.functions = idioms(compiled.graph, types)
        for value in graph.walk():
            if value.op == "via" and value not in self.functions:
                self.functions[value] = History(self, value, types)
        self.evaluator = Evaluator(
            graph,
            types,
            weight=loader,
            cache=self.keep,
            via=lambda value, tensors: self.functions[value](*tensors),
            device=device,
        )

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.caches = {
            name: torch.zeros(num_blocks * block_size, *sizes, dtype=self.dtype, device=self.device)
            for name, sizes in self.sizes.items()
        }

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        self.sequences = self.histories(batch)
        self.tokens, self.slots = self.written(batch)
        self.masks: dict[tuple, torch.Tensor | None] = {}
        inputs = {"ids": batch.ids.long(), "pos": batch.positions.long(), "rows": batch.rows.long()}
        (logits,) = self.evaluator(**{i.attrs["name"]: inputs[i.attrs["name"]] for i in self.compiled.graph.inputs})
        return logits

    def histories(self, batch: Batch) -> list[tuple[slice, slice | torch.Tensor]]:
        """Per sequence: its tokens of this step, and the cache rows of its whole history."""
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        found = []
        for b, length in enumerate(lengths):
            if not length:
                continue
            blocks = batch.block_tables[b, : -(-length // self.block_size)].long()
            rows = (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)).reshape(-1)[:length]
            found.append((slice(starts[b], starts[b + 1]), consecutive(rows.tolist()) or rows))
        return found

    def written(self, batch: Batch) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
        """The tokens that are no padding, and the cache rows where they go."""
        live = batch.slots >= 0
        if not bool(live.all()):
            return live, batch.slots[live]
        return slice(None), consecutive(batch.slots.tolist()) or batch.slots

    def keep(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        """Writes each token's row to its slot; the result stands for the history until attention asks for it."""
        cache = self.caches[value.attrs["name"]]
        cache[self.slots] = tensor if isinstance(self.tokens, slice) else tensor[self.tokens]
        return cache


class History:
    """A `via` body that reads caches: evaluated for one sequence after the other, on its tokens of this step and its history."""

    def __init__(self, program: TorchProgram, value: Value, types):
        body = value.attrs["body"]
        self.program, self.names = program, [i.attrs["name"] for i in body.inputs]
        self.kinds = ["S" if "S" in i.names else "T" if "T" in i.names else "" for i in body.inputs]
        self.sizes = [d.size for d in value.dims[1:]]
        self.body = Evaluator(body, types, device=program.device)
        self.attention = Attention.of(body, types, program.device)

    def __call__(self, *operands: torch.Tensor) -> torch.Tensor:
        tokens = operands[self.kinds.index("T")].shape[0]
        parts = [
            (queries, self.one(number, queries, history, operands))
            for number, (queries, history) in enumerate(self.program.sequences)
        ]
        if len(parts) == 1 and parts[0][1].shape[0] == tokens:
            return parts[0][1]
        out = torch.zeros(tokens, *self.sizes, dtype=self.program.dtype, device=self.program.device)
        for queries, result in parts:
            out[queries] = result
        return out

    def one(self, number: int, queries: slice, history, operands) -> torch.Tensor:
        """The result of one sequence of the step."""
        places = {"S": history, "T": queries}
        own = [t[places[kind]] if kind else t for t, kind in zip(operands, self.kinds, strict=True)]
        if self.attention is None:
            return self.body(**dict(zip(self.names, own, strict=True)))[0]
        masks, key = self.program.masks, (self.attention.key, number)
        if key not in masks:
            masks[key] = self.attention.mask(dict(zip(self.names, own, strict=True)))
        return self.attention(own, masks[key])


def consecutive(rows: list[int]) -> slice | None:
    """The slice that these rows are, if they are neighbours: it reads and writes without an index."""
    return slice(rows[0], rows[-1] + 1) if rows and rows == list(range(rows[0], rows[0] + len(rows))) else None
