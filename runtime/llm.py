"""LLM: prompts in, text out.

    llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf")
    outputs = llm.generate(["The moon is"], SamplingParams(temperature=0, max_tokens=32))
    print(outputs[0].outputs[0].text)
    for piece in llm.stream([{"role": "user", "content": "What is a GPU?"}]):
        print(piece, end="", flush=True)

The names are vLLM's wherever it has one.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import random
from collections.abc import Iterator, Mapping

import torch

from fusec.errors import UsageError, UserError
from fusec.runtime.engine import Engine
from fusec.runtime.loading import Model, load_model
from fusec.runtime.memory import cache_blocks
from fusec.runtime.outputs import RequestOutput
from fusec.runtime.request import Request
from fusec.runtime.sampling import SamplingParams

Prompt = str | list[int]

# At its end Python looks for garbage among the 170,000 objects that torch's import leaves, for a third of a second.
atexit.register(gc.freeze)


class LLM:
    """A compiled model, ready to answer.

    model        a folder of safetensors, a .gguf file, a Hugging Face id, a name that fusec knows, a config (a dictionary or the
                 path of a config.json, for random weights); None: the default model
    source       the .fuse file that describes it; None: found by the checkpoint's architecture
    dtype        "auto", "float32", "bfloat16" or "float16";  device: "auto", "cpu", "cuda", "cuda:1"
    max_model_len  longest prompt and answer together, in tokens; None: what the model was trained for, if the cache holds it
    enforce_eager  no CUDA graphs
    load_format  "auto", or "random": weights of the right shapes drawn from `seed`
    seed         of sampling, where SamplingParams give none
    block_size, num_blocks   the cache: tokens per block, and blocks; None: what gpu_memory_utilization of the GPU's memory leaves
    max_num_seqs, max_num_batched_tokens   sequences and tokens of one step
    enable_prefix_caching    compute a beginning that prompts share once
    offline      never ask the Hugging Face Hub
    progress     called with (done, total) while weights load

    Raises UserError for a model that cannot be found, read or compiled, DeviceError when the device is missing or too small.
    """

    def __init__(self, model: str | Mapping | None = None, *, source=None, dtype="auto", device="auto",
                 max_model_len: int | None = None, enforce_eager: bool = False, load_format: str = "auto", seed: int = 0,
                 block_size: int = 16, num_blocks: int | None = None, gpu_memory_utilization=0.9, max_num_seqs: int = 256,
                 max_num_batched_tokens: int = 2048, enable_prefix_caching: bool = False, offline: bool = False,
                 progress=None):  # fmt: skip
        _check("block_size", block_size, block_size >= 1 and block_size & (block_size - 1) == 0, "a power of two")
        _check("gpu_memory_utilization", gpu_memory_utilization, 0 < gpu_memory_utilization <= 1, "a number above 0, at most 1")
        _check("max_num_seqs", max_num_seqs, 1 <= max_num_seqs <= 1024, "an integer from 1 to 1024")
        _check("max_num_batched_tokens", max_num_batched_tokens, max_num_batched_tokens >= 1, "a positive integer")
        _check("num_blocks", num_blocks, num_blocks is None or num_blocks >= 1, "a positive integer")
        _check("max_model_len", max_model_len, max_model_len is None or max_model_len >= 2, "an integer of 2 or more")
        self._use(
            load_model(model, source=source, dtype=dtype, device=device, max_model_len=max_model_len, load_format=load_format,
                       seed=seed, offline=offline, max_tokens=max(max_num_batched_tokens, max_num_seqs), progress=progress),
            explicit_len=max_model_len is not None, seed=seed, block_size=block_size, num_blocks=num_blocks,
            utilization=gpu_memory_utilization, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=enforce_eager, enable_prefix_caching=enable_prefix_caching,
        )  # fmt: skip

    @classmethod
    def from_model(cls, model: Model, *, seed: int = 0, block_size: int = 16, num_blocks: int | None = None,
                   utilization: float = 0.9, max_num_seqs: int = 256, explicit_len: bool = True, **engine) -> LLM:  # fmt: skip
        """An LLM around a program that is loaded already."""
        llm = cls.__new__(cls)
        llm._use(model, explicit_len=explicit_len, seed=seed, block_size=block_size, num_blocks=num_blocks,
                 utilization=utilization, max_num_seqs=max_num_seqs, **engine)  # fmt: skip
        return llm

    def _use(self, model, *, explicit_len, seed, block_size, num_blocks, utilization, max_num_seqs, **engine):
        length = model.max_model_len
        num_blocks = num_blocks or cache_blocks(model.program, block_size=block_size, max_model_len=length,
                                                max_num_seqs=max_num_seqs, utilization=utilization)
        if num_blocks * block_size < length:
            if explicit_len:
                raise UserError("the cache is too small for max_model_len", expected=f"room for {length} tokens",
                                found=f"{num_blocks} blocks of {block_size} tokens",
                                hint=f"max_model_len={num_blocks * block_size} would fit", exit_code=5)  # fmt: skip
            length = num_blocks * block_size
        self.program, self.tokenizer, self.eos_ids, self.max_model_len = model.program, model.tokenizer, model.eos_ids, length
        self.engine = Engine(model.program, num_blocks=num_blocks, block_size=block_size, max_model_len=length,
                             max_num_seqs=max_num_seqs, **engine)  # fmt: skip
        self._seeds, self._numbers = random.Random(seed), itertools.count()
        self._requests: dict[int, Request] = {}

    def generate(self, prompts: Prompt | list[Prompt], sampling_params: SamplingParams | list[SamplingParams] | None = None
                 ) -> list[RequestOutput]:  # fmt: skip
        """Continue prompts, given as text or token ids; all at once, answered in their order.

        Raises UserError for a prompt that is empty, longer than the context, or of unknown tokens. Ctrl-C ends all of them.
        """
        if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        prompts = [_plain(prompt) for prompt in prompts]
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            expected = f"{len(prompts)}, or one for all"
            raise UsageError("prompts and sampling_params differ in number", expected=expected, found=len(params))
        requests = [self._request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        for request in requests:
            self._submit(request)
        while not all(request.finished for request in requests):
            self._step()
        return [request.output for request in requests]

    def chat(self, messages, sampling_params: SamplingParams | list[SamplingParams] | None = None,
             chat_template_kwargs: dict | None = None) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation, or a list of them: lists of {"role": …, "content": …}, under the model's own chat template.

        chat_template_kwargs: what else the template reads, such as tools or enable_thinking.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self._chat_ids(each, **chat_template_kwargs or {}) for each in conversations], sampling_params)

    def stream(self, prompt: Prompt | list[dict], sampling_params: SamplingParams | None = None) -> Stream:
        """Answer one prompt (text, token ids or a conversation) piece by piece."""
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], Mapping):
            prompt = self._chat_ids(prompt)
        return Stream(self, self._request(prompt, sampling_params))

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Teacher-forced: the logits after every token, float32 [T, V] on the CPU."""
        self._check_ids(token_ids, self.max_model_len)
        return self.engine.logits(token_ids)

    def _request(self, prompt, params):
        params = params or SamplingParams()
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            if self.tokenizer is None:
                raise UserError("there is no tokenizer", expected="a prompt of token ids", found="text")
            prompt = self.tokenizer.encode(text)
        self._check_ids(prompt, self.max_model_len - 1)
        unknown = [token for token in (*params.logit_bias, *params.stop_token_ids) if token >= self.program.vocab_size]
        if unknown:
            raise UsageError("a token of logit_bias or stop_token_ids is not in the vocabulary",
                             expected=f"token ids below {self.program.vocab_size}", found=unknown[0])  # fmt: skip
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer", expected="stop_token_ids", found=f"stop={params.stop!r}")
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(64)
        return Request(str(next(self._numbers)), text, list(prompt), params, seed=seed, tokenizer=self.tokenizer,
                       eos_ids=self.eos_ids, max_model_len=self.max_model_len)  # fmt: skip

    def _check_ids(self, ids, longest):
        vocab_size = self.program.vocab_size
        if not ids:
            raise UserError("the prompt is empty", expected="one token at least", found="none")
        if len(ids) > longest:
            raise UserError("the prompt is longer than the context", expected=f"at most {longest} tokens",
                            found=f"{len(ids)} tokens", hint=f"shorten it, or raise max_model_len (now {self.max_model_len})")
        wrong = next((token for token in ids if not isinstance(token, int) or not 0 <= token < vocab_size), None)
        if wrong is not None:
            expected = f"integers from 0 to {vocab_size - 1}"
            raise UserError("the prompt holds an unknown token id", expected=expected, found=repr(wrong))

    def _chat_ids(self, messages, **variables):
        if self.tokenizer is None:
            raise UserError("there is no tokenizer, and with it no chat template", hint="generate() takes token ids")
        return self.tokenizer.apply_chat(messages, **variables)

    def _submit(self, request):
        for sequence in request.sequences:
            self._requests[id(sequence)] = request
            self.engine.add(sequence)

    def _step(self):
        """One step of the engine. What interrupts it ends everything that runs, and leaves nothing behind."""
        try:
            for new in self.engine.step():
                request = self._requests[id(new.sequence)]
                request.accept(new, self.engine)
                if new.sequence.finished:
                    del self._requests[id(new.sequence)]
        except BaseException:
            self.engine.reset()
            for request in {id(request): request for request in self._requests.values()}.values():
                request.abort()
            self._requests.clear()
            raise

    def _abort(self, request):
        for sequence in request.sequences:
            self.engine.finish(sequence, "abort")
            self._requests.pop(id(sequence), None)
        request.abort()


class Stream:
    """An answer as it comes: iterate over pieces of text that never end in half a character or in half a stop string.

    output: the RequestOutput so far, with its metrics. Leaving the loop early, or `close`, aborts the request.
    """

    def __init__(self, llm: LLM, request: Request):
        if request.params.n != 1:
            raise UsageError("a stream has one answer", expected="n = 1", found=request.params.n)
        self._llm, self._request = llm, request
        self.output = request.output
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def _run(self):
        self._llm._submit(self._request)
        answer, printed = self.output.outputs[0], 0
        try:
            while not self._request.finished:
                self._llm._step()
                if len(answer.text) > printed:
                    piece, printed = answer.text[printed:], len(answer.text)
                    yield piece
        finally:
            if not self._request.finished:
                self._llm._abort(self._request)


def _check(name, value, holds, expected):
    if not holds:
        raise UsageError(f"{name} is out of range", expected=expected, found=repr(value))


def _plain(prompt):
    """A prompt as text or token ids; vLLM's {"prompt": …} and {"prompt_token_ids": …} are taken apart."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if not isinstance(prompt, str | list):
        raise UsageError("this is no prompt", expected='text, token ids, {"prompt": …} or {"prompt_token_ids": …}',
                         found=repr(prompt)[:60], hint="conversations go to llm.chat")  # fmt: skip
    return prompt
