"""Retrieval while the answer is written: when it happens, and that only the drafter reads anew."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from world import Chunk, Retrieval, World, complete, run

from rapid.drafters.sentences import SentenceWatch
from rapid.errors import InvalidRequest
from rapid.request import GenerationRequest
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import VerifyResult
from rapid.speculation.params import SpeculationParams

LENGTH = 60


def round_of(text: str, tokenizer: PreTrainedTokenizerFast, num_accepted: int, confidence: float) -> VerifyResult:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    num_drafted = max(num_accepted, len(tokens) - 1)
    return VerifyResult(tokens, num_drafted, num_accepted, 0, [confidence] * num_drafted, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("num_accepted", "confidence", "expected"), [(0, 0.2, "abc"), (0, 0.9, None), (4, 0.2, None), (4, 0.9, None)]
)
def test_a_sentence_that_the_passages_did_not_help_with_is_searched_for(
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
    num_accepted: int,
    confidence: float,
    expected: str | None,
) -> None:
    """The drafter was unsure, and fewer of its tokens stood than before; both only count at the sentence's end."""
    tokenizer = letter_tokenizer(12)
    watch = SentenceWatch(tokenizer)
    assert watch.observe(round_of("ab", tokenizer, min(1, num_accepted), confidence)) is None
    assert watch.observe(round_of("c\nab", tokenizer, num_accepted, confidence)) == expected
    # What follows the end is the beginning of the next sentence.
    assert watch.observe(round_of("ca\n", tokenizer, 0, 0.1)) == "abca"


class Searches:
    """Each query finds other letters of the content."""

    def __init__(self) -> None:
        self.queries: list[str] = []

    def __call__(self, contents: list[str], query: str, options: Any) -> Retrieval:
        self.queries.append(query)
        start = len(self.queries) - 1
        chunk = Chunk(0, contents[0][start : start + 6], start, 0.5, start, start + 6)
        return Retrieval([chunk], len(contents[0]), 6)


def asked(world: World, **options: Any) -> GenerationRequest:
    """What is written repeats nothing, so that a line ends every few tokens."""
    options = {"refresh": "auto", "logits": LogitParams(frequency_penalty=0.5)} | options
    prompt = world.prompt("abcabbcacbaabcabcaacbbcab\n\nab")
    return world.request(max_tokens=LENGTH, gamma=3, prompt=prompt, **options)


def plainly(world: World) -> list[int]:
    return run(asked(world, strategy="autoregressive", refresh="off"), world.backend()).tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("strategy", ["speculative", "rapid"])
def test_the_drafter_reads_other_passages_and_the_text_is_the_same(
    make_world: Callable[..., World], strategy: str, overlap: bool
) -> None:
    world = make_world(5)
    search = Searches()
    completion = run(asked(world, strategy=strategy), world.backend(search, overlap=overlap))
    assert completion.tokens == plainly(world)
    statistics = completion.statistics
    assert statistics.refreshed > 0
    assert len(search.queries) > statistics.refreshed
    assert search.queries[0] == "ab" and all("\n" not in query for query in search.queries[1:])
    assert statistics.chunks[0]["position"] > 0
    assert statistics.fallback is None and world.num_sequences() == 0


def test_a_seed_writes_the_same_text_although_passages_change(make_world: Callable[..., World]) -> None:
    world = make_world(5)
    request = asked(world, sampling=SamplingParams(temperature=0.9, seed=5), transfer_strength="auto")
    first, second = (run(request, world.backend(Searches())) for _ in range(2))
    assert first.tokens == second.tokens
    assert first.statistics.refreshed == second.statistics.refreshed > 0


def test_a_retriever_that_fails_later_leaves_the_passages_as_they_are(make_world: Callable[..., World]) -> None:
    world, search = make_world(5), Searches()

    def failing(contents: list[str], query: str, options: Any) -> Retrieval:
        if search.queries:
            search.queries.append(query)
            raise OSError("gone")
        return search(contents, query, options)

    completion = run(asked(world), world.backend(failing))
    assert completion.tokens == plainly(world)
    assert len(search.queries) > 1 and completion.statistics.refreshed == 0
    assert completion.statistics.chunks[0]["position"] == 0
    assert completion.statistics.fallback is None and world.num_sequences() == 0


def test_a_request_that_ends_while_passages_are_read_frees_their_sequence(make_world: Callable[..., World]) -> None:
    world = make_world(5)

    async def until_it_searches() -> None:
        search, backend = Searches(), world.backend()
        backend._retrieve = search
        reading = asyncio.create_task(complete(asked(world), backend))
        while len(search.queries) < 2 and not reading.done():
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(until_it_searches())
    assert world.num_sequences() == 0


def test_a_greedy_transfer_keeps_its_passages(make_world: Callable[..., World]) -> None:
    """Where its rounds end must not change q."""
    world, search = make_world(5), Searches()
    run(asked(world, transfer_temperature=1.0), world.backend(search))
    assert len(search.queries) == 1


def test_another_word_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="refresh must be off or auto") as caught:
        SpeculationParams(refresh="always")  # type: ignore[arg-type]
    assert caught.value.param == "rapid.refresh"
