"""Paged decode attention on the GPU against float64: lengths of every kind in one batch, and any way to share their work out; and
every row of the tile tables.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

HEADS = {"llama": (8, 4, 128, 128, 16), "odd": (2, 3, 80, 64, 16), "one each": (4, 1, 64, 128, 32), "wide": (1, 8, 256, 256, 16)}
LENGTHS = [1, 0, 37, 5000, 64, 1029, 16, 700]  # a padding row, contexts that end inside a page, one that outweighs all others


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["causal", "dense window"])
def test_skewed_lengths(kind, heads):
    import attention_lab as lab

    from fusec.codegen.attention_schedule import decode_launch, with_tile

    G, R, K, J, page = HEADS[heads]
    context, score, keep = lab.KINDS[kind]
    case = lab.make_case(LENGTHS, G=G, R=R, K=K, J=J, page=page)
    want, fn = lab.reference(case, score, keep), lab.kernel("decode", **context)
    rule = decode_launch(len(LENGTHS), 8192, **case.shape, pdl=True)
    for chunk in (16, 512, 8192):
        tile = dict(block_n=rule.constants["BLOCK_N"], parts=0, chunk=chunk, num_warps=rule.num_warps, num_stages=rule.num_stages)
        launch = with_tile(rule.constants, tile, len(LENGTHS), 8192, 2)
        scratch = lab.make_scratch(launch, len(LENGTHS), "cuda")
        first = lab.run_decode(fn, case, launch, scratch)
        assert lab.error(first, want) < 5e-3, (chunk, launch)
        again = lab.run_decode(fn, case, launch, scratch)  # finds the counters as the first left them, and adds in its order
        assert torch.equal(first.nan_to_num(), again.nan_to_num()) and not scratch[2].any()


def rows_of_tables():
    """(G, R, K, J, row) of every table, each once."""
    from fusec.codegen import schedule

    found = {}
    for path in sorted(schedule.TABLES.glob("*.json")):
        for key, rows in schedule.table(path.stem).items():
            form, *sizes = key.split()
            if form == "decode":
                found |= {(*sizes, *row.values()): (*map(int, sizes[:4]), row) for row in rows}
    return list(found.values())


@pytest.mark.parametrize("G, R, K, J, row", rows_of_tables(), ids=str)
def test_every_row_of_the_tables(G, R, K, J, row):
    import attention_lab as lab

    from fusec.codegen.attention_schedule import decode_launch, decode_row, with_tile

    sequences, longest = row["sequences"], row["context"]
    pick = random.Random(repr(row))
    context, score, keep = lab.KINDS["causal"]
    fn = lab.kernel("decode", **context)
    for most in (40, longest):  # less than a program's share, and all that the row is for
        lengths = [pick.randint(1, most) for _ in range(sequences - 1)] + [most]
        case = lab.make_case(lengths, G=G, R=R, K=K, J=J, page=16)
        constants = decode_launch(sequences, longest, **case.shape, pdl=True).constants
        launch = with_tile(constants, row, sequences, longest, 2)
        assert decode_row(launch, sequences, longest, 2)[1] == row
        assert lab.error(lab.run_decode(fn, case, launch), lab.reference(case, score, keep)) < 5e-3, launch
