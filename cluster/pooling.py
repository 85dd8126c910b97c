"""Embeddings: prompts to vectors, and vectors to scores.

The server that generates embeds as well: a pooled request runs its prompt through the same model,
batched with everything else, and is answered by one vector in place of tokens.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from tensorray.actors.protocol import Sampling
from tensorray.cluster.assembly import GenerationFailed
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.bodies import all_of
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.frontend import EngineClient, Frontend
from tensorray.cluster.pooling_type import PoolingType
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.truncation import TruncatePromptTokens

Vector = NDArray[np.float32]  # [dimensions]


class PoolingParams(BaseModel):
    """How a prompt becomes a vector. Out-of-range values raise pydantic's ValidationError."""

    model_config = ConfigDict(extra="forbid")

    pooling_type: PoolingType | None = Field(
        None, description="Of the last hidden states: the last, their mean, or the first (cls)"
    )
    normalize: bool = Field(True, description="Give the vector length 1")
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many leading numbers (Matryoshka embeddings)"
    )
    truncate_prompt_tokens: TruncatePromptTokens | None = Field(
        None, description="Keep so many of the prompt's first tokens; -1: what the context holds"
    )


@dataclass(frozen=True)
class PoolingOutput:
    """A prompt's vector."""

    data: Vector

    @property
    def embedding(self) -> list[float]:
        return cast("list[float]", self.data.tolist())


@dataclass(frozen=True)
class ScoringOutput:
    """How well two texts go together: the cosine of their vectors, -1 to 1."""

    score: float


@dataclass(frozen=True)
class PoolingRequestOutput:
    """The answer to a prompt that was embedded."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True)
class ScoringRequestOutput:
    """The answer to two prompts that were compared; the tokens are both prompts'."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int] = field(default_factory=list)
    finished: bool = True


class Embedder:
    """Embeds prompts with the model of a frontend."""

    def __init__(self, frontend: Frontend, pooling_type: PoolingType) -> None:
        """`pooling_type` is that of requests that name none."""
        self.pooling_type = pooling_type
        self._frontend = frontend

    def request(
        self,
        prompt: str | Sequence[int] | Conversation,
        params: PoolingParams,
        *,
        request_id: str,
        add_special_tokens: bool = True,
        **routing: Any,
    ) -> GenerationRequest:
        """A request the engine can run; `routing` is `priority`, `user`, `cache_salt`, `lora`.

        A conversation is what the model's chat template makes of it.

        Raises BadRequest.
        """
        frontend = self._frontend
        if isinstance(prompt, Conversation):
            prompt = frontend.render(prompt)
        tokens = frontend.prompt_tokens(prompt, add_special_tokens)
        if (most := params.truncate_prompt_tokens) is not None:
            most = frontend.max_model_len if most == -1 else most
            tokens = frontend.truncated(prompt, tokens, most, "start")
        if len(tokens) > frontend.max_model_len:
            raise BadRequest(
                f"the input is too long: {len(tokens)} tokens, but the context is "
                f"{frontend.max_model_len}; shorten it",
                param="input",
            )
        most = frontend.hidden_size
        if params.dimensions is not None and params.dimensions > most:
            raise BadRequest(
                f"dimensions ({params.dimensions}) is more than the {most} that this model's "
                "vectors have",
                param="dimensions",
            )
        pooling = params.pooling_type or self.pooling_type
        return GenerationRequest(
            request_id=request_id,
            prompt=tokens,
            sampling=Sampling(),
            max_tokens=1,
            pooling=pooling,
            reuse_prefix=pooling == "last",  # the others need rows that reuse leaves out
            **routing,
        )

    async def embed(
        self, client: EngineClient, request: GenerationRequest, params: PoolingParams
    ) -> PoolingRequestOutput:
        """Run a request. Raises GenerationFailed, or whatever the client raises."""
        arriving = cast("AsyncGenerator[list[Delta], None]", client.generate(request))
        async with aclosing(arriving):
            async for deltas in arriving:
                for delta in deltas:
                    if delta.finish_reason == "stop":
                        return PoolingRequestOutput(
                            request.request_id,
                            PoolingOutput(finished(delta.pooled, params)),
                            request.prompt,
                            delta.cached_tokens,
                        )
                    if delta.finish_reason is not None:
                        raise GenerationFailed(delta.error or "the request was cancelled")
        raise GenerationFailed("the engine ended the request without an answer")

    async def embed_all(
        self,
        client: EngineClient,
        requests: Sequence[GenerationRequest],
        params: PoolingParams,
        advance: Callable[[], None] = lambda: None,
    ) -> list[PoolingRequestOutput]:
        """Run requests in one batch; if one fails, the others are cancelled. `advance` is called as
        each is done."""

        async def one(request: GenerationRequest) -> PoolingRequestOutput:
            output = await self.embed(client, request, params)
            advance()
            return output

        return await all_of([one(each) for each in requests])


def finished(pooled: bytes, params: PoolingParams) -> Vector:
    """A shard's vector as it was asked for: cut to its dimensions, then normalized."""
    vector = np.frombuffer(pooled, "<f4")[: params.dimensions]
    if params.normalize:
        length = float(np.linalg.norm(vector.astype(np.float64)))
        vector = vector / np.float32(length or 1.0)
    return vector.astype(np.float32)


def pair_up(first: int, second: int) -> list[tuple[int, int]]:
    """Places to compare, in two lists of so many: one by one, or one alone with all others.

    Raises ValueError for lists that don't fit.
    """
    if first != second and 1 not in (first, second):
        raise ValueError(f"{first} texts and {second} to compare them with; one or as many fit")
    return [(0 if first == 1 else i, 0 if second == 1 else i) for i in range(max(first, second))]


def compare(
    request_id: str, first: PoolingRequestOutput, second: PoolingRequestOutput
) -> ScoringRequestOutput:
    """Two embedded prompts as a score."""
    score = cosine(first.outputs.data, second.outputs.data)
    tokens = [*first.prompt_token_ids, *second.prompt_token_ids]
    return ScoringRequestOutput(request_id, ScoringOutput(score), tokens)


def cosine(first: Vector, second: Vector) -> float:
    """The cosine of the angle between two vectors; 0 where one is zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
