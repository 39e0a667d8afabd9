"""The compiled program, ready to run: on a GPU the generated Triton, elsewhere the same graph in torch.

    program = load_program(checkpoint, dtype="bfloat16", device="cuda")
    program.allocate_cache(num_blocks=1024, block_size=16)
    logits = program.forward(batch)          # float32 [R, V]
"""

from __future__ import annotations

import math
import threading
from typing import Protocol

import torch

from fusec.codegen.schedule import gpu_key
from fusec.compiler import Compiled
from fusec.errors import DeviceError, UsageError, UserError
from fusec.runtime.batch import Batch
from fusec.runtime.drawing import NOTHING, Drawing
from fusec.runtime.program_cache import compile_once


class Program(Protocol):
    """What the engine drives.  cache_bytes_per_token: over all layers.  supports_graphs: `forward` may be captured in a CUDA
    graph.  draws: `forward` may be given a Drawing as well, and returns None where it
    has kept best tokens instead of logits."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    cache_bytes_per_token: int
    supports_graphs: bool
    draws: bool

    def allocate_cache(self, num_blocks: int, block_size: int) -> None: ...

    def forward(self, batch: Batch, drawing: Drawing = NOTHING) -> torch.Tensor | None: ...


def load_program(
    model,
    *,
    source=None,
    dtype="auto",
    device="auto",
    load_format="auto",
    seed=0,
    max_model_len=None,
    max_tokens=8192,
    progress=None,
) -> Program:
    """Compiles the program for a checkpoint (or a config, for random weights) and loads its weights.

    model: a Checkpoint, or a dict of config.json's keys with load_format="random".  source: a `.fuse` path; None: found by
    architecture. dtype, device: "auto" takes bfloat16 on a GPU, float32 on a CPU.  max_tokens: most tokens of one step.
    progress(done, total): called while weights load.  Raises UserError, DiagnosticError, DeviceError.
    """
    device = pick_device(device)
    name = pick_dtype(dtype, device, model if isinstance(model, dict) else model.config)
    config = model if isinstance(model, dict) else model.config
    if device.type == "cuda":
        hashing = hash_triton()
        compiled = compile_once(source, config, dtype=name, gpu=gpu_key(torch.cuda.get_device_name(device)))
    else:
        compiled = compile_once(source, config, dtype=name, backend="torch")
    if not isinstance(model, dict) and load_format != "random":
        check_coverage(compiled, model)
    if not cache_sizes(compiled):
        raise UserError(
            "the program keeps no history", expected="attention over cache(k) and cache(v)", found="no cache in the program",
            hint="write attend[K](q, cache(k), cache(v), pos): without it a token sees nothing before this step",
        )  # fmt: skip
    from fusec.runtime.weights import Loader, RandomWeights

    torch_dtype = getattr(torch, name)
    counted = {"total": sum(v.op == "weight" for v in compiled.graph.walk()), "progress": progress}
    if load_format == "random" or isinstance(model, dict):
        loader = RandomWeights(seed, torch_dtype, device, **counted)
    else:
        loader = Loader(model, torch_dtype, device, **counted)
    if device.type == "cuda":
        from fusec.runtime.first_start import compile_ahead
        from fusec.runtime.triton_program import TritonProgram

        compiling = compile_ahead(compiled, device)
        program = TritonProgram(compiled, loader, torch_dtype, device, max_tokens=max_tokens)
        for thread in filter(None, (hashing, compiling)):
            thread.join()  # a launch that came before its end would do the same once more
        return program
    from fusec.runtime.torch_program import TorchProgram

    return TorchProgram(compiled, loader, torch_dtype, device)


def hash_triton() -> threading.Thread | None:
    """Triton names its compiled kernels by a hash of all its 400 MB, taken before the first launch: a third of a second, which
    passes here while weights are loaded."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # another version has it elsewhere: it will take its time
        return None
    thread = threading.Thread(target=triton_key, daemon=True)
    thread.start()
    return thread


def pick_device(device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError("unknown device", expected="auto, cpu, cuda or cuda:N", found=str(device)) from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no CUDA device (fusec doctor says more)"
        raise DeviceError(
            f"{chosen} is not there",
            expected="an NVIDIA GPU that torch can use",
            found=found,
            hint="fusec run --device cpu answers on the CPU",
        )
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError("unsupported device", expected="cpu or cuda", found=str(device))
    return chosen


def pick_dtype(dtype, device, config) -> str:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        stored = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        name = (stored if stored in ("bfloat16", "float16") else "bfloat16") if device.type == "cuda" else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError("unknown dtype", expected="auto, float32, bfloat16 or float16", found=str(dtype))
    return name


def check_coverage(compiled: Compiled, checkpoint) -> None:
    """Every tensor the program names is in the checkpoint, with its shape; what the checkpoint has besides is reported."""
    from fusec.diagnostics import DiagnosticError
    from fusec.language import check_checkpoint

    graph = compiled.stages[0][1] if compiled.stages else compiled.graph
    problems = check_checkpoint(graph, {key: tuple(checkpoint.shape(key)) for key in checkpoint.keys()})
    errors = [p for p in problems if p.level == "error"]
    if errors:
        raise DiagnosticError(errors)


def cache_sizes(compiled: Compiled) -> dict[str, tuple[int, ...]]:
    """cache name -> sizes of one token's row."""
    if compiled.module is not None:
        return dict(compiled.module.caches)
    return {
        v.attrs["name"]: tuple(d.size for d in v.dims if d.size is not None) for v in compiled.graph.walk() if v.op == "cache"
    }


def cache_bytes(compiled: Compiled, dtype: torch.dtype) -> int:
    return sum(math.prod(sizes) for sizes in cache_sizes(compiled).values()) * dtype.itemsize
