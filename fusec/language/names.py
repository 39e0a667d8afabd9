"""Names, checked before anything is computed: unknown, declared twice, shadowed, used too early, never used."""

from __future__ import annotations

from ..diagnostics import Diagnostic, Label, did_you_mean
from . import syntax
from .scope import BUILTINS, Module


def check_names(program: syntax.Program, module: Module) -> list[Diagnostic]:
    """Every mistake in the names of a program. `module.library` is what it uses."""
    return _Checker(program, module).run()


def parts(node):
    """The nodes directly below an expression, shape or bracket argument."""
    if isinstance(node, syntax.Number | syntax.String | syntax.Name):
        return ()
    if isinstance(node, syntax.Attribute):
        return (node.value,)
    if isinstance(node, syntax.Subscript):
        return (node.value, *node.arguments)
    if isinstance(node, syntax.Arrow):
        return (node.source, node.target)
    if isinstance(node, syntax.Keyword | syntax.Negate):
        return (node.value,)
    if isinstance(node, syntax.Call):
        return (node.function, *node.arguments)
    if isinstance(node, syntax.Binary):
        return (node.left, node.right)
    if isinstance(node, syntax.Choice):
        return (node.value, node.condition, node.otherwise)
    if isinstance(node, syntax.Default):
        return (node.value, node.otherwise)
    if isinstance(node, syntax.Cast):
        return (node.value, node.like)
    return node.axes  # Shape


def names_in(node):
    """Every Name in an expression."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, syntax.Name):
            yield node
        else:
            stack.extend(reversed(parts(node)))


class _Checker:
    def __init__(self, program, module):
        self.program, self.module, self.found = program, module, []
        self.top: dict[str, object] = {}  # name -> span of its declaration

    def run(self):
        self.library = self.module.library.visible() if self.module.library else set(BUILTINS)
        lets = [let for section in self.program.of(syntax.Config) for let in section.lets]
        for let in lets:
            for name in let.names:
                self.declare(self.top, name.id, name.span)
                if name.id in ("T", "S"):
                    meaning = "the tokens of the step" if name.id == "T" else "the history of the sequence"
                    self.shadow(name.id, name.span, f"is {meaning}")
        for decl in self.program.declarations:
            if isinstance(decl, syntax.Op | syntax.Block):
                self.declare(self.top, decl.name, decl.name_span)
        self.config_order(lets)
        for decl in self.program.declarations:
            if isinstance(decl, syntax.Op | syntax.Block):
                self.declaration(decl)
        return self.found

    def error(self, code, title, span, text="", related=(), hint=None):
        self.found.append(Diagnostic(code, title, Label(span, text), tuple(related), hint))

    def declare(self, table, name, span):
        if name in table:
            self.error("FUS012", f"{name} is declared twice", span, "is the second", [Label(table[name], "is the first")])
        else:
            table[name] = span

    def shadow(self, name, span, text, related=()):
        self.error("FUS013", f"{name} is already a name", span, text, related, hint="choose another name")

    def config_order(self, lets):
        """A config name used above its own line. (Other unknown names there are keys.)"""
        later = {name.id: name.span for let in lets for name in let.names}
        for let in lets:
            for value in let.values:
                for name in names_in(value):
                    if name.id in later and name.id not in {n.id for n in let.names}:
                        self.error("FUS011", f"{name.id} is used before it is declared", name.span, "is not bound yet",
                                   [Label(later[name.id], "is declared here")])
            for name in let.names:
                later.pop(name.id, None)

    def declaration(self, decl):
        inner = {}
        for item in (*decl.statics, *decl.params):
            span = item.span
            self.declare(inner, item.name, span)
            if isinstance(item, syntax.Param) and item.name in self.top and not self.is_op(item.name):
                self.shadow(item.name, span, "hides a name of this file", [Label(self.top[item.name], "is declared here")])
        fields = {}
        for field in decl.fields if isinstance(decl, syntax.Block) else ():
            self.declare(fields, field.name, field.name_span)
            if field.name in inner:
                self.shadow(field.name, field.name_span, "hides a parameter", [Label(inner[field.name], "is declared here")])
            elif field.name in self.top and not self.is_op(field.name):
                self.shadow(field.name, field.name_span, "hides a name of this file",
                            [Label(self.top[field.name], "is declared here")])
        statics, earlier = set(), []
        for static in decl.statics:
            if static.default is not None:
                self.check(static.default, set(statics))
            statics.add(static.name)
        for param in decl.params:
            self.type(param.type, statics)
        self.type(decl.result, statics)
        for field in getattr(decl, "fields", ()):
            self.type(field.type, statics | ({field.index} if field.index else set()))
            if field.count is not None:
                self.check(field.count, statics)
            if field.tied is not None:
                self.tied(field, fields, earlier)
            if field.condition is not None:
                self.check(field.condition, statics)
            earlier.append(field.name)
        self.body(decl, inner, fields)

    def is_op(self, name):
        return any(isinstance(d, syntax.Op | syntax.Block) and d.name == name for d in self.program.declarations)

    def tied(self, field, fields, earlier):
        name = field.tied.id if isinstance(field.tied, syntax.Name) else None
        if name in fields and name not in earlier:
            self.error("FUS011", f"{name} is used before it is declared", field.tied.span, "is not declared yet",
                       [Label(fields[name], "is declared here")], hint="declare it above")
        elif name is not None and name not in fields:
            self.error("FUS010", f"unknown name {name}", field.tied.span, "is no field of this block",
                       hint=did_you_mean(name, fields))

    def body(self, decl, inner, fields):
        known, used, statics = set(inner) | set(fields), set(), {s.name for s in decl.statics}
        lets = decl.body.lets
        later = {}
        for let in reversed(lets):
            later.update((n.id, n.span) for n in let.names)
        for let in lets:
            for value in let.values:
                used |= self.check(value, known, later)
            for name in let.names:
                if name.id in statics:
                    self.shadow(name.id, name.span, "hides a compile-time parameter", [Label(inner[name.id], "is declared here")])
                elif name.id in fields:
                    self.shadow(name.id, name.span, "hides a field", [Label(fields[name.id], "is declared here")])
                elif name.id in self.top:
                    self.shadow(name.id, name.span, "hides a name of this file", [Label(self.top[name.id], "is declared here")])
                elif name.id in BUILTINS:
                    self.shadow(name.id, name.span, "hides a built-in name")
                known.add(name.id)
        used |= self.check(decl.body.result, known, later)
        used |= {f.tied.id for f in getattr(decl, "fields", ()) if isinstance(f.tied, syntax.Name)}
        for field in getattr(decl, "fields", ()):
            if field.name not in used:
                self.error("FUS014", f"{field.name} is declared but never used", field.name_span, "is not used in the body",
                           hint="use it, or remove it: every field is a tensor that a checkpoint must hold")

    def type(self, node, known):
        if node is None:
            return
        if isinstance(node, syntax.Subscript) and isinstance(node.value, syntax.Name) and node.value.id in ("int", "f32", "bool"):
            for argument in node.arguments:
                self.check(argument, known)
        else:
            self.check(node, known)

    def check(self, node, known, later=None) -> set[str]:
        """Reports unknown names in an expression; returns all names it uses."""
        used, paths = set(), _paths(node)
        for name in names_in(node):
            used.add(name.id)
            if name.id in known or name.id in self.top or name.id in self.library:
                continue
            if later and name.id in later:
                self.error("FUS011", f"{name.id} is used before it is declared", name.span, "has no value yet",
                           [Label(later[name.id], "is declared here")])
                continue
            path = paths.get(name)
            if path is not None and path.name in known:
                used.add(path.name)
                self.error("FUS010", f"unknown name {path.span.text}", path.span, "is not how the body calls it",
                           hint=f"a field is called by the last part of its path: {path.name}")
                continue
            near = did_you_mean(name.id, known | set(self.top) | self.library)
            from .library import standard_library  # which parses with what this module checks

            if self.module.library is None and name.id in standard_library().visible():
                near = "it is in the standard library: add the line  use std"
            self.error("FUS010", f"unknown name {name.id}", name.span, "is declared nowhere",
                       hint=near or "a key of config.json is bound in the config section first")
        return used


def _paths(node) -> dict:
    """The first name of each dotted path in an expression -> the whole path."""
    found, stack = {}, [node]
    while stack:
        node = stack.pop()
        if isinstance(node, syntax.Attribute):
            base = node.value
            while isinstance(base, syntax.Attribute):
                base = base.value
            found.setdefault(base, node)
        stack.extend(parts(node))
    return found
