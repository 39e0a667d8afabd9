"""A tokenizer from GGUF metadata, as a `tokenizers.Tokenizer`.

Two families cover the models that run here. `gpt2` is byte-level BPE: vocabulary and merges are in the file, and
`tokenizer.ggml.pre` names the rule that cuts text into words first. `llama` is SentencePiece's BPE: only the vocabulary and its
scores are in the file; the merges follow from them.
"""

from __future__ import annotations

from fusec.errors import UserError

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # tokenizer.ggml.token_type

# How text is cut before BPE, as each model's own tokenizer.json says.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "smaug-bpe": LLAMA3, "dbrx": LLAMA3, "falcon3": LLAMA3,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "stablelm2": QWEN2, "tekken": TEKKEN, "gpt-4o": GPT4O,
}  # fmt: skip
GPT2_WORDS = {"default", "gpt-2", "phi-2", "olmo", "mpt", "jais"}  # GPT-2's own rule
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b", "exaone"}  # digits first, then GPT-2's
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}  # a word that is a token needs no merges
NORMALISED = {"qwen2", "deepseek-r1-qwen"}  # to Unicode's NFC
BOS_UNSAID = {"llama-bpe", "llama3", "llama-v3"}  # begin with bos where an old file does not say

SPACE = "\u2581"  # SentencePiece's visible space


def tokenizer_from_gguf(metadata, name):
    """The `tokenizers.Tokenizer` that the metadata of a GGUF file describes.  name: what to call the file in messages.

    Raises UserError for a tokenizer family or a pre-tokenizer that is not known, since a guess would cut text wrongly.
    """
    import tokenizers

    if packed := metadata.get("tokenizer.huggingface.json"):
        return tokenizers.Tokenizer.from_str(packed)
    family, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if family not in ("gpt2", "llama") or not isinstance(tokens, list) or not tokens:
        found = f"the family {family!r}" if tokens else "no tokenizer"
        raise UserError(
            f"the tokenizer of {name} cannot be used",
            expected="tokens of the family gpt2 (byte-level BPE) or llama (SentencePiece)",
            found=found,
            hint="use the model's safetensors folder instead",
        )
    try:
        return _build(metadata, tokens, family, name)
    except UserError:
        raise
    except Exception as error:  # ids out of range, merges of unknown tokens: `tokenizers` raises nothing more specific
        raise UserError(f"the tokenizer of {name} is damaged", found=str(error), hint="download the file again") from None


def _build(metadata, tokens, family, name):
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma and family == "llama":  # runs of spaces are stored as such, and looked up as visible ones
        tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    tokenizer = _byte_level(metadata, tokens, name) if family == "gpt2" else _sentencepiece(metadata, tokens, gemma)
    _mark_special(tokenizer, metadata, tokens)
    _add_ends(tokenizer, metadata, tokens, family)
    return tokenizer


def _byte_level(metadata, tokens, name):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = metadata.get("tokenizer.ggml.pre", "default")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in SPLITS)
    if rule in SPLITS:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[rule]), "isolated"), words])
    elif rule in SINGLE_DIGITS:
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    elif rule not in GPT2_WORDS:
        known = sorted({*SPLITS, *SINGLE_DIGITS, *GPT2_WORDS})
        raise UserError(
            f"the tokenizer of {name} cuts text in a way that is not known",
            expected=f"tokenizer.ggml.pre to be one of {', '.join(known)}",
            found=repr(rule),
            hint="use the model's safetensors folder instead",
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in WHOLE_WORDS))
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    if rule in NORMALISED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata, tokens, gemma):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    # Gemma's scores do not follow the order in which its tokens were learned; their ids do.
    scores = [-i for i in range(len(tokens))] if gemma else metadata.get("tokenizer.ggml.scores", ())
    bpe = models.BPE(
        vocab=vocabulary, merges=merges_from_scores(tokens, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)  # " " before the first word
    visible = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), visible]) if prefix else visible
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def merges_from_scores(tokens, scores):
    """The merges of a SentencePiece BPE vocabulary, best first: every way to make a token of two others, by the token's score.

    Of equal scores, the longer left half comes first, as Hugging Face's converter orders them.
    """
    known, merges = set(tokens), []
    for token, score in zip(tokens, scores, strict=True):
        for i in range(1, len(token)):
            if token[:i] in known and token[i:] in known:
                merges.append((-score, -i, i - len(token), token))
    merges.sort(key=lambda merge: merge[:3])
    return [(token[:-i], token[-i:]) for _, i, _, token in merges]


def _mark_special(tokenizer, metadata, tokens):
    """Control tokens (never printed) and user-defined ones (printed) are cut out of a text before anything else."""
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type", ())
    control = [token for token, kind in zip(tokens, kinds) if kind in (CONTROL, UNKNOWN)]  # noqa: B905  (may be absent)
    own = [token for token, kind in zip(tokens, kinds) if kind == USER_DEFINED]  # noqa: B905
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])


def _add_ends(tokenizer, metadata, tokens, family):
    """Adds bos and eos around each text, as the file asks."""
    from tokenizers import processors

    unsaid = {"bos": family == "llama" or metadata.get("tokenizer.ggml.pre") in BOS_UNSAID, "eos": False}
    ids = {
        end: metadata[f"tokenizer.ggml.{end}_token_id"]
        for end, default in unsaid.items()
        if metadata.get(f"tokenizer.ggml.add_{end}_token", default) and f"tokenizer.ggml.{end}_token_id" in metadata
    }
    if not ids:
        return
    bos, eos = ([tokens[ids[end]]] if end in ids else [] for end in ("bos", "eos"))
    special = [(tokens[i], i) for i in ids.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=special)
