"""`rapid serve`: runs `serve run` as a child process, says when it answers, and what is wrong when it does not."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from rich.console import Console

from cluster.processes import ENVIRONMENT
from deployments.config import AppConfig, ConfigError, read_config
from deployments.serve.worker import without_pandas
from rapid.errors import InvalidRequest, RapidError
from rapid.weights import embedded_models

POLL_S = 0.5
STOP_S = 30
CONNECT_S = 5
END_CHARS = 20_000
# Ray's name for what a worker process calls first.
SETUP = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "deployments.serve.worker.without_pandas"}
# What the proxy calls when it starts, so that clients cannot speak to Serve as its own parts do.
EDGE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.serve.edge:middlewares"}
# Ray's name for: the processes of a cluster that starts here talk to each other over 127.0.0.1, and listen there alone.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
SERVE = """
from deployments.serve.worker import without_pandas

without_pandas()
from ray.serve.scripts import cli

cli()
"""
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# The line of a traceback that names its error; one that is followed by another traceback only wraps it.
ERROR = re.compile(r"^\s*((?:\w+\.)+[A-Z]\w*|[A-Z]\w*Error): (?!Traceback)(\S.*)$", re.MULTILINE)


class Endpoint(NamedTuple):
    """Where the config file wants its first application served."""

    host: str
    port: int
    route_prefix: str
    application: str

    @property
    def url(self) -> str:
        """For a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"

    def check_free(self) -> None:
        """Raises InvalidRequest when the port cannot be listened on."""
        try:
            with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the ends of old connections do not count
                probe.bind((self.host, self.port))
        except OSError as error:
            raise InvalidRequest(
                f"port {self.port} of {self.host} cannot be used: {error.strerror}. Stop what listens there "
                f"(`ss -ltnp 'sport = :{self.port}'` names it), or set another http_options.port in the config."
            ) from error


def read_endpoint(path: Path) -> Endpoint:
    """Raises ConfigError when a field that Ray Serve reads is unknown or has a wrong value."""
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    _refuse_what_serve_ignores(path, document)
    try:
        schema = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    application = schema.applications[0]
    http = schema.http_options
    return Endpoint(http.host, http.port, application.route_prefix or "/", application.name)


def _refuse_what_serve_ignores(path: Path, document: dict[str, Any]) -> None:
    """Ray Serve drops keys it does not know: a misspelt `deployments` would change nothing, silently."""
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    def check(where: str, keys: Any, schema: type[BaseModel]) -> None:
        unknown = set(keys or ()) - set(schema.model_fields)
        if unknown:
            raise ConfigError(f"{path}: {where}{sorted(unknown)[0]}: unknown field")

    check("", document, ServeDeploySchema)
    check("http_options.", document.get("http_options"), HTTPOptionsSchema)
    for i, application in enumerate(document["applications"]):
        check(f"applications[{i}].", application, ServeApplicationSchema)
        for j, deployment in enumerate(application.get("deployments") or []):
            check(f"applications[{i}].deployments[{j}].", deployment, DeploymentSchema)


def supervise(path: Path, *, verbose: bool) -> None:
    """Serves the config file until SIGINT, SIGTERM or SIGHUP.

    Raises:
        RapidError: the config is wrong, the port is taken, a model is missing, or the application does not start.
    """
    console = Console(stderr=True, highlight=False)
    # `serve run` protects a new cluster with Ray's own token; Ray's client reads it when it loads in this mode.
    environment = ENVIRONMENT | SETUP | EDGE | LOOPBACK | os.environ
    without_pandas()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    config, endpoint = read_config(path), read_endpoint(path)
    endpoint.check_free()
    pass_over_a_dead_ray()
    for model in dict.fromkeys((config.target.model, config.drafting_engine.model, config.retriever.embedder)):
        embedded_models.fetch(model)  # with a bar, and what is missing is missed before Ray has started
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    run = ServeRun(path, environment, endpoint.application, verbose=verbose)
    try:
        console.print(f"Starting {path}; Ray's output goes to {run.log}")
        started = time.perf_counter()
        with console.status("Ray is starting"):
            while not _answers(endpoint):
                for name in run.newly_up():
                    console.print(f"  {name} is up ({time.perf_counter() - started:.0f} s)")
        console.print(f"Ready after {time.perf_counter() - started:.0f} s. Stop with Ctrl-C. Try it:\n")
        print(how_to_try(config, endpoint), flush=True)
        while True:
            run.wait()
    except KeyboardInterrupt:
        console.print("\nStopping")
    finally:
        run.stop()


def pass_over_a_dead_ray() -> None:
    """Removes Ray's own note of a cluster that was killed. Ray would wait for that one, without a word and without end.

    Raises:
        InvalidRequest: RAY_ADDRESS names a cluster that does not answer.
    """
    from ray._common.utils import reset_ray_address
    from ray._private.utils import read_ray_address

    named = os.environ.get("RAY_ADDRESS")
    found = re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", named or read_ray_address() or "")
    if found is None:  # none yet, or a name that only Ray understands
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except OSError as error:
        if named:
            raise InvalidRequest(
                f"no Ray answers at {named} ({error.strerror or error}), which RAY_ADDRESS names: start it there, or "
                "unset RAY_ADDRESS for a new one on this machine"
            ) from error
        reset_ray_address()


def how_to_try(config: AppConfig, endpoint: Endpoint) -> str:
    """A command line that works as it is, and what the openai client needs; a key is named and not shown."""
    body = json.dumps(
        {
            "model": config.model_name,
            "messages": [{"role": "user", "content": "Name three oceans."}],
            "max_tokens": 64,
            "temperature": 0,
            "stream": True,
        }
    )
    has_keys = bool(config.access.keys)
    first = "export RAPID_API_KEY=...  # one of the server's\n" if has_keys else ""
    key = '-H "Authorization: Bearer $RAPID_API_KEY" ' if has_keys else ""
    api_key = 'os.environ["RAPID_API_KEY"]' if has_keys else '"none"'
    return (
        f"{first}curl -N {endpoint.url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'\n\n"
        f'OpenAI(base_url="{endpoint.url}/v1", api_key={api_key})  # model="{config.model_name}"\n'
    )


def _answers(endpoint: Endpoint) -> bool:
    # Never through a proxy that the environment names: this is our own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{endpoint.url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class ServeRun:
    """The child process. Its output is in the file ``log``, and on stderr as well when ``verbose``."""

    def __init__(self, path: Path, environment: dict[str, str], application: str, *, verbose: bool) -> None:
        descriptor, name = tempfile.mkstemp(prefix="rapid-serve-", suffix=".log")
        self.log = Path(name)
        self._application, self._verbose = application, verbose
        self._read = self.log.open(encoding="utf-8", errors="replace")
        self._end = ""  # of the output
        self._dashboard: str | None = None
        self._client: Any = None
        self._up: set[str] = set()
        with os.fdopen(descriptor, "wb") as output:
            # A session of its own, so that Ctrl-C reaches Ray through us and all its processes end in order.
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, "run", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def newly_up(self) -> list[str]:
        """Waits a moment; returns the deployments that came up since the last call.

        Raises:
            RapidError: the process ended, or Ray Serve gave the application up.
        """
        self.wait()
        application = self._application_details()
        if application.get("status") in FAILED:
            raise RapidError(f"{root_cause(application)}; all of it is in {self.log}")
        up = {name for name, it in application.get("deployments", {}).items() if it["status"] == "HEALTHY"}
        new, self._up = sorted(up - self._up), up
        return new

    def wait(self) -> None:
        """Waits a moment. Raises RapidError when the process ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL_S)
        self._follow()
        if self._process.returncode is not None:
            if not self._verbose:
                sys.stderr.write("".join(self._end.splitlines(keepends=True)[-20:]))
            raise RapidError(f"Ray Serve ended by itself, with exit code {self._process.returncode}; see {self.log}")

    def stop(self) -> None:
        """Ends the process, and with it Ray on this machine; a second Ctrl-C ends it at once."""
        try:
            self._process.terminate()
            self._process.wait(STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
        self._follow()
        self._read.close()

    def _follow(self) -> None:
        new = self._read.read()
        if self._verbose:
            sys.stderr.write(new)
        self._end = (self._end + new)[-END_CHARS:]
        found = re.search(r"View the dashboard at (http\S+)", COLOUR.sub("", self._end))
        self._dashboard = self._dashboard or (found and found[1])

    def _application_details(self) -> dict[str, Any]:
        """What Ray's dashboard says of the application; nothing while it cannot be asked."""
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        if self._dashboard is None:
            return {}
        try:
            self._client = self._client or ServeSubmissionClient(self._dashboard)
            details: dict[str, Any] = self._client.get_serve_details()["applications"].get(self._application, {})
        except Exception:  # of requests, Ray's own, or a plain RuntimeError; a child that ended is noticed anyway
            return {}
        return details


def root_cause(application: dict[str, Any]) -> str:
    """The last line of a failed application's nested tracebacks that names an error which is not Ray's wrapping."""
    failed = [(name, it["message"]) for name, it in application["deployments"].items() if it["status"] in FAILED]
    for name, message in [*failed, ("the application", application["message"])]:
        causes = [cause for cause in ERROR.findall(COLOUR.sub("", message)) if not cause[0].startswith("ray.")]
        if causes:
            return f"{name} did not start: {causes[-1][1]}"
    return f"{application['status']}: {application['message'].strip().splitlines()[0]}"
