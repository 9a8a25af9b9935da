"""Every error of the server: its code, and the status and type that belong to the code, in OpenAI's format.

OpenAI, "Error codes", and the errors that its server sends. docs/serving.md has this table for users.
"""

from __future__ import annotations

from typing import Any

INVALID, SERVER = "invalid_request_error", "server_error"

# code: (status, type)
ERRORS: dict[str, tuple[int, str]] = {
    "invalid_http": (400, INVALID),
    "invalid_json": (400, INVALID),
    "invalid_value": (400, INVALID),
    "missing_required_parameter": (400, INVALID),
    "unknown_parameter": (400, INVALID),
    "unsupported_parameter": (400, INVALID),
    "context_length_exceeded": (400, INVALID),
    "invalid_api_key": (401, INVALID),
    "host_not_allowed": (403, INVALID),
    "unknown_url": (404, INVALID),
    "model_not_found": (404, INVALID),
    "method_not_supported": (405, INVALID),
    "request_timeout": (408, INVALID),
    "request_too_large": (413, INVALID),
    "unsupported_media_type": (415, INVALID),
    "rate_limit_exceeded": (429, "requests"),
    "header_too_large": (431, INVALID),
    "client_disconnected": (499, INVALID),
    "internal_error": (500, SERVER),
    "not_implemented": (501, SERVER),
    "too_many_connections": (503, SERVER),
    "engine_stopped": (503, SERVER),
}
HEADERS = {401: {"www-authenticate": 'Basic realm="peakgpt"'}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}
_CODE_OF_STATUS = {status: code for code, (status, _) in reversed(ERRORS.items())}  # the first of each status


class BadRequest(Exception):
    """An error response; `body` has the format of OpenAI.

    Args:
        message: what was got and what was expected.
        param: the field of the request that is wrong.
        code: a key of ERRORS.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.status, kind = ERRORS[code]
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(HEADERS.get(self.status, {}))


def code_of(status: int) -> str:
    """Return the code of an error that a library raised with a status only."""
    return _CODE_OF_STATUS.get(status, "internal_error" if status >= 500 else "invalid_http")
