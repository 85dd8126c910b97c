"""OpenAI's protocol: what requests may say, and the exact shapes of the answers.

Requests are pydantic models (they are checked, and they make the OpenAPI schema); answers are
msgspec structs (they are written once a token). Field names beyond OpenAI's are vLLM's.

https://platform.openai.com/docs/api-reference/completions
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tensorray.cluster.chat_fields import ChatFields, TemplateFields
from tensorray.cluster.errors import bad_request
from tensorray.cluster.sampling_params import ProcessorSpecs
from tensorray.cluster.structured_outputs import StructuredOutputs

# --- requests ---------------------------------------------------------------------------------

# Fields that ask for something this server does not do: the values that ask for nothing are
# taken, any other is refused by name, because leaving it out would change the answer.
_OFF: tuple[object, ...] = (None, False, [], {}, "")
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "suffix": (_OFF, "completions end where the model ends them; insertion is not supported"),
    "tools": (_OFF, "only chats call tools"),
    "tool_choice": ((None, "none", "auto"), "only chats call tools"),
    "functions": (_OFF, "send tools, which took their place"),
    "function_call": ((None, "none", "auto"), "send tool_choice, which took its place"),
    "modalities": ((None, ["text"]), "only text can be generated"),
    "audio": (_OFF, "only text can be generated"),
    "prediction": (_OFF, "only chats take predicted outputs"),
    "web_search_options": ((None,), "web search is not supported"),
    "moderation": (_OFF, "nothing is moderated here"),
    "reasoning_effort": (_OFF, "only chats reason"),
    "verbosity": ((None, "medium"), "say in the messages how long the answer should be"),
    "store": (_OFF, "answers are not stored"),
    "service_tier": ((None, "auto", "default"), "there is one tier; leave it out"),
    "prompt_cache_options": ((None, {}, {"mode": "implicit"}), "all prompts are cached alike"),
    "prompt_cache_retention": ((None, "in_memory"), "prompts are cached in memory only"),
    "guided_decoding_backend": (_OFF, "there is one only; leave it out"),
    "guided_whitespace_pattern": (_OFF, "whitespace in JSON is free; leave it out"),
    "structural_tag": (_OFF, "use structured_outputs with a grammar"),
    "prompt_embeds": (_OFF, "prompts are text or token ids"),
    "truncate_prompt_tokens": (_OFF, "shorten the text before sending it"),
    "truncation_side": ((None, "left"), "prompts that are truncated keep their end"),
    "chat_template": (_OFF, "the template is the server's (--chat-template)"),
    "documents": (_OFF, "put documents into the messages"),
    "continue_final_message": (_OFF, "only chats have messages"),
    "return_token_ids": (_OFF, "only completions and chats tell tokens"),
    "return_tokens_as_token_ids": (_OFF, "only completions and chats tell tokens"),
    "echo": (_OFF, "only completions can echo"),
    "add_special_tokens": (_OFF, "chat templates write special tokens by themselves"),
}


class ApiRequest(BaseModel):
    """Types are taken at their word (no "0.5" for 0.5); fields nobody knows are kept apart."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    refused: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = _REFUSED

    def ignored_fields(self) -> list[str]:
        """Names of fields that mean nothing here. Raises ApiError for those that must not be
        ignored, because the answer would be another one."""
        extra = self.model_extra or {}
        tools_off = extra.get("tool_choice") == "none"
        ignored = []
        for name, value in extra.items():
            if name not in self.refused:
                ignored.append(name)
                continue
            neutral, why = self.refused[name]
            if not any(
                value is off or (value == off and type(value) is type(off)) for off in neutral
            ):
                if name in ("tools", "functions") and tools_off:
                    continue
                raise bad_request(f"{name}: {why}.", name, "unsupported_parameter")
        return ignored

    @property
    def takes_long(self) -> bool:
        """Whether it may take long to prepare, however short it is."""
        return False


class JsonSchema(BaseModel):
    """OpenAI's: a schema with a name. It is enforced whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's spelling of structured outputs."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", 'json_schema goes with the type "json_schema", and only with it'
            )
        return self

    def structured_outputs(self) -> StructuredOutputs | None:
        """The same, as vLLM spells it."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return StructuredOutputs(json_object=True)
        return StructuredOutputs(json=self.json_schema.schema_)


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="usage on every chunk (vLLM)")


# Fields of GenerateRequest that are `SamplingParams` of the same name.
_SAMPLING = [
    "n",
    "best_of",
    "use_beam_search",
    "beam_width",
    "length_penalty",
    "early_stopping",
    "beam_search_diversity_rate",
    "num_beam_groups",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "banned_token_ids",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "bad_words",
    "no_repeat_ngram_size",
    "forced_prefix",
    "logits_processors",
]


class GenerateRequest(ApiRequest):
    """What completions and chat have in common. Ranges are checked by `SamplingParams`."""

    model: str | None = Field(None, description="A served model's name; default: the only one")
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = Field(None, description="search instead of drawing (vLLM)")
    beam_width: int | None = Field(None, description="default: best_of, or else n")
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    beam_search_diversity_rate: float | None = None
    num_beam_groups: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = Field(None, description="token id -> -100 to 100")
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = Field(
        None, description="keep so many of the prompt's last tokens; -1: what there is room for"
    )
    bad_words: list[str | list[int]] | None = Field(
        None, description="words, or lists of token ids, that are never completed"
    )
    no_repeat_ngram_size: int | None = None
    forced_prefix: str | list[int] | None = Field(
        None, description="text, or token ids, that the answer begins with"
    )
    logits_processors: ProcessorSpecs | None = Field(
        None, description="of --logits-processors: names, or names and arguments"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(
        None, description="what the answer must match (vLLM)"
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="structured_outputs' json")
    guided_regex: str | None = Field(None, description="structured_outputs' regex")
    guided_choice: list[str] | None = Field(None, description="structured_outputs' choice")
    guided_grammar: str | None = Field(None, description="structured_outputs' grammar")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(
        False, description="tell the answer's token ids, and the prompt's (vLLM)"
    )
    return_tokens_as_token_ids: bool | None = Field(
        False, description='spell tokens of logprobs as "token_id:7" (vLLM)'
    )
    user: str | None = None
    priority: int | None = Field(
        None,
        ge=-(2**31),
        lt=2**31,
        description="lower runs first, under --scheduling-policy priority",
    )
    cache_salt: str | None = Field(None, description="share cached prompts under this salt only")
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds it may take, its wait included"
    )

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the request sets."""
        fields = {name: getattr(self, name) for name in _SAMPLING}
        fields["structured_outputs"] = self.guide()
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def takes_long(self) -> bool:
        return self.guide() is not None

    def guide(self) -> StructuredOutputs | None:
        """What the answer must match, however it was spelled."""
        response = self.response_format
        found: dict[str, StructuredOutputs | None] = {
            "structured_outputs": self.structured_outputs,
            "response_format": None if response is None else response.structured_outputs(),
            **{
                f"guided_{name}": StructuredOutputs(**{name: value})
                for name, value in (
                    ("json", self.guided_json),
                    ("regex", self.guided_regex),
                    ("choice", self.guided_choice),
                    ("grammar", self.guided_grammar),
                )
                if value is not None
            },
        }
        given = {name: value for name, value in found.items() if value is not None}
        if len(given) > 1:
            first, second, *_ = given
            raise bad_request(f"{first} and {second} both say what to answer; send one", second)
        return next(iter(given.values()), None)

    @model_validator(mode="after")
    def _consistent_stream(self) -> GenerateRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options needs stream to be true; leave it out"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError(
                "prompt_logprobs", "prompt_logprobs can't be streamed; set stream to false"
            )
        return self


Prompt = str | list[int] | list[str] | list[list[int]]


def check_prompts(name: str) -> Callable[[object], object]:
    """A check of the field `name`, with one message for the union instead of one a branch."""

    def check(value: object) -> object:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise PydanticCustomError(
                "prompt",
                "{name} must be a string, a list of strings, a list of token ids "
                "or a list of lists of token ids, and not empty",
                {"name": name},
            )
        kind = type(value[0])
        for i, item in enumerate(value):
            if type(item) is not kind or kind not in (str, int, list):
                kinds = {str: "a string", int: "a token id", list: "a list of token ids"}
                raise PydanticCustomError(
                    "prompt",
                    "{name}[{index}] must be {kind}",
                    {
                        "name": name,
                        "index": i,
                        "kind": kinds.get(kind, "a string or a token id"),
                    },
                )
            if kind is list and not all(type(token) is int for token in item):
                raise PydanticCustomError(
                    "prompt",
                    "{name}[{index}] must be a list of token ids (integers)",
                    {"name": name, "index": i},
                )
        return value

    return check


class CompletionRequest(GenerateRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[Prompt, BeforeValidator(check_prompts("prompt"))]
    echo: bool | None = Field(False, description="alone, to score a prompt, with max_tokens 0")
    logprobs: int | None = Field(None, description="top alternatives to report a token")
    add_special_tokens: bool | None = True

    @property
    def only_echo(self) -> bool:
        """Whether it wants to know about its prompt and nothing else."""
        return self.max_tokens == 0 and bool(self.echo)

    def prompts(self) -> list[str | list[int]]:
        """The request's prompts, one choice (or n) each."""
        value: Any = self.prompt
        return list(value) if isinstance(value, list) and type(value[0]) is not int else [value]

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        fields.setdefault("max_tokens", 16)  # OpenAI's default for completions
        if self.only_echo:
            fields["max_tokens"] = 1  # which nobody is told
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return fields


# What messages hold is checked where they are rendered (chat.py), for the handle and `LLM` too.
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


class PredictedText(BaseModel):
    """A part of a predicted answer."""

    type: Literal["text"]
    text: str


class Prediction(BaseModel):
    """What the answer will probably be like, OpenAI's "predicted outputs"."""

    type: Literal["content"]
    content: str | list[PredictedText]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerateRequest, ChatFields):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = None
    prediction: Prediction | None = Field(
        None, description="text that the answer may repeat; prompt lookup guesses from it too"
    )
    logprobs: bool | None = False
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        if self.max_completion_tokens is not None:  # the newer name wins, as at OpenAI
            fields["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        return fields

    @property
    def takes_long(self) -> bool:
        return bool(self.tools) or super().takes_long


class TokenizeRequest(ApiRequest, TemplateFields):
    """`POST /tokenize`: a prompt, or messages as chat would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages")
        return self


class DetokenizeRequest(ApiRequest):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


# --- answers ----------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0  # tokens that speculative decoding guessed, and were right
    rejected_prediction_tokens: int = 0  # and that were not: no part of the answer


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


FinishReason = Literal["stop", "length", "abort", "error"]
ChatFinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token; with echo the prompt's first token has none."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class PromptLogprob(msgspec.Struct):
    """One token of vLLM's prompt_logprobs."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # of a stream, in a choice's first chunk


class Completion(msgspec.Struct):
    """The whole answer, and every chunk of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct):
    """`arguments` is JSON text; in a stream, what is new of it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    function: CalledFunction
    id: str
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct):
    """`id`, `type` and the name come first, without arguments; then arguments alone."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    """`reasoning` is what `reasoning_content` is, as vLLM and OpenRouter name it."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    metadata: dict[str, str] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # in the first one


class Model(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "tensorray"
    parent: str | UnsetType = UNSET  # of an adapter: the base


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """Answer of /detokenize."""

    prompt: str


_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def to_json(answer: msgspec.Struct) -> bytes:
    return _encode(answer)


def to_event(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(chunk) + b"\n\n"


def warnings_header(ignored: list[str], limit: int = 8) -> str:
    """Value of the X-Tensorray-Warnings header: which fields were ignored. ASCII, whatever the
    names are."""
    names = ", ".join(json.dumps(name[:64]) for name in ignored[:limit])
    more = f" and {len(ignored) - limit} more" if len(ignored) > limit else ""
    return f"ignored unknown fields: {names}{more}"
