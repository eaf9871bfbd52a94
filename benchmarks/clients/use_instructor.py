"""instructor: structured output by tools and by a schema, and a stream of partial objects."""

import instructor
from harness import MESSAGES, MODEL, V1, check, feature, main
from openai import OpenAI
from pydantic import BaseModel, Field

ASK = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "temperature": 0, "max_retries": 0}


class Weather(BaseModel):
    city: str = Field(pattern="^(Rome|Oslo)$")


def client(mode):
    return instructor.from_openai(OpenAI(base_url=V1, api_key="none", max_retries=0), mode=mode)


@feature("tools")
def tools():
    found = client(instructor.Mode.TOOLS).chat.completions.create(**ASK, response_model=Weather)
    check(found.city in ("Rome", "Oslo"), True)


@feature("structured output")
def structured():
    found = client(instructor.Mode.JSON_SCHEMA).chat.completions.create(**ASK, response_model=Weather)
    check(found.city in ("Rome", "Oslo"), True)


@feature("stream")
def stream():
    partial = client(instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(**ASK, response_model=Weather)
    check(list(partial)[-1].city in ("Rome", "Oslo"), True)


main()
