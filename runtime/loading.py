"""From what a user calls a model to a program that is loaded: the checkpoint, its tokenizer, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusec import config_file
from fusec.errors import UsageError

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
DEFAULT_CONTEXT = 2048


@dataclass
class Model:
    """A loaded program (see Program) and what goes with it.  tokenizer: None where only a config was given.  eos_ids: tokens that
    end an answer.  max_model_len: longest sequence, in tokens."""

    program: object
    tokenizer: object | None
    eos_ids: frozenset[int]
    max_model_len: int


def load_model(model, *, source, dtype, device, max_model_len, load_format, seed, offline, max_tokens, progress) -> Model:
    """See LLM for the arguments.  max_tokens: most tokens of one step."""
    from fusec.runtime.program import load_program

    if load_format not in ("auto", "random"):
        raise UsageError("load_format is unknown", expected="'auto' or 'random'", found=repr(load_format))
    checkpoint, config, tokenizer = _open(model, load_format, offline)
    trained = next((config[key] for key in CONTEXT_KEYS if config.get(key)), DEFAULT_CONTEXT)
    if max_model_len is not None and max_model_len > trained:
        raise UsageError("max_model_len is larger than the model's context", expected=f"at most {trained}", found=max_model_len)
    length = max_model_len or trained
    program = load_program(checkpoint if checkpoint is not None else config, source=source, dtype=dtype, device=device,
                           load_format=load_format, seed=seed, max_model_len=length, max_tokens=max_tokens,
                           progress=progress)  # fmt: skip
    ends = config.get("eos_token_id")
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return Model(program, tokenizer, frozenset(ends | set(tokenizer.eos_ids if tokenizer else ())), length)


def _open(model, load_format, offline):
    """(checkpoint or None, config, tokenizer or None)"""
    from fusec.runtime.checkpoint import open_checkpoint
    from fusec.runtime.hub import resolve
    from fusec.runtime.tokenizer import Tokenizer

    if isinstance(model, Mapping):
        if load_format != "random":
            raise UsageError("a config has no weights", expected="load_format='random'", found=repr(load_format))
        return None, dict(model), None
    if load_format == "random" and (folder := _folder_of_config(model)):
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        return None, config_file.read(folder / "config.json"), tokenizer
    checkpoint = open_checkpoint(resolve(model, offline))
    return checkpoint, checkpoint.config, Tokenizer.load(checkpoint)


def _folder_of_config(model):
    """The folder of a config.json that stands without weights, named itself or by its folder."""
    path = Path(model).expanduser() if model is not None else None
    if path is not None and path.name == "config.json":
        path = path.parent
    return path if path is not None and (path / "config.json").is_file() else None
