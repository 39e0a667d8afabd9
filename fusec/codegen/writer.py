"""What the writers of all kernels share: the finished source, the names and pointers of one kernel, and small edits of its
lines."""

from __future__ import annotations

import functools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from ..ir.graph import Graph, Value
from ..passes.analysis import RUNTIME
from ..passes.extract import result_name
from .expressions import Emitter, Names, Params, strip
from .schedule import MOST_PIECES

WIDTH = 120  # columns of generated source

# Names that the templates use themselves.
RESERVED = (
    "gdc_wait_in_loop",
    "keep_best",
    "threads_meet",
    "sigmoid",
    "async_load",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
    "barrier",
    "mbarrier",
    "reinterpret",
    "pair",
    "pairs",
    "range",
    "min",
    "max",
    "mma_v2",
    "tma",
    "gl",
    "gluon",
    "first",
    "last",
    "split",
    "tile",
    "tokens",
    "sums",
    "parts",
    "there",
    "cell",
    "part",
    "start_all",
    "b",
    "g",
    "own",
    "step",
    "steps",
    "turn",
    "stage",
    "leaf",
    "n_0",
    "t_0",
    "t_line",
    "w_ring",
    "x_ring",
    "x_seen",
    "ready",
    "row_sums",
    "x_tile",
    "x_part",
    "place",
    "done",
    "row",
    "tiles",
    "whole",
    "k",
    "n",
    "t",
    "m",
    "j",
    "T",
    "K",
    "ROWS",
    "start",
    "pid",
    "group",
    "height",
    "w_row",
    "k_mask",
    "n_mask",
    "t_mask",
    "m_mask",
    "tl",
    "libdevice",
    "blocks_m",
    "blocks_n",
    *(f"{letter}{i}" for letter in ("w", "y", "acc", "w_ring_") for i in range(9)),
    *(f"y{leaf}_{piece}" for leaf in range(9) for piece in range(MOST_PIECES)),
)
# reduction -> (identity, one more element, the whole tile along an axis)
REDUCE = {
    "sum": ("0.0", "{0} + {1}", "tl.sum({0}, {1})"),
    "mean": ("0.0", "{0} + {1}", "tl.sum({0}, {1})"),
    "max": ('float("-inf")', "tl.maximum({0}, {1})", "tl.max({0}, {1})"),
}


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
def environment():
    """The templates' Jinja environment."""
    import jinja2  # not at the top: a start from the program cache renders nothing

    folder = Path(__file__).resolve().parents[2] / "templates"
    if not folder.is_dir():
        import fusec.templates

        folder = Path(fusec.templates.__file__).parent
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


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


def define(name: str, params, tiles=()) -> str:
    """The `def` line of a kernel, folded to the page's width."""
    params = [p.replace(": ", ":~") for p in (*params, *(f"{t}: tl.constexpr" for t in tiles))]
    lines = textwrap.wrap(f"def {name}({', '.join(params)}):", WIDTH, subsequent_indent=" " * (len(name) + 5),
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines).replace("~", " ")


def rename(text: str, old: str, new: str) -> str:
    """The source of a kernel under another name, its signature folded anew."""

    def signature(match) -> str:
        return match[0].replace(old, new) if match[1].startswith("\n") else define(new, re.split(r",\s+", match[1]))

    return re.sub(rf"def {old}\(([^)]*)\):", signature, text, count=1)


def fold(text: str) -> str:
    """Generated source with its long lines folded inside their parentheses."""
    return "\n".join(line if len(line) <= WIDTH or "#" in line else fold_line(line) for line in text.split("\n"))


def fold_line(line: str) -> str:
    """A statement on several lines, broken after commas, as far outside of its parentheses as can be."""
    within = line.endswith(",")  # the arguments of a call, which opens on the line before
    margin, depth, lines = " " * (len(line) - len(line.lstrip()) + 8 * (not within)), int(within), []
    while len(line) > WIDTH:
        places, level = [], depth
        for i, c in enumerate(line[:WIDTH]):
            level += (c in "([{") - (c in ")]}")
            if c == " " and level > 0 and i > len(margin):
                places.append((level, line[i - 1] != ",", -i))
        if not places:
            break
        at = -min([p for p in places if -p[2] > WIDTH // 2] or places)[2]
        depth += sum((c in "([{") - (c in ")]}") for c in line[:at])
        lines.append(line[:at])
        line = margin + line[at + 1 :]
    return "\n".join([*lines, line])


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
    """Lines without the assignments that nothing reads."""
    text = "\n".join([*lines, *read])

    def read_again(line: str) -> bool:
        target = re.match(r"\s*(\w+) = ", line)
        return not target or len(re.findall(rf"(?<!\.)\b{target[1]}\b", text)) > 1

    kept = [line for line in lines if read_again(line)]
    return tidy(kept, *read) if len(kept) < len(lines) else kept
