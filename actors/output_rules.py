"""Which tokens a sequence's own tokens force or forbid next: forced prefix, bad words, n-grams.

All three are masks over the vocabulary that follow from the tokens so far, so one object a sequence
is told each token and says what comes of it. Nothing in it survives the sequence's end: one that
starts again builds it from the tokens it has.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import Sampling, SequenceStart

_WORD = 32  # tokens whose bits one word of a mask holds

_Tokens = tuple[int, ...]


class OutputRules:
    """One sequence's rules.

    The forced prefix goes before the others: while it lasts nothing else is forbidden. A bad word
    is kept from being completed, wherever in prompt or output it began; an n-gram is kept from
    coming a second time in prompt and output together. Both are as transformers defines them
    (`NoBadWordsLogitsProcessor`, `NoRepeatNGramLogitsProcessor`; the latter from arXiv 1705.04304).
    """

    def __init__(self, start: SequenceStart) -> None:
        sampling = start.sampling
        self._forced = sampling.forced_prefix
        self._outputs = len(start.tokens) - start.prompt_len
        self._bad_words = _BadWords(sampling.bad_words)
        self._ngrams = _NGrams(sampling.no_repeat_ngram_size, start.tokens)
        self._recent: list[int] = []  # as many tokens as any rule looks back at
        self._reach = max(self._bad_words.longest, self._ngrams.size) - 1
        for token in start.tokens[max(0, len(start.tokens) - self._reach) :]:
            self._note(token)

    @property
    def done(self) -> bool:
        """Whether nothing is ever forced or forbidden any more."""
        return self._reach < 0 and self._outputs >= len(self._forced)

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None: there is a choice."""
        return self._forced[self._outputs] if self._outputs < len(self._forced) else None

    @property
    def banned(self) -> list[int]:
        """Tokens that may not come next, in no order, some maybe twice."""
        if self.forced is not None:
            return []
        return [*self._bad_words.completed_by(self._recent), *self._ngrams.after(self._recent)]

    def append(self, token: int) -> None:
        """The sequence has one more token."""
        self._outputs += 1
        self._ngrams.add(self._recent, token)
        self._note(token)

    def restrict(self, mask: NDArray[np.int32]) -> None:
        """Clear the bits of a mask, int32 [words], whose tokens may not come next.

        A token's bit is bit `token % 32` of word `token // 32`.
        """
        words = mask.view(np.uint32)
        if (forced := self.forced) is not None:
            word, bit = divmod(forced, _WORD)
            kept = words[word] & np.uint32(1 << bit)
            words.fill(0)
            words[word] = kept
            return
        for token in self.banned:
            words[token // _WORD] &= ~np.uint32(1 << token % _WORD)

    def _note(self, token: int) -> None:
        self._recent.append(token)
        if len(self._recent) > 2 * self._reach + 64:
            del self._recent[: -self._reach or None]


class _BadWords:
    """Words of several tokens, by all of their tokens but the last."""

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._last: defaultdict[_Tokens, list[int]] = defaultdict(list)
        for word in words:
            self._last[tuple(word[:-1])].append(word[-1])
        self._lengths = sorted({len(begin) for begin in self._last})
        self.longest = max((length + 1 for length in self._lengths), default=0)

    def completed_by(self, recent: Sequence[int]) -> Iterable[int]:
        for length in self._lengths:
            if length <= len(recent):
                yield from self._last.get(tuple(recent[len(recent) - length :]), ())


class _NGrams:
    """What has followed each run of `size` - 1 tokens.

    A beam starts anew with every token, and asks once. To look through all of its tokens for that
    is many times faster than to note what follows what, which pays from the second time on.
    """

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self.size = size
        self._tokens = array("I", tokens if size else ())  # that it started with
        self._followers: defaultdict[_Tokens, list[int]] | None = None

    def add(self, recent: Sequence[int], token: int) -> None:
        """`token` has followed `recent`."""
        before = self.size - 1
        if before < 0:
            return
        if self._followers is None:
            self._followers = defaultdict(list)
            begun = self._tokens.tolist()
            for end in range(before, len(begun)):
                self._followers[tuple(begun[end - before : end])].append(begun[end])
        if before <= len(recent):
            self._followers[tuple(recent[len(recent) - before :])].append(token)

    def after(self, recent: Sequence[int]) -> Iterable[int]:
        before = self.size - 1
        if not 0 <= before <= len(recent):
            return ()
        last = recent[len(recent) - before :]
        if self._followers is None:
            return _after(last, self._tokens) if last else self._tokens
        return self._followers.get(tuple(last), ())


def _after(run: Sequence[int], tokens: array[int]) -> Iterator[int]:
    """What has followed a run of tokens, one at least, wherever it came."""
    size, searched, found = tokens.itemsize, tokens.tobytes(), array("I", run).tobytes()
    at = searched.find(found)
    while 0 <= at < len(searched) - len(found):
        if at % size == 0:  # else it begins within a token
            yield tokens[at // size + len(run)]
        at = searched.find(found, at + 1)


def has_rules(sampling: Sampling) -> bool:
    """Whether a sequence's next token hangs on its last ones by a rule of this file."""
    return bool(sampling.forced_prefix or sampling.bad_words or sampling.no_repeat_ngram_size)


def rules_of(start: SequenceStart) -> OutputRules | None:
    """The rules of a sequence that starts, if there are any that still matter."""
    if not has_rules(start.sampling):
        return None
    rules = OutputRules(start)
    return None if rules.done else rules
