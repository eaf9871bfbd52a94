"""The answers that are drafted, their scores and the choice, against transformers' own passes over the same tokens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from running import eventually
from transformers import PreTrainedModel
from world import Chunk, Completion, Retrieval, World, complete, greedily, run

from rapid.backend import leases
from rapid.backend.local import LocalBackend
from rapid.backend.protocol import Lease, Role
from rapid.engine.messages import SequenceRequest
from rapid.errors import EngineLost, InvalidRequest, RequestQuarantined, RetrievalFailed
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.params import SpeculationParams
from rapid.speculative_rag.choice import RATIONALE, RATIONALE_TOKENS, REFLECTION, YES
from rapid.text.encoding import encode

TEXT = "abcabbcacbaaccabbc\n\nab"  # six chunks of three letters, and a question
SCORES = [0.3, 0.9, 0.5, 0.7, 0.4, 0.8]


def six(contents: list[str], query: str, options: Any) -> Retrieval:
    """A retriever that cuts 18 letters into six chunks."""
    chunks = [Chunk(0, contents[0][3 * i : 3 * i + 3], i, SCORES[i], 3 * i, 3 * i + 3) for i in range(6)]
    return Retrieval(chunks, len(contents[0]), 18)


def by_letters(texts: list[str], _salt: str) -> NDArray[np.float32]:
    counts = np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)
    vectors: NDArray[np.float32] = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    return vectors


class Backend(LocalBackend):
    """Engines that die when ``fault(role, method)`` says so, at the call of a method or ("open") at the lease."""

    def __init__(self, world: World, fault: Callable[[Role, str], bool] = lambda *_: False, **how: Any) -> None:
        super().__init__(world.target, world.drafter, how.pop("retrieve", six), embed=how.pop("embed", by_letters))
        self.resume_timeout_s, self._fault = 5.0, fault
        self.calls: list[tuple[Role, str]] = []

    @asynccontextmanager
    async def lease(self, role: Role, request: SequenceRequest) -> AsyncIterator[Lease]:
        self._check(role, "open")
        async with super().lease(role, request) as lease:
            yield lease.over(partial(self._call, role, lease))

    def _call(self, role: Role, lease: Lease, method: str, *message: Any) -> Awaitable[Any]:
        try:
            self._check(role, method)
        except EngineLost as error:
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed
        return lease.call(method, *message)

    def _check(self, role: Role, method: str) -> None:
        self.calls.append((role, method))
        if self._fault(role, method):
            raise EngineLost("the engine died")


def ask(world: World, backend: LocalBackend | None = None, **how: Any) -> Completion:
    request = world.request(strategy="speculative_rag", prompt=world.prompt(TEXT), **how)
    completion = run(request, backend or Backend(world))
    assert world.num_sequences() == 0
    return completion


def logprobs_of(network: PreTrainedModel, before: list[int], tokens: list[int]) -> list[float]:
    """transformers' own, in one pass."""
    with torch.inference_mode():
        logits = network(torch.tensor([before + tokens])).logits[0].double().log_softmax(-1)
    rows = range(len(before) - 1, len(before) + len(tokens) - 1)
    return [float(logits[row, token]) for row, token in zip(rows, tokens, strict=True)]


def mean(logprobs: list[float]) -> float:
    return math.exp(sum(logprobs) / len(logprobs))


@pytest.mark.parametrize(("num_answers", "num_clusters", "max_tokens"), [(5, 2, 12), (3, 3, 1), (16, 1, 30)])
def test_scores_and_choice_are_those_of_transformers(
    world: World,
    tiny_network: Callable[..., PreTrainedModel],
    num_answers: int,
    num_clusters: int,
    max_tokens: int,
) -> None:
    target, drafter = (tiny_network(12, seed=seed, layers=1, window=512) for seed in (1, 2))
    completion = ask(world, num_answers=num_answers, num_clusters=num_clusters, max_tokens=max_tokens)
    told = completion.statistics.answers
    prompt = world.prompt(TEXT)
    chunks = six(prompt.contents, "", None).chunks
    question = prompt.shortened([])
    marker, reflection, yes = (encode(world.tokenizer, text) for text in (RATIONALE, REFLECTION, YES))
    assert 1 < len(told) <= num_answers and len({tuple(each["chunks"]) for each in told}) == len(told)
    scores, answers = [], []
    for each in told:
        assert each["chunks"] == sorted(each["chunks"])
        short = prompt.shortened([chunks[position] for position in each["chunks"]])
        answer = greedily(world.drafter.model, short, max_tokens)
        rationale = greedily(world.drafter.model, short + answer + marker, RATIONALE_TOKENS)
        drafted = logprobs_of(drafter, short, answer)
        drafted += logprobs_of(drafter, short + answer + marker, rationale)
        scored = logprobs_of(target, question, answer + marker + rationale + reflection + yes)
        own = scored[: len(answer)] + scored[len(answer + marker) : len(answer + marker + rationale)]
        expected = {
            "draft": mean(drafted),
            "self_contained": mean(own),
            "self_reflective": math.exp(sum(scored[-len(yes) :])),
        }
        scores.append(math.prod(expected.values()))
        for name, value in (expected | {"score": scores[-1]}).items():
            assert each[name] == pytest.approx(value, rel=1e-3)
        assert each["tokens"] == max_tokens
        answers.append(answer)
    best = scores.index(max(scores))
    assert [each["chosen"] for each in told] == [i == best for i in range(len(told))]
    assert completion.tokens == answers[best]
    assert len({tuple(answer) for answer in answers}) > 1  # else any choice would do
    assert (completion.finish.reason, completion.text) == ("length", world.tokenizer.decode(answers[best]))


def test_each_subset_has_one_chunk_of_each_cluster(world: World) -> None:
    """Two heaps of three, told apart by their embeddings alone."""

    def embed(texts: list[str], _salt: str) -> NDArray[np.float32]:
        places = [six([TEXT], "", None).chunks[i].text for i in range(6)]
        return np.array([[places.index(text) % 2, places.index(text) / 100] for text in texts], np.float32)

    told = ask(world, Backend(world, embed=embed), num_answers=16).statistics.answers
    assert {tuple(each["chunks"]) for each in told} == {tuple(sorted((a, b))) for a in (0, 2, 4) for b in (1, 3, 5)}


def test_the_drafts_are_one_batch(world: World) -> None:
    """They take about as many passes as one of them."""
    before = world.drafter.stats().forward_passes
    ask(world, num_answers=1)
    alone = world.drafter.stats().forward_passes - before
    ask(world, num_answers=5)
    together = world.drafter.stats().forward_passes - before - alone
    assert together < 2 * alone


def test_an_end_of_sequence_ends_a_draft_early(make_world: Callable[..., World]) -> None:
    """Some answers end at once, some go on to the limit; an answer of nothing is never chosen over another."""
    reasons = set()
    for eos in range(6):
        world = make_world(6, eos=eos)
        completion = ask(world, num_answers=5, max_tokens=20)
        told = completion.statistics.answers
        assert all(each["score"] == 0 for each in told if each["tokens"] == 0)
        reasons.add(completion.finish.reason)
        if completion.finish.reason == "stop":
            assert completion.tokens.index(eos) == len(completion.tokens) - 1
        else:
            assert len(completion.tokens) == 20 and eos not in completion.tokens
        if any(each["tokens"] for each in told):
            assert len(completion.tokens) > 1
    assert reasons == {"stop", "length"}


def test_what_the_request_says_of_its_output_holds_for_the_answer(make_world: Callable[..., World]) -> None:
    world = make_world(6, eos=4)
    whole = ask(world, max_tokens=20, ignore_eos=True)
    assert len(whole.tokens) == 20
    stop = whole.text[5:7]
    assert ask(world, max_tokens=20, ignore_eos=True, stop=(stop,)).text == whole.text[: whole.text.index(stop)]
    banned = LogitParams(logit_bias={whole.tokens[0]: -100.0})
    assert whole.tokens[0] not in ask(world, max_tokens=8, logits=banned).tokens[:-1]
    # Temperature and seed change nothing: drafts are greedy.
    assert ask(world, max_tokens=20, ignore_eos=True, sampling=SamplingParams(seed=3)).tokens == whole.tokens


def test_statistics_tell_of_a_choice_and_not_of_rounds(world: World) -> None:
    completion = ask(world)
    stats = completion.statistics
    assert (stats.rounds, stats.emitted, stats.drafted, stats.acceptance_rate) == (1, 12, 0, None)
    assert (stats.fallback, len(stats.chunks), stats.retrieved_tokens) == (None, 6, 18)
    assert [(delta.source, delta.num_drafted) for delta in completion.deltas] == [("answers", 0)]
    assert stats.timings_ms["drafting"] > 0 and stats.timings_ms["verification"] > 0


def assert_same(completion: Completion, expected: Completion) -> None:
    """The same answers were drafted and chosen; float32 rounds by what else is in a pass."""
    assert completion.tokens == expected.tokens
    for ours, theirs in zip(completion.statistics.answers, expected.statistics.answers, strict=True):
        assert ours.pop("chunks") == theirs.pop("chunks")
        assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FIRST_PAUSE_S", 0.001)


@pytest.mark.parametrize("method", ["open", "prefill", "propose"])
def test_without_a_drafter_the_target_drafts(world: World, method: str) -> None:
    by_itself = ask(world, LocalBackend(world.target, world.target, six, embed=by_letters))
    completion = ask(world, Backend(world, lambda role, at: (role, at) == ("drafter", method)))
    assert completion.statistics.fallback == "engine_lost"
    assert_same(completion, by_itself)


@pytest.mark.parametrize("method", ["open", "prefill", "score"])
@pytest.mark.parametrize("nth", [0, 3])
def test_a_target_that_dies_while_it_scores_changes_nothing(
    world: World, no_pauses: None, method: str, nth: int
) -> None:
    seen = iter(range(1000))
    backend = Backend(world, lambda role, at: (role, at) == ("target", method) and next(seen) == nth)
    expected, completion = ask(world), ask(world, backend)
    assert_same(completion, expected)
    assert next(seen) > nth


def test_an_answer_that_ends_engines_when_it_is_scored_leaves_other_answers_to_its_question(
    world: World, no_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LONGEST_APART_S", 0.0)
    left = [True] * 3
    backend = Backend(world, lambda role, at: (role, at) == ("target", "score") and bool(left) and left.pop())
    for _ in range(2):
        with pytest.raises(RequestQuarantined):
            ask(world, backend, num_answers=1)
    assert ask(world, backend, num_answers=1, max_tokens=5).tokens


def test_a_target_that_stays_away_fails_the_request(world: World) -> None:
    backend = Backend(world, lambda role, at: role == "target")
    backend.resume_timeout_s = 0.0
    with pytest.raises(EngineLost):
        ask(world, backend)
    assert world.num_sequences() == 0


def test_without_anything_to_choose_from_the_target_answers(make_world: Callable[..., World]) -> None:
    def nothing(contents: list[str], query: str, options: Any) -> Retrieval:
        return Retrieval([], len(contents[0]), 0)

    def fails(*_: Any) -> Any:
        raise RetrievalFailed("gone")

    world = make_world()
    prompt = world.prompt(TEXT)
    plain = greedily(world.target.model, prompt.tokens, 12)
    short = greedily(world.target.model, prompt.shortened(six(prompt.contents, "", None).chunks), 12)
    for how, expected, reason in (
        ({"retrieve": nothing}, plain, "nothing_above_threshold"),
        ({"retrieve": fails}, plain, "retrieval_failed"),
        ({"embed": fails}, short, "retrieval_failed"),
    ):
        completion = ask(world, Backend(world, **how))
        assert (completion.tokens, completion.statistics.fallback) == (expected, reason)
        assert completion.statistics.answers == []
    narrow = make_world(window=80, drafter_window=80)  # no room for a rationale
    completion = ask(narrow)
    assert (completion.tokens, completion.statistics.fallback) == (short, "drafter_window_exceeded")


def test_closing_early_frees_all_drafts(world: World) -> None:
    async def main() -> None:
        request = world.request(strategy="speculative_rag", prompt=world.prompt(TEXT), max_tokens=300)
        reading = asyncio.create_task(complete(request, Backend(world)))
        await asyncio.to_thread(eventually, lambda: world.drafter.stats().num_sequences == 5)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert world.num_sequences() == 0

    asyncio.run(main())


@pytest.mark.parametrize(("param", "values"), [("num_answers", [0, 17]), ("num_clusters", [0, 11])])
def test_a_number_out_of_range_is_refused_by_name(param: str, values: list[int]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=param) as caught:
            SpeculationParams(**{param: value})  # type: ignore[arg-type]
        assert caught.value.param == f"rapid.{param}"
