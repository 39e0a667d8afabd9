"""The parser: what the syntax tree says, and how fast it is there."""

import time

import pytest

from fusec.diagnostics import DiagnosticError
from fusec.language import config_keys, examples, parse, read, syntax

LLAMA = examples()["LlamaForCausalLM"]


def expression(text):
    return parse(f"op f(x) = {text}\n").declarations[0].body.result


def shape(node):
    """An expression as nested tuples."""
    if isinstance(node, syntax.Binary):
        return (node.operator, shape(node.left), shape(node.right))
    if isinstance(node, syntax.Negate):
        return ("-", shape(node.value))
    if isinstance(node, syntax.Choice):
        return ("if", shape(node.condition), shape(node.value), shape(node.otherwise))
    if isinstance(node, syntax.Default):
        return ("??", shape(node.value), shape(node.otherwise))
    if isinstance(node, syntax.Cast):
        return ("as", shape(node.value), shape(node.like))
    return node.span.text


@pytest.mark.parametrize(("text", "meaning"), [
    ("a + b * c", ("+", "a", ("*", "b", "c"))),
    ("a - b - c", ("-", ("-", "a", "b"), "c")),
    ("-a^2", ("-", ("^", "a", "2"))),
    ("a^-0.5", ("^", "a", ("-", "0.5"))),
    ("a @ w + b", ("+", ("@", "a", "w"), "b")),
    ("a < b and c or d", ("or", ("and", ("<", "a", "b"), "c"), "d")),
    ("a ?? b ?? 1", ("??", "a", ("??", "b", "1"))),
    ("p / s if c else p", ("if", "c", ("/", "p", "s"), "p")),
    ("a * b as x", ("as", ("*", "a", "b"), "x")),
    ("(a + b)[K](x)", "(a + b)[K](x)"),
])
def test_precedence(text, meaning):
    assert shape(expression(text)) == meaning


def test_numbers():
    assert [expression(t).value for t in ("3", "0.5", "1e-5", "2.5E3")] == [3, 0.5, 1e-5, 2500.0]
    assert isinstance(expression("3").value, int)


def test_fields():
    program = parse("model M(x)\n  model.layers[i < L] : Layer\n  h[L] : Layer\n  head : Linear[D -> V] = wte if tied\n"
                    "  w : [.., D]\n  x\n")
    layers, h, head, w = program.declarations[0].fields
    assert (layers.path, layers.name, layers.index, layers.count.id) == (("model", "layers"), "layers", "i", "L")
    assert (h.path, h.index, h.count.id) == (("h",), None, "L")
    assert (head.tied.id, head.condition.id) == ("wte", "tied")
    assert isinstance(w.type, syntax.Shape) and w.type.rest


def test_spans_are_where_the_text_is():
    program = read(LLAMA)
    layer = next(d for d in program.of(syntax.Block) if d.name == "Layer")
    assert layer.name_span.text == "Layer"
    assert [f.type.span.text for f in layer.fields] == ["RMSNorm[D, eps]", "Attention", "RMSNorm[D, eps]", "SwiGLU"]
    assert layer.body.result.span.source.line(layer.body.result.span.line).strip() == layer.body.result.span.text


def test_model_is_a_word_like_any_other_inside_a_path():
    field = parse("model model(x)\n  model.norm : Norm\n  norm(x)\n").declarations[0].fields[0]
    assert field.path == ("model", "norm")


def test_lines_continue_inside_brackets():
    assert shape(expression("(a\n    + b)")) == ("+", "a", "b")


@pytest.mark.parametrize("text", ["", "# only a comment", "\n\n# comment\n\n"])
def test_empty_files_parse(text):
    assert parse(text).declarations == ()


def test_windows_line_endings():
    assert len(parse(LLAMA.read_text().replace("\n", "\r\n")).declarations) == len(read(LLAMA).declarations)


def test_every_declaration_reports_its_own_error():
    with pytest.raises(DiagnosticError) as caught:
        parse("op f(x) = x +\n\nop g(x)\n  y = x\n\nop h(x) = x\n\nblock B(x:\n  x\n")
    assert [d.label.span.line for d in caught.value.diagnostics] == [1, 4, 8]


def test_config_keys():
    keys = config_keys(read(LLAMA))
    assert keys[:3] == ["vocab_size", "hidden_size", "intermediate_size"]
    assert {"rope_theta", "rope_scaling", "tie_word_embeddings"} <= set(keys)


def test_a_broken_table_cache_is_rebuilt(tmp_path, monkeypatch):
    from fusec.language import tables

    monkeypatch.setenv("FUSEC_CACHE", str(tmp_path))
    first = tables.lark_parser()
    (file,) = tmp_path.iterdir()
    again = tables.lark_parser()
    file.write_text("{")
    rebuilt = tables.lark_parser()
    text = LLAMA.read_text()
    assert first.parse(text) == again.parse(text) == rebuilt.parse(text)


def test_parsing_is_fast():
    parse(LLAMA.read_text())
    start = time.perf_counter()
    parse(LLAMA.read_text())
    assert time.perf_counter() - start < 0.5
