"""A scheduler with a content shard behind it, and the checks that hold at every moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Any

import msgspec

from helpers.content_shard import ContentShard, generate_alone, search_alone
from tensorray.actors.protocol import KVGroups, Sampling, StepPlan, StepResult
from tensorray.cluster.beams import candidates
from tensorray.cluster.blocks import Page
from tensorray.cluster.request import BeamSearch, GenerationRequest, RequestRefused
from tensorray.cluster.scheduler import Progress, Scheduler
from tensorray.cluster.sequence import Sequence, Status


class Rig:
    """Drives a scheduler step by step, `depth` plans ahead, and keeps what came out."""

    def __init__(
        self,
        windows: Iterable[int | None] = (None,),
        *,
        num_blocks: int = 1000,
        block_size: int = 4,
        max_model_len: int = 1000,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 256,
        depth: int = 1,
        luck: Random | None = None,
        **options: Any,
    ) -> None:
        kv = KVGroups(list(windows), num_blocks, block_size)
        self.scheduler = Scheduler(
            kv,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            **options,
        )
        self.shard = ContentShard(kv, max_num_seqs, max_num_batched_tokens, luck=luck)
        self.depth = depth
        self.steps = 0  # results taken in
        self.sequences: dict[int, Sequence] = {}  # all ever added
        self._next_sequence = 0
        self.outputs: dict[int, list[int]] = {}
        self.found: dict[int, list[tuple[list[int], float]]] = {}  # by beam searches
        self.first_token_step: dict[int, int] = {}
        self.finished: dict[int, str] = {}
        self.end_step: dict[int, int] = {}
        self._on_the_way: deque[StepResult] = deque()

    def sequence(self, prompt: Iterable[int], max_tokens: int = 8, **fields: Any) -> Sequence:
        """A new sequence, not added yet; keywords go to its sampling or else its request."""
        known = set(Sampling.__struct_fields__)
        beams: BeamSearch | None = fields.get("beams")
        if beams is not None:
            count = candidates(beams, len(fields.get("stop_token_ids", ())))
            fields |= {"beam": True, "logprobs": count}
        sampling = Sampling(**{key: fields.pop(key) for key in list(fields) if key in known})
        seq = self._next_sequence
        self._next_sequence += 1 if beams is None else beams.width
        request = GenerationRequest(f"r{seq}", list(prompt), sampling, max_tokens, **fields)
        s = self.sequences[seq] = Sequence(seq, request, sampling)
        return s

    def add(self, prompt: Iterable[int], max_tokens: int = 8, **fields: Any) -> int:
        s = self.sequence(prompt, max_tokens, **fields)
        try:
            self.scheduler.add(s)
        except RequestRefused:
            del self.sequences[s.seq]
            raise
        self.outputs[s.seq] = []
        return s.seq

    def cancel(self, seq: int) -> None:
        if self.scheduler.cancel(seq):
            self.finished[seq] = "abort"

    def schedule(self, fail: Iterable[int] = ()) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self._on_the_way.append(self.shard.execute(plan, fail))
        return plan

    @property
    def in_flight(self) -> int:
        return len(self._on_the_way)

    def update(self) -> list[Progress]:
        progress = self.scheduler.update(self._on_the_way.popleft())
        self.steps += 1
        for gain in progress:
            seq = gain.sequence.seq
            assert seq not in self.finished, "news of a sequence that had ended"
            if gain.token is not None:
                self.outputs[seq].append(gain.token)
                self.first_token_step.setdefault(seq, self.steps)
            if gain.hypotheses is not None:
                self.found[seq] = [
                    ([entry.token for entry in each.entries], each.score)
                    for each in gain.hypotheses
                ]
                self.finished[seq] = "found"
            if gain.finish_reason is not None:
                self.finished[seq] = gain.finish_reason
                self.end_step[seq] = self.steps
        return progress

    def step(self) -> list[Progress]:
        """Plan ahead as far as `depth` allows, then take one result in."""
        while self.in_flight < self.depth and self.schedule() is not None:
            pass
        return self.update() if self.in_flight else []

    def run(self, limit: int = 10_000) -> None:
        """Step until all sequences have ended."""
        for _ in range(limit):
            if not self.scheduler.unfinished and not self.in_flight:
                break
            before = self.steps
            self.step()
            assert self.steps > before, "nothing runs, but not everything has ended"
        assert not self.scheduler.unfinished, "something did not end"

    def lose_shard(self, **changes: Any) -> None:
        """The shard dies, results on the way with it; another takes its place, whose cache may
        have other figures (fields of KVGroups)."""
        kv = msgspec.structs.replace(self.shard.kv, **changes)
        limits = (self.shard.max_num_seqs, self.shard.max_num_batched_tokens)
        next_step, luck = self.shard.next_step, self.shard.luck
        self.shard = ContentShard(kv, *limits, luck=luck)
        self.shard.next_step = next_step
        self._on_the_way.clear()
        for s in self.scheduler.restart(kv):
            self.finished[s.seq] = "error"

    # --- checks ----------------------------------------------------------------------------

    def check_books(self) -> None:
        """Every block is in one place, and every page counted as often as it is referred to."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        places: dict[Page, list[tuple[Sequence, int]]] = {}
        unfinished = scheduler._sequences.values()
        running = [s for s in unfinished if s.status is not Status.WAITING]
        gone = [each.sequence for each in scheduler._fetching]
        gone = [s for s in gone if s.status is Status.FINISHED]  # cancelled in mid-fetch
        groups = [group for group in scheduler._groups.values() if group.running]
        assert {s for s in running if s.group} == {s for g in groups for s in g.members.values()}
        for s in [*running, *gone]:
            assert [table.kind for table in s.tables] == blocks._kinds
            for table in s.tables:
                for column, page in enumerate(table.pages):
                    assert (page is None) == (column < table.trimmed)
                    if page is not None:
                        assert page.kind is table.kind
                        places.setdefault(page, []).append((s, column))
        for s in {*self.sequences.values(), *unfinished}:
            if s not in running and s not in gone:
                assert not s.tables

        free, idle = blocks._free, blocks._idle
        assert not idle.keys() & places.keys()
        everywhere = [*free, *(block for page in [*idle, *places] for block in page.blocks)]
        assert sorted(everywhere) == list(range(1, blocks.total + 1))
        assert blocks._idle_blocks == sum(len(page.blocks) for page in idle)

        # Only what is full and findable is shared, at the same column and with the same content;
        # but for the beams of a search, which share all they have in common.
        for page, holders in places.items():
            assert page.refs == len(holders)
            assert len(page.blocks) == len(page.kind.groups)
            (column,) = {column for _, column in holders}
            if len(holders) > 1 and len({s.group for s, _ in holders}) == 1:
                last = (column + 1) * blocks.block_size
                assert len({tuple(s.tokens[: min(last, s.computed)]) for s, _ in holders}) == 1
            elif len(holders) > 1:
                assert {s.keys[column] for s, _ in holders} == {page.key}
        for page in idle:
            assert page.refs == 0
            assert page.key is not None
        for kind in blocks._kinds:
            for key, page in kind.found.items():
                assert page.key == key
                assert page.kind is kind
                assert page in idle or page in places
        assert set(blocks._coming.values()) <= {*running, *gone}

        stats = scheduler.stats()
        assert stats.running == len(running) <= scheduler._max_num_seqs - len(gone)
        in_tables = sum(len(page.blocks) for page in places)
        assert stats.free_blocks + in_tables == stats.total_blocks
        assert stats.running + stats.waiting == scheduler.unfinished

    def check_outputs(self) -> None:
        """Whatever ended by itself generated what it would have generated alone."""
        for seq, reason in self.finished.items():
            s = self.sequences[seq]
            limit = self.scheduler._limits.max_model_len - s.prompt_len
            if s.request.beams is not None:
                if reason == "found":
                    prompt, most = s.request.prompt, min(s.request.max_tokens, limit)
                    n, rules = s.request.n, s.request.beams
                    assert self.found[seq] == search_alone(prompt, s.sampling, rules, most, n)
                continue
            alone = generate_alone(s.request.prompt, s.sampling, min(s.request.max_tokens, limit))
            if reason in ("stop", "length"):
                assert self.outputs[seq] == alone
                stopped = alone[-1] in s.sampling.stop_token_ids
                stopped = stopped and len(alone) > s.sampling.min_tokens
                assert reason == ("stop" if stopped else "length")
            else:
                assert self.outputs[seq] == alone[: len(self.outputs[seq])]

    def check_released(self) -> None:
        """Nothing is left behind once everything has ended."""
        stats = self.scheduler.stats()
        assert stats.running == stats.waiting == 0
        assert stats.free_blocks == stats.total_blocks
        assert not self.scheduler.blocks._coming
        # The shard still holds what the next plan's ends will name, and nothing else.
        assert sorted(self.shard.states) == sorted(self.scheduler._ends)
