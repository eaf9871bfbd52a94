"""The decode loop: what it writes, where it ends, and what it tells of itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from world import Retrieval, World, first_eight, greedily, run, unsure

from rapid.backend.local import LocalBackend
from rapid.engine.engine import Engine
from rapid.errors import ContextLengthExceeded, InvalidRequest, ModelMismatch
from rapid.events import Statistics
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.speculation.controller import MAX_DRAFT_TOKENS
from rapid.speculation.params import SpeculationParams
from rapid.speculation.verification import RULES
from rapid.strategies import STRATEGIES

MakeEngine = Callable[..., Engine]


# Strategies and rules


@pytest.mark.parametrize("gamma", [0, 1, 2, 5, 11, 12, 30, "auto"])
def test_greedy_output_is_the_target_s_own_for_every_strategy_and_rule(world: World, gamma: int | str) -> None:
    expected = greedily(world.target.model, world.prompt().tokens, 12)
    for strategy in ("autoregressive", "lookup", "speculative", "magicdec", "triforce"):
        assert run(world.request(strategy=strategy, gamma=gamma), world.backend()).tokens == expected
    for rule in RULES:
        request = world.request(gamma=gamma, verification=rule, transfer_strength=20.0)
        assert run(request, world.backend()).tokens == expected


def test_one_engine_in_both_roles(world: World) -> None:
    backend = LocalBackend(world.target, world.target, first_eight)
    completion = run(world.request(), backend)
    assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 12)
    assert completion.statistics.drafted > 0
    assert world.num_sequences() == 0


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_rag_decodes_the_shortened_prompt_with_the_chosen_model(world: World, role: str) -> None:
    prompt = world.prompt()
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)
    assert len(short) == 8 + 4
    completion = run(world.request(strategy="rag", rag_model=role), world.backend())
    assert completion.tokens == greedily(getattr(world, role).model, short, 12)
    assert (completion.statistics.drafted, completion.statistics.fallback) == (0, None)
    assert completion.statistics.retrieved_tokens == 8


def test_the_retriever_is_asked_for_the_context_and_the_query(world: World) -> None:
    asked = []

    def retrieve(*question: Any) -> Retrieval:
        asked.append(question)
        return first_eight(*question)

    for strategy in STRATEGIES:
        run(world.request(strategy=strategy, retrieval={"mode": strategy}), world.backend(retrieve))
    expected = [(["abcabbcacbaabcabca"], "ab", {"mode": s}) for s in ("rag", "speculative_rag", "speculative", "rapid")]
    assert asked == expected


# Where it ends


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gamma", [0, 1, 4, 10, "auto"])
def test_max_tokens_is_honoured_exactly(world: World, strategy: str, gamma: int | str) -> None:
    for max_tokens in (1, 2, 3, 7, 12):
        for verification in ("published", "augmented"):
            request = world.request(
                strategy=strategy,
                gamma=gamma,
                max_tokens=max_tokens,
                sampling=SamplingParams(seed=max_tokens),
                verification=verification,
            )
            completion = run(request, world.backend())
            assert len(completion.tokens) == max_tokens
            assert completion.finish.reason == "length"
            assert completion.text == world.tokenizer.decode(completion.tokens)


def test_without_max_tokens_the_default_or_the_window_ends_it(make_world: Callable[..., World]) -> None:
    world = make_world(window=40)
    room = 40 - len(world.prompt().tokens)
    for strategy in STRATEGIES:
        request = world.request(strategy=strategy, max_tokens=None, default_max_tokens=9)
        assert len(run(request, world.backend()).tokens) == 9
    for strategy in ("autoregressive", "lookup", "speculative", "magicdec", "triforce", "rapid"):
        request = world.request(strategy=strategy, max_tokens=None, gamma=10)
        assert len(run(request, world.backend()).tokens) == room


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gamma", [1, 6, "auto"])
def test_an_end_of_sequence_ends_it(make_world: Callable[..., World], strategy: str, gamma: int | str) -> None:
    """Nothing comes after the first end of sequence, be it drafted, recovered or the bonus."""
    world = make_world(6, eos=4)
    reasons = set()
    for seed in range(30):
        request = world.request(strategy=strategy, gamma=gamma, sampling=SamplingParams(seed=seed), max_tokens=3)
        completion = run(request, world.backend())
        reasons.add(completion.finish.reason)
        if completion.finish.reason == "stop":
            assert completion.tokens.index(4) == len(completion.tokens) - 1
        else:
            assert 4 not in completion.tokens
            assert len(completion.tokens) == 3
        assert completion.statistics.emitted == len(completion.tokens)
        assert completion.statistics.accepted <= completion.statistics.drafted
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("strategy", ["autoregressive", "rapid"])
def test_a_stop_string_across_tokens_ends_it(world: World, strategy: str) -> None:
    """Every letter is a token, so a stop string of letters always crosses their borders."""
    request = world.request(strategy=strategy, gamma=6, sampling=SamplingParams(seed=3), max_tokens=40)
    whole = run(request, world.backend()).text
    for start, length in ((5, 2), (17, 3), (30, 5)):
        stop = whole[start : start + length]
        completion = run(replace(request, stop=("never", stop)), world.backend())
        assert completion.finish.reason == "stop"
        assert stop not in completion.text
        assert completion.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "speculative", "magicdec", "triforce", "rapid"])
def test_a_prompt_too_long_is_refused_with_its_numbers(make_world: Callable[..., World], strategy: str) -> None:
    world = make_world(window=40)
    tokens = len(world.prompt().tokens)
    run(world.request(strategy=strategy, max_tokens=40 - tokens), world.backend())
    with pytest.raises(ContextLengthExceeded) as caught:
        run(world.request(strategy=strategy, max_tokens=41 - tokens), world.backend())
    error = caught.value
    assert (error.prompt_tokens, error.max_tokens, error.window) == (tokens, 41 - tokens, 40)
    too_long = world.prompt("ab" * 20 + "\n\nab")
    with pytest.raises(ContextLengthExceeded) as caught:
        run(world.request(strategy=strategy, prompt=too_long, max_tokens=None), world.backend())
    assert (caught.value.prompt_tokens, caught.value.window) == (44, 40)
    assert world.num_sequences() == 0


def test_rag_only_needs_room_for_the_shortened_prompt(make_world: Callable[..., World]) -> None:
    world = make_world(window=40)
    prompt = world.prompt("ab" * 30 + "\n\nab")
    completion = run(world.request(strategy="rag", prompt=prompt, max_tokens=28), world.backend())
    assert len(completion.tokens) == 28
    with pytest.raises(ContextLengthExceeded) as caught:
        run(world.request(strategy="rag", prompt=prompt, max_tokens=29), world.backend())
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.window) == (12, 29, 40)


# Fallbacks, statistics, parameters


def test_rag_beyond_the_window_reads_the_best_passages_however_unsure(make_world: Callable[..., World]) -> None:
    """Below the threshold it reads the whole context where that fits, and else the passages, and does not fail."""
    world = make_world(window=40)
    short, long = world.prompt("ab" * 10 + "\n\nab"), world.prompt("ab" * 30 + "\n\nab")
    for prompt, max_tokens, reads_all in (
        (short, 16, True),
        (short, 17, False),
        (short, None, True),
        (long, 28, False),
    ):
        completion = run(world.request(strategy="rag", prompt=prompt, max_tokens=max_tokens), world.backend(unsure))
        stats = completion.statistics
        assert (stats.fallback, stats.retrieved_tokens) == (("nothing_above_threshold", 0) if reads_all else (None, 8))
        assert stats.confidence == 0.125
        read = prompt.tokens if reads_all else prompt.shortened(unsure(prompt.contents, "", None).chunks)
        assert completion.tokens == greedily(world.target.model, read, len(completion.tokens))


@pytest.mark.parametrize("strategy", ["speculative", "rapid"])
def test_drafts_from_passages_below_the_threshold_do_not_move_the_output(world: World, strategy: str) -> None:
    def text(retrieve: Any, strength: float) -> tuple[list[int], Statistics]:
        sampling = SamplingParams(temperature=1.0, seed=5)
        request = world.request(strategy=strategy, sampling=sampling, max_tokens=40, transfer_strength=strength)
        completion = run(request, world.backend(retrieve))
        return completion.tokens, completion.statistics

    tokens, stats = text(unsure, 50.0)
    assert (stats.fallback, stats.confidence) == ("nothing_above_threshold", 0.125)
    assert stats.draft_prompt_tokens > 0 and stats.chunks and stats.drafted > 0
    assert tokens == text(first_eight, 0.0)[0]
    assert (tokens == text(first_eight, 50.0)[0]) == (strategy == "speculative")


def nothing(contents: list[str], query: str, options: Any) -> Retrieval:
    return Retrieval([], len(contents[0]), 0)


@pytest.mark.parametrize("strategy", ["speculative", "rapid", "rag"])
def test_without_chunks_the_target_decodes_alone(world: World, strategy: str) -> None:
    for text, retrieve, reason in (
        ("abc\n\nab", first_eight, "no_long_context"),
        ("abcabbcacbaabcabca\n\nab", nothing, "nothing_above_threshold"),
    ):
        prompt = world.prompt(text)
        completion = run(world.request(strategy=strategy, prompt=prompt), world.backend(retrieve))
        assert completion.tokens == greedily(world.target.model, prompt.tokens, 12)
        stats = completion.statistics
        assert stats.fallback == reason
        assert stats.drafted == stats.lookup_drafted  # by the text itself, if at all
        if strategy != "rapid":
            assert (stats.drafted, stats.acceptance_rate) == (0, None)


def test_a_drafter_whose_window_is_too_small_is_left_out(make_world: Callable[..., World]) -> None:
    """The shortened prompt, the output, and the longest draft have to fit."""
    for missing in (0, 1):
        world = make_world(drafter_window=12 + 12 + MAX_DRAFT_TOKENS - missing)
        completion = run(world.request(), world.backend())
        stats = completion.statistics
        assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 12)
        if missing:
            assert (stats.fallback, stats.drafted) == ("drafter_window_exceeded", stats.lookup_drafted)
        else:
            assert (stats.fallback, stats.draft_prompt_tokens, stats.lookup_drafted) == (None, 12, 0)
            assert stats.drafted > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_add_up(world: World, strategy: str) -> None:
    request = world.request(strategy=strategy, gamma=4, sampling=SamplingParams(seed=5), max_tokens=31)
    completion = run(request, world.backend())
    stats = completion.statistics
    assert stats.strategy == strategy
    assert stats.rounds == len(completion.deltas)
    assert stats.emitted == len(completion.tokens) == 31
    assert stats.drafted == sum(delta.num_drafted for delta in completion.deltas)
    assert stats.accepted == sum(delta.num_accepted for delta in completion.deltas) <= stats.drafted
    assert stats.mean_accepted_length == 31 / stats.rounds
    assert stats.prompt_tokens == len(world.prompt().tokens)
    assert stats.emitted == stats.accepted + stats.rounds  # each round adds one token of the target's own
    by_lookup = [delta for delta in completion.deltas if delta.source == "lookup"]
    assert stats.lookup_drafted == sum(delta.num_drafted for delta in by_lookup)
    assert stats.lookup_accepted == sum(delta.num_accepted for delta in by_lookup)
    assert all((delta.source == "none") == (delta.num_drafted == 0) for delta in completion.deltas)
    drafters = STRATEGIES[strategy].drafters
    if any("Retrieval" in drafter for drafter in drafters):
        assert stats.acceptance_rate == stats.accepted / stats.drafted
        assert stats.draft_prompt_tokens == 12
    elif not drafters:
        assert stats.rounds == 31
    if strategy in ("rag", "speculative", "rapid"):
        assert (stats.context_tokens, stats.retrieved_tokens) == (18, 8)
        assert stats.chunks == [{"position": 0, "score": 0.5, "content": 0, "start": 0, "end": 8}]
        assert completion.deltas[-1].chunks == stats.chunks
    assert all(ms >= 0 for ms in stats.timings_ms.values())
    parts = sum(stats.timings_ms[part] for part in ("drafting", "verification", "transport"))
    assert 0 < parts <= stats.timings_ms["total"]


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("strategy", ["fast", ""]),
        ("num_draft_tokens", [-1, 65, "some"]),
        ("transfer_strength", [-0.1, 1001, float("nan")]),
        ("verification", ["typical"]),
        ("draft_top_k", [0, 4097]),
        ("rag_model", ["both"]),
        ("draft_cache", ["all", ""]),
        ("draft_cache_tokens", [31, 2**20 + 1]),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=param) as caught:
            SpeculationParams(**{param: value})
        assert caught.value.param == f"rapid.{param}"


def test_models_with_different_tokenizers_are_refused(
    tiny_network: Callable[..., PreTrainedModel],
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
    engine: MakeEngine,
) -> None:
    engines = [engine(Model(tiny_network(12), letter_tokenizer(size), "letters")) for size in (8, 9)]
    with pytest.raises(ModelMismatch):
        LocalBackend(*engines, first_eight)


def test_progress_of_the_prefill_is_told(world: World) -> None:
    told = []
    backend = LocalBackend(world.target, world.drafter, first_eight, on_prefill=lambda *now: told.append(now))
    run(world.request(), backend)
    total = len(world.prompt().tokens) - 1
    assert ("target", total, total) in told
    assert ("drafter", 11, 11) in told
