"""Norms and activations that the compiler has never heard of, written by a user: fused as Llama's own, and numerically right."""

import pytest
from interpret import INTERPRETED, run_interpreted
from program_checks import EXAMPLES, TINY

LLAMA = (EXAMPLES / "llama.fuse").read_text(encoding="utf-8")

SQUARED_RELU = "op bend(x) = maximum(x, 0)^2 * sigmoid(x)\n\n"
MEAN_ABS = """\
block Norm[I, eps](x: [.., I])                     # scaled by the mean size of an entry
  gain : [I]
  h = f32(x)
  gain * (h / (mean[I](abs(h)) + eps) as x)

"""
CENTRED = """\
block Norm[I, eps](x: [.., I])                     # the mean taken away, then scaled by the largest entry
  gain : [I]
  h = f32(x) - mean[I](f32(x))
  gain * (h / (max[I](abs(h)) + eps) as x)

"""
NORMS = {"mean of |x|": MEAN_ABS, "centred": CENTRED}


def program(norm) -> str:
    """Llama, but for its norm and its activation."""
    text = LLAMA.replace("RMSNorm[", "Norm[").replace("silu(", "bend(")
    at = text.index("block Attention")
    return text[:at] + SQUARED_RELU + norm + text[at:]


if INTERPRETED:
    import torch
    from program_checks import check
    from test_programs import interpreted

    @pytest.mark.parametrize("norm", NORMS)
    def test_numerics(norm):
        where = dict(dtype=torch.float32, device="cpu", make_program=interpreted)
        report = check("llama", TINY["llama"], source=program(NORMS[norm]), **where)
        assert report.worst < 2e-5, report
else:
    from fusec.compiler import compile

    def test_interpreted():
        run_interpreted(__file__)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_same_kernels_as_llama(norm):
        ours, theirs = (compile(source, TINY["llama"]).module for source in (program(NORMS[norm]), LLAMA))
        assert [n.function for n in ours.launches] == [n.function for n in theirs.launches]
        merged = next(n.kernel.attrs["body"] for n in ours.launches if n.function == "q_k_v_proj")
        found = [v.op for v in merged.walk()]
        assert found.count("contract") == 1 and found.count("cache") == 2
        assert found.count("max" if "max" in NORMS[norm] else "mean") == 1
        gate_up = next(n.kernel.attrs["body"] for n in ours.launches if n.function == "gate_up_proj")
        assert {"maximum", "exp"} <= {v.op for v in gate_up.walk()} and len(gate_up.outputs) == 1

    def test_the_user_s_lines_stand_above_the_kernels():
        text = compile(program(MEAN_ABS), TINY["llama"]).module.kernels_py
        assert "gain * (h / (mean[I](abs(h)) + eps) as x)" in text
