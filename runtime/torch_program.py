"""The torch backend: the compiled graph, evaluated by torch with a paged cache. The default where there is no GPU, and the reference."""

from __future__ import annotations

import torch

from fusec.compiler import Compiled
from fusec.ir.graph import Value
from fusec.ir.interpreter import Evaluator, dtypes
from fusec.runtime.batch import Batch
from fusec.runtime.program import cache_bytes, cache_sizes


class TorchProgram:
    """See Program. Sequences are independent but for the matrices: everything outside `via` bodies runs on the packed tokens at once, each
    sequence's attention runs on its own history."""

    supports_graphs = False

    def __init__(self, compiled: Compiled, loader, dtype: torch.dtype, device: torch.device):
        self.compiled, self.dtype, self.device = compiled, dtype, device
        self.vocab_size = compiled.graph.outputs[0].dims[-1].size
        self.cache_bytes_per_token = cache_bytes(compiled, dtype)
        self.sizes = cache_sizes(compiled)
        self.caches: dict[str, torch.Tensor] = {}
        types = dtypes(dtype)
        self.bodies: dict[Value, Evaluator] = {}
        for value in compiled.graph.walk():
            if value.op == "via":
                self.bodies[value] = Evaluator(value.attrs["body"], types, device=device)
        self.evaluator = Evaluator(compiled.graph, types, weight=loader, cache=self.keep, via=self.attend, device=device)
        self.batch: Batch | None = None

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.caches = {name: torch.zeros(num_blocks * block_size, *sizes, dtype=self.dtype, device=self.device) for name, sizes in self.sizes.items()}

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        self.batch = batch
        self.live = batch.slots >= 0
        self.all_live = bool(self.live.all())
        self.sequences = self.histories(batch)
        inputs = {"ids": batch.ids.long(), "pos": batch.positions.long(), "rows": batch.rows.long()}
        names = [i.attrs["name"] for i in self.compiled.graph.inputs]
        (logits,) = self.evaluator(**{name: inputs[name] for name in names})
        return logits

    def histories(self, batch: Batch) -> list[tuple[slice, slice | torch.Tensor]]:
        """Per sequence: its tokens of this step, and the cache rows of its whole history."""
        starts, lengths = batch.query_starts.tolist(), batch.context_lens.tolist()
        found = []
        for b, length in enumerate(lengths):
            if not length:
                continue
            blocks = batch.block_tables[b, :-(-length // self.block_size)].long()
            if len(blocks) == 1 or bool((blocks[1:] - blocks[:-1] == 1).all()):  # neighbours: the history is a view
                first = int(blocks[0]) * self.block_size
                rows = slice(first, first + length)
            else:
                rows = (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)).reshape(-1)[:length]
            found.append((slice(starts[b], starts[b + 1]), rows))
        return found

    def keep(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        """Writes each token's row to its slot; the result stands for the history until a body asks for it."""
        cache = self.caches[value.attrs["name"]]
        slots = self.batch.slots
        if self.all_live:
            cache[slots] = tensor
        else:
            cache[slots[self.live]] = tensor[self.live]
        return cache

    def attend(self, value: Value, operands) -> torch.Tensor:
        body = self.bodies[value]
        names = [i.attrs["name"] for i in body.graph.inputs]
        kinds = ["S" if "S" in i.names else "T" if "T" in i.names else "" for i in body.graph.inputs]
        tokens = next(t.shape[0] for t, kind in zip(operands, kinds, strict=True) if kind == "T")
        parts = []
        for queries, history in self.sequences:
            inputs = {name: t[history] if kind == "S" else t[queries] if kind == "T" else t
                      for name, t, kind in zip(names, operands, kinds, strict=True)}
            parts.append((queries, body(**inputs)[0]))
        if len(parts) == 1 and parts[0][1].shape[0] == tokens:
            return parts[0][1]
        out = torch.zeros(tokens, *(d.size for d in value.dims[1:]), dtype=self.dtype, device=self.device)
        for queries, result in parts:
            out[queries] = result
        return out
