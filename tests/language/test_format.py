"""The formatter: the shipped programs are its output, and nothing but layout ever changes."""

import re
from importlib import resources
from pathlib import Path

import pytest

from fusec.diagnostics import DiagnosticError
from fusec.language import examples, format_source

FILES = sorted({*examples().values(), Path(str(resources.files("fusec.grammar"))) / "std.fuse"})


def by_name(path):
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_shipped_programs_are_formatted(path):
    text = path.read_text(encoding="utf-8")
    assert format_source(text) == text


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_a_mess_comes_out_in_order(path):
    text = path.read_text(encoding="utf-8")
    mess = re.sub(r"(?<=\S) +", " ", text)  # no columns
    mess = re.sub(r"^  ", "      ", mess, flags=re.M)  # deep
    mess = re.sub(r"^[^#\n]+", lambda code: code[0].replace(", ", ",").replace(" = ", "=").replace("(", "( "), mess, flags=re.M)
    mess = mess.replace("\n\n", "\n\n\n")
    assert _without_comments(format_source(mess)) == _without_comments(text)
    assert _comments(format_source(mess)) == _comments(text)


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_stable(path):
    once = format_source(path.read_text(encoding="utf-8").replace(" : ", ":  "))
    assert format_source(once) == once


def _without_comments(text):
    return re.sub(r" *#.*", "", text)


def _comments(text):
    return [re.sub(r"\s+", " ", c) for c in re.findall(r"#.*", text)]


def test_columns_runs_and_comments():
    messy = """config # sizes
   D=hidden_size??8
   hidden=D*2 # twice
   # a note
   eps=1e-5

   K=D/2
model M(x:[T,D],pos:int[T])->[T,D]
   # the fields
   up:Linear[D->hidden]
   long_name  :  Linear[ hidden -> D ]  # back
   a,b=split[D->K+K]( x )
   c=a*b-2   *   a
   long_name(up(x)) if  D==8  else -x
"""
    assert format_source(messy) == """config  # sizes
  D      = hidden_size ?? 8
  hidden = D*2  # twice
  # a note
  eps = 1e-5

  K = D/2

model M(x: [T, D], pos: int[T]) -> [T, D]
  # the fields
  up        : Linear[D -> hidden]
  long_name : Linear[hidden -> D]       # back
  a, b = split[D -> K + K](x)
  c = a*b - 2 * a
  long_name(up(x)) if D == 8 else -x
"""


def test_a_file_that_does_not_parse_is_not_touched():
    with pytest.raises(DiagnosticError):
        format_source("op f(x) = x +\n")
