"""Random arrivals with cancels for some minutes: does memory grow, are all blocks free at the end?

    python3 tests/gpu/soak.py [--minutes 10] [--model Qwen3-0.6B] [NAME=VALUE ...]

Requests come in bursts: short and long prompts (up to what the context holds), many sampling
parameters, logprobs, penalties, several sequences; one in five is cancelled on its way. Fails
(status 1) if a request ends in an error, a block is not free at the end, or the device memory that
this process holds grows by more than 8 MiB once the first fifth of the time is over. The driver
says how much that is where nvidia-ml-py is installed; else it is all that is taken of the device,
other processes' included, which the last line then says.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.device_memory import used_by_process, used_of_device
from helpers.dummy_models import make_dummy_model

from tensorray.cluster.llm import LLM, SamplingParams

MAX_MODEL_LEN = 4096
GROWTH = 8 << 20
REPORT_SECONDS = 60.0


def params(draw: random.Random, room: int) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": draw.randint(1, min(300, room)), "ignore_eos": True}
    if draw.random() < 0.6:
        fields |= {"temperature": draw.uniform(0.3, 1.2), "seed": draw.getrandbits(40)}
        fields |= {"top_p": draw.choice([1.0, 0.9]), "top_k": draw.choice([0, 50])}
    else:
        fields["temperature"] = 0.0
    if draw.random() < 0.2:
        fields |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if draw.random() < 0.1:
        fields["logprobs"] = draw.randint(0, 5)
    if draw.random() < 0.03:
        fields["prompt_logprobs"] = 1
    if draw.random() < 0.1:
        fields["n"] = draw.randint(2, 4)
    return SamplingParams(**fields)


class Soak:
    """Keeps about `target` requests going."""

    def __init__(self, llm: LLM, seed: int, target: int) -> None:
        self._llm = llm
        self._draw = random.Random(seed)
        self._target = target
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0

    async def run(self, seconds: float, watch: Any) -> None:
        ends = time.perf_counter() + seconds
        running: set[asyncio.Task[None]] = set()
        number = 0
        while time.perf_counter() < ends:
            for _ in range(self._draw.randint(0, max(0, self._target - len(running)))):
                running.add(asyncio.create_task(self._request(number)))
                number += 1
            await asyncio.sleep(self._draw.uniform(0.0, 0.5))
            running = {task for task in running if not task.done()}
            watch()
        await asyncio.gather(*running)

    async def _request(self, number: int) -> None:
        draw = random.Random(number)
        most = MAX_MODEL_LEN - 320
        length = draw.randint(1, draw.choice([64, 512, most]))
        prompt = [draw.randrange(300, 30000) for _ in range(length)]
        if draw.random() < 0.3:  # a prefix that others have too
            prompt[: length // 2] = [400 + i % 50 for i in range(length // 2)]
        wanted = params(draw, MAX_MODEL_LEN - length)
        prepared = self._llm.frontend.request(prompt, wanted, request_id=f"soak-{number}")
        stop_after = draw.randint(0, 40) if draw.random() < 0.2 else None
        try:
            deltas = self._llm.frontend.stream(self._llm.engine, prepared)
            got = 0
            async for delta in deltas:
                got += sum(len(output.token_ids) for output in delta.outputs)
                if stop_after is not None and got > stop_after:
                    await deltas.aclose()  # type: ignore[attr-defined]
                    self.outcomes["cancelled"] += 1
                    break
            else:
                self.outcomes["finished"] += 1
            self.tokens += got
        except Exception as error:
            self.outcomes[f"{type(error).__name__}: {error}"] += 1


class Memory:
    """Bytes in use over time: the most of the first fifth, and of the rest."""

    def __init__(self, seconds: float) -> None:
        by_process = used_by_process()
        self.scope = "this process" if by_process else "the whole device"
        self._used = by_process or used_of_device
        self._began = self._reported = time.perf_counter()
        self._settles = self._began + seconds / 5
        self.settled = self.most = 0

    @property
    def growth(self) -> int:
        return max(0, self.most - self.settled)

    def watch(self, soak: Soak) -> None:
        now, used = time.perf_counter(), self._used()
        if now < self._settles:
            self.settled = max(self.settled, used)
        else:
            self.most = max(self.most, used)
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            minutes = (now - self._began) / 60
            print(
                f"{minutes:5.1f} min: {used / 2**20:.0f} MiB, {soak.tokens} tokens, "
                f"{soak.outcomes.total()} requests",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--target", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="NAME=VALUE of EngineConfig")
    arguments = parser.parse_args()
    model = make_dummy_model(arguments.model, Path(tempfile.mkdtemp()))
    settings: dict[str, Any] = {
        **{"load_format": "dummy", "max_model_len": MAX_MODEL_LEN, "num_kv_blocks": 6000},
        **dict(each.split("=", 1) for each in arguments.settings),
    }
    seconds = 60 * arguments.minutes
    with LLM(str(model), **settings) as llm:
        soak = Soak(llm, arguments.seed, arguments.target)
        memory = Memory(seconds)
        llm._run(soak.run(seconds, lambda: memory.watch(soak)))
        stats = llm.engine.scheduler.stats()
    print(f"{soak.tokens} tokens, {dict(soak.outcomes)}")
    print(
        f"blocks: {stats.free_blocks} of {stats.total_blocks} free, {stats.preemptions} preempted"
    )
    print(
        f"device memory, {memory.scope}: at most {memory.settled / 2**20:.1f} MiB in the first "
        f"fifth, {memory.growth / 2**20:.1f} MiB more later"
    )
    wrong = set(soak.outcomes) - {"finished", "cancelled"}
    if wrong or stats.free_blocks != stats.total_blocks or memory.growth > GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
