"""The command line. Each command imports the libraries that take seconds to load (PyTorch, Ray) itself."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deployments.cli.calibrate import retrieval
from deployments.cli.eval import evaluation
from deployments.cli.inputs import read_content, read_document
from deployments.cli.shell_completion import CONFIG, auto, configs, model_names, one_of, rules, strategies
from deployments.cli.tools import tools
from rapid.errors import InvalidRequest, RapidError
from rapid.strategies import STRATEGIES, VERIFICATION_RULES

if TYPE_CHECKING:
    from deployments.config import AppConfig
    from rapid.request import GenerationRequest

app = typer.Typer(
    help="RAPID: retrieval-augmented speculative decoding for long contexts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: list[str] | None = None) -> None:
    """Runs one command and exits: 0, 1 (it failed), 2 (wrong arguments or configuration) or 130 (Ctrl-C).

    An error is one line and no traceback.
    """
    try:
        app(args)
    except Exception as error:
        if os.environ.get("RAPID_DEBUG") == "1":
            raise
        print(f"rapid: error: {_in_one_line(error)}", file=sys.stderr)
        is_wrong_usage = isinstance(error, RapidError) and (error.status < 500 or error.code == "config_error")
        sys.exit(2 if is_wrong_usage else 1)


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if not isinstance(error, RapidError):
        from retrieval import RetrievalError

        if not isinstance(error, RetrievalError):
            return f"{type(error).__name__}: {message} (RAPID_DEBUG=1 shows where)"
    return message


@app.command()
def generate(
    question: Annotated[str | None, typer.Option("--question", "-q", help="What to ask about the documents.")] = None,
    document: Annotated[
        list[Path] | None, typer.Option("--document", "-d", help="A UTF-8 text file, or - for stdin. Repeatable.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run every strategy and print a table. Greedy.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (a list with --compare).")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing on stderr but errors.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help=f"Whose `args` hold the defaults.  [default: {CONFIG}, where there is one]", **configs),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Embedded name, folder or hub id. It drafts too, unless --drafter says other.", **model_names
        ),
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="A model with the target's tokenizer.", **model_names)] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of both models' weights, where they are not quantised."),
    ] = None,
    kv_dtype: Annotated[
        Literal["auto", "int8", "fp8"] | None,
        typer.Option(help="Of both models' stored keys and values: int8 on a CPU, fp8 on CUDA."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help=one_of(STRATEGIES), rich_help_panel="Decoding", **strategies),
    ] = None,
    num_draft_tokens: Annotated[
        str | None, typer.Option(help="γ: tokens drafted a round, or auto.", rich_help_panel="Decoding", **auto)
    ] = None,
    transfer_strength: Annotated[
        str | None,
        typer.Option(help="η: how far drafts move the target, or auto; 0: not.", rich_help_panel="Decoding", **auto),
    ] = None,
    transfer_temperature: Annotated[
        float | None, typer.Option(help="Of p and q, at every position; 0: the paper's.", rich_help_panel="Decoding")
    ] = None,
    transfer_divergence: Annotated[
        float | None, typer.Option(help="With η auto: the most KL(p̂‖p), in nats.", rich_help_panel="Decoding")
    ] = None,
    verification: Annotated[
        str | None,
        typer.Option(help=one_of(VERIFICATION_RULES), rich_help_panel="Decoding", **rules),
    ] = None,
    draft_top_k: Annotated[
        int | None, typer.Option(help="The drafter samples from its k likeliest.", rich_help_panel="Decoding")
    ] = None,
    num_answers: Annotated[
        int | None, typer.Option(help="Answers that speculative_rag drafts.", rich_help_panel="Decoding")
    ] = None,
    num_clusters: Annotated[
        int | None, typer.Option(help="Clusters of chunks that each of them reads from.", rich_help_panel="Decoding")
    ] = None,
    draft_cache: Annotated[
        Literal["window", "snap"] | None,
        typer.Option(help="What a target reads of its cache when it drafts itself.", rich_help_panel="Decoding"),
    ] = None,
    draft_cache_tokens: Annotated[
        int | None, typer.Option(help="How many tokens of its cache that are.", rich_help_panel="Decoding")
    ] = None,
    refresh: Annotated[
        Literal["off", "auto"] | None,
        typer.Option(help="auto: retrieve anew while the answer is written.", rich_help_panel="Retrieval"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write.", rich_help_panel="Decoding")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. Repeatable.", rich_help_panel="Decoding")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel="Sampling")] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel="Sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.", rich_help_panel="Sampling")] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel="Sampling")] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel="Sampling")] = None,
    query: Annotated[
        str | None, typer.Option(help="What to search for, if not the question.", rich_help_panel="Retrieval")
    ] = None,
    retrieval_max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to keep, at most.", rich_help_panel="Retrieval")
    ] = None,
    retrieval_method: Annotated[
        str | None, typer.Option(help="dense, sparse or hybrid.", rich_help_panel="Retrieval")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Least similarity of a chunk.", rich_help_panel="Retrieval")
    ] = None,
) -> None:
    """Answer a question about long documents, in this process. The answer goes to stdout, all else to stderr.

    Piped text is the document where --document is absent. Without --question
    too, it is the whole prompt, and the question is what it asks around its document.
    On a terminal, --question alone will do.

    What no option says, the config's `args` say.

    [dim]rapid generate --document book.txt --question "Who is Queequeg?"[/dim]
    [dim]git log | rapid generate --question "What changed in the retriever?"[/dim]
    [dim]cat prompt.txt | rapid generate[/dim]
    """
    content = read_content(document or [], question)
    if not quiet:
        print("rapid: loading the models", file=sys.stderr)
    loading_since = time.perf_counter()
    kinds = {"dtype": dtype, "kv_dtype": kv_dtype}
    settings = _settings(config, {"model": target} | kinds, {"model": drafter or target} | kinds)
    request = _read_request(
        settings,
        content,
        max_tokens=max_tokens,
        temperature=0.0 if compare and temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        rapid={
            "strategy": strategy,
            "num_draft_tokens": _number(num_draft_tokens, int),
            "transfer_strength": _number(transfer_strength, float),
            "transfer_temperature": transfer_temperature,
            "transfer_divergence": transfer_divergence,
            "verification": verification,
            "draft_top_k": draft_top_k,
            "num_answers": num_answers,
            "num_clusters": num_clusters,
            "draft_cache": draft_cache,
            "draft_cache_tokens": draft_cache_tokens,
            "refresh": refresh,
            "query": query or question,
            "retrieval": {
                "method": retrieval_method,
                "max_tokens": retrieval_max_tokens,
                "threshold": threshold,
            },
        },
    )
    from deployments.cli.terminal import Terminal

    terminal = Terminal(as_json=as_json, quiet=quiet, loading_since=loading_since)
    asyncio.run((terminal.compare if compare else terminal.answer)(request, settings))


def _number(value: str | None, kind: type[float]) -> float | str | None:
    """An option that is a number or a word, which the request's check names if it is neither."""
    try:
        return None if value is None else kind(value)
    except ValueError:
        return value


def _settings(path: Path | None, target: dict[str, Any], drafter: dict[str, Any]) -> "AppConfig":
    """The configuration. Fields of ``target`` and ``drafter`` that are not None replace those of its engines."""
    from deployments.config import AppConfig, read_config
    from deployments.engine_config import EngineConfig

    if path is None and CONFIG.exists():
        path = CONFIG
    config = read_config(path) if path else AppConfig()

    def changed(engine: EngineConfig, fields: dict[str, Any]) -> EngineConfig:
        if engine.quantization != "none":
            fields = fields | {"dtype": None}  # quantized weights have a dtype of their own
        return engine.model_copy(update={name: value for name, value in fields.items() if value is not None})

    return config.model_copy(
        update={"target": changed(config.target, target), "drafter": changed(config.drafter, drafter)}
    )


def _read_request(config: "AppConfig", content: str, **fields: Any) -> "GenerationRequest":
    """The request that the HTTP API makes of the same fields."""
    from pydantic import ValidationError

    from deployments.schemas.chat import ChatRequest
    from rapid.text.tokenizer import load_tokenizer

    message = {"role": "user", "content": content}
    try:
        completion = ChatRequest.model_validate({"model": config.model_name, "messages": [message], **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"{first['loc'][-1]}: {first['msg']}" if first["loc"] else first["msg"]) from error
    return completion.read(load_tokenizer(config.target.model), config)


@app.command()
def chat(
    document: Annotated[
        list[Path] | None, typer.Option("--document", "-d", help="A UTF-8 text file. Repeatable.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A running server instead, such as http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Of that server; else the first that it names.")] = None,
    config: Annotated[
        Path | None, typer.Option(help=f"Whose `args` are used.  [default: {CONFIG}, where there is one]", **configs)
    ] = None,
    strategy: Annotated[str | None, typer.Option(help=one_of(STRATEGIES), **strategies)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write, each time.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
) -> None:
    """Talk about documents, in this process or with a running server. /help lists what else can be said.

    A document is read once: the next question reads only what is new. Without a
    terminal each line of stdin is a question. The server's key is
    $RAPID_API_KEY, or $OPENAI_API_KEY. Nothing that is typed is kept.

    [dim]rapid chat --document book.txt[/dim]
    [dim]rapid chat --url http://gpu-server:8000/v1 --document book.txt[/dim]
    """
    texts = [read_document(path) for path in document or []]
    if url is None and model is not None:
        raise InvalidRequest("--model is a server's: give its --url, or name a --config")
    from deployments.cli.chat import chat_here, chat_with

    how = {"strategy": strategy, "max_tokens": max_tokens, "temperature": temperature}
    went_well = chat_with(url, model, texts, **how) if url else chat_here(_settings(config, {}, {}), texts, **how)
    raise typer.Exit(0 if went_well else 1)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A Ray Serve config file.", **configs)] = CONFIG,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray prints.")] = False,
) -> None:
    """Serve over HTTP on this machine until Ctrl-C; OpenAI's API."""
    from deployments.cli.serve import supervise

    supervise(config, verbose=verbose)


app.add_typer(evaluation)
app.add_typer(tools)
app.add_typer(retrieval, name="retrieval")
