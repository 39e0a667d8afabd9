"""fusec: a one-page description of a transformer, compiled to a fast, readable inference program.

    from fusec import LLM, SamplingParams, compile
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # multiply and add as one: Triton 3.9 says that 3.10 will not, unasked

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "compile"]

_HOME = {"LLM": "fusec.runtime.llm", "SamplingParams": "fusec.runtime.sampling", "compile": "fusec.compiler"}


def __dir__():
    return [*globals(), *__all__]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module fusec has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
