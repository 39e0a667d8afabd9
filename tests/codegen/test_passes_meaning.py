"""Every pass keeps a program's meaning: the float64 interpreter gives the same logits before and after each."""

import pytest
import torch
from program_checks import EXAMPLES, TINY

from fusec.compiler import compile
from fusec.ir.interpreter import evaluate
from fusec.runtime.weights import RandomWeights


@pytest.mark.parametrize("example", TINY)
def test_pipeline(example):
    compiled = compile(EXAMPLES / f"{example}.fuse", TINY[example], keep_stages=True, verify=True)
    weights = RandomWeights(0, torch.float64, torch.device("cpu"))
    ids, pos, rows = torch.randint(0, 101, (11,)), torch.arange(11), torch.tensor([3, 10])
    exact = None
    for name, graph in compiled.stages:
        inputs = {"ids": ids, "pos": pos, "rows": rows}
        (out,) = evaluate(graph, {i.attrs["name"]: inputs[i.attrs["name"]] for i in graph.inputs}, weights)
        out = out if out.shape[0] == 2 else out[rows]
        exact = out if exact is None else exact
        assert torch.allclose(out, exact, rtol=1e-10, atol=1e-10), name
