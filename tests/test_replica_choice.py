"""Which replica a request goes to: by what it holds, against what it has to do."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from tensorray.actors.protocol import Sampling
from tensorray.cluster import replica_choice
from tensorray.cluster.replica_choice import SEQUENCE_TOKENS, ReplicaChoice, Routing, prefix_keys
from tensorray.cluster.request import GenerationRequest


def request(prompt: list[int], **fields: object) -> GenerationRequest:
    return GenerationRequest("r", prompt, Sampling(), 16, **fields)  # type: ignore[arg-type]


def tokens(group: int, length: int) -> list[int]:
    return [(group * 7919 + i * 31) % 50_000 for i in range(length)]


def choice_of(count: int, routing: Routing = "prefix") -> ReplicaChoice[int]:
    choice: ReplicaChoice[int] = ReplicaChoice(routing, seed=0)
    for name in range(count):
        choice.add(name, str(name))
    return choice


class Loads:
    """Replicas that never finish anything."""

    def __init__(self, *loads: int | None) -> None:
        self.loads = list(loads)

    def __call__(self, name: int) -> int | None:
        return self.loads[name]


def chosen(choice: ReplicaChoice[int], asked: GenerationRequest, loads: Loads) -> tuple[int, int]:
    found = choice.choose(asked, loads)
    assert found is not None
    return found.replica, found.cached


def test_a_prompt_follows_its_beginning() -> None:
    choice, idle = choice_of(8), Loads(*[0] * 8)
    first, cached = chosen(choice, request(tokens(1, 300)), idle)
    assert cached == 0
    for more in range(1, 20):
        again, cached = chosen(choice, request(tokens(1, 300) + tokens(more, 100)), idle)
        assert again == first
        assert cached >= 256


def test_the_longest_prefix_wins_among_equally_loaded() -> None:
    choice, idle = choice_of(8), Loads(*[0] * 8)
    short, _ = chosen(choice, request(tokens(1, 128)), idle)
    busy = Loads(*[0] * 8)
    busy.loads[short] = 10_000
    long, _ = chosen(choice, request(tokens(1, 128) + tokens(2, 1000)), busy)
    assert long != short
    found = chosen(choice, request(tokens(1, 128) + tokens(2, 1000) + [5]), idle)
    assert found[0] == long
    assert found[1] > 900


def test_a_prefix_is_worth_as_much_queue_as_it_saves() -> None:
    choice = choice_of(2)
    prompt = tokens(1, 512)
    first, _ = chosen(choice, request(prompt), Loads(0, 0))
    loads = Loads(0, 0)
    loads.loads[first] = 511
    assert chosen(choice, request([*prompt, 1]), loads) == (first, 512)
    loads.loads[first] = 513
    assert chosen(choice, request([*prompt, 2]), loads) == (1 - first, 0)
    # And now both hold it.
    loads.loads[first] = 1
    assert chosen(choice, request([*prompt, 3]), loads) == (1 - first, 512)


def test_salts_and_adapters_share_nothing() -> None:
    choice, idle = choice_of(4), Loads(0, 0, 0, 0)
    chosen(choice, request(tokens(1, 256), cache_salt="alice"), idle)
    assert chosen(choice, request(tokens(1, 256), cache_salt="bob"), idle)[1] == 0
    assert chosen(choice, request(tokens(1, 256), cache_salt="alice"), idle)[1] == 256
    assert chosen(choice, request(tokens(1, 256), lora="alice"), idle)[1] == 0


def test_a_request_that_may_not_reuse_a_prefix_goes_by_load() -> None:
    choice = choice_of(2)
    first, _ = chosen(choice, request(tokens(1, 256)), Loads(0, 0))
    loads = Loads(0, 0)
    loads.loads[first] = 1
    assert chosen(choice, request(tokens(1, 256), reuse_prefix=False), loads) == (1 - first, 0)


def test_equals_take_turns() -> None:
    for routing in ("prefix", "balanced"):
        choice = choice_of(5, routing)  # type: ignore[arg-type]
        found = [chosen(choice, request([1, 2, 3]), Loads(*[0] * 5))[0] for _ in range(10)]
        assert found == [0, 1, 2, 3, 4] * 2


def test_one_that_cannot_be_used_is_passed_over_and_one_that_is_gone_forgotten() -> None:
    choice = choice_of(3)
    prompt = request(tokens(1, 256))
    first, _ = chosen(choice, prompt, Loads(0, 0, 0))
    loads = Loads(0, 0, 0)
    loads.loads[first] = None
    for _ in range(10):
        assert chosen(choice, prompt, loads)[0] != first
    assert choice.choose(prompt, Loads(None, None, None)) is None
    for name in range(3):
        choice.remove(name)
    assert choice.choose(prompt, Loads(0, 0, 0)) is None
    choice.add(3, "3")
    assert chosen(choice, prompt, Loads(0, 0, 0, 0)) == (3, 0)


@pytest.mark.parametrize("routing", ["prefix", "balanced"])
def test_skewed_prefixes_leave_no_replica_behind(routing: Routing) -> None:
    """Nine of ten requests share one prefix; each weighs what it leaves to compute."""
    count, rng = 16, random.Random(1)
    choice, loads = choice_of(count, routing), Loads(*[0] * count)
    held: list[set[int]] = [set() for _ in range(count)]
    hits = 0
    for number in range(4000):
        group = 0 if rng.random() < 0.9 else rng.randrange(1, 40)
        asked = request(tokens(group, 512) + tokens(1000 + number, 64))
        name, _ = chosen(choice, asked, loads)
        hit = group in held[name]
        hits += hit
        held[name].add(group)
        loads.loads[name] += SEQUENCE_TOKENS + 64 + (0 if hit else 512)  # type: ignore[operator]
    work = [load or 0 for load in loads.loads]
    assert max(work) < 1.1 * sum(work) / count
    if routing == "prefix":
        assert hits > 0.97 * 4000


def test_random_pairs_balance_among_many() -> None:
    count = 1000
    choice, sent = choice_of(count, "balanced"), Counter[int]()
    rng = random.Random(2)
    loads = Loads(*[0] * count)
    for _ in range(20 * count):
        name, _ = chosen(choice, request([1, 2, 3]), loads)
        sent[name] += 1
        loads.loads[name] += rng.randrange(1, 3)  # type: ignore[operator]
    assert max(sent.values()) < 40


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_choice, "_PREFIXES_A_REPLICA", 50)
    choice, idle = choice_of(4), Loads(0, 0, 0, 0)
    hot = request(tokens(0, 256))
    first, _ = chosen(choice, hot, idle)
    for group in range(1, 300):
        chosen(choice, request(tokens(group, 640)), idle)
        assert chosen(choice, hot, idle) == (first, 256)  # in use, so not forgotten
    assert len(choice) == 200
    assert chosen(choice, request(tokens(1, 640)), idle)[1] == 0


def test_keys_are_few_however_long_the_prompt() -> None:
    lengths = [length for length, _ in prefix_keys(request(tokens(0, 200_000)))]
    assert len(lengths) < 70
    assert lengths[:4] == [64, 128, 192, 256]
    assert all(b - a <= max(64, a / 8) for a, b in pairwise(lengths))
    assert lengths[-1] > 200_000 * 8 / 9
    longer = prefix_keys(request([*tokens(0, 1000), 3]))
    assert prefix_keys(request(tokens(0, 1000))) == longer
    assert prefix_keys(request(tokens(0, 63))) == []
    assert prefix_keys(request([-1] * 100)) == []
