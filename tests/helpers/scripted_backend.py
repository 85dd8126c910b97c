"""The API over an engine that "generates" what it is told to, a few tokens at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from tensorray.cluster.backend import EngineStatus
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.request import Delta, GenerationRequest

#: Writes tools, reasoning and calls as Qwen3 does, in the words of `null_engine.write_model`.
THINKING_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class ScriptedBackend:
    """`script` has the text of an answer, from the prompt's. `seen` are the requests."""

    def __init__(
        self,
        frontend: Frontend,
        script: Callable[[str], str],
        *,
        step: int = 1,
        finish_reason: Any = "stop",
    ) -> None:
        self._tokenizer = frontend.tokenizer
        self._script = script
        self._step = step
        self._finish_reason = finish_reason
        self.seen: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        self.seen.append(request)
        prompt = self._tokenizer.decode(request.prompt, skip_special_tokens=False)
        text = self._script(prompt)
        tokens = self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        step = len(tokens) + 1 if request.whole else self._step
        for start in range(0, len(tokens) + 1, step):
            last = start + step > len(tokens)
            yield [
                Delta(
                    index,
                    tokens[start : start + step],
                    finish_reason=self._finish_reason if last else None,
                )
                for index in range(request.n)
            ]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        pass

    async def failure(self) -> str | None:
        return None

    async def metrics(self) -> bytes:
        return b""

    async def status(self) -> list[EngineStatus]:
        return []


def scripted_app(
    model: Path, script: Callable[[str], str], *, config: dict[str, Any] | None = None, **how: Any
) -> tuple[FastAPI, ScriptedBackend]:
    """The API over a script; `how` is ScriptedBackend's."""
    settings = EngineConfig(model=str(model), served_model_name=["tiny"], **(config or {}))
    frontend = Frontend.load(settings)
    backend = ScriptedBackend(frontend, script, **how)
    return create_app(frontend, backend, settings), backend


@asynccontextmanager
async def scripted(
    model: Path, script: Callable[[str], str], **how: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedBackend]]:
    """An HTTP client of it."""
    app, backend = scripted_app(model, script, **how)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client:
        yield client, backend
