"""The playground, `GET /`: one page with everything inside, put together from the files beside this one."""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template

from fastapi import Response

from rapid.speculation.params import SpeculationParams
from rapid.strategies import STRATEGIES, VERIFICATION_RULES
from retrieval import METHODS

_SCRIPTS = ("server.js", "document.js", "answer.js", "page.js")


def page() -> Response:
    """The page, under a policy that lets it run its own script and talk to its own server, and nothing else."""
    source = files(__package__)
    style = source.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join([_tables(), *(source.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)])
    example = escape(source.joinpath("example.txt").read_text(encoding="utf-8").strip())
    html = Template(source.joinpath("page.html").read_text(encoding="utf-8"))
    policy = {
        "default-src": "'none'",
        "style-src": _hashed(style),
        "script-src": _hashed(script),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    rules = "".join(f"<option>{name}</option>" for name in VERIFICATION_RULES)
    methods = "".join(f"<option>{name}</option>" for name in METHODS)
    content = html.substitute(style=style, script=script, example=example, rules=rules, methods=methods)
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


def _tables() -> str:
    """What the scripts know of the strategies: names and summaries, as the table has them."""
    summaries = {name: strategy.summary for name, strategy in STRATEGIES.items()}
    default = SpeculationParams().strategy
    return f"const STRATEGIES = {json.dumps(summaries)};\nconst DEFAULT_STRATEGY = {json.dumps(default)};"


def _hashed(inline: str) -> str:
    """The source expression that allows this inline style or script: no other one runs, wherever it came from."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
