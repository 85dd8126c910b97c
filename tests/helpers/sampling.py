"""Sampling parameters of every kind, and logits to try them on."""

from __future__ import annotations

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
