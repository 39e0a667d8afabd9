"""The text form of a graph: what golden files, pass tests and `--print-after` show. `read_graph(print_graph(g))` is `g` again.

    graph Tiny
      source tiny.fuse
      dims T, D=8, F=16
      input %x : x[T, D]   @ 9:14
      %0 = weight key="up.weight" offset=0 shape=(16, 8) strides=(8, 1) : x[F, D]   @ 7:3 up
      %1 = contract(%x, %0) over=("D",) : x[T, F]   @ 11:3 up
      return %1

One line per value in program order: operands, attributes as Python literals, dtype and dims, then source line and path. The body
of a `via` or `kernel` is the block indented under its line, with numbers of its own. Locations name their file only where it is
not the `source` of the header, and a dim its size only where it is not the one in the header. What passes note down in a graph's
`attrs` is left out unless it is a literal. The grammar is `grammar/ir.lark`.

Written by hand, a type may be left out wherever the op's rule can infer it, and `#` starts a comment.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from importlib import resources

from ..errors import UserError
from .graph import NOWHERE, Dim, Graph, N, Origin, S, T, Value
from .ops import OPS, ShapeError, make

RUN_TIME = {dim.name: dim for dim in (T, S, N)}
MARGIN = " " * 3  # between a value and its origin


def print_graph(graph: Graph, *, origins: bool = True, fold_layers: bool = False) -> str:
    """The text of `graph`, ending in a line break; never fails, so that a wrong graph can be shown too.

    origins=False leaves out where values come from.  fold_layers=True shows layers that repeat once, with a count of the others
    (such text is for people: `read_graph` refuses it).
    """
    return _Printer(graph, origins).text(fold_layers)


def line_of(graph: Graph, value: Value) -> str:
    """The first line that `print_graph` gives to `value`, which may stand in a region."""
    printer = _Printer(graph, True)
    for region in (graph, *(body for _, body in regions(graph))):
        order = region.walk()
        if value in order or value in region.inputs:
            return printer.line(value, printer.handles(region, order), declared=value in region.inputs)
    return printer.line(value, {operand: "%?" for operand in (value, *value.inputs)})


def same(a: Graph, b: Graph, *, origins: bool = False) -> bool:
    """Whether two graphs are equal value by value, sharing and regions included, and origins too if asked for."""
    return print_graph(a, origins=origins) == print_graph(b, origins=origins)


def regions(graph: Graph):
    """Every (value, body) of `graph`, outer ones first."""
    for value in graph.walk():
        body = value.attrs.get("body")
        if isinstance(body, Graph):
            yield value, body
            yield from regions(body)


def literal(value) -> str:
    """A Python literal in one spelling: double quotes, `inf` and `nan` by name."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def is_literal(value) -> bool:
    """Whether the text form can hold `value`: numbers, strings, None, and tuples, lists and dicts of them."""
    if type(value) in (tuple, list):
        return all(map(is_literal, value))
    if type(value) is dict:
        return all(is_literal(k) and is_literal(v) for k, v in value.items())
    return value is None or type(value) in (str, int, float, bool)


# ---- printer -------------------------------------------------------------------------------------------------------------------


def _bare(pattern, text):
    """`text` as it is where it fits the pattern, else quoted."""
    return text if re.fullmatch(pattern, text) else literal(text)


NAME, DIM, FILE, PATH = r"[A-Za-z_][\w.-]*", r'[A-Za-z_][^\s,=\[\]"#]*( [^\s,=\[\]"#]+)*', r'[^\s":#][^\s":]*', r'[^\s":]+'


class _Printer:
    def __init__(self, graph: Graph, origins: bool):
        self.graph, self.origins = graph, origins
        self.types: dict[tuple, str] = {}
        self.sizes: dict[str, Dim] = {}
        files = Counter()
        for region in (graph, *(body for _, body in regions(graph))):
            for value in (*region.inputs, *region.walk()):
                for dim in value.dims:
                    self.sizes.setdefault(dim.name, dim)
                files[value.origin.file] += 1
        del files[""]
        own = next((v.origin.file for v in (*graph.inputs, *graph.outputs) if v.origin.file), None)
        self.file = (own or files.most_common(1)[0][0]) if files and origins else ""

    def text(self, fold_layers: bool) -> str:
        lines = [f"graph {_bare(NAME, self.graph.name)}"]
        if self.file:
            lines.append(f"  source {_bare(FILE, self.file)}")
        if self.sizes:
            ordered = sorted(self.sizes.values(), key=lambda d: d.name not in RUN_TIME)
            lines.append(f"  dims {', '.join(_bare(DIM, d.name) + ('' if d.size is None else f'={d.size}') for d in ordered)}")
        return "\n".join(lines + self.block(self.graph, "  ", fold_layers)) + "\n"

    def handles(self, graph: Graph, order) -> dict[Value, str]:
        """How values are called: a declared input by its name where that is a unique word, all others by their place."""
        handles, taken = {}, set()
        for value in graph.inputs:
            name = value.attrs.get("name")
            if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w.]*", name) and name not in taken:
                handles[value] = "%" + name
                taken.add(name)
        for value in (*graph.inputs, *order):
            if value not in handles:
                handles[value] = f"%{len(handles) - len(taken)}"
        return handles

    def block(self, graph: Graph, indent: str, fold_layers=False) -> list[str]:
        order = graph.walk()
        handles, declared = self.handles(graph, order), set(graph.inputs)
        literals = {k: v for k, v in graph.attrs.items() if is_literal(v)}
        lines = [indent + "attrs " + self.attrs(literals)] if literals else []
        lines += [indent + self.line(value, handles, declared=True) for value in graph.inputs]
        order = [value for value in order if value not in declared]
        for shown, note in self.folded(order) if fold_layers else ((order, ""),):
            for value in shown:
                lines.append(indent + self.line(value, handles))
                if isinstance(value.attrs.get("body"), Graph):
                    lines += self.block(value.attrs["body"], indent + "  ")
            lines += [indent + note] if note else []
        lines.append(f"{indent}return {', '.join(handles[o] for o in graph.outputs)}".rstrip())
        return lines

    def folded(self, order):
        from .fold import fold

        return fold(order)

    def line(self, value: Value, handles, declared=False) -> str:
        handle, attrs = handles[value], value.attrs
        if declared:
            head = f"input {handle}"
            attrs = {k: v for k, v in attrs.items() if k != "name" or "%" + str(v) != handle}
        else:
            operands = ", ".join(handles.get(i, "%?") for i in value.inputs)
            head = f"{handle} = {value.op}" + (f"({operands})" if operands else "")
        if attrs:
            head += " " + self.attrs(attrs)
        key = (value.dtype, value.dims)
        if key not in self.types:
            self.types[key] = self.type(*key)
        head += self.types[key]
        return head + self.origin(value.origin) if self.origins and value.origin is not NOWHERE else head

    def attrs(self, attrs) -> str:
        pairs = ((key, _bare(NAME, v.name) if isinstance(v, Graph) else literal(v)) for key, v in sorted(attrs.items()))
        return " ".join(f"{key}={text}" for key, text in pairs)

    def type(self, dtype, dims) -> str:
        names = [_bare(DIM, d.name) + ("" if self.sizes.get(d.name, d) == d else f"={d.size}") for d in dims]
        return f" : {dtype}" + (f"[{', '.join(names)}]" if names else "")

    def origin(self, origin: Origin) -> str:
        parts = []
        if origin.line or origin.column or origin.file:
            file = "" if origin.file == self.file else _bare(PATH, origin.file) + ":"
            parts.append(f"{file}{origin.line}:{origin.column}")
        if origin.path:
            parts.append(_bare(PATH, origin.path))
        return f"{MARGIN}@ {' '.join(parts)}" if parts else ""


# ---- reader --------------------------------------------------------------------------------------------------------------------


def read_graph(text: str) -> Graph:
    """The graph that `text` describes. It is not verified. UserError: text that is no graph, with line and column."""
    from lark.exceptions import UnexpectedInput

    try:
        tree = _parser().parse(text if text.endswith("\n") else text + "\n")
    except UnexpectedInput as error:
        lines = text.splitlines()
        found = lines[error.line - 1].strip() if 0 < error.line <= len(lines) else "the end of the text"
        where = f"line {error.line}, column {error.column}"
        raise UserError(f"graph text, {where}: cannot be read from here on", found=found) from None
    return _Reader().graph(tree)


@functools.cache
def _parser():
    from lark import Lark
    from lark.indenter import Indenter

    class Lines(Indenter):
        NL_type, INDENT_type, DEDENT_type, tab_len = "_NL", "_INDENT", "_DEDENT", 2
        OPEN_PAREN_types, CLOSE_PAREN_types = ["LPAR", "LSQB", "LBRACE"], ["RPAR", "RSQB", "RBRACE"]

    grammar = resources.files("fusec.grammar").joinpath("ir.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", postlex=Lines(), maybe_placeholders=True)


class _Reader:
    def __init__(self):
        self.file, self.sizes = "", dict(RUN_TIME)

    def graph(self, tree) -> Graph:
        name, source, dims, block = tree.children
        if source:
            self.file = _text(source.children[0])
        if dims:
            self.sizes |= {dim.name: dim for dim in (self.size(d, declares=True) for d in dims.children)}
        return self.block(_text(name.children[0]), block)

    def block(self, name, tree) -> Graph:
        values, inputs, attrs, outputs = {}, [], {}, ()
        for node in tree.children:
            if node is None:
                continue
            if node.data == "attrs":
                attrs = self.attrs(node.children)
            elif node.data == "return":
                outputs = tuple(_lookup(values, o) for o in node.children if o is not None)
            else:
                handle = node.children[0]
                if str(handle) in values:
                    raise _error(handle, f"{handle} is defined twice")
                values[str(handle)] = value = self.input(node) if node.data == "input" else self.assign(node, values)
                if node.data == "input":
                    inputs.append(value)
        return Graph(name, tuple(inputs), outputs, attrs)

    def input(self, node) -> Value:
        handle, *attrs, kind, origin = node.children
        return Value("input", (), {"name": handle[1:]} | self.attrs(attrs), *self.type(kind), self.origin(origin))

    def assign(self, node, values) -> Value:
        handle, op, operands, *attrs, kind, origin, region = node.children
        inputs = [_lookup(values, o) for o in operands.children if o is not None] if operands else []
        attrs = self.attrs(attrs)
        if region:
            if not isinstance(attrs.get("body"), str):
                raise _error(handle, f"{handle} has a region but no body=…")
            attrs["body"] = self.block(attrs["body"], region.children[0])
        if kind is not None:
            return Value(str(op), inputs, attrs, *self.type(kind), self.origin(origin))
        if str(op) not in OPS or OPS[op].rule is None:
            raise _error(op, f"the type of {handle} must be written: {op} does not infer it")
        try:
            return make(str(op), *inputs, origin=self.origin(origin), **attrs)
        except (ShapeError, LookupError, TypeError, ValueError) as error:
            raise _error(op, f"{handle}: {error}") from None

    def attrs(self, nodes) -> dict:
        pairs = (("body", _text(n.children[0].children[0])) if n.data == "body" else (str(n.children[0]), _literal(n.children[1]))
                 for n in nodes)
        return dict(pairs)

    def type(self, node):
        dtype, *dims = node.children
        return str(dtype), tuple(self.size(d) for d in dims if d is not None)

    def size(self, node, declares=False) -> Dim:
        (token,), size = node.children[0].children, node.children[1]
        name = _text(token)
        if size is not None or declares:
            return Dim(name, None if size is None else int(size))
        if name not in self.sizes:
            raise _error(token, f"dim {name} has no size: write it in the header (dims {name}=…)")
        return self.sizes[name]

    def origin(self, token) -> Origin:
        if token is None:
            return NOWHERE
        file, line, column, path = _ORIGIN.fullmatch(token).groups()
        file = "" if line is None else self.file if file is None else _text(file)
        return Origin(file, int(line or 0), int(column or 0), _text(path or ""))


_QUOTED = r'"(?:[^"\\]|\\.)*"'
_ORIGIN = re.compile(rf'@[ \t]*(?:(?:({_QUOTED}|{PATH}):)?(\d+):(\d+)(?!\S))?[ \t]*(\S.*?)?[ \t\r]*')


def _error(token, message) -> UserError:
    return UserError(f"graph text, line {token.line}, column {token.column}: {message}")


def _lookup(values, token) -> Value:
    if str(token) not in values:
        raise _error(token, f"{token} is not defined above")
    return values[str(token)]


def _text(token) -> str:
    return json.loads(token) if token.startswith('"') else str(token)


def _literal(node):
    children = node.children
    match node.data:
        case "number":
            return (float if re.search(r"[.einE]", children[0]) else int)(children[0])
        case "string":
            return json.loads(children[0])
        case "true" | "false" | "none":
            return {"true": True, "false": False, "none": None}[node.data]
        case "dict":
            return {_literal(i.children[0]): _literal(i.children[1]) for i in children if i is not None}
        case kind:
            return (tuple if kind == "tuple" else list)(_literal(c) for c in children if c is not None)
