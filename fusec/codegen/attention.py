"""Recognising attention: the body of a `via attention` value, matched against what the paged templates implement.

    out = Σ_S softmax_S(where(mask, score(q·k), -inf)) · v

`score` and `mask` may be any elementwise expressions of the product and of the two positions: their lines are spliced into
the template. A body of another shape is refused with the reason, and nothing is silently computed another way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..ir.graph import Graph, Value
from ..ir.ops import OPS
from .expressions import Emitter, Index, Names, Params, strip


class Unmatched(Exception):
    """The body is not one that the attention templates implement; the message says what they expected."""


@dataclass
class Attention:
    """What the templates need. q, k, v: numbers of the body's inputs.  G, R, K, J: kv heads, query heads per kv head, head
    sizes."""

    q: int
    k: int
    v: int
    G: int
    R: int
    K: int
    J: int
    score: list[str]
    mask: list[str]
    first: str | None
    causal: bool
    dense: bool
    extra: list[str] = field(default_factory=list)


def match(body: Graph) -> Attention:
    out = uncast(body.outputs[0])
    p, v = operands(out, "contract", "a sum over the history of probabilities times values")
    if out.attrs["over"] != ("S",):
        raise Unmatched(f"the last contraction runs over {', '.join(out.attrs['over'])}, not over the history alone")
    p, v = (p, v) if uncast(v).op == "input" else (v, p)
    e, total = operands(uncast(p), "div", "probabilities that are e / sum(e)")
    (shifted,) = operands(uncast(e), "exp", "exp of the shifted scores")
    if uncast(total).op != "sum" or uncast(total).inputs[0] is not e:
        raise Unmatched("the divisor is not the sum of the exponentials over the history")
    z, top = operands(shifted, "sub", "scores less their maximum")
    if uncast(top).op != "max" or uncast(top).inputs[0] is not z:
        raise Unmatched("the scores are not shifted by their own maximum")
    mask, score, floor = operands(uncast(z), "where", "scores under a mask")
    if floor.op != "const" or floor.attrs["value"] != float("-inf"):
        raise Unmatched("masked scores are not -inf")
    product = find_product(score)
    q, k = (uncast(i) for i in product.inputs)
    q, k = (q, k) if "T" in q.names else (k, q)
    for value, role in ((q, "queries"), (k, "keys"), (uncast(v), "values")):
        if value.op != "input":
            raise Unmatched(f"the {role} are computed inside the body, not read from memory")
    v = uncast(v)
    groups = [d for d in k.dims if d.name in q.names and d.name not in product.attrs["over"]]
    heads = [d for d in q.dims if d.name not in k.names and d.name != "T"]
    inner, value_dims = (
        [d for d in q.dims if d.name in product.attrs["over"]],
        [d for d in v.dims if d.name != "S" and d not in groups],
    )
    names = [d.name for d in groups]
    orders = {
        "queries": (q, ["T", *names, *(d.name for d in heads), *(d.name for d in inner)]),
        "keys": (k, ["S", *names, *(d.name for d in inner)]),
        "values": (v, ["S", *names, *(d.name for d in value_dims)]),
    }
    for role, (value, order) in orders.items():
        if list(value.names) != order:
            raise Unmatched(f"the {role} have the dims {', '.join(value.names)}; the template reads {', '.join(order)}")
    lines, keep, first, causal, dense = splice(body, product, score, mask)
    size = lambda dims: math.prod(d.size for d in dims)  # noqa: E731
    return Attention(
        body.inputs.index(q),
        body.inputs.index(k),
        body.inputs.index(v),
        size(groups),
        size(heads),
        size(inner),
        size(value_dims),
        lines,
        keep,
        first,
        causal,
        dense,
    )


def uncast(value: Value) -> Value:
    while value.op == "cast":
        value = value.inputs[0]
    return value


def operands(value: Value, op: str, expected: str):
    if value.op != op:
        raise Unmatched(f"expected {expected}, found {value.op}")
    return value.inputs


def find_product(score: Value) -> Value:
    """The q·k contraction below a score expression; everything between must be elementwise."""
    found, stack = set(), [score]
    while stack:
        value = stack.pop()
        if value.op == "contract":
            found.add(value)
        elif OPS[value.op].kind == "elementwise":
            stack.extend(value.inputs)
        elif value.op not in ("const", "index", "input"):
            raise Unmatched(f"{value.op} between the product of queries and keys and the softmax")
    if len(found) != 1:
        raise Unmatched("the score does not come from one product of queries and keys")
    return found.pop()


def splice(body, product, score, mask):
    """(score lines, mask lines, first, causal, dense): the language's ops as code over s, q_pos and k_pos."""
    position = [i for i in body.inputs if i.dtype == "int" and i.names == ("T",)]
    given = {product: "s"} | dict.fromkeys(position, "q_pos")
    coords = {"S": Index("k_pos")}

    def write(value, into):
        names = Names(("s", "k_pos", "q_pos", "keep"))
        emitter = Emitter(body, Params(), coords, given, lines := [], names)
        try:
            text = emitter.write(value)
        except KeyError as missing:
            raise Unmatched(f"scores or masks read a value over {missing.args[0]}") from None
        if emitter.params.roles:
            raise Unmatched(f"scores or masks read a tensor: {', '.join(emitter.params.roles)}")
        return lines + ([f"{into} = {strip(text)}"] if text != into else [])

    first, causal, dense = None, False, True
    for condition in conjuncts(mask):
        bound = lower_bound(condition, position)
        if is_causal(condition, position):
            causal = True
        elif bound is not None and first is None:
            value, shift = bound
            (line,) = write(value, "first")[-1:]
            text = line.partition(" = ")[2]
            first = f"{text} + {shift}" if shift else text
        else:
            dense = False
    return write(score, "s"), write(mask, "keep"), first, causal, dense and causal


def conjuncts(mask: Value) -> list[Value]:
    return [c for i in mask.inputs for c in conjuncts(i)] if mask.op == "and" else [mask]


def is_causal(condition, position) -> bool:
    """k <= q, or q >= k."""
    a, b = condition.inputs if len(condition.inputs) == 2 else (None, None)
    return (
        condition.op == "le" and a.op == "index" and b in position or condition.op == "ge" and b.op == "index" and a in position
    )


def lower_bound(condition, position):
    """(value, shift) if the condition says k >= value + shift with a value of the query's position less a literal."""
    if len(condition.inputs) != 2:
        return None
    a, b = condition.inputs
    op = condition.op
    if b.op == "index":
        a, b, op = b, a, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(op, op)
    if a.op != "index" or op not in ("gt", "ge"):
        return None
    if b.op != "sub" or b.inputs[0] not in position or b.inputs[1].op != "const":
        return None
    return b, 1 if op == "gt" else 0
