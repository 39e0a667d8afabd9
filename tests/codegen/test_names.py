"""A program's fields may be called what generated code calls things of its own, or what Python reserves."""

import ast
import re

import pytest
from program_checks import EXAMPLES

from fusec.compiler import compile

NAMES = ("out", "lambda", "product", "stats", "a", "step", "kernels", "torch", "m")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["o_proj", "gate_proj", "down_proj", "input_layernorm"])
def test_field(field, name):
    source = re.sub(rf"\b{field}\b", name, (EXAMPLES / "llama.fuse").read_text(encoding="utf-8"))
    module = compile(source, {"num_hidden_layers": 1, "tie_word_embeddings": False}).module
    for text in (module.kernels_py, module.program_py):
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            taken = {"out", "a", "torch", "triton", "kernels", "product", "stats"}
            names = [argument.arg for argument in function.args.args]
            assert len(set(names)) == len(names)
            assert function.name not in taken | {"step"} or function.name == "step" and names == ["m", "b"]
    weights = {line.split("def ")[1].split("(")[0]: line for line in module.program_py.splitlines() if line.startswith("def ")}
    assert all(line.count(" out,") + line.count(" out)") <= 1 for line in weights.values())
