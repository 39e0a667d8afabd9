"""The interpreter against plain torch: every op, on dims in odd orders, in float64 and in narrow types."""

import math

import pytest
import torch
from llama_text import llama_text

from fusec.ir.graph import Dim, Graph, N, S, T
from fusec.ir.interpreter import EXACT, Evaluator, dtypes, evaluate, storage_view
from fusec.ir.ops import OPS, make
from fusec.ir.text import read_graph
from fusec.ir.verify import verify

SIZES = {"A": 3, "B": 4, "C": 5, "D": 8, "H": 2, "K": 6, "P": 3, "Q": 1}
A, B, C, D, H, K, P, Q = (Dim(name, size) for name, size in SIZES.items())
TOKENS = 7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def argument(name, *dims, dtype="x"):
    return make("input", name=name, dtype=dtype, dims=dims)


def run(inputs, output, *tensors, types=EXACT, **handlers):
    """Verifies and evaluates the graph of one output."""
    graph = Graph("test", tuple(inputs), (output,))
    verify(graph)
    (result,) = evaluate(graph, {i.attrs["name"]: t for i, t in zip(inputs, tensors, strict=True)}, types=types, **handlers)
    return result


def equal(result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


# ---- elementwise ---------------------------------------------------------------------------------------------------------------

UNARY = [op for op in OPS.values() if op.kind == "elementwise" and op.arity == 1 and op.name != "cast"]
BINARY = [op for op in OPS.values() if op.kind == "elementwise" and op.arity == 2 and op.name not in ("and", "or")]
TORCH = {"neg": torch.neg, "mod": torch.remainder, "lt": torch.lt, "and": torch.logical_and, "or": torch.logical_or}


@pytest.mark.parametrize("op", UNARY, ids=lambda op: op.name)
def test_unary(op):
    x, data = argument("x", T, A), normal(TOKENS, 3).abs() + 0.1
    equal(run([x], make(op.name, x), data), getattr(torch, op.name)(data))


@pytest.mark.parametrize("op", BINARY, ids=lambda op: op.name)
def test_binary_meets_by_name(op):
    """[B, T] with [T, A, B]: transposed, and with a missing dim in the middle."""
    x, y = argument("x", B, T), argument("y", T, A, B)
    p, q = normal(4, TOKENS).abs() + 0.1, normal(TOKENS, 3, 4, seed=1).abs() + 0.1
    function = TORCH.get(op.name) or getattr(torch, op.name)
    for first, second, swapped in ((x, y, False), (y, x, True)):
        wide = p.T[:, None, :].expand(TOKENS, 3, 4)
        expected = function(q, wide) if swapped else function(wide, q)
        equal(run([x, y], make(op.name, first, second), p, q), expected)


def test_where_and_logic():
    x, y, i = argument("x", T, A), argument("y", A), make("index", dtype="int", dims=(A,))
    p, q, along = normal(TOKENS, 3), normal(3, seed=1), torch.arange(3)
    one = make("const", value=1)
    both = make("and", make("ge", i, one), make("gt", x, y))
    either = make("or", make("lt", i, one), make("gt", x, y))
    equal(run([x, y], make("where", both, x, y), p, q), torch.where((along >= 1) & (p > q), p, q))
    equal(run([x, y], make("where", either, y, x), p, q), torch.where((along < 1) | (p > q), q, p))
    masked = make("where", both, x, make("const", value=-math.inf))
    assert run([x, y], masked, p, q)[:, 0].eq(-math.inf).all()


@pytest.mark.parametrize("x", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_results_have_the_type_the_rule_infers(x):
    """Where torch promotes otherwise: integers beside fractions, tensors without axes beside literals or wider types."""
    types, i, half = dtypes(x), make("index", dtype="int", dims=(B,)), make("const", value=0.5)
    v = argument("v", T, A)
    tokens, data = argument("n", T, dtype="int"), normal(TOKENS, 3).to(x)
    scalar = make("sum", argument("w", A), over=("A",))
    wide = make("cast", scalar, to="f32")
    for value in (make("div", i, make("const", value=7)), make("mul", i, half), make("exp", i), make("pow", i, half),
                  make("mean", i, over=("B",)), make("pow", make("const", value=3.0), i), make("mul", tokens, half),
                  make("mul", v, i), make("maximum", v, half), make("mul", v, half), make("add", scalar, half),
                  make("div", wide, half), make("mul", v, wide), make("mul", v, scalar), make("mul", i, make("const", value=2))):
        graph = Graph("g", (v, tokens, scalar.inputs[0]), (value,))
        (result,) = evaluate(graph, {"v": data, "n": torch.arange(TOKENS), "w": torch.ones(3, dtype=x)}, types=types)
        assert result.dtype == types[value.dtype], value


def test_float64_is_not_rounded_on_the_way():
    """theta ^ (-2 * index / K) and K ^ -0.5, written with whole numbers as rope and attend do."""
    i, k = make("index", dtype="int", dims=(K,)), make("const", value=80)
    power = make("div", make("mul", make("const", value=-2), i), k)
    freqs = make("pow", make("const", value=10000), power)
    equal(run([], freqs), 10000.0 ** (-2 * torch.arange(6, dtype=torch.float64) / 80))
    scale = make("mul", make("cast", i, to="x"), make("pow", k, make("const", value=-0.5)))
    equal(run([], scale), torch.arange(6, dtype=torch.float64) * 80**-0.5)
    root = make("mul", make("cast", i, to="x"), make("sqrt", make("const", value=2304)))
    equal(run([], root), torch.arange(6, dtype=torch.float64) * 48)


# ---- reductions and contraction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, function", [("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)])
@pytest.mark.parametrize("over", [("A",), ("B",), ("C", "A"), ("A", "B", "C")], ids="".join)
def test_reductions(op, function, over):
    x, data = argument("x", A, T, C, B), normal(3, TOKENS, 5, 4)
    equal(run([x], make(op, x, over=over), data), function(data, dim=["ATCB".index(name) for name in over]))


@pytest.mark.parametrize("a, b, over", [
    ("TD", "AD", "D"), ("TD", "DA", "D"), ("DT", "DA", "D"), ("AD", "TD", "D"),          # a plain linear, however it is stored
    ("TABC", "CAD", "C"), ("CTBA", "DCA", "C"),                                          # batch dims
    ("TABC", "CBD", "CB"), ("TABC", "CBD", "BC"), ("BCTA", "ADC", "AC"),                 # several contracted, some parallel
    ("TAB", "TABD", "B"), ("TAB", "BA", "AB"), ("TA", "B", ""), ("TA", "TA", "A"), ("TAB", "ATB", ""),
])
@pytest.mark.parametrize("static", [False, True], ids=["value", "weight"])
def test_contract(a, b, over, static):
    table = {d.name: d for d in (T, A, B, C, D)}
    size = {d.name: d.size or TOKENS for d in table.values()}
    x, p, q = argument("x", *map(table.get, a)), normal(*map(size.get, a)), normal(*map(size.get, b), seed=1)
    handlers = {"weight": lambda value: storage_view(q, value)}
    if static and "T" in b:
        pytest.skip("a weight has no T")
    w = argument("w", *map(table.get, b))
    if static:
        w = make("weight", key="w", shape=tuple(q.shape), offset=0, strides=q.stride(), dtype="x", dims=w.dims)
    for first, second in ((x, w), (w, x)):
        value = make("contract", first, second, over=tuple(over))
        expected = torch.einsum(f"{a},{b}->{''.join(value.names)}", p, q)
        result = run([x], value, p, **handlers) if static else run([x, w], value, p, q)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_one_matrix_read_with_batch_dims_in_two_orders():
    w = make("weight", key="w", shape=(3, 4, 8), offset=0, strides=(32, 8, 1), dtype="x", dims=(A, B, D))
    x, y, data, matrix = argument("x", T, A, B, D), argument("y", T, B, A, D), normal(TOKENS, 3, 4, 8), normal(3, 4, 8, seed=1)
    graph = Graph("g", (x, y), tuple(make("contract", v, w, over=("D",)) for v in (x, y)))
    one, other = evaluate(graph, {"x": data, "y": data.transpose(1, 2)}, weight=lambda v: storage_view(matrix, v))
    equal(one, (data * matrix).sum(-1))
    equal(other, one.transpose(1, 2))


# ---- movement ------------------------------------------------------------------------------------------------------------------


def test_split_of_composite_axes():
    """D = H*(P + Q): two parts of every head. K = K/2*(1 + 1): neighbours. On an axis in the middle, of a transposed tensor."""
    x, data = argument("x", A, D, T), normal(TOKENS, 8, 3).permute(2, 1, 0)
    heads = data.reshape(3, 2, 4, TOKENS)
    p = make("split", x, dim="D", into=("H", "P"), sizes=(2, 3), strides=(4, 1), offset=0)
    q = make("split", x, dim="D", into=("H", "Q"), sizes=(2, 1), strides=(4, 1), offset=3)
    assert p.names == ("A", "H", "P", "T")
    equal(run([x], p, data), heads[:, :, :3])
    equal(run([x], q, data), heads[:, :, 3:])
    swapped = make("split", x, dim="D", into=("P4", "H"), sizes=(4, 2), strides=(1, 4), offset=0)
    equal(run([x], swapped, data), heads.transpose(1, 2))
    odd = make("split", x, dim="D", into=("J",), sizes=(4,), strides=(2,), offset=1)
    equal(run([x], odd, data), data[:, 1::2])
    chained = make("split", odd, dim="J", into=("M",), sizes=(2,), strides=(2,), offset=1)
    equal(run([x], chained, data), data[:, 3::4])


def test_join_of_composite_axes():
    p, q = argument("p", T, H, P), argument("q", Q, H, T)
    a, b = normal(TOKENS, 2, 3), normal(1, 2, TOKENS, seed=1)
    joined = make("join", p, q, dim="D", size=8, parts=((("H", "P"), (4, 1), 0), (("H", "Q"), (4, 1), 3)))
    assert joined.names == ("T", "D")
    equal(run([p, q], joined, a, b), torch.cat((a, b.permute(2, 1, 0)), -1).reshape(TOKENS, 8))


def test_join_of_neighbours_and_halves():
    j = Dim("J", 3)
    x, y, a, b = argument("x", T, j, A), argument("y", A, T, j), normal(TOKENS, 3, 3), normal(3, TOKENS, 3, seed=1)
    b_like_a = b.permute(1, 2, 0)
    neighbours = make("join", x, y, dim="K", size=6, parts=((("J",), (2,), 0), (("J",), (2,), 1)))
    equal(run([x, y], neighbours, a, b), torch.stack((a, b_like_a), 2).reshape(TOKENS, 6, 3))
    halves = make("join", x, y, dim="K", size=6, parts=((("J",), (1,), 0), (("J",), (1,), 3)))
    equal(run([x, y], halves, a, b), torch.cat((a, b_like_a), 1))


def test_join_broadcasts_what_a_part_lacks():
    x, y = argument("x", A, T, B), argument("y", C)
    a, b = normal(3, TOKENS, 4), normal(5, seed=1)
    joined = make("join", x, y, dim="Z", size=9, parts=((("B",), (1,), 0), (("C",), (1,), 4)))
    equal(run([x, y], joined, a, b), torch.cat((a, b.expand(3, TOKENS, 5)), -1).transpose(0, 1))  # tokens first
    swapped = make("join", y, x, dim="Z", size=9, parts=((("C",), (1,), 0), (("B",), (1,), 5)))
    expected = torch.cat((b.expand(3, TOKENS, 5), a), -1)
    result = run([x, y], swapped, a, b)
    equal(result.permute([swapped.names.index(n) for n in ("A", "T", "Z")]), expected)


def test_split_undoes_join():
    x, y, a, b = argument("x", T, B), argument("y", T, C), normal(TOKENS, 4), normal(TOKENS, 5, seed=1)
    joined = make("join", x, y, dim="Z", size=9, parts=((("B",), (1,), 5), (("C",), (1,), 0)))
    back = make("split", joined, dim="Z", into=("B",), sizes=(4,), strides=(1,), offset=5)
    equal(run([x, y], back, a, b), a)


def test_gather():
    ids, table = argument("ids", T, dtype="int"), argument("table", D, A)
    picked, data = torch.tensor([2, 0, 0, 1, 2, 1, 0], dtype=torch.int32), normal(8, 3)
    equal(run([ids, table], make("gather", table, ids, dim="A"), picked, data), data.T[picked])
    rows, x, wanted = argument("rows", N, dtype="int"), argument("x", T, D), torch.tensor([6, 1])
    equal(run([rows, x], make("gather", x, rows, dim="T"), wanted, normal(TOKENS, 8)), normal(TOKENS, 8)[wanted])
    two = argument("e", T, H, dtype="int")  # routed experts: a matrix per token and choice
    experts, choice = argument("w", A, D, C), torch.randint(0, 3, (TOKENS, 2), generator=torch.Generator().manual_seed(0))
    stack = normal(3, 8, 5)
    equal(run([two, experts], make("gather", experts, two, dim="A"), choice, stack), stack[choice])


def test_top():
    x, data = argument("x", D, T), normal(8, TOKENS)
    best = torch.topk(data, 3, dim=0)
    equal(run([x], make("top", x, dim="D", into="E", size=3, result="values"), data), best.values)
    equal(run([x], make("top", x, dim="D", into="E", size=3, result="index"), data), best.indices)


# ---- state and regions ---------------------------------------------------------------------------------------------------------


def attention(q, k, v, pos):
    """softmax(q·k + causal mask)·v of grouped heads as a `via`: q [T, A, B, D]; k and v [S, A, D]; A groups of B heads."""
    iq, ik, iv, ip = (argument(n, *i.dims, dtype=i.dtype) for n, i in zip("qkvp", (q, k, v, pos), strict=True))
    s = make("contract", iq, ik, over=("D",))
    seen = make("le", make("index", dtype="int", dims=(S,)), ip)
    s = make("where", seen, s, make("const", value=-math.inf))
    e = make("exp", make("sub", s, make("max", s, over=("S",))))
    out = make("contract", make("div", e, make("sum", e, over=("S",))), iv, over=("S",))
    body = Graph("attend", (iq, ik, iv, ip), (out,))
    return make("via", q, k, v, pos, template="attention", body=body, dtype="x", dims=out.dims)


def test_via_evaluates_its_body_and_cache_sees_the_sequence():
    q, k, v, pos = argument("q", T, A, B, D), argument("k", T, A, D), argument("v", T, A, D), argument("pos", T, dtype="int")
    via = attention(q, make("cache", k, name="k"), make("cache", v, name="v"), pos)
    a, b, c = normal(TOKENS, 3, 4, 8), normal(TOKENS, 3, 8, seed=1), normal(TOKENS, 3, 8, seed=2)
    result = run([q, k, v, pos], via, a, b, c, torch.arange(TOKENS))
    heads, keys, values = a.permute(1, 2, 0, 3), b.permute(1, 0, 2)[:, None], c.permute(1, 0, 2)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=1.0)
    torch.testing.assert_close(result, expected.permute(2, 0, 1, 3), rtol=1e-12, atol=1e-12)


def test_cache_and_via_can_be_replaced():
    k, pos, seen = argument("k", T, A, D), argument("pos", T, dtype="int"), []
    q = make("mul", make("index", dtype="int", dims=(B,)), k)
    q = make("join", q, dim="D2", size=8, parts=((("D",), (1,), 0),))
    q = make("split", q, dim="D2", into=("D",), sizes=(8,), strides=(1,), offset=0)
    history = make("cache", k, name="layer.k")
    via = attention(q, history, history, pos)

    def cache(value, tensor):
        seen.append((value.attrs["name"], tensor.shape))
        return tensor

    def implement(value, tensors):
        assert value.attrs["template"] == "attention" and len(tensors) == 4
        return tensors[0] * 2

    result = run([k, pos], via, normal(TOKENS, 3, 8), torch.arange(TOKENS), cache=cache, via=implement)
    assert seen == [("layer.k", (TOKENS, 3, 8))] and result.shape[0] == TOKENS


def test_kernel_results_are_read_by_get():
    x, inner, data = argument("x", T, A), argument("a", T, A), normal(TOKENS, 3)
    doubled = make("mul", inner, make("const", value=2))
    body = Graph("rows", (inner,), (make("sum", doubled, over=("A",)), doubled))
    kernel = make("kernel", x, kind="rows", name="rows", body=body, dtype="x", dims=())
    first, second = (make("get", kernel, index=i, dtype="x", dims=body.outputs[i].dims) for i in range(2))
    equal(run([x], make("add", first, second), data), data.sum(-1, keepdim=True) * 2 + data * 2)


# ---- weights and preparation ---------------------------------------------------------------------------------------------------


def test_static_values_are_computed_once():
    calls, matrix, scale = [], normal(5, 8), normal(8, seed=1)

    def weight(value):
        calls.append(value.attrs["key"])
        return storage_view({"w": matrix, "s": scale}[value.attrs["key"]], value)

    x = argument("x", T, D)
    w = make("weight", key="w", shape=(5, 8), offset=0, strides=(8, 1), dtype="x", dims=(C, D))
    s = make("weight", key="s", shape=(8,), offset=0, strides=(1,), dtype="x", dims=(D,))
    graph = Graph("g", (x,), (make("contract", x, make("mul", w, s), over=("D",)),))
    evaluator = Evaluator(graph, EXACT, weight=weight)
    for seed in range(3):
        data = normal(TOKENS, 8, seed=seed)
        torch.testing.assert_close(evaluator(x=data)[0], data @ (matrix * scale).T, rtol=1e-12, atol=1e-12)
    assert sorted(calls) == ["s", "w"]
    assert len(evaluator.steps) == 1


def test_a_component_of_a_fused_transposed_weight():
    """GPT-2's c_attn: storage [D, H*P + H*P]; the second component as [H, P, D]."""
    storage = normal(8, 12)
    w = make("weight", key="w", shape=(8, 12), offset=6, strides=(3, 1, 12), dtype="x", dims=(H, P, D))
    x, data = argument("x", T, D), normal(TOKENS, 8, seed=1)
    result = run([x], make("contract", x, w, over=("D",)), data, weight=lambda v: storage_view(storage, v))
    torch.testing.assert_close(result, (data @ storage)[:, 6:].reshape(TOKENS, 2, 3), rtol=1e-12, atol=1e-12)


def test_outputs_may_be_inputs_weights_and_shared():
    x = argument("x", T, A)
    w = make("weight", key="w", shape=(3,), offset=0, strides=(1,), dtype="x", dims=(A,))
    y, data, ones = make("mul", x, w), normal(TOKENS, 3), torch.ones(3, dtype=torch.float64)
    results = evaluate(Graph("g", (x,), (x, w, y, y)), {"x": data}, weight=lambda v: ones)
    for result, expected in zip(results, (data, ones, data, data), strict=True):
        equal(result, expected)


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_llama_in_narrow_types_stays_near_float64(x):
    graph = read_graph(llama_text(2))
    verify(graph)
    generator = torch.Generator().manual_seed(0)
    keys = {v.attrs["key"]: v.attrs["shape"] for v in graph.walk() if v.op == "weight"}
    storage = {key: (torch.randn(shape, generator=generator).double() * 0.3).to(x).double() for key, shape in keys.items()}
    arguments = {"ids": torch.tensor([3, 1, 4, 1, 5, 9, 2]), "pos": torch.arange(7)}

    def logits(types):
        weight = lambda v: storage_view(storage[v.attrs["key"]].to(types["x"]), v)  # noqa: E731
        return evaluate(graph, arguments, weight, types)[0]

    exact, narrow = logits(EXACT), logits(dtypes(x))
    assert narrow.dtype == x and exact.shape == (7, 50)
    assert (narrow.double() - exact).norm() / exact.norm() < 12 * torch.finfo(x).eps
