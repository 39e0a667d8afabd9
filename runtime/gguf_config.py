"""GGUF metadata told in the keys of Hugging Face's config.json."""

from __future__ import annotations

import math
import struct

from fusec.errors import UserError

# general.architecture -> (architectures[0], model_type, hidden_act).  "llama" also holds Mistral and SmolLM2.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", "silu"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", "silu"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", "silu"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", "gelu_pytorch_tanh"),
}

REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
OPTIONAL = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192  # Llama 3.1's and 3.2's own; the file keeps only the factors they give


def config_from_gguf(file, rope_factors=None) -> dict:
    """The config.json that the model in `file` (a GGUFFile) would have had.

    rope_factors: the values of the tensor `rope_freqs.weight` ([head_dim / 2]), through which Llama 3 files scale their rope.
    Raises UserError for an architecture that is not known, or metadata that is missing.
    """
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES or metadata.get(f"{architecture}.expert_count", 0):
        found = f"{architecture} with experts" if architecture in ARCHITECTURES else repr(architecture)
        raise UserError(
            f"the architecture of {file.path} cannot be read from GGUF",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            found=found,
            hint="use the model's safetensors folder instead",
        )
    name, model_type, activation = ARCHITECTURES[architecture]
    get = {key.removeprefix(architecture + "."): value for key, value in metadata.items()}.get
    config = {"architectures": [name], "model_type": model_type, "hidden_act": activation}
    for key, source in REQUIRED.items():
        config[key] = _scalar(file.path, f"{architecture}.{source}", get(source))
    config.update({key: _short(get(source)) for key, source in OPTIONAL.items() if get(source) is not None})
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = _scalar(
        file.path, f"{architecture}.attention.head_count_kv", get("attention.head_count_kv", heads)
    )
    rotated = get("rope.dimension_count")  # a Llama rotates the whole head
    config["head_dim"] = get("attention.key_length") or (rotated if architecture == "llama" and rotated else hidden // heads)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file.path} holds no language model", expected="a tensor token_embd.weight", found="none")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["rope_theta"] = _short(get("rope.freq_base", 10000.0))
    scaling = _rope_scaling(get) or (rope_factors and _llama3_scaling(file.path, config, rope_factors))
    if scaling:
        config["rope_scaling"] = scaling
    if architecture == "gemma2":  # not in the file: the 27B alone (46 layers) scales scores by hidden / heads
        config["query_pre_attn_scalar"] = hidden // heads if config["num_hidden_layers"] == 46 else config["head_dim"]
    config.update({key: metadata[source] for key, source in TOKEN_IDS.items() if source in metadata})
    return config


def _scalar(path, key, value):
    if not isinstance(value, (int, float)) or not value > 0:
        found = "a list (sizes that differ by layer)" if isinstance(value, list) else repr(value)
        expected = f"one positive number for {key}"
        raise UserError(f"the metadata of {path} does not describe a model", expected=expected, found=found)
    return _short(value)


def _short(value):
    """A float32 read back as the decimal a person wrote: 9.999999747378752e-06 -> 1e-05."""
    if not isinstance(value, float):
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))  # nine digits tell any two float32 apart
    return next((short for short in candidates if struct.pack("<f", short) == struct.pack("<f", value)), value)


def _rope_scaling(get):
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    scaling = {"rope_type": kind, "factor": _short(factor)}
    if context := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = context
    return scaling


def _llama3_scaling(path, config, factors):
    """Finds the `llama3` scaling that gives these factors (https://arxiv.org/abs/2407.21783, and its reference code)."""
    factor = float(f"{max(factors):.4g}")  # the lowest frequencies are divided by all of it
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    head_dim = config["head_dim"]
    for i, found in enumerate(factors):
        turns = LLAMA3_CONTEXT / (2 * math.pi * config["rope_theta"] ** (2 * i / head_dim))  # rotations over the first context
        smooth = min(1.0, max(0.0, (turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)))
        expected = 1 / ((1 - smooth) / factor + smooth)
        if not math.isclose(expected, found, rel_tol=1e-3):
            raise UserError(
                f"the rope factors of {path} are not known",
                expected=f"{expected:.4f} at frequency {i}, as Llama 3 scales with factor {factor}",
                found=f"{found:.4f}",
                hint="use the model's safetensors folder instead",
            )
    return scaling
