"""The graph's meaning in torch: the oracle of every test, and the `torch` backend.

`Evaluator(graph, ...)` prepares one closure per value; calling it runs them in order. Values that depend on weights and
constants alone are computed once, at preparation. Contractions with such a matrix keep it as an `[N, K]`, so that they are a
plain linear.

Types are a table, so the same graph runs in float64 (`EXACT`), float32 or bfloat16: `{"x": torch.bfloat16, "f32":
torch.float32, …}`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .graph import Graph, S, T, Value
from .ops import OPS, promote


def dtypes(x: torch.dtype) -> dict[str, torch.dtype]:
    """The torch type of each IR type when the model's own is `x`. In a float64 model "f32" is float64 too: the oracle rounds
    nowhere."""
    return {"x": x, "f32": torch.promote_types(x, torch.float32), "int": torch.int64, "bool": torch.bool, "weak": torch.float64}


EXACT = dtypes(torch.float64)
INTEGRAL = ("add", "sub", "mul", "mod", "neg", "abs", "maximum", "minimum", "where")  # whole numbers stay whole


class Evaluator:
    """A graph made ready to run in torch.

    weight(value) -> tensor: the component of a checkpoint tensor that a `weight` value names, axes as in `value.dims`.
    cache(value, tensor) and via(value, tensors) replace the meaning of those two ops; by default there is one sequence, seen
    whole: its history is the tokens of this call, and a `via` evaluates its body.
    """

    def __init__(self, graph: Graph, types: dict[str, torch.dtype], *, weight=None, cache=None, via=None, device="cpu"):
        self.graph, self.types, self.device = graph, types, torch.device(device)
        self.weight, self.cache, self.via = weight, cache, via
        order = graph.walk()
        self.number = {value: i for i, value in enumerate(order)}
        static = set()
        for value in order:
            if value.op in ("weight", "const") or value.op == "index" and value.dims[0].size is not None:
                static.add(value)
            elif value.inputs and value.op not in ("cache", "via", "kernel") and all(i in static for i in value.inputs):
                static.add(value)
        self._users, self._static, self._matrices = graph.users(), {}, {}
        self.constants = self._evaluate_constants(order, static, graph.outputs)
        last_use = {}
        for value in order:
            for operand in value.inputs:
                last_use[operand] = value
        kept = set(graph.outputs) | static
        self.steps = []
        for value in order:
            if value in static or value.op == "input":
                continue
            dead = tuple(self.number[i] for i in dict.fromkeys(value.inputs) if last_use[i] is value and i not in kept)
            self.steps.append((self.number[value], self._closure(value), tuple(self.number[i] for i in value.inputs), dead))

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slots = dict(self.constants)
        sizes = {}
        for value in self.graph.inputs:
            tensor = inputs[value.attrs["name"]]
            slots[self.number.get(value, -1)] = tensor
            sizes.update((dim.name, size) for dim, size in zip(value.dims, tensor.shape, strict=True) if dim.size is None)
        self.sizes = {S.name: sizes.get(T.name)} | sizes
        for target, run, operands, dead in self.steps:
            slots[target] = run(*[slots[i] for i in operands])
            for i in dead:
                del slots[i]
        return tuple(slots[self.number[value]] for value in self.graph.outputs)

    def _evaluate_constants(self, order, static, outputs) -> dict[int, torch.Tensor]:
        """Computes the static values and keeps those that something dynamic reads (a raw weight that was merged away is
        freed)."""
        needed = {i for v in order if v not in static for i in v.inputs if i in static} | {o for o in outputs if o in static}
        remaining, table = {}, {}
        for value in order:
            if value in static:
                for operand in value.inputs:
                    remaining[operand] = remaining.get(operand, 0) + 1
        for value in order:
            if value not in static:
                continue
            table[value] = self._closure(value)(*[table[i] for i in value.inputs])
            for operand in value.inputs:
                remaining[operand] -= 1
                if not remaining[operand] and operand not in needed:
                    table.pop(operand, None)
        self._static = {v: t for v, t in table.items() if v in needed}
        return {self.number[v]: t for v, t in self._static.items()}

    # ---- one closure per value -------------------------------------------------------------------------------------

    def _closure(self, value: Value):
        kind = OPS[value.op].kind
        if kind == "elementwise":
            return self._elementwise(value)
        return getattr(self, "_" + value.op)(value)

    def _elementwise(self, value):
        if value.op == "cast":
            to = self.types[value.attrs["to"]]
            settled = value.inputs[0].dtype in ("x", "f32") and self.types[value.inputs[0].dtype] == to
            return same if settled else lambda a: a.to(to)
        convert = self._converters(value)
        if value.op == "pow" and value.inputs[1].op == "const":  # torch multiplies for small exponents given as numbers
            exponent, base = value.inputs[1].attrs["value"], convert[0] or (lambda t: t)
            return lambda a, _: torch.pow(base(a), exponent)
        function = torch_function(value.op)
        if not value.dims and value.dtype in ("x", "f32") and any(i.dtype == "weak" for i in value.inputs):
            exact, to = function, self.types[value.dtype]  # beside a tensor without axes torch would let a literal's float64 win
            function = lambda *operands: exact(*operands).to(to)  # noqa: E731
        aligners = [chain(c, aligner(i.names, value.names)) for c, i in zip(convert, value.inputs, strict=True)]
        if not any(aligners):
            return function
        if len(aligners) == 2:
            left, right = (a or (lambda t: t) for a in aligners)
            return lambda a, b: function(left(a), right(b))
        return lambda *operands: function(*[a(t) if a else t for a, t in zip(aligners, operands, strict=True)])

    def _converters(self, value):
        """Per operand the cast that torch's own promotion would miss, or None: integers to real numbers (torch takes its
        default type for them), a tensor with axes to the type of a wider one without (torch ignores the latter's type)."""
        operands = value.inputs[1:] if value.op == "where" else value.inputs
        target = promote(*operands) if value.dtype == "bool" else value.dtype
        real = target in ("x", "f32") or target == "weak" and value.op not in INTEGRAL
        decided = any(i.dtype == target and i.dims for i in operands)

        def missed(operand):
            if not real or operand not in operands:
                return False
            if operand.dtype == "weak":
                return target == "weak"
            return operand.dtype in ("int", "bool") or operand.dtype != target and not decided

        return [functools.partial(torch.Tensor.to, dtype=self.types[target]) if missed(i) else None for i in value.inputs]

    def _weight(self, value):
        return lambda: self.weight(value)

    def _const(self, value):
        number = value.attrs["value"]
        dtype = torch.int64 if isinstance(number, int) else torch.float64
        return lambda: torch.tensor(number, dtype=dtype, device=self.device)

    def _index(self, value):
        (dim,) = value.dims
        return lambda: torch.arange(self.sizes[dim.name] if dim.size is None else dim.size, device=self.device)

    def _reduction(self, value, function):
        axes = tuple(value.inputs[0].names.index(name) for name in value.attrs["over"])
        return lambda a: function(a, axes)

    def _sum(self, value):
        return self._reduction(value, torch.sum)

    def _max(self, value):
        return self._reduction(value, torch.amax)

    def _mean(self, value):
        to = self.types[value.dtype]
        return self._reduction(value, torch.mean if value.dtype == value.inputs[0].dtype else lambda a, axes: a.to(to).mean(axes))

    def _contract(self, value):
        a, b = value.inputs
        dtype = self.types[value.dtype]
        swap = a in self._static and b not in self._static
        if swap:
            a, b = b, a
        contracted = value.attrs["over"]
        batch = [n for n in a.names if n in b.names and n not in contracted]
        rows = [n for n in a.names if n not in b.names]
        columns = [n for n in b.names if n not in a.names]
        arrange_a = permuter(a.names, batch + rows + list(contracted))
        arrange_b = permuter(b.names, batch + columns + list(contracted))
        arrange_out = permuter(tuple(batch + rows + columns), value.names)
        n_batch, n_rows, n_columns = len(batch), len(rows), len(columns)

        def matrix(t):
            t = arrange_b(t)
            return t.reshape(*t.shape[:n_batch], math.prod(t.shape[n_batch:n_batch + n_columns]), -1).to(dtype)

        fixed = None
        if b in self._static:
            tensor = self._static[b]
            key = (b, *batch, None, *columns, None, *contracted)
            if key not in self._matrices:
                self._matrices[key] = self._laid_out(matrix(tensor)), arrange_b(tensor).shape
            fixed, shape_b = self._matrices[key]
            if self._only_matrix(b):
                self.constants[self.number[b]] = fixed.new_empty(0)
            elif fixed.shape == tensor.shape and fixed.dtype == tensor.dtype and arrange_b(tensor).stride() == tensor.stride():
                self.constants[self.number[b]] = fixed  # a table that is a matrix too (tied embeddings) is kept once

        if fixed is not None and columns and contracted and not batch and not swap:  # a linear layer: most of a model's time
            tail, arrange_rows = shape_b[:n_columns], None if arrange_a is same else arrange_a
            convert = self.types[a.dtype] != dtype

            def linear(x, _):
                x = x if arrange_rows is None else arrange_rows(x)
                x = x if x.dim() == n_rows + 1 else x.flatten(n_rows)
                out = F.linear(x.to(dtype) if convert else x, fixed)
                return arrange_out(out if n_columns == 1 else out.unflatten(-1, tail))

            return linear

        def run(x, y):
            if swap:
                x, y = y, x
            x = arrange_a(x)
            outer = x.shape[:n_batch + n_rows]
            x = x.reshape(*x.shape[:n_batch], math.prod(x.shape[n_batch:n_batch + n_rows]), -1).to(dtype)
            if fixed is None:
                tail = arrange_b(y).shape[n_batch:n_batch + n_columns]
                out = torch.matmul(x, matrix(y).transpose(-1, -2))
            else:
                tail = shape_b[n_batch:n_batch + n_columns]
                out = torch.matmul(x, fixed.transpose(-1, -2))
            return arrange_out(out.reshape(*outer, *tail))

        return run

    def _laid_out(self, matrix: torch.Tensor) -> torch.Tensor:
        """[N, K] as it is multiplied fastest by few rows: K contiguous, but on a CPU in float32, which reads [K, N] a third
        faster."""
        if self.device.type == "cpu" and matrix.dtype == torch.float32 and matrix.dim() == 2:
            return matrix.t().contiguous().t()
        return matrix.contiguous()

    def _only_matrix(self, value) -> bool:
        return value not in self.graph.outputs and all(user.op == "contract" for user in self._users[value])

    def _split(self, value):
        at = value.inputs[0].names.index(value.attrs["dim"])
        sizes, strides, offset = value.attrs["sizes"], value.attrs["strides"], value.attrs["offset"]

        def run(a):
            step = a.stride(at)
            return a.as_strided((*a.shape[:at], *sizes, *a.shape[at + 1:]),
                                (*a.stride()[:at], *[s * step for s in strides], *a.stride()[at + 1:]),
                                a.storage_offset() + offset * step)

        return run

    def _join(self, value):
        at = value.names.index(value.attrs["dim"])
        dtype, views = self.types[value.dtype], []
        for operand, (names, strides, offset) in zip(value.inputs, value.attrs["parts"], strict=True):
            target = (*value.names[:at], *names, *value.names[at + 1:])
            arrange = chain(aligner(operand.names, target), ranked(len(target)))
            views.append((arrange, tuple(operand.dim(n).size for n in names), strides, offset))

        def run(*operands):
            aligned = [align(t) for t, (align, *_) in zip(operands, views, strict=True)]
            outer = broadcast([(*t.shape[:at], *t.shape[at + len(v[1]):]) for t, v in zip(aligned, views, strict=True)])
            out = torch.empty(*outer[:at], value.attrs["size"], *outer[at:], dtype=dtype, device=aligned[0].device)
            step = out.stride(at)
            for tensor, (_, sizes, strides, offset) in zip(aligned, views, strict=True):
                out.as_strided((*out.shape[:at], *sizes, *out.shape[at + 1:]),
                               (*out.stride()[:at], *[s * step for s in strides], *out.stride()[at + 1:]),
                                offset * step).copy_(tensor)
            return out

        return run

    def _gather(self, value):
        table = value.inputs[0].names
        arrange = permuter(table, [value.attrs["dim"], *(n for n in table if n != value.attrs["dim"])])
        return lambda t, ids: arrange(t)[ids]

    def _top(self, value):
        at, count = value.inputs[0].names.index(value.attrs["dim"]), value.attrs["size"]
        result = 1 if value.attrs["result"] == "index" else 0
        return lambda a: torch.topk(a, count, dim=at)[result]

    def _cache(self, value):
        return (lambda a: a) if self.cache is None else lambda a: self.cache(value, a)

    def _via(self, value):
        if self.via is not None:
            return lambda *operands: self.via(value, operands)
        body = self._region(value)
        return lambda *operands: body(*operands)[0]

    def _kernel(self, value):
        return self._region(value)

    def _region(self, value):
        body = value.attrs["body"]
        inner = Evaluator(body, self.types, weight=self.weight, cache=self.cache, via=self.via, device=self.device)
        names = [i.attrs["name"] for i in body.inputs]
        return lambda *operands: inner(**dict(zip(names, operands, strict=True)))

    def _get(self, value):
        return lambda results: results[value.attrs["index"]]


@functools.cache
def torch_function(op: str):
    """The torch meaning of an elementwise op, from its spelling in the op table."""
    letters = "abc"[:OPS[op].arity]
    return eval(f"lambda {', '.join(letters)}: {OPS[op].torch.format(*letters)}", {"torch": torch})


def chain(first, second):
    """Both functions of one tensor in turn, where None does nothing."""
    return (lambda t: second(first(t))) if first and second else first or second


def ranked(rank: int):
    """tensor -> a view with `rank` axes, the missing ones in front."""
    return lambda t: t[(None,) * (rank - t.dim())] if t.dim() < rank else t


def broadcast(shapes) -> tuple[int, ...]:
    """What shapes of one rank broadcast to. (torch.broadcast_shapes imports SymPy for it, a third of a second.)"""
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True))


def same(tensor):
    return tensor


def permuter(names, wanted):
    """tensor with axes `names` -> the same with axes in the order `wanted` (a permutation)."""
    order = [list(names).index(n) for n in wanted]
    return same if order == sorted(order) else lambda t: t.permute(order)


def aligner(names: tuple[str, ...], target: tuple[str, ...]):
    """tensor with axes `names` -> a view that broadcasts against axes `target`, or None if trailing axes already line up."""
    if not names or names == target[len(target) - len(names):]:
        return None
    arrange = permuter(names, [n for n in target if n in names])
    first = next(i for i, n in enumerate(target) if n in names)
    index = tuple(slice(None) if n in names else None for n in target[first:])
    if None not in index:
        return arrange
    return lambda t: arrange(t)[index]


def evaluate(graph: Graph, inputs: dict[str, torch.Tensor], weight=None, types=EXACT, **handlers) -> tuple[torch.Tensor, ...]:
    """One evaluation of `graph` on one whole sequence, in float64 unless told otherwise."""
    return Evaluator(graph, types, weight=weight, **handlers)(**inputs)


def storage_view(storage: torch.Tensor, value: Value) -> torch.Tensor:
    """The component of a checkpoint tensor that the `weight` value names: a view with axes `value.dims`."""
    return storage.contiguous().as_strided([d.size for d in value.dims], value.attrs["strides"], value.attrs["offset"])
