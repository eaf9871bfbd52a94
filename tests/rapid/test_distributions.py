"""Sampled outputs come as often as the strategy and its rule say, counted over many requests."""

import asyncio
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import assert_follows, many
from running import logits_after
from world import World, first_eight, run

from benchmarks.common.closed_forms import Array, augmented, bound, chosen_strength, law
from rapid.datastore.search import Datastore, Segment, suffix_array
from rapid.generate import generate_choices
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.sampling.sampler import probabilities
from rapid.speculation.verification import RULES


def next_probs(model: Model, tokens: list[int], sampling: SamplingParams) -> torch.Tensor:
    return probabilities(logits_after(model, tokens), sampling)


@pytest.mark.parametrize(
    ("strategy", "sampling", "num"),
    [
        ("speculative", SamplingParams(), 2000),
        ("speculative", SamplingParams(temperature=0.8, top_p=0.8), 1000),
        ("lookup", SamplingParams(), 1000),
        ("rest", SamplingParams(), 1000),
    ],
)
def test_lossless_strategies_write_what_the_target_would(
    make_world: Callable[..., World], strategy: str, sampling: SamplingParams, num: int
) -> None:
    """All continuations of 3 tokens, over several rounds, come as often as the target alone would write them."""
    world = make_world(5)
    prompt, size = world.prompt("abcabbcacbaabcabca\n\nab"), 5
    exact = np.ones((size, size, size))
    for n in range(3):
        for prefix in itertools.product(range(size), repeat=n):
            exact[prefix] *= (
                next_probs(world.target.model, prompt.tokens + list(prefix), sampling)
                .numpy()
                .reshape(-1, *[1] * (2 - n))
            )
    texts = np.random.default_rng(0).integers(0, size, 400).astype(np.uint32)
    datastore = Datastore([Segment(texts, suffix_array(texts))])
    how = {"prompt": prompt, "sampling": sampling, "datastore": datastore}
    request = world.request(strategy=strategy, gamma=2, max_tokens=3, draft_top_k=3, **how)
    counts = many(world, request, num, 3)
    assert_follows(counts.ravel(), exact.ravel())


@pytest.mark.parametrize("rule", ["published", "reference", "augmented"])
def test_rapid_writes_what_its_rule_says(make_world: Callable[..., World], rule: str) -> None:
    """The first token follows the rule's law: of p on the whole prompt, and the drafter's truncated q on the short."""
    world, sampling, eta, top_k = make_world(6), SamplingParams(temperature=0.9), 8.0, 4
    prompt = world.prompt()
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)
    tokens = prompt.tokens
    z = logits_after(world.target.model, tokens).double().numpy()
    q = np.zeros(6)
    weights, indices = next_probs(world.drafter.model, short, sampling).topk(top_k)
    q[indices.numpy()] = (weights / weights.sum()).numpy()
    expected = law(rule, z, q, eta, sampling.temperature)
    p = law("lossless", z, q, eta, sampling.temperature)
    assert abs(expected - p).sum() / 2 > 0.1  # else the test could not tell the rules apart

    request = world.request(
        gamma=4, max_tokens=2, sampling=sampling, verification=rule, transfer_strength=eta, draft_top_k=top_k
    )
    counts = many(world, request, 1000, 1)
    assert_follows(counts, expected)
    with pytest.raises(AssertionError):
        assert_follows(counts, p)


def test_a_chosen_strength_writes_exactly_p_hat(make_world: Callable[..., World]) -> None:
    """The first token, with the η that the bound allows: passages of confidence 0.5 move half as far as sure ones."""
    world, sampling, top_k = make_world(6), SamplingParams(temperature=0.9), 4
    prompt = world.prompt()
    retrieval = first_eight(prompt.contents, prompt.query, None)
    assert retrieval.confidence == 0.5
    short = prompt.shortened(retrieval.chunks)
    z = logits_after(world.target.model, prompt.tokens).double().numpy()
    q = np.zeros(6)
    weights, indices = next_probs(world.drafter.model, short, sampling).topk(top_k)
    q[indices.numpy()] = (weights / weights.sum()).numpy()
    epsilon = bound(z, q, 2.0 * retrieval.confidence, 0.9)
    eta = chosen_strength("augmented", z, q, epsilon, 0.9, confidence=retrieval.confidence)
    expected = augmented("augmented", z, q, eta, 0.9)
    p = law("lossless", z, q, eta, 0.9)
    assert abs(expected - p).sum() / 2 > 0.1

    how = {"transfer_strength": "auto", "transfer_divergence": 2.0, "verification": "augmented", "draft_top_k": top_k}
    request = world.request(gamma=4, max_tokens=2, sampling=sampling, **how)
    counts = many(world, request, 500, 1)
    assert_follows(counts, expected)
    with pytest.raises(AssertionError):
        assert_follows(counts, p)


@pytest.mark.parametrize("rule", RULES)
def test_drafting_ahead_changes_no_rule_s_law(make_world: Callable[..., World], rule: str) -> None:
    """All continuations of 4 tokens, over several rounds, some of which were drafted while the last was verified."""
    world, sampling, eta, top_k = make_world(4), SamplingParams(temperature=0.9), 8.0, 3
    prompt = world.prompt("abcabbcacbaabcabca\n\nab")
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)

    @functools.cache
    def p_and_z_of(*written: int) -> tuple[torch.Tensor, Array]:
        logits = logits_after(world.target.model, prompt.tokens + list(written))
        return probabilities(logits, sampling).double(), logits.double().numpy()

    @functools.cache
    def q_of(*written: int) -> torch.Tensor:
        q = torch.zeros(4, dtype=torch.float64)
        weights, indices = next_probs(world.drafter.model, short + list(written), sampling).double().topk(top_k)
        q[indices] = weights / weights.sum()
        return q

    def continuations(written: list[int], chance: float) -> None:
        """Adds up the chances of all outputs that go on from ``written``, where a round begins."""
        if len(written) >= 4:
            exact[tuple(written[:4])] += chance
            return
        (p, z), q = p_and_z_of(*written), q_of(*written)
        accepted = torch.minimum(q, RULES[rule].augment(p, q, eta))
        all_of_it = torch.from_numpy(law(rule, z, q.numpy(), eta, sampling.temperature))
        for token in range(4):
            continuations([*written, token], chance * float(all_of_it[token] - accepted[token]))
            bonus, _ = p_and_z_of(*written, token)
            for after in range(4):
                continuations([*written, token, after], chance * float(accepted[token] * bonus[after]))

    exact = np.zeros((4, 4, 4, 4))
    continuations([], 1.0)
    request = world.request(
        gamma=1,
        max_tokens=6,  # a round that may write one token alone drafts none
        sampling=sampling,
        prompt=prompt,
        verification=rule,
        transfer_strength=eta,
        draft_top_k=top_k,
    )
    counts = many(world, request, 500, 4, overlap=True, workers=4)
    assert_follows(counts.ravel(), exact.ravel())


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "lookup"])
def test_texts_that_stop_and_several_choices_are_as_likely_as_the_target_makes_them(
    make_world: Callable[..., World], strategy: str
) -> None:
    """The texts of up to 3 tokens, cut at a stop string; and of two choices, that neither depends on the other."""
    world, sampling, stops = make_world(4), SamplingParams(temperature=0.9), ("ba", "\n")
    prompt = world.prompt("abcabbcacbaabcabca\n\nab")

    @functools.cache
    def after(*written: int) -> torch.Tensor:
        return next_probs(world.target.model, prompt.tokens + list(written), sampling).double()

    exact, begins = Counter[str](), Counter[str]()
    for tokens in itertools.product(range(4), repeat=3):
        chance = float(torch.stack([after(*tokens[:i])[token] for i, token in enumerate(tokens)]).prod())
        text = "".join("\n ab"[token] for token in tokens)
        text = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=3)]
        exact[text] += chance
        begins[text[:1]] += chance

    request = world.request(
        strategy=strategy, gamma=2, max_tokens=3, prompt=prompt, sampling=sampling, draft_top_k=3, stop=stops
    )
    seen, pairs = Counter[str](), Counter[tuple[str, ...]]()
    backend, seeds = world.backend(), iter(range(0, 2000, 2))  # two choices have two seeds

    async def worker() -> None:
        for seed in seeds:
            texts = ["", ""]
            seeded = replace(request, sampling=replace(sampling, seed=seed))
            async for event in generate_choices(seeded, 2, backend):
                texts[event.choice] += event.text
            seen.update(texts)
            pairs[tuple(text[:1] for text in texts)] += 1

    async def all_workers() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(worker())

    asyncio.run(all_workers())
    assert seen.total() == 2000 and seen.keys() <= exact.keys()
    assert_follows(np.array([seen[text] for text in exact]), np.array(list(exact.values())))
    both = list(itertools.product(begins, repeat=2))
    expected = np.array([begins[first] * begins[second] for first, second in both])
    assert_follows(np.array([pairs[pair] for pair in both]), expected)


@pytest.mark.parametrize("gamma", [3, "auto"])
def test_a_seed_reproduces_and_another_differs(world: World, gamma: int | str) -> None:
    def tokens(seed: int | None) -> list[int]:
        request = world.request(sampling=SamplingParams(seed=seed), max_tokens=30, gamma=gamma)
        return run(request, world.backend()).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
