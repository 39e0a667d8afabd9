"""`fusec explain llama.fuse`: what a program became, in plain words: the kernels of a layer, what each computes, what it must
move, and where two computations were not joined, with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .aot import SHARED, architecture
from .codegen.traffic import BANDWIDTH, Step, Traffic, traffic
from .ir.graph import Value
from .ir.ops import OPS

WIDTH = 118


@dataclass
class Run:
    """Launches that stand together: `count` times in a row, once for each layer. name: "" outside of layers."""

    name: str
    launches: list
    count: int = 1


def explain_program(compiled, report=None, *, bandwidth: float = BANDWIDTH, context: int = 512) -> str:
    """The summary of a compiled program (triton backend) as text without colours.

    report: a BuildReport with cubins adds registers, spills and shared memory.  bandwidth: GB/s that floors are reckoned with.
    context: tokens of history at which one token is decoded.
    """
    module, step = compiled.module, Step(1, 1, context)
    runs = fold(module)
    lines = head(compiled, runs, step, bandwidth)
    numbers = resources(report)
    shown: set[str] = set()
    for run in runs:
        count = len(run.launches)
        title = f"{run.name}, {plural(run.count, 'time')}" if run.count > 1 else run.name or "outside of layers"
        lines += ["", f"{title}: {plural(count, 'kernel')}"]
        for launch in run.launches:
            if launch.function in shown:
                lines += ["", f"  {launch.function}: as above"]
                continue
            shown.add(launch.function)
            lines += ["", *kernel_lines(compiled, launch, step, bandwidth), *numbers.get(launch.function, ())]
    lines += refusal_lines(compiled)
    return "\n".join(lines) + "\n"


def head(compiled, runs, step, bandwidth) -> list[str]:
    module = compiled.module
    name = Path(compiled.source).name if isinstance(compiled.source, Path) else "a program"
    moved = sum((traffic(launch.kernel, step, compiled.dtype) for launch in module.launches), Traffic())
    counts = sorted({len(launched(run.launches)) for run in runs if run.count > 1})
    per_layer = f", {' or '.join(map(str, counts))} a layer" if counts else ""
    return [
        f"{module.name} from {name}, {compiled.dtype}",
        f"{plural(len(launched(module.launches)), 'launch', 'launches')} a step{per_layer}; "
        f"{plural(len(module.functions), 'distinct kernel')}",
        f"one token at a context of {step.context}: {amount(moved.weights)} of weights, {amount(moved.history)} of history, "
        f"{amount(moved.reads + moved.writes)} of activations",
        f"floor at {bandwidth:g} GB/s: {moved.floor_us(bandwidth) / 1e3:.3f} ms a token",
    ]


def launched(launches) -> list:
    """Those of a step of one token a sequence: what decode attention makes itself is no launch then."""
    return [launch for launch in launches if not launch.kernel.attrs.get("inlined")]


# ---- one kernel ----------------------------------------------------------------------------------------------------------------


def kernel_lines(compiled, launch, step, bandwidth) -> list[str]:
    kernel = launch.kernel
    moved = traffic(kernel, step, compiled.dtype)
    floor = moved.floor_us(bandwidth)
    sizes = {"weights": moved.weights, "history": moved.history, "activations": moved.reads + moved.writes}
    parts = [f"{amount(size)} {what}" for what, size in sizes.items() if size]
    lines = [f"  {launch.function}   {places(kernel)}",
             *wrapped("computes", what_it_computes(kernel, launch.function)),
             *(wrapped("launched", "for several tokens a sequence; one token's attention computes it itself")
               if kernel.attrs.get("inlined") else []),
             *handed_on(next(f for f in compiled.module.functions if f.name == launch.function)),
             f"    moves     {' + '.join(parts)}; floor {f'{floor:.2f} µs' if floor >= 0.005 else 'below 0.01 µs'}"]
    return lines


def handed_on(function) -> list[str]:
    """Which row reductions it leaves for the next one, or finds, as a stream: see codegen/row_sums.py."""
    lines = []
    for what, fact, done in (("leaves", "leaves_sums", "row reductions of each tile that it stores"),
                             ("finds", "finds", "its row reductions where x was stored")):  # fmt: skip
        tiles = [t for s in function.sources if s.facts.get(fact) for t in s.facts["tiles"]]
        tokens = ranges(sorted({n for t in tiles for n in range(t.least, t.tokens + 1)}))
        lines += wrapped(what, f"{done}, as a stream (on Hopper, {tokens} tokens)") if tiles else []
    return lines


def what_it_computes(kernel: Value, name: str) -> str:
    """The blocks a kernel implements, and its ops by name."""
    inside = values(kernel)
    blocks: dict[str, None] = {}
    for value in inside:
        if value.op not in ("cast", "const", "split", "join") and value.origin.path:
            own = value.op == "contract" and kernel.attrs["kind"] == "contract"
            blocks[name if own else last_block(value.origin.path)] = None
    ops = Counter(value.op for value in inside if value.op not in ("input", "const", "cast", "split", "join", "index", "via"))
    for via in (v for v in inside if v.op == "via"):
        ops.update(v.op for v in via.attrs["body"].walk() if v.op not in ("input", "const", "cast", "split", "join", "index"))
    order = {"contract": 0, "gather": 0, "cache": 3}
    ranked = sorted(ops.items(), key=lambda pair: (order.get(pair[0], 1 if OPS[pair[0]].kind == "reduction" else 2), pair[0]))
    counted = ", ".join(op if count == 1 else f"{count} {op}" for op, count in ranked)
    return f"{', '.join(blocks)} ({counted})" if blocks else counted


def values(kernel: Value) -> list[Value]:
    body = kernel.attrs["body"]
    return [v for v in body.walk() if v.op != "input"]


def last_block(path: str) -> str:
    """model.layers.0.self_attn.q_proj -> q_proj; the layer itself is named by its stack."""
    parts = [p for p in path.split(".") if not p.isdigit()]
    return parts[-1] if not path.rpartition(".")[2].isdigit() else f"{parts[-1]}[…]"


def places(kernel: Value) -> str:
    """llama.fuse:27-30, 45"""
    found: dict[str, set[int]] = {}
    for value in values(kernel):
        for inner in (value, *(value.attrs["body"].walk() if value.op == "via" else ())):
            if inner.origin.line and inner.op not in ("input", "const"):
                found.setdefault(Path(inner.origin.file).name, set()).add(inner.origin.line)
    return "; ".join(f"{file}:{ranges(sorted(lines))}" for file, lines in sorted(found.items(), key=lambda p: p[0] == "std.fuse"))


def ranges(numbers: list[int]) -> str:
    """[27, 28, 29, 45] -> "27-29, 45"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def resources(report) -> dict[str, list[str]]:
    """function -> a line per compiled variant."""
    table: dict[str, list[str]] = {}
    for k in report.kernels if report is not None else ():
        heads = ("BLOCK_R", "BLOCK_K", "BLOCK_J") if "PAGE" in k.tiles else ()  # attention's: the head sizes, padded
        told = ("SPLITS", "HANDED", "DRAW")
        shown = [name for name in k.tiles if name not in heads and (name.startswith("BLOCK_") or name in told)]
        tiles = " ".join(f"{name}={k.tiles[name]}" for name in shown)
        warps = f"{k.options.get('num_warps', 4)} warps"
        spills = f"{k.spills} bytes spilled" if k.spills else "no spills"
        shared = f"{k.shared / 1024:.0f} KB shared" if k.shared >= 1024 else f"{k.shared} bytes shared"
        if report.target and k.shared > SHARED.get(architecture(report.target), 1 << 20) * 1024:
            shared += f", MORE THAN {report.target} HAS: it cannot be launched"
        table.setdefault(k.function, []).append(
            f"    {k.form:<9} {k.registers} registers, {spills}, {shared}   {tiles}, {warps} ({k.steps[0]})")
    return table


# ---- layers folded -------------------------------------------------------------------------------------------------------------


def fold(module) -> list[Run]:
    """A step's launches with layers that repeat folded into one run. What several layers read stands outside of them."""
    groups: list[Run] = []
    for launch, layer in layers_of(module):
        if not groups or groups[-1].name != layer:
            groups.append(Run(layer, []))
        groups[-1].launches.append(launch)
    keys = [(bool(run.name), tuple(launch.function for launch in run.launches)) for run in groups]
    runs, at = [], 0
    while at < len(groups):
        repeats = {period: count_repeats(keys, at, period) for period in range(1, 9)}
        period = max(repeats, key=lambda p: (repeats[p] > 1) * p * repeats[p] - p / 16)
        stem = re.sub(r"\.?\d+$", "", groups[at].name)
        for run in groups[at:at + period]:
            alone = repeats[period] == 1
            name = run.name if alone else stem if period == 1 else f"{run.name} and every {ordinal(period)} layer from there"
            runs.append(Run(name, run.launches, repeats[period]))
        at += period * repeats[period]
    return runs


def layers_of(module) -> list[tuple]:
    """(launch, its layer's path), "" for what belongs to none or is read by more than the layer after it."""
    def layer(kernel):
        match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", kernel.origin.path)
        return match.group() if match else ""

    readers: dict[Value, set[str]] = {}
    for launch in module.launches:
        for operand in launch.kernel.inputs:
            if operand.op == "get":
                readers.setdefault(operand.inputs[0], set()).add(layer(launch.kernel))
    return [(launch, "" if len(readers.get(launch.kernel, set()) - {layer(launch.kernel)}) > 1 else layer(launch.kernel))
            for launch in module.launches]


def count_repeats(keys, at: int, period: int) -> int:
    count = 1
    while keys[at:at + period] == keys[at + count * period:at + (count + 1) * period]:
        count += 1
    return count


# ---- refusals ------------------------------------------------------------------------------------------------------------------


def refusal_lines(compiled) -> list[str]:
    found = refusals(compiled)
    if not found:
        return []
    lines = ["", "Not fused, and why:"]
    for (value, user, why), count in found.items():
        times = f"   ×{count}" if count > 1 else ""
        lines += ["", f"  {value} → {user}{times}", *wrapped("because", why)]
    return lines


def refusals(compiled) -> dict[tuple[str, str, str], int]:
    """(from, to, why) -> how many layers. What starts a kernel anyway is left out."""
    table: dict[tuple[str, str, str], int] = {}
    homes = home_of_values(compiled.module)
    for refusal in compiled.graph.attrs.get("refusals", ()):
        value, user = refusal.value, refusal.user
        if refusal.why.endswith("a kernel of its own") or user.op == "via":
            continue
        home = homes.get((user.op, user.origin))
        why = refusal.why + (f"; {home} computes it" if home else "")
        key = (described(value), described(user), why)
        table[key] = table.get(key, 0) + 1
    return table


def home_of_values(module) -> dict[tuple, str]:
    """(op, origin) -> the kernel that computes it."""
    table: dict[tuple, str] = {}
    for launch in module.launches:
        for value in launch.kernel.attrs["body"].walk():
            if value.op not in ("input", "const"):
                table.setdefault((value.op, value.origin), launch.function)
    return table


def described(value: Value) -> str:
    """o_proj (llama.fuse:30)"""
    block = last_block(value.origin.path) if value.origin.path else value.op
    op = "" if value.op == "contract" else f"{value.op} of "
    where = f" ({Path(value.origin.file).name}:{value.origin.line})" if value.origin.line else ""
    return f"{op}{block}{where}"


# ---- words ---------------------------------------------------------------------------------------------------------------------


def plural(count: int, noun: str, many: str | None = None) -> str:
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def ordinal(n: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")


def amount(size: float) -> str:
    """Bytes for people: decimal units, three digits."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000


def wrapped(label: str, text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent=f"    {label:<9} ", subsequent_indent=" " * 14)
