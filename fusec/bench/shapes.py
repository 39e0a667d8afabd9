"""What is measured: the architectures of published models as config.json's keys, with random weights, or a user's own config."""

from __future__ import annotations

import difflib
from pathlib import Path

from .. import config_file
from ..errors import UsageError


def llama3_scaling(factor: float) -> dict:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
         "mlp_bias": False, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}

MODELS: dict[str, dict] = {
    "llama-3.1-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
        "rope_theta": 500000.0, "rope_scaling": llama3_scaling(8.0), "max_position_embeddings": 131072},
    "llama-3.2-1b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "rope_scaling": llama3_scaling(32.0), "max_position_embeddings": 131072},
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960},
    "smollm2-135m": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
        "rope_theta": 100000.0, "max_position_embeddings": 8192},
}


def config_of(model: str) -> tuple[str, dict]:
    """(what to call it, its config) of a name in MODELS, a folder with a config.json, such a file, or a .gguf file."""
    if model.lower() in MODELS:
        return model.lower(), dict(MODELS[model.lower()])
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from fusec.runtime.checkpoint import open_checkpoint

        return path.stem, open_checkpoint(path).config
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(model.lower(), MODELS, n=1)
        raise UsageError(f"no model {model}", expected=f"{', '.join(MODELS)}, or a folder with a config.json",
                         hint=f"did you mean {near[0]}?" if near else None)
    return file.parent.resolve().name, config_file.read(file)
