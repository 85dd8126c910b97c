"""Guided decoding: which tokens a grammar allows next, for the sequences that have one.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing. A grammar's state is on the
host, beside sampling: each sequence's `Guide` follows the tokens that were chosen, and says which
may come next as one bit a token. Nothing of it survives a sequence's end, so one that starts again,
after a preemption or on another shard, replays its output.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # imported with the first guided sequence: most shards never have one
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_WORD = 32  # tokens whose bits one word of a mask holds

# Seconds without a step after which a shard has time for its vocabulary.
_QUIET = 2.0

_KEPT = 16  # grammars that are ready to be followed again

NO_VOCABULARY = "guided output needs the model's vocabulary, which this shard was not given"


@dataclass(frozen=True)
class Vocabulary:
    """What tokens stand for: `tokens[id]` is the bytes that token `id` adds to a text.

    No text holds a `control` token, whatever its bytes spell; any of `ends` ends one. `encode` has
    the tokens of bytes: those that a model would write where a grammar leaves no choice.
    """

    tokens: Sequence[bytes]
    control: Sequence[int]
    ends: Sequence[int]
    encode: Callable[[bytes], list[int]]


class NoEndToken(ValueError):
    """Nothing would say that a text which follows a grammar is over."""


class Guide:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: Future[LLMatcher]) -> None:
        self._coming = matcher

    def advance(self, token: int) -> None:
        """`token` was chosen. Tokens after the end, which a step under way may bring, are void."""
        matcher = self.matcher
        if not matcher.is_stopped():
            matcher.consume_token(token)

    @property
    def matcher(self) -> LLMatcher:
        return self._coming.result()

    @property
    def error(self) -> str:
        """Why it can't go on: the grammar needs more than its limits allow. Empty if it can."""
        return self.matcher.get_error().split("\n", 1)[0]


class Guidance:
    """A shard's grammars over its model's vocabulary, which is loaded when the first one comes, or
    ahead of it, see `prepare`."""

    def __init__(
        self, load: Callable[[], Vocabulary], vocab_size: int, quiet: float = _QUIET
    ) -> None:
        """`vocab_size` is the model's: tokens beyond the vocabulary's are never allowed."""
        self._quiet = quiet
        self._last_step = time.monotonic()
        self.words = -(-vocab_size // _WORD)
        self._load = load
        self._vocab_size = vocab_size
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._fresh: OrderedDict[str, LLMatcher] = OrderedDict()  # by grammar, at its beginning

    def step(self) -> None:
        """A step runs: who has no grammar must not wait for what `prepare` does."""
        self._last_step = time.monotonic()

    def prepare(self) -> threading.Thread:
        """Have the vocabulary loaded as soon as no step has run for a while, on the thread that is
        returned: it takes seconds, in which Python runs little else, and the first grammar would
        have to wait for it."""
        thread = threading.Thread(target=self._prepare, name="vocabulary", daemon=True)
        thread.start()
        return thread

    def _prepare(self) -> None:
        while (left := self._last_step + self._quiet - time.monotonic()) > 0:
            time.sleep(left)
        try:
            self._compiled()
        except NoEndToken as error:  # no request with a grammar gets here
            logger.info("%s", error)
        except Exception:  # the first grammar will say it to who can do something about it
            logger.exception("the vocabulary for guided decoding can't be loaded")

    def guide(self, grammar: str, outputs: Sequence[int]) -> Guide:
        """The guide of a sequence that has generated `outputs`; returns before it is ready.

        `grammar` is what `tensorray.cluster.structured_outputs` makes and has checked.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return Guide(self._pool.submit(self._match, grammar, list(outputs)))

    def masks(self, guides: Sequence[Guide]) -> NDArray[np.int32]:
        """Who may come next: int32 [len(guides), words]; a token's bit, set where it is allowed,
        is bit `token % 32` of word `token // 32`."""
        masks = np.zeros((len(guides), self.words), np.int32)
        if len(guides) == 1:
            guides[0].matcher.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        elif guides:
            from llguidance import LLExecutor

            self._executor = self._executor or LLExecutor()
            numbered = [(guide.matcher, row) for row, guide in enumerate(guides)]
            self._executor.unsafe_compute_mask_ptr(
                numbered, masks.ctypes.data, 4 * self.words, len(guides)
            )
        return masks

    def _match(self, grammar: str, outputs: list[int]) -> LLMatcher:
        matcher = self._begun(grammar).deep_copy()
        for token in outputs:
            if not matcher.is_stopped():
                matcher.consume_token(token)
        return matcher

    def _begun(self, grammar: str) -> LLMatcher:
        """A matcher to copy: beams start anew with every token, and a request may have many
        sequences."""
        from llguidance import LLMatcher

        found = self._fresh.pop(grammar, None)
        if found is None:
            found = LLMatcher(self._compiled(), grammar, log_level=0)
        self._fresh[grammar] = found
        if len(self._fresh) > _KEPT:
            self._fresh.popitem(last=False)
        return found

    def _compiled(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = compile_vocabulary(self._load(), self._vocab_size)
            return self._tokenizer


def compile_vocabulary(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The vocabulary as llguidance searches it: a trie of the tokens' bytes. Raises NoEndToken."""
    from llguidance import LLTokenizer

    if not vocabulary.ends:
        raise NoEndToken("the model has no end-of-sequence token, so it can't follow a grammar")

    return LLTokenizer(
        _Tokens(vocabulary, vocab_size),  # type: ignore[arg-type]  # one by duck typing
        n_vocab=vocab_size,
        eos_token=list(vocabulary.ends),
    )


class _Tokens:
    """A vocabulary as LLTokenizer wants to be told of it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        tokens = list(vocabulary.tokens[:vocab_size])
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))
        self._encode = vocabulary.encode
        self.special_token_ids = [token for token in vocabulary.control if token < vocab_size]
        self.eos_token_id = vocabulary.ends[0]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)
