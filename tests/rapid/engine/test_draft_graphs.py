"""A draft that is one replay has the tokens, q and confidences of one that is drawn step by step.

The device is pretended: a replay is a call, and its results are said to come later, as those of a GPU do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pretended import FAILS, PretendedRecorder, pretend_cuda
from running import GREEDY, VOCAB, begun, done, opened, proposal, random_tokens

from rapid.engine.engine import Engine
from rapid.engine.messages import SequenceRequest
from rapid.engine.sequence import Sequence
from rapid.engine.verify import prefill
from rapid.models.model import Model
from rapid.models.pass_inputs import Shape
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import Draft, DraftLimits

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]
NO_EOS = frozenset[int]()
WARM = SamplingParams(temperature=0.8, seed=3)
NUCLEUS = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=9)
SHAPES = [Shape(16, 1, 8), Shape(1, 1, 1), Shape(2, 2, 1), Shape(4, 4, 1), Shape(8, 8, 1)]  # of single passes
EACH_CHOSEN = (1.0,) * 9  # an acceptance that never ends a draft


@dataclass
class Pair:
    """An engine that replays drafts, and one that draws step by step."""

    replaying: Engine
    stepping: Engine
    recorder: PretendedRecorder

    def both(self, run: Callable[[Engine], list[Draft]]) -> tuple[list[Draft], int]:
        """The drafts that both engines must give, and the number of replays."""
        before = self.recorder.num_replays
        ours = run(self.replaying)
        num_replays = self.recorder.num_replays - before
        for draft, expected in zip(ours, run(self.stepping), strict=True):
            assert (draft.offset, draft.tokens) == (expected.offset, expected.tokens)
            assert draft.confidences == pytest.approx(expected.confidences, abs=1e-5)
            for (ids, weights), (other_ids, others) in zip(draft.distributions, expected.distributions, strict=True):
                assert dict(zip(ids.tolist(), weights.tolist(), strict=True)) == pytest.approx(
                    dict(zip(other_ids.tolist(), others.tolist(), strict=True)), abs=1e-5
                )
        return ours, num_replays


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> PretendedRecorder:
    monkeypatch.setattr("rapid.engine.propose.is_asynchronous", lambda _: True)
    monkeypatch.setattr(Shape, "all", lambda: SHAPES)
    return pretend_cuda(monkeypatch)


@pytest.fixture
def pair(tiny_model: MakeModel, engine: MakeEngine, recorder: PretendedRecorder) -> Pair:
    replaying = engine(tiny_model(VOCAB, attention=recorder.attention), max_batch_tokens=64)
    return Pair(replaying, engine(tiny_model(VOCAB), max_batch_tokens=64), recorder)


def drafted(engine: Engine, sequence: Sequence, limits: DraftLimits, top_k: int = 64) -> Draft:
    draft: Draft = done(engine.submit(proposal(sequence, 0, [], limits, top_k, NO_EOS)))
    return draft


@pytest.mark.parametrize("sampling", [GREEDY, WARM, NUCLEUS], ids=["greedy", "warm", "nucleus"])
@pytest.mark.parametrize(
    ("limits", "num_replays"),
    [
        (DraftLimits(8), 1),
        (DraftLimits(4), 1),
        (DraftLimits(2), 1),
        (DraftLimits(1), 1),  # a pass
        (DraftLimits(6), 2),  # four and two
        (DraftLimits(13), 3),  # eight, four and a pass
        (DraftLimits(8, acceptance=EACH_CHOSEN), 2),  # the host looks after four
    ],
    ids=lambda value: (
        f"{value.max_tokens}{'-chosen' * bool(value.acceptance)}" if isinstance(value, DraftLimits) else ""
    ),
)
def test_a_draft_is_one_replay(pair: Pair, sampling: SamplingParams, limits: DraftLimits, num_replays: int) -> None:
    def run(engine: Engine) -> list[Draft]:
        before = engine.stats().forward_passes
        draft = drafted(engine, opened(engine, random_tokens(21, seed=1), sampling), limits)
        assert engine.stats().forward_passes == before + 1 + limits.max_tokens  # with the prefill's
        return [draft]

    (draft,), seen = pair.both(run)
    assert len(draft.tokens) == limits.max_tokens
    assert seen == num_replays


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_q_has_as_many_tokens_as_the_request_says(pair: Pair, top_k: int) -> None:
    drafts, _ = pair.both(lambda e: [drafted(e, opened(e, random_tokens(9, seed=2), WARM), DraftLimits(9), top_k)])
    assert {len(ids) for ids, _ in drafts[0].distributions} == {min(top_k, VOCAB)}


def test_round_after_round_with_accepted_and_rejected_tokens(pair: Pair) -> None:
    """Over the end of pages, and with what the target wrote behind a rejected token."""

    def run(engine: Engine) -> list[Draft]:
        sequence = opened(engine, random_tokens(26, seed=5), WARM)
        drafts, offset, tokens = [], 0, list[int]()
        for i in range(8):
            draft = done(engine.submit(proposal(sequence, offset, tokens, DraftLimits(4), 64, NO_EOS)))
            drafts.append(draft)
            offset += len(tokens)
            tokens = [*draft.tokens[: (4, 2, 0, 4)[i % 4]], i]
        return drafts

    _, num_replays = pair.both(run)
    assert num_replays == 8


def test_several_sequences_of_all_kinds_draft_together(pair: Pair) -> None:
    """A batch goes on as long as its shortest draft; greedy ones and sampled ones are in one graph."""
    kinds = [GREEDY, WARM, NUCLEUS]

    def run(engine: Engine) -> list[Draft]:
        sequences = [begun(engine, random_tokens(5 + 7 * i, seed=i), kinds[i % 3]) for i in range(5)]
        for reading in [engine.submit(prefill(sequence)) for sequence in sequences]:
            done(reading)
        asked = [
            engine.submit(proposal(sequence, 0, [], DraftLimits(gamma), 8, NO_EOS))
            for sequence, gamma in zip(sequences, (8, 4, 3, 10, 6), strict=True)
        ]
        return [done(each) for each in asked]

    drafts, _ = pair.both(run)
    assert [len(draft.tokens) for draft in drafts] == [8, 4, 3, 10, 6]


def test_what_is_drafted_ahead_is_replayed_too(pair: Pair) -> None:
    def run(engine: Engine) -> list[Draft]:
        sequence = opened(engine, random_tokens(20, seed=1), WARM)
        first = drafted(engine, sequence, DraftLimits(3, ahead=True))
        ahead = sequence.drafting_ahead
        assert ahead is not None
        return [first, done(ahead)]

    (first, whole), _ = pair.both(run)
    assert (len(first.tokens), whole.num_ahead) == (3, 4)


def test_penalties_are_drawn_token_by_token(pair: Pair) -> None:
    def run(engine: Engine) -> list[Draft]:
        request = SequenceRequest(random_tokens(8, seed=2), 100, WARM, logits=LogitParams(frequency_penalty=0.5))
        return [drafted(engine, done(engine.open(request)), DraftLimits(4))]

    _, num_replays = pair.both(run)
    assert num_replays == 4


def test_a_long_first_pass_and_a_wide_q_are_drawn_step_by_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(engine: Engine) -> list[Draft]:
        unread = begun(engine, random_tokens(30, seed=2), WARM)  # its prompt is read by the draft's first pass
        return [drafted(engine, unread, DraftLimits(5))]

    _, num_replays = pair.both(run)
    assert num_replays == 1  # four tokens behind the first
    monkeypatch.setattr("rapid.engine.draft_graphs.MOST_TOP_K", 4)
    _, num_replays = pair.both(
        lambda e: [drafted(e, opened(e, random_tokens(21, seed=3), WARM), DraftLimits(4), top_k=5)]
    )
    assert num_replays == 4


def test_drafts_that_cannot_be_recorded_are_drawn_step_by_step_with_a_warning(
    tiny_model: MakeModel, engine: MakeEngine, recorder: PretendedRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails_at = (
        len(SHAPES) + 2
    )  # the graphs of eight and of four tokens of one sequence are there, that of two is not
    model = tiny_model(VOCAB, attention=recorder.attention)
    pair = Pair(engine(model), engine(tiny_model(VOCAB)), recorder)
    assert FAILS in caplog.text and "Steps(sequences=1, steps=2)" in caplog.text
    _, num_replays = pair.both(lambda e: [drafted(e, opened(e, random_tokens(21, seed=3), WARM), DraftLimits(7))])
    assert num_replays == 1 + 3


def test_a_replayed_draft_asks_the_host_for_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first pass to the last token."""
    sequence = opened(pair.replaying, random_tokens(20, seed=1), NUCLEUS)
    seen: list[int] = []
    replay = pair.replaying._passes.drafts._runner.replay  # type: ignore[union-attr]

    def watched(*arguments: Any, **options: Any) -> int:
        with pytest.MonkeyPatch.context() as within:
            for name in ("item", "tolist", "cpu", "__bool__", "numpy"):
                within.setattr(torch.Tensor, name, None)
            seen.append(1)
            return replay(*arguments, **options)

    monkeypatch.setattr(pair.replaying._passes.drafts._runner, "replay", watched)  # type: ignore[union-attr]
    assert len(drafted(pair.replaying, sequence, DraftLimits(8)).tokens) == 8
    assert seen == [1]
