"""A page about a run that needs nothing but itself: tables, pictures, and single questions with all their answers.

Questions, documents and answers are other people's text: all of it is escaped, and the page may run no script and load
nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from deployments.evaluation.answers import Answer
from deployments.evaluation.plots import pictures
from deployments.evaluation.run import Asked
from deployments.evaluation.runner import Passage
from deployments.evaluation.summary import Summary
from deployments.evaluation.tables import Table, needed, notes, tables
from deployments.evaluation.task import Question

_MOST_SHOWN = 1500  # characters of a message, half of them its first
_ORIGINS = {
    "accepted": "drafted by the drafter's model",
    "lookup": "looked up in the text",
    "datastore": "looked up in the datastore",
    "self": "drafted by the target itself",
    "recovered": "the target's, where a draft was refused",
    "bonus": "the target's, behind a whole draft",
    "plain": "the target's, without a draft",
    "chosen": "of the chosen answer",
}
_STYLE = """
:root{color-scheme:light dark;--line:#d0d7de;--soft:#f6f8fa;--text:#1f2328;--dim:#57606a;--page:#fff}
@media (prefers-color-scheme:dark){:root{--line:#3d444d;--soft:#161b22;--text:#e6edf3;--dim:#9198a1;--page:#0d1117}
svg{background:#fff;border-radius:6px}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--page);max-width:1200px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}small,.dim{color:var(--dim);font-size:.85em}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0 1rem}
th,td{border-bottom:1px solid var(--line);padding:.3rem .7rem;text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto;display:block;margin:1rem 0}
details{border:1px solid var(--line);border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}
summary{cursor:pointer}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);
padding:.6rem;margin:.3rem 0;border-radius:6px;font:13px/1.5 ui-monospace,monospace}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:.6rem;margin:.6rem 0}
.answer{border:1px solid var(--line);border-radius:6px;padding:.5rem .7rem;overflow-wrap:anywhere}
.answer p{margin:.3rem 0;white-space:pre-wrap}.bad{color:#d1242f}
.accepted{background:#1a7f3740}.lookup{background:#0a7ea440}.datastore{background:#8250df40}.self{background:#bf398940}
.recovered{background:#d1242f30}.bonus{background:#9a670040}.chosen{background:#1f6feb30}
"""


def render(summary: Summary, asked: Sequence[Asked], answers: Iterable[Answer]) -> str:
    """The page, as HTML."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>rapid eval</title><style>{_STYLE}</style></head><body><h1>rapid eval</h1>",
        _about(summary),
        *map(_table, tables(summary)),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(summary)) + "</ul>",
    ]
    if lines := needed(summary):
        listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<details><summary>Differences that this run cannot tell</summary><ul>{listed}</ul></details>")
    parts += ["<h2>Pictures</h2>", *pictures(summary).values(), "<h2>Questions</h2>", _legend()]
    by_question: defaultdict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        by_question[answer.task, answer.question].append(answer)
    order = {row.name: i for i, row in enumerate(summary.evaluation.rows)}
    for each in asked:
        parts.append(f"<h3>{escape(each.choice.label)}</h3>")
        for question in each.questions[: summary.evaluation.reported]:
            found = by_question[each.choice.label, question.id]
            found = sorted(
                (a for a in found if a.row in order), key=lambda answer: (answer.temperature, order[answer.row])
            )
            parts.append(_question(each, question, found))
    return "\n".join([*parts, "</body></html>\n"])


def _about(summary: Summary) -> str:
    systems = "".join(
        f"<li>{escape(name)}: {escape(json.dumps(about, ensure_ascii=False))}</li>"
        for name, about in summary.ran.systems.items()
    )
    said = escape(json.dumps(summary.evaluation.model_dump(mode="json", exclude_defaults=True), indent=1))
    return f"<ul>{systems}</ul><details><summary>What was asked for</summary><pre>{said}</pre></details>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell.text)}<br><small>{escape(cell.detail)}</small></td>" for cell in row)
        + "</tr>"
        for row in table.rows
    )
    return f'<h2>{escape(table.title)}</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _legend() -> str:
    return "<p>Origins of tokens: " + ", ".join(
        f'<span class="{name}">{name}</span> <small>{meaning}</small>' for name, meaning in _ORIGINS.items()
    ) + "</p>"  # fmt: skip


def _question(asked: Asked, question: Question, answers: Sequence[Answer]) -> str:
    right = " / ".join(question.references) or "no reference"
    messages = "".join(
        f"<small>{escape(message['role'])}</small><pre>{escape(_shortened(message['content']))}</pre>"
        for message in question.messages
    )
    facts = escape(json.dumps(dict(question.facts), ensure_ascii=False, indent=1)) if question.facts else ""
    return (
        f"<details><summary>{escape(question.query or question.id)}</summary>"
        f'<p class="dim">{escape(question.id)} · right: {escape(right)}</p>'
        f'<div class="answers">{"".join(_answer(asked, answer) for answer in answers)}</div>'
        + _passages(answers)
        + (f"<details><summary>Facts</summary><pre>{facts}</pre></details>" if facts else "")
        + f"<details><summary>Prompt</summary>{messages}</details></details>"
    )


def _answer(asked: Asked, answer: Answer) -> str:
    title = f"<b>{escape(answer.row)}</b> <small>T {answer.temperature:g}</small>"
    if answer.error is not None:
        return f'<div class="answer">{title}<p class="bad">{escape(answer.error)}</p></div>'
    score = answer.scores.get(asked.task.metric)
    told = [f"{asked.task.metric} {score:.2f}" if score is not None else "no score"]
    told += [f"{answer.decoded / answer.decode_s:.0f} tokens/s"] if answer.decode_s and answer.decoded else []
    told += [f"{answer.accepted} of {answer.drafted} drafted accepted"] if answer.drafted else []
    told += [f"{name} {number}" for name, number in answer.origins.items()]
    told += [f"without passages: {answer.fallback}"] if answer.fallback else []
    pieces = answer.pieces if "".join(text for _, text in answer.pieces).strip() == answer.text.strip() else []
    text = "".join(
        f'<span class="{origin if origin in _ORIGINS else "plain"}">{escape(piece)}</span>' for origin, piece in pieces
    ) or escape(answer.text)
    first = f"<details><summary>First answer</summary><pre>{escape(answer.first)}</pre></details>" * bool(answer.first)
    verdict = f"<details><summary>Verdict</summary><pre>{escape(answer.verdict)}</pre></details>" * bool(answer.verdict)
    return f'<div class="answer">{title}<p>{text}</p>{first}{verdict}<small>{escape(" · ".join(told))}</small></div>'


def _passages(answers: Sequence[Answer]) -> str:
    """Each passage once, with the rows that read it."""
    readers: defaultdict[Passage, list[str]] = defaultdict(list)
    for answer in answers:
        for passage in answer.passages:
            if answer.row not in readers[passage]:
                readers[passage].append(answer.row)
    if not readers:
        return ""
    shown = "".join(
        f"<small>characters {passage.start:,} to {passage.end:,} · score {passage.score:.2f} · "
        f"{escape(', '.join(rows))}</small><pre>{escape(passage.text) or NO_TEXT}</pre>"
        for passage, rows in sorted(readers.items())
    )
    return f"<details><summary>Passages that were retrieved ({len(readers)})</summary>{shown}</details>"


NO_TEXT = "(the server tells the place of a passage, not its text)"


def _shortened(text: str) -> str:
    if len(text) <= _MOST_SHOWN:
        return text
    half = _MOST_SHOWN // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
