"""llama-index's openai-like: chat, stream, completion."""

from harness import MODEL, QUESTION, V1, check, feature, greedy, main, post
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

HOW = {"api_base": V1, "api_key": "none", "model": MODEL, "max_retries": 0, "temperature": 0, "max_tokens": 16}
model = OpenAILike(**HOW, is_chat_model=True)


@feature("chat")
def chat():
    check(model.chat([ChatMessage(role="user", content=QUESTION)]).message.content, greedy())


@feature("stream")
def stream():
    chunks = list(model.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    check(chunks[-1].message.content, greedy())


@feature("completions")
def completions():
    found = OpenAILike(**HOW, is_chat_model=False).complete(QUESTION).text
    check(found, post("/completions", prompt=QUESTION, max_tokens=16, temperature=0)["choices"][0]["text"])


main()
