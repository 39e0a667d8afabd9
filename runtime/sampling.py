"""Choosing the next token: the parameters a user gives, and the sampler that applies them to a whole batch on the device.

Every operation of `sample` is a tensor operation on static shapes, so a CUDA graph can hold it. A row's token depends on that row
alone: its logits, its parameters, and noise that is a hash of (seed, position, token). The same request therefore draws the same
tokens alone, in a batch, after preemption, with or without graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusec.errors import UsageError
from fusec.runtime.drawing import GREEDY_BELOW
from fusec.runtime.step_buffers import StepBuffers

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 48


@dataclass
class SamplingParams:
    """How to continue a prompt; the names and defaults are vLLM's.

    n                    answers per prompt
    temperature          ≥ 0; 0 takes the most probable token
    top_p, top_k, min_p  keep the smallest set of tokens whose probability reaches top_p, the top_k best (0 or -1: all), those at
                         least min_p times as probable as the best. Order: temperature, min_p, top_k, top_p. Ties are all kept.
    max_tokens           most tokens to generate; None: until the context is full
    min_tokens           no end of sequence and no stop token before this many
    stop                 strings that end the answer; include_stop_str_in_output keeps them in the text
    stop_token_ids       tokens that end the answer; ignore_eos keeps going past the model's own end of sequence
    seed                 the same seed gives the same tokens; None: drawn from the engine's seed
    logprobs             None, or how many of the best tokens to report at every step beside the chosen one (at most 20)
    presence_penalty, frequency_penalty    subtracted from the logits of tokens generated so far, once or per occurrence
    repetition_penalty   divides positive and multiplies negative logits of tokens in prompt or answer (CTRL, arXiv:1909.05858)
    logit_bias           token id -> added to its logit, -100 … 100
    skip_special_tokens  leave control tokens out of the text

    Raises UsageError, naming the parameter, its range and what was found.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None

    def __post_init__(self):
        if not isinstance(self.stop, str | list | tuple | None):
            raise UsageError("stop is not text", expected="a string or a list of strings", found=repr(self.stop))
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.logit_bias = {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()}
        _check_number(self, "n", 1, 128, int)
        _check_number(self, "temperature", 0, 100)
        _check_number(self, "top_p", 0, 1, above=True)
        _check_number(self, "top_k", -1, 2**31 - 1, int)
        _check_number(self, "min_p", 0, 1)
        _check_number(self, "max_tokens", 1, 2**31 - 1, int, optional=True)
        _check_number(self, "min_tokens", 0, 2**31 - 1, int)
        _check_number(self, "seed", -(2**63), 2**63 - 1, int, optional=True)
        _check_number(self, "logprobs", 0, MAX_LOGPROBS, int, optional=True)
        _check_number(self, "presence_penalty", -2, 2)
        _check_number(self, "frequency_penalty", -2, 2)
        _check_number(self, "repetition_penalty", 0, 100, above=True)
        if self.prompt_logprobs is not None:
            raise UsageError("prompt_logprobs is not supported", hint="LLM.logits(token_ids) gives the logits of every position")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError("min_tokens is larger than max_tokens", expected=f"at most {self.max_tokens}", found=self.min_tokens)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UsageError("a stop string is empty or no string", expected="non-empty strings", found=repr(self.stop))
        stops = self.stop_token_ids
        if len(stops) > MAX_STOP_TOKENS or any(not isinstance(token, int) or token < 0 for token in stops):
            raise UsageError("stop_token_ids cannot be taken", found=repr(stops),
                             expected=f"at most {MAX_STOP_TOKENS} token ids, each 0 or more")
        if any(token < 0 or not abs(bias) <= 100 for token, bias in self.logit_bias.items()):
            raise UsageError("logit_bias is out of range", expected="token id ≥ 0 -> -100 … 100", found=repr(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def variant(self) -> Variant:
        """What the sampler has to do for this request."""
        filtered = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return Variant(
            mode=0 if self.greedy else 2 if filtered else 1,
            adjusted=bool(self.min_tokens or self.logit_bias or self.presence_penalty or self.frequency_penalty
                          or self.repetition_penalty != 1),
            logprobs=self.logprobs is not None,
        )


def _check_number(params, name, low, high, kind=float, *, above=False, optional=False):
    value = getattr(params, name)
    if optional and value is None:
        return
    right_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right_kind or not low <= value <= high or (above and value == low):
        noun = "an integer" if kind is int else "a number"
        bounds = f"above {low}, at most {high}" if above else f"from {low} to {high}"
        expected = f"{noun} {bounds}{', or None' if optional else ''}"
        raise UsageError(f"{name} is out of range", expected=expected, found=repr(value))


class Variant(NamedTuple):
    """Which parts of the sampler a batch needs; each distinct one is a CUDA graph of its own.

    mode: 0 every row is greedy, 1 some row draws from its whole distribution, 2 some row draws from a part of it (a sort).
    adjusted: some row changes its logits first.  logprobs: some row reports log probabilities.
    """

    mode: int = 0
    adjusted: bool = False
    logprobs: bool = False

    @property
    def plain(self) -> bool:
        """Whether a row's token is the best of its logits, or of their sum with noise, and nothing else is wanted of them."""
        return self.mode < 2 and not self.adjusted and not self.logprobs

    @staticmethod
    def covering(variants) -> Variant:
        """The one variant that serves rows of all these."""
        return Variant(*map(max, zip(Variant(), *variants, strict=True)))


@dataclass
class SamplingTensors:
    """The parameters of R rows, on the device. The [R, V] fields are None unless the batch is `adjusted`.

    temperature, top_p, min_p, repetition, presence, frequency   float32 [R]
    top_k, seed_low, seed_high, min_length   int32 [R]; top_k 0: all; `stops` are forbidden at positions below min_length
    stops      int32 [R, K]   tokens that would end the row, padded with -1
    counts     int32 [R, V]   how often each token was generated
    prompted   bool [R, V]    tokens of the prompt
    bias       float32 [R, V]
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    top_k: torch.Tensor
    seed_low: torch.Tensor
    seed_high: torch.Tensor
    min_length: torch.Tensor
    stops: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    prompted: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class SampleResult(NamedTuple):
    """tokens int32 [R], -1 where a row's logits are not a number. When asked for, of the raw logits: the chosen token's log
    probability float32 [R] and rank int32 [R] (1 is the best), and the best tokens' ids int32 and log probabilities float32
    [R, MAX_LOGPROBS]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(logits: torch.Tensor, params: SamplingTensors, positions: torch.Tensor, variant: Variant,
           buffers: StepBuffers | None = None) -> SampleResult:  # fmt: skip
    """The next token of every row.

    logits: float32 [R, V], left as they are.  positions: int32 [R], the place in its sequence that each new token takes.
    buffers: their first R rows take the tokens and move on.
    """
    scores = _adjusted(logits, params, positions) if variant.adjusted else logits
    thresholds = _thresholds(scores / _heat(params), params) if variant.mode == 2 else None
    if logits.is_cuda:
        from fusec.runtime.draw import draw
    else:
        draw = _draw
    tokens = draw(scores, params, positions, noise=variant.mode > 0, thresholds=thresholds, buffers=buffers)
    return _with_logprobs(logits, tokens) if variant.logprobs else SampleResult(tokens)


def _draw(scores, params, positions, *, noise, thresholds, buffers):
    """See draw.draw, which is this for the GPU."""
    if noise:
        heated = scores / _heat(params)
        if thresholds is not None:
            heated = torch.where(heated < thresholds[:, None], -math.inf, heated)
        heated = heated + gumbel(params.seed_low, params.seed_high, positions, scores.shape[1])
        scores = torch.where(params.temperature[:, None] >= GREEDY_BELOW, heated, scores)
    best, tokens = scores.max(dim=-1)
    tokens = torch.where(best.isnan(), -1, tokens).int()
    if buffers is not None:
        buffers.advance(tokens)
    return tokens


def _heat(params):
    return torch.where(params.temperature >= GREEDY_BELOW, params.temperature, 1.0)[:, None]


def _adjusted(logits, params, positions):
    """Bias, penalties, and no end before `min_length`."""
    logits = logits + params.bias
    repeated = params.prompted | (params.counts > 0)
    factor = params.repetition[:, None]
    logits = torch.where(repeated, torch.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - params.frequency[:, None] * params.counts - params.presence[:, None] * (params.counts > 0)
    forbidden = (positions < params.min_length)[:, None] & (params.stops >= 0)
    return logits.scatter_add(1, params.stops.clamp(min=0).long(), torch.where(forbidden, -math.inf, 0.0))


def _thresholds(scores, params):
    """float32 [R]: the smallest score that min_p, top_k and top_p leave. Whether a token stays is asked of its score, not of its
    place in the sorted row, so that equal scores share their fate whatever the order in which a sort leaves them."""
    ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    limit = torch.where(params.top_k > 0, params.top_k, ordered.shape[1])[:, None]
    keep = (ordered >= ordered[:, :1] + params.min_p.log()[:, None]) & (rank < limit)
    probabilities = torch.where(keep, ordered, -math.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    keep &= (before < params.top_p[:, None]) | (params.top_p >= 1)[:, None]
    return torch.where(keep, ordered, math.inf).amin(dim=-1)


def _with_logprobs(logits, tokens):
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.clamp(min=0).long()[:, None])
    ranks = (logprobs > chosen).sum(dim=-1, dtype=torch.int32) + 1
    top = logprobs.topk(min(MAX_LOGPROBS, logits.shape[1]), dim=-1)
    return SampleResult(tokens, chosen[:, 0], ranks, top.indices.int(), top.values)


def gumbel(seed_low: torch.Tensor, seed_high: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, vocab_size]: argmax(scores + noise) draws from softmax(scores).

    Counter-based: a hash of (seed, position, token), so it needs no state and no order of evaluation. All arguments int32 [R].
    """
    token = torch.arange(vocab_size, dtype=torch.int32, device=positions.device)
    low = (seed_low + positions * _signed(0x85EBCA6B))[:, None]
    high = (seed_high ^ (positions * _signed(0xC2B2AE35)))[:, None]
    bits = _mix(_mix(token * _signed(0x9E3779B1) + low) ^ high)
    # 31 bits as a fraction in [0, 1]: the exponential's small values, which win, are the finely resolved ones
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -(-torch.log1p(-uniform)).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """An invertible hash of int32, wrapping (lowbias32, C. Wellons' hash-prospector)."""
    x = (x ^ _shift(x, 16)) * _signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift right; torch's own keeps the sign."""
    return (x >> count) & ((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two well mixed int32 words (splitmix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return _signed(z & 0xFFFFFFFF), _signed(z >> 32)
