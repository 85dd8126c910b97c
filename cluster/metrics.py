"""What Prometheus is told, measured in one place: beside the engine, whoever asks.

Several ingress replicas may stand before one router and Serve sends a scrape to any of them, so
they keep no figures of their own: each passes the scrape on to the router. Latencies therefore
start when a request reaches the router; Serve itself exports the HTTP side (`ray_serve_*`).
Names and meanings follow vLLM's, with `tensorray:` for `vllm:`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tensorray.cluster.engine import Engine
from tensorray.cluster.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_POWERS = tuple(2**i for i in range(15))


def join_scrapes(scrapes: Sequence[bytes]) -> bytes:
    """Several engines' scrapes as one: a family's samples have to stand together, under one head.

    The engines' labels tell their samples apart.
    """
    families: dict[str, list[str]] = {}
    for scrape in scrapes:
        lines: list[str] = []
        for line in scrape.decode().splitlines():
            if line.startswith("# HELP "):
                lines = families.setdefault(line, [])
            elif not line.startswith("# TYPE ") or line not in lines:
                lines.append(line)
    text = "".join("\n".join([head, *lines]) + "\n" for head, lines in families.items())
    return text.encode()


class Histogram:
    """Counts by upper bound. One event loop writes it, so it needs no lock; an observation costs
    a bisection, which matters once a token."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, help: str, labels: dict[str, str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, help, labels=list(labels))
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class EngineMetrics(Collector):
    """An EngineObserver that Prometheus can read.

    `scheduler.stats()` and `failure` are asked for when a scrape comes; the rest is counted as the
    engine tells it.
    """

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self._labels = {"model_name": model_name, "engine": engine}
        self._engine: Engine | None = None
        self._first_token = Histogram(_SECONDS)
        self._queue = Histogram(_SECONDS)
        self._prefill = Histogram(_SECONDS)
        self._next_token = Histogram(_SECONDS)
        self._request = Histogram(_SECONDS)
        self._step_seconds = Histogram(_SECONDS)
        self._step_sequences = Histogram(_POWERS)
        self._step_tokens = Histogram(_POWERS)
        self._prompt_lengths = Histogram(_POWERS)
        self._output_lengths = Histogram(_POWERS)
        self._generated = 0
        self._prompt_tokens = 0
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self._failures = 0
        self._last_failure = ("", 0.0)  # its reason, and when
        self._recovery = Histogram(_SECONDS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def watch(self, engine: Engine) -> None:
        """Whose queue and cache to report."""
        self._engine = engine

    # --- EngineObserver ---

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        self._step_sequences.observe(sequences)
        self._step_tokens.observe(tokens)
        self._step_seconds.observe(seconds)

    def first_token(self, since_arrival: float, queued: float) -> None:
        self._generated += 1
        self._first_token.observe(since_arrival)
        self._queue.observe(queued)
        self._prefill.observe(since_arrival - queued)

    def next_token(self, since_last: float) -> None:
        self._generated += 1
        self._next_token.observe(since_last)

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, since_arrival: float
    ) -> None:
        self._finished[reason] += 1
        self._prompt_tokens += prompt_tokens
        self._prompt_lengths.observe(prompt_tokens)
        self._output_lengths.observe(generated)
        self._request.observe(since_arrival)

    def failed(self, reason: str) -> None:
        self._failures += 1
        self._last_failure = (reason, time.time())

    def recovered(self, reason: str, seconds: float) -> None:
        self._last_failure = (reason, self._last_failure[1])
        self._recovery.observe(seconds)

    # --- Prometheus ---

    def text(self) -> bytes:
        """The scrape's answer, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        if self._engine is not None:
            yield from self._state(self._engine)
        yield self._counter(
            "prompt_tokens", "Prompt tokens of finished requests", self._prompt_tokens
        )
        yield self._counter("generation_tokens", "Tokens generated", self._generated)
        success = CounterMetricFamily(
            "tensorray:request_success",
            "Sequences ended, by reason",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in self._finished.items():
            success.add_metric([*self._labels.values(), reason], count)
        yield success
        for name, help, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", self._first_token),
            ("request_queue_time_seconds", "Arrival to first step", self._queue),
            ("request_prefill_time_seconds", "First step to first token", self._prefill),
            ("inter_token_latency_seconds", "From one token to the next", self._next_token),
            ("e2e_request_latency_seconds", "Arrival to last token", self._request),
            ("recovery_seconds", "From a loss of shards to their return", self._recovery),
            ("step_duration_seconds", "A step's time on the shard", self._step_seconds),
            ("batch_size", "Sequences in a step", self._step_sequences),
            ("iteration_tokens_total", "Tokens in a step", self._step_tokens),
            ("request_prompt_tokens", "Prompt tokens of a request", self._prompt_lengths),
            ("request_generation_tokens", "Tokens a request generated", self._output_lengths),
        ):
            yield histogram.family(f"tensorray:{name}", help, self._labels)

    def _state(self, engine: Engine) -> Iterator[Metric]:
        stats = engine.scheduler.stats()
        used = stats.total_blocks - stats.free_blocks
        up = engine.failure is None and engine.recovering is None
        yield self._gauge("engine_up", "1 while the engine can serve", up)
        yield self._counter("shard_failures", "Times that shards were lost", self._failures)
        reason, when = self._last_failure
        if when:
            last = GaugeMetricFamily(
                "tensorray:last_shard_failure_seconds",
                "When shards were lost last, in seconds since 1970, and why",
                labels=[*self._labels, "reason"],
            )
            last.add_metric([*self._labels.values(), engine.recovering or reason], when)
            yield last
        yield self._gauge("num_requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue", stats.waiting)
        yield self._gauge(
            "queued_tokens",
            "Prompt tokens of those that wait or prefill, still to be computed",
            engine.scheduler.queued_tokens,
        )
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of KV blocks that running sequences hold, 0 to 1",
            used / stats.total_blocks if stats.total_blocks else 0.0,
        )
        yield self._gauge("kv_cache_blocks", "KV blocks in the pool", stats.total_blocks)
        yield self._gauge(
            "kv_cache_reusable_blocks",
            "Free KV blocks kept for their contents",
            stats.cached_blocks,
        )
        yield self._gauge(
            "rejected_plans",
            "TensorRT plans that gave wrong results, so that own kernels run in their place",
            engine.info.rejected_plans,
        )
        for name, help, value in (
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache",
                stats.prefix_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hits),
            (
                "prefix_routed_requests",
                "Requests that this replica was chosen for because it holds their prefix",
                engine.prefix_routed,
            ),
            ("num_preemptions", "Sequences that lost their blocks to others", stats.preemptions),
            ("spec_decode_num_drafts", "Times that tokens were guessed", stats.drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed", stats.draft_tokens),
            (
                "spec_decode_num_accepted_tokens",
                "Tokens guessed that were right",
                stats.accepted_tokens,
            ),
        ):
            yield self._counter(name, help, value)
        yield from self._handovers(engine)

    def _handovers(self, engine: Engine) -> Iterator[Metric]:
        """Nothing where no prompt is handed over."""
        stats = engine.handovers.stats
        if not (stats.held or stats.fetched or stats.failed):
            return
        for name, help, value in (
            ("handover_held", "Sequences prefilled for other replicas", stats.held),
            ("handover_expired", "Of these, the ones nobody fetched in time", stats.expired),
            ("handover_fetched", "Sequences whose prompt another replica computed", stats.fetched),
            ("handover_failed", "Prompts computed here as they did not come", stats.failed),
            ("handover_blocks", "KV blocks fetched, over all shards", stats.blocks),
            ("handover_bytes", "Bytes of KV blocks fetched, over all shards", stats.bytes),
            ("handover_seconds", "Time that fetches took", stats.seconds),
        ):
            yield self._counter(name, help, value)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"tensorray:{name}", help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"tensorray:{name}", help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
