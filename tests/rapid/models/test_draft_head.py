"""Drafts from a part of the vocabulary: whose tokens it has, the head's rows, and that every law holds."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from running import done, logits_after, opened, random_tokens
from test_distributions import assert_follows
from transformers import PreTrainedModel

from benchmarks.common.closed_forms import law
from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, VerifyRequest
from rapid.engine.propose import propose
from rapid.engine.sequence import Sequence
from rapid.engine.verify import verify_draft
from rapid.kernels.cpu.jit import available
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.models.draft_head import DraftHead
from rapid.models.draft_vocabulary import DraftVocabulary, Size, by_frequency, num_columns
from rapid.models.model import Model
from rapid.sampling.logits_processor import LogitProcessor
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult
from rapid.speculation.params import SpeculationParams

VOCAB, COLUMNS = 256, 64
compiled = pytest.mark.skipif(not available(), reason="needs llvmlite")


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_the_vocabulary_has_what_is_wanted_and_then_the_smallest_ids() -> None:
    vocabulary = DraftVocabulary(COLUMNS, VOCAB, [200, *by_frequency([90, 91, 91, 3])])
    assert vocabulary.ids[:4].tolist() == [200, 91, 90, 3]
    assert vocabulary.ids[4:].tolist() == [*range(3), *range(4, 61)]
    assert (vocabulary.columns >= 0).sum() == COLUMNS
    assert (vocabulary.ids[vocabulary.columns[vocabulary.ids]] == vocabulary.ids).all()


def test_tokens_of_the_output_take_the_columns_of_the_largest_ids() -> None:
    """However many come: what was wanted stays, and no token has two columns."""
    vocabulary = DraftVocabulary(COLUMNS, VOCAB, range(100, 200))
    kept = vocabulary.ids[:56].tolist()
    assert kept == list(range(100, 156))
    for token in range(200, 256):
        assert len(vocabulary.add([token, token, 100])) == 1
        assert vocabulary.columns[token] >= 56
        assert vocabulary.ids[:56].tolist() == kept and len(set(vocabulary.ids.tolist())) == COLUMNS
        assert (vocabulary.columns[vocabulary.ids] == np.arange(COLUMNS)).all()
        assert (vocabulary.columns >= 0).sum() == COLUMNS


@pytest.mark.parametrize(
    ("size", "vocab_size", "columns"),
    [
        ("full", 10**6, None),
        ("auto", 49_152, 8192),
        ("auto", 8192, None),
        ("auto", 128_256, 21_376),
        (1025, 2000, 1088),
    ],
)
def test_how_many_tokens_it_has(size: Size, vocab_size: int, columns: int | None) -> None:
    assert num_columns(size, vocab_size) == columns


@compiled
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("with_bias", [False, True])
def test_some_outputs_of_a_product_are_those_of_the_whole(bits: int, with_bias: bool) -> None:
    weight, bias = random_rows(200, 96), random_rows(200, seed=1) if with_bias else None
    whole, rows = CompiledLinear(weight, bias, bits), random_rows(3, 96, seed=2)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:64]
    some, before = whole.of_outputs(ids), whole(rows)
    assert torch.equal(some(rows), before[:, ids])
    places, others = torch.tensor([0, 17, 63]), torch.tensor([199, 5, 5])
    some.copy_outputs(places, whole, others)
    ids[places] = others
    assert torch.equal(some(rows), before[:, ids])
    assert torch.equal(whole(rows), before)


def test_penalties_over_a_vocabulary_are_those_of_its_tokens() -> None:
    """Also when a token of the output has come in place of another."""
    params = LogitParams(
        logit_bias={3: 1.5, 250: -2.0},
        repetition_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=-0.4,
        min_tokens=99,
        stop_token_ids=(7, 240),
        prompt=(1, 9, 201),
        eos=(2,),
    )
    whole = LogitProcessor(params, None, VOCAB, torch.device("cpu"))
    vocabulary = DraftVocabulary(COLUMNS, VOCAB, [2, *whole.needed, 201])
    logits, output = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)), [9, 222, 8, 8, 61]
    for is_new in (True, False):
        ids = torch.from_numpy(vocabulary.ids)
        adjusted = whole.over(vocabulary)(logits[:, ids], output, [5, 230])
        torch.testing.assert_close(adjusted, whole(logits, output, [5, 230])[:, ids])
        assert bool(vocabulary.add(output)) is is_new


@pytest.fixture
def models(tiny_network: Callable[..., PreTrainedModel]) -> tuple[Model, Model]:
    """A target, and a drafter that mostly agrees."""
    target, drafter = (tiny_network(VOCAB, layers=1).bfloat16() for _ in range(2))
    with torch.no_grad():
        drafter.model.norm.weight *= 0.8
    return Model(target, None, "target"), Model(drafter, None, "drafter", quantization="int8")


def new_head(model: Model, size: Size, wanted: Iterable[int]) -> DraftHead:
    """As `Model.draft_head`, which leaves a vocabulary so small whole."""
    assert model.draft_head(size, wanted) is None
    return DraftHead(model._decoder.head, DraftVocabulary(COLUMNS, VOCAB, wanted))


def written(target: Sequence, drafter: Sequence, engines: tuple[Engine, Engine], num_rounds: int) -> list[Draft]:
    """Rounds with drafts from a part of the vocabulary; returns the drafts."""
    drafts, known = list[Draft](), 0
    making = functools.partial(new_head, engines[1].model)
    for _ in range(num_rounds):
        asked = DraftRequest(known, target.output[known:], DraftLimits(3))
        drafts.append(done(engines[1].submit(propose(drafter, asked, frozenset(), making))))
        known = len(target.output)
        result: VerifyResult = done(engines[0].submit(verify_draft(target, VerifyRequest(drafts[-1], transfers=True))))
        assert result.tokens
    return drafts


@compiled
def test_greedy_text_is_the_target_s_and_its_tokens_become_draftable(
    models: tuple[Model, Model], engine: Callable[..., Engine]
) -> None:
    engines, prompt = (engine(models[0]), engine(models[1])), random_tokens(20, seed=1)
    alone = opened(engines[0], prompt)
    target, drafter = opened(engines[0], prompt), opened(engines[1], prompt)
    drafts = written(target, drafter, engines, 20)
    for _ in range(len(target.output)):
        done(engines[0].submit(verify_draft(alone, VerifyRequest(Draft(len(alone.output))))))
    assert target.output == alone.output
    assert drafter.head is not None
    newest = [token for token in target.output[: drafts[-1].offset] if token >= COLUMNS][-1]
    assert newest in drafter.head.ids
    assert any(token >= COLUMNS for draft in drafts for token in draft.tokens)


@compiled
@pytest.mark.parametrize("rule", ["published", "augmented", "lossless"])
def test_every_rule_keeps_its_law(models: tuple[Model, Model], engine: Callable[..., Engine], rule: str) -> None:
    """The first token of many seeds, among which many are outside of the draft vocabulary."""
    engines, prompt, eta = (engine(models[0]), engine(models[1])), random_tokens(20, seed=1), 8.0
    sampling = SamplingParams(temperature=0.8, top_p=0.95)
    how = SpeculationParams(verification=rule, transfer_strength=eta)
    vocabulary = torch.from_numpy(DraftVocabulary(COLUMNS, VOCAB, prompt).ids)
    p = probabilities(logits_after(models[0], prompt), sampling).double().numpy()
    q = np.zeros(VOCAB)
    q[vocabulary] = probabilities(logits_after(models[1], prompt)[vocabulary], sampling).double().numpy()
    with np.errstate(divide="ignore"):
        expected = law(rule, sampling.temperature * np.log(p), q, eta, sampling.temperature)
    assert p[vocabulary].sum() < 0.9
    counts = np.zeros(VOCAB)
    for seed in range(400):
        sequences = [opened(each, prompt, replace(sampling, seed=seed + 7000 * i)) for i, each in enumerate(engines)]
        for sequence in sequences:
            sequence.request = replace(sequence.request, speculation=how)
        written(sequences[0], sequences[1], engines, 1)
        counts[sequences[0].output[0]] += 1
        for sequence, each in zip(sequences, engines, strict=True):
            each.close(sequence)
    assert_follows(counts, expected)
