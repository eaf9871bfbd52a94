"""A client of any server that speaks OpenAI's API: this project's, or another one."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from rapid.errors import RapidError

UNREACHABLE = 503  # also the status of a server that cannot be asked at all


class OpenAIServer:
    """Asks the server at ``url``, which ends with its version: http://127.0.0.1:8000/v1.

    The key is $RAPID_API_KEY, or $OPENAI_API_KEY. All methods raise RapidError when the server cannot be asked,
    refuses, or does not speak OpenAI's API.
    """

    def __init__(self, url: str) -> None:
        key = os.environ.get("RAPID_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(10, read=600),  # a long document is read for minutes
            # A proxy that the environment names does not lead to this machine.
            "trust_env": urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"),
        }

    def models(self) -> list[dict[str, Any]]:
        """The models that the server names, as it describes them: `id`, `owned_by` and others. There may be none."""
        with self._in_words(), httpx.Client(**self._options) as client:
            response = client.get("/models")
            _check(response, response.content)
            return [{"id": str(model["id"])} | model for model in response.json()["data"]]

    def first_model(self) -> dict[str, Any]:
        """The first of `models`."""
        if not (models := self.models()):
            raise RapidError(f"{self._options['base_url']} names no model: say which one to ask", status=400)
        return models[0]

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of the answer to a chat, as the server sends them; the usage is in the last ones."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        with self._in_words():
            async with (
                httpx.AsyncClient(**self._options) as client,
                client.stream("POST", "/chat/completions", json=body) as response,
            ):
                _check(response, await response.aread() if response.is_error else b"")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        error = chunk["error"]
                        raise RapidError(error["message"] if isinstance(error, dict) else str(error))
                    text_of(chunk)  # which other formats do not have
                    yield chunk

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        url = self._options["base_url"]
        try:
            yield
        except httpx.HTTPError as error:
            raise RapidError(f"{url} cannot be asked: {error or type(error).__name__}", status=UNREACHABLE) from error
        except (ValueError, LookupError) as error:
            raise RapidError(f"what answers at {url} does not speak OpenAI's API: {error!r}") from error


def text_of(chunk: dict[str, Any]) -> str:
    """What a streamed chunk adds to the answer."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _check(response: httpx.Response, body: bytes) -> None:
    if not response.is_error:
        return
    error: dict[str, Any] = {}
    with suppress(ValueError, LookupError):
        found = json.loads(body)["error"]
        error = found if isinstance(found, dict) else {"message": found}
    message = error.get("message") or body.decode(errors="replace")[:300]
    raise RapidError(
        f"{response.status_code} from {response.url}: {message}", code=error.get("code"), status=response.status_code
    )
