"""Help, and the commands that work on source files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusec.cli import COMMANDS
from fusec.language.codes import registry

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA = EXAMPLES / "llama.fuse"
WRONG = "config\n  D = 8\n\nmodel M(x: [T, D]) -> [T, D]\n  x + y\n"
HEAVY = {"torch", "triton", "lark", "jinja2", "numpy", "transformers", "tokenizers", "rich"}


@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "wrong.fuse").write_text(WRONG)
    return tmp_path / "wrong.fuse"


def test_help_names_every_command(fusec):
    result = fusec("--help")
    assert result.status == 0
    for name, (_, help) in COMMANDS.items():
        assert f"  {name} " in result.out
        assert help in " ".join(result.out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(fusec, name):
    result = fusec(name, "--help")
    assert result.status == 0
    assert "Usage: " in result.out


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_a_group_alone_shows_its_help(fusec, group):
    result = fusec(*group)
    assert result.status == 2 and result.err.startswith("Usage: ") and "error" not in result.err


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(flag):
    """This is why they answer at once; a time would depend on the machine."""
    code = (
        f"import sys; from fusec.cli import main; main([{flag!r}]); print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"


def test_check_and_fmt_do_not_import_torch():
    code = f"import sys; from fusec.cli import main; main(['check', {str(LLAMA)!r}]); main(['fmt', '--check', {str(LLAMA)!r}])"
    result = subprocess.run([sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert result.stdout.strip() == "False"


def test_unknown_command_and_flag(fusec):
    result = fusec("chekc", LLAMA)
    assert (result.status, result.err) == (2, "error: no command chekc\nhint: did you mean check?\n")
    result = fusec("run", "--promt", "hello")
    assert (result.status, result.err) == (2, "error: no such option --promt\nhint: did you mean --prompt?\n")
    assert fusec("run", "--max-tokens", "many").status == 2


def test_check(fusec, wrong):
    assert fusec("check", *sorted(EXAMPLES.glob("*.fuse"))).status == 0
    result = fusec("check", LLAMA, wrong)
    assert result.status == 3
    assert result.out == ""
    assert "wrong.fuse:5:7" in result.err and "2 files checked, 1 error" in result.err
    assert "\x1b" not in result.err


def test_check_json(fusec, wrong):
    result = fusec("check", "--json", wrong)
    (found,) = json.loads(result.out)
    assert result.status == 3
    assert found["code"].startswith("FUS") and found["level"] == "error"
    assert (found["at"]["line"], found["at"]["column"], found["at"]["end_column"]) == (5, 7, 8)


@pytest.mark.parametrize("command", ["check", "compile", "explain"])
def test_json_tells_mistakes_too(fusec, wrong, command):
    result = fusec(command, wrong, "--json")
    (found,) = json.loads(result.out)
    assert (result.status, result.err, found["code"]) == (3, "", "FUS010")


@pytest.fixture
def qwen(tmp_path):
    """A config of another architecture that llama.fuse could compile."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64}))
    return file


def test_a_config_that_the_program_does_not_serve_is_a_warning(fusec, qwen, tmp_path):
    result = fusec("check", LLAMA, "--model", qwen)
    assert result.status == 0 and "1 file checked, 0 errors, 1 warning" in result.err
    for text in ("warning[FUS034]", "does not serve Qwen3ForCausalLM", "serves LlamaForCausalLM", "hint: qwen3.fuse serves it"):
        assert text in result.err
    (found,) = json.loads(fusec("check", LLAMA, "--model", qwen, "--json").out)
    result = fusec("compile", LLAMA, "--model", qwen, "--source-only", "--out", tmp_path / "out", "--json")
    assert result.status == 0 and "warning[FUS034]" in result.err
    assert json.loads(result.out)["warnings"] == [found]
    assert "warning[FUS034]" in fusec("explain", LLAMA, "--model", qwen).err
    for nothing in ("Qwen3ForCausalLM", [3], [], None):
        qwen.write_text(json.dumps({"architectures": nothing, "hidden_size": 64}))
        assert "warning" not in fusec("check", LLAMA, "--model", qwen).err


def test_check_with_a_config_that_does_not_fit(fusec, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_size": "large"}))
    assert fusec("check", LLAMA, "--model", config).status == 3
    config.write_text("{")
    assert fusec("check", LLAMA, "--model", config).status == 1


def test_fmt(fusec, tmp_path):
    file = tmp_path / "a.fuse"
    file.write_text(WRONG.replace("x + y", "x+x"))
    result = fusec("fmt", "--check", file)
    assert result.status == 1 and "would format" in result.err
    assert fusec("fmt", file).status == 0
    assert "x + x" in file.read_text()
    assert fusec("fmt", "--check", file).status == 0
    assert fusec("fmt").status == 2
    assert fusec("fmt", "--check", *sorted(EXAMPLES.glob("*.fuse"))).status == 0


def test_fmt_stdin(fusec, monkeypatch):
    text = WRONG.replace("x + y", "x+x")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    result = fusec("fmt", "--stdin")
    assert (result.status, result.out) == (0, text.replace("x+x", "x + x"))
    monkeypatch.setattr("sys.stdin", io.StringIO("model ("))
    assert fusec("fmt", "--stdin").status == 3


@pytest.mark.parametrize("code", registry())
def test_explain_every_code(fusec, code):
    result = fusec("explain", code.lower())
    assert result.status == 0
    assert result.out.startswith(f"{code}: ")
    assert json.loads(fusec("explain", "--json", code).out)["code"] == code


def test_explain_unknown_code_and_program(fusec, tiny_llama):
    assert fusec("explain", "FUS9").status == 2
    result = fusec("explain", LLAMA)
    assert result.status == 0 and "5 kernels" in result.out and "Not fused, and why" in result.out
    result = json.loads(fusec("explain", LLAMA, "--model", tiny_llama, "--json").out)
    assert result["warnings"] == []
    assert [layer["count"] for layer in result["layers"] if layer["count"] > 1] == [3]


def test_compile_to_source(fusec, tmp_path):
    out = tmp_path / "llama"
    result = fusec("compile", LLAMA, "--source-only", "--out", out)
    assert result.status == 0 and "5 kernels" in result.out
    assert {path.name for path in out.iterdir()} >= {"graph.txt", "kernels.py", "program.py", "manifest.json"}
    result = fusec("compile", LLAMA, "--source-only", "--out", out, "--json")
    assert json.loads(result.out)["folder"] == str(out)


def test_print_after(fusec):
    result = fusec("compile", LLAMA, "--print-after", "fuse")
    assert result.status == 0 and result.out.startswith("# after fuse\ngraph Llama\n")
    assert fusec("compile", LLAMA, "--print-after-all").out.count("# after ") >= 8
    result = fusec("compile", LLAMA, "--print-after", "fus")
    assert result.status == 2 and "did you mean fuse?" in result.err


def test_compile_what_cannot_be_compiled(fusec, wrong, tmp_path):
    assert fusec("compile", wrong).status == 3
    result = fusec("compile", EXAMPLES / "lama.fuse")
    assert result.status == 1 and "did you mean llama.fuse?" in result.err
    assert fusec("compile", LLAMA, "--model", tmp_path).status == 1
    assert fusec("compile", LLAMA, "--model", tmp_path / "no.json").status == 1
    assert fusec("compile", LLAMA, "--target", "gfx90a", "--out", tmp_path / "out").status == 2


def test_doctor(fusec):
    result = fusec("doctor")
    assert result.status == 0
    findings = {finding["name"]: finding for finding in json.loads(fusec("doctor", "--json").out)}
    assert findings["torch"]["state"] == "ok"
    assert findings["default model"]["mend"] == "fusec pull smollm2"


def test_pull_unknown(fusec):
    assert fusec("pull", "gpt-5").status == 2


def test_a_bug_is_told_in_one_line(monkeypatch, capsys):
    from fusec.cli import main

    monkeypatch.setattr("fusec.language.codes.explain", lambda code: 1 / 0)
    assert main(["explain", "FUS001"]) == 1
    err = capsys.readouterr().err
    assert "a bug in fusec: ZeroDivisionError" in err and "Traceback" not in err
    monkeypatch.setenv("FUSEC_DEBUG", "1")
    assert main(["explain", "FUS001"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m fusec compile {LLAMA} --print-after-all"
    result = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True)
    assert result.stdout == "# after elaborate\n"
    assert result.stderr == ""


def test_ctrl_c(tmp_path):
    import signal
    import time

    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fusec", "fmt", "--stdin"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so their own
    )
    time.sleep(2)  # it waits for standard input by then
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
