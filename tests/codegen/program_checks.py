"""A generated program against the float64 oracle: prefill and decode of a few sequences over pages, on random weights.

Runs on the CPU under Triton's interpreter (tests/codegen/test_programs.py) and on a GPU (tests/gpu/test_programs.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fusec.compiler import compile
from fusec.ir.interpreter import EXACT, Evaluator
from fusec.language import load
from fusec.runtime.batch import Batch
from fusec.runtime.torch_program import TorchProgram
from fusec.runtime.weights import RandomWeights

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass
class Report:
    """Relative errors ‖out − exact‖ / ‖exact‖ of the logits: of the program, and of torch in the same dtype."""

    ours: float
    torch: float
    worst: float


class Shared(RandomWeights):
    """Random weights drawn in float32 and rounded to the program's dtype once, so that the oracle sees the very numbers that
    it uses."""

    def __init__(self, seed, dtype, device, stored):
        super().__init__(seed, dtype, device)
        self.stored = stored

    def storage(self, key, shape):
        made = RandomWeights(self.seed, torch.float32, torch.device("cpu")).storage(key, shape)
        return made.to(self.stored).to(self.dtype).to(self.device)


def make_batch(starts, counts, block_size, blocks_per_sequence, vocab, generator, device, ids):
    """Sequence b has `starts[b]` tokens in the cache and `counts[b]` new ones; pages are shuffled."""
    order = (
        torch.randperm(len(starts) * blocks_per_sequence, generator=torch.Generator().manual_seed(1)).view(len(starts), -1).int()
    )
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)]).int()
    owner = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(counts))
    slots = order[owner, positions.long() // block_size].long() * block_size + positions % block_size
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    tokens = torch.cat([ids[b][s : s + c] for b, (s, c) in enumerate(zip(starts, counts, strict=True))]).int()
    to = lambda t: t.to(device)  # noqa: E731
    return Batch(
        ids=to(tokens),
        positions=to(positions),
        slots=to(slots),
        query_starts=to(ends),
        context_lens=to(torch.tensor([s + c for s, c in zip(starts, counts, strict=True)]).int()),
        block_tables=to(order),
        rows=to(torch.arange(len(tokens)).int()),
        max_query=max(counts),
        max_context=max(64, *(s + c for s, c in zip(starts, counts, strict=True))),
    )


def check(
    example, config, *, dtype, device, make_program, lengths=(5, 19, 1), decode_steps=2, seed=0, block_size=4, source=None
) -> Report:
    """Prefill, then decode, of sequences of odd lengths; every row's logits compared."""
    generator = torch.Generator().manual_seed(seed)
    source = source or EXAMPLES / f"{example}.fuse"
    name = str(dtype).removeprefix("torch.")
    compiled = compile(source, config, dtype=name, verify=True)
    program = make_program(compiled, Shared(seed, dtype, device, dtype))
    plain = TorchProgram(
        compile(source, config, dtype=name, backend="torch"), Shared(seed, dtype, device, dtype), dtype, torch.device(device)
    )
    exact = Evaluator(load(source, config), EXACT, weight=Shared(seed, torch.float64, "cpu", dtype))
    vocab = program.vocab_size
    total = [n + decode_steps for n in lengths]
    ids = [torch.randint(0, vocab, (n,), generator=generator) for n in total]
    blocks = -(-max(total) // block_size)
    for p in (program, plain):
        p.allocate_cache(blocks * len(lengths), block_size)
    ours, theirs, reference = [], [], []
    truth = [exact(ids=i, pos=torch.arange(len(i)))[0] for i in ids]
    steps = [([0] * len(lengths), list(lengths))] + [
        ([n + i for n in lengths], [1] * len(lengths)) for i in range(decode_steps - 1)
    ]
    steps += [([lengths[0] + decode_steps - 1], [1])]  # one sequence alone: the one-token kernels
    for starts, counts in steps:
        alone = len(starts) == 1
        batch = make_batch([*starts, *([0] * 0)], counts, block_size, blocks, vocab, generator, device, ids)
        if alone:  # sequence 0's pages, as they were dealt for all
            order = torch.randperm(len(lengths) * blocks, generator=torch.Generator().manual_seed(1)).view(len(lengths), -1).int()
            batch.block_tables = order[:1].to(device)
            batch.slots = (order[0, starts[0] // block_size].long() * block_size + starts[0] % block_size).view(1).to(device)
        ours.append(program.forward(batch).double().cpu())
        theirs.append(plain.forward(batch).double().cpu())
        reference.append(torch.cat([truth[b][s : s + c] for b, (s, c) in enumerate(zip(starts, counts, strict=True))]))
    error = lambda parts: float((torch.cat(parts) - torch.cat(reference)).norm() / torch.cat(reference).norm())  # noqa: E731
    worst = max(float((a - r).norm() / r.norm()) for a, r in zip(ours, reference, strict=True))
    return Report(error(ours), error(theirs), worst)


TINY = {
    "llama": dict(
        architectures=["LlamaForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "gemma2": dict(
        architectures=["Gemma2ForCausalLM"],
        vocab_size=101,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=7,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "gpt2": dict(
        architectures=["GPT2LMHeadModel"],
        vocab_size=101,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=3,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    ),
    "qwen2": dict(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "phi3": dict(
        architectures=["Phi3ForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "olmo2": dict(
        architectures=["Olmo2ForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "mistral": dict(
        architectures=["MistralForCausalLM"],
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=6,
        head_dim=16,
        tie_word_embeddings=False,
    ),
    "gemma3": dict(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=101,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_local_base_freq=1000.0,
        sliding_window=7,
        query_pre_attn_scalar=16,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
    ),
}
