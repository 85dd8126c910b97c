import numpy as np
import pytest

from tensorray.kernels.philox import philox4x32, uniform

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    (
        [0x00000000, 0x00000000, 0x00000000, 0x00000000],
        [0x00000000, 0x00000000],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
        [0xFFFFFFFF, 0xFFFFFFFF],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def test_known_answers() -> None:
    counters, keys, results = (np.array(column).T for column in zip(*KNOWN_ANSWERS, strict=True))
    assert np.array_equal(philox4x32(counters, keys), results)


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (2**64 - 1, 7), (123456789 << 32 | 987654321, 2**40 + 3)]
)
def test_uniform_takes_its_bits_from_the_words_of_seed_and_position(
    seed: int, position: int
) -> None:
    counter = np.array([position & 0xFFFFFFFF, position >> 32, 0, 0])[:, None]
    key = np.array([seed & 0xFFFFFFFF, seed >> 32])[:, None]
    words = [int(word) for word in philox4x32(counter, key)[:, 0]]
    assert uniform([seed], [position])[0] == ((words[0] << 32 | words[1]) >> 11) / 2**53


def test_a_draw_depends_on_its_own_pair_alone() -> None:
    seeds, positions = np.meshgrid(np.arange(5, dtype=np.uint64), np.arange(7))
    together = uniform(seeds.ravel(), positions.ravel())
    pairs = zip(seeds.ravel().tolist(), positions.ravel().tolist(), strict=True)
    alone = [uniform([seed], [position])[0] for seed, position in pairs]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone)


def test_draws_spread_evenly_over_the_unit_interval() -> None:
    draws = uniform(np.full(100_000, 42, np.uint64), np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.bincount((draws * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square, 99 degrees, 99.9 %
