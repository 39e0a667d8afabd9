"""How many blocks of cache the memory holds, once the weights are in it."""

from __future__ import annotations

import os

import torch

from fusec.errors import DeviceError

CPU_CACHE = 4 << 30  # bytes: the most the cache takes of a CPU's memory, unless one sequence needs more


def cache_blocks(program, *, block_size: int, max_model_len: int, max_num_seqs: int, utilization: float) -> int:
    """Blocks for the cache, at least one and at most what `max_num_seqs` full sequences use.

    On a GPU: what `utilization` of its whole memory leaves, beside what is used already and room for a step. On a CPU: a quarter
    of the free memory.  Raises DeviceError when not even one block fits.
    """
    block_bytes = program.cache_bytes_per_token * block_size
    if program.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(program.device)
        # a step's activations, and the sampler's few copies of the logits
        step = (1 << 30) + 8 * 4 * max_num_seqs * program.vocab_size
        room = min(int(total * utilization) - (total - free), free) - step
    else:
        one = -(-max_model_len // block_size) * block_bytes
        free = _free_host_memory()
        room = min(max(CPU_CACHE, one), free // 4)
    if room < block_bytes:
        raise DeviceError(
            "the cache does not fit beside the weights", expected=f"{_gib(block_bytes)} for {block_size} tokens at least",
            found=f"{_gib(max(room, 0))} to spare of {_gib(free)} free",
            hint="raise gpu_memory_utilization, lower max_num_seqs, or take a smaller model",
        )  # fmt: skip
    return min(room // block_bytes, max_num_seqs * -(-max_model_len // block_size))


def _free_host_memory():
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _gib(size):
    return f"{size / 2**30:.2f} GiB"
