"""The epilogue of a stream, as its template wants it: Gluon, in the layout that suits what it reads and writes, and with the
loads apart that can be under way while the products are made.

A thread has its products along t, a few rows n apart. What they are stored to, or computed with, lies along n: eight neighbours
are one access of 16 bytes. So something is turned in shared memory on the way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .writer import partition, share, tidy

WIDE = ".to(gl.float32)"


@dataclass
class StreamEpilogue:
    """turn: "products" (what comes after them is then done in the turned layout), "stored" (only what is stored: the same tile,
    of half the bytes), or None.  early: lines before the products.  loaded: names that they hand on.  lines: those after.
    """

    turn: str | None
    early: list[str]
    loaded: list[str]
    lines: list[str]

    def takes(self, names) -> list[str]:
        """Those of `names` that the early lines read."""
        return [name for name in names if name in words(self.early)]


def mark(text: str) -> str:
    """What is stored, until it is known in which layout."""
    return f"«{text}»"


def by_line(text: str) -> str:
    """A value a token, made of a tile: until it is known in which layout it is stored."""
    return f"‹{text}›"


def stream_epilogue(lines: list[str], *, late: set[str], early: bool, halves: bool, bound: int | None) -> StreamEpilogue:
    """lines: of the epilogue, from its products to its stores, as the other templates have them.  late: names that are there only
    after the products.  early: whether what is read may be loaded before them.  halves: whether all that is stored has 16 bits.
    bound: the number of rows, where tiles do not divide it."""
    lines = [in_gluon(line) for line in lines]
    # A value that is read, or an index that is computed with, lies as the addresses do; a slot is an address itself.
    reads = feeds(lines) or any("gl.load(" in line and "gl.load(slots_ptr " not in line for line in lines)
    turn = "products" if reads else "stored" if halves else None
    stored = r"gl.convert_layout((\3).to(\2.dtype.element_ty), Z)" if turn == "stored" else r"\3"
    lines = [in_a_line(re.sub(r"(gl\.store\((\w+).*)«(.*)»", rf"\1{stored}", line)) for line in lines]
    lines = [re.sub("‹(.*)›", rf"gl.convert_layout(\1, gl.SliceLayout(0, {'Z' if turn else 'Y'}))", line) for line in lines]
    places = indices("Z" if turn else "Y", bound)
    if not reads or not early:
        return StreamEpilogue(turn, [], [], tidy([*places, *lines]))
    before, lines = partition(share(lines), late)
    made: set[str] = set()  # what is loaded, or computed from what is loaded
    for line in before:
        if "gl.load(" in line or made & words([line]):
            made.add(assigned(line))
    lines = tidy([*places, *(line for line in before if assigned(line) not in made), *lines])
    loaded = [name for name in map(assigned, before) if name in made & words(lines)]
    for i, line in enumerate(before):  # what waits, waits as it was loaded
        name = assigned(line)
        alone = name in loaded and name not in words(before[i + 1 :])
        if alone and line.startswith(f"{name} = gl.load(") and line.endswith(WIDE):
            before[i] = line.removesuffix(WIDE)
            lines.insert(0, f"{name} = {name}{WIDE}")
    return StreamEpilogue(turn, tidy([*places, *before], *loaded), loaded, lines)


def feeds(lines: list[str]) -> bool:
    """Whether the place of a value in its tile goes into what is stored."""
    reached = {"n", "t", "t_line"}
    for line in lines:
        if " = " in line and reached & words([line.partition(" = ")[2]]) and "gl.load(" not in line:
            reached.add(assigned(line).strip())
    return bool(reached & words(re.findall("«(.*)»", "\n".join(lines))))


def indices(layout: str, bound: int | None) -> list[str]:
    """What the lines call the places of a tile."""
    lines = [f"t_line = t_0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, {layout}))", "t = t_line[None, :]", "t_mask = t < T",
             f"n = n_0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, {layout}))[:, None]"]
    return [*lines, f"n_mask = n < {bound}"] if bound else lines


def in_gluon(line: str) -> str:
    """A line of Triton in Gluon, which has the same functions under its own name."""
    return line.replace("tl.sigmoid(", "sigmoid(").replace("tl.", "gl.")


def in_a_line(line: str) -> str:
    """A load that depends on the token alone, of one value a token: as a tile it would be loaded by each of its rows."""
    found = re.search(r"gl\.load\((\w+) \+ ([^,]*), mask=t_mask, other=([^)]*)\)", line)
    if not found or words([found[2]]) != {"t"}:
        return line
    address = re.sub(r"\bt\b", "t_line", found[2])
    load = f"gl.load({found[1]} + {address}, mask=t_line < T, other={found[3]})[None, :]"
    return line[: found.start()] + load + line[found.end() :]


def assigned(line: str) -> str:
    return line.partition(" = ")[0]


def words(lines: list[str]) -> set[str]:
    """The names in some lines."""
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(lines)))
