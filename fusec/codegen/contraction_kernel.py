"""Contraction kernels as Triton source, in the forms of FORMS, a template each."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Value
from ..passes.analysis import axis
from . import schedule
from .contraction import Contraction
from .expressions import Emitter, Index, coordinates, strip, term
from .row_sums import Handover
from .stream_epilogue import by_line, in_gluon, mark, stream_epilogue, words
from .writer import REDUCE, Source, Writer, define, environment, partition, share, tidy


@dataclass(frozen=True)
class Form:
    """How a contraction's tile lies.

    reduce: the axis along which a tile of x is reduced, and how the result is spread again.  tiles: launch constants.  many:
    whether a program works on several tokens.  multiplies: whether it contracts (or the vendor's matmul does).  scratch: pointers
    it takes.  gluon: whether it is written in Gluon, with tiles of the weight and of x described to the bulk copy engine.
    bounds: the first and the last row of a tile.  tokens: those of a tile, on one line; None where none are drawn:
    one row's logits are cheaper to store.  axis: along which a tile of results has the rows of the weight.
    """

    reduce: str
    tiles: tuple[str, ...]
    many: bool = True
    multiplies: bool = True
    scratch: tuple[str, ...] = ()
    gluon: bool = False
    bounds: tuple[str, str] = ("tl.min(n)", "tl.max(n)")
    tokens: str | None = "tl.reshape(t, [BLOCK_M])"
    axis: int = 1


FORMS = {
    "gemv": Form("0)", ("BLOCK_N", "BLOCK_K", "STAGES", "PDL"), many=False, tokens=None),
    "skinny": Form("0)[None, :]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "STAGES", "PDL"),
                   scratch=("partial", "arrivals"), axis=0),
    "stream": Form("1)", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "STAGES", "PDL"), scratch=("partial", "arrivals"),
                   gluon=True, bounds=("n_0", "n_0 + BLOCK_N - 1"), tokens="t_line", axis=0),
    "wide": Form("1)", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "STAGES", "PDL"), gluon=True, bounds=("n_0", "n_0 + BLOCK_N - 1"),
                 tokens="t_line", axis=0),
    "matmul": Form("1)[:, None]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "STAGES", "PDL")),
    "stats": Form("1)[:, None]", ("BLOCK_M", "BLOCK_K", "PDL"), multiplies=False, scratch=("stats",), tokens=None),
    "epilogue": Form("1)[:, None]", ("BLOCK_M", "BLOCK_N", "PDL"), multiplies=False, scratch=("product", "stats")),
}


DRAWING = ("best", "temperature", "seed_low", "seed_high", "lengths")  # pointers of a runtime.drawing.Drawing


def contraction(kernel: Value, name: str, form: str, comment, dtype: str, block_n: int, block_k: int,
                parts: Contraction | None = None, draws: bool = False, makes: Handover | None = None,
                takes: bool = False, pieces: int = 1) -> Source:  # fmt: skip
    """A contraction kernel in one of its forms: one token ("gemv"), a few ("skinny", or "stream" and "wide" where there are
    Hopper's units), many ("matmul"), or what the vendor's matmul leaves to do ("stats", "epilogue").

    Masks are left out where blocks divide the sizes: block_n and block_k are the least divisible of the tiles that it will be
    launched with.  draws: what it makes are the program's logits, and instead of storing them it may keep each row's best
    token, in the forms for several.  makes: row reductions of its result that it leaves for another kernel, takes: whether it
    may find its own; both in streams alone, and what is wide leaves none.  pieces: of a tile of what is wide.
    """
    parts = parts or Contraction(kernel.attrs["body"])
    return ContractionWriter(form, dtype, block_n, block_k, parts, draws, makes, takes, pieces).source(name, comment)


def blocks_of(source: Source, tile: schedule.Tile) -> dict[str, list[tuple[int, int]]]:
    """What a kernel takes in tiles: pointer -> the blocks that it is described in to the bulk copy engine, one argument each."""
    if not source.facts["described"]:
        return {}
    weight, x = source.facts["described"]
    return {weight: [(rows, tile.block_k) for rows in tile.pieces], x: [(tile.block_m, tile.block_k)]}


class ContractionWriter(Writer):
    """Writes one form of one contraction kernel."""

    def __init__(self, form, dtype, block_n, block_k, parts: Contraction, draws: bool, makes: Handover | None, takes: bool,
                 pieces: int):  # fmt: skip
        super().__init__(parts.body, dtype)
        self.form, self.shape, self.parts = form, FORMS[form], parts
        self.block_n, self.block_k, self.draws = block_n, block_k, draws and FORMS[form].tokens is not None
        self.masked_k, self.masked_n = bool(parts.k % block_k), bool(parts.n % block_n)
        self.pieces = pieces
        self.makes = makes if form == "stream" and not self.masked_n else None
        self.takes = takes and self.shape.gluon
        self.many = self.shape.many
        self.row = Index("t", ("t_mask",)) if self.many else Index("0")
        self.given: dict[Value, str] = {}  # finished reductions, by name

    def source(self, name: str, comment) -> Source:
        parts, form, pieces = self.parts, self.form, self.pieces
        weight = None
        if self.shape.multiplies:
            weight = self.params.pointer(parts.matrix.attrs["name"], ("weight", parts.weight))
        before = self.reductions_before() if self.shape.multiplies else []
        lines: list[str] = []
        coords = self.k_coords(lines)
        x = operand = None
        if self.shape.multiplies:
            x, operand = self.operand(coords, lines)
        beside = self.reductions_beside(coords, lines)
        found = None
        if self.takes:
            found = self.params.pointer(f"{parts.stored[0].attrs['name']}_sums", ("sums", *self.x_role))
        early, epilogue = ([], self.epilogue()) if form != "stats" else ([], [])
        if form == "gemv":  # what the epilogue reads is on its way while the weights stream past
            late = {f"y{i}" for i in range(parts.leaves)} | set(self.given.values())
            early, epilogue = partition(share(epilogue), late)
        for pointer in self.shape.scratch:
            if pointer != "stats" or beside:
                self.params.pointer(pointer, ("scratch", pointer))
        described = [weight, *(p for p, role in self.params.roles.items() if role == self.x_role)] if self.shape.gluon else []
        names = {p: p.replace("_ptr", "_tiles") if p in described else p for p in self.params.roles}
        ys = [f"y{i}" for i in range(parts.leaves)]
        stream = None
        if self.shape.gluon:
            weight, x = (names[p] for p in described)
            halves = all(o.dtype == "x" for o in self.body.outputs)
            # A segment that a tile has no rows of would be loaded for nothing; and pieces have no room to wait in.
            ahead = form == "stream" and len(parts.segments) == 1
            stream = stream_epilogue(epilogue, late={*ys, *self.given.values()}, early=ahead, halves=halves,
                                     bound=parts.n if self.masked_n else None)  # fmt: skip
            early, epilogue = stream.early, stream.lines
        several = form == "gemv" and parts.leaves + len(beside) > 1  # things that the threads put together
        own = ["AT_ONCE"] if several else []
        if self.shape.gluon and beside:
            own = ["REDUCERS", "REDUCING", *(["HANDED"] if found else [])]
        tiles = (*self.shape.tiles[:-1], *own, *(["DRAW"] if self.draws else []), "PDL")
        in_pieces = [f"{weight}_{i}" for i in range(pieces)] if form == "wide" else [weight]
        taken = [p for given in names.values() for p in (in_pieces if given == weight else [given])]
        context = {
            "name": name,
            "pieces": pieces,
            "draws": self.draws,
            "late_takes": [p for p in names.values() if p in words(epilogue)],
            "signature": define(name, [*taken, *(["T"] if self.many else []), *(["parts"] if found else [])], tiles),
            "comment": comment,
            "rows": parts.n,
            "k": parts.k,
            "masked_n": self.masked_n,
            "masked_k": self.masked_k,
            "weight": weight,
            "leaves": parts.leaves,
            "before": before,
            "lines": tidy(lines, *filter(None, (x, operand)), *(r["value"] for r in beside)),
            "x": x,
            "operand": operand,
            "beside": beside,
            "several": several,
            "thin": schedule.padded(max(1, len(beside) ** 2)),
            "found": found,
            "early": early,
            "epilogue": epilogue,
            "ys": ", ".join(ys),
            "turn": stream and stream.turn,
            "early_takes": stream and stream.takes([*names.values(), "n_0", "t_0", "T"]),
            "stacks": stream and stream.turn == "products" and parts.leaves == 2,
            "results": stream and (", ".join([*ys, *stream.loaded]) if ys[1:] or stream.loaded else "(y0,)"),
            "copy_registers": schedule.COPY_REGISTERS,
            "precision": ', input_precision="ieee"' if self.dtype == "float32" else "",
        }
        text = environment().get_template(f"{form}.py.jinja").render(k=context)
        facts = {
            "rows": parts.n,
            "k": parts.k,
            "leaves": parts.leaves,
            "row_dim": parts.row_dim,
            "packing": parts.packing(),
            "k_dims": [d.name for d in parts.k_dims],
            "n_dims": list(axis(parts.anchor)),
            "weight": parts.weight,
            "block_n": self.block_n,
            "block_k": self.block_k,
            "described": described,
            "reductions": len(beside),
            "draws": self.draws,
            "finds": found and found.removesuffix("_ptr"),
            "leaves_sums": self.left and self.left.removesuffix("_ptr"),
            "sums": len(self.makes.reader.beside) if self.makes else 0,
            "picked": parts.stored[1].attrs["name"] if described and parts.stored[1] else None,
        }
        return Source(name, form, text, self.params.roles, facts)

    def k_coords(self, lines) -> dict[str, Index]:
        """Indices of a tile of x: the token's, and the contracted dims from the flat k."""
        masks = ("k_mask",) if self.masked_k else ()
        return {self.parts.row_dim: self.row} | coordinates(self.parts.k_dims, "k", masks, lines, self.names)

    # ---- x, and reductions over it ------------------------------------------------------------------------------------------

    def operand(self, coords, lines) -> tuple[str, str]:
        """(x, x as the matrix instruction takes it): the moving operand at a tile of K; its lines are appended."""
        parts = self.parts
        if self.shape.gluon:
            self.params.pointer(parts.stored[0].attrs["name"], self.x_role)
            self.known = {parts.x: "x_seen"}
            return "x_seen", "x_seen"
        emitter = self.emitter(coords, self.given, lines, ', eviction_policy="evict_last"' if self.many and parts.beside else "")
        if self.many and parts.x.op == "input":  # loaded as it is, so that it can go from memory to the tensor cores untouched
            pointer = self.params.pointer(parts.x.attrs["name"], ("input", self.body.inputs.index(parts.x)))
            offset, masks = emitter.address(parts.x)
            lines.append(f"a = tl.load({pointer} + {offset}, mask={' & '.join(masks)}, other=0{emitter.policy})")
            return "a", "a"
        x = emitter.write(parts.x)
        x = x if x.isidentifier() else emitter.assign(self.names.fresh("x"), x)
        if not self.many:
            self.known = emitter.known  # a reduction beside it reads the same x
        cast = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}[self.dtype]
        return x, f"tl.where(k_mask, {x}, 0.0).to({cast})" if self.many and self.masked_k else f"{x}.to({cast})"

    known: dict | None = None
    left: str | None = None  # where it leaves row reductions

    @property
    def x_role(self) -> tuple:
        return "input", self.body.inputs.index(self.parts.stored[0])

    def reductions_before(self) -> list[dict]:
        """Reductions that x itself needs: one walk over K each; a later one may read an earlier one's result."""
        walks = []
        for value in self.parts.before:
            lines: list[str] = []
            emitter = self.emitter(self.k_coords(lines), self.given, lines)
            walks.append({"lines": lines, "reductions": [self.reduction(value, emitter)]})
        return walks

    def reductions_beside(self, coords, lines) -> list[dict]:
        """Reductions that only the epilogue needs.

        The many-token forms load x again for them, from cache: Triton 3.6 miscompiles a tile that both an asynchronous
        tensor-core instruction and an elementwise expression read, once two accumulators are in flight. The eviction policy
        of the first load keeps the two apart (and tells the truth: every program reads this x).
        """
        if self.form == "epilogue":  # they are in memory
            self.given |= {value: self.names.fresh(value.op) for value in self.parts.beside}
            return [{"name": self.given[value], "value": ""} for value in self.parts.beside]
        emitter = self.emitter(coords, self.known or self.given, lines)
        return [self.reduction(value, emitter) for value in self.parts.beside]

    def reduction(self, value: Value, emitter) -> dict:
        """What a template needs of a reduction over K, kept per column of the tile and collapsed at the end."""
        identity, update, _ = REDUCE[value.op]
        text = strip(emitter.write(value.inputs[0]))
        if self.masked_k:
            text = f"tl.where(k_mask, {text}, {identity})"
        label = self.names.fresh(value.op)
        self.names.fresh(f"{label}_part")  # the template's name for a split's part of it
        self.given[value] = label
        if self.shape.gluon:
            return self.reduction_in_gluon(value, label, in_gluon(text))
        whole = f"tl.{'max' if value.op == 'max' else 'sum'}({label}_k, {self.shape.reduce}"
        scale = f" / {self.parts.k}" if value.op == "mean" else ""
        step = text if text.isidentifier() or text.startswith("tl.") else f"({text})"
        return {
            "name": label,
            "partial": f"{label}_k",
            "identity": identity,
            "value": text,
            "step": update.format(f"{label}_k", step),
            "finish": whole + scale,
            "collapse": whole,
            "scale": scale,
            "combine": update.format(label, f"{label}_part"),
            "fold": update.format(f"a_{label}", f"b_{label}"),
        }

    def reduction_in_gluon(self, value: Value, label: str, text: str) -> dict:
        """As `reduction`: each thread adds up the eight neighbours along K that it holds."""
        identity, update, _ = REDUCE[value.op]
        fold = f"gl.{'max' if value.op == 'max' else 'sum'}"
        eights = f"gl.convert_layout({fold}(({text}).reshape([BLOCK_M, BLOCK_K // 8, 8]), 2), EIGHTS)"
        return {
            "name": label,
            "partial": f"{label}_k",
            "identity": identity,
            "value": text,
            "step": in_gluon(update.format(f"{label}_k", eights)),
            "collapse": f"{fold}({label}_k, 1)",
            "whole": f"{fold}({label}, 0)",
            "scale": f" / {self.parts.k}" if value.op == "mean" else "",
            "combine": in_gluon(update.format(label, f"{label}_part")),
        }

    # ---- after the product ---------------------------------------------------------------------------------------------------

    def epilogue(self) -> list[str]:
        """Lines from the accumulators y0, y1, … to the stores, segment by segment."""
        lines = self.row_scalars()
        for segment in self.parts.segments:
            lines += self.segment(segment)
        return tidy(lines)

    def row_scalars(self) -> list[str]:
        """What the epilogue makes of whole rows (a norm's scale), once for all segments."""
        parts, lines = self.parts, []
        reads = {i for v in parts.after for i in v.inputs}
        emitter = self.emitter({parts.row_dim: self.row}, self.given, lines)
        for value in parts.body.walk():
            derived = value.inputs and any(i in self.given for i in value.inputs)
            if value not in self.given and not axis(value) and (derived or value.op == "input" and value in reads):
                text = emitter.write(value)
                name = text if text.isidentifier() else emitter.assign(self.names.of(value), text)
                emitter.known[value] = self.given[value] = name
        return lines

    def segment(self, segment) -> list[str]:
        """The lines of the rows that belong to one segment."""
        first, last = segment.start, segment.start + segment.rows
        if len(self.parts.segments) == 1:
            lines: list[str] = []
            masks = ("n_mask",) if self.masked_n else ()
        else:
            inside = self.names.fresh("inside")
            bounds = [f"(n >= {first})"] * (first > 0) + [f"(n < {last})"] * (last < self.parts.n or self.masked_n)
            lines, masks = [f"{inside} = {strip(' & '.join(bounds))}"], (inside,)
        for chunk in range(segment.chunks):
            self.chunk(segment, chunk, masks, lines)
        lines = tidy(lines)
        if len(self.parts.segments) > 1 and self.many:  # most tiles lie in one segment
            low, high = self.shape.bounds
            bounds = [f"({high} >= {first})"] * (first > 0) + [f"({low} < {last})"] * (last < self.parts.n)
            return [f"if {strip(' & '.join(bounds))}:", *["    " + line for line in lines]]
        return lines

    def chunk(self, segment, chunk: int, masks: tuple[str, ...], lines: list[str]):
        """One part of a segment's index space: its indices, its expressions, its stores."""
        shift = chunk * segment.rows - segment.start
        flat = "n" if not shift else f"n {'+' if shift > 0 else '-'} {abs(shift)}"
        if segment.chunks * segment.rows > segment.numel and chunk == segment.chunks - 1:
            masks = (*masks, f"({flat} < {segment.numel})")
        index = "n"
        if shift:
            index = self.names.fresh("i")
            lines.append(f"{index} = {flat}")
        coords = {self.parts.row_dim: self.row} | coordinates(list(segment.dims), index, masks, lines, self.names)
        leaves = {leaf: f"y{i * segment.chunks + chunk}" for i, leaf in enumerate(segment.leaves)}
        emitter = self.emitter(coords, self.given | leaves, lines)
        row = "t" if self.many else "0"
        for piece in segment.pieces:
            text = emitter.write(piece.value)
            offset = flat_offset(piece, segment.dims, index, coords)
            kept = []
            if self.draws:
                text = emitter.assign(self.names.fresh("logits"), text)
                kept = self.keep_best(text, index, masks)
            if self.makes:
                text = stored = emitter.assign(self.names.fresh("stored"), text)
            text = mark(strip(text)) if self.shape.gluon else text
            self.store(text, piece.output, piece.value, row, offset, (*masks, *self.row.masks), lines)
            if self.makes:
                lines += self.row_sums(stored)
            if kept:
                lines[-1:] = [*kept, "else:", f"    {lines[-1]}"]

    def row_sums(self, stored: str) -> list[str]:
        """Lines that leave row reductions of what a tile has stored: of the values as the next kernel will read them."""
        lines, reader = [], self.makes.reader
        out = self.params.pointer("out", ("output", 0))
        self.left = self.params.pointer("out_sums", ("sums", "output", 0))
        seen = self.names.fresh("seen")
        lines.append(f"{seen} = {stored}.to({out}.dtype.element_ty).to(tl.float32)")
        emitter = Emitter(reader.body, self.params, {}, {reader.x: seen}, lines, self.names)
        for number, value in enumerate(reader.beside):
            part, count = "n_0 // BLOCK_N", len(reader.beside)
            row = part if count == 1 else f"({part} * {count} + {number})"
            whole = by_line(REDUCE[value.op][2].format(strip(emitter.write(value.inputs[0])), 0))
            lines.append(f"tl.store({self.left} + {row} * T + t_line, {whole}, mask=t_line < T)")
        return lines

    def keep_best(self, logits: str, token: str, masks: tuple[str, ...]) -> list[str]:
        """What is done with logits that are drawn from."""
        if masks:
            logits = f'tl.where({" & ".join(masks)}, {logits}, float("-inf"))'
        drawing = ", ".join(self.params.pointer(name, ("drawing", name)) for name in DRAWING)
        return ["if DRAW:", f"    keep_best({logits}, {token}, {self.shape.tokens}, T, {drawing}, DRAW, {self.shape.axis})"]


def flat_offset(piece, dims, index: str, coords) -> str:
    """The address of a piece's elements; the flat index itself where they lie in its order."""
    step, in_order = 1, True
    for dim in reversed(dims):
        in_order &= piece.strides[dim.name] == step
        step *= dim.size
    terms = [index] if in_order else [term(coords[d.name].text, piece.strides[d.name]) for d in dims]
    return " + ".join(terms + ([str(piece.offset)] if piece.offset else []))
