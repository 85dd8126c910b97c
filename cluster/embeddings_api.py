"""Embeddings, scores and rankings over HTTP: requests, answers, endpoints.

https://platform.openai.com/docs/api-reference/embeddings for `/v1/embeddings`; `/v1/score` is
vLLM's; `/v1/rerank` is Jina's and Cohere's, as vLLM answers it. Scores are cosines of embeddings,
or a judge's (judge.py).
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from tensorray.cluster import openai_api as api
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.bodies import all_of
from tensorray.cluster.chat_fields import TemplateFields
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.errors import ApiError, bad_request, explain
from tensorray.cluster.frontend import EngineClient, Frontend, PreparedRequest
from tensorray.cluster.judge import Judge
from tensorray.cluster.pooling import (
    Embedder,
    PoolingParams,
    PoolingRequestOutput,
    Vector,
    cosine,
    pair_up,
)
from tensorray.cluster.pooling_type import PoolingType
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.responses import WholeResponse

#: Most inputs of one request.
MAX_INPUTS = 2048

Prompts = Sequence[str | list[int] | Conversation]

# --- requests ---------------------------------------------------------------------------------


class PoolingRequest(api.ApiRequest):
    """What embeddings, scores and rankings have in common."""

    refused: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {
        **api.ApiRequest.refused,
        "truncation_side": ((None, "right"), "inputs that are truncated keep their beginning"),
    }

    model: str | None = Field(None, description="A served model's name; default: the only one")
    user: str | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="lower runs first")
    cache_salt: str | None = Field(None, description="share cached inputs under this salt only")
    add_special_tokens: bool | None = True
    pooling_type: PoolingType | None = Field(
        None, description="of the last hidden states: the last, their mean, the first (cls)"
    )

    def params(self) -> PoolingParams:
        """Raises BadRequest."""
        return PoolingParams(pooling_type=self.pooling_type)

    @property
    def takes_long(self) -> bool:
        return False


class EmbeddingRequest(PoolingRequest, TemplateFields):
    """`POST /v1/embeddings`: inputs, or messages (vLLM), which are one."""

    input: Annotated[api.Prompt, BeforeValidator(api.check_prompts("input"))] | None = None
    messages: api.Messages | None = Field(None, description="as chat would render them")
    add_generation_prompt: bool | None = False  # nothing is generated
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, description="leading numbers of each vector to keep")
    normalize: bool | None = Field(True, description="give each vector length 1 (vLLM)")
    truncate_prompt_tokens: int | None = Field(
        None, description="keep so many of an input's first tokens; -1: what the context holds"
    )

    def inputs(self) -> Prompts:
        """Raises ApiError or BadRequest for fields that contradict each other."""
        if self.messages is not None:
            if self.input is not None:
                raise bad_request("input and messages both say what to embed; send one.", "input")
            if self.add_special_tokens and "add_special_tokens" in self.model_fields_set:
                why = "chat templates write special tokens by themselves; leave it out."
                raise bad_request(f"add_special_tokens: {why}", "add_special_tokens")
            return [self.conversation(self.messages)]
        if self.input is None:
            raise bad_request("input is missing; send it, or messages.", "input")
        for name in TemplateFields.model_fields:
            if getattr(self, name):
                raise bad_request(f"{name} goes with messages, not with input.", name)
        value: Any = self.input
        return list(value) if isinstance(value, list) and type(value[0]) is not int else [value]

    def params(self) -> PoolingParams:
        try:
            return PoolingParams(
                pooling_type=self.pooling_type,
                normalize=self.normalize is not False,
                dimensions=self.dimensions,
                truncate_prompt_tokens=self.truncate_prompt_tokens,
            )
        except ValidationError as error:
            message, param = explain(error)
            raise BadRequest(message, param=param) from None


def _texts(name: str) -> Callable[[object], object]:
    """A check of a text or several, with one message for all that is wrong."""

    def check(value: object) -> object:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return texts
        raise PydanticCustomError(name, f"{name} must be a string or a list of strings, not empty")

    return check


class ScoreRequest(PoolingRequest):
    """`POST /v1/score`: each text of one list against the one at its place in the other, or
    against the only one there."""

    text_1: Annotated[list[str], BeforeValidator(_texts("text_1"))]
    text_2: Annotated[list[str], BeforeValidator(_texts("text_2"))]

    def pairs(self) -> list[tuple[int, int]]:
        """Places in the two lists. Raises ApiError for lists that don't fit."""
        try:
            return pair_up(len(self.text_1), len(self.text_2))
        except ValueError as error:
            raise bad_request(f"text_1 and text_2: {error}", "text_2") from None


def _documents(value: object) -> object:
    """Cohere's documents may be objects with a text."""
    if not isinstance(value, list):
        return value
    return [each.get("text") if isinstance(each, dict) else each for each in value]


class RerankRequest(PoolingRequest):
    """`POST /v1/rerank`."""

    query: str = Field(min_length=1)
    documents: Annotated[
        list[str], BeforeValidator(_texts("documents")), BeforeValidator(_documents)
    ]
    top_n: int | None = Field(None, ge=0, description="best documents to tell; 0 or none: all")
    return_documents: bool | None = True


# --- answers ----------------------------------------------------------------------------------


class InputUsage(msgspec.Struct):
    """Tokens read; nothing is written."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct):
    """One input's vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: InputUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: InputUsage
    object: Literal["list"] = "list"


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct):
    """A document, by its place in the request."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class Ranking(msgspec.Struct):
    """Documents, the best first."""

    id: str
    model: str
    usage: InputUsage
    results: list[Ranked]


# --- endpoints --------------------------------------------------------------------------------

R = TypeVar("R", bound=PoolingRequest)
Reader = Callable[[Request, type[R]], Awaitable[tuple[R, dict[str, str], bool]]]
Route = Callable[..., None]


class EmbeddingService:
    """The endpoints, over a frontend and a client of its engine."""

    def __init__(
        self,
        frontend: Frontend,
        client: EngineClient,
        read: Callable[..., Awaitable[Any]],
        chosen: Callable[[str | None], tuple[str, str]],
        explain: Callable[[Exception], Awaitable[ApiError]],
        judge: Judge | None = None,
    ) -> None:
        """`read` reads a request, `chosen` finds the model it names, `explain` tells an error.
        Scores are the judge's, if there is one, else cosines."""
        self._judge = judge
        self._embedder = Embedder(frontend, frontend.pooling_type)
        self._client = client
        self._read = read
        self._chosen = chosen
        self._explain = explain

    def add_routes(self, route: Route) -> None:
        """Put the endpoints into an application; `route` takes a method, a path, an endpoint, its
        body's model and its answer's."""
        paths: list[tuple[str, Callable[..., Coroutine[Any, Any, Response]], type[BaseModel], Any]]
        paths = [
            ("/v1/embeddings", self.embeddings, EmbeddingRequest, EmbeddingList),
            ("/v1/score", self.score, ScoreRequest, ScoreList),
            ("/score", self.score, ScoreRequest, ScoreList),
            ("/v1/rerank", self.rerank, RerankRequest, Ranking),
            ("/v2/rerank", self.rerank, RerankRequest, Ranking),
            ("/rerank", self.rerank, RerankRequest, Ranking),
        ]
        for path, endpoint, body, answer in paths:
            route("POST", path, endpoint, body, answer)

    async def embeddings(self, http: Request) -> Response:
        """OpenAI's embeddings: a vector for each input."""
        request, headers, large = await self._read(http, EmbeddingRequest)

        def answer(id: str, name: str, found: Sequence[PoolingRequestOutput]) -> EmbeddingList:
            encode = _base64 if request.encoding_format == "base64" else _numbers
            data = [Embedding(i, encode(each.outputs.data)) for i, each in enumerate(found)]
            return EmbeddingList(id, int(time.time()), name, data, _usage(found))

        return await self._respond("embd", request, request.inputs(), headers, large, answer)

    async def score(self, http: Request) -> Response:
        """How well pairs of texts go together."""
        request, headers, large = await self._read(http, ScoreRequest)
        pairs = [(request.text_1[a], request.text_2[b]) for a, b in request.pairs()]

        def answer(id: str, name: str, scores: Sequence[float], usage: InputUsage) -> ScoreList:
            data = [Score(i, score) for i, score in enumerate(scores)]
            return ScoreList(id, int(time.time()), name, data, usage)

        return await self._compare("score", request, pairs, headers, large, answer)

    async def rerank(self, http: Request) -> Response:
        """Documents by how well they go with a query."""
        request, headers, large = await self._read(http, RerankRequest)

        def answer(id: str, name: str, scores: Sequence[float], usage: InputUsage) -> Ranking:
            ranked = [Ranked(i, score) for i, score in enumerate(scores)]
            ranked.sort(key=lambda each: -each.relevance_score)
            ranked = ranked[: request.top_n or None]
            if request.return_documents is not False:
                for each in ranked:
                    each.document = Document(request.documents[each.index])
            return Ranking(id, name, usage, ranked)

        pairs = [(request.query, document) for document in request.documents]
        return await self._compare("rerank", request, pairs, headers, large, answer)

    async def _compare(
        self,
        kind: str,
        request: PoolingRequest,
        pairs: list[tuple[str, str]],
        headers: dict[str, str],
        large: bool,
        answer: Callable[[str, str, Sequence[float], InputUsage], msgspec.Struct],
    ) -> Response:
        """Answer with the score of each pair."""
        _check_count(len(pairs))
        if self._judge is not None:
            return await self._respond_judged(
                self._judge, kind, request, pairs, headers, large, answer
            )
        inputs = [*dict.fromkeys(text for pair in pairs for text in pair)]
        place = {text: i for i, text in enumerate(inputs)}

        def told(id: str, name: str, found: Sequence[PoolingRequestOutput]) -> msgspec.Struct:
            vectors = [each.outputs.data for each in found]
            scores = [cosine(vectors[place[a]], vectors[place[b]]) for a, b in pairs]
            return answer(id, name, scores, _usage(found))

        return await self._respond(kind, request, inputs, headers, large, told)

    async def _respond_judged(
        self,
        judge: Judge,
        kind: str,
        request: PoolingRequest,
        pairs: list[tuple[str, str]],
        headers: dict[str, str],
        large: bool,
        answer: Callable[[str, str, Sequence[float], InputUsage], msgspec.Struct],
    ) -> Response:
        name, lora = self._chosen(request.model)
        id = f"{kind}-{uuid.uuid4().hex}"

        def prepare() -> list[list[PreparedRequest]]:
            return [
                judge.prepare(
                    first,
                    second,
                    request_id=f"{id}-{i}",
                    priority=request.priority or 0,
                    user=request.user or "",
                    cache_salt=request.cache_salt or "",
                    lora=lora,
                )
                for i, (first, second) in enumerate(pairs)
            ]

        prepared = await asyncio.to_thread(prepare) if large else prepare()

        async def whole() -> bytes:
            found = await all_of([judge.score(self._client, each) for each in prepared])
            tokens = sum(count for _, count in found)
            scores = [score for score, _ in found]
            return api.to_json(answer(id, name, scores, InputUsage(tokens, tokens)))

        return WholeResponse(whole(), self._explain, headers)

    async def _respond(
        self,
        kind: str,
        request: PoolingRequest,
        inputs: Prompts,
        headers: dict[str, str],
        large: bool,
        answer: Callable[[str, str, Sequence[PoolingRequestOutput]], msgspec.Struct],
    ) -> Response:
        _check_count(len(inputs))
        name, lora = self._chosen(request.model)
        id = f"{kind}-{uuid.uuid4().hex}"
        params = request.params()

        def prepare() -> list[GenerationRequest]:
            return [
                self._embedder.request(
                    each,
                    params,
                    request_id=f"{id}-{i}",
                    add_special_tokens=request.add_special_tokens is not False,
                    priority=request.priority or 0,
                    user=request.user or "",
                    cache_salt=request.cache_salt or "",
                    lora=lora,
                )
                for i, each in enumerate(inputs)
            ]

        prepared = await asyncio.to_thread(prepare) if large else prepare()

        async def whole() -> bytes:
            found = await self._embedder.embed_all(self._client, prepared, params)
            return api.to_json(answer(id, name, found))

        return WholeResponse(whole(), self._explain, headers)


def _check_count(inputs: int) -> None:
    if inputs > MAX_INPUTS:
        raise bad_request(
            f"{inputs} inputs are more than {MAX_INPUTS}; send several requests", "input"
        )


def _usage(found: Sequence[PoolingRequestOutput]) -> InputUsage:
    tokens = sum(len(each.prompt_token_ids) for each in found)
    return InputUsage(tokens, tokens)


def _numbers(vector: Vector) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
