"""Streams without a GPU: what their epilogue becomes, and that every kind of it compiles for Hopper's tensor cores."""

import pytest
import torch
from tile_case import Case, waits_for_all_warps

from fusec import aot, tune
from fusec.codegen import schedule
from fusec.codegen.stream_epilogue import stream_epilogue

ADDRESS = "t.to(tl.int64) * 48 + n"


def lines_of(*lines, early=True, halves=True, bound=None, leaves=1):
    late = {f"y{i}" for i in range(leaves)} | {"mean"}
    return stream_epilogue(list(lines), late=late, early=early, halves=halves, bound=bound)


def test_what_the_epilogue_reads_is_loaded_before_the_products_as_it_is_stored():
    found = lines_of("h = tl.load(h_ptr + t * 48 + n, mask=t_mask, other=0).to(tl.float32)",
                     f"tl.store(out_ptr + {ADDRESS}, «h + y0», mask=t_mask)")
    assert found.turn == "products" and found.loaded == ["h"]
    assert "h = gl.load(h_ptr + t * 48 + n, mask=t_mask, other=0)" in found.early
    assert "h = h.to(gl.float32)" in found.lines and not any("h_ptr" in line for line in found.lines)
    assert found.takes(["w_tiles", "h_ptr", "out_ptr", "n_0", "T"]) == ["h_ptr", "n_0", "T"]


def test_what_is_computed_from_loads_alone_is_too():
    found = lines_of("a = tl.load(a_ptr + n).to(tl.float32)", "b = 1 + a", "c = y0 * b",
                     f"tl.store(out_ptr + {ADDRESS}, «c», mask=t_mask)")
    assert found.loaded == ["b"] and "b = 1 + a" in found.early
    assert "t_mask = t < T" not in found.early and "T" not in found.takes(["T"])


def test_where_nothing_is_read_what_is_stored_is_turned_in_half_the_bytes():
    found = lines_of("v = y0 * mean", f"tl.store(out_ptr + {ADDRESS}, «v * (v + 1)», mask=t_mask)")
    assert found.turn == "stored" and not found.early
    assert "gl.convert_layout((v * (v + 1)).to(out_ptr.dtype.element_ty), Z), mask=t_mask)" in found.lines[-1]


def test_float32_is_stored_as_it_lies():
    found = lines_of(f"tl.store(out_ptr + {ADDRESS}, «y0», mask=t_mask)", halves=False)
    assert found.turn is None and "convert_layout" not in found.lines[-1]
    assert any("SliceLayout(0, Y)" in line for line in found.lines)


def test_a_value_a_token_is_loaded_once_a_token():
    found = lines_of("slot = tl.load(slots_ptr + t, mask=t_mask, other=-1)",
                     "tl.store(k_ptr + slot * 8 + n, «y0», mask=t_mask & (slot >= 0))")
    assert "slot = gl.load(slots_ptr + t_line, mask=t_line < T, other=-1)[None, :]" in found.lines
    assert found.turn == "stored"  # a slot is an address: the epilogue reads nothing that it computes with


def test_an_index_that_is_computed_with_lies_as_the_addresses_do():
    """Also by the names of its parts; and a weight's name may end like the cache's slots."""
    store = f"tl.store(out_ptr + {ADDRESS}, «y0 * {{}}», mask=t_mask)"
    assert lines_of(store.format("n")).turn == "products"
    assert lines_of("i_k = n % 8", store.format("i_k")).turn == "products"
    assert lines_of("w = tl.load(mlp_slots_ptr + n).to(tl.float32)", store.format("w")).loaded == ["w"]
    assert lines_of("i_k = n % 8", f"tl.store(out_ptr + {ADDRESS} + i_k, «y0», mask=t_mask)").turn == "stored"


def test_loads_of_several_segments_or_pieces_stay_where_they_are():
    found = lines_of("if n_0 < 16:", "    c = tl.load(c_ptr + t * 8 + n, mask=t_mask, other=0)",
                     f"    tl.store(out_ptr + {ADDRESS}, «y0 * c», mask=t_mask)", early=False)
    assert found.turn == "products" and not found.early and not found.loaded


KINDS = [  # rows, leaves, reads, tile
    (480, 1, True, schedule.Stream(16, 64, 64, 2, 4, 3)),  # rows that tiles do not divide
    (480, 1, False, schedule.Stream(64, 64, 128, 1, 4, 3)),
    (480, 1, True, schedule.Stream(8, 64, 128, 2, 4, 3)),  # as few tokens as tensor cores take
    (512, 2, True, schedule.Stream(8, 32, 64, 1, 4, 3)),
    (512, 2, False, schedule.Stream(8, 64, 128, 1, 4, 3)),
    (512, 1, True, schedule.Stream(64, 256, 64, 1, 8, 3)),
    (480, 2, True, schedule.Stream(64, 32, 64, 3, 4, 4)),  # two leaves one below the other
    (512, 2, False, schedule.Stream(32, 16, 128, 1, 4, 3)),
    (512, 2, True, schedule.Stream(128, 64, 64, 2, 8, 3)),
    (1024, 1, True, schedule.Stream(128, 128, 64, 1, 4, 3)),
    (480, 1, True, schedule.Stream(32, 24, 64, 1, 4, 10)),  # in two pieces, all steps in flight
    (480, 2, False, schedule.Stream(64, 112, 128, 1, 4, 3)),  # in three
    (672, 2, True, schedule.Stream(64, 112, 64, 1, 8, 6)),
    (672, 2, True, schedule.Stream(128, 112, 64, 1, 8, 5)),
]


@pytest.mark.parametrize("rows, leaves, reads, tile", KINDS)
def test_every_kind_compiles(rows, leaves, reads, tile, tmp_path):
    case = Case(rows, 640, leaves, 2, tile, tmp_path, f"{rows}_{tile.tokens}_{tile.block_n}", reads)
    path, name, options, [(arguments, sizes)] = case.job()
    kernels = tune.load_kernels(path)
    values = [tune.argument(a) if not isinstance(a, str) else torch.empty(1, dtype=getattr(torch, a), device="meta")
              for a in arguments]
    variant = aot.specialize(getattr(kernels, name), name, (1,), values, sizes | options)
    job = {"kernel": name, "signature": variant.signature, "constants": variant.constants, "aligned": variant.aligned,
           "options": variant.options, "target": 90}
    cubin = aot.compile_one(kernels, job)
    stacked = leaves == 2 and reads and tile.block_n == 32 and tile.block_k == 64
    assert waits_for_all_warps(cubin.ptx)
    if tile.form == "wide":
        assert tile.program(leaves, case.source.facts["reductions"]).fits and not cubin.spills
    assert cubin.spills <= 64 and ("wgmma.mma_async" in cubin.ptx) == (tile.block_n >= 64 or stacked or tile.form == "wide")
