"""The shipped programs against transformers: the same tiny random checkpoints, the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fusec.ir.interpreter import dtypes, evaluate, storage_view
from fusec.language import check_checkpoint, find_example, load

transformers = pytest.importorskip("transformers")

COMMON = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=56, max_position_embeddings=64)
ROPE3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, num_key_value_heads=4, head_dim=4,
              moe_intermediate_size=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, first_k_dense_replace=1,
              topk_method="greedy", n_group=1, topk_group=1)
CASES = {
    "llama": ("LlamaForCausalLM", dict(tie_word_embeddings=False)),
    "llama-tied-llama3": ("LlamaForCausalLM", dict(tie_word_embeddings=True, rope_parameters=ROPE3)),
    "llama-linear": ("LlamaForCausalLM", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "llama-head-dim": ("LlamaForCausalLM", dict(head_dim=20)),
    "mistral-window": ("MistralForCausalLM", dict(sliding_window=5)),
    "mistral-full": ("MistralForCausalLM", dict(sliding_window=None)),
    "qwen2": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    "qwen2-yarn": ("Qwen2ForCausalLM", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=16)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
                                             norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])),
    "mixtral": ("MixtralForCausalLM", dict(num_local_experts=5, num_experts_per_tok=2)),
    "phi3": ("Phi3ForCausalLM", dict(pad_token_id=0, sliding_window=5)),
    "olmo2": ("Olmo2ForCausalLM", dict()),
    "gemma2": ("Gemma2ForCausalLM", dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=20, num_hidden_layers=3)),
    "gemma3": ("Gemma3ForCausalLM", dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=20, num_hidden_layers=7)),
    "gpt2": ("GPT2LMHeadModel", dict(n_embd=48, n_layer=2, n_head=4, n_positions=64)),
    "deepseek-v2": ("DeepseekV2ForCausalLM", LATENT | dict(q_lora_rank=24, routed_scaling_factor=1.5)),
    "deepseek-v2-lite": ("DeepseekV2ForCausalLM", LATENT | dict(q_lora_rank=None)),
}


def checkpoint(architecture, changes, folder):
    """A random checkpoint written by transformers -> (its model, its config.json, its tensors)."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    base = {} if architecture.startswith("GPT2") else COMMON
    config = model_class.config_class(**(base | dict(vocab_size=97) | changes))
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def weight_of(tensors):
    def weight(value):
        key = value.attrs["key"]
        count = value.attrs["shape"][0]
        storage = torch.stack([tensors[key.format(i)] for i in range(count)]) if "{}" in key else tensors[key]
        assert tuple(storage.shape) == value.attrs["shape"]
        return storage_view(storage, value)

    return weight


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    architecture, changes = CASES[case]
    model, config, tensors = checkpoint(architecture, changes, tmp_path)
    graph = load(find_example(architecture), config)
    assert check_checkpoint(graph, {key: tuple(t.shape) for key, t in tensors.items()}) == []
    ids = torch.randint(0, 97, (23,))
    (logits,) = evaluate(graph, {"ids": ids, "pos": torch.arange(23)}, weight_of(tensors), dtypes(torch.float32))
    with torch.no_grad():
        reference = model(ids[None]).logits[0]
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()
