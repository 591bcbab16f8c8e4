"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST_MESSAGE = 300  # characters, of which a request may have given most


class ApiError(Exception):
    """What a client gets in place of an answer.

    Args:
        status: HTTP's.
        message: what is wrong, and what to do.
        param: the part of the request that it is about.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self)
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]}...{message[-_LONGEST_MESSAGE // 2 :]}"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def no_such_model(asked: str | None, served: str) -> ApiError:
    """The error for a model that is not the server's."""
    message = f"no model {asked!r} here; this server has {served!r}"
    return ApiError(404, message, "model", "model_not_found")
