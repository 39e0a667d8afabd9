"""The syntax tree: what a `.fuse` file says, before any meaning. Each node knows its span."""

from __future__ import annotations

from dataclasses import dataclass

from ..diagnostics import Source, Span

# ---- expressions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Number:
    span: Span
    value: int | float


@dataclass(frozen=True, slots=True, eq=False)
class String:
    span: Span
    value: str


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    span: Span
    id: str


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """`value.name`: a nested config key, or the path of a field."""

    span: Span
    value: Expr
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Subscript:
    """`value[…]`: compile-time arguments, or an index into a tensor, list or stack."""

    span: Span
    value: Expr
    arguments: tuple[Expr | Arrow | Keyword, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Arrow:
    """`source -> target` inside brackets."""

    span: Span
    source: Expr
    target: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Keyword:
    """`name=value` inside brackets."""

    span: Span
    name: str
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    span: Span
    function: Expr
    arguments: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Negate:
    span: Span
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Binary:
    """`left operator right`, operator one of + - * / % @ ^ == != < <= > >= and or."""

    span: Span
    operator: str
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """`value if condition else otherwise`, decided at compile time."""

    span: Span
    value: Expr
    condition: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Default:
    """`value ?? otherwise`: otherwise, where value is missing or null."""

    span: Span
    value: Expr
    otherwise: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """`value as like`: value in the dtype of like."""

    span: Span
    value: Expr
    like: Expr


Expr = Number | String | Name | Attribute | Subscript | Call | Negate | Binary | Choice | Default | Cast

# ---- declarations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """`[T, D]`, or `[.., I]`: at least these dims."""

    span: Span
    rest: bool
    axes: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Static:
    """A compile-time parameter. `arrow`: the next one is written after `->`, as O is in `[I -> O]`."""

    span: Span
    name: str
    default: Expr | None = None
    arrow: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Param:
    span: Span
    name: str
    type: Shape | Expr | None


@dataclass(frozen=True, slots=True, eq=False)
class Let:
    """`a, b = e` or `a, b = e, f`."""

    span: Span
    names: tuple[Name, ...]
    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    span: Span
    lets: tuple[Let, ...]
    result: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """`path : type`, `path[count] : type`, `path[index < count] : type`; `= tied if condition` shares another field's weights."""

    span: Span
    name_span: Span
    path: tuple[str, ...]
    index: str | None
    count: Expr | None
    type: Shape | Expr
    tied: Expr | None = None
    condition: Expr | None = None

    @property
    def name(self) -> str:
        """What the body calls it: the last part of the path."""
        return self.path[-1]


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    span: Span
    name_span: Span
    name: str
    statics: tuple[Static, ...]
    params: tuple[Param, ...]
    result: Shape | Expr | None
    via: str | None
    body: Body


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A `block`, or the `model`: an op with fields."""

    span: Span
    name_span: Span
    name: str
    statics: tuple[Static, ...]
    params: tuple[Param, ...]
    result: Shape | Expr | None
    fields: tuple[Field, ...]
    body: Body
    is_model: bool


@dataclass(frozen=True, slots=True, eq=False)
class Config:
    span: Span
    lets: tuple[Let, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    span: Span
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Serves:
    """`serves A, B`: the `architectures` entries of the checkpoints that this program is for."""

    span: Span
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    source: Source
    declarations: tuple[Use | Serves | Config | Op | Block, ...]

    def of(self, kind):
        """The declarations of one kind, in order."""
        return [d for d in self.declarations if isinstance(d, kind)]
