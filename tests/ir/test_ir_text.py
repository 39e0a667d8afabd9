"""The text form of graphs: what it looks like, that it round-trips, and what it says about text that is no graph."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_text import llama_text
from random_programs import graphs

from fusec.errors import UserError
from fusec.ir.graph import Dim, Graph, N, Origin, T, Value, rewrite
from fusec.ir.ops import make
from fusec.ir.text import line_of, print_graph, read_graph, same
from fusec.ir.verify import verify

TINY = """\
graph Tiny
  source tiny.fuse
  dims T, D=8, F=16
  input %x : x[T, D]   @ 9:14
  %0 = weight key="up.weight" offset=0 shape=(16, 8) strides=(8, 1) : x[F, D]   @ 7:3 up
  %1 = contract(%x, %0) over=("D",) : x[T, F]   @ 11:3 up
  %2 = const value=-inf : weak   @ std.fuse:4:1 up
  %3 = maximum(%1, %2) : x[T, F]
  return %3, %1
"""

KERNELS = """\
graph Kernels
  dims T, D=8
  input %x : x[T, D]
  %0 = kernel(%x) body=rows_norm kind="rows" name="rows_norm" : x
    attrs lines=(3, 4)
    input %x : x[T, D]
    %0 = mul(%x, %x) : x[T, D]
    %1 = via(%x) body=same template="rows" : x[T, D]
      input %a : x[T, D]
      %0 = neg(%a) : x[T, D]
      return %0
    %2 = add(%0, %1) : x[T, D]
    return %2, %0
  %1 = get(%0) index=0 : x[T, D]
  %2 = get(%0) index=1 : x[T, D]
  %3 = add(%1, %2) : x[T, D]
  return %3
"""


@pytest.mark.parametrize("text", [TINY, KERNELS], ids=["tiny", "kernels"])
def test_text_is_canonical(text):
    graph = read_graph(text)
    verify(graph)
    assert print_graph(graph) == text


def test_numbers_and_sharing_follow_program_order():
    x = make("input", name="x", dtype="x", dims=(T,))
    y = make("neg", x)
    shared, twice = make("add", y, y), make("add", y, make("neg", x))
    assert "add(%0, %0)" in print_graph(Graph("g", (x,), (shared,)))
    assert not same(Graph("g", (x,), (shared,)), Graph("g", (x,), (twice,)))


def test_origins_can_be_left_out_and_ignored():
    graph = read_graph(TINY)
    bare = print_graph(graph, origins=False)
    assert "@" not in bare and "source" not in bare
    assert same(graph, read_graph(bare))
    assert not same(graph, read_graph(bare), origins=True)


def test_types_may_be_left_out_where_the_rule_infers_them():
    short = TINY.replace("const value=-inf : weak", "const value=-inf").replace("maximum(%1, %2) : x[T, F]", "maximum(%1, %2)")
    assert print_graph(read_graph(short)) == TINY


def test_comments_names_and_blank_lines():
    text = ("# a norm\n\ngraph g\n  dims T, D=8  # sizes\n  input %x : x[T, D]\n\n  # twice\n  %double = add(%x, %x)\n"
            "  return %double\n")
    assert print_graph(read_graph(text)) == (
        "graph g\n  dims T, D=8\n  input %x : x[T, D]\n  %0 = add(%x, %x) : x[T, D]\n  return %0\n")


def test_llama_round_trips_with_its_regions():
    graph = read_graph(llama_text(2))
    verify(graph)
    again = read_graph(print_graph(graph))
    assert same(graph, again, origins=True)
    assert [v.origin for v in graph.walk()] == [v.origin for v in again.walk()]


def test_odd_names_are_quoted():
    x = make("input", name="not a word", dtype="x", dims=(T, Dim("K/2*(1+1)", 4)))
    y = make("neg", x, origin=Origin("my file.fuse", 3, 4, "a b: 5:6"))
    z = make("neg", y, origin=Origin("", 0, 0, "3:4"))
    w = Value("neg", (z,), {}, "x", (Dim("A + B", 3), Dim("[dim]", 2), *z.dims), Origin("", 7, 1))
    graph = Graph("odd name", (x,), (w,), {"note": 'say "hi"\n', "refusals": (object(),)})
    text = print_graph(graph)
    assert same(graph, read_graph(text), origins=True)
    assert [v.origin for v in read_graph(text).walk()] == [v.origin for v in graph.walk()]


def test_wrong_graphs_print_too():
    """The verifier shows what it refuses: conflicting sizes, undeclared and equally named inputs."""
    a, b = (make("input", name="x", dtype="x", dims=(T, Dim("D", size))) for size in (8, 9))
    stray = make("input", name="x", dtype="x", dims=(N,))
    graph = Graph("wrong", (a, b), (Value("mul", (a, b, stray), {}, "x", a.dims),))
    assert print_graph(graph) == (
        "graph wrong\n  dims T, T', D=8\n  input %x : x[T, D]\n  input %0 name=\"x\" : x[T, D=9]\n"
        "  %1 = input name=\"x\" : x[T']\n  %2 = mul(%x, %0, %1) : x[T, D]\n  return %2\n")
    assert same(graph, read_graph(print_graph(graph)))


def test_line_of_finds_values_in_regions():
    graph = read_graph(KERNELS)
    kernel = next(v for v in graph.walk() if v.op == "kernel")
    inner = kernel.attrs["body"].outputs[0]
    assert line_of(graph, inner) == "%2 = add(%0, %1) : x[T, D]"
    assert line_of(graph, graph.inputs[0]) == "input %x : x[T, D]"


_scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5))
_literals = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
                         | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=6)


@settings(max_examples=80, deadline=None)
@given(_literals)
def test_attributes_round_trip(value):
    x = make("input", name="x", dtype="x", dims=(T,))
    graph = Graph("g", (x,), (make("neg", x, note=value),))
    assert repr(read_graph(print_graph(graph)).outputs[0].attrs["note"]) == repr(value)


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_random_graphs_round_trip(graph):
    text = print_graph(graph)
    again = read_graph(text)
    assert print_graph(again) == text
    assert [(v.op, v.attrs, v.dtype, v.dims, v.origin) for v in again.walk()] == [
        (v.op, v.attrs, v.dtype, v.dims, v.origin) for v in graph.walk()]


# ---- folded layers -------------------------------------------------------------------------------------------------------------


def test_repeated_layers_print_once():
    text = print_graph(read_graph(llama_text(32)), fold_layers=True)
    assert "  … ×31 to model.layers.31\n" in text
    assert "model.layers.0.mlp" in text and "model.layers.1.mlp" not in text and "lm_head" in text


def test_a_layer_that_differs_is_shown():
    graph = read_graph(llama_text(6))

    def third_layer_widens(value, inputs):
        if value.op == "const" and value.origin.path == "model.layers.3.mlp":
            return make("const", value=2, origin=value.origin)

    text = print_graph(rewrite(graph, third_layer_widens), fold_layers=True)
    assert "… ×2 to model.layers.2\n" in text and "model.layers.3.mlp" in text and "… ×1 to model.layers.5\n" in text


def test_layers_that_alternate_fold_by_two():
    lines = ["graph Gemma", "  dims T", "  input %x : x[T]", "  %v0 = neg(%x)   @ 1:1 embed"]
    for i in range(6):
        lines.append(f"  %v{i + 1} = {'sin' if i % 2 else 'cos'}(%v{i})   @ 3:1 layers.{i}.attn")
    text = print_graph(read_graph("\n".join([*lines, "  return %v6"])), fold_layers=True)
    assert text.count("cos(") == text.count("sin(") == 1 and "… ×2 the last 2 layers, to layers.5" in text


# ---- text that is no graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, message", [
    ("%0 = neg(%y) : x[T]", "line 4, column 12: %y is not defined above"),
    ("%0 = neg(%x : x[T]", "line 4, column 15: cannot be read from here on"),
    ("%0 = neg(%x) : x[Q]", "line 4, column 20: dim Q has no size: write it in the header (dims Q=…)"),
    ("%0 = nag(%x)", "line 4, column 8: the type of %0 must be written: nag does not infer it"),
    ('%0 = sum(%x) over=("D",)', "line 4, column 8: %0: nothing to reduce over D: the value has T"),
    ("%0 = sum(%x)", "line 4, column 8: %0: 'over'"),
    ("%x = neg(%x)", "line 4, column 3: %x is defined twice"),
    ("%0 = via(%x) : x[T]\n    input %a : x[T]\n    return %a", "line 4, column 3: %0 has a region but no body=…"),
])
def test_reader_errors_say_where(line, message):
    with pytest.raises(UserError) as error:
        read_graph(f"graph g\n  dims T\n  input %x : x[T]\n  {line}\n  return %x\n")
    assert error.value.title == f"graph text, {message}"


@pytest.mark.parametrize("text", [
    "", "graph", "graph g\n", "graph g\n  input %x : x[T\n", "def f():\n  pass\n", "graph g\n return %0\n"])
def test_truncated_text_is_one_clear_error(text):
    with pytest.raises(UserError, match="graph text, "):
        read_graph(text)


# ---- cost ----------------------------------------------------------------------------------------------------------------------


def test_a_model_of_32_layers_prints_and_verifies_quickly():
    graph = read_graph(llama_text(32, V=128256, D=4096, F=14336, G=8, R=4, K=128))
    assert len(graph.walk()) > 1800
    spent = {print_graph: math.inf, verify: math.inf}
    for work in spent:
        for _ in range(3):
            start = time.perf_counter()
            work(graph)
            spent[work] = min(spent[work], time.perf_counter() - start)
    assert spent[print_graph] < 0.3 and spent[verify] < 0.1, spent


def test_printing_needs_neither_lark_nor_torch():
    code = "import sys, fusec.ir.text, fusec.ir.verify; assert not {'lark', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
