"""LoRA adapters over HTTP, as vLLM has them: an adapter is a model with a name of its own, and two
endpoints load and unload adapters where the server allows it.

https://docs.vllm.ai/en/latest/features/lora.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from tensorray.actors.adapter import Adapter
from tensorray.cluster import openai_api as api
from tensorray.cluster.adapters import AdapterRefused
from tensorray.cluster.bodies import read_body
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.errors import ApiError, bad_request, model_not_found
from tensorray.cluster.fleet import Fleet
from tensorray.cluster.frontend import Frontend

_MOST_NAME = 200  # characters

Name = Annotated[str, Field(min_length=1, max_length=_MOST_NAME)]


class LoadAdapterRequest(api.ApiRequest):
    """`POST /v1/load_lora_adapter`."""

    lora_name: Name = Field(description="What requests call it, as their model")
    lora_path: str = Field(min_length=1, description="A directory that PEFT saved, or a Hub id")
    load_inplace: bool | None = Field(
        False, description="Take the place of the adapter that has this name"
    )


class UnloadAdapterRequest(api.ApiRequest):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = Field(None, description="Taken as vLLM's; not used")


class Models:
    """What requests can name as their model: the base, by any of its names, and adapters."""

    def __init__(
        self, frontend: Frontend, fleet: Fleet | None, config: EngineConfig, started: int
    ) -> None:
        """`started` is when the server did, in seconds since 1970."""
        self._frontend = frontend
        self._fleet = fleet
        self._allowed = [Path(each).expanduser().resolve() for each in config.allowed_lora_path]
        self._max_body_bytes = config.max_body_bytes
        self._started = started

    def chosen(self, asked: str | None) -> tuple[str, str]:
        """The name to answer under, and the adapter's ("": none), which the engine looks up.

        Raises ApiError for what can't be a model here.
        """
        names = self._frontend.model_names
        if asked is None or asked in names:
            return asked or names[0], ""
        if self._fleet is None or not asked or len(asked) > _MOST_NAME:
            raise self._unknown(asked)
        return asked, asked

    async def get(self, asked: str | None) -> api.Model:
        """A model that is served now. Raises ApiError if there is none of that name."""
        name, lora = self.chosen(asked)
        if not lora:
            return self._base(name)
        for each in await self._adapters():
            if each.name == lora:
                return self._adapter(each)
        raise self._unknown(name)

    async def listed(self) -> list[api.Model]:
        """All that are served now."""
        models = [self._base(name) for name in self._frontend.model_names]
        return models + [self._adapter(each) for each in await self._adapters()]

    async def load(self, http: Request) -> Response:
        """Load an adapter, in every replica; what runs goes on meanwhile."""
        body = await read_body(http, self._max_body_bytes)
        request = LoadAdapterRequest.model_validate_json(body)
        name, fleet = request.lora_name, self._updating()
        if name in self._frontend.model_names:
            raise bad_request(f"{name!r} is the base model's name.", "lora_name")
        path = self._path(request.lora_path)
        if not request.load_inplace and any(each.name == name for each in await fleet.listed()):
            raise bad_request(
                f"The adapter {name!r} is loaded already; unload it first, or send load_inplace.",
                "lora_name",
            )
        try:
            await fleet.load(name, path)
        except AdapterRefused as error:
            raise bad_request(f"The adapter can't be loaded: {error}.", "lora_path") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, http: Request) -> Response:
        """Unload an adapter, from every replica; requests that run with it end as they would."""
        body = await read_body(http, self._max_body_bytes)
        request = UnloadAdapterRequest.model_validate_json(body)
        if not await self._updating().unload(request.lora_name):
            raise model_not_found(f"There is no adapter {request.lora_name!r} here.")
        return PlainTextResponse(
            f"Success: LoRA adapter '{request.lora_name}' removed successfully."
        )

    def _updating(self) -> Fleet:
        assert self._fleet is not None  # or there is no such endpoint
        return self._fleet

    async def _adapters(self) -> Sequence[Adapter]:
        return [] if self._fleet is None else await self._fleet.listed()

    def _path(self, path: str) -> str:
        """The path as shards get it. Raises ApiError for one outside what is allowed."""
        if "\0" in path:
            raise bad_request("lora_path has a zero byte.", "lora_path")
        try:
            local = Path(path).expanduser().resolve()
            exists = local.exists()
        except (OSError, RuntimeError) as error:  # nobody's home, too long a name, a loop of links
            raise bad_request(f"lora_path is no path: {error}.", "lora_path") from None
        if not self._allowed:
            return str(local) if exists else path
        if not any(local.is_relative_to(root) for root in self._allowed):
            raise bad_request(
                "lora_path is not below a directory that this server loads adapters from "
                "(--allowed-lora-path).",
                "lora_path",
            )
        return str(local)

    def _base(self, name: str) -> api.Model:
        frontend = self._frontend
        return api.Model(name, self._started, frontend.max_model_len, frontend.model_name)

    def _adapter(self, adapter: Adapter) -> api.Model:
        # Ids are times, but for those of the configuration, which count from 1.
        created = adapter.id // 10**9 or self._started
        frontend = self._frontend
        return api.Model(
            adapter.name,
            created,
            frontend.max_model_len,
            adapter.path,
            parent=frontend.model_name,
        )

    def _unknown(self, asked: str) -> ApiError:
        names = ", ".join(self._frontend.model_names)
        more = " and its adapters" if self._fleet is not None else ""
        return model_not_found(
            f"There is no model {asked[:_MOST_NAME]!r} here; this server has {names}{more}."
        )
