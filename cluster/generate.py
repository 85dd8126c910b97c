"""Offline generation for the command line: one prompt or a file of them, as one batch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.flags import Given
from tensorray.cluster.progress import progress
from tensorray.cluster.prompts import PromptLine, read_prompts
from tensorray.cluster.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tensorray.cluster.outputs import CompletionOutput, RequestOutput, TokenLogprob


def run(
    config: EngineConfig,
    sampling: Given,
    prompt: str | None,
    prompts_file: str | None,
    *,
    lora: str | None = None,
    as_json: bool,
) -> None:
    """Complete `prompt`, or every line of `prompts_file`, and print what came out, in order.

    `sampling` are fields of SamplingParams, over the model's own defaults; `lora` is an adapter, by
    its path or its name in the config.
    """
    SamplingParams(**sampling)  # a mistake is told before anything is loaded
    lines = [PromptLine(prompt)] if prompts_file is None else read_prompts(prompts_file)
    from tensorray.cluster.llm import LLM, LoRARequest

    adapter = None
    if lora is not None:
        known = {module.name: module.path for module in config.lora_modules}
        adapter = LoRARequest(lora, 0, known.get(lora, lora))
        config = config.model_copy(update={"enable_lora": True})
    with results_on_stdout() as results, LLM(**dict(config)) as llm:
        each = [
            llm.frontend.params(
                **sampling | ({} if line.max_tokens is None else {"max_tokens": line.max_tokens})
            )
            for line in lines
        ]
        with progress(len(lines)) as advance:
            outputs = llm.generate(
                [line.content for line in lines],
                each,
                on_finished=lambda _: advance(),
                lora_request=adapter,
            )
        for output in outputs:
            print(json.dumps(as_dict(output)) if as_json else output.outputs[0].text, file=results)


def as_dict(output: RequestOutput) -> dict[str, Any]:
    """One request's result as JSON: its first sequence, and `outputs` with all where n > 1.

    Log-probabilities are there if they were asked for.
    """
    result = {**_sequence(output.outputs[0]), "prompt_token_ids": output.prompt_token_ids}
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = [_logprob(each) for each in output.prompt_logprobs]
    if len(output.outputs) > 1:
        result["outputs"] = [_sequence(each) for each in output.outputs]
    return result


def _sequence(output: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        result["logprobs"] = [_logprob(each) for each in output.logprobs]
    return result


def _logprob(token: TokenLogprob | None) -> dict[str, Any] | None:
    if token is None:  # a prompt's first token has none
        return None
    result: dict[str, Any] = {
        "token_id": token.token_id,
        "text": token.text,
        "logprob": token.logprob,
        "rank": token.rank,
    }
    if token.top:
        result["top"] = [_logprob(each) for each in token.top]
    return result


@contextlib.contextmanager
def results_on_stdout() -> Iterator[TextIO]:
    """A file that is stdout, while all else that anyone prints to stdout goes to stderr.

    Also what libraries print below Python, and processes started meanwhile.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(stdout, "w", closefd=False) as results, contextlib.redirect_stdout(sys.stderr):
            yield results
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
