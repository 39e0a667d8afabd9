"""Axis arithmetic: `*` nests, `+` concatenates, `K/2` divides.

An axis of a stored tensor is a tree over named dims. Flattened, each of its components is an affine view: element (i, j, …) of
the component is element offset + i·stride_i + j·stride_j + … of the axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.graph import Dim


@dataclass(frozen=True)
class Nest:
    """`A*B`: the last part runs fastest. `Nest(())` is the axis of one element, written 1."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class Concat:
    """`A + B`: one part after the other."""

    parts: tuple[Axis, ...]


Axis = Dim | Nest | Concat
UNIT = Nest(())


@dataclass(frozen=True)
class Component:
    """One tensor that an axis holds: its dims, and where it lies in the flat axis."""

    dims: tuple[Dim, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0


def nest(a: Axis, b: Axis) -> Axis:
    parts = (a.parts if isinstance(a, Nest) else (a,)) + (b.parts if isinstance(b, Nest) else (b,))
    return parts[0] if len(parts) == 1 else Nest(parts)


def concat(a: Axis, b: Axis) -> Axis:
    return Concat((a.parts if isinstance(a, Concat) else (a,)) + (b.parts if isinstance(b, Concat) else (b,)))


def size(axis: Axis) -> int | None:
    """How many elements the flat axis has; None if that is known only at run time."""
    if isinstance(axis, Dim):
        return axis.size
    sizes = [size(part) for part in axis.parts]
    return None if None in sizes else math.prod(sizes) if isinstance(axis, Nest) else sum(sizes)


def components(axis: Axis) -> tuple[Component, ...]:
    """The tensors an axis holds, in the order they are written."""
    if isinstance(axis, Dim):
        return (Component((axis,), (1,)),)
    if isinstance(axis, Concat):
        found, offset = [], 0
        for part in axis.parts:
            found += [Component(c.dims, c.strides, c.offset + offset) for c in components(part)]
            offset += size(part)
        return tuple(found)
    outer = (Component(),)
    for part in axis.parts:
        outer = _product(outer, components(part), size(part))
    return outer


def _product(outer, inner, inner_size):
    return tuple(Component(a.dims + b.dims, tuple(s * inner_size for s in a.strides) + b.strides,
                           a.offset * inner_size + b.offset)
                 for a in outer for b in inner)


def storage(axes: tuple[Axis, ...]) -> tuple[tuple[int, ...], tuple[Component, ...]]:
    """A stored tensor with these axes -> (its shape, row-major; the components it holds: none if a size is unknown)."""
    shape, found = tuple(size(axis) for axis in axes), (Component(),)
    if None in shape:
        return shape, ()
    for axis, length in zip(axes, shape, strict=True):
        found = _product(found, components(axis), length)
    return shape, found


def dims_of(axis: Axis) -> tuple[Dim, ...]:
    """Every dim in the tree, each once."""
    return tuple(dict.fromkeys(d for c in components(axis) for d in c.dims)) if not isinstance(axis, Dim) else (axis,)


def show(axis: Axis, inner: bool = False) -> str:
    """The axis as it is written."""
    if isinstance(axis, Dim):
        return axis.name
    if isinstance(axis, Nest):
        return "*".join(show(part, True) for part in axis.parts) or "1"
    text = " + ".join(show(part) for part in axis.parts)
    return f"({text})" if inner else text
