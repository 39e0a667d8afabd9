"""The clock and the power of a GPU while something runs on it: a card that draws all the power that it may runs slower, and a
time means little without that.

`nvidia-smi` is asked, which comes with the driver, in a process of its own.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time

EVERY = 50  # ms from one reading to the next


class Clock:
    """Reads a GPU's clock and power from `with` to its end. Without a GPU, or without nvidia-smi, there are no readings."""

    def __init__(self, device):
        self.device, self.process = device, None
        self.readings: list[tuple[float, float, float]] = []  # (when, by time.perf_counter; MHz of the multiprocessors; W)

    def __enter__(self) -> Clock:
        command = shutil.which("nvidia-smi")
        if self.device.type == "cuda" and command:
            query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
            command = [command, *query, f"--loop-ms={EVERY}", "-i", uuid(self.device)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.reader = threading.Thread(target=self.read, daemon=True)
            self.reader.start()
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.reader.join()

    def read(self) -> None:
        for line in self.process.stdout:
            try:
                clock, power = map(float, line.split(","))
            except ValueError:  # "[N/A]": some cards do not say
                continue
            self.readings.append((time.perf_counter(), clock, power))

    def between(self, start: float, end: float) -> dict[str, float | None]:
        """The medians of what was read from one time to another, by time.perf_counter; None where nothing was."""
        inside = [reading[1:] for reading in self.readings if start <= reading[0] <= end]
        clock, power = map(statistics.median, zip(*inside, strict=True)) if inside else (None, None)
        return {"clock_MHz": clock, "power_W": power}


def uuid(device) -> str:
    """The device's name for nvidia-smi, whatever CUDA_VISIBLE_DEVICES made of its number."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
