"""Start-up: from the start of Python to the first token, random weights, in processes of their own.

    first_s   with empty caches (Triton's, ours and that of Python's bytecode are pointed at an empty folder)
    again_s   the same once more; the other columns are its phases
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from ..errors import UserError
from .engine import pick
from .limits import machine
from .shapes import config_of
from .table import say

COLUMNS = {"model": ("model", ""), "first_s": ("first s", ".2f"), "again_s": ("again s", ".2f"), "import_s": ("imports s", ".2f"),
           "load_s": ("compile and load s", ".2f"), "token_s": ("first token s", ".2f")}

CHILD = """
import json, sys, time
start = time.time()
from fusec import LLM, SamplingParams
imported = time.time()
config, device, dtype = json.loads(sys.argv[1])
length = min(8192, config.get("max_position_embeddings") or 2048)
llm = LLM(config, load_format="random", device=device, dtype=dtype, max_model_len=length)
loaded = time.time()
llm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
print(json.dumps([imported - start, loaded - imported, time.time() - loaded]))
"""


def bench_startup(models: list[str], *, device: str = "auto", dtype: str = "auto") -> dict:
    """One case per model."""
    configs = [config_of(model) for model in models]
    chosen = [pick(device, config) for _, config in configs][0]
    cases = []
    for name, config in configs:
        with tempfile.TemporaryDirectory() as caches:
            first, _ = run_once(config, str(chosen), dtype, caches)
            again, parts = run_once(config, str(chosen), dtype, caches)
        cases.append({"model": name, "first_s": round(first, 2), "again_s": round(again, 2),
                      **{key: round(part, 2) for key, part in zip(("import_s", "load_s", "token_s"), parts, strict=True)}})
        say(f"{name}: {first:.2f} s, and again {again:.2f} s")
    return {"command": "startup", **machine(chosen), "cases": cases}


def run_once(config: dict, device: str, dtype: str, caches: str) -> tuple[float, list[float]]:
    """(seconds of a whole process that answers with one token, its phases: imports, load, first token)."""
    environment = os.environ | {"TRITON_CACHE_DIR": f"{caches}/triton", "FUSEC_CACHE": f"{caches}/fusec",
                                "PYTHONPYCACHEPREFIX": f"{caches}/python"}  # fmt: skip
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # torch's 1100 modules compiled anew are 2 s more
    command = [sys.executable, "-c", CHILD, json.dumps([config, device, dtype])]
    clock = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - clock
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError("the program did not start", found=last)
    return seconds, json.loads(done.stdout.strip().splitlines()[-1])
