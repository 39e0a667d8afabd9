"""The build folder of a compiled program: what `fusec compile` leaves behind.

    graph.txt        the graph of kernels as text, layers that repeat shown once
    kernels.py       every kernel, readable; program.py calls them in order
    cubins/          each kernel compiled for the target, with its PTX
    manifest.json    versions, sizes, per kernel tiles, registers, spills, shared memory, bytes and floor; a hash of every file

The folder appears whole or not at all: it is written beside its place and moved there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import __version__
from .codegen.traffic import BANDWIDTH, Step, traffic
from .errors import UsageError, UserError


@dataclass
class KernelReport:
    """One compiled variant.  function: of program.py that launches it.  steps: those that do, as text.  registers a thread;
    spills: bytes a thread; shared: bytes a program.  bytes, floor_us: of one launch in the first of `steps`, at `BANDWIDTH`
    GB/s."""

    kernel: str
    function: str
    form: str
    tiles: dict
    options: dict
    steps: list[str]
    registers: int
    spills: int
    shared: int
    bytes: int
    floor_us: float
    cubin: str


@dataclass
class BuildReport:
    """What was written.  target: None for source only.  kernels: one entry per cubin.  seconds: by phase, compilation
    included."""

    folder: Path
    target: str | None
    kernels: list[KernelReport] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self) | {"folder": str(self.folder)}


def write_build(compiled, out: Path | str, target: str = "sm_90", source_only: bool = False, progress=None) -> BuildReport:
    """Writes the build folder of a compiled program (triton backend) to `out`; an older build there is replaced.

    target: an NVIDIA architecture, such as sm_90; needs no GPU.  source_only: no cubins.  progress(done, total): called as
    kernels are compiled.  Raises UserError when `out` holds something else, or a kernel does not compile.
    """
    if compiled.module is None:
        raise UsageError("nothing to build", expected="a program compiled with backend='triton'", found="backend='torch'")
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_place(out)
    if not source_only:
        from .aot import architecture

        architecture(target)  # a wrong target is told before anything is written
    report = BuildReport(out, None if source_only else target, seconds=dict(compiled.seconds))
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_sources(compiled, work)
        if not source_only:
            clock = time.perf_counter()
            report.kernels = write_cubins(compiled, work, target, progress)
            report.seconds["cubins"] = time.perf_counter() - clock
        report.files = {str(p.relative_to(work).as_posix()): digest(p) for p in sorted(work.rglob("*")) if p.is_file()}
        text = json.dumps(manifest(compiled, report), indent=2, ensure_ascii=False) + "\n"
        (work / "manifest.json").write_text(text, encoding="utf-8")
        move_into_place(work, out)
    except OSError as error:
        raise UserError(f"cannot write {out}", found=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def check_place(out: Path) -> None:
    """Only a folder that is empty, or that an earlier build made, is written over."""
    if not out.exists():
        return
    hint = "name another folder with --out"
    if not out.is_dir():
        raise UserError(f"{out} is a file", expected="a folder", hint=hint)
    if any(out.iterdir()) and not is_build(out):
        raise UserError(f"{out} holds other files", expected="an empty folder or an earlier build", hint=hint)


def is_build(folder: Path) -> bool:
    try:
        return "fusec" in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def move_into_place(work: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_sources(compiled, folder: Path) -> None:
    from .ir.text import print_graph

    (folder / "graph.txt").write_text(print_graph(compiled.graph, fold_layers=True), encoding="utf-8")
    (folder / "kernels.py").write_text(compiled.module.kernels_py, encoding="utf-8")
    (folder / "program.py").write_text(compiled.module.program_py, encoding="utf-8")


def write_cubins(compiled, folder: Path, target: str, progress) -> list[KernelReport]:
    from .aot import compile_all, record
    from .runtime.triton_program import load_folder

    variants = record(compiled, load_folder(folder), target)
    cubins = compile_all(variants, folder / "kernels.py", target, progress=progress)
    home = {source.name: (function, source) for function in compiled.module.functions for source in function.sources}
    (folder / "cubins").mkdir()
    reports, numbers = [], {}
    for variant, cubin in zip(variants, cubins, strict=True):
        number = numbers[variant.kernel] = numbers.get(variant.kernel, 0) + 1
        stem = variant.kernel if number == 1 else f"{variant.kernel}.{number}"
        (folder / "cubins" / f"{stem}.cubin").write_bytes(cubin.cubin)
        (folder / "cubins" / f"{stem}.ptx").write_text(cubin.ptx, encoding="utf-8")
        function, source = home.get(variant.kernel, (None, None))
        moved = traffic(function.kernel, variant.steps[0], compiled.dtype) if function else None
        reports.append(KernelReport(
            variant.kernel, function.name if function else "", source.form if source else "", variant.tiles, variant.options,
            [step_text(s) for s in variant.steps], cubin.registers, cubin.spills, cubin.shared,
            moved.bytes if moved else 0, round(moved.floor_us(), 3) if moved else 0.0, f"cubins/{stem}.cubin"))
    return reports


def step_text(step: Step) -> str:
    if step.tokens == step.sequences:
        return f"decode {step.sequences} × {step.context}"
    return f"prefill {step.tokens}"


def manifest(compiled, report: BuildReport) -> dict:
    """The manifest's content, without anything that changes from one build of the same program to the next."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "fusec": __version__, "triton": triton, "target": report.target, "model": compiled.graph.name,
        "source": Path(compiled.source).name if isinstance(compiled.source, Path) else None, "dtype": compiled.dtype,
        "config": getattr(compiled, "config", None), "sizes": sizes(compiled.graph),
        "launches": len(compiled.module.launches), "arena_bytes_per_token": compiled.graph.attrs.get("arena"),
        "bandwidth_GBps": BANDWIDTH, "kernels": [asdict(k) for k in report.kernels],
        "sha256": report.files,
    }


def sizes(graph) -> dict[str, int]:
    """The named dims of a model and their sizes."""
    found: dict[str, int] = {}
    for value in graph.walk():
        for dim in value.dims:
            if dim.size is not None and dim.name.isidentifier():
                found.setdefault(dim.name, dim.size)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
