"""Beams start anew in every step: what their starts leave out, because the shard knows it."""

from __future__ import annotations

import msgspec

from tensorray.actors.protocol import StepPlan


class BeamStarts:
    """The tokens of running beams, which starts that prolong one of them begin with."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}

    def complete(self, plan: StepPlan) -> StepPlan:
        """The plan with whole starts. Every plan is to come here, before it is run.

        Raises KeyError for a start that prolongs no beam that was running up to this plan.
        """
        if not plan.starts and not self._tokens:
            return plan
        starts = [
            start
            if start.prolongs is None
            else msgspec.structs.replace(
                start, tokens=self._tokens[start.prolongs] + start.tokens, prolongs=None
            )
            for start in plan.starts
        ]
        for seq in plan.ends:
            self._tokens.pop(seq, None)
        self._tokens.update((start.seq, start.tokens) for start in starts if start.sampling.beam)
        return msgspec.structs.replace(plan, starts=starts)
