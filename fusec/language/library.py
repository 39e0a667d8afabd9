"""Loading programs: a user's own, and the standard library that they use."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from ..diagnostics import Diagnostic, DiagnosticError, Label
from ..ir.graph import Graph
from . import syntax
from .parser import parse
from .scope import BlockRef, Module, OpRef
from .sources import read_text


def load(source: str | Path, config: dict | None = None, *, file: str | None = None) -> Graph:
    """The graph of a `.fuse` program.

    source: a path, or the text of a program (anything with a line break).  config: the keys of config.json; None takes the
    program's own defaults.  file: what to call the program in messages.  Raises DiagnosticError for mistakes in the program or in
    how it fits the config, UserError for a file that cannot be read.
    """
    from .elaborate import elaborate

    program = read(source, file)
    return elaborate(program, library_of(program), config)


def read(source: str | Path, file: str | None = None) -> syntax.Program:
    """The syntax tree of a path or text, as `load` takes it."""
    text, name = read_text(source)
    return parse(text, file or name)


def library_of(program: syntax.Program) -> Module | None:
    """What the program's `use` lines bring in."""
    uses = program.of(syntax.Use)
    for use in uses:
        if use.name != "std":
            raise DiagnosticError([Diagnostic("FUS004", f"no library {use.name}", Label(use.span, "is not known"),
                                              hint="the library is std")])
    return standard_library() if uses else None


@functools.cache
def standard_library() -> Module:
    """`grammar/std.fuse`."""
    text = resources.files("fusec.grammar").joinpath("std.fuse").read_text(encoding="utf-8")
    program = parse(text, "std.fuse")
    module = Module(program, {}, is_std=True)
    for decl in program.declarations:
        module.names[decl.name] = OpRef(decl, module) if isinstance(decl, syntax.Op) else BlockRef(decl, module)
    return module


def config_keys(program: syntax.Program) -> list[str]:
    """The keys of config.json that a program reads, in order, nested ones dotted."""
    from .config import key_path
    from .names import parts

    keys, bound, module = {}, set(), library_of(program)
    known = set(module.visible()) if module else set()
    known |= {d.name for d in program.declarations if isinstance(d, syntax.Op | syntax.Block)}

    def visit(node):
        path = key_path(node)
        if path is not None and path[0] not in bound | known:
            keys[".".join(path)] = None
        elif path is None:
            for part in parts(node):
                visit(part)

    for section in program.of(syntax.Config):
        for let in section.lets:
            for value in let.values:
                visit(value)
            bound |= {name.id for name in let.names}
    return list(keys)
