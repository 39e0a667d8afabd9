"""SamplingParams says what is wrong; the sampler draws what they ask for, whatever shares the batch."""

import numpy as np
import pytest
import torch

from fusec.errors import UsageError
from fusec.runtime.sampling import SamplingParams, Variant, gumbel, sample, seed_words
from fusec.runtime.sampling_state import SamplingState
from fusec.runtime.scheduler import Sequence

V = 40


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_p=0), dict(top_p=1.01), dict(top_k=1.5), dict(top_k=-2),
     dict(min_p=2), dict(max_tokens=0), dict(max_tokens="9"), dict(min_tokens=-1), dict(min_tokens=20), dict(n=0), dict(n=True),
     dict(logprobs=21), dict(seed=0.5), dict(stop=[""]), dict(stop=[3]), dict(stop_token_ids=[-1]), dict(repetition_penalty=0),
     dict(presence_penalty=3), dict(frequency_penalty=-3), dict(logit_bias={3: 101}), dict(prompt_logprobs=1)],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused(bad):
    with pytest.raises(UsageError) as error:
        SamplingParams(**bad)
    assert next(iter(bad)) in str(error.value) or "stop string" in str(error.value)
    assert error.value.exit_code == 2


def test_message():
    with pytest.raises(UsageError) as error:
        SamplingParams(top_p=1.5)
    assert str(error.value) == "error: top_p is out of range\n  expected: a number above 0, at most 1\n  found: 1.5"


def draw(logits, params, *, positions=None, prompt=(), generated=(), stops=(), seeds=None):
    """Sample rows that share parameters, through the state the runner keeps."""
    params = params if isinstance(params, list) else [params] * len(logits)
    state = SamplingState(len(logits), logits.shape[1], torch.device("cpu"))
    sequences = [Sequence(list(prompt), each, 99, dict.fromkeys(stops), seed=seeds[row] if seeds else row)
                 for row, each in enumerate(params)]  # fmt: skip
    for sequence in sequences:
        sequence.tokens += generated
    state.seat(range(len(params)), sequences, torch.from_numpy)
    variant = Variant.covering(each.variant for each in params)
    positions = torch.arange(len(logits), dtype=torch.int32) if positions is None else positions
    return sample(logits, state.select(slice(None), variant.adjusted), positions, variant)


def frequencies(row, params, count=20000):
    """How often each token is drawn from one row of logits."""
    tokens = draw(row.expand(count, -1), [params] * count).tokens
    return torch.bincount(tokens.long(), minlength=len(row)) / count


def test_greedy_takes_the_best_and_marks_nan():
    logits = torch.randn(5, V)
    logits[3, 7] = torch.nan
    for params in (SamplingParams(temperature=0), [SamplingParams(temperature=0)] * 4 + [SamplingParams(top_k=1)]):
        tokens = draw(logits, params).tokens
        assert tokens[3] == -1 and tokens.dtype == torch.int32
        assert tokens[[0, 1, 2, 4]].tolist() == logits.argmax(-1)[[0, 1, 2, 4]].tolist()
    assert draw(logits, SamplingParams(top_p=0.5)).tokens[3] == -1


def test_noise_is_a_hash_of_seed_position_and_token():
    low, high = seed_words(2**63 + 5)
    noise = gumbel(torch.tensor([low], dtype=torch.int32), torch.tensor([high], dtype=torch.int32),
                   torch.tensor([77], dtype=torch.int32), 200)[0]

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    for token in (0, 1, 199):
        start = token * 0x9E3779B1 + low + 77 * 0x85EBCA6B & 0xFFFFFFFF
        bits = mix(mix(start) ^ (high & 0xFFFFFFFF) ^ (77 * 0xC2B2AE35 & 0xFFFFFFFF)) & 0x7FFFFFFF
        expected = -np.log(-np.log1p(-(bits + 0.5) / 2**31))
        assert noise[token].item() == pytest.approx(expected, rel=1e-4)


def test_noise_is_standard_gumbel():
    words = torch.tensor([seed_words(seed) for seed in range(100)], dtype=torch.int32)
    noise = gumbel(words[:, 0], words[:, 1], torch.arange(100, dtype=torch.int32), 5000).double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.02)
    assert abs(torch.corrcoef(noise[:20])[~torch.eye(20, dtype=torch.bool)]).max() < 0.06
    assert abs(torch.corrcoef(noise[:, :20].T)[~torch.eye(20, dtype=torch.bool)]).max() < 0.45


def test_temperature_draws_from_the_softmax():
    row = torch.randn(V) * 2
    assert torch.allclose(frequencies(row, SamplingParams(temperature=0.7)), (row / 0.7).softmax(-1), atol=0.015)


FILTERS = [dict(top_k=5), dict(top_p=0.6), dict(min_p=0.2), dict(top_k=8, top_p=0.8, min_p=0.05)]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_keep_what_they_say(params):
    row = torch.randn(V) * 2
    found = frequencies(row, SamplingParams(temperature=1.3, **params))
    probability = (row / 1.3).softmax(-1)
    order = probability.argsort(descending=True)
    kept = order[: params.get("top_k", V)]
    kept = kept[probability[kept] >= params.get("min_p", 0) * probability.max()]
    share = probability[kept] / probability[kept].sum()
    kept = kept[: int((share.cumsum(0) - share < params.get("top_p", 2)).sum())]
    expected = torch.zeros(V)
    expected[kept] = probability[kept] / probability[kept].sum()
    assert torch.allclose(found, expected, atol=0.015) and set(found.nonzero()[:, 0].tolist()) <= set(kept.tolist())


def test_a_row_does_not_depend_on_its_company():
    logits = torch.randn(6, V)
    kinds = [dict(temperature=0), {}, dict(temperature=0.5, top_p=0.9), dict(top_k=3), dict(frequency_penalty=1),
             dict(min_p=0.1, logprobs=2)]  # fmt: skip
    params = [SamplingParams(**kind) for kind in kinds]
    together = draw(logits, params, seeds=list(range(6)), positions=torch.full((6,), 9, dtype=torch.int32))
    for row in range(6):
        alone = draw(logits[row : row + 1], params[row : row + 1], seeds=[row], positions=torch.tensor([9], dtype=torch.int32))
        assert alone.tokens[0] == together.tokens[row]


def test_penalties_and_bias():
    logits = torch.zeros(1, V)
    logits[0, :4] = torch.tensor([4.0, 3.9, 3.8, -1.0])
    history = dict(prompt=[0, 0], generated=[1, 1, 1])

    def best(**params):
        return draw(logits, SamplingParams(temperature=0, **params), **history).tokens.item()

    assert best() == 0
    assert best(repetition_penalty=1.2) == 2  # prompt and answer
    assert best(presence_penalty=2, logit_bias={0: -1}) == 2
    assert best(presence_penalty=0.05, logit_bias={0: -0.2}) == 1  # 3.85 against 3.8
    assert best(frequency_penalty=0.05, logit_bias={0: -0.3}) == 2  # 3.75 against 3.8
    assert best(logit_bias={9: 50}) == 9


def test_no_end_before_min_tokens():
    logits = torch.zeros(2, V)
    logits[:, 5], logits[:, 6] = 9, 8
    tokens = draw(logits, SamplingParams(temperature=0, min_tokens=3), prompt=[1, 2], stops=[5],
                  positions=torch.tensor([4, 5], dtype=torch.int32)).tokens
    assert tokens.tolist() == [6, 5]


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(3, V)
    result = draw(logits, SamplingParams(temperature=2, logprobs=5, logit_bias={1: 100}))
    expected = logits.log_softmax(-1)
    assert result.tokens.tolist() == [1, 1, 1]
    assert torch.allclose(result.logprobs, expected[:, 1])
    assert result.ranks.tolist() == [(row > row[1]).sum().item() + 1 for row in logits]
    assert torch.equal(result.top_tokens[:, 0], logits.argmax(-1).int()) and result.top_logprobs.shape == (3, 20)
