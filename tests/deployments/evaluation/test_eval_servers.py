"""Servers as an evaluation sees them: this project's, other projects', judges, and ones that fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from faked import FakeRunner, evaluation, run

from deployments.cli.main import main
from deployments.config import AppConfig, parse_config
from deployments.evaluation.answers import read_answers
from deployments.evaluation.config import Row, System
from deployments.evaluation.judging import JudgeClient
from deployments.evaluation.recommend import advice, candidates, choose, fragment
from deployments.evaluation.runner import Ask
from deployments.evaluation.server_runner import ServerRunner
from deployments.evaluation.suites import SUITES, suite_of
from deployments.evaluation.tables import notes
from deployments.evaluation.tasks.own import AnswerJudge
from rapid.errors import RapidError

Chunks = list[dict[str, Any]]
Serve = Callable[..., tuple[str, list[dict[str, Any]]]]
USAGE = {"prompt_tokens": 100, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
STATISTICS = {
    "emitted": 3,
    "drafted": 2,
    "accepted": 1,
    "fallback": None,
    "chunks": [{"position": 1, "score": 0.5, "content": 0, "start": 10, "end": 20}],
    "timings_ms": {"drafting": 100, "verification": 150, "transport": 50, "total": 1300},
}


def said(*pieces: str) -> Chunks:
    chunks: Chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    return [*chunks, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]


@pytest.fixture
def server() -> Iterator[Serve]:
    """Starts servers of OpenAI's API that stream given chunks; each gives its URL, and the bodies it was sent."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(
        chunks: Chunks, *, owner: str = "other", status: int = 200, names: tuple[str, ...] | None = ("a model",)
    ) -> tuple[str, list[dict[str, Any]]]:
        seen: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if names is None:
                    self._send(500, "text/plain", "Internal Server Error")
                    return
                models = [{"id": name, "owned_by": owner} for name in names]
                self._send(200, "application/json", json.dumps({"data": models}))

            def do_POST(self) -> None:
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if status != 200:
                    self._send(status, "application/json", json.dumps({"error": {"message": "no", "code": "a_code"}}))
                    return
                lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                self._send(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

            def _send(self, code: int, kind: str, body: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((made, thread))
        return f"http://127.0.0.1:{made.server_port}/v1", seen

    yield start
    for made, thread in running:
        made.shutdown()
        thread.join()
        made.server_close()


def ask(**fields: Any) -> Ask:
    row = Row.model_validate({"name": "LC", "rapid": {"strategy": "autoregressive"}} | fields.pop("row", {}))
    return Ask(({"role": "user", "content": "Who?"},), 8, row, 0.3, 17, query="Who?", **fields)


def test_a_peer_is_sent_nothing_of_ours_and_timed_by_the_client(server: Serve) -> None:
    url, seen = server([*said("Ish", "mael", "."), {"choices": [], "usage": USAGE}])
    reply = asyncio.run(ServerRunner(System(url=url)).answer(ask()))
    (body,) = seen
    assert "rapid" not in body and body["model"] == "a model" and body["seed"] == 17 and body["temperature"] == 0.3
    assert (reply.text, reply.finish, reply.tokens, reply.decoded) == ("Ishmael.", "stop", 3, 2)
    assert reply.is_clocked_here and reply.has_read and reply.statistics == {} and reply.pieces == []
    assert 0 < reply.first_s <= reply.total_s and reply.decode_s >= 0


def test_a_peer_that_counts_nothing_is_counted_by_its_chunks(server: Serve) -> None:
    url, _ = server(said("a", "b", "c"))
    reply = asyncio.run(ServerRunner(System(url=url, model="named")).answer(ask()))
    assert (reply.tokens, reply.decoded, reply.has_read) == (None, 2, None)


@pytest.mark.parametrize("names", [(), None])
def test_a_peer_that_names_no_model_is_asked_for_the_named_one(server: Serve, names: tuple[str, ...] | None) -> None:
    url, seen = server(said("a"), names=names)
    assert asyncio.run(ServerRunner(System(url=url, model="named")).answer(ask())).text == "a"
    assert seen[0]["model"] == "named"
    with pytest.raises(RapidError, match="names no model: say which" if names is not None else "500"):
        ServerRunner(System(url=url))


def test_a_server_that_is_not_there_is_no_peer() -> None:
    with pytest.raises(RapidError, match="cannot be asked"):
        ServerRunner(System(url="http://127.0.0.1:1/v1", model="named"))


@pytest.mark.parametrize("error", ["it broke", {"message": "it broke"}])
def test_an_error_in_the_middle_of_an_answer_is_told(server: Serve, error: Any) -> None:
    url, _ = server([*said("a"), {"error": error}])
    with pytest.raises(RapidError, match="it broke"):
        asyncio.run(ServerRunner(System(url=url)).answer(ask()))


def test_our_server_is_asked_by_strategy_and_tells_of_every_token(server: Serve) -> None:
    chunks = said("Ish", "mael.")
    chunks[0]["rapid_round"] = {"tokens": [{"text": "I", "origin": "accepted"}, {"text": "sh", "origin": "accepted"}]}
    chunks[1]["rapid_round"] = {"tokens": [{"text": "mael.", "origin": "recovered"}]}
    url, seen = server([*chunks, {"choices": [], "usage": USAGE, "rapid": STATISTICS}], owner="rapid")
    row = {"rapid": {"strategy": "rapid", "transfer_strength": 5.0}}
    reply = asyncio.run(ServerRunner(System(url=url)).answer(ask(row=row)))
    assert seen[0]["rapid"] == {"strategy": "rapid", "transfer_strength": 5.0, "query": "Who?", "trace": True}
    assert (reply.decoded, reply.decode_s, reply.is_clocked_here) == (3, pytest.approx(0.3), False)
    assert reply.pieces == [("accepted", "Ish"), ("recovered", "mael.")]
    assert reply.origins == {"accepted": 2, "recovered": 1}
    assert reply.passages == [(10, 20, 0.5, "")]


def test_what_a_server_cannot_do_is_left_out_and_said(server: Serve, tmp_path: Path) -> None:
    url, seen = server([*said("right 1"), {"choices": [], "usage": USAGE}])
    ours, _ = server([*said("right 1"), {"choices": [], "usage": USAGE, "rapid": STATISTICS}], owner="rapid")
    peer, rapid = ServerRunner(System(url=url)), ServerRunner(System(url=ours))

    def row(**fields: Any) -> Row:
        return Row.model_validate({"name": "r"} | fields)

    assert peer.refusal(row()) is None and rapid.refusal(row(rapid={"strategy": "triforce"})) is None
    assert "another project's server" in str(peer.refusal(row(rapid={"strategy": "rag"})))
    assert "in process alone" in str(rapid.refusal(row(retrieve_from="whole")))
    summary = asyncio.run(run(evaluation(), tmp_path, peer))
    assert {each.row for each in summary.quality} == {"LC"} and len(seen) == 6
    assert any(note.startswith("RAPID is left out: ") for note in notes(summary))
    assert any("measured at the client" in note for note in notes(summary))


def test_a_peer_that_says_nothing_of_its_cache_has_read_what_is_new_to_it(server: Serve, tmp_path: Path) -> None:
    url, _ = server([*said("right 1"), {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 3}}])
    asked_for = evaluation(systems={"here": {"url": url}}, temperatures=[0, 0.3])
    summary = asyncio.run(run(asked_for, tmp_path, ServerRunner(System(url=url))))
    read = {(each.question, each.temperature) for each in read_answers(tmp_path) if each.has_read}
    assert read == {("q0", 0), ("q3", 0)}  # the first of each document
    (speed, *_) = summary.speed
    assert speed.readings == 2 and speed.reading_s is not None


@pytest.mark.parametrize("status", [400, 500])
def test_a_servers_refusal_keeps_its_status(server: Serve, status: int) -> None:
    url, _ = server([], status=status)
    with pytest.raises(RapidError, match="no") as raised:
        asyncio.run(ServerRunner(System(url=url)).answer(ask()))
    assert raised.value.status == status and raised.value.code == "a_code"


def test_a_judge_rates_and_a_verdict_without_a_rating_is_missing(server: Serve) -> None:
    from deployments.evaluation.task import Question

    question = Question("1", (), (), 8, query="Who?", facts={"document": "Call me Ishmael."})
    url, seen = server(said("Good. Rating: ", "[[7]]"))
    scores, verdict = asyncio.run(JudgeClient(url).scores(AnswerJudge(), question, "Ishmael"))
    assert scores == {"rating": 7.0} and verdict == "Good. Rating: [[7]]"
    assert seen[0]["temperature"] == 0 and "Call me Ishmael." in seen[0]["messages"][1]["content"]
    url, _ = server(said("I would rather not."))
    assert asyncio.run(JudgeClient(url).scores(AnswerJudge(), question, "Ishmael"))[0] == {}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 20)
    rows: list[dict[str, Any]] = [
        {"file": "book.txt", "question": "Who speaks?", "answer": "Ishmael"},
        {"document": "The sea is blue.", "question": "What is the sea?", "answer": ["blue", "azure"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def left(*arguments: object) -> int:
    with pytest.raises(SystemExit) as raised:
        main(["eval", *map(str, arguments)])
    assert isinstance(raised.value.code, int)
    return raised.value.code


def test_the_command_asks_two_servers_and_shows_one_table(
    server: Serve, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, _ = server([*said("Ishmael", "."), {"choices": [], "usage": USAGE}])
    ours, _ = server([*said("It is ", "blue"), {"choices": [], "usage": USAGE, "rapid": STATISTICS}], owner="rapid")
    folder = tmp_path / "out"
    options = ["--tasks", "own", "--data", questions, "--url", f"ours={ours}", "--url", f"peer={peer}", "-o", folder]
    assert left(*options, "--strategies", "rapid") == 0
    out, err = capsys.readouterr()
    assert "rapid at peer is left out" in err and "LC at ours" in out and "LC at peer" in out
    assert {path.name for path in folder.iterdir()} > {"answers.jsonl", "summary.json", "report.html", "speed-t0.svg"}
    kept = json.loads((folder / "summary.json").read_text())
    assert kept["command"].startswith("rapid ") and kept["machine"]["cores"] > 0 and kept["date"]
    by_row = {(each.row, each.question): each.scores["match"] for each in read_answers(folder)}
    assert by_row["LC at peer", "1"] == 1 and by_row["LC at peer", "2"] == 0 and by_row["rapid at ours", "2"] == 1
    assert left(*options, "--strategies", "rapid", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert [each["row"] for each in again["quality"]] == ["LC at ours", "rapid at ours", "LC at peer"]


def test_an_evaluation_in_a_file(server: Serve, questions: Path, tmp_path: Path) -> None:
    peer, seen = server([*said("Ishmael"), {"choices": [], "usage": USAGE}])
    fields = {
        "tasks": [{"name": "own", "data": str(questions), "limit": 1, "max_tokens": 5}],
        "systems": {"peer": {"url": peer}},
        "rows": [{"name": "LC", "system": "peer"}],
    }
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert left("--config", path, "-o", tmp_path / "out", "--temperature", "0.5") == 0
    assert len(seen) == 1 and (seen[0]["max_tokens"], seen[0]["temperature"]) == (5, 0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": [{"name": "LC", "sytem": "here"}]}, "rows.0.sytem: unknown field"),
        ({"rows": [{"name": "LC", "rapid": {"strategy": "fast"}}]}, "rapid.strategy must be one of"),
        ({"rows": [{"name": "LC", "rapid": {"num_draft": 1}}]}, "unknown field"),
        ({"rows": [{"name": "LC"}, {"name": "LC"}]}, "two rows are called LC"),
        ({"rows": [{"name": "LC", "system": "there"}]}, "there is no system there"),
        ({"temperatures": [3]}, "temperatures lie between 0 and 2"),
        ({"systems": {"here": {"url": "http://a/v1", "target_bits": 4}}}, "a server has its own models"),
        ({"tasks": [{"name": "no such task"}]}, "there is none of this name"),
    ],
)
def test_a_file_with_a_mistake_is_one_line(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump({"tasks": [{"name": "own"}], "rows": [{"name": "LC"}]} | change))
    assert left("--config", path, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_options_of_a_task_may_have_commas() -> None:
    from deployments.cli.eval import _specs

    assert _specs(["nq:depth=0.5,name=x,qmsum", "own"]) == ["nq:depth=0.5,name=x", "qmsum", "own"]


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_evaluations_in_both_sizes(name: str) -> None:
    from deployments.evaluation.config import parse_evaluation
    from deployments.evaluation.tasks import make_task

    engine = {"model": "meta-llama/Llama-3.1-8B-Instruct"}
    larger = {"target": engine, "drafter": {"model": "meta-llama/Llama-3.1-70B-Instruct"}}
    for args in (AppConfig(), parse_config({"target": engine, "drafter": engine}), parse_config(larger)):
        suite = parse_evaluation(suite_of(name, args), source=name)
        for task in suite.tasks:
            make_task(task.name)
        again = parse_evaluation(suite.model_dump(mode="json", exclude_defaults=True), source="again")
        assert [row.name for row in again.rows] == [row.name for row in suite.rows]
        if name == "paper-main":
            assert ("upward" in suite.systems) == (args.target.model != args.drafter.model or args == AppConfig())


def test_the_small_main_suite_is_as_large_as_it_says_and_fits_an_hour() -> None:
    from deployments.evaluation.config import parse_evaluation

    suite = parse_evaluation(suite_of("paper-main", AppConfig()), source="paper-main")
    limits = {task.label: task.limit or 0 for task in suite.tasks}
    assert limits["nq"] >= 200 and limits["qmsum"] >= 60 and limits["loogle"] >= 60
    assert limits["xquad_en"] >= 100 and limits["xquad_zh"] >= 100 and suite.temperatures == (0.0, 0.3)
    answers = sum(min(row.limit or limit, limit) for row in suite.rows for limit in limits.values()) * 2
    assert answers < 4800  # of 0.7 s


def test_advice_is_the_better_row_or_the_fastest_equal_one(questions: Path, tmp_path: Path) -> None:
    fields = candidates(questions, AppConfig(), is_judged=False)
    assert fields["tasks"][0]["name"] == "own:metric=f1" and len(fields["rows"]) > 12
    rows = [row | {"name": "RAPID"} if row["name"] == "rapid, η auto" else row for row in fields["rows"]]
    by_name = {row["name"]: row for row in rows}
    chosen_rows = [by_name["LC"], by_name["RAPID"], by_name["rag, 512 tokens"]]
    from faked import Words

    many = asyncio.run(run(evaluation(rows=chosen_rows), tmp_path / "many", FakeRunner(), task=Words(60)))
    better = choose(many)
    assert better.chosen.row.name == "RAPID" and "surely above" in better.reason
    few = asyncio.run(run(evaluation(rows=chosen_rows), tmp_path / "few", FakeRunner(), task=Words(3)))
    assert choose(few).chosen.row.name == "RAPID" and "the fastest" in choose(few).reason
    told = advice(few)
    assert "3 questions tell little" in told and "# > RAPID" in told
    parsed = parse_config(yaml.safe_load(told))
    assert (parsed.speculation.strategy, parsed.speculation.transfer_strength) == ("rapid", "auto")
    rag = fragment(Row.model_validate(by_name["rag, 512 tokens"]))
    assert parse_config(rag).retriever.options.max_tokens == 512
