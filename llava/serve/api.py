"""OpenAI's chat completions over a service: ``POST /v1/chat/completions``, plain or streamed, and ``GET /v1/models``.

An answer has one field more than OpenAI's, ``route`` (``llava.slots.route.Route.describe``); streamed, the last part
with a choice has it. Errors have OpenAI's shape and status codes, so that its clients raise what they raise there.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import shortuuid
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from llava.outside import decoded, parsed
from llava.serve.chat_request import ChatRequest, read_request
from llava.serve.question import Answer, Busy, ModelFailed, Refused
from llava.serve.service import Answering, Service
from llava.utils import UserError

PATIENCE = 60.0
"""Seconds in which a body must be there."""
STATUS = {"model_not_found": 404, "too_large": 413, "wrong_content_type": 415}
"""Of what is refused; 400 where the code is none of these."""


def add_api(app: FastAPI, service: Service) -> None:
    """Let ``app`` answer ``/v1``."""
    api = _Api(service)
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", api.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/{rest:path}", api.unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])


class _Api:
    """The three addresses; requests hold one of ``at_once`` places from before their body is read."""

    def __init__(self, service: Service) -> None:
        self.service, self.since = service, int(time.time())
        self.places = threading.BoundedSemaphore(service.limits.at_once)

    @property
    def names(self) -> list[str]:
        """The model's name and, where there is one under it, its base's."""
        return [self.service.name, *([f"{self.service.name}-base"] if self.service.has_base else [])]

    def _told(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.since, "owned_by": "llava"}

    async def models(self) -> JSONResponse:
        """The models' list."""
        return JSONResponse({"object": "list", "data": [self._told(name) for name in self.names]})

    async def model(self, name: str) -> JSONResponse:
        """One model."""
        if name not in self.names:
            return failed(Refused(f"there is no model {name[:80]!r}", "model", "model_not_found"))
        return JSONResponse(self._told(name))

    async def unknown(self, request: Request) -> JSONResponse:
        """Any other address."""
        return _error(404, f"there is no {request.method} {request.url.path[:80]}", "invalid_request_error")

    async def complete(self, request: Request) -> Response:
        """An answer, or its parts as server-sent events."""
        if not self.places.acquire(blocking=False):
            return failed(Busy("too many requests are being answered; ask again in a moment"))
        answering: Answering | None = None
        watch: asyncio.Task[None] | None = None
        streamed: Response | None = None
        try:
            body = await self._body(request)
            asked = await to_thread.run_sync(self._read, body)
            del body
            answering = self.service.ask(asked.question)
            watch = asyncio.create_task(_stop_when_gone(request, answering))
            first = await _next(answering)
            if asked.stream:
                end = functools.partial(self._end, answering)
                streamed = _Stream(self._parts(asked, answering, first), end)
                return streamed
            while first is not None:
                first = await _next(answering)
            return JSONResponse(_completion(asked.model, answering.answer))
        except UserError as error:
            return failed(error)
        except TimeoutError:
            return failed(Refused(f"the body did not come within {PATIENCE:.0f} seconds", None))
        except ModelFailed as error:
            return _error(500, str(error), "server_error")
        finally:
            if watch is not None:
                watch.cancel()  # a stream looks for itself
            if streamed is None:
                self._end(answering)

    def _end(self, answering: Answering | None) -> None:
        if answering is not None:
            answering.stop()
        self.places.release()

    async def _body(self, request: Request) -> bytes:
        """The body, as far as it may be read.

        Raises:
            Refused: it is no JSON by its type, or too large.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused("the content type must be application/json", None, "wrong_content_type")
        limits, found = self.service.limits, bytearray()
        most = limits.picture_bytes * 4 // 3 + 12 * limits.characters + 2**16
        with anyio.fail_after(PATIENCE):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise Refused(f"the body is larger than {most >> 20} MB", None, "too_large")
        return bytes(found)

    def _read(self, body: bytes) -> ChatRequest:
        try:
            value = parsed(decoded(body, "the body"), "the body")
        except UserError as error:
            raise Refused(error, None) from error
        return read_request(value, self.service.limits, self.service.generation, self.names)

    async def _parts(self, asked: ChatRequest, answering: Answering, text: str | None) -> AsyncIterator[str]:
        """The answer as events."""
        whole = functools.partial(_chunk, _identity(), asked)
        told = ""
        try:
            yield _event(whole({"role": "assistant", "content": ""}))
            while text is not None:
                yield _event(whole({"content": text.removeprefix(told)}))
                told = text
                text = await _next(answering)
            answer = answering.answer
            if answer.text != told:
                yield _event(whole({"content": answer.text.removeprefix(told)}))
            yield _event(whole({}, finish=_finish(answer)) | {"route": answer.route})
            if asked.usage:
                yield _event(whole(None) | {"usage": _usage(answer)})
            yield "data: [DONE]\n\n"
        except UserError as error:
            yield _event({"error": _told_error(str(error), "invalid_request_error")})
        except ModelFailed as error:
            yield _event({"error": _told_error(str(error), "server_error")})


class _Stream(StreamingResponse):
    """Events, and what is to be done when they end or their reader goes away, which may be before the first."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def _stop_when_gone(request: Request, answering: Answering) -> None:
    """Stop an answer, or its waiting, when its reader goes away; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answering.stop()


async def _next(answering: Answering) -> str | None:
    return await to_thread.run_sync(answering.next, abandon_on_cancel=True)


def failed(error: UserError) -> JSONResponse:
    """An error as OpenAI's clients know it."""
    if isinstance(error, Busy):
        return _error(429, str(error), "rate_limit_error", code="rate_limit_exceeded")
    param, code = (error.param, error.code) if isinstance(error, Refused) else ("messages", None)
    return _error(STATUS.get(code or "", 400), str(error), "invalid_request_error", param, code)


def _error(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": _told_error(message, kind, param, code)}, status)


def _told_error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``param`` may be a field's name as it came, with what UTF-8 cannot say."""
    param = param and param.encode("utf-8", "backslashreplace").decode()
    return {"message": message, "type": kind, "param": param, "code": code}


def _identity() -> dict[str, Any]:
    return {"id": f"chatcmpl-{shortuuid.uuid()}", "created": int(time.time())}


def _finish(answer: Answer) -> str:
    return "stop" if answer.finish == "stopped" else answer.finish


def _usage(answer: Answer) -> dict[str, int]:
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens}
    return counts | {"total_tokens": sum(counts.values())}


def _completion(model: str, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
    told = _identity() | {"object": "chat.completion", "model": model, "choices": [choice]}
    return told | {"usage": _usage(answer), "route": answer.route}


def _chunk(
    identity: dict[str, Any], asked: ChatRequest, delta: dict[str, Any] | None, finish: str | None = None
) -> dict[str, Any]:
    """One part of a streamed answer; without a ``delta`` it has no choice."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    told = identity | {"object": "chat.completion.chunk", "model": asked.model}
    return told | {"choices": [] if delta is None else [choice]} | ({"usage": None} if asked.usage else {})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
