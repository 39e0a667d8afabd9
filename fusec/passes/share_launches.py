"""share_launches: row kernels that wait for no other kernel become one launch.

    before   %e = kernel(%ids, %table) kind="rows" …        after   %k = kernel(%ids, %table, %pos, %freqs) kind="rows" …
             %p = kernel(%pos, %freqs) kind="rows" …                (their results, one after another)

They read nothing but the model's inputs and its weights, for the same tokens: the embedding, and the sines and cosines of the
positions. Each alone is a launch that leaves the GPU idle.
"""

from __future__ import annotations

from ..ir.graph import Graph, Value, replace, rewrite, substitute
from ..ir.ops import make
from .analysis import RUNTIME, statics
from .extract import joined_name, unique


def share_launches(graph: Graph) -> Graph:
    static = statics(graph)
    alike: dict[tuple, list[Value]] = {}
    for value in graph.walk():
        if value.op == "kernel" and value.attrs["kind"] == "rows" and all(i.op == "input" or i in static for i in value.inputs):
            outputs = value.attrs["body"].outputs
            alike.setdefault(tuple(sorted({n for o in outputs for n in o.names if n in RUNTIME})), []).append(value)
    places: dict[Value, tuple[Value, int]] = {}
    for kernels in alike.values():
        if len(kernels) > 1:
            shared, first = together(kernels), 0
            for kernel in kernels:
                places[kernel] = shared, first
                first += len(kernel.attrs["body"].outputs)

    def rule(value: Value, inputs) -> Value | None:
        if value.op != "get" or value.inputs[0] not in places:
            return None
        shared, first = places[value.inputs[0]]
        return replace(value, inputs=(shared,), attrs=value.attrs | {"index": first + value.attrs["index"]})

    return rewrite(graph, rule)


def together(kernels: list[Value]) -> Value:
    """One kernel that computes what `kernels` compute, its results in their order. What several read is one input."""
    names: dict[str, int] = {}
    inputs: dict[Value, Value] = {}  # what a kernel reads -> the body's input that stands for it
    outputs: list[Value] = []
    for kernel in kernels:
        body, mapping = kernel.attrs["body"], {}
        for parameter, operand in zip(body.inputs, kernel.inputs, strict=True):
            if operand not in inputs:
                attrs = parameter.attrs | {"name": unique(names, parameter.attrs["name"])}
                inputs[operand] = replace(parameter, attrs=attrs)
            mapping[parameter] = inputs[operand]
        outputs += substitute(body, mapping).outputs
    name = joined_name([kernel.attrs["name"] for kernel in kernels])
    body = Graph(name, tuple(inputs.values()), tuple(outputs))
    return make("kernel", *inputs, kind="rows", name=name, body=body, dtype="x", dims=(), origin=kernels[0].origin)
