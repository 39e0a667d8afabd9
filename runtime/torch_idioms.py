"""Idioms: parts of the graph for which torch has one function, so that the torch backend makes one call instead of a dozen.

    x * (1 / (1 + exp(-x)))   ->   F.silu(x)

A pattern is nested tuples `(op, operand, ...)` with names for holes and numbers for literals. `idioms` replaces each match by a
`via` value whose body is what it replaced: the graph means what it did, and can still be evaluated without the shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fusec.ir.graph import Graph, Value, replace, rewrite
from fusec.ir.interpreter import Evaluator, aligner, permuter
from fusec.ir.text import print_graph
from fusec.passes.extract import extract

COMMUTES = ("add", "mul")
SILU = ("mul", "x", ("div", 1, ("add", 1, ("exp", ("neg", "x")))))
RMS_NORM = ("cast", ("mul", "x", ("rsqrt", ("add", ("mean", ("mul", "x", "x")), "eps"))))
TURNED = ("sub", ("mul", "a", "cos"), ("mul", "b", "sin")), ("add", ("mul", "b", "cos"), ("mul", "a", "sin"))
ROPE = ("join", ("cast", TURNED[0]), ("cast", TURNED[1]))
SCORES = ("where", "mask", ("cast", ("mul", ("contract", "q", "k"), "scale")), -math.inf)
EXPONENTIALS = ("exp", ("sub", SCORES, ("max", SCORES)))
ATTENTION = ("contract", ("cast", ("div", EXPONENTIALS, ("sum", EXPONENTIALS))), "v")


def unify(pattern, value: Value, holes: dict[str, Value]) -> dict[str, Value] | None:
    """`holes` and those that make `pattern` equal to `value`, or None. A hole named twice stands for one value."""
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
            found = found if found is None else unify(part, operand, found)
        if found is not None:
            return found
    return None


def idioms(graph: Graph, types: dict[str, torch.dtype]) -> tuple[Graph, dict[Value, Callable]]:
    """`graph` with every idiom as a `via` value, and the torch function of each such value, of its operands in order."""
    functions: dict[Value, Callable] = {}

    def rule(value, inputs):
        value = value if inputs == value.inputs else replace(value, inputs=inputs)
        for pattern, write in ((SILU, silu), (RMS_NORM, rms_norm), (ROPE, rope)):
            holes = unify(pattern, value, {})
            function = write(value, types, **holes) if holes else None
            if function:
                operands = [hole for hole in holes.values() if hole.op != "const"]
                body, leaves = extract(write.__name__, [value], operands.__contains__)
                via = replace(value, op="via", inputs=leaves, attrs={"template": write.__name__, "body": body})
                functions[via] = reordered(function, [leaves.index(operand) for operand in operands])
                return via
        return value

    return rewrite(graph, rule), functions


def reordered(function, order: list[int]):
    """The function of operands that stand as `order` says."""
    return function if order == sorted(order) else lambda *tensors: function(*[tensors[i] for i in order])


def silu(value, types, x):
    return F.silu if value.dtype == x.dtype else None


def rms_norm(value, types, x, eps):
    """x / sqrt(mean(x^2) + eps), rounded to the type that the program casts it to; the next value applies the weight."""
    root = next(i for i in value.inputs[0].inputs if i.op == "rsqrt")
    mean = next(i for i in root.inputs[0].inputs if i.op == "mean")
    if mean.attrs["over"] != x.names[-1:] or eps.op != "const":
        return None
    small, to = eps.attrs["value"], types[value.dtype]
    return lambda x: (x * (x * x).mean(-1, keepdim=True).add_(small).rsqrt_()).to(to)


def rope(value, types, a, cos, b, sin):
    """Both halves of a rotation, written where the join wants them."""
    (names, (step,), first), (others, _, second) = value.attrs["parts"]
    if (
        value.names[-1] != value.attrs["dim"]
        or a.names != b.names
        or a.names != (*value.names[:-1], *names)
        or cos.names != sin.names
    ):
        return None
    size, to, align = value.attrs["size"], types[value.dtype], aligner(cos.names, a.names) or (lambda t: t)
    span = step * (a.dims[-1].size - 1) + 1

    def rotate(a, cos, b, sin):
        cos, sin = align(cos), align(sin)
        out = a.new_empty(*a.shape[:-1], size)
        torch.mul(a, cos, out=out[..., first : first + span : step]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., second : second + span : step]).addcmul_(a, sin)
        return out.to(to)

    return rotate


class Attention:
    """The body of a `via attention` value as torch's own attention, where it is one: a scaled product, any mask, a softmax.

    mask(inputs) is bool [T, S], or None if every token sees its whole history; bodies of equal `key` have equal masks.
    """

    def __init__(self, q: int, k: int, v: int, scale: float, mask: Evaluator, arrange: Callable, heads: int, key: str):
        self.q, self.k, self.v, self.scale, self.heads, self.key = q, k, v, scale, heads, key
        self._mask, self._arrange = mask, arrange

    @classmethod
    def of(cls, body: Graph, types, device) -> Attention | None:
        holes = unify(ATTENTION, body.outputs[0], {})
        if holes is None or any(holes[name].op != "input" for name in "qkv") or holes["scale"].op != "const":
            return None
        q, k, v, mask = (holes[name] for name in ("q", "k", "v", "mask"))
        groups, inner = k.names[1:-1], k.names[-1]
        plain = (q.names[0], k.names[0], v.names[:-1], set(mask.names)) == ("T", "S", k.names[:-1], {"T", "S"})
        if (
            not plain
            or q.names[1 : 1 + len(groups)] != groups
            or q.names[-1] != inner
            or body.outputs[0].names != (*q.names[:-1], v.names[-1])
        ):
            return None
        seen = Graph("mask", body.inputs, (mask,))
        numbers = (body.inputs.index(value) for value in (q, k, v))
        heads = math.prod(d.size for d in k.dims[1:-1])
        return cls(
            *numbers,
            holes["scale"].attrs["value"],
            Evaluator(seen, types, device=device),
            permuter(mask.names, ("T", "S")),
            heads,
            print_graph(seen, origins=False),
        )

    def mask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        mask = self._arrange(self._mask(**inputs)[0])
        return None if bool(mask.all()) else mask

    def __call__(self, operands, mask) -> torch.Tensor:
        q, k, v = operands[self.q], operands[self.k], operands[self.v]
        tokens, outer = q.shape[0], q.shape[:-1]
        k, v = (t.reshape(t.shape[0], self.heads, -1).transpose(0, 1)[None] for t in (k, v))
        if tokens == 1 and mask is None:  # the query heads of a group stand as rows: its keys are read once
            q = q.reshape(1, self.heads, -1, q.shape[-1])
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale).reshape(*outer, v.shape[-1])
        q = q.reshape(tokens, -1, q.shape[-1]).transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=q.shape[1] != self.heads)
        return out[0].transpose(0, 1).reshape(*outer, v.shape[-1])
