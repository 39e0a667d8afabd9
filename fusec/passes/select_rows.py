"""select_rows: only the rows whose logits are wanted reach the final norm and the head.

    before   %h = … : x[T, D]                            after   %s = gather(%h, %rows) dim="T" : x[T', D]
             %y = contract(norm(%h), %w) : x[T, V]               %y = contract(norm(%s), %w) : x[T', V]

The program describes every token's logits; a server wants one row of each sequence. The selection is made at the last value
that all of the head's input is computed from (the last residual sum): the lowest single point of its dataflow above the
matrices of the last layer.
"""

from __future__ import annotations

from ..ir.graph import Graph, N, T, Value, replace
from ..ir.ops import make
from .analysis import is_anchor, statics


def select_rows(graph: Graph) -> Graph:
    static = statics(graph)
    order = graph.walk()
    position = {value: i for i, value in enumerate(order)}
    rows = make("input", name="rows", dtype="int", dims=(N,))
    heads = [v for v in above_last_anchor(graph.outputs, static) if is_anchor(v, static)]
    tops = [operand for head in heads for operand in head.inputs if T in operand.dims] or list(graph.outputs)
    whole = any(head.op != "contract" for head in heads)  # a template's body sees every token
    point = None if whole else bottleneck(tops, position, static)
    points = graph.outputs if point is None else (point,)
    selected: dict[Value, Value] = {point: make("gather", point, rows, dim="T", origin=point.origin) for point in points}

    def select(value: Value) -> Value:
        if T not in value.dims:
            return value
        if value not in selected:
            if value.op in ("input", "get"):
                selected[value] = make("gather", value, rows, dim="T", origin=value.origin)
            else:
                selected[value] = replace(
                    value, inputs=tuple(map(select, value.inputs)), dims=tuple(N if d == T else d for d in value.dims)
                )
        return selected[value]

    return Graph(graph.name, (*graph.inputs, rows), tuple(map(select, graph.outputs)), graph.attrs)


def above_last_anchor(outputs, static) -> list[Value]:
    """Values from the outputs down to, and with, the first anchor on each path."""
    found, stack = {}, list(outputs)
    while stack:
        value = stack.pop()
        if value not in found and T in value.dims:
            found[value] = None
            if not is_anchor(value, static):
                stack.extend(value.inputs)
    return list(found)


def bottleneck(tops, position, static) -> Value | None:
    """The lowest value through which everything that `tops` are computed from, above the next anchors, must pass."""
    open_values = {v for v in tops if T in v.dims}
    best = None
    while open_values:
        if len(open_values) == 1 and not is_anchor(next(iter(open_values)), static):
            best = next(iter(open_values))
        candidates = [v for v in open_values if v.inputs and not is_anchor(v, static) and v.op not in ("cache", "gather")]
        if not candidates:
            break
        top = max(open_values, key=position.__getitem__)
        if top not in candidates:
            break
        open_values.remove(top)
        open_values |= {i for i in top.inputs if T in i.dims}
    return best
