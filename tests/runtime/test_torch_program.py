"""The torch backend, with pages, chunks and torch's own functions, against the plain evaluation of the same graph."""

import pytest
import torch

from fusec import LLM
from fusec.compiler import compile
from fusec.ir.interpreter import dtypes, evaluate
from fusec.runtime.torch_idioms import idioms
from fusec.runtime.weights import RandomWeights

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "LlamaForCausalLM": SMALL,
    "MistralForCausalLM": SMALL | {"sliding_window": 5},
    "Qwen3ForCausalLM": SMALL,
    "Gemma2ForCausalLM": SMALL | {"sliding_window": 5},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
IDS = [int(i) for i in torch.randint(0, 99, (23,), generator=torch.Generator().manual_seed(0))]


def config(architecture):
    return CONFIGS[architecture] | {"architectures": [architecture]}


def plain(architecture):
    """float32 logits of IDS by the interpreter alone, the whole sequence at once."""
    graph = compile(None, config(architecture), dtype="float32", backend="torch").graph
    ids, pos = torch.tensor(IDS), torch.arange(len(IDS))
    loader = RandomWeights(0, torch.float32, torch.device("cpu"))
    return evaluate(graph, {"ids": ids, "pos": pos, "rows": pos}, loader, dtypes(torch.float32))[0]


def model(architecture):
    return LLM(config(architecture), load_format="random", dtype="float32", device="cpu", block_size=4, max_num_seqs=4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_whole_sequence(architecture):
    assert torch.allclose(model(architecture).logits(IDS), plain(architecture), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_token_by_token_over_scattered_pages(architecture):
    llm, expected = model(architecture), plain(architecture)
    blocks = llm.engine.allocator.allocate(12)[::-2]  # neither in order nor neighbours
    with torch.inference_mode():
        logits = llm.engine.runner.logits(IDS, blocks, chunk=1)
        chunked = llm.engine.runner.logits(IDS, blocks, chunk=5)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(chunked, expected, rtol=1e-4, atol=1e-4)


def test_idioms_of_a_llama():
    types = dtypes(torch.bfloat16)
    graph, functions = idioms(compile(None, config("LlamaForCausalLM"), backend="torch").graph, types)
    names = [value.attrs["template"] for value in graph.walk() if value in functions]
    assert {name: names.count(name) for name in set(names)} == {"silu": 2, "rms_norm": 5, "rope": 4}


def test_an_idiom_means_what_it_replaced():
    types = dtypes(torch.float32)
    graph, functions = idioms(compile(None, config("LlamaForCausalLM"), dtype="float32", backend="torch").graph, types)
    for value in graph.walk():
        if value in functions:
            body = value.attrs["body"]
            inputs = {i.attrs["name"]: torch.randn([d.size or 3 for d in i.dims]) for i in body.inputs}
            (expected,) = evaluate(body, inputs, types=types)
            assert torch.allclose(functions[value](*inputs.values()), expected, rtol=1e-5, atol=1e-6)
