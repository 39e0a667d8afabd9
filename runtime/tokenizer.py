"""Text to token ids and back, with what the checkpoint says of its special tokens and its chat template.

    tokenizer = Tokenizer.load("SmolLM2-135M-Instruct.Q4_1.gguf")     # or a folder with tokenizer.json, or a Checkpoint
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from fusec.errors import UserError

# Tokens that end a turn, or a whole text. A checkpoint's own list often forgets the end that its template writes.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # what a chat template may call by name


class Tokenizer:
    """A `tokenizers.Tokenizer` (`backend`) and the facts around it.

    name: what to call the model in messages.  named: bos_token, eos_token, … -> its spelling.  chat_template: Jinja source, or
    None.  eos_ids: ids that end a generation.  bos_id: the id that begins a text, or None.  special_ids: ids that are not
    printed.  vocab_size: one more than the largest id (a model's logits may be wider).
    """

    def __init__(self, backend, *, name="the model", named=None, eos_ids=(), chat_template=None):
        backend.no_truncation()  # tokenizer.json may carry a training run's settings
        backend.no_padding()
        self.backend, self.name, self.named, self.chat_template = backend, name, named or {}, chat_template
        self.bos_id = backend.token_to_id(self.named.get("bos_token", ""))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        turn_ends = {backend.token_to_id(token) for token in TURN_ENDS if token in (chat_template or "")}
        self.eos_ids = frozenset(eos_ids) | (turn_ends & self.special_ids)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
        self._bytes = {}

    @classmethod
    def load(cls, source) -> Tokenizer:
        """From a folder, a .gguf file or an opened checkpoint; UserError if there is no tokenizer that can be used."""
        metadata, path = getattr(source, "metadata", None), Path(getattr(source, "path", source))
        if metadata is None and path.suffix == ".gguf" and not path.is_dir():
            from .gguf_format import read_gguf

            metadata = read_gguf(path).metadata
        return _from_folder(path) if metadata is None else _from_gguf(metadata, path.name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it count.  add_special_tokens: bos too, where the model has one."""
        sound = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8 form
        return self.backend.encode(sound, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids; an id past the vocabulary is nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for (`byte_level` must hold)."""
        if index not in self._bytes:
            token = self.backend.id_to_token(index) or ""
            codes = [BYTES.get(letter) for letter in token]
            self._bytes[index] = token.encode() if None in codes else bytes(codes)
        return self._bytes[index]

    @cached_property
    def byte_level(self) -> bool:
        """Whether every token is a fixed string of bytes (GPT-2's spelling), so that decoding is concatenation."""
        decoder = self.backend.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    def apply_chat(self, messages, add_generation_prompt: bool = True, **variables) -> list[int]:
        """Token ids of a conversation under the model's own chat template (variables: see chat.render_chat)."""
        prompt = self.render_chat(messages, add_generation_prompt, **variables)
        return self.encode(prompt, add_special_tokens=False)  # the template writes bos itself

    def render_chat(self, messages, add_generation_prompt: bool = True, **variables) -> str:
        """The conversation as text; UserError if the model has no chat template."""
        from .chat import render_chat

        if self.chat_template is None:
            raise UserError(
                f"{self.name} has no chat template",
                expected="a model trained for chat",
                found="a tokenizer without chat_template",
                hint="send the prompt as it is (--raw)",
            )
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **self.named | variables)


def _gpt2_alphabet():
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes as the letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _gpt2_alphabet()  # letter -> byte


def _from_gguf(metadata, name):
    from .gguf_tokenizer import tokenizer_from_gguf

    backend, tokens = tokenizer_from_gguf(metadata, name), metadata["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    named = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    ends = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    ends |= {backend.token_to_id(token) for token in TEXT_ENDS}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, name=name, named=named, eos_ids=ends - {None}, chat_template=template)


def _from_folder(folder):
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()]
        raise UserError(
            f"{folder} holds no tokenizer",
            expected="tokenizer.json",
            found=f"only {others[0]}" if others else "none",
            hint="convert it: AutoTokenizer.from_pretrained(…).save_pretrained(…)" if others else "copy tokenizer.json there",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is no tokenizer", expected="what the tokenizers package saves", found=str(error)) from None

    files = ("tokenizer_config", "special_tokens_map", "config", "generation_config")
    settings, special, config, generation = (_optional(folder / f"{name}.json") for name in files)
    settings = special | settings
    named = {name: _spelling(settings[name]) for name in NAMED if settings.get(name)}
    ends = {backend.token_to_id(named.get("eos_token", "")), *_ids(config), *_ids(generation)} - {None}
    template = _folder_template(folder, settings.get("chat_template"))
    return Tokenizer(backend, name=folder.resolve().name, named=named, eos_ids=ends, chat_template=template)


def _optional(path):
    from .safetensors_checkpoint import read_json

    return read_json(path) if path.is_file() else {}


def _spelling(token):
    return token["content"] if isinstance(token, dict) else token


def _ids(config):
    """eos_token_id, which may be one id, a list, or absent."""
    ids = config.get("eos_token_id")
    return ids if isinstance(ids, list) else [ids]


def _folder_template(folder, setting):
    """chat_template.jinja if there is one, else the setting: a string, or a list of named ones of which "default" is meant."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(setting, list):
        setting = {entry.get("name"): entry.get("template") for entry in setting}.get("default")
    return setting
