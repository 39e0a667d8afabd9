"""Idioms: shapes of the graph for which torch has one function. The torch backend calls it instead of a dozen small operations.

    x * (1 / (1 + exp(-x)))   ->   F.silu(x)

An idiom is a pattern: nested tuples `(op, operand, ...)` with names for holes and numbers for literals. `idioms(graph)` replaces each match by
a `via` value whose template is the idiom's name and whose body is what was replaced, so the graph means what it did.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fusec.ir.graph import Graph, Value, replace, rewrite
from fusec.ir.ops import make

COMMUTES = ("add", "mul", "maximum", "minimum")
SILU = ("mul", "x", ("div", 1, ("add", 1, ("exp", ("neg", "x")))))
NORM = ("cast", ("mul", "h", ("rsqrt", ("add", ("mean", ("mul", "h", "h")), "eps"))))
ROPE = ("join", ("cast", ("sub", ("mul", "a", "cos"), ("mul", "b", "sin"))), ("cast", ("add", ("mul", "b", "cos"), ("mul", "a", "sin"))))
SCORES = ("where", "mask", ("cast", ("mul", ("contract", "q", "k"), "scale")), -math.inf)
EXPONENTIALS = ("exp", ("sub", SCORES, ("max", SCORES)))
ATTENTION = ("contract", ("cast", ("div", EXPONENTIALS, ("sum", EXPONENTIALS))), "v")


def unify(pattern, value: Value, holes: dict[str, Value]) -> dict[str, Value] | None:
    """The holes that make `pattern` equal to `value`, or None. A hole named twice is one value."""
    if isinstance(pattern, str):
        return holes | {pattern: value} if holes.get(pattern, value) is value else None
    if not isinstance(pattern, tuple):
        return holes if value.op == "const" and value.attrs["value"] == pattern else None
    op, *parts = pattern
    if value.op != op or len(value.inputs) != len(parts):
        return None
    for operands in (value.inputs, value.inputs[::-1]) if op in COMMUTES else (value.inputs,):
        found = holes
        for part, operand in zip(parts, operands, strict=True):
            found = None if found is None else unify(part, operand, found)
        if found is not None:
            return found
    return None


def idioms(graph: Graph) -> Graph:
    """`graph` with every idiom replaced by a `via` value (attention, which is one already, keeps its own template)."""
    old = {}  # rewritten value -> the value it stands for

    def rule(value, inputs):
        new = value if inputs == value.inputs else replace(value, inputs=inputs)
        for name, pattern, fits in (("silu", SILU, same_type), ("norm", NORM, normal), ("rope", ROPE, halves)):
            holes = unify(pattern, new, {})
            if holes is not None and (operands := fits(new, holes)):
                return replace(new, op="via", inputs=operands, attrs={"template": name, "body": body_of(old, value, name), "instead": new})
        old[new] = value
        return new

    return rewrite(graph, rule)
