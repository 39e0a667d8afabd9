"""Heads that draw tokens themselves, in every form: one row, streams of tiles, tensor cores, and the vendor's matmul."""

import pytest
import torch
from drawing_checks import check_drawing, decode_batch
from program_checks import EXAMPLES, TINY, Shared

from fusec.compiler import compile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

WIDE = {"hidden_size": 128, "vocab_size": 5000, "num_hidden_layers": 1}


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gpt2"])
def program(request):
    from fusec.runtime.triton_program import TritonProgram

    config = TINY[request.param] | (WIDE if request.param != "gpt2" else {})
    compiled = compile(EXAMPLES / f"{request.param}.fuse", config, dtype="bfloat16")
    loader = Shared(0, torch.bfloat16, torch.device("cuda"), torch.bfloat16)
    return TritonProgram(compiled, loader, torch.bfloat16, torch.device("cuda"), max_tokens=400)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("count", [1, 3, 16, 31, 64, 100, 260, 400])
def test_tokens(program, count, noise):
    for seed in range(4):
        check_drawing(program, count, noise, seed)


def test_rows_that_are_not_numbers(program):
    (name,) = [name for name in program.weights if "embed" in name or "wte" in name]
    kept = program.weights[name].clone()
    try:
        for count in (3, 31, 100):
            batch = decode_batch(count, program.vocab_size, "cuda", 0)
            program.weights[name].copy_(kept)[batch.ids[1].long()] = torch.nan
            assert check_drawing(program, count, noise=True)[1] == -1
    finally:
        program.weights[name].copy_(kept)
