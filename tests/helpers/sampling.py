"""Sampling parameters of every kind, and logits to try them on."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorray.actors.protocol import Sampling, SequenceStart

VOCAB = 40


def start(
    seq: int, sampling: Sampling, prompt: list[int] | None = None, outputs: list[int] | None = None
) -> SequenceStart:
    prompt = [1, 2, 2, 3] if prompt is None else prompt
    return SequenceStart(
        seq=seq,
        tokens=prompt + (outputs or []),
        prompt_len=len(prompt),
        computed=0,
        blocks=[],
        sampling=sampling,
    )


def logits_of(outputs: list[int], seq: int = 0) -> NDArray[np.float32]:
    """Logits that depend on a sequence's own tokens, as a model's would."""
    rng = np.random.default_rng([seq, len(outputs), *outputs])
    return rng.normal(0, 2, VOCAB).astype(np.float32)


token_ids = st.integers(0, VOCAB - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 3, 10, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.4, 1e-6]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.8, -0.5]),
    logit_bias=st.dictionaries(token_ids, st.sampled_from([-100.0, -1.0, 2.0, 100.0]), max_size=3),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=12, max_size=20, unique=True),
    banned_token_ids=st.lists(token_ids, max_size=4),
    logprobs=st.sampled_from([None, None, 0, 3, -1]),
    seed=st.integers(0, 2**63),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.lists(token_ids, max_size=3),
)


# How logits are spread: what a trained model gives, what an untrained one does, and what is hard.
SPREADS = ("normal", "flat", "peaked", "tied", "equal", "wide", "few", "outliers")


def random_logits(
    rng: np.random.Generator, spread: str, rows: int, vocab: int
) -> NDArray[np.float32]:
    """Logits [rows, vocab], of which some hold -inf, of one of SPREADS."""
    logits = rng.normal(0, 2, (rows, vocab))
    if spread == "flat":
        logits *= 0.01
    elif spread == "peaked":
        logits[np.arange(rows), rng.integers(0, vocab, rows)] += rng.uniform(5, 30, rows)
    elif spread == "tied":
        logits = np.round(logits)
    elif spread == "equal":
        logits[:] = rng.normal(0, 3, (rows, 1))
    elif spread == "wide":
        logits *= 300
    elif spread == "few":
        logits[:, :] = -np.inf
        count = min(vocab, 9)
        where = rng.permuted(np.tile(np.arange(vocab), (rows, 1)), axis=1)[:, :count]
        np.put_along_axis(logits, where, rng.normal(0, 1, (rows, count)), axis=1)
    elif spread == "outliers":
        logits[:, rng.integers(0, vocab, max(vocab // 100, 1))] = -30000
        logits[:, rng.integers(0, vocab, max(vocab // 100, 1))] = -np.inf
    return logits.astype(np.float32)


def random_sampling(rng: np.random.Generator, vocab: int, **fixed: Any) -> Sampling:
    """Parameters of a request, most of them off, as requests have them."""

    def some(chance: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < chance else otherwise

    def tokens(most: int) -> list[int]:
        return [int(token) for token in rng.integers(0, vocab, rng.integers(1, most + 1))]

    edits = rng.random() < 0.4
    penalizes = rng.random() < 0.3
    chosen: dict[str, Any] = {
        "temperature": some(0.15, 0.0, float(rng.choice([1e-3, 0.3, 0.7, 1.0, 1.0, 1.5, 20]))),
        "top_k": some(0.4, int(rng.choice([1, 2, 5, 50, 200, 600, 3000, vocab, 2**31 - 1])), 0),
        "top_p": some(0.5, float(rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-7])), 1.0),
        "min_p": some(0.25, float(rng.choice([1e-4, 0.02, 0.3, 1.0])), 0.0),
        "repetition_penalty": some(0.5 * penalizes, float(rng.choice([0.7, 1.2, 3])), 1.0),
        "frequency_penalty": some(0.5 * penalizes, float(rng.normal(0, 0.7)), 0.0),
        "presence_penalty": some(0.5 * penalizes, float(rng.normal(0, 0.7)), 0.0),
        "logit_bias": {t: float(rng.normal(0, 5)) for t in some(0.4 * edits, tokens(70), [])},
        "allowed_token_ids": some(0.3 * edits, tokens(max(vocab // 2, 1)), None),
        "banned_token_ids": some(0.4 * edits, tokens(max(vocab // 20, 1)), []),
        "seed": int(rng.integers(-(2**63), 2**63)),
        "logprobs": some(0.3, int(rng.choice([0, 1, 5, 20])), None),
        "min_tokens": some(0.4 * edits, 8, 0),
        "stop_token_ids": tokens(5),
    }
    return Sampling(**{**chosen, **fixed})
