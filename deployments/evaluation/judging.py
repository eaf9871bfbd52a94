"""Asks a judge how good an answer is: a model at any server that speaks OpenAI's API."""

from __future__ import annotations

from contextlib import aclosing

from deployments.evaluation.task import ChatMessage, Judge, Question
from deployments.openai_client import OpenAIServer, text_of


class JudgeClient:
    """The judge at ``url``; the first model there unless ``model`` names one.

    Raises:
        RapidError: the server cannot be asked.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self._server = OpenAIServer(url)
        self.model = model or str(self._server.first_model()["id"])

    async def scores(self, judge: Judge, question: Question, answer: str) -> tuple[dict[str, float], str]:
        """The scores that the verdict gives, none where it contains no rating; and the verdict."""
        verdict = await self._write(judge.messages(question, answer), judge.max_tokens)
        try:
            return judge.scores(verdict), verdict
        except ValueError:
            return {}, verdict

    async def _write(self, messages: tuple[ChatMessage, ...], max_tokens: int) -> str:
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        async with aclosing(self._server.stream(body)) as chunks:
            return "".join([text_of(chunk) async for chunk in chunks])
