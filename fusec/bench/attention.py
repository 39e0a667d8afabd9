"""The paged attention kernels by themselves, against torch's own attention and FlashInfer's, all under CUDA graph replay.

Sequences are uniform, or skewed: lengths fall with the rank, from the whole context to a sixteenth of it. The peers get what
suits them: torch's keys and values lie together without pages, all of the batch's longest length, and FlashInfer is planned
ahead.

    us, torch_us, flashinfer_us   our kernel and its peers, the best of each
    GBps, TFLOPs                  history read (decode); causal multiply-adds, counted twice (prefill)
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from .decode import release
from .engine import BLOCK_SIZE, need_gpu
from .limits import machine, microseconds, read_bandwidth
from .shapes import config_of
from .table import say

COLD = 256 << 20
COLUMNS = {"kind": ("kind", ""), "batch": ("batch", "d"), "context": ("context", "d"), "lengths": ("lengths", ""),
           "us": ("µs", ".2f"), "torch_us": ("torch µs", ".2f"), "flashinfer_us": ("FlashInfer µs", ".2f"),
           "GBps": ("GB/s", ".0f"), "share": ("share", ".1%"), "TFLOPs": ("TFLOP/s", ".1f"),
           "torch_ratio": ("torch / ours", ".2f"), "flashinfer_ratio": ("FlashInfer / ours", ".2f")}


@dataclass
class Shape:
    """Heads of the model's first attention kernel: G kv heads, R query heads each, K and J the sizes of keys and values."""

    G: int
    R: int
    K: int
    J: int


class Model:
    """What the generated launch function asks of a program: pages, and scratch of fixed addresses."""

    def __init__(self, device):
        self.device, self.block_size, self._scratch = device, BLOCK_SIZE, {}

    def scratch(self, launch, sequences):
        from fusec.runtime.triton_program import TritonProgram

        return TritonProgram.scratch(self, launch, sequences)


def bench_attention(model: str, batches: list[int], contexts: list[int], tokens: list[int], *, device: str = "auto",
                    dtype: str = "auto") -> dict:
    """Decode cases of every batch and context, uniform and skewed, then prefill cases of every prompt length."""
    import torch

    from fusec.runtime.program import pick_dtype

    name, config = config_of(model)
    chosen = need_gpu(device, "fusec bench attention")
    torch.cuda.set_device(chosen)
    kind = pick_dtype(dtype, chosen, config)
    call, shape = attention_of(config, kind, chosen, max(batches))
    read, cases = read_bandwidth(chosen), []
    peer = FlashInfer.find(chosen)
    for batch, context, skewed in itertools.product(batches, contexts, (False, True)):
        if skewed and batch == 1 or batch * context * shape.G * (shape.K + shape.J) * 2 > 40e9:
            continue
        lengths = lengths_of(batch, context, skewed)
        case = decode_case(call, shape, lengths, getattr(torch, kind), chosen, peer, read)
        cases.append({"kind": "decode", "batch": batch, "context": context, "lengths": "skewed" if skewed else "uniform"} | case)
        say(f"decode {batch} × {context} {cases[-1]['lengths']}: {case['us']:.2f} µs, {case['share']:.1%}")
        release(chosen)
    for count in tokens:
        case = prefill_case(call, shape, count, getattr(torch, kind), chosen, peer)
        cases.append({"kind": "prefill", "batch": 1, "context": count, "lengths": "uniform"} | case)
        say(f"prefill {count}: {case['us']:.1f} µs, {case['TFLOPs']:.0f} TFLOP/s")
        release(chosen)
    document = {"command": "attention", **machine(chosen), "model": name, "read_GBps": round(read, 1)}
    ratios = [c["flashinfer_ratio"] for c in cases if c["kind"] == "decode" and c.get("flashinfer_ratio")]
    if ratios:
        geomean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        document |= {"flashinfer_geomean": round(geomean, 3), "flashinfer_worst": min(ratios)}
    return document | {"cases": cases}


def lengths_of(batch: int, context: int, skewed: bool) -> list[int]:
    """[context] * batch, or lengths that fall with the rank: context / rank, at least a sixteenth of it."""
    if not skewed:
        return [context] * batch
    return [max(1, context // 16, context // (rank + 1)) for rank in range(batch)]


def attention_of(config: dict, dtype: str, device, most: int):
    """(launch function of the generated attention kernel, its heads) of a model of the config's shape, with one layer.
    most: sequences of a batch."""
    import torch

    from fusec.codegen.schedule import gpu_key
    from fusec.compiler import compile
    from fusec.runtime.capabilities import dependent_launch
    from fusec.runtime.triton_program import load_source

    gpu = gpu_key(torch.cuda.get_device_name(device))
    module = compile(None, config | {"num_hidden_layers": 1}, dtype=dtype, gpu=gpu).module
    function = next(f for f in module.functions if f.kernel.attrs["kind"] == "attention")
    program = load_source(module.kernels_py, module.program_py)
    program.PDL = dependent_launch(device)
    found = next(s.facts["attention"] for s in function.sources if "attention" in s.facts)
    # What a norm over each head reads, if there is one: random numbers.
    types, made = {"x": getattr(torch, dtype), "f32": torch.float32}, {}
    for name, number in function.sources[0].facts["inputs"].items():
        value = function.kernel.inputs[number]
        made[name] = torch.randn(*(d.size or most for d in value.dims), device=device).to(types[value.dtype])
    return functools.partial(getattr(program, function.name), **made), Shape(found.G, found.R, found.K, found.J)


def paged(lengths, shape: Shape, dtype, device):
    """(caches of keys and values, block tables): pages in random order."""
    import torch

    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(counts), device=device, dtype=torch.int32)
    tables = torch.zeros(len(lengths), -(-max(counts) // 16) * 16, device=device, dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[at:at + count]
        at += count
    k, v = (torch.randn(sum(counts), BLOCK_SIZE, shape.G, size, device=device, dtype=dtype) for size in (shape.K, shape.J))
    return k, v, tables


def batch_of(tables, lengths, queries, device):
    import torch

    from fusec.runtime.batch import Batch

    def ints(values):
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    starts = [0, *itertools.accumulate(queries)]
    empty = ints([])
    return Batch(ids=empty, positions=empty, slots=empty, query_starts=ints(starts), context_lens=ints(lengths),
                 block_tables=tables, rows=empty, max_query=max(queries), max_context=max(lengths))


def decode_case(call, shape, lengths, dtype, device, peer, read) -> dict:
    moved = sum(lengths) * shape.G * (shape.K + shape.J) * dtype.itemsize
    copies = max(1, min(64, -(-COLD // moved)))
    us, peer_us = paged_decode(call, shape, lengths, dtype, device, peer, copies)
    release(device)
    found = {"us": round(us, 3), "GBps": round(moved / us / 1e3, 1), "share": round(moved / us / 1e3 / read, 4)}
    found |= ratio("flashinfer", peer_us, us)
    return found | ratio("torch", torch_decode(lengths, shape, dtype, device, copies), us)


def paged_decode(call, shape, lengths, dtype, device, peer, copies):
    """(our time, FlashInfer's or None) over `copies` caches in turn, so that they come from memory."""
    import torch

    q = torch.randn(len(lengths), shape.G * shape.R * shape.K, device=device, dtype=dtype)
    out = torch.empty(len(lengths), shape.G * shape.R * shape.J, device=device, dtype=dtype)
    sets = [paged(lengths, shape, dtype, device) for _ in range(copies)]
    model = Model(device)
    batches = [batch_of(tables, lengths, [1] * len(lengths), device) for _, _, tables in sets]

    def ours():
        for (k, v, _), b in zip(sets, batches, strict=True):
            call(m=model, b=b, q=q, k_cache=k, v_cache=v, out=out)

    return microseconds(ours, device) / copies, peer.decode(sets, lengths, shape, q) if peer else None


def torch_decode(lengths, shape, dtype, device, copies):
    """torch's attention of one query a sequence; None where it cannot."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    batch, longest = len(lengths), max(lengths)
    if batch * longest * shape.G * (shape.K + shape.J) * dtype.itemsize * copies > 60e9:
        return None
    q = torch.randn(batch, shape.G * shape.R, 1, shape.K, device=device, dtype=dtype)
    sets = [tuple(torch.randn(batch, shape.G, longest, size, device=device, dtype=dtype) for size in (shape.K, shape.J))
            for _ in range(copies)]
    mask = None
    if min(lengths) < longest:
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None, None, None]
    return attempt(lambda: [sdpa(q, k, v, attn_mask=mask, enable_gqa=shape.R > 1) for k, v in sets], device, copies)


def prefill_case(call, shape, count, dtype, device, peer) -> dict:
    import torch

    k, v, tables = paged([count], shape, dtype, device)
    q = torch.randn(count, shape.G * shape.R * shape.K, device=device, dtype=dtype)
    out = torch.empty(count, shape.G * shape.R * shape.J, device=device, dtype=dtype)
    model, batch = Model(device), batch_of(tables, [count], [count], device)
    us = microseconds(lambda: call(m=model, b=batch, q=q, k_cache=k, v_cache=v, out=out), device)
    flops = 2 * shape.G * shape.R * (shape.K + shape.J) * count * (count + 1) / 2
    found = {"us": round(us, 2), "TFLOPs": round(flops / us / 1e6, 1)}
    found |= ratio("torch", torch_prefill(shape, count, dtype, device), us)
    return found | ratio("flashinfer", peer.prefill(k, v, tables, count, shape, q) if peer else None, us)


def torch_prefill(shape, count, dtype, device):
    """The faster of torch's flash and cuDNN kernels, causal, keys and values repeated to the query heads beforehand."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    heads = shape.G * shape.R
    q, k, v = (torch.randn(1, heads, count, size, device=device, dtype=dtype) for size in (shape.K, shape.K, shape.J))
    times = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            times.append(attempt(lambda: sdpa(q, k, v, is_causal=True), device))
    return min((t for t in times if t is not None), default=None)


def attempt(run, device, copies: int = 1):
    """The time of a peer, or None with the reason on stderr: a peer that cannot run a shape stops nothing."""
    try:
        return microseconds(run, device) / copies
    except Exception as error:
        say(f"  left out: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}")
        return None


def ratio(name: str, peer_us, us) -> dict:
    if peer_us is None:
        return {f"{name}_us": None, f"{name}_ratio": None}
    return {f"{name}_us": round(peer_us, 3), f"{name}_ratio": round(peer_us / us, 3)}


class FlashInfer:
    """FlashInfer's paged attention, where it is installed."""

    def __init__(self, module, device):
        import torch

        self.module, self.device = module, device
        self.workspace = torch.empty(512 << 20, dtype=torch.uint8, device=device)

    @classmethod
    def find(cls, device):
        try:
            import flashinfer
        except Exception:
            say("FlashInfer is not installed: its columns stay empty")
            return None
        return cls(flashinfer, device)

    def pages(self, lengths):
        import torch

        counts = [-(-n // BLOCK_SIZE) for n in lengths]
        indptr = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=self.device)
        last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in lengths], dtype=torch.int32, device=self.device)
        return counts, indptr, last

    def decode(self, sets, lengths, shape: Shape, q):
        import torch

        counts, indptr, last = self.pages(lengths)
        queries, best = q.view(len(lengths), -1, shape.K), None
        tables = sets[-1][2]  # one plan serves all copies: they differ in the order of their pages alone
        index = torch.cat([tables[row, :count] for row, count in enumerate(counts)])
        for cores, backend in ((True, "auto"), (False, "auto"), (True, "fa3")):
            try:
                wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=cores,
                                                                         backend=backend)
                wrapper.plan(indptr, index, last, shape.G * shape.R, shape.G, shape.K, BLOCK_SIZE, q_data_type=q.dtype,
                             kv_data_type=q.dtype)
            except Exception as error:
                say(f"  FlashInfer left out: {type(error).__name__}: {str(error)[:120]}")
                continue
            time = attempt(lambda w=wrapper: [w.run(queries, (k, v)) for k, v, _ in sets], self.device, len(sets))
            best = time if best is None or time is not None and time < best else best
        return best

    def prefill(self, k, v, tables, count, shape: Shape, q):
        import torch

        counts, indptr, last = self.pages([count])
        starts = torch.tensor([0, count], dtype=torch.int32, device=self.device)
        best = None
        for backend in ("fa2", "fa3"):
            try:
                wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=backend)
                wrapper.plan(starts, indptr, tables[0, :counts[0]].contiguous(), last, shape.G * shape.R, shape.G, shape.K,
                             BLOCK_SIZE, causal=True, q_data_type=q.dtype, kv_data_type=k.dtype)
            except Exception as error:
                say(f"  FlashInfer {backend} left out: {type(error).__name__}: {str(error)[:120]}")
                continue
            queries = q.view(count, -1, shape.K)
            out = torch.empty(count, queries.shape[1], shape.J, dtype=q.dtype, device=self.device)  # its own would be zeroed
            time = attempt(lambda w=wrapper, x=queries, out=out: w.run(x, (k, v), out=out), self.device)
            best = time if best is None or time is not None and time < best else best
        return best
