"""The page and its requests, as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from solo_vlm.serve.page.conversation import Question, WordQuestion
from solo_vlm.serve.page.events import Emit, ShouldStop, stream_events
from solo_vlm.serve.page.service import Service
from solo_vlm.serve.page.worker import BusyError, Worker
from solo_vlm.utils.errors import SoloError

_PAGE = Path(__file__).parent / "page"


def make_app(service: Service) -> Starlette:
    """The application. It answers errors as `{"error": one line}`."""
    api = _Api(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        api.worker.close()

    return Starlette(
        routes=[
            Route("/", lambda _: FileResponse(_PAGE / "index.html")),
            Mount("/page", StaticFiles(directory=_PAGE)),
            Route("/api/model", api.about),
            Route("/api/images", api.add_image, methods=["POST"]),
            Route("/api/images/{name}", api.seen_image, methods=["GET"]),
            Route("/api/images/{name}", api.remove_image, methods=["DELETE"]),
            Route("/api/answer", api.answer, methods=["POST"]),
            Route("/api/attention", api.attention, methods=["POST"]),
        ],
        lifespan=lifespan,
        middleware=[Middleware(_RefuseOtherSites)],
        exception_handlers={
            SoloError: lambda _, error: _error(400, str(error)),
            BusyError: lambda _, error: _error(429, str(error)),
            ValidationError: _validation_error,
            HTTPException: _http_error,
            Exception: _unexpected_error,
        },
    )


class _Api:
    """One method a request."""

    def __init__(self, service: Service) -> None:
        self.worker = Worker(service.limits.waiting)
        self._service = service

    async def about(self, _: Request) -> Response:
        return JSONResponse(self._service.about())

    async def add_image(self, request: Request) -> Response:
        data = await _body(request, self._service.limits.image_bytes)
        return JSONResponse(await run_in_threadpool(self._service.add_image, data))

    async def seen_image(self, request: Request) -> Response:
        return Response(self._service.seen_image(request.path_params["name"]), media_type="image/png")

    async def remove_image(self, request: Request) -> Response:
        self._service.remove_image(request.path_params["name"])
        return JSONResponse({})

    async def answer(self, request: Request) -> Response:
        question = Question.model_validate_json(await _body(request, self._service.limits.request_bytes))
        self._service.check(question)

        def job(emit: Emit, should_stop: ShouldStop) -> None:
            emit({"event": "begin"})
            reply = self._service.answer(
                question, lambda text: emit({"event": "text", "text": text}), should_stop
            )
            emit({"event": "end", **reply})

        return StreamingResponse(stream_events(self.worker, job), media_type="application/x-ndjson")

    async def attention(self, request: Request) -> Response:
        question = WordQuestion.model_validate_json(await _body(request, self._service.limits.request_bytes))
        work = self.worker.submit(lambda: self._service.attention(question))
        return JSONResponse(await asyncio.wrap_future(work))


class _RefuseOtherSites:
    """Refuses what another web site has made a visitor's browser send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/":
            origin = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
            if origin not in (b"same-origin", b"none"):
                return await _error(403, "requests from other sites are refused")(scope, receive, send)
        await self._app(scope, receive, send)


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body of a request; one that is too long is not read to its end."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise HTTPException(413, f"larger than the limit of {max_bytes / 2**20:.3g} MiB")
    return bytes(data)


async def _validation_error(_: Request, error: Any) -> Response:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "request"
    return _error(422, f"{field}: {first['msg']}")


async def _http_error(_: Request, error: Any) -> Response:
    return _error(error.status_code, error.detail)


async def _unexpected_error(_: Request, error: Exception) -> Response:
    return _error(500, f"this failed on the server: {type(error).__name__}")


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
