"""One contraction kernel with given tiles, launched by itself: y = x Wᵀ, or, with two leaves, a product of both halves scaled by
the row's norm, in which its largest element may have a part; to which another input may be added. Streams that add one also take
and leave row reductions."""

import itertools
import re

import torch

from fusec import tune
from fusec.codegen.contraction import Contraction
from fusec.codegen.contraction_kernel import blocks_of, contraction
from fusec.codegen.module import preamble
from fusec.codegen.row_sums import Handover
from fusec.ir.text import read_graph
from fusec.passes import fuse
from fusec.runtime.tiles import tiles

ONE_LEAF = """\
graph tile
  dims T, K={k}, N={n}
  input %x : x[T, K]
  input %h : x[T, N]
  %w = weight key="w.weight" shape=({n}, {k}) offset=0 strides=({k}, 1) : x[N, K]
  %y = contract(%x, %w) over=("K",)
  %z = add(%h, %y)
  return %{result}
"""
TWO_LEAVES = """\
graph tile
  dims T, K={k}, N={n}, "N + N"={both}
  input %x : x[T, K]
  input %h : x[T, N]
  %w = weight key="w.weight" shape=({both}, {k}) offset=0 strides=({k}, 1) : x["N + N", K]
  %c = contract(%x, %w) over=("K",)
  %a = split(%c) dim="N + N" into=("N",) sizes=({n},) strides=(1,) offset=0
  %b = split(%c) dim="N + N" into=("N",) sizes=({n},) strides=(1,) offset={n}
  %f = cast(%x) to="f32"
  %s = mul(%f, %f)
  %m = mean(%s) over=("K",)
  %r = rsqrt(%m)
  %ar = mul(%a, %r)
  %p = mul(%ar, %b)
  %y = cast(%p) to="x"
  %f_2 = cast(%h) to="f32"
  %q = add(%f_2, %p)
  %z = cast(%q) to="x"
  return %{result}
"""
TWO_REDUCTIONS = TWO_LEAVES.replace("""
  %r = rsqrt(%m)
""", """
  %t = max(%f) over=("K",)
  %u = add(%m, %t)
  %r = rsqrt(%u)
""")  # of rows whose largest element is above 0
NEXT = """\
graph next
  dims T, N={n}, M=64
  input %y : x[T, N]
  %w = weight key="w.weight" shape=(64, {n}) offset=0 strides=({n}, 1) : x[M, N]
  %c = contract(%y, %w) over=("N",)
  %f = cast(%y) to="f32"
  %s = mul(%f, %f)
  %a = mean(%s) over=("N",)
  %b = max(%f) over=("N",)
  %d = add(%a, %b)
  %p = mul(%c, %d)
  %z = cast(%p) to="x"
  return %z
"""
PART = 48  # columns of each part of the row reductions that a kernel is given


class Case:
    """One tile and the kernel rendered for it.  reads: whether its epilogue adds an input; a stream then hands on row reductions
    as well: it is given those of x, and leaves those that NEXT wants of its result.  largest: whether a row's largest element
    has a part in its norm."""

    def __init__(self, n, k, leaves, itemsize, tiles, folder, number, reads=False, largest=False):
        self.n, self.k, self.leaves, self.tiles, self.largest = n, k, leaves, tiles, largest
        self.form = form = tiles.form
        self.dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        self.reads = reads
        self.hands = reads and form in ("stream", "wide")
        text = ONE_LEAF if leaves == 1 else TWO_REDUCTIONS if largest else TWO_LEAVES
        kernel = kernel_of(text.format(n=n, k=k, both=2 * n, result="z" if reads else "y"))
        self.name, self.path = f"tile_{number}", folder / f"tile_{number}.py"
        name = str(self.dtype).removeprefix("torch.")
        parts = Contraction(kernel.attrs["body"])
        reader = Contraction(kernel_of(NEXT.format(n=n)).attrs["body"])
        hands = (Handover(reader, ()), leaves > 1) if self.hands else (None, False)
        self.source = contraction(kernel, self.name, form, [], name, tiles.block_n, tiles.block_k, parts, False, *hands,
                                  len(tiles.pieces))  # fmt: skip
        self.path.write_text(preamble(self.source.text) + "\n\n" + self.source.text)
        few = form in ("skinny", "stream", "wide")
        self.tokens = tiles.tokens - 1 if few else {"gemv": 1, "matmul": 257}[form]  # so that masks matter

    def __repr__(self):
        more = ", reads" * self.reads + ", largest" * self.largest
        return f"{self.form} {self.n} x {self.k}, {self.leaves} leaves, {self.tiles}{more}"

    def sizes(self):
        handed = True if self.source.facts["finds"] else None
        return tune.constants(self.tiles, self.leaves, self.source.facts["reductions"], handed=handed)

    def options(self):
        return self.tiles.options(self.leaves, self.source.facts["reductions"])

    def job(self):
        kinds = {"weight": self.dtype, "input": self.dtype, "output": self.dtype, "sums": torch.float32}
        scratch = {"partial": "float32", "arrivals": "int32"}
        blocks, pointers = blocks_of(self.source, self.tiles), []
        for pointer, role in self.source.roles.items():
            kind = str(kinds.get(role[0], scratch.get(role[-1]))).removeprefix("torch.")
            pointers += [(kind, self.k, block) for block in blocks[pointer]] if pointer in blocks else [kind]
        arguments = [*pointers, *([33] if self.form != "gemv" else []), *([17] if self.source.facts["finds"] else [])]
        options = {**self.options(), "launch_pdl": True}
        return str(self.path), self.name, options, [(arguments, self.sizes() | {"PDL": True})]

    def run(self, x, w, h, **options):
        t, n, device = self.tokens, self.n, x.device
        blocks = -(-n // self.tiles.block_n)
        height = -(-t // getattr(self.tiles, "block_m", 1))
        padded, splits = height * getattr(self.tiles, "block_m", 1), getattr(self.tiles, "splits", 1)
        out = torch.full((t, n), float("nan"), dtype=self.dtype, device=device)
        partial = torch.full((splits * padded * blocks * (self.leaves * self.tiles.block_n + 1),), float("nan"), device=device)
        arrivals = torch.zeros(height * blocks, dtype=torch.int32, device=device)
        values = {"weight": w, "input": x, "output": out, "partial": partial, "arrivals": arrivals}
        found = [[part.square().sum(1), part.amax(1)][: 1 + self.largest] for part in x.float().split(PART, 1)]
        found = torch.stack([torch.stack(part) for part in found])
        left = torch.full((blocks, 2, t), float("nan"), device=device)
        values |= {"x_sums_ptr": found, "out_sums_ptr": left, "h_ptr": h}
        arguments, described = [], blocks_of(self.source, self.tiles)
        for pointer, role in self.source.roles.items():
            value = next(values[name] for name in (pointer, *role) if name in values)
            arguments += [tiles(value, self.k, *block) for block in described[pointer]] if pointer in described else [value]
        grid = {"gemv": (blocks,), "matmul": (height * blocks,)}.get(self.form, (height * blocks, splits))
        arguments += [t] if self.form != "gemv" else []
        arguments += [len(found)] if self.source.facts["finds"] else []
        launch = getattr(tune.load_kernels(str(self.path)), self.name)[grid]
        for _ in range(2):  # the second launch finds the counters as the first left them
            launch(*arguments, **self.sizes(), **self.options(), **options)
        assert not arrivals.any(), f"{self} leaves its counters behind"
        if self.source.facts["leaves_sums"]:
            stored = out.float().view(t, blocks, self.tiles.block_n)
            wanted = torch.stack([stored.square().sum(2), stored.amax(2)]).permute(2, 0, 1)
            torch.testing.assert_close(left, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{self}: row reductions: {text}")
        return out


def waits_for_all_warps(ptx):
    """Whether the one thread of a stream that gives a place of the ring back for all warps has waited for them."""
    steps = re.findall(r"bar\.sync|wgmma\.mma_async|mma\.sync|mbarrier\.arrive\.shared", ptx)
    before = [earlier for earlier, step in itertools.pairwise(steps) if step == "mbarrier.arrive.shared"]
    return bool(before) and set(before) == {"bar.sync"}


def kernel_of(text):
    """The one kernel of a graph."""
    return next(v for v in fuse(read_graph(text)).walk() if v.op == "kernel")


def result(x, w, h, dtype, reads=False, largest=False):
    """What the kernel computes, by torch in `dtype`."""
    halves = [x.to(dtype) @ part.to(dtype).T for part in w]
    found = halves[0].double()
    if len(halves) > 1:
        norm = x.double().pow(2).mean(-1, keepdim=True)
        scale = (norm + x.double().amax(-1, keepdim=True) if largest else norm).rsqrt()
        found = ((halves[0] * scale.to(dtype)) * halves[1]).double()
    return (found.to(dtype) + h.to(dtype)).double() if reads else found


def operands(case, device):
    """x, w and what the epilogue may add."""
    generator = torch.Generator(device=device).manual_seed(case.n * 31 + case.k)
    x = torch.randn(case.tokens, case.k, generator=generator, device=device).to(case.dtype)
    w = torch.randn(case.leaves, case.n, case.k, generator=generator, device=device).mul_(case.k**-0.5).to(case.dtype)
    return x, w, torch.randn(case.tokens, case.n, generator=generator, device=device).to(case.dtype)
