"""Row reductions that the kernel which stores a value makes for the one that reads it: who hands what to whom.

Whether they are right is seen on a GPU (tests/gpu): streams are written in Gluon, which no interpreter runs.
"""

import re
from pathlib import Path

import pytest

from fusec import aot
from fusec.bench.shapes import MODELS
from fusec.compiler import compile
from fusec.runtime.triton_program import load_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LLAMA = MODELS["llama-3.1-8b"] | {"num_hidden_layers": 2}


def module(source="llama", config=LLAMA, **options):
    return compile(EXAMPLES / f"{source}.fuse" if source in ("llama", "gemma2", "gpt2") else source, config, **options).module


def calls(program_py, name):
    """The arguments of each call in `step`, by the names of the function's parameters."""
    names = re.search(rf"def {name}\(([^)]*)\):", program_py)[1]
    found = re.findall(rf"^    {name}\(([^)]*)\)", program_py[program_py.index("def step(") :], re.MULTILINE)
    return [dict(zip(re.split(r",\s*", names), re.split(r",\s*", each), strict=True)) for each in found]


def test_a_norm_is_summed_where_its_rows_are_stored():
    program = module().program_py
    assert [call["out_sums"] for call in calls(program, "o_proj")] == [f"{call['out']}_sums" for call in calls(program, "o_proj")]
    for maker, reader, first in (("o_proj", "gate_up_proj", 0), ("down_proj", "q_k_v_proj", 1)):
        made, found = calls(program, maker), calls(program, reader)[first:]
        assert found and [call["out_sums"] for call in made[: len(found)]] == [call["x_sums"] for call in found]
    assert calls(program, "lm_head")[0]["x_sums"] == calls(program, "down_proj")[-1]["out_sums"]


def test_like_kernels_are_one_whoever_stores_their_x():
    """The first layer reads the embedding, which leaves no sums."""
    program = module().program_py
    assert calls(program, "q_k_v_proj")[0]["x_sums"] == "m.no_sums" and "q_k_v_proj_2" not in program


def test_what_is_left_is_left_by_streams_alone():
    """Whoever launches another form says that there is none."""
    program = module().program_py
    body = re.search(r"def o_proj\(.*?(?=\ndef )", program, re.DOTALL)[0]
    assert body.split("\n")[1].strip() == "out_sums.parts = 0"
    streams = body.count("kernels.o_proj_stream[")
    assert streams and body.count("out_sums.parts = ") == 1 + streams
    assert "HANDED=x_sums.parts > 0 and b.every" in re.search(r"def lm_head\(.*?(?=\ndef )", program, re.DOTALL)[0]


def with_norm(norm):
    """Llama with another norm in the place of RMSNorm."""
    text = (EXAMPLES / "llama.fuse").read_text()
    own = f"block OwnNorm[D, eps](x: [T, D]) -> [T, D]\n  weight : [D]\n\n  {norm}\n\n"
    return text.replace("block ", own + "block ", 1).replace(": RMSNorm[", ": OwnNorm[")


SEVERAL = "x * rsqrt(mean[D](x * x) + sum[D](abs(x)) + max[D](x) + eps) * weight"


@pytest.mark.parametrize("norm, reduced", [
    ("x * rsqrt(mean[D](x * x) + eps) * weight", ["gl.sum(seen * seen, 0)"]),
    ("x / (max[D](abs(x)) + eps) * weight", ["gl.max(gl.abs(seen), 0)"]),
    (SEVERAL, ["gl.sum(seen * seen, 0)", "gl.sum(gl.abs(seen), 0)", "gl.max(seen, 0)"]),
])  # fmt: skip
def test_a_norm_of_the_users_own_is_handed_on_as_ours(norm, reduced):
    kernels = module(with_norm(norm)).kernels_py
    body = re.search(r"def o_proj_stream\(.*?(?=\n@|\Z)", kernels, re.DOTALL)[0]
    stored = re.sub(r"\s+", " ", body[body.index("seen = ") :])
    assert [stored.count(each) for each in reduced] == [1] * len(reduced) == [1] * stored.count("out_sums_ptr + ")


def test_several_reductions_compile_where_they_are_left_and_where_they_are_found(tmp_path):
    compiled = compile(with_norm(SEVERAL), LLAMA)
    folder = tmp_path / "build"
    folder.mkdir()
    for name in ("kernels", "program"):
        (folder / f"{name}.py").write_text(getattr(compiled.module, f"{name}_py"))
    found = [v for v in aot.record(compiled, load_folder(folder), "sm_90")
             if v.kernel in ("o_proj_stream", "q_k_v_proj_stream") and v.tiles["BLOCK_M"] in (32, 128)]
    assert {v.constants.get("HANDED") for v in found} == {None, False, True}
    assert not any(cubin.spills for cubin in aot.compile_all(found, folder / "kernels.py", "sm_90"))


def test_each_gets_what_it_wants():
    """Two norms that reduce differently, in turn."""
    text = (EXAMPLES / "llama.fuse").read_text()
    own = "block Other[D, eps](x: [T, D]) -> [T, D]\n  weight : [D]\n\n  x / (max[D](abs(x)) + eps) * weight\n\n"
    text = text.replace("block ", own + "block ", 1)
    text = text.replace("post_attention_layernorm : RMSNorm[", "post_attention_layernorm : Other[")
    program = module(text).program_py
    for maker, reader, first in (("o_proj", "gate_up_proj", 0), ("down_proj", "q_k_v_proj", 1)):
        assert [call["x_sums"] for call in calls(program, reader)[first:]] == [
            call["out_sums"] for call in calls(program, maker)][: len(calls(program, reader)) - first]


@pytest.mark.parametrize("source, options", [("llama", {"dtype": "float32"}), ("gemma2", {}), ("gpt2", {})])
def test_programs_without(source, options):
    """float32 does not stream; Gemma norms what attention and the MLP have made in kernels of rows; GPT-2's norm wants the mean
    first."""
    made = module(source, LLAMA if source == "llama" else {"num_hidden_layers": 2, "n_layer": 2}, **options)
    assert not made.sums and "out_sums" not in made.program_py
