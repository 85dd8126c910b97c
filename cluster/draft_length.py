"""How many tokens to guess for a sequence in the next step: as many as pay.

A step that runs R tokens costs about `1 + row_cost * (R - 1)`, in steps of one token. With B
sequences decoding it yields B tokens, so a token's going price is that cost over B. One more draft
costs `row_cost` and what guessing it takes, and is right only if all before it were. It pays while
its chance exceeds its cost over the going price. A batch that is large by itself leaves drafts
little to gain, and the same rule then asks for few, or none.

The chance of a guess is tracked for each sequence: a running mean over its recent drafts. One that
has none, as they don't pay, becomes more confident with time and so tries again now and then.

A shard that takes plans ahead of their results stands still for a moment where a plan has to wait
for one; and drafts have to, as what they follow is to be known. (Sequences with drafts that take
turns with others, each in every second plan, would cost more: a step reads all weights, whoever is
in it.) So there all drafts together have to gain more than that costs.
"""

from __future__ import annotations

from collections.abc import Collection
from math import log

from tensorray.actors.protocol import Drafting
from tensorray.cluster.sequence import OPTIMISM, Sequence

_MEMORY = 0.85  # what one draft leaves of the weight of those before it
_MISSED = 0.6  # what nothing to guess leaves of the confidence; tries cost two turns
_RECOVERY = 1 / 64  # of the way back to optimism, for a step without drafts
_SUREST = 0.98  # a chance that is never exceeded, as any text ends


class DraftLength:
    """The rule, for one shard. `plan` first, for every plan; then ask."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self._least = 1.0  # a draft's chance from which on it pays

    def plan(self, decodes: int) -> None:
        """A plan of so many decodes is in the making."""
        how = self._drafting
        self._least = 1.0
        if decodes and (how.max_batch is None or decodes <= how.max_batch):
            price = (1 + how.row_cost * (decodes - 1)) / decodes
            # A round of guesses is for all that decode.
            cost = how.row_cost + how.draft_cost + how.round_cost / decodes
            self._least = cost / price

    def waits(self, decoding: Collection[Sequence]) -> bool:
        """Whether this plan is to wait for all results, as the shard could take it ahead of them.
        If it could and is not to wait, nobody has drafts in it."""
        how, batch = self._drafting, len(decoding)
        if not how.wait_cost:
            return False
        gained, drafts, most = 0.0, 0, 0
        for s in decoding:
            if length := self.length(s):
                chance = min(s.acceptance, _SUREST)
                gained += chance * (1 - chance**length) / (1 - chance)
                drafts += length
                most = max(most, length)
        step = 1 + how.row_cost * (batch - 1)
        cost = how.wait_cost + batch * how.sequence_cost + most * how.round_cost
        cost += drafts * (how.row_cost + how.draft_cost)
        if gained * step > batch * cost:
            return True
        self._least = 1.0
        return False

    def length(self, s: Sequence) -> int:
        """Drafts that pay for a sequence."""
        if s.sampling.beam:  # its tokens are chosen elsewhere
            return 0
        chance = min(s.acceptance, _SUREST)
        if chance <= self._least:
            return 0
        return min(int(log(self._least) / log(chance)), self._drafting.max_tokens)

    def awaits(self, s: Sequence) -> bool:
        """Whether drafts pay for a decode that can't have any yet: its last token is on its way."""
        return s.computed >= len(s.tokens) and self.length(s) > 0

    def rest(self, s: Sequence) -> None:
        """It has no room in this plan."""
        s.acceptance += _RECOVERY * max(OPTIMISM - s.acceptance, 0)

    def miss(self, s: Sequence) -> None:
        """There was room, and nothing to guess."""
        s.acceptance *= _MISSED

    def record(self, s: Sequence, drafted: int, accepted: int) -> None:
        """So many of its drafts were right; after the first wrong one none was looked at."""
        s.drafted += drafted
        s.accepted += accepted
        looked_at = accepted + (accepted < drafted)
        keep = _MEMORY**looked_at
        s.acceptance = keep * s.acceptance + (1 - keep) * accepted / looked_at
