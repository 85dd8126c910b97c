"""The device sampler on a host device: the same choices as the sampler's, in every detail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.host_device import HostDevice
from helpers.sampling import VOCAB, logits_of, samplings, start
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.protocol import Sampling, SequenceStart
from tensorray.actors.sampler import Sampler, SamplingError
from tensorray.kernels.batch_sampling import MAX_TOP


class Pair:
    """Both samplers, side by side; the device's runs `ahead` steps before it is collected."""

    def __init__(self, vocab: int = VOCAB, rows: int = 8, last_tokens: Any = None) -> None:
        self.host = Sampler(vocab)
        self.device = DeviceSampler(HostDevice(), vocab, rows, last_tokens)
        self.rows: dict[int, int] = {}

    def start(self, start: SequenceStart, row: int) -> None:
        self.host.start(start)
        self.device.start(start, row)
        self.rows[start.seq] = row

    def end(self, seq: int) -> None:
        self.host.end(seq)
        self.device.end(seq)

    def sample(self, seqs: list[int], logits: NDArray[np.float32]) -> list[int]:
        expected = self.host.sample(seqs, logits)
        rows = np.array([self.rows[seq] for seq in seqs], np.int32)
        found = self.device.collect(self.device.enqueue(seqs, rows, logits))
        assert found == expected
        for seq, token in zip(seqs, expected[0], strict=True):
            if token >= 0:
                assert self.device.last_tokens[self.rows[seq]] == token
        return expected[0]


@settings(max_examples=100, deadline=None)
@given(mix=st.lists(samplings, min_size=1, max_size=5), data=st.data())
def test_it_chooses_what_the_sampler_chooses(mix: list[Sampling], data: st.DataObject) -> None:
    pair = Pair()
    outputs: dict[int, list[int]] = {seq: [] for seq in range(len(mix))}
    free = data.draw(st.permutations(range(8)))
    for seq, sampling in enumerate(mix):
        pair.start(start(seq, sampling), free.pop())
    for _ in range(6):
        seqs = data.draw(st.lists(st.sampled_from([*outputs]), min_size=1, unique=True))
        logits = np.stack([logits_of(outputs[seq], seq) for seq in seqs])
        for seq, token in zip(seqs, pair.sample(seqs, logits), strict=True):
            if token >= 0:
                outputs[seq].append(token)
        if data.draw(st.booleans()):  # preempted, and started again in another row
            seq = seqs[0]
            pair.end(seq)
            free.insert(0, pair.rows[seq])
            pair.start(start(seq, mix[seq], outputs=outputs[seq]), free.pop())


def test_steps_run_ahead_of_what_the_host_has_read() -> None:
    sampling = Sampling(seed=3, frequency_penalty=1.5, min_tokens=3, stop_token_ids=[1, 2, 3])
    pair, rng = Pair(), np.random.default_rng(0)
    pair.start(start(0, sampling), 5)
    logits = rng.normal(0, 1, (7, 1, VOCAB)).astype(np.float32)
    expected = [pair.host.sample([0], step)[0] for step in logits]
    row = np.array([5], np.int32)
    under_way = [pair.device.enqueue([0], row, step) for step in logits]
    assert [pair.device.collect(sampled)[0] for sampled in under_way] == expected


def test_greedy_steps_wait_for_the_minimum_length_to_be_read() -> None:
    """The host can't know that a step under way did not fail, so it must not drop the mask."""
    pair = Pair()
    greedy = Sampling(temperature=0.0, min_tokens=2, stop_token_ids=[7])
    pair.start(start(0, greedy), 0)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7] = 5
    row, bad = np.zeros(1, np.int32), np.full_like(logits, np.nan)
    steps = [logits, bad, bad, logits, logits]
    under_way = [pair.device.enqueue([0], row, step) for step in steps]
    assert [pair.device.collect(sampled)[0] for sampled in under_way] == [[0], [-1], [-1], [0], [7]]


@pytest.mark.parametrize("top", [0, 3, VOCAB, MAX_TOP + 1, -1])
def test_prompts_are_scored_as_the_sampler_scores_them(top: int) -> None:
    pair, rng = Pair(), np.random.default_rng(1)
    logits = rng.normal(0, 3, (5, VOCAB)).astype(np.float32)
    logits[2, :-2] = -np.inf
    tokens = rng.integers(0, VOCAB, 5).tolist()
    found = pair.device.prompt_logprobs(tokens, logits, top)
    for ours, theirs in zip(found, pair.host.prompt_logprobs(tokens, logits, top), strict=True):
        assert (ours.token, ours.rank) == (theirs.token, theirs.rank)
        assert ours.top_tokens == theirs.top_tokens
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-12)
        assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-12)
    assert pair.device.prompt_logprobs([], logits[:0], top) == []
    logits[4, 0] = np.nan
    with pytest.raises(SamplingError, match="NaN"):
        pair.device.prompt_logprobs(tokens, logits, top)


def test_tokens_go_to_the_array_it_is_given() -> None:
    last_tokens = np.full(8, -5, np.int32)
    pair = Pair(last_tokens=last_tokens)
    pair.start(start(4, Sampling(temperature=0.0)), 2)
    pair.start(start(5, Sampling(temperature=0.0)), 6)
    logits = np.stack([logits_of([], 4), np.full(VOCAB, -np.inf, np.float32)])
    tokens = pair.sample([4, 5], logits)
    assert last_tokens.tolist() == [-5, -5, tokens[0], -5, -5, -5, -5, -5]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_leave_the_tokens_whose_bits_are_set(temperature: float) -> None:
    pair, rng = Pair(), np.random.default_rng(2)
    for seq in range(3):
        pair.start(start(seq, Sampling(temperature=temperature, seed=seq)), seq)
    masks = rng.integers(0, 2**32, (2, -(-VOCAB // 32)), np.uint32)
    bits = masks[:, np.arange(VOCAB) // 32] >> (np.arange(VOCAB) % 32).astype(np.uint32) & 1
    rows, of = np.arange(3, dtype=np.int32), np.array([1, -1, 0], np.int32)
    for _ in range(20):
        logits = rng.normal(0, 2, (3, VOCAB)).astype(np.float32)
        masked = logits.copy()
        masked[0, bits[1] == 0] = masked[2, bits[0] == 0] = -np.inf
        expected = pair.host.sample([0, 1, 2], masked)
        sampled = pair.device.enqueue([0, 1, 2], rows, logits, masks=masks, mask_rows=of)
        assert pair.device.collect(sampled) == expected


def test_a_mask_that_leaves_nothing_fails() -> None:
    pair = Pair()
    pair.start(start(0, Sampling()), 0)
    masks, row = np.zeros((1, -(-VOCAB // 32)), np.uint32), np.zeros(1, np.int32)
    logits = np.zeros((1, VOCAB), np.float32)
    sampled = pair.device.enqueue([0], row, logits, masks=masks, mask_rows=row)
    tokens, _, failed = pair.device.collect(sampled)
    assert tokens == [-1]
    assert "no token is left" in failed[0]


def test_slots_are_reused_and_biases_grow() -> None:
    pair = Pair(vocab=300, rows=3)
    rng = np.random.default_rng(3)
    for seq in range(30):
        row = seq % 3
        pair.end(seq - 3)
        biased = rng.permutation(300)[: 10 * (seq + 1) % 300].tolist()
        bias = {token: float(rng.normal(0, 3)) for token in biased}
        banned = rng.permutation(300)[:20].tolist()
        sampling = Sampling(seed=seq, logit_bias=bias, banned_token_ids=banned, top_k=5)
        pair.start(start(seq, sampling), row)
        pair.sample([seq], rng.normal(0, 2, (1, 300)).astype(np.float32))
    assert len(pair.device._state.words) == 3


@pytest.mark.parametrize("rows", [3, 300])
def test_room_for_edits_is_taken_before_it_is_needed(rows: int) -> None:
    """For 256 sequences at once; for as many again when they are more."""
    sampler = DeviceSampler(HostDevice(), 40, rows)
    room = len(sampler._state.words)
    assert room == min(rows, 256)
    for row in range(rows):
        sampler.start(start(row, Sampling(frequency_penalty=1.0)), row)
        sampler.enqueue([row], np.array([row], np.int32), np.zeros((1, 40), np.float32))
        if row < 256:
            assert len(sampler._state.words) == room
    assert len(sampler._state.words) == rows


def test_half_precision_logits_mean_their_float32_values() -> None:
    pair = Pair()
    pair.start(start(0, Sampling(logprobs=3, seed=8)), 0)
    logits = logits_of([], 0)[None].astype(np.float16)
    expected = pair.host.sample([0], logits.astype(np.float32))
    sampled = pair.device.enqueue([0], np.zeros(1, np.int32), logits)
    assert pair.device.collect(sampled) == expected


def test_wrong_logits_and_unknown_sequences_are_refused() -> None:
    pair = Pair()
    device = pair.device
    device.start(start(0, Sampling()), 0)
    row = np.zeros(1, np.int32)
    refused: list[NDArray[Any]] = [
        np.zeros((0, VOCAB), np.float32),
        np.zeros((1, 3), np.float32),
        np.zeros(VOCAB, np.float32),
        np.zeros((1, VOCAB), np.float64),
    ]
    for logits in refused:
        with pytest.raises(ValueError, match="logits are"):
            device.enqueue([0], row, logits)
    device.end(0)
    device.end(0)
    with pytest.raises(KeyError):
        device.enqueue([0], row, np.zeros((1, VOCAB), np.float32))
    assert device.collect(device.enqueue([], row[:0], np.zeros((0, VOCAB), np.float32))) == (
        [],
        {},
        {},
    )
