"""Tasks that read a benchmark's file: prompts letter by letter, references, scores, and what wrong files say."""

import json
from collections import Counter

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from words import Words, asked, num_tokens, text

from deployments.evaluation.task import EvaluationError, TaskSettings, chosen
from deployments.evaluation.tasks import TASKS, make_task


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


LONGBENCH = {
    "_id": "66f",
    "domain": "QA",
    "sub_domain": "Novel",
    "difficulty": "hard",
    "length": "short",
    "question": " Who? ",
    "choice_A": "Ann",
    "choice_B": "Ben ",
    "choice_C": "Cy",
    "choice_D": "Di",
    "answer": "B",
    "context": "\nOnce upon a time.\n",
}


def test_longbench_v2(tmp_path):
    data = tmp_path / "longbench_v2.json"
    data.write_text(json.dumps([LONGBENCH, {**LONGBENCH, "_id": "2", "length": "long"}]))
    (question,) = asked("longbench_v2:length=short", tmp_path)
    assert text(question) == (
        "Please read the following text and answer the question below.\n\n<text>\nOnce upon a time.\n</text>\n\n"
        "What is the correct answer to this question: Who?\nChoices:\n(A) Ann\n(B) Ben\n(C) Cy\n(D) Di\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (question.references, question.max_tokens, question.group, question.then) == (
        ("B",),
        128,
        "hard, short",
        None,
    )
    assert question.query == "Who?\nChoices:\n(A) Ann\n(B) Ben\n(C) Cy\n(D) Di"
    task = make_task("longbench_v2")
    assert task.score(question, "The correct answer is (B).") == {"accuracy": 1, "answered": 1}
    assert task.score(question, "The correct answer is (C).") == {"accuracy": 0, "answered": 1}
    assert task.score(question, "Ben") == {"accuracy": 0, "answered": 0}


def test_longbench_v2_with_a_chain_of_thought(tmp_path):
    (question,) = asked("longbench_v2_cot", write(tmp_path / "longbench_v2.jsonl", [LONGBENCH]))
    listed = "What is the correct answer to this question: Who?\nChoices:\n(A) Ann\n(B) Ben\n(C) Cy\n(D) Di\n\n"
    opening = "Please read the following text and answer the questions below.\n\n"
    steps = "Let’s think step by step:"
    assert text(question) == f"{opening}<text>\nOnce upon a time.\n</text>\n\n{listed}{steps}"
    assert question.max_tokens == 1024
    assert question.then is not None and question.then.max_tokens == 128
    (second,) = question.then.messages(" It is Ben. ")
    assert second["content"] == (
        f"{opening}The text is too long and omitted here.\n\n{listed}{steps} It is Ben.\n\n"
        "Based on the above, what is the single, most likely answer choice? "
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )


def test_infinitebench_books(tmp_path):
    row = {"id": 7, "context": "A book.", "input": "Who?", "answer": ["Ben", "Benjamin"], "options": []}
    write(tmp_path / "longbook_qa_eng.jsonl", [row])
    (question,) = asked("infinitebench_qa", tmp_path)
    assert text(question) == (
        "Read the book and answer the question. Be very concise in your answer.\n\nA book.\n\nQuestion: Who?\nAnswer:"
    )
    assert (question.references, question.max_tokens) == (("Ben", "Benjamin"), 40)
    assert make_task("infinitebench_qa").score(question, "the Benjamin") == {"f1": 1}

    write(tmp_path / "longbook_sum_eng.jsonl", [{**row, "answer": "Ben dies.\nThe end."}])
    (question,) = asked("infinitebench_sum", tmp_path)
    assert text(question) == "Summarize the book below.\n\nA book.\n\nSummary:"
    assert question.query == "Summarize the book."
    assert question.max_tokens == 1200
    assert make_task("infinitebench_sum").score(question, "the end\nBen dies") == {"rouge_lsum": 1, "rouge_l": 0.5}


@pytest.mark.parametrize("answer", [["Ben"], ["Ben", "B"], "Ben"])
def test_infinitebench_choices(tmp_path, answer):
    row = {"id": 1, "context": "A book.", "input": "Who?", "answer": answer, "options": ["Ann", "Ben", "Cy", "Di"]}
    write(tmp_path / "longbook_choice_eng.jsonl", [row])
    (question,) = asked("infinitebench_mc", tmp_path)
    assert text(question) == (
        "Read the book and answer the question.\n\nA book.\n\nQuestion: Who?\nA. Ann\nB. Ben\nC. Cy\nD. Di\n\n"
        "The letter of the correct answer is"
    )
    task = make_task("infinitebench_mc")
    assert [task.score(question, said)["accuracy"] for said in ("B", " B.", "Ben", "A", "Cy")] == [1, 1, 1, 0, 0]
    assert question.choices == ("Ann", "Ben", "Cy", "Di")


def test_prompts_above_the_limit_lose_their_middle(tmp_path):
    context = " ".join(f"w{i}" for i in range(100))
    write(tmp_path / "longbook_qa_eng.jsonl", [{"id": 1, "context": context, "input": "Who?", "answer": ["Ben"]}])
    (question,) = asked("infinitebench_qa", tmp_path, context_tokens=30)
    assert num_tokens(question) == 30
    assert text(question).startswith("Read the book")
    assert text(question).endswith(" w98 w99\n\nQuestion: Who?\nAnswer:")
    assert " w1 w88 " in text(question)  # 13 words before the book and 3 behind it: 2 and 12 of its own
    assert question.whole == context


def test_infinitebench_retrieval_from_files(tmp_path):
    row = {"id": 0, "context": "noise", "input": "What is the pass key?", "answer": ["71432"]}
    write(tmp_path / "passkey.jsonl", [row])
    (question,) = asked("infinitebench_passkey", tmp_path)
    assert text(question) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n\nnoise\n\nWhat is the pass key?\n\nThe pass key is"
    )
    assert question.max_tokens == 6
    task = make_task("infinitebench_passkey")
    assert [task.score(question, said)["accuracy"] for said in (" 71432. Remember", "7143", "1 71432")] == [1, 0, 0]

    write(tmp_path / "kv_retrieval.jsonl", [{**row, "input": 'Key: "k"', "answer": ["a-b"]}])
    (question,) = asked("infinitebench_kv_retrieval", tmp_path)
    assert text(question).endswith('below.\n\nnoise\n\nKey: "k"')
    assert make_task("infinitebench_kv_retrieval").score(question, '{"k": "a-b"}')["accuracy"] == 1
    assert make_task("infinitebench_kv_retrieval").score(question, "xa-b")["accuracy"] == 0


def test_mtbench101(tmp_path):
    def dialogue(i, length):
        return {
            "task": "MR" if i else "CM",
            "id": i,
            "history": [{"user": f"u{i} {j} " + "word " * 20, "bot": f"b{i} {j}"} for j in range(length)],
        }

    rows = [dialogue(i, 1 + i % 4) for i in range(40)]
    path = write(tmp_path / "mtbench101.jsonl", rows)
    questions = asked("mtbench101:turns=3", path, context_tokens=700)
    assert [question.id for question in questions][:3] == ["MR-2/3", "MR-3/4", "MR-6/3"]
    for question in questions:
        said = [message["content"] for message in question.messages]
        history = rows[int(question.item.removeprefix("MR-"))]["history"]
        own = [said.index(turn[role]) for turn in history[:-1] for role in ("user", "bot")]
        assert own == sorted(own)  # its own turns are there, in order, each answer behind its message
        assert all(answer == message + 1 for message, answer in zip(own[::2], own[1::2], strict=True))
        assert len(set(said)) == len(said)  # no turn stands there twice
        assert said[-1] == history[-1]["user"] and question.messages[-1]["role"] == "user"
        roles = [message["role"] for message in question.messages]
        assert roles == ["user", "assistant"] * (len(said) // 2) + ["user"]
        assert 700 - 64 < num_tokens(question) + 10 * (len(said) + 1) // 2 <= 700
    starts = [question.messages[0]["content"] for question in questions]
    assert Counter(starts).most_common(1)[0][1] > 10  # the dialogues between are the same
    question = questions[1]
    assert question.references == ("b3 3",)

    task = make_task("mtbench101")
    assert task.best == 10 and task.metric == "rating"
    system, user = task.judge.messages(question, "My answer.")
    assert "Rating: [[6]]" in system["content"] and "mathematics" in system["content"]
    assert user["content"].endswith("Assistant: My answer.\n</dialogue>\n\nReference solution:\nb3 3")
    assert user["content"].count("User: ") == 4  # the dialogue alone
    assert task.judge.scores("Good. Rating: [[8]]") == {"rating": 8}
    assert set(task.score(question, "b3")) == {"f1_to_reference"}

    as_published = asked("mtbench101:turns=3,rated=all,spread=false", path, limit=2)
    assert len({question.item for question in as_published}) == 2
    for question in as_published:
        turn = int(question.id.rpartition("/")[2])
        assert [message["content"] for message in question.messages] == [
            one[role] for one in rows[int(question.item[3:])]["history"][:turn] for role in ("user", "bot")
        ][:-1]
    assert [question.id for question in asked("mtbench101:rated=all,spread=false", path)][:3] == [
        "MR-1/1",
        "MR-1/2",
        "MR-2/1",
    ]
    rows[1]["task"] = "AR"  # whose first turn is given
    write(path, rows)
    assert [question.id for question in asked("mtbench101:rated=all,spread=false", path)][:2] == ["AR-1/2", "MR-2/1"]
    assert task.combine([7, 3, 9]) == 3


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


def test_a_limit_draws_by_the_seed_and_a_lower_one_draws_of_the_same():
    names = [f"q{i}" for i in range(100)]
    few, more, other = (
        chosen(names, str, TaskSettings(Words(), limit=limit, seed=seed)) for limit, seed in ((10, 0), (30, 0), (10, 1))
    )
    assert set(few) < set(more) and len(few) == 10 and len(more) == 30
    assert few == [name for name in names if name in few]  # in their order
    assert few != other
    assert chosen(names, str, TaskSettings(Words())) == names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "there is none of this name; there are longbench_v2, "),
        ("nq:depth=2", "depth"),
        ("nq:deep=1", "deep"),
        ("nq:depth", "NAME=VALUE"),
        ("qmsum:queries=some", "queries"),
        ("mtbench101:turns=few", "turns"),
    ],
)
def test_wrong_specs_name_what_is_wrong(spec, message):
    with pytest.raises(EvaluationError, match=message):
        make_task(spec)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("qmsum", None, "no qmsum_test.jsonl"),
        ("qmsum", "", "empty"),
        ("qmsum", "{", "line 1: it is no JSON"),
        ("qmsum", '{"meeting_transcripts": []}', "record 1: it has no field general_query_list, specific_query_list"),
    ],
)
def test_wrong_files_name_what_is_wrong(tmp_path, spec, content, message):
    if content is not None:
        (tmp_path / "qmsum_test.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        asked(spec, tmp_path)


def test_formats_that_are_none_are_refused(tmp_path):
    for name, task, content in (
        ("xquad.en.json", "xquad_en", '{"data": [{"paragraphs": [{}]}]}'),
        ("loogle_longdep_qa.jsonl", "loogle_long", '{"input": "a", "title": "t", "qa_pairs": "[{"}'),
        ("nq_open_oracle.jsonl", "nq", '{"question": "q", "answers": ["a"], "ctxs": [{"title": "t", "text": "x"}]}'),
        ("longbook_choice_eng.jsonl", "infinitebench_mc", '{"id": 1, "context": "c", "answer": "a", "options": ["b"]}'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(EvaluationError, match=r"format|list of questions|gold|four options"):
            asked(task, tmp_path)


def test_a_task_without_data_says_how_to_give_it():
    with pytest.raises(EvaluationError, match=r"--data \(qmsum_test.jsonl or test.jsonl, or its folder\)"):
        asked("qmsum")
    with pytest.raises(EvaluationError, match="--from-hub"):
        asked("longbench_v2")


def test_the_hub_is_asked_only_where_that_is_allowed(tmp_path, monkeypatch):
    path = write(tmp_path / "data.json", [LONGBENCH])
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **more: calls.append((args, more)) or str(path)
    )
    assert len(asked("longbench_v2", from_hub=True)) == 1
    assert len(asked("longbench_v2", path, from_hub=True)) == 1  # a file goes before the hub
    assert calls == [(("THUDM/LongBench-v2", "data.json"), {"repo_type": "dataset"})]

    def refuse(*args, **more):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(EvaluationError, match="xinrongzhang2022/InfiniteBench could not be downloaded: no connection"):
        asked("infinitebench_qa", from_hub=True)


def test_every_task_has_a_name_a_metric_and_a_scale():
    for name in TASKS:
        task = make_task(name)
        assert task.name == name and task.metric and task.best in (1, 10)
        assert task.combine([0.25, 0.75]) == (0.25 if name == "mtbench101" else 0.5)
    assert make_task("nq:depth=0.5").name == "nq:depth=0.5"
