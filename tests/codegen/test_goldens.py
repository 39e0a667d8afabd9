"""What the compiler writes, kept as files: read a change of one as code.

    goldens/<example>/kernels.py, program.py    the example at its published sizes, two layers
    goldens/ir/llama.<n>_<pass>.txt             a Llama of one layer after each pass
"""

import ast

import pytest
from program_checks import EXAMPLES

from fusec.compiler import compile
from fusec.ir.text import print_graph, read_graph, same

TRITON = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "gpt2")
TORCH_ONLY = ("mixtral", "qwen3_moe", "deepseek_v2")
TWO_LAYERS = {"num_hidden_layers": 2, "n_layer": 2}


def compiled(example):
    """At its published sizes, with tiles by the cost rule: tuning changes no golden."""
    return compile(EXAMPLES / f"{example}.fuse", TWO_LAYERS, gpu="untuned").module


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.fuse")} == {*TRITON, *TORCH_ONLY}


@pytest.mark.parametrize("example", TRITON)
def test_source(example, golden):
    module = compiled(example)
    for name, text in (("kernels.py", module.kernels_py), ("program.py", module.program_py)):
        ast.parse(text)
        wide = [line for line in text.splitlines() if len(line) > 130]
        assert not wide, f"{example}/{name}: lines of more than 130 columns, such as\n{wide[0]}"
        golden(f"goldens/{example}/{name}", text)


@pytest.mark.parametrize("example", TRITON)
def test_nothing_is_computed_in_vain(example):
    """Every name that a kernel assigns is read (but for the sizes that stand at its head)."""
    tree = ast.parse(compiled(example).kernels_py)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        written -= {"ROWS", "K", "LEAVES"}
        assert not written - read, f"{function.name} computes {', '.join(sorted(written - read))} in vain"
        parameters = {argument.arg for argument in function.args.args}
        unread = parameters - read - {"STAGES", "PDL", "GIVEN"}
        assert not unread, f"{function.name} takes {', '.join(sorted(unread))} and never reads it"


def test_two_compilations_write_the_same():
    first, second = (compiled("gemma2") for _ in range(2))
    assert (first.kernels_py, first.program_py) == (second.kernels_py, second.program_py)


def test_ir_after_each_pass(golden):
    compiled = compile(EXAMPLES / "llama.fuse", {"num_hidden_layers": 1}, keep_stages=True, verify=True)
    for i, (name, graph) in enumerate(compiled.stages):
        text = print_graph(graph)
        assert same(read_graph(text), graph, origins=True)
        golden(f"goldens/ir/llama.{i}_{name}.txt", text)
