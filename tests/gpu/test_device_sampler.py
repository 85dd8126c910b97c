"""The device sampler on a GPU against the sampler on the host."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.equality import assert_same_tokens, choice
from helpers.sampling import SPREADS, random_logits, random_sampling, start
from numpy.typing import NDArray

from tensorray.actors import device as devices
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.protocol import Logprobs, Sampling
from tensorray.actors.sampler import Sampler, SamplingError

pytestmark = pytest.mark.gpu
DEVICE = devices.find_device()
if DEVICE is None:
    pytest.skip("no NVIDIA GPU, or no CuPy", allow_module_level=True)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def _current() -> Any:
    with DEVICE.current():
        yield


def on_device(array: NDArray[Any]) -> Any:
    return DEVICE.xp.asarray(array)


def assert_same_logprobs(found: Logprobs, expected: Logprobs) -> None:
    assert (found.token, found.rank) == (expected.token, expected.rank)
    assert found.top_tokens == expected.top_tokens
    assert found.logprob == pytest.approx(expected.logprob, abs=2e-6, rel=1e-6)
    assert found.top_logprobs == pytest.approx(expected.top_logprobs, abs=2e-6, rel=1e-6)


class Pair:
    """Both samplers, for sequences whose rows on the device are in no order."""

    def __init__(self, rng: np.random.Generator, vocab: int, rows: int) -> None:
        self.vocab = vocab
        self.host, self.device = Sampler(vocab), DeviceSampler(DEVICE, vocab, rows)
        self.rows = rng.permutation(rows).astype(np.int32)
        self.parted = 0  # choices that differed, at near-ties

    def compare(
        self,
        samplings: list[Sampling],
        logits: NDArray[Any],
        prompts: list[list[int]],
        outputs: list[list[int]],
    ) -> None:
        """One choice each, of sequences that have generated `outputs`."""
        seqs = list(range(len(samplings)))
        for seq in seqs:
            begun = start(seq, samplings[seq], prompts[seq], outputs[seq])
            self.host.start(begun)
            self.device.start(begun, int(self.rows[seq]))
        exact = logits.astype(np.float32)
        rows = on_device(self.rows[: len(seqs)])
        before = self.device.last_tokens.copy()
        sampled = self.device.enqueue(seqs, rows, on_device(logits))
        tokens, logprobs, failed = self.device.collect(sampled)
        expected, expected_logprobs, expected_failed = self.host.sample(seqs, exact)
        assert failed == expected_failed
        newest = DEVICE.xp.asnumpy(self.device.last_tokens)[self.rows]
        before = DEVICE.xp.asnumpy(before)[self.rows]
        for seq in seqs:
            assert newest[seq] == (before[seq] if seq in failed else tokens[seq])
            if tokens[seq] != expected[seq]:
                its = choice(exact[seq], samplings[seq], outputs[seq], prompts[seq])
                said = (samplings[seq], its, tokens[seq], expected[seq])
                assert samplings[seq].temperature, said
                assert its.is_near_tie(), said
                self.parted += 1
        assert logprobs.keys() == expected_logprobs.keys()
        for seq, found in logprobs.items():
            if tokens[seq] == expected[seq]:
                assert_same_logprobs(found, expected_logprobs[seq])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "rows", "rounds"),
    [(2, 16, 4), (40, 64, 8), (513, 64, 4), (5000, 33, 4), (50257, 24, 2), (128256, 40, 2)],
)
def test_mixes_of_parameters(dtype: str, vocab: int, rows: int, rounds: int) -> None:
    rng = np.random.default_rng([vocab, rows])
    pair, count = Pair(rng, vocab, rows), 0
    for spread in SPREADS:
        for index in range(rounds):
            some = rows if index % 2 else int(rng.integers(1, rows + 1))
            logits = random_logits(rng, spread, some, vocab).astype(DTYPES[dtype])
            samplings = [random_sampling(rng, vocab) for _ in range(some)]
            prompts = [rng.integers(0, vocab, 30).tolist() for _ in range(some)]
            outputs = [rng.integers(0, vocab, rng.integers(0, 12)).tolist() for _ in range(some)]
            pair.compare(samplings, logits, prompts, outputs)
            count += some
    print(f"{count} choices, {pair.parted} parted at near-ties")
    assert pair.parted <= 2 + count / 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("vocab", [1, 40, 1001, 151936])
def test_greedy_takes_the_first_of_the_best(dtype: str, rows: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    pair = Pair(rng, vocab, rows)
    greedy = [Sampling(temperature=0.0)] * rows
    nothing: list[list[int]] = [[] for _ in range(rows)]
    for spread in ("normal", "tied", "equal", "outliers"):
        logits = random_logits(rng, spread, rows, vocab).astype(DTYPES[dtype])
        logits[rng.random(rows) < 0.1, rng.integers(0, vocab)] = np.nan
        logits[rng.random(rows) < 0.05, rng.integers(0, vocab)] = -np.nan
        logits[rng.random(rows) < 0.05, rng.integers(0, vocab)] = np.inf
        logits[rng.random(rows) < 0.05] = -np.inf
        with np.errstate(invalid="ignore"):
            logits[rng.random(rows) < 0.2] *= np.array(0, logits.dtype)  # zeros of both signs
        pair.compare(greedy, logits, nothing, nothing)
    assert pair.parted == 0


@pytest.mark.parametrize("vocab", [64, 40000])
@pytest.mark.parametrize("ahead", [1, 3, 10])
def test_a_sequence_of_steps_queued_ahead(vocab: int, ahead: int) -> None:
    """Penalties, minimum lengths and positions count on the device alone."""
    rng, rows, steps = np.random.default_rng(7), 24, 30
    samplings = [
        random_sampling(rng, vocab, logprobs=None, min_tokens=int(rng.integers(0, 9)))
        for _ in range(rows)
    ]
    samplings[0] = Sampling(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.3)
    samplings[1] = Sampling(temperature=0.0, min_tokens=5, stop_token_ids=list(range(vocab // 2)))
    logits = rng.normal(0, 1.5, (steps, rows, vocab)).astype(np.float32)
    host, device = Sampler(vocab), DeviceSampler(DEVICE, vocab, rows)
    for seq, sampling in enumerate(samplings):
        begun = start(seq, sampling, [1, 2, 3], [])
        host.start(begun)
        device.start(begun, seq)
    ours: list[list[int]] = [[] for _ in samplings]
    theirs: list[list[int]] = [[] for _ in samplings]
    under_way = []
    for step in range(steps):
        seqs = [seq for seq in range(rows) if step % (seq % 3 + 1) == 0]
        own = on_device(logits[step][seqs])
        under_way.append(device.enqueue(seqs, on_device(np.array(seqs, np.int32)), own))
        for seq, token in zip(seqs, host.sample(seqs, logits[step][seqs])[0], strict=True):
            theirs[seq].append(token)
        while len(under_way) >= ahead or (step == steps - 1 and under_way):
            sampled = under_way.pop(0)
            for seq, token in zip(sampled.seqs, device.collect(sampled)[0], strict=True):
                ours[seq].append(token)
    for seq, sampling in enumerate(samplings):
        ran = [step for step in range(steps) if step % (seq % 3 + 1) == 0]

        def its(
            place: int,
            seq: int = seq,
            sampling: Sampling = sampling,
            ran: list[int] = ran,
        ) -> Any:
            return choice(logits[ran[place], seq], sampling, theirs[seq][:place], [1, 2, 3])

        assert_same_tokens(ours[seq], theirs[seq], its)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("top", [0, 1, 20, 512, -1])
def test_prompt_logprobs(spread: str, top: int) -> None:
    rng = np.random.default_rng(top % 1000)
    for vocab in (40, 3000, 151936):
        host, device = Sampler(vocab), DeviceSampler(DEVICE, vocab, 4)
        logits = random_logits(rng, spread, 7, vocab)
        tokens = rng.integers(0, vocab, 7).tolist()
        tokens[:2] = [int(row.argmax()) for row in logits[:2]]
        found = device.prompt_logprobs(tokens, on_device(logits), top)
        expected = host.prompt_logprobs(tokens, logits, top)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_logprobs(ours, theirs)
        logits[6, 11] = np.nan
        with pytest.raises(SamplingError, match="NaN"):
            device.prompt_logprobs(tokens, on_device(logits), top)


def test_the_distribution_of_draws() -> None:
    """Chi-square over what 40,000 draws of a small vocabulary may give, filters on."""
    vocab, rows, steps = 24, 200, 200
    logits = np.random.default_rng(5).normal(0, 1.2, vocab).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) / 0.8)
    ranked = np.argsort(-weights)
    for sampling, kept in (
        (Sampling(temperature=0.8), vocab),
        (Sampling(temperature=0.8, top_k=6), 6),
        (Sampling(temperature=0.8, top_p=0.8), None),
    ):
        if kept is None:
            shares = weights[ranked].cumsum() / weights.sum()
            kept = int((shares < 0.8).sum()) + 1
        expected = np.zeros(vocab)
        expected[ranked[:kept]] = weights[ranked[:kept]]
        expected *= rows * steps / expected.sum()
        device = DeviceSampler(DEVICE, vocab, rows)
        for seq in range(rows):
            seeded = {**{f: getattr(sampling, f) for f in ("temperature", "top_k", "top_p")}}
            device.start(start(seq, Sampling(**seeded, seed=seq)), seq)
        many = on_device(np.tile(logits, (rows, 1)))
        index, counts = on_device(np.arange(rows, dtype=np.int32)), np.zeros(vocab)
        for _ in range(steps):
            tokens, _, _ = device.collect(device.enqueue(range(rows), index, many))
            counts += np.bincount(tokens, minlength=vocab)
        assert counts[expected == 0].sum() == 0
        drawn = expected > 0
        surprise = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
        assert surprise < (drawn.sum() - 1) + 5 * np.sqrt(2 * (drawn.sum() - 1))


@pytest.mark.parametrize("vocab", [40, 1000, 128256])
def test_masks(vocab: int) -> None:
    rng, rows = np.random.default_rng(2), 12
    samplings = [random_sampling(rng, vocab, allowed_token_ids=None) for _ in range(rows)]
    samplings[0] = Sampling(temperature=0.0)
    host, device = Sampler(vocab), DeviceSampler(DEVICE, vocab, rows)
    for seq, sampling in enumerate(samplings):
        host.start(start(seq, sampling))
        device.start(start(seq, sampling), seq)
    masks = rng.integers(0, 2**32, (3, -(-vocab // 32)), np.uint32)
    allowed = masks[:, np.arange(vocab) // 32] >> (np.arange(vocab) % 32).astype(np.uint32) & 1
    of = rng.integers(-1, 3, rows).astype(np.int32)
    logits = rng.normal(0, 2, (rows, vocab)).astype(np.float32)
    masked = logits.copy()
    for seq in range(rows):
        if of[seq] >= 0:
            masked[seq, allowed[of[seq]] == 0] = -np.inf
    seqs, index = list(range(rows)), np.arange(rows, dtype=np.int32)
    sampled = device.enqueue(
        seqs,
        on_device(index),
        on_device(logits),
        masks=on_device(masks),
        mask_rows=on_device(of),
    )
    tokens, logprobs, failed = device.collect(sampled)
    expected, _, expected_failed = host.sample(seqs, masked)
    assert failed == expected_failed
    for seq in seqs:
        if tokens[seq] != expected[seq]:
            assert choice(masked[seq], samplings[seq], [], [1, 2, 2, 3]).is_near_tie()
        elif seq in logprobs:  # of the model's own distribution
            own = host.prompt_logprobs([tokens[seq]], logits[seq : seq + 1], 0)[0]
            assert logprobs[seq].logprob == pytest.approx(own.logprob, abs=2e-6)
            assert logprobs[seq].rank == own.rank


def test_failures_are_the_samplers() -> None:
    rng, vocab = np.random.default_rng(0), 3000
    pair = Pair(rng, vocab, 16)
    excluded = Sampling(allowed_token_ids=[1, 2], banned_token_ids=[1, 2])
    samplings = [
        Sampling(temperature=0.0),
        Sampling(logprobs=2),
        Sampling(top_p=0.5, allowed_token_ids=[7]),
        excluded,
        Sampling(repetition_penalty=1e-300),
        Sampling(min_tokens=1, stop_token_ids=list(range(vocab))),
    ]
    for poison in (np.nan, np.inf, -np.inf, None):
        logits = rng.normal(1, 1, (len(samplings), vocab)).astype(np.float32)
        if poison == -np.inf:
            logits[1:4] = poison
        elif poison is not None:
            logits[1:4, 100] = poison
        prompts = [[int(row.argmax())] for row in logits]
        pair.compare(samplings, logits, prompts, [[] for _ in samplings])


def test_a_rows_token_does_not_depend_on_its_batch() -> None:
    """Bit for bit: alone many blocks share a row, in a full batch one block has it."""
    rng, vocab, rows = np.random.default_rng(9), 128256, 300
    samplings = [random_sampling(rng, vocab, logprobs=3) for _ in range(rows)]
    logits = random_logits(rng, "normal", rows, vocab)
    device, index = DeviceSampler(DEVICE, vocab, rows), np.arange(rows, dtype=np.int32)
    device.prepare(np.float32, rows)

    def sample(some: list[int]) -> Any:
        for seq in some:
            device.start(start(seq, samplings[seq]), seq)
        return device.collect(device.enqueue(some, on_device(index[some]), on_device(logits[some])))

    together, together_logprobs, _ = sample(list(range(rows)))
    for some in ([5], [6, 7], list(range(40, 60)), list(range(100, 220))):
        tokens, logprobs, _ = sample(some)
        assert tokens == [together[seq] for seq in some]
        assert logprobs == {seq: together_logprobs[seq] for seq in some}


def test_padded_and_misaligned_logits() -> None:
    """Logits may be a view: more rows than sequences, rows apart, starts off vector borders."""
    rng, vocab = np.random.default_rng(4), 4096
    host, device = Sampler(vocab), DeviceSampler(DEVICE, vocab, 4)
    whole = rng.normal(0, 2, (6, vocab + 8)).astype(np.float16)
    held = on_device(whole)
    for first in (0, 3, 8):
        for seq, sampling in enumerate([Sampling(temperature=0.0), Sampling(top_p=0.9, seed=1)]):
            host.start(start(seq, sampling))
            device.start(start(seq, sampling), seq)
        for seqs in ([0], [0, 1]):
            index = on_device(np.array(seqs, np.int32))
            view = held[:, first : first + vocab]
            expected = host.sample(seqs, whole[seqs, first : first + vocab].astype(np.float32))
            assert device.collect(device.enqueue(seqs, index, view)) == expected
