"""What a kernel must move and compute at the least: the floor that its time is held against.

Every weight is read once, every activation read and written once, the history of each sequence read once. Caches between
memory and the multiprocessors can only make a step faster than this says where a kernel's inputs were just written, and then
by little."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.graph import Graph, Value
from ..passes.analysis import RUNTIME, cone

BANDWIDTH = 4545.0  # GB/s: what a plain reduction over 4 GiB reads on an H200


@dataclass(frozen=True)
class Step:
    """The size of one step: packed tokens, the sequences they belong to, and the context of each sequence after the step."""

    tokens: int = 1
    sequences: int = 1
    context: int = 512

    def length(self, dim) -> int:
        """How long a dim is in this step. N, the rows whose logits are wanted, is one a sequence; S is the history of all of
        them."""
        return (
            dim.size
            if dim.size is not None
            else {"T": self.tokens, "T'": self.sequences, "S": self.sequences * self.context}[dim.name]
        )

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that a causal mask keeps; queries are the last tokens of their sequences."""
        queries = self.tokens / self.sequences
        return round(self.sequences * queries * (self.context - (queries - 1) / 2))


@dataclass(frozen=True)
class Traffic:
    """Bytes by what they are, and floating-point operations (a multiply-add counts two) of one launch or of several."""

    weights: int = 0
    history: int = 0
    reads: int = 0
    writes: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.history + self.reads + self.writes

    def floor_us(self, bandwidth: float = BANDWIDTH) -> float:
        """Microseconds that moving these bytes takes at `bandwidth` GB/s."""
        return self.bytes / bandwidth / 1e3

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.weights + other.weights,
            self.history + other.history,
            self.reads + other.reads,
            self.writes + other.writes,
            self.flops + other.flops,
        )


def traffic(kernel: Value, step: Step, dtype: str = "bfloat16") -> Traffic:
    """The traffic of one `kernel` value. A table that rows are looked up in counts the rows, not the table."""
    body: Graph = kernel.attrs["body"]
    inside = [v for output in body.outputs for v in cone(output, lambda v: v.op == "input")]
    weights = history = reads = writes = 0
    for operand, value in zip(kernel.inputs, body.inputs, strict=True):
        users = [u for u in inside if value in u.inputs]
        if not users:  # read by another kernel's account (see passes/inline_heads.py)
            continue
        if all(u.op == "gather" and u.inputs[0] is value for u in users):
            dim = users[0].attrs["dim"]
            dims = [*users[0].inputs[1].dims, *(d for d in value.dims if d.name != dim)]
        else:
            dims = value.dims
        size = math.prod(map(step.length, dims)) * itemsize(value, dtype)
        if not any(d.name in RUNTIME for d in operand.dims):
            weights += size
        elif any(d.name == "S" for d in dims):
            history += size
        else:
            reads += size
    for output in body.outputs:
        dims = output.inputs[0].dims if output.op == "cache" else output.dims
        writes += math.prod(map(step.length, dims)) * itemsize(output, dtype)
    return Traffic(weights, history, reads, writes, sum(flops(v, step) for v in inside))


def total(graph: Graph, step: Step) -> Traffic:
    """The traffic of a whole step of a graph of kernels."""
    dtype = graph.attrs.get("dtype", "bfloat16")
    return sum((traffic(v, step, dtype) for v in graph.walk() if v.op == "kernel"), Traffic())


def flops(value: Value, step: Step) -> int:
    """Operations of a contraction (of those inside a template's body, too); elementwise work is not counted."""
    if value.op == "via":
        return sum(flops(v, step) for v in value.attrs["body"].walk())
    if value.op != "contract":
        return 0
    dims = {d.name: d for operand in value.inputs for d in operand.dims}
    if "T" in dims and "S" in dims:
        return 2 * step.pairs * math.prod(d.size for d in dims.values() if d.size is not None)
    return 2 * math.prod(map(step.length, dims.values()))


def itemsize(value: Value, dtype: str) -> int:
    return {"x": 4 if dtype == "float32" else 2, "bool": 1}.get(value.dtype, 4)
