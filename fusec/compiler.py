"""From a `.fuse` program and a config to a module: the driver that runs the front end, the passes and code generation in order.

    compiled = compile("examples/llama.fuse", config)         # pure: no GPU, no checkpoint, no torch
    compiled.module.kernels_py, compiled.module.program_py     # the two generated files
    compiled.stages                                            # (pass name, graph) for --print-after
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from . import language
from .codegen.launches import check_supported
from .codegen.module import Module, build
from .codegen.schedule import DEFAULT
from .errors import UsageError, UserError
from .ir.graph import Graph, Value
from .ir.ops import make
from .passes import PIPELINE, TORCH_PIPELINE
from .passes.analysis import cone

DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Compiled:
    """A compiled program.

    config: the keys of config.json it was compiled for (None: the program's own defaults).  graph: of kernels (triton) or
    of primitives (torch).  stages: the graph after each pass, if they were kept.  module: the generated source (triton
    backend only).  seconds: time by phase.
    """

    source: Path | str
    config: dict | None
    graph: Graph
    dtype: str
    module: Module | None
    stages: list[tuple[str, Graph]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def compile(
    source=None,
    config: dict | None = None,
    *,
    dtype: str = "bfloat16",
    backend: str = "triton",
    gpu: str = DEFAULT,
    keep_stages: bool = False,
    verify: bool = False,
) -> Compiled:
    """Compiles a program.

    source: path or text of a `.fuse` program; None finds the example for `config["architectures"][0]`.  config: the keys of a
    config.json; None: the program's own defaults.  dtype: what "x" means: bfloat16, float16 or float32.  backend: "triton"
    writes kernels; "torch" stops at the graph that torch evaluates.  gpu: whose table of tiles to use (schedule.gpu_key).
    verify: check the graph between passes.  Raises DiagnosticError for mistakes in the program, UserError for the rest.
    """
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", expected=", ".join(DTYPES), found=str(dtype))
    clock = time.perf_counter()
    source = source_for(source, config)
    graph = language.load(source, config)
    check_inputs(graph)
    check_sizes(graph)
    seconds = {"language": time.perf_counter() - clock}
    graph = Graph(graph.name, graph.inputs, tuple(widened(o) for o in graph.outputs), graph.attrs | {"dtype": dtype})
    if backend == "triton":
        check_supported(graph)
    stages = [("elaborate", graph)] if keep_stages else []
    clock = time.perf_counter()
    for run in PIPELINE if backend == "triton" else TORCH_PIPELINE:
        graph = run(graph)
        if verify:
            from .ir.verify import verify as check

            check(graph)
        if keep_stages:
            stages.append((run.__name__, graph))
    seconds["passes"] = time.perf_counter() - clock
    module = None
    if backend == "triton":
        clock = time.perf_counter()
        title = Path(source).name if isinstance(source, Path) else ""
        module = build(graph, dtype=dtype, source_lines=SourceLines(source), title=title, gpu=gpu)
        seconds["codegen"] = time.perf_counter() - clock
    return Compiled(source, config, graph, dtype, module, stages, seconds)


def source_for(source, config: dict | None):
    """`source`, or the shipped program for the config's architecture."""
    if source is not None:
        return source
    named = (config or {}).get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise UserError("the config names no architecture", expected='"architectures": ["LlamaForCausalLM"], or the like',
                        found=repr(named), hint="name a program with --source model.fuse")  # fmt: skip
    return language.find_example(named[0])


INPUTS = ("ids", "pos", "rows")  # what the runtime hands to a model; rows: the tokens whose logits are wanted


def check_inputs(graph: Graph) -> None:
    """Raises UserError for a parameter of the model that no runtime can give it."""
    for value in graph.inputs:
        if value.attrs["name"] not in INPUTS:
            raise UserError(f"the model asks for {value.attrs['name']}", expected="ids: int[T] and pos: int[T], by these names",
                            found=value.attrs["name"], hint="declare it as model M(ids: int[T], pos: int[T])")  # fmt: skip


def check_sizes(graph: Graph) -> None:
    """Raises UserError for a size that no tensor can have."""
    for dim in {d for value in graph.walk() for d in value.dims if d.size is not None}:
        if dim.size < 1:
            hint = "see the model's config.json"
            raise UserError(f"{dim.name} is no size", expected="a positive number", found=str(dim.size), hint=hint)


def widened(output: Value) -> Value:
    """Logits leave the program as float32: they are rounded nowhere on the way to the sampler."""
    return output if output.dtype == "f32" else make("cast", output, to="f32", origin=output.origin)


class SourceLines:
    """kernel -> the `.fuse` lines that it implements, as comment lines."""

    def __init__(self, source):
        self.files: dict[str, list[str]] = {}
        self.source = source

    def __call__(self, kernel: Value) -> list[str]:
        body = kernel.attrs["body"]
        seen: dict[tuple[str, int], None] = {}
        values = [v for output in body.outputs for v in cone(output, lambda v: v.op == "input")]
        for value in values:
            for inner in [value, *(value.attrs["body"].walk() if value.op == "via" else [])]:
                origin = inner.origin
                if origin.line and inner.op != "const":  # a literal is shared by all who use it
                    seen[(origin.file, origin.line)] = None
        lines = []
        for file, line in sorted(seen):
            text = self.text(file, line)
            if text:
                lines.append(f"{Path(file).name}:{line:<4} {text}")
        return lines

    def text(self, file: str, line: int) -> str:
        if file not in self.files:
            self.files[file] = self.read(file)
        lines = self.files[file]
        return lines[line - 1].partition("#")[0].strip() if 0 < line <= len(lines) else ""

    def read(self, file: str) -> list[str]:
        if file == "std.fuse":
            from importlib import resources

            return resources.files("fusec.grammar").joinpath("std.fuse").read_text(encoding="utf-8").splitlines()
        if isinstance(self.source, str) and "\n" in self.source:
            return self.source.splitlines()
        try:
            return Path(file).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
