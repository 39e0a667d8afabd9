"""The language: `.fuse` text -> checked graph.

    load(path_or_text, config) -> Graph      parse(text, file) -> Program      format_source(text) -> text
    find_example(architecture) -> Path       config_keys(program) -> [key]     check_checkpoint(graph, shapes) -> [Diagnostic]
    check_architecture(program, config) -> [Diagnostic]

Nothing here needs a GPU, a checkpoint, torch or the network. Names are imported on first use.
"""

from __future__ import annotations

_HOME = {"load": "library", "read": "library", "config_keys": "library", "find_example": "sources", "examples": "sources",
         "read_text": "sources", "parse": "parser", "format_source": "format", "check_architecture": "coverage",
         "check_checkpoint": "coverage", "registry": "codes", "explain": "codes"}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
