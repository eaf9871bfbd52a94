from __future__ import annotations

import math
import pickle
import threading
import time
from dataclasses import replace

import pytest
from qdrant_double import FakeServer

from retrieval import RetrievalError, RetrievalOptions, Retriever
from retrieval.embedding import load_embedder
from retrieval.errors import StoreTimeout
from retrieval.store import ChunkStore

SMALL = RetrievalOptions(chunk_tokens=32, min_tokens=64, threshold=0.2)
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


def test_nothing_above_the_threshold_keeps_nothing(retriever, prose):
    result = retriever.retrieve([prose[:3000]], "xylophone quartz", replace(SMALL, threshold=0.9))
    assert result.chunks == () and result.retrieved_tokens == 0 and result.num_chunks > 0


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
            add(namespace, args[0][:2])  # a write that breaks off
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
        add(namespace, vectors[:2], **how)
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

    def slow(query: str):
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
