"""Medusa heads on the GPU shard, on NumPy arrays: from the right states; no token changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.draft_cases import Ahead, arrivals, assert_like_the_cpu, scheduler
from helpers.gpu_shards import ArrayRunners, StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.medusa_heads import heads_that_know, write_heads
from helpers.running import Arrival, load, run
from helpers.shard_ranks import ShardRanks
from helpers.tiny_models import directory

from tensorray.actors import device_medusa, gpu_shard
from tensorray.actors.config import ShardConfig
from tensorray.actors.device_drafts import DeviceDrafts
from tensorray.actors.device_medusa import DeviceMedusa
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.gpu_shard import GpuShard, GraphSizes, Limits
from tensorray.actors.protocol import Drafting, Sampling
from tensorray.actors.speculative_config import SpeculativeConfig
from tensorray.actors.step_buffers import StepBuffers
from tensorray.builder.checkpoint.medusa import MedusaHead
from tensorray.builder.model import Layout
from tensorray.builder.precision import numpy_dtype

LIMITS = Limits(max_model_len=64, max_num_seqs=8, step_tokens=40)
EAGER = GraphSizes([], [])
GRAPHS = GraphSizes([2, 8], [16, 40], [8, 24])
HOW = Drafting(max_tokens=4, row_cost=0.01, draft_cost=0.0, wait_cost=0.01)
ASKED = Arrival(0, [20, 21, 22, 23, 24], Sampling(temperature=0.0), 30)


def shard(
    heads: list[MedusaHead], graphs: GraphSizes = GRAPHS, layout: Layout | None = None
) -> StepwiseShard:
    layout = layout or Layout()
    model, weights = load(directory("llama3"), layout)
    medusa = None
    if layout.rank == layout.sampler:
        medusa = DeviceMedusa(
            HostDevice(), heads, model, weights.head, dtype=np.float32, residual=np.float32
        )
    return make_gpu_shard(
        directory("llama3"),
        limits=LIMITS,
        graphs=graphs,
        layout=layout,
        drafts=DeviceDrafts(medusa, HOW, measured=True),
    )


@pytest.mark.parametrize("graphs", [GRAPHS, EAGER], ids=["graphs", "eager"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_heads_that_know_the_text_guess_it(graphs: GraphSizes, ranks: int) -> None:
    """They see the state that each newest token was chosen from, however it was come to."""
    heads, answer = heads_that_know(directory("llama3"), ASKED, 3)
    ours = (
        shard(heads, graphs)
        if ranks == 1
        else ShardRanks(ranks, lambda layout: shard(heads, graphs, layout))
    )
    assert ours.info.drafting is not None
    assert ours.info.drafting.max_tokens == 3
    plans = scheduler(ours)
    ahead = Ahead(ours)
    (found,) = run(ahead, plans, [ASKED], depth=2)
    assert found.tokens == answer
    assert plans.stats().accepted_tokens >= plans.stats().draft_tokens - 3 > 12
    assert ahead.steps < 14


def test_states_are_kept_to_the_bit_by_row() -> None:
    """Of a dtype that NumPy has from elsewhere; not of those that chose nothing."""
    model, weights = load(directory("llama3"))
    device, kind = HostDevice(), numpy_dtype("bfloat16")
    heads, _ = heads_that_know(directory("llama3"), ASKED, 1)
    medusa = DeviceMedusa(device, heads, model, weights.head, dtype=np.float32, residual=kind)
    buffers = StepBuffers(device, max_seqs=4, max_tokens=8, groups=1, width=2, block_size=4, ring=2)
    medusa.prepare(buffers, DeviceSampler(device, model.vocab_size, 4), [], [])
    stream = np.random.default_rng(0).normal(size=(8, model.hidden_size)).astype(kind)
    packed, rows = np.array([[5, 0, 7], [2, -1, 0]], np.int32)
    medusa.keep_states(stream, packed, rows)
    normed = model.final_norm(medusa._ops, weights.head, stream[[5, 7]])
    assert (medusa._normed(np.array([2, 0], np.int32)) == normed).all()
    assert not medusa._normed(np.array([1, 3], np.int32)).any()


def test_wrong_guesses_change_no_token() -> None:
    first = arrivals()[0]
    heads, _ = heads_that_know(directory("llama3"), Arrival(0, first.prompt, first.sampling, 32), 3)
    _, plans = assert_like_the_cpu("llama3", shard(heads))
    assert 0 < plans.stats().accepted_tokens < plans.stats().draft_tokens


def test_a_config_s_heads_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heads, answer = heads_that_know(directory("llama3"), ASKED, 2)
    monkeypatch.setattr(gpu_shard, "open_runners", lambda *_, **__: ArrayRunners())
    monkeypatch.setattr(device_medusa, "_SENT_BYTES", 1000)  # they go there in pieces
    config = ShardConfig(
        str(directory("llama3")),
        speculative_config=SpeculativeConfig("medusa", str(write_heads(tmp_path, heads))),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        block_size=4,
        num_kv_blocks=100,
        cudagraph_capture_sizes=(1, 16, 40),
    )
    ours = GpuShard.load(config, HostDevice())
    assert ours.info.drafting is not None
    assert ours.info.drafting.max_tokens == 2
    assert ours.info.drafting.round_cost > 0
    (found,) = run(Ahead(ours), scheduler(ours), [ASKED], depth=2)
    assert found.tokens == answer
