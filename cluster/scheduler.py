"""The scheduler: decides, step by step, which sequences run and how many tokens each.

In-flight batching (Orca, Yu et al., OSDI 2022) with chunked prefill (Sarathi-Serve, arXiv
2403.02310) over a paged cache (arXiv 2309.06180). Each plan is made in this order:

1. Every running decode gets its next token.
2. Waiting sequences are admitted while there are slots and their known tokens fit the cache.
3. The rest of the token budget goes to prefills: half of it to the oldest, which so always gets
   on, the other half to those with the least left, so that a short prompt passes long ones.

When blocks run out, the running sequence that ranks last (lowest priority, then admitted last)
loses its blocks and waits, ahead of new ones, to be computed again; one that ranks last itself
stands still instead. So the first in rank always advances and everything ends.

Plans may be made ahead: `schedule` may be called again before `update` has seen the earlier
results. A decode is then planned with its input token unknown (the shard feeds its own sample);
where a result shows that the sequence had ended, later results for it are dropped. A result
belongs to a sequence's present life only if its step is not before `first_step`; a sequence the
shard does not hold has `first_step` NEVER, so whatever still arrives for it is dropped too.

Where the shard drafts, a decode may have room in a plan for tokens that are guessed. How many of
them were right only the result says, so that such a sequence is in one plan at a time; where plans
are made ahead and guesses gain more than that does, every plan waits for the results. Room is what
is left over: of the token budget, and of the blocks. What wrong guesses leave in the cache is
written over by what follows.

A prompt's blocks may come from another replica, which has prefilled it. Such a sequence is admitted
with blocks that are fetched while others run. They are in nobody's plan meanwhile, and nobody may
have them until the fetch has ended, whatever becomes of the sequence. One that fails is a
preemption: the prompt is computed after all. The other side is a sequence that is held: off the
plans since its first token, but on the shard's books, until it is cancelled.

A beam search's sequences (beam_group.py) advance together: each of its steps is the prefill of one
token, and they wait until all of them have told what may come next. They are admitted, preempted
and ended together too, and take as many slots as the search is wide from its admission on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import msgspec

from tensorray.actors.protocol import (
    Drafting,
    KVGroups,
    Logprobs,
    SequenceStart,
    StepPlan,
    StepResult,
)
from tensorray.cluster.adapter_room import AdapterRoom
from tensorray.cluster.beam_group import BeamGroup
from tensorray.cluster.beams import Hypothesis
from tensorray.cluster.blocks import BlockManager
from tensorray.cluster.draft_length import DraftLength
from tensorray.cluster.fairness import AdmissionQueue
from tensorray.cluster.fetches import Fetch, Fetches, given_columns
from tensorray.cluster.limits import Limits
from tensorray.cluster.prefill_shares import shares
from tensorray.cluster.request import FinishReason, QueueFull
from tensorray.cluster.sequence import NEVER, Sequence, Status


class Progress(msgspec.Struct, gc=False):
    """What one step brought one sequence."""

    sequence: Sequence
    token: int | None = None  # None: it only got prompt logprobs, or failed
    logprobs: Logprobs | None = None
    prompt_logprobs: list[Logprobs] | None = None  # for prompt tokens 1.., each once, in order
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token id that ended it (equal to `token`)
    error: str = ""  # with finish_reason "error"
    refused: bool = False  # with `error`: by what the request asks for
    pooled: bytes = b""  # all that a pooled sequence brings, when it ends
    # Of a beam search, whose `sequence` is its leader: what it has found, when it has ended.
    hypotheses: list[Hypothesis] | None = None
    lent: list[list[int]] | None = None  # it is held from now on, with these blocks: Source.blocks


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for metrics. Counters count from the start."""

    running: int
    waiting: int
    total_blocks: int
    free_blocks: int  # can be handed out; includes the cached ones
    cached_blocks: int  # unreferenced, kept for reuse
    prefix_queries: int  # counter: prompt tokens looked up in the prefix cache
    prefix_hits: int  # counter: prompt tokens found there
    preemptions: int  # counter
    prefill_tokens: int  # in the last plan
    decode_tokens: int  # in the last plan
    drafts: int = 0  # counter: times that tokens were guessed for a sequence
    draft_tokens: int = 0  # counter: tokens guessed
    accepted_tokens: int = 0  # counter: of these, the ones that were right


class Scheduler:
    """Decides what every step runs. Knows no device, no clock and no network.

    `max_num_batched_tokens` bounds a plan's tokens, `max_num_seqs` the sequences running at once.
    `policy` "fcfs" ignores requests' priorities; "priority" lets a lower value run first, and
    preempt. `max_waiting` bounds the sequences that wait beyond the free slots,
    `max_waiting_tokens` the tokens they have, which take memory; a sequence alone may have more.

    At most `max_adapters` different LoRA adapters run at once; who needs another one waits.

    With `micro_batches` above 1 the decodes are shared out over that many plans, for a pipeline
    whose stages work on one plan each: a sequence is in one plan at a time, or, with `ahead`, in
    its next one before its last token is known, as without micro-batches, but then in none that
    comes so soon that a stage would wait for that token, unless there is nothing else to run.

    `drafting` says how the shard drafts, if it does (and `micro_batches` is 1 then).
    """

    def __init__(
        self,
        kv: KVGroups,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        policy: Literal["fcfs", "priority"] = "fcfs",
        max_waiting: int = 4096,
        max_waiting_tokens: int = 1 << 23,
        micro_batches: int = 1,
        ahead: bool = False,
        max_adapters: int = 8,
        drafting: Drafting | None = None,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}), so that every running sequence can advance in every step"
            )
        self.blocks = BlockManager(kv, enable_prefix_caching=enable_prefix_caching)
        self._limits = Limits(max_model_len, max_num_seqs)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_adapters = max_adapters
        self._priorities = policy == "priority"
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._micro_batches = micro_batches
        self._ahead = ahead and micro_batches > 1
        self._drafts = None if drafting is None else DraftLength(drafting)

        self._sequences: dict[int, Sequence] = {}  # all unfinished ones
        self._waiting = AdmissionQueue()
        self._prefilling: list[Sequence] = []  # admitted, known tokens not all planned yet
        self._decoding: list[Sequence] = []
        self._held: set[Sequence] = set()
        self._fetching = Fetches()
        self._groups: dict[int, BeamGroup] = {}  # unfinished beam searches, by their leaders
        self._guessing: dict[Sequence, int] = {}  # with drafts in a plan that is out: which
        self._admitted = 0
        self._step = 0
        # Plans whose results are not back: (step, [(sequence, tokens cached after its chunk)], and,
        # with `ahead`, all that it runs).
        self._in_flight: deque[tuple[int, list[tuple[Sequence, int]], set[Sequence]]] = deque()

        # For the plan in the making.
        self._ends: list[int] = []
        self._new_blocks: dict[int, list[list[int]]] = {}
        self._copies: dict[int, list[tuple[int, int]]] = {}  # of blocks, by the sequence they serve

        self._prefix_queries = 0
        self._prefix_hits = 0
        self._preemptions = 0
        self._drafted = [0, 0, 0]  # times, tokens, tokens that were right
        self._prefill_tokens = 0
        self._decode_tokens = 0

    # --- what the engine calls ---------------------------------------------------------------

    def add(self, *sequences: Sequence, always: bool = False) -> None:
        """Queue sequences: all of them or, when this raises, none.

        RequestRefused: one of them can never run here. QueueFull: too many wait already, which
        does not keep out what has to be taken `always`.
        """
        for s in sequences:
            if s.seq in self._sequences:
                raise ValueError(f"sequence id {s.seq} is in use")
            self._limits.check(s, self.blocks)
        count = sum(_slots(s) for s in sequences)
        if count > self._places and not always:
            raise QueueFull(
                f"{len(self._waiting)} sequences wait already and {count} more would "
                f"exceed max_waiting ({self._max_waiting}); try again later"
            )
        known = self._waiting.known_tokens
        added = sum(len(s.tokens) for s in sequences)
        if known and known + added > self._max_waiting_tokens and not always:
            raise QueueFull(
                f"{known} tokens wait already and {added} more would exceed max_waiting_tokens "
                f"({self._max_waiting_tokens}); try again later"
            )
        for s in sequences:
            s.max_len = min(s.max_len, self._limits.tokens(s))
            if s.request.hand_over:
                s.max_len = min(s.max_len, len(s.tokens) + 1)
            s.level = s.request.priority if self._priorities else 0
            if s.request.beams is not None:
                self._groups[s.seq] = BeamGroup(s)
            self._sequences[s.seq] = s
            self._waiting.add(s)

    def cancel(self, seq: int) -> bool:
        """Forget a sequence, or the beam search it leads; its blocks are free at once. False if it
        had ended already."""
        group = self._groups.get(seq)
        if group is not None:
            self._end_group(group)
            return True
        s = self._sequences.get(seq)
        if s is None:
            return False
        if s.status is Status.WAITING:
            self._waiting.remove(s)
        elif s.status is Status.FETCHING:
            s.status = Status.FINISHED
            del self._sequences[seq]
            return True  # `fetched` gives its blocks back
        elif s.status is Status.HELD:
            self._held.remove(s)
        elif s.computed < s.target:
            self._prefilling.remove(s)
        else:
            self._decoding.remove(s)
        self._finish(s)
        return True

    def fetches(self) -> list[Fetch]:
        """What is to be fetched from now on, each told once; its end must reach `fetched`."""
        return self._fetching.begin(self._in_flight[0][0] if self._in_flight else self._step)

    @property
    def wants_fetches(self) -> bool:
        """Whether anything is still to be told by `fetches`."""
        return self._fetching.wants_begin

    def fetched(self, seq: int, came: bool) -> None:
        """A fetch has ended, and writes no more. One from before a restart is ignored."""
        fetch = self._fetching.end(seq)
        if fetch is None:
            return
        s = fetch.sequence
        if s.status is Status.FINISHED:
            self.blocks.release(s)
        elif came:
            s.source = None  # it is not held for a second time
            s.computed = fetch.given * self.blocks.block_size
            self.blocks.register(s, s.computed)
            s.status = Status.RUNNING
            s.last_prefill = self._step
            self._prefilling.append(s)
        else:
            self.blocks.release(s)
            s.source = None
            s.status = Status.WAITING
            self._waiting.put_back(s)

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when nothing can run before the next `update` or `add`.

        A plan's result must reach `update`, in the order of the plans. Ends of sequences travel
        with the next plan that runs something.
        """
        if self._drafts is not None:
            self._drafts.plan(len(self._decoding))
            if self._drafts.waits(self._decoding) and self._in_flight:
                return None
        self._new_blocks = {}
        self._copies = {}
        for s in self._prefilling:
            self.blocks.trim(s)
        resting = self._others_turn() if self._micro_batches > 1 else set()
        if self._drafts is not None:
            resting |= {s for s in self._decoding if self._drafts.awaits(s)}
            # Whether drafts pay may have changed since; how far these have come is still not known.
            resting.update(self._guessing)
        stuck = self._extend_decodes(resting)
        if stuck and resting and self._micro_batches > 1 and not self._in_flight:
            # Those whose turn it is stand still, and no result will change that: all may go.
            stuck |= self._extend_decodes(stuck)
            resting = set()
        resting |= stuck
        self._admit()
        chunks = self._share_out(resting) if self._prefilling else []

        # From here on nothing is preempted any more.
        decoding = _without(self._decoding, resting)
        if self._micro_batches > 1:
            self._decoding = [s for s in self._decoding if s in resting] + decoding
        seqs = [s.seq for s in decoding]
        counts = [1] * len(seqs)
        if self._drafts is not None:
            taken = len(seqs) + sum(count for _, count in chunks)
            self._leave_room(self._drafts, decoding, counts, self._max_num_batched_tokens - taken)
        for s in decoding:
            s.computed += 1
        self._decode_tokens = len(seqs)
        self._prefill_tokens = 0
        starts: list[SequenceStart] = []
        reached: list[tuple[Sequence, int]] = []
        for s, count in chunks:
            if s.first_step == NEVER:
                s.first_step = self._step
                prolongs, known = None, 0
                # The shard knows a beam's tokens up to the plan that ends it.
                if s.prolongs is not None and s.prolongs[0] in self._ends:
                    prolongs, known = s.prolongs
                starts.append(
                    SequenceStart(
                        seq=s.seq,
                        tokens=s.tokens[known:],
                        prolongs=prolongs,
                        prompt_len=s.prompt_len,
                        computed=s.computed,
                        blocks=self.blocks.block_tables(s),
                        sampling=s.sampling,
                        adapter=s.request.adapter,
                        pooling=s.request.pooling,
                        prediction=s.request.prediction,
                    )
                )
            seqs.append(s.seq)
            counts.append(count)
            s.computed += count
            s.last_prefill = self._step
            self._prefill_tokens += count
            reached.append((s, s.computed))
            if s.computed == s.target:
                s.pause_at = s.computed
                self._prefilling.remove(s)
                if s.group is None:  # else the others of its search are waited for
                    self._decoding.append(s)
        if not seqs:
            return None

        plan = StepPlan(
            step=self._step,
            seqs=seqs,
            counts=counts,
            starts=starts,
            new_blocks=self._new_blocks,
            ends=self._ends,
            copies=[copy for copies in self._copies.values() for copy in copies],
        )
        ran = {*decoding, *(s for s, _ in chunks)} if self._ahead else set()
        self._in_flight.append((self._step, reached, ran))
        self._ends = []
        self._step += 1
        return plan

    def update(self, result: StepResult) -> list[Progress]:
        """Take a step's result in: what it brought to each sequence that still wants it.

        Raises ValueError when the result is not the oldest plan's that is out.
        """
        step = result.step
        if not self._in_flight or self._in_flight[0][0] != step:
            expected = self._in_flight[0][0] if self._in_flight else "none"
            raise ValueError(f"result of step {step} out of order, expected {expected}")
        _, reached, _ = self._in_flight.popleft()
        if self._guessing:
            self._guessing = {s: plan for s, plan in self._guessing.items() if plan > step}
        progress: list[Progress] = []
        ended: list[Sequence] = []
        sequences = self._sequences

        for seq, reason in result.failed.items():
            s = sequences.get(seq)
            if s is not None and step >= s.first_step:
                if s.group is not None:
                    self._end_group(s.group, forget=True)
                    s = s.group.leader
                else:
                    ended.append(s)
                    self._finish(s, forget=True)
                refused = seq in result.refused
                progress.append(Progress(s, finish_reason="error", error=reason, refused=refused))
        for s, confirmed in reached:
            if step >= s.first_step:
                self.blocks.register(s, confirmed)

        for seq, vector in result.pooled.items():
            s = sequences.get(seq)
            if s is not None and step >= s.first_step:
                ended.append(s)
                self._finish(s)
                progress.append(Progress(s, finish_reason="stop", pooled=vector))
        rows = self._prompt_rows(result) if result.prompt_logprobs else {}
        logprobs = result.logprobs
        further = self._take_drafts(result) if result.drafted else {}
        for seq, token in zip(result.seqs, result.tokens, strict=True):
            s = sequences.get(seq)
            if s is None or step < s.first_step:
                continue
            if s.group is not None:
                gain = self._hear(s, s.group, logprobs[seq])
                gain.prompt_logprobs = rows.pop(seq, None)
                progress.append(gain)
                continue
            tokens = s.tokens
            tokens.append(token)
            gain = Progress(s, token)
            progress.append(gain)
            if logprobs:
                gain.logprobs = next(further[seq]) if seq in further else logprobs.get(seq)
            if rows:
                gain.prompt_logprobs = rows.pop(seq, None)
            if token in s.stops and s.output_len > s.sampling.min_tokens:
                gain.finish_reason = "stop"
                gain.stop_token = token
            elif len(tokens) >= s.max_len:
                asked = min(s.prompt_len + s.request.max_tokens, self._limits.tokens(s))
                if s.request.hand_over and len(tokens) < asked:
                    gain.lent = self.blocks.lent(s)
                    s.status = Status.HELD
                    self._held.add(s)
                    ended.append(s)
                    continue
                gain.finish_reason = "length"
            else:
                continue
            ended.append(s)
            self._finish(s)
        progress.extend(
            Progress(sequences[seq], prompt_logprobs=gained) for seq, gained in rows.items()
        )

        if ended:
            self._decoding = [s for s in self._decoding if s.status is Status.RUNNING]
            self._prefilling = [s for s in self._prefilling if s.status is Status.RUNNING]
        return progress

    def restart(self, kv: KVGroups) -> list[Sequence]:
        """The shards have lost every sequence, and have a cache of this shape now.

        What ran waits again, ahead of what is new, to be computed from the tokens it has; results
        on the way are not to come. Returns the sequences that will never fit the new cache; they
        are forgotten.
        """
        for group in self._groups.values():
            if group.running:
                self._fold(group)
        self._in_flight.clear()
        self._guessing = {}
        self._ends = []
        self._new_blocks = {}
        self._copies = {}
        self.blocks = BlockManager(kv, enable_prefix_caching=self.blocks.enable_prefix_caching)
        ran = self._prefilling + self._decoding
        fetching = [each.sequence for each in self._fetching]
        ran += [s for s in fetching if _fetches(s)]
        for s in fetching:
            s.source = None  # the fetch may be what the shards failed of
        self._prefilling, self._decoding = [], []
        for s in [*self._held, *(s for s in fetching if not _fetches(s))]:
            self._sequences.pop(s.seq, None)
            s.tables = []
            s.status = Status.FINISHED
        self._held, self._fetching = set(), Fetches()
        for s in ran:
            s.tables = []
            s.computed = s.registered = s.promised = 0
            s.first_step = NEVER
            s.status = Status.WAITING
            self._waiting.put_back(s)
        unfit = [
            s
            for s in self._sequences.values()
            if self._limits.blocks(s, self.blocks) > self.blocks.total
        ]
        for s in unfit:
            self.cancel(s.seq)
        return unfit

    @property
    def unfinished(self) -> int:
        """Sequences that are running or waiting."""
        return len(self._sequences)

    def leader(self, seq: int) -> int:
        """The leader of the beam search that a sequence belongs to, or itself."""
        s = self._sequences.get(seq)
        return seq if s is None or s.group is None else s.group.leader.seq

    @property
    def queued_tokens(self) -> int:
        """Known tokens that no plan has computed yet, of sequences that wait or prefill."""
        return self._waiting.tokens + sum(s.target - s.computed for s in self._prefilling)

    @property
    def room(self) -> int:
        """Sequences that could be added now; of few tokens, if many wait already."""
        full = self._waiting.known_tokens >= self._max_waiting_tokens
        return 0 if full else max(0, self._places)

    @property
    def in_flight(self) -> int:
        """Plans whose results `update` has not seen yet."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._sequences) - len(self._waiting),
            waiting=len(self._waiting),
            total_blocks=self.blocks.total,
            free_blocks=self.blocks.available,
            cached_blocks=self.blocks.cached,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            drafts=self._drafted[0],
            draft_tokens=self._drafted[1],
            accepted_tokens=self._drafted[2],
        )

    # --- decodes ---------------------------------------------------------------------------

    def _others_turn(self) -> set[Sequence]:
        """The decodes to leave out of this micro-batch: all but an even share, which goes to those
        who have waited longest; if not `ahead`, those whose last token is on its way as well.

        With `ahead`, those of the newest plans are left out, one fewer than there are stages: they
        are still to pass the stages before the last, and whatever goes along would wait for them.
        """
        if self._ahead:
            newest = islice(reversed(self._in_flight), self._micro_batches - 1)
            recent = {s for _, _, ran in newest for s in ran}
            going = [s for s in self._decoding if not _ending(s)]
            turn = [s for s in going if s not in recent or s.computed < len(s.tokens)]
            if not turn and not self._prefilling and not self._waiting:
                turn = going  # rather wait in a stage than here
            share = -(-len(self._decoding) // self._micro_batches)
            return set(self._decoding) - set(turn[:share])
        turn = [s for s in self._decoding if s.computed < len(s.tokens)]
        free = max(1, self._micro_batches - len(self._in_flight))  # plans to share these out over
        share = min(-(-len(turn) // free), -(-len(self._decoding) // self._micro_batches))
        return set(self._decoding) - set(turn[:share])

    def _extend_decodes(self, left_out: set[Sequence]) -> set[Sequence]:
        """Give blocks to the decodes that need new ones; the set of those that can't run now."""
        due = [s for s in self._decoding if s.computed == s.pause_at and s not in left_out]
        resting: set[Sequence] = set()
        due.sort(key=_rank)
        for s in due:
            if s.status is not Status.RUNNING:  # preempted for one before it
                continue
            if _ending(s):  # its last token is on the way
                resting.add(s)
                continue
            if len(s.tokens) > s.target:  # the newest token is sampled, not computed
                self.blocks.register(s, len(s.tokens) - 1)
            trimmed = self.blocks.trim(s)
            self._waiting.charge_output(s)
            if not self._extend(s, s.computed + 1):
                resting.add(s)
            elif trimmed:
                s.pause_at = min(self.blocks.capacity(s), s.max_len - 1)
            else:
                s.pause_at = s.computed + 1
        return resting

    # --- drafts ------------------------------------------------------------------------------

    def _leave_room(
        self, drafts: DraftLength, decoding: list[Sequence], counts: list[int], left: int
    ) -> None:
        """Add to the decodes' counts the room for drafts, of `left` tokens that a plan may have
        besides. Blocks are taken only if nobody else has to give any up for them."""
        for i, s in enumerate(decoding):
            # A result may bring one token more than there were drafts.
            wanted = min(drafts.length(s), s.max_len - len(s.tokens) - 1, left)
            if wanted < 1:
                drafts.rest(s)
                continue
            upto = s.computed + 1 + wanted
            if (missing := upto - self.blocks.capacity(s)) > 0:
                pages = -(-missing // self.blocks.block_size)
                spare = self.blocks.available - self._reserve()
                if spare >= pages * self.blocks.num_groups:
                    self._add_blocks(s, self.blocks.grow(s, upto) or [])
                upto = min(upto, self.blocks.capacity(s))
            room = upto - s.computed - 1
            counts[i] += room
            left -= room
            if room:
                self._guessing[s] = self._step

    def _add_blocks(self, s: Sequence, added: list[list[int]]) -> None:
        """Tell the shard of blocks, after those that the plan has for the sequence already."""
        known = self._new_blocks.setdefault(s.seq, [[] for _ in added])
        for ids, more in zip(known, added, strict=True):
            ids += more

    def _take_drafts(self, result: StepResult) -> dict[int, Iterator[Logprobs]]:
        """Count what became of a step's drafts. Of sequences that gained several tokens and have
        log-probabilities, these in order."""
        assert self._drafts is not None
        gained = Counter(result.seqs)
        for seq, drafted in result.drafted.items():
            s = self._sequences.get(seq)
            if s is None or result.step < s.first_step:
                continue
            if not drafted:
                self._drafts.miss(s)
                continue
            accepted = max(gained[seq] - 1, 0)
            s.computed += accepted
            s.pause_at = s.computed  # it may have passed the point it was to pause at
            self._drafts.record(s, drafted, accepted)
            for place, count in enumerate((1, drafted, accepted)):
                self._drafted[place] += count
        return {
            seq: chain([result.logprobs[seq]], more)
            for seq, more in result.further_logprobs.items()
        }

    # --- admission ---------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move waiting sequences to the prefilling ones, as far as slots and blocks go."""
        put_aside: list[Sequence] = []
        adapters = AdapterRoom(self._max_adapters, self._admitted_ones())
        while (s := self._waiting.head()) is not None:
            if self._running == self._max_num_seqs and not self._priorities:
                break
            if len(put_aside) == self._max_num_seqs:
                break
            if self._should_wait_for_prefix(s) or not adapters.take(s):
                self._waiting.remove(s)
                put_aside.append(s)
                continue
            if not self._try_to_admit(s) and not (self._make_way(s) and self._try_to_admit(s)):
                break
        for s in reversed(put_aside):
            self._waiting.put_back(s)

    def _admitted_ones(self) -> Iterator[Sequence]:
        """All that have slots; a search is its leader, also while it waits for its results."""
        searching = (group.leader for group in self._groups.values() if group.running)
        fetching = (each.sequence for each in self._fetching)
        return chain(self._decoding, self._prefilling, self._held, fetching, searching)

    def _try_to_admit(self, s: Sequence) -> bool:
        if self._running + _slots(s) > self._max_num_seqs:
            return False
        given = given_columns(s, self.blocks)
        if not self.blocks.admit(s, self._reserve() + self._headroom(s), given):
            return False
        self._waiting.remove(s)
        if s.group is not None:
            s.group.running = True
        if s.order < 0:  # for the first time
            s.order = self._admitted
            self._admitted += 1
            self._waiting.charge_admission(s, s.prompt_len - s.computed)
            if s.request.reuse_prefix and self.blocks.enable_prefix_caching:
                self._prefix_queries += s.prompt_len
                self._prefix_hits += s.computed
            s.cached_tokens = s.computed
        s.status = Status.RUNNING
        s.target = len(s.tokens)
        s.last_prefill = self._step
        s.prompt_rows = 0
        if s.source is not None and s.registered < given:
            s.status = Status.FETCHING
            self._fetching.add(s, s.source, given, self.blocks, after=self._step - 1)
        else:
            self._prefilling.append(s)
        return True

    def _reserve(self) -> int:
        """Blocks to leave to the running sequences, so that newcomers don't cost them theirs."""
        return self._running * self.blocks.num_groups

    def _headroom(self, s: Sequence) -> int:
        """Blocks that a search's beams will want as soon as its prompt has run."""
        if s.group is None:
            return 0
        most = (s.group.width - 1) * self.blocks.num_groups
        return min(
            most, self._limits.blocks(s, self.blocks) - self.blocks.blocks_needed(s.prompt_len)
        )

    def _should_wait_for_prefix(self, s: Sequence) -> bool:
        """Whether another's prefill is just computing blocks that this sequence could reuse.

        It pays to wait only while that prefill advances: it ran in a plan that is still out, or
        in the last one, or was admitted just now.
        """
        other = self.blocks.awaited(s)
        if other is None:
            return False
        advances = other.last_prefill >= self._step - len(self._in_flight) - 1
        return advances or _fetches(other)

    def _make_way(self, s: Sequence) -> bool:
        """Preempt running sequences of lower priority, if that lets a waiting one in."""
        lower = [other for other in self._preemptible() if other.level > s.level]
        if not lower:
            return False
        given = given_columns(s, self.blocks)
        missing = self.blocks.shortfall(s, self._reserve() + self._headroom(s), given)
        slots = self._max_num_seqs - self._running - _slots(s)
        victims: list[Sequence] = []
        for victim in sorted(lower, key=_rank, reverse=True):
            if slots >= 0 and missing <= 0:
                break
            victims.append(victim)
            slots += 1
            missing -= self.blocks.held(victim) + self.blocks.num_groups
        if slots < 0 or missing > 0:
            return False
        for victim in victims:
            if victim.status is Status.RUNNING:  # not gone with another of its search
                self._preempt(victim)
        return bool(victims)

    # --- prefills ----------------------------------------------------------------------------

    def _share_out(self, resting: set[Sequence]) -> list[tuple[Sequence, int]]:
        """Chunks for the prefilling sequences, by rank; blocks for them are taken."""
        budget = self._max_num_batched_tokens - len(_without(self._decoding, resting))
        chunks: list[tuple[Sequence, int]] = []
        for s, count in shares(budget, sorted(self._prefilling, key=_rank)).items():
            if count and s.status is Status.RUNNING:
                # Rather a smaller chunk than preempting for it, but one token at least.
                reach = self.blocks.reach(s, self._reserve())
                upto = min(s.computed + count, max(reach, s.computed + 1))
                if self._extend(s, upto):
                    chunks.append((s, upto - s.computed))
        return chunks

    # --- beams -------------------------------------------------------------------------------

    def _hear(self, s: Sequence, group: BeamGroup, found: Logprobs) -> Progress:
        """Take in what may follow a beam; if it was the last one to tell, its search goes on."""
        gain = Progress(group.leader)
        if not group.hear(s, found):
            return gain
        if not group.search.beams:
            gain.hypotheses = group.search.best(s.request.n)
            self._end_group(group)
            return gain
        before = list(group.members.values())
        for member in before:  # it is another beam now: the shard has it start anew
            self._ends.append(member.seq)
            member.first_step = NEVER
            del self._sequences[member.seq]
            member.status = Status.FINISHED
        group.hand_out(self.blocks)
        for member in group.members.values():
            member.status = Status.RUNNING
            member.last_prefill = self._step
            self._sequences[member.seq] = member
            self._waiting.charge_output(member)
            self._prefilling.append(member)
        return gain

    def _fold(self, group: BeamGroup) -> None:
        """Back to the queue with a search, which goes on from where it is."""
        self._leave_all(group)
        group.lead()
        leader = group.leader
        leader.status = Status.WAITING
        self._sequences[leader.seq] = leader
        self._waiting.put_back(leader)

    def _end_group(self, group: BeamGroup, *, forget: bool = False) -> None:
        if not group.running:
            self._waiting.remove(group.leader)
        self._leave_all(group, forget=forget)
        del self._groups[group.leader.seq]

    def _leave_all(self, group: BeamGroup, *, forget: bool = False) -> None:
        """Take a search's sequences off the shard."""
        for member in group.members.values():
            self._leave(member, Status.FINISHED, forget=forget)
            del self._sequences[member.seq]
        self._prefilling = [s for s in self._prefilling if s.group is not group]

    # --- making room -------------------------------------------------------------------------

    def _extend(self, s: Sequence, upto: int) -> bool:
        """Extend its tables to `upto` tokens, at the cost of sequences that rank after it."""
        while (added := self.blocks.grow(s, upto)) is None:
            if not self._take_from_last(s):
                return False
        if s.group is not None:
            while (copies := self.blocks.unshare(s)) is None:
                if not self._take_from_last(s):
                    return False
            if copies:
                self._copies[s.seq] = copies
        if s.first_step != NEVER and any(added):  # else its start will carry the whole tables
            self._new_blocks[s.seq] = added
        return True

    def _take_from_last(self, s: Sequence) -> bool:
        """Preempt the sequence that ranks last, for one that lacks blocks; False if it is that."""
        if not self.blocks.trim(s):
            return False  # blocks of its own come free with the results on the way
        victim = max(self._preemptible(), key=_rank)
        if victim is s or (s.group is not None and victim.group is s.group):
            return False
        self._preempt(victim)
        return True

    def _preemptible(self) -> list[Sequence]:
        """The running sequences that won't end by themselves with the results on the way."""
        awaited = (
            s
            for group in self._groups.values()
            if group.running
            for s in group.members.values()
            if s.computed == s.target
        )
        return [s for s in chain(self._decoding, self._prefilling, awaited) if not _ending(s)]

    def _preempt(self, s: Sequence) -> None:
        """Back to the queue; whatever is on the way for it will be computed again."""
        if s.group is not None:
            self._preemptions += 1
            self._fold(s.group)
            return
        if s.computed < s.target:
            self._prefilling.remove(s)
        else:
            self._decoding.remove(s)
        if s.first_step != NEVER:
            self._preemptions += 1
        self._leave(s, Status.WAITING)
        self._waiting.put_back(s)

    def _finish(self, s: Sequence, *, forget: bool = False) -> None:
        self._waiting.charge_output(s)
        self._leave(s, Status.FINISHED, forget=forget)
        del self._sequences[s.seq]

    def _leave(self, s: Sequence, status: Status, *, forget: bool = False) -> None:
        """Take a sequence off the shard."""
        if s.first_step != NEVER:
            self._ends.append(s.seq)
            s.first_step = NEVER
        self._new_blocks.pop(s.seq, None)
        self._copies.pop(s.seq, None)
        if s.status in (Status.RUNNING, Status.HELD):
            if len(s.tokens) > s.target and not forget:
                self.blocks.register(s, len(s.tokens) - 1)
            self.blocks.release(s, forget=forget)
        s.status = status

    # --- small things --------------------------------------------------------------------------

    @property
    def _running(self) -> int:
        """Slots taken."""
        elsewhere = len(self._held) + len(self._fetching)
        if not self._groups:
            return len(self._prefilling) + len(self._decoding) + elsewhere
        alone = sum(s.group is None for s in self._prefilling) + len(self._decoding) + elsewhere
        return alone + sum(group.width for group in self._groups.values() if group.running)

    @property
    def _places(self) -> int:
        """Slots, and places in the queue for them, that nobody has; below 0 where sequences were
        taken that had to be."""
        return self._max_waiting + self._max_num_seqs - self._running - len(self._waiting)

    def _prompt_rows(self, result: StepResult) -> dict[int, list[Logprobs]]:
        """The step's prompt logprobs by sequence, without those given before a preemption."""
        gained: dict[int, list[Logprobs]] = {}
        for seq, rows in result.prompt_logprobs.items():
            s = self._sequences.get(seq)
            if s is None or result.step < s.first_step:
                continue
            known = max(0, s.prompt_rows_given - s.prompt_rows)
            s.prompt_rows += len(rows)
            s.prompt_rows_given = max(s.prompt_rows_given, s.prompt_rows)
            if len(rows) > known:
                gained[seq] = rows[known:]
        return gained


def _without(sequences: list[Sequence], left_out: set[Sequence]) -> list[Sequence]:
    return [s for s in sequences if s not in left_out] if left_out else sequences


def _slots(s: Sequence) -> int:
    """How many of the sequences that run at once it counts as."""
    return 1 if s.request.beams is None else s.request.beams.width


def _fetches(s: Sequence) -> bool:
    return s.status is Status.FETCHING


def _rank(s: Sequence) -> tuple[int, int]:
    return s.level, s.order


def _ending(s: Sequence) -> bool:
    """Whether all the sequence may compute is planned: the last token is sampled, not computed."""
    return s.computed >= s.max_len - 1
