"""Contraction kernels as Triton source: one token, a few, or many (see the three templates)."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Value
from ..passes.analysis import axis
from .contraction import Contraction
from .expressions import Index, coordinates, strip, term
from .writer import REDUCE, Source, Writer, define, environment, partition, share, tidy


@dataclass(frozen=True)
class Form:
    """How a contraction's tile lies.  x: shape of the tile of x.  row: the token's index.  axis: along which x is reduced,
    and how the result is spread again.  tiles: launch constants.  many: tokens per program; split: parts of K."""

    x: str
    row: str
    reduce: str
    tiles: tuple[str, ...]
    many: bool = True
    split: bool = False


FORMS = {
    "gemv": Form("[BLOCK_K]", "0", "0)", ("BLOCK_N", "BLOCK_K", "STAGES", "PDL"), many=False),
    "skinny": Form(
        "[BLOCK_K, BLOCK_M]", "t", "0)[None, :]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLITS", "STAGES", "PDL"), split=True
    ),
    "matmul": Form("[BLOCK_M, BLOCK_K]", "t", "1)[:, None]", ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "STAGES", "PDL")),
}


def contraction(
    kernel: Value,
    name: str,
    form: str,
    comment,
    dtype: str,
    block_n: int,
    block_k: int,
    parts: Contraction | None = None,
    splits: int = 1,
) -> Source:
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
            text = strip(emitter.write(value.inputs[0]))
            if masked_k:
                text = f"tl.where(k_mask, {text}, {identity})"
            label = w.names.fresh(value.op)
            whole = f"tl.{'max' if value.op == 'max' else 'sum'}({label}_k, {shape.reduce}"
            scale = f" / {parts.k}" if value.op == "mean" else ""
            rows.append(
                {
                    "name": label,
                    "partial": f"{label}_k",
                    "identity": identity,
                    "value": text,
                    "op": value,
                    "step": update.format(f"{label}_k", text if text.isidentifier() or text.startswith("tl.") else f"({text})"),
                    "finish": whole + scale,
                    "collapse": whole,
                    "scale": scale,
                    "combine": update.format(label, f"{label}_part"),
                }
            )
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
        # tensor-core instruction and an elementwise expression read, once two accumulators are in flight. The eviction policy
        # keeps the two loads apart (and tells the truth: every program reads this x).
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
                w.store(
                    text,
                    piece.output,
                    piece.value,
                    "t" if many else "0",
                    offset,
                    tuple(masks) + (("t_mask",) if many else ()),
                    inner,
                )
            if len(parts.segments) > 1 and many:
                first, last = segment.start, segment.start + segment.rows
                inner = [f"if (tl.max(n) >= {first}) & (tl.min(n) < {last}):", *["    " + line for line in tidy(inner)]]
            epilogue += tidy(inner)
    early: list[str] = []
    epilogue = tidy(epilogue)
    if form == "gemv":  # what the epilogue reads is on its way while the weights stream past
        early, epilogue = partition(share(epilogue), {f"y{i}" for i in range(parts.leaves)} | set(given.values()))
    if shape.split:
        w.params.pointer("partial", ("scratch", "partial"))
        w.params.pointer("arrivals", ("scratch", "arrivals"))
    signature = define(name, [*w.params.roles, *(["T"] if many else [])], shape.tiles)
    context = {
        "signature": signature,
        "comment": comment,
        "rows": parts.n,
        "k": parts.k,
        "masked_n": masked_n,
        "masked_k": masked_k,
        "weight": weight,
        "leaves": parts.leaves,
        "before": before,
        "lines": tidy(lines, x, operand, *(r["value"] for r in beside)),
        "x": x,
        "operand": operand,
        "beside": beside,
        "early": early,
        "epilogue": epilogue,
        "precision": ', input_precision="ieee"' if dtype == "float32" else "",
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
        "block_n": block_n,
        "block_k": block_k,
    }
    return Source(name, form, text, w.params.roles, facts)


def flat_offset(piece, dims, index: str, coords) -> str:
    """The address of a piece's elements; the flat index itself where they lie in its order."""
    step, in_order = 1, True
    for dim in reversed(dims):
        in_order &= piece.strides[dim.name] == step
        step *= dim.size
    terms = [index] if in_order else [term(coords[d.name].text, piece.strides[d.name]) for d in dims]
    return " + ".join(terms + ([str(piece.offset)] if piece.offset else []))
