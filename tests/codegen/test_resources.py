"""Every kernel of two published shapes, compiled for sm_90 on a machine without a GPU: nothing spills, and shared memory
suffices.

All kernels of Llama 3.2 1B for one token and for one tile of each other form; of SmolLM2 135M, whose sizes no tile divides,
likewise.
"""

import pytest
from tile_case import waits_for_all_warps

from fusec import aot
from fusec.bench.shapes import MODELS
from fusec.build import write_build
from fusec.compiler import compile

pytest.importorskip("triton")
SHARED = 227 * 1024  # bytes a program may have on sm_90
ALLOWED = {"positions": 16, "prefill": 256}  # sines of large angles; a prefill tile is held to the registers of two programs


def chosen(variants):
    """Of the variants of one kernel that differ in tiles: the widest, which needs the most."""
    widest = {}
    for variant in variants:
        key = (variant.kernel, variant.tiles.get("SPLITS", 1) > 1, variant.tiles.get("DRAW"))
        if key not in widest or aot.cost(variant) >= aot.cost(widest[key]):
            widest[key] = variant
    return list(widest.values())


@pytest.mark.parametrize("model", ["llama-3.2-1b", "smollm2-135m"])
def test_no_spills(model, tmp_path):
    from fusec.runtime.triton_program import load_folder

    compiled = compile(config=MODELS[model] | {"num_hidden_layers": 1})
    folder = write_build(compiled, tmp_path / "build", source_only=True).folder
    program = load_folder(folder)
    variants = aot.record(compiled, program, "sm_90")
    streamed = {v.kernel for v in variants}
    variants += [v for v in aot.record(compiled, program, "sm_80") if v.kernel not in streamed]  # what streams replace on Hopper
    some = chosen(variants)
    assert {v.kernel for v in some} == {s.name for f in compiled.module.functions for s in f.sources}
    for variant, cubin in zip(some, aot.compile_all(some, folder / "kernels.py", "sm_90"), strict=True):
        allowed = 16 if variant.tiles.get("DRAW") == 2 else next((n for name, n in ALLOWED.items() if name in variant.kernel), 0)
        assert cubin.spills <= allowed, f"{variant.kernel} {variant.tiles} spills {cubin.spills} bytes a thread"
        assert cubin.shared <= SHARED, f"{variant.kernel} {variant.tiles} takes {cubin.shared} bytes of shared memory"
        if "_stream" in variant.kernel:
            assert waits_for_all_warps(cubin.ptx), f"{variant.kernel} {variant.tiles}"
        if "_matmul" in variant.kernel or "_stream" in variant.kernel:
            assert "wgmma.mma_async" in cubin.ptx, f"{variant.kernel} {variant.tiles} runs beside the tensor cores"
