"""Compiled programs on disk: what misses, what a hit gives, and what is done with an entry that is no good."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import fusec.compiler
from fusec.ir.text import print_graph
from fusec.language import examples
from fusec.runtime import program_cache
from fusec.runtime.program import hash_triton
from fusec.runtime.program_cache import compile_once

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "vocab_size": 99}  # fmt: skip
TWO_LAYERS = {"num_hidden_layers": 2, "n_layer": 2}
LLAMA = Path(examples()["LlamaForCausalLM"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSEC_NO_CACHE")
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(program_cache, "fingerprint", functools.cache(program_cache.fingerprint))
    return tmp_path / "cache" / "compiled"


def hit(source=LLAMA, config=SMALL, dtype="bfloat16", gpu="nvidia_h200") -> bool:
    return "cache" in compile_once(source, config, dtype=dtype, gpu=gpu).seconds


def everything(compiled):
    module = compiled.module
    facts = () if module is None else (
        module.kernels_py, module.program_py, module.buffers, module.caches, module.partial, module.arrivals,
        [(w.name, w.shape, w.packing, compiled.graph.walk().index(w.value)) for w in module.weights.values()],
        [(launch.function, launch.arguments, compiled.graph.walk().index(launch.kernel)) for launch in module.launches],
    )  # fmt: skip
    return print_graph(compiled.graph), repr(compiled.graph.attrs), compiled.source, compiled.config, compiled.dtype, facts


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("path", sorted(set(examples().values())), ids=lambda path: path.stem)
def test_a_hit_is_the_program_that_was_compiled(path, backend):
    try:
        first = compile_once(path, TWO_LAYERS, backend=backend)
    except fusec.compiler.UserError:  # no kernels for it yet
        return
    again = compile_once(path, TWO_LAYERS, backend=backend)
    assert "cache" in again.seconds and "cache" not in first.seconds
    assert everything(again) == everything(first)


def test_a_deep_program_is_kept():
    assert [hit(config=SMALL | {"num_hidden_layers": 40}) for _ in range(2)] == [False, True]


def test_what_misses(tmp_path, monkeypatch):
    own = tmp_path / "own.fuse"
    own.write_text(LLAMA.read_text())
    assert [hit(own), hit(own)] == [False, True]
    assert not hit(own, SMALL | {"num_hidden_layers": 3})
    assert not hit(own, dtype="float16")
    monkeypatch.setattr("fusec.codegen.schedule.table", lambda gpu: {})
    assert not hit(own)
    monkeypatch.undo()
    own.write_text(own.read_text() + "# a remark\n")
    assert not hit(own)


def test_another_compiler_misses(monkeypatch):
    assert [hit(), hit()] == [False, True]
    monkeypatch.setattr(program_cache, "fingerprint", lambda: "another")
    assert not hit()


def test_the_fingerprint_is_of_all_that_compiles(tmp_path, monkeypatch):
    fingerprint = program_cache.fingerprint.__wrapped__
    monkeypatch.setattr(program_cache, "COMPILER", ["package"])
    monkeypatch.setattr(program_cache.resources, "files", lambda package: tmp_path)
    seen = set()
    for name in ("a.py", "std.fuse", "fuse.lark", "gemv.py.jinja"):
        for text in "12":
            (tmp_path / name).write_text(text)
            seen.add(fingerprint())
    assert len(seen) == 8


def test_the_compiler_is_all_of_these_packages():
    folders = {f"fusec.{p.parent.name}" for p in Path(fusec.compiler.__file__).parent.glob("*/__init__.py")}
    assert folders - {"fusec.bench"} <= set(program_cache.COMPILER), "is the new one part of the compiler?"


@pytest.mark.parametrize("spoil", [
    lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(bytes(32) + file.read_bytes()[32:]), lambda file: file.chmod(0o666),
    lambda file: (file.unlink(), file.mkdir()),
], ids=["empty", "cut", "damaged", "writable by others", "a folder"])  # fmt: skip
def test_an_entry_that_is_no_good_is_not_used(spoil, folder):
    hit()
    (file,) = folder.iterdir()
    spoil(file)
    assert not hit()
    assert hit() or file.is_dir()


def test_an_entry_makes_no_objects_but_ours(folder):
    folder.mkdir(parents=True)
    file = folder / "x"
    for value in (os.path.join, subprocess.Popen, Path("x"), fusec.compiler.compile):
        program_cache.write(file, value)
        assert file.is_file() and program_cache.read(file) is None
    program_cache.write(file, {"plain": [1, 2.5, None]})
    assert program_cache.read(file) == {"plain": [1, 2.5, None]}
    dotted = pickle.dumps(0)[:-3] + b"\x8c\x09fusec.aot\x8c\x10subprocess.Popen\x93."
    with pytest.raises(pickle.UnpicklingError):
        program_cache.Entry(program_cache.io.BytesIO(dotted)).load()


def test_it_is_private_and_does_not_grow_without_end(folder, monkeypatch):
    monkeypatch.setattr(program_cache, "ENTRIES", 2)
    for layers in (1, 2, 3):
        hit(config=SMALL | {"num_hidden_layers": layers})
    assert len(list(folder.iterdir())) == 2
    assert folder.stat().st_mode & 0o777 == 0o700 and all(f.stat().st_mode & 0o777 == 0o600 for f in folder.iterdir())


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "file"))
    assert not hit() and not hit()


def test_it_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setenv("FUSEC_NO_CACHE", "1")
    assert not hit() and not hit() and not folder.exists()


def in_a_process(code: str) -> subprocess.Popen:
    code = f"from fusec.runtime.program_cache import compile_once; c = compile_once({str(LLAMA)!r}, {SMALL!r}); {code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(folder):
    processes = [in_a_process("print(c.module.kernels_py)") for _ in range(2)]
    first, second = [process.communicate()[0] for process in processes]
    assert first == second and "@triton.jit" in first
    assert [file.suffix for file in folder.iterdir()] == [".pickle"]
    assert "cache" in compile_once(str(LLAMA), SMALL).seconds


SECOND_START = """
import sys, torch
from fusec import LLM, SamplingParams
from fusec.runtime.weights import RandomWeights, prepare
loader = RandomWeights(0, torch.bfloat16, torch.device("cpu"))
for weight in c.module.weights.values():
    prepare(weight, loader, torch.bfloat16)
llm = LLM({config}, source={source}, load_format="random", device="cpu", max_model_len=32)
llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
print(*sorted({heavy} & set(sys.modules)))
"""
HEAVY = {"lark", "fusec.language.parser", "tokenizers", "transformers", "huggingface_hub", "gguf", "rich", "click", "sympy",
         "jinja2", "networkx", "torch._dynamo", "torch._inductor"}  # fmt: skip


def test_a_second_start_imports_what_it_needs():
    code = SECOND_START.replace("{config}", repr(SMALL)).replace("{source}", repr(str(LLAMA))).replace("{heavy}", repr(HEAVY))
    runs = [in_a_process(f"exec({code!r})").communicate()[0].split() for _ in range(2)]
    assert runs == [["fusec.language.parser", "jinja2", "lark"], []]


def test_triton_hashes_itself_aside():
    cache = pytest.importorskip("triton.runtime.cache")
    hash_triton().join()
    assert cache.triton_key.cache_info().currsize == 1
