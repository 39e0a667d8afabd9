"""The verifier: runs between passes and says which value breaks which rule of the graph.

    %7 = sum(%6) over=("T",) : x[D]   @ llama.fuse:24:3 model.layers.0
    after fuse: mixes tokens: only cache and the body of a via may work along T

Checked: operands and attributes are what the op asks for; dtype and dims are what its rule infers; one size per dim name;
weights, splits and joins stay inside their axis, and a join covers it exactly once; regions are closed and agree with their
operands; kernels are read through `get`; and nothing but `cache` and the body of a `via` mixes tokens, so that T may be the
packed tokens of any batch.
"""

from __future__ import annotations

import functools
import math

from .graph import Graph, N, S, T, Value
from .ops import OPS, ShapeError
from .text import is_literal, line_of

RUN_TIME = frozenset(dim.name for dim in (T, S, N))
DTYPES = frozenset(("x", "f32", "int", "bool", "weak"))


class VerifyError(Exception):
    """A graph that breaks a rule. graph, value: where (value is None for the graph itself); problem: what, in one sentence."""

    def __init__(self, graph: Graph, value: Value | None, problem: str, after: str = ""):
        self.graph, self.value, self.problem = graph, value, problem
        place = f"graph {graph.name}" if value is None else line_of(graph, value)
        super().__init__(f"{place}\n{f'after {after}: ' if after else ''}{problem}")


# ---- attributes ----------------------------------------------------------------------------------------------------------------

def _tuple_of(test):
    return lambda v: type(v) is tuple and all(map(test, v))


def _text(v):
    return type(v) is str and v != ""


def _natural(v):
    return type(v) is int and v >= 0


def _positive(v):
    return type(v) is int and v > 0


_names, _sizes = _tuple_of(_text), _tuple_of(_positive)


def _part(v):
    """One part of a join: names, strides, offset."""
    return type(v) is tuple and len(v) == 3 and _names(v[0]) and _sizes(v[1]) and len(v[0]) == len(v[1]) and _natural(v[2])


_OVER = {"over": lambda v: _names(v) and len(set(v)) == len(v)}

# op -> attribute -> test. An op may carry more; whatever it carries must be literal.
ATTRS = {
    "input": {"name": _text},
    "weight": {"key": _text, "shape": _sizes, "offset": _natural, "strides": _sizes},
    "const": {"value": lambda v: type(v) in (int, float, bool)},
    "cast": {"to": (DTYPES - {"weak"}).__contains__},
    "sum": _OVER, "max": _OVER, "mean": _OVER, "contract": _OVER,
    "split": {"dim": _text, "into": _names, "sizes": _sizes, "strides": _sizes, "offset": _natural},
    "join": {"dim": _text, "size": _positive, "parts": _tuple_of(_part)},
    "gather": {"dim": _text},
    "top": {"dim": _text, "into": _text, "size": _positive, "result": ("values", "index").__contains__},
    "cache": {"name": _text},
    "via": {"template": _text, "body": lambda v: isinstance(v, Graph)},
    "kernel": {"kind": _text, "name": _text, "body": lambda v: isinstance(v, Graph)},
    "get": {"index": _natural},
}


# ---- the graph -----------------------------------------------------------------------------------------------------------------


def verify(graph: Graph, after: str = "") -> None:
    """Raises VerifyError at the first value of `graph` that breaks a rule. after: the pass to blame in the message."""
    _Verifier(graph, after).region(graph, mixing=False)


class _Verifier:
    def __init__(self, graph, after):
        self.graph, self.after = graph, after
        self.sizes = {name: None for name in RUN_TIME}
        self.caches: dict[str, Value] = {}
        self.done: set[tuple[Graph, bool]] = set()
        self.types: set[tuple] = set()  # (dtype, dims) already found good

    def fail(self, value, problem):
        raise VerifyError(self.graph, value, problem, self.after)

    def region(self, graph: Graph, mixing: bool):
        """mixing: whether tokens may be mixed here (inside a `via`)."""
        if (graph, mixing) in self.done:  # identical layers may share one body
            return
        self.done.add((graph, mixing))
        names = set()
        for value in graph.inputs:
            if value.op != "input":
                self.fail(value, f"stands among the inputs of {graph.name} but is no input")
            self.value(value, mixing)
            if value.attrs["name"] in names:
                self.fail(value, f"{graph.name} has two inputs of this name")
            names.add(value.attrs["name"])
        if not graph.outputs:
            self.fail(None, f"{graph.name} has no outputs")
        declared = set(graph.inputs)
        for value in graph.walk():
            if value.op != "input":
                self.value(value, mixing)
            elif value not in declared:
                self.fail(value, f"{graph.name} does not declare this input: it reads the outside only through its operands")
        for value in graph.outputs:
            if value.op == "kernel":
                self.fail(value, "a kernel is read through get, one result at a time")

    def value(self, value: Value, mixing: bool):
        op, attrs = OPS.get(value.op), value.attrs
        if op is None:
            self.fail(value, f"there is no op {value.op}")
        if op.arity is not None and op.arity != len(value.inputs):
            self.fail(value, f"{value.op} takes {op.arity} operand{'s' * (op.arity != 1)}; this has {len(value.inputs)}")
        for name, test in ATTRS.get(value.op, {}).items():
            if name not in attrs:
                self.fail(value, f"{value.op} needs the attribute {name}")
            if not test(attrs[name]):
                self.fail(value, f"this cannot be the attribute {name} of {value.op}")
        for name, attribute in attrs.items():
            if not (is_literal(attribute) or isinstance(attribute, Graph) and name == "body" and op.kind == "region"):
                self.fail(value, f"attribute {name} is no literal")
        if (value.dtype, value.dims) not in self.types:
            self.type(value)
        if value.op != "get" and any(operand.op == "kernel" for operand in value.inputs):
            self.fail(value, "a kernel is read through get, one result at a time")
        if value.op in _CHECKS:
            problem = _CHECKS[value.op](value)
            if problem:
                self.fail(value, problem)
        if op.rule is not None:
            self.infer(value, op.rule)
        if not mixing:
            self.tokens(value)
        if op.kind == "region" and "body" in attrs:
            self.region(attrs["body"], mixing or value.op == "via")
        if value.op == "cache" and self.caches.setdefault(attrs["name"], value) is not value:
            self.fail(value, "another cache has this name")

    def type(self, value):
        if value.dtype not in DTYPES:
            self.fail(value, f"there is no dtype {value.dtype}")
        for at, dim in enumerate(value.dims):
            if dim.name in value.names[:at]:
                self.fail(value, f"carries the dim {dim.name} twice")
            if self.sizes.setdefault(dim.name, dim.size) != dim.size:
                self.fail(value, f"{dim.name} is {_size(dim.size)} here and {_size(self.sizes[dim.name])} elsewhere")
            if dim.size is None and dim.name not in RUN_TIME or dim.size is not None and not _positive(dim.size):
                self.fail(value, f"{dim.name} cannot be {_size(dim.size)}: only T, S and T' have no size before run time")
        self.types.add((value.dtype, value.dims))

    def infer(self, value, rule):
        try:
            dtype, dims = rule(value.inputs, value.attrs)
        except (ShapeError, ValueError, LookupError, TypeError) as error:
            self.fail(value, str(error))
        if dtype != value.dtype or dims != value.dims:
            names = ", ".join(d.name for d in dims)
            self.fail(value, f"the rule of {value.op} infers {dtype}[{names}]")

    def tokens(self, value):
        """Nothing outside a `via` may work along the dims of tokens, nor set tokens against history."""
        attrs = value.attrs
        along = {"index": lambda: value.names, "split": lambda: (attrs["dim"], *attrs["into"]), "top": lambda: (attrs["dim"],),
                 "join": lambda: (attrs["dim"], *(n for names, _, _ in attrs["parts"] for n in names)),
                 "gather": lambda: () if value.inputs[1].dims == (N,) else (attrs["dim"],)}  # picking rows mixes nothing
        used = attrs["over"] if "over" in attrs else along[value.op]() if value.op in along else ()
        for name in used:
            if name in RUN_TIME:
                self.fail(value, f"mixes tokens: only cache and the body of a via may work along {name}")
        if T in value.dims and S in value.dims:
            self.fail(value, "sets tokens against history (T and S): only the body of a via may")


def _size(size):
    return "without size" if size is None else size


# ---- single ops: value -> what is wrong with it, or None -----------------------------------------------------------------------


def _weight(value):
    if len(value.attrs["strides"]) != len(value.dims):
        return f"{len(value.dims)} dims but {len(value.attrs['strides'])} strides"
    if RUN_TIME.intersection(value.names):
        return "a weight has no run-time dim"
    end = _last([d.size for d in value.dims], value.attrs["strides"], value.attrs["offset"])
    size = math.prod(value.attrs["shape"])
    return f"reaches element {end} of a tensor of {size}" if end >= size else None


def _index(value):
    return None if value.dtype == "int" and len(value.dims) == 1 else "an index is of type int and has one dim"


def _where(value):
    return None if value.inputs[0].dtype == "bool" else f"the condition is {value.inputs[0].dtype}, not bool"


def _split(value):
    attrs = value.attrs
    if attrs["dim"] not in value.inputs[0].names:
        return f"the value has no dim {attrs['dim']}"
    if not len(attrs["into"]) == len(attrs["sizes"]) == len(attrs["strides"]):
        return "into, sizes and strides are of different lengths"
    end, size = _last(attrs["sizes"], attrs["strides"], attrs["offset"]), value.inputs[0].dim(attrs["dim"]).size
    return f"reaches element {end} of {attrs['dim']}={size}" if size is not None and end >= size else None


def _join(value):
    parts = []
    if len(value.inputs) != len(value.attrs["parts"]):
        return f"{len(value.inputs)} operands but {len(value.attrs['parts'])} parts"
    for operand, (names, strides, offset) in zip(value.inputs, value.attrs["parts"], strict=True):
        missing = [name for name in names if name not in operand.names]
        if missing:
            return f"a part is laid along {missing[0]}, which its operand lacks"
        sizes = tuple(operand.dim(name).size for name in names)
        if None in sizes:
            return "a part is laid along a run-time dim"
        parts.append((sizes, strides, offset))
    return _coverage(tuple(parts), value.attrs["dim"], value.attrs["size"])


def _gather(value):
    table, ids = value.inputs
    if value.attrs["dim"] not in table.names:
        return f"the table has no dim {value.attrs['dim']}"
    return None if ids.dtype == "int" else f"picks by {ids.dtype}, not int"


def _top(value):
    (operand,) = value.inputs
    if value.attrs["dim"] not in operand.names:
        return f"the value has no dim {value.attrs['dim']}"
    size = operand.dim(value.attrs["dim"]).size
    return f"{value.attrs['size']} of {size} entries" if size is not None and value.attrs["size"] > size else None


def _body(value):
    body = value.attrs["body"]
    if len(body.inputs) != len(value.inputs):
        return f"{len(value.inputs)} operands but {body.name} has {len(body.inputs)} inputs"
    for operand, inner in zip(value.inputs, body.inputs, strict=True):
        if (operand.dtype, operand.dims) != (inner.dtype, inner.dims):
            return f"input {inner.attrs.get('name')} of {body.name} is {_type(inner)}, its operand {_type(operand)}"
    return None


def _via(value):
    body = value.attrs["body"]
    if len(body.outputs) != 1:
        return f"{body.name} has {len(body.outputs)} results, not one"
    (result,) = body.outputs
    agrees = (result.dtype, result.dims) == (value.dtype, value.dims)
    return _body(value) or (None if agrees else f"{body.name} returns {_type(result)}")


def _get(value):
    (kernel,), index = value.inputs, value.attrs["index"]
    if kernel.op != "kernel":
        return f"reads a result of {kernel.op}, which is no kernel"
    results = kernel.attrs["body"].outputs
    if index >= len(results):
        return f"result {index} of a kernel that has {len(results)}"
    result = results[index]
    return None if (result.dtype, result.dims) == (value.dtype, value.dims) else f"the kernel's result {index} is {_type(result)}"


_CHECKS = {"weight": _weight, "index": _index, "where": _where, "split": _split, "join": _join, "gather": _gather, "top": _top,
           "via": _via, "kernel": _body, "get": _get}


def _type(value):
    return f"{value.dtype}[{', '.join(map(repr, value.dims))}]"


def _last(sizes, strides, offset) -> int:
    """The last element that an affine view touches."""
    return offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


@functools.lru_cache(maxsize=4096)
def _coverage(parts, dim, size):
    """What keeps `parts`, each (sizes, strides, offset), from covering an axis of `size` elements exactly once."""
    taken = bytearray(size)
    for sizes, strides, offset in parts:
        if _last(sizes, strides, offset) >= size:
            return f"a part reaches element {_last(sizes, strides, offset)} of {dim}={size}"
        *outer, (run, step) = sorted(zip(sizes, strides, strict=True)) or [(1, 1)]
        starts = [offset]
        for count, stride in outer:
            starts = [start + i * stride for start in starts for i in range(count)]
        for start in starts:
            stretch = slice(start, start + (run - 1) * step + 1, step)
            if any(taken[stretch]):
                return f"two parts of {dim} share element {start + taken[stretch].index(1) * step}"
            taken[stretch] = b"\1" * run
    return f"no part covers element {taken.index(0)} of {dim}={size}" if 0 in taken else None
