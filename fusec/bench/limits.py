"""What the machine itself allows, and how times are taken.

Everything on a GPU is timed as a CUDA graph between two events, several replays at a time, so that the host is out of the
picture; what is reported is the median of the rounds. What is timed runs in inference mode, as it does when a model answers:
scratch that an answer has left behind can be written in no other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator

import torch

READ_BYTES = 4 << 30  # far past any cache
READ_TILES = ((4096, 2, 8), (8192, 4, 8), (4096, 8, 4), (2048, 16, 4))  # (block, programs a multiprocessor, warps)


@torch.inference_mode()
def microseconds(run, device, *, rounds: int = 15, at_least: float = 5000.0, reset=None) -> float:
    """The median time of `run()`. On a GPU it is captured in a CUDA graph after it ran once; a round lasts `at_least` µs.

    reset: called before every round, untimed.
    """
    if device.type != "cuda":
        run()
        return statistics.median(wall(run, reset) for _ in range(min(rounds, 3)))
    return replay_microseconds(capture(run, device), rounds=rounds, at_least=at_least, reset=reset)


@torch.inference_mode()
def capture(run, device) -> torch.cuda.CUDAGraph:
    """`run()` as a CUDA graph. It ran twice before."""
    run()
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


@torch.inference_mode()
def replay_microseconds(graph, *, rounds: int = 15, at_least: float = 5000.0, most: int = 256, reset=None) -> float:
    """The median time of one replay of a captured graph."""
    count = replays(graph, at_least, most, reset)
    return statistics.median(replay(graph, count, reset) for _ in range(rounds))


def replays(graph, at_least: float, most: int, reset=None) -> int:
    """How many replays take `at_least` µs, once the graph is warm."""
    replay(graph, 2, reset)
    return min(most, max(2, int(at_least / max(replay(graph, 4, reset), 0.1)) + 1))


def replay(graph, count: int, reset=None) -> float:
    """µs of one of `count` replays."""
    if reset:
        reset()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


@torch.inference_mode()
def turns(now, other, *, at_least: float = 4000.0, most: int = 256) -> Iterator[tuple[float, float]]:
    """µs of a replay of two graphs, taken in turn without end, so that a clock that changes changes for both."""
    count = replays(other, at_least, most)
    while True:
        yield replay(now, count), replay(other, count)
        after = replay(other, count)  # neither is always the first
        yield replay(now, count), after


def proven_saving(pairs: Iterable[tuple[float, float]], *, least: int = 12, most: int = 24) -> float:
    """The share of its time that something saves over what there is now, less four standard errors: above 0 it is noise once in a
    hundred times.

    pairs: times of (now, other), of which no more are taken than it needs to tell; four losses are enough. Of all savings the
    smallest and the greatest do not count: something came in between.
    """
    savings = []
    for now, other in itertools.islice(pairs, most):
        savings.append(1 - other / now)
        if len(savings) == 4 and max(savings) < 0:
            return max(savings)
        if len(savings) >= least:
            inner = sorted(savings)[1:-1]
            mean, doubt = statistics.mean(inner), 4 * statistics.stdev(inner) / len(inner) ** 0.5
            if mean > doubt or mean < 0:
                break
    return mean - doubt


def wall(run, reset=None) -> float:
    if reset:
        reset()
    clock = time.perf_counter()
    run()
    return (time.perf_counter() - clock) * 1e6


def read_bandwidth(device) -> float:
    """GB/s of a plain reduction: over 4 GiB on a GPU, the best of a few tilings; over 256 MiB on a CPU."""
    if device.type != "cuda":
        x = torch.ones(64 << 20)
        return x.numel() * 4 / microseconds(x.sum, device) / 1e3
    from .read_kernel import read

    free, _ = torch.cuda.mem_get_info(device)
    size = min(READ_BYTES, 1 << (max(free // 2, 1 << 26).bit_length() - 1))
    x = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    out = torch.empty(16384, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    times = [microseconds(lambda b=block, p=per * processors, w=warps: read[(p,)](x, out, x.numel(), b, p, num_warps=w), device)
             for block, per, warps in READ_TILES]
    return size / min(times) / 1e3


def matmul_microseconds(m: int, n: int, k: int, device, dtype) -> float:
    """The vendor's x @ Wᵀ of [m, k] and [n, k], weights rotated so that they come from memory."""
    x = torch.randn(m, k, device=device, dtype=dtype)
    copies = 1 if device.type != "cuda" else max(1, min(8, (256 << 20) // (n * k * x.element_size())))
    weights = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
    return microseconds(lambda: [torch.nn.functional.linear(x, w) for w in weights], device) / copies


def matmul_rate(device, dtype, size: int = 8192) -> float:
    """TFLOP/s of the vendor's matmul of `size`³."""
    size = size if device.type == "cuda" else 512
    return 2 * size**3 / matmul_microseconds(size, size, size, device, dtype) / 1e6


def machine(device) -> dict:
    """What the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "fusec": __version__, "torch": torch.__version__, "triton": installed("triton"),
            "cuda": torch.version.cuda if device.type == "cuda" else None}
