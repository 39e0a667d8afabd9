"""The text of programs: the shipped examples, and a user's own files. Knows nothing of their grammar."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ..diagnostics import did_you_mean
from ..errors import UserError


def read_text(source: str | Path) -> tuple[str, str]:
    """(the text, what messages call it) of a path, or of a program's text (anything with a line break). UserError for a file that
    cannot be read."""
    if isinstance(source, str) and "\n" in source:
        return source, "<text>"
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8"), _shown(path)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.fuse")] if path.parent.is_dir() else [])
        raise UserError(f"no file {source}", hint=near) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"cannot read {source}", found=reason) from None


def _shown(path: Path) -> str:
    """A path as messages name it: relative where it lies below the working directory."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def examples() -> dict[str, Path]:
    """Architecture -> the shipped program that serves it."""
    found = {}
    for path in sorted(Path(str(resources.files("fusec.examples"))).glob("*.fuse")):
        for line in re.findall(r"^serves\s+([^#\n]*)", path.read_text(encoding="utf-8"), re.M):
            found.update((name.strip(), path) for name in line.split(","))
    return found


def find_example(architecture: str) -> Path:
    """The shipped program for `architectures[0]` of a checkpoint. Raises UserError if there is none."""
    known = examples()
    if architecture not in known:
        raise UserError(f"no program for the architecture {architecture}", expected=f"one of {', '.join(sorted(known))}",
                        hint=did_you_mean(architecture, known) or "write one, and name it with --source model.fuse")
    return known[architecture]
