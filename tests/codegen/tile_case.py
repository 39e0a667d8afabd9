"""One contraction kernel with given tiles, launched by itself: y = x Wᵀ, or, with two leaves, a product of both halves scaled by
the row's norm; to which another input may be added."""

import torch

from fusec import tune
from fusec.codegen.contraction import Contraction
from fusec.codegen.contraction_kernel import contraction
from fusec.codegen.module import preamble
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


class Case:
    """One tile and the kernel rendered for it.  reads: whether its epilogue adds an input."""

    def __init__(self, form, n, k, leaves, itemsize, tiles, folder, number, reads=False):
        self.form, self.n, self.k, self.leaves, self.tiles = form, n, k, leaves, tiles
        self.dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        self.reads = reads
        text = (ONE_LEAF if leaves == 1 else TWO_LEAVES).format(n=n, k=k, both=2 * n, result="z" if reads else "y")
        kernel = next(v for v in fuse(read_graph(text)).walk() if v.op == "kernel")
        self.name, self.path = f"tile_{number}", folder / f"tile_{number}.py"
        name = str(self.dtype).removeprefix("torch.")
        parts = Contraction(kernel.attrs["body"])
        self.source = contraction(kernel, self.name, form, [], name, tiles.block_n, tiles.block_k, parts)
        self.path.write_text(preamble(self.source.text) + "\n\n" + self.source.text)
        few = form in ("skinny", "stream")
        self.tokens = tiles.tokens - 1 if few else {"gemv": 1, "matmul": 257}[form]  # so that masks matter

    def __repr__(self):
        return f"{self.form} {self.n} x {self.k}, {self.leaves} leaves, {self.tiles}{', reads' if self.reads else ''}"

    def sizes(self):
        return tune.constants(self.form, self.tiles, self.leaves, self.source.facts["reductions"])

    def options(self):
        return tune.launch_options(self.form, self.tiles, self.leaves, self.source.facts["reductions"])

    def job(self):
        kinds = {"weight": self.dtype, "input": self.dtype, "output": self.dtype}
        scratch = {"partial": "float32", "arrivals": "int32"}
        blocks, pointers = tune.blocks_of(self.source, self.sizes()), []
        for pointer, role in self.source.roles.items():
            kind = str(kinds.get(role[0], scratch.get(role[-1]))).removeprefix("torch.")
            pointers.append((kind, self.k, blocks[pointer]) if pointer in blocks else kind)
        arguments = [*pointers, *([33] if self.form != "gemv" else [])]
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
        arguments = [h if pointer == "h_ptr" else values[role[0]] if role[0] in values else values[role[1]]
                     for pointer, role in self.source.roles.items()]
        for pointer, block in tune.blocks_of(self.source, self.sizes()).items():
            at = list(self.source.roles).index(pointer)
            arguments[at] = tiles(arguments[at], self.k, *block)
        grid = {"gemv": (blocks,), "matmul": (height * blocks,)}.get(self.form, (height * blocks, splits))
        arguments += [t] if self.form != "gemv" else []
        launch = getattr(tune.load_kernels(str(self.path)), self.name)[grid]
        for _ in range(2):  # the second launch finds the counters as the first left them
            launch(*arguments, **self.sizes(), **self.options(), **options)
        assert not arrivals.any(), f"{self} leaves its counters behind"
        return out


def result(x, w, h, dtype, reads=False):
    """What the kernel computes, by torch in `dtype`."""
    halves = [x.to(dtype) @ part.to(dtype).T for part in w]
    found = halves[0].double()
    if len(halves) > 1:
        scale = x.double().pow(2).mean(-1, keepdim=True).rsqrt()
        found = ((halves[0] * scale.to(dtype)) * halves[1]).double()
    return (found.to(dtype) + h.to(dtype)).double() if reads else found


def operands(case, device):
    """x, w and what the epilogue may add."""
    generator = torch.Generator(device=device).manual_seed(case.n * 31 + case.k)
    x = torch.randn(case.tokens, case.k, generator=generator, device=device).to(case.dtype)
    w = torch.randn(case.leaves, case.n, case.k, generator=generator, device=device).mul_(case.k**-0.5).to(case.dtype)
    return x, w, torch.randn(case.tokens, case.n, generator=generator, device=device).to(case.dtype)
