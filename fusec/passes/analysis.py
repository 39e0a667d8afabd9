"""Facts about a graph that several passes ask for."""

from __future__ import annotations

from ..ir.graph import Graph, N, S, T, Value
from ..ir.ops import OPS

RUNTIME = (T.name, S.name, N.name)


def statics(graph: Graph) -> set[Value]:
    """Values that depend on weights and literals alone: they are computed once, when the model is loaded."""
    found = set()
    for value in graph.walk():
        kind = OPS[value.op].kind
        if value.op in ("weight", "const") or value.op == "index" and value.dims[0].size is not None:
            found.add(value)
        elif value.inputs and kind not in ("state", "region") and all(i in found for i in value.inputs):
            found.add(value)
    return found


def is_anchor(value: Value, static: set[Value]) -> bool:
    """Ops that own a launch: a contraction of an activation with a matrix, a body that a template implements."""
    if value.op in ("via", "top"):
        return True
    return value.op == "contract" and value not in static


def levels(graph: Graph, static: set[Value]) -> dict[Value, int]:
    """value -> the most anchors on any path to it. What has a smaller level than an anchor cannot depend on it."""
    table: dict[Value, int] = {}
    for value in graph.walk():
        table[value] = max((table[i] for i in value.inputs), default=0) + is_anchor(value, static)
    return table


def cone(value: Value, stop) -> list[Value]:
    """`value` and what it is computed from, down to values for which `stop` holds (which are left out), operands first."""
    order, seen, stack = [], set(), [(value, False)]
    while stack:
        v, ready = stack.pop()
        if ready:
            order.append(v)
        elif v not in seen and not stop(v):
            seen.add(v)
            stack.append((v, True))
            stack.extend((i, False) for i in reversed(v.inputs))
    return order


def axis(value: Value) -> tuple[str, ...]:
    """The names of a value's dims that have a size before run time."""
    return tuple(n for n in value.names if n not in RUNTIME)
