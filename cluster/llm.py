"""LLM: a model in this process, without Ray Serve. The engine is the same one that serves.

from tensorray import LLM, SamplingParams

llm = LLM("path/or/hub-id")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from tensorray.actors.device import has_devices
from tensorray.actors.guidance import Vocabulary
from tensorray.actors.link import LocalLink, ShardLink, StepExecutor
from tensorray.actors.local_replica import LocalReplica
from tensorray.actors.logits_processors import spell
from tensorray.actors.shard_host import ShardHost, load_executor
from tensorray.actors.shard_process import ShardProcess
from tensorray.cluster.adapters import EngineAdapters, LocalHost
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.beam_answers import (
    BeamSearchOutput,
    BeamSearchParams,
    beam_search_output,
)
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.engine import Engine
from tensorray.cluster.fleet import Fleet, LocalDoor
from tensorray.cluster.frontend import EngineClient, Frontend, PreparedRequest
from tensorray.cluster.lora_module import LoRARequest
from tensorray.cluster.outputs import RequestOutput, RequestOutputDelta
from tensorray.cluster.pooling import (
    Embedder,
    PoolingParams,
    PoolingRequestOutput,
    ScoringRequestOutput,
    compare,
    pair_up,
)
from tensorray.cluster.progress import progress
from tensorray.cluster.replicas import Replicas
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.tools import ToolUse
from tensorray.cluster.vocabulary import vocabulary

__all__ = ["LLM", "BeamSearchParams", "LoRARequest", "PoolingParams", "SamplingParams"]

T = TypeVar("T")

# Requests of a batch that are handed to the engine between two looks at what it has to do.
_AT_ONCE = 32
Plain = str | list[int]
#: Text, token ids, or either as vLLM names it: {"prompt": text}, {"prompt_token_ids": ids}.
Prompt = Plain | Mapping[str, Any]


class LLM:
    """One engine on one thread of its own; `generate`, `chat` and `stream` may be called from any.
    With data parallelism there are several, on the same thread. A layout's shards are threads here,
    and processes where they have GPUs.

    Keyword arguments are EngineConfig's fields; `logits_processors` may hold classes, too. Raises
    pydantic's ValidationError for a bad setting and the loader's own errors (CheckpointError,
    ModelConfigError, KVCacheError) for a model that can't be served. Use as a context manager, or
    call `close`.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        if processors := settings.get("logits_processors"):
            settings = {**settings, "logits_processors": [spell(each) for each in processors]}
        self.config = EngineConfig(model=model, **settings)
        self.frontend = Frontend.load(self.config)
        known = partial(vocabulary, self.frontend.tokenizer, self.frontend.eos_token_ids)
        shards = [_Shards(self.config, known, i) for i in range(self.config.data_parallel_size)]
        # The queue's limit is for servers, who can turn clients away: a batch here may be any size.
        limits = dict.fromkeys(("max_waiting", "max_waiting_tokens"), sys.maxsize)
        endless = self.config.model_copy(update=limits)
        self._ids = itertools.count()
        self._embedder = Embedder(self.frontend, self.frontend.pooling_type)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._shards = shards
        self.engines: list[Engine] = []
        for each in shards:
            link = self._run(each.connect())
            adapters = None
            if self.config.enable_lora:
                adapters = EngineAdapters(LocalHost(each.holders), self.config.max_cpu_loras)
            self.engines.append(Engine(link, endless.scheduler(link.info), adapters=adapters))
            self._run(self.engines[-1].start())
        doors = [LocalDoor(each.adapters) for each in self.engines if each.adapters is not None]
        #: The engines' adapters; None without enable_lora. Its coroutines are for `run`.
        self.fleet = Fleet(lambda: doors) if doors else None
        self._adapters: dict[str, LoRARequest] = {}  # that were loaded by requests
        try:
            for module in self.config.lora_modules:
                self._load_adapter(LoRARequest(module.name, 0, module.path))
        except BaseException:
            self.close()
            raise
        self.engine = self.engines[0]
        self.info = self.engine.info
        self._client: EngineClient = (
            self.engine
            if len(self.engines) == 1
            else Replicas(self.engines, self.config.effective_routing)
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finished: Callable[[RequestOutput], None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts (text, or token ids) in one batch; outputs in the prompts' order.

        `sampling_params` is one for all or one a prompt; without it the model's own defaults.
        `on_finished` is called, on the engine's thread, as each prompt finishes. `lora_request` is
        the LoRA adapter for all, or one a prompt. `use_tqdm` (vLLM's name) shows how many are done,
        if stderr is a terminal. Raises BadRequest for a prompt or parameter the model can't take,
        AdapterRefused for such an adapter, before anything runs.
        """
        return self._answer(
            [partial(self.frontend.request, prompt) for prompt in _prompts(prompts)],
            sampling_params,
            on_finished,
            lora_request,
            use_tqdm,
        )

    def _answer(
        self,
        listed: Sequence[Callable[..., PreparedRequest]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_finished: Callable[[RequestOutput], None] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
        shown: bool,
    ) -> list[RequestOutput]:
        """Run a batch of requests; each of `listed` prepares one from its sampling parameters."""
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each = [sampling_params or self.frontend.params()] * len(listed)
        else:
            each = list(sampling_params)
            if len(each) != len(listed):
                raise ValueError(f"{len(listed)} prompts but {len(each)} sampling_params")
        if lora_request is None or isinstance(lora_request, LoRARequest):
            lora_request = [lora_request] * len(listed)
        if len(lora_request) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(lora_request)} lora_request")
        prepared = [
            prepare(params, request_id=self._next_id(), lora=self._load_adapter(lora))
            for prepare, params, lora in zip(listed, each, lora_request, strict=True)
        ]
        if not shown:
            return self._run(self._collect(prepared, on_finished))
        with progress(len(prepared)) as advance:

            def count(output: RequestOutput) -> None:
                advance()
                if on_finished is not None:
                    on_finished(output)

            return self._run(self._collect(prepared, count))

    def chat(
        self,
        messages: list[dict[str, Any]] | Sequence[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finished: Callable[[RequestOutput], None] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        use_tqdm: bool = False,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several in one batch, through the model's chat template.

        `tools`, `tool_choice` and `parallel_tool_calls` are OpenAI's. An output's `reply` has the
        calls, and the reasoning, taken out of its text. With `continue_final_message` the answer
        goes on from the last message's text. Errors as `generate`.
        """
        several = not (messages and isinstance(messages[0], dict))
        conversations = cast(
            "list[list[dict[str, Any]]]", list(messages) if several else [messages]
        )
        use = ToolUse.read(tools, tool_choice, parallel_tool_calls)
        goes_on = template_arguments.pop("continue_final_message", False)
        opens = template_arguments.pop("add_generation_prompt", not goes_on)
        return self._answer(
            [
                partial(
                    self.frontend.converse,
                    Conversation(each, use, opens, goes_on, arguments=template_arguments),
                )
                for each in conversations
            ],
            sampling_params,
            on_finished,
            lora_request,
            use_tqdm,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: LoRARequest | None = None,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt, as vLLM's method of this name
        returns them. `generate` with `use_beam_search` says more about a search."""
        outputs = self.generate(
            prompts, params.sampling_params(), lora_request=lora_request, use_tqdm=use_tqdm
        )
        return [beam_search_output(each, self.frontend.tokenizer) for each in outputs]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Iterator[RequestOutputDelta]:
        """Complete one prompt, as it comes. Leaving the iterator early cancels the request."""
        prepared = self.frontend.request(
            _plain(prompt),
            sampling_params or self.frontend.params(),
            request_id=self._next_id(),
            lora=self._load_adapter(lora_request),
        )
        items: queue.SimpleQueue[RequestOutputDelta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for delta in self.frontend.stream(self._client, prepared):
                    items.put(delta)
                items.put(None)
            except BaseException as error:
                items.put(error)
                raise

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[PoolingRequestOutput]:
        """A vector for each prompt (text, or token ids), in one batch: `outputs.embedding`, of
        length 1 unless `pooling_params` say otherwise. `use_tqdm` as in `generate`. Raises
        BadRequest before anything runs."""
        params = pooling_params or PoolingParams()
        requests = [
            self._embedder.request(prompt, params, request_id=self._next_id())
            for prompt in _prompts(prompts)
        ]
        shown = progress(len(requests), "Embedding") if use_tqdm else nullcontext(lambda: None)
        with shown as advance:
            return self._run(self._embedder.embed_all(self._client, requests, params, advance))

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[PoolingRequestOutput]:
        """`embed`, as the hidden states are: not normalized unless `pooling_params` say so. The
        vectors are `outputs.data`, float32 [dimensions]."""
        params = pooling_params or PoolingParams(normalize=False)
        return self.embed(prompts, params, use_tqdm=use_tqdm)

    def score(
        self,
        first: Prompt | Sequence[Prompt],
        second: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[ScoringRequestOutput]:
        """How well prompts go together: cosines of their vectors, `outputs.score`.

        Each of `first` is compared with the one at its place in `second`; one alone on either
        side, with all of the other. Raises ValueError for lists that don't fit.
        """
        firsts, seconds = _prompts(first), _prompts(second)
        pairs = pair_up(len(firsts), len(seconds))
        found = self.embed([*firsts, *seconds], pooling_params, use_tqdm=use_tqdm)
        return [compare(self._next_id(), found[a], found[len(firsts) + b]) for a, b in pairs]

    @property
    def client(self) -> EngineClient:
        """What runs requests, for coroutines that `run` is given."""
        return self._client

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine on the engine's thread."""
        return self._run(work)

    def close(self) -> None:
        """Stop the engine and its thread. Idempotent."""
        if self._loop.is_closed():
            return
        for engine, shards in zip(self.engines, self._shards, strict=True):
            self._run(engine.close())
            shards.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _collect(
        self,
        prepared: list[PreparedRequest],
        on_finished: Callable[[RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        async def one(each: PreparedRequest) -> RequestOutput:
            output = await self.frontend.collect(self._client, each)
            if on_finished is not None:
                on_finished(output)
            return output

        tasks = []
        try:
            for each in prepared:
                tasks.append(asyncio.ensure_future(one(each)))
                if len(tasks) % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # the engine begins while the others are handed over
            return list(await asyncio.gather(*tasks))
        except BaseException:
            # One failed or the caller left: the others must not run on unseen.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    def _load_adapter(self, asked: LoRARequest | None) -> str:
        """The name of the adapter that is asked for, which is loaded if that version is not."""
        if asked is None:
            return ""
        if self.fleet is None:
            raise BadRequest("lora_request needs enable_lora", param="lora_request")
        if self._adapters.get(asked.lora_name) != asked:
            self._run(self.fleet.load(asked.lora_name, asked.lora_path))
            self._adapters[asked.lora_name] = asked
        return asked.lora_name

    def _next_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread stops the work too
            raise


class _Shards:
    """One replica's shards: one that runs on the engine's thread, or several on their own."""

    def __init__(
        self, config: EngineConfig, vocabulary: Callable[[], Vocabulary], replica: int
    ) -> None:
        configs = [config.shard(rank) for rank in range(config.num_shards)]
        first = replica * len(configs)
        apart = len(configs) > 1 and _on_gpus(config)
        if not apart:  # so they can share what this process knows of the vocabulary
            configs = [replace(each, vocabulary=vocabulary) for each in configs]
        self._executor = load_executor(configs[0], first) if len(configs) == 1 else None
        self._replica = None
        if self._executor is None:
            self._replica = LocalReplica(configs, first, processes=apart)

    @property
    def holders(self) -> Sequence[StepExecutor | ShardHost | ShardProcess]:
        """Who each shard's adapters are given to."""
        if self._replica is not None:
            return self._replica.hosts
        assert self._executor is not None
        return [self._executor]

    async def connect(self) -> ShardLink:
        if self._replica is not None:
            return await self._replica.connect()
        assert self._executor is not None
        return LocalLink(self._executor, inline=True)

    def close(self) -> None:
        if self._replica is not None:
            self._replica.close()


def _on_gpus(config: EngineConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and has_devices())


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Plain]:
    """One prompt or several, as several. Raises BadRequest for what is no prompt."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        prompts = [cast(Prompt, prompts)]
    return [_plain(each) for each in cast(Sequence[Prompt], prompts)]


def _plain(prompt: Prompt) -> Plain:
    if not isinstance(prompt, Mapping):
        return prompt
    given = {name: value for name, value in prompt.items() if value is not None}
    for name in ("prompt_token_ids", "prompt"):  # ids say what the text is
        if name in given:
            plain: Plain = given.pop(name)
            given.pop("prompt", None)
            break
    else:
        raise BadRequest("a prompt needs a 'prompt' or 'prompt_token_ids'", param="prompt")
    if given:
        raise BadRequest(f"prompts are text or token ids, without {min(given)!r}", param="prompt")
    return plain
