"""Which part of a chat is context and which is the query (docs/design.md), and what the drafter reads instead."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from rapid.errors import InvalidRequest
from rapid.text.prompts import Message, Prompt, read_chat, read_text

QUESTION = "Who commanded the ship, and why did he sail?"
DOCUMENT = "\n\n".join(f"Chapter {i}. The ship sailed on, and nobody aboard knew where to." for i in range(1, 61))
CHUNKS = ["Chapter 7. The ship sailed on", "Chapter 31. The ship sailed on"]


class Chunk(NamedTuple):
    content: int
    text: str


@pytest.fixture
def tokenizer(chat_tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    """The real one; a test may change its template."""
    template = chat_tokenizer.chat_template
    yield chat_tokenizer
    chat_tokenizer.chat_template = template


@pytest.fixture
def render(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Message]], str]:
    def rendered(messages: list[Message]) -> str:
        template_s = [message._asdict() for message in messages]
        return str(tokenizer.apply_chat_template(template_s, tokenize=False, add_generation_prompt=True))

    return rendered


Render = Callable[[list[Message]], str]


def read_back(prompt: Prompt, chunks: list[Chunk]) -> str:
    """The text of what the drafter reads."""
    return str(prompt.tokenizer.decode(prompt.shortened(chunks)))


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def system(content: str) -> Message:
    return Message("system", content)


JOINED = "\n\n".join(CHUNKS)
WHERE_THE_DOCUMENT_STANDS: dict[str, Callable[[str], list[Message]]] = {
    "system": lambda document: [system(document), user(QUESTION)],
    "earlier turn": lambda document: [user(document), assistant("I have read it."), user(QUESTION)],
    "a reply": lambda document: [user("Tell me a story."), assistant(document), user(QUESTION)],
    "a tool's answer": lambda document: [user("Look it up."), Message("tool", document), user(QUESTION)],
    "last message": lambda document: [system("Be brief."), user(f"{document}\n\n{QUESTION}")],
    "last message, spaced": lambda document: [user(f"{document}\n \n\n  {QUESTION}\n\n")],
}


@pytest.mark.parametrize("where", WHERE_THE_DOCUMENT_STANDS)
def test_a_long_document_is_the_context_wherever_it_stands(
    tokenizer: PreTrainedTokenizerFast, render: Render, where: str
) -> None:
    """The last user message, or its last paragraph, asks; the drafter reads the same chat around the chunks."""
    chat = WHERE_THE_DOCUMENT_STANDS[where]
    prompt = read_chat(chat(DOCUMENT), tokenizer)
    assert prompt.contents == [DOCUMENT]
    assert prompt.query == QUESTION
    assert tokenizer.decode(prompt.tokens) == render(chat(DOCUMENT))
    assert read_back(prompt, [Chunk(0, text) for text in CHUNKS]) == render(chat(JOINED))


def test_a_question_of_one_line_may_follow_a_document_of_lines(
    tokenizer: PreTrainedTokenizerFast, render: Render
) -> None:
    """Without a blank line in it, the last line asks."""
    lines = DOCUMENT.replace("\n\n", "\n")
    prompt = read_chat([user(f"{lines}\n{QUESTION}")], tokenizer)
    assert (prompt.contents, prompt.query) == ([lines], QUESTION)
    assert read_back(prompt, [Chunk(0, CHUNKS[0])]) == render([user(f"{CHUNKS[0]}\n{QUESTION}")])


def test_a_document_of_one_line_has_no_question(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    line = DOCUMENT.replace("\n\n", " ")
    prompt = read_chat([user(line)], tokenizer)
    assert (prompt.contents, prompt.query) == ([line], line)
    assert read_back(prompt, [Chunk(0, CHUNKS[0])]) == render([user(CHUNKS[0])])


@pytest.mark.parametrize("order", ["question last", "question first", "question between"])
def test_documents_in_a_message_are_contents_of_their_own(
    tokenizer: PreTrainedTokenizerFast, render: Render, order: str
) -> None:
    """What is beside them asks, wherever it stands and however many paragraphs it has."""
    question = f"Two things.\n\n{QUESTION}"
    parts = {
        "question last": [DOCUMENT, DOCUMENT[:99], question],
        "question first": [question, DOCUMENT, DOCUMENT[:99]],
        "question between": [DOCUMENT, question, DOCUMENT[:99]],
    }[order]
    content, spans = "\n\n".join(parts), []
    for part in (DOCUMENT, DOCUMENT[:99]):
        start = content.index(part, spans[-1][1] if spans else 0)
        spans.append((start, start + len(part)))
    prompt = read_chat([Message("user", content, documents=tuple(spans))], tokenizer)
    assert (prompt.contents, prompt.query) == ([DOCUMENT, DOCUMENT[:99]], question)
    assert tokenizer.decode(prompt.tokens) == render([user(content)])
    short = read_back(prompt, [Chunk(0, CHUNKS[0]), Chunk(1, CHUNKS[1])])
    assert short == render([user(f"{CHUNKS[0]}\n\n{CHUNKS[1]}\n\n{question}")])


def test_long_text_beside_a_document_is_context_too(tokenizer: PreTrainedTokenizerFast) -> None:
    content = f"{DOCUMENT}\n\n{DOCUMENT}\n\n{QUESTION}"
    prompt = read_chat([Message("user", content, documents=((0, len(DOCUMENT)),))], tokenizer)
    assert (prompt.contents, prompt.query) == ([DOCUMENT, DOCUMENT], QUESTION)


def test_a_last_paragraph_that_is_itself_long_is_no_question(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Summarise this:\n\n" + DOCUMENT.replace("\n\n", " ")
    prompt = read_chat([user(text)], tokenizer)
    assert (prompt.contents, prompt.query) == ([text.removeprefix("Summarise this:\n\n")], "Summarise this:")
    text = DOCUMENT.replace("\n\n", " ")
    assert read_chat([user(f"Nothing.\n\n{text}")], tokenizer).contents == [f"Nothing.\n\n{text}"]


def test_a_given_query_takes_precedence(tokenizer: PreTrainedTokenizerFast) -> None:
    for chat in WHERE_THE_DOCUMENT_STANDS.values():
        prompt = read_chat(chat(DOCUMENT), tokenizer, query="whales")
        assert (prompt.query, prompt.contents) == ("whales", [DOCUMENT])
    assert read_text(f"{DOCUMENT}\n\n{QUESTION}", tokenizer, query="whales").query == "whales"


def test_several_documents_are_several_contents(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    other = DOCUMENT.replace("ship", "train")
    prompt = read_chat([system(DOCUMENT), user(f"{other}\n\n{QUESTION}")], tokenizer)
    assert (prompt.contents, prompt.query) == ([DOCUMENT, other], QUESTION)
    chunks = [Chunk(0, "first"), Chunk(0, "second"), Chunk(1, "third"), Chunk(1, "fourth")]
    expected = [system("first\n\nsecond"), user(f"third\n\nfourth\n\n{QUESTION}")]
    assert read_back(prompt, chunks) == render(expected)
    # A document without a chunk goes; a message that has nothing else goes with it.
    assert read_back(prompt, chunks[2:]) == render([user(f"third\n\nfourth\n\n{QUESTION}")])
    assert read_back(prompt, chunks[:2]) == render([system("first\n\nsecond"), user(f"\n\n{QUESTION}")])


def test_the_limit_is_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    """Exactly ``long_content_tokens`` tokens are not long; one more is."""
    chat = [system(DOCUMENT), user(QUESTION)]
    size = len(tokenizer(DOCUMENT)["input_ids"])
    assert read_chat(chat, tokenizer, long_content_tokens=size).contents == []
    assert read_chat(chat, tokenizer, long_content_tokens=size - 1).contents == [DOCUMENT]


def test_a_short_chat_has_no_context(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    chat = [system("Be brief."), user("Hello?"), assistant("Hello."), user(QUESTION)]
    prompt = read_chat(chat, tokenizer)
    assert (prompt.contents, prompt.query) == ([], QUESTION)
    assert tokenizer.decode(prompt.tokens) == render(chat)


def dialogues(data: Path) -> Iterator[tuple[str, str]]:
    """(what the user said, the reply): turns of real dialogues where there are any, else made up."""
    if data.is_file():
        for line in data.read_text().splitlines():
            for turn in json.loads(line)["history"]:
                yield turn["user"], turn["bot"]
    else:
        for i in range(200):
            yield f"What happens in chapter {i}?", f"In chapter {i} the ship sails on. " * (i % 7 + 1)


@pytest.fixture
def history(tokenizer: PreTrainedTokenizerFast) -> list[Message]:
    """40 exchanges, together a good deal longer than any limit, each message short."""
    messages: list[Message] = []
    for said, replied in dialogues(Path(__file__).parents[4] / "shared" / "data" / "mtbench101.jsonl"):
        if max(len(tokenizer(text)["input_ids"]) for text in (said, replied)) <= 400 and said != replied:
            messages += [user(said), assistant(replied)]
        if len(messages) == 80:
            return messages
    raise AssertionError("too few dialogues")


def test_a_long_history_of_short_messages_is_the_context(
    tokenizer: PreTrainedTokenizerFast, render: Render, history: list[Message]
) -> None:
    """Exchanges are kept or dropped whole, roles still alternate, and the last question stays as it was."""
    last = user(QUESTION + "\n\nTell me briefly.")
    prompt = read_chat([system("Be brief."), *history, last], tokenizer)
    exchanges = [history[i : i + 2] for i in range(0, len(history), 2)]
    assert prompt.contents == ["\n".join(message.content for message in exchange) for exchange in exchanges]
    assert prompt.query == last.content  # the whole message: it is not long
    for kept in ([3], [0, 1, 39], [5, 20], list(range(40))):
        chunks = [Chunk(i, exchanges[i][0].content[:20]) for i in kept]
        expected = [system("Be brief."), *(message for i in kept for message in exchanges[i]), last]
        assert read_back(prompt, chunks) == render(expected)


def test_several_replies_to_a_message_are_one_exchange(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    chat = [
        assistant("Welcome aboard, sailor."),
        user("Who is it?"),
        assistant("Let me look."),
        Message("tool", "Ahab"),
        assistant("Ahab."),
        user("Where to?"),
        assistant("The Pacific."),
        user(QUESTION),
    ]
    prompt = read_chat(chat, tokenizer, long_content_tokens=12)
    assert prompt.contents == [
        "Welcome aboard, sailor.",
        "Who is it?\nLet me look.\nAhab\nAhab.",
        "Where to?\nThe Pacific.",
    ]
    assert read_back(prompt, [Chunk(1, "Ahab")]) == render([*chat[1:5], chat[-1]])


def test_what_is_not_long_stays(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    """Short system messages, even empty ones, the question, and exchanges when there is no long history."""
    chat = [system(""), user("Hello?"), assistant("Hello."), user(f"{DOCUMENT}\n\n{QUESTION}")]
    chat += [assistant("He"), system("Be brief.")]
    prompt = read_chat(chat, tokenizer)
    assert (prompt.contents, prompt.query) == ([DOCUMENT], QUESTION)
    expected = [*chat[:3], user(f"{CHUNKS[0]}\n\n{QUESTION}"), *chat[4:]]
    assert read_back(prompt, [Chunk(0, CHUNKS[0])]) == render(expected)


def test_an_exchange_goes_with_its_document(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    """A reply without what it replies to says nothing; and of an exchange that stays, both sides stay."""
    other = DOCUMENT.replace("ship", "train")
    chat = [user(DOCUMENT), assistant("I have read it."), user(other), assistant("That too."), user(QUESTION)]
    prompt = read_chat(chat, tokenizer)
    assert prompt.contents == [DOCUMENT, other]
    assert read_back(prompt, [Chunk(1, "a train")]) == render([user("a train"), *chat[3:]])


def test_chunks_stay_in_document_order(tokenizer: PreTrainedTokenizerFast, render: Render) -> None:
    parts = [f"part {i}" for i in range(20)]
    prompt = read_chat([system(DOCUMENT), user(QUESTION)], tokenizer)
    expected = render([system("\n\n".join(parts)), user(QUESTION)])
    assert read_back(prompt, [Chunk(0, f" {part}\n") for part in parts]) == expected


STRICT = """{% for message in messages %}{% if message.role != ['user', 'assistant'][loop.index0 % 2] %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
[{{ message.role }}] {{ message.content }}
{% endfor %}"""


def test_what_the_template_refuses_is_an_invalid_request(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        read_chat([user("a"), user("b")], tokenizer)
    assert caught.value.param == "messages"
    tokenizer.chat_template = "{{ messages[0].content | no_such_filter }}"
    with pytest.raises(InvalidRequest, match="no_such_filter"):
        read_chat([user("a")], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        read_chat([user("a")], tokenizer)


def test_variables_of_the_template_are_the_drafter_s_too(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ mood }}{{ messages[0].content }}"
    prompt = read_chat([user(DOCUMENT)], tokenizer, template_kwargs={"mood": "glad"})
    assert all(tokenizer.decode(tokens).startswith("glad") for tokens in (prompt.tokens, prompt.shortened([])))
    tokenizer.chat_template = "{{ mood + 1 }}"
    with pytest.raises(InvalidRequest, match="refuses"):
        read_chat([user("a")], tokenizer, template_kwargs={"mood": "glad"})


def test_nothing_to_read_is_an_invalid_request(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_chat([], tokenizer)
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest) as caught:
        read_text("", tokenizer)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("seed", range(20))
def test_a_strict_template_takes_whatever_is_left_of_a_chat(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Many templates insist that user and assistant take turns: no choice of chunks may break that."""
    tokenizer.chat_template = STRICT
    rng = random.Random(seed)
    long, short = "The ship sailed on and on. " * 8, "And then?"
    chat: list[Message] = []
    for _ in range(rng.randint(2, 6)):
        chat += [user(rng.choice([long, short])), assistant(rng.choice([long, short]))]
    chat.append(user(rng.choice([QUESTION, f"{long}\n\n{QUESTION}"])))
    prompt = read_chat(chat, tokenizer, long_content_tokens=30)
    for _ in range(5):
        kept = sorted(rng.sample(range(len(prompt.contents)), rng.randint(1, len(prompt.contents))))
        assert QUESTION in read_back(prompt, [Chunk(i, "sailed") for i in kept])


def test_a_plain_prompt_is_read_by_the_same_rule(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{DOCUMENT}\n\n{QUESTION}"
    prompt = read_text(text, tokenizer)
    assert prompt.tokens == tokenizer(text)["input_ids"]
    assert (prompt.contents, prompt.query) == ([DOCUMENT], QUESTION)
    assert read_back(prompt, [Chunk(0, text) for text in CHUNKS]) == f"{JOINED}\n\n{QUESTION}"
    assert read_text("Once upon a time", tokenizer).contents == []


def test_a_question_before_the_document_stays_before_the_passages(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = read_chat([user(f"{QUESTION}\n\n{DOCUMENT}\n\nBe brief.")], tokenizer)
    assert (prompt.contents, prompt.query) == ([DOCUMENT], QUESTION)
    shortened = read_back(prompt, [Chunk(0, text) for text in CHUNKS])
    assert f"{QUESTION}\n\n{JOINED}\n\nBe brief." in shortened


@pytest.mark.parametrize("earlier", [[system(f"You are a clerk. {QUESTION}")], [user(QUESTION), assistant("Send it.")]])
def test_an_earlier_message_asks_about_a_document_without_a_question(
    tokenizer: PreTrainedTokenizerFast, earlier: list[Message]
) -> None:
    assert read_chat([*earlier, user(DOCUMENT)], tokenizer).query == QUESTION
    assert read_chat([*earlier, user(f"{DOCUMENT}\n\nHow many chapters?")], tokenizer).query == "How many chapters?"
    assert read_chat([system("Unsure? Say so."), user(f"{DOCUMENT}\n\nSum it up.")], tokenizer).query == "Sum it up."


def test_messages_of_which_a_template_makes_nothing_are_refused(
    letter_tokenizer: Callable[[int], PreTrainedTokenizerFast],
) -> None:
    tokenizer = letter_tokenizer(12)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert read_chat([Message("user", "a")], tokenizer).tokens
    with pytest.raises(InvalidRequest, match="empty prompt"):
        read_chat([Message("user", "")], tokenizer)
