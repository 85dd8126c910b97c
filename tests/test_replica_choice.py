"""Which replica a request goes to: by what it holds, against what it has to do."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_what_is_foreseen_is_chosen_and_changes_nothing(count: int) -> None:
    choices = [ReplicaChoice[int](foresee=True, seed=0) for _ in range(2)]
    for choice in choices:
        for name in range(count):
            choice.add(name, str(name))
    loads = Loads(*[(name * 37) % 11 for name in range(count)])
    for number in range(60):
        asked = request(tokens(number % 9, 200 + number))
        for choice in choices:  # one is asked more often, but draws the same
            choice._random.seed(number)
        foreseen = choices[0].foresee(asked, loads)
        choices[0]._random.seed(number)
        assert foreseen == choices[0].choose(asked, loads) == choices[1].choose(asked, loads)
        assert foreseen is not None
        assert (foreseen.cached > 0) == (number >= 9) or count > 8


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


@pytest.mark.parametrize("count", [3, 8, 30])
def test_whoever_is_left_is_chosen_however_many_have_gone_at_once(count: int) -> None:
    choice = choice_of(count)
    for _ in range(count - 1):  # it is the last one's turn
        chosen(choice, request([1, 2, 3]), Loads(*[0] * count))
    for name in range(1, count):
        choice.remove(name)
    assert chosen(choice, request([1, 2, 3]), Loads(0)) == (0, 0)
    choice.remove(0)
    assert choice.choose(request([1, 2, 3]), Loads()) is None


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


def held(prompt: list[int], sent: list[list[int]]) -> int:
    """How much of a prompt a replica holds that was sent these: a full comparison."""
    same = max(
        (
            next((i for i, (a, b) in enumerate(zip(prompt, each, strict=False)) if a != b), len(s))
            for each in sent
            for s in [min(prompt, each, key=len)]
        ),
        default=0,
    )
    return max((at for at, _ in prefix_keys(request(prompt)) if at <= same), default=0)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 8))
def test_among_few_it_is_what_looking_at_all_of_everything_finds(
    data: st.DataObject, count: int
) -> None:
    choice = choice_of(count)
    sent: list[list[list[int]]] = [[] for _ in range(count)]
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = tokens(data.draw(st.integers(0, 2)), data.draw(st.sampled_from([40, 130, 300])))
        prompt += tokens(data.draw(st.integers(3, 5)), data.draw(st.sampled_from([0, 90, 200])))
        loads = Loads(*(data.draw(st.none() | st.integers(0, 400)) for _ in range(count)))
        found = choice.choose(request(prompt), loads)
        costs = {
            name: load - (held(prompt, sent[name]) if count > 1 else 0)
            for name, load in enumerate(loads.loads)
            if load is not None
        }
        if not costs:
            assert found is None
            continue
        assert found is not None
        assert costs[found.replica] == min(costs.values())
        sent[found.replica].append(prompt)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(9, 400), st.booleans())
def test_among_many_few_are_looked_at_and_the_best_of_them_is_taken(
    data: st.DataObject, count: int, meet: bool
) -> None:
    choice: ReplicaChoice[int] = ReplicaChoice(meet=meet, seed=data.draw(st.integers(0, 99)))
    for name in range(count):
        choice.add(name, str(name))
    loads = random.Random(data.draw(st.integers(0, 99))).choices(range(4000), k=count)
    asked: list[int] = []

    def load(name: int) -> int:
        asked.append(name)
        return loads[name]

    for number in range(30):
        asked.clear()
        prompt = tokens(number % 3, 300) + tokens(number, 100)
        found = choice.choose(request(prompt), load)
        assert found is not None
        assert 2 <= len(set(asked)) <= len(asked) <= 12
        # What is cached, and that prompts meet, is worth no more than this.
        assert loads[found.replica] <= min(loads[name] for name in asked) + 2 * len(prompt)
        loads[found.replica] += SEQUENCE_TOKENS + len(prompt) - found.cached


def test_the_one_that_is_chosen_among_a_thousand_is_seldom_a_busy_one() -> None:
    count, rng = 1000, random.Random(3)
    choice = choice_of(count, "balanced")
    loads = Loads(*rng.sample(range(count), count))  # so a load is a place in the order
    places = [chosen(choice, request([1, 2, 3]), loads)[0] for _ in range(4000)]
    mean = sum(loads.loads[name] or 0 for name in places) / len(places)
    assert mean == pytest.approx(count / 3, rel=0.05)  # the lesser of two at random


def several(count: int, names: list[int]) -> list[ReplicaChoice[int]]:
    """Ingresses that came to know the replicas in different orders."""
    found = []
    for seed in range(count):
        choice: ReplicaChoice[int] = ReplicaChoice(meet=True, seed=seed)
        for name in random.Random(seed).sample(names, len(names)):
            choice.add(name, str(name))
        found.append(choice)
    return found


@pytest.mark.parametrize("count", [4, 200])
def test_prompts_that_begin_alike_meet_whichever_way_they_come(count: int) -> None:
    ingresses, idle = several(5, list(range(count))), Loads(*[0] * count)
    homes = Counter[int]()
    for group in range(100):
        found = {
            chosen(each, request(tokens(group, 100) + tokens(number, 60)), idle)[0]
            for number, each in enumerate(ingresses)
        }
        assert len(found) == 1
        homes.update(found)
    assert max(homes.values()) < 100 * 3 / count + 5


def test_they_part_where_meeting_costs_too_much() -> None:
    asked, idle = request(tokens(1, 200)), Loads(*[0] * 4)
    home, _ = chosen(several(1, [0, 1, 2, 3])[0], asked, idle)
    loads = Loads(*[0] * 4)
    loads.loads[home] = 399
    assert chosen(several(1, [0, 1, 2, 3])[0], asked, loads) == (home, 0)
    loads.loads[home] = 401
    assert chosen(several(1, [0, 1, 2, 3])[0], asked, loads)[0] != home
    loads.loads[home] = None
    assert chosen(several(1, [0, 1, 2, 3])[0], asked, loads)[0] != home


def test_a_replica_that_goes_moves_only_what_was_at_home_there() -> None:
    names, idle = list(range(20)), Loads(*[0] * 20)
    prompts = [request(tokens(group, 100)) for group in range(200)]
    (before,) = several(1, names)
    homes = [chosen(before, prompt, idle)[0] for prompt in prompts]
    (after,) = several(1, names)
    after.remove(7)
    for prompt, home in zip(prompts, homes, strict=True):
        moved = chosen(after, prompt, idle)[0]
        assert (moved == home) is (home != 7)
