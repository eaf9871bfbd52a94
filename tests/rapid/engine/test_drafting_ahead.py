"""What a drafter does while the target verifies: it is the next draft where it guessed right, and gone where not."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from gate import Gate
from running import VOCAB, assert_cache_is_fresh, done, opened, proposal, random_tokens
from world import Chunk, Retrieval, World, complete

from rapid.engine.engine import Engine
from rapid.engine.propose import drafted_ahead
from rapid.models.model import Model
from rapid.speculation.draft import Draft, DraftLimits

MakeEngine = Callable[..., Engine]
NO_EOS = frozenset[int]()
AHEAD = DraftLimits(3, ahead=True)


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(VOCAB)


def test_a_right_guess_is_the_next_draft(model: Model, engine: MakeEngine) -> None:
    running = engine(model)
    prompt = random_tokens(20, seed=1)
    expected = done(running.submit(proposal(opened(running, prompt), 0, [], DraftLimits(11), 8, NO_EOS))).tokens
    sequence = opened(running, prompt)
    first: Draft = done(running.submit(proposal(sequence, 0, [], AHEAD, 8, NO_EOS)))
    drafted = asyncio.run(drafted_ahead(sequence.drafting_ahead))
    assert drafted is not None
    assert (drafted.offset, drafted.tokens, drafted.num_ahead) == (0, expected[:7], 4)

    passes = running.stats().forward_passes
    second: Draft = done(running.submit(proposal(sequence, 0, expected[:4], DraftLimits(3), 8, NO_EOS)))
    assert running.stats().forward_passes == passes  # it only had to be handed over
    assert (first.tokens, second.tokens, second.num_ahead) == (expected[:3], expected[4:7], 3)
    assert_cache_is_fresh(sequence, model)
    third: Draft = done(running.submit(proposal(sequence, 4, expected[4:8], DraftLimits(3), 8, NO_EOS)))
    assert third.tokens == expected[8:]


@pytest.mark.parametrize("guessed", [True, False])
def test_only_a_wrong_guess_s_pass_is_given_up_at_once(
    model: Model, engine: MakeEngine, gates: Callable[[Model], Gate], guessed: bool
) -> None:
    running = engine(model)
    sequence = opened(running, random_tokens(20, seed=2))
    gate = gates(model)
    limits = DraftLimits(1, ahead=True)
    proposed = running.submit(proposal(sequence, 0, [], limits, 8, NO_EOS))
    gate.wait()
    gate.step()  # now the first token drafted ahead is being computed
    drafting = sequence.drafting_ahead
    assert drafting is not None
    right = done(proposed).tokens[0]
    emitted = [right, 5] if guessed else [(right + 1) % VOCAB]  # what follows the draft nobody knows yet
    again = running.submit(proposal(sequence, 0, emitted, DraftLimits(1), 8, NO_EOS))
    assert drafting.cancelled() is not guessed
    gate.open()
    assert len(done(again).tokens) == 1
    assert asyncio.run(drafted_ahead(drafting)) is None
    assert_cache_is_fresh(sequence, model)


def test_the_decode_loop_asks_for_no_draft_that_is_here(make_world: Callable[..., World], engine: MakeEngine) -> None:
    """A drafter that reads what the target reads is always right, so all but the first draft come ahead."""

    def everything(contents: list[str], query: str, options: Any) -> Retrieval:
        return Retrieval([Chunk(0, contents[0], 0, 0.5, 0, len(contents[0]))])

    world = make_world()
    twin = World(world.target, engine(world.target.model), world.tokenizer)
    request = twin.request(strategy="speculative", gamma=2, max_tokens=13)
    backend = twin.patient_backend(everything)
    ahead = asyncio.run(complete(request, backend))
    alone = asyncio.run(complete(twin.request(strategy="autoregressive", max_tokens=13), twin.backend()))
    assert ahead.tokens == alone.tokens
    assert backend.were_here == [False, True, True, True, True]  # the last is a plain round
    assert (ahead.statistics.drafted, ahead.statistics.accepted, ahead.statistics.drafted_ahead) == (8, 8, 6)
    assert twin.num_sequences() == 0
