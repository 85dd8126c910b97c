"""What the router and a shard say to each other: one StepPlan down, one StepResult up, per step.

The shard keeps per-sequence state (tokens, block tables, sampling state), so a plan carries only
changes: sequences that start, blocks that were added, how many tokens each scheduled sequence
runs. A decode never carries its token: the shard feeds its own last sample. That is also what
lets a plan for step n+1 be sent before step n's tokens are known.

Everything here is a msgspec struct: typed on arrival, never a pickle.
"""

from __future__ import annotations

import msgspec


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a sequence's next token is chosen. Already validated; every field is resolved.

    Order of application: the grammar; logit bias, allowed/banned tokens and the minimum length;
    repetition (arXiv 1909.05858), frequency and presence penalties (OpenAI's definition, over
    generated tokens); temperature; top-k; top-p (arXiv 1904.09751); min-p (arXiv 2407.01082); one
    draw.
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


class SequenceStart(msgspec.Struct, frozen=True):
    """A sequence enters (or, preempted before, re-enters) the shard's state."""

    seq: int  # the router's id, unique while the router lives
    tokens: list[int]  # prompt, then tokens generated before a preemption
    prompt_len: int  # how many of `tokens` are the prompt
    computed: int  # leading tokens whose KV is in the cache already (prefix reuse)
    blocks: list[list[int]]  # per KV group, the block table so far
    sampling: Sampling


class StepPlan(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step: what changes in the shard's state, then what to run.

    `seqs[i]` runs its next `counts[i]` tokens. A sequence samples when the step reaches the end
    of its known tokens; earlier prefill chunks sample nothing. Block ids of a sliding-window
    group that fell out of the window stay in the shard's table and are never read again.
    """

    step: int
    seqs: list[int]
    counts: list[int]
    starts: list[SequenceStart] = []
    new_blocks: dict[int, list[list[int]]] = {}  # seq -> per KV group, ids to append
    ends: list[int] = []  # sequences to forget, before anything else


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
    seconds: float = 0.0  # time the step took on the shard


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
    depth: int = 1  # steps worth having in flight: 2 if the device runs while the host prepares
