"""What is fuzzed: each target takes any bytes and raises only where the project is at fault.

A fault is a server error, an exception that is no clear refusal, or a request that leaves something
running. Hanging and crashing are noticed by who runs the target.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import gguf
import httpx
import numpy as np
import tritonclient.http as triton
from jinja2 import TemplateError

from tensorray.builder.checkpoint import open_checkpoint, open_files
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.load import load_weights
from tensorray.builder.manifest import ManifestError, read_manifest
from tensorray.builder.model import ModelConfigError
from tensorray.builder.registry import resolve
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.chat import ChatTemplate
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.tokenizer import TokenizerError
from tensorray.cluster.tokenizer_files import load_tokenizer
from tests.helpers.gguf_files import write_gguf
from tests.helpers.null_engine import LocalBackend, write_model
from tests.helpers.tiny_models import directory

CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    def seeds(self) -> list[bytes]:
        """Inputs to begin with."""
        ...

    def run(self, data: bytes) -> None:
        """Raises if the project is at fault."""
        ...


# --- bodies of requests -----------------------------------------------------------------------


class Faults(logging.Handler):
    """Keeps the last exception that the server logged."""

    last: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.last = record.exc_info[1]


class Server:
    """The whole API in this process over a null device, with an event loop of its own."""

    def __init__(self, model: Path) -> None:
        self._faults = Faults()
        log = logging.getLogger("ray.serve")
        log.setLevel(logging.ERROR)
        log.addHandler(self._faults)
        log.propagate = False
        self._loop = asyncio.new_event_loop()
        config = EngineConfig(model=str(model), served_model_name=["tiny"])
        self.backend = LocalBackend()
        self._loop.run_until_complete(self.backend.__aenter__())
        self.app = create_app(Frontend.load(config), self.backend, config)
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=True),
            base_url="http://test",
            timeout=None,
        )
        self.schema: dict[str, Any] = self.app.openapi()
        atexit.register(self._close)

    def _close(self) -> None:
        self._loop.run_until_complete(self.backend.__aexit__())
        self._loop.close()

    def posts(self) -> list[str]:
        """Every path that takes a body, however it came to be there."""
        return sorted(path for path, known in self.schema["paths"].items() if "post" in known)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """Checks what no request may do: fail the server, or leave anything running."""

        async def ask() -> httpx.Response:
            answer = await self._client.post(path, content=body, headers=headers)
            for _ in range(1000):
                if not self.backend.engine.scheduler.unfinished:
                    break
                await asyncio.sleep(0.01)
            return answer

        answer = self._loop.run_until_complete(ask())
        if answer.status_code >= 500:
            raise AssertionError(
                f"{path}: {answer.status_code} {answer.text[:300]}"
            ) from self._faults.last
        if self.backend.engine.failure is not None:
            raise AssertionError(f"{path}: the engine failed: {self.backend.engine.failure}")
        if self.backend.engine.scheduler.unfinished:
            raise AssertionError(f"{path}: the request ended, and something of it runs still")
        if answer.headers.get("content-type", "").startswith("application/json"):
            json.loads(answer.content)  # what says that it is JSON is
        if re.search(b'"type": ?"server_error"', answer.content):  # an event of a stream
            raise AssertionError(f"{path}: {answer.text[-300:]}")
        return answer


@cache
def server() -> Server:
    return Server(write_model(Path(tempfile.mkdtemp()) / "model"))


def _example(schema: dict[str, Any], components: dict[str, Any], depth: int = 0) -> Any:
    """Some value a JSON schema allows, every property filled in."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rsplit("/", 1)[-1]]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            kinds = [each for each in schema[several] if each.get("type") != "null"]
            return _example((kinds or schema[several])[0], components, depth)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            named = schema.get("properties", {})
            if depth > 3:
                named = {key: named[key] for key in schema.get("required", []) if key in named}
            return {key: _example(each, components, depth + 1) for key, each in named.items()}
        case "array":
            return [_example(schema.get("items", {}), components, depth + 1)]
        case "string":
            return "Hello"
        case "integer" | "number":
            return 1
        case "boolean":
            return True
    return None


# Requests that get through, of the endpoints that have the most to them.
_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "logprobs": 2, "n": 2, "echo": True}),
    ("/v1/completions", {"prompt": [[72, 105]], "max_tokens": 2, "stream": True, "stop": ["x"],
                         "stream_options": {"include_usage": True}, "seed": 1}),
    ("/v1/completions", {"prompt": ["a", "b"], "temperature": 0.5, "top_k": 3, "top_p": 0.9,
                         "min_p": 0.1, "logit_bias": {"7": 1.5}, "prompt_logprobs": 1,
                         "presence_penalty": 0.5, "frequency_penalty": -0.5,
                         "repetition_penalty": 1.1, "banned_token_ids": [3], "user": "u"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3,
                              "logprobs": True, "top_logprobs": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "Hi"}]}], "max_tokens": 3, "priority": 1, "cache_salt": "s",
        "chat_template_kwargs": {"suffix": "x"},
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}}),
    ("/v1/completions", {"prompt": "a", "guided_regex": "a+b", "max_tokens": 3}),
    ("/v1/completions", {"prompt": "a", "guided_grammar": 'start: "a" | "b"', "max_tokens": 3}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a", "bc"]}}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True}),
    ("/detokenize", {"tokens": [72, 256, 105]}),
    ("/v2/models/tiny/generate", {"text_input": "Hello", "max_tokens": 3, "stop_words": ["x"],
                                  "bad_words": ["b"], "embedding_bias_words": ["a"],
                                  "embedding_bias_weights": [0.5], "return_log_probs": True}),
    ("/v2/models/tiny/generate_stream", {"text_input": "Hello", "stream": True, "parameters": {
        "max_tokens": 3, "temperature": 0.5, "top_k": 3}}),
    ("/v2/models/tiny/generate", {"text_input": "a", "guided_decoding_guide_type": "regex",
                                  "guided_decoding_guide": "a|b"}),
    ("/v2/models/tiny/infer", {"inputs": [
        {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [["Hello"]]},
        {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [3]}],
        "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}]}),
]  # fmt: skip


class Bodies:
    """First line: the path; the rest: the body. A path that is none is one of those there are."""

    def seeds(self) -> list[bytes]:
        schema = server().schema
        components = schema["components"]["schemas"]
        found = [f"{path}\n{json.dumps(body)}".encode() for path, body in _REQUESTS]
        for path in server().posts():
            content = schema["paths"][path]["post"].get("requestBody", {}).get("content", {})
            body = _example(content.get("application/json", {}).get("schema", {}), components)
            found.append(f"{path}\n{json.dumps(body)}".encode())
        return found

    def run(self, data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        path = head.decode(errors="replace")
        known = {*server().posts(), *(path for path, _ in _REQUESTS)}
        if path not in known:
            path = sorted(known)[sum(head) % len(known)]
        path = path.replace("{name}", "tiny").replace("{version}", "1")
        server().post(path, body, {"Content-Type": "application/json"})


class TritonTensors:
    """Binary tensors. First line: Inference-Header-Content-Length; the rest: the body."""

    def seeds(self) -> list[bytes]:
        def tensor(name: str, values: Any, dtype: Any, datatype: str) -> Any:
            array = np.array(values, dtype)
            made = triton.InferInput(name, list(array.shape), datatype)
            made.set_data_from_numpy(array, binary_data=True)
            return made

        requests = [
            [
                tensor("text_input", [["Hello"], ["a"]], np.object_, "BYTES"),
                tensor("max_tokens", [[3], [2]], np.int32, "INT32"),
                tensor("temperature", [[0.5], [1.0]], np.float32, "FP32"),
                tensor("stop_words", [["x", "yz"], ["", ""]], np.object_, "BYTES"),
            ],
            [
                tensor("text_input", ["Hello"], np.object_, "BYTES"),
                tensor("return_log_probs", [True], np.bool_, "BOOL"),
                tensor("seed", [2**63], np.uint64, "UINT64"),
                tensor("top_p", [0.5], np.float16, "FP16"),
            ],
        ]
        found = []
        for inputs in requests:
            outputs = [triton.InferRequestedOutput("text_output", binary_data=True)]
            body, size = triton.InferenceServerClient.generate_request_body(
                inputs, outputs=outputs, request_id="mine", priority=1
            )
            found.append(f"{size}\n".encode() + body)
        return found

    def run(self, data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        size = "".join(char for char in head.decode("latin-1") if char.isprintable())
        headers = {"Inference-Header-Content-Length": size.encode("ascii", "ignore").decode()}
        server().post("/v2/models/tiny/infer", body, headers)


# --- templates --------------------------------------------------------------------------------

_CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Hi </s>"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "5", "tool_call_id": "1"},
]  # fmt: skip
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
_TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}\n{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.x = ns.x + 1 %}{{ m.content[:ns.x] ~ loop.index0 }}{% endif %}{% endfor %}"
    "{{ ns.x ** 2 }}",
    "{% macro f(a, b=2) %}{{ '%s-%d' % (a, b) }}{% endmacro %}{{ f(messages | length) }}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ tools | tojson(indent=2) }}",
    "{% if tools %}{{ raise_exception('no') }}{% else %}{{ strftime_now('%Y') }}{% endif %}",
    "{%- for t in (tools or []) -%}{{ t.function.name.upper().replace('F', 'g') * 3 }}"
    "{%- endfor -%}"
    "{% generation %}x{% endgeneration %}{{ range(5) | list | reverse | list }}",
    "{{ ''.join(['a', 'b']) }}{{ '{:>5}'.format(3) }}{{ 'a b'.split() | sort }}"
    "{{ {'a': 1}.items() }}",
]


class ChatTemplates:
    """The text of a template, rendered with and without tools."""

    def seeds(self) -> list[bytes]:
        return [text.encode() for text in _TEMPLATES]

    def run(self, data: bytes) -> None:
        source = data.decode(errors="replace")
        with suppress(BadRequest, TemplateError):
            template = ChatTemplate(_tokenizer(), "{# a template #}" + source)
            with suppress(BadRequest):
                template.encode(_CONVERSATION, tools=_TOOLS)
            template.encode(_CONVERSATION[:2])


@cache
def _tokenizer() -> Any:
    return load_tokenizer(directory("qwen3"))


# --- files ------------------------------------------------------------------------------------

#: How a model that can't be used says so.
REFUSALS = (CheckpointError, ModelConfigError, TokenizerError, BadRequest)


def _load(path: Path) -> None:
    """Everything that serving a model reads of its files."""
    with suppress(*REFUSALS):
        files = open_files(str(path))
        model = resolve(files.config, None)(files.config)
        checkpoint = open_checkpoint(str(path))
        try:
            load_weights(model, checkpoint)
        finally:
            checkpoint.close()
    with suppress(*REFUSALS):
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("Hello 1 ünï </s>"))
        template = ChatTemplate(tokenizer)
        if template.exists:
            template.encode(_CONVERSATION[1:2])


class Safetensors:
    """First line: which file of a model's directory; the rest: its content. Of the weights it is
    the header only; the tensors' own bytes follow it unchanged."""

    _FILES = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    )
    _MODELS = ("qwen3", "gemma3", "llama2", "mixtral")

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp())

    def seeds(self) -> list[bytes]:
        found = []
        for model in self._MODELS:
            for name in self._FILES:
                path = directory(model) / name
                if not path.is_file():
                    continue
                content = path.read_bytes()
                if path.suffix == ".safetensors":
                    content = content[8 : 8 + int.from_bytes(content[:8], "little")]
                elif name == "tokenizer.json" and len(content) > 20_000:
                    continue
                found.append(f"{model}/{name}\n".encode() + content)
        return found

    def run(self, data: bytes) -> None:
        head, _, content = data.partition(b"\n")
        model, _, name = head.decode(errors="replace").partition("/")
        if model not in self._MODELS:
            model = self._MODELS[0]
        if name not in self._FILES:
            name = self._FILES[sum(head) % len(self._FILES)]
        source = directory(model)
        for each in self._FILES:
            place = self._place / each
            place.unlink(missing_ok=True)
            if each != name:
                if (source / each).is_file():
                    place.symlink_to(source / each)
                continue
            if name == "model.safetensors":
                whole = (source / name).read_bytes()
                rest = whole[8 + int.from_bytes(whole[:8], "little") :]
                content = len(content).to_bytes(8, "little") + content + rest
            place.write_bytes(content)
        _load(self._place)


class Gguf:
    """A GGUF file up to its tensors' bytes, which follow it unchanged."""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp())
        self._rest: list[bytes] = []

    @cache  # noqa: B019 -- there is one of these
    def seeds(self) -> list[bytes]:
        found = []
        for model in ("qwen3", "gemma3", "gpt2"):
            path = write_gguf(self._place / f"{model}.gguf", directory(model))
            start = gguf.GGUFReader(path).data_offset
            content = path.read_bytes()
            found.append(content[:start])
            self._rest.append(content[start:])
        found.append(self._with_tokenizer())
        self._rest.append(b"")
        return found

    def _with_tokenizer(self) -> bytes:
        path = self._place / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        tokens = ["<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "ab", "Ġ"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages[0].content }}")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path.read_bytes()

    def run(self, data: bytes) -> None:
        seeds = self.seeds()
        near = max(range(len(seeds)), key=lambda i: _common(seeds[i], data))
        path = self._place / "fuzzed.gguf"
        path.write_bytes(data + self._rest[near])
        _load(path)


def _common(a: bytes, b: bytes) -> int:
    """How much of two files is the same, from the end: what a tensor's offsets are made for."""
    same = 0
    while same < min(len(a), len(b), 64) and a[-1 - same] == b[-1 - same]:
        same += 1
    return same


class Manifests:
    """An engine manifest."""

    def seeds(self) -> list[bytes]:
        from tests.test_manifest import MANIFEST

        return [MANIFEST.to_json()]

    def run(self, data: bytes) -> None:
        with suppress(ManifestError):
            read_manifest(data, "here").to_json()


TARGETS: dict[str, Callable[[], Target]] = {
    "bodies": Bodies,
    "triton_tensors": TritonTensors,
    "chat_templates": ChatTemplates,
    "safetensors": Safetensors,
    "gguf": Gguf,
    "manifests": Manifests,
}


def inputs(name: str, target: Target) -> list[bytes]:
    """A target's seeds, and what was found wrong once."""
    found = [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]
    return [*found, *target.seeds()]
