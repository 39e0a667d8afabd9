"""A program against a checkpoint: it serves the architecture, and every tensor it names is there with its shape, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from ..diagnostics import Diagnostic, Label, Source, Span, nearest
from ..ir.graph import Graph, Origin, Value
from . import examples, syntax

# Tensors that some checkpoints carry and that hold no parameter: rope tables, causal masks, quantisation leftovers.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|rope_freqs\.weight|attn\.(masked_)?bias|position_ids)$")


def check_architecture(program: syntax.Program, config: dict | None) -> list[Diagnostic]:
    """A warning where a program says what it serves and the config names none of that.  config: the keys of config.json."""
    serves = program.of(syntax.Serves)
    served = [name for line in serves for name in line.names]
    wanted = (config or {}).get("architectures")
    wanted = [name for name in wanted if isinstance(name, str)] if isinstance(wanted, list) else []
    if not served or not wanted or set(served) & set(wanted):
        return []
    span = serves[0].span
    here = Label(Span(span.source, span.start, span.start + len(span.text.rstrip())), "is what it was written for")
    shipped = [path.name for name, path in examples().items() if name in wanted]
    other = f"{shipped[0]} serves it" if shipped else "write a program for it"
    return [Diagnostic("FUS034", f"this program does not serve {', '.join(wanted)}", here, level="warning",
                       hint=f"{other}; if this one computes the same, add the name to its serves line")]


def expected(graph: Graph) -> dict[str, Value]:
    """Checkpoint key -> a weight value that reads it. A stacked key stands for one tensor per member."""
    found = {}
    for value in graph.walk():
        if value.op == "weight":
            key = value.attrs["key"]
            members = [key.replace("{}", str(i)) for i in range(value.attrs["shape"][0])] if "{}" in key else [key]
            for member in members:
                found.setdefault(member, value)
    return found


def stored_shape(value: Value) -> tuple[int, ...]:
    """The shape of one checkpoint tensor that a weight reads."""
    return tuple(value.attrs["shape"][1:] if "{}" in value.attrs["key"] else value.attrs["shape"])


def check_checkpoint(graph: Graph, shapes: dict[str, tuple[int, ...]], name: str = "the checkpoint") -> list[Diagnostic]:
    """What is missing from a checkpoint, left over in it, or of another shape.

    shapes: the checkpoint's keys and the shapes of its tensors.  name: what to call it.  A head that is left over because the
    program ties it to the embedding is not reported.
    """
    wanted = expected(graph)
    missing = [key for key in wanted if key not in shapes]
    if wanted and len(missing) == len(wanted):  # one fact, not a list of every name on both sides
        return [Diagnostic("FUS070", f"{name} has none of the program's tensors", hint="the program is for another architecture",
                           notes=(f"the program reads {_some(wanted)}", f"{name} holds {_some(shapes)}"))]
    spare = [key for key in shapes if key not in wanted and not _BUFFERS.search(key)]
    found = []
    for key in _folded(missing):
        near = nearest(key, spare)
        found.append(Diagnostic("FUS070", f"{name} has no tensor {key}",
                                _label(wanted[key], f"needs {list(stored_shape(wanted[key]))}"),
                                hint=f"did you mean {near}?" if near else None, notes=_same_elsewhere(key, missing)))
    for key, value in wanted.items():
        shape = stored_shape(value)
        if key in shapes and tuple(shapes[key]) != shape:
            found.append(Diagnostic("FUS072", f"{key} has another shape", _label(value, f"is {list(shape)} here"),
                                    notes=(f"{name} holds {list(shapes[key])}",),
                                    hint="is the config of this checkpoint, and is the program for its architecture?"))
    for key in _folded(spare):
        if key.startswith("lm_head."):
            continue
        near = nearest(key, missing)
        found.append(Diagnostic("FUS071", f"{name} holds {key}, which the program never reads", None,
                                hint=f"did you mean {near}?" if near else "the program may be for another architecture",
                                notes=(f"its shape is {list(shapes[key])}", *_same_elsewhere(key, spare))))
    return found


def _folded(keys: list[str]) -> list[str]:
    """One key for all layers that differ only in their number."""
    first = {}
    for key in keys:
        first.setdefault(_pattern(key), key)
    return list(first.values())


def _some(keys) -> str:
    """The first few of many keys."""
    shown = list(keys)[:3]
    return ", ".join([*shown, "…"] if len(keys) > len(shown) else shown) or "nothing"


def _pattern(key: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", key)


def _same_elsewhere(key: str, keys: list[str]) -> tuple[str, ...]:
    others = sum(_pattern(k) == _pattern(key) for k in keys) - 1
    return (f"and {others} more like it, {_pattern(key)}",) if others else ()


def _label(value: Value, text: str) -> Label | None:
    """Underlines the field that a weight belongs to, where its file can be read."""
    origin: Origin = value.origin
    try:
        source = Source(origin.file, Path(origin.file).read_text(encoding="utf-8"))
        line = source.line(origin.line)
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    start = sum(len(source.line(n)) + 1 for n in range(1, origin.line)) + origin.column - 1
    return Label(Span(source, start, start + len(line.split("#")[0].rstrip()) - origin.column + 1), text)
