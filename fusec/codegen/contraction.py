"""A contraction kernel, taken apart for the templates: packed weight, prologue, side reductions, epilogue.

A kernel body holds one contraction `x[rows, K…] @ w[K…, N…]` and an epilogue over components of its result. The epilogue
reads the result through *leaves*, affine views of the flat N axis (gate and up; the halves of q that rope turns). Leaves read
together form a *segment* with its own index space; its outputs are stored at affine addresses. All segments of a kernel are
one launch:

    the weight is packed, when the model is loaded, as [LEAVES, ROWS, K]: row n of each leaf side by side, segment after segment.

So a tile of rows yields LEAVES accumulators, whatever the segments are; a segment with fewer leaves is cut into as many pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.graph import Graph, Value
from ..ir.ops import OPS
from ..passes.analysis import RUNTIME, axis, cone
from .attention import Unmatched
from .expressions import row_major


@dataclass(frozen=True)
class Piece:
    """One expression of an epilogue and where it goes: element offset + Σ stride·index of output number `output`'s row."""

    value: Value
    output: int
    strides: dict[str, int]
    offset: int


@dataclass
class Segment:
    """Pieces over one index space. leaves: values that read the contraction's result.  start/rows: its rows in the packed weight.
    chunks: into how many equal parts each leaf's index space is cut to fill the kernel's LEAVES."""

    dims: tuple
    leaves: list[Value]
    pieces: list[Piece]
    start: int = 0
    rows: int = 0
    chunks: int = 1

    @property
    def numel(self) -> int:
        return math.prod(d.size for d in self.dims)


class Contraction:
    """The parts of a contraction kernel's body.

    anchor: the contraction.  x: its moving operand, an expression over the body's inputs.  weight: the index of the body
    input that holds the matrix.  k_dims: the contracted dims in x's order.  rows: the run-time dim.  leaves, n: LEAVES and
    ROWS of the packed weight.  before: reductions that x, or another reduction, needs.  beside: those that only the epilogue
    needs.  Raises Unmatched for a contraction that is no product of tokens and a matrix.
    """

    def __init__(self, body: Graph):
        self.body = body
        anchor = next((v for v in body.walk() if v.op == "contract" and v.inputs[1].op == "input"), None)
        if anchor is None or any(n in RUNTIME for n in anchor.inputs[1].names):
            raise Unmatched("a contraction of two values that both change with every token")
        others = [n for n in axis(anchor.inputs[0]) if n not in anchor.attrs["over"]]
        if others:
            raise Unmatched(f"a contraction for each {', '.join(others)} of every token")
        self.anchor = anchor
        self.x, matrix = anchor.inputs
        self.weight = body.inputs.index(matrix)
        self.matrix = matrix
        over = anchor.attrs["over"]
        self.k_dims = [d for d in self.x.dims if d.name in over]
        self.k = math.prod(d.size for d in self.k_dims)
        self.row_dim = next(n for n in anchor.names if n in RUNTIME)
        self.after = after = self.dependents()
        self.segments = self.form_segments(after)
        self.leaves = max(len(s.leaves) for s in self.segments)
        start = 0
        for segment in self.segments:
            segment.chunks = self.leaves // len(segment.leaves)
            segment.rows, segment.start = -(-segment.numel // segment.chunks), start
            start += segment.rows
        self.n = start
        prologue = set(cone(self.x, lambda v: v.op == "input"))
        reductions = [v for v in body.walk() if OPS[v.op].kind == "reduction" and v not in after]
        prologue |= {i for v in reductions for i in cone(v.inputs[0], lambda v: v.op == "input")}
        self.before = [v for v in reductions if v in prologue]
        self.beside = [v for v in reductions if v not in prologue]

    def dependents(self) -> set[Value]:
        """Values computed from the contraction's result, and itself."""
        found = {self.anchor}
        for value in self.body.walk():
            if any(i in found for i in value.inputs):
                found.add(value)
        return found

    def form_segments(self, after) -> list[Segment]:
        segments: list[Segment] = []
        for number, output in enumerate(self.body.outputs):
            for value, _, strides, offset in pieces(output):
                leaves = [
                    v
                    for v in cone(value, lambda v: v not in after)
                    if v in after
                    and v.op in ("contract", "split")
                    and not any(
                        u.op == "split" and u in cone(value, lambda w: w not in after) for u in self.body.users().get(v, ())
                    )
                ]
                piece = Piece(value, number, strides, offset)
                shared = [s for s in segments if any(leaf in s.leaves for leaf in leaves)]
                if shared:
                    first = shared[0]
                    first.leaves += [leaf for leaf in leaves if leaf not in first.leaves]
                    first.pieces.append(piece)
                    for other in shared[1:]:
                        first.leaves += [leaf for leaf in other.leaves if leaf not in first.leaves]
                        first.pieces += other.pieces
                        segments.remove(other)
                else:
                    dims = tuple(d for d in leaves[0].dims if d.name not in RUNTIME)
                    segments.append(Segment(dims, leaves, [piece]))
        return segments

    def leaf_rows(self, leaf: Value, dims) -> tuple[int, list[int]]:
        """(offset, stride of each of `dims`) of a leaf in the contraction's flat N axis."""
        strides = dict(zip(axis(self.anchor), row_major([d for d in self.anchor.dims if d.name not in RUNTIME]), strict=True))
        offset, splits = 0, []
        while leaf.op == "split":
            splits.append(leaf.attrs)
            leaf = leaf.inputs[0]
        for a in reversed(splits):
            step = strides.pop(a["dim"])
            offset += a["offset"] * step
            strides |= {name: s * step for name, s in zip(a["into"], a["strides"], strict=True)}
        return offset, [strides[d.name] for d in dims]

    def plain_sum(self) -> str | None:
        """The name of the stored value that the epilogue adds to the product, if that is all it does, rows in order."""
        (segment, *rest), outputs = self.segments, self.body.outputs
        if rest or len(outputs) > 1 or len(segment.pieces) > 1 or outputs[0].op != "add" or outputs[0].dtype != self.x.dtype:
            return None
        others = [i for i in outputs[0].inputs if i is not self.anchor]
        if len(others) != 1 or others[0].op != "input" or others[0].dims != outputs[0].dims or others[0].dtype != self.x.dtype:
            return None
        return others[0].attrs["name"] if outputs[0].dims == self.anchor.dims else None

    @property
    def in_order(self) -> Value | None:
        """The one output, if there is no other and its elements are stored in the order of the weight's rows."""
        (segment, *rest), (output, *more) = self.segments, self.body.outputs
        (piece, *others) = segment.pieces
        in_order = dict(zip([d.name for d in segment.dims], row_major(segment.dims), strict=True))
        alone = not rest and not more and not others and segment.chunks == 1 and piece.value is output
        return output if alone and piece.strides == in_order and not piece.offset else None

    @property
    def makes_logits(self) -> bool:
        """Whether all that is made is one float32 of each row and token, in their order and by a kernel of our own: logits."""
        return self.in_order is not None and self.in_order.dtype == "f32" and self.plain_sum() is None

    @property
    def stored(self) -> tuple[Value, Value | None] | None:
        """(input, rows): the input that x is; or that whose rows x is, and the input that says which. None: x is computed."""
        if self.x.op == "input":
            return self.x, None
        if self.x.op == "gather" and all(i.op == "input" for i in self.x.inputs) and self.x.attrs["dim"] in RUNTIME:
            table, rows = self.x.inputs
            return (table, rows) if table.names == (self.x.attrs["dim"], *axis(self.x)) else None
        return None

    @property
    def streams(self) -> bool:
        """Whether x, or the rows picked for it, go from memory to the tensor cores as they are, and else only into reductions
        that read x alone."""
        read = {v for o in self.body.outputs for v in cone(o, lambda v: v is self.anchor or v in self.beside)}
        if not self.stored or self.x.dtype != "x" or self.before or self.x in read:
            return False
        made = [v for r in self.beside for v in cone(r.inputs[0], lambda v: v is self.x)]
        return all(OPS[v.op].kind == "elementwise" or v.op == "const" for v in made)

    def packing(self) -> list[list[tuple]]:
        """Per leaf slot, per segment: (offset, strides, sizes, first, count): which rows of the flat N axis stand in the
        packed weight.

        Row `first + i` of the leaf's index space (row-major over `sizes`) stands at packed row `segment.start + i`.
        """
        table = []
        for slot in range(self.leaves):
            column = []
            for s in self.segments:
                leaf = s.leaves[min(slot // s.chunks, len(s.leaves) - 1)]
                offset, strides = self.leaf_rows(leaf, s.dims)
                column.append((offset, tuple(strides), tuple(d.size for d in s.dims), slot % s.chunks * s.rows, s.rows))
            table.append(column)
        return table


def pieces(output: Value) -> list[tuple[Value, tuple, dict[str, int], int]]:
    """An output as stored expressions, each with the dims it is stored over, their strides and an offset: joins and cache
    writes become addresses. A joined part is repeated along the dims that it lacks."""
    value = output.inputs[0] if output.op == "cache" else output
    dims = tuple(d for d in value.dims if d.name not in RUNTIME)

    def visit(v: Value, dims: tuple, strides: dict[str, int], offset: int):
        if v.op != "join":
            return [(v, dims, strides, offset)]
        found = []
        at = [d.name for d in dims].index(v.attrs["dim"])
        outer = {n: s for n, s in strides.items() if n != v.attrs["dim"]}
        step = strides[v.attrs["dim"]]
        for operand, (names, part, start) in zip(v.inputs, v.attrs["parts"], strict=True):
            inner = (*dims[:at], *(operand.dim(n) for n in names), *dims[at + 1 :])
            found += visit(operand, inner, outer | {n: s * step for n, s in zip(names, part, strict=True)}, offset + start * step)
        return found

    return visit(value, dims, dict(zip([d.name for d in dims], row_major(dims), strict=True)), 0)
