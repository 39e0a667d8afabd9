"""Generated kernels of every example, under Triton's interpreter, against float64."""

import pytest
from interpret import INTERPRETED, run_interpreted

if INTERPRETED:
    import torch
    from program_checks import TINY, check

    from fusec.runtime.triton_program import TritonProgram

    def interpreted(compiled, loader):
        compiled.module.program_py = compiled.module.program_py.replace(", launch_pdl=PDL", "").replace("**launch.options", "num_warps=4")
        return TritonProgram(compiled, loader, loader.dtype, torch.device("cpu"), max_tokens=80)

    @pytest.mark.parametrize("example", TINY)
    def test_program(example):
        report = check(example, TINY[example], dtype=torch.float32, device="cpu", make_program=interpreted)
        assert report.worst < 2e-5, report
else:

    def test_interpreted():
        run_interpreted(__file__)
