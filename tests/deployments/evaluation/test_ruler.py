"""RULER's thirteen tasks and ∞Bench's synthetic ones, as they are made here."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from words import Words, asked, num_tokens, text

from deployments.evaluation.task import EvaluationError, TaskSettings
from deployments.evaluation.tasks import TASKS, make_task

MADE = [name for name in TASKS if name.startswith("ruler_") and "qa" not in name]
SYNTHETIC = ["infinitebench_passkey", "infinitebench_number_string", "infinitebench_kv_retrieval"]


@pytest.fixture
def essay(tmp_path):
    generator = random.Random(0)
    sentences = [f"{' '.join(f'word{generator.randrange(500)}' for _ in range(8))}." for _ in range(300)]
    path = tmp_path / "essay.txt"
    path.write_text("\ufeff" + "\n".join(sentences))
    return path


@pytest.mark.parametrize("name", MADE)
def test_prompt_and_answer_fill_the_length(name, essay):
    questions = asked(name, essay, context_tokens=1_500, limit=4)
    assert [question.id for question in questions] == ["0", "1", "2", "3"]
    for question in questions:
        assert 0.9 * 1_500 < num_tokens(question) + question.max_tokens <= 1_500
        assert all(reference in text(question) for reference in question.references)
        assert make_task(name).score(question, " ".join(question.references)) == {"match": 1}
    assert len({text(question) for question in questions}) == 4


@pytest.mark.parametrize("name", MADE + SYNTHETIC)
def test_the_same_seed_makes_the_same_questions_whatever_the_limit(name, essay):
    data = None if name in SYNTHETIC else essay
    few = asked(name, data, context_tokens=1_200, limit=2)
    assert few == asked(name, data, context_tokens=1_200, limit=3)[:2]
    assert [text(one) for one in few] != [text(one) for one in asked(name, data, context_tokens=1_200, limit=2, seed=1)]


@pytest.mark.parametrize(
    ("name", "needles", "references", "tokens"),
    [
        ("niah_single_1", 1, 1, 128),
        ("niah_single_2", 1, 1, 128),
        ("niah_single_3", 1, 1, 128),
        ("niah_multikey_1", 4, 1, 128),
        ("niah_multikey_2", None, 1, 128),
        ("niah_multikey_3", None, 1, 128),
        ("niah_multivalue", 4, 4, 128),
        ("niah_multiquery", 4, 4, 128),
    ],
)
def test_needles(name, needles, references, tokens, essay):
    for question in asked(f"ruler_{name}", essay, context_tokens=1_500, limit=8):
        prompt = text(question)
        hidden = re.findall(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.", prompt)
        if needles is None:
            assert len(hidden) > 50  # other needles are the haystack
        else:
            assert len(hidden) == needles
        keys = prompt.rpartition(" for ")[2].removesuffix(" mentioned in the provided text is")
        keys = re.split(", and |, ", keys.removesuffix(" mentioned in the provided text are"))
        assert [value for key in keys for _, other, value in hidden if other == key] and {
            value for _, other, value in hidden if other in keys
        } == set(question.references)
        assert len(question.references) == references and question.max_tokens == tokens
        assert len(keys) == (4 if name == "niah_multiquery" else 1)
        kind = "uuid" if name.endswith("_3") else "number"
        pattern = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if kind == "uuid" else r"\d{7}"
        assert all(re.fullmatch(pattern, reference) for reference in question.references)
        if references == 1:
            assert prompt.startswith(
                f"A special magic {kind} is hidden within the following text. Make sure to memorize it."
            )
            assert prompt.endswith(
                f"\nWhat is the special magic {kind} for {keys[0]} mentioned in the provided text? "
                f"The special magic {kind} for {keys[0]} mentioned in the provided text is"
            )
        else:
            assert prompt.startswith("Some special magic numbers are hidden within the following text.")
            assert "I will quiz you about the numbers afterwards.\n" in prompt
            assert prompt.endswith(" mentioned in the provided text are")


def test_needles_stand_at_all_depths_of_an_essay_and_do_not_change_it(essay):
    words = essay.read_text(encoding="utf-8-sig").split()
    depths = []
    for question in asked("ruler_niah_single_2", essay, context_tokens=1_000, limit=40):
        context = text(question).partition("\n")[2].rpartition("\nWhat")[0]
        before, _, behind = context.partition("One of the special magic numbers")
        depths.append(len(before) / len(context))
        left = (before + behind.partition(". ")[2]).split()
        assert left[: len(words)] == words[: len(left)]
    assert min(depths) < 0.1 and max(depths) > 0.9
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.15)


def test_variable_tracking():
    for question in asked("ruler_vt", context_tokens=1_500, limit=5):
        example, _, last = text(question).rpartition("Memorize and track")
        value = re.search(r"assigned the value (\d{5}) in the text above", last)[1]
        chain = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", last))
        assert len(chain) == 5 and set(chain) == set(question.references)
        for name in chain:
            while name in chain:
                name = chain[name]
            assert name == value
        positions = [last.index(f"VAR {name} =") for name in question.references]
        assert positions == sorted(positions)
        assert last.endswith(f"5 variables are assigned the value {value}, they are:")
        names = re.findall(r"VAR ([A-Z]{3}) =", example)
        assert example.endswith(f"they are: {' '.join(names)}\n\n")
        assert question.max_tokens == 30


@pytest.mark.parametrize(("length", "often", "seldom"), [(4_096, 30, 3), (1_500, 6, 1)])
def test_common_words(length, often, seldom):
    (question,) = asked("ruler_cwe", context_tokens=length, limit=1)
    example, _, last = text(question).rpartition("Below is a numbered list")
    listed = re.findall(r"(\d+)\. (\S+)", last.partition("\nQuestion")[0])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert 0 < sum(word in question.references for _, word in listed[: len(listed) // 2]) < 10 * often  # in no order
    assert {counts[word] for word in question.references} == {often} and len(question.references) == 10
    assert {counts[word] for word in counts if word not in question.references} == {seldom}
    assert "1. " in example.rpartition("are:")[2] and "10. " in example.rpartition("are:")[2]
    assert question.max_tokens == 120


def test_frequent_words_fall_as_the_squares_of_their_ranks():
    (question,) = asked("ruler_fwe", context_tokens=3_000, limit=1)
    coded = text(question).partition("coded words. ")[2].partition("\nQuestion")[0].split()
    counts = Counter(coded).most_common()
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(question.references)
    size = question.facts["pieces"]
    for rank, (_, count) in enumerate(counts, start=1):
        assert count == int(size / rank**2 / 1.6449340668482264)
    assert question.max_tokens == 50


def squad(folder):
    def paragraph(i):
        return {
            "context": f"Context {i} has value{i}x. " + "filler " * 10,
            "qas": [{"question": f"What has {i}?", "answers": [{"text": f"value{i}x"}, {"text": f"other{i}"}]}],
        }

    articles = [{"paragraphs": [paragraph(10 * a + i) for i in range(10)]} for a in range(6)]
    articles[0]["paragraphs"][0]["qas"].append({"question": "None?", "answers": [], "is_impossible": True})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))


def test_questions_about_one_of_many_documents(tmp_path):
    squad(tmp_path)
    for question in asked("ruler_qa_1", tmp_path, context_tokens=300, limit=30):
        number = int(re.search(r"What has (\d+)\?", question.query)[1])
        documents = re.findall(r"Document (\d+):\nContext (\d+) ", text(question))
        assert [int(place) for place, _ in documents] == list(range(1, len(documents) + 1))
        assert str(number) in [context for _, context in documents] and len({c for _, c in documents}) == len(documents)
        own = sum(int(context) // 10 == number // 10 for _, context in documents)
        assert own == min(10, len(documents))  # those of the same article come first
        assert num_tokens(question) + 32 <= 300
        task = make_task("ruler_qa_1")
        assert task.score(question, f"OTHER{number}") == {"match": 1} and task.score(question, "no") == {"match": 0}
    assert len({question.query for question in asked("ruler_qa_1", tmp_path, context_tokens=300, limit=30)}) == 30
    places = [
        text(q).index(f"Context {q.query.split()[-1][:-1]} ")
        for q in asked("ruler_qa_1", tmp_path, context_tokens=300, limit=30)
    ]
    assert len(set(places)) > 3  # the document with the answer is anywhere
    assert "None?" not in {question.query for question in asked("ruler_qa_1", tmp_path, context_tokens=300)}


def test_hotpot_and_nq_are_read_for_the_second(tmp_path):
    rows = [
        {"question": f"q{i}", "answer": f"a{i}", "context": [[f"T{i}", ["One. ", "Two."]], [f"U{i}", [f"a{i}"]]]}
        for i in range(9)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    for question in asked("ruler_qa_2", tmp_path, context_tokens=120, limit=5):
        i = question.query[1:]
        assert f":\nT{i}\nOne. Two." in text(question) and f":\nU{i}\na{i}" in text(question)
        assert text(question).endswith(f"\n\nQuestion: q{i} Answer:")
    row = {"question": "q", "answers": ["a", "b"], "ctxs": [{"title": "T", "text": "a", "isgold": True}]}
    (tmp_path / "nq.jsonl").write_text(json.dumps(row))
    (question,) = asked("ruler_qa_2", tmp_path / "nq.jsonl", limit=1)
    assert question.references == ("a", "b") and "Document 1:\nT\na" in text(question)


def test_a_length_that_is_too_short_is_refused(tmp_path):
    for name in ("ruler_cwe", "ruler_vt"):
        with pytest.raises(EvaluationError, match="too few"):
            asked(name, tmp_path, context_tokens=100)


def test_an_essay_must_be_given_and_not_empty(tmp_path):
    with pytest.raises(EvaluationError, match="--data"):
        asked("ruler_niah_single_2", limit=1)
    (tmp_path / "essay.txt").write_text(" \n")
    with pytest.raises(EvaluationError, match="empty"):
        asked("ruler_niah_single_2", tmp_path, limit=1)


def test_no_made_prompt_loses_its_middle_however_many_tokens_its_keys_have():
    class Digits(Words):
        """Every digit 7 is a token, so that keys of the same length have unlike numbers of them."""

        def encode(self, text):
            return [ord(character) for character in text if character == "7"]

    task = make_task("infinitebench_kv_retrieval")
    for question in task.questions(TaskSettings(Digits(), context_tokens=300, limit=30)):
        assert question.whole == "" and 240 < text(question).count("7") <= 300


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_tasks_of_infinitebench(name):
    questions = asked(name, context_tokens=1_500, limit=22)
    depths = []
    for question in questions:
        (answer,) = question.references
        prompt = text(question)
        assert 1_400 < num_tokens(question) <= 1_500 and question.whole == ""
        assert prompt.count(answer) == (1 if "kv" in name else 2)
        depths.append(prompt.index(answer) / len(prompt))
        assert float(question.group.removeprefix("depth ")) == pytest.approx(depths[-1], abs=0.08)
        assert make_task(name).score(question, f"{answer}.") == {"accuracy": 1}
    assert len({question.references for question in questions}) == 22
    assert len({question.group for question in questions}) == 11
    kv = "\nThe value associated with the specified key is: "
    ends = {"passkey": "The pass key is", "number_string": "The sequence of digits is", "kv_retrieval": kv}
    assert text(questions[0]).endswith(ends[name.removeprefix("infinitebench_")])


def test_a_key_of_infinitebench_leads_to_its_value_and_digits_are_repeated():
    for question in asked("infinitebench_kv_retrieval", context_tokens=500, limit=5):
        data = json.loads(text(question).partition("JSON data:\n")[2].partition("\n\nKey")[0])
        key = re.search(r'Key: "(.+)"', text(question))[1]
        assert (data[key],) == question.references
    for question in asked("infinitebench_number_string", context_tokens=500, limit=20):
        (digits,) = question.references
        assert len(digits) == 10 and sum(a == b for a, b in pairwise(digits)) >= 5


def test_the_length_is_counted_in_the_targets_tokens():
    class Letters(Words):
        def encode(self, text):
            return list(map(ord, text))

    (question,) = make_task("ruler_niah_single_1").questions(TaskSettings(Letters(), context_tokens=2_000, limit=1))
    assert 1_700 < len(text(question)) <= 2_000 - 128
