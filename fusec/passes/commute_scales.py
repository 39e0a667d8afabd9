"""commute_scales: a row's scale moves from a contraction's input to its result.

    before   %n = mul(mul(%x, %rstd), %w) : x[T, D]      after   %c = contract(%x, mul(%m, %w)) over=("D",)
             %c = contract(%n, %m) over=("D",)                   %y = mul(%c, %rstd) : x[T, F]

(x · rstd · w) @ M = rstd · (x @ (w · M)): a contraction is linear, and rstd is one number per row. So the reduction that a norm
needs runs beside the contraction, over the same loaded x, and no launch is spent on it. w is folded into M when that matrix
serves nothing else (a head tied to the embedding keeps its w on x).

Nothing here knows RMSNorm: any product with a factor that has no contracted dim, and that is reduced from the rest, commutes.
The result is rounded once less than the text says; see docs/decisions.md.
"""

from __future__ import annotations

from ..ir.graph import Graph, Value, rewrite
from ..ir.ops import make
from .analysis import cone, statics


def commute_scales(graph: Graph) -> Graph:
    static = statics(graph)
    users = graph.users()
    keys = {}
    for value in graph.walk():
        if value.op == "weight":
            keys.setdefault(value.attrs["key"], set()).update(users.get(value, ()))

    def private(matrix: Value) -> bool:
        """The matrix, and the checkpoint tensors it is made of, are read by this contraction alone."""
        if len(users[matrix]) > 1:
            return False
        return all(len(keys[v.attrs["key"]]) == 1 for v in cone(matrix, lambda v: False) if v.op == "weight")

    commuted: dict[Value, tuple] = {}
    new: dict[Value, Value] = {}
    for value in graph.walk():
        if value.op == "contract" and value.inputs[1] in static and value.inputs[0] not in static:
            scales, vectors, rest = factors(value.inputs[0], value.attrs["over"], static)
            if not scales or len(rest) != 1:
                continue
            base, sign = rest[0]
            if sign > 0 and all(reads(scale, base, static) for scale, _ in scales):
                commuted[value] = (scales, vectors, base)

    def rule(value: Value, inputs):
        if value not in commuted:
            return None
        scales, vectors, base = commuted[value]
        matrix = inputs[1]
        x, origin = new[base], value.origin
        for vector, sign in vectors:
            if private(value.inputs[1]):
                matrix = make(
                    "cast", make("mul" if sign > 0 else "div", matrix, new[vector], origin=origin), to="x", origin=origin
                )
            else:
                x = make("mul" if sign > 0 else "div", x, new[vector], origin=x.origin)
        if matrix.dtype == value.inputs[1].dtype and x.dtype != value.inputs[0].dtype:
            x = make("cast", x, to=value.inputs[0].dtype, origin=x.origin)
        result = make("contract", x, matrix, over=value.attrs["over"], origin=origin)
        for scale, sign in scales:
            result = make("mul" if sign > 0 else "div", result, new[scale], origin=scale.origin)
        return result if result.dtype == value.dtype else make("cast", result, to=value.dtype, origin=origin)

    return rewrite(graph, rule, new)


def reads(value: Value, base: Value, static) -> bool:
    """Whether `value` is computed from `base`. Looks near before far: the graph behind both is as deep as the model."""
    seen, nearest = set(), [value]
    while nearest:
        if base in nearest:
            return True
        seen.update(nearest)
        nearest = [i for v in nearest for i in v.inputs if i not in seen and i not in static]
    return False


def factors(value: Value, over, static) -> tuple[list, list, list]:
    """`value` as a product: (row scales, static vectors over the contracted dims, the rest), each factor with its sign (+1,
    or -1: divided by)."""
    scales, vectors, rest = [], [], []

    def visit(v: Value, sign: int):
        if v.op == "cast" and v not in static:
            visit(v.inputs[0], sign)
        elif v.op in ("mul", "div") and v not in static and sign > 0:
            visit(v.inputs[0], sign)
            visit(v.inputs[1], sign if v.op == "mul" else -sign)
        elif v in static:
            vectors.append((v, sign))
        elif not set(v.names) & set(over):
            scales.append((v, sign))
        else:
            rest.append((v, sign))

    visit(value, 1)
    return scales, vectors, rest
