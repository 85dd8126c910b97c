"""EngineConfig: one typed description of a deployment; YAML keys and command-line flags alike.

Names are vLLM's where it has one. A field here is a flag of `tensorray serve`, `generate` and
`bench` (`max_model_len` is `--max-model-len`) and a key of a config file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tensorray.actors.config import ShardConfig
from tensorray.actors.protocol import ShardInfo
from tensorray.actors.speculative_config import parse_speculative_config
from tensorray.cluster.elsewhere import ELSEWHERE
from tensorray.cluster.key_digests import digest
from tensorray.cluster.lora_module import LoraModule
from tensorray.cluster.replica_choice import Routing
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.vocabulary import load_vocabulary

# The settings that say what answers, rather than how fast.
_ANSWERING = (
    "model",
    "model_class",
    "tokenizer",
    "revision",
    "load_format",
    "hf_overrides",
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "logits_processors",
)


class EngineConfig(BaseModel):
    """Everything an engine is started with. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    #: The parts of `--help`, by the first setting of each.
    topics: ClassVar[dict[str, str]] = {
        "model": "Model",
        "chat_template": "Chats",
        "device": "Device",
        "max_model_len": "Memory and batching",
        "tensor_parallel_size": "Many devices",
        "data_parallel_size": "Many replicas",
        "enable_lora": "LoRA adapters",
        "pooling_type": "Embeddings and scores",
        "api_key": "Keys and limits of the API",
        "step_timeout_seconds": "When something fails",
        "log_format": "Logs and traces",
    }

    # --- model ---
    model: str = Field(description="A Hub id, a local directory in Hub layout, or a GGUF file")
    served_model_name: list[str] = Field(
        default_factory=list, description="Names the API answers to (default: the model's)"
    )
    model_class: str | None = Field(
        None, description="Your own definition, as pkg.module:Class or path/to/file.py:Class"
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer's path or Hub id, if not the model's"
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub")
    hf_token: str | None = Field(
        None, description="Hub token (default: the environment's)", repr=False
    )
    download_dir: str | None = Field(None, description="Hub cache directory")
    offline: bool = Field(False, description="Use the Hub cache only")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        "auto", description="dummy: random weights of the config's shapes"
    )
    hf_overrides: dict[str, Any] = Field(
        default_factory=dict, description="Keys to set in the model's config (JSON)"
    )
    generation_config: str = Field(
        "auto", description="auto: the model's defaults; vllm: none; or a directory"
    )
    logits_processors: list[str] = Field(
        default_factory=list,
        description="Your own class between logits and choice, as pkg.module:Class or "
        "path/to/file.py:Class; requests name it",
    )
    seed: int | None = Field(None, description="Base seed for requests without one")
    # --- chats ---
    chat_template: str | None = Field(None, description="A jinja file, or a template inline")
    tool_call_parser: Literal[
        "auto", "none", "hermes", "mistral", "llama3_json", "pythonic", "qwen3_coder"
    ] = Field("auto", description="How the model writes calls; auto: as its chat template shows")
    enable_auto_tool_choice: bool = Field(
        True, description="Let the model choose to call tools; off: only where a request says so"
    )
    reasoning_parser: Literal["auto", "none", "qwen3", "deepseek_r1", "mistral"] = Field(
        "auto", description="How the model marks its reasoning; auto: as its chat template shows"
    )
    # --- device ---
    device: Literal["auto", "cpu", "cuda", "null"] = Field(
        "auto",
        description="auto: the GPU if CuPy sees one, else the CPU; null: a device that answers at "
        "once, to measure everything else",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto",
        description="Weights and activations; auto: the checkpoint's on a GPU (float16 if it says "
        "none), float32 on a CPU. Under float16 the residual stream of Gemma and Qwen is float32; "
        "if another model's overflows, take bfloat16",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="auto: as the activations; fp8: half the memory (GPU only)"
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads (default: all cores)")
    segment_backend: Literal["auto", "tensorrt", "kernels"] = Field(
        "auto",
        description="What runs dense math on a GPU. auto: TensorRT plans that are stored, where "
        "they are the faster, else own kernels; tensorrt: plans wherever they serve, built if they "
        "are not there; kernels: own kernels only",
    )
    plan_store: str | None = Field(
        None,
        description="Directory or fsspec URL of TensorRT plans (default: $TENSORRAY_STORE, or "
        "~/.cache/tensorray/plans)",
    )
    build_plans: bool = Field(
        False, description="Build the plans that are not stored, at start; takes minutes"
    )
    enforce_eager: bool = Field(False, description="On a GPU, record no CUDA graphs")
    cudagraph_capture_sizes: list[int] = Field(
        default_factory=list,
        description="Sequences, or tokens, that a GPU's steps are padded to, a CUDA graph each "
        "(default: powers of two up to 128, then sizes between as well)",
    )
    null_step_ms: float = Field(0.0, ge=0, description="Step time of the null device")
    # --- memory and batching ---
    max_model_len: int | None = Field(
        None, ge=1, description="Context length (default: the model's)"
    )
    max_num_seqs: int = Field(256, ge=1, description="Sequences running at once")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens a step may run; more prefill faster and stall decodes longer (default: "
        "4096 on a GPU, 512 on a CPU)",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory that weights, activations and KV cache may fill",
    )
    kv_cache_memory_bytes: int | None = Field(
        None, ge=1, description="Size of the KV cache (default: from the free memory)"
    )
    num_kv_blocks: int | None = Field(None, ge=2, description="Size of the KV cache, in blocks")
    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV block")
    enable_prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes")
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    speculative_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Speculative decoding, as JSON with vLLM's keys: "
        '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5, '
        '"prompt_lookup_min": 2}, {"model": "a draft model"}, or {"method": "medusa", "model": '
        '"its heads"}, or so with "eagle" or "eagle3"; same tokens, fewer steps (on GPUs all '
        "but EAGLE)",
    )
    # --- many devices ---
    tensor_parallel_size: int = Field(1, ge=1, description="Shards that split every layer")
    pipeline_parallel_size: int = Field(
        1,
        ge=1,
        description="Stages that share out the layers, each at work on a batch of its own",
    )
    enable_expert_parallel: bool = Field(
        False, description="Share out whole experts over the tensor-parallel shards"
    )
    accelerator_type: str | None = Field(
        None, description="Ray's name of the GPU type to run on, such as H100"
    )
    placement_strategy: Literal["pack", "spread"] = Field(
        "pack", description="Pipeline stages on few nodes, or on as many as there are"
    )
    disable_custom_all_reduce: bool = Field(
        False, description="Have NCCL make all sums over GPUs, small ones too"
    )
    # --- many replicas ---
    data_parallel_size: int = Field(1, ge=1, description="Replicas of the whole model")
    num_ingress_replicas: int = Field(
        1, ge=1, description="Processes that speak HTTP and turn text into tokens and back"
    )
    routing: Routing = Field(
        "prefix",
        description="Which replica a request goes to. prefix: one that holds its prompt's "
        "beginning already, unless another is that much freer; balanced: the freer of two",
    )
    autoscaling_config: dict[str, Any] = Field(
        default_factory=dict,
        description="When serving: Serve's autoscaling settings for the replicas (min_replicas, "
        "max_replicas, upscale_delay_s, ...; JSON), and target_queued_tokens, the prompt tokens "
        "that one should have waiting, a running sequence counting as 128 (default: 96 for each "
        "of max_num_seqs)",
    )
    enable_sleep_mode: bool = Field(
        False,
        description="When serving: POST /sleep frees the shards' place until POST /wake_up, or the "
        "next request, which waits",
    )
    idle_timeout_seconds: float | None = Field(
        None, gt=0, description="With --enable-sleep-mode: sleep after so long without a request"
    )
    prefill_replicas: int = Field(
        0,
        ge=0,
        description="When serving: replicas besides, which compute prompts and hand their KV "
        "blocks to the others (disaggregation); 0: each computes its own",
    )
    prefill_min_tokens: int = Field(
        256,
        ge=1,
        description="With --prefill-replicas: prompts with fewer tokens to compute are computed "
        "where they are decoded",
    )
    handover_timeout_seconds: float = Field(
        30.0,
        gt=0,
        description="With --prefill-replicas: how long a prompt's blocks are kept for the replica "
        "that is to fetch them, which computes them itself after that",
    )
    # --- LoRA adapters ---
    enable_lora: bool = Field(False, description="Serve LoRA adapters of the model beside it")
    lora_modules: list[LoraModule] = Field(
        default_factory=list,
        description="Adapter to serve, as NAME=PATH or JSON; a directory that PEFT saved, or a Hub "
        "id",
    )
    max_loras: int = Field(8, ge=1, description="Adapters running at once")
    max_lora_rank: int = Field(16, ge=1, description="Highest rank of an adapter")
    max_cpu_loras: int | None = Field(
        None, ge=1, description="Adapters in memory at once (default: any number)"
    )
    allow_runtime_lora_updating: bool = Field(
        False, description="Let clients of the API load and unload adapters"
    )
    allowed_lora_path: list[str] = Field(
        default_factory=list,
        description="Directory below which clients may load from (default: anywhere, and the Hub)",
    )
    # --- embeddings and scores ---
    pooling_type: Literal["auto", "last", "mean", "cls"] = Field(
        "auto",
        description="Embeddings are the last hidden state of a prompt, the mean of all, or the "
        "first; auto: as Sentence Transformers' files beside the model say, else the last",
    )
    score_template: str | None = Field(
        None,
        description="A jinja file over query and document, whose text the model answers with yes "
        "or no: scores and rankings are then the odds of yes, as generative rerankers mean it",
    )
    score_tokens: list[str] = Field(
        ["yes", "no"], description="The two answers, yes first", min_length=2, max_length=2
    )
    # --- keys and limits of the API ---
    api_key: list[str] = Field(
        default_factory=list,
        repr=False,
        description="Key that clients must send, or its sha256: digest, which is all that is kept",
    )
    api_key_file: str | None = Field(
        None, description="File of keys' digests and names, as `tensorray api-key` makes"
    )
    api_key_requests_per_minute: int | None = Field(
        None, ge=1, description="Most requests a minute with one key, in each ingress process"
    )
    api_key_concurrency: int | None = Field(
        None, ge=1, description="Most requests at once with one key, in each ingress process"
    )
    allowed_origins: list[str] = Field(
        default_factory=list,
        description="Web sites whose pages may use the API from a browser (CORS); *: any",
    )
    max_logprobs: int = Field(20, ge=-1, description="Most top-logprobs a request may ask; -1: any")
    max_n: int = Field(128, ge=1, le=128, description="Most sequences a request may ask")
    max_body_bytes: int = Field(
        16 << 20, ge=1024, description="Largest request body the server reads"
    )
    max_waiting: int = Field(
        4096, ge=0, description="When serving: sequences that may wait before new ones get 429"
    )
    max_waiting_tokens: int = Field(
        1 << 23,
        ge=1,
        description="When serving: prompt tokens that may wait before new ones get 429; each takes "
        "about 50 bytes",
    )
    request_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="Most that a request may take, its wait included; it may ask for less",
    )
    read_timeout_seconds: float = Field(
        60.0, gt=0, description="A client that reads nothing for so long is dropped"
    )
    # --- when something fails ---
    step_timeout_seconds: float = Field(
        300.0, gt=0, description="When serving: a shard that takes longer over a step is replaced"
    )
    stall_seconds: float = Field(
        30.0, gt=0, description="/health is red while a shard takes longer over a step"
    )
    collective_timeout_seconds: float = Field(
        300.0, gt=0, description="A shard that its peers wait longer for within a step is given up"
    )
    placement_timeout_seconds: float = Field(
        600.0, gt=0, description="When serving: how long to wait for room in the cluster"
    )
    shard_lease_seconds: float = Field(
        60.0, gt=0, description="How long shards whose router is gone wait for the next one"
    )
    router_timeout_seconds: float = Field(
        120.0, ge=0, description="How long requests wait for a router that is lost; 0: not at all"
    )
    drain_timeout_seconds: float = Field(
        60.0, ge=0, description="When serving: how long a process that is to go ends its streams"
    )
    # --- logs and traces ---
    log_format: Literal["text", "json"] = Field(
        "text", description="When serving: how lines of logs are written"
    )
    log_prompts: bool = Field(False, description="Log requests' bodies, up to 2000 characters each")
    otlp_traces_endpoint: str | None = Field(
        None,
        description="Where OpenTelemetry traces go, over HTTP, such as http://host:4318/v1/traces",
    )

    @model_validator(mode="before")
    @classmethod
    def _are_settings(cls, given: Any) -> Any:
        """Another server's are answered with what stands here; pydantic names the others."""
        for name in given if isinstance(given, dict) else ():
            instead = ELSEWHERE.get("--" + str(name).replace("_", "-"))
            if instead is not None and name not in cls.model_fields:
                raise ValueError(f"no {name} here; {instead}")
        return given

    @field_validator("api_key")
    @classmethod
    def _digests(cls, keys: list[str]) -> list[str]:
        if not all(key.strip() for key in keys):
            raise ValueError("a key must not be empty")
        return [digest(key) for key in keys]

    @model_validator(mode="after")
    def _can_speculate(self) -> EngineConfig:
        if parse_speculative_config(self.speculative_config) is None:
            return self
        if self.pipeline_parallel_size > 1:
            raise ValueError(
                "speculative_config: a pipeline of several stages can't speculate; set "
                "pipeline_parallel_size to 1"
            )
        return self

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _can_trace(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            try:
                found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
            except ModuleNotFoundError:
                found = None
            if found is None:
                raise ValueError("traces need more packages: pip install '.[otel]' in the source")
        return endpoint

    @model_validator(mode="after")
    def _sleep_is_enabled(self) -> EngineConfig:
        if self.idle_timeout_seconds is not None and not self.enable_sleep_mode:
            raise ValueError("idle_timeout_seconds needs enable_sleep_mode")
        return self

    @model_validator(mode="after")
    def _limits_have_keys(self) -> EngineConfig:
        limits = (self.api_key_requests_per_minute, self.api_key_concurrency)
        if any(limits) and not (self.api_key or self.api_key_file):
            raise ValueError("limits a key need keys: set api_key or api_key_file")
        return self

    @model_validator(mode="after")
    def _adapters_are_enabled(self) -> EngineConfig:
        asked = {
            "lora_modules": self.lora_modules,
            "allow_runtime_lora_updating": self.allow_runtime_lora_updating,
            "allowed_lora_path": self.allowed_lora_path,
        }
        for name, value in asked.items():
            if value and not self.enable_lora:
                raise ValueError(f"{name} needs enable_lora")
        names = [module.name for module in self.lora_modules]
        for name in names:
            if names.count(name) > 1 or name in self.names():
                raise ValueError(f"lora_modules: {name!r} is another model's name already")
        most = self.max_cpu_loras
        if most is not None and most < len(names):
            raise ValueError(f"max_cpu_loras ({most}) is less than the {len(names)} lora_modules")
        return self

    @model_validator(mode="after")
    def _scales(self) -> EngineConfig:
        scaling = self.autoscaling_config
        if not scaling:
            return self
        if self.data_parallel_size > 1:
            raise ValueError(
                "autoscaling_config decides on the number of replicas: set min_replicas in it "
                "instead of data_parallel_size"
            )
        if scaling.get("min_replicas", 1) < 1:
            raise ValueError("autoscaling_config: min_replicas must be at least 1")
        target = scaling.get("target_queued_tokens", 1)
        if not isinstance(target, (int, float)) or target <= 0:
            raise ValueError("autoscaling_config: target_queued_tokens must be a positive number")
        return self

    @property
    def min_replicas(self) -> int:
        """Replicas that there are at least."""
        return int(self.autoscaling_config.get("min_replicas", self.data_parallel_size))

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        most = self.max_num_batched_tokens
        if most is not None and most < self.max_num_seqs:  # said before weights are loaded
            raise ValueError(
                f"max_num_batched_tokens ({most}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), as every running sequence gets a token a step"
            )
        return self

    @property
    def effective_routing(self) -> Routing:
        """How requests are routed: a prefix is worth nothing where none is cached."""
        return self.routing if self.enable_prefix_caching else "balanced"

    def names(self) -> list[str]:
        """What the API calls the model; the first is the one answers carry."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model).expanduser()
        return [path.resolve().name.removesuffix(".gguf") if path.exists() else self.model]

    def digest(self) -> str:
        """A name for this very configuration, of this version."""
        text = f"{version('tensorray')} {self.model_dump_json()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def model_digest(self) -> str:
        """A name for what answers: configurations with the same one may go on with each other's
        streams."""
        text = json.dumps([version("tensorray"), *(getattr(self, name) for name in _ANSWERING)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def num_shards(self) -> int:
        """Shards of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def shard(self, rank: int = 0) -> ShardConfig:
        """What a replica's shard is started with."""
        shared = {item.name for item in fields(ShardConfig)}
        values = {name: value for name, value in self if name in shared}
        values["cudagraph_capture_sizes"] = tuple(self.cudagraph_capture_sizes)
        values["speculative_config"] = parse_speculative_config(self.speculative_config)
        values["logits_processors"] = tuple(self.logits_processors)
        return ShardConfig(**values, rank=rank, vocabulary=partial(load_vocabulary, self))

    def scheduler(self, info: ShardInfo) -> Scheduler:
        """The scheduler for a shard that has come up with this config."""
        return Scheduler(
            info.kv,
            max_model_len=info.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=info.step_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
            policy=self.scheduling_policy,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            micro_batches=self.pipeline_parallel_size,
            ahead=info.depth > self.pipeline_parallel_size,
            drafting=info.drafting,
            max_adapters=self.max_loras,
        )

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> EngineConfig:
        """Read a config file; keyword arguments win over its keys."""
        import yaml

        data = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(data, dict):
            raise ValueError(f"{path}: a config file is a mapping of settings")
        return cls(**{**data, **overrides})
