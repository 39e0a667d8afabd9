"""Tiles: what `fusec tune` may choose computes the same, and what it tries fits the GPU."""

import itertools

import pytest
import torch
from interpret import INTERPRETED, run_interpreted
from program_checks import EXAMPLES, TINY

from fusec.codegen import candidates, schedule
from fusec.codegen.attention_schedule import LITTLE, WHOLE, decode_launch, decode_row
from fusec.compiler import compile

if INTERPRETED:
    from tile_case import Case, operands, result

    SPLITS = [(1, 96), (2, 160), (3, 160), (5, 160), (3, 144)]  # equal shares of K, a shorter last one, one that ends in a block

    @pytest.mark.parametrize("leaves", (1, 2))
    @pytest.mark.parametrize("splits, k", SPLITS)
    def test_any_number_of_splits(splits, k, leaves, tmp_path):
        case = Case(40, k, leaves, 4, schedule.Skinny(16, 16, 16, 32, splits, 4, 2), tmp_path, 0)
        x, w, h = operands(case, "cpu")
        want = result(x, w, h, torch.float64)
        assert (case.run(x, w, h, PDL=False).double() - want).norm() <= 1e-5 * want.norm()

    @pytest.mark.parametrize("at_once", (False, True))
    @pytest.mark.parametrize("block_n", (1, 4))
    def test_one_token_however_it_is_put_together(at_once, block_n, tmp_path):
        """Two leaves and two row reductions; neither K nor the rows are a whole number of blocks."""
        case = Case(42, 160, 2, 4, schedule.Gemv(block_n, 64, 4, 1, at_once, 64), tmp_path, 0, largest=True)
        x, w, h = operands(case, "cpu")
        want = result(x, w, h, torch.float64, largest=True)
        assert (case.run(x, w, h, PDL=False).double() - want).norm() <= 1e-5 * want.norm()

else:

    def test_interpreted():
        run_interpreted(__file__)

    def test_variants_of_a_tile_for_one_token():
        tile = schedule.Gemv(4, 512, 4, 1, registers=64)
        several = candidates.variants(tile, 2, 1)
        assert len(several) == len(set(several)) == 7 and tile not in several
        assert all((t.block_n, t.block_k, t.num_warps, t.stages) == (4, 512, 4, 1) for t in several)
        assert {t.at_once for t in candidates.variants(tile, 1, 0)} == {False}  # there is one thing to put together
        assert candidates.variants(schedule.Matmul(None, 128, 64, 64, 8, 4, 3), 1, 0) == []

    SHAPES = [(3072, 4096, 2), (4096, 14336, 1), (151936, 1024, 1), (480, 576, 2)]

    @pytest.mark.parametrize("rows, k, leaves", SHAPES)
    def test_candidates_give_every_program_work(rows, k, leaves):
        for tokens in candidates.TOKENS["skinny"]:
            tiles = candidates.tiles_for("skinny", rows, k, leaves, 2, tokens)
            assert 0 < len(tiles) <= candidates.MOST + 12
            for t in tiles:
                if t.form == "skinny":
                    share = -(-k // (t.block_k * t.splits)) * t.block_k
                    assert (t.splits - 1) * share < k and t.stages * t.block_n * leaves * t.block_k * 2 <= candidates.SHARED

    @pytest.mark.parametrize("rows, k, leaves", [*SHAPES, (1024, 2048, 1), (40, 64, 2)])
    def test_streams_give_every_program_steps(rows, k, leaves):
        """What the rule and the tuner choose for a Hopper GPU: whole steps along K, a share of them for each program, and a
        ring that fits."""
        for tokens in candidates.TOKENS["skinny"]:
            rule = [t for t in schedule.stream(rows, k, leaves, 2, "nobody's table") if t.tokens == tokens]
            for t in rule + candidates.stream(rows, k, leaves, 2, tokens, beside=1):
                steps = k // t.block_k
                share = -(-steps // t.splits)
                assert k % t.block_k == 0 and (t.splits - 1) * share < steps and t.stages >= 2
                assert t.stages * (leaves * t.block_n + tokens) * t.block_k * 2 + 4096 <= candidates.SHARED
                high = 64 if (leaves, t.block_n, t.block_k) == (2, 32, 64) else t.block_n  # of what is multiplied at once
                assert tokens * min(t.num_warps, high // 16) // t.num_warps >= 8  # columns of a warp's product

    def test_a_measured_shape_streams_what_was_faster_that_way(monkeypatch):
        row = {"tokens": 32, "block_n": 64, "block_k": 64, "splits": 1, "num_warps": 4, "stages": 4}
        tables = {"measured": {"skinny 128 256 1 2": [], "stream 128 256 1 2": [row]},
                  "skinny": {"skinny 128 256 1 2": [{"tokens": 16}]}, "empty": {}}
        monkeypatch.setattr(schedule, "table", tables.__getitem__)
        rule = schedule.stream(128, 256, 1, 2, "empty")
        assert schedule.stream(128, 256, 1, 2, "measured") == (rule[0], schedule.Stream(**row), rule[2])  # the others by rule
        assert schedule.stream(128, 256, 1, 2, "skinny") == rule[1:]
        assert [t.tokens for t in schedule.stream(128, 256, 1, 2, "empty")] == [16, 32, 64]
        assert schedule.stream(128, 250, 1, 2, "empty") == () == schedule.stream(128, 256, 1, 4, "empty")
        assert [(t.least, t.tokens) for t in schedule.stream(128, 256, 1, 2, "empty")] == [(2, 16), (17, 32), (33, 64)]

    @pytest.mark.parametrize("heads", [dict(G=8, R=4, K=128, J=128), dict(G=3, R=3, K=64, J=64), dict(G=1, R=8, K=256, J=256)])
    def test_one_sequence_leaves_shared_memory_to_its_neighbours(heads):
        rule = decode_launch(1, 1024, **heads, page=16)
        for launch in candidates.decode_tiles(rule, 1, 1024, 2):
            tile = launch.constants["BLOCK_N"] * (launch.constants["BLOCK_K"] + launch.constants["BLOCK_J"]) * 2
            assert tile * (launch.num_stages - 1) < LITTLE

    def test_decode_attention_wants_the_shared_memory_that_its_programs_need():
        heads = dict(G=8, R=4, K=128, J=128, page=16, gpu="nobody's table")
        sizes = (1, 1024), (1, 32768), (8, 1024)
        short, long, several = (decode_launch(*size, **heads, pdl=True) for size in sizes)
        for launch, each in ((short, 1), (long, 2)):  # programs a multiprocessor
            constants = launch.constants
            tile = 2 * constants["BLOCK_N"] * 128 * 2 * (launch.num_stages - 1)
            assert -(-launch.grid[0] * launch.grid[1] // 132) == each
            assert each * tile < launch.shared * WHOLE // 100 < each * (tile + 16384)
        assert several.shared == 100  # as the kernels beside it
        assert decode_launch(1, 1024, **heads).shared is None  # where nothing overlaps, the driver knows best

    def test_wide_tiles_make_one_wave():
        """In pieces that the tensor cores take; of shapes that streams give each multiprocessor a tile of, there are none."""
        found = candidates.wide(14336, 4096, 2, 2, 64, 1)
        assert {(t.block_n, t.pieces, t.form, t.block_m) for t in found} == {(112, (64, 32, 16), "wide", 64)}
        assert all(t.stages * t.place(2) < schedule.SHARED for t in found) and set(found) <= set(
            candidates.tiles_for("skinny", 14336, 4096, 2, 2, 64, streams=True))  # fmt: skip
        assert {t.block_m for t in candidates.wide(14336, 4096, 2, 2, 128, 1)} == {128}
        assert not candidates.wide(14336, 4096, 2, 2, 16, 1) and not candidates.wide(8192, 2048, 2, 2, 64, 1)
        stream = schedule.Stream(32, 64, 64, 1, 4, 3)
        assert (stream.pieces, stream.form, stream.block_m) == ((64,), "stream", 32)
        assert not candidates.wide(100000, 4096, 1, 2, 32, 0)  # pieces of 512: no instruction is so wide
        for rows, splits in ((112, 2), (120, 1), (100, 1)):
            with pytest.raises(ValueError, match=f"{rows} rows"):
                schedule.Stream(32, rows, 64, splits, 4, 3)

    @pytest.mark.parametrize("reductions", (0, 1, 2))
    @pytest.mark.parametrize("leaves", (1, 2, 4))
    def test_streams_leave_registers_for_as_many_programs_as_there_is_memory_for(leaves, reductions):
        for tokens, n, bk, warps, stages in itertools.product((16, 32, 64, 128), (16, 64, 128), (64, 256), (4, 8), (2, 4, 9)):
            t = schedule.Stream(tokens, n, bk, 1, warps, stages)
            programs = schedule.SHARED // (stages * (leaves * n + tokens) * bk * 2 + 2048)
            program = t.program(leaves, reductions)
            registers, threads = program.registers, 32 * program.warps
            assert registers % 8 == 0
            assert registers * threads <= schedule.REGISTERS
            least = registers <= tokens // 2 + 39  # one product wants no less, and would not compile: fewer programs have room
            assert registers * threads * max(1, min(4, programs)) <= schedule.REGISTERS or least

    @pytest.mark.parametrize("sequences", (1, 8))
    def test_limits_on_registers_are_variants_of_a_launch(sequences, monkeypatch):
        heads = dict(G=2, R=4, K=64, J=64, page=16)
        chosen = decode_launch(sequences, 1024, **heads)
        variants = candidates.decode_variants(chosen, sequences, 1024, 2)
        assert [v.maxnreg for v in variants] == [limit for limit in candidates.LIMITS if limit]
        for variant in variants:
            key, row = decode_row(variant, sequences, 1024, 2)
            monkeypatch.setattr(schedule, "table", lambda gpu, key=key, row=row: {key: [row]})
            assert decode_launch(sequences, 1024, **heads) == variant
            assert chosen in candidates.decode_variants(variant, sequences, 1024, 2)

    def test_a_row_of_the_table_is_what_decode_launch_answers(monkeypatch):
        heads = dict(G=2, R=4, K=64, J=64, page=16)
        wanted = candidates.decode_tiles(decode_launch(8, 1024, **heads), 8, 1024, 2)[-1]
        key, row = decode_row(wanted, 8, 1024, 2)
        monkeypatch.setattr(schedule, "table", lambda gpu: {key: [row]})
        assert decode_launch(8, 1024, **heads) == wanted
        assert decode_launch(5, 512, **heads).constants["BLOCK_N"] == wanted.constants["BLOCK_N"]
        for beyond in ((9, 1024), (8, 2048), (1, 512)):  # more sequences or longer ones than the row is for, or one alone
            assert decode_launch(*beyond, **heads).constants["BLOCK_N"] != wanted.constants["BLOCK_N"]

    def test_a_program_asks_the_table_of_the_gpu_it_was_compiled_for():
        program = compile(EXAMPLES / "llama.fuse", TINY["llama"], gpu="some_gpu").module.program_py
        assert 'gpu="some_gpu"' in program and schedule.DEFAULT not in program
