"""A prompt on its way through the engine: its sequences, and the text that grows out of their tokens."""

from __future__ import annotations

import time

from fusec.runtime.detokenizer import Detokenizer, StopChecker
from fusec.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fusec.runtime.sampling import SamplingParams
from fusec.runtime.scheduler import Sequence


class Request:
    """One prompt and `params.n` answers to it.  tokenizer: None leaves the texts empty.  eos_ids: the model's own ends."""

    def __init__(self, request_id: str, prompt: str | None, ids: list[int], params: SamplingParams, *, seed: int, tokenizer,
                 eos_ids, max_model_len: int):  # fmt: skip
        self.params, self.tokenizer = params, tokenizer
        limit = max_model_len if params.max_tokens is None else min(len(ids) + params.max_tokens, max_model_len)
        stops = {token: token for token in params.stop_token_ids} | ({} if params.ignore_eos else dict.fromkeys(eos_ids))
        metrics = RequestMetrics(arrival_time=time.monotonic(), prompt_tokens=len(ids))
        self.sequences = [Sequence(ids, params, limit, stops, seed=seed + index, metrics=metrics) for index in range(params.n)]
        outputs = [CompletionOutput(index) for index in range(params.n)]
        self.output = RequestOutput(request_id, prompt, ids, outputs, finished=False, metrics=metrics)
        self._texts = [_Text(tokenizer, params, ids) if tokenizer else None for _ in outputs]

    @property
    def finished(self) -> bool:
        return self.output.finished

    def accept(self, new, engine) -> None:
        """Take an engine.NewToken; ends its sequence in the engine when a stop string is complete."""
        sequence = new.sequence
        index = next(index for index, own in enumerate(self.sequences) if own is sequence)
        output, text = self.output.outputs[index], self._texts[index]
        output.token_ids.append(new.token)
        if new.logprobs is not None:
            self._note_logprobs(output, new)
        output.finish_reason, output.stop_reason = sequence.finish_reason, sequence.stop_reason
        if text:
            # the token that ends an answer is no part of its text
            ending = sequence.finish_reason == "stop" and not self.params.include_stop_str_in_output
            output.text += text.add([] if ending else [new.token], may_stop=len(output.token_ids) >= self.params.min_tokens)
            if text.stops.matched is not None:
                engine.finish(sequence, "stop", text.stops.matched)
                output.finish_reason, output.stop_reason = "stop", text.stops.matched
            elif sequence.finished:
                output.text += text.flush()
        self.output.finished = all(output.finished for output in self.output.outputs)

    def abort(self) -> None:
        """Mark what has not finished."""
        for output in self.output.outputs:
            output.finish_reason = output.finish_reason or "abort"
        self.output.finished = True

    def _note_logprobs(self, output, new):
        if output.logprobs is None:
            output.logprobs, output.cumulative_logprob = [], 0.0
        for token, entry in new.logprobs.items():
            entry.decoded_token = self.tokenizer.decode([token], skip_special_tokens=False) if self.tokenizer else None
        output.logprobs.append(new.logprobs)
        output.cumulative_logprob += new.logprobs[new.token].logprob


class _Text:
    """Tokens to text, up to a stop string."""

    def __init__(self, tokenizer, params, prompt_ids):
        self.stops = StopChecker(params.stop, params.include_stop_str_in_output)
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, prompt_ids)

    def add(self, ids, may_stop):
        piece = self._detokenizer.add(ids)
        return self.stops.add(piece)[0] if may_stop else piece

    def flush(self):
        piece, stopped = self.stops.add(self._detokenizer.flush())
        return piece if stopped else piece + self.stops.flush()
