"""Every example at tiny sizes on the GPU: no further from float64 than 1.5 times what torch is in the same dtype."""

import pytest
import torch
from program_checks import TINY, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CASES = [(example, torch.bfloat16) for example in TINY] + [(example, torch.float16) for example in ("llama", "gemma2", "gpt2")]


def on_gpu(compiled, loader):
    from fusec.runtime.triton_program import TritonProgram

    program = TritonProgram(compiled, loader, loader.dtype, torch.device("cuda"), max_tokens=320)
    program.arena.fill_(255)  # what no kernel has written is NaN
    return program


@pytest.mark.parametrize("example, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_prefill_and_decode(example, dtype):
    """25 packed tokens, then one of each of three sequences, then one of one sequence, over pages of 4 and of 16 tokens."""
    block_size = 4 if dtype == torch.float16 else 16
    report = check(example, TINY[example], dtype=dtype, device="cuda", make_program=on_gpu, block_size=block_size)
    assert report.ours <= 1.5 * report.torch, report


@pytest.mark.parametrize("example", ["llama", "gemma2", "gpt2", "qwen2", "olmo2"])
def test_long_prefill(example):
    """281 packed tokens: the kernels for many."""
    config = TINY[example] | ({"n_positions": 256} if example == "gpt2" else {})
    report = check(example, config, dtype=torch.bfloat16, device="cuda", make_program=on_gpu, lengths=(150, 131), block_size=16)
    assert report.ours <= 1.5 * report.torch, report
