"""Renders the two attention templates and checks or times them.

    attention_lab.py check              bfloat16 against float64 on the GPU
    attention_lab.py decode | prefill   times tiles, splits and stages under CUDA graph replay
    attention_lab.py all

Tests take the batches, the reference and the compiler's report from here.
"""
import itertools
import linecache
import re
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jinja2
import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fusec.codegen.attention_schedule import decode_launch, decode_scratch, prefill_launch, with_tile  # noqa: E402
from fusec.codegen.module import preamble  # noqa: E402
from fusec.runtime.carveout import share_memory  # noqa: E402

TEMPLATES = ROOT / "templates"
CAUSAL = "keep = k_pos <= q_pos"


def softcap(cap):
    return f"s = {cap} * (2.0 * tl.sigmoid(2.0 * s / {cap}) - 1.0)"


def render(template, name="attention", score=(), mask=(CAUSAL,), first=None, causal=True, dense=None, extra=(),
           comment=("attention",), heads=None):
    """The text of one kernel."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
                             undefined=jinja2.StrictUndefined)
    k = types.SimpleNamespace(name=name, comment=list(comment), score=list(score), mask=list(mask), first=first, causal=causal,
                              extra=list(extra), heads=heads, **({} if dense is None else {"dense": dense}))
    return env.get_template(f"attention_{template}.py.jinja").render(k=k)


def kernel(template, **context):
    """The compiled-on-launch kernel of `render`."""
    text = render(template, **context)
    source = preamble(text) + "\n\n" + text
    path = f"<{template} {hash(source) & 0xffffffff:x}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    scope = {"triton": triton, "tl": tl, "__name__": "attention_lab"}
    exec(compile(source, path, "exec"), scope)
    return scope[context.get("name", "attention")]


def compile_for(fn, launch, dtype="bf16"):
    """Compiles for sm_90 with no GPU: the compiled kernel and its (registers, spilled bytes, shared bytes)."""
    constants = launch.constants
    int32, pointers = {"block_tables", "context_lens", "query_starts", "arrivals"}, {"q", "k_cache", "v_cache", "out"}
    kind = {**{n: "*i32" for n in int32}, **{n: f"*{dtype}" for n in pointers}, "partial": "*fp32", "lse": "*fp32"}
    names = fn.arg_names
    kind |= {n: f"*{dtype}" for n in names if n.endswith("_ptr")}  # what the heads are made of
    signature = {n: "constexpr" if n in constants else kind.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    code = triton.compile(ASTSource(fn, signature, {(names.index(n),): v for n, v in constants.items()}, aligned),
                          target=GPUTarget("cuda", 90, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(code.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return code, (found["REG"], found["STACK"] + found["LOCAL"], code.metadata.shared)


@dataclass
class Case:
    """A batch over a poisoned pool of pages in random order: whatever a kernel must not read is NaN."""

    q: torch.Tensor  # [T, G, R, K], a column slice of a wider buffer
    k_cache: torch.Tensor  # [pages, PAGE, G, K]
    v_cache: torch.Tensor  # [pages, PAGE, G, J]
    block_tables: torch.Tensor  # int32 [B, M]; unused entries are out of range
    query_starts: torch.Tensor  # int32 [B + 1]
    context_lens: torch.Tensor  # int32 [B]
    queries: list
    contexts: list

    @property
    def shape(self):
        """G, R, K, J and PAGE as the launch rules name them."""
        _, G, R, K = self.q.shape
        return dict(G=G, R=R, K=K, J=self.v_cache.shape[-1], page=self.v_cache.shape[1])


def make_case(contexts, queries=None, *, G=8, R=4, K=128, J=None, page=16, dtype=torch.bfloat16, device="cuda", seed=0,
              poison=True):
    J, queries = J or K, queries or [1] * len(contexts)
    rng = torch.Generator(device).manual_seed(seed)
    counts = [-(-c // page) for c in contexts]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=rng, device=device, dtype=torch.int32)
    k_cache, v_cache = (torch.randn(pages, page, G, d, generator=rng, device=device, dtype=dtype) for d in (K, J))
    tables = torch.full((len(contexts), -(-(max(counts) + 1) // 16) * 16), 1 << 30, device=device, dtype=torch.int32)
    at = 0
    for b, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        tables[b, :count] = order[at:at + count]
        if poison and context % page:
            for cache in (k_cache, v_cache):
                cache[order[at + count - 1].long(), context % page:] = float("nan")
        at += count
    if poison:
        for cache in (k_cache, v_cache):
            cache[order[at:].long()] = float("nan")
    wide = torch.randn(sum(queries), G * R * K + 64, generator=rng, device=device, dtype=dtype)
    q = wide[:, :G * R * K].view(-1, G, R, K)
    starts = torch.tensor([0, *queries], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Case(q, k_cache, v_cache, tables, starts, torch.tensor(contexts, device=device, dtype=torch.int32), queries, contexts)


def reference(case, score, keep):
    """float64 [T, G, R, J]; score(s, q_pos, k_pos) and keep(q_pos, k_pos) mirror the kernel's lines; padding rows are NaN."""
    T, G, R, _ = case.q.shape
    out = torch.full((T, G, R, case.v_cache.shape[-1]), float("nan"), dtype=torch.float64, device=case.q.device)
    for b, (context, length) in enumerate(zip(case.contexts, case.queries, strict=True)):
        if context == 0:
            continue
        pages = case.block_tables[b, :-(-context // case.v_cache.shape[1])].long()
        k, v = (cache[pages].flatten(0, 1)[:context].double() for cache in (case.k_cache, case.v_cache))
        rows = slice(int(case.query_starts[b]), int(case.query_starts[b + 1]))
        k_pos = torch.arange(context, device=k.device)
        q_pos = (context - length + torch.arange(length, device=k.device))[:, None]
        s = score(torch.einsum("tgrk,ngk->grtn", case.q[rows].double(), k), q_pos, k_pos)
        p = s.masked_fill(~keep(q_pos, k_pos), -float("inf")).softmax(-1)
        out[rows] = torch.einsum("grtn,ngj->tgrj", p, v)
    return out


def poisoned_out(case):
    return torch.full((*case.q.shape[:3], case.v_cache.shape[-1]), float("nan"), dtype=case.q.dtype, device=case.q.device)


def run_decode(fn, case, launch, scratch=None, out=None):
    out = poisoned_out(case) if out is None else out
    sequences = len(case.context_lens)
    scratch = scratch or make_scratch(launch, sequences, out.device)
    kernel = fn[launch.grid](case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, out, *scratch, sequences,
                             case.q.stride(0), case.block_tables.stride(0), **launch.constants, **launch.options)
    share_memory(kernel, launch.shared)
    return out


def run_prefill(fn, case, launch, out=None):
    out = poisoned_out(case) if out is None else out
    fn[launch.grid](case.q, case.k_cache, case.v_cache, case.block_tables, case.query_starts, case.context_lens, out,
                    case.q.stride(0), case.block_tables.stride(0), **launch.constants, **launch.options)
    return out


def make_scratch(launch, sequences, device):
    """The scratch buffers of a decode launch, poisoned where that is allowed."""
    fills = {"float32": float("nan"), "int32": 0}
    return [torch.full(shape, fills[dtype], dtype=getattr(torch, dtype), device=device)
            for shape, dtype in decode_scratch(launch, sequences).values()]


def error(out, want):
    """Relative error over the rows that exist; NaN where the kernel wrote a padding row or left a real one unwritten."""
    real = ~want.isnan().flatten(1).any(1)
    if not out[~real].isnan().all():
        return float("nan")
    return float((out[real].double() - want[real]).norm() / want[real].norm())


def causal(q_pos, k_pos):
    return k_pos <= q_pos


def scaled(s, q_pos, k_pos):
    return s * 0.125


KINDS = {  # name: (template context, score and keep of the reference)
    "causal": (dict(score=["s = s * 0.125"]), scaled, causal),
    "window": (dict(score=["s = s * 0.125"], mask=["keep = (k_pos <= q_pos) & (k_pos > q_pos - 40)"], first="q_pos - 39"),
               scaled, lambda q, k: (k <= q) & (k > q - 40)),
    "dense window": (dict(score=["s = s * 0.125"], mask=["keep = (k_pos <= q_pos) & (k_pos > q_pos - 40)"], first="q_pos - 39",
                          dense=True), scaled, lambda q, k: (k <= q) & (k > q - 40)),
    "softcap": (dict(score=["s = s * 0.5", softcap(5.0)]), lambda s, q, k: 5 * torch.tanh(s / 10), causal),
    "alibi": (dict(score=["s = s * 0.125 + 0.01 * (k_pos - q_pos)"]), lambda s, q, k: s * 0.125 + 0.01 * (k - q), causal),
    "full": (dict(score=["s = s * 0.125"], mask=["keep = k_pos >= 0"], causal=False), scaled, lambda q, k: (k >= 0) & (q >= 0)),
    "not itself": (dict(score=["s = s * 0.125"], mask=["keep = (k_pos < q_pos) | (k_pos == 0)"]), scaled,
                   lambda q, k: (k < q) | (k == 0)),
}


# ---- on the GPU

LLAMA = dict(G=8, R=4, K=128, J=128, page=16)
SCALE = dict(score=["s = s * 0.08838834764831845"])
# Block, warps, stages.
DECODE_TILES = [(64, 4, 3), (64, 4, 4), (32, 4, 4), (32, 4, 6), (128, 4, 3), (128, 8, 3), (32, 2, 4), (32, 2, 6)]
DECODE_SHAPES = {"1x512": [512], "1x1k": [1024], "1x8k": [8192], "1x32k": [32768], "8x1k": [1024] * 8, "32x1k": [1024] * 32,
                 "64x2k": [2048] * 64, "128x1k": [1024] * 128, "128x4k": [4096] * 128,
                 "32 skewed": [16384] + [8192] * 3 + [512] * 28}
FLASHINFER = {"1x1k": 13.6, "1x8k": 24.2, "1x32k": 52.8, "8x1k": 23.7, "32x1k": 50.2, "64x2k": 142, "128x1k": 148, "128x4k": 505}
PREFILL_TILES = [(128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 64, 8, 2, 128), (128, 32, 8, 3, 128), (64, 64, 4, 2, None),
                 (64, 64, 8, 2, 128), (128, 128, 16, 2, None)]  # rows, block, warps, stages, registers
PREFILL_SHAPES = {"1x2k": [2048], "1x8k": [8192], "8x1k": [1024] * 8, "4x4k": [4096] * 4}


def decode_variants(batch, context):
    """The launch rule's choice and every (block, warps, stages, splits) worth trying for a shape, as launches."""
    base = decode_launch(batch, context, **LLAMA)
    yield "rule", base
    for block, warps, stages in DECODE_TILES:
        for several in (1, 2, 4, 8, 16, 32) if batch == 1 else (256, 512, 1024):
            chunk = block if batch == 1 else max(block, several)
            tile = dict(block_n=block, parts=several, chunk=chunk, num_warps=warps, num_stages=stages)
            yield (block, warps, stages, several), with_tile(base.constants, tile, batch, context, 2)


def prefill_variants(batch, query):
    base = prefill_launch(batch, query, **LLAMA)
    yield "rule", base
    for block_m, block_n, warps, stages, registers in PREFILL_TILES:
        constants = dict(base.constants, BLOCK_M=block_m, BLOCK_N=block_n)
        yield (block_m, block_n, warps, stages, registers), replace(
            base, grid=(LLAMA["G"], batch, -(-query // (block_m // LLAMA["R"]))), constants=constants, num_warps=warps,
            num_stages=stages, maxnreg=registers)


def all_variants():
    """Every distinct kernel that the timings launch: (template, launch)."""
    seen = {}
    for contexts in DECODE_SHAPES.values():
        for _, launch in decode_variants(len(contexts), max(contexts)):
            for pdl in (False, True):
                trial = replace(launch, constants=dict(launch.constants, PDL=pdl))
                seen["decode", str(replace(trial, grid=()))] = "decode", trial
    for queries in PREFILL_SHAPES.values():
        for _, launch in prefill_variants(len(queries), max(queries)):
            seen["prefill", str(replace(launch, grid=()))] = "prefill", launch
    return list(seen.values())


def warm(shard, shards):
    """Compiles one shard of the variants into Triton's cache by launching them on a padding row."""
    case = make_case([0, 0], poison=False)
    fns = {t: kernel(t, **SCALE) for t in ("decode", "prefill")}
    for template, launch in all_variants()[shard::shards]:
        launch = replace(launch, grid=(launch.grid[0], 1, *launch.grid[2:]))
        try:
            (run_decode if template == "decode" else run_prefill)(fns[template], case, launch)
        except Exception as e:  # a tile that does not fit: the timing reports it
            print("warm", launch, repr(e)[:100])


def graph_us(launches, replays=12):
    """Median time of one launch, in microseconds, of a CUDA graph that runs `launches` in order."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for run in launches:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in launches:
            run()
    times = []
    for _ in range(replays + 2):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times[2:])[replays // 2] * 1e3 / len(launches)


def pool_cases(lens, queries=None):
    """Cases of one shape over one pool of pages, enough of them to outgrow the 60 MB L2 before a page comes round again."""
    queries = queries or [1] * len(lens)
    counts = [-(-n // 16) for n in lens]
    tokens = 16 * sum(counts)
    n = max(2, min(40, (300 << 20) // (tokens * 4096) + 1))
    pages = n * sum(counts)
    k_cache, v_cache = (torch.randn(pages, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(pages, device="cuda", dtype=torch.int32)
    starts = torch.tensor([0, *queries], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    at, cases = 0, []
    for _ in range(n):
        tables = torch.zeros(len(lens), -(-max(counts) // 16) * 16, device="cuda", dtype=torch.int32)
        for b, count in enumerate(counts):
            tables[b, :count] = order[at:at + count]
            at += count
        q = torch.randn(sum(queries), 4096 + 2048, device="cuda", dtype=torch.bfloat16)[:, :4096].view(-1, 8, 4, 128)
        contexts = torch.tensor(lens, device="cuda", dtype=torch.int32)
        cases.append(Case(q, k_cache, v_cache, tables, starts, contexts, queries, lens))
    return cases


def time_decode():
    fn = kernel("decode", **SCALE)
    for name, lens in DECODE_SHAPES.items():
        cases, rows = pool_cases(lens), []
        for tile, launch in decode_variants(len(lens), max(lens)):
            scratch, out = make_scratch(launch, len(lens), "cuda"), torch.empty_like(cases[0].q)
            trials = [replace(launch, constants=dict(launch.constants, PDL=pdl)) for pdl in (False, True)]
            try:
                times = [graph_us([partial(run_decode, fn, c, trial, scratch, out) for c in cases]) for trial in trials]
                rows.append((*times, tile))
            except Exception as e:
                print("fail", tile, repr(e)[:90])
        gb = sum(lens) * 4096 / 1e3
        peer = FLASHINFER.get(name, float("nan"))
        print(f"decode {name}: FlashInfer {peer} us | us, with PDL, GB/s, (block, warps, stages, parts or chunk)")
        for by in (0, 1):
            best = sorted(rows[1:], key=lambda r: r[by])[:4]
            print("   ", "  ".join(f"{r[0]:.1f} {r[1]:.1f} {gb / r[by]:.0f} {r[2]}" for r in [rows[0], *best]), flush=True)


def time_prefill():
    fn = kernel("prefill", **SCALE)
    for name, lens in PREFILL_SHAPES.items():
        cases, rows = pool_cases(lens, lens)[:3], []
        flops = sum(2 * 2 * 32 * n * n * 128 / 2 for n in lens) / 1e6
        out = torch.empty_like(cases[0].q)
        for tile, launch in prefill_variants(len(lens), max(lens)):
            try:
                rows.append((flops / graph_us([partial(run_prefill, fn, c, launch, out) for c in cases]), tile))
            except Exception as e:
                print("fail", tile, repr(e)[:90])
        qkv = [torch.randn(len(lens), 32, lens[0], 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            sdpa = flops / graph_us([partial(scaled_dot_product_attention, *qkv, is_causal=True)] * 3)
        best = sorted(rows[1:], key=lambda r: -r[0])
        print(f"prefill {name} TFLOP/s; cuDNN {sdpa:.0f} |", *(f"{t:.0f} {tile} " for t, tile in [rows[0], *best]), flush=True)


CHECK_SHAPES = [(8, 4, 128, 128, 16), (2, 3, 80, 64, 16), (4, 1, 64, 128, 32), (1, 8, 256, 256, 16)]


def check(shard, shards):
    """bfloat16 against float64 on the GPU: every kind of mask and score, skewed lengths, several splits, repeats."""
    worst, lens = 0.0, [1, 0, 37, 5000, 64, 1029, 16, 700]
    for kind, (G, R, K, J, page) in list(itertools.product(KINDS, CHECK_SHAPES))[shard::shards]:
        context, score, keep = KINDS[kind]
        case = make_case(lens, G=G, R=R, K=K, J=J, page=page)
        want, fn = reference(case, score, keep), kernel("decode", **context)
        launch = decode_launch(len(lens), 8192, **case.shape)
        for chunk, warps, pdl in ((16, 4, False), (512, 4, True), (8192, 2, False)):
            tile = dict(block_n=launch.constants["BLOCK_N"], parts=0, chunk=chunk, num_warps=warps, num_stages=launch.num_stages)
            trial = with_tile(dict(launch.constants, PDL=pdl), tile, len(lens), 8192, 2)
            scratch = make_scratch(trial, len(lens), "cuda")
            errors = [error(run_decode(fn, case, trial, scratch), want) for _ in range(3)]
            if not max(errors) < 5e-3 or scratch[2].any() or len(set(errors)) > 1:
                print("WRONG decode", kind, (G, R, K, J, page), chunk, warps, errors)
            worst = max(worst, *errors)
        queries = [5, 1, 1, 333, 2, 1029]
        case = make_case([5, 0, 37, 700, 64, 1029], queries, G=G, R=R, K=K, J=J, page=page)
        want, launch = reference(case, score, keep), prefill_launch(6, max(queries), **case.shape)
        for block_m, warps in ((16, 4), (64, 4), (launch.constants["BLOCK_M"], launch.num_warps)):
            trial = replace(launch, constants=dict(launch.constants, BLOCK_M=block_m), num_warps=warps,
                            grid=(G, len(queries), -(-max(queries) // (block_m // R))))
            e = error(run_prefill(kernel("prefill", **context), case, trial), want)
            if not e < 5e-3:
                print("WRONG prefill", kind, (G, R, K, J, page), block_m, e)
            worst = max(worst, e)
    print(f"check {shard}: worst relative error {worst:.1e}", flush=True)


def in_parallel(job, shards=14):
    for p in [subprocess.Popen([sys.executable, __file__, job, str(i), str(shards)]) for i in range(shards)]:
        p.wait()


def main(what, *rest):
    if rest:
        return {"warm": warm, "check": check}[what](*map(int, rest))
    start = time.time()
    for name, jobs in (("check", [lambda: in_parallel("check")]), ("decode", [lambda: in_parallel("warm"), time_decode]),
                       ("prefill", [time_prefill])):
        if what in (name, "all"):
            for job in jobs:
                job()
                print(f"[{time.time() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["all"]))
