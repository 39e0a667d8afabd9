"""Random small graphs for property tests: what a pass returns must verify, and compute what it was given.

    @given(graphs())
    def test_pass(graph):
        after = some_pass(graph)
        verify(after)
        arguments, weight = random_arguments(graph)
        assert_close(evaluate(graph, arguments, weight), evaluate(after, arguments, weight))

The values stay of moderate size and depend smoothly on the inputs, so that float64 evaluations agree to 1e-9 whatever the order.
"""

import zlib

import torch
from hypothesis import strategies as st

from fusec.ir.graph import Dim, Graph, Origin, T
from fusec.ir.interpreter import storage_view
from fusec.ir.ops import make

DIMS = {"A": Dim("A", 3), "B": Dim("B", 4), "C": Dim("C", 6), "D": Dim("D", 8)}
MAX_DIMS = 4


def random_graph(draw) -> Graph:
    """A graph over T and a few static dims: one or two inputs, a chain of random moves, one or two outputs that carry T."""
    return _Maker(draw).graph()


def graphs():
    """A hypothesis strategy of random graphs."""
    return st.composite(random_graph)()


def random_arguments(graph: Graph, tokens: int = 5, seed: int = 0, dtype=torch.float64):
    """(arguments by name, weight function) for `interpreter.evaluate`: standard normal, the same for the same names and seed."""

    def normal(name, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())), dtype=torch.float64)

    arguments = {}
    for value in graph.inputs:
        shape = [tokens if d.size is None else d.size for d in value.dims]
        name = value.attrs["name"]
        arguments[name] = torch.arange(tokens) if value.dtype == "int" else normal(name, shape).to(dtype)
    return arguments, lambda value: storage_view(normal(value.attrs["key"], value.attrs["shape"]).to(dtype), value)


class _Maker:
    def __init__(self, draw):
        self.draw, self.line, self.weights = draw, 0, 0
        self.pos = make("input", name="pos", dtype="int", dims=(T,))
        self.x = make("input", name="x", dtype="x", dims=(T, *self.some(list(DIMS.values()), 1, 2)))
        self.pool = [self.x]

    def graph(self):
        moves = [self.unary, self.binary, self.scale, self.reduce, self.project, self.projections, self.pair, self.norm,
                 self.rotate, self.heads, self.concatenate, self.cast, self.choose]
        for move in self.draw(st.lists(st.sampled_from(moves), min_size=3, max_size=10)):
            for value in move():
                if len(value.dims) <= MAX_DIMS and T in value.dims:
                    self.pool.append(value)
        outputs = [self.pool[-1]]
        if self.draw(st.booleans()):
            outputs.insert(0, self.some(self.pool, 1, 1)[0])
        return Graph("random", (self.x, self.pos), tuple(dict.fromkeys(outputs)))

    def make(self, op, *inputs, **attrs):
        return make(op, *inputs, origin=Origin("random.fuse", self.line, 3, f"layers.{self.line}"), **attrs)

    def const(self, number):
        return self.make("const", value=number)

    def weight(self, *dims):
        """A fresh weight whose storage has the axes in some other order."""
        self.weights += 1
        stored = self.draw(st.permutations(dims))
        strides, size = {}, 1
        for dim in reversed(stored):
            strides[dim] = size
            size *= dim.size
        return self.make("weight", key=f"w{self.weights}.weight", shape=tuple(d.size for d in stored), offset=0,
                         strides=tuple(strides[d] for d in dims), dtype="x", dims=tuple(dims))

    def some(self, items, least, most):
        indices = st.lists(st.integers(0, len(items) - 1), min_size=least, max_size=min(most, len(items)), unique=True)
        return [items[i] for i in self.draw(indices)]

    def value(self):
        """A value made so far, later ones more often."""
        self.line += 1
        return self.pool[-1] if self.draw(st.booleans()) else self.some(self.pool, 1, 1)[0]

    def static(self, value):
        return [d for d in value.dims if d.size is not None]

    # ---- moves: each returns new values ----------------------------------------------------------------------------------------

    def unary(self):
        op = self.draw(st.sampled_from(("tanh", "sin", "cos", "erf", "neg", "abs")))
        return [self.make(op, self.value())]

    def binary(self):
        op = self.draw(st.sampled_from(("add", "sub", "mul", "maximum", "minimum")))
        a, b = self.value(), self.value()
        return [self.make(op, a, b)] if len({*a.dims, *b.dims}) <= MAX_DIMS else []

    def scale(self):
        value = self.value()
        if self.draw(st.booleans()) or not self.static(value):
            return [self.make("mul", value, self.const(self.draw(st.sampled_from((0.5, -2, 3)))))]
        return [self.make("add", value, self.weight(*self.some(self.static(value), 1, 2)))]

    def reduce(self):
        value = self.value()
        over = self.some(self.static(value), 1, 2) if self.static(value) else []
        op = self.draw(st.sampled_from(("sum", "mean", "max")))
        return [self.make(op, value, over=tuple(d.name for d in over))] if over else []

    def project(self, value=None, over=None):
        value = value or self.value()
        over = over or (self.some(self.static(value), 1, 2) if self.static(value) else [])
        outward = [d for d in DIMS.values() if d not in value.dims or d in over]
        into = [Dim(d.name + "'", d.size) if d in over else d for d in self.some(outward, 0, 2)] if outward else []
        if not over or any(d in value.dims for d in into):
            return []
        weight = self.weight(*self.draw(st.permutations([*over, *into])))
        product = self.make("contract", *self.draw(st.permutations([value, weight])), over=tuple(d.name for d in over))
        return [self.make("mul", product, self.const(0.25))] if self.draw(st.booleans()) else [product]

    def projections(self):
        """Several projections of one value, as q, k and v are."""
        value = self.value()
        over = self.some(self.static(value), 1, 1) if self.static(value) else []
        return [result for _ in range(3) for result in self.project(value, over)] if over else []

    def pair(self):
        a, b = self.value(), self.value()
        shared = [d for d in self.static(a) if d in b.dims]
        if not shared or len({*a.dims, *b.dims}) > MAX_DIMS + 1:
            return []
        return [self.make("tanh", self.make("contract", a, b, over=tuple(d.name for d in self.some(shared, 1, 2))))]

    def norm(self):
        """RMSNorm along one dim, as std.fuse writes it."""
        value = self.value()
        if not self.static(value):
            return []
        (along,) = self.some(self.static(value), 1, 1)
        h = self.make("cast", value, to="f32")
        mean = self.make("mean", self.make("mul", h, h), over=(along.name,))
        h = self.make("mul", h, self.make("rsqrt", self.make("add", mean, self.const(1e-5))))
        normed = self.make("mul", self.make("cast", h, to="x"), self.weight(along))
        return [normed, *self.project(normed, [along])]

    def rotate(self):
        """Rope along one dim, by halves or by neighbours."""
        value = self.value()
        even = [d for d in self.static(value) if d.size % 2 == 0]
        if not even:
            return []
        (dim,) = self.some(even, 1, 1)
        half = Dim(f"{dim.name}/2", dim.size // 2)
        if half in value.dims:
            return []
        stride, offset = self.draw(st.sampled_from(((1, half.size), (2, 1))))
        a, b = (self.make("split", value, dim=dim.name, into=(half.name,), sizes=(half.size,), strides=(stride,), offset=at)
                for at in (0, offset))
        index = self.make("index", dtype="int", dims=(half,))
        angle = self.make("mul", self.pos, self.make("pow", self.const(100.0), self.make("div", index, self.const(-half.size))))
        c, s = self.make("cos", angle), self.make("sin", angle)
        left = self.make("sub", self.make("mul", a, c), self.make("mul", b, s))
        right = self.make("add", self.make("mul", b, c), self.make("mul", a, s))
        return [self.make("join", left, right, dim=dim.name, size=dim.size,
                          parts=(((half.name,), (stride,), 0), ((half.name,), (stride,), offset)))]

    def heads(self):
        """D split as H*(P + Q): two components of every head."""
        value = self.value()
        if DIMS["D"] not in value.dims or "H" in value.names:
            return []
        return [self.make("split", value, dim="D", into=("H", name), sizes=(2, size), strides=(4, 1), offset=offset)
                for name, size, offset in (("P", 3, 0), ("Q", 1, 3)) if name not in value.names]

    def concatenate(self):
        a, b = self.value(), self.value()
        dims = [self.some(self.static(v), 1, 1)[0] if self.static(v) else None for v in (a, b)]
        if None in dims or dims[0] in b.dims or dims[1] in a.dims or len({*a.dims, *b.dims}) > MAX_DIMS:
            return []
        name, (p, q) = "+".join(d.name for d in dims), dims
        if name in a.names + b.names:
            return []
        return [self.make("join", a, b, dim=name, size=p.size + q.size, parts=(((p.name,), (1,), 0), ((q.name,), (1,), p.size)))]

    def cast(self):
        return [self.make("cast", self.value(), to=self.draw(st.sampled_from(("f32", "x"))))]

    def choose(self):
        value, other = self.value(), self.value()
        if not self.static(value) or len({*value.dims, *other.dims}) > MAX_DIMS:
            return []
        (along,) = self.some(self.static(value), 1, 1)
        test = self.make("lt", self.make("index", dtype="int", dims=(along,)), self.const(along.size // 2))
        return [self.make("where", test, value, other)]
