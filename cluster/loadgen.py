"""A load generator for the OpenAI completions API: when requests are sent, and what came back when.

Requests leave on a schedule of their own (an open loop: Poisson arrivals at `rate`), whatever the
server does, unless `concurrency` holds them back. Clocks start when a request is sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import aiohttp

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Prompt:
    """What one request asks. `prompt` is text or token ids."""

    prompt: str | list[int]
    max_tokens: int


@dataclass
class Record:
    """What became of one request. Times in seconds on the generator's clock."""

    sent: float
    chunks: list[float] = field(default_factory=list)  # arrival of each chunk that brought tokens
    done: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what else every request's body says."""

    url: str  # of the server, without /v1
    model: str
    api_key: str = ""
    extra_body: dict[str, Any] = field(default_factory=dict)


def random_prompts(
    count: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    token_ids: tuple[int, int],
    seed: int,
) -> list[Prompt]:
    """Prompts of random token ids; lengths and ids are uniform over their inclusive ranges."""
    draw = random.Random(seed)
    return [
        Prompt(
            [draw.randint(*token_ids) for _ in range(draw.randint(*input_len))],
            draw.randint(*output_len),
        )
        for _ in range(count)
    ]


async def run(
    target: Target,
    prompts: Sequence[Prompt],
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
    timeout: float = 3600.0,
) -> tuple[list[Record], float]:
    """Send all prompts; returns their records, in order, and the seconds from first to last.

    `rate` is the mean of Poisson arrivals in requests a second; None sends all at once.
    """
    gate = asyncio.Semaphore(concurrency or len(prompts))
    arrivals = _arrivals(len(prompts), rate, seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=timeout), read_bufsize=2**20
    ) as session:
        start = time.perf_counter()

        async def one(prompt: Prompt, after: float) -> Record:
            await asyncio.sleep(start + after - time.perf_counter())
            async with gate:
                return await _request(session, target, prompt)

        records = await asyncio.gather(*map(one, prompts, arrivals))
        return records, time.perf_counter() - start


def summarize(records: Iterable[Record], seconds: float) -> dict[str, Any]:
    """Rates, and percentiles in milliseconds, of the requests that succeeded.

    TTFT: from sending to the first tokens. TPOT, of one request: from first to last tokens, per
    output token after the first. ITL: each gap between two arrivals of tokens; a server may
    deliver several tokens at one arrival. E2E: from sending to the end.
    """
    records = list(records)
    good = [record for record in records if not record.error]
    output_tokens = sum(record.output_tokens for record in good)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": sorted({record.error for record in records if record.error})[:5],
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "output_tokens": output_tokens,
        "output_tokens_per_second": round(output_tokens / seconds, 2),
        "ttft_ms": distribution([r.chunks[0] - r.sent for r in good if r.chunks]),
        "tpot_ms": distribution(
            [
                (r.chunks[-1] - r.chunks[0]) / (r.output_tokens - 1)
                for r in good
                if r.chunks and r.output_tokens > 1
            ]
        ),
        "itl_ms": distribution(
            [after - before for r in good for before, after in pairwise(r.chunks)]
        ),
        "e2e_ms": distribution([r.done - r.sent for r in good]),
    }


def distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles (nearest rank) and maximum in milliseconds; empty for no values."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    ranks = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    values = {"mean": fmean(ordered), **ranks, "max": ordered[-1]}
    return {name: round(1e3 * value, 3) for name, value in values.items()}


def _arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """Seconds after the start at which each request is due; the first at once."""
    if rate is None:
        return [0.0] * count
    draw = random.Random(seed)
    due, arrivals = 0.0, []
    for _ in range(count):
        arrivals.append(due)
        due += draw.expovariate(rate)
    return arrivals


async def _request(session: aiohttp.ClientSession, target: Target, prompt: Prompt) -> Record:
    body = {
        "model": target.model,
        "prompt": prompt.prompt,
        "max_tokens": prompt.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    record = Record(sent=time.perf_counter())
    try:
        async with session.post(
            f"{target.url}/v1/completions", json=body, headers=headers
        ) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return record
            await _read_events(response, record)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.done = time.perf_counter()
    return record


async def _read_events(response: aiohttp.ClientResponse, record: Record) -> None:
    """Follow a stream of server-sent events up to `[DONE]`."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            record.error = str(event["error"].get("message", event["error"]))
            return
        if any(choice["text"] for choice in event.get("choices", [])):
            record.chunks.append(time.perf_counter())
        if usage := event.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.output_tokens = usage["completion_tokens"]
    record.error = record.error or "the stream ended early"
