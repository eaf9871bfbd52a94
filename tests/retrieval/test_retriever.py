from __future__ import annotations

import itertools
import math
import pickle
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from qdrant_double import FakeServer

from retrieval import RetrievalError, RetrievalOptions, Retriever, TenantOptions
from retrieval.calibration import Calibration, Confidence
from retrieval.embedding import load_embedder
from retrieval.errors import StoreTimeout
from retrieval.kept import KeptVectors
from retrieval.options import MAX_QUERY_CHARACTERS
from retrieval.store import ChunkStore
from retrieval.vectors import ChunkVectors, embed_chunks

SMALL = RetrievalOptions(chunk_tokens=32, min_tokens=64, threshold=0.2, method="dense")
NEEDLE = "The password of the lighthouse is heliotrope. "


@pytest.fixture
def store(embedder):
    store = ChunkStore(dimension=embedder.dimension)
    yield store
    store.close()


@pytest.fixture
def retriever(embedder, store, tokenizer):
    return Retriever(embedder, store, tokenizer)


def in_store(store: ChunkStore) -> int:
    client = store._client
    return sum(client.count(each.name).count for each in client.get_collections().collections)


def hide(needle: str, prose: str) -> str:
    middle = prose.index("\n", len(prose) // 2)
    return prose[:middle] + "\n\n" + needle + "\n\n" + prose[middle:]


def test_the_passage_that_answers_is_found(retriever, prose):
    result = retriever.retrieve([prose[:3000], hide(NEEDLE, prose[:6000])], "password lighthouse", SMALL)
    assert any(chunk.content == 1 and NEEDLE.strip() in chunk.text for chunk in result.chunks)


def test_chunks_are_slices_of_their_contents_in_document_order(retriever, prose):
    contents = [prose[:4000], "", prose[4000:9000], prose[9000:12_000]]
    result = retriever.retrieve(contents, "the whale and the ship", replace(SMALL, min_tokens=400, threshold=0.0))
    positions = [chunk.position for chunk in result.chunks]
    assert len(positions) > 5 and positions == sorted(set(positions)) and positions[-1] < result.num_chunks
    places = [(chunk.content, chunk.start) for chunk in result.chunks]
    assert places == sorted(places) and {content for content, _ in places} <= {0, 2, 3}
    for chunk in result.chunks:
        assert chunk.text == contents[chunk.content][chunk.start : chunk.end] and chunk.text.strip()
    assert result.retrieved_tokens == sum(chunk.num_tokens for chunk in result.chunks)


def test_the_best_chunks_are_kept(retriever, prose):
    text, query = prose[:6000], "a whale in the sea"
    everything = retriever.retrieve([text], query, replace(SMALL, threshold=-1, min_tokens=10**6))
    some = retriever.retrieve([text], query, replace(SMALL, threshold=-1))
    assert len(everything.chunks) == everything.num_chunks and everything.retrieved_tokens == everything.context_tokens
    worst_kept = min(chunk.score for chunk in some.chunks)
    left = SMALL.min_tokens - some.retrieved_tokens
    for chunk in everything.chunks:
        assert chunk in some.chunks or chunk.score <= worst_kept or chunk.num_tokens > left


@pytest.mark.parametrize(
    ("context_tokens", "options", "budget"),
    [
        (7000, RetrievalOptions(), 1024),
        (7000, RetrievalOptions(min_tokens=4096), 4096),
        (122_880, RetrievalOptions(), 5120),
        (122_881, RetrievalOptions(), 5632),
        (600, RetrievalOptions(), 1024),
        (100, RetrievalOptions(), 512),
        (0, RetrievalOptions(), 0),
        (7000, RetrievalOptions(min_tokens=0, fraction=0), 0),
        (7000, RetrievalOptions(max_tokens=700), 700),
        (10**6, RetrievalOptions(max_tokens=700), 700),
    ],
)
def test_the_budget_is_the_papers_in_whole_chunks_unless_it_is_given(context_tokens, options, budget):
    """Paper, section 4.1: max(min(min_tokens, L), L/24) tokens, ceil(budget / chunk_tokens) chunks."""
    assert options.budget(context_tokens) == budget
    if options.max_tokens is None:
        rule = max(min(options.min_tokens, context_tokens), context_tokens / 24 if options.fraction else 0)
        assert budget == math.ceil(rule / 512) * 512


@pytest.mark.parametrize("max_tokens", [1, 10, 31, 100, 333])
def test_a_given_budget_is_never_exceeded(retriever, prose, max_tokens):
    options = replace(SMALL, threshold=-1, max_tokens=max_tokens)
    result = retriever.retrieve([prose[:3000]], "the whale and the ship", options)
    assert 0.5 * max_tokens <= result.retrieved_tokens <= max_tokens


def test_short_messages_fill_the_budget_though_they_are_short(retriever):
    """Counting chunks instead of tokens would keep two of these messages."""
    messages = [f"message {i} about the whale" for i in range(40)]
    result = retriever.retrieve(messages, "the whale", SMALL)
    assert len(result.chunks) > 4 and result.retrieved_tokens <= 64


def test_nothing_above_the_threshold_keeps_the_best_and_says_so(retriever, prose):
    result = retriever.retrieve([prose[:3000]], "whale xylophone quartz", replace(SMALL, threshold=0.9))
    assert not result.reaches_threshold and result.num_chunks > 0
    best = retriever.retrieve([prose[:3000]], "whale xylophone quartz", replace(SMALL, threshold=-1))
    assert result.chunks == best.chunks != () and best.reaches_threshold


@pytest.mark.parametrize(
    ("contents", "query"),
    [([], "whale"), ([""], "whale"), ([" \n\t "], "whale"), (["A whale."], " \n"), (["A whale."], "")],
)
def test_nothing_to_search_or_to_ask_keeps_nothing(retriever, embedder, contents, query):
    assert retriever.retrieve(contents, query, SMALL).chunks == ()
    assert embedder.embedded == []


def test_blank_chunks_are_counted_as_context_but_never_embedded(retriever, embedder, tokenizer):
    text = "A white whale." + "\n\n" * 500 + "A black ship."
    result = retriever.retrieve([text], "white whale", replace(SMALL, chunk_tokens=4, threshold=-1, min_tokens=10**6))
    assert embedder.embedded and all(text.strip() for text in embedder.embedded)
    assert result.num_chunks == len(embedder.embedded) == len(result.chunks)
    assert result.context_tokens > result.retrieved_tokens


def test_nothing_stays_after_a_request(retriever, store, prose):
    retriever.retrieve([prose[:3000]], "whale", SMALL)
    assert in_store(store) == 0


@pytest.mark.parametrize("step", ["search", "add"])
def test_nothing_stays_after_a_request_that_failed(retriever, store, prose, monkeypatch, step):
    add = store.add

    def fail(namespace, *args, **kwargs):
        if step == "add":
            add(namespace, ChunkVectors(*(part[:2] for part in args[0])))  # a write that breaks off
        assert in_store(store) > 0
        raise RetrievalError("broken")

    monkeypatch.setattr(store, step, fail)
    with pytest.raises(RetrievalError, match="broken"):
        retriever.retrieve([prose[:3000]], "whale", SMALL)
    assert in_store(store) == 0


def test_kept_contents_are_embedded_once(retriever, embedder, store, prose):
    keep = replace(SMALL, keep=True)
    first = retriever.retrieve([prose[:3000]], "the whale", keep)
    embedder.embedded.clear()
    again = retriever.retrieve([prose[:3000]], "the whale", keep)
    assert embedder.embedded == [] and again.chunks == first.chunks and in_store(store) == first.num_chunks
    other = retriever.retrieve([prose[:3000]], "the ship", keep)
    assert embedder.embedded == [] and other.chunks != first.chunks


def test_kept_contents_are_found_only_by_what_was_embedded(retriever, embedder, store, prose, tokenizer):
    keep = replace(SMALL, keep=True)
    another = type(embedder)()
    another.name = "other words"
    for asked, contents, options in [
        (retriever, [prose[:3000]], keep),
        (retriever, [prose[:3000] + "x"], keep),
        (retriever, [prose[:1500], prose[1500:3000]], keep),
        (retriever, [prose[:3000]], replace(keep, chunk_tokens=16)),
        (Retriever(another, store, tokenizer), [prose[:3000]], keep),
    ]:
        embedder.embedded.clear()
        asked.retrieve(contents, "the whale", options)
        assert embedder.embedded or another.embedded


def test_a_tenant_finds_what_it_kept_itself_alone(retriever, embedder, prose):
    """How long a retrieval takes would else tell that another has the same text."""
    options = {
        tenant: TenantOptions(**asdict(replace(SMALL, keep=True)), tenant=tenant, client=tenant) for tenant in "ab"
    }
    for tenant, is_embedded in (("a", True), ("b", True), ("a", False), ("b", False)):
        embedder.embedded.clear()
        retriever.retrieve([prose[:3000]], "the whale", options[tenant])
        assert bool(embedder.embedded) == is_embedded, tenant


def test_a_kept_text_is_embedded_once_across_restarts(retriever, embedder, store, prose, tokenizer, tmp_path):
    def made() -> Retriever:
        return Retriever(embedder, ChunkStore(dimension=embedder.dimension, folder=tmp_path), tokenizer)

    steps = list(made().keep(prose[:3000], SMALL.chunk_tokens))
    assert [step.num_embedded for step in steps] == sorted({step.num_embedded for step in steps})
    assert (steps[0].num_embedded, steps[-1].num_embedded) == (0, steps[0].num_chunks) and len(steps) > 3
    assert len(embedder.embedded) == steps[0].num_chunks

    embedder.embedded.clear()
    later, contents = made(), [prose[:3000], prose[3000:4000]]
    assert list(later.keep(prose[:3000], SMALL.chunk_tokens)) == [steps[-1]]
    assert embedder.embedded == []
    found = later.retrieve(contents, "the whale", SMALL)
    assert "".join(embedder.embedded) == contents[1]  # beside another content, too
    expected = retriever.retrieve(contents, "the whale", SMALL)
    assert [chunk.position for chunk in found.chunks] == [chunk.position for chunk in expected.chunks] != []

    later.delete(steps[-1].namespace)
    embedder.embedded.clear()
    assert list(tmp_path.iterdir()) == []
    made().retrieve(contents[:1], "the whale", SMALL)
    assert embedder.embedded


def test_kept_vectors_that_are_cut_short_are_made_again(embedder, prose, tokenizer, tmp_path):
    def keep() -> int:
        store = ChunkStore(dimension=embedder.dimension, folder=tmp_path)
        return len(list(Retriever(embedder, store, tokenizer).keep(prose[:3000], 64)))

    assert keep() > 1 and keep() == 1
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert keep() > 1 and keep() == 1


def test_a_broken_write_does_not_poison_kept_contents(retriever, store, prose, monkeypatch):
    keep = replace(SMALL, keep=True)
    expected = retriever.retrieve([prose[:3000]], "the whale", SMALL)
    add = store.add

    def break_off(namespace, vectors, **how):
        add(namespace, ChunkVectors(vectors.dense[:2], vectors.context[:2], vectors.sparse[:2]), **how)
        raise RetrievalError("broken")

    with monkeypatch.context() as patch, pytest.raises(RetrievalError, match="broken"):
        patch.setattr(store, "add", break_off)
        retriever.retrieve([prose[:3000]], "the whale", keep)
    assert in_store(store) == 2
    assert retriever.retrieve([prose[:3000]], "the whale", keep).chunks == expected.chunks


def test_concurrent_requests_see_only_their_own_contents(retriever, embedder, store, prose, monkeypatch):
    texts = [prose[i * 2000 : i * 2000 + 1000 + 150 * i] for i in range(6)]
    expected = [retriever.retrieve([text], "the whale and the ship", SMALL).chunks for text in texts]
    embed_query, wrong = embedder.embed_query, []

    def slow(query: str, _salt: str = ""):
        if query == "the whale and the ship":
            time.sleep(0.01)  # between storing and searching, so that requests overlap there
        return embed_query(query)

    monkeypatch.setattr(embedder, "embed_query", slow)

    def work(i: int) -> None:
        for _ in range(3):
            try:
                if retriever.retrieve([texts[i]], "the whale and the ship", SMALL).chunks != expected[i]:
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and in_store(store) == 0


def test_results_and_options_travel_between_processes(retriever, prose):
    result = retriever.retrieve([prose[:3000]], "the whale", SMALL)
    assert result.chunks and result.elapsed_ms > 0
    assert pickle.loads(pickle.dumps((result, SMALL))) == (result, SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_tokens", 0),
        ("method", "magic"),
        ("rerank_candidates", 0),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("min_tokens", -1),
        ("fraction", 1.1),
        ("fraction", -0.1),
        ("max_tokens", 0),
    ],
)
def test_an_option_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        RetrievalOptions(**{field: value})


def test_a_real_embedder_finds_the_answer_in_a_novel(minilm, prose, tokenizer):
    """End to end on 4K tokens or so, the answer in other words than the question."""
    embedder = load_embedder(minilm)
    retriever = Retriever(embedder, ChunkStore(dimension=embedder.dimension), tokenizer)
    text = hide("Philippa, daughter of the lighthouse keeper, grew up on sardines in Lisbon.", prose[:12_000])
    query = "In which city did the girl at the lighthouse spend her childhood?"
    result = retriever.retrieve([text], query, RetrievalOptions(chunk_tokens=128))
    best = max(result.chunks, key=lambda chunk: chunk.score)
    assert "Lisbon" in best.text and result.retrieved_tokens <= 1024 < result.context_tokens


def test_what_is_dropped_while_it_is_embedded_is_not_stored(retriever, store, prose):
    keeping = retriever.keep(prose[:3000], SMALL.chunk_tokens)
    namespace = next(keeping).namespace
    next(keeping)
    retriever.delete(namespace)
    *_, last = keeping
    assert last.num_embedded < last.num_chunks and store.count(namespace) == 0
    assert [*retriever.keep(prose[:3000], SMALL.chunk_tokens)][-1].num_embedded == store.count(namespace) > 0


def test_a_retrieval_that_nobody_waits_for_ends_between_two_batches(retriever, embedder, store, prose):
    """Closing the steps, as their caller does when its client leaves, ends the work and leaves nothing."""
    contents = [prose[:20_000]]
    in_all = retriever.retrieve(contents, "the whale", SMALL).num_chunks
    steps = retriever.steps(contents, "the whale", SMALL)
    embedder.embedded.clear()
    while not embedder.embedded:
        assert next(steps) is None
    steps.close()
    assert len(embedder.embedded) < in_all / 4 and in_store(store) == 0


def test_chunks_are_cut_step_by_step(retriever, embedder, prose):
    steps = retriever.steps([prose[:20_000]], "the whale", SMALL)
    assert [next(steps) for _ in range(3)] == [None] * 3 and embedder.embedded == []
    assert [step for step in steps if step] != []


def test_what_requests_keep_is_bounded_for_each_client(embedder, store, tokenizer, prose):
    """The least recently used goes first, and another client's stays."""
    texts = [prose[i * 1000 : (i + 1) * 1000] for i in range(6)]
    num_chunks = [
        Retriever(embedder, store, tokenizer).retrieve([text], "the whale", SMALL).num_chunks for text in texts
    ]
    a_text = max(num_chunks) * 2 * 256 * 4 + 4096  # and its words
    most = 2.5 * a_text  # so two or three fit
    retriever = Retriever(embedder, store, tokenizer, KeptVectors(max_mb=most / 1e6))

    def keep(text: str, client: str = "hostile") -> bool:
        """Whether it had to be embedded."""
        embedder.embedded.clear()
        retriever.retrieve([text], "the whale", TenantOptions(**vars(SMALL) | {"keep": True}, client=client))
        return bool(embedder.embedded)

    assert keep(texts[5], "honest")
    assert keep(texts[0]) and keep(texts[1]) and not keep(texts[0])
    for text in texts[2:5]:
        assert keep(text)
    assert in_store(store) * 2 * 256 * 4 < most + a_text
    assert keep(texts[1]) and not keep(texts[5], "honest")


def test_what_was_used_last_stays_longest(monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr("retrieval.kept.time.time", lambda: float(next(moments)))
    kept = KeptVectors(max_mb=2 * (4096 + 4 * 100) / 1e6)  # room for two of a hundred numbers
    assert kept.reserve("first", "me", 100) == kept.reserve("second", "me", 100) == []
    kept.use("first")
    assert kept.reserve("third", "me", 100) == ["second"]


def test_what_makes_room_for_the_same_request_is_still_found(embedder, store, tokenizer, prose):
    contents = [prose[i * 1000 : (i + 1) * 1000] for i in range(6)]
    options = replace(SMALL, threshold=-1)
    expected = Retriever(embedder, store, tokenizer).retrieve(contents, "the whale", options).chunks
    few = Retriever(embedder, store, tokenizer, KeptVectors(max_mb=0.1))
    assert few.retrieve(contents, "the whale", replace(options, keep=True)).chunks == expected
    assert 0 < in_store(store) * 2 * 256 * 4 < 0.1e6


def test_what_is_larger_than_all_room_is_not_kept(embedder, store, tokenizer, prose):
    retriever = Retriever(embedder, store, tokenizer, KeptVectors(max_mb=0.02))
    assert retriever.retrieve([prose[:3000]], "the whale", replace(SMALL, keep=True)).chunks
    assert in_store(store) == 0


def test_what_requests_keep_expires_also_after_a_restart(embedder, tokenizer, prose, tmp_path):
    def made(max_age_s: float = 1000) -> Retriever:
        store = ChunkStore(dimension=embedder.dimension, folder=tmp_path / "vectors")
        return Retriever(embedder, store, tokenizer, KeptVectors(tmp_path, max_age_s=max_age_s))

    keep = replace(SMALL, keep=True)
    made().retrieve([prose[:1000]], "the whale", keep)
    *_, of_a_file = made().keep(prose[1000:2000], SMALL.chunk_tokens)
    made().retrieve([prose[1000:2000]], "the whale", keep)
    made().retrieve([prose[2000:3000]], "the whale", keep)
    assert len(list((tmp_path / "vectors").iterdir())) == 3
    later = made(max_age_s=0)
    later.retrieve([prose[3000:4000]], "the whale", keep)
    assert len(list((tmp_path / "vectors").iterdir())) == 2  # the file's, and the latest
    assert (tmp_path / "vectors" / f"{of_a_file.namespace}.npz").exists()


def test_what_a_file_needs_is_no_requests_any_more(retriever, embedder, store, prose):
    """A file whose text a request has kept before: its vectors go with the file alone."""
    retriever.retrieve([prose[:1000]], "the whale", replace(SMALL, keep=True))
    embedder.embedded.clear()
    *_, done = retriever.keep(prose[:1000], SMALL.chunk_tokens)
    assert embedder.embedded == [] and done.num_embedded == done.num_chunks
    retriever._kept._max_age_s = 0
    retriever.retrieve([prose[1000:2000]], "the whale", replace(SMALL, keep=True))
    assert store.count(done.namespace) == done.num_chunks


def test_a_retrieval_that_runs_out_of_the_stores_time_fails(embedder, tokenizer, monkeypatch):
    monkeypatch.setattr("retrieval.retriever._STORE_TIME_S", 0.0)
    question = (["a whale in the ocean"], "whale", RetrievalOptions())
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(StoreTimeout):
        Retriever(embedder, ChunkStore(server.url, dimension=embedder.dimension), tokenizer).retrieve(*question)
    server.shutdown()
    server.server_close()
    assert Retriever(embedder, ChunkStore(dimension=embedder.dimension), tokenizer).retrieve(*question).chunks


def filler(i: int) -> str:
    return f"Line {i} tells of the sea and of a ship and of nothing else. " * 2


@pytest.fixture
def rare(retriever):
    """A text in which the rare word stands once; the common words of the query are everywhere."""
    lines = [filler(i) for i in range(40)]
    lines[23] = "Of the sea and of a ship there is a quillwort. "
    return "\n\n".join(lines), "the sea and of a ship quillwort"


@pytest.mark.parametrize("method", ["sparse", "hybrid"])
def test_a_rare_word_outweighs_common_ones(retriever, rare, method):
    text, query = rare
    options = replace(SMALL, method=method, max_tokens=40, threshold=-1)
    assert any("quillwort" in chunk.text for chunk in retriever.retrieve([text], query, options).chunks)


def test_words_alone_need_no_embedder(retriever, embedder, rare):
    text, query = rare
    result = retriever.retrieve([text], query, replace(SMALL, method="sparse", threshold=0.99))
    assert embedder.embedded == [] and result.chunks and result.reaches_threshold
    nothing = retriever.retrieve([text], "xylophone", replace(SMALL, method="sparse"))
    assert nothing.chunks and not nothing.reaches_threshold and nothing.chunks[0].position == 0


def test_a_hybrid_search_is_gated_by_the_cosine(retriever, rare):
    """Its own scores are ranks, which say nothing about how near the best chunk is."""
    text, query = rare
    options = replace(SMALL, method="hybrid")
    found = retriever.retrieve([text], query, replace(options, threshold=-1))
    best = max(chunk.score for chunk in retriever.retrieve([text], query, replace(options, max_tokens=10**6)).chunks)
    for above in (-0.01, 0.01):
        result = retriever.retrieve([text], query, replace(options, threshold=best + above))
        assert result.reaches_threshold == (above < 0) and result.chunks == found.chunks


@pytest.mark.parametrize("method", ["dense", "sparse", "hybrid"])
def test_kept_and_passing_contents_are_ranked_together(retriever, embedder, store, prose, tokenizer, method):
    """As if all were sent at once, in process and on a server."""
    contents, query = [prose[:3000], prose[3000:6000], prose[6000:8000]], "the whale and the captain"
    options = replace(SMALL, method=method)
    expected = retriever.search(retriever.chunks(contents, options)[0], query, options)
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served = ChunkStore(server.url, dimension=embedder.dimension)
    served.add("anothers", embed_chunks(embedder, [["whale"] * 9]))  # no part of the IDF
    try:
        for where in (store, served):
            mixed = Retriever(embedder, where, tokenizer)
            list(mixed.keep(contents[1], SMALL.chunk_tokens))
            found = mixed.search(mixed.chunks(contents, options)[0], query, options)
            assert found.scores == pytest.approx(expected.scores, abs=1e-5)
            # Equal scores have ranks in whatever order, so that neighbours may change places.
            assert all(abs(found.order.index(i) - place) <= 2 for place, i in enumerate(expected.order[:10]))
    finally:
        server.shutdown()
        server.server_close()


def test_a_reranker_orders_the_best_chunks_anew(embedder, store, tokenizer, rare):
    text, query = rare
    read: list[str] = []

    def rerank(asked: str, texts: list[str]) -> list[float]:
        assert asked == query
        read.extend(texts)
        return [float("Line 31 " in each) for each in texts]

    retriever = Retriever(embedder, store, tokenizer, rerank=rerank)
    options = replace(SMALL, method="hybrid", threshold=-1, max_tokens=40, rerank_candidates=40)
    assert any("Line 31 " in chunk.text for chunk in retriever.retrieve([text], query, options).chunks)
    read.clear()
    retriever.retrieve([text], query, replace(options, rerank_candidates=3))
    assert len(read) == 3


def test_the_threshold_and_the_confidence_are_the_embedders(embedder, store, tokenizer, prose):
    """sigmoid(top·s + margin·z + bias), held to its closed form."""
    calibration = Calibration(0.95, Confidence(2.0, 0.5, -1.5), Confidence(0.1, 0.0, 0.0))
    retriever = Retriever(embedder, store, tokenizer, calibration=calibration)
    options = replace(SMALL, threshold=None, method="hybrid", max_tokens=10**6)
    result = retriever.retrieve([prose[:3000]], "the whale", options)
    scores = np.array([chunk.score for chunk in result.chunks])
    assert len(scores) == result.num_chunks and not result.reaches_threshold
    *others, top = sorted(scores)
    x = 2.0 * top + 0.5 * min((top - np.mean(others)) / np.std(others), 8.0) - 1.5
    assert result.confidence == pytest.approx(1 / (1 + np.exp(-x)), abs=1e-4)
    assert retriever.retrieve([prose[:3000]], " ", options).confidence == 0


def test_of_a_query_of_a_megabyte_the_beginning_is_read(embedder, store, tokenizer, monkeypatch):
    read = []
    asked = embedder.embed_query
    monkeypatch.setattr(embedder, "embed_query", lambda query, salt="": (read.append(query), asked(query))[1])
    ranked = []
    rerank = lambda query, texts: (ranked.append(query), [0.0] * len(texts))[1]  # noqa: E731
    retriever = Retriever(embedder, store, tokenizer, rerank=rerank)
    query = "whale " * 200_000
    assert retriever.retrieve(["A whale swims."], query, RetrievalOptions()).chunks
    retriever.search(retriever.chunks(["A whale swims."], RetrievalOptions())[0], query, RetrievalOptions())
    assert max(map(len, read + ranked)) == MAX_QUERY_CHARACTERS
