"""What a deployment needs, and filling a store with it: everything but compiling, without Ray."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers.plans import TARGET, nonsense, request
from helpers.published_configs import PUBLISHED

from tensorray.builder import build
from tensorray.builder.build import (
    LocalWorkers,
    Outcome,
    PlanRequest,
    Progress,
    compile_plan,
    fill,
    find_segments,
    look_up,
    plan_for,
)
from tensorray.builder.graph import trace
from tensorray.builder.joining import join
from tensorray.builder.model import Layout, ModelConfigError, stage_layers
from tensorray.builder.models.llama import Llama
from tensorray.builder.plan import Plan
from tensorray.builder.registry import resolve
from tensorray.builder.store import PlanStore, StoreError, open_store
from tensorray.builder.tensorrt_flavour import TargetError, TensorRTError

REQUESTS = [request(size) for size in (8, 16, 24, 32)]
LLAMA = PUBLISHED["Llama-3.1-8B"].config


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "POLL", 0.02)


@dataclass
class Events(Progress):
    """Everything heard, as (what, segment name)."""

    heard: list[tuple[str, str]]

    def building(self, request: PlanRequest) -> None:
        self.heard.append(("building", request.name))

    def elsewhere(self, request: PlanRequest) -> None:
        self.heard.append(("elsewhere", request.name))

    def finished(self, outcome: Outcome) -> None:
        self.heard.append((outcome.state, outcome.request.name))


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


# --- what is needed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "stages"), [(32, 1), (32, 2), (126, 8), (7, 3), (5, 5)])
def test_stages_share_the_layers_out(layers: int, stages: int) -> None:
    parts = [stage_layers(layers, stages, rank) for rank in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_stages_than_layers() -> None:
    with pytest.raises(ModelConfigError, match=r"9 pipeline stages for 8 layers.*1 to 8"):
        stage_layers(8, 9, 0)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Mixtral-8x7B-v0.1", "gemma-3-27b"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
def test_every_rank_and_stage_finds_its_segments(name: str, tp: int, pp: int) -> None:
    config = PUBLISHED[name].model().config
    definition = resolve(config)
    found = {each.segment for each in find_segments(definition, config, tp_size=tp, pp_size=pp)}
    used = set()
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            model = definition(config, Layout(tp_rank, tp, pp_rank, pp))
            layers = stage_layers(model.num_layers, pp, pp_rank)
            used |= set(join(trace(model, layers)).segments())
    assert found == used


def test_segments_do_not_grow_with_layers_or_ranks() -> None:
    def count(layers: int, tp: int) -> int:
        return len(find_segments(Llama, {**LLAMA, "num_hidden_layers": layers}, tp_size=tp))

    assert count(4, 1) == count(126, 1) <= 6
    assert count(4, 2) == count(126, 8) <= 6


def test_segments_are_named_by_where_they_are() -> None:
    names = [each.name for each in find_segments(Llama, LLAMA, tp_size=2)]
    assert names == [
        "layer 0: attention_norm qkv",
        "layers 0-31: o",
        "layers 0-31: gate_up down",
        "layers 1-31: qkv",
        "layer 31: add_residual",
        "head: norm tokens",
    ]


def test_ranks_that_do_not_divide_the_model() -> None:
    with pytest.raises(ModelConfigError, match="sizes that do: 1, 2, 4, 8"):
        find_segments(Llama, LLAMA, tp_size=3)


def test_another_machines_target_is_refused() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'tensorray[rtx]'")
    with pytest.raises(TargetError, match=r"this machine builds for .*not for .*version='1\.7'"):
        compile_plan(request(target=TARGET))


# --- filling a store --------------------------------------------------------------------------


def test_what_is_missing_is_built_and_the_next_run_builds_nothing(store: PlanStore) -> None:
    built: list[str] = []

    def compile(request: PlanRequest) -> Plan:
        built.append(request.name)
        return nonsense(request)

    assert states(look_up(REQUESTS, store)) == ["missing"] * 4
    store.put(nonsense(REQUESTS[1]))
    events = Events([])
    outcomes = fill(REQUESTS, store, LocalWorkers(compile), events)
    assert states(outcomes) == ["compiled", "reused", "compiled", "compiled"]
    assert [outcome.request for outcome in outcomes] == REQUESTS
    assert [outcome.seconds for outcome in outcomes] == [0.25, 0.0, 0.25, 0.25]
    assert {outcome.bytes for outcome in outcomes} == {len(nonsense(REQUESTS[0]).data)}
    assert Counter(what for what, _ in events.heard) == Counter(reused=1, building=3, compiled=3)
    assert built == ["silu 8", "silu 24", "silu 32"]
    assert states(fill(REQUESTS, store, LocalWorkers(compile))) == ["reused"] * 4
    assert states(look_up(REQUESTS, store)) == ["reused"] * 4
    assert len(built) == 3


def test_equal_requests_are_built_once(store: PlanStore) -> None:
    built: list[str] = []

    def compile(request: PlanRequest) -> Plan:
        built.append(request.key)
        return nonsense(request)

    twice = [REQUESTS[0], replace(REQUESTS[0], name="the same, elsewhere")]
    assert states(fill(twice, store, LocalWorkers(compile))) == ["compiled"] * 2
    assert len(built) == 1


def test_a_truncated_plan_is_built_again(
    store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    fill(REQUESTS, store, LocalWorkers(nonsense))
    name = f"plans/{REQUESTS[2].key}.plan"
    store.write(name, (store.read(name) or b"")[:-100])
    with caplog.at_level(logging.WARNING):
        outcomes = fill(REQUESTS, store, LocalWorkers(nonsense))
    assert states(outcomes) == ["reused", "reused", "compiled", "reused"]
    assert "truncated or corrupt" in caplog.text
    assert store.get(REQUESTS[2].key) == nonsense(REQUESTS[2])


def test_a_segment_that_fails_is_named_and_the_rest_lands(store: PlanStore) -> None:
    def compile(request: PlanRequest) -> Plan:
        if request == REQUESTS[1]:
            raise TensorRTError("0.silu/sigmoid: no such activation")
        return nonsense(request)

    outcomes = fill(REQUESTS, store, LocalWorkers(compile))
    assert states(outcomes) == ["compiled", "failed", "compiled", "compiled"]
    assert outcomes[1].error == "silu 16, for sm_89: 0.silu/sigmoid: no such activation"
    claim = store.claim(REQUESTS[1].key)
    assert claim is not None, "a failed build lets go of its claim"
    claim.release()


def test_a_store_that_fails_ends_the_job_and_keeps_what_is_there(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put

    def put_two(plan: Plan) -> None:
        if plan.key == REQUESTS[2].key:
            raise StoreError("full")
        put(plan)

    monkeypatch.setattr(store, "put", put_two)
    with pytest.raises(StoreError, match="full"):
        fill(REQUESTS, store, LocalWorkers(nonsense))
    assert states(look_up(REQUESTS, store)) == ["reused", "reused", "missing", "missing"]
    claims = [store.claim(request.key) for request in REQUESTS]
    assert None not in claims, "the job let go of all it had claimed"
    for claim in claims:
        assert claim is not None
        claim.release()


def test_nothing_is_built_for_a_store_that_can_not_be_written(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise StoreError("read-only")

    def compile(_: PlanRequest) -> Plan:
        raise AssertionError("built in vain")

    monkeypatch.setattr(store, "check_writable", refuse)
    with pytest.raises(StoreError, match="read-only"):
        fill(REQUESTS, store, LocalWorkers(compile))


def test_a_full_read_only_store_is_enough_when_nothing_is_missing(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(REQUESTS, store, LocalWorkers(nonsense))

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    for method in ("check_writable", "write", "claim"):
        monkeypatch.setattr(store, method, refuse)
    assert states(fill(REQUESTS, store, LocalWorkers(nonsense))) == ["reused"] * 4


# --- jobs side by side ------------------------------------------------------------------------


def test_two_jobs_at_once_build_each_plan_once(store: PlanStore) -> None:
    built: Counter[str] = Counter()
    both = threading.Barrier(2)

    def job() -> list[Outcome]:
        both.wait()
        return fill(REQUESTS, open_store(store.url), LocalWorkers(compile))

    def compile(request: PlanRequest) -> Plan:
        built[request.key] += 1
        return nonsense(request)

    with ThreadPoolExecutor(2) as pool:
        first, second = (job.result() for job in [pool.submit(job), pool.submit(job)])
    assert set(built.values()) == {1}
    assert len(built) == len(REQUESTS)
    pairs = {frozenset(pair) for pair in zip(states(first), states(second), strict=True)}
    assert pairs == {frozenset(("compiled", "reused"))}


def test_a_job_takes_over_what_another_fails_to_build(store: PlanStore) -> None:
    claim = store.claim(REQUESTS[0].key)
    assert claim is not None

    class OtherEnds(Events):
        def finished(self, outcome: Outcome) -> None:
            super().finished(outcome)
            if sum(what == "compiled" for what, _ in self.heard) == len(REQUESTS) - 1:
                claim.release()  # the other job ends, without a plan

    events = OtherEnds([])
    outcomes = fill(REQUESTS, open_store(store.url), LocalWorkers(nonsense), events)
    assert states(outcomes) == ["compiled"] * 4
    assert ("elsewhere", "silu 8") in events.heard
    assert events.heard[-1] == ("compiled", "silu 8"), "the others did not wait for it"


# --- a shard at its start ---------------------------------------------------------------------


def never(_: PlanRequest) -> Plan:
    raise AssertionError("there is a plan")


def test_a_shard_builds_what_is_not_there_and_stores_it(store: PlanStore) -> None:
    assert plan_for(REQUESTS[0], store, nonsense) == nonsense(REQUESTS[0])
    assert plan_for(REQUESTS[0], store, never) == nonsense(REQUESTS[0])


def test_shards_that_start_together_build_once(store: PlanStore) -> None:
    built: list[str] = []

    def compile(request: PlanRequest) -> Plan:
        built.append(request.key)
        return nonsense(request)

    def start(_: int) -> Plan:
        return plan_for(REQUESTS[0], open_store(store.url), compile)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(start, range(4))) == {nonsense(REQUESTS[0])}
    assert len(built) == 1


@pytest.mark.parametrize("fails", ["read", "claim", "write"])
def test_a_shard_serves_without_a_store_that_fails(
    store: PlanStore,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    built: list[str] = []

    def compile(request: PlanRequest) -> Plan:
        built.append(request.key)
        return nonsense(request)

    def refuse(*_: object) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(store, fails, refuse)
    assert plan_for(REQUESTS[0], store, compile) == nonsense(REQUESTS[0])
    assert len(built) == 1
    assert "gone; going on without it" in caplog.text


def test_a_shard_hears_what_tensorrt_says(store: PlanStore) -> None:
    def reject(_: PlanRequest) -> Plan:
        raise TensorRTError("0.silu/sigmoid: no such activation")

    with pytest.raises(TensorRTError, match="no such activation"):
        plan_for(REQUESTS[0], store, reject)
    claim = store.claim(REQUESTS[0].key)
    assert claim is not None
    claim.release()
