"""Each pass on small graphs: one text file a pass, each case a title, the graph before, and the graph after.

    # title                 what the case shows
    graph …                 the graph before, in the text form of fusec.ir.text
    =>
    graph …                 the graph after; below it, what `fuse` refused and why

Every result is verified, and computes in float64 what the graph before it computes. `--update-golden` rewrites what follows `=>`.
"""

import re
from pathlib import Path

import pytest
import torch
from random_programs import random_arguments

from fusec import passes
from fusec.ir.graph import Graph
from fusec.ir.interpreter import evaluate
from fusec.ir.text import print_graph, read_graph
from fusec.ir.verify import verify

FOLDER = Path(__file__).parent
TITLE = re.compile(r"^# (.+)\n", re.MULTILINE)


def cases(path):
    """[(title, before, after)] of one file."""
    parts = TITLE.split(path.read_text(encoding="utf-8"))[1:]
    return [(title, *map(str.strip, body.partition("=>")[::2])) for title, body in zip(parts[::2], parts[1::2], strict=True)]


def shown(graph) -> str:
    """The graph, and beneath it a line for each refusal."""
    plain = Graph(graph.name, graph.inputs, graph.outputs, {k: v for k, v in graph.attrs.items() if k != "refusals"})
    lines = [f"refused: {r.user.op} where {r.value.op} is computed: {r.why}" for r in graph.attrs.get("refusals", ())]
    return "\n".join([print_graph(plain, origins=False).rstrip(), *dict.fromkeys(lines)])


CASES = [(path.stem, title) for path in sorted(FOLDER.glob("*.txt")) for title, _, _ in cases(path)]


def test_every_pass_has_cases():
    counts = {run.__name__: 0 for run in passes.PIPELINE}
    for name, _ in CASES:
        counts[name] += 1
    assert min(counts.values()) >= 3, counts


@pytest.mark.parametrize("name, title", CASES)
def test_case(name, title, request):
    path = FOLDER / f"{name}.txt"
    before, after = next((b, a) for t, b, a in cases(path) if t == title)
    given = read_graph(before)
    verify(given)
    result = getattr(passes, name)(given)
    verify(result, after=name)
    arguments, weight = random_arguments(given)
    names = [value.attrs["name"] for value in result.inputs]
    wanted = {name: arguments.get(name, torch.arange(5)) for name in names}  # rows: all of them, in order
    for got, want in zip(evaluate(result, wanted, weight), evaluate(given, arguments, weight), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    text = shown(result)
    if request.config.getoption("--update-golden"):
        whole = path.read_text(encoding="utf-8")
        start = whole.index(f"# {title}\n") + len(title) + 3
        end = start + (m.start() if (m := TITLE.search(whole[start:])) else len(whole[start:]))
        case = f"{before}\n=>\n{text}\n" + "\n" * (end < len(whole))
        path.write_text(whole[:start] + case + whole[end:], encoding="utf-8")
        return
    assert text == after, f"{path.name}: {title}; if the new graph is right, run pytest --update-golden"
