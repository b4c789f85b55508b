"""Errors as the client sees them: typed JSON with codes that do not change."""

from __future__ import annotations

from typing import Any

from armt.errors import (
    CheckpointError,
    DeviceError,
    InvalidArgument,
    NonFiniteError,
    OutOfMemory,
    StateError,
)

# code: (HTTP status, type). The documentation lists them; a test compares.
CODES: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "invalid_text": (400, "invalid_request_error"),
    "invalid_token": (400, "invalid_request_error"),
    "invalid_state": (400, "invalid_request_error"),
    "empty_input": (400, "invalid_request_error"),
    "unsupported": (400, "invalid_request_error"),
    "no_tokenizer": (400, "invalid_request_error"),
    "no_chat_template": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "not_found": (404, "not_found_error"),
    "model_not_found": (404, "not_found_error"),
    "session_not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "body_timeout": (408, "timeout_error"),
    "session_busy": (409, "conflict_error"),
    "version_mismatch": (412, "conflict_error"),
    "body_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "too_many_requests": (429, "rate_limit_error"),
    "too_many_sessions": (429, "rate_limit_error"),
    "internal_error": (500, "server_error"),
    "device_error": (500, "server_error"),
    "not_finite": (500, "server_error"),
    "session_lost": (500, "server_error"),
    "overloaded": (503, "overloaded_error"),
    "out_of_memory": (503, "overloaded_error"),
    "shutting_down": (503, "overloaded_error"),
    "request_timeout": (504, "timeout_error"),
}
RETRY_AFTER = {
    "session_busy": 1,
    "too_many_requests": 1,
    "too_many_sessions": 60,
    "overloaded": 1,
    "out_of_memory": 5,
    "shutting_down": 5,
}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    @property
    def status(self) -> int:
        """The HTTP status."""
        return CODES[self.code][0]

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "error": {
                "message": self.message,
                "type": CODES[self.code][1],
                "code": self.code,
                "param": self.param,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {}
        if self.code in RETRY_AFTER:
            headers["Retry-After"] = str(RETRY_AFTER[self.code])
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def as_api_error(error: BaseException) -> ApiError:
    """Any error as one for the client; nothing of the inside gets out."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StateError):
        return ApiError("invalid_state", str(error))
    if isinstance(error, CheckpointError):
        return ApiError("internal_error", "the model's files cannot be read")
    if isinstance(error, InvalidArgument):
        return ApiError("invalid_request", str(error))
    if isinstance(error, (OutOfMemory, MemoryError)):
        return ApiError("out_of_memory", "there is not enough memory for this request now")
    if isinstance(error, NonFiniteError):
        return ApiError("not_finite", str(error))
    if isinstance(error, DeviceError):
        return ApiError("device_error", "the device failed; the server's log says more")
    return ApiError("internal_error", "the server failed; its log says more")
