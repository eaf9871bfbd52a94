"""langchain-openai: chat, stream, tools, structured output, embeddings."""

from harness import MESSAGES, MODEL, QUESTION, V1, check, feature, greedy, main
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

HOW = {"base_url": V1, "api_key": "none", "model": MODEL, "max_retries": 0}
model = ChatOpenAI(**HOW, temperature=0, max_tokens=16)
longer = ChatOpenAI(**HOW, temperature=0, max_tokens=60)


class Weather(BaseModel):
    """How the weather is in a city"""

    city: str = Field(pattern="^(Rome|Oslo)$")


@feature("chat")
def chat():
    check(model.invoke(QUESTION).content, greedy())


@feature("stream")
def stream():
    check("".join(chunk.content for chunk in model.stream(QUESTION)), greedy())


@feature("tools")
def tools():
    calls = longer.bind_tools([Weather], tool_choice="any").invoke(QUESTION).tool_calls
    check(calls[0]["args"]["city"] in ("Rome", "Oslo"), True)


@feature("structured output")
def structured():
    for method in ("json_schema", "function_calling"):
        found = longer.with_structured_output(Weather, method=method).invoke(QUESTION)
        check(found.city in ("Rome", "Oslo"), True)


@feature("responses")
def responses():
    by_responses = ChatOpenAI(**HOW, temperature=0, max_tokens=16, use_responses_api=True)
    check(by_responses.invoke(MESSAGES).text, greedy())


@feature("embeddings")
def embeddings():
    # Without this option it sends tokens of OpenAI's own models, whatever the model is.
    embedder = OpenAIEmbeddings(**HOW, check_embedding_ctx_length=False)
    near, far = embedder.embed_documents(["A cat sat.", "Rates rose."])
    asked = embedder.embed_query("A cat")
    close, distant = (sum(a * b for a, b in zip(one, asked, strict=True)) for one in (near, far))
    check(close > distant, True)


main()
