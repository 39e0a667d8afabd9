"""LLM over a small program in plain torch: a request gets the same answer in any batch, however it is cut into steps."""

import dataclasses

import pytest
import torch
from fake_program import FakeProgram

from fusec.errors import UserError
from fusec.runtime.drawing import EMPTY
from fusec.runtime.llm import LLM
from fusec.runtime.loading import Model
from fusec.runtime.sampling import SamplingParams

VOCAB = 50
EOS = 0
PROMPTS = [[1, 2, 3], [4] * 13, [5, 6, 7, 8, 9, 10], [3], [9, 8, 7], list(range(20, 45))]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
KINDS = [
    GREEDY,
    SamplingParams(temperature=1, seed=5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.5, seed=6, top_p=0.9, top_k=20, min_p=0.01, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1, seed=7, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={3: 2.0}, max_tokens=20),
    SamplingParams(temperature=1, seed=8, min_tokens=5, max_tokens=20, logprobs=3),
]


class FakeTokenizer:
    """Token 0 is special; 1 and 2 are the two bytes of é; the others are letters, byte for byte."""

    eos_ids, special_ids, byte_level = frozenset([EOS]), frozenset([EOS]), True

    def token_bytes(self, index):
        return "é".encode()[index - 1 : index] if 1 <= index <= 2 else bytes([97 + index % 26])

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.token_bytes(index) for index in ids).decode(errors="replace")

    def encode(self, text):
        return [3 + (ord(letter) - 100) % 26 for letter in text]

    def apply_chat(self, messages, **variables):
        return self.encode("".join(message["content"] for message in messages))


def make(program=None, **options):
    options = dict(num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=64) | options
    return LLM.from_model(Model(program or FakeProgram(VOCAB), FakeTokenizer(), frozenset([EOS]), 64), **options)


def answers(outputs):
    return [(output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]


class Scripted(FakeProgram):
    """Says what it is told: the token after position p is script[p]."""

    def __init__(self, script):
        super().__init__(VOCAB)
        self.script = torch.tensor(script)

    def forward(self, batch):
        return torch.nn.functional.one_hot(self.script[batch.positions[batch.rows].long()], VOCAB).float() * 9


@pytest.fixture(scope="module")
def alone():
    """Each prompt by itself, with each kind of sampling."""
    return [[answers(make().generate(prompt, params))[0] for prompt in PROMPTS] for params in KINDS]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(max_num_batched_tokens=8), dict(max_num_seqs=3, max_num_batched_tokens=3), dict(num_blocks=17),
     dict(run_ahead=1), dict(run_ahead=2, num_blocks=17), dict(block_size=1, num_blocks=70), dict(enable_prefix_caching=True)],
    ids=str,
)  # fmt: skip
def test_same_answer_in_any_company(options, alone):
    for params, expected in zip(KINDS, alone, strict=True):
        llm = make(**options)
        outputs = llm.generate(PROMPTS, params)
        assert answers(outputs) == expected
        assert llm.engine.allocator.num_used == 0
        if options.get("num_blocks") == 17 and params is GREEDY:
            assert sum(output.metrics.preemptions for output in outputs) > 0
    mixed = make(**options).generate(PROMPTS[: len(KINDS)], KINDS)
    assert answers(mixed) == [alone[index][index] for index in range(len(KINDS))]


def test_sequences_come_and_go(alone):
    """Lengths differ, so rows are freed and filled while others decode."""
    llm = make(max_num_seqs=3, run_ahead=1)
    params = [SamplingParams(temperature=0, max_tokens=3 + 3 * index, ignore_eos=True) for index in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, params)
    for index, output in enumerate(outputs):
        assert output.outputs[0].token_ids == alone[0][index][0][: 3 + 3 * index]
    assert max(count for count, _ in llm.program.steps) == 3


@pytest.mark.parametrize("short", [(0, 2, 3), (1, 4, 5), (0, 1, 2, 3, 4)])
def test_several_leave_at_once(short, alone):
    """The last rows take the places of those that end in the same step, with their parameters; others follow."""
    llm = make(max_num_seqs=6)
    for kind in (1, 3):  # the latter has counts as wide as the vocabulary
        params = [dataclasses.replace(KINDS[kind], max_tokens=4 if index in short else 12) for index in range(len(PROMPTS))]
        outputs = llm.generate([*PROMPTS, *PROMPTS], [*params, *params])
        for index, output in enumerate(outputs):
            which = index % len(PROMPTS)
            assert output.outputs[0].token_ids == alone[kind][which][0][: params[which].max_tokens]


def test_logits_are_what_generation_sees(alone):
    tokens = PROMPTS[1] + alone[0][1][0]
    logits = make().logits(tokens)
    assert logits.shape == (33, VOCAB) and logits.dtype == torch.float32
    assert logits[12:-1].argmax(-1).tolist() == alone[0][1][0]
    llm = make()
    whole, chunked = llm.logits(tokens), llm.engine.runner.logits(tokens, list(range(20, 40)), chunk=5)
    assert torch.allclose(whole, chunked, atol=1e-6)


def test_repeating_a_prompt_with_prefix_caching(alone):
    llm = make(enable_prefix_caching=True, run_ahead=1)
    for _ in range(3):
        assert answers(llm.generate(PROMPTS, GREEDY)) == alone[0]
        assert llm.engine.allocator.num_used == 0


def test_several_answers_to_one_prompt():
    params = SamplingParams(n=3, temperature=1, seed=4, max_tokens=8)
    output = make().generate(PROMPTS[0], params)[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2] and output.finished
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    assert answers([output]) == answers(make().generate(PROMPTS[0], SamplingParams(seed=4, max_tokens=8)))


def test_without_a_seed_the_engine_s_counts():
    first, again, other = (answers(make(seed=seed).generate(PROMPTS, SamplingParams(max_tokens=12))) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_ends(run_ahead):
    def run(script, **params):
        llm = make(Scripted([9] * 2 + script), run_ahead=run_ahead)
        answer = llm.generate([[3, 3, 3]], SamplingParams(temperature=0, **params))[0].outputs[0]
        return answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason

    letters = [7, 8, 9, 10, EOS] + [20] * 70  # h i j k
    assert run(letters) == ("hijk", [7, 8, 9, 10, EOS], "stop", None)
    assert run(letters, max_tokens=2) == ("hi", [7, 8], "length", None)
    assert run(letters, stop_token_ids=[9]) == ("hi", [7, 8, 9], "stop", 9)
    assert run(letters, stop_token_ids=[9], include_stop_str_in_output=True) == ("hij", [7, 8, 9], "stop", 9)
    assert run(letters, stop="ij") == ("h", [7, 8, 9], "stop", "ij")
    assert run(letters, stop=["ij"], include_stop_str_in_output=True) == ("hij", [7, 8, 9], "stop", "ij")
    assert run(letters, stop=["jx"], max_tokens=3) == ("hij", [7, 8, 9], "length", None)
    assert run(letters, stop=["j"], max_tokens=3) == ("hi", [7, 8, 9], "stop", "j")
    assert run(letters, max_tokens=None, ignore_eos=True)[2] == "length"
    assert len(run(letters, max_tokens=None, ignore_eos=True)[1]) == 61  # of 64, after 3
    assert run([1, 2, 7, 1, EOS] + [20] * 9) == ("éh\ufffd", [1, 2, 7, 1, EOS], "stop", None)


def test_logprobs():
    answer = make().generate(PROMPTS[0], SamplingParams(temperature=1, seed=1, max_tokens=6, logprobs=2))[0].outputs[0]
    logits = make().logits(PROMPTS[0] + answer.token_ids)[2:-1].log_softmax(-1)
    assert len(answer.logprobs) == 6
    for token, entry, row in zip(answer.token_ids, answer.logprobs, logits, strict=True):
        assert next(iter(entry)) == token and len(entry) in (2, 3)
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert entry[token].rank == (row > row[token]).sum() + 1
        assert entry[row.argmax().item()].rank == 1 and isinstance(entry[token].decoded_token, str)
    total = sum(entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_stream_and_metrics():
    llm = make(run_ahead=1)
    stream = llm.stream([{"role": "user", "content": "hello"}], GREEDY)
    pieces = list(stream)
    assert len(pieces) > 5 and "".join(pieces) == stream.output.outputs[0].text and stream.output.finished
    assert answers([stream.output]) == answers(make().chat([{"role": "user", "content": "hello"}], GREEDY))
    metrics = stream.output.metrics
    assert metrics.prompt_tokens == 5 and metrics.output_tokens == 20
    assert metrics.time_to_first_token > 0 and metrics.decode_tokens_per_second > 0 and metrics.prefill_tokens_per_second > 0


def test_a_stream_left_early_frees_its_blocks_and_others_go_on(alone):
    llm = make(run_ahead=1)
    left, other = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    assert next(left) and next(other)
    left.close()
    assert left.output.outputs[0].finish_reason == "abort"
    rest = list(other)
    assert rest and answers([other.output]) == [alone[0][1]]
    assert llm.engine.allocator.num_used == 0


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_interrupt_leaves_nothing_behind(run_ahead, alone, monkeypatch):
    llm = make(run_ahead=run_ahead)
    forward, calls, buffers = llm.program.forward, iter(range(100)), llm.engine.runner.buffers

    def interrupted(batch):
        if next(calls) == 7:
            buffers.best[0], buffers.arrivals[0] = 1, 1  # as between the head and the end of a step
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(llm.program, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert llm.engine.allocator.num_used == 0 and not llm.engine.busy
    assert (buffers.best == EMPTY).all() and not buffers.arrivals.any()
    assert answers(llm.generate(PROMPTS, GREEDY)) == alone[0]


def test_nan_is_reported():
    program = FakeProgram(VOCAB)
    program.head[:] = torch.nan
    llm = make(program)
    with pytest.raises(UserError, match="not numbers"):
        llm.generate(PROMPTS, GREEDY)
    assert llm.engine.allocator.num_used == 0


@pytest.mark.parametrize(
    "prompt, message",
    [([1] * 64, "longer than the context"), ([], "empty"), ([1, VOCAB], "unknown token"), ([1, -1], "unknown token")],
    ids=str,
)
def test_bad_prompts(prompt, message):
    llm = make()
    with pytest.raises(UserError, match=message):
        llm.generate([[1, 2], prompt], GREEDY)
    assert not llm.engine.busy
    with pytest.raises(UserError, match="differ in number"):
        llm.generate([[1], [2]], [GREEDY])


def test_a_cache_too_small_is_refused():
    with pytest.raises(UserError, match="too small for max_model_len") as error:
        make(num_blocks=4)
    assert "max_model_len=16 would fit" in str(error.value) and error.value.exit_code == 5
    assert make(num_blocks=4, explicit_len=False).max_model_len == 16
