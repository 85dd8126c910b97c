"""Beam search as vLLM's `LLM.beam_search` has it: its parameters, and what it returns.

https://docs.vllm.ai/en/latest/api/vllm/beam_search.html
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorray.cluster.outputs import CompletionOutput, RequestOutput, TokenLogprob
from tensorray.cluster.request import FinishReason
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.tokenizer import Tokenizer


@dataclass(frozen=True)
class BeamSearchParams:
    """vLLM's. `temperature` is there for its callers and has no meaning: 0 or 1."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """Raises pydantic's ValidationError for values out of range."""
        return SamplingParams(
            use_beam_search=True,
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


@dataclass(frozen=True)
class BeamSearchSequence:
    """One sequence that was found. `tokens` and `text` begin with the prompt; `logprobs` and
    `cum_logprob` are of what was generated."""

    tokens: list[int]
    text: str
    cum_logprob: float
    logprobs: list[TokenLogprob | None]
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class BeamSearchOutput:
    """What was found for one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beam_search_output(output: RequestOutput, tokenizer: Tokenizer) -> BeamSearchOutput:
    """An answer to `BeamSearchParams.sampling_params`, in vLLM's shape."""
    prompt = output.prompt
    if prompt is None:
        prompt = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def sequence(each: CompletionOutput) -> BeamSearchSequence:
        return BeamSearchSequence(
            tokens=[*output.prompt_token_ids, *each.token_ids],
            text=prompt + each.text,
            cum_logprob=each.cumulative_logprob or 0.0,
            logprobs=each.logprobs or [],
            finish_reason=each.finish_reason,
            stop_reason=each.stop_reason,
        )

    return BeamSearchOutput([sequence(each) for each in output.outputs])
