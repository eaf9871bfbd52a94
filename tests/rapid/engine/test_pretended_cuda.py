"""The engine as it runs on CUDA, on a pretended device, writes what it writes on a CPU.

Passes go through paged batches and replayed buffers, where they would be graphs. Both engines compute in float32.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pretended import FAILS, PretendedRecorder, pretend_cuda
from running import GREEDY, ROUNDING, VOCAB, begun, decode, done, opened, proposal, random_tokens, verification

from rapid.engine.engine import Engine
from rapid.engine.sequence import Sequence
from rapid.engine.verify import prefill
from rapid.errors import SequenceClosed
from rapid.kernels.interface import BatchEntry
from rapid.models.info import GraphLimits
from rapid.models.model import Model
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import DraftLimits, certain_draft

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]

SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=9)
LENGTHS = (1, 2, 40, 17, 130, 64, 33, 90)


@dataclass
class Pair:
    """The same engine twice: as on CUDA, and as on a CPU."""

    pretended: Engine
    plain: Engine
    recorder: PretendedRecorder

    def both(self, run: Callable[[Engine], object]) -> object:
        """What ``run`` gives on either; the pretended engine's passes of few tokens must have been replayed."""
        before = self.recorder.num_replays
        ours, expected = run(self.pretended), run(self.plain)
        assert ours == expected
        assert self.recorder.num_replays > before
        return ours


@pytest.fixture
def pair(tiny_model: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> Pair:
    recorder = pretend_cuda(monkeypatch)
    models = tiny_model(VOCAB, attention=recorder.attention), tiny_model(VOCAB)
    return Pair(*(engine(model, max_batch_tokens=48) for model in models), recorder)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_eight_at_once_with_drafts_of_all_lengths(pair: Pair, sampling: SamplingParams) -> None:
    """Accepted, cut and rolled back in every round, in passes that hold whatever has come meanwhile."""

    def run(engine: Engine) -> list[list[int]]:
        sequences = [begun(engine, random_tokens(n, seed=n), sampling) for n in LENGTHS]
        for reading in [engine.submit(prefill(s)) for s in sequences]:
            done(reading)
        for round_number in range(6):
            verdicts = []
            for i, sequence in enumerate(sequences):
                draft = certain_draft(len(sequence.output), random_tokens((3 * i + round_number) % 17, seed=i))
                verdicts.append(engine.submit(verification(sequence, draft)))
            for verdict in verdicts:
                done(verdict)
        return [sequence.output for sequence in sequences]

    pair.both(run)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_drafts_are_the_same_and_are_drafted_anew_behind_a_rejected_one(pair: Pair, sampling: SamplingParams) -> None:
    def run(engine: Engine) -> list[list[int]]:
        sequences = [opened(engine, random_tokens(n, seed=n), sampling) for n in LENGTHS[:4]]
        limits = [DraftLimits(n) for n in (1, 5, 16, 3)]
        drafts = []
        for tokens in ([], [3], [5, 6]):
            offsets = [sequence.position - len(sequence.output) for sequence in sequences]
            asked = [
                engine.submit(proposal(s, offset, tokens, most, 8, frozenset()))
                for s, offset, most in zip(sequences, offsets, limits, strict=True)
            ]
            drafts += [done(draft).tokens for draft in asked]
        return drafts

    drafts = pair.both(run)
    assert isinstance(drafts, list)
    assert [len(draft) for draft in drafts[:4]] == [1, 5, 16, 3]


def test_a_prefix_is_shared_and_a_prefill_runs_beside_decoding(pair: Pair) -> None:
    def run(engine: Engine) -> tuple[object, ...]:
        prompt = random_tokens(200, seed=1)
        first = opened(engine, [*prompt, 1])
        reading = engine.submit(prefill(begun(engine, random_tokens(400, seed=2))))
        written = list(decode(engine, first, 10))
        second = opened(engine, [*prompt, 2, 3])
        assert second.cached_tokens == 192
        done(reading)
        return written, decode(engine, second, 10), decode(engine, first, 10), engine.stats().kv.hit_tokens

    pair.both(run)


def test_sequences_that_are_closed_leave_the_others_alone(pair: Pair) -> None:
    def run(engine: Engine) -> list[list[int]]:
        kept = [opened(engine, random_tokens(n, seed=n)) for n in (20, 50)]
        written = []
        for i in range(4):
            doomed: Sequence = begun(engine, random_tokens(300, seed=10 + i))
            reading = engine.submit(prefill(doomed))
            written += [list(decode(engine, sequence, 3)) for sequence in kept]
            engine.close(doomed)
            with contextlib.suppress(SequenceClosed):
                done(reading)
        return written

    pair.both(run)


def test_graphs_that_cannot_be_recorded_change_nothing_but_a_line_in_the_log(
    tiny_model: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = pretend_cuda(monkeypatch)
    recorder.fails_at = 0
    eager, plain = engine(tiny_model(VOCAB, attention=recorder.attention)), engine(tiny_model(VOCAB))
    assert FAILS in caplog.text
    prompt = random_tokens(30, seed=1)
    assert decode(eager, opened(eager, prompt), 8) == decode(plain, opened(plain, prompt), 8)
    assert recorder.num_replays == 0


def test_an_engine_records_its_graphs_before_its_first_request(
    tiny_model: MakeModel, engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = pretend_cuda(monkeypatch)
    model = tiny_model(VOCAB, attention=recorder.attention)
    running = engine(model)
    assert recorder.num_recorded == 82 + 24
    decode(running, opened(running, [1]), 3)
    assert (recorder.num_recorded, recorder.num_replays) == (106, 3)
    engine(model, graphs=GraphLimits(seconds=0))
    assert recorder.num_recorded == 106
    engine(model, drafts=False)
    assert recorder.num_recorded == 106 + 82


def test_a_draft_step_leaves_its_token_on_the_device(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed pass over a token that the device sampled asks the host for nothing."""
    recorder = pretend_cuda(monkeypatch)
    model, plain = tiny_model(VOCAB, attention=recorder.attention), tiny_model(VOCAB)
    caches = []
    for made in (model, plain):
        pool = made.new_pool(2**18)
        if made is model:
            made.record(pool, GraphLimits())
        cache = pool.open([], 60)
        assert cache is not None
        made.forward([BatchEntry(cache, [7, 8, 9], 1)])
        caches.append(cache)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    token = torch.tensor([3])
    ours = model.forward([BatchEntry(caches[0], token, 1)])[0]
    monkeypatch.undo()
    torch.testing.assert_close(ours, plain.forward([BatchEntry(caches[1], token, 1)])[0], **ROUNDING)
