"""SamplingParams: what a user may say about decoding, with vLLM's names, checked at the edge."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tensorray.actors.protocol import Sampling
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.beams import candidates
from tensorray.cluster.request import BeamSearch
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.truncation import TruncatePromptTokens

# What only a beam search heeds, and what only a draw does: the values that ask for nothing.
_BEAM_FIELDS: dict[str, tuple[object, ...]] = {
    "beam_width": (None, 1),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "beam_search_diversity_rate": (0.0,),
    "num_beam_groups": (None, 1),
}
_DRAW_FIELDS: dict[str, tuple[object, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
}

_MOST_BEAM_STOPS = 64  # stop tokens that a beam search takes

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class LogitsProcessorSpec(BaseModel):
    """A logits processor that a request chooses, by the name of its class."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


def _named(value: object) -> object:
    """A processor without arguments may be its bare name."""
    return {"name": value} if isinstance(value, str) else value


_TokenIds = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
ProcessorSpecs = list[Annotated[LogitsProcessorSpec, BeforeValidator(_named)]]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else ([] if value is None else value)


class SamplingParams(BaseModel):
    """Sampling parameters of one request. Out-of-range values raise pydantic's ValidationError.

    Penalties and filters follow vLLM's definitions; see `tensorray.actors.protocol.Sampling` for
    the order in which they apply.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    n: int = Field(1, ge=1, le=128, description="Sequences to return for the prompt")
    best_of: int | None = Field(
        None,
        ge=1,
        le=128,
        description="Sequences to draw, of which the n most likely are returned [default: n]",
    )
    use_beam_search: bool = Field(
        False, description="Return the likeliest sequences a beam search finds; nothing is drawn"
    )
    beam_width: int | None = Field(
        None, ge=1, le=128, description="Beams to search with [default: best_of, or else n]"
    )
    length_penalty: FiniteFloat = Field(
        1.0,
        ge=-10.0,
        le=10.0,
        description="Beams are ranked by log-probability over length to this power",
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="When a beam search ends: true, with beam_width sequences; false, when better "
        "ones are unlikely; never, when there can be none",
    )
    beam_search_diversity_rate: FiniteFloat = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="What a token costs a beam for each earlier group of beams that just took it",
    )
    num_beam_groups: int | None = Field(
        None,
        ge=1,
        le=128,
        description="Groups of beams that differ from each other [default: one, or with "
        "beam_search_diversity_rate one for each beam]",
    )
    temperature: FiniteFloat = Field(
        1.0, ge=0.0, le=100.0, description="Sharpness of the draw; 0: the most likely token"
    )
    top_k: int = Field(0, ge=-1, description="Draw from the k most likely tokens; 0: from all")
    top_p: FiniteFloat = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Draw from the likeliest tokens that make up this probability",
    )
    min_p: FiniteFloat = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Draw from tokens at least this likely, relative to the likeliest",
    )
    repetition_penalty: FiniteFloat = Field(
        1.0, gt=0.0, le=100.0, description="Above 1: against tokens of prompt and output so far"
    )
    presence_penalty: FiniteFloat = Field(
        0.0, ge=-2.0, le=2.0, description="Against tokens of the output so far, once"
    )
    frequency_penalty: FiniteFloat = Field(
        0.0, ge=-2.0, le=2.0, description="Against tokens of the output so far, per occurrence"
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]] = (
        Field(
            default_factory=dict,
            max_length=1024,
            description="Added to the logits: token id to bias, -100 to 100",
        )
    )
    allowed_token_ids: list[int] | None = Field(
        None, min_length=1, description="Only these tokens may be chosen"
    )
    banned_token_ids: list[int] = Field(
        default_factory=list, description="These tokens are never chosen"
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Same seed, same tokens, whatever else runs"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Tokens to generate at most [default: what the context leaves]"
    )
    min_tokens: int = Field(0, ge=0, description="Tokens to generate before it may stop")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default_factory=list, max_length=16, description="Text that ends the output"
    )
    stop_token_ids: list[int] = Field(
        default_factory=list, description="Tokens that end the output"
    )
    include_stop_str_in_output: bool = Field(False, description="Keep the stop text in the output")
    ignore_eos: bool = Field(False, description="Go on past the end-of-sequence token")
    logprobs: int | None = Field(
        None,
        ge=-1,
        description="Log-probability of each token and of this many alternatives; -1: all",
    )
    prompt_logprobs: int | None = Field(None, ge=-1, description="The same for the prompt's tokens")
    truncate_prompt_tokens: TruncatePromptTokens | None = Field(
        None, description="Keep so many of the prompt's last tokens; -1: what there is room for"
    )
    bad_words: list[Annotated[str, Field(min_length=1)] | _TokenIds] = Field(
        default_factory=list,
        max_length=1024,
        description="Words, or lists of token ids, that are never completed",
    )
    no_repeat_ngram_size: int = Field(
        0,
        ge=0,
        le=64,
        description="No run of this many tokens comes twice, prompt included; 0: any may",
    )
    forced_prefix: Annotated[str, Field(min_length=1)] | _TokenIds | None = Field(
        None, description="Text, or token ids, that the output begins with"
    )
    logits_processors: ProcessorSpecs = Field(
        default_factory=list,
        max_length=16,
        description="Registered logits processors to apply: name, or name and arguments",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What the output must match: json, regex, choice or grammar"
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text")
    detokenize: bool = Field(True, description="Turn tokens into text")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            given = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise ValueError(
                f"{given} can't go with structured_outputs, which end where they are complete"
            )
        return self

    @model_validator(mode="after")
    def _consistent_beams(self) -> SamplingParams:
        if not self.use_beam_search:
            for name, off in _BEAM_FIELDS.items():
                if getattr(self, name) not in off:
                    raise ValueError(f"{name} needs use_beam_search to be true")
            return self
        if None not in (self.beam_width, self.best_of) and self.beam_width != self.best_of:
            raise ValueError(
                f"beam_width ({self.beam_width}) and best_of ({self.best_of}) both say how many "
                "beams to search with; send one"
            )
        width = self.beam_width or self.best_of or self.n
        if width < self.n:
            raise ValueError(f"beam_width ({width}) must be at least n ({self.n})")
        for name, off in _DRAW_FIELDS.items():
            if (value := getattr(self, name)) not in off:
                raise ValueError(f"{name} ({value}) has no meaning in a beam search; leave it out")
        if self.stop:
            raise ValueError("stop can't go with use_beam_search; use stop_token_ids")
        if len(self.stop_token_ids) > _MOST_BEAM_STOPS:
            raise ValueError(
                f"stop_token_ids has {len(self.stop_token_ids)} tokens; with use_beam_search "
                f"{_MOST_BEAM_STOPS} is the most, as each is one more to rank for every beam"
            )
        groups, rate = self.num_beam_groups, self.beam_search_diversity_rate
        if groups is not None and width % groups:
            raise ValueError(f"num_beam_groups ({groups}) must divide beam_width ({width})")
        if groups is not None and (groups > 1) != (rate > 0):
            raise ValueError(
                f"several groups of beams (num_beam_groups {groups}) and a rate above 0 "
                f"(beam_search_diversity_rate {rate:g}) need each other"
            )
        return self

    def beam_search(self) -> BeamSearch | None:
        """The rules of the beam search that is asked for, if one is."""
        if not self.use_beam_search:
            return None
        width = self.beam_width or self.best_of or self.n
        rate = self.beam_search_diversity_rate
        return BeamSearch(
            width=width,
            groups=self.num_beam_groups or (width if rate else 1),
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            diversity=rate,
            alternatives=sys.maxsize if self.logprobs == -1 else self.logprobs or 0,
        )

    def resolve(self, eos_token_ids: Sequence[int], vocab_size: int) -> Sampling:
        """What the shard needs, with the model's EOS ids and a seed filled in.

        Raises BadRequest when a token id lies outside the vocabulary, or for structured outputs
        that can't be enforced.
        """
        for field, ids in (
            ("logit_bias", list(self.logit_bias)),
            ("allowed_token_ids", self.allowed_token_ids or []),
            ("banned_token_ids", self.banned_token_ids),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise BadRequest(
                        f"{field} names token {token}; this model's tokens are 0 to "
                        f"{vocab_size - 1}",
                        param=field,
                    )
        stop = list(
            dict.fromkeys([*self.stop_token_ids, *([] if self.ignore_eos else eos_token_ids)])
        )
        best_of = self.best_of or self.n
        # best_of ranks by the sequences' log-probabilities, so the shard must report them.
        logprobs = 0 if self.logprobs is None and best_of > self.n else self.logprobs
        beams = self.beam_search()
        if beams is not None:
            logprobs = vocab_size if self.logprobs == -1 else self.logprobs or 0
            logprobs = min(max(candidates(beams, len(stop)), logprobs), vocab_size)
        grammar = ""
        if self.structured_outputs is not None:
            if not eos_token_ids:
                raise BadRequest(
                    "the model has no end-of-sequence token, which structured outputs need",
                    param="structured_outputs",
                )
            grammar = self.structured_outputs.compiled()
        return Sampling(
            temperature=self.temperature if beams is None else 0.0,
            top_k=min(max(self.top_k, 0), vocab_size),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            banned_token_ids=self.banned_token_ids,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            min_tokens=self.min_tokens,
            stop_token_ids=stop,
            grammar=grammar,
            beam=beams is not None,
        )
