"""Text to ids and back, chat templates, streaming text and stop strings."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import parameters, smollm2, write_gguf
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fusec.errors import UserError
from fusec.runtime.chat import render_chat
from fusec.runtime.checkpoint import open_checkpoint
from fusec.runtime.detokenizer import Detokenizer, StopChecker
from fusec.runtime.tokenizer import Tokenizer

CORPUS = ["the cat sat on the mat", "the dog sat on the cat", "A GPU? A GPU is a processor.", "  two  spaces", "naïve café"]
HARD = [
    "Hello world", "  two  spaces 12345 and 3.14", "  12\n\n\n\t tabs", "naïve café Ünïcödé 你好，世界 привет",
    "👩‍👩‍👧‍👦 🎉🎉", "", "<|im_start|>user\nhi<|im_end|>\n", "I'm you're 'S", "a\u00a0b\u200b\ufeff", "١٢٣ ½ ² Ⅷ", "\n", " ",
    "x  1", "e\u0301", "\x00\x01", "def f(x):\r\n    return x**2\r\n",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def error_of(action, *arguments, **more):
    with pytest.raises(UserError) as caught:
        action(*arguments, **more)
    return str(caught.value)


@pytest.fixture(scope="session")
def byte_level():
    """A byte-level BPE as tokenizer.json would hold it: SmolLM2's rules, a small vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return backend


@pytest.fixture(scope="session")
def sentencepiece():
    """A SentencePiece-like BPE with byte fallback, as Llama 2's tokenizer.json holds it."""
    special = ["<unk>", "<s>", "</s>"]
    reserved = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [("▁" + line).replace(" ", "▁") for line in CORPUS]
    learned = Backend(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=330, special_tokens=reserved))
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    backend = Backend(models.BPE(learned.get_vocab(), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(special)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def tokens_of(backend):
    return [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]


def byte_level_metadata(backend, pre="smollm"):
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens_of(backend),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]],
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (backend.get_vocab_size() - len(SPECIAL)),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }  # fmt: skip


def sentencepiece_metadata(backend):
    tokens = tokens_of(backend)
    plain = len(tokens) - 259
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(plain)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * plain,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def write_tokenizer_folder(folder, backend, **files):
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# --- from GGUF ---


def test_byte_level_from_gguf_equals_tokenizer_json(tmp_path, byte_level):
    path = write_gguf(tmp_path / "tiny.gguf", parameters(), tokenizer=byte_level_metadata(byte_level))
    from_path, from_checkpoint = Tokenizer.load(path), Tokenizer.load(open_checkpoint(path))
    for text in HARD:
        assert from_path.encode(text) == from_checkpoint.encode(text) == byte_level.encode(text).ids
        assert from_path.decode(from_path.encode(text), skip_special_tokens=False) == text
    assert from_path.byte_level and from_path.bos_id == 1 and from_path.special_ids == {0, 1, 2}
    assert from_path.eos_ids == {0, 2}  # <|endoftext|> ends a text too
    assert from_path.vocab_size == byte_level.get_vocab_size()


def test_sentencepiece_from_gguf_equals_tokenizer_json(tmp_path, sentencepiece):
    path = write_gguf(tmp_path / "tiny.gguf", parameters(), tokenizer=sentencepiece_metadata(sentencepiece))
    tokenizer = Tokenizer.load(path)
    for text in [*CORPUS, *HARD]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == sentencepiece.encode(text).ids
        assert tokenizer.encode(text) == [1, *ids]  # SentencePiece models begin with bos unless the file says no
        assert tokenizer.decode(ids) == text
    assert not tokenizer.byte_level and tokenizer.eos_ids == {2}


def test_tokenizers_that_are_not_known(tmp_path, byte_level):
    metadata = byte_level_metadata(byte_level)

    def write(**changes):
        changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return write_gguf(tmp_path / "tiny.gguf", {}, tokenizer=metadata | changes)

    assert "found: 'martian'" in error_of(Tokenizer.load, write(pre="martian"))
    assert "the family 'bert'" in error_of(Tokenizer.load, write(model="bert"))
    assert "no tokenizer" in error_of(Tokenizer.load, write(tokens=None))


@pytest.mark.parametrize(
    "damage",
    [
        {"merges": ["ab"]},
        {"merges": ["never seen"]},
        {"bos_token_id": 999_999, "add_bos_token": True},
        {"model": "llama", "scores": [0.0]},
        {"model": "llama", "unknown_token_id": 999_999},
        {"token_type": 3},
    ],
)
def test_damaged_tokenizers(tmp_path, byte_level, damage):
    damage = {f"tokenizer.ggml.{key}": value for key, value in damage.items()}
    path = write_gguf(tmp_path / "tiny.gguf", {}, tokenizer=byte_level_metadata(byte_level) | damage)
    assert "the tokenizer of tiny.gguf is damaged" in error_of(Tokenizer.load, path)


def test_smollm2_hard_strings():
    """Ids of the published SmolLM2 tokenizer: digits stand alone, and spaces before a digit stay together."""
    tokenizer = Tokenizer.load(smollm2())
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    spelled = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("  12 GPUs")]
    assert spelled == ["ĠĠ", "1", "2", "ĠGPUs"]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>")[0::4] == [1, 2]
    prompt = tokenizer.render_chat([{"role": "user", "content": "What is a GPU?"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nWhat is a GPU?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_ids == {0, 2} and tokenizer.vocab_size == 49152


# --- from a folder ---


def test_a_folder_gathers_ends_and_template(tmp_path, byte_level):
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>", "chat_template": CHATML}
    folder = write_tokenizer_folder(
        tmp_path, byte_level, tokenizer_config=settings, config={"eos_token_id": 5}, generation_config={"eos_token_id": [6, 7]}
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {0, 2, 5, 6, 7}  # 2 because the template writes <|im_end|>
    messages = [{"role": "user", "content": "cat"}]
    assert tokenizer.apply_chat(messages) == tokenizer.encode("<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.apply_chat(messages, add_generation_prompt=False) == tokenizer.encode("<|im_start|>user\ncat<|im_end|>\n")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert Tokenizer.load(folder).render_chat(messages) == "<|im_start|>cat"


def test_a_template_among_several(tmp_path, byte_level):
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_tokenizer_folder(tmp_path, byte_level, tokenizer_config={"chat_template": templates})
    assert Tokenizer.load(folder).chat_template == "yes"


def test_truncation_and_padding_of_a_training_run_are_dropped(tmp_path, byte_level):
    backend = Backend.from_str(byte_level.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.load(write_tokenizer_folder(tmp_path, backend))
    assert tokenizer.encode("the cat sat") == byte_level.encode("the cat sat").ids


def test_folders_without_a_tokenizer(tmp_path, byte_level):
    assert "expected: tokenizer.json" in error_of(Tokenizer.load, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert "only tokenizer.model" in error_of(Tokenizer.load, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is no tokenizer" in error_of(Tokenizer.load, tmp_path)
    byte_level.save(str(tmp_path / "tokenizer.json"))
    assert "has no chat template" in error_of(Tokenizer.load(tmp_path).apply_chat, [{"role": "user", "content": "x"}])


def test_lone_surrogates_are_replaced(byte_level):
    tokenizer = Tokenizer(byte_level)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


# --- chat templates ---


def test_templates_trim_blocks_and_write_plain_json():
    template = "{% for m in messages %}\n  {% if true %}\n{{ m | tojson }}\n  {% break %}\n  {% endif %}\n{% endfor %}"
    assert render_chat(template, [{"role": "user", "content": "<é>"}] * 2) == '{"role": "user", "content": "<é>"}\n'


def test_templates_see_variables_tools_and_the_clock():
    template = "{{ bos_token }}{{ enable_thinking }}{{ tools[0].name }}{{ strftime_now('%Y') | length }}"
    template += "{% generation %}x{% endgeneration %}"
    messages = [{"role": "user", "content": "x"}]
    assert render_chat(template, messages, tools=[{"name": "f"}], bos_token="<s>", enable_thinking=False) == "<s>Falsef4x"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_templates_that_fail(template, told):
    message = error_of(render_chat, template, [{"role": "user", "content": "x"}])
    assert "the model's chat template failed" in message and told in message


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"content": "x"}], [{"role": "user", "content": object()}]])
def test_messages_that_are_malformed(messages):
    assert "chat message" in error_of(render_chat, CHATML, messages)


# --- streaming text ---

SLOW_FIXTURES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def streamed(tokenizer, ids, cuts, **options):
    stream, text, start = Detokenizer(tokenizer, **options), "", 0
    for end in [*sorted(cuts), len(ids)]:
        text += stream.add(ids[start:end])
        start = max(start, end)
    return text + stream.flush()


def cuts_of(ids, data):
    return data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))


@SLOW_FIXTURES
@given(data=st.data(), skip=st.booleans())
def test_random_ids_stream_to_the_text_of_them_all(byte_level, data, skip):
    tokenizer = Tokenizer(byte_level)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    options = {"skip_special_tokens": skip}
    assert streamed(tokenizer, ids, cuts_of(ids, data), **options) == tokenizer.decode(ids, **options)


@SLOW_FIXTURES
@given(data=st.data(), text=st.text(max_size=30))
def test_random_text_streams_through_sentencepiece(sentencepiece, data, text):
    tokenizer = Tokenizer(sentencepiece)
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids, cuts_of(ids, data)) == tokenizer.decode(ids)


@SLOW_FIXTURES
@given(data=st.data())
def test_random_words_stream_through_sentencepiece(sentencepiece, data):
    tokenizer = Tokenizer(sentencepiece)
    ids = data.draw(st.lists(st.one_of(st.just(2), st.integers(259, tokenizer.vocab_size - 1)), max_size=40))
    assert streamed(tokenizer, ids, cuts_of(ids, data)) == tokenizer.decode(ids)


def test_no_half_character_is_printed(byte_level, sentencepiece):
    for backend in (byte_level, sentencepiece):
        tokenizer = Tokenizer(backend)
        ids, stream = tokenizer.encode("a🎉b", add_special_tokens=False), Detokenizer(tokenizer)
        pieces = [stream.add([i]) for i in ids]
        assert "".join(pieces) == "a🎉b" and not any("\ufffd" in piece for piece in pieces)
        stream = Detokenizer(tokenizer)
        assert stream.add(ids[:-2]) in ("a", "")  # the last byte of the character is missing
        assert stream.flush().startswith(("\ufffd", "a\ufffd"))


def test_a_word_after_a_prompt_keeps_its_space(sentencepiece):
    tokenizer = Tokenizer(sentencepiece)
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    space = next(i for i, token in enumerate(sentencepiece.encode("the cat").tokens) if i and token.startswith("▁"))
    assert Detokenizer(tokenizer, prompt_ids=ids[:space]).add(ids[space:]) == " cat"
    assert Detokenizer(tokenizer).add(ids[space:]) == "cat"


# --- stop strings ---


def stopped_text(text, stops, include):
    """The meaning of stop strings, on the whole text."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, size = min(ends)
    return text[: end if include else end + size]


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, include, data):
    checker, printed, start, stopped = StopChecker(stops, include), "", 0, False
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))), len(text)]:
        safe, stopped = checker.add(text[start:end])
        printed, start = printed + safe, end
    printed += "" if stopped else checker.flush()
    assert printed == stopped_text(text, stops, include)
    assert stopped == any(stop in text for stop in stops) == (checker.matched is not None)


def test_only_what_may_begin_a_stop_string_waits():
    checker = StopChecker(["\n\nUser:"])
    assert checker.add("hello\n") == ("hello", False)
    assert checker.add("\nUs") == ("", False)
    assert checker.add("e it") == ("\n\nUse it", False)
    assert checker.add(".\n\nUser: hi") == (".", True)
    assert checker.matched == "\n\nUser:" and checker.add("more") == ("", True) and checker.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopChecker([""])
