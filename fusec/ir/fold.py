"""Layers that repeat, shown once: what `print_graph(graph, fold_layers=True)` prints of a model of many layers."""

from __future__ import annotations

import re

from .graph import Graph, Value
from .text import literal, print_graph


def fold(order):
    """Runs of values and a note after each: of layers that repeat, the first period is a run, the note counts the others."""
    groups, shared = _layers(order)
    place = {value: i for i, value in enumerate(v for _, values in groups for v in values if v not in shared)}
    layer_of = {value: layer for layer, values in groups for value in values}
    keys, start = [], 0
    for layer, values in groups:  # layers are alike if their values are, with operands counted from where the layer starts
        keys.append((_stem(layer) if layer else object(), *(
            (v.op, v.dtype, v.dims, _anonymous(v, layer),
             *(place[i] - start if i in place and (layer_of[i] or place[i] == start - 1) else i for i in v.inputs))
            for v in values)))
        start += sum(v not in shared for v in values)

    at = 0
    while at < len(groups):
        periods = {p: _repeats(keys, at, p) for p in range(1, 9)}
        period = max(periods, key=lambda p: (periods[p] > 1) * p * periods[p] - p / 16)
        count = periods[period]
        for _, values in groups[at:at + period - 1]:
            yield values, ""
        end = groups[at + period * count - 1][0]
        noun = "" if period == 1 else f" the last {period} layers,"
        yield groups[at + period - 1][1], "" if count == 1 else f"… ×{count - 1}{noun} to {end}"
        at += period * count


def _layers(order) -> tuple[list[tuple[str, list[Value]]], set[Value]]:
    """Program order cut into layers, stretches whose path starts with the same stack index (`model.layers.3`), "" between them;
    and what several layers share, such as rope's angles: it goes in front of the first. Values of no path belong to the layer
    they stand in.
    """
    layer_of, users, layer = {}, {}, ""
    for value in order:
        match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", value.origin.path)
        layer = layer_of[value] = match.group() if match else "" if value.origin.path else layer
        for operand in value.inputs:
            users.setdefault(operand, []).append(value)
    shared = set()
    for value in reversed(order):
        readers = users.get(value, ())
        own = [user for user in readers if user not in shared]
        if len({layer_of[user] for user in own} - {layer_of[value]}) > 1 or readers and not own:
            shared.add(value)

    groups: list[tuple[str, list[Value]]] = [("", [])]
    for value in order:
        layer = layer_of[value]
        if value in shared:
            if groups[-1][0] and (len(groups) < 2 or groups[-2][0]):
                groups.insert(-1, ("", []))
            groups[-2 if groups[-1][0] else -1][1].append(value)
            continue
        if groups[-1][0] != layer:
            groups.append((layer, []))
        groups[-1][1].append(value)
    return groups, shared


def _stem(layer):
    return re.sub(r"\d+$", "", layer)


def _anonymous(value, layer):
    """The attributes of `value` as text that does not tell which layer it belongs to."""
    text = print_graph(value.attrs["body"], origins=False) if isinstance(value.attrs.get("body"), Graph) else ""
    text += literal({k: v for k, v in sorted(value.attrs.items()) if not isinstance(v, Graph)})
    return text.replace(layer, _stem(layer) + "*") if layer else text


def _repeats(keys, at, period):
    count = 1
    while keys[at:at + period] == keys[at + count * period:at + (count + 1) * period]:
        count += 1
    return count
