"""fusec tune: measures tiles of every contraction of a model on this GPU and writes them to the table that ships with the
project.

Each candidate is launched as the model would: the same kernel over all layers' weights, one CUDA graph, dependent launch. It
is timed only if its results agree with those of the cost rule's tiles. Candidates are compiled in parallel processes first.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from fusec.codegen import schedule
from fusec.codegen.contraction import Contraction
from fusec.codegen.contraction_kernel import contraction

HEADER = """import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


"""
FORMS = ("gemv", "skinny", "matmul")
TOKENS = {"gemv": (1,), "skinny": (16, 32, 64, 128), "matmul": (4096,)}


@dataclass(frozen=True)
class Candidate:
    """One way to launch a kernel: form, tiles, and the file and name of the kernel that was rendered for it."""

    form: str
    tiles: object
    path: str
    name: str


def candidates(form: str, rows: int, k: int, leaves: int, itemsize: int, tokens: int) -> list:
    """Tiles worth trying."""
    found = []
    if form == "gemv":
        for n, bk, warps, stages in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (4, 8), (1, 3)):
            elements = n * bk * leaves / (warps * 32)
            whole = bk >= k
            if bk > 2 * k or (whole and stages > 1) or not 16 <= elements <= 128 or (k % bk and not whole):
                continue
            found.append(schedule.Gemv(n, bk, warps, stages))
    if form == "skinny":
        small = rows * k * leaves < 8 << 20
        for n, bk, splits, warps, stages in itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (4, 8), (3, 4)):
            shared = stages * (n * leaves + tokens) * bk * itemsize  # and as much again of x where a reduction runs beside
            programs = -(-rows // n) * splits
            if (
                k % (bk * splits)
                or shared > 200_000
                or programs > 1100
                or not 32 <= n * leaves <= 128
                or warps == 8
                and n * leaves < 64
            ):
                continue
            if bk == 64 and not small and k % 128 == 0 or splits > 1 and programs > 600 or programs < 100 and not small:
                continue
            if not small and shared * min(4, programs // 132 + 1) < 80_000:
                continue
            found.append(schedule.Skinny(tokens, tokens, n, bk, splits, warps, stages))
    if form == "matmul":
        for n, bk, warps, stages in itertools.product((64, 128, 256), (64,), (4, 8), (3, 4)):
            if k % bk or n < 64 or n == 256 and warps == 4 or n % leaves:
                continue
            found.append(schedule.Matmul(None, 128, n // leaves, bk, 8, warps, stages))
    return found


def constants(form: str, tiles) -> dict:
    table = {"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "STAGES": tiles.stages}
    if form != "gemv":
        table["BLOCK_M"] = tiles.block_m
    if form == "skinny":
        table["SPLITS"] = tiles.splits
    if form == "matmul":
        table["GROUP"] = tiles.group
    return table


@functools.cache
def load_kernels(path: str):
    spec = importlib.util.spec_from_file_location(f"fusec_tune_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm(job) -> str | None:
    """Compiles one candidate into Triton's cache, in a process of its own. Returns what went wrong, if anything."""
    path, name, pointers, sizes, warps = job
    try:
        arguments = [p if isinstance(p, int) else getattr(torch, p) for p in pointers]
        kernel = getattr(load_kernels(path), name)
        kernel.warmup(*arguments, **sizes, PDL=True, num_warps=warps, launch_pdl=True, grid=(1,))
        return None
    except Exception as error:  # noqa: BLE001  a candidate that does not compile is no candidate
        return repr(error)[:200]


class Tuner:
    """Tunes one program (a TritonProgram with its cache allocated)."""

    def __init__(self, program, workers: int | None = None, say=print):
        self.program, self.say = program, say
        self.module = program.module
        self.scratch = tempfile.TemporaryDirectory(prefix="fusec-tune-")  # goes with the tuner
        self.folder = Path(self.scratch.name)
        self.pool = ProcessPoolExecutor(workers or max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn"))

    @torch.inference_mode()
    def run(self, budget: float, forms=FORMS, on_result=None) -> dict[str, list[dict]]:
        """The table of the best tiles found within `budget` seconds."""
        table: dict[str, list[dict]] = {}
        jobs = []
        for function in self.module.functions:
            if function.kernel.attrs["kind"] != "contract":
                continue
            parts = Contraction(function.kernel.attrs["body"])
            for form in forms:
                for tokens in TOKENS[form]:
                    key = f"{form} {parts.n} {parts.k} {parts.leaves} {self.program.dtype.itemsize}"
                    jobs.append((key, function, parts, form, tokens))
        deadline = time.monotonic() + budget
        prepared = []
        for key, function, parts, form, tokens in jobs:
            options = self.render(function, parts, form, tokens)
            prepared.append(
                (key, function, form, tokens, options, [self.pool.submit(warm, self.job(function, o)) for o in options])
            )
        for key, function, form, tokens, options, futures in prepared:
            best = self.measure(function, form, tokens, options, futures, deadline)
            if best:
                microseconds, tiles = best
                rows = table.setdefault(key, [])
                known = [r for r in rows if r.get("tokens") != getattr(tiles, "tokens", None)]
                table[key] = [*known, asdict(tiles)]
                if on_result:
                    on_result(function.name, form, tokens, microseconds, tiles)
        self.pool.shutdown(wait=False, cancel_futures=True)
        return table

    def render(self, function, parts, form, tokens) -> list[Candidate]:
        found, files = [], {}
        for tiles in candidates(form, parts.n, parts.k, parts.leaves, self.program.dtype.itemsize, tokens):
            splits = getattr(tiles, "splits", 1)
            masks = (bool(parts.k % (tiles.block_k * splits)), bool(parts.n % tiles.block_n))
            if masks not in files:
                name = f"{function.name}_{form}"
                source = contraction(
                    function.kernel, name, form, [], self.module.dtype, tiles.block_n, tiles.block_k, parts, splits
                )
                path = self.folder / f"{name}_{tokens}_{masks[0]:d}{masks[1]:d}.py"
                path.write_text(HEADER + source.text)
                files[masks] = (str(path), name)
            found.append(Candidate(form, tiles, *files[masks]))
        return found

    def source(self, function, form):
        return next(s for s in function.sources if s.form == form)

    def job(self, function, option: Candidate):
        source = self.source(function, option.form)
        launch = next(n for n in self.module.launches if n.function == function.name)
        values = self.values(function, launch, self.batch(1))
        pointers = [str(values[p.removesuffix("_ptr")].dtype).removeprefix("torch.") for p in source.roles]
        sizes = constants(option.form, option.tiles)
        return option.path, option.name, [*pointers, *([33] if option.form != "gemv" else [])], sizes, option.tiles.num_warps

    def batch(self, tokens: int):
        from fusec.runtime.batch import Batch

        make = lambda *a, **k: torch.arange(*a, **k, dtype=torch.int32, device=self.program.device)  # noqa: E731
        if not hasattr(self, "_batches"):
            self._batches = {}
        if tokens not in self._batches:
            self._batches[tokens] = Batch(
                ids=make(tokens),
                positions=make(tokens),
                slots=make(tokens).long(),
                query_starts=make(tokens + 1),
                context_lens=make(tokens) * 0 + 1,
                block_tables=make(tokens)[:, None],
                rows=make(tokens),
                max_query=1,
                max_context=1024,
            )
        return self._batches[tokens]

    def values(self, function, launch, batch) -> dict:
        """Parameter -> argument of one launch."""
        tokens = batch.ids.shape[0]
        p = self.program
        vocab = p.vocab_size
        if getattr(self, "_logits", None) is None or self._logits.shape[0] < tokens:
            self._logits = torch.empty(tokens, vocab, dtype=torch.float32, device=p.device)
        scope = {"m": p, "w": p.weights, "c": p.caches, "b": batch, "T": tokens, "N": tokens, "logits": self._logits[:tokens]}
        return {
            name: eval(text, scope) for name, text in zip(function.params, launch.arguments, strict=True)
        }  # our own generated text

    def call(self, function, option: Candidate, launch, batch):
        values = self.values(function, launch, batch)
        source = self.source(function, option.form)
        tokens, t = batch.ids.shape[0], option.tiles
        rows = source.facts["rows"]
        blocks = -(-rows // t.block_n)
        grid = {
            "gemv": lambda: (blocks,),
            "skinny": lambda: (-(-tokens // t.block_m) * blocks, t.splits),
            "matmul": lambda: (-(-tokens // t.block_m) * blocks,),
        }[option.form]()
        kernel = getattr(load_kernels(option.path), option.name)
        arguments = [values[p.removesuffix("_ptr")] for p in source.roles]
        kernel[grid](
            *arguments,
            *([tokens] if option.form != "gemv" else []),
            **constants(option.form, t),
            PDL=True,
            num_warps=t.num_warps,
            launch_pdl=True,
        )
        return [values[p.removesuffix("_ptr")] for p, role in source.roles.items() if role[0] == "output"]

    def measure(self, function, form, tokens, options, futures, deadline):
        batch = self.batch(tokens)
        launches = [n for n in self.module.launches if n.function == function.name]
        if len(launches) == 1:
            launches = launches * 3
        self.program.arena.zero_()
        for buffer in self.program.module.buffers:
            tensor = getattr(self.program, buffer)
            tensor[:tokens].normal_() if tensor.is_floating_point() else tensor.zero_()
        for name in ("partial",):
            need = 8 * (2 * self.source(function, form).facts["rows"] * 64 + 64 * 4096)
            if getattr(self.program, name).numel() < need:
                setattr(self.program, name, torch.empty(need, dtype=torch.float32, device=self.program.device))
        if self.program.arrivals.numel() < 65536:
            self.program.arrivals = torch.zeros(65536, dtype=torch.int32, device=self.program.device)
        reference, ranked = None, []
        state = self.program.arena.clone()  # launches write over one another's inputs
        for option, future in zip(options, futures, strict=True):
            if time.monotonic() > deadline:
                break
            try:
                problem = future.result(timeout=deadline - time.monotonic())
            except TimeoutError:
                break
            if problem:
                continue
            try:
                self.program.arena.copy_(state)
                outputs = self.call(function, option, launches[0], batch)
                result = [o[:tokens].float().clone() for o in outputs[:1]]
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001  out of resources: no candidate
                self.say(f"{function.name} {option.tiles}: {repr(error)[:100]}")
                continue
            if reference is None:
                reference = result
            if any(not ((r - x).norm() <= 2e-2 * x.norm()) for r, x in zip(result, reference, strict=True)):
                self.say(f"{function.name} {option.tiles}: wrong result, left out")
                continue
            ranked.append((self.time(function, option, launches, batch), option.tiles))
        return min(ranked, key=lambda r: r[0]) if ranked else None

    def time(self, function, option, launches, batch) -> float:
        """Median µs a launch, in a graph of all layers."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                self.call(function, option, launch, batch)
        times = []
        for i in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2] / len(launches) * 1e3


def write_table(table: dict[str, list[dict]], path: Path) -> None:
    """Merges `table` into the JSON table at `path`, one line a row."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known.update(table)
    lines = []
    for key in sorted(known):
        rows = sorted(known[key], key=lambda r: r.get("tokens") or 1 << 30)
        lines.append(f'  "{key}": [' + ",\n    ".join(json.dumps(r) for r in rows) + "]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
