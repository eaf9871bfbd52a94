"""Paths that clients of other servers ask for and that are not served: what to do instead."""

from __future__ import annotations

_INSTEAD = {
    "/v1/assistants": "the Responses API at /v1/responses does what assistants did",
    "/v1/audio": "text alone is read and written here",
    "/v1/chat/completions": "chats are not kept: those of /v1/responses are",
    "/v1/complete": "/v1/messages and /v1/completions are served",
    "/v1/conversations": "previous_response_id of /v1/responses goes on with a conversation",
    "/v1/fim/completions": "/v1/completions takes a suffix",
    "/v1/fine_tuning": "models are served here, not trained",
    "/v1/images": "text alone is read and written here",
    "/v1/moderations": "no model that judges texts is served here",
    "/v1/realtime": "answers are streamed over HTTP, as server-sent events",
    "/v1/threads": "the Responses API at /v1/responses does what threads did",
    "/v1/vector_stores": "name files in a chat: what they say about its question is found by the server",
    "/v1/videos": "text alone is read and written here",
}


def absent(path: str) -> str:
    """What is said of a ``path`` that is not there."""
    instead = next((words for served, words in _INSTEAD.items() if f"{path}/".startswith(f"{served}/")), None)
    return f"there is no {path}" + (f": {instead}" if instead else "")
