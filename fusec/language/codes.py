"""The registry of diagnostic codes: `grammar/diagnostics.md`, read."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

from ..diagnostics import did_you_mean
from ..errors import UsageError


@dataclass(frozen=True)
class Code:
    """What `fusec explain` knows about a code. `wrong` and `right` are whole programs, or None."""

    code: str
    title: str
    text: str
    wrong: str | None
    right: str | None


@functools.cache
def registry() -> dict[str, Code]:
    """Every code there is, in order."""
    page = resources.files("fusec.grammar").joinpath("diagnostics.md").read_text(encoding="utf-8")
    found = {}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        heading, _, rest = section.partition("\n")
        code, _, title = heading.partition(" ")
        programs = dict(re.findall(r"^```(wrong|right)\n(.*?)^```$", rest, re.M | re.S))
        text = re.sub(r"^```.*?^```$", "", rest, flags=re.M | re.S).strip()
        found[code] = Code(code, title, text, programs.get("wrong"), programs.get("right"))
    return found


def explain(code: str) -> str:
    """The long explanation of a code. Raises UsageError for one that does not exist."""
    known = registry().get(code.upper())
    if known is None:
        raise UsageError(f"no diagnostic {code}", expected="a code such as FUS021", hint=did_you_mean(code.upper(), registry()))
    parts = [f"{known.code}: {known.title}", known.text]
    for title, program in (("wrong:", known.wrong), ("right:", known.right)):
        if program:
            parts.append(title + "\n\n" + "".join(f"    {line}".rstrip() + "\n" for line in program.splitlines()).rstrip("\n"))
    return "\n\n".join(parts)
