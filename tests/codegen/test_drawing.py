"""Heads that draw tokens themselves, under Triton's interpreter; tests/gpu has those that stream, and noise."""

import pytest
from interpret import INTERPRETED, run_interpreted
from program_checks import EXAMPLES, TINY, Shared

from fusec.compiler import compile

if INTERPRETED:
    import torch
    from drawing_checks import check_drawing

    from fusec.runtime.triton_program import TritonProgram

    def interpreted(example):
        compiled = compile(EXAMPLES / f"{example}.fuse", TINY[example], dtype="float32")
        text = compiled.module.program_py.replace(", launch_pdl=PDL", "").replace("**launch.options", "num_warps=4")
        compiled.module.program_py = text
        return TritonProgram(compiled, Shared(0, torch.float32, "cpu", torch.float32), torch.float32, torch.device("cpu"),
                             max_tokens=80)  # fmt: skip

    @pytest.mark.parametrize("count", [1, 3, 19, 70])
    @pytest.mark.parametrize("example", ["qwen3", "gemma2"])  # whose logits are capped
    def test_tokens(example, count):
        check_drawing(interpreted(example), count, noise=False)

    def test_rows_that_are_not_numbers():
        """A table of embeddings with a hole."""
        program = interpreted("qwen3")
        (name,) = [name for name in program.weights if "embed" in name]
        program.weights[name][:51] = torch.nan
        assert -1 in check_drawing(program, 19, noise=False)

else:

    def test_interpreted():
        run_interpreted(__file__)

    def test_what_is_not_a_head_does_not_draw():
        """Logits that something is done to across the vocabulary, after the last matrix."""
        source = (EXAMPLES / "llama.fuse").read_text(encoding="utf-8").replace("lm_head(norm(x))", "softmax[V](lm_head(norm(x)))")
        module = compile(source, {"num_hidden_layers": 1, "tie_word_embeddings": False}).module
        assert not module.draws and "keep_best" not in module.kernels_py and "def step(m, b):" in module.program_py
