"""Kernels as Triton source: one body in, the text of its variants out.

`render(kernel)` gives the variants of one kernel: a contraction has a one-token form (`gemv`) and a many-token form (`matmul`), a row
kernel has one, attention a decoding and a prefill form. Each `Source` carries the text and the roles of its pointers, from which the
program writer makes the launch.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..ir.graph import Graph, Value
from ..ir.ops import OPS
from ..passes.analysis import RUNTIME, axis, cone
from ..passes.extract import result_name
from .contraction import Contraction, pieces
from .expressions import Emitter, Index, Names, Params, coordinates, strip, term

RESERVED = ("first", "last", "split", "tile", "tokens", "sums", "cell", "part", "start_all", "k", "n", "t", "m", "j", "T", "K", "ROWS", "start", "pid", "group", "height", "w_row", "k_mask", "n_mask", "t_mask", "m_mask", "tl",
            "libdevice", "blocks_m", "blocks_n", *(f"{letter}{i}" for letter in ("w", "y", "acc") for i in range(9)))
REDUCE = {"sum": ("0.0", "{0} + {1}", "tl.sum({0}, {1})"), "mean": ("0.0", "{0} + {1}", "tl.sum({0}, {1})"),
          "max": ('float("-inf")', "tl.maximum({0}, {1})", "tl.max({0}, {1})")}
ROW_BLOCK = 8192  # elements of a row that one block may hold


@dataclass
class Source:
    """One kernel variant. form: gemv, matmul, rows, decode or prefill.  roles: what each pointer parameter is, in order.
    facts: what the launch rule needs (rows, k, leaves, …)."""

    name: str
    form: str
    text: str
    roles: dict[str, tuple]
    facts: dict


@functools.cache
def environment() -> jinja2.Environment:
    folder = Path(__file__).resolve().parents[2] / "templates"
    if not folder.is_dir():
        import fusec.templates
        folder = Path(fusec.templates.__file__).parent
    return jinja2.Environment(loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)


class Writer:
    """What the forms of one kernel share: names, pointers, outputs."""

    def __init__(self, body: Graph, dtype: str):
        self.body, self.dtype = body, dtype
        self.params, self.names = Params(), Names(RESERVED)
        self.users = body.users()

    def emitter(self, coords, given, lines, policy="") -> Emitter:
        return Emitter(self.body, self.params, coords, given, lines, self.names, self.users, policy)

    def store(self, text: str, number: int, value: Value, row: str, offset: str, masks, lines):
        """Writes `text` into output `number` at element `offset` of row `row`: a buffer's row, or the token's slot in a cache."""
        output = self.body.outputs[number]
        numel = math.prod(d.size for d in output.dims if d.name not in RUNTIME)
        pointer = self.params.pointer(output_name(self.body, number), ("output", number))
        if output.op == "cache":
            slots = self.params.pointer("slots", ("slots",))
            mask = f", mask={row}_mask, other=-1" if "t_mask" in masks or "m_mask" in masks else ""
            index = {"0": "", "t": " + t", "m": " + m"}[row]
            if row == "m" and self.row_index != "m":
                index = f" + {self.row_index}"
            read = f"tl.load({slots}{index}{mask})"
            slot = next((line.partition(" = ")[0] for line in lines if line.endswith(f" = {read}")), None)
            if slot is None:
                slot = self.names.fresh("slot")
                lines.append(f"{slot} = {read}")
            base, masks = f"{slot} * {numel}", (*masks, f"({slot} >= 0)")
        else:
            base = {"0": "", "t": f"t.to(tl.int64) * {numel}", "m": f"{self.row_index} * {numel}" if row == "m" else ""}[row]
        where = " + ".join(p for p in (pointer, base, offset) if p and p != "0")
        mask = f", mask={' & '.join(dict.fromkeys(masks))}" if masks else ""
        lines.append(f"tl.store({where}, {strip(text)}{mask})")

    row_index = "m"


def output_name(body: Graph, number: int) -> str:
    output = body.outputs[number]
    if output.op == "cache":
        return result_name(output)
    return "out" if sum(o.op != "cache" for o in body.outputs) == 1 else f"out{number}"


# ---- contractions ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a contraction's tile lies.  x: shape of the tile of x.  row: the token's index.  axis: along which x is reduced, and how the
    result is spread again.  tiles: launch constants.  many: tokens per program; split: parts of K."""

    x: str
    row: str
    reduce: str
    tiles: tuple[str, ...]
    many: bool = True
    split: bool = False


FORMS = {
    "gemv": Form("[BLOCK_K]", "0", "0)", ("BLOCK_N", "BLOCK_K", "STAGES", "PDL"), many=False),
    "skinny": Form("[BLOCK_K, BLOCK_M]", "t", "0)[None, :]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "STAGES", "PDL"), split=True),
    "matmul": Form("[BLOCK_M, BLOCK_K]", "t", "1)[:, None]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "STAGES", "PDL")),
}


def contraction(kernel: Value, name: str, form: str, comment, dtype: str, block_n: int, block_k: int, parts: Contraction | None = None,
                splits: int = 1) -> Source:
    """A contraction kernel in one of its forms: one token ("gemv"), a few ("skinny") or many ("matmul"). Masks are left out where
    blocks divide the sizes: block_n, block_k and splits are the least divisible of the tiles that it will be launched with."""
    body = kernel.attrs["body"]
    parts = parts or Contraction(body)
    w = Writer(body, dtype)
    shape = FORMS[form]
    many = shape.many
    masked_k, masked_n = bool(parts.k % (block_k * splits)), bool(parts.n % block_n)
    k_masks, n_masks = (("k_mask",) if masked_k else ()), (("n_mask",) if masked_n else ())
    row = Index("t", ("t_mask",)) if many else Index("0")
    weight = w.params.pointer(parts.matrix.attrs["name"], ("weight", parts.weight))

    def k_coords(lines):
        return {parts.row_dim: row} | coordinates(parts.k_dims, "k", k_masks, lines, w.names)

    def reductions(values, emitter):
        rows = []
        for value in values:
            identity, update, _ = REDUCE[value.op]
            text = emitter.write(value.inputs[0])
            if masked_k:
                text = f"tl.where(k_mask, {strip(text)}, {identity})"
            label = w.names.fresh(value.op)
            whole = f"tl.{'max' if value.op == 'max' else 'sum'}({label}_k, {shape.reduce}"
            scale = f" / {parts.k}" if value.op == "mean" else ""
            rows.append({"name": label, "partial": f"{label}_k", "identity": identity, "value": text, "op": value,
                         "step": update.format(f"{label}_k", text), "finish": whole + scale, "collapse": whole, "scale": scale,
                         "combine": update.format(label, f"{label}_part")})
        return rows

    given: dict[Value, str] = {}
    before = []
    for value in parts.before:  # one walk per reduction; a later one may read an earlier one's result
        lines: list[str] = []
        emitter = w.emitter(k_coords(lines), given, lines)
        rows = reductions([value], emitter)
        before.append({"lines": lines, "reductions": rows})
        given[value] = rows[0]["name"]
    lines = []
    coords = k_coords(lines)
    emitter = w.emitter(coords, given, lines, ', eviction_policy="evict_last"' if many and parts.beside else "")
    cast = {"float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16"}[dtype]
    if many and parts.x.op == "input":  # loaded as it is, so that it can go from memory to the tensor cores untouched
        pointer = w.params.pointer(parts.x.attrs["name"], ("input", body.inputs.index(parts.x)))
        offset, masks = emitter.address(parts.x)
        lines.append(f"a = tl.load({pointer} + {offset}, mask={' & '.join(masks)}, other=0{emitter.policy})")
        x = operand = "a"
    else:
        x = emitter.write(parts.x)
        x = x if x.isidentifier() else emitter.assign(w.names.fresh("x"), x)
        operand = f"{x}.to({cast})"
        if many and masked_k:
            operand = f"tl.where(k_mask, {x}, 0.0).to({cast})"
    if many:
        # A reduction beside the contraction loads x again, from cache: Triton 3.6 miscompiles a tile that both an asynchronous
        # tensor-core instruction and an elementwise expression read, once two accumulators are in flight. The eviction policy keeps the
        # two loads apart (and tells the truth: every program reads this x).
        emitter = w.emitter(coords, given, lines)
    beside = reductions(parts.beside, emitter)
    given |= {r["op"]: r["name"] for r in beside}

    epilogue_reads = {i for v in parts.after for i in v.inputs}
    scalars: list[str] = []  # what the epilogue makes of a whole row's reduction, once for all segments
    shared = w.emitter({parts.row_dim: row}, given, scalars)
    for value in parts.body.walk():
        derived = value.inputs and any(i in given for i in value.inputs)
        if value not in given and not axis(value) and (derived or value.op == "input" and value in epilogue_reads):
            text = shared.write(value)
            shared.known[value] = given[value] = text if text.isidentifier() else shared.assign(w.names.of(value), text)
    epilogue = scalars
    for segment in parts.segments:
        for chunk in range(segment.chunks):
            inner: list[str] = []
            base = "n" if segment.start == 0 else f"(n - {segment.start})"
            flat = base if chunk == 0 else f"({base} + {chunk * segment.rows})"
            masks = list(n_masks)
            if len(parts.segments) > 1:
                inside = w.names.fresh("inside")
                inner.append(f"{inside} = (n >= {segment.start}) & (n < {segment.start + segment.rows})")
                masks = [inside]
            if segment.chunks * segment.rows > segment.numel and chunk == segment.chunks - 1:
                masks.append(f"({flat} < {segment.numel})")
            index = w.names.fresh("i")
            if flat == "n":
                index = "n"
            else:
                inner.append(f"{index} = {strip(flat)}" if chunk else f"{index} = {flat.strip('()')}")
            coords = {parts.row_dim: row} | coordinates(list(segment.dims), index, tuple(masks), inner, w.names)
            leaves = {leaf: f"y{segment.leaves.index(leaf) * segment.chunks + chunk}" for leaf in segment.leaves}
            e = w.emitter(coords, given | leaves, inner)
            for piece in segment.pieces:
                text = e.write(piece.value)
                offset = flat_offset(piece, segment.dims, index, coords)
                w.store(text, piece.output, piece.value, "t" if many else "0", offset, tuple(masks) + (("t_mask",) if many else ()), inner)
            if len(parts.segments) > 1 and many:
                first, last = segment.start, segment.start + segment.rows
                inner = [f"if (tl.max(n) >= {first}) & (tl.min(n) < {last}):", *["    " + line for line in tidy(inner)]]
            epilogue += tidy(inner)
    early: list[str] = []
    if form == "gemv":  # what the epilogue reads is on its way while the weights stream past
        early, epilogue = partition(share(epilogue), {f"y{i}" for i in range(parts.leaves)} | set(given.values()))
    if shape.split:
        w.params.pointer("partial", ("scratch", "partial"))
        w.params.pointer("arrivals", ("scratch", "arrivals"))
    signature = define(name, [*w.params.roles, *(["T"] if many else [])], shape.tiles)
    context = {"signature": signature, "comment": comment, "rows": parts.n, "k": parts.k, "masked_n": masked_n,
               "masked_k": masked_k, "weight": weight, "leaves": parts.leaves, "before": before, "lines": tidy(lines, x), "x": x, "operand": operand,
               "beside": beside, "early": early, "epilogue": epilogue, "precision": ', input_precision="ieee"' if dtype == "float32" else ""}
    text = environment().get_template(f"{form}.py.jinja").render(k=context)
    facts = {"rows": parts.n, "k": parts.k, "leaves": parts.leaves, "row_dim": parts.row_dim, "packing": parts.packing(),
             "k_dims": [d.name for d in parts.k_dims], "n_dims": list(axis(parts.anchor)), "weight": parts.weight, "block_n": block_n, "block_k": block_k}
    return Source(name, form, text, w.params.roles, facts)


def flat_offset(piece, dims, index: str, coords) -> str:
    """The address of a piece's elements; the flat index itself where they lie in its order."""
    step, in_order = 1, True
    for dim in reversed(dims):
        in_order &= piece.strides[dim.name] == step
        step *= dim.size
    terms = [index] if in_order else [term(coords[d.name].text, piece.strides[d.name]) for d in dims]
    return " + ".join(terms + ([str(piece.offset)] if piece.offset else []))


def define(name: str, params, tiles) -> str:
    """The `def` line of a kernel, folded to the page's width."""
    text = f"def {name}({', '.join([*params, *(f'{t}:~tl.constexpr' for t in tiles)])}):"
    return textwrap.fill(text, 120, subsequent_indent=" " * (len(name) + 5), break_long_words=False, break_on_hyphens=False).replace("~", " ")


def share(lines: list[str]) -> list[str]:
    """Straight-line code in which no two lines compute the same."""
    seen, renamed, kept = {}, {}, []
    for line in lines:
        line = re.sub(r"[A-Za-z_]\w*", lambda m: renamed.get(m[0], m[0]), line)
        name, _, text = line.partition(" = ")
        if name.isidentifier() and text in seen:
            renamed[name] = seen[text]
        else:
            seen[text] = name
            kept.append(line)
    return kept


def partition(lines: list[str], late: set[str]) -> tuple[list[str], list[str]]:
    """(early, late) lines: those that need none of the `late` names, nor what is computed from them, nor store anything."""
    late, first, rest = set(late), [], []
    for line in lines:
        name = line.partition(" = ")[0]
        if not name.isidentifier() or late & set(re.findall(r"[A-Za-z_]\w*", line.partition(" = ")[2])):
            late.add(name)
            rest.append(line)
        else:
            first.append(line)
    return first, rest


def tidy(lines: list[str], *read: str) -> list[str]:
    """Lines without indices that nothing reads, folded to the page's width."""
    text = "\n".join([*lines, *read])
    kept = [line for line in lines if not (m := re.match(r"\s*(i_\w+) = ", line)) or len(re.findall(rf"\b{m[1]}\b", text)) > 1]
    return tidy(kept, *read) if len(kept) < len(lines) else kept


# ---- row kernels -------------------------------------------------------------------------------------------------------------------


def row_kernel(kernel: Value, name: str, comment, dtype: str) -> Source:
    """A row kernel. Results over rows of the same kind form a section; sections share the launch."""
    body = kernel.attrs["body"]
    w = Writer(body, dtype)
    kinds: dict[tuple, list[int]] = {}
    for number, output in enumerate(body.outputs):
        kinds.setdefault(row_dims(output), []).append(number)
    sections = [row_section(w, rows, numbers) for rows, numbers in kinds.items()]
    context = {"signature": define(name, [*w.params.roles, "T"], ["BLOCK_M", "PDL"]), "comment": comment, "sections": sections}
    text = environment().get_template("rows.py.jinja").render(k=context)
    runtime = next(d.name for d in next(iter(kinds)) if d.name in RUNTIME)
    facts = {"repeats": [s["repeat"] for s in sections], "width": max(s["width"] for s in sections), "row_dim": runtime}
    return Source(name, "rows", text, w.params.roles, facts)


def row_dims(output: Value) -> tuple:
    """The dims of the rows that a result is computed over: what its reductions leave; without one, the run-time dim."""
    value = output.inputs[0] if output.op == "cache" else output
    reductions = [v for v in cone(value, lambda v: v.op == "input") if OPS[v.op].kind == "reduction"]
    return reductions[-1].dims if reductions else tuple(d for d in value.dims if d.name in RUNTIME)


def row_section(w: Writer, rows, numbers: list[int]) -> dict:
    """One section's lines: reductions over the row's inner dims level by level, then the stores."""
    body = w.body
    inside = {v for number in numbers for v in cone(body.outputs[number], lambda v: v.op == "input")}
    reductions = [v for v in body.walk() if v in inside and OPS[v.op].kind == "reduction"]
    stores = [(number, *piece) for number in numbers for piece in pieces(body.outputs[number])]
    row_names = {d.name for d in rows}
    runtime, sized = [d for d in rows if d.name in RUNTIME], [d for d in rows if d.name not in RUNTIME]
    repeat = math.prod(d.size for d in sized)
    lines: list[str] = []
    base = {runtime[0].name: Index("t" if sized else "m", ("m_mask",))}
    w.row_index = base[runtime[0].name].text
    if sized:
        lines.append(f"t = m // {repeat}")
        lines.append(f"i = m % {repeat}")
        base |= coordinates(sized, "i", ("m_mask",), lines, w.names)
    given: dict[Value, str] = {}
    blocks: dict[tuple, Emitter] = {}

    def inner_dims(value: Value):
        return tuple(d for d in value.dims if d.name not in row_names)

    def block(dims) -> tuple[Emitter, str, list[str]]:
        """The emitter of a row's elements over `dims`, all in one block."""
        if dims not in blocks:
            size = math.prod(d.size for d in dims)
            width = 1 << (size - 1).bit_length()
            j = w.names.fresh("j") if blocks else "j"
            lines.append(f"{j} = tl.arange(0, {width})[None, :]")
            masks = ()
            if width != size:
                lines.append(f"{j}_mask = {j} < {size}")
                masks = (f"{j}_mask",)
            blocks[dims] = (w.emitter(base | coordinates(list(dims), j, masks, lines, w.names), given, lines), j, masks)
        return blocks[dims]

    def in_one_block(dims):
        return math.prod(d.size for d in dims) <= ROW_BLOCK

    def loop(dims, names, emit):
        """A walk over a long row: `emit(emitter, masks, lines)` writes the loop's body."""
        size = math.prod(d.size for d in dims)
        inner = [f"j = start + tl.arange(0, {ROW_BLOCK})[None, :]"]
        masks = ()
        if size % ROW_BLOCK:
            inner.append(f"j_mask = j < {size}")
            masks = ("j_mask",)
        emit(w.emitter(base | coordinates(list(dims), "j", masks, inner, w.names), given, inner), masks, inner)
        lines.append(f"for start in range(0, {size}, {ROW_BLOCK}):")
        lines.extend("    " + line for line in inner)

    for value in reductions:
        dims = inner_dims(value.inputs[0])
        identity, update, finish = REDUCE[value.op]
        size = math.prod(d.size for d in dims)
        label = w.names.fresh(value.op)
        if in_one_block(dims):
            emitter, _, masks = block(dims)
            emitter.known |= given
            text = emitter.write(value.inputs[0])
            if masks:
                text = f"tl.where({' & '.join(masks)}, {strip(text)}, {identity})"
            lines.append(f"{label} = {finish.format(strip(text), '1')}[:, None]" + (f" / {size}" if value.op == "mean" else ""))
        else:
            lines.append(f"{label}_j = tl.full([BLOCK_M, {ROW_BLOCK}], {identity}, tl.float32)")

            def emit(emitter, masks, inner, value=value, label=label, identity=identity, update=update):
                text = emitter.write(value.inputs[0])
                if masks:
                    text = f"tl.where({' & '.join(masks)}, {strip(text)}, {identity})"
                inner.append(f"{label}_j = {update.format(f'{label}_j', text)}")

            loop(dims, label, emit)
            lines.append(f"{label} = {finish.format(f'{label}_j', '1')}[:, None]" + (f" / {size}" if value.op == "mean" else ""))
        given[value] = label
    by_space: dict[tuple, list] = {}
    for store in stores:
        by_space.setdefault(inner_dims(store[1]), []).append(store)
    for dims, group in by_space.items():
        def emit(emitter, masks, out, group=group, dims=dims):
            emitter.known |= given
            for number, value, strides, offset in group:
                text = emitter.write(value)
                terms = [term(emitter.coords[d.name].text, strides[d.name]) for d in (*sized, *dims) if d.name in strides]
                if len(dims) > 1 and not sized and row_major_strides(dims, strides):
                    terms = [emitter.coords["*"].text[1]]
                w.store(text, number, value, "m", " + ".join(terms + ([str(offset)] if offset else [])), (*masks, "m_mask"), out)

        if in_one_block(dims):
            emitter, _, masks = block(dims)
            emit(emitter, masks, lines)
        else:
            loop(dims, None, emit)
    widest = max(math.prod(d.size for d in dims) for dims in [*by_space, *(inner_dims(v.inputs[0]) for v in reductions)])
    return {"lines": tidy(lines), "repeat": repeat, "width": min(widest, ROW_BLOCK)}


def row_major_strides(dims, strides) -> bool:
    step = 1
    for dim in reversed(dims):
        if strides[dim.name] != step:
            return False
        step *= dim.size
    return True
