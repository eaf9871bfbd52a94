"""`response_format`: text, any JSON object, or JSON by a schema; and the grammar of each."""

from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.schemas.body import Body


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


def _json_grammar(schema: dict[str, Any]) -> str:
    # Here, since it loads PyTorch: the process that listens only checks bodies.
    from rapid.sampling.grammar import Framed, json_grammar

    return json_grammar(Framed(schema))


ResponseFormat = Annotated[AsText | AsObject | AsSchema, Field(discriminator="type")]
