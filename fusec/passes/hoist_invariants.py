"""hoist_invariants: what depends on positions alone is computed once a step, by a kernel of its own.

    before   %c1 = cos(mul(%pos, %freqs))  (read by every layer)        after   %t = kernel(%pos, %freqs) kind="rows" …
                                                                                 %c1 = get(%t) index=0

Two reads make it worth a launch: without this, every layer's kernels would compute the same sines again. (What depends on
weights alone needs no pass: it is computed when the model is loaded.)
"""

from __future__ import annotations

from ..ir.graph import Graph, T, Value, rewrite
from ..ir.ops import OPS, make
from .analysis import statics
from .extract import extract


def hoist_invariants(graph: Graph) -> Graph:
    static = statics(graph)
    invariant: set[Value] = set()
    for value in graph.walk():
        if (
            value.op == "input"
            or value in static
            or OPS[value.op].kind in ("elementwise", "movement")
            and value.op not in ("gather", "top")
            and all(i in invariant for i in value.inputs)
        ):
            invariant.add(value)
    users = graph.users()
    roots = [
        v
        for v in graph.walk()
        if v in invariant
        and v not in static
        and v.op != "input"
        and T in v.dims
        and len(v.dims) > 1
        and sum(u not in invariant for u in users.get(v, ())) > 1
    ]
    if not roots:
        return graph
    body, leaves = extract("positions", roots, lambda v: v.op == "input" or v in static and v.op != "const")
    kernel = make("kernel", *leaves, kind="rows", name="positions", body=body, dtype="x", dims=(), origin=roots[0].origin)
    results = {
        root: make("get", kernel, index=i, dtype=root.dtype, dims=root.dims, origin=root.origin) for i, root in enumerate(roots)
    }
    return rewrite(graph, lambda value, inputs: results.get(value))
