"""Errors in OpenAI's format."""

from __future__ import annotations

import logging

from raycloud.edge.workers import ServerStopping
from raycloud.errors import LinkError, ModelError

_LOG = logging.getLogger(__name__)


class ApiError(Exception):
    """Error in OpenAI's format.

    Args:
        status: HTTP status.
        message: one line for the client.
        kind: ``type`` of the error.
        param: field of the request that is wrong.
        code: code for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: Exception) -> ApiError:
    """API error of an exception, without internal details; those are written to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LinkError):
        return ApiError(503, f"the link to the cloud: {error}", "server_error", code="link_error")
    if isinstance(error, ServerStopping):
        return ApiError(503, "the server is stopping", "server_error", code="stopping")
    if isinstance(error, ModelError):  # its message is one line for users
        _LOG.error("a generation failed: %s", error)
        return ApiError(500, str(error), "server_error", code="model_error")
    _LOG.error("a generation failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", "server_error", code="internal_error")
