"""Hostile bodies, templates and files get a clear refusal: a short run, the same every time.

`make fuzz` runs longer, by coverage. Counts are printed with -s.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from tests.fuzz import short, targets
from tests.fuzz.mutate import mutated
from tests.fuzz.short import Hang

#: Changed inputs a target; what takes longer gets fewer.
CHANGES = {"bodies": 400, "triton_tensors": 300, "chat_templates": 300, "safetensors": 60}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_nothing_but_clear_refusals(name: str) -> None:
    count, found = short.run(name, targets.TARGETS[name](), CHANGES.get(name, 150), seed=0)
    print(f"{name}: {count} inputs, {len(found)} findings")
    assert [f"{data[:200]!r}\n{why}" for data, why in found] == []


def test_seeds_are_what_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that is refused at once would find nothing; with no refusal allowed, none is."""
    monkeypatch.setattr(targets, "suppress", lambda *_: nullcontext())
    # One template raises by itself; of the GGUF files one has a tokenizer only, the others none.
    allowed = {"safetensors": 0, "gguf": 4, "chat_templates": 1, "manifests": 0}
    for name, most in allowed.items():
        target = targets.TARGETS[name]()
        refused = [why for seed in target.seeds() if (why := short.fault(target, seed))]
        assert len(refused) <= most, refused
    server = targets.server()
    statuses: dict[str, set[int]] = {}
    for seed in targets.Bodies().seeds():
        path, _, body = seed.decode().partition("\n")
        path = path.replace("{name}", "tiny").replace("{version}", "1")
        answer = server.post(path, body.encode(), {"Content-Type": "application/json"})
        statuses.setdefault(path, set()).add(answer.status_code)
    reached = {path for path, found in statuses.items() if 200 in found}
    assert reached >= {path for path, _ in targets._REQUESTS}


class Faulty:
    """A target that fails, and one that hangs, on some of its inputs."""

    def __init__(self, how: str) -> None:
        self._how = how

    def seeds(self) -> list[bytes]:
        return [b'{"a": 1}', b"fine"]

    def run(self, data: bytes) -> None:
        while self._how == "hang" and data == b"fine":
            pass
        if self._how == "fail" and b"null" in data:
            raise KeyError(data)


def test_faults_and_hangs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = Faulty("fail")
    count, found = short.run("faulty", target, 500, seed=0)
    assert count == 502
    assert found
    assert all(b"null" in data and "KeyError" in why for data, why in found)
    assert short.run("faulty", target, 500, seed=0)[1] == found, "every run is the same"
    monkeypatch.setattr(short, "HANGS_AFTER", 1)
    _, found = short.run("faulty", Faulty("hang"), 0, seed=0)
    assert [data for data, _ in found] == [b"fine"]
    assert Hang.__name__ in found[0][1]


def test_changes_come_from_the_seed() -> None:
    from random import Random

    inputs = [b'{"a": [1, {"b": "c"}]}', b"x\n{}", b"plain"]
    first = [mutated(data, inputs, Random(5)) for data in inputs * 20]
    assert first == [mutated(data, inputs, Random(5)) for data in inputs * 20]
    assert len({mutated(inputs[0], inputs, Random(i)) for i in range(200)}) > 100
