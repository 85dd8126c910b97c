"""Which routers an ingress sends to: all of few, a share of many, known from names alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.cluster import router_share
from tensorray.cluster.replicas import Replicas
from tensorray.cluster.router_share import Place


def share(place: Place, routers: list[str]) -> set[str]:
    senders = place.senders(len(routers))
    return {router for router in routers if place.sends_to(router, senders)}


@settings(deadline=None, max_examples=20)
@given(ingresses=st.integers(1, 12), routers=st.integers(1, 120))
def test_every_router_has_as_many_ingresses_as_any_other(ingresses: int, routers: int) -> None:
    names = [f"router-{number}" for number in range(routers)]
    sent = Counter(
        name for number in range(ingresses) for name in share(Place(number, ingresses), names)
    )
    assert set(sent.values()) == {Place(0, ingresses).senders(routers)}
    assert len(sent) == routers
    assert min(sent.values()) >= min(2, ingresses)


def test_of_few_routers_an_ingress_sends_to_all_and_of_many_to_few() -> None:
    few = [f"router-{number}" for number in range(64)]
    assert all(share(Place(number, 12), few) == set(few) for number in range(12))
    many = [f"router-{number}" for number in range(400)]
    assert share(Place(), many) == set(many)
    sizes = [len(share(Place(number, 12), many)) for number in range(12)]
    assert sum(sizes) == 2 * 400
    assert all(45 <= size <= 90 for size in sizes)


def test_a_router_that_comes_changes_nothing_for_the_others() -> None:
    names = [f"router-{number}" for number in range(200)]
    for number in range(8):
        place = Place(number, 8)
        assert share(place, [*names, "another"]) - {"another"} == share(place, names)


def test_more_ingresses_for_a_router_are_those_it_has_and_others() -> None:
    place = Place(3, 12)
    for router in map(str, range(50)):
        held = [place.sends_to(router, senders) for senders in range(1, 13)]
        assert held == sorted(held)
        assert held[-1]


def test_ingresses_are_ranked_once_with_each_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the number of senders changes: it stops all streams meanwhile."""
    ranked: list[str] = []
    rank = router_share._rank

    def count(router: str, ingress: int) -> tuple[bytes, int]:
        ranked.append(router)
        return rank(router, ingress)

    monkeypatch.setattr(router_share, "_rank", count)
    place = Place(3, 10)
    replicas: Replicas[Any] = Replicas(place=place)
    for number in range(150):
        replicas.add(str(number), None)
    assert len({place.senders(routers) for routers in range(1, 151)}) > 5
    assert max(Counter(ranked).values()) == 1 + 10
    monkeypatch.undo()
    near = {each.name for each in replicas.members() if each.near}
    assert near == share(place, [str(number) for number in range(150)])
