"""openai-agents: an agent over chats and one over responses, streamed, and with a tool."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from harness import MODEL, QUESTION, V1, check, feature, greedy, main
from openai import AsyncOpenAI

set_tracing_disabled(True)
MOST = 256  # an answer that is cut short is an error to it
SETTINGS = ModelSettings(temperature=0, max_tokens=MOST)


def client():
    return AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)


def chats():
    return OpenAIChatCompletionsModel(MODEL, openai_client=client())


@feature("chat")
def chat():
    agent = Agent(name="a", model=chats(), model_settings=SETTINGS)
    check(Runner.run_sync(agent, QUESTION).final_output, greedy(MOST))


@feature("responses")
def responses():
    agent = Agent(name="a", model=OpenAIResponsesModel(MODEL, openai_client=client()), model_settings=SETTINGS)
    check(Runner.run_sync(agent, QUESTION).final_output, greedy(MOST))


@feature("stream")
def stream():
    async def read():
        agent = Agent(name="a", model=OpenAIResponsesModel(MODEL, openai_client=client()), model_settings=SETTINGS)
        result = Runner.run_streamed(agent, QUESTION)
        deltas = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return "".join(deltas)

    check(asyncio.run(read()), greedy(MOST))


@feature("tools")
def tools():
    asked = []

    @function_tool
    def weather(city: str) -> str:
        """How the weather is in a city"""
        asked.append(city)
        return "snow"

    settings = ModelSettings(temperature=0, max_tokens=60, tool_choice="required")
    agent = Agent(name="a", model=chats(), model_settings=settings, tools=[weather])
    Runner.run_sync(agent, "How is the weather in Oslo?", max_turns=3)
    check(len(asked) >= 1, True)


main()
