"""Compiled programs, kept in the user's cache: a second start neither parses, nor runs passes, nor renders kernels.

An entry is a pickle named by a hash of all that the compiler reads. It is read only from a file that nobody but its owner could
have written, as the generated source beside it is run. FUSEC_NO_CACHE=1 compiles each time.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

from fusec.codegen import schedule
from fusec.compiler import Compiled, compile, source_for
from fusec.language import read_text
from fusec.runtime.hub import cache_folder

COMPILER = ("fusec", "fusec.language", "fusec.ir", "fusec.passes", "fusec.codegen", "fusec.grammar", "fusec.templates")
ENTRIES = 64  # the oldest beyond them are deleted; one takes about 1 MB


def compile_once(source, config: dict, **options) -> Compiled:
    """`compiler.compile(source, config, **options)`, or what an earlier call made of the same."""
    if os.environ.get("FUSEC_NO_CACHE"):
        return compile(source, config, **options)
    clock = time.perf_counter()
    source = source_for(source, config)
    file = cache_folder() / "compiled" / f"{key(source, config, options)}.pickle"
    compiled = read(file)
    if compiled is not None:
        return replace(compiled, source=source, config=config, seconds={"cache": time.perf_counter() - clock})
    compiled = compile(source, config, **options)
    write(file, replace(compiled, source=None, config=None))
    return compiled


def key(source, config: dict, options: dict) -> str:
    """A hash of what a compiled program depends on: the compiler, the program's text and its name in messages, the config, the
    options and the table of tiles that they choose."""
    table = schedule.table(options["gpu"]) if "gpu" in options else None
    return hashlib.sha256(repr((fingerprint(), source, read_text(source), config, options, table)).encode()).hexdigest()[:32]


def fingerprint() -> str:
    """A hash of the compiler: its source, grammar, library and templates."""
    digest = hashlib.sha256()
    for package in COMPILER:
        for file in sorted(Path(str(resources.files(package))).iterdir()):
            if file.suffix in (".py", ".fuse", ".lark", ".jinja"):
                digest.update(f"{package} {file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(file: Path) -> Compiled | None:
    """The entry, or None if there is none that can be trusted and understood."""
    try:
        with open(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            digest, data = stream.read(32), stream.read()
        return Entry(io.BytesIO(data)).load() if digest == hashlib.sha256(data).digest() else None
    except Exception:  # noqa: BLE001 - whatever is wrong with a cache, the source is the truth
        return None


class Entry(pickle.Unpickler):
    """Makes objects of fusec's own classes and nothing else."""

    def find_class(self, module, name):
        if module.split(".")[0] == "fusec":
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a compiled program")


def write(file: Path, compiled: Compiled) -> None:
    """Whole or not at all. What cannot be written costs the next start its time, and nothing else."""
    try:
        data = pickle.dumps(compiled, protocol=5)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:  # for its owner's eyes
            temporary.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary.name, file)
        for old in sorted(file.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)[:-ENTRIES]:
            old.unlink(missing_ok=True)
    except Exception:  # noqa: BLE001 - the program is compiled all the same
        pass
