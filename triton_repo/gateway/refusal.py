"""What a caller is told instead of an answer: one object for every error, whatever found it."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, final

Code = Literal[
    "invalid", "unauthorized", "too_large", "rate_limited", "unavailable", "cancelled", "internal", "not_found"
]  # fmt: skip
STATUS: dict[Code, int] = {
    "invalid": 400, "unauthorized": 401, "not_found": 404, "too_large": 413, "rate_limited": 429, "cancelled": 499,
    "internal": 500, "unavailable": 503,
}  # fmt: skip
INTERNAL = "[gateway] an error of the server's own; its log has the request's id"


@final
class Refusal(Exception):
    """`message` is one line with the remedy; `retry_s`: after how many seconds it is worth coming back."""

    def __init__(self, code: Code, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.retry_s = retry_s

    def body(self, request_id: str) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, "request_id": request_id}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_s is None else {"retry-after": str(max(1, math.ceil(self.retry_s)))}
        return headers | ({"www-authenticate": "Bearer"} if self.code == "unauthorized" else {})


def as_json(value: Any) -> bytes:
    """ASCII only: a caller's text may hold halves of surrogate pairs, which UTF-8 cannot."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
