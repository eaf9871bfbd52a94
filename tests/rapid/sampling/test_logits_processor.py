"""Penalties, biases and log-probabilities: under speculation as without, and as transformers has them."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from running import logits_after
from test_distributions import assert_follows, many
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from world import World, complete, first_eight, run

from benchmarks.common.closed_forms import law
from rapid.errors import InvalidRequest
from rapid.models.draft_vocabulary import DraftVocabulary
from rapid.request import GenerationRequest
from rapid.sampling.logits_processor import LogitProcessor
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.verification import RULES

EVERY = LogitParams(logit_bias={3: 1.5, 5: -2.0}, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4)
STRATEGIES = [
    ("autoregressive", 0),
    ("lookup", 4),
    *((strategy, 3) for strategy in ("speculative", "magicdec", "triforce")),
    ("rapid", 3),
    ("rapid", "auto"),
]


def adjusted(params: LogitParams, logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """``logits`` [V] as the four definitions say, a token at a time."""
    result = logits.clone()
    for token in range(len(logits)):
        value = float(logits[token]) + params.logit_bias.get(token, 0.0)
        if token in prompt + output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = output.count(token)
        result[token] = value - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    return result


def test_each_row_sees_the_draft_tokens_before_it() -> None:
    prompt, output, draft = [1, 1, 4], [2, 3, 3, 7], [3, 6, 1]
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    processor = LogitProcessor(replace(EVERY, prompt=tuple(prompt)), None, 10, torch.device("cpu"))
    expected = [adjusted(EVERY, row, prompt, output + draft[:i]) for i, row in enumerate(logits)]
    torch.testing.assert_close(processor(logits, output, draft), torch.stack(expected))


@pytest.mark.parametrize("in_part", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        LogitParams(repetition_penalty=1.3),
        LogitParams(frequency_penalty=0.7, presence_penalty=-0.4),
        replace(EVERY, min_tokens=6, stop_token_ids=(7,), eos=(2,)),
    ],
)
def test_a_draft_s_rows_are_adjusted_as_if_they_came_together(params: LogitParams, in_part: bool) -> None:
    """Token by token on the device, as the target's rows all at once; over all tokens, or a part of them."""
    prompt, output, draft = (1, 1, 4), [2, 3, 3, 30], [3, 6, 6, 1, 7]
    processor = LogitProcessor(replace(params, prompt=prompt), None, 300, torch.device("cpu"))
    logits, ids = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)), torch.arange(300)
    expected = processor(logits, output, draft)
    if in_part:
        vocabulary = DraftVocabulary(64, 300, [*range(200, 230), 7, 5, 3])
        processor, ids = processor.over(vocabulary), torch.from_numpy(vocabulary.ids)
    following = processor.following(output)
    for row, adjusted, token in zip(logits, expected, [*draft, 0], strict=True):
        before = row.clone()
        torch.testing.assert_close(following(row[None, ids])[0], adjusted[ids])
        assert torch.equal(row, before)
        following.write(torch.tensor([token]))


@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
def test_greedy_text_is_that_of_transformers_processors(
    world: World, tiny_network: Callable[..., PreTrainedModel], strategy: str, gamma: int | str
) -> None:
    """An independent reference: the same network, with transformers' own generate and its logits processors."""
    bias, penalty = {3: 0.8, 5: -1.5}, 1.4
    prompt = world.prompt().tokens
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(penalty),
        ]
    )
    ids = torch.tensor([prompt])
    network = tiny_network(12, seed=1, layers=1)
    whole = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        logits_processor=processors,
    )
    params = LogitParams(logit_bias=bias, repetition_penalty=penalty)
    request = world.request(strategy=strategy, gamma=gamma, max_tokens=24, logits=params)
    expected = whole[0, len(prompt) :].tolist()
    assert run(request, world.backend()).tokens == expected
    assert run(replace(request, logits=LogitParams()), world.backend()).tokens != expected


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
def test_greedy_text_is_the_argmax_of_adjusted_logits(
    world: World, strategy: str, gamma: int | str, overlap: bool
) -> None:
    prompt, output = world.prompt().tokens, list[int]()
    for _ in range(24):
        logits = adjusted(EVERY, logits_after(world.target.model, prompt + output), prompt, output)
        output.append(int(logits.argmax()))
    request = world.request(strategy=strategy, gamma=gamma, max_tokens=24, logits=EVERY)
    assert run(request, world.backend(overlap=overlap)).tokens == output


@pytest.mark.parametrize("strategy", ["speculative", "lookup"])
def test_lossless_strategies_follow_the_adjusted_distribution(make_world: Callable[..., World], strategy: str) -> None:
    """All continuations of 3 tokens, over several rounds, against the product of closed forms."""
    world, sampling, size = make_world(5), SamplingParams(temperature=0.9), 5
    params = replace(EVERY, logit_bias={2: 0.5, 3: -1.0}, frequency_penalty=1.5)
    prompt = world.prompt("abcabbcacbaabcabca\n\nab")
    exact = np.ones((size, size, size))
    for n in range(3):
        for prefix in itertools.product(range(size), repeat=n):
            z = logits_after(world.target.model, prompt.tokens + list(prefix))
            p = probabilities(adjusted(params, z, prompt.tokens, list(prefix)), sampling)
            exact[prefix] *= p.numpy().reshape(-1, *[1] * (2 - n))
    request = world.request(
        strategy=strategy, gamma=2, max_tokens=3, prompt=prompt, sampling=sampling, draft_top_k=3, logits=params
    )
    assert_follows(many(world, request, 1000, 3).ravel(), exact.ravel())


def first_token(world: World, rule: str, params: LogitParams, sampling: SamplingParams) -> tuple[Any, Any, Any]:
    """(the rule's law of the first token, p, a request for it) with η = 8 and a truncated q."""
    eta, top_k = 8.0, 4
    prompt = world.prompt()
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)
    z, q = (
        adjusted(params, logits_after(engine.model, tokens), prompt.tokens, [])
        for engine, tokens in ((world.target, prompt.tokens), (world.drafter, short))
    )
    weights, indices = probabilities(q, sampling).topk(top_k)
    draft_probs = np.zeros(len(q))
    draft_probs[indices.numpy()] = (weights / weights.sum()).numpy()
    expected, p = (law(r, z.double().numpy(), draft_probs, eta, sampling.temperature) for r in (rule, "lossless"))
    how = {"verification": rule, "transfer_strength": eta, "draft_top_k": top_k}
    return expected, p, world.request(gamma=4, max_tokens=2, sampling=sampling, logits=params, **how)


@pytest.mark.parametrize("rule", ["published", "augmented"])
def test_rules_transfer_between_adjusted_distributions(make_world: Callable[..., World], rule: str) -> None:
    """The drafter's penalties count the target's prompt, so its q is the one that the rule's law is of."""
    world = make_world(6)
    expected, p, request = first_token(world, rule, EVERY, SamplingParams(temperature=0.9))
    counts = many(world, request, 1000, 1)
    assert_follows(counts, expected)
    with pytest.raises(AssertionError):
        assert_follows(counts, p)


@pytest.mark.parametrize("rule", RULES)
def test_logprobs_are_of_the_law_that_was_sampled_from(make_world: Callable[..., World], rule: str) -> None:
    world = make_world(6)
    expected, _, request = first_token(world, rule, LogitParams(), SamplingParams(temperature=0.9))
    seen = set()
    for seed in range(20):
        sampling = replace(request.sampling, seed=seed)
        completion = run(replace(request, sampling=sampling, num_logprobs=6), world.backend())
        (chosen, top) = completion.deltas[0].logprobs[0]
        assert chosen.token == completion.tokens[0]
        assert [token.logprob for token in top] == sorted((token.logprob for token in top), reverse=True)
        chances = np.zeros(6)
        chances[[token.token for token in top]] = np.exp([token.logprob for token in top])
        np.testing.assert_allclose(chances, expected, atol=2e-5)
        assert chosen in top
        seen.add(chosen.token)
    assert len(seen) > 1


def logprobs(request: GenerationRequest, world: World) -> list[tuple[int, float]]:
    deltas, finish = asyncio.run(complete(request, world.backend()))
    entries = [entry for delta in deltas for entry in delta.logprobs] + finish.logprobs
    return [(entry.chosen.token, entry.chosen.logprob) for entry in entries]


@pytest.mark.parametrize(("strategy", "gamma"), STRATEGIES)
@pytest.mark.parametrize("params", [LogitParams(), EVERY])
def test_greedy_logprobs_are_of_the_unwarped_distribution(
    world: World, strategy: str, gamma: int | str, params: LogitParams
) -> None:
    request = world.request(strategy=strategy, gamma=gamma, max_tokens=20, num_logprobs=2, logits=params)
    entries = logprobs(request, world)
    prompt, output = world.prompt().tokens, [token for token, _ in entries]
    assert len(output) == 20
    for i, (token, logprob) in enumerate(entries):
        z = adjusted(params, logits_after(world.target.model, prompt + output[:i]), prompt, output[:i])
        assert abs(logprob - float(z.log_softmax(-1)[token])) < 1e-4


@pytest.mark.parametrize("gamma", [3, "auto"])
def test_lossless_logprobs_are_the_target_s_own_after_warping(world: World, gamma: int | str) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=5, seed=5)
    request = world.request(
        gamma=gamma, verification="lossless", max_tokens=30, sampling=sampling, num_logprobs=12, logits=EVERY
    )
    completion = run(request, world.backend())
    assert completion.statistics.accepted
    prompt = world.prompt().tokens
    entries = [entry for delta in completion.deltas for entry in delta.logprobs] + completion.finish.logprobs
    for i, (chosen, top) in enumerate(entries):
        written = completion.tokens[:i]
        z = adjusted(EVERY, logits_after(world.target.model, prompt + written), prompt, written)
        p = probabilities(z, sampling)
        assert abs(chosen.logprob - float(p[chosen.token].log())) < 1e-3
        assert len(top) == 5  # what top_k left; nothing without a chance is listed


def test_nobody_pays_who_does_not_ask(world: World) -> None:
    assert LogitParams().on([1, 2], world.target.model.info) is None
    completion = run(world.request(), world.backend())
    assert not any(delta.logprobs for delta in completion.deltas)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("repetition_penalty", [0.0, -1.0, float("inf"), float("nan")]),
        ("frequency_penalty", [-2.1, 2.1, float("nan")]),
        ("presence_penalty", [-2.1, 2.1]),
        ("logit_bias", [{1: 100.5}, {1: float("nan")}]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=param) as caught:
            LogitParams(**{param: value})
        assert caught.value.param == param


def test_a_biased_token_must_exist(world: World) -> None:
    with pytest.raises(InvalidRequest, match="no token 12") as caught:
        run(world.request(logits=LogitParams(logit_bias={12: 1.0})), world.backend())
    assert caught.value.param == "logit_bias"
