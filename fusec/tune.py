"""fusec tune: measures tiles of every contraction and of decode attention on this GPU, for the table that ships with the project.

First each kernel alone: a candidate is launched as the model would, over all layers' weights, in one CUDA graph with dependent
launch, and is timed only if its results agree with those of the others. Then the whole step: kernels overlap their neighbours,
so the fastest alone need not be the fastest together. The best few of each kernel take turns in a captured decode step, and
launches of decode attention with them, if their results agree with those of the one in use.

Candidates are compiled in parallel processes first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from fusec.bench.decode import decode_bytes
from fusec.bench.limits import capture, microseconds, proven_saving, read_bandwidth, replay_microseconds, turns
from fusec.codegen import schedule
from fusec.codegen.attention_schedule import Launch, decode_launch, decode_row
from fusec.codegen.candidates import FORMS, TOKENS, decode_tiles, decode_variants, tiles_for, variants
from fusec.codegen.contraction import Contraction
from fusec.codegen.contraction_kernel import blocks_of, contraction
from fusec.codegen.module import preamble
from fusec.codegen.row_sums import Handover, Handovers, handovers
from fusec.runtime.batch import Batch
from fusec.runtime.drawing import NOTHING, Drawing, places
from fusec.runtime.row_sums import RowSums
from fusec.runtime.tiles import tiles as in_tiles

FEW = 24  # of a kernel's candidates that are tried in the whole step
ALONE = 0.6  # of the budget for kernels alone; the rest is for whole steps
VARYING = 0.3  # of the time for whole steps, for variants of the tiles found in the rest
LEAST = 0.2  # seconds that are left to each kernel still to be measured alone
TOLERANCE = 2e-2  # by how much results may differ, of their norm
CONTEXT = 560  # tokens of history of a step that is measured: no whole number of tiles, as most histories are
PAGE = 16
PAGES = CONTEXT // PAGE + 1
BUCKET = 1024  # the bound on contexts that its graph is captured for
ATTENTION = ""  # stands beside kernels' names for the launch of decode attention


@dataclass(frozen=True)
class Candidate:
    """One way to launch a kernel: its tiles, and the file, the name and the source of the kernel that was rendered for them."""

    tiles: schedule.Tile
    path: str
    name: str
    source: object = field(compare=False, repr=False)

    @property
    def form(self) -> str:
        return self.tiles.form


def constants(tiles, leaves: int, reductions: int, draw: int | None = None, handed: bool | None = None) -> dict:
    """A contraction kernel's launch constants.  reductions: how many a row it makes.  draw: the mode, where it may draw.
    handed: whether it finds its row reductions, where it may."""
    own = {"DRAW": draw, "HANDED": handed}
    return {name: value for name, value in own.items() if value is not None} | tiles.constants(leaves, reductions)


def table_row(tiles) -> dict:
    """A tile as a table has it: what it leaves to defaults is not told."""
    return {field.name: value for field in fields(tiles) if (value := getattr(tiles, field.name)) != field.default}


@functools.cache
def load_kernels(path: str):
    spec = importlib.util.spec_from_file_location(f"fusec_tune_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def argument(what):
    """An argument of a kernel that is only compiled: a number, None, a pointer by its type, or (type, columns, tile) of what is
    copied in tiles."""
    if isinstance(what, tuple):
        kind, columns, block = what
        return in_tiles(torch.empty(1, columns, dtype=getattr(torch, kind), device="meta"), columns, *block)
    return getattr(torch, what) if isinstance(what, str) else what


def pointed(value):
    """What a kernel's pointer points to, of an argument of its launch function."""
    return value.place if isinstance(value, RowSums) else value


def warm(job) -> str | None:
    """Compiles one candidate into Triton's cache, in a process of its own. Returns what went wrong, if anything.

    job: path and name of the kernel, options of the launch, and (arguments, constants) of each variant (dtypes by name for
    pointers)."""
    path, name, options, variants = job
    try:
        for arguments, sizes in variants:
            arguments = [argument(a) for a in arguments]
            getattr(load_kernels(path), name).warmup(*arguments, **sizes, **options, grid=(1,))
        return None
    except Exception as error:  # noqa: BLE001  a candidate that does not compile is no candidate
        return repr(error)[:200]


class Tuner:
    """Tunes one program: a TritonProgram for at least 128 tokens a step."""

    def __init__(self, program, workers: int | None = None, say=print):
        self.program, self.say = program, say
        self.module = program.module
        self.folder = tempfile.TemporaryDirectory(prefix="fusec-tune-")  # goes with the tuner
        self.pool = ProcessPoolExecutor(workers or max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn"))
        self.contractions = [f for f in self.module.functions if f.kernel.attrs["kind"] == "contract"]
        self.handovers = handovers(self.module.graph) if self.contractions else Handovers({}, {})
        self.batches: dict[int, Batch] = {}
        self.drawings: dict[int, Drawing] = {}  # kept: captured steps write there

    @torch.inference_mode()
    def run(self, budget: float, forms=FORMS, on_result=None, tokens=None) -> dict[str, list[dict]]:
        """The table of the best tiles found within about `budget` seconds.  tokens: of a form that has tiles for several
        numbers of them, only these.

        on_result(what, form, tokens, microseconds, tiles) is called for each of its rows, and with "the whole step" for steps.
        """
        tell = on_result or (lambda *result: None)
        start = time.monotonic()
        self.program.allocate_cache(128 * PAGES, PAGE)
        for cache in self.program.caches.values():
            cache.normal_()
        ranges = [(form, n) for form in forms for n in TOKENS[form] if len(TOKENS[form]) == 1 or n in (tokens or TOKENS[form])]
        ranges = ranges if self.contractions else []
        jobs = [(f, *each, self.render(f, *each)) for each in ranges for f in self.contractions]
        self.make_room([option for *_, options in jobs for option in options])
        warming = [[self.pool.submit(warm, self.job(f, option)) for option in options] for f, _, _, options in jobs]
        attention = {each: self.warm_attention(each[1]) for each in ranges if each[0] != "matmul"}
        ranked: dict[tuple, dict] = {each: {} for each in ranges}
        deadlines = [start + ALONE * budget - LEAST * later for later in reversed(range(len(jobs)))]
        for (f, form, tokens, options), futures, deadline in zip(jobs, warming, deadlines, strict=True):
            if rows := self.alone(f, form, tokens, options, futures, deadline):
                ranked[form, tokens][f.name] = rows
        table: dict[str, list[dict]] = {}
        for left, (form, tokens) in zip(range(len(ranges), 0, -1), ranges, strict=True):
            found = ranked[form, tokens]
            choice = {name: rows[0][1] for name, rows in found.items()}
            if choice and form != "matmul":
                deadline = time.monotonic() + (start + budget - time.monotonic()) / left
                choice, launch, ms = self.in_the_step(found, attention[form, tokens], form, tokens, deadline)
                bandwidth = decode_bytes(self.program.compiled, tokens, CONTEXT + 1) / ms / 1e6
                tell("the whole step", form, tokens, ms * 1e3, f"{bandwidth / self.read:.1%} of {self.read:.0f} GB/s")
                if launch:
                    key, row = decode_row(launch, tokens, BUCKET, self.program.dtype.itemsize)
                    table.setdefault(key, []).append(row)
                    tell("attention", "decode", tokens, ms * 1e3, row)
            for f in self.contractions:
                if f.name in choice:
                    parts, tiles = Contraction(f.kernel.attrs["body"]), choice[f.name].tiles
                    shape = (parts.n, parts.k, parts.leaves, self.program.dtype.itemsize)
                    table.setdefault(schedule.key(tiles.table, *shape), []).append(table_row(tiles))
                    tell(f.name, form, tokens, next(us for us, option in found[f.name] if option is choice[f.name]), tiles)
        self.pool.shutdown(wait=False, cancel_futures=True)
        return table

    @functools.cached_property
    def read(self) -> float:
        """GB/s that this GPU reads."""
        return read_bandwidth(self.program.device)

    @functools.cached_property
    def attention(self):
        """The function of decode attention, where a model has one kernel of it."""
        found = [f for f in self.module.functions if f.kernel.attrs["kind"] == "attention"]
        return found[0] if len(found) == 1 else None

    @property
    def decode(self):
        """The source of decode attention."""
        return next(s for s in self.attention.sources if s.form == "decode")

    @contextlib.contextmanager
    def standing_in(self, trial: dict[str, Callable]):
        """The program's own names as in `trial`."""
        space = vars(self.program.program)
        real = {name: space[name] for name in trial}
        space.update(trial)
        try:
            yield
        finally:
            space.update(real)

    # ---- candidates --------------------------------------------------------------------------------------------------------

    def render(self, function, form: str, tokens: int) -> list[Candidate]:
        """Every candidate of a kernel, with the file of its source: one a set of masks."""
        parts, found, files = Contraction(function.kernel.attrs["body"]), [], {}
        shape = (parts.n, parts.k, parts.leaves, self.program.dtype.itemsize)
        streams = parts.streams and self.program.program.HOPPER
        first, *others = tiles_for(form, *shape, tokens, streams, len(parts.beside)) or [None]
        several = dict.fromkeys([first, self.used(function, form, tokens), *others])  # each once, the one in use among the first
        for tiles in filter(None, several):
            pieces = len(tiles.pieces)
            kind = (tiles.form, bool(parts.k % tiles.block_k), bool(parts.n % tiles.block_n), pieces)
            if kind not in files:
                name = f"{function.name}_{kind[0]}"
                draws = any(s.facts.get("draws") for s in function.sources)
                hands = self.hands_of(function)
                source = contraction(function.kernel, name, kind[0], [], self.module.dtype, tiles.block_n, tiles.block_k, parts,
                                     draws, *hands, pieces)  # fmt: skip
                path = Path(self.folder.name, f"{name}_{tokens}_{kind[1]:d}{kind[2]:d}{pieces}.py")
                path.write_text(preamble(source.text) + "\n\n" + source.text)
                files[kind] = (str(path), name, source)
            found.append(Candidate(tiles, *files[kind]))
        return found

    def variants_of(self, choice: dict[str, Candidate], form: str, tokens: int, deadline: float) -> dict:
        """Of each kernel whose chosen tile has variants, that and its variants, measured alone and held to its results."""
        jobs = []
        for f in (f for f in self.contractions if f.name in choice):
            option, facts = choice[f.name], choice[f.name].source.facts
            if others := variants(option.tiles, facts["leaves"], facts["reductions"]):
                jobs.append((f, [option, *(replace(option, tiles=tiles) for tiles in others)]))
        warming = [[self.pool.submit(warm, self.job(f, option)) for option in options] for f, options in jobs]
        found = {f.name: self.alone(f, form, tokens, options, futures, deadline)
                 for (f, options), futures in zip(jobs, warming, strict=True)}  # fmt: skip
        return {name: rows for name, rows in found.items() if rows}

    def hands_of(self, function) -> tuple[Handover | None, bool]:
        """Which row reductions a kernel leaves, and whether it asks for its own, as the program has it."""
        facts = [s.facts for s in function.sources]
        makes = self.handovers.makes.get(function.kernel) if any(f.get("leaves_sums") for f in facts) else None
        return makes, any(f.get("finds") for f in facts)

    def used(self, function, form: str, tokens: int):
        """The tile with which the program launches a kernel for one or a few tokens, by its table or the rule."""
        forms = ("stream", "wide", "skinny") if form == "skinny" and self.program.program.HOPPER else (form,)
        tiles = [t for s in function.sources if s.form in forms and form != "matmul" for t in s.facts["tiles"]]
        found = next((t for t in tiles if form == "gemv" or t.tokens == tokens), None)
        if form == "skinny" and all(t.tokens < tokens for t in tiles):  # the next form has them
            larger = [t for s in function.sources if s.form == "matmul" for t in s.facts["tiles"]]
            found = next((replace(t, tokens=2 * tokens) for t in larger if t.tokens is None or t.tokens >= tokens), None)
        return found

    def make_room(self, options: list[Candidate]) -> None:
        """Scratch for the partial results of any candidate."""
        p = self.program
        most = max((o.tiles.splits * max(o.tiles.tokens, o.tiles.block_m) for o in options if o.form in ("skinny", "stream")),
                   default=1)  # fmt: skip
        facts = [s.facts for f in self.contractions for s in f.sources if "leaves" in s.facts]
        columns = max(((f["leaves"] + 1) * f["rows"] for f in facts), default=0)  # and what blocks and row reductions add
        if not columns:
            return
        p.partial = torch.empty(max(p.partial.numel(), most * (columns + 4096)), dtype=torch.float32, device=p.device)
        p.arrivals = torch.zeros(max(p.arrivals.numel(), columns), dtype=torch.int32, device=p.device)
        streams = [(o.tiles, o.source.facts) for o in options if o.form == "stream"]
        most = max((t.tokens * (f["rows"] // t.block_n) * f["sums"] for t, f in streams), default=0)
        for name in self.module.sums:
            setattr(p, name, RowSums(max(getattr(p, name).place.numel(), most), p.device))

    def job(self, function, option: Candidate):
        source = option.source
        launch = next(n for n in self.module.launches if n.function == function.name)
        facts, calls = source.facts, []
        leaves, reductions = facts["leaves"], facts["reductions"]
        drawings = (NOTHING, self.drawing(1)) if facts["draws"] else (NOTHING,)
        for drawing, handed in itertools.product(drawings, (False, True) if facts["finds"] else (None,)):
            values = self.values(function, launch, self.batch(1), drawing)
            draw = values["draw"] if facts["draws"] else None
            sizes = constants(option.tiles, leaves, reductions, draw, handed) | {"PDL": True}
            blocks, pointers = blocks_of(source, option.tiles), []
            for pointer in source.roles:
                value = pointed(values[pointer.removesuffix("_ptr")])
                kind = None if value is None else str(value.dtype).removeprefix("torch.")
                pointers += [(kind, facts["k"], block) for block in blocks[pointer]] if pointer in blocks else [kind]
            calls.append(([*pointers, *([33] if option.form != "gemv" else []), *([17] if facts["finds"] else [])], sizes))
        options = option.tiles.options(leaves, reductions) | {"launch_pdl": True}
        return option.path, option.name, options, calls

    def warm_attention(self, sequences: int) -> list[tuple]:
        """(launch, future of its compilation) of each way to launch decode attention, where a model has one kernel of it."""
        if self.attention is None:
            return []
        a = self.decode.facts["attention"]
        rule = decode_launch(sequences, BUCKET, G=a.G, R=a.R, K=a.K, J=a.J, page=PAGE, itemsize=self.program.dtype.itemsize,
                             pdl=True, gpu=schedule.gpu_key(torch.cuda.get_device_name(self.program.device)))  # fmt: skip
        return self.warm_launches(decode_tiles(rule, sequences, BUCKET, self.program.dtype.itemsize), sequences)

    def warm_variants(self, launch: Launch | None, sequences: int) -> list[tuple]:
        """The chosen launch of decode attention and its variants."""
        if launch is None:
            return []
        return self.warm_launches([launch, *decode_variants(launch, sequences, BUCKET, self.program.dtype.itemsize)], sequences)

    def warm_launches(self, launches: list[Launch], sequences: int) -> list[tuple]:
        source, kind = self.decode, self.module.dtype
        path, a = Path(self.program.program.__file__).with_name("kernels.py"), source.facts["attention"]
        pointers = [kind] * 3 + ["int32"] * 2 + [kind, "float32", "float32", "int32", *source.facts["heads"]]
        strides = [max(sequences, 2), a.G * a.R * a.K, self.batch(1).block_tables.stride(0)]
        return [(each, self.pool.submit(warm, (str(path), source.name, each.options, [([*pointers, *strides], each.constants)])))
                for each in launches]  # fmt: skip

    def agreeing(self, attention: list[tuple], tokens: int) -> list[tuple]:
        """The launches of decode attention that compile, and whose results agree with those of the first, the one in use."""
        if not attention:
            return []
        name = self.attention.name
        values = self.values(self.attention, next(n for n in self.module.launches if n.function == name), self.batch(tokens))
        self.fill_buffers(tokens)
        reference, found = None, []
        for launch, future in attention:
            if future.result() is not None:
                continue
            values["out"][:tokens] = torch.nan

            def attend(launch=launch):
                with self.standing_in({"decode_launch": lambda *_, **__: launch}):
                    vars(self.program.program)[name](*values.values())
                return values["out"][:tokens]

            if (result := self.agreed(f"{name} {launch}", attend, reference)) is not None:
                reference = result if reference is None else reference
                found.append((launch, future))
        return found

    def agreed(self, candidate: str, run: Callable, reference: torch.Tensor | None) -> torch.Tensor | None:
        """What `run` computes, in float32. None, and told, if it fails or differs from the reference."""
        try:
            result = run().float().clone()
            reference = result if reference is None else reference
            agrees = bool((result - reference).norm() <= TOLERANCE * reference.norm())  # waits for the GPU; no NaN agrees
        except Exception as error:  # noqa: BLE001  out of resources: no candidate
            self.say(f"{candidate}: {repr(error)[:100]}")
            return None
        if not agrees:
            self.say(f"{candidate}: wrong result, left out")
        return result if agrees else None

    def fill_buffers(self, tokens: int) -> None:
        """What a step leaves in its buffers, random."""
        for buffer in self.module.buffers:
            tensor = getattr(self.program, buffer)
            tensor[:tokens].normal_() if tensor.is_floating_point() else tensor.zero_()

    def time(self, run: Callable) -> float:
        """Median µs of `run` as a CUDA graph: a few replays, since thousands are timed."""
        return microseconds(run, self.program.device, rounds=5, at_least=0.0)

    # ---- one kernel alone --------------------------------------------------------------------------------------------------

    def source(self, function, form):
        return next(s for s in function.sources if s.form == form)

    def batch(self, tokens: int) -> Batch:
        """A decode step of `tokens` sequences, CONTEXT tokens each."""
        if tokens not in self.batches:

            def make(*size):
                return torch.arange(*size, dtype=torch.int32, device=self.program.device)

            lengths = torch.full_like(make(tokens), CONTEXT + 1)
            self.batches[tokens] = Batch(
                ids=make(tokens), positions=lengths - 1, slots=make(tokens).long() * PAGES * PAGE + CONTEXT,
                query_starts=make(tokens + 1), context_lens=lengths, block_tables=make(tokens * PAGES).view(tokens, PAGES),
                rows=make(tokens), max_query=1, max_context=BUCKET, every=True,
            )  # fmt: skip
        return self.batches[tokens]

    def drawing(self, tokens: int) -> Drawing:
        """As a step of greedy rows has it, where the program draws."""
        if not self.program.draws:
            return NOTHING
        if tokens not in self.drawings:
            ints = torch.zeros(tokens, dtype=torch.int32, device=self.program.device)
            self.drawings[tokens] = Drawing(1, places(tokens, ints.device), ints.float(), ints, ints, ints)
        return self.drawings[tokens]

    def values(self, function, launch, batch, drawing=NOTHING) -> dict:
        """Parameter -> argument of one launch."""
        tokens, p = batch.ids.shape[0], self.program
        logits = None if drawing.mode else p._take("logits", tokens * p.vocab_size, torch.float32).view(tokens, p.vocab_size)
        scope = {"m": p, "w": p.weights, "c": p.caches, "b": batch, "d": drawing, "T": tokens, "N": tokens, "logits": logits}
        arguments = (eval(text, scope) for text in launch.arguments)  # our own generated text
        return dict(zip(function.params, arguments, strict=True))

    def launch(self, function, option: Candidate, tokens: int, values: dict) -> None:
        """Launches a candidate in the place of `function`. values: parameter of the launch function -> argument."""
        source, t = option.source, option.tiles
        leaves, reductions = source.facts["leaves"], source.facts["reductions"]
        found = values[source.facts["finds"]] if source.facts["finds"] else None
        draw = values["draw"] if source.facts["draws"] else None
        sizes = constants(t, leaves, reductions, draw, found and found.parts > 0)
        blocks = -(-source.facts["rows"] // t.block_n)
        if option.form == "gemv":
            grid = (blocks,)
        else:
            grid = (-(-tokens // t.block_m) * blocks, getattr(t, "splits", 1))
        arguments, described = [], blocks_of(source, t)
        for pointer in source.roles:
            value = pointed(values[pointer.removesuffix("_ptr")])
            if pointer in described and source.roles[pointer][0] != "weight":
                value = self.program.picked(value, self.batch(tokens)) if source.facts["picked"] else value[:tokens]
            described_as, k = described.get(pointer), source.facts["k"]
            arguments += [in_tiles(value, k, *block) for block in described_as] if described_as else [value]
        arguments += [tokens] if option.form != "gemv" else []
        arguments += [found.parts] if found else []
        kernel = getattr(load_kernels(option.path), option.name)
        kernel[grid](*arguments, **sizes, PDL=True, **t.options(leaves, reductions), launch_pdl=True)
        for left in {s.facts.get("leaves_sums") for s in function.sources} - {None}:
            values[left].parts = blocks if source.facts["leaves_sums"] else 0

    def alone(self, function, form, tokens, options, futures, deadline) -> list[tuple[float, Candidate]]:
        """(µs a launch, candidate), the fastest first: over all layers in turn."""
        batch = self.batch(tokens)
        launches = [n for n in self.module.launches if n.function == function.name]
        self.program.forward(batch, self.drawing(tokens))  # row reductions are left where a step leaves them
        calls = [self.values(function, launch, batch) for launch in launches * (3 if len(launches) == 1 else 1)]
        finds = [s.facts["finds"] for s in function.sources if s.facts.get("finds")]
        checked = calls[0] | dict.fromkeys(finds, self.program.no_sums)  # of random buffers a step has left none
        results = [p.removesuffix("_ptr") for p, role in self.source(function, "gemv").roles.items() if role[0] == "output"]
        self.fill_buffers(tokens)
        state = self.program.arena.clone()  # launches write over one another's inputs
        reference, ranked = None, []
        for option, future in zip(options, futures, strict=True):
            try:
                problem = future.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
            if problem:
                continue
            self.program.arena.copy_(state)

            def once(option=option):
                self.launch(function, option, tokens, checked)
                return checked[results[0]][:tokens]

            result = self.agreed(f"{function.name} {option.tiles}", once, reference)
            if result is None:
                continue
            reference = result if reference is None else reference
            us = self.time(lambda option=option: [self.launch(function, option, tokens, values) for values in calls])
            ranked.append((us / len(calls), option))
        return sorted(ranked, key=lambda pair: pair[0])

    # ---- the whole step ----------------------------------------------------------------------------------------------------

    def in_the_step(self, found: dict, attention: list[tuple], form: str, tokens: int, deadline: float):
        """As `together`, of the fastest alone in `found`, and then of the chosen ones' variants, whose times are added there."""
        few = {name: [option for _, option in rows[:FEW]] for name, rows in found.items()}
        tiles = {f.name: self.used(f, form, tokens) for f in self.contractions}
        used = {name: next((o for _, o in rows if o.tiles == tiles[name]), rows[0][1]) for name, rows in found.items()}
        soon = deadline - VARYING * (deadline - time.monotonic())
        choice, launch, ms = self.together(few, self.agreeing(attention, tokens), tokens, soon, used)
        if time.monotonic() >= deadline:
            return choice, launch, ms
        varied = self.variants_of(choice, form, tokens, deadline)
        launches = self.agreeing(self.warm_variants(launch, tokens), tokens)
        if varied or len(launches) > 1:
            found |= varied
            few = {name: [option for _, option in rows] for name, rows in varied.items()}
            choice, launch, ms = self.together(few, launches, tokens, deadline, choice)
        return choice, launch, ms

    def together(self, few: dict[str, list[Candidate]], attention, tokens: int, deadline: float, used=None):
        """(candidate of each kernel, launch of attention, ms of the step): each kernel's few take turns, twice at most. One takes
        another's place if the step is shorter with it, by whatever replays of both in turn can tell.

        The first launch in `attention` is the one in use. Without any, attention is left as it is, and None returned.
        used: the candidates in use, which the search begins with: tuning for a short time leaves nothing slower than it was. The
        fastest alone, all together, are the first to be tried.
        """
        launches = [launch for launch, future in attention if future.result() is None]
        alone, options = {name: several[0] for name, several in few.items()}, few | {ATTENTION: launches}
        choice = (used or alone) | {ATTENTION: launches[0] if launches else None}
        best = self.step(choice, tokens)
        ranks = itertools.zip_longest(*([{name: option} for option in several] for name, several in options.items()))
        trials = [trial for rank in ranks for trial in rank if trial]  # a short time is for the best of each
        for each in ([alone], trials, trials):
            before = best
            for trial in each:
                changed = {name: option for name, option in trial.items() if option is not choice[name]}
                if not changed or (time.monotonic() > deadline and trial is not alone):
                    continue
                try:
                    other = self.step(choice | changed, tokens)
                    better = proven_saving(turns(best, other)) > 0
                except Exception as error:  # noqa: BLE001  out of resources: no candidate
                    self.say(f"{changed}: {repr(error)[:100]}")
                    continue
                if better:
                    choice, best = choice | changed, other
            if each is trials and best is before:
                break
        return choice, choice.pop(ATTENTION), replay_microseconds(best) / 1e3

    def step(self, choice: dict, tokens: int) -> torch.cuda.CUDAGraph:
        """A decode step: candidates stand in for the kernels of `choice`, a launch for attention's own."""
        batch = self.batch(tokens)

        def stand_in(function, option):
            return lambda *values: self.launch(function, option, tokens, dict(zip(function.params, values, strict=True)))

        trial = {f.name: stand_in(f, choice[f.name]) for f in self.contractions if f.name in choice}
        if launch := choice[ATTENTION]:
            trial["decode_launch"] = lambda *_, **__: launch
        drawing = self.drawing(tokens)
        with self.standing_in(trial):
            return capture(lambda: self.program.forward(batch, drawing), self.program.device)


def write_table(table: dict[str, list[dict]], path: Path) -> None:
    """Merges `table` into the JSON table at `path`, one line a row. A row takes the place of that for as many tokens (or
    sequences of a context), and of several the first is taken, since two kernels may have one shape. Where another form than
    the stream is the fastest for a few tokens, the stream's row goes."""
    known, lines = json.loads(path.read_text()) if path.is_file() else {}, []

    def place(row):
        return row.get("tokens"), row.get("sequences"), row.get("context")

    for shape, rows in table.items():
        measured = {place(row): row for row in reversed(rows)}
        known[shape] = [row for row in known.get(shape, ()) if place(row) not in measured] + list(measured.values())
        form, _, rest = shape.partition(" ")
        most = max(TOKENS["skinny"])
        if form == "matmul" and 2 * most in {row.get("tokens") for row in rows}:  # it won against the others for so many tokens
            for other in (f"skinny {rest}", f"stream {rest}"):
                won = {place(row) for row in table.get(other, ())}
                known[other] = [row for row in known.get(other, ()) if row["tokens"] != most or place(row) in won]
        if form == "skinny" and (stream := f"stream {rest}") in known:
            streamed = {place(row) for row in table.get(stream, ())}
            known[stream] = [row for row in known[stream] if place(row) in streamed or place(row) not in measured]
    for key in sorted(key for key in known if known[key]):
        rows = sorted(known[key], key=lambda r: r.get("tokens") or r.get("sequences") or 1 << 30)
        lines.append(f'  "{key}": [' + ",\n    ".join(json.dumps(r) for r in rows) + "]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
