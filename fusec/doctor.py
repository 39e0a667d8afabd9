"""`fusec doctor`: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

import click

from .cli import colored, json_option, print_json

REQUIRED = ("torch", "triton", "numpy", "safetensors", "gguf", "tokenizers", "jinja2", "lark", "click", "rich")
OPTIONAL = {"huggingface_hub": "models by their Hugging Face id"}


@dataclass
class Finding:
    """One line of the report. state: ok, note (works without) or missing (does not work). mend: a command, if one helps."""

    name: str
    state: str
    found: str
    mend: str | None = None


@click.command(short_help="Say what is installed, what is missing, and how to mend it.")
@json_option("Print JSON.")
def doctor(as_json):
    """Look at this machine: versions, GPU, model, cache. Exits with 1 if something that fusec needs is missing."""
    findings = [python(), *packages(), *gpu(), assembler(), model(), cache(), memory()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        show(findings)
    return int(any(finding.state == "missing" for finding in findings))


def show(findings) -> None:
    marks = {"ok": ("ok", "32"), "note": ("--", "33"), "missing": ("!!", "31")}
    for f in findings:
        mark, color = marks[f.state]
        mark = f"\x1b[{color}m{mark}\x1b[0m" if colored(sys.stdout) else mark
        print(f"{mark}  {f.name:<16} {f.found}" + (f"\n      {f.mend}" if f.mend else ""))


def python() -> Finding:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    recent = sys.version_info >= (3, 10)
    return Finding("python", "ok" if recent else "missing", found, None if recent else "install Python 3.10 or later")


def packages():
    """Versions of what fusec uses, without importing any of it."""
    from . import __version__

    yield Finding("fusec", "ok", __version__)
    for name in (*REQUIRED, *OPTIONAL):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            if name == "triton" and platform.system() != "Linux":
                yield Finding(name, "note", "not made for this system; programs run through torch")
                continue
            found = f"not installed; only needed for {OPTIONAL[name]}" if name in OPTIONAL else "not installed"
            yield Finding(name, "note" if name in OPTIONAL else "missing", found, f"{sys.executable} -m pip install {name}")


def gpu():
    """The GPUs that torch can use; where there are none, why."""
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        yield Finding("GPU", "note", f"torch does not import: {error}")
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            recent = p.major >= 8
            yield Finding(f"GPU {i}", "ok" if recent else "note", found if recent else f"{found}: generated kernels need sm_80")
        return
    driver = driver_names_gpu()
    if driver and torch.version.cuda is None:
        found = f"{driver} is there, but this torch ({torch.__version__}) is built for the CPU"
        yield Finding("GPU", "note", found, f"{sys.executable} -m pip install --force-reinstall torch")
    elif driver:
        found = f"{driver} is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
        yield Finding("GPU", "note", found, "update the NVIDIA driver")
    else:
        yield Finding("GPU", "note", "none; models run on the CPU, and fusec compile still writes cubins")


def driver_names_gpu() -> str | None:
    """The first GPU that the NVIDIA driver lists, whatever torch thinks."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    ask = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(listed.splitlines()), None)


def assembler() -> Finding:
    """ptxas, which Triton brings: it turns kernels into cubins."""
    try:
        folder = metadata.distribution("triton").locate_file("triton/backends/nvidia/bin")
    except metadata.PackageNotFoundError:
        return Finding("ptxas", "note", "comes with triton; without it no cubins")
    path = os.environ.get("TRITON_PTXAS_PATH") or shutil.which("ptxas", path=str(folder))
    if path:
        return Finding("ptxas", "ok", path)
    mend = f"{sys.executable} -m pip install --force-reinstall triton"
    return Finding("ptxas", "note", "missing from triton; without it no cubins", mend)


def model() -> Finding:
    from fusec.runtime.hub import DEFAULT, resolve

    from .errors import UserError

    try:
        return Finding("default model", "ok", str(resolve()))
    except UserError:
        return Finding("default model", "note", f"{DEFAULT} is not on this machine", f"fusec pull {DEFAULT}")


def cache() -> Finding:
    from fusec.runtime.hub import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return Finding("cache", "ok", str(folder))
        reason = "cannot be written"
    except OSError as error:
        reason = error.strerror
    return Finding("cache", "missing", f"{folder}: {reason}", "set FUSEC_CACHE to a folder of yours")


def memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return Finding("memory", "ok", f"{total:.0f} GiB")
    except (ValueError, OSError):
        return Finding("memory", "note", "unknown")
