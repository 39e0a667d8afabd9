"""The engine: token ids in, token ids out, for many sequences at once."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

from fusec.errors import UserError
from fusec.runtime.blocks import BlockAllocator
from fusec.runtime.outputs import Logprob
from fusec.runtime.runner import Launched, Runner
from fusec.runtime.scheduler import Scheduler, Sequence


class NewToken(NamedTuple):
    """A sequence got a token.  logprobs: of the chosen token and of the best ones, when its parameters ask."""

    sequence: Sequence
    token: int
    logprobs: dict[int, Logprob] | None


class Engine:
    """Plans steps, launches them, and reads them `run_ahead` steps later, so that the device never waits for the host.

    program: see Program; its cache is allocated here.  num_blocks × block_size: tokens the cache holds.  max_num_batched_tokens:
    tokens per step.  run_ahead: default 1 on a GPU; on a CPU steps run while they are launched, and nothing is gained.
    """

    def __init__(self, program, *, num_blocks: int, block_size: int = 16, max_model_len: int, max_num_seqs: int = 256,
                 max_num_batched_tokens: int = 2048, enforce_eager: bool = False, enable_prefix_caching: bool = False,
                 run_ahead: int | None = None):  # fmt: skip
        self.program, self.max_model_len = program, max_model_len
        self._limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max(max_num_batched_tokens, max_num_seqs),
                        "prefix_caching": enable_prefix_caching}  # fmt: skip
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.scheduler = Scheduler(self.allocator, **self._limits)
        program.allocate_cache(num_blocks, block_size)
        self.runner = Runner(program, max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size,
                             enforce_eager=enforce_eager)  # fmt: skip
        self.run_ahead = int(program.device.type == "cuda") if run_ahead is None else run_ahead
        self.under_way: deque[Launched] = deque()

    @property
    def busy(self) -> bool:
        """Some sequence has not finished."""
        scheduler = self.scheduler
        return bool(scheduler.waiting or scheduler.running) or any(
            not item.sequence.finished for launched in self.under_way for item in launched.plan.work)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def finish(self, sequence: Sequence, reason: str = "abort", stop_reason: int | str | None = None) -> None:
        """End a sequence now; what is under way for it is dropped."""
        self.scheduler.finish(sequence, reason, stop_reason)

    def reset(self) -> None:
        """Forget every sequence, after a step that failed or was interrupted halfway."""
        self.under_way.clear()
        self.allocator = BlockAllocator(self.allocator.num_blocks, self.allocator.block_size)
        self.scheduler = Scheduler(self.allocator, **self._limits)
        self.runner.reset()

    def step(self) -> list[NewToken]:
        """Launch the next step, if there is one, and read the oldest one under way, once enough are. Tokens come in the order in
        which they were planned; a list without any is no sign of an end: ask `busy`."""
        plan = self.scheduler.plan(may_preempt=not self.under_way)
        if plan is not None:
            self.under_way.append(self.runner.launch(plan))
        if self.under_way and (plan is None or len(self.under_way) > self.run_ahead):
            return self._read(self.under_way.popleft())
        return []

    def _read(self, launched):
        tokens, details = launched.read()
        sampling = [item.sequence for item in launched.plan.work if item.samples]
        for sequence, token in zip(sampling, tokens, strict=True):
            if token < 0 and not sequence.finished:
                raise UserError(
                    "the model's logits are not numbers", found=f"NaN for token {len(sequence.tokens)} of a sequence",
                    hint="the weights may be damaged, or too large for this dtype: try dtype='float32'",
                )  # fmt: skip
        grown = set(map(id, self.scheduler.commit(launched.plan, tokens)))
        if not self.busy:
            self.under_way.clear()  # only tokens past the end are left
        details = details or [None] * len(tokens)
        return [NewToken(sequence, token, _logprobs(token, detail, sequence.params.logprobs))
                for sequence, token, detail in zip(sampling, tokens, details, strict=True) if id(sequence) in grown]

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Teacher-forced logits, float32 [T, V] on the CPU; needs the blocks of T tokens free."""
        blocks = self.allocator.allocate(self.allocator.blocks_for(len(tokens)))
        if blocks is None:
            room = self.allocator.num_free * self.allocator.block_size
            raise UserError("the cache has no room for these tokens", expected=f"at most {room} tokens", found=len(tokens))
        try:
            return self.runner.logits(tokens, blocks)
        finally:
            self.allocator.release(blocks)


def _logprobs(token, detail, count):
    """vLLM's dictionary of one step: the chosen token first, then the `count` best."""
    if count is None:
        return None
    logprob, rank, top_tokens, top_logprobs = detail
    found = {token: Logprob(logprob, rank)}
    for place, (candidate, value) in enumerate(zip(top_tokens[:count], top_logprobs[:count], strict=True), 1):
        found.setdefault(candidate, Logprob(value, place))
    return found
