"""Kernels compiled ahead of time and the build folder, on a machine with no GPU."""

import hashlib
import json
from pathlib import Path

import pytest

from fusec import aot
from fusec.build import write_build
from fusec.codegen.traffic import Step
from fusec.compiler import compile
from fusec.errors import UsageError, UserError

pytest.importorskip("triton")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 250, "rms_norm_eps": 1e-5}


@pytest.fixture(scope="module")
def compiled():
    return compile(EXAMPLES / "llama.fuse", TINY)


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    return write_build(compiled, tmp_path_factory.mktemp("build") / "tiny", source_only=True).folder


@pytest.fixture(scope="module")
def program(folder):
    from fusec.runtime.triton_program import load_folder

    return load_folder(folder)


@pytest.fixture(scope="module")
def variants(compiled, program):
    return aot.record(compiled, program, "sm_90")


@pytest.fixture(scope="module")
def everywhere(compiled, program, variants):
    """What Hopper launches, and what GPUs before it do."""
    return variants + aot.record(compiled, program, "sm_80")


def test_every_kernel_is_launched_by_some_step(compiled, variants, everywhere):
    names = {source.name for function in compiled.module.functions for source in function.sources}
    assert {variant.kernel for variant in everywhere} == names
    streams = {source.name for function in compiled.module.functions for source in function.sources
               if source.facts.get("described")}
    assert streams and streams <= {variant.kernel for variant in variants}
    assert not streams & {variant.kernel for variant in everywhere[len(variants):]}


def test_each_range_of_tokens_has_its_tiles(compiled, everywhere):
    for function in compiled.module.functions:
        for source in function.sources:
            if isinstance(source.facts.get("tiles"), tuple):
                found = {(v.tiles["BLOCK_N"], v.tiles["BLOCK_K"]) for v in everywhere if v.kernel == source.name}
                assert found == {(tile.block_n, tile.block_k) for tile in source.facts["tiles"]}


def test_a_head_of_several_rows_is_recorded_with_and_without_row_reductions_found(variants):
    """Steps of decoding find them; of prompts that end in one step the head takes picked rows, and makes its own."""
    found = {(v.constants["BLOCK_M"], v.constants["HANDED"]) for v in variants if "_head_stream" in v.kernel}
    assert found and found == {(size, handed) for size, _ in found for handed in (False, True)}


def test_variants_are_distinct_and_the_recorder_is_gone(program, variants):
    keys = [str((v.kernel, v.signature, v.constants, v.options)) for v in variants]
    assert len(keys) == len(set(keys))
    assert not isinstance(program.kernels, aot.Recorder)


def test_dependent_launch_follows_the_target(compiled, program):
    for target, expected in (("sm_90", True), ("sm_80", False)):
        first, *others = aot.record(compiled, program, target)
        assert {v.options["launch_pdl"] for v in others} == {expected}
        assert not first.options["launch_pdl"]  # a step begins when the one before is over


def test_signatures_are_those_of_the_compiler_that_runs_later(compiled, program):
    """What is compiled ahead is what a launch on a GPU looks for in Triton's cache."""
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("this Triton binds arguments in another way")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend, checked = make_backend(GPUTarget("cuda", 90, 32)), set()

    class Compared(aot.Recorder):
        def note(self, function, name, grid, args, named):
            ours = aot.specialize(function, name, grid, args, named)
            bind = jit.create_function_from_signature(function.signature, function.params, backend)
            bound, special, options = bind(*args, **named)
            _, signature, constants, known = function._pack_args(backend, named, bound, special, options)
            at = function.arg_names.index
            assert signature == ours.signature
            assert {path[0]: value for path, value in constants.items()} == {at(n): value for n, value in ours.constants.items()}
            assert list(known.items()) == list(aot.attributes(function, ours.constants, ours.aligned).items())  # in that order
            checked.add(name)

    real = aot.Recorder
    aot.Recorder = Compared
    try:
        for target in ("sm_90", "sm_80"):
            aot.record(compiled, program, target)
    finally:
        aot.Recorder = real
    assert len(checked) == sum(len(f.sources) for f in compiled.module.functions)


def test_cubins_with_their_resources(folder, variants):
    few = [v for v in variants if v.kernel in ("embed_tokens", "o_proj_gemv")]
    calls = []
    cubins = aot.compile_all(few, folder / "kernels.py", "sm_90", progress=lambda *at: calls.append(at))
    assert calls == [(i + 1, len(few)) for i in range(len(few))]
    for cubin in cubins:
        assert cubin.cubin.startswith(b"\x7fELF") and ".target sm_90" in cubin.ptx
        assert 8 <= cubin.registers <= 255 and cubin.spills == 0 and cubin.shared >= 0


def test_a_kernel_that_does_not_compile_is_told_by_name(folder, variants):
    variant = next(v for v in variants if v.kernel == "o_proj_gemv")
    constants = variant.constants | {"BLOCK_K": 48}
    wrong = aot.Variant(variant.kernel, variant.signature, constants, variant.aligned, variant.options, (1,))
    with pytest.raises(UserError, match="o_proj_gemv does not compile for sm_90"):
        aot.compile_all([wrong], folder / "kernels.py", "sm_90")


@pytest.mark.parametrize("target", ["sm_9", "sm_70", "gfx942", ""])
def test_targets_that_are_none(target, compiled, tmp_path):
    with pytest.raises(UsageError, match="unknown target"):
        write_build(compiled, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


# ---- the folder ----------------------------------------------------------------------------------------------------------------


def test_a_source_build_holds_graph_kernels_program_and_hashes(compiled, folder):
    assert {p.name for p in folder.iterdir()} == {"graph.txt", "kernels.py", "program.py", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16" and manifest["sizes"]["D"] == 64 and manifest["kernels"] == []
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(manifest["sha256"]) == {"graph.txt", "kernels.py", "program.py"}
    assert (folder / "graph.txt").read_text().startswith("graph Llama\n")


def test_two_builds_are_equal_and_the_second_replaces_the_first(compiled, tmp_path):
    texts = []
    for _ in range(2):
        write_build(compiled, tmp_path / "b", source_only=True)
        texts.append((tmp_path / "b" / "manifest.json").read_text())
    assert texts[0] == texts[1]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_other_peoples_files_are_left_alone(compiled, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write_build(compiled, tmp_path, source_only=True)
    with pytest.raises(UserError, match="is a file"):
        write_build(compiled, tmp_path / "notes.txt", source_only=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_the_old_one(compiled, tmp_path, monkeypatch):
    out = write_build(compiled, tmp_path / "b", source_only=True).folder
    monkeypatch.setattr("fusec.build.write_cubins", lambda *a: (_ for _ in ()).throw(UserError("o_proj does not compile")))
    with pytest.raises(UserError):
        write_build(compiled, out)
    assert (out / "manifest.json").exists() and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_the_torch_backend_has_nothing_to_build(tmp_path):
    with pytest.raises(UsageError, match="nothing to build"):
        write_build(compile(EXAMPLES / "llama.fuse", TINY, backend="torch"), tmp_path / "b")


@pytest.mark.slow
def test_the_8b_compiles_within_a_minute_and_spills_nowhere_by_accident(tmp_path):
    compiled = compile(EXAMPLES / "llama.fuse")
    report = write_build(compiled, tmp_path / "llama")
    assert report.seconds["cubins"] < 60
    assert len(report.kernels) == len(list((tmp_path / "llama" / "cubins").glob("*.cubin")))
    for kernel in report.kernels:
        wide = "_stream" in kernel.kernel and kernel.tiles["BLOCK_M"] == 128  # the epilogue of 128 tokens a tile
        noisy = kernel.tiles.get("DRAW") == 2  # noise, beside as many products as there is room for
        usual = 256 if "_prefill" in kernel.kernel else 64 if wide else 16 if kernel.function == "positions" else 0
        allowed = (640 if wide else 16) if noisy else usual
        assert kernel.spills <= allowed, kernel
        assert kernel.shared <= 227 * 1024, kernel


def test_steps_cover_decoding_and_prefill(compiled):
    found = aot.steps(compiled.module)
    assert Step(1, 1, 1024) in found and Step(aot.LONGEST, 1, aot.LONGEST) in found
    assert any(step.tokens == step.sequences > 64 for step in found)
