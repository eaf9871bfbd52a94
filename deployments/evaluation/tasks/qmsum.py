"""QMSum: what a part of a long meeting was about, or all of it.

Source of the data: Zhong et al., "QMSum", 2021; of the prompt, the truncation and the metric: LongBench, 2023. Its
ROUGE-L comes from another package than ours, and differs from it in how it cuts words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from deployments.evaluation.metrics.answers import f1
from deployments.evaluation.metrics.rouge import rouge_l
from deployments.evaluation.reading import Source, find, records
from deployments.evaluation.task import OPTIONS, Question, Task, TaskSettings, chosen
from deployments.evaluation.truncation import Document, evidence_kept, prompt

SOURCE = Source(("qmsum_test.jsonl", "test.jsonl"))
FIELDS = ("meeting_transcripts", "general_query_list", "specific_query_list")
CONTEXT_TOKENS = 31_500
MAX_TOKENS = 512
_BEFORE = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n"
)
_BEHIND = (
    "\n\nNow, answer the query based on the above meeting transcript in one or more sentences."
    "\n\nQuery: {query}\nAnswer:"
)


class _Asked(NamedTuple):
    id: str
    query: str
    answer: str
    spans: tuple[range, ...]  # of turns
    meeting: int


@dataclass(config=OPTIONS)
class QMSum(Task):
    """``queries``: about a part of the meeting, about the whole, or both.

    ``keep`` is what is read of a meeting that is too long: "ends" as in the benchmark, or the part with the "evidence".
    """

    name: str = "qmsum"
    queries: Literal["specific", "general", "all"] = "specific"
    keep: Literal["ends", "evidence"] = "ends"
    metric = "rouge_l"

    def questions(self, settings: TaskSettings) -> Iterator[Question]:
        rows = records(find(SOURCE, self.name, settings), FIELDS)
        asked = [one for i, row in enumerate(rows) for one in _asked(i, row) if self._wanted(one)]
        documents: dict[int, Document] = {}
        for one in chosen(asked, lambda one: one.id, settings):
            if one.meeting not in documents:
                turns = rows[one.meeting]["meeting_transcripts"]
                lines = [f"{turn['speaker']}: {turn['content']}" for turn in turns]
                documents[one.meeting] = Document(lines, "\n", settings.tokenizer)
            yield self._question(one, documents[one.meeting], settings)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"rouge_l": rouge_l(answer, question.references), "f1": f1(answer, question.references)}

    def _wanted(self, one: _Asked) -> bool:
        return self.queries == "all" or (self.queries == "specific") == bool(one.spans)

    def _question(self, one: _Asked, document: Document, settings: TaskSettings) -> Question:
        limit = settings.context_tokens or CONTEXT_TOKENS
        behind = _BEHIND.replace("{query}", one.query)
        turns = [i for span in one.spans for i in span if i < len(document.pieces)]
        part = range(len(document.pieces))
        if self.keep == "evidence":
            # Room for a query of 64 tokens, so that the queries of a meeting share its parts.
            part = document.part_with(turns, limit - len(settings.tokenizer.encode(_BEFORE + _BEHIND)) - 64)
        made = prompt(_BEFORE, document.read(part), behind, settings.tokenizer, limit)
        kept = evidence_kept([document.pieces[i] for i in turns], made.messages[0]["content"])
        return Question(
            id=one.id,
            messages=made.messages,
            references=(one.answer,),
            max_tokens=MAX_TOKENS,
            query=one.query,
            whole=document.text if made.whole or len(part) < len(document.pieces) else "",
            document=f"{one.meeting}/{part.start}",
            group=f"evidence: {kept}" if turns else "general",
            facts={"turns": [[span.start, span.stop - 1] for span in one.spans]},
        )


def _asked(meeting: int, row: dict[str, Any]) -> Iterator[_Asked]:
    for i, query in enumerate(row["specific_query_list"]):
        spans = tuple(range(int(first), int(last) + 1) for first, last in query.get("relevant_text_span", ()))
        yield _Asked(f"{meeting}-s{i}", query["query"], query["answer"], spans, meeting)
    for i, query in enumerate(row["general_query_list"]):
        yield _Asked(f"{meeting}-g{i}", query["query"], query["answer"], (), meeting)
