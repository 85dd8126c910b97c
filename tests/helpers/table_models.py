"""Models that are tables: a token's successors have the distribution of its row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.device import Device
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.draft_choices import DraftChoices
from tensorray.actors.protocol import Sampling, SequenceStart

VOCAB = 6
# Of 30 degrees of freedom, exceeded once in a million: Wilson and Hilferty's approximation.
MOST = 30 * (1 - 2 / 270 + 4.753 * (2 / 270) ** 0.5) ** 3

RNG = np.random.default_rng(7)
MODEL = RNG.normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)
#: Like the model, but not the same.
SMALL = (MODEL + RNG.normal(0, 0.6, MODEL.shape)).astype(np.float32)


def chi_square(texts: Sequence[Sequence[int]], temperature: float) -> float:
    """Of the successors of each token, over all tokens."""
    counts = np.zeros((VOCAB, VOCAB))
    for tokens in texts:
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    weights = np.exp(MODEL.astype(np.float64) / temperature)
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    expected = shares * counts.sum(axis=1, keepdims=True)
    return float(((counts - expected) ** 2 / expected).sum())


def write_on(
    device: Device, *, texts: int, steps: int, room: int, temperature: float
) -> tuple[list[list[int]], int]:
    """Texts written in so many steps of `room` guesses by the small table, each with a seed of its
    own, on a device; and how many guesses were right."""
    xp, seqs = device.xp, list(range(texts))
    found = [[0] for _ in seqs]
    right = 0
    with device.current():
        large, small = xp.asarray(MODEL), xp.asarray(SMALL)
        rows, guessed = xp.arange(texts, dtype=np.int32), xp.zeros(texts, np.int32)
        sampler = DeviceSampler(device, VOCAB, texts)
        choices = DraftChoices(device, sampler.state, guessed)
        for seq in seqs:
            sampling = Sampling(temperature=temperature, seed=seq)
            sampler.start(SequenceStart(seq, [0], 1, 0, [], sampling), seq)
        for step in range(steps):
            newest = sampler.last_tokens.copy()
            guessed[...] = newest
            choices.begin()
            guesses = [
                choices.enqueue(small[guessed], rows, greedy=False).copy()
                for _ in range(room if step else 0)  # what starts comes with a first step
            ]
            queued = [sampler.enqueue(seqs, rows, large[newest])]
            queued += [
                sampler.enqueue_next(seqs, rows.copy(), guess, large[guess]) for guess in guesses
            ]
            for ahead, sampled in enumerate(queued):
                tokens, _, failed = sampler.collect(sampled)
                assert not failed
                for text, token in zip(found, tokens, strict=True):
                    if token >= 0:
                        text.append(token)
                        right += ahead > 0
    return found, right
