"""Drafts in compiled steps are what the engine draws token by token: the same tokens, q and confidences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from running import contents, done, random_tokens
from transformers import PreTrainedModel

from rapid.engine.compiled_drafts import CompiledDrafts, TokenDrawer
from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest
from rapid.engine.propose import propose
from rapid.engine.readout import Draw, Drawing, drafted_token
from rapid.engine.sequence import Sequence
from rapid.engine.verify import prefill
from rapid.errors import PassAbandoned
from rapid.kernels.cpu.jit import available
from rapid.kernels.interface import BatchEntry
from rapid.models.compiled_steps import CompiledSteps
from rapid.models.draft_vocabulary import DraftVocabulary
from rapid.models.model import Model
from rapid.sampling.logits_processor import Following, LogitProcessor
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import Draft, DraftLimits
from rapid.speculation.params import SpeculationParams

pytestmark = pytest.mark.skipif(not available(), reason="this machine compiles no kernels")

CPU = torch.device("cpu")
V, N = 4096, 1024
SAMPLED = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0)
    for top_k in (0, 5, 200)
    for top_p in (1.0, 0.9, 1e-6)
    for min_p in (0.0, 0.1)
]
PENALTIES = LogitParams(
    logit_bias={3: 2.0, 700: -1.5, V - 1: 5.0},
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    prompt=(1, 2, 3, 900),
)
REPEATING = LogitParams(logit_bias={3: 20.0}, frequency_penalty=0.4, presence_penalty=2.0)


def following(params: LogitParams | None, vocabulary: DraftVocabulary, output: list[int]) -> Following | None:
    return None if params is None else LogitProcessor(params, None, V, CPU, vocabulary).following(output)


@pytest.mark.parametrize("params", [None, PENALTIES, REPEATING])
@pytest.mark.parametrize("is_greedy", [False, True])
def test_each_token_is_drawn_as_by_pytorch(params: LogitParams | None, is_greedy: bool) -> None:
    """Several tokens behind each other, so that each changes what the next one is drawn from."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = DraftVocabulary(N, V, [5, 900, V - 1, V - 2])
    ids = torch.from_numpy(vocabulary.ids)
    # No two logits are equal: which of them is among the k likeliest would be anybody's choice.
    values = (3 * torch.randn(100_000, generator=generator)).bfloat16().unique()
    sampled = [*SAMPLED, SamplingParams(temperature=0)]
    for number, sampling in enumerate(sampled):
        ours, theirs = (following(params, vocabulary, [5, 5, 2000]) for _ in range(2))
        drawing = Drawing(sampling, is_greedy or sampling.temperature == 0, 16, number, 7, 2, 4, ours)
        drawer = TokenDrawer(drawing, ids, 4)
        for step in range(4):
            logits = values[torch.randperm(len(values), generator=generator)[None, :N]]
            drawer.kernel.alone(*drawer.arguments(step, logits))
            drawer.drawn(step)
            (expected,) = Draw.together([Draw(logits.float(), drawing._replace(step=2 + step, following=theirs), ids)])
            got, wanted = (drafted_token(drawn.values[-1].numpy()) for drawn in (drawer.tokens_of(step + 1), expected))
            assert got[0] == wanted[0] and int(drawer.tokens_of(step + 1).last) == int(expected.last)
            assert got[2] == pytest.approx(wanted[2], rel=1e-5)
            order = np.argsort(got[1][0]), np.argsort(wanted[1][0])
            assert got[1][0][order[0]].tolist() == wanted[1][0][order[1]].tolist()
            np.testing.assert_allclose(got[1][1][order[0]], wanted[1][1][order[1]], rtol=1e-5)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
SAMPLINGS = [SamplingParams(temperature=0), SamplingParams(min_p=0.5, seed=3)]  # min-p keeps equal logits or none


def model_of(tiny_network: Callable[..., PreTrainedModel], quantization: str) -> Model:
    return Model(tiny_network(2048, **SIZES).bfloat16(), None, "tiny", quantization=quantization)


def drafting(running: Engine, prompt: list[int], sampling: SamplingParams, params: LogitParams | None) -> Sequence:
    logits = None if params is None else params.on(prompt, running.model.info)
    request = SequenceRequest(
        prompt, 100, sampling, SpeculationParams(draft_top_k=64, draft_vocabulary=1024), logits=logits
    )
    sequence: Sequence = done(running.open(request))
    done(running.submit(prefill(sequence)))
    return sequence


def draft_of(running: Engine, sequence: Sequence, known: int, new: list[int], limits: DraftLimits, eos: int) -> Draft:
    request, model = DraftRequest(known, new, limits), running.model
    draft: Draft = done(running.submit(propose(sequence, request, frozenset([eos]), model.draft_head)))
    return draft


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of passes of all compiled drafts."""
    made: list[int] = []
    run = CompiledSteps.run

    def counted(*arguments: Any) -> int:
        made.append(run(*arguments))
        return made[-1]

    monkeypatch.setattr(CompiledSteps, "run", counted)
    return made


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "params",
    [
        None,
        LogitParams(repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: 1.0}),
        LogitParams(min_tokens=6, stop_token_ids=tuple(range(0, 1000, 2))),
    ],
)
def test_an_engine_drafts_the_same_in_compiled_steps(
    tiny_network: Callable[..., PreTrainedModel],
    engine: Callable[..., Engine],
    passes: list[int],
    sampling: SamplingParams,
    params: LogitParams | None,
    quantization: str,
) -> None:
    """Round after round, across a block of positions, whatever the target kept of the draft before."""
    ours, theirs = (engine(model_of(tiny_network, quantization)) for _ in range(2))
    theirs._passes.drafts = None
    prompt = random_tokens(235, seed=4)
    pair = [(running, drafting(running, prompt, sampling, params)) for running in (ours, theirs)]
    written: list[int] = []
    for number, (gamma, kept) in enumerate([(3, 1), (1, 1), (9, 9), (5, 0), (4, 2), (7, 7), (9, 4)]):
        known, new = len(written), [2000 + number]
        written += new
        drafts = [draft_of(running, sequence, known, new, DraftLimits(gamma), -1) for running, sequence in pair]
        assert drafts[0].tokens == drafts[1].tokens and len(drafts[0].tokens) == gamma
        np.testing.assert_allclose(drafts[0].confidences, drafts[1].confidences, rtol=1e-5)
        for (ids, weights), (other_ids, others) in zip(*(draft.distributions for draft in drafts), strict=True):
            assert sorted(ids) == sorted(other_ids)
            np.testing.assert_allclose(weights[np.argsort(ids)], others[np.argsort(other_ids)], rtol=1e-4)
        written += drafts[0].tokens[:kept]
    caches = [contents(sequence.cache) for _, sequence in pair]
    for side, other in zip(*caches, strict=True):
        torch.testing.assert_close(side, other, rtol=0, atol=0)
    assert passes and max(passes) == 4


def test_a_compiled_draft_ends_where_any_draft_would(
    tiny_network: Callable[..., PreTrainedModel], engine: Callable[..., Engine], passes: list[int]
) -> None:
    """At an end of sequence, and behind a token that leaves little hope: no pass is computed behind it."""
    running, prompt = engine(model_of(tiny_network, "none")), random_tokens(50, seed=4)
    whole = draft_of(running, drafting(running, prompt, SAMPLINGS[1], None), 0, [9], DraftLimits(4), -1)
    assert passes == [4]
    eos = whole.tokens[2]
    ended = draft_of(running, drafting(running, prompt, SAMPLINGS[1], None), 0, [9], DraftLimits(4), eos)
    first = whole.tokens.index(eos) + 1
    assert ended.tokens == whole.tokens[:first] and passes == [4, first]
    hopeless = DraftLimits(4, floor=0.5, acceptance=(0.0,) * 9)
    ended = draft_of(running, drafting(running, prompt, SAMPLINGS[1], None), 0, [9], hopeless, -1)
    assert ended.tokens == whole.tokens[:1] and passes == [4, first, 1]


def test_an_abandoned_draft_leaves_the_cache_as_it_was(
    tiny_network: Callable[..., PreTrainedModel], engine: Callable[..., Engine]
) -> None:
    running = engine(model_of(tiny_network, "none"))
    sequence = drafting(running, random_tokens(50, seed=4), SAMPLINGS[1], None)
    before, asked = sequence.cache.length, 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    drawing = Drawing(SAMPLINGS[1], False, 8, 1, 0, 0, 4)
    assert isinstance(running._passes.drafts, CompiledDrafts)
    with pytest.raises(PassAbandoned):
        running._passes.drafts.run([BatchEntry(sequence.cache, [5], 1)], [None], [drawing], abandoned)
    assert sequence.cache.length == before and asked == 3
