"""The build of a model: `kernels.py` (every kernel, readable), `program.py` (the launch sequence), and what the runtime must
provide.

Kernels of like layers have the same text and become one function. `program.py` holds one function a kernel, which picks the
form and the tiles by the number of tokens, and `step`, which calls them in order. Both are ordinary Python: edit a kernel and
run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ..ir.graph import Graph, Value
from ..passes.analysis import RUNTIME, cone
from ..passes.extract import free, leaf_name, result_name, unique
from ..passes.inline_heads import made_in_decode
from . import schedule
from .launches import COUNTS, Launches
from .row_sums import handovers
from .writer import Source, environment, fold, rename

HEADER = '''"""{title}

{body}
"""

'''


@dataclass
class Launch:
    """One call of `step`: the function, its arguments as Python text, and the kernel it runs (for explain)."""

    function: str
    arguments: list[str]
    kernel: Value


@dataclass
class Function:
    """A distinct kernel: its variants and the body of its launch function."""

    name: str
    params: list[str]
    sources: list[Source]
    launch: list[str]
    kernel: Value
    count: int = 0


@dataclass
class Weight:
    """A tensor that the runtime prepares when the model is loaded. value: the graph of weights that computes it.
    packing: None, or the facts of a contraction whose rows are packed (see contraction.py)."""

    name: str
    value: Value
    packing: dict | None

    @property
    def shape(self) -> tuple[int, ...]:
        p = self.packing
        return (p["leaves"], p["rows"], p["k"]) if p else tuple(d.size for d in self.value.dims)


@dataclass
class Module:
    """A compiled model. buffers: name -> (offset in bytes per token, elements per token, dtype).  caches: name -> sizes per
    token. partial, arrivals: elements of the scratch that split contractions share.  sums: elements of the row reductions that
    are left beside a buffer.  draws: whether `step` may be given a Drawing."""

    name: str
    dtype: str
    graph: Graph
    functions: list[Function] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    buffers: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    caches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    partial: int = 1
    arrivals: int = 1
    sums: dict[str, int] = field(default_factory=dict)
    draws: bool = False
    kernels_py: str = ""
    program_py: str = ""


def build(graph: Graph, *, dtype: str = "bfloat16", source_lines=None, title: str = "", gpu: str = schedule.DEFAULT) -> Module:
    """The module of a graph of kernels. source_lines(kernel) -> comment lines: the .fuse lines that a kernel implements."""
    return Builder(graph, dtype, source_lines or (lambda kernel: []), title, gpu).build()


class Builder:
    def __init__(self, graph, dtype, source_lines, title, gpu):
        self.module = Module(graph.name, dtype, graph)
        self.graph, self.dtype, self.title = graph, dtype, title
        self.handovers = handovers(graph)
        self.launches = Launches(dtype, gpu, source_lines, self.maker_of_logits(), self.handovers)
        self.by_text: dict[tuple, Function] = {}
        self.by_structure: dict[tuple, tuple] = {}
        self.names: dict[str, int] = {}
        self.weight_names: dict = {}
        self.names_of_weights: dict[str, int] = {}
        self.names_of_buffers: dict[str, int] = {}
        self.places: dict[Value, str] = {}
        self.results = {(v.inputs[0], v.attrs["index"]): v for v in graph.walk() if v.op == "get"}

    def build(self) -> Module:
        for value in self.graph.walk():
            if value.op == "kernel":
                self.add(value)
        module = self.module
        module.partial, module.arrivals, module.draws = self.launches.partial, self.launches.arrivals, self.launches.draws
        module.kernels_py = self.write_kernels()
        module.program_py = self.write_program()
        return module

    def maker_of_logits(self) -> Value | None:
        """The kernel that makes the program's result, if no other reads that."""
        (result, *more), users = self.graph.outputs, self.graph.users()
        return result.inputs[0] if not more and result.op == "get" and not users.get(result) else None

    # ---- one kernel ------------------------------------------------------------------------------------------------

    def add(self, kernel: Value):
        like = kernel is self.launches.result, self.handovers.of(kernel), structure(kernel)
        if like not in self.by_structure:  # like layers are written once
            self.by_structure[like] = self.write(kernel)
        function, params = self.by_structure[like]
        function.count += 1
        arguments = [self.place(kernel, role, function) for _, role in params]
        self.module.launches.append(Launch(function.name, arguments, kernel))

    def write(self, kernel: Value) -> tuple[Function, list[tuple[str, tuple]]]:
        """The function of a kernel, and what plays its parameters."""
        sources, launch, params = self.launches.of(kernel)
        key = (tuple(s.text for s in sources), tuple(launch), tuple(params), self.result_types(kernel))
        function = self.by_text.get(key)
        if function is None:
            label = unique(self.names, free(kernel.attrs["name"]))
            function = Function(label, [p for p, _ in params], [], [], kernel)
            for source in sources:
                final = label + source.name.removeprefix("kernel") if len(sources) > 1 else label
                helpers = re.findall(rf"def ({source.name}_\w+)\(", source.text)
                source.text = rename(source.text, source.name, final)
                for helper in helpers:
                    its = final + helper.removeprefix(source.name)
                    source.text = re.sub(rf"\b{helper}\b", its, rename(source.text, helper, its))
                function.launch = [
                    line.replace(f"kernels.{source.name}[", f"kernels.{final}[") for line in (function.launch or launch)
                ]
                source.name = final
            function.sources = sources
            self.by_text[key] = function
            self.module.functions.append(function)
        return function, params

    def result_types(self, kernel):
        return tuple(o.dtype for o in kernel.attrs["body"].outputs) + tuple(i.dtype for i in kernel.inputs)

    # ---- where things live -----------------------------------------------------------------------------------------

    def place(self, kernel: Value, role: tuple, function: Function) -> str:
        if role[0] == "tokens":
            return role[1]
        if role[0] == "scratch":
            return f"m.{role[1]}"
        if role[0] in ("model", "batch", "slots"):
            return {"model": "m", "batch": "b", "slots": "b.slots"}[role[0]]
        if role[0] == "drawing":
            return f"d.{role[1]}"
        if role[0] == "output":
            return self.buffer(self.results[kernel, role[1]])
        if role[0] == "sums":
            return self.sums(kernel, role, function)
        value = kernel.inputs[role[1]]
        if value.op == "input":
            return {"ids": "b.ids", "pos": "b.positions", "rows": "b.rows"}[value.attrs["name"]]
        if value.op == "get":
            return self.buffer(value)
        packing = None
        if role[0] == "weight":
            packing = next(s.facts for s in function.sources if "packing" in s.facts)
        return f'w["{self.weight(value, packing)}"]'

    def sums(self, kernel: Value, role: tuple, function: Function) -> str:
        """Where the row reductions that a kernel leaves or finds lie: beside the buffer that they are of."""
        maker = kernel if role[1] == "output" else self.handovers.takes[kernel]
        place = f"{self.buffer(self.results[maker, 0])}_sums" if maker else "m.no_sums"
        name = place.removeprefix("m.")
        if maker is kernel:
            made = next(s.facts for s in function.sources if s.facts.get("leaves_sums"))
            most = max(made["rows"] // t.block_n * t.tokens for t in made["tiles"]) * made["sums"]
            self.module.sums[name] = max(self.module.sums.get(name, 0), most)
        return place if name in self.module.sums else "m.no_sums"  # the maker may have no stream, or none of whole tiles

    def buffer(self, value: Value) -> str:
        if value in self.places:
            return self.places[value]
        numel = math.prod(d.size for d in value.dims if d.size is not None)
        body = value.inputs[0].attrs["body"].outputs[value.attrs["index"]]
        if body.op == "cache":
            name = body.attrs["name"]
            self.module.caches[name] = tuple(d.size for d in value.dims if d.size is not None)
            place = f'c["{name}"]'
        elif value in self.graph.outputs:
            place = "logits"
        else:
            dtype = {"x": self.dtype, "f32": "float32", "int": "int32", "bool": "bool"}[value.dtype]
            known = {v: n for n, v in self.module.buffers.items()}
            spec = (value.attrs["offset"], numel, dtype)
            name = known.get(spec) or unique(self.names_of_buffers, leaf_name(value))
            self.module.buffers[name] = spec
            place = f"m.{name}"
        self.places[value] = place
        return place

    def weight(self, value: Value, packing) -> str:
        identity = packing is None or is_identity(packing, value)
        key = (value, None if identity else str(packing["packing"]))
        if key not in self.weight_names:
            paths = [v.attrs["key"] for v in cone(value, lambda v: False) if v.op == "weight"]
            prefix = common(paths) if paths else "constants"
            name = unique(self.names_of_weights, f"{prefix}.{leaf_name(value)}".lstrip("."))
            self.weight_names[key] = name
            self.module.weights[name] = Weight(name, value, None if identity else packing)
        return self.weight_names[key]

    # ---- the two files ---------------------------------------------------------------------------------------------

    def write_kernels(self) -> str:
        head = HEADER.format(
            title=f"The kernels of {self.title or self.graph.name}, generated by fusec.",
            body="Arithmetic is float32 inside a kernel; values are rounded to their own type where they are stored.",
        )
        text = "".join("\n\n" + s.text.strip("\n") + "\n" for f in self.module.functions for s in f.sources)
        return fold(head + preamble(text) + text)

    def write_program(self) -> str:
        drawn = ",\n`d` how tokens are drawn (fusec.runtime.drawing.Drawing)." if self.module.draws else "."
        head = HEADER.format(
            title=f"One step of {self.title or self.graph.name}, generated by fusec: the launches, in order.",
            body=(
                "T tokens are packed into a step, N of their rows are wanted as logits. `m` holds the arena's buffers,\n"
                "`w` the packed weights, `c` the caches, `b` the batch (fusec.runtime.batch.Batch)" + drawn
            ),
        )
        head += "import torch\nimport triton\nfrom fusec.codegen.attention_schedule import decode_launch, prefill_launch\n"
        described = any(s.facts.get("described") for f in self.module.functions for s in f.sources)
        head += "from fusec.runtime.carveout import share_memory\n"
        head += "from fusec.runtime.drawing import NOTHING\n" if self.module.draws else ""
        head += "from fusec.runtime.tiles import tiles\n\n" if described else "\n"
        head += "import kernels\n\n"
        head += "PDL = True  # each launch starts while the one before it drains, and waits for its results where it needs them\n"
        if described:
            head += "HOPPER = True  # the GPU has the bulk copies and warpgroup products of the stream kernels\n"
        parts = [head]
        for f in self.module.functions:
            lines = [f"def {f.name}({', '.join(f.params)}):", *("    " + line for line in f.launch)]
            parts.append("\n\n" + "\n".join(lines) + "\n")
        output = self.graph.outputs[0]
        size = math.prod(d.size for d in output.dims if d.size)
        rows = COUNTS[next(d.name for d in output.dims if d.name in RUNTIME)]
        if self.module.draws:
            lines = [
                "def step(m, b, d=NOTHING):",
                '    """Logits of the wanted rows: float32 [N, V]. None if `d` draws several: d.best has their best tokens."""',
            ]
        else:
            lines = ["def step(m, b):", '    """Logits of the wanted rows: float32 [N, V]."""']
        made = f"torch.empty(({rows}, {size}), dtype=torch.float32, device=b.ids.device)"
        lines += [
            "    w, c = m.weights, m.caches",
            "    T, N = b.ids.shape[0], b.rows.shape[0]",
            f"    logits = {f'None if d.mode and {rows} > 1 else ' if self.module.draws else ''}{made}",
        ]
        lines += [f"    {launch.function}({', '.join(launch.arguments)})" for launch in self.module.launches]
        lines += ["    return logits"]
        return fold("".join(parts) + "\n\n" + "\n".join(lines) + "\n")


def preamble(text: str) -> str:
    """What the kernels in `text` import and call."""
    head = "import triton\nimport triton.language as tl\n"
    if "@gluon.jit" in text:
        head += environment().get_template("gluon_imports.py.jinja").render()
    head += "from triton.language.extra import libdevice\n" if "libdevice." in text else ""
    head += "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
    head += "from fusec.runtime.best_token import keep_best\n" if "keep_best(" in text else ""
    if "@gluon.jit" in text:
        head += "\n" + environment().get_template("gluon_names.py.jinja").render()
    code = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
    for helper in ("gdc_wait_in_loop", "threads_meet", "sigmoid"):
        if re.search(rf"(?<![\w.]){helper}\(", code):
            head += "\n\n" + environment().get_template(f"{helper}.py.jinja").render()
    return head


def structure(kernel: Value) -> tuple:
    """What the source of a kernel depends on: equal for kernels of like layers."""
    a = kernel.attrs
    heads = ()
    if "heads" in a:  # the text of the row kernel that it makes the rows of is part of its own
        own = made_in_decode(kernel.inputs[: a["heads"]])
        heads = (a["heads"], shape_of(own[0].inputs[0].attrs["body"]), tuple(i.attrs["index"] for i in own))
    types = tuple(i.dtype for i in kernel.inputs)
    return a["kind"], a["name"], heads, a.get("inlined"), types, shape_of(a["body"])


def shape_of(body: Graph) -> tuple:
    """The body with numbers for operands, and without the names of its caches, which are the layers' own."""
    number, rows = {}, []
    for value in (*body.inputs, *body.walk()):
        if value in number:
            continue
        number[value] = len(number)
        attrs = {k: shape_of(a) if isinstance(a, Graph) else a for k, a in value.attrs.items()}
        if value.op == "cache":
            attrs["name"] = result_name(value)
        operands = tuple(number[i] for i in value.inputs)
        rows.append((value.op, operands, repr(attrs), value.dtype, value.dims, value.origin.file, value.origin.line))
    return tuple(rows), tuple(number[o] for o in body.outputs)


def common(keys: list[str]) -> str:
    """The dotted path that all keys share."""
    split = [k.split(".")[:-2] for k in keys]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def is_identity(packing: dict, value: Value) -> bool:
    """The packed weight is the value as it lies: one leaf, rows in order, contracted dims last."""
    if packing["leaves"] != 1 or list(value.names) != [*packing["n_dims"], *packing["k_dims"]]:
        return False
    at = 0
    for offset, strides, sizes, first, count in packing["packing"][0]:
        step = 1
        for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
            if stride != step:
                return False
            step *= size
        if offset != at or first != 0 or count != math.prod(sizes):
            return False
        at += count
    return True
