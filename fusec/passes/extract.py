"""Cutting a region out of a graph: the values a kernel computes become its body, what they read becomes its inputs."""

from __future__ import annotations

import keyword

from ..ir.graph import Graph, Value, replace
from ..ir.ops import make
from .analysis import RUNTIME, cone

# What generated code calls things of its own.
TAKEN = set(
    "a arrivals b block blocks c d decode_launch draw g i kernel kernels launch libdevice m out own partial prefill_launch "
    "product sequences share_memory slots stats step tiles tl torch triton w".split()
)


def free(label: str) -> str:
    """`label`, with an underscore behind it where generated Python could not use it: a field may well be called `out`."""
    return f"{label}_" if label in TAKEN or keyword.iskeyword(label) else label


def extract(name: str, outputs, is_leaf) -> tuple[Graph, list[Value]]:
    """(body, leaves): a closed graph that computes `outputs`, with one input per leaf, and the values those inputs stand for.

    `is_leaf(value)` says what the region reads from outside. Inputs are named after what they hold, so that kernels of like
    layers come out alike.
    """
    inside, seen = [], set()
    for output in outputs:
        for value in cone(output, lambda v: v in seen or is_leaf(v) and v not in outputs):
            seen.add(value)
            inside.append(value)
    members = set(inside)
    new: dict[Value, Value] = {}
    leaves, names = [], {}
    for value in inside:
        for operand in value.inputs:
            if operand not in members and operand not in new:
                label = unique(names, free(leaf_name(operand)))
                new[operand] = make("input", name=label, dtype=operand.dtype, dims=operand.dims, origin=operand.origin)
                leaves.append(operand)
        new[value] = replace(value, inputs=tuple(new[i] for i in value.inputs))
    return Graph(name, tuple(new[leaf] for leaf in leaves), tuple(new[o] for o in outputs)), leaves


def unique(names: dict[str, int], label: str) -> str:
    names[label] = names.get(label, 0) + 1
    return label if names[label] == 1 else f"{label}_{names[label]}"


def leaf_name(value: Value) -> str:
    """What a reader would call it: an input's name, a weight's block, the op that made it."""
    if value.op == "input":
        return value.attrs["name"]
    if value.op == "weight":
        return block_name(value.attrs["key"])
    if value.op == "get":
        body = value.inputs[0].attrs["body"]
        return result_name(body.outputs[value.attrs["index"]])
    if not set(value.names) & set(RUNTIME):
        weights = [v for v in cone(value, lambda v: False) if v.op == "weight"]
        names = [block_name(v.attrs["key"]) for v in weights if len(v.dims) > 1 or len(value.dims) == 1]
        return joined_name(names) or ("table" if value.dims else "constant")
    return result_name(value)


def block_name(key: str) -> str:
    """model.layers.3.mlp.gate_proj.weight -> gate_proj (a bias keeps its own name: q_proj_bias)."""
    parts = [p for p in key.split(".") if not p.isdigit() and p != "{}"]
    block = parts[-2] if len(parts) > 1 else parts[-1]
    return block if parts[-1] == "weight" else f"{block}_{parts[-1]}"


def joined_name(names) -> str:
    """gate_proj, up_proj -> gate_up_proj."""
    names = list(dict.fromkeys(names))
    tails = {n.rpartition("_")[2] for n in names}
    if len(names) > 1 and len(tails) == 1 and all("_" in n for n in names):
        return "_".join(n.rpartition("_")[0] for n in names) + "_" + tails.pop()
    return "_".join(names)


def result_name(value: Value) -> str:
    """A short name for a kernel's result, after the value that computes it."""
    if value.op == "cache":
        name = value.attrs["name"].rpartition(".")[2]
        return name if "cache" in name else f"{name}_cache"
    while value.op in ("cast", "join") and value.inputs:
        value = value.inputs[0]
    if value.op in ("cos", "sin", "rsqrt", "max", "mean", "sum"):
        return value.op
    return {"via": "attended"}.get(value.op, "x")
