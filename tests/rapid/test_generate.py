"""The decode loop end to end, on models so small that every output and its probability can be enumerated."""

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gate import Gate
from transformers import PreTrainedTokenizerFast

from benchmarks.closed_forms import Array, law
from rapid.engine import Engine
from rapid.errors import ContextLengthExceeded, InvalidRequest, ModelMismatch, SequenceClosed
from rapid.generate import STRATEGIES, Delta, Finish, GenerationRequest, SpeculationParams, Statistics, generate
from rapid.local import LocalBackend
from rapid.model import Model
from rapid.prompts import Prompt, read_text
from rapid.sampling import SamplingParams, probabilities, truncate
from rapid.speculative import RULES

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0)


class Chunk(NamedTuple):
    content: int
    text: str
    position: int
    score: float


class Retrieval(NamedTuple):
    chunks: list[Chunk]
    context_tokens: int = 0
    retrieved_tokens: int = 0


def first_eight(contents: list[str], query: str, options: Any) -> Retrieval:
    """A retriever that keeps the first 8 letters of the first content."""
    return Retrieval([Chunk(0, contents[0][:8], 0, 0.5)], len(contents[0]), 8)


class Completion(NamedTuple):
    deltas: list[Delta]
    finish: Finish

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas) + self.finish.text

    @property
    def statistics(self) -> Statistics:
        return self.finish.statistics


async def complete(request: GenerationRequest, backend: LocalBackend) -> Completion:
    *deltas, finish = [event async for event in generate(request, backend)]
    return Completion(deltas, finish)


def run(request: GenerationRequest, backend: LocalBackend) -> Completion:
    return asyncio.run(complete(request, backend))


class World(NamedTuple):
    """A target and a drafter that disagree, on a vocabulary of letters."""

    target: Engine
    drafter: Engine
    tokenizer: PreTrainedTokenizerFast

    def backend(self, retrieve: Callable[..., Retrieval] = first_eight) -> LocalBackend:
        return LocalBackend(self.target, self.drafter, retrieve)

    def prompt(self, text: str = "abcabbcacbaabcabca\n\nab") -> Prompt:
        return read_text(text, self.tokenizer, long_content_tokens=10)

    def request(
        self, *, strategy: str = "rapid", gamma: int = 3, max_tokens: int | None = 12, **options: Any
    ) -> GenerationRequest:
        options.setdefault("sampling", GREEDY)
        options.setdefault("prompt", self.prompt())
        speculation = SpeculationParams(
            strategy=strategy,
            num_draft_tokens=gamma,
            **{name: options.pop(name) for name in list(options) if name in SpeculationParams.__dataclass_fields__},
        )
        return GenerationRequest(speculation=speculation, max_tokens=max_tokens, **options)

    def num_sequences(self) -> int:
        return self.target.stats().num_sequences + self.drafter.stats().num_sequences


@pytest.fixture
def make_world(
    tiny_model: MakeModel, letter_tokenizer: Callable[[int], PreTrainedTokenizerFast], engine: MakeEngine
) -> Callable[..., World]:
    def make(
        vocab_size: int = 12,
        *,
        eos: int | None = None,
        window: int = 512,
        drafter_window: int = 512,
        max_batch_tokens: int = 512,
    ) -> World:
        target = tiny_model(vocab_size, seed=1, layers=1, eos=eos, window=window)
        drafter = tiny_model(vocab_size, seed=2, layers=1, eos=eos, window=drafter_window)
        engines = [engine(model, max_batch_tokens=max_batch_tokens) for model in (target, drafter)]
        return World(*engines, letter_tokenizer(vocab_size))

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


# Strategies and rules


def greedily(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    """Plain decoding, the whole text anew for every token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model.forward([(model.new_cache(len(tokens)), tokens, 1)])[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("gamma", [0, 1, 2, 5, 11, 12, 30])
def test_greedy_output_is_the_target_s_own_for_every_strategy_and_rule(world: World, gamma: int) -> None:
    expected = greedily(world.target.model, world.prompt().tokens, 12)
    for strategy in ("autoregressive", "speculative"):
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
    expected = [(["abcabbcacbaabcabca"], "ab", {"mode": s}) for s in ("rag", "speculative", "rapid")]
    assert asked == expected


# Distributions


def pearson(observed: Array, expected: Array) -> tuple[float, int]:
    """The chi-square statistic and its degrees of freedom; outcomes expected under 5 times count as one."""
    rare = expected < 5
    observed, expected = (
        np.append(counts[~rare], counts[rare].sum()) if rare.any() else counts for counts in (observed, expected)
    )
    return float(((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()), len(expected) - 1


def assert_follows(observed: Array, probs: Array) -> None:
    """Counts of independent draws agree with ``probs``: 5 standard deviations of chi-square, under one in 100,000."""
    assert abs(probs.sum() - 1) < 1e-5
    assert observed[probs == 0].sum() == 0
    statistic, degrees = pearson(observed, observed.sum() * probs)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


def many(world: World, request: GenerationRequest, num: int, num_tokens: int) -> Array:
    """Counts of the first ``num_tokens`` tokens of ``num`` completions with different seeds: [V, V, …]."""
    counts = np.zeros([world.target.model.vocab_size] * num_tokens)
    backend, seeds = world.backend(), iter(range(num))

    async def worker() -> None:
        for seed in seeds:
            completion = await complete(replace(request, sampling=replace(request.sampling, seed=seed)), backend)
            counts[tuple(completion.tokens[:num_tokens])] += 1

    async def workers() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(worker())

    asyncio.run(workers())
    assert counts.sum() == num
    return counts


def next_probs(model: Model, tokens: list[int], sampling: SamplingParams) -> torch.Tensor:
    return probabilities(model.forward([(model.new_cache(len(tokens)), tokens, 1)])[0][0], sampling)


@pytest.mark.parametrize(
    ("sampling", "num"), [(SamplingParams(), 2000), (SamplingParams(temperature=0.8, top_p=0.8), 1000)]
)
def test_speculative_decoding_writes_what_the_target_would(
    make_world: Callable[..., World], sampling: SamplingParams, num: int
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
    request = world.request(
        strategy="speculative", gamma=2, max_tokens=3, prompt=prompt, sampling=sampling, draft_top_k=3
    )
    counts = many(world, request, num, 3)
    assert_follows(counts.ravel(), exact.ravel())


@pytest.mark.parametrize("rule", ["published", "reference", "augmented"])
def test_rapid_writes_what_its_rule_says(make_world: Callable[..., World], rule: str) -> None:
    """The first token follows the rule's law: of p on the whole prompt, and the drafter's truncated q on the short."""
    world, sampling, eta, top_k = make_world(6), SamplingParams(temperature=0.9), 8.0, 4
    prompt = world.prompt()
    short = prompt.shortened(first_eight(prompt.contents, prompt.query, None).chunks)
    tokens = prompt.tokens
    z = world.target.model.forward([(world.target.model.new_cache(len(tokens)), tokens, 1)])[0][0].double().numpy()
    q = np.zeros(6)
    indices, weights = truncate(next_probs(world.drafter.model, short, sampling), top_k)
    q[indices.numpy()] = weights.numpy()
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


def test_a_seed_reproduces_and_another_differs(world: World) -> None:
    def tokens(seed: int | None) -> list[int]:
        request = world.request(sampling=SamplingParams(seed=seed), max_tokens=30)
        return run(request, world.backend()).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


# Where it ends


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gamma", [0, 1, 4, 10])
def test_max_tokens_is_honoured_exactly(world: World, strategy: str, gamma: int) -> None:
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
    for strategy in ("autoregressive", "speculative", "rapid"):
        request = world.request(strategy=strategy, max_tokens=None, gamma=10)
        assert len(run(request, world.backend()).tokens) == room


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gamma", [1, 6])
def test_an_end_of_sequence_ends_it(make_world: Callable[..., World], strategy: str, gamma: int) -> None:
    """Nothing comes after the first end of sequence, be it drafted, recovered or the bonus."""
    world = make_world(6, eos=4)
    reasons = set()
    for seed in range(20):
        request = world.request(strategy=strategy, gamma=gamma, sampling=SamplingParams(seed=seed), max_tokens=4)
        completion = run(request, world.backend())
        reasons.add(completion.finish.reason)
        if completion.finish.reason == "stop":
            assert completion.tokens.index(4) == len(completion.tokens) - 1
        else:
            assert 4 not in completion.tokens
            assert len(completion.tokens) == 4
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


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative", "rapid"])
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
        assert completion.statistics.fallback == reason
        assert (completion.statistics.drafted, completion.statistics.acceptance_rate) == (0, None)


def test_a_drafter_whose_window_is_too_small_is_left_out(make_world: Callable[..., World]) -> None:
    world = make_world(drafter_window=12 + 12 + 3)
    fits = run(world.request(gamma=3), world.backend()).statistics
    assert (fits.fallback, fits.draft_prompt_tokens) == (None, 12)
    completion = run(world.request(gamma=4), world.backend())
    assert completion.statistics.fallback == "drafter_window_exceeded"
    assert completion.statistics.drafted == 0
    assert completion.tokens == greedily(world.target.model, world.prompt().tokens, 12)


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
    if STRATEGIES[strategy].drafts:
        assert stats.emitted == stats.accepted + stats.rounds  # each round adds one token of the target's own
        assert stats.acceptance_rate == stats.accepted / stats.drafted
        assert stats.draft_prompt_tokens == 12
    else:
        assert stats.rounds == 31
    if STRATEGIES[strategy].retrieves:
        assert (stats.context_tokens, stats.retrieved_tokens) == (18, 8)
        assert stats.chunks == [{"position": 0, "score": 0.5}]
    assert all(ms >= 0 for ms in stats.timings_ms.values())
    parts = sum(stats.timings_ms[part] for part in ("drafting", "verification", "transport"))
    assert 0 < parts <= stats.timings_ms["total"]


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("strategy", ["fast", ""]),
        ("num_draft_tokens", [-1, 65]),
        ("transfer_strength", [-0.1, 1001, float("nan")]),
        ("verification", ["typical"]),
        ("draft_top_k", [0, 4097]),
        ("rag_model", ["both"]),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(param: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=param) as caught:
            SpeculationParams(**{param: value})
        assert caught.value.param == f"rapid.{param}"


def test_models_with_different_tokenizers_are_refused(
    tiny_model: MakeModel, letter_tokenizer: Callable[[int], PreTrainedTokenizerFast], engine: MakeEngine
) -> None:
    engines = [engine(Model(tiny_model(12).network, letter_tokenizer(size), "letters")) for size in (8, 9)]
    with pytest.raises(ModelMismatch):
        LocalBackend(*engines, first_eight)


def test_progress_of_the_prefill_is_told(world: World) -> None:
    told = []
    backend = LocalBackend(world.target, world.drafter, first_eight, on_prefill=lambda *now: told.append(now))
    run(world.request(), backend)
    total = len(world.prompt().tokens) - 1
    assert ("target", total, total) in told
    assert ("drafter", 11, 11) in told


# Endings that are no end


def quietly(main: Callable[[], Any]) -> None:
    """Runs ``main()``; nothing may be left behind that asyncio complains about when it is collected."""
    complaints: list[dict[str, Any]] = []

    async def listening() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await main()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(listening())
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_closing_the_iterator_early_frees_everything(world: World, strategy: str) -> None:
    async def main() -> None:
        completion = generate(world.request(strategy=strategy, max_tokens=400), world.backend())
        assert isinstance(await anext(completion), Delta)
        assert world.num_sequences() == (2 if STRATEGIES[strategy].drafts else 1)
        await completion.aclose()
        assert world.num_sequences() == 0

    quietly(main)


@pytest.mark.parametrize("waits_for", ["target", "drafter"])
@pytest.mark.parametrize("passes", [0, 1, 2, 3])
def test_cancelling_the_reader_frees_everything(
    make_world: Callable[..., World], gates: Callable[[Model], Gate], waits_for: str, passes: int
) -> None:
    """In the middle of a prefill, a draft or a verification."""
    world = make_world(max_batch_tokens=10)
    gate = gates(getattr(world, waits_for).model)

    async def main() -> None:
        await cancelled_at(gate, passes, world)
        assert world.num_sequences() == 0
        gate.open()
        assert (await complete(world.request(), world.backend())).finish.reason == "length"

    asyncio.run(main())


async def cancelled_at(gate: Gate, passes: int, world: World) -> None:
    """A reader that is cancelled while its model is held at its gate, after so many passes."""
    reading = asyncio.create_task(complete(world.request(max_tokens=100), world.backend()))
    await asyncio.to_thread(gate.wait)
    for _ in range(passes):
        await asyncio.to_thread(gate.step)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


def test_a_cancelled_prefill_leaves_nothing_to_complain_about(
    make_world: Callable[..., World], gates: Callable[[Model], Gate]
) -> None:
    world = make_world(max_batch_tokens=10)
    gate = gates(world.target.model)

    async def main() -> None:
        await cancelled_at(gate, 0, world)
        gate.open()
        await complete(world.request(), world.backend())

    quietly(main)


def test_cancelling_during_the_retrieval_does_not_wait_for_it(world: World) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(*question: Any) -> Retrieval:
        asked.set()
        assert answer.wait(30)
        return first_eight(*question)

    async def main() -> None:
        reading = asyncio.create_task(complete(world.request(), world.backend(slow)))
        await asyncio.to_thread(asked.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert world.num_sequences() == 0
        answer.set()

    quietly(main)


@pytest.mark.parametrize("strategy", ["rag", "speculative", "rapid"])
def test_a_failing_retrieval_is_raised_as_itself(world: World, strategy: str) -> None:
    def failing(*question: Any) -> Retrieval:
        raise LookupError("the store is down")

    async def main() -> None:
        with pytest.raises(LookupError, match="the store is down"):
            await complete(world.request(strategy=strategy), world.backend(failing))
        assert world.num_sequences() == 0

    quietly(main)


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_a_failing_model_is_raised_as_itself(world: World, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def failing(segments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(getattr(world, broken).model, "forward", failing)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            await complete(world.request(), world.backend())
        assert world.num_sequences() == 0

    quietly(main)


def test_a_sequence_closed_by_the_engine_ends_the_request(world: World) -> None:
    """An expired lease, for one."""

    async def main() -> None:
        completion = generate(world.request(max_tokens=400), world.backend())
        await anext(completion)
        for sequence in list(world.drafter._sequences.values()):
            world.drafter.close(sequence)
        with pytest.raises(SequenceClosed):
            await anext(completion)
        assert world.num_sequences() == 0

    quietly(main)
