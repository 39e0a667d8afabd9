"""The engine on a GPU: CUDA graphs, run-ahead and the fused end of a step change nothing."""

import pytest
import torch
from fake_program import FakeProgram
from test_llm_fake import EOS, KINDS, PROMPTS, VOCAB, FakeTokenizer, answers

from fusec.runtime.drawing import EMPTY
from fusec.runtime.llm import LLM
from fusec.runtime.loading import Model
from fusec.runtime.sampling import SamplingParams, Variant, sample
from fusec.runtime.sampling_state import SamplingState
from fusec.runtime.scheduler import Sequence
from fusec.runtime.step_buffers import StepBuffers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def make(**options):
    program = FakeProgram(VOCAB, device="cuda", supports_graphs=True)
    options = dict(num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=64) | options
    return LLM.from_model(Model(program, FakeTokenizer(), frozenset([EOS]), 64), **options)


OPTIONS = [dict(), dict(run_ahead=0), dict(run_ahead=3), dict(num_blocks=17), dict(max_num_seqs=3)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graphs_change_nothing(options):
    for params in KINDS:
        eager = make(enforce_eager=True, run_ahead=0)
        alone = [answers(eager.generate(prompt, params))[0] for prompt in PROMPTS]
        llm = make(**options)
        for _ in range(2):
            assert answers(llm.generate(PROMPTS, params)) == alone
        assert llm.engine.allocator.num_used == 0 and llm.engine.runner.graphs
    assert answers(make(**options).generate(PROMPTS[:5], KINDS)) == answers(make(enforce_eager=True).generate(PROMPTS[:5], KINDS))


def test_a_step_of_an_unchanged_batch_copies_nothing_to_the_device():
    llm = make(block_size=64, num_blocks=8)
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    for _ in range(4):
        next(stream)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(8):
            next(stream)
        torch.cuda.synchronize()
    copies = {event.key: event.count for event in profile.key_averages() if "memcpy" in event.key.lower()}
    assert not any("HtoD" in key for key in copies), copies


@pytest.mark.parametrize("kind", [dict(temperature=0), dict(temperature=0, min_tokens=1), dict(), dict(top_p=0.9, temperature=2)])
def test_a_step_ends_the_same_in_torch_and_in_triton(kind):
    """The sampled tokens make the next step's input: of rows that are padding, of the last position of a table, of NaN."""
    params = SamplingParams(**kind)
    adjusted = params.variant.adjusted

    def filled(device):
        generator = torch.Generator().manual_seed(0)
        buffers = StepBuffers(20, 6, 4, torch.device(device))
        lengths = torch.randint(0, 23, (20,), generator=generator, dtype=torch.int32)
        lengths[3] = 0
        buffers.tables.copy_(torch.randint(0, 99, (20, 6), generator=generator))
        buffers.begin(torch.arange(20, device=device), torch.arange(20, dtype=torch.int32, device=device), lengths.to(device))
        buffers.clear(3)
        state = SamplingState(20, 5000, torch.device(device))
        sequences = [Sequence([1], params, 9, seed=row) for row in range(20)]
        state.seat(range(20), sequences, lambda array: torch.from_numpy(array).to(device))
        return buffers, state

    pairs, ties = [filled("cpu"), filled("cuda")], 0
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        count = (20, 1, 7, 2)[step % 4]
        logits = torch.randn(count, 5000, generator=generator) * 3
        logits[count // 2, 4999] = torch.nan if step % 3 == 0 else 30
        results = []
        for buffers, state in pairs:
            given = logits.to(buffers.ids.device)
            select = state.select(slice(count), adjusted)
            results.append(sample(given, select, buffers.context_lens[:count], params.variant, buffers).tokens.cpu())
        if params.temperature and not torch.equal(*results):  # a tie in the last bit
            ties += 1
            for name in ("ids", "ring"):
                getattr(pairs[1][0], name).copy_(getattr(pairs[0][0], name))
        assert ties <= 1 and (ties or torch.equal(*results))
        assert (results[1][count // 2] == -1) == (step % 3 == 0)
        for name in ("ids", "positions", "context_lens", "slots", "ring", "cursor"):
            cpu, gpu = (getattr(buffers, name).cpu() for buffers, _ in pairs)
            assert torch.equal(cpu, gpu), name
        assert (pairs[1][0].best == EMPTY).all() and not pairs[1][0].arrivals.any()


@pytest.mark.parametrize("vocab_size", [7, 1024, 50001])
def test_draw_is_the_same_in_torch_and_in_triton(vocab_size):
    generator = torch.Generator().manual_seed(1)
    kinds = [dict(temperature=0), {}, dict(temperature=0.3), dict(top_p=0.8), dict(top_k=3, temperature=2), dict(min_p=0.1)]
    logits = torch.randn(len(kinds) + 1, vocab_size, generator=generator) * 3
    logits[-1, vocab_size // 2] = torch.nan
    params = [SamplingParams(**kind) for kind in [*kinds, {}]]
    variant = Variant.covering(each.variant for each in params)
    differ = 0
    for step in range(50):
        tokens = []
        for device in ("cpu", "cuda"):
            state = SamplingState(len(params), vocab_size, torch.device(device))
            sequences = [Sequence([1], each, 9, seed=row) for row, each in enumerate(params)]
            state.seat(range(len(params)), sequences, lambda array, device=device: torch.from_numpy(array).to(device))
            positions = torch.full((len(params),), step, dtype=torch.int32, device=device)
            tokens.append(sample(logits.to(device), state.select(slice(None), False), positions, variant).tokens.cpu())
        assert tokens[0][-1] == tokens[1][-1] == -1 and tokens[0][0] == tokens[1][0]
        differ += (tokens[0] != tokens[1]).sum().item()
    assert differ <= 1  # a tie in the last bit


def test_the_best_token_passes_its_own_filter():
    """The threshold that one token leaves is its own score: it must be divided by the temperature as that was."""
    generator = torch.Generator().manual_seed(2)
    params = [SamplingParams(top_k=1, temperature=0.1 + 0.013 * row) for row in range(150)]
    state = SamplingState(150, 3000, torch.device("cuda"))
    state.seat(range(150), [Sequence([1], each, 9, seed=row) for row, each in enumerate(params)],
               lambda array: torch.from_numpy(array).to("cuda"))  # fmt: skip
    variant = Variant.covering(each.variant for each in params)
    for _ in range(10):
        logits = torch.randn(150, 3000, generator=generator).cuda() * 3
        positions = torch.zeros(150, dtype=torch.int32, device="cuda")
        tokens = sample(logits, state.select(slice(None), False), positions, variant).tokens
        assert torch.equal(tokens, logits.argmax(1).int())


def test_speed_of_a_step_is_the_device_s():
    """With run-ahead the host is hidden: a step takes what its graph takes."""
    llm = make(block_size=16, num_blocks=8)
    output = llm.generate([3], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0]
    assert output.metrics.decode_tokens_per_second > 500
