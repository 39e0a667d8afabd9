"""What `fusec explain` says of a compiled program, and the bytes it counts."""

from pathlib import Path

import pytest

from fusec.build import BuildReport, KernelReport
from fusec.codegen.traffic import Step, Traffic, total, traffic
from fusec.compiler import compile
from fusec.explain import amount, explain_program, fold, last_block, ranges, refusals

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def llama():
    return compile(EXAMPLES / "llama.fuse")


def test_layers_are_folded(llama):
    runs = fold(llama.module)
    assert [(run.name, run.count, [launch.function for launch in run.launches]) for run in runs] == [
        ("", 1, ["embed_tokens_positions"]),
        ("model.layers", 32, ["q_k_v_proj", "attention", "o_proj", "gate_up_proj", "down_proj"]),
        ("", 1, ["lm_head"])]
    assert sum(run.count * len(run.launches) for run in runs) == len(llama.module.launches)


def test_layers_of_two_kinds_are_folded_in_pairs():
    runs = fold(compile(EXAMPLES / "gemma2.fuse").module)
    pairs = [run for run in runs if run.count > 1]
    assert len(pairs) == 2 and pairs[0].count == pairs[1].count
    assert "every 2nd layer" in pairs[0].name


def test_the_summary_names_kernels_lines_and_floors(llama):
    text = explain_program(llama)
    assert "Llama from llama.fuse, bfloat16" in text
    assert "162 launches a step, 5 a layer; 7 distinct kernels" in text
    assert "model.layers, 32 times: 5 kernels" in text
    assert "  q_k_v_proj   llama.fuse:27-30, 45" in text
    assert "235 MB weights" in text and "floor 51.69 µs" in text
    assert "GB/s: 3.31" in text  # 15.1 GB at 4545 GB/s
    assert max(map(len, text.splitlines())) <= 130


def test_row_reductions_are_told_by_who_leaves_and_who_finds_them(llama):
    blocks = explain_program(llama).split("\n\n")

    def those_with(line):
        return {block.split()[0] for block in blocks if f"    {line} row reductions" in block}

    assert those_with("leaves   ") == {"o_proj", "down_proj"}
    assert those_with("finds     its") == {"q_k_v_proj", "gate_up_proj", "lm_head"}


def test_bandwidth_and_context_are_the_readers(llama):
    assert "floor at 9090 GB/s: 1.6" in explain_program(llama, bandwidth=9090.0)
    assert "at a context of 32768: 15 GB of weights, 4.29 GB of history" in explain_program(llama, context=32768)


def test_refusals_are_folded_and_say_who_computes_it(llama):
    found = refusals(llama)
    assert all(not why.startswith("contract starts") for _, _, why in found)
    key = next(key for key in found if key[0].startswith("o_proj") and "mean" in key[1])
    assert found[key] == 32 and key[2].endswith("gate_up_proj computes it")
    assert len(found) < 8


def test_a_build_report_adds_resources(llama):
    kernel = KernelReport("o_proj_gemv", "o_proj", "gemv", {"BLOCK_N": 4, "BLOCK_K": 2048}, {"num_warps": 4}, ["decode 1 × 1024"],
                          86, 12, 2048, 1, 1.0, "cubins/o_proj_gemv.cubin")
    text = explain_program(llama, BuildReport(Path("build"), "sm_90", [kernel]))
    assert "gemv      86 registers, 12 bytes spilled, 2 KB shared   BLOCK_N=4 BLOCK_K=2048, 4 warps" in text


def test_a_kernel_too_large_for_its_target_is_called_out(llama):
    kernel = KernelReport("q_k_v_proj_skinny", "q_k_v_proj", "skinny", {}, {"num_warps": 4}, ["decode 64 × 1024"], 200, 0,
                          288 * 1024, 1, 1.0, "cubins/q_k_v_proj_skinny.cubin")
    assert "288 KB shared, MORE THAN sm_90 HAS" in explain_program(llama, BuildReport(Path("build"), "sm_90", [kernel]))
    assert "MORE THAN" not in explain_program(llama, BuildReport(Path("build"), None, []))


def test_bytes_of_a_contraction_and_of_attention(llama):
    kernels = {launch.function: launch.kernel for launch in llama.module.launches}
    down = traffic(kernels["down_proj"], Step(1, 1, 512))
    assert (down.weights, down.history, down.reads, down.writes) == (4096 * 14336 * 2, 0, (14336 + 4096) * 2, 4096 * 2)
    assert down.flops == 2 * 4096 * 14336
    attention = traffic(kernels["attention"], Step(8, 8, 512))
    assert attention.history == 8 * 512 * 2 * 8 * 128 * 2 and attention.weights == 0
    assert attention.flops == 2 * 2 * 8 * 512 * 32 * 128
    assert traffic(kernels["embed_tokens_positions"], Step(3, 3, 512)).weights == 3 * 4096 * 2 + 64 * 4


def test_causal_prefill_counts_half_the_pairs():
    assert Step(4, 1, 4).pairs == 10
    assert Step(2, 2, 7).pairs == 14
    assert Step(3, 1, 10).pairs == 8 + 9 + 10


def test_total_is_the_sum_of_the_launches(llama):
    step = Step(1, 1, 64)
    assert total(llama.graph, step) == sum((traffic(launch.kernel, step) for launch in llama.module.launches), Traffic())


def test_words():
    assert ranges([27, 28, 29, 45]) == "27-29, 45"
    assert [amount(n) for n in (12, 8192, 50.3e6, 15e9)] == ["12 bytes", "8.19 KB", "50.3 MB", "15 GB"]
    assert last_block("model.layers.0.self_attn.q_proj") == "q_proj" and last_block("model.layers.0") == "layers[…]"
