"""Headers that mean something to Ray Serve, and that no client may send."""

from starlette.datastructures import Headers

from rapid.errors import InvalidRequest

_INTERNAL = {"x_request_disconnect_disabled", "x_request_timeout_seconds", "x_session_id"}


def is_internal(name: str) -> bool:
    """Whether Serve acts on the header ``name``; a proxy may have changed hyphens and underscores."""
    normal = name.lower().replace("-", "_")
    return normal in _INTERNAL or normal.startswith("serve_")


def check_headers(headers: Headers) -> None:
    """Refuses what `deployments.serve.edge` would have taken away, where nothing took it away.

    Raises:
        InvalidRequest: a header is internal.
    """
    for name in headers:
        if is_internal(name):
            raise InvalidRequest(f"the header {name[:64]} is not for clients: leave it out", code="header_not_allowed")
