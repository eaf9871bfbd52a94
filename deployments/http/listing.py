"""Pages of a list, as OpenAI has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rapid.errors import InvalidRequest


def listed(found: Sequence[dict[str, Any]], limit: int, after: str | None, what: str) -> dict[str, Any]:
    """The first ``limit`` of ``found`` behind the one whose id is ``after``; the error says ``what`` they are.

    Raises:
        InvalidRequest: no item has the id ``after``.
    """
    ids = [item["id"] for item in found]
    if after is not None:
        if after not in ids:
            raise InvalidRequest(f"there is no {what} {after!r} in this list", param="after")
        found = found[ids.index(after) + 1 :]
    page = found[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, **ends, "has_more": len(page) < len(found)}
