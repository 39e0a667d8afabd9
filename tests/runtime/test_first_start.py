"""A first start: what is compiled beside the loading of weights is what launches look for."""

import pytest

pytest.importorskip("triton")

from fusec import aot  # noqa: E402
from fusec.bench.shapes import MODELS  # noqa: E402
from fusec.compiler import compile  # noqa: E402
from fusec.runtime import first_start  # noqa: E402
from fusec.runtime.triton_program import build_folder, load_folder  # noqa: E402

TINY = MODELS["llama-3.1-8b"] | {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256,
                                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path / "fusec"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """A machine of eight cores with an H200, and what is asked to be compiled there."""
    asked = []
    monkeypatch.setattr(first_start.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(first_start.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(first_start, "compile_for_one", lambda *_, workers: asked.append(workers))
    return asked


def test_launches_find_what_was_compiled(caches, monkeypatch):
    """By the same keys: another module of the same file, the signature and options that the just-in-time compiler makes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource

    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("this Triton binds arguments in another way")
    compiled = compile(None, TINY)
    steps = [aot.Step(1, 1, 1024), aot.Step(16, 1, 16)]
    monkeypatch.setattr(aot, "steps", lambda module: [*steps, aot.Step(4, 4, 1024)])
    folder = build_folder(compiled.module.kernels_py, compiled.module.program_py)
    count = first_start.compile_for_one(compiled, load_folder(folder), folder, "sm_90", workers=2)
    known = {path.name for path in (caches / "triton").iterdir()}
    target, launched = GPUTarget("cuda", 90, 32), set()
    backend = make_backend(target)

    class Launched(aot.Recorder):
        def note(self, function, name, grid, args, named):
            named = named | {"debug": False}
            bound, special, options = jit.create_function_from_signature(function.signature, function.params, backend)(
                *args, **named)  # fmt: skip
            options, *parts = function._pack_args(backend, named, bound, special, options)
            source = (GluonASTSource if function.is_gluon() else ASTSource)(function, *parts)
            triton.compile(source, target=target, options=options.__dict__)
            launched.add(name)

    monkeypatch.setattr(aot, "Recorder", Launched)
    aot.record(compiled, load_folder(folder), "sm_90", steps)
    assert count >= len(launched) > 4
    assert {path.name for path in (caches / "triton").iterdir()} == known


def test_it_is_done_once(gpu):
    compiled = compile(None, TINY)
    first_start.compile_ahead(compiled, None).join()
    assert gpu == [7] and first_start.compile_ahead(compiled, None) is None


def test_another_cache_of_triton_is_empty(gpu, monkeypatch, tmp_path):
    compiled = compile(None, TINY)
    first_start.compile_ahead(compiled, None).join()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    first_start.compile_ahead(compiled, None).join()
    assert gpu == [7, 7]


def test_what_fails_is_tried_again(gpu, monkeypatch):
    """The launch that needs the kernel tells what is wrong with it."""

    def fail(*_, workers):
        gpu.append(workers)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(first_start, "compile_for_one", fail)
    compiled = compile(None, TINY)
    for _ in range(2):
        first_start.compile_ahead(compiled, None).join()
    assert len(gpu) == 2


def test_few_cores_compile_what_they_launch(gpu, monkeypatch):
    monkeypatch.setattr(first_start.os, "cpu_count", lambda: 2)
    assert first_start.compile_ahead(compile(None, TINY), None) is None and not gpu
