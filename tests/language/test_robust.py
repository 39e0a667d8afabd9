"""Broken programs: whatever is done to a program, it compiles or says what is wrong; and what formats once formats twice."""

import random
import re

import pytest

from fusec.diagnostics import DiagnosticError
from fusec.language import examples, format_source, load

TOKEN = re.compile(r"[A-Za-z_]\w*|\d+\.?\d*|\?\?|->|==|<=|[^\sA-Za-z0-9_]")
FILES = sorted(set(examples().values()))
PROGRAMS = [re.sub(r"(\bL = \w+ \?\? )\d+", r"\g<1>2", path.read_text(encoding="utf-8")) for path in FILES]


def broken(chance: random.Random) -> str:
    """A shipped program with a few tokens or lines replaced, removed or repeated."""
    text = chance.choice(PROGRAMS)
    pool = TOKEN.findall(text)
    for _ in range(chance.choice((1, 1, 2, 3))):
        token = chance.choice(list(TOKEN.finditer(text)))
        change = chance.randrange(4)
        if change == 3:
            lines = text.split("\n")
            lines.insert(chance.randrange(len(lines)), lines.pop(chance.randrange(len(lines))))
            text = "\n".join(lines)
        else:
            new = (chance.choice(pool), "", f"{chance.choice(pool)} {token[0]}")[change]
            text = text[:token.start()] + new + text[token.end():]
    return text


@pytest.mark.parametrize("seed", range(60))
def test_no_program_escapes_the_diagnostics(seed):
    text = broken(random.Random(seed))
    try:
        load(text)
    except DiagnosticError as error:
        assert str(error).startswith("error[FUS")
    try:
        once = format_source(text)
    except DiagnosticError:
        return
    assert format_source(once) == once


@pytest.mark.parametrize("text", ["op f(x) = " + "(" * 3000 + "x" + ")" * 3000 + "\n", "op f(x) = x" + " + x" * 5000 + "\n"])
def test_deep_expressions(text):
    with pytest.raises(DiagnosticError):
        load(text)
