"""What the router and a shard say to each other: one StepPlan down, one StepResult up, per step.

The shard keeps per-sequence state (tokens, block tables, sampling state), so a plan carries only
changes: sequences that start, blocks that were added, how many tokens each scheduled sequence
runs. A decode never carries its token: the shard feeds its own last sample. That is also what
lets a plan for step n+1 be sent before step n's tokens are known.

Everything here is a msgspec struct: typed on arrival, never a pickle.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tensorray.actors.wire import Endpoint


class ProcessorCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A logits processor that a sequence asks for, as its class is registered, with arguments."""

    name: str
    arguments: dict[str, Any] = {}


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a sequence's next token is chosen. Already validated; every field is resolved.

    Order of application: the user's logits processors, on the model's logits (not while the forced
    prefix lasts); the grammar; the forced prefix, or bad words and repeated n-grams; logit bias,
    allowed/banned tokens and the minimum length; repetition (arXiv 1909.05858), frequency and
    presence penalties (OpenAI's definition, over generated tokens); temperature; top-k; top-p
    (arXiv 1904.09751); min-p (arXiv 2407.01082); one draw.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] = []
    seed: int = 0  # the draw for output position i depends on (seed, i) alone
    logprobs: int | None = None  # top alternatives to report per token; -1: whole vocabulary
    prompt_logprobs: int | None = None
    min_tokens: int = 0  # until then stop_token_ids can't be chosen
    stop_token_ids: list[int] = []  # EOS ids included, unless the request ignores them
    grammar: str = ""  # that all of the output follows (guidance.py); empty: none
    # What the sequence's own tokens force or forbid (output_rules.py).
    forced_prefix: list[int] = []  # that the output begins with
    bad_words: list[list[int]] = []  # each of two tokens or more; single ones are banned tokens
    no_repeat_ngram_size: int = 0  # 0: any
    logits_processors: list[ProcessorCall] = []  # of the user's (logits_processors.py)
    # A beam: its `logprobs` are its candidates, scored after all that edits logits. As in
    # transformers' beam search the edits apply to log-probabilities, which then are not
    # normalized again.
    beam: bool = False


class SequenceStart(msgspec.Struct, frozen=True):
    """A sequence enters (or, preempted before, re-enters) the shard's state."""

    seq: int  # the router's id, unique while the router lives
    tokens: list[int]  # prompt, then tokens generated before a preemption
    prompt_len: int  # how many of `tokens` are the prompt
    computed: int  # leading tokens whose KV is in the cache already (prefix reuse)
    blocks: list[list[int]]  # per KV group, the block table so far
    sampling: Sampling
    adapter: int = 0  # the LoRA adapter it runs with, by id; 0: none
    # The vector that is wanted in place of tokens: "last", "mean" or "cls" (pooling.py).
    pooling: str = ""
    # A beam that ran up to this plan: its tokens come before `tokens`, which leave them out.
    prolongs: int | None = None
    prediction: list[int] = []  # what its user thinks the output will be like, for drafts


class StepPlan(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step: what changes in the shard's state, then what to run.

    `seqs[i]` runs its next `counts[i]` tokens. A sequence samples when the step reaches the end
    of its known tokens; earlier prefill chunks sample nothing. Block ids of a sliding-window
    group that fell out of the window stay in the shard's table and are never read again.

    Where a sequence has one known token left and `counts[i]` is more, the rest is room for drafts:
    tokens the shard guesses and runs along, up to so many (speculative decoding, arXiv 2211.17192).
    Such a sequence is in one plan at a time.
    """

    step: int
    seqs: list[int]
    counts: list[int]
    starts: list[SequenceStart] = []
    new_blocks: dict[int, list[list[int]]] = {}  # seq -> per KV group, ids to append
    ends: list[int] = []  # sequences to forget, before anything else
    # Blocks that take over what others hold, as (from, to): before anything is computed, all at
    # once, so that each "from" is as the plan before left it. No block is in two of the "to".
    copies: list[tuple[int, int]] = []


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, from the model's own distribution (before temperature
    and filters, after none of the penalties), natural logarithm."""

    token: int
    logprob: float
    rank: int  # 1: the most likely token
    top_tokens: list[int]
    top_logprobs: list[float]


class StepResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a step sampled. `seqs[i]` chose `tokens[i]`; sequences in mid-prefill are absent.

    A sequence whose drafts were right is there once for each token it gained, in order.

    `failed` names sequences the shard could not go on with (non-finite logits, say), each with
    the reason; they sampled nothing and the shard has kept no state the router must undo.
    """

    step: int
    seqs: list[int]
    tokens: list[int]
    logprobs: dict[int, Logprobs] = {}
    # Of the prompt tokens whose predecessors ran, in order; a sequence that was preempted in
    # mid-prompt reports them again from the first when it re-enters.
    prompt_logprobs: dict[int, list[Logprobs]] = {}
    failed: dict[int, str] = {}
    # Of the pooled sequences whose prompts have run whole: float32 [hidden], little-endian.
    pooled: dict[int, bytes] = {}
    seconds: float = 0.0  # time the step took on the shard
    # Tokens guessed, for the sequences that had any; 0, from shards that plans have to wait for,
    # where there was room in vain.
    drafted: dict[int, int] = {}
    # Of the tokens after a sequence's first in this step, whose own are in `logprobs`.
    further_logprobs: dict[int, list[Logprobs]] = {}
    refused: list[int] = []  # of `failed`, those whose requests ask for what can't be


class KVGroups(msgspec.Struct, frozen=True):
    """The cache's shape as the block manager needs it. One pool of blocks serves all groups: each
    group has at most `layers_per_group` layers, so a block is the same bytes whichever group
    takes it."""

    windows: list[int | None]  # per group: its layers' attention window in tokens, None: all
    num_blocks: int  # in the pool; block 0 is a placeholder that is never allocated
    block_size: int  # tokens


class SegmentInfo(msgspec.Struct, frozen=True):
    """What runs one of the model's segments."""

    name: str  # where the model has it
    backends: dict[int, str]  # by the number of rows: "tensorrt" or "kernels"
    microseconds: dict[int, dict[str, float]] = {}  # of those that were timed, by backend


class Drafting(msgspec.Struct, frozen=True):
    """How a shard drafts. Costs are in steps of one sequence and one token."""

    max_tokens: int  # a sequence and step
    row_cost: float  # of one more token in a step
    draft_cost: float  # of guessing one token
    max_batch: int | None = None  # no drafts where more sequences than so many decode
    # Of planning each step after the result of the one before: what the device stands still then.
    # 0: it does in any case. What comes to that for each sequence that decodes, and for each draft
    # of the one that has most.
    wait_cost: float = 0.0
    sequence_cost: float = 0.0
    round_cost: float = 0.0


class Door(msgspec.Struct, frozen=True):
    """Where a shard hands out blocks of its KV cache, and takes in others' (kv_door.py)."""

    endpoint: Endpoint
    life: int  # of the sequences it knows: another one after it has forgotten them


class ShardInfo(msgspec.Struct, frozen=True):
    """What a shard reports once it is ready to serve."""

    kv: KVGroups
    vocab_size: int
    max_model_len: int
    device: str
    weight_bytes: int
    kv_cache_bytes: int
    load_seconds: float
    segments: list[SegmentInfo] = []  # none where the array interpreter runs the model
    rejected_plans: int = 0  # that were wrong, so that something else runs in their place
    step_tokens: int = 512  # the most a step may run
    # Whether it sends results; of a replica's shards one does, the others tell of failures only.
    answers: bool = True
    # Steps worth having in flight: one a stage, one more if the device runs while the host works.
    depth: int = 1
    drafting: Drafting | None = None  # None: it takes no room for drafts
    # Of the replica's shards, by rank; none where a device keeps no pages.
    doors: list[Door] = []
