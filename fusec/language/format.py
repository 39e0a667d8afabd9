"""The formatter: one way to lay out a program, with its comments and its author's grouping kept.

Names, `:` and `=` stand in columns within a run of lines of one kind; a blank line starts a new run. `*`, `/` and `^` are set
tight or wide as the author wrote them, all other operators wide. A trailing comment keeps its column unless the code reaches it.
Blank lines part the declarations that have bodies; elsewhere they are kept, never two. Formatting twice changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import syntax
from .parser import parse

_TOKEN = re.compile(r'"[^"\n]*"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[A-Za-z_]\w*'
                    r"|\?\?|->|==|!=|<=|>=|\.\.|[-+*/%@^<>=:,.()\[\]]")
_KEYWORDS = {"if", "else", "and", "or", "as", "via", "use", "serves", "op", "block", "model", "config"}
_OPERATORS = {"+", "-", "*", "/", "%", "@", "^", "<", ">", "<=", ">=", "==", "!=", "??", "->", "="}
_FREE = {"*", "/", "^"}  # tight or wide, as written


@dataclass
class Line:
    """One line of the file. `kind`: what it is aligned with; `split`: where in `code` the part to align begins."""

    number: int
    code: str = ""
    comment: str = ""
    column: int = 0  # of the comment
    indent: int = 0
    kind: tuple | None = None
    split: int | None = None
    opens: bool = False  # the first line of a declaration with a body
    top: bool = False
    tokens: list = field(default_factory=list)


def format_source(text: str, file: str = "<text>") -> str:
    """The program, laid out. Raises DiagnosticError if it does not parse."""
    program = parse(text, file)
    lines = _lines(text, _kinds(program))
    for run in _runs(lines):
        width = max(line.split for line in run)
        for line in run:
            line.code = line.code[:line.split].ljust(width) + line.code[line.split:]
    out = []
    for line in _spaced(lines):
        code = " " * line.indent + line.code
        if line.comment and line.code:
            code = code.ljust(max(line.column, len(code) + 2))
        out.append((code + line.comment).rstrip())
    return "\n".join(out).strip("\n") + "\n"


def _kinds(program: syntax.Program) -> dict[int, tuple]:
    """Line number -> (what it is aligned with, whether it opens a body)."""
    kinds = {}
    for decl in program.declarations:
        if isinstance(decl, syntax.Use | syntax.Serves):
            continue
        first = decl.span.line
        one_line = isinstance(decl, syntax.Op) and decl.body.span.line == first
        kinds[first] = (("op",) if one_line else None, not one_line)
        lets = decl.lets if isinstance(decl, syntax.Config) else decl.body.lets
        for let in lets:
            kinds[let.span.line] = (("let", len(let.names)), False)
        for item in getattr(decl, "fields", ()):
            kinds[item.span.line] = (("field",), False)
    return kinds


def _lines(text: str, kinds) -> list[Line]:
    """The lines of the file with normal spacing inside each."""
    lines, depth = [], 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = Line(number)
        tokens, position = [], 0
        while position < len(raw):
            if raw[position] == "#":
                line.comment, line.column = raw[position:].rstrip(), position
                break
            match = _TOKEN.match(raw, position)
            if match:
                spaced = position > 0 and raw[position - 1] == " " or raw[match.end():match.end() + 1] == " "
                tokens.append((match.group(), spaced))
            position = match.end() if match else position + 1
        indented = raw[:1] in (" ", "\t")
        line.indent = (2 if indented else 0) + (2 if depth and tokens else 0)
        line.top = bool(tokens) and not indented and not depth
        kind, line.opens = kinds.get(number, (None, False)) if not depth else (None, False)
        line.code, line.split, depth = _join(tokens, depth, kind)
        line.kind = kind if line.split is not None else None
        lines.append(line)
    return lines


def _join(tokens, depth: int, kind) -> tuple[str, int | None, int]:
    """Tokens -> (their text, where `:` or `=` stands for alignment, the bracket depth after them)."""
    text, split, unary, before = "", None, False, None
    for token, spaced in tokens:
        if token in ")]":
            depth -= 1
        mark = ":" if kind == ("field",) else "="
        if kind and split is None and depth == 0 and token == mark:
            split = len(text) + 1
        if before is not None and _space(before, token, spaced, depth, unary):
            text += " "
        operand = before is not None and before[0] not in _OPERATORS | _KEYWORDS | {"(", "[", ",", ":"}
        unary = token == "-" and not operand
        text += token
        if token in "([":
            depth += 1
        before = (token, spaced)
    return text, split, depth


def _space(before, token, spaced, depth, unary) -> bool:
    """Whether a space stands between two neighbouring tokens."""
    last, last_spaced = before
    if unary or last in ("(", "[", ".") or token in (")", "]", ",", "."):
        return False
    if token in "([":
        return last in _OPERATORS - _FREE or last in _KEYWORDS or last in (",", ":") or (last in _FREE and last_spaced)
    if depth and (token == ":" or "=" in (token, last)):
        return last == ":"
    if token in _FREE:
        return spaced
    if last in _FREE:
        return last_spaced
    return True


def _runs(lines: list[Line]):
    """Neighbouring lines of one kind, to be aligned."""
    run = []
    for line in lines:
        if run and (line.kind, line.indent, line.number) != (run[-1].kind, run[-1].indent, run[-1].number + 1):
            yield run
            run = []
        if line.kind is not None:
            run.append(line)
    if run:
        yield run


def _spaced(lines: list[Line]) -> list[Line]:
    """The lines with blank ones where they belong."""
    out, body, previous = [], False, None
    for at, line in enumerate(lines):
        if not line.code and not line.comment:
            continue
        blank = at > 0 and not lines[at - 1].code and not lines[at - 1].comment
        comment_before = previous is not None and not previous.code and previous.number == line.number - 1
        starts = line.top or (not line.code and not line.indent)
        first_code = next((n for n in lines[at:] if n.code), line)
        if previous is not None and previous.opens:
            blank = False
        elif starts and not comment_before and (body or first_code.opens and first_code.top):
            blank = previous is not None
        if blank and previous is not None:
            out.append(Line(0))
        if line.top:
            body = line.opens
        out.append(line)
        previous = line
    return out
