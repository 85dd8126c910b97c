"""The frontend: users' prompts to engine requests, the engine's tokens to users' answers.

    prompt, messages --tokenizer, chat template--> GenerationRequest --EngineClient--> deltas
    deltas --Assembler--> RequestOutputDelta, RequestOutput

It knows a model's small files (config, tokenizer, generation defaults) and none of its weights,
imports no Ray, and serves the HTTP ingress, the Serve handle and the in-process `LLM` alike.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from pydantic import ValidationError

from tensorray.actors.logits_processors import load_registry
from tensorray.builder.checkpoint import eos_token_ids, open_files, resolve_path
from tensorray.builder.checkpoint.config import read_generation_config
from tensorray.builder.registry import resolve
from tensorray.cluster.assembly import Assembler, GenerationFailed, PreparedRequest
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.chat import ChatTemplate, ChatTemplateError
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.errors import explain
from tensorray.cluster.output_control import Registry, controls
from tensorray.cluster.outputs import RequestOutput, RequestOutputDelta
from tensorray.cluster.pooling_type import PoolingType, find_pooling_type
from tensorray.cluster.reasoning import template_arguments
from tensorray.cluster.reply_format import ReplyFormats
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.tokenizer import InvalidText, Tokenizer
from tensorray.cluster.tokenizer_files import load_tokenizer
from tensorray.cluster.truncation import shortened

__all__ = [
    "BadRequest",
    "ChatTemplateError",
    "EngineClient",
    "Frontend",
    "GenerationFailed",
    "PreparedRequest",
]

#: Log-probabilities of prompts in one answer: about 60 MB between processes.
MAX_PROMPT_LOGPROBS = 1 << 22

# generation_config.json's names are SamplingParams' for these. All but the last are of draws.
_DRAW_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")
_DEFAULTS = (*_DRAW_DEFAULTS, "repetition_penalty")


class EngineClient(Protocol):
    """Whatever runs requests: an engine in this process, or a handle to one elsewhere."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """The request's deltas, all that came since the last item in each. Ends when every
        sequence has finished; closing it earlier cancels the request."""
        ...

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """End one sequence of a request, whose text is complete, or all of them. Unknown or
        ended ones are ignored."""
        ...


class Frontend:
    """One model's frontend. Its attributes:

    `tokenizer`; `model_names`, the names the API answers to, the first being the model's own;
    `max_model_len`, the most tokens of prompt and answer together; `vocab_size`, the model's,
    which may exceed the tokenizer's; `hidden_size`, the length of its embeddings, and
    `pooling_type`, how they are pooled where a request does not say; `eos_token_ids`, each of
    which ends a sequence; `default_params`, SamplingParams fields the model's makers recommend.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_names: Sequence[str],
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        default_params: Mapping[str, Any] | None = None,
        default_max_tokens: int | None = None,
        chat_template: str | None = None,
        tool_call_parser: str = "auto",
        enable_auto_tool_choice: bool = True,
        reasoning_parser: str = "auto",
        logits_processors: Registry | None = None,
        hidden_size: int = 0,
        pooling_type: PoolingType = "last",
        max_logprobs: int = 20,
        max_n: int = 128,
        looks_up: bool = False,
        seed: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model_names = list(model_names)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self.hidden_size = hidden_size
        self.pooling_type = pooling_type
        self.default_params = dict(default_params or {})
        self._default_max_tokens = default_max_tokens
        self._logits_processors = logits_processors or {}
        self._max_logprobs = max_logprobs
        self._max_n = max_n
        self._looks_up = looks_up  # whether the engine guesses by prompt lookup
        self._seeds = random.Random(seed) if seed is not None else None
        self._template = ChatTemplate(tokenizer, chat_template)
        self.replies = ReplyFormats(
            tokenizer,
            self._template.text,
            tool_parser=tool_call_parser,
            calls_freely=enable_auto_tool_choice,
            reasoning_parser=reasoning_parser,
        )

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template.exists

    @classmethod
    def load(cls, config: EngineConfig) -> Frontend:
        """The frontend of the model that a config names; fetches no weights.

        Raises CheckpointError, ModelConfigError, TokenizerError or ChatTemplateError for a model
        that can't be served, and ValueError for settings it can't be served with.
        """
        files = open_files(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            token=config.hf_token,
            cache_dir=config.download_dir,
            offline=config.offline,
            hf_overrides=config.hf_overrides,
        )
        model = resolve(files.config, config.model_class)(files.config)
        max_model_len = config.max_model_len or model.max_positions
        if max_model_len > model.max_positions:
            raise ValueError(
                f"--max-model-len {max_model_len} is more than the {model.max_positions} "
                "positions the model was made for"
            )
        tokenizer = load_tokenizer(_tokenizer_path(config, files.path))
        eos = [*eos_token_ids(files.config, files.generation_config), *tokenizer.eos_ids]
        defaults = _generation_defaults(config, files.generation_config)
        return cls(
            tokenizer,
            model_names=config.names(),
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=list(dict.fromkeys(eos)),
            default_params={name: defaults[name] for name in _DEFAULTS if name in defaults},
            default_max_tokens=defaults.get("max_new_tokens"),
            chat_template=config.chat_template,
            tool_call_parser=config.tool_call_parser,
            enable_auto_tool_choice=config.enable_auto_tool_choice,
            reasoning_parser=config.reasoning_parser,
            logits_processors=load_registry(config.logits_processors),
            hidden_size=model.hidden_size,
            pooling_type=find_pooling_type(config.pooling_type, files.path),
            max_logprobs=config.max_logprobs,
            max_n=config.max_n,
            looks_up=config.speculative_config.get("method") == "ngram",
            seed=config.seed,
        )

    # --- in ---------------------------------------------------------------------------------

    def params(self, **fields: Any) -> SamplingParams:
        """Sampling parameters: the fields a user set, over the model's defaults.

        Raises BadRequest naming the field that is wrong.
        """
        defaults = self.default_params
        if fields.get("use_beam_search"):  # which draws nothing
            defaults = {name: defaults[name] for name in defaults if name not in _DRAW_DEFAULTS}
        try:
            return SamplingParams(**{**defaults, **fields})
        except ValidationError as error:
            message, param = explain(error)
            raise BadRequest(message, param=param) from None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> list[int]:
        """A conversation as prompt tokens, through the model's chat template.

        `template_arguments` are variables of the template (`enable_thinking=False`). Special
        tokens spelled in messages are text, see `ChatTemplate.encode`. Raises BadRequest for a
        malformed message, ChatTemplateError (one too) where the template is missing or fails.
        """
        return self._template.encode(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **template_arguments,
        )

    def request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        user: str = "",
        cache_salt: str = "",
        lora: str = "",
        add_special_tokens: bool = True,
        echo: bool = False,
        only_echo: bool = False,
        prediction: str = "",
    ) -> PreparedRequest:
        """A request the engine can run: tokens, and every limit resolved.

        Without `max_tokens` the answer may fill the context. With `echo` the answer begins with
        the prompt, and its log-probabilities if the answer's are asked for; with `only_echo` that
        is all of it. `prediction` is text
        that the answer may repeat: it changes how fast that comes. Raises BadRequest.
        """
        tokens = self.prompt_tokens(prompt, add_special_tokens)
        if (most := params.truncate_prompt_tokens) is not None:
            if echo:
                message = "an echo is of the whole prompt; leave truncate_prompt_tokens out"
                raise BadRequest(message, param="truncate_prompt_tokens")
            if most == -1:
                most = max(self.max_model_len - max(params.max_tokens or 1, params.min_tokens), 1)
            tokens = self.truncated(prompt, tokens, most, "end")
        self._check(params)
        self._check_prompt_logprobs(len(tokens), params, echo)
        sampling = params.resolve(self.eos_token_ids, self.vocab_size)
        prompt_logprobs = params.prompt_logprobs
        if echo and prompt_logprobs is None:
            prompt_logprobs = params.logprobs
        changes = controls(
            params, sampling, self.tokenizer, self._logits_processors, self.vocab_size
        )
        changes["prompt_logprobs"] = prompt_logprobs
        if params.seed is None and self._seeds is not None:
            changes["seed"] = self._seeds.getrandbits(63)
        beams = params.beam_search()
        request = GenerationRequest(
            request_id=request_id,
            prompt=tokens,
            sampling=msgspec.structs.replace(sampling, **changes),
            max_tokens=self._max_tokens(len(tokens), params),
            n=params.n if beams is not None else params.best_of or params.n,
            beams=beams,
            priority=priority,
            user=user,
            cache_salt=cache_salt,
            lora=lora,
            reuse_prefix=prompt_logprobs is None,
            prediction=self._predicted_tokens(prediction),
        )
        return PreparedRequest(
            request,
            params,
            prompt=prompt if isinstance(prompt, str) else None,
            echo=echo,
            only_echo=only_echo,
        )

    def _predicted_tokens(self, text: str) -> list[int]:
        """A prediction's tokens, where anything is looked up in them."""
        if not text or not self._looks_up:
            return []
        try:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        except InvalidText as error:
            message = f"the prediction can't be encoded: {error}"
            raise BadRequest(message, param="prediction") from None
        return tokens[: self.max_model_len]

    def converse(
        self, conversation: Conversation, params: SamplingParams, **settings: Any
    ) -> PreparedRequest:
        """A request for what comes next in a conversation; `settings` are those of `request`.

        Its answer is taken apart: reasoning, text and calls of tools. Raises BadRequest.
        """
        prompt = self.render(conversation)
        prepared = self.request(prompt, params, **settings)
        sampling = prepared.request.sampling
        if not params.detokenize and conversation.tools.mode == "none":
            return prepared  # there is no text to take apart
        reply = self.replies.format(
            prompt,
            conversation.tools,
            sampling.grammar,
            continues=conversation.continue_final_message,
        )
        if reply is None:
            return prepared
        if not params.detokenize:
            raise BadRequest("calls are read from text; leave detokenize on", param="tools")
        if reply.grammar and (params.ignore_eos or params.min_tokens):
            given = "ignore_eos" if params.ignore_eos else "min_tokens"
            raise BadRequest(f"{given} can't go with calls that have to be made", param=given)
        if reply.grammar and not self.eos_token_ids:
            raise BadRequest("the model has no end-of-sequence token, which enforced calls need")
        guided = msgspec.structs.replace(sampling, grammar=reply.grammar)
        request = msgspec.structs.replace(prepared.request, sampling=guided)
        return replace(prepared, request=request, reply=reply)

    def render(self, conversation: Conversation) -> list[int]:
        """A conversation as prompt tokens. Raises BadRequest."""
        self.replies.check(conversation.tools)
        return self.chat(
            conversation.messages,
            tools=conversation.tools.for_template(),
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            **{
                **template_arguments(
                    self._template.text,
                    conversation.reasoning_effort,
                    conversation.enable_thinking,
                ),
                **conversation.arguments,
            },
        )

    def prompt_tokens(self, prompt: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        """A prompt's tokens, which are the model's. Raises BadRequest."""
        if not prompt:
            raise BadRequest("the prompt is empty; give it at least one token", param="prompt")
        if isinstance(prompt, str):
            try:
                tokens = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            except InvalidText as error:
                raise BadRequest(f"the prompt can't be encoded: {error}", param="prompt") from None
            if not tokens:
                raise BadRequest("the prompt's text has no tokens", param="prompt")
        else:
            tokens = list(prompt)
        if not _are_tokens(tokens, self.vocab_size):
            wrong = next(t for t in tokens if not _are_tokens([t], self.vocab_size))
            raise BadRequest(
                f"the prompt has token {wrong!r}; this model's tokens are 0 to "
                f"{self.vocab_size - 1}",
                param="prompt",
            )
        return tokens

    def truncated(
        self,
        prompt: str | Sequence[int],
        tokens: list[int],
        most: int,
        keep: Literal["start", "end"],
    ) -> list[int]:
        """A prompt's `tokens`, `most` of them."""
        if len(tokens) <= most:
            return tokens
        bare: Sequence[int] = tokens
        if isinstance(prompt, str):
            bare = self.tokenizer.encode(prompt, add_special_tokens=False)
        return shortened(tokens, bare, most, keep)

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        limit, asked = self.max_model_len, params.max_tokens
        left = limit - prompt_tokens
        if left < 1:
            raise BadRequest(
                f"the prompt is too long: {prompt_tokens} tokens, but the context is {limit} "
                "tokens for prompt and answer together; shorten the prompt",
                param="prompt",
            )
        if asked is not None and asked > left:
            raise BadRequest(
                f"max_tokens is too large: {prompt_tokens} tokens of prompt and {asked} of answer "
                f"exceed the context of {limit} tokens; ask for at most {left}",
                param="max_tokens",
            )
        if params.min_tokens > left:
            raise BadRequest(
                f"min_tokens ({params.min_tokens}) exceeds the {left} tokens that a prompt of "
                f"{prompt_tokens} leaves of the context of {limit}",
                param="min_tokens",
            )
        if asked is not None:
            return asked
        return max(params.min_tokens, min(left, self._default_max_tokens or left))

    def _check(self, params: SamplingParams) -> None:
        for name in ("n", "best_of", "beam_width"):
            count: int = getattr(params, name) or 0
            if count > self._max_n:
                raise BadRequest(
                    f"{name} ({count}) is more than this server's limit of {self._max_n}",
                    param=name,
                )
        for name, asked in (
            ("logprobs", params.logprobs),
            ("prompt_logprobs", params.prompt_logprobs),
        ):
            if asked is None:
                continue
            wanted = self.vocab_size if asked == -1 else asked
            most = self.vocab_size if self._max_logprobs == -1 else self._max_logprobs
            if wanted > most:
                raise BadRequest(
                    f"{name} ({asked}) asks for more alternatives than this server's limit of "
                    f"{most}",
                    param=name,
                )
        if params.stop and not params.detokenize:
            raise BadRequest(
                "stop strings need text, so detokenize can't be false; use stop_token_ids",
                param="stop",
            )

    def _check_prompt_logprobs(self, tokens: int, params: SamplingParams, echo: bool) -> None:
        name, top = "prompt_logprobs", params.prompt_logprobs
        if top is None and echo:
            name, top = "logprobs", params.logprobs
        if top is None:
            return
        sequences = params.best_of or params.n
        numbers = sequences * tokens * (self.vocab_size if top == -1 else top + 1)
        if numbers > MAX_PROMPT_LOGPROBS:
            raise BadRequest(
                f"{name} ({top}) asks for {numbers} log-probabilities of the prompt's {tokens} "
                f"tokens; {MAX_PROMPT_LOGPROBS} is the most of one request, so ask for fewer "
                "alternatives, or send a shorter prompt",
                param=name,
            )

    # --- out --------------------------------------------------------------------------------

    def stream(
        self, client: EngineClient, prepared: PreparedRequest
    ) -> AsyncIterator[RequestOutputDelta]:
        """The answer as it comes: one item for each the engine sends, so nothing waits here.

        Close the iterator to cancel the request. Raises BadRequest at once if best_of exceeds n
        (the best is known at the end only), and while iterating GenerationFailed, RequestRefused
        or whatever the client raises.
        """
        if prepared.ranks:
            raise BadRequest(
                f"best_of ({prepared.request.n}) with n ({prepared.params.n}) can't be streamed, "
                "as the best are known at the end only; set stream to false",
                param="best_of",
            )
        return self._run(client, prepared, Assembler(self.tokenizer, prepared))

    async def collect(self, client: EngineClient, prepared: PreparedRequest) -> RequestOutput:
        """The whole answer. Cancelling the call cancels the request; errors as in `stream`."""
        if not prepared.params.stop:  # only stop strings need looking for before the end
            whole = msgspec.structs.replace(prepared.request, whole=True)
            prepared = replace(prepared, request=whole)
        assembler = Assembler(self.tokenizer, prepared)
        async with contextlib.aclosing(self._run(client, prepared, assembler)) as deltas:
            return assembler.result([delta async for delta in deltas])

    async def _run(
        self, client: EngineClient, prepared: PreparedRequest, assembler: Assembler
    ) -> AsyncGenerator[RequestOutputDelta, None]:
        request_id = prepared.request.request_id
        arriving = client.generate(prepared.request)
        try:
            async for deltas in arriving:
                output, stopped = assembler.add(deltas)
                for index in stopped:
                    await client.cancel(request_id, index)
                if output.outputs or output.prompt_logprobs is not None:
                    yield output
                if output.finished:
                    return
        finally:
            close = getattr(arriving, "aclose", None)
            if close is not None:
                await close()


def _are_tokens(tokens: list[Any], vocab_size: int) -> bool:
    """Whether all are integers, and of the vocabulary. Long prompts take a while any other way."""
    return set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocab_size


def _tokenizer_path(config: EngineConfig, model: Path) -> Path:
    if config.tokenizer is None:
        return model
    path = Path(config.tokenizer).expanduser()
    if path.exists():
        return path
    return resolve_path(
        config.tokenizer,
        weights=False,
        token=config.hf_token,
        cache_dir=config.download_dir,
        offline=config.offline,
    )


def _generation_defaults(config: EngineConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `--generation-config` says to take from generation_config.json."""
    if config.generation_config == "vllm":
        return {}
    if config.generation_config != "auto":
        directory = Path(config.generation_config).expanduser()
        if not directory.is_dir():
            raise ValueError(
                f"--generation-config {config.generation_config}: neither auto nor vllm nor a "
                "directory"
            )
        found = read_generation_config(directory)
    return {key: value for key, value in found.items() if value is not None}
