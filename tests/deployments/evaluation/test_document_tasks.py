"""XQuAD, QMSum, LooGLE and NQ: which part of a document is read, where the evidence is, prompts and scores."""

import json

import pytest
from words import asked, num_tokens, text, write

from deployments.evaluation.tasks import make_task

SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"Paragraph {i} says that the answer is value{i}. " + f"filler{i} " * 20,
                    "qas": [{"id": f"q{i}", "question": f"What does {i} say?", "answers": [{"text": f"value{i}"}]}],
                }
                for i in range(12)
            ],
        }
    ]
}


def test_xquad_is_one_document(tmp_path):
    (tmp_path / "xquad.en.json").write_text(json.dumps(SQUAD))
    questions = asked("xquad_en", tmp_path)
    assert len(questions) == 12
    assert len({text(question).rpartition("\n\nNow")[0] for question in questions}) == 1
    assert text(questions[5]).startswith("Read the following text and answer briefly.\n\nParagraph 0 says")
    assert text(questions[5]).endswith(
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: What does 5 say?\nAnswer:"
    )
    assert questions[5].whole == ""
    assert make_task("xquad_en").score(questions[5], "the value5") == {"f1": 1, "exact_match": 1, "match": 1}


def test_xquad_reads_the_part_with_the_question_where_it_is_too_long(tmp_path):
    (tmp_path / "xquad.en.json").write_text(json.dumps(SQUAD))
    questions = asked("xquad_en", tmp_path, context_tokens=160)
    for question in questions:
        assert num_tokens(question) <= 160
        assert question.facts["gold"]["text"] in text(question)
        assert question.references[0] in text(question)
        assert "Paragraph 0" in question.whole and "Paragraph 11" in question.whole
    assert 2 < len({question.document for question in questions}) < 12
    named = [question.document for question in questions]
    assert sorted(named, key=int) == named  # a cache serves the questions of a document in a row


def test_xquad_in_chinese_counts_characters(tmp_path):
    data = {
        "data": [
            {
                "paragraphs": [
                    {"context": "中文", "qas": [{"id": "1", "question": "谁？", "answers": [{"text": "黑豹队"}]}]}
                ]
            }
        ]
    }
    (tmp_path / "xquad.zh.json").write_text(json.dumps(data))
    (question,) = asked("xquad_zh", tmp_path)
    assert text(question).endswith("\n\n问题：谁？\n回答：")
    assert make_task("xquad_zh").score(question, "是黑豹队。") == {
        "f1": pytest.approx(6 / 7),
        "exact_match": 0,
        "match": 1,
    }


MEETING = {
    "meeting_transcripts": [{"speaker": f"S{i}", "content": f"says{i} " * 10} for i in range(30)],
    "general_query_list": [{"query": "Summarize the whole meeting.", "answer": "All."}],
    "specific_query_list": [
        {"query": "What of four?", "answer": "Four.", "relevant_text_span": [["4", "5"]]},
        {"query": "What of the middle?", "answer": "Middle.", "relevant_text_span": [["14", "14"], ["20", "20"]]},
    ],
}


def test_qmsum(tmp_path):
    write(tmp_path / "qmsum_test.jsonl", [MEETING])
    whole, _ = asked("qmsum", tmp_path)
    assert text(whole).startswith(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\nS0: says0 says0"
    )
    assert text(whole).endswith(
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: What of four?\nAnswer:"
    )
    assert whole.group == "evidence: all" and whole.max_tokens == 512
    assert len(asked("qmsum:queries=all", tmp_path)) == 3
    assert [question.query for question in asked("qmsum:queries=general", tmp_path)] == ["Summarize the whole meeting."]

    near, middle = asked("qmsum", tmp_path, context_tokens=200)
    assert (near.group, middle.group) == ("evidence: all", "evidence: none")
    assert num_tokens(near) == 200 and near.whole.count("\n") == 29

    near, middle = asked("qmsum:keep=evidence", tmp_path, context_tokens=260)
    assert (near.group, middle.group) == ("evidence: all", "evidence: all")
    assert num_tokens(middle) <= 260 and middle.facts["turns"] == [[14, 14], [20, 20]]
    assert near.document != middle.document


def loogle_row(questions, as_text=True):
    sentences = [f"Sentence {i} tells of thing{i} and more." for i in range(60)]
    pairs = [{"S": s, "Q": q, "A": a} for s, q, a in questions]
    return {"input": " ".join(sentences), "title": "T", "qa_pairs": str(pairs) if as_text else pairs, "output": "none"}


def test_loogle(tmp_path):
    middle = "Sentence 30 tells of thing30 and more. Sentence 31 tells of thing31 and more."
    row = loogle_row(
        [(middle, "What is in the middle?", "thing30"), (["Sentence 0 tells of thing0 and more."], "First?", 3)]
    )
    write(tmp_path / "loogle_shortdep_qa.jsonl", [row])
    first, second = asked("loogle_short", tmp_path)
    assert text(first).startswith("Please answer the question based on the long texts below. \nSentence 0 tells")
    assert text(first).endswith("thing59 and more.\nQuestion: What is in the middle?\nAnswer: ")
    assert (first.max_tokens, second.references) == (300, ("3",))
    cut, kept = (asked(f"loogle_short:keep={keep}", tmp_path, context_tokens=240) for keep in ("ends", "evidence"))
    assert [question.group for question in cut] == ["evidence: none", "evidence: all"]
    assert [question.group for question in kept] == ["evidence: all", "evidence: all"]
    assert max(map(num_tokens, cut + kept)) <= 240
    task = make_task("loogle_short:judged=true")
    assert task.metric == "correct"
    assert task.judge.messages(first, "x")[1]["content"].endswith("\npredict_answer = x")
    assert task.judge.scores("True") == {"correct": 1}
    assert make_task("loogle_long").judge is None


def test_a_list_of_pairs_is_read_as_well_as_its_literal(tmp_path):
    row = loogle_row([("Sentence 1", "What?", "A")], as_text=False)
    assert len(asked("loogle_long", write(tmp_path / "longdep_qa.jsonl", [row]))) == 1


def nq_rows(number):
    return [
        {
            "question": f"what is thing{i}x",
            "answers": [f"answer{i}x"],
            "ctxs": [{"title": f"Title{i}", "text": f"thing{i}x is answer{i}x " + "filler " * 16, "isgold": True}],
        }
        for i in range(number)
    ]


def position(question):
    gold = question.facts["gold"]["text"]
    documents = text(question).split("\nDocument [")[1:]
    return next((i for i, document in enumerate(documents) if gold in document), None), len(documents)


def test_nq_puts_the_gold_passage_at_its_depth(tmp_path):
    path = write(tmp_path / "nq_open_oracle.jsonl", nq_rows(40))
    first = asked("nq:depth=0", path, context_tokens=500)[3]
    assert text(first).startswith(
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\nDocument [1](Title: Title3) thing3x is answer3x"
    )
    assert text(first).endswith("\n\nQuestion: what is thing3x\nAnswer:")
    assert first.whole == ""  # nothing had to be cut off
    for depth in (0, 0.5, 1):
        for question in asked(f"nq:depth={depth}", path, context_tokens=500, limit=10):
            at, number = position(question)
            assert number == question.facts["passages"] and number > 8
            assert at == round(depth * (number - 1))
            assert 500 - 60 < num_tokens(question) <= 500 and question.whole == ""
    groups = {question.group for question in asked("nq", path, context_tokens=500)}
    assert groups == {f"depth {depth:g}" for depth in (0, 0.25, 0.5, 0.75, 1)}


def test_nq_without_the_gold_passage_has_no_answer_anywhere(tmp_path):
    rows = nq_rows(40)
    rows[7]["answers"] = ["answer8x"]  # another question's passage has it too
    for question in asked("nq:depth=absent", write(tmp_path / "nq_open_oracle.jsonl", rows), context_tokens=500):
        assert not any(answer in text(question) for answer in question.references)
        assert question.group == "absent"


def test_nq_shares_documents(tmp_path):
    path = write(tmp_path / "nq_open_oracle.jsonl", nq_rows(40))
    questions = asked("nq:depth=shared", path, context_tokens=500)
    assert len({question.id for question in questions}) == 40
    assert len({text(question).rpartition("\n\nQuestion")[0] for question in questions}) < 8
    for question in questions:
        assert position(question)[0] is not None and num_tokens(question) <= 500 and question.whole == ""
    fewer = asked("nq:depth=shared", path, context_tokens=500, limit=15)
    assert fewer == questions[:15]
    assert {question.group for question in questions} == {f"fifth {i} of 5" for i in range(1, 6)}
