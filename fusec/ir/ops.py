"""The primitive ops, each defined once: name, kind, shape rule, torch meaning, Triton spelling.

    source       input weight const index           elementwise  arithmetic, comparison, functions, cast
    reduction    sum max mean                       contraction  contract (sums products over named dims)
    movement     split join gather top              state        cache
    region       via (a body some template implements), kernel (what one launch computes), get (one result of a kernel)

Every named layer of the literature is written in the language in terms of these; the compiler knows no other op.

`make(op, *inputs, **attrs)` builds a value: its dtype and dims come from the op's rule. A torch meaning is called as
`fn(run, value, *tensors)`, the tensors' axes standing in the order of each operand's `dims`, elementwise operands already aligned
to the result's. A Triton spelling is a format string over its operands (float32 inside a kernel), or None where a template owns
the op.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .graph import NOWHERE, Dim, N, S, T, Value


@dataclass(frozen=True)
class Op:
    """One primitive. `rule(inputs, attrs) -> (dtype, dims)`; None where the maker states them (`dtype=`, `dims=`)."""

    name: str
    kind: str
    arity: int | None
    rule: Callable | None
    torch: str
    triton: str | None
    doc: str


OPS: dict[str, Op] = {}


class ShapeError(ValueError):
    """An op applied to values that do not fit it. `where` is the index of the offending operand, if one can be named."""

    def __init__(self, message, where=None):
        super().__init__(message)
        self.where = where


def define(name, kind, arity, rule, torch, triton, doc):
    OPS[name] = Op(name, kind, arity, rule, torch, triton, doc)


def make(op: str, *inputs: Value, dtype=None, dims=None, origin=NOWHERE, **attrs) -> Value:
    """A new value of primitive `op`. `dtype` and `dims` are stated only for ops that have no rule (input, weight, via…)."""
    rule = OPS[op].rule
    if rule is not None:
        dtype, dims = rule(inputs, attrs)
    names = [d.name for d in dims]
    if len(set(names)) != len(names):
        raise ShapeError(f"{op} would carry the dim {next(n for n in names if names.count(n) > 1)} twice")
    return Value(op, inputs, attrs, dtype, dims, origin)


# ---- dtypes --------------------------------------------------------------------------------------------------------

_RANK = {"bool": 0, "weak": 1, "int": 2, "x": 3, "f32": 4}


def promote(*values: Value) -> str:
    """The wider type, as torch promotes; a literal is weak, but a fractional one turns integers into float32."""
    dtype = max((v.dtype for v in values), key=_RANK.__getitem__)
    fractional = any(v.op == "const" and isinstance(v.attrs["value"], float) for v in values)
    return "f32" if dtype == "int" and fractional else dtype


def union(*values: Value) -> tuple[Dim, ...]:
    """The dims of all operands, each once, in order of first appearance in the operand with the most dims, then the others."""
    table = {}
    for value in sorted(values, key=lambda v: -len(v.dims)):
        for dim in value.dims:
            known = table.setdefault(dim.name, dim)
            if known.size != dim.size:
                raise ShapeError(f"{dim.name} is {known.size} here and {dim.size} there")
    return tokens_first(table.values())


def tokens_first(dims) -> tuple[Dim, ...]:
    """The dims with the tokens' in front: how results lie in memory, a token's row contiguous."""
    dims = tuple(dims)
    return tuple(d for d in dims if d in (T, N)) + tuple(d for d in dims if d not in (T, N))


def _elementwise(inputs, attrs):
    return promote(*inputs), union(*inputs)


def _real(inputs, attrs):
    dtype = promote(*inputs)
    return ("f32" if dtype in ("int", "bool") else dtype), union(*inputs)


def _comparison(inputs, attrs):
    return "bool", union(*inputs)


def _where(inputs, attrs):
    return promote(*inputs[1:]), union(*inputs)


# ---- sources -------------------------------------------------------------------------------------------------------

define("input", "source", 0, None, "env[name]", None, "A run-time argument. attrs: name.")
define("weight", "source", 0, None, "as_strided(checkpoint[key])", None,
       "A component of a checkpoint tensor. attrs: key (with {} where a stack's index stands), shape (of the storage; a stack's "
       "count first), "
       "offset and strides (per dim, in elements of the storage).")
define("const", "source", 0, lambda i, a: ("weak", ()), "value", None, "A literal number. attrs: value.")
define("index", "source", 0, None, "arange(size)", None, "0, 1, 2, … along a dim: dims = (that dim,), dtype int.")

# ---- elementwise ---------------------------------------------------------------------------------------------------

for _name, _rule, _torch, _triton, _doc in (
    ("add", _elementwise, "torch.add({0}, {1})", "{0} + {1}", "a + b"),
    ("sub", _elementwise, "torch.sub({0}, {1})", "{0} - {1}", "a - b"),
    ("mul", _elementwise, "torch.mul({0}, {1})", "{0} * {1}", "a * b"),
    ("div", _real, "torch.div({0}, {1})", "{0} / {1}", "a / b; integers divide to float32"),
    ("mod", _elementwise, "torch.remainder({0}, {1})", "((({0}) % {1} + {1}) % {1})", "a % b, with the divisor's sign"),
    ("pow", _real, "torch.pow({0}, {1})", "libdevice.pow({0}, {1})", "a ^ b"),
    ("neg", _elementwise, "torch.neg({0})", "-{0}", "-a"),
    ("abs", _elementwise, "torch.abs({0})", "tl.abs({0})", "|a|"),
    ("exp", _real, "torch.exp({0})", "tl.exp({0})", "exp(a)"),
    ("log", _real, "torch.log({0})", "tl.log({0})", "natural logarithm"),
    ("sqrt", _real, "torch.sqrt({0})", "tl.sqrt({0})", "square root"),
    ("rsqrt", _real, "torch.rsqrt({0})", "tl.rsqrt({0})", "1 / square root"),
    ("sin", _real, "torch.sin({0})", "tl.sin({0})", "sine, radians"),
    ("cos", _real, "torch.cos({0})", "tl.cos({0})", "cosine, radians"),
    ("tanh", _real, "torch.tanh({0})", "(2 * tl.sigmoid(2 * {0}) - 1)", "hyperbolic tangent"),
    ("erf", _real, "torch.erf({0})", "tl.erf({0})", "error function"),
    ("floor", _real, "torch.floor({0})", "tl.floor({0})", "largest integer not above a"),
    ("maximum", _elementwise, "torch.maximum({0}, {1})", "tl.maximum({0}, {1})", "the larger of two"),
    ("minimum", _elementwise, "torch.minimum({0}, {1})", "tl.minimum({0}, {1})", "the smaller of two"),
    ("lt", _comparison, "torch.lt({0}, {1})", "{0} < {1}", "a < b"),
    ("le", _comparison, "torch.le({0}, {1})", "{0} <= {1}", "a <= b"),
    ("gt", _comparison, "torch.gt({0}, {1})", "{0} > {1}", "a > b"),
    ("ge", _comparison, "torch.ge({0}, {1})", "{0} >= {1}", "a >= b"),
    ("eq", _comparison, "torch.eq({0}, {1})", "{0} == {1}", "a == b"),
    ("and", _comparison, "torch.logical_and({0}, {1})", "{0} & {1}", "both"),
    ("or", _comparison, "torch.logical_or({0}, {1})", "{0} | {1}", "either"),
    ("where", _where, "torch.where({0}, {1}, {2})", "tl.where({0}, {1}, {2})", "where(condition, a, b)"),
    ("cast", lambda i, a: (a["to"], i[0].dims), "{0}.to(to)", None,
     "To another dtype. attrs: to. Inside a kernel arithmetic is float32: a cast down takes effect where the value is stored."),
):
    define(_name, "elementwise", len(set(re.findall(r"{\d}", _torch))), _rule, _torch, _triton, _doc)

# ---- reductions and contraction ------------------------------------------------------------------------------------


def _reduce(inputs, attrs):
    missing = [name for name in attrs["over"] if name not in inputs[0].names]
    if missing:
        raise ShapeError(f"nothing to reduce over {missing[0]}: the value has {', '.join(inputs[0].names) or 'no dims'}", 0)
    return inputs[0].dtype, tuple(d for d in inputs[0].dims if d.name not in attrs["over"])


def _contract(inputs, attrs):
    for where, value in enumerate(inputs):
        for name in attrs["over"]:
            if name not in value.names:
                raise ShapeError(f"{name} is contracted but missing from an operand with {', '.join(value.names)}", where)
    first, second = inputs if {T, N} & set(inputs[0].dims) else reversed(inputs)  # x @ w and w @ x lie alike
    dims = first.dims + tuple(d for d in second.dims if d.name not in first.names)
    return promote(*inputs), tokens_first(d for d in dims if d.name not in attrs["over"])


define("sum", "reduction", 1, _reduce, "{0}.sum(axes)", "tl.sum({0}, axis)", "Sum over dims. attrs: over (names).")
define("max", "reduction", 1, _reduce, "{0}.amax(axes)", "tl.max({0}, axis)", "Maximum over dims. attrs: over (names).")
define("mean", "reduction", 1, lambda i, a: (_real(i, a)[0], _reduce(i, a)[1]), "{0}.mean(axes)", "tl.sum({0}, axis) / size",
       "Mean over dims. attrs: over (names).")
define("contract", "contraction", 2, _contract, "einsum({0}, {1})", "tl.dot",
       "Sum of products over dims; other dims that both operands carry run in parallel. attrs: over (names).")

# ---- movement ------------------------------------------------------------------------------------------------------


def _split(inputs, attrs):
    (value,) = inputs
    if attrs["dim"] not in value.names:
        raise ShapeError(f"no dim {attrs['dim']} to split: the value has {', '.join(value.names)}", 0)
    into = tuple(Dim(name, size) for name, size in zip(attrs["into"], attrs["sizes"], strict=True))
    at = value.names.index(attrs["dim"])
    return value.dtype, value.dims[:at] + into + value.dims[at + 1:]


def _join(inputs, attrs):
    parts = attrs["parts"]
    rests = [[d for d in v.dims if d.name not in names] for v, (names, _, _) in zip(inputs, parts, strict=True)]
    outer = union(*(Value("", dims=rest) for rest in rests))
    at = min((inputs[0].names.index(n) for n in parts[0][0]), default=len(outer))
    at = max(at, sum(d in (T, N) for d in outer))
    return promote(*inputs), outer[:at] + (Dim(attrs["dim"], attrs["size"]),) + outer[at:]


def _gather(inputs, attrs):
    table, ids = inputs
    return table.dtype, ids.dims + tuple(d for d in table.dims if d.name != attrs["dim"])


def _top(inputs, attrs):
    (value,) = inputs
    dims = tuple(Dim(attrs["into"], attrs["size"]) if d.name == attrs["dim"] else d for d in value.dims)
    return ("int" if attrs["result"] == "index" else value.dtype), dims


define("split", "movement", 1, _split, "as_strided along one axis", None,
       "One component of an axis. attrs: dim, into (names), sizes, strides, offset: element i.. of the component is element "
       "offset + Σ stride·i of dim.")
define("join", "movement", None, _join, "copy into strided views", None,
       "Components laid side by side into one axis. attrs: dim, size, parts: (names, strides, offset) per operand.")
define("gather", "movement", 2, _gather, "table[ids]", None, "Rows of a table along attrs dim, picked by integer ids.")
define("top", "movement", 1, _top, "topk", None,
       "The largest entries along attrs dim, largest first. attrs: dim, into (name), size, result ('values' or 'index').")

# ---- state and regions ---------------------------------------------------------------------------------------------


def _cache(inputs, attrs):
    if not any(d.name == T.name for d in inputs[0].dims):
        raise ShapeError("only a value of each token (with the dim T) can be cached", 0)
    return inputs[0].dtype, tuple(S if d.name == T.name else d for d in inputs[0].dims)


define("cache", "state", 1, _cache, "append, then the whole history", None,
       "This token's row is kept; the result is the sequence's history, T becoming S. attrs: name (unique).")
define("via", "region", None, None, "evaluate the body", None,
       "A body that a kernel template implements. attrs: template, body (its inputs stand for the operands, in order).")
define("kernel", "region", None, None, "evaluate the body", None,
       "What one launch computes. attrs: kind, name, body (one output per result; read them with get).")
define("get", "region", 1, None, "results[index]", None, "One result of a kernel. attrs: index.")
