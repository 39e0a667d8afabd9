"""The verifier: what it refuses, and the sentence it says."""

import pytest
from hypothesis import given, settings
from llama_text import llama_text
from random_programs import graphs

from fusec.ir.graph import Dim, Graph, T, Value
from fusec.ir.ops import make
from fusec.ir.text import read_graph
from fusec.ir.verify import VerifyError, verify

HEADER = """\
graph wrong
  dims T, S, T', D=8, E=4, H=2, J=4
  input %x : x[T, D]
  input %w : x[D]
  input %ids : int[T]
  input %rows : int[T']
"""


def problem(lines, returns="%0"):
    body = "".join(f"  {line}\n" for line in lines.splitlines())
    with pytest.raises(VerifyError) as error:
        verify(read_graph(f"{HEADER}{body}  return {returns}\n"), after="some_pass")
    line, said = str(error.value).split("\n")
    assert said.startswith("after some_pass: ") and error.value.value is not None
    return f"{line.split(' : ')[0]} ! {said.removeprefix('after some_pass: ')}"


@pytest.mark.parametrize("lines, expected", [
    # what every op needs
    ("%0 = nag(%x) : x[T, D]", "%0 = nag(%x) ! there is no op nag"),
    ("%0 = neg(%x, %x) : x[T, D]", "%0 = neg(%x, %x) ! neg takes 1 operand; this has 2"),
    ("%0 = add(%x) : x[T, D]", "%0 = add(%x) ! add takes 2 operands; this has 1"),
    ("%0 = neg(%x) : f32[T, D]", "%0 = neg(%x) ! the rule of neg infers x[T, D]"),
    ("%0 = neg(%x) : x[D, T]", "%0 = neg(%x) ! the rule of neg infers x[T, D]"),
    ("%0 = neg(%x) : half[T, D]", "%0 = neg(%x) ! there is no dtype half"),
    ("%0 = neg(%x) : x[T, D, D]", "%0 = neg(%x) ! carries the dim D twice"),
    ("%0 = neg(%x) : x[T, D=9]", "%0 = neg(%x) ! D is 9 here and 8 elsewhere"),
    ("%0 = sum(%x) : x[T]", "%0 = sum(%x) ! sum needs the attribute over"),
    ('%0 = sum(%x) over="D" : x[T]', '%0 = sum(%x) over="D" ! this cannot be the attribute over of sum'),
    ('%0 = sum(%x) over=("D", "D") : x[T]', '%0 = sum(%x) over=("D", "D") ! this cannot be the attribute over of sum'),
    ('%0 = sum(%w) over=("E",) : x[D]', '%0 = sum(%w) over=("E",) ! nothing to reduce over E: the value has D'),
    ('%0 = cast(%x) to="f16" : x[T, D]', '%0 = cast(%x) to="f16" ! this cannot be the attribute to of cast'),
    ('%0 = const value="1" : weak', '%0 = const value="1" ! this cannot be the attribute value of const'),
    ("%0 = where(%x, %x, %x) : x[T, D]", "%0 = where(%x, %x, %x) ! the condition is x, not bool"),
    ("%0 = index : x[D]", "%0 = index ! an index is of type int and has one dim"),
    ('%0 = contract(%x, %ids) over=("D",) : x[T]',
     '%0 = contract(%x, %ids) over=("D",) ! D is contracted but missing from an operand with T'),
    # views stay inside their axis
    ('%0 = weight key="a" shape=(4, 8) offset=1 strides=(1, 8) : x[D, E]',
     '%0 = weight key="a" offset=1 shape=(4, 8) strides=(1, 8) ! reaches element 32 of a tensor of 32'),
    ('%0 = weight key="a" shape=(8,) offset=0 strides=(1, 8) : x[D]',
     '%0 = weight key="a" offset=0 shape=(8,) strides=(1, 8) ! 1 dims but 2 strides'),
    ('%0 = split(%x) dim="D" into=("E",) sizes=(4,) strides=(2,) offset=2 : x[T, E]',
     '%0 = split(%x) dim="D" into=("E",) offset=2 sizes=(4,) strides=(2,) ! reaches element 8 of D=8'),
    ('%0 = split(%x) dim="E" into=("J",) sizes=(4,) strides=(2,) offset=0 : x[T, J]',
     '%0 = split(%x) dim="E" into=("J",) offset=0 sizes=(4,) strides=(2,) ! the value has no dim E'),
    ('%a = index : int[E]\n%0 = join(%a, %a) dim="D" size=8 parts=((("E",), (1,), 0), (("E",), (1,), 3)) : int[D]',
     '%1 = join(%0, %0) dim="D" parts=((("E",), (1,), 0), (("E",), (1,), 3)) size=8 ! two parts of D share element 3'),
    ('%a = index : int[E]\n%0 = join(%a, %a) dim="D" size=8 parts=((("E",), (1,), 0), (("E",), (1,), 5)) : int[D]',
     '%1 = join(%0, %0) dim="D" parts=((("E",), (1,), 0), (("E",), (1,), 5)) size=8 ! a part reaches element 8 of D=8'),
    ('%a = index : int[E]\n%0 = join(%a) dim="D" size=8 parts=((("E",), (2,), 0),) : int[D]',
     '%1 = join(%0) dim="D" parts=((("E",), (2,), 0),) size=8 ! no part covers element 1 of D=8'),
    ('%a = index : int[E]\n%0 = join(%a, %a) dim="D" size=8 parts=((("E",), (2,), 0),) : int[D]',
     '%1 = join(%0, %0) dim="D" parts=((("E",), (2,), 0),) size=8 ! 2 operands but 1 parts'),
    ('%a = index : int[E]\n%0 = join(%a, %a) dim="D" size=8 parts=((("E",), (1,), 0), (("J",), (1,), 4)) : int[D]',
     '%1 = join(%0, %0) dim="D" parts=((("E",), (1,), 0), (("J",), (1,), 4)) size=8 '
     "! a part is laid along J, which its operand lacks"),
    # picking
    ('%0 = gather(%w, %x) dim="D" : x[T, D]', '%0 = gather(%w, %x) dim="D" ! picks by x, not int'),
    ('%0 = gather(%w, %ids) dim="E" : x[T, D]', '%0 = gather(%w, %ids) dim="E" ! the table has no dim E'),
    ('%0 = top(%x) dim="D" into="A" size=9 result="values" : x[T, A=9]',
     '%0 = top(%x) dim="D" into="A" result="values" size=9 ! 9 of 8 entries'),
    # tokens stay apart
    ('%0 = sum(%x) over=("T",) : x[D]',
     '%0 = sum(%x) over=("T",) ! mixes tokens: only cache and the body of a via may work along T'),
    ('%c = cache(%x) name="c" : x[S, D]\n%0 = max(%c) over=("S",) : x[D]',
     '%1 = max(%0) over=("S",) ! mixes tokens: only cache and the body of a via may work along S'),
    ("%0 = index : int[T]", "%0 = index ! mixes tokens: only cache and the body of a via may work along T"),
    ('%0 = contract(%x, %x) over=("T", "D") : x',
     '%0 = contract(%x, %x) over=("T", "D") ! mixes tokens: only cache and the body of a via may work along T'),
    ('%0 = top(%x) dim="T" into="E" size=4 result="values" : x[E, D]',
     '%0 = top(%x) dim="T" into="E" result="values" size=4 ! mixes tokens: only cache and the body of a via may work along T'),
    ('%i = index : int[E]\n%0 = gather(%x, %i) dim="T" : x[E, D]',
     '%1 = gather(%x, %0) dim="T" ! mixes tokens: only cache and the body of a via may work along T'),
    ('%c = cache(%x) name="c" : x[S, D]\n%0 = mul(%x, %c) : x[T, D, S]',
     "%1 = mul(%x, %0) ! sets tokens against history (T and S): only the body of a via may"),
    ('%0 = cache(%w) name="c" : x[D]', '%0 = cache(%w) name="c" ! only a value of each token (with the dim T) can be cached'),
    ('%a = cache(%x) name="c" : x[S, D]\n%b = cache(%x) name="c" : x[S, D]\n%0 = add(%a, %b) : x[S, D]',
     '%1 = cache(%x) name="c" ! another cache has this name'),
    # regions agree with what stands around them
    ('%0 = via(%x) body=b template="t" : x[T, D]\n  input %a : x[T, D]\n  input %b : x[D]\n  %0 = add(%a, %b)\n  return %0',
     '%0 = via(%x) body=b template="t" ! 1 operands but b has 2 inputs'),
    ('%0 = via(%w) body=b template="t" : x[T, D]\n  input %a : x[T, D]\n  return %a',
     '%0 = via(%w) body=b template="t" ! input a of b is x[T, D=8], its operand x[D=8]'),
    ('%0 = via(%x) body=b template="t" : f32[T, D]\n  input %a : x[T, D]\n  return %a',
     '%0 = via(%x) body=b template="t" ! b returns x[T, D=8]'),
    ('%0 = via(%x) body=b template="t" : x[T, D]\n  input %a : x[T, D]\n  return %a, %a',
     '%0 = via(%x) body=b template="t" ! b has 2 results, not one'),
    ('%0 = via(%x) body=b template="t" : x[T, D]\n  input %a : x[T, D]\n  %0 = neg(%a) : f32[T, D]\n  return %0',
     '%0 = via(%x) body=b template="t" ! b returns f32[T, D=8]'),
    ('%0 = via(%x) body=b template="t" : x[T, D]\n  input %a : x[T, D]\n  %0 = neg(%a) : f32[T, D]\n  %1 = cast(%0) to="x"\n'
     "  return %1",
     "%0 = neg(%a) ! the rule of neg infers x[T, D]"),
    ('%0 = kernel(%x) body=b kind="rows" name="k" : x\n  input %a : x[T, D]\n  return %a',
     '%0 = kernel(%x) body=b kind="rows" name="k" ! a kernel is read through get, one result at a time'),
    ('%k = kernel(%x) body=b kind="rows" name="k" : x\n  input %a : x[T, D]\n  %0 = sum(%a) over=("T",)\n  return %0\n'
     "%0 = get(%k) index=0 : x[D]",
     '%0 = sum(%a) over=("T",) ! mixes tokens: only cache and the body of a via may work along T'),
    ('%k = kernel(%x) body=b kind="rows" name="k" : x\n  input %a : x[T, D]\n  return %a\n%0 = get(%k) index=1 : x[T, D]',
     "%1 = get(%0) index=1 ! result 1 of a kernel that has 1"),
    ('%k = kernel(%x) body=b kind="rows" name="k" : x\n  input %a : x[T, D]\n  return %a\n%0 = get(%k) index=0 : x[D]',
     "%1 = get(%0) index=0 ! the kernel's result 0 is x[T, D=8]"),
    ('%k = kernel(%x) body=b kind="rows" name="k" : x\n  input %a : x[T, D]\n  return %a\n%0 = neg(%k) : x',
     "%1 = neg(%0) ! a kernel is read through get, one result at a time"),
    ("%0 = get(%x) index=0 : x[T, D]", "%0 = get(%x) index=0 ! reads a result of input, which is no kernel"),
])
def test_refused(lines, expected):
    assert problem(lines) == expected


def refusal(graph):
    with pytest.raises(VerifyError) as error:
        verify(graph)
    return str(error.value)


def test_a_region_must_not_reach_outside():
    x, inner = (make("input", name=name, dtype="x", dims=(T,)) for name in ("x", "a"))
    leak = Graph("body", (inner,), (make("add", inner, make("neg", x)),))
    outside = make("via", x, template="t", body=leak, dtype="x", dims=(T,))
    assert "body does not declare this input" in refusal(Graph("g", (x,), (outside,)))


def test_inputs_are_inputs_of_different_names():
    x, y = (make("input", name="x", dtype="x", dims=(T,)) for _ in "xy")
    assert "two inputs of this name" in refusal(Graph("g", (x, y), (make("add", x, y),)))
    assert "is no input" in refusal(Graph("g", (make("neg", x), x), (x,)))
    assert "has no outputs" in refusal(Graph("g", (x,), ()))


def test_attributes_are_literals():
    x = make("input", name="x", dtype="x", dims=(T,))
    assert "attribute note is no literal" in refusal(Graph("g", (x,), (make("neg", x, note=object()),)))
    verify(Graph("g", (x,), (make("neg", x, note=(1, [None, {"a": 2.5}], True)),), {"notes of passes": object()}))


def test_only_three_dims_have_no_size():
    q = make("input", name="x", dtype="x", dims=(Dim("Q"),))
    assert "Q cannot be without size" in refusal(Graph("g", (q,), (q,)))
    t = make("input", name="x", dtype="x", dims=(Dim("T", 8),))
    assert "T is 8 here and without size elsewhere" in refusal(Graph("g", (t,), (t,)))
    e = make("input", name="x", dtype="x", dims=(Dim("E", 0),))
    assert "E cannot be 0" in refusal(Graph("g", (e,), (e,)))


def test_picking_rows_mixes_no_tokens():
    verify(read_graph(HEADER + '  %0 = gather(%x, %rows) dim="T" : x[T\', D]\n  return %0\n'))


def test_composite_axes_are_covered():
    """K/2*(1+1): neighbours; H*(N+P): two parts of every head."""
    verify(read_graph(HEADER + '  %a = split(%x) dim="D" into=("J",) sizes=(4,) strides=(2,) offset=0\n'
                               '  %0 = join(%a, %a) dim="D" size=8 parts=((("J",), (2,), 0), (("J",), (2,), 1))\n  return %0\n'))
    verify(read_graph(HEADER + '  %a = split(%x) dim="D" into=("H", "P") sizes=(2, 3) strides=(4, 1) offset=0\n'
                               '  %b = split(%x) dim="D" into=("H", "Q") sizes=(2, 1) strides=(4, 1) offset=3\n'
                               '  %0 = join(%a, %b) dim="D" size=8 parts=((("H", "P"), (4, 1), 0), (("H", "Q"), (4, 1), 3))\n'
                               "  return %0\n"))


def test_llama_verifies():
    verify(read_graph(llama_text(3)))


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_random_graphs_verify(graph):
    verify(graph)


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_a_changed_type_is_found(graph):
    last = graph.outputs[-1]
    other = {"x": "f32", "f32": "x"}[last.dtype]
    if last.op != "input":
        wrong = Value(last.op, last.inputs, last.attrs, other, last.dims)
        assert f"the rule of {last.op} infers" in refusal(Graph("g", graph.inputs, (wrong,)))
