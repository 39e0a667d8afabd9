"""plan_memory: every stored result gets an address in one arena, by liveness.

    before   %9 = get(%8) index=0 : x[T, D]              after   %9 = get(%8) index=0 offset=8192 : x[T, D]

Addresses are bytes per token: a result of n bytes a token at offset o lies at `o · max_tokens`, so that addresses are fixed
for any step (what CUDA graphs need). Caches are not in the arena; neither are the graph's outputs, which the caller keeps.
"""

from __future__ import annotations

import math

from ..ir.graph import Graph, Value, replace, rewrite

ALIGN = 16  # bytes per token; with an even number of tokens every address allows 16-byte loads
BYTES = {"x": 2, "f32": 4, "int": 4, "bool": 1}


def plan_memory(graph: Graph) -> Graph:
    order = graph.walk()
    kernels = [v for v in order if v.op == "kernel"]
    step = {kernel: i for i, kernel in enumerate(kernels)}
    last: dict[Value, int] = {}
    for kernel in kernels:
        for operand in kernel.inputs:
            if operand.op == "get":
                last[operand] = step[kernel]
    gets = {}
    for value in order:
        if value.op == "get" and value not in graph.outputs and not any(d.name == "S" for d in value.dims):
            gets.setdefault(step[value.inputs[0]], []).append(value)
    width = 4 if graph.attrs.get("dtype") == "float32" else 2
    live: list[tuple[int, int, int]] = []  # (offset, end, last step)
    offsets, high = {}, 0
    for i in range(len(kernels)):
        live = [slot for slot in live if slot[2] >= i]
        for value in gets.get(i, ()):
            numel = math.prod(d.size for d in value.dims if d.size is not None)
            size = -(-numel * (width if value.dtype == "x" else BYTES[value.dtype]) // ALIGN) * ALIGN
            offset = 0
            for start, end, _ in sorted(live):
                if offset + size <= start:
                    break
                offset = max(offset, end)
            offsets[value] = offset
            live.append((offset, offset + size, last.get(value, i)))
            high = max(high, offset + size)
    planned = rewrite(
        graph,
        lambda value, inputs: (
            replace(value, inputs=inputs, attrs=value.attrs | {"offset": offsets[value]}) if value in offsets else None
        ),
    )
    return Graph(planned.name, planned.inputs, planned.outputs, planned.attrs | {"arena": high})
