"""Links between router and shard: order, failures, and who may connect."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time

import msgspec
import pytest

from tensorray.actors import group_link, wire
from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.group_link import GroupFailed, GroupLink
from tensorray.actors.link import LocalLink, ShardError, ShardLink
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import KVGroups, Sampling, SequenceStart, ShardInfo, StepPlan
from tensorray.actors.tcp_link import ShardServer, TcpLink
from tensorray.actors.wire import PEER_SECONDS, keep_alive

INFO = ShardInfo(
    kv=KVGroups(windows=[None], num_blocks=64, block_size=4),
    vocab_size=100,
    max_model_len=64,
    device="null",
    weight_bytes=0,
    kv_cache_bytes=0,
    load_seconds=0.0,
)


def prefill(step: int, seq: int, tokens: list[int], sampling: Sampling | None = None) -> StepPlan:
    sampling = sampling or Sampling(seed=seq)
    start = SequenceStart(seq, tokens, len(tokens), 0, [[1]], sampling)
    return StepPlan(step=step, seqs=[seq], counts=[len(tokens)], starts=[start])


def decode(step: int, seq: int) -> StepPlan:
    return StepPlan(step=step, seqs=[seq], counts=[1])


@pytest.fixture
def server():
    server = ShardServer(NullShard(INFO))
    yield server
    server.close()


@pytest.fixture(params=["inline", "thread", "tcp"])
async def link(request, server):
    link: ShardLink
    if request.param == "tcp":
        link = await TcpLink.connect(server.endpoint)
    else:
        link = LocalLink(NullShard(INFO), inline=request.param == "inline")
    yield link
    await link.close()


async def test_two_plans_in_flight_come_back_in_order_with_the_same_tokens(link):
    assert link.info == INFO
    link.send(prefill(1, 7, [5, 6, 7]))
    link.send(decode(2, 7))
    results = [await link.receive(), await link.receive()]
    assert [result.step for result in results] == [1, 2]
    alone = NullShard(INFO)
    expected = [alone.execute(prefill(1, 7, [5, 6, 7])).tokens, alone.execute(decode(2, 7)).tokens]
    assert [result.tokens for result in results] == expected


async def test_a_failing_step_gives_its_own_reason(link):
    link.send(prefill(1, 7, [5, 6]))
    await link.receive()
    link.send(StepPlan(step=2, seqs=[7], counts=[9]))
    with pytest.raises(ShardError, match="sequence 7: 9 tokens asked, 1 known"):
        await link.receive()


async def test_a_killed_shard_is_noticed(server):
    link = await TcpLink.connect(server.endpoint)
    waiting = asyncio.create_task(link.receive())
    await asyncio.sleep(0)
    server.close()
    with pytest.raises(ShardError, match="connection ended"):
        await asyncio.wait_for(waiting, 60)
    await link.close()


async def test_a_new_router_finds_an_empty_shard(server):
    first = await TcpLink.connect(server.endpoint)
    first.send(prefill(1, 7, [5, 6]))
    await first.receive()
    await first.close()
    second = await TcpLink.connect(server.endpoint)
    second.send(prefill(1, 7, [5, 6]))  # the same id: known still, the shard would refuse it
    assert (await second.receive()).seqs == [7]
    await second.close()


async def test_a_wrong_secret_is_turned_away_and_the_right_one_still_served(server):
    forged = msgspec.structs.replace(server.endpoint, secret=secrets.token_bytes(32))
    with pytest.raises(ShardError, match="no shard answers"):
        await TcpLink.connect(forged)
    link = await TcpLink.connect(server.endpoint)
    assert link.info == INFO
    await link.close()


async def test_nobody_at_the_address_is_a_shard_error(server):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ShardError, match=str(port)):
        await TcpLink.connect(msgspec.structs.replace(server.endpoint, port=port))


async def checked(link: ShardLink) -> None:
    for _ in range(6000):
        await asyncio.sleep(0.01)
        await link.check()


async def test_a_shard_that_dies_while_nothing_runs_is_noticed(server):
    link = await TcpLink.connect(server.endpoint)
    await link.check()
    server.close()
    with pytest.raises(ShardError, match="connection ended"):
        await checked(link)
    await link.close()


async def test_a_group_waits_for_the_one_that_says_why(monkeypatch):
    """The shard that samples fails because of another, and is heard of first."""
    monkeypatch.setattr(group_link, "_CAUSE_SECONDS", 60.0)

    class Speaker(NullShard):
        def execute(self, plan: StepPlan) -> StepPlan:
            raise CommunicatorError("rank 1 at 10.0.0.2:7 is gone", 1)

    class Culprit(NullShard):
        def execute(self, plan: StepPlan) -> StepPlan:
            time.sleep(0.1)
            raise MemoryError("out of luck")

    silent = msgspec.structs.replace(INFO, answers=False)
    servers = [ShardServer(Speaker(INFO)), ShardServer(Culprit(silent))]
    group = GroupLink([await TcpLink.connect(each.endpoint) for each in servers])
    group.send(prefill(1, 7, [5, 6, 7]))
    with pytest.raises(GroupFailed, match="rank 1: MemoryError: out of luck") as caught:
        await group.receive()
    assert list(caught.value.ranks) == [1]
    await group.close()
    for each in servers:
        each.close()


async def test_a_shard_without_a_say_sends_no_results():
    silent = msgspec.structs.replace(INFO, answers=False)
    servers = [ShardServer(NullShard(silent)), ShardServer(NullShard(INFO))]
    group = GroupLink([await TcpLink.connect(each.endpoint) for each in servers])
    group.send(prefill(1, 7, [5, 6, 7]))
    group.send(decode(2, 7))
    results = [await group.receive(), await group.receive()]
    assert [len(result.tokens) for result in results] == [1, 1]
    await group.check()
    servers[0].close()  # while nothing runs
    with pytest.raises(GroupFailed, match="rank 0: the shard's connection ended"):
        await checked(group)
    await group.close()
    servers[1].close()


def test_the_kernel_is_told_to_ask_for_a_silent_peer():
    with socket.socket() as connection:
        keep_alive(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            option = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert option == PEER_SECONDS * 1000 == 2000
        if hasattr(socket, "TCP_KEEPIDLE"):
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [connection.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [1, 1, 1]


async def test_log_probabilities_that_fit_no_frame_fail_their_sequences_alone(monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME", 2000)
    server = ShardServer(NullShard(INFO))
    link = await TcpLink.connect(server.endpoint)
    wordy = prefill(1, 7, [5] * 200, Sampling(prompt_logprobs=0))
    plain = prefill(1, 8, [5, 6])
    link.send(
        msgspec.structs.replace(
            wordy,
            seqs=[7, 8],
            counts=[200, 2],
            starts=[*wordy.starts, *plain.starts],
        )
    )
    result = await link.receive()
    assert result.seqs == [8]
    assert list(result.failed) == [7]
    assert "ask for fewer" in result.failed[7]
    link.send(StepPlan(step=2, seqs=[8], counts=[1], ends=[7]))
    assert (await link.receive()).seqs == [8]  # the connection stands
    await link.close()
    server.close()
