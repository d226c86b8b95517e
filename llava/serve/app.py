"""The app of one process: the demo's page at ``/``, the API at ``/v1``, and what neither may do.

A browser that shows the page may load nothing from elsewhere (``Content-Security-Policy``), a request may not be
larger than what may be asked, and what of gradio's writes files, reads them or fetches is closed: its upload, its
recordings, and its links to what a page shows, which it would write down. On the loopback address a request
must name this machine, so that a page of elsewhere cannot reach it under a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from llava.serve.api import add_api
from llava.serve.demo import build
from llava.serve.examples import Example
from llava.serve.service import Service

HERE = ["127.0.0.1", "localhost", "::1", "[::1]"]
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TAKEN = ("/v1/", *(f"/gradio_api/{name}" for name in ("queue/join", "run/", "cancel", "reset")))
"""What may be sent to: the API, and what the page's buttons need."""
CLOSED = tuple(f"/gradio_api/{name}" for name in ("deep_link", "proxy=", "file", "upload"))


def make_app(service: Service, examples: Sequence[Example] = (), only_here: bool = True) -> FastAPI:
    """The app that answers for a service; ``only_here``: it listens on the loopback address."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, service)
    blocks, look = build(service, examples)
    limits = service.limits
    app = gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, show_error=False, ssr_mode=False, pwa=False,
        enable_monitoring=False, mcp_server=False, max_file_size=1, **look,
    )  # fmt: skip
    app.add_middleware(_Guard, most=limits.picture_bytes * 3 // 2 + 12 * limits.characters + 2**17)
    if only_here:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=HERE)
    return app


class _Guard:
    """Closed addresses, the size of bodies, and headers of every answer.

    Args:
        most: bytes of a body.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0" if scope["method"] in ("GET", "HEAD") else b"")
        sent = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if scope["path"].startswith(CLOSED) or (sent and not scope["path"].startswith(TAKEN)):
            await PlainTextResponse("closed", 403)(scope, receive, send)
            return
        bounded = scope["path"].startswith("/v1/")  # the API looks for itself
        if not bounded and (not length or int(length) > self.most):
            await PlainTextResponse("too large", 413)(scope, receive, send)
            return

        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, answered)
