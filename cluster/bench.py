"""`tensorray bench`: a model in this process, or a server, under a workload, in figures."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tensorray.cluster import loadgen
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.loadgen import Prompt, random_prompts
from tensorray.cluster.prompts import read_prompts
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.usage_error import UsageError

if TYPE_CHECKING:
    from tensorray.cluster.llm import LLM
    from tensorray.cluster.outputs import RequestOutput

DEFAULT_RANDOM_PROMPTS = 64


@dataclass(frozen=True)
class Lengths:
    """Random prompts: inclusive ranges of input and output length and of token ids."""

    input: tuple[int, int]
    output: tuple[int, int]
    token_ids: tuple[int, int]

    @classmethod
    def parse(cls, input_len: str, output_len: str, token_ids: str) -> Lengths:
        return cls(
            _range("--input-len", input_len, 1),
            _range("--output-len", output_len, 1),
            _range("--token-ids", token_ids, 0),
        )

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        return random_prompts(count, self.input, self.output, self.token_ids, seed)


@dataclass(frozen=True)
class Workload:
    """Prompts to run. Random ones ignore the end-of-sequence token, so that lengths hold."""

    prompts: list[Prompt]
    ignore_eos: bool

    @classmethod
    def make(cls, dataset: str | None, count: int | None, lengths: Lengths, seed: int) -> Workload:
        """The first `count` prompts of a dataset (all, by default), or that many random ones."""
        if dataset is None:
            return cls(lengths.prompts(count or DEFAULT_RANDOM_PROMPTS, seed), True)
        most = lengths.output[1]
        lines = read_prompts(dataset)[:count]
        return cls([Prompt(line.content, line.max_tokens or most) for line in lines], False)


def latency(
    config: EngineConfig, lengths: Lengths, *, batch_size: int, iterations: int, as_json: bool
) -> None:
    """Time whole batches, one after the other; every one has prompts of its own, so that no
    prefix is reused. The first is not counted."""
    from tensorray.cluster.generate import results_on_stdout
    from tensorray.cluster.llm import LLM
    from tensorray.cluster.progress import progress

    with results_on_stdout() as results, LLM(**dict(config)) as llm:
        seconds, first_token, tokens = [], [], 0
        with progress(iterations + 1) as advance:
            for iteration in range(iterations + 1):
                took, outputs = _run(llm, lengths.prompts(batch_size, seed=2 * iteration))
                fresh = lengths.prompts(batch_size, seed=2 * iteration + 1)
                to_first, _ = _run(llm, [replace(each, max_tokens=1) for each in fresh])
                if iteration:
                    seconds.append(took)
                    first_token.append(to_first)
                    tokens += _output_tokens(outputs)
                advance()
        figures = {
            "model": config.model,
            "batch_size": batch_size,
            "input_len": lengths.input,
            "output_len": lengths.output,
            "iterations": iterations,
            "batch_ms": loadgen.distribution(seconds),
            "all_first_tokens_ms": loadgen.distribution(first_token),
            "output_tokens_per_second": round(tokens / sum(seconds), 2),
            "seconds_per_batch": round(fmean(seconds), 4),
        }
        print(json.dumps(figures) if as_json else table(figures), file=results)


def throughput(config: EngineConfig, workload: Workload, *, as_json: bool) -> None:
    """Run everything at once, and count."""
    from tensorray.cluster.generate import results_on_stdout
    from tensorray.cluster.llm import LLM
    from tensorray.cluster.progress import progress

    with results_on_stdout() as results, LLM(**dict(config)) as llm:
        prompts = workload.prompts
        _run(llm, [Prompt("Hello", 2)])  # what happens once only
        with progress(len(prompts)) as advance:
            seconds, outputs = timed(
                llm,
                [each.prompt for each in prompts],
                _params(prompts, workload.ignore_eos),
                on_finished=lambda _: advance(),
            )
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        output_tokens = _output_tokens(outputs)
        figures = {
            "model": config.model,
            "requests": len(outputs),
            "seconds": round(seconds, 3),
            "requests_per_second": round(len(outputs) / seconds, 3),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "output_tokens_per_second": round(output_tokens / seconds, 2),
            "total_tokens_per_second": round((prompt_tokens + output_tokens) / seconds, 2),
        }
        print(json.dumps(figures) if as_json else table(figures), file=results)


def serve(
    url: str,
    model: str | None,
    workload: Workload,
    *,
    api_key: str = "",
    rate: float | None,
    concurrency: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Load a server. Raises RuntimeError when no request succeeded."""
    target = loadgen.Target(
        url,
        model or served_model(url, api_key),
        api_key,
        extra_body={"temperature": 0.0, "ignore_eos": workload.ignore_eos},
    )
    records, seconds = asyncio.run(loadgen.run(target, workload.prompts, rate, concurrency, seed))
    figures = {
        "model": target.model,
        "request_rate": rate,
        "concurrency": concurrency,
        **loadgen.summarize(records, seconds),
    }
    print(json.dumps(figures) if as_json else table(figures))
    if figures["failed"] == len(records):
        raise RuntimeError(f"every request failed; the first said: {records[0].error}")


def timed(
    llm: LLM,
    prompts: Sequence[str | list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    on_finished: Callable[[RequestOutput], None] | None = None,
) -> tuple[float, list[RequestOutput]]:
    """Seconds to complete a batch, and its outputs."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, on_finished=on_finished)
    return time.perf_counter() - began, outputs


def served_model(url: str, api_key: str = "") -> str:
    """The first model a server lists. Raises UsageError when there is no server, or no key fits."""
    request = urllib.request.Request(f"{url}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        said = "give the server's --api-key" if error.code == 401 else "it lists no models"
        raise UsageError(f"{url}/v1/models answers {error.code} {error.reason}: {said}") from None
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError) as error:
        raise UsageError(f"{url}: no server answers /v1/models ({error})") from None


def table(figures: dict[str, Any]) -> str:
    """Figures as aligned lines for people."""
    width = max(map(len, figures))
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {number:g}" for key, number in value.items()) or "none"
        elif isinstance(value, tuple | list):
            value = " to ".join(map(str, dict.fromkeys(value))) or "none"
        lines.append(f"{name.replace('_', ' '):{width}}  {'none' if value is None else value}")
    return "\n".join(lines)


def _run(llm: LLM, prompts: Sequence[Prompt]) -> tuple[float, list[RequestOutput]]:
    return timed(llm, [each.prompt for each in prompts], _params(prompts, ignore_eos=True))


def _output_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _params(prompts: Sequence[Prompt], ignore_eos: bool) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0.0, max_tokens=each.max_tokens, ignore_eos=ignore_eos)
        for each in prompts
    ]


def _range(name: str, text: str, least: int) -> tuple[int, int]:
    """`128` or `100:1024`, both ends inclusive."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        raise UsageError(f"{name} must be N or LOW:HIGH (got {text!r})") from None
    if not least <= found[0] <= found[1]:
        raise UsageError(f"{name} must rise from at least {least} (got {text!r})")
    return found
