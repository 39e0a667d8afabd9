"""Each generated kernel of a step by itself: what to tune with.

A step is run once on real tensors with the program's launch functions watched; then every function's launches are repeated
alone, in a CUDA graph, over the weights and caches of all layers (and copies of them, where a model is small), so that every
byte comes from memory.

    us, step_us   one launch, and all launches of the kernel in a step
    bytes, GBps   what a launch must move, and how fast it does
    share         GBps of the read bandwidth, or TFLOPs of the vendor's matmul: whichever is nearer to its limit
"""

from __future__ import annotations

from ..codegen.traffic import Step, traffic
from ..explain import places
from .decode import release
from .engine import BLOCK_SIZE, need_gpu
from .limits import machine, matmul_rate, microseconds, read_bandwidth
from .prefill import prefill_batch
from .shapes import config_of
from .table import say

COLD = 256 << 20  # bytes that a round moves at least: several times the last cache
MOST_LAUNCHES = 256
COLUMNS = {"model": ("model", ""), "step": ("step", ""), "kernel": ("kernel", ""), "count": ("×", "d"), "us": ("µs", ".2f"),
           "step_us": ("µs a step", ".1f"), "bytes": ("bytes", ",d"), "GBps": ("GB/s", ".0f"), "TFLOPs": ("TFLOP/s", ".1f"),
           "share": ("share", ".1%"), "limit": ("of", ""), "lines": ("source", "")}


def bench_kernels(models: list[str], batches: list[int], context: int, tokens: int | None = None, *, device: str = "auto",
                  dtype: str = "auto") -> dict:
    """One case per model, step and kernel, and one for the whole step.  tokens: a prefill step instead of decoding."""
    import torch

    from fusec.runtime.program import load_program, pick_dtype

    configs = [config_of(model) for model in models]
    chosen = need_gpu(device, "fusec bench kernels")
    read, cases = read_bandwidth(chosen), []
    steps = [Step(tokens, 1, tokens)] if tokens else [Step(batch, batch, context) for batch in batches]
    for name, config in configs:
        kind = pick_dtype(dtype, chosen, config)
        peak = matmul_rate(chosen, getattr(torch, kind))
        say(f"{name}: loading random {kind} weights on {chosen}")
        most = max(step.tokens for step in steps)
        program = load_program(config, dtype=kind, device=str(chosen), load_format="random", max_tokens=most)
        program.allocate_cache(max(s.sequences * (-(-s.context // BLOCK_SIZE)) for s in steps), BLOCK_SIZE)
        for cache in program.caches.values():
            cache.normal_()
        for step in steps:
            found = measure(program, step, chosen, read, peak)
            cases += [{"model": name, **case} for case in found]
        del program
        release(chosen)
    return {"command": "kernels", **machine(chosen), "read_GBps": round(read, 1), "vendor_TFLOPs": round(peak, 1), "cases": cases}


def measure(program, step: Step, device, read: float, peak: float) -> list[dict]:
    """The cases of one step, the slowest kernel first, the whole step last."""
    batch = prefill_batch(program, step.tokens) if step.tokens > step.sequences else decode_batch(program, step)
    program.forward(batch)
    calls = watch(program, batch)
    functions = {f.name: f for f in program.module.functions}
    text = f"decode {step.sequences} × {step.context}" if step.tokens == step.sequences else f"prefill {step.tokens}"
    cases = []
    for name, arguments in calls.items():
        function = functions[name]
        if step.tokens == step.sequences and function.kernel.attrs.get("inlined"):
            continue  # decode attention does its work
        moved = traffic(function.kernel, step, program.compiled.dtype)
        launches = rotate(program, arguments, max(moved.bytes, 1))
        call = getattr(program.program, name)
        us = microseconds(lambda call=call, launches=launches: [call(*each) for each in launches], device) / len(launches)
        cases.append(case(text, name, len(arguments), us, moved, read, peak) | {"lines": places(function.kernel)})
        del launches
        say(f"{text}, {name}: {us:.2f} µs, {cases[-1]['share']:.1%}")
    cases.sort(key=lambda c: -c["step_us"])
    whole = microseconds(lambda: program.forward(batch), device)
    total = sum((traffic(launch.kernel, step, program.compiled.dtype) for launch in program.module.launches[1:]),
                traffic(program.module.launches[0].kernel, step, program.compiled.dtype))
    cases.append(case(text, "the whole step", 1, whole, total, read, peak) | {"lines": ""})
    return cases


def case(text, name, count, us, moved, read, peak) -> dict:
    gbps, tflops = moved.bytes / us / 1e3, moved.flops / us / 1e6
    limit, share = max(("bandwidth", gbps / read), ("matmul rate", tflops / peak), key=lambda pair: pair[1])
    return {"step": text, "kernel": name, "count": count, "us": round(us, 3), "step_us": round(us * count, 2),
            "bytes": moved.bytes, "GBps": round(gbps, 1), "TFLOPs": round(tflops, 2), "share": round(share, 4), "limit": limit}


def watch(program, batch) -> dict[str, list[tuple]]:
    """function -> the arguments of each of its calls in one step, in the order of the first call."""
    calls: dict[str, list[tuple]] = {}
    space = vars(program.program)
    real = {f.name: space[f.name] for f in program.module.functions}

    def watched(name):
        def call(*arguments):
            calls.setdefault(name, []).append(arguments)
            return real[name](*arguments)
        return call

    try:
        space.update({name: watched(name) for name in real})
        program.forward(batch)
    finally:
        space.update(real)
    return calls


def rotate(program, calls: list[tuple], each: int) -> list[tuple]:
    """The calls, and copies of them over copied weights and caches until a round moves COLD bytes."""
    import torch

    apart = {t.data_ptr() for t in (*program.weights.values(), *program.caches.values())}

    def copied(arguments):
        return tuple(a.clone() if isinstance(a, torch.Tensor) and a.data_ptr() in apart else a for a in arguments)

    def room():
        return torch.cuda.mem_get_info(program.device)[0] > 16 << 30

    launches = list(calls[:MOST_LAUNCHES])
    wanted = min(MOST_LAUNCHES, max(8, -(-COLD // each)))
    while len(launches) < wanted:
        call = calls[len(launches) % len(calls)]
        launches.append(copied(call) if room() else call)
    return launches


def decode_batch(program, step: Step):
    """`step.sequences` sequences, each with its newest token at the end of a history in scattered blocks."""
    import torch

    from fusec.runtime.batch import Batch

    count, last = step.sequences, step.context - 1
    columns = -(-step.context // program.block_size)
    draw = torch.Generator().manual_seed(0)
    tables = torch.randperm(count * columns, generator=draw).view(count, columns)
    slots = tables[:, last // program.block_size] * program.block_size + last % program.block_size
    tables = torch.nn.functional.pad(tables, (0, -columns % 16))

    def ints(values, dtype=torch.int32):
        return torch.as_tensor(values, dtype=dtype, device=program.device)

    return Batch(ids=ints(torch.randint(program.vocab_size, (count,), generator=draw)), positions=ints([last] * count),
                 slots=ints(slots, torch.int64), query_starts=ints(range(count + 1)), context_lens=ints([step.context] * count),
                 block_tables=ints(tables), rows=ints(range(count)), max_query=1, max_context=step.context, every=True)
