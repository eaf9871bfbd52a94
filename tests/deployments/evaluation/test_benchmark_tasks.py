"""LongBench v2, ∞Bench and MT-Bench-101: prompts letter by letter, references and scores."""

import json
from collections import Counter

import pytest
from words import asked, num_tokens, text, write

from deployments.evaluation.tasks import make_task

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
