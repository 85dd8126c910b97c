"""A replica's shards on this machine, without Ray: what LLM runs a layout on.

On CPUs they are threads of this process; on GPUs each has a process of its own (shard_process.py
says why).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tensorray.actors.config import ShardConfig
from tensorray.actors.group_link import GroupLink
from tensorray.actors.shard_host import ShardHost
from tensorray.actors.shard_process import ShardProcess
from tensorray.actors.tcp_link import TcpLink


class LocalReplica:
    """All shards of a layout, loaded and joined, on the GPUs from `first_gpu` on if they want any;
    in `processes` of their own, or as threads. Raises what loading a shard raises."""

    def __init__(
        self, configs: Sequence[ShardConfig], first_gpu: int = 0, *, processes: bool = False
    ) -> None:
        self._hosts: list[ShardHost | ShardProcess] = []
        kind = ShardProcess if processes else ShardHost
        try:
            for gpu, config in enumerate(configs, first_gpu):
                self._hosts.append(kind(config, gpu=gpu))
            loaded = [host.loaded for host in self._hosts]
            members = [each.peers for each in loaded]
            num_blocks = min(each.info.kv.num_blocks for each in loaded)
            with ThreadPoolExecutor(len(configs)) as pool:
                list(pool.map(lambda host: host.join(0, members, num_blocks), self._hosts))
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> Sequence[ShardHost | ShardProcess]:
        return self._hosts

    async def connect(self) -> GroupLink:
        """The link to all of them; one at a time."""
        links = [TcpLink.connect(host.loaded.steps) for host in self._hosts]
        return GroupLink(await asyncio.gather(*links))

    def close(self) -> None:
        for host in self._hosts:
            host.close()
