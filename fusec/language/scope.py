"""What a name can stand for while a program is elaborated, and where it is looked up.

Compile-time values are Python numbers, strings, booleans, lists and None, axes (`dims.Axis`) and the references below. Run-time
values are `ir.graph.Value`, or `Many` of them: the tensors that a sum of dims holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..diagnostics import Diagnostic, Label, Span
from ..ir.graph import S, T, Value
from . import syntax


class Problem(Exception):
    """An error found while elaborating; it is recorded at the statement around it, whose names then hold POISON."""

    def __init__(self, code, title, span: Span, text="", *, related=(), hint=None, notes=()):
        self.diagnostic = Diagnostic(code, title, Label(span, text), tuple(related), hint, tuple(notes))
        super().__init__(title)

    def move_out_of_library(self, call: Span):
        """Tells an error found in a library at the user's line that led there; what was found becomes the related place."""
        found = self.diagnostic
        if found.label.span.source is not call.source:
            self.diagnostic = replace(found, label=Label(call, found.label.text),
                                      related=(Label(found.label.span, "here"),
                                               *(r for r in found.related if r.span.source is call.source)))


class Silent(Exception):
    """Something POISON was needed; what made it so was reported already."""


class Poison:
    """The value of something that was reported already. Whatever touches it is poison too, silently."""

    def __repr__(self):
        return "POISON"


POISON = Poison()
ABSENT = object()
UNSUPPORTED = object()


@dataclass(frozen=True, slots=True)
class Many:
    """Several tensors under one name. Elementwise ops and contractions apply to each."""

    values: tuple


@dataclass(frozen=True, slots=True)
class Missing:
    """A key that config.json lacks, or holds as null."""

    key: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table inside config.json, such as rope_scaling."""

    key: str
    entries: dict


@dataclass(slots=True)
class Module:
    """One file: what its top level declares. `library` is where its names are looked up next."""

    program: syntax.Program
    names: dict[str, object]
    library: Module | None = None
    is_std: bool = False
    pending: set[str] = field(default_factory=set)  # config names that are not bound yet

    def find(self, name):
        """The meaning of a top-level name, or ABSENT."""
        module = self
        while module is not None:
            if name in module.names:
                return module.names[name]
            module = module.library
        return BUILTINS.get(name, ABSENT)

    def visible(self) -> set[str]:
        return set(self.names) | (self.library.visible() if self.library else set(BUILTINS))


@dataclass(frozen=True, slots=True)
class OpRef:
    """An `op` with some of its compile-time parameters bound."""

    decl: syntax.Op
    module: Module
    statics: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A `block` as a type, with some of its compile-time parameters bound."""

    decl: syntax.Block
    module: Module
    statics: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Primitive:
    """An op of the compiler. `build(elaborator, statics, arguments, node, scope)` applies it."""

    name: str
    build: Callable
    arity: int | None
    statics: str = ""          # what stands in its brackets: "", "axis", "arrow"
    arguments: tuple = ()


@dataclass(slots=True, eq=False)
class Instance:
    """A block at a place in the model: its weights have keys that start with `path`.

    stack: the dim over which its weights are stacked (`experts[E]` indexed by a tensor), else None.
    field: where it was declared.
    """

    ref: BlockRef
    statics: dict[str, object]
    path: str
    field: syntax.Field | None
    module: Module
    stack: object = None
    members: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Stack:
    """`layers[L] : Layer`: called, the composition of its members; indexed, one of them."""

    owner: Instance
    field: syntax.Field
    count: object
    path: str
    members: dict[int, Instance] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """`experts[e]`: each entry of the tensor `index` picks a member's weights."""

    instance: Instance
    index: Value


@dataclass(slots=True)
class Scope:
    """Where an expression stands. `call`: the user's line that led into the standard library, if it stands there."""

    module: Module
    names: dict[str, object]
    path: str = ""
    instance: Instance | None = None
    routed: Value | None = None
    call: Span | None = None
    config: bool = False


BUILTINS: dict[str, object] = {"T": T, "S": S, "true": True, "false": False, "none": None, "unsupported": UNSUPPORTED,
                               "inf": float("inf"), "pi": 3.141592653589793}


def describe(value) -> str:
    """A value in words, for a message."""
    if isinstance(value, Value):
        return f"a tensor with {show_dims(value.dims)}"
    if isinstance(value, Many):
        return f"{len(value.values)} tensors"
    if isinstance(value, OpRef | Primitive):
        return "an op"
    if isinstance(value, BlockRef | Instance | Routed):
        return "a block"
    if isinstance(value, Stack):
        return "a stack of blocks"
    if isinstance(value, bool | int | float | str | list) or value is None:
        return {True: "true", False: "false", None: "none"}.get(value, repr(value)) if not isinstance(value, list) else "a list"
    return "a table of the config" if isinstance(value, Table) else "a dim"


def show_dims(dims) -> str:
    return ", ".join(d.name for d in dims) or "no dims"
