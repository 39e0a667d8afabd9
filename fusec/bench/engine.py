"""An LLM with random weights, sized for a measurement."""

from __future__ import annotations

from pathlib import Path

from ..codegen.traffic import Step, Traffic, total, traffic
from ..errors import DeviceError, UsageError

BLOCK_SIZE = 16
SPARE = 40  # tokens of a sequence beyond what is asked for: warm-up and what runs ahead


def compiled_for(config: dict, dtype: str = "bfloat16"):
    """The kernels that a config becomes; pure, so that bytes can be counted without a GPU."""
    from ..compiler import compile

    return compile(None, config, dtype=dtype)


def pick(device: str, config: dict | None = None):
    """The device to measure on; a GPU with its number. Without one, "auto" is the CPU for models that its memory holds."""
    import torch

    from fusec.runtime.program import pick_device

    chosen = pick_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if chosen.type == "cpu" and config is not None:
        need, free = weight_bytes(config, "float32"), free_memory()
        if need > free // 2:
            raise DeviceError("the model does not fit this machine's memory",
                              expected=f"{need / 1e9:.1f} GB for float32 weights, twice over",
                              found=f"{free / 1e9:.1f} GB free and no GPU in use",
                              hint="measure a smaller one: --model smollm2-135m")
    return chosen


def need_gpu(device: str, what: str):
    """The CUDA device, or one clear error."""
    chosen = pick(device)
    if chosen.type != "cuda":
        raise DeviceError(f"{what} needs an NVIDIA GPU", found="the CPU (fusec doctor says more)",
                          hint="fusec bench decode --device cpu --model smollm2-135m runs without one")
    return chosen


def weight_bytes(config: dict, dtype: str) -> int:
    return total(compiled_for(config, dtype).graph, Step(1, 1, 1)).weights


def free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30


def kernel_traffic(compiled, step: Step) -> Traffic:
    return sum((traffic(launch.kernel, step, compiled.dtype) for launch in compiled.module.launches), Traffic())


def make_llm(config: dict, *, device, dtype: str, batch: int, longest: int, budget: int, source=None):
    """An LLM over random weights whose cache holds `batch` sequences of `longest` tokens.  budget: tokens of one step."""
    from fusec.runtime.llm import LLM

    trained = config.get("max_position_embeddings") or 1 << 30
    if longest > trained:
        expected = f"at most {trained} tokens, with the steps and {SPARE} to spare"
        raise UsageError("the context is longer than the model's", expected=expected, found=longest)
    length = min(trained, max(8192, longest)) if device.type == "cuda" else longest
    blocks = batch * (-(-longest // BLOCK_SIZE) + 1)
    blocks = max(blocks, -(-length // BLOCK_SIZE))
    return LLM(config, source=source, load_format="random", dtype=dtype, device=str(device), max_model_len=length,
               num_blocks=blocks, block_size=BLOCK_SIZE, max_num_seqs=batch, max_num_batched_tokens=max(budget, batch),
               enable_prefix_caching=False)


def fill_caches(program) -> None:
    """Random history: zeros would run faster than data."""
    for cache in getattr(program, "caches", {}).values():
        cache.normal_()


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    import random

    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
