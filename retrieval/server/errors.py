"""Errors of the server, in the form of OpenAI's API, and the limit of what is read of a request."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from common.errors import UserError, one_line
from retrieval.server.worker import BusyError

KINDS = {429: "rate_limit_error", 404: "not_found_error"}


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        message: what is wrong, and what to do, in a sentence.
        status: HTTP's.
        parameter: the field of the request that is wrong.
    """

    def __init__(self, message: str, status: int = 400, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


def error_response(message: str, status: int, parameter: str | None = None) -> JSONResponse:
    """Return an error as OpenAI's clients read it.

    Args:
        message: what is wrong, and what to do.
        status: HTTP's.
        parameter: the field of the request that is wrong.
    """
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": one_line(message), "type": kind, "param": parameter, "code": None}
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": error}, status, headers)


def add_handlers(app: FastAPI, folder: str) -> None:
    """Make an application answer with such errors.

    Args:
        app: the application.
        folder: of the index, whose place on the disk is left out of errors.
    """

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return error_response(str(error), error.status, error.parameter)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return error_response(str(error).replace(folder, "the index"), 400)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return error_response(str(error), 429)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.detail, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
        return error_response(f"{name or 'the body'}: {first['msg']}", 400, name)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return error_response("the server has failed; its log says why", 500)


class LimitedBody:
    """An application that reads no more of a request than it may have.

    Args:
        app: the application.
        most: bytes.
    """

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = error_response(f"the request has more than {self.most:,} bytes; divide it", 413)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            await too_large(scope, receive, send)
            return
        read, answered = 0, False

        async def counting() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise _TooLargeError
            return message

        async def noting(message: Any) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, counting, noting)
        except _TooLargeError:
            if not answered:
                await too_large(scope, receive, send)


class _TooLargeError(BaseException):
    """More was sent than is read; no handler of the application takes it for an error of its own."""
