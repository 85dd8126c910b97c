"""A replica's shards in this process, each on threads of its own: what LLM runs a layout on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tensorray.actors.config import ShardConfig
from tensorray.actors.group_link import GroupLink
from tensorray.actors.shard_host import ShardHost
from tensorray.actors.tcp_link import TcpLink


class LocalReplica:
    """All shards of a layout, loaded and joined, on the GPUs from `first_gpu` on if they want any.
    Raises what loading a shard raises."""

    def __init__(self, configs: Sequence[ShardConfig], first_gpu: int = 0) -> None:
        self._hosts: list[ShardHost] = []
        try:
            for gpu, config in enumerate(configs, first_gpu):
                self._hosts.append(ShardHost(config, gpu=gpu))
            loaded = [host.loaded for host in self._hosts]
            members = [each.peers for each in loaded]
            num_blocks = min(each.info.kv.num_blocks for each in loaded)
            with ThreadPoolExecutor(len(configs)) as pool:
                list(pool.map(lambda host: host.join(0, members, num_blocks), self._hosts))
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> Sequence[ShardHost]:
        return self._hosts

    async def connect(self) -> GroupLink:
        """The link to all of them; one at a time."""
        links = [TcpLink.connect(host.loaded.steps) for host in self._hosts]
        return GroupLink(await asyncio.gather(*links))

    def close(self) -> None:
        for host in self._hosts:
            host.close()
