"""The block manager: which KV block holds which tokens of which sequence.

One pool of blocks serves all KV groups, since a block is the same bytes in each. A sequence has
one block table per group: entry i holds tokens `i * block_size` and on. A group with an attention
window gives its blocks back as they fall out of the window (entry: the placeholder block 0), so
such a table has a live tail only.

Full blocks are offered for reuse under a key chained from the prompt's start, so that a key
stands for the block's tokens and all before them (the idea of vLLM, arXiv 2309.06180, section
4.4, and of SGLang's radix cache, arXiv 2312.07104). A block nobody refers to any more stays
findable until its memory is needed; the least recently used goes first.

When blocks may change hands: plans run on the shard in the order they were made, so a block freed
while making plan n may be given away in plan n at once. Plans before n may still read or write it
for its old owner, and do so before n runs; plan n and those after know it under its new owner only.

When blocks become findable: once a *result* confirms that the step which computes them succeeded,
not when that step is planned. A plan could hit them one step earlier, but then a sequence that
failed on the shard would drag along those that trusted its blocks.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from tensorray.actors.protocol import KVGroups
from tensorray.cluster.sequence import Sequence


class BlockManager:
    """Block tables of the running sequences, and the cache of blocks that may be reused.

    It keeps its notes on the sequences themselves: `tables`, `trimmed`, `keys`, `registered`,
    `promised`, and at admission `computed`. A *column* is a block's index in the tables.
    """

    def __init__(self, kv: KVGroups, *, enable_prefix_caching: bool = True) -> None:
        self.block_size = kv.block_size
        self.total = kv.num_blocks - 1  # block 0 is the placeholder
        self.num_groups = len(kv.windows)
        self.enable_prefix_caching = enable_prefix_caching
        self._full = [g for g, window in enumerate(kv.windows) if window is None]
        self._windowed = [(g, window) for g, window in enumerate(kv.windows) if window is not None]
        self._free = list(range(kv.num_blocks - 1, 0, -1))
        self._refs = [0] * kv.num_blocks
        # What can be found: per group, key -> block; and back, for eviction.
        self._found: list[dict[bytes, int]] = [{} for _ in kv.windows]
        self._key: list[bytes | None] = [None] * kv.num_blocks
        self._home: list[dict[bytes, int]] = [{}] * kv.num_blocks
        # Findable, but nobody's: least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Keys that running prefills are about to register.
        self._coming: dict[bytes, Sequence] = {}

    # --- how much there is -----------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones nobody refers to."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks kept only in case their content is asked for again."""
        return len(self._idle)

    def blocks_needed(self, length: int) -> int:
        """The most blocks a sequence alone holds on its way to `length` cached tokens.

        A windowed group holds most at the first token of a block: the window then reaches
        furthest into the block it is about to leave.
        """
        columns = -(-length // self.block_size)
        return len(self._full) * columns + sum(
            min(columns, self._span(window)) for _, window in self._windowed
        )

    def longest(self) -> int:
        """The most cached tokens one sequence alone in the pool can reach, at most 2**40."""
        if self.blocks_needed(1) > self.total:
            return 0
        fits, too_long = 1, 2**40
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.blocks_needed(middle) <= self.total:
                fits = middle
            else:
                too_long = middle
        return fits

    def held(self, s: Sequence) -> int:
        """Blocks in the sequence's tables, shared ones included."""
        return sum(map(len, s.tables)) - sum(s.trimmed)

    def _span(self, window: int) -> int:
        """The most blocks that `window` consecutive tokens touch."""
        return (window + self.block_size - 2) // self.block_size + 1

    # --- a sequence's life: admit, (trim, grow, register)*, release --------------------------

    def shortfall(self, s: Sequence, reserve: int) -> int:
        """How many blocks are missing to admit the sequence and leave `reserve`; <= 0: none."""
        return self._cost(s, self._match(s)) + reserve - self.available

    def admit(self, s: Sequence, reserve: int) -> bool:
        """Start a sequence's tables with what the cache has, if its known tokens will fit.

        Takes the full-attention groups' blocks for all its known tokens at once, so that a
        prefill that has begun can run out of windowed blocks only. Sets `computed` to the number
        of reused tokens. False, and nothing changed, if fewer than `reserve` blocks were left.
        """
        hit = self._match(s)
        if self._cost(s, hit) + reserve > self.available:
            return False
        columns = -(-len(s.tokens) // self.block_size)
        s.trimmed = self._first_columns(hit)
        s.tables = []
        for found, first in zip(self._found, s.trimmed, strict=True):
            blocks = [found[key] for key in s.keys[first:hit]]
            for block in blocks:
                if not self._refs[block]:
                    del self._idle[block]
                self._refs[block] += 1
            s.tables.append([0] * first + blocks)
        for g in self._full:
            s.tables[g] += [self._take() for _ in range(columns - hit)]
        s.registered = hit
        s.computed = hit * self.block_size
        if self.enable_prefix_caching:
            s.promised = len(s.tokens) // self.block_size
            for key in self._keys(s, s.promised)[hit : s.promised]:
                self._coming.setdefault(key, s)
        return True

    def grow(self, s: Sequence, upto: int) -> list[list[int]] | None:
        """Extend every group's table to hold the first `upto` tokens: the blocks each was given.

        None, and nothing taken, when there are not enough.
        """
        columns = -(-upto // self.block_size)
        tables = s.tables
        missing = 0
        for table in tables:
            if len(table) < columns:
                missing += columns - len(table)
        if missing > len(self._free) + len(self._idle):
            return None
        take = self._take
        added = []
        for table in tables:
            blocks = [take() for _ in range(columns - len(table))]
            table += blocks
            added.append(blocks)
        return added

    def capacity(self, s: Sequence) -> int:
        """How many leading tokens the tables hold."""
        return min(map(len, s.tables)) * self.block_size

    def reach(self, s: Sequence, reserve: int) -> int:
        """How many a prefill's tables could hold, were all blocks but `reserve` given to it."""
        more = max(0, self.available - reserve) // len(self._windowed) if self._windowed else 0
        return self.capacity(s) + more * self.block_size

    def trim(self, s: Sequence) -> bool:
        """Free the windowed blocks that no query from position `computed` on will see.

        False if some must stay until they are confirmed and can be offered for reuse: a long
        chunk's early blocks leave the window before its result is back.
        """
        done = True
        for g, window in self._windowed:
            dead = (s.computed - window + 1) // self.block_size
            if self.enable_prefix_caching and dead > s.registered:
                dead, done = s.registered, False
            table = s.tables[g]
            for column in range(s.trimmed[g], dead):
                self._drop(table[column])
                table[column] = 0
                s.trimmed[g] = dead
        return done

    def register(self, s: Sequence, confirmed: int) -> None:
        """Offer the full blocks among the first `confirmed` computed tokens for reuse."""
        full = confirmed // self.block_size
        if full <= s.registered or not self.enable_prefix_caching:
            return
        keys = self._keys(s, full)
        for column in range(s.registered, full):
            key = keys[column]
            for table, found in zip(s.tables, self._found, strict=True):
                if key not in found:
                    block = table[column]
                    found[key] = block
                    self._key[block] = key
                    self._home[block] = found
            if self._coming.get(key) is s:
                del self._coming[key]
        s.registered = full

    def release(self, s: Sequence, *, forget: bool = False) -> None:
        """Give all of a sequence's blocks back, the last first, so that prefixes outlive suffixes.

        `forget` makes them unfindable as well: a failed sequence's content is not to be trusted.
        """
        for key in s.keys[s.registered : s.promised]:
            if self._coming.get(key) is s:
                del self._coming[key]
        # By column rather than by group: a hit needs a column of every group.
        for column in range(max(map(len, s.tables), default=0) - 1, -1, -1):
            for table in s.tables:
                if column < len(table) and table[column]:
                    if forget:
                        self._forget(table[column])
                    self._drop(table[column])
        s.tables, s.trimmed = [], []
        s.computed = s.registered = s.promised = 0

    def awaited(self, s: Sequence) -> Sequence | None:
        """The running sequence that is about to compute the next block `s` could reuse, if any."""
        if not self._coming or not self._may_reuse(s):
            return None
        found = self._found[self._full[0] if self._full else 0]
        for key in self._keys(s, self._reusable(s))[: self._reusable(s)]:
            if key not in found:
                return self._coming.get(key)
        return None

    # --- finding --------------------------------------------------------------------------

    def _may_reuse(self, s: Sequence) -> bool:
        return self.enable_prefix_caching and s.request.reuse_prefix

    def _reusable(self, s: Sequence) -> int:
        """Columns that could be reused at most: one token must be left to compute."""
        return (len(s.tokens) - 1) // self.block_size

    def _match(self, s: Sequence) -> int:
        """The most leading columns whose blocks are all there, as far as the windows reach."""
        if not self._may_reuse(s):
            return 0
        hit = self._reusable(s)
        keys = self._keys(s, hit)
        for g in self._full:
            found = self._found[g]
            hit = next((c for c in range(hit) if keys[c] not in found), hit)
        while hit:
            firsts = self._first_columns(hit)
            gap = max(
                (
                    column
                    for g, _ in self._windowed
                    for column in range(firsts[g], hit)
                    if keys[column] not in self._found[g]
                ),
                default=None,
            )
            if gap is None:
                break
            hit = gap  # any longer hit would see the gap
        return hit

    def _first_columns(self, hit: int) -> list[int]:
        """Per group, the first column that a query after `hit` columns sees."""
        firsts = [0] * self.num_groups
        for g, window in self._windowed:
            firsts[g] = max(0, hit * self.block_size - window + 1) // self.block_size
        return firsts

    def _cost(self, s: Sequence, hit: int) -> int:
        """How many available blocks it takes to admit a sequence with that hit."""
        columns = -(-len(s.tokens) // self.block_size)
        firsts = self._first_columns(hit)
        new = len(self._full) * (columns - hit) + sum(
            max(0, min(columns, self._span(window)) - (hit - firsts[g]))
            for g, window in self._windowed
        )
        revived = sum(
            not self._refs[found[key]]
            for found, first in zip(self._found, firsts, strict=True)
            for key in s.keys[first:hit]
        )
        return new + revived

    def _keys(self, s: Sequence, columns: int) -> list[bytes]:
        """The sequence's content keys, at least the first `columns`."""
        keys, tokens, size = s.keys, s.tokens, self.block_size
        while len(keys) < columns:
            start = len(keys) * size
            parent = keys[-1] if keys else blake2b(s.request.cache_salt.encode()).digest()
            content = array("q", tokens[start : start + size]).tobytes()
            keys.append(blake2b(parent + content, digest_size=32).digest())
        return keys

    # --- single blocks ----------------------------------------------------------------------

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if not self._refs[block]:
            if self._key[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._home[block][key]
            self._key[block] = None
