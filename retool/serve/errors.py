"""What a request gets instead of an answer, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """Why a request isn't answered: an HTTP `status`, a sentence, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.code = code

    def as_dict(self) -> dict[str, Any]:
        """The body of the response."""
        server_side = self.status >= 500
        fallback = "server_error" if server_side else "invalid_request_error"
        error = {
            "message": self.message,
            "type": KINDS.get(self.status, fallback),
            "param": self.field,
            "code": self.code,
        }
        return {"error": error}
