"""The host waits for the device as seldom as can be: per draft token, draft, verification and plain step 0, 1, 1, 1.

The engine is real. Its model gives logits on PyTorch's meta device, where tensors have shapes and types but no values.
So whatever would read one on the host (`.item()`, `.tolist()`, `bool()`, `.cpu()`, an index by an unknown number of
elements) raises. Only `download` gives numbers. A blocking upload raises, too: it waits for all work before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from running import VOCAB, done, opened, proposal, random_tokens, verification
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rapid.engine.engine import Engine
from rapid.engine.messages import DraftRequest, SequenceRequest, VerifyRequest
from rapid.engine.propose import propose
from rapid.engine.sequence import Sequence
from rapid.engine.verify import verify_draft
from rapid.kernels.cuda.attention import PagedAttention, PagedBatch, gathered_sdpa
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVLayout, KVPool
from rapid.kv_cache.table import PageTable
from rapid.models.model import Model
from rapid.models.tensor_parallel import Pass
from rapid.sampling.params import LogitParams, SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft
from rapid.speculation.drawing import draw_greedily
from rapid.speculation.params import SpeculationParams

DEVICE = torch.device("meta")
NO_EOS = frozenset[int]()
GAMMA = 4
_ROW = torch.arange(5, device=DEVICE)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, seed=1)


class _Moment:
    """A device that does not exist has no clock."""

    def __init__(self, device: torch.device) -> None: ...
    def ms_until(self, later: "_Moment") -> float:
        return 1.0


class _Valueless:
    """A model whose logits have no values; its pages are on the host, and nobody reads them."""

    tokenizer, group, vocab_size = None, None, VOCAB
    layout = KVLayout(num_kv_heads=1, head_dim=4, dtype=torch.float32, devices=(DEVICE,))

    def __init__(self, model: Model) -> None:
        self.info, self.balanced_context = model.info, model.balanced_context
        self.fed: list[Any] = []
        self._on_host = model

    def new_pool(self, budget_bytes: int) -> KVPool:
        pool = self._on_host.new_pool(budget_bytes)
        pool.layout = self.layout
        return pool

    def record(self, *_: object) -> None:
        """Nothing is recorded."""

    def compiled_steps(self) -> None:
        """Nothing is compiled."""

    def forward(self, entries: list[BatchEntry], **_: Any) -> list[Tensor]:
        self.fed += [tokens for _, tokens, _ in entries]
        for cache, tokens, _ in entries:
            cache.advance(len(tokens))
        sizes = [rows for _, _, rows in entries]
        return list(torch.randn(sum(sizes), VOCAB, device=DEVICE).split(sizes))


class _NoBlockingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | (kwargs or {})
        if func.name().startswith(("aten::to.", "aten::_to_copy")) and given["self"].device != given.get("device"):
            assert given.get("device") is None or given.get("non_blocking"), "a blocking copy to the device"
        return func(*args, **(kwargs or {}))


class _WatchedEngine(Engine):
    def _work(self) -> None:
        with _NoBlockingCopies():
            super()._work()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was downloaded, in order. Every number that the host gets is 1."""
    downloaded: list[Tensor] = []

    def download(values: Tensor) -> NDArray[Any]:
        assert values.device == DEVICE
        downloaded.append(values)
        return np.ones(len(values))

    monkeypatch.setattr("rapid.engine.readout.download", download)
    for module in ("propose", "verify"):
        monkeypatch.setattr(f"rapid.engine.{module}.Moment", _Moment)
    return downloaded


@pytest.fixture
def running(tiny_model: Callable[..., Model], waits: list[Tensor]) -> Iterator[Engine]:
    engine = _WatchedEngine(_Valueless(tiny_model(VOCAB)), kv_bytes=2**22, max_batch_tokens=128)  # type: ignore[arg-type]
    yield engine
    engine.shutdown()


def a_draft(engine: Engine, sequence: Sequence, limits: DraftLimits) -> Draft:
    offset = len(sequence.output)
    drafted: Draft = done(engine.submit(proposal(sequence, offset, [], limits, 8, NO_EOS)))
    return drafted


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(temperature=0.7, seed=1), SAMPLED])
@pytest.mark.parametrize("rule", ["published", "reference", "augmented", "lossless"])
def test_a_draft_a_verification_and_a_plain_step_wait_once_each(
    running: Engine, waits: list[Tensor], sampling: SamplingParams, rule: str
) -> None:
    sequence = opened(running, random_tokens(20, seed=1), sampling)
    before = len(waits)
    draft = a_draft(running, sequence, DraftLimits(GAMMA))
    assert draft.tokens == [1] * GAMMA
    assert len(waits) == before + 1
    assert sum(isinstance(tokens, Tensor) for tokens in running.model.fed) == GAMMA - 1  # type: ignore[attr-defined]
    sequence.output.clear()
    verified: VerifyResult = done(running.submit(verification(sequence, draft, rule, 10.0)))
    assert (verified.num_accepted, verified.tokens) == (1, [1, 1])
    assert len(waits) == before + 2
    done(running.submit(verification(sequence, Draft(len(sequence.output)), rule, 10.0)))
    assert len(waits) == before + 3 == running.stats().host_waits


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SAMPLED])
@pytest.mark.parametrize("strength", ["auto", 10.0])
def test_choosing_the_transfer_adds_no_wait(
    running: Engine, waits: list[Tensor], sampling: SamplingParams, strength: float | Literal["auto"]
) -> None:
    """A transfer everywhere, whose draft brings one q more than it has tokens to score, and η as a trust region."""
    speculation = SpeculationParams(transfer_strength=strength, transfer_temperature=1.0)
    sequences = [
        done(running.open(SequenceRequest(random_tokens(20, seed=i), 100, sampling, speculation))) for i in range(2)
    ]
    drafted, verifying = sequences
    before = len(waits)
    draft = done(running.submit(propose(drafted, DraftRequest(0, [], DraftLimits(GAMMA)), NO_EOS)))
    assert draft.tokens == [1] * GAMMA and len(waits) == before + 1
    assert len(draft.distributions[0][0]) > 1  # q is no point, at temperature 0 neither
    verified: VerifyResult = done(running.submit(verify_draft(verifying, VerifyRequest(draft, transfers=True))))
    assert verified.num_drafted == GAMMA - 1
    assert (verified.transferred is not None) == (strength == "auto")
    assert len(waits) == before + 2 == running.stats().host_waits


def test_a_whole_batch_waits_once(running: Engine, waits: list[Tensor], gates: Callable[[Any], Any]) -> None:
    """Greedy and sampled requests, drafts and plain steps, rules and lengths of all kinds, in one pass."""
    gate = gates(running.model)
    gate.open()
    params = [SamplingParams(temperature=0), SAMPLED, SamplingParams(temperature=0.5, seed=2), SAMPLED]
    sequences = [opened(running, random_tokens(20, seed=i), params[i % 4]) for i in range(8)]
    blocker = opened(running, [1, 2], params[0])
    gate.close()
    blocking = running.submit(verification(blocker, Draft(0)))
    gate.wait()
    rules = ["published", "lossless", "augmented"]
    rounds = [
        running.submit(verification(s, certain_draft(0, [1] * (i % 3)), rules[i % 3], 3.0))
        for i, s in enumerate(sequences)
    ]
    before = len(waits)
    gate.open()
    for each in (blocking, *rounds):
        done(each)
    assert len(waits) == before + 2  # the blocker's, and one for all others


@pytest.mark.parametrize(
    ("limits", "expected"),
    [(DraftLimits(6), 1), (DraftLimits(6, acceptance=(1.0,) * 9), 2), (DraftLimits(3, ahead=True), 1)],
)
def test_a_draft_that_may_end_anywhere_is_read_in_parts(
    running: Engine, waits: list[Tensor], limits: DraftLimits, expected: int
) -> None:
    sequence = opened(running, random_tokens(20, seed=1), SAMPLED)
    before = len(waits)
    assert len(a_draft(running, sequence, limits).tokens) == limits.max_tokens
    assert len(waits) >= before + expected
    if sequence.drafting_ahead is None:
        assert len(waits) == before + expected


def test_penalties_do_not_let_the_host_see_each_token(running: Engine, waits: list[Tensor]) -> None:
    """They depend on the tokens, which the device has. The statistics count the wait at the draft's end."""
    every = LogitParams(
        logit_bias={3: 1.0}, repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=2, stop_token_ids=(7,)
    )
    request = SequenceRequest(random_tokens(20, seed=1), 100, SAMPLED, logits=every)
    before = running.stats().host_waits
    a_draft(running, done(running.open(request)), DraftLimits(GAMMA))
    assert running.stats().host_waits == before + 1 == len(waits)


@pytest.mark.parametrize("lengths", [(1, 1), (5, 40, 1)], ids=str)
def test_a_batch_is_uploaded_without_waiting(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]) -> None:
    """Few new tokens, many beside few, and pages that are shared."""
    layout = KVLayout(num_kv_heads=1, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),))
    backend = PagedAttention(gathered_sdpa, page_size=16)
    pool = backend.pool(layout, 2**16)
    pool.layout = replace(layout, devices=(DEVICE,))
    entries = [
        BatchEntry(PageTable(pool, [7, 3, 9 + i, 12 + i, 15 + i], 32), [0] * n, 0) for i, n in enumerate(lengths)
    ]
    monkeypatch.setattr("rapid.kernels.cuda.attention.WORTH_SHARING_BYTES", 0)
    monkeypatch.setattr(torch, "tensor", None)  # with a device it waits
    with _NoBlockingCopies():
        batch = backend.batch(entries)
    assert isinstance(batch, PagedBatch) and batch.prefix is not None
    assert {each.device for each in (batch.slots, batch.table, batch.lengths, *batch.prefix.tensors())} == {DEVICE}
    assert len(batch.parts) == (2 if len(lengths) == 3 else 0)


def test_ranks_read_tokens_from_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []

    def download(values: Tensor) -> NDArray[Any]:
        read.append(values)
        return np.array([5, 6, 7])

    monkeypatch.setattr("rapid.models.tensor_parallel.download", download)
    tokens = [torch.empty(1, dtype=torch.long, device=DEVICE), [1, 2], torch.empty(2, dtype=torch.long, device=DEVICE)]
    layout = KVLayout(num_kv_heads=1, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),))
    table = PageTable(KVPool(layout, 2**20), [3], 4)
    entries = [BatchEntry(table, each, 1) for each in tokens]
    assert [new for _, new, _ in Pass.of(entries).parts] == [[5], [1, 2], [6, 7]]
    assert len(read) == 1


@pytest.mark.parametrize(
    "read",
    [
        *(Tensor.item, Tensor.tolist, Tensor.cpu, bool, float),
        lambda token: _ROW[token],
        lambda token: _ROW[token < _ROW],
        lambda token: torch.ones(1).to(DEVICE),
    ],
)
def test_these_tests_notice_a_wait(running: Engine, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any]) -> None:
    def careless(logits: Tensor, ids: Tensor | None) -> Any:
        drawn = draw_greedily(logits, ids)
        read(drawn.tokens[0])
        return drawn

    monkeypatch.setattr("rapid.engine.readout.draw_greedily", careless)
    sequence = opened(running, random_tokens(20, seed=1))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=r"meta|blocking"):
        a_draft(running, sequence, DraftLimits(GAMMA))
