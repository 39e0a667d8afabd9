"""What a request answers: text, tokens, log probabilities and timing, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """One candidate of a step: its log probability (natural, of the raw logits), its rank (1 is the best) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer to a prompt.

    cumulative_logprob, logprobs: present when SamplingParams.logprobs asked for them; one dictionary per token.
    finish_reason: "stop" (end of sequence, a stop string or a stop token), "length", "abort", or None while it runs.
    stop_reason: the stop string or stop token that ended it; None for the model's own end of sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of a monotonic clock, and the speeds that follow."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def prefill_tokens_per_second(self) -> float | None:
        if self.first_token_time is None or self.first_scheduled_time is None:
            return None
        return self.prompt_tokens / max(self.first_token_time - self.first_scheduled_time, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, per second since the first; None before there are two."""
        if self.output_tokens < 2:
            return None
        return (self.output_tokens - 1) / max(self.last_token_time - self.first_token_time, 1e-9)


@dataclass
class RequestOutput:
    """A prompt and its answers (`SamplingParams.n` of them)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
