"""inline_heads: what a row kernel makes of the heads for attention alone, decode attention makes itself.

    before   %3 = kernel(%q, %k, …) kind="rows"             after   %3 = kernel(%q, %k, …) kind="rows" inlined=True
             %6 = kernel(%4, %5, %v, …) kind="attention"            %6 = kernel(%4, %5, %v, …, %q, %k, …) kind="attention" heads=4

A norm over each head (Qwen 3, Gemma 3), and the rotation after it, stand between a projection and attention, and are a launch of
their own: their reduction is over what the projection's tiles divide. When each sequence has one token, the programs of a
sequence and kv head make those few rows themselves, all the same ones, before they read them; only steps with more tokens
launch the row kernel. So attention reads what the row kernel reads, and memory is planned for that: its inputs from number
`heads` on are the row kernel's.
"""

from __future__ import annotations

from ..ir.graph import Graph, S, T, Value, replace, rewrite
from ..ir.ops import OPS
from .analysis import cone


def inline_heads(graph: Graph) -> Graph:
    users = graph.users()
    found: dict[Value, Value] = {}  # row kernel -> the attention that it works for
    for attention in graph.walk():
        if attention.op == "kernel" and attention.attrs["kind"] == "attention":
            makers = {i.inputs[0] for i in attention.inputs if i.op == "get" and i.inputs[0].attrs["kind"] == "rows"}
            for rows in makers if len(makers) == 1 else ():
                results = users[rows]
                mine = all(users.get(result) == [attention] and result not in graph.outputs for result in results)
                if mine and by_head(rows, heads_of(attention)):
                    found[rows] = attention
    inlined = set(found.values())

    def rule(value: Value, inputs) -> Value | None:
        if value in found:
            return replace(value, inputs=inputs, attrs=value.attrs | {"inlined": True})
        if value not in inlined:
            return None
        rows = made_in_decode(inputs)[0].inputs[0]
        body = value.attrs["body"]
        taken = [i.attrs["name"] for i in body.inputs]
        more = []
        for theirs in rows.attrs["body"].inputs:
            name = f"of_{theirs.attrs['name']}"
            while name in taken:
                name += "_"
            taken.append(name)
            more.append(replace(theirs, attrs=theirs.attrs | {"name": name}))
        wider = Graph(body.name, (*body.inputs, *more), body.outputs, body.attrs)
        return replace(value, inputs=(*inputs, *rows.inputs), attrs=value.attrs | {"body": wider, "heads": len(inputs)})

    return rewrite(graph, rule)


def made_in_decode(operands) -> list[Value]:
    """Those of an attention kernel's own operands that decode attention makes itself: results of one row kernel."""
    return [i for i in operands if i.op == "get" and i.inputs[0].attrs.get("inlined")]


def heads_of(attention: Value):
    """The dim of an attention kernel's kv heads: the first after the history of what it caches."""
    cached = next(i for i in attention.inputs if S in i.dims)
    return next(d for d in cached.dims if d != S)


def by_head(rows: Value, heads) -> bool:
    """Whether each result of a row kernel is made of reductions over rows of one token and one of `heads`."""
    for output in rows.attrs["body"].outputs:
        value = output.inputs[0] if output.op == "cache" else output
        reductions = [v for v in cone(value, lambda v: v.op == "input") if OPS[v.op].kind == "reduction"]
        if not reductions or reductions[-1].dims[:2] != (T, heads):
            return False
    return True
