"""`response_format` and vLLM's `structured_outputs`: what the output may be, and the grammar of each."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from deployments.schemas.body import AtMost, Body, wrong
from rapid.errors import InvalidRequest


class JsonSchema(Body):
    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class AsText(Body):
    type: Literal["text"]

    def grammar(self) -> str | None:
        return None


class AsObject(Body):
    type: Literal["json_object"]

    def grammar(self) -> str | None:
        return _json_grammar({"type": "object"})


class AsSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> str | None:
        return _json_grammar(self.json_schema.json_schema)


def _json_grammar(schema: dict[str, Any], param: str = "response_format") -> str:
    # Here, since it loads PyTorch: the process that listens only checks bodies.
    from rapid.sampling.grammar import Framed, json_grammar

    return json_grammar(Framed(schema), param=param)


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`; its older `guided_json` and kin are the same fields by another name."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], AtMost(1024)] | None = None
    grammar_rules: str | None = Field(None, alias="grammar", description="in llguidance's Lark")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if len(self.model_fields_set) != 1 or self.json_object is False or self.choice == []:
            raise wrong("", "give one of json, json_object, regex, choice, grammar")
        return self

    def grammar(self) -> str:
        from rapid.sampling.grammar import lark_grammar, regex_grammar

        param = "structured_outputs"
        if self.json_object:
            return _json_grammar({"type": "object"})
        if self.json_schema is not None:
            return _json_grammar(_as_schema(self.json_schema), param)
        if self.regex is not None:
            return regex_grammar(self.regex, param)
        if self.choice is not None:
            return lark_grammar("start: " + " | ".join(json.dumps(text) for text in self.choice), param)
        assert self.grammar_rules is not None
        return lark_grammar(self.grammar_rules, param)


def _as_schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given)
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequest("structured_outputs.json: it is neither an object nor the JSON of one")
    return schema


ResponseFormat = Annotated[AsText | AsObject | AsSchema, Field(discriminator="type")]
