"""Metrics on cases computed by hand, from the benchmarks' definitions."""

import pytest

from deployments.evaluation.metrics.answers import characters, contains_any, exact_match, f1, normalized
from deployments.evaluation.metrics.matching import (
    any_contained,
    chooses,
    correct_letter,
    first_number,
    names_word,
    share_contained,
)
from deployments.evaluation.metrics.rouge import rouge_l, rouge_lsum
from deployments.evaluation.metrics.verdicts import is_true, rating


def test_normalisation_is_squads():
    assert normalized("The  U.S. Army's, an-other\nA") == "us armys another"
    assert normalized("theory of a man") == "theory of man"


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [
        ("the cat sat", ["a cat sat down"], 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),  # P 1, R 2/3
        ("cat cat cat", ["cat dog"], 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # a word counts as often as in both
        ("cat cat", ["cat cat"], 1.0),
        ("no", ["yes"], 0.0),
        ("", ["yes"], 0.0),
        ("the", ["a"], 0.0),  # nothing is left of either
        ("Paris", ["London", "paris!"], 1.0),  # the best reference
        ("anything", [], 0.0),
    ],
)
def test_f1(answer, references, value):
    assert f1(answer, references) == pytest.approx(value, abs=1e-15)


def test_f1_by_characters():
    """卡罗来纳黑豹队 has 7 characters, of which 黑豹队 are 3: P = 1, R = 3/7, F = 0.6."""
    assert f1("黑豹队。", ["卡罗来纳黑豹队"], characters) == pytest.approx(0.6)
    assert f1("308 分", ["308"], characters) == pytest.approx(2 * 3 / 7)
    assert exact_match("「308」", ["308"], characters) == 1
    assert characters("《308》") == list("《308")  # the benchmark's list of punctuation lacks this one
    assert contains_any("是 黑豹队。", ["黑豹 队"], characters) == 1  # white space is nothing
    assert contains_any("答案是黑豹队。", ["黑豹队"], characters) == 1


def test_exact_and_contained():
    assert exact_match("The Beatles.", ["beatles"]) == 1
    assert exact_match("The Beatles.", ["wings", "beatles"]) == 1
    assert exact_match("The Beatles band", ["beatles"]) == 0
    assert contains_any("It was the Beatles' band", ["Wings", "Beatles"]) == 1
    assert contains_any("It was Wings", ["Beatles"]) == 0


def test_rulers_matches():
    assert share_contained("Numbers: 12, 34\x00and 56", ["12", "34", "78"]) == pytest.approx(2 / 3)
    assert share_contained("abcde", ["ABC"]) == 1
    assert share_contained("12\t34", ["12\n34"]) == 1  # control characters become ends of lines
    assert any_contained("abcde", ["x", "BCD"]) == 1
    assert any_contained("abcde", ["x", "y"]) == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("**The correct answer is (C) because", "C"),
        ("The correct answer is *(D)*.", "D"),
        ("The correct answer is A", "A"),
        ("The correct answer is A or rather The correct answer is (B)", "B"),  # brackets first
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_letter_of_longbench(answer, letter):
    assert correct_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        (" B. The whale", True),
        ("C", False),
        ("Because", True),  # the benchmark reads the first character, whatever word it begins
        ("the whale", True),  # the option's own text
        ("a whale", False),
        ("so the answer is: B", True),
        ("so the answer is B", True),
        ("so the answer is the whale, I think", True),
        ("so the answer is", False),
        ("my option is C", False),
        ("(B) it is", False),  # brackets are not removed, so no word is a letter
        ("surely 'B'!", True),
        ("I say C or B", False),
        ("the answer\n is: B", True),
        ("I say no more", False),
        ("", False),
    ],
)
def test_the_choice_of_infinitebench(answer, right):
    assert chooses(answer, "B", "the whale") is right


def test_numbers_and_words_of_infinitebench():
    assert first_number("The pass key is 71432. Remember 5") == "71432"
    assert first_number("it is 10203.") == "10203"
    assert first_number("none") == ""
    assert names_word('{"value": "ab-12"}', "ab-12")
    assert names_word("value:ab-12", "ab-12")
    assert not names_word("xab-12", "ab-12")


def test_rouge_l_by_hand():
    """ "police killed the gunman" and "police kill the gunman": 3 of 4 words in order (Lin 2004, section 3.1)."""
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("a b", ["c", "a b c d"]) == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge_l("", ["a"]) == 0
    assert rouge_l("!?", ["a"]) == 0


def test_rouge_lsum_by_hand():
    """Reference w1…w5; lines "w1 w2 w6 w7 w8" and "w1 w3 w8 w9 w5": the union is w1 w2 w3 w5, so R = 4/5, P = 4/10."""
    answer = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"
    assert rouge_lsum(answer, ["w1 w2 w3 w4 w5"]) == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert rouge_l(answer, ["w1 w2 w3 w4 w5"]) == pytest.approx(2 * 0.8 * 0.4 / 1.2)  # w1 w2 w3 w5 in one line too
    assert rouge_lsum("b\na", ["a\nb"]) == 1
    assert rouge_l("b\na", ["a\nb"]) == 0.5
    assert rouge_lsum("a\na", ["a b"]) == 0.5  # nor more often than the reference has it
    assert rouge_lsum("a b", ["c", "a b"]) == 1
    assert rouge_lsum("a", ["a\na"]) == pytest.approx(2 * 1 * 0.5 / 1.5)  # a word counts once if the answer has it once


def test_rouge_of_two_paragraphs_is_what_the_package_computes():
    """The numbers are those of rouge_score 0.1.2, RougeScorer(["rougeL", "rougeLsum"], use_stemmer=False)."""
    reference = (
        "The committee discussed the new remote control.\nIts case will be made of rubber, and the buttons "
        "of plastic.\n"
        "Marketing asked for a cheaper chip; the industrial designer disagreed."
    )
    answer = (
        "Marketing wanted a cheaper chip.\nThe remote control gets a case of rubber and buttons of plastic.\n\n"
        "The industrial designer disagreed with that, and the committee went on."
    )
    assert rouge_l(answer, [reference]) == pytest.approx(0.49122807017543857, abs=1e-12)
    assert rouge_lsum(answer, [reference]) == pytest.approx(0.7017543859649122, abs=1e-12)


@pytest.mark.parametrize(
    ("verdict", "value"),
    [
        ("It is fine. Rating: [[7]]", 7),
        ("A [[3]] would be harsh.\nRating: [[ 8.5 ]]", 8.5),
        ("Rating: [6]", 6),
        ("See [2]. Rating: [[10]]", 10),
    ],
)
def test_a_rating(verdict, value):
    assert rating(verdict) == value


@pytest.mark.parametrize("verdict", ["good", "Rating: 7", "Rating: [[0]]", "Rating: [[11]]", ""])
def test_no_rating_is_an_error_and_no_number(verdict):
    with pytest.raises(ValueError, match="rating"):
        rating(verdict)


def test_true_and_false():
    assert is_true("True") and is_true("**true**, not false")
    assert not is_true("False.")
    with pytest.raises(ValueError, match="neither"):
        is_true("untrue")
