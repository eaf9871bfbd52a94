"""What a person sees of a question answered in this process: bars while it works, then statistics or a table.

Everything but answers and the table goes to stderr.
"""

import json
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from deployments.cli.answers import Answer, LocalRun
from deployments.config import AppConfig
from rapid.backend.protocol import Role
from rapid.events import Statistics
from rapid.models.info import ModelInfo
from rapid.request import GenerationRequest
from rapid.strategies import STRATEGIES

NO_DRAFTS = {
    "no_datastore": "no datastore is configured (see rapid datastore build)",
    "no_long_context": "the prompt has no long part to retrieve from",
    "nothing_above_threshold": "no chunk is similar enough to the question (see --threshold)",
    "drafter_window_exceeded": "the retrieved context does not fit the drafter's window",
    "kv_memory_exceeded": "the drafter has too little KV memory (see kv_memory_gib)",
    "overloaded": "the drafter is full",
    "retrieval_failed": "what matters of the context could not be retrieved",
}
NONE = "–"
ANSWER_CHARS = 400


class Terminal:
    """Runs one `rapid generate`."""

    def __init__(self, *, as_json: bool, quiet: bool, loading_since: float) -> None:
        self._stderr = Console(stderr=True, quiet=quiet, highlight=False)
        self._stdout = Console(highlight=False)
        self._as_json, self._loading_since = as_json, loading_since
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    async def answer(self, request: GenerationRequest, config: AppConfig) -> None:
        """Streams an answer to stdout, then says on stderr how it came about."""
        with self._loaded(config) as run:
            answer = await self._ask(run, request, streams=not self._as_json)
            block = statistics_block(answer, run.info("target"), run.info("drafter"), self._loading_s)
        if self._as_json:
            print(json.dumps(answer.as_object(), ensure_ascii=False, indent=2))
        elif not answer.text.endswith("\n"):
            print()
        self._stderr.print()
        self._stderr.print(block)

    async def compare(self, request: GenerationRequest, config: AppConfig) -> None:
        """Answers by every strategy in turn; prints a table and the beginnings of the answers."""
        answers: list[Answer] = []
        with self._loaded(config) as run:
            for strategy in STRATEGIES:
                self._stderr.print(f"rapid: {strategy} ({len(answers) + 1} of {len(STRATEGIES)})")
                speculation = replace(request.speculation, strategy=strategy)
                answers.append(await self._ask(run, replace(request, speculation=speculation), streams=False))
        if self._as_json:
            print(json.dumps([answer.as_object() for answer in answers], ensure_ascii=False, indent=2))
            return
        dtype = run.info("target").dtype
        self._stdout.print(comparison(answers, dtype=dtype, is_greedy=request.sampling.temperature == 0))
        for answer in answers:
            beginning = textwrap.shorten(answer.text, ANSWER_CHARS, placeholder=" …")
            self._stdout.print(f"\n[cyan]{answer.statistics.strategy}[/cyan]\n{escape(beginning)}")

    @contextmanager
    def _loaded(self, config: AppConfig) -> Iterator[LocalRun]:
        disable_progress_bar()  # transformers' own, for weights that are on the disk already
        with LocalRun.open(config, self._on_prefill) as run:
            self._loading_s = time.perf_counter() - self._loading_since
            yield run

    async def _ask(self, run: LocalRun, request: GenerationRequest, *, streams: bool) -> Answer:
        """One answer, under bars; one that goes to the same terminal takes their place."""

        def on_text(piece: str, num_tokens: int) -> None:
            if streams:
                if self._stdout.is_terminal:
                    bars.stop()
                print(piece, end="", flush=True)
            self._update("writing", num_tokens, request.max_tokens or request.default_max_tokens)

        columns = (
            TextColumn("{task.description:<15}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TimeElapsedColumn(),
        )
        is_drawn = self._stderr.is_terminal and not self._stderr.quiet
        with Progress(*columns, console=self._stderr, transient=True, disable=not is_drawn) as bars:
            self._bars, self._tasks = bars, {}
            return await run.answer(request, on_text)

    def _on_prefill(self, role: Role, done: int, total: int) -> None:
        self._update(f"{role} reads", done, total)

    def _update(self, what: str, done: int, total: int) -> None:
        assert self._bars is not None
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)


def statistics_block(answer: Answer, target: ModelInfo, drafter: ModelInfo, loading_s: float) -> Table:
    """How one answer came about, a line for each aspect that the strategy has."""
    stats = answer.statistics
    block = Table.grid(padding=(0, 2))
    block.add_column(style="cyan", no_wrap=True)
    block.add_column()

    def line(name: str, *parts: str) -> None:
        block.add_row(name, " · ".join(parts))

    models = target.name if drafter == target else f"{target.name} ← {drafter.name}"
    line("strategy", f"[bold]{stats.strategy}[/bold]", escape(models), f"{target.dtype} on {target.device}")
    ended = "the token limit" if answer.reason == "length" else "an end of sequence or stop string"
    line("written", f"{_count(stats.emitted, 'token')} in {_count(stats.rounds, 'round')}", f"ended by {ended}")
    line("speed", f"[bold]{answer.tokens_per_second:.1f}[/bold] tokens/s", f"{answer.decode_s:.2f} s of decoding")
    if stats.acceptance_rate is not None:
        accepted = f"[bold]{stats.acceptance_rate:.0%}[/bold] of {_count(stats.drafted, 'draft token')} accepted"
        line("drafts", accepted, f"mean accepted length {stats.mean_accepted_length:.2f}")
    if stats.answers:
        scores = (f"{'[bold]' if a['chosen'] else '[dim]'}{a['score']:.2g}[/]" for a in stats.answers)
        line("answers", f"{len(stats.answers)} drafted, scored", *scores)
    if stats.fallback:
        line("fallback", f"[yellow]{_fallback(stats)}[/yellow]")
    line("prompt", *_prompt_parts(stats))
    if stats.chunks:
        block.add_row(
            "chunks", "  ".join(f"#{chunk['position']:.0f} [dim]{chunk['score']:.2f}[/dim]" for chunk in stats.chunks)
        )
    times = {name.replace("_", " "): ms / 1e3 for name, ms in stats.timings_ms.items()}
    line("seconds", *(f"{name} {s:.1f}" for name, s in ({"loading": loading_s} | times).items() if s))
    return block


def _prompt_parts(stats: Statistics) -> list[str]:
    parts = [_count(stats.prompt_tokens, "token")]
    if stats.context_tokens:
        parts.append(f"context {stats.context_tokens:,} → {stats.retrieved_tokens:,} retrieved")
    if stats.confidence is not None:
        parts.append(f"confidence {stats.confidence:.2f}")
    if stats.draft_prompt_tokens:
        parts.append(f"drafter read {stats.draft_prompt_tokens:,}")
    return parts


def comparison(answers: Sequence[Answer], *, dtype: str, is_greedy: bool) -> Table:
    """A row for each answer; all are compared with the first. It fits 80 columns."""
    first = answers[0]
    table = Table(title="One question, every strategy", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in ("read", "wrote", "prefill\ns", "decode\ns", "tokens\n/s", "speed", "drafts\nkept", "same\ntext"):
        table.add_column(heading, justify="right", no_wrap=True)
    for answer in answers:
        stats = answer.statistics
        same = ("yes" if answer.text == first.text else "no") if is_greedy and answer is not first else NONE
        table.add_row(
            stats.strategy,
            _tokens_read(answer),
            f"{stats.emitted:,}",
            f"{answer.prefill_s:.2f}",
            f"{answer.decode_s:.2f}",
            f"{answer.tokens_per_second:.1f}",
            f"{answer.tokens_per_second / first.tokens_per_second:.2f}×",
            NONE if stats.acceptance_rate is None else f"{stats.acceptance_rate:.0%}",
            same,
        )
    table.caption = _caption(answers, dtype, is_greedy)
    table.caption_justify = "left"
    return table


def _tokens_read(answer: Answer) -> str:
    """By the target, and by the drafter where there is one."""
    return "+".join(f"{answer.tokens_read[role]:,}" for role in ("target", "drafter") if role in answer.tokens_read)


def _caption(answers: Sequence[Answer], dtype: str, is_greedy: bool) -> str:
    lines = ["Prefill is everything before the first token: retrieval, and both prompts at once."]
    lines.append("Decoding speed and text are compared with autoregressive's.")
    if not is_greedy:
        lines.append("Texts that are sampled differ by chance, so they are not compared.")
    elif dtype != "float32":
        lines.append(f"In {dtype} near ties may fall otherwise in a batch; with --dtype float32 hardly ever.")
    lines += [f"{_fallback(a.statistics).capitalize()}." for a in answers[-1:] if a.statistics.fallback]
    return "\n".join(lines)


def _fallback(stats: Statistics) -> str:
    """What is missing, and why."""
    missing = "transfer" if stats.fallback == "nothing_above_threshold" and stats.draft_prompt_tokens else "drafter"
    return f"no {missing}: {NO_DRAFTS.get(stats.fallback or '', stats.fallback)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
