"""What the compiler says: each file in diagnostics/ holds a program, what it is compiled with, and the exact errors."""

import json
import re
from pathlib import Path

import pytest

from fusec.diagnostics import ENOUGH, DiagnosticError, render
from fusec.errors import UsageError, UserError
from fusec.language import check_checkpoint, examples, explain, find_example, load, registry

CASES = sorted(Path(__file__).parent.joinpath("diagnostics").glob("*.txt"))


def said(source, config, checkpoint):
    """The errors of a program in the file model.fuse, as a user sees them."""
    Path("model.fuse").write_text(source, encoding="utf-8")
    try:
        graph = load("model.fuse", config)
    except DiagnosticError as error:
        return error
    return DiagnosticError(check_checkpoint(graph, {key: tuple(shape) for key, shape in checkpoint.items()}))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_snapshot(case, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, *sections = re.split(r"^---- (\w+)\n", case.read_text(encoding="utf-8"), flags=re.M)
    given = dict(zip(sections[::2], sections[1::2], strict=True))
    config = json.loads(given["config"]) if "config" in given else None
    error = said(head, config, json.loads(given["checkpoint"]) if "checkpoint" in given else None)
    assert error.exit_code == 3
    assert all(d.code in registry() for d in error.diagnostics)
    before = "".join(f"---- {name}\n{text}" for name, text in given.items() if name != "says")
    golden(f"diagnostics/{case.name}", f"{head}{before}---- says\n{error}\n")


def test_there_are_enough_snapshots():
    assert len(CASES) >= 25


@pytest.mark.parametrize("code", registry())
def test_explanations_show_the_error_and_its_cure(code):
    entry = registry()[code]
    if entry.wrong is None:
        return
    with pytest.raises(DiagnosticError) as caught:
        load(entry.wrong)
    assert {d.code for d in caught.value.diagnostics} == {code}
    load(entry.right)
    assert entry.wrong.splitlines()[-1].strip() in explain(code.lower())


def test_explain_suggests_the_nearest_code():
    with pytest.raises(UsageError, match="FUS021"):
        explain("FUS0211")


def test_every_code_in_the_sources_is_explained():
    sources = Path(__file__).parents[2].joinpath("fusec").rglob("*.py")
    used = set().union(*(re.findall(r'"(FUS\d{3})"', path.read_text(encoding="utf-8")) for path in sources))
    assert used <= set(registry()), sorted(used - set(registry()))


def test_what_is_no_program_at_all_is_told_briefly():
    with pytest.raises(DiagnosticError) as caught:
        load("words\n" * 500)
    assert len(caught.value.diagnostics) == ENOUGH


def test_color_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = said("model M(x: int[T]) -> int[T]\n  y\n", None, None)
    assert "\x1b" not in str(error)
    assert "\x1b[" in render(error.diagnostics[0], color=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", error.render(color=True)) == str(error)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "model.fuse").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "model.fuse")
    with pytest.raises(UserError, match=r"did you mean model\.fuse"):
        load(tmp_path / "modle.fuse")


def test_unknown_architecture():
    with pytest.raises(UserError, match="did you mean LlamaForCausalLM"):
        find_example("LLamaForCausalLM")
    assert find_example("LlamaForCausalLM").name == "llama.fuse"
    assert len(examples()) >= 12
