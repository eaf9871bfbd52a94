"""The HTTP API over engines in this process: what Ray takes no part in."""

from __future__ import annotations

import httpx
from openai import OpenAI
from served import MODEL, chat, health


def test_the_same_answer_whole_and_streamed(letters_url: str) -> None:
    body = {"model": "letters", "prompt": "abc", "max_tokens": 9, "temperature": 0}
    whole = httpx.post(f"{letters_url}/v1/completions", json=body).json()
    client = OpenAI(base_url=f"{letters_url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="letters", prompt="abc", max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 9
    assert health(letters_url)["sequences"] == {"target": 0, "drafter": 0}


def test_a_real_model_answers(smollm_url: str) -> None:
    client = OpenAI(base_url=f"{smollm_url}/v1", api_key="none", max_retries=0)
    answers = [
        client.chat.completions.create(
            model=MODEL, messages=chat(), max_tokens=16, temperature=0, extra_body={"rapid": {"strategy": strategy}}
        )
        for strategy in ("autoregressive", "rapid")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content != ""
