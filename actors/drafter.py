"""What guesses tokens for speculative decoding (Leviathan et al., arXiv 2211.17192).

Whatever a drafter says, the sampler draws each token as it would have drawn it alone, from the same
logits with the same random number, and goes on to the next while the guess was that very token. So
a guess decides how fast tokens come and never which, and a seed gives the same tokens with and
without it. A drafter whose guesses are themselves draws uses the same random numbers (`Guess`;
common random numbers, Daliri et al., arXiv 2408.07978), which agree where the distributions do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import SequenceStart

#: (sequence, how many tokens after its next one, float32 logits [vocab]) -> what the sequence would
#: draw from these.
Guess = Callable[[int, int, Any], int]


@dataclass(frozen=True)
class Seen:
    """What a step ran of the sequences that have guesses, but for guesses that were wrong: S
    sequences, T tokens packed end to end."""

    seqs: list[int]
    counts: NDArray[np.int32]  # [S], tokens of each
    first: NDArray[np.int32]  # [S], the position of the first of these
    following: NDArray[np.int32]  # [T], the token that comes after each
    tables: list[NDArray[np.int32]]  # of each KV group, [S, blocks]
    states: Mapping[int, NDArray[Any]]  # of the layers in `Drafter.watches`, [T, hidden]


class Drafter:
    """Guesses for the sequences that run. What it need not know it may leave out."""

    #: What guessing one token costs, in steps of one sequence.
    cost = 0.0
    #: The most tokens it can guess at once; None: any number.
    most: int | None = None
    #: The layers whose inputs it wants to see of all that steps run (the number of layers: what
    #: comes out of the last).
    watches: tuple[int, ...] = ()

    def start(self, start: SequenceStart) -> None:
        """A sequence enters, or re-enters."""

    def end(self, seq: int) -> None:
        """It leaves."""

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        """It chose these tokens in a step, the last from this row `[hidden]` of the residual
        stream, which is to be copied if it is to be kept."""

    def watch(self, seen: Seen) -> None:
        """After a step, if it watches any layer. What was chosen in the step is known here."""

    def resize(self, num_blocks: int) -> None:
        """All sequences are gone; the KV cache has so many blocks from now on."""

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        """Up to `rooms[i]` tokens that `seqs[i]` may go on with.

        `tables`, int32 [len(seqs), blocks] for each KV group, are the sequences' block tables, with
        room for the positions of all known tokens and the guesses; on a GPU there are none, since
        the host has no part in what goes by them.
        """
        return [[] for _ in seqs]
