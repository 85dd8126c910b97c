"""From a config to the drafter it asks for, loaded and checked against the model."""

from __future__ import annotations

import numpy as np

from tensorray.actors.config import ShardConfig
from tensorray.actors.draft_cache import DraftCache
from tensorray.actors.draft_model import DraftModel, define_draft_model
from tensorray.actors.drafter import Drafter
from tensorray.actors.eagle import EagleDraft
from tensorray.actors.eagle_parts import EagleParts, load_eagle
from tensorray.actors.lookup_drafter import LookupDrafter
from tensorray.actors.medusa import MedusaHeads, open_medusa
from tensorray.actors.protocol import Drafting, KVGroups
from tensorray.actors.speculation import Speculation
from tensorray.actors.speculative_config import SpeculativeConfig
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Model, ShardWeights
from tensorray.builder.models.eagle import Eagle, Eagle3

#: What one more token adds to a step on a CPU, of a step with one: weights are read once for up to
#: six rows, and from there on the products take the time (tests/benchmarks/bench_step.py).
CPU_ROW_COST = 0.08


class OpenSpeculation:
    """A drafter that waits for the KV cache to be sized."""

    def __init__(self, config: ShardConfig, model: Model, weights: ShardWeights) -> None:
        """Load what the config's drafter needs: on the rank that samples, as the others are told.

        `weights` are the model's own. Raises CheckpointError, ModelConfigError or ValueError saying
        what does not fit.
        """
        assert config.speculative_config is not None
        self._how: SpeculativeConfig = config.speculative_config
        self._config = config
        self._model = model
        self._weights = weights
        self._small: Model | None = None  # with a cache of its own
        self._eagle: EagleParts | None = None
        self._drafter: Drafter | None = None
        self._cost = 0.0
        if model.layout.pp_size > 1:
            raise ValueError("--speculative-config: a pipeline of several stages can't speculate")
        if model.layout.rank != model.layout.sampler:
            return
        if self._how.method == "ngram":
            self._drafter = LookupDrafter(self._how.prompt_lookup_min, self._how.prompt_lookup_max)
        elif self._how.method == "medusa":
            self._drafter = self._load_medusa()
        elif self._how.method in ("eagle", "eagle3"):
            self._load_eagle()
        else:
            self._load_small()

    def share(self, block_bytes: int) -> float:
        """The part of the KV cache's memory that blocks of `block_bytes` of the model may have."""
        if self._small is None:
            return 1.0
        own = DraftCache.block_bytes(self._small, self._config.block_size)
        return block_bytes / (block_bytes + own)

    def close(self, groups: KVGroups, max_model_len: int, step_tokens: int) -> Speculation:
        """The speculation of a shard whose cache has this shape."""
        if self._eagle is not None:
            self._drafter = EagleDraft(
                self._eagle, groups, cost=self._cost, max_model_len=max_model_len
            )
        elif self._small is not None:
            self._drafter = DraftModel(
                self._small,
                self._small_weights,
                groups,
                cost=self._cost,
                max_model_len=max_model_len,
                step_tokens=step_tokens,
            )
        most = self._how.num_speculative_tokens
        cost = 0.0
        if self._drafter is not None:
            most = min(most, self._drafter.most or most)
            cost = self._drafter.cost
        drafting = Drafting(most, CPU_ROW_COST, cost, self._how.disable_by_batch_size)
        return Speculation(drafting, self._drafter)

    def _load_medusa(self) -> MedusaHeads:
        model = self._model
        heads = open_medusa(self._config.guesser(), model)
        whole = plan_bytes(model, dtype=np.float32)
        cost = sum(head.nbytes for head in heads) / len(heads) / whole
        return MedusaHeads(heads, model, self._weights.head, cost=cost)

    def _load_eagle(self) -> None:
        kind = Eagle3 if self._how.method == "eagle3" else Eagle
        checkpoint = open_checkpoint(str(self._config.guesser()))
        try:
            self._eagle = load_eagle(
                kind, checkpoint, self._model, self._weights, self._config.open
            )
        finally:
            checkpoint.close()
        self._small = self._eagle.draft
        self._cost = self._eagle.nbytes / plan_bytes(self._model, dtype=np.float32)

    def _load_small(self) -> None:
        checkpoint = open_checkpoint(str(self._config.guesser()))
        try:
            small = define_draft_model(checkpoint, self._model.vocab_size)
            self._small_weights = load_weights(small, checkpoint, dtype=np.float32)
        finally:
            checkpoint.close()
        self._small = small
        sizes = plan_bytes(small, dtype=np.float32), plan_bytes(self._model, dtype=np.float32)
        self._cost = sizes[0] / sizes[1]
