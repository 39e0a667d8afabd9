"""Prefill: the time of a prompt, against the vendor's matmul on the same shapes.

    ms          `generate` with one token asked for, by the clock on the wall: the time to the first token of a prompt
    step_ms     the program's forward of the same step on the device, by events
    TFLOPs      the step's multiply-adds (contractions and causal attention, twice) by step_ms
    vendor_ms   the model's matrices through the vendor's matmul at the same number of tokens, without attention
    share       TFLOPs as a share of the vendor's rate at 8192³
"""

from __future__ import annotations

import statistics

from ..codegen.contraction import Contraction
from ..codegen.traffic import Step
from .decode import generate, release
from .engine import SPARE, compiled_for, kernel_traffic, make_llm, pick
from .limits import machine, matmul_microseconds, matmul_rate, microseconds
from .shapes import config_of
from .table import say

COLUMNS = {"model": ("model", ""), "tokens": ("tokens", "d"), "ms": ("ms", ".2f"), "step_ms": ("step ms", ".2f"),
           "TFLOPs": ("TFLOP/s", ".1f"), "vendor_ms": ("vendor matmuls ms", ".2f"),
           "vendor_TFLOPs": ("vendor 8192³ TFLOP/s", ".1f"), "share": ("share", ".1%")}


def bench_prefill(models: list[str], tokens: list[int], *, device: str = "auto", dtype: str = "auto", repeats: int = 5) -> dict:
    """One case per model and prompt length."""
    import torch

    from fusec.runtime.program import pick_dtype

    configs = [config_of(model) for model in models]
    chosen = [pick(device, config) for _, config in configs][0]
    cases = []
    for name, config in configs:
        kind = pick_dtype(dtype, chosen, config)
        peak = matmul_rate(chosen, getattr(torch, kind))
        compiled = compiled_for(config, kind)
        say(f"{name}: loading random {kind} weights on {chosen}")
        llm = make_llm(config, device=chosen, dtype=kind, batch=1, longest=max(tokens) + SPARE, budget=max(tokens))
        for count in tokens:
            generate(llm, 1, count, 1)
            ms = statistics.median(generate(llm, 1, count, 1) for _ in range(repeats)) * 1e3
            step_ms = forward_milliseconds(llm, count)
            vendor_ms = vendor_milliseconds(compiled, count, chosen, getattr(torch, kind))
            tflops = kernel_traffic(compiled, Step(count, 1, count)).flops / step_ms / 1e9
            cases.append({"model": name, "tokens": count, "ms": round(ms, 3), "step_ms": round(step_ms, 3),
                          "TFLOPs": round(tflops, 2), "vendor_ms": round(vendor_ms, 3),
                          "vendor_TFLOPs": round(peak, 2), "share": round(tflops / peak, 4)})
            say(f"{name}, {count} tokens: {ms:.2f} ms, {tflops:.1f} of {peak:.1f} TFLOP/s")
        del llm
        release(chosen)
    return {"command": "prefill", **machine(chosen), "cases": cases}


def forward_milliseconds(llm, count: int) -> float:
    """Milliseconds of one forward of `count` tokens of one sequence."""
    import torch

    batch = prefill_batch(llm.program, count)
    device = llm.program.device
    if device.type != "cuda":
        return microseconds(lambda: llm.program.forward(batch), device) / 1e3
    times = []
    for i in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        llm.program.forward(batch)
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if i > 1 else []
    return statistics.median(times)


def prefill_batch(program, count: int):
    """One sequence of `count` tokens from position 0, in the first blocks of the cache."""
    import torch

    from fusec.runtime.batch import Batch

    def ints(values, dtype=torch.int32):
        return torch.as_tensor(values, dtype=dtype, device=program.device)

    blocks = -(-count // program.block_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(program.vocab_size, (count,), generator=draw)
    tables = [[*range(blocks)] + [0] * (-blocks % 16)]
    return Batch(ids=ints(ids), positions=ints(range(count)), slots=ints(range(count), torch.int64),
                 query_starts=ints([0, count]), context_lens=ints([count]), block_tables=ints(tables), rows=ints([count - 1]),
                 max_query=count, max_context=count)


def vendor_milliseconds(compiled, count: int, device, dtype) -> float:
    """The step's contractions with weights through the vendor's matmul: what merging and fusing start from."""
    total_us = 0.0
    for function in compiled.module.functions:
        if function.kernel.attrs["kind"] == "contract":
            parts = Contraction(function.kernel.attrs["body"])
            rows = count if parts.row_dim == "T" else 1
            n = 1
            for dim in parts.anchor.dims:
                n *= dim.size or 1
            total_us += function.count * matmul_microseconds(rows, n, parts.k, device, dtype)
    return total_us / 1e3


