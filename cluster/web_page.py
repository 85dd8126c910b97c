"""The page at `/`: a playground and a live view of the engine.

Plain files (web/), served as they are: no build, and nothing from any other server, which the
content security policy makes sure of.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from tensorray.cluster.errors import ApiError

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # ask whether it changed, every time
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_routes(app: FastAPI) -> None:
    """Serve the page at `/` of an application."""
    folder = Path(__file__).parent / "web"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _TYPES}

    async def page(http: Request) -> Response:
        return _answer(http, "index.html", files["index.html"])

    async def file(http: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, "There is no such file; the page is at /.")
        return _answer(http, name, files[name])

    app.add_api_route("/", page, include_in_schema=False, response_model=None)
    app.add_api_route("/web/{name}", file, include_in_schema=False, response_model=None)


def _answer(http: Request, name: str, content: bytes) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {**_HEADERS, "ETag": tag}
    if http.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[Path(name).suffix])
