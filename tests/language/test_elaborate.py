"""Elaboration: what a program becomes in the graph."""

import time

import pytest

from fusec.language import find_example, load

SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)


def program(fields, body, params="x: [T, D], pos: int[T]", result="[T, D]", config="  D = 8\n  G = 2\n  R = 3\n  K = 4\n"):
    lines = "".join(f"  {line}\n" for line in (*fields, "", *body))
    return f"use std\n\nconfig\n{config}\nmodel M({params}) -> {result}\n{lines}"


def weights(graph):
    return {value.attrs["key"]: value for value in graph.walk() if value.op == "weight"}


def test_a_sum_of_dims_is_several_views_of_one_tensor():
    graph = load(find_example("Phi3ForCausalLM"), SMALL | dict(head_dim=4))
    parts = sorted((v for v in graph.walk() if v.op == "weight" and v.attrs["key"] == "model.layers.0.self_attn.qkv_proj.weight"),
                   key=lambda v: v.attrs["offset"])
    assert [v.names for v in parts] == [("G", "R", "K", "D"), ("G", "K", "D"), ("G", "K", "D")]
    assert {v.attrs["shape"] for v in parts} == {(32, 16)}
    assert [v.attrs["offset"] for v in parts] == [0, 16 * 16, 24 * 16]
    assert parts[0].attrs["strides"] == (2 * 4 * 16, 4 * 16, 16, 1)


def test_a_sum_inside_a_product_distributes():
    graph = load(program(["up : Linear[D -> G*(K + R)]"], ["a, b = up(x)", "x + sum[G](sum[K](a) + sum[R](b))"]))
    a, b = sorted((v for v in graph.walk() if v.op == "weight"), key=lambda v: v.attrs["offset"])
    assert (a.names, a.attrs["strides"], a.attrs["offset"]) == (("G", "K", "D"), (7 * 8, 8, 1), 0)
    assert (b.names, b.attrs["strides"], b.attrs["offset"]) == (("G", "R", "D"), (7 * 8, 8, 1), 4 * 8)


def test_tied_weights_are_one_value():
    tied = load(find_example("LlamaForCausalLM"), SMALL | dict(tie_word_embeddings=True))
    assert "lm_head.weight" not in weights(tied)
    users = tied.users()[weights(tied)["model.embed_tokens.weight"]]
    assert sorted(user.op for user in users) == ["contract", "gather"]
    assert "lm_head.weight" in weights(load(find_example("LlamaForCausalLM"), SMALL))


def test_routed_weights_are_stacked():
    graph = load(find_example("MixtralForCausalLM"), SMALL | dict(num_local_experts=3, num_experts_per_tok=2))
    value = weights(graph)["model.layers.1.block_sparse_moe.experts.{}.w1.weight"]
    assert (value.names, value.attrs["shape"]) == (("E", "F", "D"), (3, 24, 16))
    (gather,) = graph.users()[value]
    assert (gather.op, gather.names) == ("gather", ("T", "A", "F", "D"))


def test_origins_name_the_line_and_the_place():
    graph = load(find_example("LlamaForCausalLM"), SMALL)
    value = weights(graph)["model.layers.1.self_attn.q_proj.weight"]
    assert value.origin.path == "model.layers.1.self_attn.q_proj"
    line = find_example("LlamaForCausalLM").read_text().splitlines()[value.origin.line - 1]
    assert line[value.origin.column - 1:].startswith("q_proj : Linear")
    assert all(v.origin.file.endswith("llama.fuse") for v in graph.walk())


def test_attention_is_a_region_that_reads_nothing_outside():
    graph = load(find_example("LlamaForCausalLM"), SMALL)
    vias = [v for v in graph.walk() if v.op == "via"]
    assert len(vias) == 2
    for via in vias:
        body = via.attrs["body"]
        assert [i.attrs["name"] for i in body.inputs] == ["q", "k", "v", "pos"]
        assert [i.dims for i in body.inputs] == [i.dims for i in via.inputs]
        assert {v for v in body.walk() if v.op == "input"} <= set(body.inputs)
        assert not {v.op for v in body.walk()} & {"weight", "cache"}
        assert via.dims == body.outputs[0].dims


def test_a_region_captures_what_else_it_reads():
    graph = load("use std\n\nop biased[K](q, k, v, pos, b) via attention\n  s = sum[K](q * k) + b\n"
                 "  sum[S](softmax[S](where(causal(pos, index[S]), f32(s), -inf)) * f32(v)) as q\n"
                 + program(["bias : [G]", "o : Linear[G*K -> D]", "i : Linear[D -> G*K]"],
                           ["h = i(x)", "o(biased[K](h, cache(h), cache(h), pos, bias))"]).removeprefix("use std\n"))
    (via,) = (v for v in graph.walk() if v.op == "via")
    assert [i.attrs["name"] for i in via.attrs["body"].inputs] == ["q", "k", "v", "pos", "b"]


def test_caches_have_names_of_their_own():
    graph = load(find_example("LlamaForCausalLM"), SMALL)
    names = [v.attrs["name"] for v in graph.walk() if v.op == "cache"]
    assert len(names) == 4 == len(set(names))


def test_layers_may_differ_by_index():
    graph = load(find_example("Gemma2ForCausalLM"), SMALL | dict(head_dim=8, sliding_window=4))
    windows = ["and" in {v.op for v in via.attrs["body"].walk()} for via in graph.walk() if via.op == "via"]
    assert windows == [True, False]


def test_a_user_may_name_parameters_as_the_config_does():
    text = program(["norm : Power[D, 3.0]"], ["norm(x)"])
    block = "\nblock Power[D, p](x: [.., D])\n  weight : [D]\n  h = f32(x)\n  weight * (h * mean[D](abs(h)^p)^(-1 / p) as x)\n"
    assert "norm.weight" in weights(load(text.replace("\nmodel", block + "\nmodel")))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "DeepseekV2ForCausalLM"])
def test_defaults_need_no_config(architecture):
    graph = load(find_example(architecture))
    assert [i.attrs["name"] for i in graph.inputs] == ["ids", "pos"]
    assert graph.outputs[0].names == ("T", "V")


def test_an_8b_model_elaborates_quickly():
    load(find_example("LlamaForCausalLM"), SMALL)
    start = time.perf_counter()
    graph = load(find_example("LlamaForCausalLM"))
    assert time.perf_counter() - start < 1.0  # about 0.1 s on one quiet core
    assert len(graph.walk()) < 4000
