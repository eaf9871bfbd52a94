"""With a transfer temperature each token is drawn by its augmented logits, however it is drafted.

What is expected is computed in float64, token by token, from both models' logits on the whole text so far: the argmax
at temperature 0, the law of the tokens above it.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from counting import assert_follows, many
from running import logits_after
from world import Chunk, Retrieval, World, complete, first_eight, greedily, run

from benchmarks.common.closed_forms import Array, softmax
from benchmarks.output_law import EVERYWHERE, of_a_transfer_everywhere
from rapid.errors import InvalidRequest
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.params import SpeculationParams

LENGTH = 40


def drafter_probs(logits: Array, temperature: float, top_k: int) -> Array:
    q = softmax(logits / temperature)
    q[np.argsort(q)[:-top_k]] = 0
    return q / q.sum()


def augmented_logits(world: World, output: list[int], eta: float, temperature: float, top_k: int) -> Array:
    """z + η·Tₓ·(q − p) behind ``output``, with p and q at the transfer's ``temperature`` Tₓ."""
    prompt = world.prompt()
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)
    z, y = (
        logits_after(engine.model, tokens + output).double().numpy()
        for engine, tokens in ((world.target, prompt.tokens), (world.drafter, short))
    )
    q = drafter_probs(y, temperature, top_k)
    return np.asarray(z + eta * temperature * (q - softmax(z / temperature)))


def augmented_text(world: World, eta: float, temperature: float, top_k: int, num_tokens: int = LENGTH) -> list[int]:
    """The argmax of the augmented logits, token by token."""
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(int(augmented_logits(world, output, eta, temperature, top_k).argmax()))
    return output


def texts(world: World, **options: Any) -> list[int]:
    return run(world.request(max_tokens=LENGTH, **options), world.backend()).tokens


@pytest.mark.parametrize(("eta", "temperature", "top_k"), [(3.0, 1.0, 64), (10.0, 0.5, 4), (20.0, 2.0, 3)])
def test_every_gamma_writes_the_argmax_of_the_augmented_logits(
    world: World, eta: float, temperature: float, top_k: int
) -> None:
    expected = augmented_text(world, eta, temperature, top_k)
    assert expected != greedily(world.target.model, world.prompt().tokens, LENGTH)  # else nothing were shown
    how = {"transfer_strength": eta, "transfer_temperature": temperature, "draft_top_k": top_k}
    for gamma in (0, 1, 4, 10, "auto"):
        assert texts(world, gamma=gamma, **how) == expected
    for rule in ("augmented", "published"):
        assert texts(world, verification=rule, gamma=3, **how) == expected

    async def four() -> list[list[int]]:
        gammas = (1, 4, 10, "auto")
        requests = [world.request(max_tokens=LENGTH, gamma=gamma, **how) for gamma in gammas]
        return [each.tokens for each in await asyncio.gather(*(complete(r, world.backend()) for r in requests))]

    assert asyncio.run(four()) == [expected] * 4


@pytest.mark.parametrize("gamma", [1, 3, "auto"])
def test_drafting_ahead_writes_the_same(world: World, gamma: int | str) -> None:
    how = {"transfer_strength": 20.0, "transfer_temperature": 1.0}
    backend = world.patient_backend()
    completion = run(world.request(max_tokens=LENGTH, gamma=gamma, **how), backend)
    assert completion.tokens == augmented_text(world, 20.0, 1.0, 64)
    assert gamma == "auto" or completion.statistics.drafted_ahead > 0


@pytest.mark.parametrize("strength", [8.0, "auto"])
def test_a_seed_writes_the_same_above_temperature_0_whatever_was_drafted(world: World, strength: Any) -> None:
    sampling = SamplingParams(temperature=0.5, top_p=0.95, seed=3)
    how = {"transfer_strength": strength, "transfer_temperature": 1.0, "transfer_divergence": 4.0, "sampling": sampling}
    written = [texts(world, gamma=gamma, **how) for gamma in (0, 1, 4, 10, "auto")]
    ahead = run(world.request(max_tokens=LENGTH, gamma=1, **how), world.patient_backend())
    assert ahead.statistics.drafted_ahead > 0
    assert all(each == written[0] for each in [*written, ahead.tokens])
    assert written[0] != texts(world, gamma=4, **how | {"transfer_temperature": 0.0})
    assert written[0] != texts(world, gamma=4, **how | {"sampling": replace(sampling, seed=4)})


@pytest.mark.parametrize(("temperature", "transfer_temperature", "gamma"), [(0.5, 1.0, 2), (1.0, 0.7, "auto")])
def test_every_token_follows_the_augmented_logits(
    make_world: Callable[..., World], temperature: float, transfer_temperature: float, gamma: int | str
) -> None:
    """All continuations of three tokens: the first one, a drafted one, and one that would be a bonus."""
    world, size, eta, top_k, num = make_world(4), 4, 6.0, 3, 1000
    expected = np.ones((size,) * 3)
    target_s_own = expected.copy()
    for n in range(3):
        for prefix in itertools.product(range(size), repeat=n):
            logits = augmented_logits(world, list(prefix), eta, transfer_temperature, top_k)
            z = logits_after(world.target.model, world.prompt().tokens + list(prefix)).double().numpy()
            expected[prefix] *= softmax(logits / temperature).reshape(-1, *[1] * (2 - n))
            target_s_own[prefix] *= softmax(z / temperature).reshape(-1, *[1] * (2 - n))
    assert abs(expected - target_s_own).sum() / 2 > 0.1  # else nothing were shown
    how = {"transfer_strength": eta, "transfer_temperature": transfer_temperature, "draft_top_k": top_k}
    request = world.request(gamma=gamma, max_tokens=3, sampling=SamplingParams(temperature=temperature), **how)
    counts = many(world, request, num, 3)
    assert_follows(counts.ravel(), expected.ravel())
    with pytest.raises(AssertionError):
        assert_follows(counts.ravel(), target_s_own.ravel())


def test_each_place_of_a_round_follows_the_augmented_logits() -> None:
    rule, temperature, transfer_temperature, top_k = EVERYWHERE[0]
    found = of_a_transfer_everywhere(rule, 10.0, temperature, transfer_temperature, top_k, num_samples=200_000)
    assert found["samples"] >= 200_000 and found["total_variation"] < 0.01 < found["distance_to_target"] / 5


def test_log_probabilities_are_those_of_the_law(world: World) -> None:
    how = {"transfer_strength": 6.0, "transfer_temperature": 1.0, "draft_top_k": 4}
    request = world.request(max_tokens=8, gamma=3, sampling=SamplingParams(temperature=0.5, seed=1), **how)
    request = replace(request, num_logprobs=2)
    found = run(request, world.backend())
    logprobs = [each for delta in found.deltas for each in delta.logprobs]
    assert len(logprobs) == 8
    for i, each in enumerate(logprobs):
        logits = augmented_logits(world, found.tokens[:i], 6.0, 1.0, 4)
        law = np.log(softmax(logits / 0.5))
        assert each.chosen.logprob == pytest.approx(law[found.tokens[i]], abs=1e-4)
        assert [token.logprob for token in each.top] == pytest.approx(sorted(law)[:-3:-1], abs=1e-4)


def test_a_draft_that_stands_is_counted_and_no_round_is_plain(world: World) -> None:
    """γ tokens are scored in a round, and the token behind them is chosen with a q as well."""
    how = {"transfer_strength": 20.0, "transfer_temperature": 1.0}
    statistics = run(world.request(max_tokens=13, gamma=3, **how), world.backend()).statistics
    assert statistics.emitted == 13 and statistics.lookup_drafted == 0
    assert 0 < statistics.accepted <= statistics.drafted <= 3 * statistics.rounds
    assert statistics.emitted == statistics.accepted + statistics.rounds


@pytest.mark.parametrize(
    "options",
    [
        {"verification": "lossless", "transfer_temperature": 1.0},
        {"strategy": "speculative", "transfer_temperature": 1.0},
        {"strategy": "lookup", "transfer_temperature": 1.0},
        {"transfer_strength": 0.0, "transfer_temperature": 1.0},
        {"transfer_strength": "auto", "transfer_divergence": 0.0, "transfer_temperature": 1.0},
        {},
        {"transfer_temperature": 0.0},
    ],
)
def test_what_transfers_nothing_writes_the_target_s_own_text(world: World, options: dict[str, Any]) -> None:
    expected = greedily(world.target.model, world.prompt().tokens, LENGTH)
    assert texts(world, gamma=4, **options) == expected


def test_without_passages_the_text_is_the_target_s_own(world: World) -> None:
    expected = greedily(world.target.model, world.prompt().tokens, LENGTH)
    request = world.request(max_tokens=LENGTH, transfer_strength=20.0, transfer_temperature=1.0)
    completion = run(request, world.backend(lambda *_: Retrieval([])))
    assert completion.tokens == expected
    assert completion.statistics.fallback == "nothing_above_threshold"


@pytest.mark.parametrize(("confidence", "is_moved"), [(0.0, False), (0.9, True)])
def test_unrelated_passages_leave_the_target_s_own_text(world: World, confidence: float, is_moved: bool) -> None:
    """With η chosen, passages that retrieval is not sure of move nothing."""

    def retrieve(contents: list[str], query: str, options: Any) -> Retrieval:
        chunk = Chunk(0, contents[0][:8], 0, 0.5, 0, 8)
        return Retrieval([chunk], len(contents[0]), 8, confidence=confidence)

    expected = greedily(world.target.model, world.prompt().tokens, LENGTH)
    how = {"transfer_strength": "auto", "transfer_divergence": 2.0, "transfer_temperature": 1.0}
    written = {
        gamma: run(world.request(max_tokens=LENGTH, gamma=gamma, **how), world.backend(retrieve)).tokens
        for gamma in (1, 4, 10)
    }
    assert written[1] == written[4] == written[10]  # one η for each position, whatever the rounds
    assert (written[1] != expected) == is_moved


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("transfer_strength", "automatic"),
        ("transfer_strength", -1.0),
        ("transfer_temperature", -0.5),
        ("transfer_temperature", 11.0),
        ("transfer_divergence", -1.0),
        ("transfer_divergence", float("nan")),
    ],
)
def test_values_out_of_range_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=option) as caught:
        SpeculationParams(**{option: value})
    assert caught.value.param == f"rapid.{option}"


def test_a_grammar_and_penalties_hold_beside_a_transfer(make_world: Callable[..., World]) -> None:
    world = make_world()
    how = {"transfer_strength": 20.0, "transfer_temperature": 1.0, "logits": LogitParams(frequency_penalty=1.5)}
    written = [texts(world, gamma=gamma, **how) for gamma in (1, 4, "auto")]
    assert written[0] == written[1] == written[2]
    assert written[0] != augmented_text(world, 20.0, 1.0, 64)
