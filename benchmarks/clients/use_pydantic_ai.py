"""pydantic-ai: chat, stream, tools, structured output."""

import asyncio

from harness import MODEL, QUESTION, V1, check, feature, greedy, main
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key="none"))
SETTINGS = {"temperature": 0.0, "max_tokens": 16}


class Weather(BaseModel):
    city: str = Field(pattern="^(Rome|Oslo)$")


@feature("chat")
def chat():
    check(Agent(model, model_settings=SETTINGS).run_sync(QUESTION).output, greedy())


@feature("stream")
def stream():
    async def read():
        async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True)]

    check("".join(asyncio.run(read())), greedy())


@feature("tools")
def tools():
    agent = Agent(model, output_type=ToolOutput(Weather), model_settings={**SETTINGS, "max_tokens": 60})
    check(agent.run_sync(QUESTION).output.city in ("Rome", "Oslo"), True)


@feature("structured output")
def structured():
    agent = Agent(model, output_type=NativeOutput(Weather), model_settings={**SETTINGS, "max_tokens": 60})
    check(agent.run_sync(QUESTION).output.city in ("Rome", "Oslo"), True)


main()
