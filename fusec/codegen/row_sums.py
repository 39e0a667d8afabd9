"""Row reductions that the kernel which stores a value makes for the one that reads it.

A norm's scale is a reduction over a whole row of x. Every program of the kernel that multiplies x could make it from the tiles
that it copies anyway; but there are a hundred such programs, and all make the same. The kernel that stores x has each element
once, in registers. So it leaves, beside x, the reduction of each of its tiles, and the next kernel combines these parts.

Only streams do so (see contraction_kernel.FORMS): which form a kernel takes is decided as it is launched, and then the launch
says how many parts there are (runtime/row_sums.py). None: the kernel that wants them makes them itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph, Value
from .attention import Unmatched
from .contraction import Contraction


@dataclass(frozen=True)
class Handover:
    """What a kernel leaves for its readers.  reader: one of them, which wants row reductions (`beside`) of x alone.  what:
    these, so that two readers' can be compared."""

    reader: Contraction
    what: tuple


@dataclass
class Handovers:
    """makes: kernel -> what it leaves beside its result.  takes: the kernels that ask for such -> the one that leaves theirs, if
    any does: like kernels are written alike, whoever stores their x."""

    makes: dict[Value, Handover]
    takes: dict[Value, Value | None]

    def of(self, kernel: Value) -> tuple:
        """What the source of a kernel depends on, of all this."""
        made = self.makes.get(kernel)
        return made and made.what, kernel in self.takes


def handovers(graph: Graph) -> Handovers:
    """Of a graph of kernels."""
    parts, wanted, makes, takes = {}, {}, {}, {}
    for kernel in graph.walk():
        if kernel.op == "kernel" and kernel.attrs["kind"] == "contract":
            try:
                parts[kernel] = Contraction(kernel.attrs["body"])
            except Unmatched:  # it will be refused when it is written
                continue
    for reader, wants in parts.items():
        if not wants.beside or not wants.streams:
            continue
        what = wanted[reader] = reductions(wants)
        x = reader.inputs[wants.body.inputs.index(wants.stored[0])]
        maker = x.inputs[0] if x.op == "get" else None
        if maker in parts and hands_on(parts[maker], wants) and makes.setdefault(maker, Handover(wants, what)).what == what:
            takes[reader] = maker
    made = {handover.what for handover in makes.values()}
    return Handovers(makes, {reader: takes.get(reader) for reader, what in wanted.items() if what in made})


def hands_on(made: Contraction, wants: Contraction) -> bool:
    """Whether tiles of what a kernel makes are parts of the rows that another reduces: one result, elements in their order."""
    output = made.in_order if made.streams else None
    return output is not None and output.dtype == "x" and made.n == wants.k and wants.stored[0].names[0] == made.row_dim


def reductions(parts: Contraction) -> tuple:
    """What is reduced, and how."""
    number, rows = {parts.x: 0}, []

    def visit(value: Value) -> int:
        if value not in number:
            operands = tuple(map(visit, value.inputs))
            number[value] = len(number)
            rows.append((value.op, operands, repr(value.attrs), value.dtype))
        return number[value]

    return tuple(map(visit, parts.beside)), tuple(rows)
