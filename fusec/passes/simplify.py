"""simplify: constants folded, equal values shared, splits moved to the contractions and joins to the stores.

    before   %5 = mul(%contract, %rstd) : f32[T, A + B]        after   %6 = split(%contract) dim="A + B" into=("A",) …
             %6 = split(%5) dim="A + B" into=("A",) …                  %7 = mul(%6, %rstd) : f32[T, A]

Afterwards every split reads a value that some kernel loads or contracts, and every join is read by a store: the form that
fusion and code generation rely on. Arithmetic is unchanged, but for literals, which are folded in Python's float64.
"""

from __future__ import annotations

import math

from ..ir.graph import Graph, N, T, Value, replace, rewrite
from ..ir.ops import OPS, make

FOLD = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "mod": lambda a, b: a % b,
    "neg": lambda a: -a,
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "erf": math.erf,
    "floor": math.floor,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "maximum": max,
    "minimum": min,
}


def simplify(graph: Graph) -> Graph:
    """The graph in canonical form (see the module)."""
    seen: dict = {}
    whole = read_whole(graph)
    kept: set[Value] = set()  # rewritten values that something reads undivided: a split of one stays where it is

    def build(op, *inputs, **fields):
        value = make(op, *inputs, **fields)
        return rule(value, value.inputs)

    def rule(value: Value, inputs: tuple[Value, ...]) -> Value:
        if inputs != value.inputs:
            value = replace(value, inputs=inputs)
        new = algebra(value, build) or movement(value, build, kept) or value
        if "body" in new.attrs:
            return replace(new, attrs=new.attrs | {"body": simplify(new.attrs["body"])})
        key = (new.op, new.inputs, tuple(sorted(new.attrs.items())), new.dtype, new.names)
        return seen.setdefault(key, new)

    def visit(value: Value, inputs: tuple[Value, ...]) -> Value:
        new = rule(value, inputs)
        if value in whole:
            kept.add(new)
        return new

    return rewrite(graph, visit)


def read_whole(graph: Graph) -> set[Value]:
    """Values that something reads undivided: a result, a reduction, a contraction, or an elementwise value that is itself
    read so."""
    users, found = graph.users(), set(graph.outputs)
    for value in reversed(graph.walk()):
        for user in users.get(value, ()):
            if user.op != "split" and (OPS[user.op].kind != "elementwise" or user in found):
                found.add(value)
    return found


def algebra(value: Value, build) -> Value | None:
    """Literals folded; powers by small integers and sums of products in their plain form."""
    inputs = value.inputs
    if value.op in FOLD and inputs and all(i.op == "const" for i in inputs):
        return build("const", value=FOLD[value.op](*[i.attrs["value"] for i in inputs]), origin=value.origin)
    if value.op == "cast" and inputs[0].dtype == value.attrs["to"]:
        return inputs[0]
    if value.op == "pow" and inputs[1].op == "const" and inputs[1].attrs["value"] in (1, 2, 3):
        base = inputs[0] if inputs[0].dtype == value.dtype else build("cast", inputs[0], to=value.dtype, origin=value.origin)
        result = base
        for _ in range(int(inputs[1].attrs["value"]) - 1):
            result = build("mul", result, base, origin=value.origin)
        return result
    if value.op == "contract" and not tokens(inputs[0]) and tokens(inputs[1]):
        return build("contract", inputs[1], inputs[0], over=value.attrs["over"], origin=value.origin)
    if (
        value.op in ("mul", "div")
        and inputs[1].op == "const"
        and inputs[1].attrs["value"] == 1
        and inputs[0].dtype == value.dtype
    ):
        return inputs[0]
    if (
        value.op == "sum"
        and inputs[0].op == "mul"
        and are_matrices(*inputs[0].inputs)
        and all(n in i.names for n in value.attrs["over"] for i in inputs[0].inputs)
    ):
        product = build("contract", *inputs[0].inputs, over=value.attrs["over"], origin=value.origin)
        return product if product.dims == value.dims and product.dtype == value.dtype else None
    if value.op == "contract" and not are_matrices(*inputs) and any(map(tokens, inputs)):
        a, b = (build("cast", i, to="f32", origin=value.origin) for i in inputs)
        dot = build("sum", build("mul", a, b, origin=value.origin), over=value.attrs["over"], origin=value.origin)
        return build("cast", dot, to=value.dtype, origin=value.origin) if dot.dims == value.dims else None
    return None


def tokens(value: Value) -> bool:
    return T in value.dims or N in value.dims


def are_matrices(a: Value, b: Value) -> bool:
    """Each has a dim that the other lacks. The contraction of others is a dot product, row by row."""
    return not set(a.names) <= set(b.names) and not set(b.names) <= set(a.names)


def movement(value: Value, build, kept) -> Value | None:
    """Splits move towards the loads, joins towards the stores."""
    if value.op == "split":
        source, name = value.inputs[0], value.attrs["dim"]

        def part(operand):
            if name not in operand.names:
                return operand
            return build("split", operand, origin=value.origin, **value.attrs)

        if source in kept and source.op != "weight":
            return compose(source, value, build) if source.op == "split" and name in source.attrs["into"] else None
        if OPS[source.op].kind == "elementwise" and source.op != "cast":
            return build(source.op, *map(part, source.inputs), origin=source.origin, **source.attrs)
        if source.op == "cast":
            return build("cast", part(source.inputs[0]), to=source.attrs["to"], origin=source.origin)
        if source.op == "join" and source.attrs["dim"] == name:
            for operand, (names, strides, offset) in zip(source.inputs, source.attrs["parts"], strict=True):
                if names == value.attrs["into"] and strides == value.attrs["strides"] and offset == value.attrs["offset"]:
                    return (
                        operand if operand.dtype == value.dtype else build("cast", operand, to=value.dtype, origin=value.origin)
                    )
        if source.op == "split" and name in source.attrs["into"]:
            return compose(source, value, build)
        if source.op == "weight":
            return narrow(source, value)
    if OPS[value.op].kind == "elementwise" and len(value.inputs) == 1 and value.inputs[0].op == "join":
        join = value.inputs[0]
        return build(
            "join",
            *[build(value.op, i, origin=value.origin, **value.attrs) for i in join.inputs],
            origin=join.origin,
            **join.attrs,
        )
    return None


def compose(outer: Value, inner: Value, build) -> Value:
    """A split of a split as one: the inner dim's stride scales the inner view."""
    a, b = outer.attrs, inner.attrs
    at = a["into"].index(b["dim"])
    step = a["strides"][at]
    return build(
        "split",
        outer.inputs[0],
        dim=a["dim"],
        into=a["into"][:at] + b["into"] + a["into"][at + 1 :],
        sizes=a["sizes"][:at] + b["sizes"] + a["sizes"][at + 1 :],
        strides=a["strides"][:at] + tuple(s * step for s in b["strides"]) + a["strides"][at + 1 :],
        offset=a["offset"] + b["offset"] * step,
        origin=inner.origin,
    )


def narrow(weight: Value, split: Value) -> Value:
    """A split of a checkpoint tensor is another view of it."""
    at = weight.names.index(split.attrs["dim"])
    strides = weight.attrs["strides"]
    attrs = weight.attrs | {
        "offset": weight.attrs["offset"] + split.attrs["offset"] * strides[at],
        "strides": strides[:at] + tuple(s * strides[at] for s in split.attrs["strides"]) + strides[at + 1 :],
    }
    return replace(weight, attrs=attrs, dims=split.dims)
