"""A program's first start: its kernels are compiled side by side, in processes of their own, while the weights are loaded.

Left to the launches they are compiled one after another, for 0.1 to 0.9 s each: fourteen before the second token of the 8B, and
44 for a prompt of any length. What is compiled here is what the launches look for in Triton's cache (see fusec.aot).
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import torch

from fusec import aot
from fusec.runtime.triton_program import build_folder, load_folder

FEW_CORES = 4  # with fewer, launches would wait for kernels that they do not need
MOST = 16  # processes: each takes a second to start


def compile_ahead(compiled, device: torch.device) -> threading.Thread | None:
    """Starts compiling what one sequence needs, a prompt of any length and a token, unless that was done before.

    Returns the thread to be waited for before the first launch, or None. Whatever goes wrong there is met again, and told, by the
    launch that needs the kernel.
    """
    import triton

    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    folder = build_folder(compiled.module.kernels_py, compiled.module.program_py)
    cache = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    name = hashlib.sha256(f"{triton.__version__} {target} {cache}".encode()).hexdigest()[:16]
    mark, cores = folder / f"compiled.{name}", os.cpu_count() or 1
    if mark.exists() or cores < FEW_CORES:
        return None
    program = load_folder(folder)  # one of its own, and not in the thread: modules are loaded one at a time

    def work():
        try:
            compile_for_one(compiled, program, folder, target, workers=min(cores - 1, MOST))
            mark.touch()
        except Exception:  # noqa: BLE001  no reason not to start
            return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def compile_for_one(compiled, program, folder: Path, target: str, *, workers: int) -> int:
    """Compiles into Triton's cache what the steps of one sequence launch. The number of kernels.  program: the loaded
    program.py, which is not to be run meanwhile."""
    steps = [step for step in aot.steps(compiled.module) if step.sequences == 1]
    variants = aot.record(compiled, program, target, steps)
    aot.compile_all(variants, folder / "kernels.py", target, workers=workers)
    return len(variants)
