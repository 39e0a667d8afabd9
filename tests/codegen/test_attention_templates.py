"""The attention templates: numerics under the interpreter against float64, and what they compile to for sm_90."""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "bench")]
from interpret import INTERPRETED, run_interpreted  # noqa: E402

import attention_lab as lab  # noqa: E402  isort: skip

from fusec.codegen.attention_schedule import decode_launch, prefill_launch, with_tile  # noqa: E402

HEADS = {  # G, R, K, J, page, dtype
    "odd sizes": (1, 3, 80, 64, 16, torch.float32),
    "half, tiny pages": (1, 8, 64, 128, 4, torch.float16),
    "one head each": (2, 1, 128, 128, 16, torch.float32),
    "huge pages": (1, 4, 64, 64, 128, torch.float32),
}
# Full pages, contexts that end inside a page, a padding row, a context of one token.
CONTEXTS = [1, 0, 37, 100, 64]
QUERIES = [1, 1, 1, 33, 2]
CASES = [(kind, "odd sizes") for kind in lab.KINDS] + [("dense window", heads) for heads in HEADS if heads != "odd sizes"]


def bound(dtype):
    return 1e-6 if dtype == torch.float32 else 1e-3


if INTERPRETED:
    torch.set_num_threads(1)

    @pytest.mark.parametrize("kind, heads", CASES)
    def test_decode(kind, heads):
        G, R, K, J, page, dtype = HEADS[heads]
        context, score, keep = lab.KINDS[kind]
        case = lab.make_case(CONTEXTS, G=G, R=R, K=K, J=J, page=page, dtype=dtype, device="cpu")
        want, fn = lab.reference(case, score, keep), lab.kernel("decode", **context)
        launch = decode_launch(len(CONTEXTS), 200, **case.shape, itemsize=dtype.itemsize)
        for block_n, chunk, many in ((64, 64, 1), (16, 32, 1), (16, 200, 200)):  # many: programs that run at once
            tile = dict(block_n=block_n, parts=0, chunk=chunk, num_warps=4, num_stages=2)
            trial = with_tile(launch.constants, tile, len(CONTEXTS), 200, dtype.itemsize, many)
            check_decode(fn, case, trial, want)

    def check_decode(fn, case, launch, want):
        scratch = lab.make_scratch(launch, len(case.context_lens), "cpu")
        for _ in range(2):  # the second launch finds the counters as the first left them
            assert lab.error(lab.run_decode(fn, case, launch, scratch), want) < bound(case.q.dtype)
            assert not scratch[2].any()

    @pytest.mark.parametrize("length", (1, 37, 200))
    @pytest.mark.parametrize("parts", (1, 3, 8))
    def test_decode_of_one_sequence(length, parts):
        context, score, keep = lab.KINDS["dense window"]
        case = lab.make_case([length], G=2, R=3, K=64, J=64, page=16, dtype=torch.float32, device="cpu")
        launch = decode_launch(1, 200, **case.shape, itemsize=4)
        tile = dict(block_n=16, parts=parts, chunk=16, num_warps=4, num_stages=2)
        trial = with_tile(launch.constants, tile, 1, 200, 4)
        check_decode(lab.kernel("decode", **context), case, trial, lab.reference(case, score, keep))

    @pytest.mark.parametrize("length", (1, 37, 64))
    def test_the_newest_row_is_not_read_with_the_history(length):
        """Its slot holds NaN until, at the wait, the kernel itself makes the row: a tile that held the slot was copied before."""
        text = """
            @triton.jit
            def attention_heads(made_k_ptr, made_v_ptr, slot_ptr, k_ptr, v_ptr, b, g):
                j = tl.arange(0, 64)
                to = (tl.load(slot_ptr + b) * 2 + g) * 64 + j
                tl.store(k_ptr + to, tl.load(made_k_ptr + (b * 2 + g) * 64 + j))
                tl.store(v_ptr + to, tl.load(made_v_ptr + (b * 2 + g) * 64 + j))
        """
        pointers = ["made_k_ptr", "made_v_ptr", "slot_ptr", "k_ptr", "v_ptr"]
        context, score, keep = lab.KINDS["causal"]
        fn = lab.kernel("decode", heads={"text": textwrap.dedent(text).strip(), "pointers": pointers}, **context)
        case = lab.make_case([length], G=2, R=3, K=64, J=64, page=16, dtype=torch.float32, device="cpu")
        want = lab.reference(case, score, keep)
        slot = case.block_tables[0, (length - 1) // 16] * 16 + (length - 1) % 16
        made = [cache.view(-1, 2, 64)[slot.long()].clone() for cache in (case.k_cache, case.v_cache)]
        for cache in (case.k_cache, case.v_cache):
            cache.view(-1, 2, 64)[slot.long()] = float("nan")
        launch = decode_launch(1, 200, **case.shape, itemsize=4)
        launch = with_tile(launch.constants, dict(block_n=64, parts=1, chunk=64, num_warps=4, num_stages=2), 1, 200, 4)
        out = lab.poisoned_out(case)
        fn[launch.grid](case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, out,
                        *lab.make_scratch(launch, 1, "cpu"), *made, slot.view(1), case.k_cache, case.v_cache, 1, case.q.stride(0),
                        case.block_tables.stride(0), **launch.constants, **launch.options)  # fmt: skip
        assert lab.error(out, want) < 1e-6

    @pytest.mark.parametrize("kind, heads", CASES)
    def test_prefill(kind, heads):
        G, R, K, J, page, dtype = HEADS[heads]
        context, score, keep = lab.KINDS[kind]
        case = lab.make_case(CONTEXTS, QUERIES, G=G, R=R, K=K, J=J, page=page, dtype=dtype, device="cpu")
        want, fn = lab.reference(case, score, keep), lab.kernel("prefill", **context)
        for rows in (16, 128):
            launch = prefill_launch(len(CONTEXTS), max(QUERIES), **case.shape, itemsize=dtype.itemsize)
            constants = dict(launch.constants, BLOCK_M=rows, BLOCK_N=16)
            launch = replace(launch, grid=(G, len(CONTEXTS), -(-max(QUERIES) // (rows // R))), constants=constants)
            assert lab.error(lab.run_prefill(fn, case, launch), want) < bound(dtype)

else:

    def test_interpreted():
        run_interpreted(__file__)

    SHAPES = {"llama": dict(G=8, R=4, K=128, J=128), "gemma": dict(G=1, R=8, K=256, J=256), "phi": dict(G=32, R=1, K=80, J=80)}

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("batch, context", [(1, 32768), (64, 4096)])
    def test_decode_compiles_without_spills(shape, batch, context):
        launch = decode_launch(batch, context, **SHAPES[shape], page=16, pdl=True)
        code, (registers, spilled, shared) = lab.compile_for(lab.kernel("decode", **lab.SCALE), launch)
        if spilled and (shape, batch) == ("gemma", 1) and not triton.__version__.startswith("3.6."):
            pytest.xfail(f"Triton {triton.__version__} spills {spilled} bytes a thread, where 3.6 spills none")
        assert spilled == 0 and shared <= 227 * 1024
        assert begins_early(code)

    def begins_early(code):
        """The copies of a program's first tiles stand before the loop, the wait for the kernel before this one inside it."""
        before, _, loop = code.asm["ttgir"].partition("scf.for")
        waits = before.count("griddepcontrol.wait") + before.count("grid_dependency_wait")  # one: programs without work leave
        return before.count("async_copy_global_to_local") >= 2 and waits == 1 and "griddepcontrol.wait" in loop

    def test_heads_that_attention_makes_itself_do_not_hold_up_the_history():
        text = """
            @triton.jit
            def attention_heads(of_q_ptr, q_ptr, b, g):
                j = tl.arange(0, 512)
                at = (b * 8 + g) * 512 + j
                tl.store(q_ptr + at, tl.load(of_q_ptr + at).to(tl.float32) * 2)
        """
        heads = {"text": textwrap.dedent(text).strip(), "pointers": ["of_q_ptr", "q_ptr"]}
        launch = decode_launch(1, 1024, **SHAPES["llama"], page=16, pdl=True)
        code, (_, spilled, _) = lab.compile_for(lab.kernel("decode", heads=heads, **lab.SCALE), launch)
        assert spilled == 0
        assert begins_early(code)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_prefill_compiles_to_wgmma(shape):
        launch = prefill_launch(4, 2048, **SHAPES[shape], page=16)
        code, (registers, spilled, shared) = lab.compile_for(lab.kernel("prefill", **lab.SCALE), launch)
        assert spilled <= 128 and shared <= 227 * 1024
        assert "wgmma.mma_async" in code.asm["ptx"]

    def test_rendered_text_is_plain_triton():
        text = lab.render("decode", comment=["o = attention(q, k, v)"], **lab.SCALE)
        assert "# o = attention(q, k, v)" in text and "{" not in text
        assert max(map(len, text.splitlines())) <= 130

    def test_a_window_skips_masks_only_when_it_is_dense():
        window = dict(mask=["keep = (k_pos <= q_pos) & (k_pos > q_pos - 40)"], first="q_pos - 39")
        assert "phase" not in lab.render("prefill", **window)
        assert "phase" in lab.render("prefill")
