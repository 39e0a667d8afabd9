"""What the compiler says about a source file: a code, a title, underlined spans, and what to do.

    error[FUS021]: dimension mismatch
       ┌─ examples/llama.fuse:24:3
    24 │   o_proj(attend[K](q, cache(k), cache(v), pos))
       │   ^^^^^^ expects at least G, R, K; this has T, G, K
    16 │   q_proj : Linear[D -> G*K]
       │            ---------------- R was expected here
    hint: write Linear[D -> G*R*K]

A `Diagnostic` is data; `render` draws it, `as_dict` writes it down for a script. A phase collects as many as it can and raises
them together as one `DiagnosticError`.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import UserError


class Source:
    """The text of one file, and the name to call it by. Offsets count characters; lines and columns count from 1."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        self._starts = [0]
        for i, character in enumerate(text):
            if character == "\n":
                self._starts.append(i + 1)

    def position(self, offset: int) -> tuple[int, int]:
        """offset -> (line, column)."""
        line = bisect.bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of line `number`, without its line break."""
        end = self._starts[number] - 1 if number < len(self._starts) else len(self.text)
        return self.text[self._starts[number - 1]:end].rstrip("\r")

    def __repr__(self):
        return f"Source({self.name!r})"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of source text: characters `start` up to, not including, `end`."""

    source: Source
    start: int
    end: int

    @property
    def file(self) -> str:
        return self.source.name

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def end_line(self) -> int:
        return self.source.position(self.end)[0]

    @property
    def end_column(self) -> int:
        return self.source.position(self.end)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start:self.end]

    def to(self, other: Span) -> Span:
        """From the start of this span to the end of `other`."""
        return Span(self.source, self.start, other.end)

    def __repr__(self):
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Label:
    """An underlined span and what to say under it."""

    span: Span
    text: str = ""


@dataclass(frozen=True)
class Diagnostic:
    """One finding: `label` is the place that is wrong, `related` are the declarations it disagrees with.

    code: a section of `grammar/diagnostics.md`.
    """

    code: str
    title: str
    label: Label | None = None
    related: tuple[Label, ...] = ()
    hint: str | None = None
    notes: tuple[str, ...] = ()
    level: str = "error"

    def __str__(self):
        return render(self)


ENOUGH = 20  # diagnostics that a reader is told at once


class DiagnosticError(UserError):
    """One or more errors in a source file or in what it is compiled with (exit status 3). Of many, the first `ENOUGH`."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)[:ENOUGH]
        super().__init__(self.diagnostics[0].title, exit_code=3)

    def __str__(self):
        return self.render()

    def render(self, color: bool = False) -> str:
        return "\n\n".join(render(d, color) for d in self.diagnostics)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name a person most likely meant by `name`, if any is near."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    if name.lower() in folded and folded[name.lower()] != name:
        return folded[name.lower()]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.65)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the nearest known name, or None."""
    match = nearest(name, known)
    return f"did you mean {match}?" if match else None


_RED, _BLUE, _BOLD, _PLAIN = "\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


def render(diagnostic: Diagnostic, color: bool = False) -> str:
    """The text of one diagnostic, without a trailing newline. Colour only when asked for."""

    def paint(text, code):
        return f"{code}{text}{_PLAIN}" if color and text else text

    labels = ([diagnostic.label] if diagnostic.label else []) + list(diagnostic.related)
    lines = [f"{paint(f'{diagnostic.level}[{diagnostic.code}]', _RED)}{paint(f': {diagnostic.title}', _BOLD)}"]
    width = max((len(str(label.span.line)) for label in labels), default=0)
    gutter = paint(" " * width + " │", _BLUE)
    file = None
    for label in labels:
        span, primary = label.span, label is diagnostic.label
        if span.file != file:
            lines.append(f"{paint(' ' * width + ' ┌─', _BLUE)} {span.file}:{span.line}:{span.column}")
            file = span.file
        text = span.source.line(span.line)
        shown = text.replace("\t", " ").rstrip()
        end = span.end_column if span.end_line == span.line else len(shown) + 1
        length = max(1, min(end, len(shown) + 1) - span.column)
        mark = ("^" if primary else "-") * length + (f" {label.text}" if label.text else "")
        lines.append(f"{paint(f'{span.line:>{width}} │', _BLUE)} {shown}".rstrip())
        lines.append(f"{gutter} {' ' * (span.column - 1)}{paint(mark, _RED if primary else _BLUE)}")
    lines += [f"note: {note}" for note in diagnostic.notes]
    lines += [f"{paint('hint', _BOLD)}: {diagnostic.hint}"] if diagnostic.hint else []
    return "\n".join(lines)


def as_dict(diagnostic: Diagnostic) -> dict:
    """A diagnostic for scripts and editors: lines and columns count from 1, ends are exclusive."""

    def place(label: Label) -> dict:
        span = label.span
        return {
            "file": span.file,
            "line": span.line,
            "column": span.column,
            "end_line": span.end_line,
            "end_column": span.end_column,
            "text": label.text,
        }

    return {
        "code": diagnostic.code,
        "level": diagnostic.level,
        "title": diagnostic.title,
        "at": place(diagnostic.label) if diagnostic.label else None,
        "related": [place(label) for label in diagnostic.related],
        "notes": list(diagnostic.notes),
        "hint": diagnostic.hint,
    }
