"""What may stream, what decode attention may make itself, and that kernels which differ in either are told apart."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from tile_case import waits_for_all_warps

from fusec import aot
from fusec.bench.shapes import MODELS
from fusec.codegen import schedule
from fusec.codegen.schedule import Stream
from fusec.compiler import compile
from fusec.explain import explain_program
from fusec.runtime.triton_program import TritonProgram, load_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN = MODELS["qwen3-0.6b"] | {"num_hidden_layers": 2}
LLAMA = MODELS["llama-3.2-1b"] | {"num_hidden_layers": 1, "hidden_size": 1024, "intermediate_size": 1024}


def kernels(source, config):
    return compile(source, config).module


def function(text, name):
    """The source of one kernel."""
    return re.search(rf"def {name}\(.*?(?=\n@|\Z)", text, re.DOTALL)[0]


def test_layers_whose_heads_are_normed_differently_have_attention_of_their_own():
    text = (EXAMPLES / "qwen3.fuse").read_text()
    text = text.replace("block Attention(x:", "block Attention[e](x:")
    text = text.replace("q_norm : RMSNorm[K, eps]", "q_norm : RMSNorm[K, e]")
    text = text.replace("block Layer(x:", "block Layer[e](x:")
    text = text.replace("self_attn                : Attention", "self_attn                : Attention[e]")
    text = text.replace("model.layers[L]    : Layer", "model.layers[i < L] : Layer[eps if i % 2 == 0 else 0.5]")
    module = kernels(text, QWEN)
    names = [launch.function for launch in module.launches if launch.function.startswith("attention")]
    assert len(set(names)) == 2
    assert [" 0.5)" in function(module.kernels_py, f"{name}_decode_heads") for name in names] == [False, True]


def test_like_layers_share_their_attention():
    module = kernels(EXAMPLES / "qwen3.fuse", QWEN)
    assert len({launch.function for launch in module.launches if launch.function.startswith("attention")}) == 1
    assert module.program_py.count("return  # decode attention makes them itself") == 1


def test_a_head_norm_may_have_the_name_of_a_head():
    text = re.sub(r"\bq_norm\b", "g", (EXAMPLES / "qwen3.fuse").read_text())
    heads = function(kernels(text, QWEN).kernels_py, "attention_decode_heads")
    assert not re.search(r"^\s+g = ", heads, re.MULTILINE)


def test_x_that_the_epilogue_reads_too_is_not_streamed():
    text = (EXAMPLES / "llama.fuse").read_text()
    start, end = text.index("block SwiGLU"), text.index("block Layer")
    gated = ("block SwiGLU(x: [T, D]) -> [T, D]\n  gate_proj : Linear[D -> A]\n  down_proj : Linear[A -> D]\n\n"
             "  u, w = split[D -> A + A](x)\n  down_proj(sigmoid(gate_proj(x)) * u)\n\n")
    text = text[:start] + gated + text[end:]
    text = text.replace("  D = hidden_size", "  A = 512\n  D = hidden_size", 1)
    text = text.replace("mlp(post_attention_layernorm(h))", "mlp(h)")
    text = re.sub(r"\n  post_attention_layernorm.*", "", text)
    sources = {s.name for f in kernels(text, LLAMA).functions for s in f.sources}
    assert "gate_proj_skinny" in sources and "gate_proj_stream" not in sources


def test_a_field_called_tiles_hides_nothing():
    text = re.sub(r"\bo_proj\b", "tiles", (EXAMPLES / "llama.fuse").read_text())
    assert "def tiles(" not in kernels(text, LLAMA).program_py


def test_the_head_streams_the_rows_it_wants():
    module = kernels(EXAMPLES / "llama.fuse", LLAMA | {"vocab_size": 1024, "tie_word_embeddings": False})
    head = next(f for f in module.functions if any("m.picked" in line for line in f.launch))
    launch = "\n".join(head.launch)
    assert "tiles(m.picked(x, b), 1024, 16," in launch and head.params[:2] == ["m", "b"]
    stream = next(s for s in head.sources if s.form == "stream")
    assert stream.facts["picked"] == "rows" and "rows_ptr" not in stream.roles
    most = TritonProgram.most_picked.func(SimpleNamespace(module=module))
    assert most == 1024 * max(tile.tokens for tile in stream.facts["tiles"])


def test_any_kernel_may_be_wide(monkeypatch, tmp_path):
    """In any number of pieces, whatever its epilogue reads, and where tokens are drawn. It leaves no row reductions: whoever
    wants them makes them."""
    tiles = [Stream(32, 24, 64, 1, 4, 4), Stream(64, 112, 64, 1, 4, 6)]
    shapes = ("1536 1024 2", "1024 2048 1", "1024 1024 2", "1024 1024 1")
    table = {f"stream {shape} 2": [asdict(tile) for tile in tiles] for shape in shapes}
    monkeypatch.setattr(schedule, "table", lambda gpu: table)
    compiled = compile(EXAMPLES / "llama.fuse", LLAMA | {"vocab_size": 1024, "tie_word_embeddings": False})
    module = compiled.module
    wide = [s for f in module.functions for s in f.sources if s.form == "wide"]
    assert len({s.name for s in wide}) == len(wide) == 2 * 5 and not any(s.facts["leaves_sums"] for s in wide)
    assert not any("_ptr" in function(s.text, f"{s.name}_products") for s in wide)  # what is read, is read behind the products
    assert "row reductions of each tile that it stores, as a stream (on Hopper, 2-16 tokens)" in explain_program(compiled)
    (tmp_path / "kernels.py").write_text(module.kernels_py)
    (tmp_path / "program.py").write_text(module.program_py)
    variants = [v for v in aot.record(compiled, load_folder(tmp_path), "sm_90") if "_wide_" in v.kernel]
    assert {v.kernel for v in variants} == {s.name for s in wide}
    cubins = aot.compile_all(variants, tmp_path / "kernels.py", target="sm_90")
    assert all(cubin.spills <= 64 and "wgmma.mma_async" in cubin.ptx for cubin in cubins)
    assert all(waits_for_all_warps(cubin.ptx) for cubin in cubins)


def test_picked_rows_lie_one_after_another():
    x, rows = torch.randn(9, 12), torch.tensor([3, 8, 3], dtype=torch.int32)
    program = SimpleNamespace(_growing={}, device="cpu", most_picked=16 * 12)
    program._take = lambda *size: TritonProgram._take(program, *size)
    picked = TritonProgram.picked(program, x, SimpleNamespace(rows=rows, every=False))
    assert torch.equal(picked, x[rows.long()]) and picked.is_contiguous()
    one = TritonProgram.picked(program, x, SimpleNamespace(rows=rows[:1], every=False))
    assert one.data_ptr() == picked.data_ptr()  # a captured graph keeps the address


def test_nothing_is_picked_where_every_token_is_wanted():
    x = torch.randn(9, 12)
    every = TritonProgram.picked(None, x, SimpleNamespace(rows=torch.arange(4, dtype=torch.int32), every=True))
    assert every.data_ptr() == x.data_ptr() and torch.equal(every, x[:4])
