"""Random small programs through the whole compiler: every pass keeps their meaning, and their generated kernels compute it.

A program looks a row up in a table of weights, then goes where `random_programs` leads: projections, norms, rotations,
splits, joins, attention over a cache. The oracle is the float64 interpreter on the graph as it was made.
"""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from interpret import INTERPRETED, run_interpreted
from random_programs import DIMS, MAX_DIMS, _Maker, random_arguments

from fusec.codegen import row_kernel
from fusec.codegen.module import build
from fusec.compiler import Compiled, widened
from fusec.errors import UserError
from fusec.ir.graph import Dim, Graph, S, T
from fusec.ir.interpreter import EXACT, dtypes, evaluate
from fusec.ir.ops import make
from fusec.ir.text import print_graph
from fusec.ir.verify import verify
from fusec.passes import PIPELINE

V = Dim("V", 11)
G, R, K = Dim("G", 2), Dim("R", 2), Dim("K", 16)


class ProgramMaker(_Maker):
    """Programs with the inputs that a language model has (ids and pos) and one result."""

    def __init__(self, draw):
        super().__init__(draw)
        self.ids = make("input", name="ids", dtype="int", dims=(T,))
        self.x = self.make("gather", self.weight(V, *self.some(list(DIMS.values()), 1, 2)), self.ids, dim="V")
        self.pool, self.caches = [self.x], 0

    def graph(self):
        moves = [self.unary, self.binary, self.scale, self.reduce, self.project, self.project, self.projections, self.norm,
                 self.norm, self.rotate, self.heads, self.concatenate, self.cast, self.choose, self.attend]
        for move in self.draw(st.lists(st.sampled_from(moves), min_size=3, max_size=9)):
            for value in move():
                if len(value.dims) <= MAX_DIMS and T in value.dims:
                    self.pool.append(value)
        result = next(v for v in reversed(self.pool) if len(v.dims) > 1)
        return Graph("random", (self.ids, self.pos), (widened(result),), {"dtype": "float32"})

    def attend(self):
        """Causal attention of q over cached k and v, all projected from one value."""
        value = self.value()
        if not self.static(value):
            return []
        if value.dtype != "x":
            value = self.make("cast", value, to="x")
        over = self.static(value)
        names = tuple(d.name for d in over)
        q, k, v = (self.make("contract", value, self.weight(*dims, *over), over=names) for dims in ((G, R, K), (G, K), (G, K)))
        self.caches += 1
        k, v = (self.make("cache", x, name=f"layer{self.caches}.{n}") for x, n in ((k, "k"), (v, "v")))
        body = attention(q, k, v, self.pos)
        out = self.make("via", q, k, v, self.pos, template="attention", body=body, dtype="x", dims=q.dims)
        return [self.make("contract", out, self.weight(*over[:1], G, R, K), over=("G", "R", "K"))]


def attention(*operands) -> Graph:
    """std.fuse's attend, causal."""
    names = ("q", "k", "v", "pos")
    inputs = tuple(make("input", name=n, dtype=o.dtype, dims=o.dims) for n, o in zip(names, operands, strict=True))
    q, k, v, pos = inputs
    s = make("mul", make("sum", make("mul", q, k), over=("K",)), make("const", value=0.25))
    keep = make("le", make("index", dtype="int", dims=(S,)), pos)
    s = make("where", keep, make("cast", s, to="f32"), make("const", value=float("-inf")))
    e = make("exp", make("sub", s, make("max", s, over=("S",))))
    p = make("cast", make("div", e, make("sum", e, over=("S",))), to="x")
    return Graph("attend", inputs, (make("sum", make("mul", p, v), over=("S",)),))


programs = st.composite(lambda draw: ProgramMaker(draw).graph())


def arguments(graph, tokens):
    _, weight = random_arguments(graph, tokens)
    ids = torch.arange(tokens) * 7 % V.size
    return {"ids": ids, "pos": torch.arange(tokens), "rows": torch.arange(tokens)}, weight


def run(graph, tokens=5, dtype=torch.float64):
    given, weight = arguments(graph, tokens)
    types = EXACT if dtype == torch.float64 else dtypes(dtype)
    given = {i.attrs["name"]: given[i.attrs["name"]] for i in graph.inputs}
    (out,) = evaluate(graph, given, lambda value: weight(value).to(dtype), types)
    return out.double()


def compiled(graph) -> Graph:
    verify(graph)
    for rule in PIPELINE:
        graph = rule(graph)
        verify(graph, after=rule.__name__)
    return graph


OPTIONS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

if INTERPRETED:
    from program_checks import make_batch
    from test_programs import interpreted

    class Weights:
        """What random_arguments draws, in float32."""

        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self, graph):
            self.weight = random_arguments(graph, dtype=torch.float32)[1]

        def __call__(self, value):
            return self.weight(value)

    @settings(max_examples=24, **OPTIONS)
    @given(programs(), st.sampled_from((4, row_kernel.ROW_BLOCK)))
    def test_generated_kernels(graph, row_block):
        """row_block: 4 makes every row a long one, which is walked in a loop."""
        kernels = compiled(graph)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(row_kernel, "ROW_BLOCK", row_block)
                module = build(kernels, dtype="float32")
        except UserError:
            assume(False)
        for tokens in (1, 3, 66):
            program = interpreted(Compiled("", None, kernels, "float32", module), Weights(graph))
            program.allocate_cache(-(-tokens // 4), 4)
            ids = [torch.arange(tokens) * 7 % V.size]
            batch = make_batch([0], [tokens], 4, -(-tokens // 4), V.size, None, "cpu", ids)
            want, plain = run(graph, tokens).flatten(1), run(graph, tokens, torch.float32).flatten(1)
            got = program.forward(batch).double()
            bound = 1e-6 + 1e-5 * want.norm() + 10 * (plain - want).norm()  # a sine of a large number is hard for anyone
            assert (got - want).norm() <= bound, (tokens, print_graph(kernels, origins=False))
else:

    @settings(max_examples=150, **OPTIONS)
    @given(programs())
    def test_fused_equals_unfused_equals_float64(graph):
        after = compiled(graph)
        assert [d for d in after.outputs[0].names if d != "T'"] == [d for d in graph.outputs[0].names if d != "T"]
        assert torch.allclose(run(after), run(graph), rtol=1e-8, atol=1e-8)

    @settings(max_examples=100, **OPTIONS)
    @given(programs())
    def test_what_no_template_implements_is_said_in_words(graph):
        after = compiled(graph)
        try:
            module = build(after, dtype="bfloat16")
        except UserError as error:
            assert "no kernel template implements" in error.title
            return
        compile(module.kernels_py, "kernels.py", "exec")
        compile(module.program_py, "program.py", "exec")

    def test_interpreted():
        run_interpreted(__file__)
