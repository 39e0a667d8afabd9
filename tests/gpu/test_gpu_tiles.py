"""Every row of the tile tables, launched at its own shape and compared with float64.

Tiles are compiled in parallel processes first.
"""

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tile_case import Case, operands, result

import fusec.codegen
from fusec import tune
from fusec.codegen import schedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

TABLES = Path(fusec.codegen.__file__).parent / "tables"
TILES = {"gemv": schedule.Gemv, "skinny": schedule.Skinny, "stream": schedule.Stream, "matmul": schedule.Matmul}


def rows():
    """(rows, k, leaves, itemsize, tiles) of every table, each once, and of a few shapes and tiles beside."""
    return dict.fromkeys(every_row())


def every_row():
    for path in sorted(TABLES.glob("*.json")):
        for key, entries in json.loads(path.read_text()).items():
            form, *shape = key.split()
            for entry in entries if form in TILES else ():
                tile = TILES[form](**entry)
                yield *map(int, shape), tile
                if form == "gemv":  # what may be chosen beside it
                    yield *map(int, shape), replace(tile, at_once=not tile.at_once, registers=0 if tile.registers else 64)
    for shape in ((1000, 320, 1), (480, 640, 2), (6144, 4096, 1), (96, 192, 2)):  # in no table: what the rule says of them
        for tile in schedule.stream(*shape):
            yield *shape, 2, tile
    for tokens, splits in itertools.product((8, 16, 32, 64, 128), (1, 2, 3)):  # two leaves one below the other
        yield 480, 640, 2, 2, schedule.Stream(tokens, 32, 64, splits, 4 if tokens < 128 else 8, 3)
    for tokens, leaves, rows in itertools.product((32, 64, 128), (1, 2), (24, 112)):  # in pieces; 24 of 64: all steps in flight
        stages = 5 if rows == 112 else 10 if tokens < 128 else 9
        yield 480, 640, leaves, 2, schedule.Stream(tokens, rows, 64, 1, 8 if tokens == 128 else 4, stages)
    yield 480, 640, 2, 2, schedule.Stream(64, 112, 64, 1, 8, 6)


def test_every_tile(tmp_path):
    """Streams also with an epilogue that reads, which turns their products before it."""
    every = [(row, reads) for row in rows() for reads in ((False, True) if isinstance(row[-1], schedule.Stream) else (False,))]
    cases = [Case(*row, tmp_path, number, reads) for number, (row, reads) in enumerate(every)]
    assert cases
    cases.sort(key=lambda case: (case.n, case.k, case.leaves, case.tokens, case.reads))
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn")) as pool:
        problems = list(pool.map(tune.warm, [case.job() for case in cases]))
    assert not any(problems), [f"{case}: {problem}" for case, problem in zip(cases, problems, strict=True) if problem]
    wrong, drawn, of = [], None, None
    for case in cases:
        shape = (case.n, case.k, case.leaves, case.tokens, case.dtype, case.reads)
        if shape != of:
            drawn = None  # frees the last ones first
            x, w, h = operands(case, "cuda")
            parts = zip(x.split(64), h.split(64), strict=True)
            exact = torch.cat([result(part, w, beside, torch.float64, case.reads) for part, beside in parts])
            drawn, of = (x, w, h, exact, (result(x, w, h, case.dtype, case.reads) - exact).norm()), shape
        x, w, h, exact, theirs = drawn
        error = (case.run(x, w, h, PDL=True, launch_pdl=True).double() - exact).norm()
        if not error <= 1.5 * theirs:
            wrong.append(f"{case}: {error / theirs:.2f} times torch's error")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("reads", (False, True))
@pytest.mark.parametrize("tokens, rows, splits", [(8, 64, 1), (16, 64, 2), (32, 64, 1), (64, 64, 2), (128, 64, 1), (64, 96, 1)])
def test_several_row_reductions(tokens, rows, splits, reads, tmp_path):
    """Made of the tiles of x as they pass, or found, if the stream reads."""
    tile = schedule.Stream(tokens, rows, 64, splits, 4, 3)
    case = Case(512, 960, 2, 2, tile, tmp_path, 0, reads, largest=True)
    assert case.source.facts["reductions"] == 2
    x, w, h = operands(case, "cuda")
    exact = result(x, w, h, torch.float64, reads, largest=True)
    theirs = (result(x, w, h, case.dtype, reads, largest=True) - exact).norm()
    assert (case.run(x, w, h, PDL=True, launch_pdl=True).double() - exact).norm() <= 1.5 * theirs


@pytest.mark.parametrize("tile", [schedule.Stream(32, 32, 64, 2, 4, 9), schedule.Stream(64, 48, 64, 1, 4, 9)], ids=str)
@pytest.mark.parametrize("leaves", (1, 2))
def test_streams_in_several_waves(leaves, tile, tmp_path):
    """Programs that start while others write their results have reads in flight for long: a place of the ring that is given back
    too early shows here, in one run of ten."""
    case = Case(14336, 4096, leaves, 2, tile, tmp_path, 0)
    x, w, h = operands(case, "cuda")
    exact = result(x, w, h, torch.float64)
    theirs = (result(x, w, h, case.dtype) - exact).norm()
    for _ in range(100):
        assert (case.run(x, w, h, PDL=True, launch_pdl=True).double() - exact).norm() <= 1.5 * theirs
