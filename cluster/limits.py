"""What a sequence may have at most, so that it can run at all."""

from __future__ import annotations

from tensorray.cluster.blocks import BlockManager
from tensorray.cluster.request import RequestRefused
from tensorray.cluster.sequence import Sequence


class Limits:
    """By the model, by how many run at once, and by the cache's size, which may change."""

    def __init__(self, max_model_len: int, max_num_seqs: int) -> None:
        self.max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs

    def tokens(self, s: Sequence) -> int:
        """Tokens it may have, its last included, which is never computed; a pooled sequence's is
        not even sampled."""
        return self.max_model_len + bool(s.request.pooling)

    def blocks(self, s: Sequence, pool: BlockManager) -> int:
        """The most blocks it holds on its way to its end: the last token is sampled and never
        computed, so it needs no room in the cache."""
        cached = min(s.max_len, self.tokens(s)) - 1
        beams = s.request.beams
        if beams is None:
            return pool.blocks_needed(cached)
        return pool.blocks_needed_by_beams(s.prompt_len, cached, beams.width)

    def check(self, s: Sequence, pool: BlockManager) -> None:
        """Raises RequestRefused for what can never run, saying what to change."""
        limit = self.tokens(s)
        if not s.prompt_len:
            raise RequestRefused("the prompt is empty; it must have at least one token")
        if min(s.request.prompt) < 0 or max(s.request.prompt) >= 2**32:
            raise RequestRefused("the prompt has token ids outside 0 to 2**32 - 1")
        if s.prompt_len >= limit:
            raise RequestRefused(
                f"the prompt has {s.prompt_len} tokens; with max_model_len {self.max_model_len} "
                f"it can have {limit - 1} at most"
                + ("" if s.request.pooling else ", to leave room for one generated token")
            )
        beams, needed = s.request.beams, self.blocks(s, pool)
        if beams is not None and beams.width > self._max_num_seqs:
            raise RequestRefused(
                f"beam_width ({beams.width}) is more than the {self._max_num_seqs} sequences "
                "that run at once here; ask for fewer beams, or serve with a larger "
                "max_num_seqs"
            )
        if needed <= pool.total:
            return
        generated = min(s.max_len, limit) - s.prompt_len
        larger = "serve with a larger KV cache (kv_cache_memory_bytes or num_kv_blocks)"
        if beams is not None:
            raise RequestRefused(
                f"{beams.width} beams of {s.prompt_len} prompt tokens and up to {generated} "
                f"generated ones may need {needed} KV blocks and the cache has {pool.total}; "
                f"lower beam_width or max_tokens, or {larger}"
            )
        raise RequestRefused(
            f"{s.prompt_len} prompt tokens and up to {generated} generated ones need {needed} KV "
            f"blocks and the cache has {pool.total}, room for "
            f"{pool.longest(s.prompt_len + generated - 1) + 1} tokens in all; shorten the prompt, "
            f"lower max_tokens, or {larger}"
        )
