"""What a request forces, forbids or has its own code decide, from texts and names to tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from tensorray.actors.logits_processors import UNKNOWN
from tensorray.actors.protocol import ProcessorCall, Sampling
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.sampling_params import LogitsProcessorSpec, SamplingParams
from tensorray.cluster.tokenizer import InvalidText, Tokenizer

_MOST_WORD = 256  # tokens of a bad word: each length is looked for with each token

#: A user's logits processors, by name.
Registry = Mapping[str, Callable[..., Any]]


def controls(
    params: SamplingParams,
    sampling: Sampling,
    tokenizer: Tokenizer,
    registry: Registry,
    vocab_size: int,
) -> dict[str, Any]:
    """The fields of `Sampling` that a request's bad words, forced prefix and logits processors
    come to; `sampling` has the others. Raises BadRequest naming the parameter that is wrong."""
    found: dict[str, Any] = {}
    if params.bad_words:
        words = list(_bad_words(params.bad_words, tokenizer, vocab_size))
        single = [word[0] for word in words if len(word) == 1]
        found["banned_token_ids"] = list(dict.fromkeys([*sampling.banned_token_ids, *single]))
        found["bad_words"] = [word for word in words if len(word) > 1]
    if params.no_repeat_ngram_size:
        found["no_repeat_ngram_size"] = params.no_repeat_ngram_size
    if params.forced_prefix:
        banned = found.get("banned_token_ids", sampling.banned_token_ids)
        found["forced_prefix"] = _forced(params, sampling, banned, tokenizer, vocab_size)
    if params.logits_processors:
        found["logits_processors"] = [_call(each, registry) for each in params.logits_processors]
    return found


def _bad_words(
    words: list[str | list[int]], tokenizer: Tokenizer, vocab_size: int
) -> Iterator[list[int]]:
    """Each word's tokens once: a text's as it begins a line, goes on within a word, and follows a
    space."""
    seen: set[tuple[int, ...]] = set()
    for word in words:
        for tokens in _spellings(word, tokenizer, vocab_size):
            if len(tokens) > _MOST_WORD:
                raise BadRequest(
                    f"bad_words has a word of {len(tokens)} tokens; {_MOST_WORD} is the most",
                    param="bad_words",
                )
            if tokens and tuple(tokens) not in seen:
                seen.add(tuple(tokens))
                yield tokens


def _spellings(word: str | list[int], tokenizer: Tokenizer, vocab_size: int) -> Iterator[list[int]]:
    if not isinstance(word, str):
        yield _checked(word, "bad_words", vocab_size)
        return
    bare = word.lstrip(" ") or word
    for text, continues in ((bare, False), (bare, True), (f" {bare}", True)):
        yield _encoded(text, "bad_words", tokenizer, continues=continues)


def _forced(
    params: SamplingParams,
    sampling: Sampling,
    banned: list[int],
    tokenizer: Tokenizer,
    vocab_size: int,
) -> list[int]:
    prefix = params.forced_prefix
    if isinstance(prefix, str):
        tokens = _encoded(prefix, "forced_prefix", tokenizer, continues=True)
    else:
        tokens = _checked(prefix or [], "forced_prefix", vocab_size)
    excluded = {*banned, *sampling.stop_token_ids}
    allowed = sampling.allowed_token_ids
    possible = set(tokens if allowed is None else allowed) - excluded
    for token in tokens:
        if token not in possible:
            raise BadRequest(
                f"forced_prefix has token {token} ({tokenizer.id_to_token(token)!r}), which "
                "allowed_token_ids, banned_token_ids or bad_words exclude or which ends the output",
                param="forced_prefix",
            )
    if params.max_tokens is not None and len(tokens) > params.max_tokens:
        raise BadRequest(
            f"forced_prefix has {len(tokens)} tokens, more than max_tokens ({params.max_tokens})",
            param="forced_prefix",
        )
    return tokens


def _call(spec: LogitsProcessorSpec, registry: Registry) -> ProcessorCall:
    found = registry.get(spec.name)
    if found is None:
        raise BadRequest(UNKNOWN.format(name=spec.name[:100]), param="logits_processors")
    try:
        msgspec.msgpack.encode(spec.arguments)
    except (TypeError, OverflowError, RecursionError) as error:
        raise BadRequest(
            f"logits processor {spec.name}: its arguments can't be sent to it: {error}",
            param="logits_processors",
        ) from None
    try:
        signature = inspect.signature(found)
    except ValueError:  # a class of C's that does not tell
        return ProcessorCall(spec.name, spec.arguments)
    try:
        signature.bind(**spec.arguments)
    except TypeError as error:
        raise BadRequest(
            f"logits processor {spec.name}: {error}; it takes {signature}",
            param="logits_processors",
        ) from None
    return ProcessorCall(spec.name, spec.arguments)


def _encoded(text: str, param: str, tokenizer: Tokenizer, *, continues: bool) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False, continues=continues)
    except InvalidText as error:
        raise BadRequest(f"{param} can't be encoded: {error}", param=param) from None


def _checked(tokens: list[int], param: str, vocab_size: int) -> list[int]:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise BadRequest(
                f"{param} names token {token}; this model's tokens are 0 to {vocab_size - 1}",
                param=param,
            )
    return tokens
