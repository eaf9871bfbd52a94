"""The command line as a person meets it: what goes to stdout and to stderr, exit codes, and errors of one line."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from deployments.cli.main import main
from deployments.cli.serve import Endpoint, ServeRun, how_to_try, root_cause
from deployments.config import AppConfig, parse_config
from rapid.errors import RapidError
from rapid.speculation.verification import RULES
from rapid.strategies import STRATEGIES
from rapid.weights import embedded_models

DOCUMENT = "\n\n".join(
    f"In week {week} the keeper of lighthouse {week % 5} wrote that the lamp had burned for {week * 7} hours."
    for week in range(24)
)
QUESTION = "For how long did the lamp burn in week 12?"
BRIEF = ["--max-tokens", "16", "--temperature", "0"]
DRAFTING = ["--num-draft-tokens", "4", *BRIEF]  # every round, from the first

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a config file whose one application follows ``head``."""

    def write(args: str = "", head: str = "") -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(f"{head}\napplications:\n- import_path: deployments.app:build\n  args: {{{args}}}\n")
        return path

    return write


def test_the_answer_alone_goes_to_stdout_and_its_statistics_to_stderr(run: Run, document: Path) -> None:
    code, out, err = run("generate", "--document", document, "--question", QUESTION, *DRAFTING)
    assert code == 0, err
    assert out.strip()
    assert "tokens/s" not in out
    assert re.search(r"rapid: loading.*\n\nstrategy +rapid", err)
    assert re.search(r"drafts +\d+% of \d+ draft tokens? accepted", err)
    assert "\r" not in err


def test_a_piped_document_gives_valid_json_without_loading_ray() -> None:
    command = ["generate", "--question", QUESTION, "--json", "--quiet", *DRAFTING]
    code = (
        "import sys, atexit; from deployments.cli.main import main\n"
        f"atexit.register(lambda: print('ray' in sys.modules, file=sys.stderr)); main({command})"
    )
    repository = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], input=DOCUMENT, capture_output=True, text=True, cwd=repository
    )
    assert (result.returncode, result.stderr) == (0, "False\n")
    answer = json.loads(result.stdout)
    assert answer.keys() == {"text", "finish_reason", "usage", "rapid"}
    assert answer["usage"]["completion_tokens"] == answer["rapid"]["emitted"] <= 16
    assert answer["rapid"]["strategy"] == "rapid"
    assert answer["rapid"]["context_tokens"] > 512


def test_compare_shows_every_strategy_and_lossless_ones_write_the_same(run: Run, document: Path) -> None:
    options = ["--compare", "--dtype", "float32", "--retrieval-max-tokens", "128", *DRAFTING]
    code, out, err = run("generate", "-d", document, "-q", QUESTION, *options)
    assert code == 0, err
    assert [name for name in STRATEGIES if f"\n{name}\n" not in out] == []
    lines = [line.split() for line in out.splitlines()]
    rows = {cells[0]: cells for cells in lines if len(cells) == 9 and cells[0] in STRATEGIES}
    assert list(rows) == list(STRATEGIES)
    assert {rows[name][-1] for name in ("speculative", "lookup", "rest", "magicdec", "triforce")} == {"yes"}
    read = {name: [int(part.replace(",", "")) for part in cells[1].split("+")] for name, cells in rows.items()}
    assert read["lookup"] == read["magicdec"] == read["autoregressive"]
    assert read["speculative"] == read["rapid"] == read["autoregressive"] + read["rag"]
    assert read["rag"] < read["autoregressive"]


def test_compare_as_json_is_a_list(run: Run) -> None:
    code, out, _ = run("generate", "-q", QUESTION, "--compare", "--json", "--quiet", "--max-tokens", 2)
    assert code == 0
    assert [answer["rapid"]["strategy"] for answer in json.loads(out)] == list(STRATEGIES)


def test_without_documents_a_question_alone_will_do(run: Run) -> None:
    code, out, err = run("generate", "-q", "Who?", "--max-tokens", 2)
    assert (code, "no drafter" in err) == (0, True)
    assert out.strip()


def test_a_prompt_longer_than_the_window_is_told_both_numbers(run: Run) -> None:
    code, out, err = run("generate", "-q", QUESTION, stdin=(DOCUMENT * 20).encode())
    assert (code, out) == (2, "")
    assert re.search(r"rapid: error: .*maximum context length is 8192 tokens, but \d{5} were requested", err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "log.txt is not UTF-8 text: byte 3 is 0xe9; convert it, for example with iconv"),
        (b"GIF\0\1", "log.txt is not plain text: byte 3 is NUL (a binary file, or UTF-16)"),
        (b" \n", "log.txt is empty"),
    ],
)
def test_an_unreadable_document_is_told_apart(run: Run, content: bytes, message: str) -> None:
    Path("log.txt").write_bytes(content)
    assert run("generate", "-d", "log.txt", "-q", QUESTION) == (2, "", f"rapid: error: {message}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-d", "absent.txt", "-q", "Why?"], "absent.txt cannot be read: no such file or directory"),
        (["-d", ".", "-q", "Why?"], ". cannot be read: is a directory"),
        (["-d", "-", "-q", "Why?"], "stdin is empty"),
        (["-d", "-"], "stdin is empty"),
        ([], "--question is needed; see rapid generate --help"),
        (["-q", " "], "--question is empty"),
        (["-q", "Why?", "--strategy", "fast"], f"strategy must be one of {', '.join(STRATEGIES)}, got 'fast'"),
        (["-q", "Why?", "--retrieval-method", "magic"], "method: Input should be 'dense', 'sparse' or 'hybrid'"),
        (["-q", "Why?", "--temperature", "-1"], "temperature must be between 0 and 10, got -1.0"),
        (["-q", "Why?", "--config", "no.yaml"], "no.yaml: cannot be read: [Errno 2] No such file"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exits_with_2(run: Run, args: list[str], message: str) -> None:
    code, out, err = run("generate", *args)
    assert (code, out) == (2, "")
    assert f"rapid: error: {message}" in err
    assert "Traceback" not in err


def test_a_typo_in_the_config_is_named(run: Run, config: Callable[..., Path]) -> None:
    path = config("draftr: {}")
    for command in (["generate", "-q", "Why?", "--config", path], ["serve", path]):
        code, _, err = run(*command)
        assert (code, err.splitlines()[-1]) == (
            2,
            f"rapid: error: {path}: applications[0].args: draftr: unknown field",
        )


def test_a_drafter_without_memory_is_left_out_and_the_answer_says_so(
    run: Run, document: Path, config: Callable[..., Path]
) -> None:
    path = config("drafter: {kv_memory_gib: 0.001}")
    for how in ([], ["--compare"]):
        code, out, err = run("generate", "-d", document, "-q", QUESTION, "--max-tokens", 2, "--config", path, *how)
        assert code == 0, err
        assert out.strip()


def test_a_drafter_beside_a_colocated_target_is_refused(run: Run, config: Callable[..., Path]) -> None:
    code, _, err = run("generate", "-q", "Why?", "--config", config("colocated: true, drafter: {}"))
    assert (code, "leave `drafter` out" in err) == (2, True)


def test_help_loads_nothing_slow_and_names_every_strategy_and_rule(run: Run) -> None:
    loaded = "import sys, deployments.cli.main; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
    code, out, _ = run("generate", "--help")
    assert code == 0
    assert [name for name in (*STRATEGIES, *RULES) if name not in out] == []


def test_an_option_with_choices_names_them(run: Run) -> None:
    code, _, err = run("generate", "-q", "Why?", "--dtype", "int8")
    assert (code, "float32" in err) == (2, True)


def test_a_debugger_may_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPID_DEBUG", "1")
    with pytest.raises(RapidError, match="no such file"):
        main(["generate", "-d", "absent.txt", "-q", "Why?"])


def test_models_list_names_each_and_its_folder(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAPID_CACHE", str(tmp_path))
    code, out, _ = run("models", "list")
    assert code == 0
    for entry, line in zip(embedded_models.entries(), out.splitlines()[1:], strict=True):
        assert line.split() == [
            entry.name, entry.kind, f"{entry.wheel.num_bytes / 1e6:.0f}", "MB", "no", str(tmp_path / entry.name)
        ]  # fmt: skip


def test_models_list_as_json_says_the_same(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAPID_CACHE", str(tmp_path))
    code, out, _ = run("models", "list", "--json")
    assert code == 0
    assert [(row["name"], row["ready"], row["folder"]) for row in json.loads(out)] == [
        (entry.name, False, str(tmp_path / entry.name)) for entry in embedded_models.entries()
    ]


def test_an_unknown_model_is_not_pulled(run: Run) -> None:
    code, _, err = run("models", "pull", "gpt-2")
    assert code == 2
    assert err.startswith("rapid: error: 'gpt-2' is not embedded; these are: ")


def test_serve_says_which_port_is_taken(run: Run, config: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", config(head=f"http_options: {{host: 127.0.0.1, port: {port}}}"))
    assert (code, out) == (2, "")
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in err
    assert "http_options.port" in err


def test_serve_does_not_wait_for_a_ray_that_was_killed(
    run: Run, config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    note = tmp_path / "ray" / "ray_current_cluster"
    wrong = config("target: {model: /absent}", "http_options: {host: 127.0.0.1, port: 0}")
    with socket.create_server(("127.0.0.1", 0)) as ray:
        address = f"127.0.0.1:{ray.getsockname()[1]}"
        note.write_text(address)
        assert run("serve", wrong)[0] == 1 and note.exists()
    assert run("serve", wrong)[0] == 1 and not note.exists()
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, _, err = run("serve", wrong)
    assert code == 2 and f"no Ray answers at {address} (Connection refused), which RAY_ADDRESS names" in err


def test_serve_says_which_option_of_ray_is_wrong(run: Run, config: Callable[..., Path]) -> None:
    code, _, err = run("serve", config(head="http_options: {port: http}"))
    assert code == 2
    assert "config.yaml: http_options.port: " in err


def test_serve_misses_a_model_before_ray_starts(run: Run, config: Callable[..., Path]) -> None:
    code, _, err = run("serve", config("target: {model: /absent}", "http_options: {host: 127.0.0.1, port: 0}"))
    assert (code, err) == (1, "rapid: error: There is no model folder at /absent.\n")


@pytest.mark.parametrize("args", ["target: {model: org/target}, colocated: true", "drafter: {model: org/target}"])
def test_serve_pulls_what_it_will_use_and_nothing_else(
    run: Run, config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, args: str
) -> None:
    asked: list[str] = []

    def no_hub(ref: str, **_: Any) -> str:
        asked.append(ref)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(embedded_models, "local_path", lambda name: asked.append(name) or Path("/models", name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    code, _, err = run("serve", config(args, "http_options: {host: 127.0.0.1, port: 0}"))
    assert code == 1
    assert "org/target" in err and "no connection" in err and "HF_TOKEN" in err
    assert asked == (["org/target"] if "colocated" in args else [AppConfig().target.model, "org/target"])


def test_a_child_that_ends_by_itself_is_an_error_that_shows_its_last_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ServeRun(tmp_path / "absent.yaml", {}, "rapid", verbose=False)
    with pytest.raises(RapidError, match="ended by itself, with exit code 1"):
        for _ in range(120):
            run.wait()
    run.stop()
    assert "absent" in capsys.readouterr().err
    run.log.unlink()


def test_the_root_cause_is_the_innermost_error_that_is_not_rays() -> None:
    message = """The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica:rapid:Target.initialize_and_get_metadata()\x1b[39m (pid=1, ip=10.0.0.1)
  File "replica.py", line 1, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task
rapid.errors.ModelFileError: There is no model folder at /absent."""
    failed = {"status": "DEPLOY_FAILED", "message": message}
    healthy = {"status": "HEALTHY", "message": ""}
    application = {"status": "DEPLOY_FAILED", "message": "Failed to update the deployments ['Target'].\nMore"}
    assert (
        root_cause({**application, "deployments": {"Ingress": healthy, "Target": failed}})
        == "Target did not start: There is no model folder at /absent."
    )
    assert (
        root_cause({**application, "deployments": {}}) == "DEPLOY_FAILED: Failed to update the deployments ['Target']."
    )


def test_the_curl_line_works_as_it_is() -> None:
    endpoint = Endpoint("0.0.0.0", 8000, "/llm/", "rapid")
    command = shlex.split(how_to_try(AppConfig(served_model="small"), endpoint).splitlines()[0])
    assert command[:3] == ["curl", "-N", "http://127.0.0.1:8000/llm/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == "small"
    assert "Authorization" not in " ".join(command)


def test_the_curl_line_of_a_server_with_keys_shows_none() -> None:
    config = parse_config({"access": {"api_keys": ["hunter2"]}})
    said = how_to_try(config, Endpoint("127.0.0.1", 8000, "/", "rapid"))
    assert "Authorization: Bearer $RAPID_API_KEY" in shlex.split(said.splitlines()[1]) and "hunter2" not in said
