"""Row kernels as Triton source: elementwise values and reductions over each row, in sections that share a launch."""

from __future__ import annotations

import math
import re

from ..ir.graph import Value
from ..ir.ops import OPS
from ..passes.analysis import RUNTIME, cone
from .contraction import pieces
from .expressions import Emitter, Index, coordinates, strip, term
from .writer import REDUCE, Source, Writer, define, environment, partition, tidy

ROW_BLOCK = 8192  # elements of a row that one block may hold


def row_kernel(kernel: Value, name: str, comment, dtype: str) -> Source:
    """A row kernel. Results over rows of the same kind form a section; sections share the launch."""
    w = Writer(kernel.attrs["body"], dtype)
    kinds, sections = write_sections(w)
    context = {"signature": define(name, [*w.params.roles, "T"], ["BLOCK_M", "PDL"]), "comment": comment, "sections": sections}
    text = environment().get_template("rows.py.jinja").render(k=context)
    runtime = next(d.name for d in next(iter(kinds)) if d.name in RUNTIME)
    facts = {"repeats": [s["repeat"] for s in sections], "width": max(s["width"] for s in sections), "row_dim": runtime}
    return Source(name, "rows", text, w.params.roles, facts)


def head_rows(kernel: Value, name: str, comment, dtype: str, heads: int) -> tuple[str, dict[str, tuple]]:
    """(source, roles of its pointers) of a function that makes the rows of a row kernel that belong to one token and one of
    `heads`: decode attention calls it (see passes/inline_heads.py)."""
    w, lines = Writer(kernel.attrs["body"], dtype), []
    _, sections = write_sections(w)
    for number, section in enumerate(sections):
        own = section["repeat"] // heads  # rows of this token and head
        first = f"(b * {heads} + g).to(tl.int64)" + (f" * {own}" if own > 1 else "")
        text = [f"own = tl.arange(0, {1 << (own - 1).bit_length()})[:, None]", f"m = {first} + own", f"m_mask = own < {own}"]
        text += section["lines"]
        ending = f"_of_{number}" if number else ""  # sections use the same names for their indices
        lines += [re.sub(r"\b(own|m|m_mask|t|i|j|j_mask)\b", rf"\1{ending}", line) for line in text]
    lines = loads_first(lines)
    context = {"signature": define(name, [*w.params.roles, "b", "g"]), "comment": comment, "lines": lines}
    return environment().get_template("heads.py.jinja").render(k=context), w.params.roles


def loads_first(lines: list[str]) -> list[str]:
    """Straight-line code in which all that is read is on its way before the first reduction waits for it; as it was, if a
    reduction needs another."""
    sums = [line for line in lines if re.match(r"\w+ = tl\.(sum|max)\(", line)]
    early, late = partition([line for line in lines if line not in sums], {line.partition(" = ")[0] for line in sums})
    made = {line.partition(" = ")[0] for line in late}
    needs = {name for line in sums for name in re.findall(r"[A-Za-z_]\w*", line.partition(" = ")[2])}
    return lines if needs & made else [*early, *sums, *late]


def write_sections(w: Writer) -> tuple[dict[tuple, list[int]], list[dict]]:
    """(rows -> numbers of the results over them, a section of each)."""
    kinds: dict[tuple, list[int]] = {}
    for number, output in enumerate(w.body.outputs):
        kinds.setdefault(row_dims(output), []).append(number)
    return kinds, [row_section(w, rows, numbers) for rows, numbers in kinds.items()]


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
        by_space.setdefault(tuple(d for d in store[2] if d.name not in row_names), []).append(store)
    for dims, group in by_space.items():

        def emit(emitter, masks, out, group=group, dims=dims):
            emitter.known |= given
            for number, value, _, strides, offset in group:
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
