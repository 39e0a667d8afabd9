import linecache, sys, torch, triton, triton.language as tl
from dataclasses import replace
import attention_lab as L

@triton.jit
def stream(w, o, PER, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, PER, BLOCK, num_stages=4):
        acc += tl.load(w + pid.to(tl.int64) * PER + i + tl.arange(0, BLOCK)).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(o + pid, tl.sum(acc))

src = L.render("decode", **L.SCALE)
bare = "\n".join(l for l in src.splitlines() if "inline_asm" not in l) + "\n"
late = bare.replace("    if PDL:\n        tl.extra.cuda.gdc_launch_dependents()\n\n", "").replace("    r = tl.arange(0, BLOCK_R)", "    if PDL:\n        tl.extra.cuda.gdc_launch_dependents()\n    r = tl.arange(0, BLOCK_R)")
def make(s, n):
    linecache.cache[n] = (len(s), None, s.splitlines(True), n)
    scope = {"triton": triton, "tl": tl}; exec(compile(s, n, "exec"), scope); return scope["attention"]
fns = {"prefetch": make(src, "<a>"), "bare": make(bare, "<b>")}
N = 12; PROGS = 528; PER = 8192 * 6   # 52 MB
w = torch.randn(N, PROGS * PER, device="cuda", dtype=torch.bfloat16); o = torch.empty(PROGS, device="cuda")
for name, lens in (("1x512", [512]), ("1x1k", [1024]), ("1x8k", [8192]), ("8x1k", [1024] * 8), ("32x1k", [1024] * 32)):
    cases = L.pool_cases(lens)[:N]
    cases = (cases * N)[:N]
    for tile, launch in L.decode_variants(len(lens), max(lens)):
        if tile not in ((32, 2, 4, 32), (32, 2, 4, 16), (64, 4, 3, 8), (64, 4, 3, 16), (128, 4, 3, 8), (64, 4, 3, 1), (64, 4, 3, 4), (32, 2, 4, 4), (32,2,4,8), (128, 4, 3, 16)): continue
        row = []
        scratch, out = L.make_scratch(launch, "cuda"), torch.empty_like(cases[0].q)
        for label in ("off", "prefetch", "bare"):
            pdl = label != "off"; fn = fns["bare" if label == "off" else label]
            la = replace(launch, constants=dict(launch.constants, PDL=pdl))
            st = lambda i: stream[(PROGS,)](w[i], o, PER, 4096, pdl, num_warps=8, launch_pdl=pdl)
            both = L.graph_us([lambda i=i: (st(i), L.run_decode(fn, cases[i], la, scratch, out)) for i in range(N)])
            alone = L.graph_us([lambda i=i: st(i) for i in range(N)])
            row.append(f"{label} {both:.1f}-{alone:.1f}={both - alone:.1f}")
        print("chain", name, tile, " | ".join(row), flush=True)
