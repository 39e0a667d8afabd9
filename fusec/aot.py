"""Kernels compiled ahead of time, for a GPU that need not be there.

The program's own `step` runs on tensors without data, with a recorder in the place of its kernels: once for each range of
tokens and kind of step. What it launches is what is compiled, with the signature, the alignments and the options that
Triton's just-in-time compiler would derive from the real tensors, so that these cubins are also what a later run finds in
Triton's cache.

    variants = record(compiled, load_folder(folder), target="sm_90")
    cubins = compile_all(variants, folder / "kernels.py", target="sm_90")

Two worker processes compile (`python -m fusec.aot KERNELS.py`): a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import base64
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

from .codegen.traffic import Step
from .errors import UsageError, UserError

CONTEXTS = (1024, 4096)  # bounds of the context that decoding is compiled for: a runner's first two buckets
BLOCK_SIZE = 16
TABLE = 512  # columns of a block table
LONGEST = 2048  # tokens of a large prefill step


SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}  # KB that a program may have


def architecture(target: str) -> int:
    """"sm_90" -> 90.  Raises UsageError for what is no NVIDIA target that the kernels are written for."""
    match = re.fullmatch(r"sm_(\d{2,3})a?", target)
    if not match or int(match[1]) < 80:
        raise UsageError("unknown target", expected="an NVIDIA architecture from sm_80 on, such as sm_90", found=target)
    return int(match[1])


@dataclass
class Variant:
    """One thing to compile.  kernel: its name in kernels.py.  signature: parameter -> Triton type, "constexpr" for constants.
    constants: parameter -> value.  aligned: parameters that are multiples of 16 (pointers: addresses).  options: num_warps, …
    grid: of its first launch.  steps: which steps launch it."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: list[str]
    options: dict[str, object]
    grid: tuple
    steps: list[Step] = field(default_factory=list)

    @property
    def tiles(self) -> dict[str, object]:
        """The constants that are block sizes and the like: what tells variants of one kernel apart."""
        return {name: value for name, value in self.constants.items() if name.isupper() and name != "PDL"}


@dataclass
class Cubin:
    """A compiled variant.  registers a thread; spills: bytes a thread that the assembler stores outside of them; shared: bytes a
    program."""

    cubin: bytes
    ptx: str
    registers: int
    spills: int
    shared: int
    seconds: float


# ---- what a step launches ------------------------------------------------------------------------------------------------------


def steps(module) -> list[Step]:
    """A step of each kind: one token, each range of tokens that a contraction has tiles for, and more; decoding and prefill."""
    bounds = {1}
    for function in module.functions:
        for source in function.sources:
            tiles = source.facts.get("tiles")
            bounds |= {t.tokens for t in tiles if getattr(t, "tokens", None)} if isinstance(tiles, (tuple, list)) else set()
    most = max(bounds)
    batches = sorted({*bounds, 2 * most})
    decode = [Step(n, n, context) for n in batches for context in CONTEXTS]
    return decode + [Step(n, 1, n) for n in sorted({*batches, LONGEST}) if n > 1]


def record(compiled, program, target: str, wanted: list[Step] | None = None) -> list[Variant]:
    """The distinct kernels that `program` (a loaded program.py) launches in the steps that are wanted, by default all of `steps`,
    in the order of their first launch."""
    import torch

    from .runtime.batch import Batch
    from .runtime.drawing import Drawing, places
    from .runtime.row_sums import RowSums
    from .runtime.triton_program import TritonProgram

    class OnPaper(TritonProgram):
        """The program over tensors that have types but no data."""

        def __init__(self):
            self.compiled, self.module, self.program = compiled, compiled.module, program
            self.dtype, self.device = getattr(torch, compiled.dtype), torch.device("meta")
            self.max_tokens = LONGEST
            types = {"x": self.dtype, "int": torch.int32, "bool": torch.bool}
            self.weights = {w.name: self.empty(*w.shape, dtype=types.get(w.value.dtype, torch.float32))
                            for w in compiled.module.weights.values()}
            for name, (_, numel, kind) in compiled.module.buffers.items():
                setattr(self, name, self.empty(self.max_tokens, numel, dtype=getattr(torch, kind)))
            self.partial, self.arrivals = self.empty(1, dtype=torch.float32), self.empty(1)
            for name in ("no_sums", *compiled.module.sums):
                setattr(self, name, RowSums(1, self.device))
            self._scratch, self._growing = {}, {}
            self.allocate_cache(1, BLOCK_SIZE)

        def empty(self, *shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device=self.device)

        def batch(self, step: Step) -> Batch:
            tokens, sequences, empty = step.tokens, step.sequences, self.empty
            return Batch(ids=empty(tokens), positions=empty(tokens), slots=empty(tokens, dtype=torch.int64),
                         query_starts=empty(sequences + 1), context_lens=empty(sequences), block_tables=empty(sequences, TABLE),
                         rows=empty(sequences), max_query=tokens // sequences, max_context=step.context,
                         every=tokens == sequences)

        def drawings(self, step: Step) -> list[tuple]:
            """All ways in which a step may end, as its last arguments."""
            if not compiled.module.draws or step.tokens > step.sequences:
                return [()]
            n, best = step.sequences, places(step.sequences, self.device)
            heat = self.empty(n, dtype=torch.float32)
            return [(), *((Drawing(mode, best, heat, self.empty(n), self.empty(n), self.empty(n)),) for mode in (1, 2))]

    model, real = OnPaper(), program.kernels
    found: dict[tuple, Variant] = {}
    program.kernels, number = Recorder(real, found), architecture(target)
    program.PDL, program.HOPPER = number >= 90, number // 10 == 9
    try:
        for step in wanted or steps(compiled.module):
            program.kernels.step = step
            batch = model.batch(step)
            for drawing in model.drawings(step):
                program.step(model, batch, *drawing)
            if step.tokens == step.sequences > 1:  # as many rows, but picked among others: of several prompts that end together
                program.step(model, replace(batch, every=False))
    finally:
        program.kernels = real
    return list(found.values())


class Recorder:
    """Stands in for the module of kernels: `kernels.name[grid](…)` is noted down, and nothing runs."""

    def __init__(self, kernels, found: dict):
        self.kernels, self.found, self.step = kernels, found, None

    def __getattr__(self, name):
        function = getattr(self.kernels, name)
        if not hasattr(function, "arg_names"):
            return function

        class Launches:
            def __getitem__(_, grid):
                return lambda *args, **named: self.note(function, name, grid, args, named)

        return Launches()

    def note(self, function, name, grid, args, named):
        variant = specialize(function, name, grid, args, named)
        key = (name, *(str(part) for part in (variant.signature, variant.constants, variant.aligned, variant.options)))
        steps = self.found.setdefault(key, variant).steps
        steps += [self.step] if self.step not in steps else []


def specialize(function, name, grid, args, named) -> Variant:
    """The variant that Triton's just-in-time compiler would make for these arguments."""
    values = dict(zip(function.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k in function.arg_names}
    options = {k: v for k, v in named.items() if k not in function.arg_names and v is not None}
    signature, constants, aligned = {}, {}, []
    for parameter in function.params:
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or special and type(value) is int and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = triton_type(value)
        multiple = value % 16 == 0 if type(value) is int else hasattr(value, "dtype")
        if special and multiple and not parameter.do_not_specialize_on_alignment:
            aligned.append(parameter.name)
    return Variant(name, signature, constants, aligned, options, tuple(grid))


def triton_type(value) -> str:
    if hasattr(value, "block_shape"):
        return f"tensordesc<{triton_type(value.base)[1:]}{list(value.block_shape)},{value.layout!r}>"
    if hasattr(value, "dtype"):
        short = {"bfloat16": "bf16", "bool": "i1"}
        kind = str(value.dtype).removeprefix("torch.")
        return "*" + short.get(kind, kind.replace("float", "fp").replace("uint", "u").replace("int", "i"))
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


# ---- compiling -----------------------------------------------------------------------------------------------------------------


def compile_all(variants: list[Variant], kernels: Path, target: str, *, workers: int = 2, progress=None) -> list[Cubin]:
    """The cubins of `variants`, in their order.  kernels: the path of kernels.py.  progress(done, total) is called as they
    finish.

    Raises UserError for a kernel that does not compile, with the compiler's own last words.
    """
    total, jobs = len(variants), queue.SimpleQueue()
    for i, variant in sorted(enumerate(variants), key=lambda pair: -cost(pair[1])):
        jobs.put((i, variant))
    results: dict[int, Cubin | Exception] = {}
    command = [sys.executable, "-m", "fusec.aot", str(kernels)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(min(workers, total))]

    def feed(process):
        while True:
            try:
                i, variant = jobs.get_nowait()
            except queue.Empty:
                process.stdin.close()
                return
            try:
                results[i] = ask(process, variant, target)
            except Exception as error:
                results[i] = error
            finished.put(i)
            if isinstance(results[i], Exception):
                return

    finished: queue.SimpleQueue = queue.SimpleQueue()
    threads = [threading.Thread(target=feed, args=(process,), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        for done in range(1, total + 1):
            i = finished.get()
            if isinstance(results[i], Exception):
                raise UserError(f"{variants[i].kernel} does not compile for {target}", found=str(results[i]))
            if progress:
                progress(done, total)
    finally:
        for process in processes:
            process.kill() if len(results) < total or any(isinstance(r, Exception) for r in results.values()) else None
            process.wait()
    return [results[i] for i in range(total)]


def cost(variant: Variant) -> int:
    """A guess at how long it compiles, so that the longest come first: attention, then wide tiles."""
    tile = 1
    for name in ("BLOCK_M", "BLOCK_N"):
        tile *= variant.tiles.get(name, 1)
    return tile + (1 << 20) * ("PAGE" in variant.tiles)


def ask(process, variant: Variant, target: str) -> Cubin:
    job = {"kernel": variant.kernel, "signature": variant.signature, "constants": variant.constants, "aligned": variant.aligned,
           "options": variant.options, "target": architecture(target)}
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the compiler ended with status {process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return Cubin(**answer | {"cubin": base64.b64decode(answer["cubin"])})


def compile_one(module, job: dict) -> Cubin:
    """One job in this process.  module: the loaded kernels.py."""
    import time

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    clock = time.perf_counter()
    function = getattr(module, job["kernel"])
    at = function.arg_names.index
    constants = {(at(name),): value for name, value in job["constants"].items()}
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(function, job["signature"], constants, attributes(function, job["constants"], job["aligned"]))
    built = triton.compile(source, target=GPUTarget("cuda", job["target"], 32), options=job["options"])
    cubin, ptx = built.asm["cubin"], built.asm["ptx"]
    registers, stack = resources(cubin)
    spills = spilled(ptx) if stack else 0
    return Cubin(cubin, ptx, registers, spills, built.metadata.shared, round(time.perf_counter() - clock, 3))


def attributes(function, constants, aligned) -> dict[tuple, list]:
    """What Triton knows of a launch's arguments, by their place, as it stands in the key of its cache: from 3.7 on the constants
    are there too, with nothing to tell.  constants, aligned: names of parameters."""
    import triton

    known = {name: [["tt.divisibility", 16]] for name in aligned}
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        known |= {name: [] for name in constants}
    return {(i,): known[name] for i, name in enumerate(function.arg_names) if name in known}


def tool(name: str) -> str:
    """A program of the CUDA toolkit that Triton carries."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if "REG" not in found:
        raise RuntimeError("cuobjdump says nothing about this kernel")
    return found["REG"], found["STACK"] + found["LOCAL"]


def spilled(ptx: str) -> int:
    """Bytes a thread stored by spills. A stack alone says little: the sine of a large angle keeps a table there."""
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    name = "ptxas-blackwell" if int(re.search(r"\d+", arch)[0]) >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        text = subprocess.run([tool(name), "-v", f"--gpu-name={arch}", str(path), "-o", f"{folder}/kernel.cubin"],
                              capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", text)))


def work(path: str) -> None:
    """A worker: jobs from stdin, answers to stdout, until stdin ends."""
    import importlib.util
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    for line in sys.stdin:
        try:
            cubin = compile_one(module, json.loads(line))
            answer = vars(cubin) | {"cubin": base64.b64encode(cubin.cubin).decode()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
