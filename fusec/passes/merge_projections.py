"""merge_projections: contractions that share an input become one, and its result is split.

    before   %q = contract(%x, %wq) over=("D",)         after   %w = join(%wq, %wk, %wv) dim="G*R*K + G*K + G*K" …
             %k = contract(%x, %wk) over=("D",)                 %c = contract(%x, %w) over=("D",)
             %v = contract(%x, %wv) over=("D",)                 %q = split(%c) …   %k = split(%c) …   %v = split(%c) …

Rule 2 of the language read backwards: what a checkpoint stores as three matrices is, to the kernel, one with a sum axis. The
join is over weights alone, so it is done once, when they are loaded.
"""

from __future__ import annotations

import math

from ..ir.graph import Graph, Value, rewrite
from ..ir.ops import make
from .analysis import RUNTIME, statics


def merge_projections(graph: Graph) -> Graph:
    static = statics(graph)
    shared: dict[tuple, list[Value]] = {}
    for value in graph.walk():
        if value.op == "contract" and value.inputs[1] in static and value.inputs[0] not in static:
            x, w = value.inputs
            rows = tuple(n for n in x.names if n not in value.attrs["over"])
            if all(n in RUNTIME for n in rows) and all(n in value.attrs["over"] for n in w.names if n in x.names):
                shared.setdefault((x, value.attrs["over"], value.dtype), []).append(value)
    merged = {value: group for group in shared.values() if len(group) > 1 for value in group}
    joined: dict[tuple, Value] = {}

    def rule(value: Value, inputs):
        if value not in merged:
            return None
        group = merged[value]
        over = value.attrs["over"]
        views, offset = [], 0
        for member in group:
            dims = [d for d in member.inputs[1].dims if d.name not in over]
            strides = tuple(math.prod(d.size for d in dims[i + 1 :]) for i in range(len(dims)))
            views.append((dims, strides, offset))
            offset += math.prod(d.size for d in dims)
        name = " + ".join("*".join(d.name for d in dims) for dims, _, _ in views)
        if group[0] not in joined:
            weight = make(
                "join",
                *[member.inputs[1] for member in group],
                dim=name,
                size=offset,
                parts=tuple((tuple(d.name for d in dims), strides, at) for dims, strides, at in views),
                origin=group[0].origin,
            )
            joined[group[0]] = make("contract", inputs[0], weight, over=over, origin=group[0].origin)
        dims, strides, at = views[group.index(value)]
        return make(
            "split",
            joined[group[0]],
            dim=name,
            into=tuple(d.name for d in dims),
            sizes=tuple(d.size for d in dims),
            strides=strides,
            offset=at,
            origin=value.origin,
        )

    return rewrite(graph, rule)
