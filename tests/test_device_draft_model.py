"""A draft model on the GPU shard, on NumPy arrays: its guesses save steps and change no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.draft_cases import assert_like_the_cpu, scheduler
from helpers.gpu_shards import ArrayRunners, StepwiseShard, make_draft_model, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.running import Arrival, run
from helpers.shard_ranks import ShardRanks
from helpers.table_models import MOST, chi_square, write_on
from helpers.tiny_models import directory

from tensorray.actors import device_draft_model, gpu_shard
from tensorray.actors.config import ShardConfig
from tensorray.actors.device_draft_model import DeviceDraftModel
from tensorray.actors.device_drafts import DeviceDrafts
from tensorray.actors.gpu_shard import GpuShard, GraphSizes, Limits
from tensorray.actors.protocol import Drafting, Sampling
from tensorray.actors.speculative_config import SpeculativeConfig
from tensorray.builder.model import Layout, ModelConfigError
from tensorray.cluster.scheduler import Scheduler

LIMITS = Limits(max_model_len=64, max_num_seqs=8, step_tokens=40)
EAGER = GraphSizes([], [])
GRAPHS = GraphSizes([2, 8], [16, 40], [8, 24])


HOW = Drafting(max_tokens=4, row_cost=0.01, draft_cost=0.0, wait_cost=0.01)


def shard(name: str, small: str, limits: Limits = LIMITS, **settings: Any) -> StepwiseShard:
    layout = settings.get("layout", Layout())
    model = None
    if layout.rank == layout.sampler:
        model = make_draft_model(directory(small), directory(name), limits)
    settings = {"graphs": GRAPHS, "drafts": DeviceDrafts(model, HOW, measured=True), **settings}
    return make_gpu_shard(directory(name), limits=limits, **settings)


@pytest.mark.parametrize("graphs", [GRAPHS, EAGER], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_model_guesses_itself_right(name: str, graphs: GraphSizes) -> None:
    """What is likeliest, and what is drawn: by the random numbers that the draws will have."""
    ahead, plans = assert_like_the_cpu(name, shard(name, name, graphs=graphs), [0, 2, 6, 7])
    stats = plans.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 60
    assert ahead.steps < 40


def test_penalties_and_rules_cost_guesses_and_no_token() -> None:
    _, plans = assert_like_the_cpu("llama3", shard("llama3", "llama3"))
    stats = plans.stats()
    assert 0.5 * stats.draft_tokens < stats.accepted_tokens < stats.draft_tokens


@pytest.mark.parametrize("blocks", [34, 512])
def test_another_model_s_guesses_change_no_token(blocks: int) -> None:
    """Few blocks: sequences lose theirs, come back, and find others' keys where theirs were."""
    _, plans = assert_like_the_cpu("llama3", shard("llama3", "qwen2", num_blocks=blocks))
    stats = plans.stats()
    assert 0 <= stats.accepted_tokens < stats.draft_tokens
    assert (stats.preemptions > 0) == (blocks == 34)


def test_other_ranks_are_handed_what_the_model_guesses() -> None:
    graphs = GraphSizes([8], [40], [24])
    shards = ShardRanks(2, lambda layout: shard("llama3", "llama3", layout=layout, graphs=graphs))
    for _ in range(2):  # graphs, cache and sequences are new the second time
        _, plans = assert_like_the_cpu("llama3", shards, [0, 2, 6, 7])
        assert plans.stats().accepted_tokens == plans.stats().draft_tokens > 60
        shards.join()


def test_a_prompt_longer_than_a_step_is_taken_in_over_several() -> None:
    short = Limits(max_model_len=64, max_num_seqs=8, step_tokens=9)
    ours = shard("llama3", "llama3", short, graphs=GraphSizes([8], [9], [8]))
    arrival = Arrival(0, [20, 21, 22, 23] * 9, Sampling(temperature=0.0), 25)
    plain = make_gpu_shard(directory("llama3"), limits=LIMITS)
    (expected,) = run(plain, scheduler(plain), [arrival])
    plans = Scheduler(
        ours.info.kv,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=9,
        drafting=ours.info.drafting,
    )
    (found,) = run(ours, plans, [arrival])
    assert found == expected
    # Room that was left in vain, while the prompt was run, made the rule careful for a while.
    assert plans.stats().accepted_tokens == plans.stats().draft_tokens > 0


def test_nothing_is_guessed_beyond_what_the_small_model_was_made_for() -> None:
    ours = shard("llama3", "llama3")
    model = ours._drafts._drafter  # type: ignore[union-attr]
    assert isinstance(model, DeviceDraftModel)
    model._books.longest = 30
    arrival = Arrival(0, [20, 21, 22, 23] * 5, Sampling(temperature=0.0), 40)
    plain = make_gpu_shard(directory("llama3"), limits=LIMITS)
    (expected,) = run(plain, scheduler(plain), [arrival])
    plans = scheduler(ours)
    (found,) = run(ours, plans, [arrival])
    assert found == expected
    assert 5 <= plans.stats().accepted_tokens <= 10


def test_the_distribution_is_the_large_model_s() -> None:
    found, right = write_on(HostDevice(), texts=16, steps=60, room=2, temperature=0.8)
    assert 0.2 < right / (16 * 2 * 59) < 0.9
    assert chi_square(found, 0.8) < MOST
    assert chi_square(found, 1.1) > MOST
    alone, _ = write_on(HostDevice(), texts=16, steps=30, room=0, temperature=0.8)
    assert [text[:31] for text in found] == alone


def load(monkeypatch: pytest.MonkeyPatch, small: Path | None, **settings: Any) -> GpuShard:
    """A shard as a config has it, on NumPy arrays."""
    for module in (gpu_shard, device_draft_model):
        monkeypatch.setattr(module, "open_runners", lambda *_, **__: ArrayRunners())
    how = None if small is None else SpeculativeConfig("draft_model", str(small))
    config = ShardConfig(
        str(directory("llama3")),
        speculative_config=how,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        block_size=4,
        cudagraph_capture_sizes=(1, 16, 40),
        **settings,
    )
    return GpuShard.load(config, HostDevice())


def test_both_caches_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"kv_cache_memory_bytes": 1 << 20}
    alone = load(monkeypatch, None, **given).info
    both = load(monkeypatch, directory("llama3"), **given).info
    assert both.kv.num_blocks == alone.kv.num_blocks // 2
    assert both.drafting is not None
    # Its steps were timed, and are part of what a round costs.
    assert both.drafting.round_cost > both.drafting.wait_cost * 0.095 / 0.35


def test_a_model_of_other_tokens_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (directory("llama3") / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 272', '"vocab_size": 280'))
    with pytest.raises(ModelConfigError, match="they have to share a vocabulary"):
        load(monkeypatch, tmp_path, load_format="dummy")
