"""The ops the compiler knows by itself, as the language spells them. All others are written in the language (`grammar/std.fuse`).

Each builder takes (elaborator, primitive, arguments, node, scope); `primitive.arguments` are the values in its brackets.
"""

from __future__ import annotations

import math

from ..diagnostics import Label
from ..ir.graph import Dim, Value
from . import dims
from .scope import BUILTINS, Many, Primitive, Problem, describe, show_dims

_FUNCTIONS = {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, "rsqrt": lambda a: 1 / math.sqrt(a), "sin": math.sin,
              "cos": math.cos, "tanh": math.tanh, "erf": math.erf, "abs": abs, "floor": math.floor}
_PAIRS = {"maximum": max, "minimum": min}


def elementwise(elaborator, primitive, arguments, node, scope):
    """exp(x), maximum(a, b), …: of numbers now, of tensors in the graph."""
    if any(isinstance(a, Many) for a in arguments):
        return elaborator.each(node, arguments, lambda *row: elementwise(elaborator, primitive, row, node, scope))
    if any(isinstance(a, Value) for a in arguments):
        return elaborator.make(primitive.name, *arguments, node=node, scope=scope)
    function = (_FUNCTIONS | _PAIRS)[primitive.name]
    try:
        return function(*[elaborator.number(a, written) for a, written in zip(arguments, node.arguments, strict=True)])
    except (ValueError, ZeroDivisionError, OverflowError):
        raise Problem("FUS032", "this number has no value", node.span, f"{primitive.name} is not defined there") from None


def where(elaborator, primitive, arguments, node, scope):
    """where(condition, a, b): chosen element by element at run time."""
    if any(isinstance(a, Many) for a in arguments):
        return elaborator.each(node, arguments, lambda *row: where(elaborator, primitive, row, node, scope))
    condition = arguments[0]
    if not isinstance(condition, Value):
        raise Problem("FUS051", "where chooses at run time", node.arguments[0].span, f"this is {describe(condition)}",
                      hint="for a choice at compile time write a if condition else b")
    if condition.dtype != "bool":
        raise Problem("FUS050", "where needs a condition", node.arguments[0].span, f"this is a tensor of {condition.dtype}")
    return elaborator.make("where", *arguments, node=node, scope=scope)


def float32(elaborator, primitive, arguments, node, scope):
    """f32(x)."""
    value = arguments[0]
    if isinstance(value, Value | Many):
        return elaborator.cast(value, "f32", node, scope)
    return float(elaborator.number(value, node))


def cache(elaborator, primitive, arguments, node, scope):
    """cache(x): keeps this token's row and returns the sequence's history."""
    value = tensor(arguments[0], node.arguments[0])
    if "T" not in value.names:
        raise Problem("FUS021", "dimension mismatch", node.arguments[0].span,
                      f"only a value of each token (with the dim T) can be cached; this has {show_dims(value.dims)}")
    return elaborator.make("cache", value, name=elaborator.cache_name(scope, node.arguments[0]), node=node, scope=scope)


def reduction(elaborator, primitive, arguments, node, scope):
    """sum[D](x), max[D](x), mean[D](x): over every dim of the axis D."""
    value = arguments[0]
    if isinstance(value, Many):
        return Many(tuple(reduction(elaborator, primitive, [v], node, scope) for v in value.values))
    value, axis = tensor(value, node.arguments[0]), axis_argument(elaborator, primitive, node)
    over = tuple(d.name for d in dims.dims_of(axis))
    absent = [name for name in over if name not in value.names]
    if absent:
        raise Problem("FUS024", f"nothing to reduce over {absent[0]}", scope.call or node.span,
                      f"this has {show_dims(value.dims)}", hint=elaborator.suggest(absent[0], value.names))
    elaborator.keep_tokens_apart(over, node, scope)
    return elaborator.make(primitive.name, value, over=over, node=node, scope=scope)


def index(elaborator, primitive, arguments, node, scope):
    """index[K]: 0, 1, 2, … along K."""
    axis = axis_argument(elaborator, primitive, node)
    if not isinstance(axis, Dim):
        raise Problem("FUS020", "index counts along one dim", node.span, f"this is {dims.show(axis)}")
    elaborator.keep_tokens_apart((axis.name,), node, scope)
    return elaborator.make("index", dtype="int", dims=(axis,), node=node, scope=scope)


def split(elaborator, primitive, arguments, node, scope):
    """split[K -> A + B](x): the components of an axis of x."""
    value = tensor(arguments[0], node.arguments[0])
    source, target = arrow_arguments(elaborator, primitive, node)
    whole = one_dim(source, node, primitive)
    if whole.name not in value.names:
        raise Problem("FUS021", "dimension mismatch", scope.call or node.span,
                      f"no dim {whole.name} to split: this has {show_dims(value.dims)}")
    same_size(source, target, node, scope)
    elaborator.keep_tokens_apart((whole.name,), node, scope)
    parts = tuple(elaborator.make("split", value, dim=whole.name, into=tuple(d.name for d in c.dims),
                                  sizes=tuple(d.size for d in c.dims), strides=c.strides, offset=c.offset,
                                  node=node, scope=scope) for c in dims.components(target))
    return parts[0] if len(parts) == 1 else Many(parts)


def join(elaborator, primitive, arguments, node, scope):
    """join[A + B -> K](a, b): components laid side by side into one axis."""
    source, target = arrow_arguments(elaborator, primitive, node)
    whole, wanted = one_dim(target, node, primitive), dims.components(source)
    given = arguments[0].values if len(arguments) == 1 and isinstance(arguments[0], Many) else arguments
    if len(given) != len(wanted):
        raise Problem("FUS040", "wrong number of arguments", scope.call or node.span,
                      f"{dims.show(source)} holds {len(wanted)} tensors, this joins {len(given)}")
    for part, component in zip(given, wanted, strict=True):
        absent = [d.name for d in component.dims if d.name not in tensor(part, node).names]
        if absent:
            raise Problem("FUS021", "dimension mismatch", scope.call or node.span,
                          f"no dim {absent[0]} to join: this has {show_dims(part.dims)}")
    same_size(source, target, node, scope)
    parts = tuple((tuple(d.name for d in c.dims), c.strides, c.offset) for c in wanted)
    return elaborator.make("join", *given, dim=whole.name, size=whole.size, parts=parts, node=node, scope=scope)


def top(elaborator, primitive, arguments, node, scope):
    """top[E -> A](x): the A largest entries along E and their indices, largest first."""
    value = tensor(arguments[0], node.arguments[0])
    source, target = arrow_arguments(elaborator, primitive, node)
    along, into = one_dim(source, node, primitive), one_dim(target, node, primitive)
    if along.name not in value.names:
        raise Problem("FUS021", "dimension mismatch", scope.call or node.span,
                      f"no dim {along.name}: this has {show_dims(value.dims)}")
    if into.size > along.size:
        raise Problem("FUS023", "sizes disagree", node.span, f"{into.name} is {into.size}, more than {along.name} = {along.size}")
    elaborator.keep_tokens_apart((along.name,), node, scope)
    return Many(tuple(elaborator.make("top", value, dim=along.name, into=into.name, size=into.size, result=result,
                                      node=node, scope=scope) for result in ("values", "index")))


def axis_argument(elaborator, primitive, node) -> dims.Axis:
    """The one axis in the brackets of `primitive`."""
    if len(primitive.arguments) != 1:
        raise Problem("FUS042", f"{primitive.name} needs to know along which dim", node.span, "",
                      hint=f"write {primitive.name}[D](…)")
    return elaborator.axis(primitive.arguments[0], node)


def arrow_arguments(elaborator, primitive, node) -> tuple[dims.Axis, dims.Axis]:
    """The axes on both sides of the arrow in the brackets of `primitive`."""
    if len(primitive.arguments) != 2:
        raise Problem("FUS042", f"{primitive.name} needs an arrow in its brackets", node.span,
                      hint=f"write {primitive.name}[A -> B](…)")
    return elaborator.axis(primitive.arguments[0], node), elaborator.axis(primitive.arguments[1], node)


def tensor(value, node) -> Value:
    """`value`, if it is one tensor."""
    if not isinstance(value, Value):
        raise Problem("FUS043", "a tensor was expected", node.span, f"this is {describe(value)}")
    return value


def one_dim(axis, node, primitive) -> Dim:
    if not isinstance(axis, Dim):
        raise Problem("FUS020", f"{primitive.name} needs one dim on that side of the arrow", node.span,
                      f"this is {dims.show(axis)}")
    return axis


def same_size(source, target, node, scope):
    if dims.size(source) != dims.size(target):
        raise Problem("FUS023", "sizes disagree", scope.call or node.span,
                      f"{dims.show(source)} is {dims.size(source)}, {dims.show(target)} is {dims.size(target)}",
                      related=[Label(node.span, "here")] if scope.call else [])


BUILTINS |= {name: Primitive(name, elementwise, 1) for name in _FUNCTIONS}
BUILTINS |= {name: Primitive(name, elementwise, 2) for name in _PAIRS}
BUILTINS |= {name: Primitive(name, reduction, 1, "axis") for name in ("sum", "max", "mean")}
BUILTINS |= {"where": Primitive("where", where, 3), "f32": Primitive("f32", float32, 1), "cache": Primitive("cache", cache, 1),
             "index": Primitive("index", index, None, "axis"), "split": Primitive("split", split, 1, "arrow"),
             "join": Primitive("join", join, None, "arrow"), "top": Primitive("top", top, 1, "arrow")}
