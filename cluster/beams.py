"""Beam search: which continuations of a prompt are kept, step by step, and which come out best.

Standard beam search with the rules of transformers' `generate`, so that results are the same:

- Of all beams' continuations the `width` best that do not end live on. One that ends, by a stop
  token or at the most tokens, is kept if it is among the `width` best of its step.
- A finished one's score is the sum of its log-probabilities over its length (generated tokens, the
  stop token included) to the power of `length_penalty`. The `width` best finished ones are kept.
- `early_stopping` True ends the search once there are `width` finished ones; False when the best
  live beam, ending now, would not beat the worst of them; "never" when it could not at any length.

With `groups` above 1, diverse beam search (Vijayakumar et al., arXiv 1610.02424): groups of beams
search in turn, each by the rules above, and a token costs `diversity` for every beam of an earlier
group that has just taken it (Hamming diversity). As in transformers and fairseq the cost stays in
the beam's score; the log-probabilities reported are the model's own.

Nothing here knows of sequences, blocks or devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, pow
from typing import Literal

from tensorray.actors.protocol import Logprobs
from tensorray.cluster.request import BeamSearch


class Beam:
    """A continuation, as its last token and the beam it prolongs; compared by identity."""

    __slots__ = ("cumulative", "entry", "length", "parent", "score")

    def __init__(
        self,
        parent: Beam | None = None,
        entry: Logprobs | None = None,
        cumulative: float = 0.0,
        score: float = 0.0,
    ) -> None:
        self.parent = parent
        self.entry = entry  # its last token; None for the prompt itself
        self.length: int = 0 if parent is None else parent.length + 1  # generated tokens
        self.cumulative = cumulative  # of their log-probabilities
        self.score = score  # `cumulative` less what diversity cost it

    def entries(self, count: int | None = None) -> list[Logprobs]:
        """Its last `count` tokens (None: all generated ones), the oldest first."""
        found: list[Logprobs] = []
        beam: Beam | None = self
        while beam is not None and beam.entry is not None and len(found) != count:
            found.append(beam.entry)
            beam = beam.parent
        found.reverse()
        return found


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation. `score` is what it was ranked by."""

    beam: Beam
    score: float
    finish_reason: Literal["stop", "length"]

    @property
    def entries(self) -> list[Logprobs]:
        return self.beam.entries()


@dataclass(frozen=True)
class _Candidate:
    """A beam and a token that may prolong it."""

    score: float
    beam: Beam
    token: int
    logprob: float
    rank: int


class Search:
    """One prompt's search. `beams` are those whose next tokens it wants to hear about."""

    def __init__(
        self,
        rules: BeamSearch,
        *,
        max_tokens: int,
        stops: frozenset[int],
        alternatives: int = 0,
    ) -> None:
        """`alternatives` is how many of a position's best tokens are kept for the answer."""
        self.root = Beam()
        self._rules = rules
        self._max_tokens = max_tokens
        self._stops = stops
        self._alternatives = alternatives
        self._groups = [_Group(rules.width // rules.groups, self.root) for _ in range(rules.groups)]

    @property
    def beams(self) -> list[Beam]:
        """Those that live, of each group the best first; the root alone before the first step."""
        return list(dict.fromkeys(beam for group in self._groups for beam in group.beams))

    @property
    def begun(self) -> bool:
        return self.beams != [self.root]

    def advance(self, found: Mapping[Beam, Logprobs]) -> None:
        """Take one step with the best next tokens of every live beam.

        Of each there have to be `candidates(rules, stops)`, or all that are possible at all; tokens
        at minus infinity are none.
        """
        taken: Counter[int] = Counter()  # by the groups before
        for group in self._groups:
            if group.beams:
                self._advance(group, found, taken)
            taken.update(beam.entry.token for beam in group.beams if beam.entry is not None)

    def best(self, count: int) -> list[Hypothesis]:
        """The best finished ones, best first; fewer than `count` if no more were possible."""
        finished = [each for group in self._groups for each in group.finished]
        return sorted(finished, key=_score, reverse=True)[:count]

    def _advance(self, group: _Group, found: Mapping[Beam, Logprobs], taken: Counter[int]) -> None:
        rules = self._rules
        ranked = self._ranked(group, found, taken)
        length = group.beams[0].length + 1
        divisor = pow(length, rules.length_penalty)
        live: list[Beam] = []
        finished = group.finished.copy()
        for place, each in enumerate(ranked):
            stops = each.token in self._stops
            if stops or length == self._max_tokens:
                if place < group.width:
                    reason: Literal["stop", "length"] = "stop" if stops else "length"
                    beam = self._prolonged(each, found[each.beam])
                    finished.append(Hypothesis(beam, each.score / divisor, reason))
            elif len(live) < group.width:
                live.append(self._prolonged(each, found[each.beam]))
            elif place >= group.width:
                break
        group.finished = sorted(finished, key=_score, reverse=True)[: group.width]
        group.beams = [] if self._is_done(group, live, length) else live

    def _ranked(
        self, group: _Group, found: Mapping[Beam, Logprobs], taken: Counter[int]
    ) -> list[_Candidate]:
        cost = self._rules.diversity
        candidates = [
            _Candidate(beam.score + logprob - cost * taken[token], beam, token, logprob, rank)
            for beam in group.beams
            for rank, (token, logprob) in enumerate(
                zip(found[beam].top_tokens, found[beam].top_logprobs, strict=True), 1
            )
            if logprob > -inf
        ]
        return sorted(candidates, key=_score, reverse=True)

    def _prolonged(self, candidate: _Candidate, found: Logprobs) -> Beam:
        parent, logprob = candidate.beam, candidate.logprob
        entry = Logprobs(
            candidate.token,
            logprob,
            candidate.rank,
            found.top_tokens[: self._alternatives],
            found.top_logprobs[: self._alternatives],
        )
        return Beam(parent, entry, parent.cumulative + logprob, candidate.score)

    def _is_done(self, group: _Group, live: list[Beam], length: int) -> bool:
        rules = self._rules
        if not live:
            return True
        if len(group.finished) < group.width:
            return False
        if rules.early_stopping is True:
            return True
        if rules.early_stopping == "never" and rules.length_penalty > 0:
            length = self._max_tokens
        best = live[0].score / pow(length, rules.length_penalty)
        return best <= group.finished[-1].score


class _Group:
    """Beams that compete with each other."""

    def __init__(self, width: int, root: Beam) -> None:
        self.width = width
        self.beams = [root]  # none: it is done
        self.finished: list[Hypothesis] = []


def candidates(rules: BeamSearch, stops: int) -> int:
    """How many of a beam's best next tokens a step needs, with so many stop tokens.

    At most `width` of them live on; stop tokens may stand before those; and what diversity makes
    dearer is what at most `width` other beams took, which `width` less a group's own bounds.
    """
    return rules.width + stops


def _score(each: Hypothesis | _Candidate) -> float:
    return each.score
