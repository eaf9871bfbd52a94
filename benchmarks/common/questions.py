"""The documents and questions that several benchmarks share: passages of real books, cut to a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from benchmarks.common.results import DATA
from rapid.text.prompts import Message, Prompt, read_chat

PASSAGES = {
    "Pride and Prejudice": ("pride-and-prejudice.txt", 60_000),
    "Moby-Dick, at sea": ("moby-dick.txt", 200_000),
    "Moby-Dick, ashore": ("moby-dick.txt", 30_000),
}
QUESTIONS = {
    "Pride and Prejudice": (
        "Who are the Bingleys, and what do the others think of them?",
        "Quote the most important sentences about Mr. Darcy in this passage.",
    ),
    "Moby-Dick, at sea": (
        "Describe what happens in this passage, and who takes part in it.",
        "What is said about whales here? Quote the text.",
    ),
    "Moby-Dick, ashore": (
        "Who is Queequeg, and how does the narrator come to know him?",
        "Summarize this passage in one paragraph.",
    ),
}


class Question(NamedTuple):
    document: str
    question: str
    prompt: Prompt


def questions(tokenizer: PreTrainedTokenizerBase, num_tokens: int, *, skip: int = 0) -> Iterator[Question]:
    """Every question about its document's first ``num_tokens`` tokens, after ``skip`` characters."""
    for document, (name, start) in PASSAGES.items():
        text = (DATA / name).read_text(encoding="utf-8")[start + skip :][: 8 * num_tokens]
        passage = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:num_tokens])
        for question in QUESTIONS[document]:
            yield Question(document, question, read_chat([Message("user", f"{passage}\n\n{question}")], tokenizer))
