"""Generated kernels of every example, under Triton's interpreter, against float64."""

import pytest
from interpret import INTERPRETED, run_interpreted
from program_checks import TINY

if INTERPRETED:
    import torch
    from program_checks import check

    from fusec.codegen import schedule
    from fusec.runtime.triton_program import TritonProgram

    def interpreted(compiled, loader):
        text = compiled.module.program_py.replace(", launch_pdl=PDL", "").replace("**launch.options", "num_warps=4")
        compiled.module.program_py = text
        return TritonProgram(compiled, loader, loader.dtype, torch.device("cpu"), max_tokens=80)

    @pytest.mark.parametrize("example", ["llama", "qwen2", "gemma2"])
    def test_vendor(example, monkeypatch):
        """With the vendor's matmul from 17 tokens on, prefill takes it."""
        monkeypatch.setattr("fusec.codegen.schedule.VENDOR_FROM", 16)
        monkeypatch.setattr("fusec.codegen.schedule.skinny", lambda *shape, all=schedule.skinny: all(*shape)[:1])
        report = check(example, TINY[example], dtype=torch.float32, device="cpu", make_program=interpreted)
        assert report.worst < 2e-5, report

    @pytest.mark.parametrize("example", TINY)
    def test_program(example):
        report = check(example, TINY[example], dtype=torch.float32, device="cpu", make_program=interpreted)
        assert report.worst < 2e-5, report
else:

    EXAMPLES = list(TINY)

    @pytest.mark.parametrize("some", [EXAMPLES[i::3] for i in range(3)], ids=" ".join)
    def test_interpreted(some):
        """A few examples a process, so that workers share them."""
        run_interpreted(__file__, " or ".join(some))
