"""How a kernel is launched: its forms as source, and the body of its launch function, which picks form and tiles by the tokens.

`Launches(...).of(kernel)` gives (sources, lines, params): the kernel's variants, the lines of `def name(params): …` in
`program.py`, and for each parameter what plays it (see `module.Builder.place`).
"""

from __future__ import annotations

from ..errors import UserError
from ..ir.graph import Graph, S, Value
from ..passes.analysis import statics
from ..passes.inline_heads import made_in_decode
from . import attention as attention_body
from . import schedule
from .contraction import Contraction
from .contraction_kernel import blocks_of, contraction
from .row_kernel import head_rows, row_kernel
from .row_sums import Handovers
from .writer import Source, environment

COUNTS = {"T": "T", "T'": "N"}  # run-time dim -> what generated code calls its size


class Launches:
    """Writes the launches of one program. partial, arrivals: elements of scratch that its split contractions share.  result: the
    kernel that makes its logits, if that is all they are needed for.  draws: whether it can draw tokens from them.
    handovers: which kernels leave row reductions for which."""

    def __init__(self, dtype: str, gpu: str, source_lines, result: Value | None, handovers: Handovers):
        self.dtype, self.gpu, self.source_lines, self.result = dtype, gpu, source_lines, result
        self.handovers = handovers
        self.draws = False
        self.itemsize = 4 if dtype == "float32" else 2
        self.partial = self.arrivals = 1
        self.begun = False  # whether the program has a kernel: all but the first may start while the one before drains

    def of(self, kernel: Value) -> tuple[list[Source], list[str], list[tuple[str, tuple]]]:
        """To be asked of a program's kernels in their order. Raises UserError for a body of attention that the template does not
        implement."""
        try:
            sources, lines, params = getattr(self, kernel.attrs["kind"])(kernel)
        except attention_body.Unmatched as problem:
            raise unsupported(kernel, str(problem)) from None
        if not self.begun:
            lines = ["# A step begins when the one before is over: decode attention reads history before it waits.", *lines]
        self.begun = True
        return sources, lines, params

    def contract(self, kernel):
        """A launch function that picks the form by the number of tokens: one, a few, many, or enough for the vendor's."""
        parts = Contraction(kernel.attrs["body"])
        comment = self.source_lines(kernel)
        shape = (parts.n, parts.k, parts.leaves, self.itemsize, self.gpu)
        rows = COUNTS[parts.row_dim]
        vendor = schedule.vendor_from(*shape) if parts.x.op == "input" else None
        streams = schedule.stream(*shape) if parts.streams else ()
        kinds = sorted({(t.form, len(t.pieces)) for t in streams})
        plan = [(schedule.gemv(*shape),), *(tuple(t for t in streams if (t.form, len(t.pieces)) == kind) for kind in kinds),
                schedule.skinny(*shape), schedule.matmul(*shape)]  # fmt: skip
        draws = kernel is self.result and parts.makes_logits
        hands = self.handovers.makes.get(kernel), kernel in self.handovers.takes
        self.draws |= draws
        stats = None
        if parts.beside and vendor:  # the row reductions, by a kernel of their own
            block_k = min(1024, schedule.padded(parts.k))
            stats = contraction(kernel, "kernel_stats", "stats", comment, self.dtype, 1, block_k, parts)
        sources, lines, reached = [], [], 0
        for tiles in filter(None, plan):
            form, pieces = tiles[0].form, len(tiles[0].pieces)
            block_n = max((t.block_n for t in tiles), key=lambda size: parts.n % size)
            block_k = max((t.block_k for t in tiles), key=lambda size: parts.k % size)
            name = f"kernel_{form}_{pieces}" if form == "wide" else f"kernel_{form}"
            source = contraction(kernel, name, form, comment, self.dtype, block_n, block_k, parts, draws, *hands, pieces)
            source.facts["tiles"] = tiles
            sources.append(source)
            for t in tiles:
                if source.facts["described"]:  # a stream
                    lines.append(f"elif HOPPER and {t.least} <= {rows} <= {t.tokens}:")
                    lines += indent(self.launch(source, parts, rows, t))
                    if left := source.facts["leaves_sums"]:
                        lines.append(f"    {left}.parts = {parts.n // t.block_n}")
                    continue
                limit = 1 if form == "gemv" else t.tokens or vendor
                if limit and limit <= reached:
                    continue
                reached = limit
                test = f"{rows} == 1" if form == "gemv" else f"{rows} <= {limit}"
                lines.append(f"{'elif' if lines else 'if'} {test}:" if limit else "else:")
                lines += indent(self.launch(source, parts, rows, t))
        sources += [stats] if stats else []
        if vendor:
            tail, text = self.vendor(kernel, parts, rows, comment, stats, draws)
            sources += tail
            lines += ["else:", *indent(text)]
        params = merge(*(s.roles for s in sources))
        if left := next((s.facts["leaves_sums"] for s in sources if s.facts.get("leaves_sums")), None):
            lines = [f"{left}.parts = 0", *lines]
        picks = streams and parts.stored[1]
        model = [("m", ("model",))] if vendor or picks else []
        batch = [("b", ("batch",))] if picks else []
        mode = [("draw", ("drawing", "mode"))] if draws else []
        return sources, lines, [*model, *batch, *mode, (rows, ("tokens", rows)), *params]

    def launch(self, source: Source, parts: Contraction, rows: str, t) -> list[str]:
        """One launch of a contraction kernel with tiles `t`."""
        blocks = f"triton.cdiv({parts.n}, {t.block_n})"
        shape = parts.leaves, len(parts.beside)
        constants, options = t.constants(*shape), t.options(*shape)
        if source.form == "gemv":
            return self.call(source, f"({blocks},)", None, constants, options)
        grid = f"triton.cdiv({rows}, {t.block_m}) * {blocks},"
        if "SPLITS" in constants:
            grid += f" {t.splits}"
        if constants.get("SPLITS", 1) > 1:
            tokens = -(-t.tokens // t.block_m) * t.block_m
            blocks = -(-parts.n // t.block_n)
            sums = max(1, len(parts.beside)) * tokens * blocks
            self.partial = max(self.partial, t.splits * (parts.leaves * blocks * t.block_n * tokens + sums))
            self.arrivals = max(self.arrivals, tokens // t.block_m * blocks)
        if found := source.facts["finds"]:
            constants["HANDED"] = f"{found}.parts > 0{' and b.every' if source.facts['picked'] else ''}"
        return self.call(source, f"({grid})", rows, constants, options, blocks_of(source, t))

    def vendor(self, kernel, parts: Contraction, rows: str, comment, stats: Source | None, draws: bool):
        """(sources, lines): the vendor's matmul, and what surrounds it. A sum with one stored value is the matmul's own."""
        x = parts.x.attrs["name"]
        matrix = f"{parts.matrix.attrs['name']}.view({parts.leaves * parts.n}, {parts.k}).t()"
        residual = parts.plain_sum()
        if residual is not None:
            return [], [f"torch.addmm({residual}[:{rows}], {x}[:{rows}], {matrix}, out=out[:{rows}])"]
        lines = [f"product = m.product({rows}, {parts.leaves * parts.n})", f"torch.mm({x}[:{rows}], {matrix}, out=product)"]
        if stats:
            lines += [f"stats = m.stats({rows}, {len(parts.beside)})"]
            tiles = {"BLOCK_M": 4, "BLOCK_K": stats.facts["block_k"]}
            lines += self.call(stats, f"(triton.cdiv({rows}, 4),)", rows, tiles, {"num_warps": 4})
        block_n = min(256, schedule.padded(parts.n))
        tail = contraction(kernel, "kernel_epilogue", "epilogue", comment, self.dtype, block_n, 1, parts, draws)
        grid = f"(triton.cdiv({rows}, 8) * triton.cdiv({parts.n}, {block_n}),)"
        lines += self.call(tail, grid, rows, {"BLOCK_M": 8, "BLOCK_N": block_n}, {"num_warps": 4})
        return [tail], lines

    def rows(self, kernel):
        source = row_kernel(kernel, "kernel_rows", self.source_lines(kernel), self.dtype)
        f = source.facts
        block_m = max(1, min(16, 1024 // schedule.padded(f["width"])))
        warps = 8 if f["width"] > 2048 else 4
        source.facts["tiles"] = {"BLOCK_M": block_m, "num_warps": warps}
        tokens = COUNTS[f["row_dim"]]
        blocks = [f"triton.cdiv({tokens}{f' * {n}' if n > 1 else ''}, {block_m})" for n in f["repeats"]]
        lines = self.call(source, f"({' + '.join(blocks)},)", tokens, {"BLOCK_M": block_m}, {"num_warps": warps})
        batch = [("b", ("batch",))] if kernel.attrs.get("inlined") else []
        if batch:
            lines = ["if b.max_query == 1:", "    return  # decode attention makes them itself", *lines]
        return [source], lines, [*batch, (tokens, ("tokens", tokens)), *merge(source.roles)]

    def attention(self, kernel):
        via = kernel.attrs["body"].outputs[0]
        a = attention_body.match(via.attrs["body"])
        comment = self.source_lines(kernel)
        operand = {i: kernel.attrs["body"].inputs.index(operand) for i, operand in enumerate(via.inputs)}
        params = [
            ("m", ("model",)),
            ("b", ("batch",)),
            ("q", ("input", operand[a.q])),
            ("k_cache", ("input", operand[a.k])),
            ("v_cache", ("input", operand[a.v])),
            ("out", ("output", 0)),
        ]
        heads = self.heads(kernel, a, params) if "heads" in kernel.attrs else None
        sources = []
        for form in ("decode", "prefill"):
            k = {
                "name": f"kernel_{form}",
                "comment": comment,
                "score": a.score,
                "mask": a.mask,
                "first": a.first,
                "causal": a.causal,
                "dense": a.dense,
                "extra": a.extra,
                "heads": heads,
            }
            text = environment().get_template(f"attention_{form}.py.jinja").render(k=k)
            facts = {"attention": a, "heads": heads["kinds"] if heads else [], "inputs": heads["inputs"] if heads else {}}
            sources.append(Source(f"kernel_{form}", form, text, {}, facts))
        sizes = f"G={a.G}, R={a.R}, K={a.K}, J={a.J}, page=m.block_size, itemsize={self.itemsize}, pdl=PDL"
        stride = a.G * a.R * a.K
        made = "".join(f" {name}," for name in heads["arguments"]) if heads else ""
        buffers = {
            "decode": f"b.block_tables, b.context_lens, out, *m.scratch(launch, sequences),{made} sequences",
            "prefill": "b.block_tables, b.query_starts, b.context_lens, out",
        }
        lines = ["sequences = b.context_lens.shape[0]", "if b.max_query == 1:"]
        tables = {"decode": f', gpu="{self.gpu}"', "prefill": ""}  # prefill's tiles follow a rule alone
        for form, size in (("decode", "b.max_context"), ("prefill", "b.max_query")):
            lines += ["else:"] if form == "prefill" else []
            lines += [
                f"    launch = {form}_launch(sequences, {size}, {sizes}{tables[form]})",
                f"    {'kernel = ' if form == 'decode' else ''}kernels.kernel_{form}[launch.grid](",
                f"        q, k_cache, v_cache, {buffers[form]}, {stride}, b.block_tables.stride(0),",
                "        **launch.constants, **launch.options)",
            ]
            lines += ["    share_memory(kernel, launch.shared)"] if form == "decode" else []
        return sources, lines, params

    def call(self, source: Source, grid: str, tokens: str | None, constants: dict, options: dict,
             blocks: dict[str, list[tuple[int, int]]] | None = None) -> list[str]:  # fmt: skip
        """A launch.  options: what Triton is told besides.  blocks: what is described to the bulk copy engine, see blocks_of."""
        pointers = []
        for pointer in source.roles:
            name = pointer.removesuffix("_ptr")
            if blocks and pointer in blocks:
                if source.roles[pointer][0] != "weight":
                    name = f"m.picked({name}, b)" if source.facts["picked"] else f"{name}[:{tokens}]"
                pointers += [f"tiles({name}, {source.facts['k']}, {rows}, {columns})" for rows, columns in blocks[pointer]]
                continue
            pointers.append(f"{name}.place" if source.roles[pointer][0] == "sums" else name)
        found = source.facts.get("finds")
        arguments = ", ".join([*pointers, *([tokens] if tokens else []), *([f"{found}.parts"] if found else [])])
        if source.facts.get("draws"):
            constants = constants | {"DRAW": "draw"}
        sizes = ", ".join(f"{k}={v}" for k, v in constants.items())
        lines, early = [f"kernels.{source.name}[{grid}](", f"    {arguments},"], "PDL" if self.begun else "False"
        told = ", ".join(f"{k}={v}" for k, v in options.items()) + f", launch_pdl={early})"
        if "maxnreg" in options:
            return [*lines, f"    {sizes},", f"    PDL=PDL, {told}"]
        return [*lines, f"    {sizes}, PDL=PDL, {told}"]

    def heads(self, kernel, a, params) -> dict:
        """What a row kernel makes of the heads, as a function that decode attention calls: its text, what it takes, and what the
        launch gives for that; the launch's own parameters are added to `params`."""
        own = kernel.attrs["heads"]
        made = made_in_decode(kernel.inputs[:own])
        rows = made[0].inputs[0]
        text, roles = head_rows(rows, "kernel_decode_heads", self.source_lines(rows), self.dtype, a.G)
        known = {role: name for name, role in params}
        results = {i.attrs["index"]: kernel.inputs.index(i) for i in made}
        pointers, arguments, kinds, inputs = [], [], [], {}
        for pointer, role in roles.items():
            if role[0] == "output":  # one of attention's own operands
                name, kind = known["input", results[role[1]]], "x"
            elif role[0] == "slots":
                name, kind = "b.slots", "slots"
            else:
                name, kind = f"of_{pointer.removesuffix('_ptr')}", kernel.inputs[own + role[1]].dtype
                inputs[name] = own + role[1]
                params.append((name, ("input", own + role[1])))
            pointers.append(pointer)
            arguments.append(name)
            kinds.append({"x": self.dtype, "slots": "int64", "int": "int32", "bool": "bool"}.get(kind, "float32"))
        return {"text": text, "pointers": pointers, "arguments": arguments, "kinds": kinds, "inputs": inputs}


def check_supported(graph: Graph) -> None:
    """Raises UserError for what no template implements, before anything is fused around it."""
    static = statics(graph)
    for value in graph.walk():
        if value.op == "top":
            raise unsupported(value, "top: a routed stack")
        if value.op == "contract" and not static & set(value.inputs):
            raise unsupported(value, "a contraction of two values that both change with every token")
        if S in value.dims and value.op != "cache":
            raise unsupported(value, "work along the history S outside attention (keys or values computed from a cache)")


def unsupported(value: Value, found: str) -> UserError:
    """What no template implements: the program is right, and torch can run it."""
    origin = value.origin
    where = f"{origin.file}:{origin.line}" if origin.line else value.op
    return UserError(
        f"no kernel template implements {where} efficiently",
        found=found,
        expected="row kernels, contractions of activations with weights, and attention over cached keys and values",
        hint="fusec run --device cpu runs it through torch",
    )


LOCAL = ("product", "stats")  # scratch that a launch function takes from the model itself


def merge(*roles: dict[str, tuple]) -> list[tuple[str, tuple]]:
    """The parameters of a launch function: each pointer once."""
    table: dict[str, tuple] = {}
    for role in roles:
        for name, what in role.items():
            if what[0] == "scratch" and what[1] in LOCAL:
                continue
            assert table.setdefault(name.removesuffix("_ptr"), what) == what, name
    return list(table.items())


def indent(lines):
    return ["    " + line for line in lines]
