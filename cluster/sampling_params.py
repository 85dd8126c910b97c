"""SamplingParams: what a user may say about decoding, with vLLM's names, checked at the edge."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tensorray.actors.protocol import Sampling

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else ([] if value is None else value)


class SamplingParams(BaseModel):
    """Sampling parameters of one request. Out-of-range values raise pydantic's ValidationError.

    Penalties and filters follow vLLM's definitions; see `tensorray.actors.protocol.Sampling` for
    the order in which they apply.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    n: int = Field(1, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=128)
    temperature: FiniteFloat = Field(1.0, ge=0.0, le=100.0)
    top_k: int = Field(0, ge=-1)
    top_p: FiniteFloat = Field(1.0, gt=0.0, le=1.0)
    min_p: FiniteFloat = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: FiniteFloat = Field(1.0, gt=0.0, le=100.0)
    presence_penalty: FiniteFloat = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: FiniteFloat = Field(0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]] = (
        Field(default_factory=dict, max_length=1024)
    )
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    banned_token_ids: list[int] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default_factory=list, max_length=16
    )
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=-1)
    prompt_logprobs: int | None = Field(None, ge=-1)
    skip_special_tokens: bool = True
    detokenize: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.n})")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        return self

    def resolve(self, eos_token_ids: Sequence[int], vocab_size: int) -> Sampling:
        """What the shard needs, with the model's EOS ids and a seed filled in.

        Raises ValueError when a token id lies outside the vocabulary.
        """
        for field, ids in (
            ("logit_bias", list(self.logit_bias)),
            ("allowed_token_ids", self.allowed_token_ids or []),
            ("banned_token_ids", self.banned_token_ids),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{field} names token {token}; this model's tokens are 0 to "
                        f"{vocab_size - 1}"
                    )
        stop = list(dict.fromkeys([*self.stop_token_ids, *([] if self.ignore_eos else eos_token_ids)]))
        best_of = self.best_of or self.n
        return Sampling(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            banned_token_ids=self.banned_token_ids,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            # best_of ranks by the sequences' log-probabilities, so the shard must report them.
            logprobs=0 if self.logprobs is None and best_of > self.n else self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            min_tokens=self.min_tokens,
            stop_token_ids=stop,
        )
