"""KServe's and Triton's protocol with the tensor names of TensorRT-LLM's Triton models, so that
`tritonclient` over HTTP and plain generate clients need a new address only.

https://github.com/triton-inference-server/server/tree/main/docs/protocol
https://github.com/triton-inference-server/tensorrtllm_backend

Defaults are TensorRT-LLM's, not the model's own: without top_k and top_p the most likely token is
taken, the seed is 0, a stop word stays in the text, and an answer that is not streamed begins with
its prompt. What asks for something that is not supported is refused by name.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from tensorray.cluster.backend import Backend
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.bodies import all_of, read_body
from tensorray.cluster.errors import ApiError, bad_request
from tensorray.cluster.frontend import Frontend, PreparedRequest
from tensorray.cluster.outputs import CompletionOutput, RequestOutput, RequestOutputDelta
from tensorray.cluster.responses import EventStream, WholeResponse, error_response, json_response
from tensorray.cluster.triton_tensors import (
    FLOATS,
    HEADER_LENGTH,
    INTEGERS,
    InferRequest,
    Tensor,
    read_request,
    write_answer,
)

# What TensorRT-LLM's model repository calls the model that takes text.
MODEL_NAMES = ("ensemble", "tensorrt_llm_bls")
VERSION = "1"
MAX_BATCH = 128
_EXTENSIONS = ["binary_tensor_data", "generate", "model_configuration", "parameters"]

Kind = Literal["text", "words", "integer", "number", "flag", "numbers"]
_DATATYPES: dict[Kind, str] = {
    "text": "BYTES",
    "words": "BYTES",
    "integer": "INT32",
    "number": "FP32",
    "numbers": "FP32",
    "flag": "BOOL",
}
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}
# Inputs that may have any number of values; the others have one.
_LISTS: tuple[Kind, ...] = ("words", "numbers")

_INPUTS: dict[str, Kind] = {
    "text_input": "text",
    "max_tokens": "integer",
    "num_return_sequences": "integer",
    "bad_words": "words",
    "stop_words": "words",
    "exclude_input_in_output": "flag",
    "end_id": "integer",
    "pad_id": "integer",  # there is no padding here, so any will do
    "top_k": "integer",
    "top_p": "number",
    "temperature": "number",
    "repetition_penalty": "number",
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "min_tokens": "integer",
    "min_length": "integer",  # min_tokens' older name
    "seed": "integer",
    "random_seed": "integer",  # seed's older name
    "embedding_bias_words": "words",
    "embedding_bias_weights": "numbers",
    "return_log_probs": "flag",
    "return_num_input_tokens": "flag",
    "return_num_output_tokens": "flag",
    "stream": "flag",
}
# The others: the values that ask for nothing, and why any other is refused.
_OFF: tuple[object, ...] = (None, False, 0, "", 0.0)
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "beam_width": ((None, 0, 1), "beam search is not supported; send 1"),
    "length_penalty": ((None, 0, 1), "it ranks beams, and beam search is not supported"),
    "early_stopping": ((None, 0, 1, False), "beam search is not supported"),
    "beam_search_diversity_rate": (_OFF, "beam search is not supported"),
    "decoder_text_input": (_OFF, "only decoder models are served"),
    "image_input": ((None,), "only text is taken"),
    "image_bytes_input": ((None,), "only text is taken"),
    "image_url_input": (_OFF, "only text is taken"),
    "video_bytes_input": ((None,), "only text is taken"),
    "top_p_min": (_OFF, "top_p does not decay here"),
    "top_p_decay": ((None, 0, 1), "top_p does not decay here"),
    "top_p_reset_ids": ((None,), "top_p does not decay here"),
    "return_context_logits": (_OFF, "logits are not returned; use return_log_probs"),
    "return_generation_logits": (_OFF, "logits are not returned; use return_log_probs"),
    "return_perf_metrics": (_OFF, "/metrics has latencies"),
    "prompt_embedding_table": ((None,), "prompt tables are not supported"),
    "prompt_table_extra_id": (_OFF, "prompt tables are not supported"),
    "prompt_vocab_size": (_OFF, "prompt tables are not supported"),
    "lora_task_id": (_OFF, "adapters are not supported"),
    "lora_weights": ((None,), "adapters are not supported"),
    "lora_config": ((None,), "adapters are not supported"),
    "guided_decoding_guide_type": (_OFF, "guided output is not supported"),
    "guided_decoding_guide": (_OFF, "guided output is not supported"),
    "num_draft_tokens": (_OFF, "speculative decoding is not supported"),
    "use_draft_logits": (_OFF, "speculative decoding is not supported"),
    "sequence_id": (_OFF, "requests have no state; send the whole prompt"),
    "sequence_start": ((None, False, True), "requests have no state"),
    "sequence_end": ((None, False, True), "requests have no state"),
    "timeout": (_OFF, "there is no server-side limit; the client may hang up at any time"),
}

_OUTPUTS = {
    "text_output": ("BYTES", [-1]),
    "cum_log_probs": ("FP32", [-1, -1]),
    "output_log_probs": ("FP32", [-1, -1, -1]),
    "num_input_tokens": ("INT32", [-1, 1]),
    "num_output_tokens": ("INT32", [-1, -1]),
}
_ASKED_BY = {
    "cum_log_probs": "return_log_probs",
    "output_log_probs": "return_log_probs",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
}

# What the sampling parameters are called here.
_THEIR_NAMES = {
    "n": "num_return_sequences",
    "stop": "stop_words",
    "logit_bias": "embedding_bias_weights",
    "stop_token_ids": "end_id",
    "prompt": "text_input",
}

Explain = Callable[[Exception], Awaitable[ApiError]]
Fields = dict[str, Any]


class TritonError(ApiError):
    """An error in Triton's shape."""

    @classmethod
    def of(cls, error: ApiError) -> TritonError:
        return cls(error.status, error.message, headers=error.headers)

    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.message})


def add_routes(
    app: FastAPI, frontend: Frontend, backend: Backend, max_body_bytes: int, explain: Explain
) -> None:
    """Put the protocol under /v2 of an application. `explain` says what to tell of an error."""
    service = _Service(frontend, backend, max_body_bytes, explain)

    def route(
        method: str, path: str, endpoint: Callable[..., Coroutine[Any, Any, Response]]
    ) -> None:
        async def answered(http: Request) -> Response:
            try:
                return await endpoint(http, **http.path_params)
            except Exception as error:
                return error_response(TritonError.of(await explain(error)))

        app.add_api_route(
            path,
            answered,
            methods=[method],
            response_model=None,
            name=endpoint.__name__,
            description=endpoint.__doc__,
        )

    route("GET", "/v2", service.server)
    route("GET", "/v2/health/live", service.live)
    route("GET", "/v2/health/ready", service.ready)
    for model in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
        route("GET", f"{model}/ready", service.model_ready)
        route("GET", f"{model}/config", service.model_config)
        route("POST", f"{model}/infer", service.infer)
        route("POST", f"{model}/generate", service.generate)
        route("POST", f"{model}/generate_stream", service.generate_stream)
    for model in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
        route("GET", model, service.model)


class _Service:
    """The endpoints."""

    def __init__(
        self, frontend: Frontend, backend: Backend, max_body_bytes: int, explain: Explain
    ) -> None:
        self._frontend = frontend
        self._backend = backend
        self._max_body_bytes = max_body_bytes
        self._tell = explain

    # --- how it is, what there is ---

    async def server(self, http: Request) -> Response:
        """Triton's server metadata."""
        return _json({"name": "tensorray", "version": http.app.version, "extensions": _EXTENSIONS})

    async def live(self, http: Request) -> Response:
        """200: this server answers."""
        return Response()

    async def ready(self, http: Request) -> Response:
        """200 while the engine can serve, else 503."""
        return Response(status_code=503 if await self._backend.failure() else 200)

    async def model_ready(self, http: Request, name: str, version: str = VERSION) -> Response:
        """200 while the model can be used, else 503."""
        self._check_model(name, version)
        return await self.ready(http)

    async def model(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The model's tensors."""
        self._check_model(name, version)
        inputs = [
            {
                "name": each,
                "datatype": _DATATYPES[kind],
                "shape": [-1, -1 if kind in _LISTS else 1],
            }
            for each, kind in _INPUTS.items()
        ]
        outputs = [
            {"name": each, "datatype": datatype, "shape": shape}
            for each, (datatype, shape) in _OUTPUTS.items()
        ]
        described = {"name": name, "versions": [VERSION], "platform": "tensorray"}
        return _json({**described, "inputs": inputs, "outputs": outputs})

    async def model_config(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The model in the terms of Triton's model configuration."""
        self._check_model(name, version)
        inputs = [
            {
                "name": each,
                "data_type": _config_type(_DATATYPES[kind]),
                "dims": [-1 if kind in _LISTS else 1],
                "optional": each != "text_input",
            }
            for each, kind in _INPUTS.items()
        ]
        outputs = [
            {"name": each, "data_type": _config_type(datatype), "dims": shape[1:] or [-1]}
            for each, (datatype, shape) in _OUTPUTS.items()
        ]
        return _json(
            {
                "name": name,
                "platform": "tensorray",
                "backend": "tensorray",
                "max_batch_size": MAX_BATCH,
                "input": inputs,
                "output": outputs,
                "model_transaction_policy": {"decoupled": False},
            }
        )

    # --- generation ---

    async def infer(self, http: Request, name: str, version: str = VERSION) -> Response:
        """Tensors in, tensors out; a row of the batch is a request."""
        self._check_model(name, version)
        body = await self._body(http)

        def prepare() -> tuple[InferRequest, list[Fields], list[str], list[PreparedRequest]]:
            request = read_request(body, http.headers.get(HEADER_LENGTH))
            rows = _rows(request.inputs)
            priority = _priority(request.parameters)
            wanted = _wanted(request, rows)
            log_probs = not {"output_log_probs", "cum_log_probs"}.isdisjoint(wanted)
            prepared = [self._prepare(row, log_probs=log_probs, priority=priority) for row in rows]
            return request, rows, wanted, prepared

        request, rows, wanted, prepared = await asyncio.to_thread(prepare)

        async def whole() -> Response:
            answers = await all_of([self._frontend.collect(self._backend, one) for one in prepared])
            for row, answer in zip(rows, answers, strict=True):
                _begin_with_prompt(row, answer)
            tensors = [_tensor(each, answers) for each in wanted]
            content, headers = write_answer(request, name, VERSION, tensors)
            return Response(content, headers=headers)

        return WholeResponse(whole(), self._explain, {})

    async def generate(self, http: Request, name: str, version: str = VERSION) -> Response:
        """Triton's generate extension: one JSON answer."""
        self._check_model(name, version)
        ask = await self._ask(http)
        if ask.fields.get("stream"):
            raise bad_request("stream: use generate_stream to stream.", "stream")
        return WholeResponse(self._whole(name, ask), self._explain, {})

    async def generate_stream(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The same as server-sent events: with `stream` as tokens come, else all in one."""
        self._check_model(name, version)
        ask = await self._ask(http)
        return EventStream(self._events(name, ask), self._explain, {})

    async def _whole(self, name: str, ask: _Ask) -> bytes:
        answer = await self._frontend.collect(self._backend, ask.prepared)
        _begin_with_prompt(ask.fields, answer)
        return msgspec.json.encode(ask.told(name, answer.outputs, answer.prompt_token_ids))

    async def _events(self, name: str, ask: _Ask) -> AsyncGenerator[bytes, None]:
        if not ask.fields.get("stream"):
            yield _event(await self._whole(name, ask))
            return
        deltas = cast(
            "AsyncGenerator[RequestOutputDelta, None]",
            self._frontend.stream(self._backend, ask.prepared),
        )
        async with aclosing(deltas):
            async for delta in deltas:
                for output in delta.outputs:
                    if output.text or output.finish_reason:
                        told = ask.told(name, [output], ask.prepared.request.prompt)
                        yield _event(msgspec.json.encode(told))

    async def _ask(self, http: Request) -> _Ask:
        body = await self._body(http)

        def prepare() -> _Ask:
            try:
                sent = msgspec.json.decode(body, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise BadRequest(f"the request is no JSON object: {error}") from None
            given = sent.pop("parameters", None) or {}
            if not isinstance(given, dict):
                raise BadRequest("parameters must be an object of names and values")
            request_id = str(sent.pop("id", ""))[:200]
            fields = _fields({**given, **sent})
            prepared = self._prepare(
                fields, log_probs=bool(fields.get("return_log_probs")), priority=0
            )
            return _Ask(request_id, fields, prepared)

        return await asyncio.to_thread(prepare)

    def _prepare(self, fields: Fields, *, log_probs: bool, priority: int) -> PreparedRequest:
        try:
            return self._frontend.request(
                fields["text_input"],
                self._frontend.params(**self._sampling(fields, log_probs)),
                request_id=f"triton-{uuid.uuid4().hex}",
                priority=priority,
            )
        except BadRequest as error:
            theirs = _THEIR_NAMES.get(error.param or "")
            if theirs is None:
                raise
            raise BadRequest(f"{theirs}: {error}", param=theirs) from None

    def _sampling(self, fields: Fields, log_probs: bool) -> Fields:
        """SamplingParams' fields, every one that the model's own defaults could set."""
        top_k, top_p = fields.get("top_k") or 0, fields.get("top_p") or 0.0
        greedy = not top_k and not top_p
        end_id = fields.get("end_id")
        seed: int = fields["seed"] if "seed" in fields else fields.get("random_seed", 0)
        sampling: Fields = {
            "temperature": 0.0 if greedy else fields.get("temperature", 1.0),
            "top_k": top_k,
            "top_p": top_p or 1.0,
            "min_p": 0.0,
            "repetition_penalty": fields.get("repetition_penalty", 1.0),
            "presence_penalty": fields.get("presence_penalty", 0.0),
            "frequency_penalty": fields.get("frequency_penalty", 0.0),
            "seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
            "n": fields.get("num_return_sequences", 1),
            "max_tokens": fields.get("max_tokens", 16),
            "min_tokens": fields.get("min_tokens", fields.get("min_length", 0)),
            "stop": [word for word in fields.get("stop_words", []) if word],
            "include_stop_str_in_output": True,
            "banned_token_ids": self._banned(fields),
            "logit_bias": self._bias(fields),
            "logprobs": 0 if log_probs else None,
        }
        if end_id is not None:  # instead of the model's own; -1: none at all
            sampling["ignore_eos"] = True
            sampling["stop_token_ids"] = [end_id] if end_id >= 0 else []
        return sampling

    def _banned(self, fields: Fields) -> list[int]:
        banned = []
        for word in fields.get("bad_words", []):
            tokens = self._tokens(word)
            if len(tokens) > 1:
                raise BadRequest(
                    f"bad_words: {word[:40]!r} is {len(tokens)} tokens of this model; only words "
                    "of one token can be kept out",
                    param="bad_words",
                )
            banned += tokens
        return banned

    def _bias(self, fields: Fields) -> dict[int, float]:
        words, weights = (
            fields.get("embedding_bias_words", []),
            fields.get("embedding_bias_weights", []),
        )
        if words == [""]:
            words = []
        if len(words) != len(weights):
            raise BadRequest(
                f"embedding_bias_words has {len(words)} words and embedding_bias_weights "
                f"{len(weights)} weights; send one for each",
                param="embedding_bias_weights",
            )
        bias: dict[int, float] = {}
        for word, weight in zip(words, weights, strict=True):
            for token in set(self._tokens(word)):
                bias[token] = bias.get(token, 0.0) + weight
        return bias

    def _tokens(self, word: str) -> list[int]:
        return self._frontend.tokenizer.encode(word, add_special_tokens=False) if word else []

    # --- common steps ---

    async def _body(self, http: Request) -> bytes:
        encoding = http.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(
                415, f"Content-Encoding {encoding[:40]!r} is not supported; send it plain."
            )
        return await read_body(http, self._max_body_bytes)

    def _check_model(self, name: str, version: str) -> None:
        names = [*self._frontend.model_names, *MODEL_NAMES]
        if name not in names:
            raise ApiError(
                404, f"There is no model {name[:200]!r} here; there are {', '.join(names)}."
            )
        if version != VERSION:
            raise ApiError(404, f"Model {name} has version {VERSION} only, not {version[:40]!r}.")

    async def _explain(self, error: Exception) -> ApiError:
        return TritonError.of(await self._tell(error))


@dataclass(frozen=True)
class _Ask:
    """A request of the generate extension."""

    id: str
    fields: Fields
    prepared: PreparedRequest

    def told(self, name: str, outputs: Sequence[CompletionOutput], prompt: list[int]) -> Fields:
        """The answer's JSON: a list where there is more than one sequence."""
        answer = RequestOutput("", None, prompt, list(outputs))
        told: Fields = {"id": self.id} if self.id else {}
        told |= {"model_name": name, "model_version": VERSION}
        told |= {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
        if self.fields.get("stream"):
            told["sequence_index"] = outputs[0].index
        for output in _OUTPUTS:
            asked = _ASKED_BY.get(output)
            if asked is None or self.fields.get(asked):
                values = _tensor(output, [answer]).values
                told[output] = values[0] if len(values) == 1 else values
        return told


# --- in ---------------------------------------------------------------------------------------


def _rows(inputs: Sequence[Tensor]) -> list[Fields]:
    """The fields of each row of the batch."""
    by_name = {tensor.name: tensor for tensor in inputs}
    if len(by_name) != len(inputs):
        raise BadRequest("an input is there twice")
    text = by_name.get("text_input")
    if text is None:
        raise BadRequest("the input text_input is missing", param="text_input")
    batch = text.shape[0] if len(text.shape) > 1 else 1
    if not 1 <= batch <= MAX_BATCH:
        raise BadRequest(f"a batch of {batch} is not within 1 to {MAX_BATCH}", param="text_input")
    rows: list[Fields] = [{} for _ in range(batch)]
    for tensor in inputs:
        shape = tensor.shape if len(tensor.shape) > 1 else [1, *tensor.shape]
        if shape[0] != batch:
            raise BadRequest(
                f"{tensor.name}: its shape {list(tensor.shape)} does not begin with the batch of "
                f"{batch}",
                param=tensor.name,
            )
        kind = _INPUTS.get(tensor.name)
        if kind is not None and not _fits(kind, tensor.datatype):
            raise BadRequest(
                f"{tensor.name}: the datatype is {tensor.datatype[:40]}, not {_DATATYPES[kind]}",
                param=tensor.name,
            )
        width = len(tensor.values) // batch
        for i, row in enumerate(rows):
            values = list(tensor.values[i * width : (i + 1) * width])
            row[tensor.name] = values[0] if width == 1 and kind not in _LISTS else values
    rows = [_fields(row) for row in rows]
    if any(row.get("stream") for row in rows):
        raise BadRequest("stream: infer answers at once; use generate_stream", param="stream")
    return rows


def _fits(kind: Kind, datatype: str) -> bool:
    if kind == "integer":
        return datatype in INTEGERS
    if kind in ("number", "numbers"):
        return datatype in FLOATS
    return datatype == _DATATYPES[kind]


def _fields(sent: Fields) -> Fields:
    """The fields that ask for something, checked. Raises BadRequest for what is not supported."""
    fields: Fields = {}
    for name, value in sent.items():
        if name in _REFUSED:
            neutral, why = _REFUSED[name]
            if not any(value == off for off in neutral):
                raise BadRequest(f"{name}: {why}", param=name)
        elif name not in _INPUTS:
            raise BadRequest(
                f"{name[:60]} is no input of this model; see its metadata under /v2/models",
                param=name[:60],
            )
        elif value is not None:
            fields[name] = _checked(name, _INPUTS[name], value)
    if not isinstance(fields.get("text_input"), str):
        raise BadRequest("text_input is missing; send the prompt's text", param="text_input")
    return fields


def _checked(name: str, kind: Kind, value: Any) -> Any:
    """JSON has no types of its own; what a tensor held passes as well."""
    if kind in _LISTS:
        values = value if isinstance(value, list) else [value]
        each: Kind = "text" if kind == "words" else "number"
        return [_checked(name, each, item) for item in values]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    types: dict[Kind, tuple[type, ...]] = {
        "text": (str,),
        "flag": (bool,),
        "integer": (int,),
        "number": (int, float),
    }
    if type(value) not in types[kind]:
        raise BadRequest(
            f"{name}: {str(value)[:40]!r} is not {_DATATYPES[kind]}",
            param=name,
        )
    return value


def _priority(parameters: Fields) -> int:
    """Of an inference request's parameters, the one that does something."""
    for name, value in parameters.items():
        if name == "binary_data_output":
            continue
        if name == "priority" and type(value) is int and 0 <= value < 1 << 31:
            continue
        neutral, why = _REFUSED.get(name, ((), "it means nothing here; leave it out"))
        if not any(value == off for off in neutral):
            raise BadRequest(f"parameter {name[:60]}: {why}", param=name[:60])
    return int(parameters.get("priority", 0))


def _wanted(request: InferRequest, rows: Sequence[Fields]) -> list[str]:
    """The outputs to answer with."""
    if request.outputs is None:
        return [
            name
            for name in _OUTPUTS
            if name not in _ASKED_BY or any(row.get(_ASKED_BY[name]) for row in rows)
        ]
    for output in request.outputs:
        if output.name not in _OUTPUTS:
            raise BadRequest(
                f"{output.name[:60]} is no output of this model; there are {', '.join(_OUTPUTS)}"
            )
        for name, value in output.parameters.items():
            if name != "binary_data" and value:
                raise BadRequest(f"output {output.name}: {name[:60]} is not supported")
    return [output.name for output in request.outputs]


# --- out --------------------------------------------------------------------------------------


def _begin_with_prompt(fields: Fields, answer: RequestOutput) -> None:
    """Put the prompt before each text, unless told not to."""
    if not fields.get("exclude_input_in_output"):
        for output in answer.outputs:
            output.text = fields["text_input"] + output.text


def _tensor(name: str, answers: Sequence[RequestOutput]) -> Tensor:
    """An output over the batch. Rows and sequences with fewer tokens are padded with zeros."""
    datatype, _ = _OUTPUTS[name]
    batch = len(answers)
    sequences = max(len(answer.outputs) for answer in answers)
    if name == "text_output":
        texts = [output.text for answer in answers for output in answer.outputs]
        return Tensor(name, datatype, [len(texts)], texts)
    if name == "num_input_tokens":
        lengths = [len(answer.prompt_token_ids) for answer in answers]
        return Tensor(name, datatype, [batch, 1], lengths)
    rows = [_padded([_of(name, out) for out in answer.outputs], sequences) for answer in answers]
    if name != "output_log_probs":
        return Tensor(name, datatype, [batch, sequences], [value or 0 for r in rows for value in r])
    longest = max((len(each) for row in rows for each in row if each), default=0)
    flat = [value for row in rows for each in row for value in _padded(each or [], longest, 0.0)]
    return Tensor(name, datatype, [batch, sequences, longest], flat)


def _of(name: str, output: CompletionOutput) -> Any:
    """One sequence's share of an output."""
    if name == "num_output_tokens":
        return len(output.token_ids)
    if name == "cum_log_probs":
        return output.cumulative_logprob
    return [entry.logprob for entry in output.logprobs or [] if entry is not None]


def _padded(values: list[Any], length: int, filler: Any = None) -> list[Any]:
    return values + [filler] * (length - len(values))


def _config_type(datatype: str) -> str:
    return _CONFIG_TYPES.get(datatype, f"TYPE_{datatype}")


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _json(value: Fields) -> Response:
    return json_response(msgspec.json.encode(value))
