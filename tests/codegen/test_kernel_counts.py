"""How many kernels a layer takes, and what they hold: a fusion lost is a test failed."""

import pytest
from program_checks import EXAMPLES, TINY

from fusec.compiler import compile

# example -> launches of one layer, one letter each:
#   p projections of the layer's input (q, k, v)   a attention   o its output   g gate and up   d down   n a kernel for norms
LAYER = {
    "llama": "paogd",
    "mistral": "paogd",
    "phi3": "paogd",
    "qwen2": "paogd",
    "gpt2": "paogd",
    "qwen3": "pnaogd",  # norms over each head of q and of k, then rope: one kernel
    "olmo2": "pnaongdn",  # norms over all heads of q and k, and after each sublayer
    "gemma2": "paongdn",  # a norm after each sublayer: one kernel for it and the sum that follows
    "gemma3": "pnaongdn",
}
LETTERS = {"q_k_v_proj": "p", "qkv_proj": "p", "c_attn": "p", "attention": "a", "o_proj": "o", "gate_up_proj": "g", "c_fc": "g",
           "down_proj": "d"}


def launches(example):
    return [launch.kernel for launch in compile(EXAMPLES / f"{example}.fuse", TINY[example]).module.launches]


@pytest.mark.parametrize("example", LAYER)
def test_launches(example):
    names = [kernel.attrs["name"] for kernel in launches(example)]
    found = ""
    for name in names[1:-1]:
        if name == "c_proj":
            found += "o" if found[-1] == "a" else "d"
        else:
            found += LETTERS.get(name, "n")
    layers = TINY[example].get("num_hidden_layers") or TINY[example]["n_layer"]
    assert found == LAYER[example] * layers
    assert ("positions" in names[0]) == (example != "gpt2")  # the embedding's launch; learned positions need no sines


@pytest.mark.parametrize("example", ["llama", "mistral", "phi3", "qwen2", "gpt2", "qwen3"])
def test_a_layer_is_at_most_six_kernels(example):
    assert len(LAYER[example]) <= 6


def body(kernels, name):
    return next(k.attrs["body"] for k in kernels if k.attrs["name"] == name)


def ops(graph):
    return [value.op for value in graph.walk()]


def test_projections_take_norm_rope_and_cache_writes_in():
    kernels = launches("llama")
    graph = body(kernels, "q_k_v_proj")
    found = ops(graph)
    assert found.count("contract") == 1 and found.count("mean") == 1 and found.count("rsqrt") == 1
    assert [o.op for o in graph.outputs].count("cache") == 2 and len(graph.outputs) == 3
    assert found.count("join") == 2 and found.count("sub") == 2  # q and k turned
    # x goes into the contraction as it lies in memory: the norm's scale comes after it, its weight is in the matrix
    contract = next(v for v in graph.walk() if v.op == "contract")
    assert [i.op for i in contract.inputs] == ["input", "input"]
    mean = next(v for v in graph.walk() if v.op == "mean")
    assert contract not in ancestors(mean) and mean not in ancestors(contract)


def test_gate_and_up_are_one_contraction_with_the_activation_behind():
    graph = body(launches("llama"), "gate_up_proj")
    assert ops(graph).count("contract") == 1 and ops(graph).count("mean") == 1 and "exp" in ops(graph)
    assert len(graph.outputs) == 1 and graph.outputs[0].names == ("T", "F")


@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_residual_sums_are_epilogues(name):
    assert sorted(ops(body(launches("llama"), name))) == ["add", "contract", "input", "input", "input"]


def test_norm_weights_are_folded_into_private_matrices_and_stay_on_x_for_a_tied_head():
    module = compile(EXAMPLES / "llama.fuse", TINY["llama"]).module
    keys = {name: {v.attrs["key"] for v in ancestors(w.value) if v.op == "weight"} for name, w in module.weights.items()}
    merged = next(k for n, k in keys.items() if "q_k_v_proj" in n)
    assert merged == {f"model.layers.0.{k}.weight" for k in ("input_layernorm", *(f"self_attn.{p}_proj" for p in "qkv"))}
    assert {"model.norm.weight"} in keys.values()  # the head is the embedding, which other kernels read as it is


def ancestors(value):
    found, stack = set(), [value]
    while stack:
        v = stack.pop()
        if v not in found:
            found.add(v)
            stack.extend(v.inputs)
    return found


def test_the_step_selects_rows_before_the_head():
    head = launches("llama")[-1].attrs["body"]
    gathers = [v for v in head.walk() if v.op == "gather"]
    assert [g.attrs["dim"] for g in gathers] == ["T"]
    assert head.outputs[0].names[0] == "T'"


def test_like_layers_share_their_kernels():
    module = compile(EXAMPLES / "llama.fuse", TINY["llama"] | {"num_hidden_layers": 6}).module
    assert len(module.functions) == 2 + 5
    assert {f.count for f in module.functions} == {1, 6}
