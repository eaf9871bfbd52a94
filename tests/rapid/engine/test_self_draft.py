"""A target that drafts over some of its own pages: which pages, what it sees, and that nothing of it is kept."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pretended import pretend_cuda
from running import ROUNDING, VOCAB, assert_cache_is_fresh, begun, done, opened, random_tokens, verification
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rapid.engine.engine import Engine
from rapid.engine.messages import CacheView, RefineRequest, SelfDraftRequest
from rapid.engine.page_ranking import rank_pages, view_of
from rapid.engine.self_draft import draft_over_view, refine
from rapid.engine.sequence import ForwardRequest, Sequence, Task
from rapid.kernels.interface import BatchEntry
from rapid.kv_cache.pool import KVCache, KVLayout, KVPool
from rapid.models.model import Model
from rapid.models.tensor_parallel import Pass
from rapid.sampling.params import SamplingParams
from rapid.speculation.draft import Draft, DraftLimits, VerifyResult, certain_draft

MakeModel = Callable[..., Model]
MakeEngine = Callable[..., Engine]
PAGE = 16
WINDOW, SNAP, CHUNKS = (CacheView(kind, 3 * PAGE) for kind in ("window", "snap", "chunks"))  # type: ignore[arg-type]
NONE = frozenset[int]()


@pytest.fixture
def network(tiny_network: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_network(VOCAB)


@pytest.fixture
def running(tiny_network: Callable[..., PreTrainedModel], engine: MakeEngine) -> Engine:
    return engine(Model(tiny_network(VOCAB), None, "letters"))


def ranked(running: Engine, sequence: Sequence, kind: str) -> list[int]:
    found: list[int] = done(running.submit(rank_pages(sequence, kind)))
    return found


# Which pages


def kept(cache: KVCache, ranking: list[int], num_tokens: int) -> list[int]:
    """The indices of the pages in the view from which the token behind ``num_tokens`` others is drafted."""
    view = view_of(cache, ranking, WINDOW, num_tokens - cache.length)
    assert view.position == num_tokens
    used = view.pages[: view.length // PAGE + 1]
    return [cache.pages.index(page) for page in used]


def test_a_view_keeps_its_size_and_slides(running: Engine) -> None:
    """Page 0, the best of the ranking, and the latest; as the output grows these take the place of the ranking's."""
    cache = opened(running, random_tokens(100, seed=1)).cache
    ranking = [0, 2, 4, 1, 3]
    assert kept(cache, ranking, 5 * PAGE + 3) == [0, 2, 5]
    assert kept(cache, ranking, 6 * PAGE - 1) == [0, 2, 5]
    assert kept(cache, ranking, 6 * PAGE) == [0, 5, 6]
    assert kept(cache, ranking, 7 * PAGE) == [0, 6, 7]
    assert kept(cache, ranking, 3 * PAGE - 1) == [0, 1, 2]  # it has room for all


@pytest.mark.parametrize("length", [100, 6 * PAGE, 6 * PAGE + 1])
def test_a_window_is_the_latest_pages(running: Engine, length: int) -> None:
    sequence = opened(running, random_tokens(length, seed=1))
    ranking = ranked(running, sequence, "window")
    last = (length - 1) // PAGE
    assert kept(sequence.cache, ranking, length - 1) == [0, last - 1, last]


def snap_scores(network: PreTrainedModel, tokens: list[int]) -> Tensor:
    """transformers' own attention weights of the last 32 tokens, over the whole pages before them."""
    network.set_attn_implementation("eager")
    weights = torch.stack(network(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0].double()
    num_pages = (len(tokens) - 32) // PAGE
    over_pages = weights[:, :, -32:, : num_pages * PAGE]
    return (over_pages / over_pages.sum(-1, keepdim=True)).sum((0, 1, 2)).view(num_pages, PAGE).sum(-1)


def chunk_scores(network: PreTrainedModel, tokens: list[int]) -> Tensor:
    """softmax of (last query · mean key of each page), from the projections themselves."""
    whole = network.model(torch.tensor([tokens]), output_hidden_states=True)
    num_pages, total = (len(tokens) - 1) // PAGE, torch.zeros(1, dtype=torch.float64)
    rotation = network.model.rotary_emb(whole.hidden_states[0], torch.arange(len(tokens))[None])
    for layer, hidden in zip(network.model.layers, whole.hidden_states, strict=False):
        x = layer.input_layernorm(hidden)
        own = layer.self_attn
        q, k = (part(x).view(1, len(tokens), -1, own.head_dim).transpose(1, 2) for part in (own.q_proj, own.k_proj))
        q, k = (part[0].double() for part in apply_rotary_pos_emb(q, k, *rotation))
        means = k[:, : num_pages * PAGE].unflatten(1, (num_pages, PAGE)).mean(2)
        means = means.repeat_interleave(len(q) // len(k), 0)
        products = torch.einsum("hd,hpd->hp", q[:, -1], means) * own.head_dim**-0.5
        total = total + products.softmax(-1).sum(0)
    return total


@pytest.mark.parametrize(("kind", "scores"), [("snap", snap_scores), ("chunks", chunk_scores)])
@torch.no_grad()
def test_pages_are_ranked_by_what_the_prompt_s_end_looks_for(
    running: Engine, network: PreTrainedModel, kind: str, scores: Callable[[PreTrainedModel, list[int]], Tensor]
) -> None:
    """Against transformers' attention; also where the prompt is cached, and where some of it is output already."""
    prompt = random_tokens(200, seed=4)
    expected = scores(network, prompt)
    order = [0, *(expected[1:].argsort(descending=True) + 1).tolist()]
    assert order != sorted(order)
    before = running.stats()
    assert ranked(running, opened(running, prompt), kind) == order
    assert running.stats().tokens_processed - before.tokens_processed == 199 + {"snap": 32, "chunks": 1}[kind]
    again = opened(running, prompt)
    assert again.cached_tokens > 0
    assert ranked(running, again, kind) == order
    assert_cache_is_fresh(again, running.model)
    resumed = opened(running, prompt + random_tokens(40, seed=5))
    resumed.request = replace(resumed.request, written=40)
    assert ranked(running, resumed, kind) == order


# What a draft sees


@torch.no_grad()
def seen(network: PreTrainedModel, tokens: list[int], pages: list[int], num_cached: int) -> Tensor:
    """transformers' logits behind ``tokens``, of which the first ``num_cached`` are read whole, by ``pages`` alone."""
    cache = network(torch.tensor([tokens[:num_cached]]), use_cache=True).past_key_values
    places = [place for page in pages for place in range(page * PAGE, (page + 1) * PAGE) if place < num_cached]
    reduced = DynamicCache()
    for i, layer in enumerate(cache.layers):
        reduced.update(layer.keys[:, :, places], layer.values[:, :, places], i)
    positions = torch.arange(num_cached, len(tokens))[None]
    new = torch.tensor([tokens[num_cached:]])
    logits: Tensor = network(new, past_key_values=reduced, position_ids=positions).logits[0]
    return logits


@pytest.mark.parametrize("view", [WINDOW, SNAP, CHUNKS], ids=lambda view: view.kind)
def test_a_draft_is_transformers_own_over_these_pages(
    running: Engine, network: PreTrainedModel, view: CacheView
) -> None:
    """At the tokens' original positions. With γ = 6 the window stays within a page here."""
    prompt = random_tokens(149, seed=6)
    sequence = opened(running, prompt, SamplingParams(seed=3))
    draft: Draft = done(running.submit(draft_over_view(sequence, SelfDraftRequest(0, DraftLimits(6), view), NONE)))
    pages = kept(sequence.cache, ranked(running, sequence, view.kind), 148)
    logits = seen(network, prompt + draft.tokens[:-1], pages, 148)
    for (ids, weights), row in zip(draft.distributions, logits.softmax(-1), strict=True):
        torch.testing.assert_close(torch.from_numpy(weights), row[ids], rtol=1e-4, atol=1e-6)
    whole = seen(network, prompt + draft.tokens[:-1], list(range(10)), 148)
    assert not torch.allclose(logits, whole, **ROUNDING)


def test_graphs_replay_passes_over_a_view(
    tiny_network: Callable[..., PreTrainedModel],
    network: PreTrainedModel,
    engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their positions are the sequence's and their lengths the view's; only the pass that is watched runs eagerly."""
    recorder = pretend_cuda(monkeypatch)
    running = engine(Model(tiny_network(VOCAB), None, "letters", attention=recorder.attention), kv_bytes=2**22)
    prompt = random_tokens(149, seed=6)
    sequence = opened(running, prompt, SamplingParams(seed=3))
    pages = kept(sequence.cache, ranked(running, sequence, "snap"), 148)
    replays = recorder.num_replays
    draft: Draft = done(running.submit(draft_over_view(sequence, SelfDraftRequest(0, DraftLimits(6), SNAP), NONE)))
    assert recorder.num_replays == replays + 6
    logits = seen(network, prompt + draft.tokens[:-1], pages, 148)
    for (ids, weights), row in zip(draft.distributions, logits.softmax(-1), strict=True):
        torch.testing.assert_close(torch.from_numpy(weights), row[ids], rtol=1e-4, atol=1e-6)


def test_other_ranks_read_and_write_the_same_places(running: Engine) -> None:
    cache = opened(running, random_tokens(149, seed=6)).cache
    tables = cache, view_of(cache, [0, 3, 1], SNAP, 0), cache.again(140)
    entries = [BatchEntry(table, [1, 2, 3], 1) for table in tables]
    for entry, theirs in zip(entries, Pass.of(entries).entries(cache.pool), strict=True):
        assert theirs.tokens == [1, 2, 3]
        for name in ("pages", "length", "position"):
            assert getattr(theirs.cache, name) == getattr(entry.cache, name)
        assert theirs.cache.slots(3) == entry.cache.slots(3)


# That nothing of it is kept


def rounds(running: Engine, sequence: Sequence, num: int, view: CacheView) -> set[int]:
    """``num`` rounds of up to five draft tokens; how many of them stood."""
    accepted = set()
    for i in range(num):
        at = sequence.position
        request = SelfDraftRequest(at, DraftLimits(1 + i % 5), view)
        draft: Draft = done(running.submit(draft_over_view(sequence, request, NONE)))
        verified: VerifyResult = done(running.submit(verification(sequence, draft)))
        accepted.add(verified.num_accepted)
        assert sequence.output[at:] == verified.tokens
        assert_cache_is_fresh(sequence, running.model)
    return accepted


@pytest.mark.parametrize("view", [WINDOW, SNAP, CHUNKS], ids=lambda view: view.kind)
def test_only_keys_over_all_pages_enter_the_prefix_index(running: Engine, view: CacheView) -> None:
    """The next turn finds this one's output in the index, every key as a fresh prefill computes it."""
    prompt = random_tokens(100, seed=7)
    sequence = opened(running, prompt, SamplingParams(seed=1), room=200)
    assert len(rounds(running, sequence, 30, view)) > 2
    written = prompt + sequence.output
    # A last draft of some pages, of which nothing is verified: the turn ends here.
    request = SelfDraftRequest(sequence.position, DraftLimits(50), view)
    drafted: Draft = done(running.submit(draft_over_view(sequence, request, NONE)))
    assert len(drafted.tokens) == 50
    running.close(sequence)
    following = opened(running, [*written, *drafted.tokens, 1])
    assert len(written) - PAGE <= following.cached_tokens <= len(written)
    assert_cache_is_fresh(following, running.model)


def test_reading_again_leaves_shared_pages_as_they_are(running: Engine) -> None:
    """The pass that ranks the pages reads cached tokens; what it computes for them must not be written, bit for bit."""
    prompt = random_tokens(100, seed=8)
    first = opened(running, prompt)
    pool = first.cache.pool
    before = [rows[:, : pool.spare_slot].clone() for rows in (*pool.keys, *pool.values)]
    filled = sorted(page * PAGE + i for page in first.cache.pages for i in range(PAGE))[:99]
    ranked(running, opened(running, prompt), "snap")
    for rows, old in zip((*pool.keys, *pool.values), before, strict=True):
        assert torch.equal(rows[:, filled], old[:, filled])


def test_a_closed_sequence_leaves_no_draft_behind(running: Engine, gates: Callable[[Model], object]) -> None:
    """Closed in the middle of a draft."""
    sequence = opened(running, random_tokens(100, seed=9))

    def cut_short() -> Task[None]:
        for token in range(3):
            yield ForwardRequest(sequence, [token], 1, view_of(sequence.cache, [0, 1], WINDOW, token))
        running.close(sequence)

    length = sequence.cache.length
    done(running.submit(cut_short()))
    assert sequence.cache.length == length
    again = opened(running, [*sequence.prompt, 0, 1, 2, 3])
    assert_cache_is_fresh(again, running.model)


def test_a_rollback_and_a_view_never_touch_another_s_pages() -> None:
    layout = KVLayout(1, 4, torch.float32, (torch.device("cpu"),))
    pool = KVPool(layout, 40 * PAGE * layout.bytes_per_token)
    cache = pool.open(list(range(100)), 120)
    assert cache is not None
    cache.advance(99)
    view = cache.view([0, 3], 5)
    assert (view.position, view.length, view.capacity) == (99, 99 - 3 * PAGE, 5 * PAGE)
    assert view.slots(2) == cache.slots(2)
    assert cache.again(97).slots(3) == [pool.spare_slot] * 2 + cache.slots(1)
    with pytest.raises(ValueError, match="cannot hold"):
        view.slots(40)


# A middle that refines


def test_refining_reads_each_token_once_and_tells_the_truncated_law(running: Engine, network: PreTrainedModel) -> None:
    prompt = random_tokens(149, seed=10)
    sequence = opened(running, prompt, SamplingParams(seed=5))
    pages = kept(sequence.cache, ranked(running, sequence, "chunks"), 148)
    drafted: list[int] = []
    whole = Draft(0)
    for below in ([], [3], [1, 2], [], [7]):
        passed = running.stats().tokens_processed
        request = RefineRequest(certain_draft(len(drafted), below), list(drafted), CHUNKS)
        refined: Draft = done(running.submit(refine(sequence, request, NONE)))
        assert running.stats().tokens_processed - passed == 1 + len(below)
        num_kept = len(refined.tokens) - 1
        assert refined.tokens[:num_kept] == below[:num_kept]
        assert num_kept == len(below) or refined.tokens[-1] != below[num_kept]  # a certain token comes not again
        for token in refined.each():
            whole.append(token, DraftLimits(99), NONE)
        drafted += refined.tokens
    assert_cache_is_fresh(sequence, running.model)
    logits = seen(network, prompt + drafted[:-1], pages, 148)
    for (ids, weights), row in zip(whole.distributions, logits.softmax(-1), strict=True):
        torch.testing.assert_close(torch.from_numpy(weights), row[ids], rtol=1e-4, atol=1e-6)
    done(running.submit(verification(sequence, whole)))
    assert_cache_is_fresh(sequence, running.model)


def test_a_request_for_another_position_is_an_error(running: Engine) -> None:
    sequence = begun(running, random_tokens(30, seed=1))
    with pytest.raises(ValueError, match="position 2 was asked of a sequence at 0"):
        done(running.submit(draft_over_view(sequence, SelfDraftRequest(2, DraftLimits(1), WINDOW), NONE)))
    with pytest.raises(ValueError, match="position 1 was asked of a sequence at 0"):
        done(running.submit(refine(sequence, RefineRequest(certain_draft(3, []), [1, 2], CHUNKS), NONE)))
