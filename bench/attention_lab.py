"""Renders the two attention templates and checks or times them.

    attention_lab.py compile            registers, spills and shared memory for sm_90; needs no GPU
    attention_lab.py check              bfloat16 against float64 on the GPU
    attention_lab.py decode | prefill   times tiles, splits and stages under CUDA graph replay
    attention_lab.py all
"""
import linecache
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fusec.codegen.attention_schedule import decode_launch, decode_scratch, prefill_launch  # noqa: E402

TEMPLATES = ROOT / "templates"
CAUSAL = "keep = k_pos <= q_pos"


def softcap(cap):
    return f"s = {cap} * (2.0 * tl.sigmoid(2.0 * s / {cap}) - 1.0)"


def render(template, name="attention", score=(), mask=(CAUSAL,), first=None, causal=True, extra=(), comment=("attention",)):
    """The text of one kernel."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
                             undefined=jinja2.StrictUndefined)
    k = types.SimpleNamespace(name=name, comment=list(comment), score=list(score), mask=list(mask), first=first, causal=causal,
                              extra=list(extra))
    return env.get_template(f"attention_{template}.py.jinja").render(k=k)


def kernel(template, **context):
    """The compiled-on-launch kernel of `render`."""
    source = render(template, **context)
    path = f"<{template} {hash(source) & 0xffffffff:x}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    scope = {"triton": triton, "tl": tl}
    exec(compile(source, path, "exec"), scope)
    return scope[context.get("name", "attention")]


def compile_for(fn, launch, dtype="bf16", **options):
    """Compiles for sm_90 with no GPU: the compiled kernel and its (registers, spilled bytes, shared bytes)."""
    constants = launch.constants
    int32, pointers = {"block_tables", "context_lens", "query_starts", "arrivals"}, {"q", "k_cache", "v_cache", "out"}
    kind = {**{n: "*i32" for n in int32}, **{n: f"*{dtype}" for n in pointers}, "partial": "*fp32", "lse": "*fp32"}
    names = fn.arg_names
    signature = {n: "constexpr" if n in constants else kind.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, launch_pdl=constants["PDL"], **options)
    code = triton.compile(ASTSource(fn, signature, {(names.index(n),): v for n, v in constants.items()}, aligned),
                          target=GPUTarget("cuda", 90, 32), options=options)
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


def make_case(contexts, queries=None, *, G=8, R=4, K=128, J=None, page=16, dtype=torch.bfloat16, device="cuda", seed=0, poison=True):
    J, queries = J or K, queries or [1] * len(contexts)
    rng = torch.Generator(device).manual_seed(seed)
    counts = [-(-c // page) for c in contexts]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=rng, device=device, dtype=torch.int32)
    k_cache, v_cache = (torch.randn(pages, page, G, d, generator=rng, device=device, dtype=dtype) for d in (K, J))
    tables = torch.full((len(contexts), max(counts) + 3), 1 << 30, device=device, dtype=torch.int32)
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


def run_decode(fn, case, launch, scratch=None, out=None):
    out = torch.full((*case.q.shape[:3], case.v_cache.shape[-1]), float("nan"), dtype=case.q.dtype, device=case.q.device) if out is None else out
    scratch = scratch or make_scratch(launch, out.device)
    fn[launch.grid](case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, out, *scratch, case.q.stride(0),
                    case.block_tables.stride(0), **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages,
                    launch_pdl=launch.constants["PDL"])
    return out


def run_prefill(fn, case, launch, out=None):
    out = torch.full((*case.q.shape[:3], case.v_cache.shape[-1]), float("nan"), dtype=case.q.dtype, device=case.q.device) if out is None else out
    fn[launch.grid](case.q, case.k_cache, case.v_cache, case.block_tables, case.query_starts, case.context_lens, out,
                    case.q.stride(0), case.block_tables.stride(0), **launch.constants, num_warps=launch.num_warps,
                    num_stages=launch.num_stages, launch_pdl=launch.constants["PDL"])
    return out


def make_scratch(launch, device):
    return [torch.full(shape, float("nan"), device=device) if dtype == "float32" else torch.zeros(shape, dtype=torch.int32, device=device)
            for shape, dtype in decode_scratch(launch).values()]


def error(out, want):
    """Relative error over the rows that exist; NaN where the kernel wrote a padding row or left a real one unwritten."""
    real = ~want.isnan().flatten(1).any(1)
    if not out[~real].isnan().all():
        return float("nan")
    return float((out[real].double() - want[real]).norm() / want[real].norm())


KINDS = {  # name: (template context, score and keep of the reference)
    "causal": (dict(score=["s = s * 0.125"]), lambda s, q, k: s * 0.125, lambda q, k: k <= q),
    "window": (dict(score=["s = s * 0.125"], mask=["keep = (k_pos <= q_pos) & (k_pos > q_pos - 40)"], first="q_pos - 39"),
               lambda s, q, k: s * 0.125, lambda q, k: (k <= q) & (k > q - 40)),
    "softcap": (dict(score=["s = s * 0.5", softcap(5.0)]), lambda s, q, k: 5 * torch.tanh(s / 10), lambda q, k: k <= q),
    "alibi": (dict(score=["s = s * 0.125 + 0.01 * (k_pos - q_pos)"]), lambda s, q, k: s * 0.125 + 0.01 * (k - q), lambda q, k: k <= q),
    "full": (dict(score=["s = s * 0.125"], mask=["keep = k_pos >= 0"], causal=False), lambda s, q, k: s * 0.125,
             lambda q, k: (k >= 0) & (q >= 0)),
}
