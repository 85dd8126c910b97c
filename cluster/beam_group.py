"""The sequences of one beam search: which of them continues which beam.

The search begins with one sequence, the *leader*, which runs the prompt. From there on each live
beam has a sequence of its own, a *member*, that shares its blocks with the others as far as they
agree. A step of a beam is the prefill of one known token, so beams run beside whatever else does;
once all members have told their candidates the search takes its step, and the members are handed
out anew: a beam's first heir keeps its sequence, others fork it.

A group that is preempted keeps its search and loses its blocks: its leader runs the prompt again,
and its members what the beams had generated.
"""

from __future__ import annotations

import msgspec

from tensorray.actors.protocol import Logprobs
from tensorray.cluster.beams import Beam, Search
from tensorray.cluster.blocks import BlockManager
from tensorray.cluster.sequence import NEVER, Sequence


class BeamGroup:
    """A search and its sequences. Members' numbers are the leader's and those that follow it."""

    def __init__(self, leader: Sequence) -> None:
        rules = leader.request.beams
        assert rules is not None
        self.leader = leader
        self.width = rules.width
        self.search = Search(
            rules,
            max_tokens=leader.max_len - leader.prompt_len,
            stops=leader.stops,
            alternatives=rules.alternatives,
        )
        self.running = False  # admitted: it takes `width` slots
        self.members: dict[Beam, Sequence] = {}
        self._all = [leader]
        self._first_sampling = leader.sampling
        # The prompt is the leader's to score.
        self._sampling = msgspec.structs.replace(leader.sampling, prompt_logprobs=None)
        self._found: dict[Beam, Logprobs] = {}
        leader.group = self
        self.lead()

    def lead(self) -> None:
        """Leave it to the leader again to run the prompt. Nobody may hold blocks."""
        leader = self.leader
        leader.tokens = [*leader.request.prompt]
        leader.charged = leader.prompt_len
        leader.keys.clear()
        leader.sampling = self._first_sampling
        leader.prolongs = None
        self._found = {}
        self.running = False
        self.members = {self.search.root: leader}

    def hear(self, s: Sequence, found: Logprobs) -> bool:
        """Take in the best next tokens of a member; whether it was the last one to tell them.

        If so the search has taken its step, unless it had before a preemption.
        """
        beam = next(beam for beam, member in self.members.items() if member is s)
        self._found[beam] = found
        if len(self._found) < len(self.members):
            return False
        if beam is not self.search.root or not self.search.begun:
            self.search.advance(self._found)
        self._found = {}
        return True

    def hand_out(self, blocks: BlockManager) -> None:
        """Give every live beam a member, with the tables of the one that it prolongs."""
        heirs: dict[Sequence, list[Beam]] = {}
        for beam in self.search.beams:
            heirs.setdefault(self._parent(beam), []).append(beam)
        for s in self.members.values():
            if s not in heirs:
                blocks.release(s)
        spare = [s for s in self._all if s not in heirs]
        self.members = {}
        for parent, (first, *others) in heirs.items():
            for beam in others:
                child = spare.pop() if spare else self._another()
                blocks.fork(parent, child)
                child.tokens = parent.tokens.copy()
                self._give(child, beam, parent)
            self._give(parent, first, parent)

    def _parent(self, beam: Beam) -> Sequence:
        if (leader := self.members.get(self.search.root)) is not None:
            return leader
        assert beam.parent is not None
        return self.members[beam.parent]

    def _give(self, s: Sequence, beam: Beam, parent: Sequence) -> None:
        self.members[beam] = s
        s.prolongs = parent.seq, len(s.tokens)
        s.tokens += [entry.token for entry in beam.entries(beam.length - s.output_len)]
        s.target = len(s.tokens)
        s.charged = s.target - 1  # a step costs a token for each beam
        s.sampling = self._sampling

    def _another(self) -> Sequence:
        leader = self.leader
        s = Sequence(leader.seq + len(self._all), leader.request, self._sampling)
        s.group = self
        s.level, s.order, s.max_len = leader.level, leader.order, leader.max_len
        s.first_step = NEVER
        self._all.append(s)
        return s
