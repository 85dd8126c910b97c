"""An engine in this process over a null device, and a model directory small enough to write."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tensorray.actors.link import LocalLink
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import KVGroups, ShardInfo
from tensorray.cluster.backend import EngineStatus, ShardStatus
from tensorray.cluster.closing import Closing
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.engine_observer import EngineObserver
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.metrics import EngineMetrics
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.scheduler import Scheduler

VOCAB_SIZE = 256 + 3  # bytes, then the special tokens
MAX_MODEL_LEN = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.content == 'fail' %}{{ raise_exception('this template fails') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{{ suffix }}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def null_engine(
    *,
    step_ms: float = 0.0,
    vocab_size: int = VOCAB_SIZE,
    max_model_len: int = MAX_MODEL_LEN,
    blocks: int = 257,
    max_num_seqs: int = 64,
    max_waiting: int = 64,
    observer: EngineObserver | None = None,
) -> Engine:
    """Not started."""
    info = ShardInfo(
        kv=KVGroups(windows=[None], num_blocks=blocks, block_size=16),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        device="null",
        weight_bytes=0,
        kv_cache_bytes=0,
        load_seconds=0.0,
    )
    scheduler = Scheduler(
        info.kv,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        max_waiting=max_waiting,
    )
    return Engine(LocalLink(NullShard(info, step_ms)), scheduler, observer=observer)


def write_model(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A Llama of two tiny layers whose tokens are bytes: config and tokenizer, no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class LocalBackend:
    """An engine in this process as the HTTP side wants it; `async with` starts and ends it."""

    def __init__(self, **settings: Any) -> None:
        self._metrics = EngineMetrics("tiny")
        self.engine = null_engine(observer=self._metrics, **settings)
        self._metrics.watch(self.engine)

    async def __aenter__(self) -> LocalBackend:
        await self.engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        return self.engine.generate(request)

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        await self.engine.cancel(request_id, index)

    async def failure(self) -> str | None:
        return self.engine.failure

    async def metrics(self) -> bytes:
        return self._metrics.text()

    async def status(self) -> list[EngineStatus]:
        info = self.engine.info
        shard = ShardStatus(0, answers=True, pid=1, node="here")
        return [
            EngineStatus(
                engine="0",
                failure=self.engine.failure,
                device=info.device,
                weight_bytes=info.weight_bytes,
                kv_cache_bytes=info.kv_cache_bytes,
                load_seconds=info.load_seconds,
                shards=[shard],
            )
        ]


@asynccontextmanager
async def serving(
    model: Path,
    *,
    limits: dict[str, Any] | None = None,
    closing: Closing | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, LocalBackend]]:
    """An HTTP client of the API over a null engine, all in this process."""
    config = EngineConfig(model=str(model), served_model_name=["tiny"], **(limits or {}))
    async with LocalBackend(**settings) as backend:
        app = create_app(Frontend.load(config), backend, config, closing=closing)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, backend
