"""The search of `fusec tune`, over made-up times of a step."""

import itertools
import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fusec import tune
from fusec.codegen import schedule
from fusec.tune import ATTENTION, Tuner, table_row, write_table


@pytest.fixture(autouse=True)
def noisy_clock(monkeypatch):
    """What stands for a step's graph is the milliseconds that it takes."""
    noise = random.Random(0)
    taken = lambda step: step * (1 + noise.gauss(0, 0.0003))  # noqa: E731
    monkeypatch.setattr(tune, "turns", lambda now, other: ((taken(now), taken(other)) for _ in itertools.count()))
    monkeypatch.setattr(tune, "replay_microseconds", lambda step: step * 1e3)


def tuner(milliseconds):
    """A tuner whose steps take milliseconds(choice), and the choices that it tried."""
    found = Tuner.__new__(Tuner)
    found.tried, found.say = [], lambda text: None

    def step(choice, tokens):
        found.tried.append(dict(choice))
        return milliseconds(choice)

    found.step = step
    return found


def done(value):
    return SimpleNamespace(result=lambda: value)


FEW = {"qkv": ["a", "b", "c"], "o": ["x", "y"]}
LAUNCHES = [("rule", done(None)), ("small", done(None)), ("broken", done("it does not compile"))]


def test_what_is_fastest_together_wins():
    """Alone a and x lead; beside a small attention b and y are better, and only then."""

    def milliseconds(choice):
        small = choice[ATTENTION] == "small"
        return 10 - small - 2 * (small and choice["qkv"] == "b") - (choice["qkv"] == "b" and choice["o"] == "y")

    search = tuner(milliseconds)
    choice, launch, ms = search.together(FEW, LAUNCHES, 1, time.monotonic() + 60)
    assert (choice, launch, ms) == ({"qkv": "b", "o": "y"}, "small", 6)
    assert not any(trial[ATTENTION] == "broken" for trial in search.tried)


def test_attention_that_is_wrong_or_fails_is_no_candidate():
    """The first launch is what the others are held to; the program's own way to choose one is put back."""
    results = {"rule": 1.0, "like it": 1.001, "wrong": 1.1, "nan": torch.nan}

    def attention(m, out):
        launch = program.program.decode_launch(8, pdl=True)
        if launch == "too large":
            raise RuntimeError("out of resource: shared memory")
        out.fill_(results[launch])

    own = lambda *_, **__: "rule"  # noqa: E731
    program = SimpleNamespace(program=SimpleNamespace(decode_launch=own, attention=attention), x=torch.zeros(8, 4))
    function = SimpleNamespace(name="attention", kernel=SimpleNamespace(attrs={"kind": "attention"}))
    search, said = Tuner.__new__(Tuner), []
    search.program, search.say = program, said.append
    search.module = SimpleNamespace(functions=[function], launches=[SimpleNamespace(function="attention")], buffers=["x"])
    search.batch, search.values = lambda tokens: None, lambda *_: {"m": None, "out": torch.empty(8, 2, 3)}
    launches = [(name, done(None)) for name in (*results, "too large")] + [("broken", done("it does not compile"))]
    assert [name for name, _ in search.agreeing(launches, 4)] == ["rule", "like it"]
    assert program.program.decode_launch is own and len(said) == 3
    assert search.agreeing([], 4) == []


def test_what_is_less_than_the_noise_changes_nothing_and_what_is_more_does():
    def found(saving):
        return tuner(lambda choice: 1 - saving * (choice["o"] == "y")).together(FEW, LAUNCHES, 1, time.monotonic() + 60)

    assert found(0.00003)[:2] == ({"qkv": "a", "o": "x"}, "rule")
    assert found(0.002)[:2] == ({"qkv": "a", "o": "y"}, "rule")


def test_a_candidate_that_fails_is_none():
    def milliseconds(choice):
        if choice["qkv"] == "c":
            raise RuntimeError("out of resource: shared memory")
        return 2 - (choice["o"] == "y")

    choice, _, ms = tuner(milliseconds).together(FEW, [], 1, time.monotonic() + 60)
    assert (choice["o"], ms) == ("y", 1)


def test_without_time_the_fastest_alone_stay():
    search = tuner(lambda choice: 1.0)
    assert search.together(FEW, LAUNCHES, 1, time.monotonic() - 1) == ({"qkv": "a", "o": "x"}, "rule", 1.0)
    assert len(search.tried) == 1


def test_a_search_without_time_leaves_nothing_slower_than_it_was():
    search = tuner(lambda choice: {"a": 1.0, "b": 0.5, "c": 2.0}[choice["qkv"]])
    used = {"qkv": "b", "o": "z"}
    assert search.together(FEW, LAUNCHES, 1, time.monotonic() - 1, used) == (used, "rule", 0.5)
    slow = {"qkv": "c", "o": "z"}
    assert search.together(FEW, LAUNCHES, 1, time.monotonic() - 1, slow) == ({"qkv": "a", "o": "x"}, "rule", 1.0)


def test_the_tile_in_use_is_that_for_so_many_tokens():
    def forms(**tiles):
        return SimpleNamespace(sources=[SimpleNamespace(form=form, facts={"tiles": each}) for form, each in tiles.items()])

    search, stream = tuner(None), schedule.Stream(16, 64, 64, 1, 4, 3)
    search.program = SimpleNamespace(program=SimpleNamespace(HOPPER=True))
    skinny, many = schedule.Skinny(32, 32, 64, 64, 1, 4, 3), schedule.Matmul(None, 128, 64, 64, 8, 4, 3)
    function = forms(gemv=(schedule.Gemv(1, 512, 4, 1),), stream=(stream,), skinny=(skinny,), matmul=(many,))
    used = {tokens: search.used(function, "skinny", tokens) for tokens in (8, 16, 32, 128)}
    assert used == {8: None, 16: stream, 32: skinny, 128: replace(many, tokens=256)}  # 8 have a share in what is for 16
    assert search.used(function, "gemv", 1) == schedule.Gemv(1, 512, 4, 1) and search.used(function, "matmul", 4096) is None


def test_a_row_tells_what_is_not_left_to_defaults():
    sizes = {"block_n": 1, "block_k": 512, "num_warps": 4, "stages": 1}
    assert table_row(schedule.Gemv(**sizes)) == sizes
    assert table_row(schedule.Gemv(**sizes, at_once=True, registers=64)) == sizes | {"at_once": True, "registers": 64}
    matmul = schedule.Matmul(None, 128, 64, 64, 8, 4, 3)
    assert schedule.Matmul(**table_row(matmul)) == matmul


def test_kernels_of_one_shape_have_one_tile(tmp_path):
    path = tmp_path / "gpu.json"
    rows = [{"block_n": n} for n in (1, 2)]
    write_table({"gemv 8 8 1 2": rows, "skinny 8 8 1 2": [{"tokens": 16} | row for row in rows]}, path)
    table = json.loads(path.read_text())
    assert table == {"gemv 8 8 1 2": rows[:1], "skinny 8 8 1 2": [{"tokens": 16} | rows[0]]}


def test_a_table_keeps_what_was_not_measured(tmp_path):
    path = tmp_path / "gpu.json"
    row = {"block_n": 64}
    write_table({"skinny 8 8 1 2": [{"tokens": n} | row for n in (16, 32)], "stream 8 8 1 2": [{"tokens": 64} | row],
                 "decode 1 1 8 8 2": [{"sequences": 1, "context": 1024, "parts": 4}]}, path)
    write_table({"stream 8 8 1 2": [{"tokens": 16} | row], "skinny 8 8 1 2": [{"tokens": 64} | row],
                 "decode 1 1 8 8 2": [{"sequences": 8, "context": 1024, "parts": 0}]}, path)
    table = json.loads(path.read_text())
    assert [r["tokens"] for r in table["skinny 8 8 1 2"]] == [16, 32, 64]  # those for 16 serve GPUs that stream nothing
    assert [r["tokens"] for r in table["stream 8 8 1 2"]] == [16]  # 64 are now faster another way
    assert [r["sequences"] for r in table["decode 1 1 8 8 2"]] == [1, 8]


def test_many_tokens_won_by_the_next_form_are_left_to_it(tmp_path):
    path = tmp_path / "gpu.json"
    few = [{"tokens": 64, "block_n": 64}, {"tokens": 128, "block_n": 64}]
    write_table({"skinny 8 8 1 2": few, "stream 8 8 1 2": few}, path)
    write_table({"matmul 8 8 1 2": [{"tokens": 256, "block_n": 128}]}, path)
    table = json.loads(path.read_text())
    assert [r["tokens"] for r in table["skinny 8 8 1 2"]] == [r["tokens"] for r in table["stream 8 8 1 2"]] == [64]
