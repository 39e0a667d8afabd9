"""The triton backend: generated kernels over an arena of fixed addresses, packed weights and a paged cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import torch
import triton

from fusec.compiler import Compiled
from fusec.runtime.batch import Batch
from fusec.runtime.capabilities import dependent_launch, hopper
from fusec.runtime.drawing import NOTHING, Drawing
from fusec.runtime.hub import cache_folder
from fusec.runtime.program import cache_bytes, cache_sizes
from fusec.runtime.row_sums import RowSums
from fusec.runtime.weights import Loader, prepare


class TritonProgram:
    """See Program. Generated code finds here what it names: `weights`, `caches`, buffers as attributes, `block_size`, `scratch`,
    `product`, `stats`, `picked`."""

    supports_graphs = True

    def __init__(
        self, compiled: Compiled, loader: Loader, dtype: torch.dtype, device: torch.device, *, max_tokens: int
    ):
        module = compiled.module
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.compiled, self.module, self.dtype, self.device = compiled, module, dtype, device
        self.vocab_size = compiled.graph.outputs[0].dims[-1].size
        self.cache_bytes_per_token = cache_bytes(compiled, dtype)
        self.max_tokens = -(-max_tokens // 16) * 16
        self.program = load_source(module.kernels_py, module.program_py)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
        self.draws = module.draws
        self.program.PDL, self.program.HOPPER = dependent_launch(device), hopper(device)
        self.weights: dict[str, torch.Tensor] = {}
        for weight in module.weights.values():
            self.weights[weight.name] = prepare(weight, loader, dtype)
        self.arena = torch.empty(compiled.graph.attrs["arena"] * self.max_tokens, dtype=torch.uint8, device=device)
        for name, (offset, numel, kind) in module.buffers.items():
            view = self.arena[offset * self.max_tokens :].view(getattr(torch, kind))[: numel * self.max_tokens]
            setattr(self, name, view.view(self.max_tokens, numel))
        self.partial = torch.empty(module.partial, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(module.arrivals, dtype=torch.int32, device=device)
        self.no_sums = RowSums(1, device)
        for name, elements in module.sums.items():
            setattr(self, name, RowSums(elements, device))
        self.caches: dict[str, torch.Tensor] = {}
        self._growing: dict[str, torch.Tensor] = {}
        self._scratch: dict[tuple, tuple] = {}

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.caches = {
            name: torch.zeros(num_blocks, block_size, *sizes, dtype=self.dtype, device=self.device)
            for name, sizes in cache_sizes(self.compiled).items()
        }

    @torch.inference_mode()
    def forward(self, batch: Batch, drawing: Drawing = NOTHING) -> torch.Tensor | None:
        if batch.ids.shape[0] > self.max_tokens:
            raise ValueError(f"a step of {batch.ids.shape[0]} tokens; the arena holds {self.max_tokens}")
        return self.program.step(self, batch, drawing) if self.draws else self.program.step(self, batch)

    def product(self, tokens: int, columns: int) -> torch.Tensor:
        """Scratch for the vendor's matmul: [tokens, columns] in the model's dtype, until the next call."""
        # One buffer for all kernels and steps, since a captured graph keeps its address.
        whole = self._take("product", max(tokens, self.max_tokens) * self.widest_product, self.dtype)
        return whole[: tokens * columns].view(tokens, columns)

    @functools.cached_property
    def widest_product(self) -> int:
        """Columns of the widest product that the vendor's matmul leaves to a kernel."""
        tails = [s.facts for f in self.module.functions for s in f.sources if s.form == "epilogue"]
        return max(facts["leaves"] * facts["rows"] for facts in tails)

    def stats(self, tokens: int, count: int) -> torch.Tensor:
        """Scratch for row reductions that are made beforehand: float32 [count, tokens], in one buffer as `product`."""
        whole = self._take("stats", max(tokens, self.max_tokens) * max(count, 4), torch.float32)
        return whole[: tokens * count]

    def picked(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The wanted tokens of x one after another, for the bulk copy engine, until the next call.  x: [at least T, K]."""
        rows = batch.rows
        count, columns = len(rows), x.shape[1]
        if batch.every:
            return x[:count]
        whole = self._take("picked", max(count * columns, self.most_picked), x.dtype)  # one buffer, as `product`
        return torch.index_select(x, 0, rows, out=whole[: count * columns].view(count, columns))

    @functools.cached_property
    def most_picked(self) -> int:
        """Elements of the largest x that is picked for a stream."""
        streams = [s.facts for f in self.module.functions for s in f.sources if s.facts.get("picked")]
        return max((tile.tokens * facts["k"] for facts in streams for tile in facts["tiles"]), default=0)

    def _take(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        kept = self._growing.get(name)
        if kept is None or kept.numel() < size:
            kept = self._growing[name] = torch.empty(size, dtype=dtype, device=self.device)
        return kept[:size]

    def scratch(self, launch, sequences: int) -> tuple[torch.Tensor, ...]:
        """Scratch of a decode attention launch: kept for each shape, so that its address is fixed; layers share it in turn."""
        from fusec.codegen.attention_schedule import decode_scratch

        shapes = decode_scratch(launch, sequences)
        key = tuple(shapes.values())
        if key not in self._scratch:
            self._scratch[key] = tuple(torch.zeros(shape, dtype=getattr(torch, kind), device=self.device) for shape, kind in key)
        return self._scratch[key]


def build_folder(kernels_py: str, program_py: str) -> Path:
    """Where the generated source of this text lies: a private folder in the user's cache, named by its hash."""
    digest = hashlib.sha256((kernels_py + program_py).encode()).hexdigest()[:16]
    folder = cache_folder() / "programs" / digest
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in (("kernels.py", kernels_py), ("program.py", program_py)):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    return folder


def load_source(kernels_py: str, program_py: str):
    """The generated program as a module; its kernels are files on disk, which is where Triton reads them."""
    folder = build_folder(kernels_py, program_py)
    return load_folder(folder)


def load_folder(folder: Path):
    """A build folder's `program.py`, with its own `kernels.py` beside it."""
    modules = []
    for name in ("kernels", "program"):
        spec = importlib.util.spec_from_file_location(f"fusec_build_{folder.name}_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        modules.append((spec, module))
    (kernels_spec, kernels), (program_spec, program) = modules
    sys.modules[kernels_spec.name] = kernels
    kernels_spec.loader.exec_module(kernels)
    shadowed = sys.modules.get("kernels")
    sys.modules["kernels"] = kernels  # program.py says `import kernels`, so that it also runs by itself
    try:
        program_spec.loader.exec_module(program)
    finally:
        if shadowed is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = shadowed
    return program
