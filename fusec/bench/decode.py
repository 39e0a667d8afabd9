"""Decoding: the time of an output token, in `generate` as a user calls it and of a step on the device alone.

    tpot_ms      from one step that gives every sequence a token to the next, the median: by the clock on the wall, when
                 `generate` is handed a step's tokens, with scheduling and sampling
    mean_ms      the mean of the same, with the host's pauses and with steps that the prompts before them slow down
    slowest_ms   the longest of them
    tok_s        tokens a second, of all sequences, by mean_ms
    step_ms      a replay of the engine's own captured step (forward, sample, advance), by events on the device
    bytes        what a step must read: every weight once, and each sequence's history, halfway through those steps
    clock_MHz    of the multiprocessors, and power_W: medians while those steps ran, where nvidia-smi says; step_clock_MHz and
                 step_power_W: while the replays did
    GBps         bytes by tpot_ms
    share        GBps of the bandwidth that a plain reduction reads in the same run; step_share: by step_ms
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

from ..codegen.traffic import Step
from .clock import Clock
from .engine import SPARE, compiled_for, fill_caches, kernel_traffic, make_llm, pick, prompts
from .limits import machine, microseconds, read_bandwidth, replay_microseconds
from .shapes import config_of
from .table import say

COLUMNS = {"model": ("model", ""), "batch": ("batch", "d"), "context": ("context", "d"), "tpot_ms": ("tpot ms", ".4f"),
           "mean_ms": ("mean ms", ".4f"), "step_ms": ("step ms", ".4f"), "tok_s": ("tok/s", ".1f"),
           "clock_MHz": ("MHz", ".0f"), "power_W": ("W", ".0f"), "bytes": ("bytes", ",d"), "GBps": ("GB/s", ".0f"),
           "read_GBps": ("read GB/s", ".0f"), "share": ("share", ".1%"), "step_share": ("step share", ".1%")}


def decode_bytes(compiled, batch: int, context: int) -> int:
    """Fewest bytes a decode step must read: every weight once plus each sequence's history of `context` tokens."""
    moved = kernel_traffic(compiled, Step(batch, batch, context))
    return moved.weights + moved.history


def bench_decode(models: list[str], batches: list[int], contexts: list[int], *, steps: int = 128, repeats: int = 2,
                 device: str = "auto", dtype: str = "auto") -> dict:
    """One case per model, context and batch; see the module for what is measured."""
    from fusec.runtime.program import pick_dtype

    configs = [config_of(model) for model in models]
    chosen = [pick(device, config) for _, config in configs][0]
    read = read_bandwidth(chosen)
    cases = []
    for name, config in configs:
        kind = pick_dtype(dtype, chosen, config)
        compiled = compiled_for(config, kind)
        budget = min(8192, max(batches) * max(contexts))
        longest = max(contexts) + ramp(max(batches), max(contexts), budget) + steps + SPARE
        say(f"{name}: loading random {kind} weights on {chosen}")
        llm = make_llm(config, device=chosen, dtype=kind, batch=max(batches), longest=longest, budget=budget)
        fill_caches(llm.program)
        generate(llm, 1, min(64, max(contexts)), 4)
        for context in contexts:
            for batch in batches:
                count = ramp(batch, context, budget) + steps
                generate(llm, batch, context, count)  # captures the graphs of this batch
                with Clock(chosen) as clock:
                    timed = min(time_per_token(llm, batch, context, count) for _ in range(repeats))
                    halfway = context + round(timed.had)
                    began = time.perf_counter()
                    step = step_milliseconds(llm, batch, halfway)
                    ended = time.perf_counter()
                moved = decode_bytes(compiled, batch, halfway)
                cases.append(case(name, batch, context, timed.tpot_ms, timed.mean_ms, step, moved, read)
                             | {"slowest_ms": round(timed.slowest_ms, 4)} | clock.between(timed.began, timed.ended)
                             | {f"step_{key}": value for key, value in clock.between(began, ended).items()})
                share = cases[-1]["share"]
                took = f"{timed.tpot_ms:.3f} ms a token, {step:.3f} ms a step"
                say(f"{name}, batch {batch}, context {context}: {took}, {share:.1%}")
        del llm
        release(chosen)
    return {"command": "decode", **machine(chosen), "steps": steps, "read_GBps": round(read, 1), "cases": cases}


class Timed(NamedTuple):
    """Milliseconds from step to step by the wall, the median, the mean and the longest; tokens that a sequence had halfway, on
    average; when the steps began and ended, by time.perf_counter."""

    tpot_ms: float
    mean_ms: float
    slowest_ms: float
    had: float
    began: float
    ended: float


def case(name, batch, context, tpot_ms, mean_ms, step_ms, moved, read_gbps) -> dict:
    gbps, step_gbps = moved / tpot_ms / 1e6, moved / step_ms / 1e6
    return {"model": name, "batch": batch, "context": context, "tpot_ms": round(tpot_ms, 4), "mean_ms": round(mean_ms, 4),
            "step_ms": round(step_ms, 4), "tok_s": round(batch / mean_ms * 1e3, 1), "bytes": moved, "GBps": round(gbps, 1),
            "read_GBps": round(read_gbps, 1), "share": round(gbps / read_gbps, 4), "step_share": round(step_gbps / read_gbps, 4)}


def generate(llm, batch: int, context: int, count: int) -> float:
    """Seconds in which `generate` answers `batch` prompts of `context` tokens with `count` tokens each."""
    from fusec.runtime.sampling import SamplingParams

    asked = prompts(batch, context, llm.program.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    clock = time.perf_counter()
    answers = llm.generate(asked, params)
    seconds = time.perf_counter() - clock
    assert all(len(answer.outputs[0].token_ids) == count for answer in answers)
    return seconds


def ramp(batch: int, context: int, budget: int) -> int:
    """Tokens that the first of `batch` prompts has, at the most, when the last has its first: steps of `budget` tokens hold the
    prompts and a token of each sequence that decodes already. One more, since decoding alone has begun then."""
    return -(-batch * context // max(1, budget - batch)) + 1


def time_per_token(llm, batch: int, context: int, count: int) -> Timed:
    """Of the steps in which all of `batch` sequences decode."""
    seen, step = [], llm.engine.step

    def watched():
        new = step()
        seen.append((time.perf_counter(), len(new)))
        return new

    llm.engine.step = watched
    try:
        generate(llm, batch, context, count)
    finally:
        del llm.engine.step
    seen = [(clock, tokens) for clock, tokens in seen if tokens]
    full = [number for number, (_, tokens) in enumerate(seen) if tokens == batch]
    first, last = full[0], full[-1]
    clocks = [clock for clock, _ in seen[first : last + 1]]
    took = [(after - before) * 1e3 for before, after in itertools.pairwise(clocks)]
    given = [sum(tokens for _, tokens in seen[: number + 1]) for number in (first, last)]
    return Timed(statistics.median(took), statistics.mean(took), max(took), sum(given) / 2 / batch, clocks[0], clocks[-1])


def step_milliseconds(llm, batch: int, context: int) -> float:
    """Milliseconds of one decode step on the device at a fixed context: `context` tokens of random history in own blocks."""
    import torch

    from fusec.runtime.runner import DecodeGraph
    from fusec.runtime.sampling import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=SPARE, ignore_eos=True)
    for prompt in prompts(batch, 8, llm.program.vocab_size):
        llm._submit(llm._request(prompt, params))
    runner = llm.engine.runner
    launched = runner.steps
    while runner.steps < launched + 2 or llm.engine.scheduler.waiting:
        llm._step()
    stretch(llm, batch, context)
    buffers = runner.buffers
    state = [(t, t.clone()) for t in (buffers.ids, buffers.positions, buffers.context_lens, buffers.slots, buffers.cursor)]

    def reset():  # each step moves the sequences on: put them back
        for tensor, value in state:
            tensor.copy_(value)

    bound = runner._context_bucket(context + SPARE)
    with torch.inference_mode():
        if runner.graphs is None:
            time_us = microseconds(lambda: runner._decode_step(batch, runner.variant, bound), llm.program.device, reset=reset)
        else:
            rows = min(key[0] for key in runner.graphs if key[0] >= batch)
            key = (rows, runner.variant, bound)
            captured = runner.graphs.get(key) or DecodeGraph(runner, key)
            time_us = replay_microseconds(captured.graph, at_least=20000.0, most=SPARE // 2, reset=reset)
    llm.engine.reset()
    llm._requests.clear()
    return time_us / 1e3


def stretch(llm, batch: int, context: int) -> None:
    """Gives each of the first rows a history of `context` tokens, in blocks that no other row has."""
    buffers, each = llm.engine.runner.buffers, llm.engine.allocator.num_blocks // batch
    columns = min(buffers.tables.shape[1], each)
    for row in range(batch):
        buffers.tables[row, :columns] = buffers.tables.new_tensor(range(row * each, row * each + columns))
    buffers.positions[:batch] = context
    buffers.context_lens[:batch] = context + 1
    buffers.slots[:batch] = buffers.slots_of(buffers.rows[:batch], buffers.positions[:batch])


def release(device) -> None:
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
