"""What enters the engine and what comes out of it, in tokens; text lives in front of it.

These cross the process border between ingress and router, so they are msgspec structs.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tensorray.actors.protocol import Door, Logprobs, Sampling

FinishReason = Literal["stop", "length", "abort", "error"]


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that another engine began: what it had told of it."""

    index: int  # which of the request's n sequences
    tokens: list[int]  # generated
    prompt_rows: int = 0  # prompt logprobs told


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Where the blocks of a prompt's full pages are: with a sequence that another replica holds."""

    doors: list[Door]  # of its shards, by rank
    seq: int  # as those shards know it
    blocks: list[list[int]]  # per KV group, ids by column; 0: not needed. No columns: no blocks


class BeamSearch(msgspec.Struct, frozen=True, omit_defaults=True):
    """How beams are kept, as `cluster/beams.py` explains."""

    width: int  # beams that live at once, over all groups
    groups: int = 1  # that divide `width`; above 1 the search is a diverse one
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    diversity: float = 0.0  # what a token costs for each beam of earlier groups that took it
    alternatives: int = 0  # likeliest tokens to report with each one of the answer


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prompt, `n` sequences. Sequence i draws with `sampling.seed + i`; of beams they are the
    n best, best first, told when the search has ended."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int  # resolved: never more than the context leaves
    n: int = 1
    priority: int = 0  # lower runs first, as in vLLM
    user: str = ""  # admission is fair between users
    cache_salt: str = ""  # prompts share cached blocks only under the same salt
    lora: str = ""  # a LoRA adapter's name; empty: none
    # The id of that adapter's version: 0 where a request begins, which then gets the present one.
    adapter: int = 0
    whole: bool = False  # its reader wants nothing of a sequence before its end
    reuse_prefix: bool = True  # off when prompt logprobs need every row computed
    beams: BeamSearch | None = None  # None: each sequence draws its own tokens
    expected_hit: int = 0  # prompt tokens whose presence in its cache had this replica chosen
    prediction: list[int] = []  # what the output may be like: speeds up prompt lookup
    pooling: str = ""  # the vector to answer with in place of tokens: "last", "mean" or "cls"
    # End each sequence at its first token, and hold the prompt's blocks until it is cancelled.
    hand_over: bool = False
    source: Source | None = None  # a replica that holds the prompt's blocks
    # Sequences to go on with; those of the n that are not named have ended. None: all begin.
    resumed: list[Resumed] | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What one sequence gained since the last delta; several steps' worth if the reader lagged."""

    index: int  # which of the request's n sequences
    tokens: list[int]
    logprobs: list[Logprobs] = []  # one per token, if asked for
    prompt_logprobs: list[Logprobs] = []  # for prompt tokens 1.., if asked for
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token id that ended it (also last in `tokens`)
    error: str = ""  # with finish_reason "error"
    refused: bool = False  # with `error`: it is what the request asks for that can't be
    pooled: bytes = b""  # float32 [hidden], little-endian: all that a pooled request is told
    cached_tokens: int = 0  # prompt tokens served from the prefix cache; on the first delta
    adapter: int = 0  # the id of the version that it runs with, if any; before its first token
    queued: float = 0.0  # seconds it waited before its first step; on the first delta
    drafted: int = 0  # tokens guessed for it from its start, where any were
    accepted: int = 0  # of these, the ones that were right
    source: Source | None = None  # it is held now, as its request's `hand_over` asked


class RequestRefused(ValueError):
    """The engine will not take the request; the message says what to change."""


class UnknownAdapter(RequestRefused):
    """No LoRA adapter of the request's name is loaded."""


class QueueFull(RequestRefused):
    """Too many requests wait already; the same request may succeed later."""
