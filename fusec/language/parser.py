"""Text -> syntax tree. The grammar is `grammar/fuse.lark`; lark is imported and built on first use."""

from __future__ import annotations

import functools
import re

from ..diagnostics import Diagnostic, DiagnosticError, Label, Source, Span
from . import syntax


def parse(text: str, file: str = "<text>") -> syntax.Program:
    """The syntax tree of a whole file. Raises DiagnosticError with one error per declaration that does not parse."""
    from lark.exceptions import LarkError

    source = Source(file, text)
    tabs = [Span(source, m.start(1), m.end(1)) for m in re.finditer(r"^ *(\t[ \t]*)", text, re.M)]
    if tabs:
        raise DiagnosticError([Diagnostic("FUS002", "a tab in the indentation", Label(tabs[0], "indent with spaces"))])
    try:
        return _Builder(source).program(_lark().parse(_ended(text)))
    except LarkError as error:
        raise DiagnosticError(_diagnose(source) or [_describe(error, source, 0, text)]) from None
    except RecursionError:
        raise DiagnosticError([Diagnostic("FUS001", "an expression is nested too deeply", Label(Span(source, 0, 0)))]) from None


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


@functools.cache
def _lark():
    from .tables import lark_parser

    return lark_parser()


# ---- tree -> nodes --------------------------------------------------------------------------------------------------


class _Builder:
    """One method per rule of the grammar: (span, children) -> node."""

    def __init__(self, source: Source):
        self.source, self.errors = source, []

    def program(self, tree) -> syntax.Program:
        declarations = tuple(self.build(child) for child in tree.children)
        if self.errors:
            raise DiagnosticError(self.errors)
        return syntax.Program(self.source, declarations)

    def build(self, node):
        children = getattr(node, "children", None)
        if children is None:
            return node  # a token, or None where something optional is absent
        meta = node.meta
        span = Span(self.source, getattr(meta, "start_pos", 0), getattr(meta, "end_pos", 0))
        return getattr(self, node.data)(span, *[self.build(child) for child in children])

    def span(self, token) -> Span:
        return Span(self.source, token.start_pos, token.end_pos)

    # declarations

    def use(self, span, name):
        return syntax.Use(self.span(name), str(name))

    def serves(self, span, *names):
        return syntax.Serves(span, tuple(map(str, names)))

    def config(self, span, *lets):
        return syntax.Config(span, lets)

    def op(self, span, name, statics, params, result, via, body):
        if not isinstance(body, syntax.Body):
            body = syntax.Body(body.span, (), body)
        return syntax.Op(span, self.span(name), str(name), statics or (), params or (), result, via, body)

    def block(self, span, name, statics, params, result, *rest, is_model=False):
        *fields, body = rest
        return syntax.Block(span, self.span(name), str(name), statics or (), params or (), result, tuple(fields), body, is_model)

    def model(self, *parts):
        return self.block(*parts, is_model=True)

    def statics(self, span, *groups):
        return tuple(static for group in groups for static in group)

    def static(self, span, name):
        return (syntax.Static(span, str(name)),)

    def optional_static(self, span, name, default):
        return (syntax.Static(self.span(name), str(name), default),)

    def arrow_static(self, span, source, target):
        return (syntax.Static(self.span(source), str(source), arrow=True), syntax.Static(self.span(target), str(target)))

    def params(self, span, *params):
        return params

    def param(self, span, name, type):
        return syntax.Param(span, str(name), type)

    def result(self, span, type):
        return type

    def via(self, span, name):
        return str(name)

    def shape(self, span, rest, *axes):
        return syntax.Shape(span, rest is not None, tuple(a for a in axes if a is not None))

    def field(self, span, target, type, tied, condition):
        path, index, count, node = [], None, None, target
        if isinstance(node, syntax.Subscript) and len(node.arguments) == 1 and isinstance(node.arguments[0], syntax.Expr):
            count, node = node.arguments[0], node.value
            if isinstance(count, syntax.Binary) and count.operator == "<" and isinstance(count.left, syntax.Name):
                index, count = count.left.id, count.right
        while isinstance(node, syntax.Attribute):
            path.append(node.name)
            node = node.value
        if not isinstance(node, syntax.Name):
            self.errors.append(Diagnostic("FUS001", "a field's name is a path such as self_attn or model.layers[L]",
                                          Label(target.span, "is not one")))
            return None
        path.append(node.id)
        span = Span(self.source, span.start, max(type.span.end, *(n.span.end for n in (type, tied, condition) if n)))
        return syntax.Field(span, target.span, tuple(reversed(path)), index, count, type, tied, condition)

    def body(self, span, *parts):
        *lets, result = parts
        return syntax.Body(span, tuple(lets), result)

    def let(self, span, names, *values):
        return syntax.Let(names[0].span.to(values[-1].span), names, values)

    def names(self, span, *names):
        return tuple(self.name(None, name) for name in names)

    # expressions

    def number(self, span, token):
        return syntax.Number(span, float(token) if any(c in token for c in ".eE") else int(token))

    def string(self, span, token):
        return syntax.String(span, token[1:-1])

    def name(self, span, token):
        return syntax.Name(self.span(token), str(token))

    def attribute(self, span, value, name):
        return syntax.Attribute(span, value, str(name))

    def subscript(self, span, value, *arguments):
        return syntax.Subscript(span, value, arguments)

    def call(self, span, function, *arguments):
        return syntax.Call(span, function, tuple(a for a in arguments if a is not None))

    def group(self, span, value):
        return value

    def arrow(self, span, source, target):
        return syntax.Arrow(span, source, target)

    def keyword(self, span, name, value):
        return syntax.Keyword(span, str(name), value)

    def negate(self, span, value):
        return syntax.Negate(span, value)

    def binary(self, span, left, operator, right):
        return syntax.Binary(span, str(operator), left, right)

    def choice(self, span, value, condition, otherwise):
        return syntax.Choice(span, value, condition, otherwise)

    def default(self, span, value, otherwise):
        return syntax.Default(span, value, otherwise)

    def cast(self, span, value, like):
        return syntax.Cast(span, value, like)


# ---- syntax errors --------------------------------------------------------------------------------------------------

# Typical mistakes, by example: (what to say, hint, texts that contain it). An error that leaves the parser in the same state as
# one of these is named after it.
_MISTAKES = (
    ("a declaration's first line ends without a colon", "remove the colon",
     ("block A(x):\n  x\n", "op f(x):\n  x\n", "config:\n  D = d\n", "block A(x) -> [T]:\n  x\n", "block A[D](x):\n  x\n")),
    ("the body ends without a result", "its last line is an expression, the value it returns",
     ("op f(x)\n  y = x\n", "block A(x)\n  w : [D]\n", "op f(x)\n  y = x\nop g(x) = x\n", "block A(x)\n  w : [D]\n  y = x\n")),
    ("a field stands below a statement", "declare all fields first, then compute",
     ("block A(x)\n  h = x\n  w : [D]\n  h\n", "block A(x)\n  w : [D]\n  h = x\n  u : [D]\n  h\n")),
    ("only the last line of a body is a value", "give this one a name: y = …",
     ("op f(x)\n  x\n  x\n", "block A(x)\n  w : [D]\n  x\n  x\n", "op f(x)\n  x\n  y = x\n", "op f(x)\n  y = x\n  y\n  y\n")),
    ("a choice needs both sides", "write a if condition else b",
     ("op f(x) = x if c\n", "op f(x) = g(x if c)\n", "config\n  D = a if b\n")),
    ("comparisons do not chain", "write a < b and b < c", ("op f(x) = a < b < c\n",)),
    ("power is written ^", "write x^2", ("op f(x) = x ** 2\n", "config\n  D = x ** 2\n")),
    ("there is no return", "the last line of a body is its value",
     ("op f(x)\n  return x\n", "block A(x)\n  w : [D]\n  return x\n")),
    ("an operand is missing", "an expression stands on both sides of an operator",
     ("op f(x) = x +\n", "op f(x) = x *\n", "op f(x) = (x + )\n", "op f(x) = x + * y\n", "op f(x) = g(x,)\n")),
    ("an op takes its arguments in parentheses", "write op name(x) = …", ("op f = x\n", "op f[D] = x\n", "op f\n  x\n")),
    ("empty brackets", "leave them out, or name a dim in them", ("op f(x) = sum[](x)\n", "op f[](x) = x\n")),
    ("nothing stands after =", "write an expression", ("op f(x) =\n", "config\n  D =\n")),
    ("a let is written name = expression", None, ("config\n  D\n", "config\n  D hidden_size\n", "config\n  D : hidden_size\n")),
    ("not a declaration", "a file consists of use, serves, config, op, block and model",
     ("def f(x): x\n", "class A:\n  x\n", "x = 1\n", "import std\n")),
)


def _diagnose(source: Source) -> list[Diagnostic]:
    """The syntax errors of a file that does not parse: each top-level declaration is tried alone, so that several are found."""
    from lark.exceptions import LarkError

    starts = [m.start() for m in re.finditer(r"^[^\s#)\]]", source.text, re.M)] + [len(source.text)]
    found = []
    for start, end in zip(starts, starts[1:], strict=False):
        chunk = source.text[start:end]
        try:
            _lark().parse(_ended(chunk))
        except LarkError as error:
            found.append(_describe(error, source, start, chunk))
    return found


def _describe(error, source: Source, start: int, chunk: str) -> Diagnostic:
    """A parser error -> a diagnostic. `start`: where the chunk that was parsed begins in the source."""
    from lark import exceptions
    from lark.indenter import DedentError

    def at(offset, length=1):
        offset = min(start + offset, len(source.text))
        return Span(source, offset, min(offset + max(length, 1), max(len(source.text), offset)))

    opened, dedent = _unclosed(chunk), _bad_dedent(chunk)
    if opened is not None:
        return Diagnostic("FUS003", f"{chunk[opened]} is never closed", Label(at(opened), "opened here"))
    if isinstance(error, DedentError) or dedent is not None:
        return Diagnostic("FUS002", "unexpected indentation", Label(at(dedent or 0), "matches no line above"))
    if isinstance(error, exceptions.UnexpectedCharacters):
        offset, what = error.pos_in_stream, chunk[error.pos_in_stream]
    else:
        token = getattr(error, "token", None)
        ends = token is None or token.type == "$END"
        offset, what = (len(chunk.rstrip()), "the end") if ends else (token.start_pos, str(token))
    if isinstance(error, exceptions.UnexpectedToken) and error.token.type == "_INDENT":
        line = chunk[:offset].rstrip("\n").count("\n")
        offset = sum(len(text) + 1 for text in chunk.split("\n")[:line + 1])
        offset += len(chunk[offset:]) - len(chunk[offset:].lstrip())
        return Diagnostic("FUS002", "unexpected indentation", Label(at(offset), "is deeper than the line above"))
    ended = what == "the end" or not what.strip()
    label = Label(at(offset if not ended else len(chunk[:offset].rstrip()), len(what.strip()) if not ended else 1),
                  "the line ends too soon" if ended else "not expected here")
    mistake = error.match_examples(_lark().parse, {i: m[2] for i, m in enumerate(_MISTAKES)}, use_accepts=False) \
        if isinstance(error, exceptions.UnexpectedInput) else None
    if mistake is None:
        return Diagnostic("FUS001", "syntax error", label)
    title, hint, _ = _MISTAKES[mistake]
    return Diagnostic("FUS001", title, label, hint=hint)


def _unclosed(chunk: str) -> int | None:
    """The offset of a bracket that nothing closes."""
    stack = []
    for match in re.finditer(r'#[^\n]*|"[^"\n]*"|[()\[\]]', chunk):
        if match.group() in "([":
            stack.append(match.start())
        elif match.group() in ")]" and stack:
            stack.pop()
    return stack[-1] if stack else None


def _bad_dedent(chunk: str) -> int | None:
    """The offset of the first line that returns to an indentation no open line has."""
    levels, offset = [0], 0
    for line in chunk.split("\n"):
        code = line.strip()
        if code and not code.startswith("#"):
            indent = len(line) - len(line.lstrip())
            returns = indent < levels[-1]
            while indent < levels[-1]:
                levels.pop()
            if indent > levels[-1]:
                if returns:
                    return offset + indent
                levels.append(indent)
        offset += len(line) + 1
    return None
