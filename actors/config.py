"""ShardConfig: what a shard needs to know to come up; plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorray.actors.speculative_config import SpeculativeConfig

if TYPE_CHECKING:  # importing it would bring NumPy to every `tensorray --help`
    from pathlib import Path

    from tensorray.actors.guidance import Vocabulary
    from tensorray.actors.segment_runners import SegmentBackend
    from tensorray.builder.checkpoint.base import Checkpoint
    from tensorray.builder.checkpoint.open import LoadFormat
    from tensorray.builder.model import Layout

#: Tokens a step may run on a CPU where nothing is said; more stall decodes for longer.
DEFAULT_STEP_TOKENS = 512


@dataclass(frozen=True)
class ShardConfig:
    """One shard's model, device, precision, memory and place in its replica.

    See EngineConfig for the fields' meaning. `rank` counts the replica's shards stage by stage.
    """

    model: str
    model_class: str | None = None
    revision: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    download_dir: str | None = None
    offline: bool = False
    load_format: LoadFormat = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"  # "auto", "cpu", "cuda" or "null"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"  # "auto" or "fp8"
    num_threads: int | None = None
    null_step_ms: float = 0.0
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_kv_blocks: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    segment_backend: SegmentBackend = "auto"
    plan_store: str | None = None
    build_plans: bool = False
    enforce_eager: bool = False
    cudagraph_capture_sizes: tuple[int, ...] = ()
    speculative_config: SpeculativeConfig | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    collective_timeout_seconds: float = 300.0
    disable_custom_all_reduce: bool = False
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 16
    rank: int = 0
    logits_processors: tuple[str, ...] = ()  # pkg.module:Class, or path/to/file.py:Class
    # Finds what the model's tokens stand for, when guided decoding first needs it.
    vocabulary: Callable[[], Vocabulary] | None = None

    def step_tokens(self, default: int) -> int:
        """Tokens a step may run; `default` where nothing is said, or a token a sequence."""
        return self.max_num_batched_tokens or max(default, self.max_num_seqs)

    def open(self) -> Checkpoint:
        """The model's checkpoint, as `open_checkpoint` opens it."""
        from tensorray.builder.checkpoint import open_checkpoint

        return open_checkpoint(
            self.model,
            load_format=self.load_format,
            revision=self.revision,
            token=self.hf_token,
            cache_dir=self.download_dir,
            offline=self.offline,
            hf_overrides=self.hf_overrides,
        )

    def guesser(self) -> Path:
        """Where the checkpoint of the speculative config's model is, or is fetched to."""
        from tensorray.builder.checkpoint import resolve_path

        assert self.speculative_config is not None
        return resolve_path(
            str(self.speculative_config.model),
            token=self.hf_token,
            cache_dir=self.download_dir,
            offline=self.offline,
        )

    @property
    def layout(self) -> Layout:
        from tensorray.builder.model import Layout

        whole = Layout(
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            expert_parallel=self.enable_expert_parallel,
        )
        return whole.at(self.rank)
