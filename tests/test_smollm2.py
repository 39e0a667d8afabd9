"""The default model on a CPU, against `transformers` on the same dequantised weights. Skipped where the model is not at hand."""

import os

import pytest
import torch

from fusec import LLM, SamplingParams
from fusec.errors import UserError
from fusec.runtime.checkpoint import open_checkpoint
from fusec.runtime.hub import resolve

PROMPTS = [
    "What is a GPU? Answer in two sentences.",
    "Write a haiku about the sea.",
    "What is the capital of France?",
    "Count from one to ten.",
    "Explain gravity to a child.",
    "Name three primes.",
    "Translate to Spanish: good morning.",
    "Why is the sky blue?",
]
TOKENS = 64
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path():
    try:
        return os.environ.get("FUSEC_SMOLLM2") or resolve()
    except UserError:
        pytest.skip("SmolLM2 is not on this machine: fusec pull smollm2")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, dtype="float32", device="cpu", max_num_seqs=8, max_model_len=1024)


@pytest.fixture(scope="module")
def reference(path):
    """transformers' Llama in float32, with the weights of the GGUF."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    weights = {key: checkpoint.load(key) for key in checkpoint.keys()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is no weight
    return model.eval()


@torch.inference_mode()
def answer(model, ids, count, ends):
    """Greedy tokens of transformers, the end of the answer included."""
    result = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    tokens = [int(result.logits[0, -1].argmax())]
    while len(tokens) < count and tokens[-1] not in ends:
        result = model(torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, use_cache=True)
        tokens.append(int(result.logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["chat", "on past the end"])
def test_greedy_tokens_are_those_of_transformers(llm, reference, ignore_eos):
    ids = [llm.tokenizer.apply_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    outputs = llm.generate(ids, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=ignore_eos))
    for prompt, prompt_ids, output in zip(PROMPTS, ids, outputs, strict=True):
        expected = answer(reference, prompt_ids, TOKENS, () if ignore_eos else llm.eos_ids)
        assert list(output.outputs[0].token_ids) == expected, prompt


def test_logits_are_those_of_transformers(llm, reference):
    text = "A graphics processing unit (GPU) is a specialized electronic circuit, first made to speed up images. "
    ids = llm.tokenizer.encode(text * 12)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    assert (llm.logits(ids) - expected).abs().max() <= 1e-3


def test_a_prompt_alone_and_in_a_batch(llm):
    ids = [llm.tokenizer.apply_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS[:3]]
    params = SamplingParams(temperature=0, max_tokens=24)
    together = llm.generate(ids, params)
    for prompt_ids, output in zip(ids, together, strict=True):
        assert llm.generate([prompt_ids], params)[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_answers_are_the_golden_ones(llm, golden):
    """What a user sees, text and all: chat template, greedy decoding, streaming detokenisation."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=TOKENS))
    golden("goldens/smollm2.txt", "".join(f"# {p}\n{a.outputs[0].text}\n[{a.outputs[0].finish_reason}]\n\n"
                                          for p, a in zip(PROMPTS, answers, strict=True)))  # fmt: skip
