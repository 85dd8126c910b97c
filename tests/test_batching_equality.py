"""Whatever shares its batch, a request gets the tokens it gets alone (helpers/equality.py).

Random mixes of lengths, arrival times, chunk sizes, pool sizes (so preemption), shared prefixes
and cancellations run on the real shard and scheduler, one or two steps in flight.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.equality import assert_same_tokens, choice
from helpers.running import Arrival, Outcome, RecordingShard, make_shard, run
from helpers.tiny_models import directory
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tensorray.actors.protocol import Sampling
from tensorray.cluster.scheduler import Scheduler

# Full attention with GQA; local and global layers; expert routing.
FAMILIES = ["llama3", "gemma3", "mixtral"]
MAX_MODEL_LEN = 64
BLOCK_SIZE = 4
VOCAB = 90


def tokens(**sizes):
    return st.lists(st.integers(3, VOCAB - 1), **sizes)


SAMPLINGS = st.one_of(
    st.just(Sampling(temperature=0.0)),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 2**63 - 1),
    ),
)

# A few prefixes that many prompts share, so that blocks are reused.
PREFIXES = [[], list(range(3, 3 + 17)), list(range(3, 3 + 9)) + list(range(50, 62))]

ARRIVALS = st.lists(
    st.builds(
        lambda step, prefix, own, sampling, length, cancel: Arrival(
            step, prefix + own, sampling, length, cancel
        ),
        st.integers(0, 12),
        st.sampled_from(PREFIXES),
        tokens(min_size=1, max_size=20),
        SAMPLINGS,
        st.integers(1, 20),
        st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
    ),
    min_size=1,
    max_size=8,
)


def make_scheduler(shard, budget, max_num_seqs, caching) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(budget, max_num_seqs),
        enable_prefix_caching=caching,
    )


def alone(path: Path, arrival: Arrival) -> tuple[Outcome, RecordingShard]:
    shard = make_shard(path, max_model_len=MAX_MODEL_LEN, kind=RecordingShard)
    lone = Arrival(0, arrival.prompt, arrival.sampling, arrival.max_tokens)
    (outcome,) = run(shard, make_scheduler(shard, 512, 1, False), [lone])
    return outcome, shard


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=ARRIVALS,
    budget=st.sampled_from([4, 7, 16, 64]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    scarcity=st.sampled_from([1, 2, 8]),
    caching=st.booleans(),
    depth=st.sampled_from([1, 2]),
)
def test_batch_mates_change_nothing(
    family, arrivals, budget, max_num_seqs, scarcity, caching, depth
):
    path = directory(family)
    ample = make_shard(path, max_model_len=MAX_MODEL_LEN)
    groups = len(ample.info.kv.windows)
    # The least pool that holds one sequence of full length, or a few times that.
    blocks = 1 + scarcity * (MAX_MODEL_LEN // BLOCK_SIZE + 1) * groups
    shard = make_shard(path, num_blocks=blocks, max_model_len=MAX_MODEL_LEN, max_num_seqs=8)
    scheduler = make_scheduler(shard, budget, max_num_seqs, caching)
    outcomes = run(shard, scheduler, arrivals, depth=depth)

    stats = scheduler.stats()
    event(f"preempted: {stats.preemptions > 0}")
    event(f"reused a prefix: {stats.prefix_hits > 0}")
    assert stats.free_blocks == stats.total_blocks
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        expected, recording = alone(path, arrival)
        reference = expected.tokens
        if outcome.finish_reason == "abort":
            reference = reference[: len(outcome.tokens)]
        else:
            assert outcome.finish_reason is not None

        def clearness(position, arrival=arrival, recording=recording, reference=reference):
            return choice(
                recording.rows[position], arrival.sampling, reference[:position], arrival.prompt
            )

        assert_same_tokens(outcome.tokens, reference, clearness)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_and_reuse_really_happen(family):
    """The property above is worth something only if its hard cases occur: here they must."""
    path = directory(family)
    groups = len(make_shard(path, max_model_len=MAX_MODEL_LEN).info.kv.windows)
    shard = make_shard(
        path,
        num_blocks=1 + 17 * groups,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
    )
    scheduler = make_scheduler(shard, 16, 8, True)
    arrivals = [
        Arrival(3 * i, PREFIXES[1] + [40 + i], Sampling(temperature=0.0), 30) for i in range(5)
    ]
    outcomes = run(shard, scheduler, arrivals)
    assert scheduler.stats().preemptions > 0
    assert scheduler.stats().prefix_hits > 0
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        expected, recording = alone(path, arrival)
        assert_same_tokens(
            outcome.tokens,
            expected.tokens,
            lambda position, recording=recording: choice(
                recording.rows[position], Sampling(temperature=0.0), []
            ),
        )
