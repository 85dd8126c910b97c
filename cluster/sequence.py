"""A sequence: one prompt being continued, with all that the scheduler knows about it."""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING

from tensorray.actors.protocol import Sampling
from tensorray.cluster.request import GenerationRequest, Resumed

if TYPE_CHECKING:
    from tensorray.cluster.beam_group import BeamGroup
    from tensorray.cluster.blocks import Table

#: What a draft's chance is taken for before there were any.
OPTIMISM = 0.75

#: A step that never comes: `first_step` of a sequence the shard does not hold.
NEVER = sys.maxsize


class Status(Enum):
    WAITING = "waiting"
    FETCHING = "fetching"  # its prompt's blocks are on their way from another replica
    RUNNING = "running"
    HELD = "held"  # its prompt's blocks are kept for another replica
    FINISHED = "finished"


class Sequence:
    """One of a request's `n` sequences. `seq` is unique while the router lives.

    `computed` counts the leading tokens whose keys and values are in the cache once every plan
    made so far has run; it runs ahead of `tokens` while sampled tokens are still on their way.
    """

    __slots__ = (
        "acceptance",
        "accepted",
        "cached_tokens",
        "charged",
        "computed",
        "drafted",
        "first_step",
        "group",
        "keys",
        "last_prefill",
        "level",
        "max_len",
        "order",
        "pause_at",
        "prolongs",
        "promised",
        "prompt_len",
        "prompt_rows",
        "prompt_rows_given",
        "registered",
        "request",
        "sampling",
        "seq",
        "source",
        "status",
        "stops",
        "tables",
        "target",
        "tokens",
    )

    def __init__(
        self,
        seq: int,
        request: GenerationRequest,
        sampling: Sampling,
        resumed: Resumed | None = None,
    ) -> None:
        self.seq = seq
        self.request = request
        self.sampling = sampling
        # The prompt, then what was generated and told.
        self.tokens = [*request.prompt, *(resumed.tokens if resumed else ())]
        self.prompt_len = len(request.prompt)
        self.max_len = self.prompt_len + request.max_tokens  # the scheduler caps it
        self.stops = frozenset(sampling.stop_token_ids)
        self.cached_tokens = 0  # prompt tokens served from the prefix cache

        # The scheduler's own.
        self.status = Status.WAITING
        self.source = request.source  # that its prompt's blocks are to be fetched from
        self.group: BeamGroup | None = None  # whose beam it is
        # A beam that starts with the tokens of a sequence on the shard: which, and how many.
        self.prolongs: tuple[int, int] | None = None
        self.level = 0  # priority; lower is served first
        self.order = -1  # place in the order of first admission; -1: not admitted yet
        self.first_step = NEVER  # the plan that (re)started it on the shard
        self.last_prefill = -1  # the last plan that ran a chunk of it
        self.computed = 0
        self.target = 0  # tokens known at (re)start: below it prefill, from it on decode
        self.pause_at = 0  # `computed` at which a decode needs more than its next token
        self.charged = len(self.tokens)  # tokens its user's account has been charged for
        self.prompt_rows = 0  # prompt logprobs received since it (re)started
        # And passed on, over all restarts.
        self.prompt_rows_given = resumed.prompt_rows if resumed else 0

        # Speculative decoding's own.
        self.drafted = 0  # tokens guessed for it
        self.accepted = 0  # of these, the ones that were right
        self.acceptance = OPTIMISM  # how likely the next guess is right, as far as is known

        # The block manager's own.
        self.tables: list[Table] = []  # one per kind of KV group, while it runs
        self.keys: list[bytes] = []  # content keys of its leading full pages
        self.registered = 0  # leading pages offered for reuse
        self.promised = 0  # leading pages that others may wait for

    @property
    def rank(self) -> tuple[int, int]:
        """Who yields to whom among the admitted: the smaller goes first."""
        return self.level, self.order

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq}, {self.status.value}, {self.prompt_len}+{self.output_len} tokens)"
        )
