"""The graph: typed values over named dims, in static single assignment.

A `Value` is the result of one primitive op (see `ops.py`). Its `dims` name its axes: two values are combined by matching
names, never positions, and the order of a value's dims is the compiler's to choose. Two dims have no size before run time:
`T`, the packed tokens of the step, and `S`, the history of one sequence; all others are integers from the model's config.

A storage axis is arithmetic over dims (`G*R*K + G*K + G*K`). In the graph each of its components is an *affine view*: an
offset and one stride per dim, in elements of the flat axis. `weight`, `split` and `join` all speak of axes in that one way.

Attributes are plain Python literals (so that the text form round-trips), except `body`, the region of a `via` or `kernel` value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Dim:
    """A named axis. `size` is None for the run-time dims T (packed tokens), S (history) and T' (rows whose logits are wanted)."""

    name: str
    size: int | None = None

    def __repr__(self):
        return self.name if self.size is None else f"{self.name}={self.size}"


T, S, N = Dim("T"), Dim("S"), Dim("T'")  # T' can be no program's own name


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: the source line (`file`, `line`, `column`; 0 = none) and the dotted path of the block it
    stands in."""

    file: str = ""
    line: int = 0
    column: int = 0
    path: str = ""


NOWHERE = Origin()


class Value:
    """One result of one op. Identity is equality: the graph is a DAG of these objects.

    op: name of a primitive in `ops.OPS`.  inputs: operand values.  attrs: op-specific literals.
    dtype: "x" (the model's own), "f32", "int", "bool", or "weak" (a literal that takes its neighbour's type).
    dims: the named axes, no name twice.
    """

    __slots__ = ("op", "inputs", "attrs", "dtype", "dims", "origin")

    def __init__(self, op, inputs=(), attrs=None, dtype="x", dims=(), origin=NOWHERE):
        self.op, self.inputs, self.attrs = op, tuple(inputs), attrs or {}
        self.dtype, self.dims, self.origin = dtype, tuple(dims), origin

    def dim(self, name: str) -> Dim:
        return next(d for d in self.dims if d.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.dims)

    def __repr__(self):
        return f"<{self.op}: {self.dtype}[{', '.join(self.names)}]>"


@dataclass(frozen=True, eq=False)
class Graph:
    """A program or a region: named `inputs` (values of op "input"), and `outputs`. Everything between is reached from the
    outputs. Neither a graph nor its values change once made."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: dict = field(default_factory=dict)

    def walk(self) -> tuple[Value, ...]:
        """Every value the outputs need, operands before users. Regions are not entered."""
        return self._order

    def users(self) -> dict[Value, list[Value]]:
        """value -> the values that read it, in program order. To be read only."""
        return self._users

    @cached_property
    def _order(self):
        return tuple(walk(self.outputs))

    @cached_property
    def _users(self):
        table: dict[Value, list[Value]] = {}
        for value in self._order:
            for operand in dict.fromkeys(value.inputs):
                table.setdefault(operand, []).append(value)
        return table

    def __getstate__(self):
        """Operands before users, so that pickling does not descend a deep graph."""
        return {"_order": self._order, "name": self.name, "inputs": self.inputs, "outputs": self.outputs, "attrs": self.attrs}


def walk(outputs) -> list[Value]:
    """Post-order over the operands of `outputs`, without recursion (a model of 100 layers is a deep graph)."""
    order, seen, stack = [], set(), [*reversed(outputs)]
    while stack:
        value = stack.pop()
        if value is None:  # what lies below it had its operands visited
            order.append(stack.pop())
        elif value not in seen:
            seen.add(value)
            stack += (value, None, *reversed(value.inputs))
    return order


def rewrite(graph: Graph, rule, new: dict[Value, Value] | None = None) -> Graph:
    """A copy of `graph` in which every value is replaced by `rule(value, inputs)`, operands first.

    `rule` gets the old value and its already rewritten operands, and returns a Value, or None to keep the value as it is
    (copied only if an operand changed). Sharing is kept: each old value is rewritten once. `new`, if given, is filled with
    old -> rewritten as the walk goes on, for rules that need more than a value's own operands.
    """
    new = {} if new is None else new
    for value in graph.walk():
        inputs = tuple(new[operand] for operand in value.inputs)
        result = rule(value, inputs)
        if result is None:
            result = value if inputs == value.inputs else replace(value, inputs=inputs)
        new[value] = result
    return Graph(graph.name, tuple(new.get(i, i) for i in graph.inputs), tuple(new[o] for o in graph.outputs), graph.attrs)


def substitute(graph: Graph, mapping: dict[Value, Value]) -> Graph:
    """`graph` with each key of `mapping` replaced by its value wherever it is read."""
    return rewrite(graph, lambda value, inputs: mapping.get(value))


def replace(value: Value, **changes) -> Value:
    """A copy of `value` with some fields changed."""
    fields = {name: getattr(value, name) for name in Value.__slots__} | changes
    return Value(**fields)
