"""A program's fields may be called what generated code calls things of its own, or what Python reserves."""

import ast
import builtins
import re

import pytest
from program_checks import EXAMPLES

from fusec.codegen.contraction_kernel import FORMS
from fusec.codegen.writer import RESERVED, environment
from fusec.compiler import compile

NAMES = ("out", "lambda", "product", "stats", "a", "step", "kernels", "torch", "m", "kernel", "share_memory", "kernel_stream",
         "range", "draw", "d", "best", "keep_best", "temperature")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["o_proj", "gate_proj", "down_proj", "input_layernorm"])
def test_field(field, name):
    source = re.sub(rf"\b{field}\b", name, (EXAMPLES / "llama.fuse").read_text(encoding="utf-8"))
    module = compile(source, {"num_hidden_layers": 1, "tie_word_embeddings": False}).module
    for text in (module.kernels_py, module.program_py):
        for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
            taken = {"out", "a", "torch", "triton", "kernels", "product", "stats"}
            names = [argument.arg for argument in function.args.args]
            assert len(set(names)) == len(names)
            assert function.name not in taken | {"step"} or function.name == "step" and names == ["m", "b", "d"]
    weights = {line.split("def ")[1].split("(")[0]: line for line in module.program_py.splitlines() if line.startswith("def ")}
    assert all(line.count(" out,") + line.count(" out)") <= 1 for line in weights.values())


@pytest.mark.parametrize("name", ["kernel_gemv", "kernel_skinny", "kernel_stream", "kernel_stream_copies", "kernel_wide_3",
                                  "kernel_wide_3_copies", "tiles", "done"])
def test_every_name_of_a_kernel_is_known(name):
    """Kernels are written under a name of their form, and get their own later: a field may be called like it."""
    source = re.sub(r"\bo_proj\b", name, (EXAMPLES / "llama.fuse").read_text(encoding="utf-8"))
    module = compile(source, {"num_hidden_layers": 1, "tie_word_embeddings": False}).module
    tree = ast.parse(module.kernels_py)
    known = set(dir(builtins)) | {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    known |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names}
    known |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
        uses = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        own = {a.arg for a in function.args.args} | {n.id for n in uses if isinstance(n.ctx, ast.Store)}
        unknown = {n.id for n in uses} - own - known
        assert not unknown, f"{function.name} reads {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("form", FORMS)
def test_what_a_template_assigns_or_calls_is_kept_from_users(form):
    """A field of a program is a name in the kernel: none may hide what the template says around it."""
    def source(name):
        text = environment().loader.get_source(environment(), name)[0]
        return re.sub(r'{% include "(.*?)" %}', lambda found: source(found[1]), text)

    text = source(f"{form}.py.jinja")
    for pattern, by in ((r"\{#.*?#\}", ""), (r"\{%.*?%\}", ""), (r"\{\{.*?\}\}", "0"), (r"#[^\n]*", "")):
        text = re.sub(pattern, by, text, flags=re.DOTALL)
    names = {n for found in re.findall(r"(?m)^\s*([a-z]\w*(?:, [a-z]\w*)*) \+?= ", text) for n in found.split(", ")}
    names |= set(re.findall(r"\bfor (\w+) in", text)) | set(re.findall(r"(?<![\w.])([a-z]\w*)\(", text))
    assert len(names) > 5 and not names - set(RESERVED)
