"""The question of a long message is found wherever a person or a prompt template puts it."""

from __future__ import annotations

import time

import pytest

from rapid.text.question import find_question, questions

PARAGRAPHS = [
    "The old clock on the tower loses four minutes a day in summer. Nobody on the square minds it any more.",
    'The keeper climbs the stairs each morning with a can of oil. "Who would do it but me?" he says to the pigeons.',
    "In winter the rod is shorter, and the clock gains a little. Then the trains seem late, and people walk faster.",
    "A new movement was bought forty years ago. It lies in its box in the cellar, because no one dares to mount it.",
]
DOCUMENT = "\n\n".join(PARAGRAPHS * 3)
LINES = "\n".join(PARAGRAPHS * 3)  # no blank lines
ASKED = "Why does the tower clock lose four minutes a day?"
CHINESE = "\n\n".join(
    [
        "钟楼的钟在夏天每天慢四分钟。广场上的人早已习惯了。",
        "看守人每天早晨带着一罐油上楼。",
        "新的机芯四十年前就买了，一直放在地下室的箱子里。",
    ]
    * 12
)

# (what stands around the document, the question): {} is the document
TEMPLATES = {
    "behind": ("{}\n\n" + ASKED, ASKED),
    "before": (ASKED + "\n\n{}", ASKED),
    "before, on a line": (ASKED + "\n{}", ASKED),
    "behind, on a line": ("{}\n" + ASKED, ASKED),
    "behind, with an instruction behind it": ("{}\n\n" + ASKED + "\n\nAnswer in one sentence.", ASKED),
    "behind, with two instructions": ("{}\n\n" + ASKED + "\n\nBe brief.\n\nName your sources.", ASKED),
    "behind, with an instruction in its paragraph": (
        "{}\n\n" + ASKED + " Answer in one sentence.",
        ASKED + " Answer in one sentence.",
    ),
    "before, with an instruction behind": (ASKED + "\n\n{}\n\nAnswer in one sentence.", ASKED),
    "tags": (f"<document>\n{{}}\n</document>\n\n<question>{ASKED}</question>", ASKED),
    "tags, question first": (f"<question>{ASKED}</question>\n\n<document>\n{{}}\n</document>", ASKED),
    "tags over lines": (f"<question>\n{ASKED}\n</question>\n<documents>\n{{}}\n</documents>", ASKED),
    "square tags": (f"[DOCUMENT]\n{{}}\n[/DOCUMENT]\n[QUESTION]\n{ASKED}\n[/QUESTION]", ASKED),
    "labels": (f"Context: {{}}\n\nQuestion: {ASKED}\n\nAnswer:", ASKED),
    "labels without a question mark": (
        "Context:\n{}\n\nQuestion: how slow the clock is\nAnswer:",
        "how slow the clock is",
    ),
    "labels, question first": (f"Question: {ASKED}\n\nContext:\n{{}}\n\nAnswer:", ASKED),
    # the shape of LlamaIndex's prompt: ruled lines, and no blank line
    "ruled": (
        "Below is some context.\n---------------------\n{}\n---------------------\nUse this context and nothing that "
        f"you knew before to answer the query.\nQuery: {ASKED}\nAnswer: ",
        ASKED,
    ),
    # the shape of LangChain's prompt
    "instruction, document, labels": (
        "The pieces of context below may help with the question at the end. Say so if they do not.\n\n{}\n\n"
        f"Question: {ASKED}\nHelpful Answer:",
        ASKED,
    ),
    # the shape of its hub's prompt
    "instruction and labels, no blank lines": (
        f"You answer questions. Use three sentences at most.\nQuestion: {ASKED} \nContext: {{}} \nAnswer:",
        ASKED,
    ),
    # the shape of Haystack's and of many others'
    "loop over documents": (
        f"Given these documents, answer the question.\nDocuments:\n{{}}\nQuestion: {ASKED}\nAnswer:",
        ASKED,
    ),
    "fenced": (f"```text\n{{}}\n```\n{ASKED}", ASKED),
    "triple quotes": (f'{ASKED}\n"""\n{{}}\n"""', ASKED),
    "headings": (f"# Document\n\n{{}}\n\n# Question\n\n{ASKED}", ASKED),
    "several": (f"{{}}\n\n{ASKED}\n\nWho oils it?", f"{ASKED}\nWho oils it?"),
    "a numbered list": (f"{{}}\n\n1. {ASKED}\n2. Who oils it?", f"1. {ASKED}\n2. Who oils it?"),
    "introduced": (f"{{}}\n\nAnswer these questions:\n1. {ASKED}\n2. Who oils it?", f"1. {ASKED}\n2. Who oils it?"),
    "a task before it": ("Summarise the text below:\n\n{}", "Summarise the text below:"),
    "a task behind it": ("{}\n\nSummarise this text.", "Summarise this text."),
    "spanish": ("{}\n\nPregunta: ¿Por qué se atrasa el reloj?\nRespuesta:", "¿Por qué se atrasa el reloj?"),
    "german, before": ("Warum geht die Uhr nach?\n\n{}\n\nAntworte in einem Satz.", "Warum geht die Uhr nach?"),
    "russian": ("Контекст:\n{}\nВопрос: Почему часы отстают?\nОтвет:", "Почему часы отстают?"),
    "arabic": ("{}\n\nلماذا تتأخر الساعة؟\n\nأجب بجملة واحدة.", "لماذا تتأخر الساعة؟"),
    "chinese": ("{}\n\n钟为什么慢？\n\n请用一句话回答。", "钟为什么慢？"),
    "chinese, before": ("问题：钟为什么慢？\n\n文档：\n{}", "钟为什么慢？"),
    "japanese": ("{}\n\nなぜ時計は遅れるのですか。", "なぜ時計は遅れるのですか。"),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("document", [DOCUMENT, LINES, CHINESE], ids=["paragraphs", "lines", "chinese"])
def test_the_question_is_found_wherever_it_stands(template: str, document: str) -> None:
    pattern, question = TEMPLATES[template]
    text = pattern.replace("{}", document)
    framed = find_question(text)
    assert "".join(framed[:3]) == text
    assert framed.query == question
    assert framed.asks == (template != "a task behind it")
    # At most a sentence of the document is taken for the frame, or the other way round.
    start, end = len(framed.before), len(framed.before) + len(framed.document)
    assert abs(start - text.index(document)) < 130
    assert abs(end - text.index(document) - len(document)) < 130


@pytest.mark.parametrize(
    "document",
    [
        "What is time?\n\n" + DOCUMENT,  # a title
        DOCUMENT + '\n\n"Is it late?" she asked. "It always is," he said, and went up the stairs to his clock again.',
        DOCUMENT + "\n\nTHE END",
    ],
    ids=["a title that asks", "a dialogue at the end", "a last line"],
)
def test_a_question_behind_the_document_wins_over_what_the_document_says(document: str) -> None:
    framed = find_question(f"{document}\n\n{ASKED}")
    assert framed.query == ASKED
    assert framed.document == document


@pytest.mark.parametrize(
    ("text", "document", "behind"),
    [
        ("a\n\nb\n\nc", "a\n\nb", "\n\nc"),
        ("a\nb\n\nc\nd", "a\nb", "\n\nc\nd"),
        ("a\n \t\nb", "a", "\n \t\nb"),
        ("a\r\n\r\nb", "a", "\r\n\r\nb"),
        ("a\nb", "a", "\nb"),
        ("a\n\nb\n\n", "a", "\n\nb\n\n"),
        ("\n\na", "\n\na", ""),
        ("a", "a", ""),
        (" \n\n ", " \n\n ", ""),
        ("", "", ""),
        ("Why?", "Why?", ""),
    ],
)
def test_where_nothing_asks_the_last_paragraph_is_the_query(text: str, document: str, behind: str) -> None:
    assert find_question(text) == ("", document, behind, behind.strip(), False)


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 2**20,
        " " * 2**20,
        " \n" * 2**19,
        "a\n" * 2**19,
        "a" + "\n" * 2**20 + "b",
        "a" + " " * 2**20 + "\nb",
        "?" * 2**20,
        "? \n\n" * 2**18,
        "<" * 2**20,
        "<a>\n" * 2**18,
        "-" * 2**20 + "\n" + "." * 2**20,
        "question " * 2**17,
        "a. " * 2**19,
    ],
)
def test_finding_takes_time_in_proportion_to_the_text(text: str) -> None:
    """A megabyte takes milliseconds; anything quadratic would take minutes."""
    started = time.perf_counter()
    framed = find_question(text)
    assert time.perf_counter() - started < 2
    assert "".join(framed[:3]) == text


def test_the_sentences_that_ask_are_found_in_a_short_text() -> None:
    assert questions(f"You are a clerk. {ASKED} Be polite.") == ASKED
    assert questions("You are a clerk.") == ""


@pytest.mark.parametrize(
    "asked",
    [
        "What does Mr. Darcy write to Miss Bennet?",
        "Why does Dr. J. H. Watson limp?",
        "How far is it, e.g. from St. Paul's, in units of 1.5 miles?",
        "What does example.com say of Fig. 3?",
    ],
)
def test_a_full_stop_inside_a_question_does_not_end_it(asked: str) -> None:
    assert questions(f"It is late. {asked} Say so.") == asked
    assert find_question(f"{DOCUMENT}\n\n{asked}\n\nFormat your response as a list.").query == asked
