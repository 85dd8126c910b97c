"""The block manager: which KV block holds which tokens of which sequence.

One pool of blocks serves all KV groups, since a block is the same bytes in each. Groups with the
same attention window form a *kind*: they always hold the same tokens, so their blocks are taken,
shared and freed together, as *pages* of one block per group. A sequence has one table of pages
per kind; a page's index in it is its *column*, and column c holds tokens `c * block_size` and on.
A kind with a window frees pages as they fall out of it, so its tables have only a live tail.

Full pages are offered for reuse under a key chained from the prompt's start, so that a key stands
for the page's tokens and all before them (the idea of vLLM, arXiv 2309.06180, section 4.4, and of
SGLang's radix cache, arXiv 2312.07104). A page nobody refers to any more stays findable until its
memory is needed; the least recently used goes first.

When blocks may change hands: plans run on the shard in the order they were made, so a block freed
while making plan n may be given away in plan n at once. Plans before n may still read or write it
for its old owner, and do so before n runs; plan n and those after know it under its new owner only.

Beams of one search share pages whether full or not: `fork` gives a beam all of another's. Before a
beam writes to a page that others hold too, `unshare` gives it one of its own, and the plan carries
the copies that fill it. Copies come before anything else a plan does, so what they read is what
plans before wrote.

When pages become findable: once a *result* confirms that the step which computes them succeeded,
not when that step is planned. A plan could hit them one step earlier, but then a sequence that
failed on the shard would drag along those that trusted its pages.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from itertools import zip_longest
from struct import Struct

from tensorray.actors.protocol import KVGroups
from tensorray.cluster.sequence import Sequence


class Kind:
    """The KV groups of one attention window, in tokens (None: all)."""

    __slots__ = ("found", "groups", "size", "window")

    def __init__(self, window: int | None, groups: list[int]) -> None:
        self.window = window
        self.groups = groups
        self.size = len(groups)  # blocks in a page
        self.found: dict[bytes, Page] = {}  # what can be reused


class Page:
    """A column of one kind's tables: one block per group of the kind."""

    __slots__ = ("blocks", "key", "kind", "refs")

    def __init__(self, kind: Kind, blocks: list[int]) -> None:
        self.kind = kind
        self.blocks = blocks
        self.refs = 1  # tables it is in
        self.key: bytes | None = None  # under which it can be found


class Table:
    """A sequence's pages of one kind, by column; None where one fell out of the window."""

    __slots__ = ("kind", "pages", "trimmed")

    def __init__(self, kind: Kind, pages: list[Page | None], trimmed: int) -> None:
        self.kind = kind
        self.pages = pages
        self.trimmed = trimmed  # leading columns that fell out of the window


class BlockManager:
    """Tables of the running sequences, and the cache of pages that may be reused.

    It keeps its notes on the sequences themselves: `tables`, `keys`, `registered`, `promised`, and
    at admission `computed`.
    """

    def __init__(self, kv: KVGroups, *, enable_prefix_caching: bool = True) -> None:
        self.block_size = kv.block_size
        self.total = kv.num_blocks - 1  # block 0 is the placeholder
        self.num_groups = len(kv.windows)
        self.enable_prefix_caching = enable_prefix_caching
        groups: dict[int | None, list[int]] = {}
        for group, window in enumerate(kv.windows):
            groups.setdefault(window, []).append(group)
        self._kinds = [Kind(window, members) for window, members in groups.items()]
        self._pack = Struct(f"{kv.block_size}I").pack
        self._free = list(range(kv.num_blocks - 1, 0, -1))
        # Findable, but in no table: least recently used first.
        self._idle: OrderedDict[Page, None] = OrderedDict()
        self._idle_blocks = 0
        # Keys that running prefills are about to register.
        self._coming: dict[bytes, Sequence] = {}

    # --- how much there is -----------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones nobody refers to."""
        return len(self._free) + self._idle_blocks

    @property
    def cached(self) -> int:
        """Blocks kept only in case their content is asked for again."""
        return self._idle_blocks

    def blocks_needed(self, length: int) -> int:
        """The most blocks a sequence alone holds on its way to `length` cached tokens.

        A windowed kind holds most at the first token of a page: the window then reaches furthest
        into the page it is about to leave.
        """
        columns = -(-length // self.block_size)
        return sum(kind.size * min(columns, self._span(kind)) for kind in self._kinds)

    def blocks_needed_by_beams(self, prompt_len: int, length: int, width: int) -> int:
        """The most blocks that `width` beams hold on their way to `length` cached tokens each, of
        which the first `prompt_len` are the same; shared ones count once.
        """
        columns = -(-length // self.block_size)
        shared = prompt_len // self.block_size
        return sum(
            kind.size
            * (min(shared, self._span(kind)) + width * min(columns - shared, self._span(kind)))
            for kind in self._kinds
        )

    def longest(self, limit: int) -> int:
        """The most cached tokens one sequence alone in the pool can reach, up to `limit`."""
        return bisect_right(range(1, limit + 1), self.total, key=self.blocks_needed)

    def held(self, s: Sequence) -> int:
        """Blocks in the sequence's tables, shared ones included."""
        return sum(table.kind.size * (len(table.pages) - table.trimmed) for table in s.tables)

    def capacity(self, s: Sequence) -> int:
        """How many leading tokens the tables hold."""
        return min(len(table.pages) for table in s.tables) * self.block_size

    def reach(self, s: Sequence, reserve: int) -> int:
        """How many a prefill's tables could hold, were all blocks but `reserve` given to it."""
        windowed = sum(kind.size for kind in self._kinds if kind.window is not None)
        more = max(0, self.available - reserve) // windowed if windowed else 0
        return self.capacity(s) + more * self.block_size

    def block_tables(self, s: Sequence) -> list[list[int]]:
        """Per group, the ids of the sequence's blocks; 0 where one fell out of the window."""
        ids: list[list[int]] = [[] for _ in range(self.num_groups)]
        for table in s.tables:
            kind = table.kind
            gone = [0] * kind.size
            columns = [page.blocks if page else gone for page in table.pages]
            # Without columns there is nothing to transpose, and the lists stay empty.
            for group, blocks in zip(kind.groups, zip(*columns, strict=True), strict=False):
                ids[group] = list(blocks)
        return ids

    def _span(self, kind: Kind) -> int:
        """The most columns that a query sees."""
        if kind.window is None:
            return sys.maxsize
        return (kind.window + self.block_size - 2) // self.block_size + 1

    # --- a sequence's life: admit, (trim, grow, register)*, release --------------------------

    def shortfall(self, s: Sequence, reserve: int, given: int = 0) -> int:
        """How many blocks are missing to admit the sequence and leave `reserve`; <= 0: none."""
        hit = self._match(s)
        return self._cost(s, hit, max(hit, given)) + reserve - self.available

    def admit(self, s: Sequence, reserve: int, given: int = 0) -> bool:
        """Start a sequence's tables with what the cache has, if its known tokens will fit.

        Takes the full-attention kind's pages for all its known tokens at once, so that a prefill
        that has begun can run out of windowed pages only. Sets `computed` to the number of reused
        tokens. False, and nothing changed, if fewer than `reserve` blocks were left.

        The first `given` columns will be filled from elsewhere, so that the tables have what a
        query after them sees; see `unfilled`.
        """
        hit = self._match(s)
        given = max(given, hit)
        if self._cost(s, hit, given) + reserve > self.available:
            return False
        columns = -(-len(s.tokens) // self.block_size)
        for kind in self._kinds:
            first = self._first_column(kind, given)
            reused = [kind.found[key] for key in s.keys[first:hit]]
            for page in reused:
                self._hold(page)
            s.tables.append(Table(kind, [None] * first + reused, first))
        for table in s.tables:
            upto = columns if table.kind.window is None else given
            table.pages += [self._take(table.kind) for _ in range(upto - len(table.pages))]
        s.registered = hit
        s.computed = hit * self.block_size
        if self.enable_prefix_caching:
            s.promised = len(s.tokens) // self.block_size
            for key in self._keys(s, s.promised)[hit:]:
                self._coming.setdefault(key, s)
        return True

    def unfilled(self, s: Sequence, given: int) -> list[list[int]]:
        """Of a sequence just admitted with `given` columns: per group, the blocks of those columns
        that are to be filled from elsewhere; 0 for one that is not."""
        ids: list[list[int]] = [[] for _ in range(self.num_groups)]
        for table in s.tables:
            first = max(s.registered, table.trimmed)
            pages = [page for page in table.pages[first:given] if page]
            for place, group in enumerate(table.kind.groups):
                ids[group] = [0] * first + [page.blocks[place] for page in pages]
        return ids

    def lent(self, s: Sequence) -> list[list[int]]:
        """Per group, the blocks of the sequence's full pages, for another pool to have copies of;
        0 where nobody who goes on after them needs one. Empty lists if one is not there that would
        be needed."""
        ids: list[list[int]] = [[] for _ in range(self.num_groups)]
        full = s.computed // self.block_size
        for table in s.tables:
            first = self._first_column(table.kind, full)
            pages = [page for page in table.pages[first:full] if page]
            if len(pages) < full - first:  # fallen out of the window since
                return [[] for _ in range(self.num_groups)]
            for place, group in enumerate(table.kind.groups):
                ids[group] = [0] * first + [page.blocks[place] for page in pages]
        return ids

    def grow(self, s: Sequence, upto: int) -> list[list[int]] | None:
        """Extend every table to hold the first `upto` tokens: the blocks added, per group.

        None, and nothing taken, when there are not enough.
        """
        columns = -(-upto // self.block_size)
        missing = 0
        for table in s.tables:
            if len(table.pages) < columns:
                missing += table.kind.size * (columns - len(table.pages))
        if missing > len(self._free) + self._idle_blocks:
            return None
        added: list[list[int]] = [[] for _ in range(self.num_groups)]
        for table in s.tables:
            kind = table.kind
            new = [self._take(kind) for _ in range(columns - len(table.pages))]
            if new:
                table.pages += new
                by_group = zip(*[page.blocks for page in new], strict=True)
                for group, blocks in zip(kind.groups, by_group, strict=True):
                    added[group] += blocks
        return added

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start a sequence's tables with all that another one's hold.

        The child's first `computed` tokens are the parent's.
        """
        child.tables = []
        for table in parent.tables:
            for page in table.pages[table.trimmed :]:
                assert page is not None
                page.refs += 1
            child.tables.append(Table(table.kind, table.pages.copy(), table.trimmed))
        child.computed = parent.computed
        child.keys = parent.keys.copy()
        child.registered = parent.registered
        child.promised = 0

    def unshare(self, s: Sequence) -> list[tuple[int, int]] | None:
        """Give the sequence a page of its own for its next token, where it shares that page.

        The blocks to copy, as (from, to). None, and nothing taken, when there are not enough.
        """
        column, used = divmod(s.computed, self.block_size)
        if not used:
            return []  # a new page, which nobody shares
        shared = []
        for table in s.tables:
            page = table.pages[column]
            assert page is not None
            if page.refs > 1:
                shared.append((table, page))
        if sum(table.kind.size for table, _ in shared) > self.available:
            return None
        copies: list[tuple[int, int]] = []
        for table, page in shared:
            own = table.pages[column] = self._take(table.kind)
            page.refs -= 1
            copies += zip(page.blocks, own.blocks, strict=True)
        return copies

    def trim(self, s: Sequence) -> bool:
        """Free the windowed pages that no query from position `computed` on will see.

        False if some must stay until they are confirmed and can be offered for reuse: a long
        chunk's early pages leave the window before its result is back.
        """
        done = True
        for table in s.tables:
            if table.kind.window is None:
                continue
            dead = (s.computed - table.kind.window + 1) // self.block_size
            if self.enable_prefix_caching and dead > s.registered:
                dead, done = s.registered, False
            if dead > table.trimmed:
                self._drop(table.pages[table.trimmed : dead])
                table.pages[table.trimmed : dead] = [None] * (dead - table.trimmed)
                table.trimmed = dead
        return done

    def register(self, s: Sequence, confirmed: int) -> None:
        """Offer the full pages among the first `confirmed` computed tokens for reuse."""
        full = confirmed // self.block_size
        if full <= s.registered or not self.enable_prefix_caching:
            return
        keys = self._keys(s, full)
        for table in s.tables:
            found, pages = table.kind.found, table.pages
            for column in range(s.registered, full):
                key, page = keys[column], pages[column]
                if page and key not in found:
                    found[key] = page
                    page.key = key
        if s.registered < s.promised:
            self._settle(s, full)
        s.registered = full

    def release(self, s: Sequence, *, forget: bool = False) -> None:
        """Give all of a sequence's pages back, the last first, so that prefixes outlive suffixes.

        `forget` makes those it alone held unfindable: a failed sequence's content is not trusted.
        """
        self._settle(s, s.promised)
        # By column rather than by kind: a hit needs a column of every kind.
        columns = zip_longest(*(table.pages for table in s.tables))
        pages = [page for column in columns for page in column if page]
        if forget:
            for page in pages:
                if page.refs == 1:
                    self._forget(page)
        pages.reverse()
        self._drop(pages)
        s.tables = []
        s.computed = s.registered = s.promised = 0

    def awaited(self, s: Sequence) -> Sequence | None:
        """The running sequence that is about to compute the next page `s` could reuse, if any."""
        if not self._coming or not self._may_reuse(s):
            return None
        # The widest kind, since that is the one which keeps pages from the start on.
        found = max(self._kinds, key=self._span).found
        for key in self._reusable(s):
            if key not in found:
                return self._coming.get(key)
        return None

    # --- finding --------------------------------------------------------------------------

    def _may_reuse(self, s: Sequence) -> bool:
        return self.enable_prefix_caching and s.request.reuse_prefix

    def _reusable(self, s: Sequence) -> list[bytes]:
        """Keys of the leading pages that could be reused: one token must be left to compute."""
        columns = (len(s.tokens) - 1) // self.block_size
        return self._keys(s, columns)[:columns]

    def _match(self, s: Sequence) -> int:
        """The most leading columns whose pages are all there, as far back as the windows reach."""
        if not self._may_reuse(s):
            return 0
        keys = self._reusable(s)
        hit = len(keys)
        for kind in self._kinds:
            if kind.window is None:
                hit = next((c for c in range(hit) if keys[c] not in kind.found), hit)
        while hit:
            gaps = [
                column
                for kind in self._kinds
                if kind.window is not None
                for column in range(self._first_column(kind, hit), hit)
                if keys[column] not in kind.found
            ]
            if not gaps:
                break
            hit = max(gaps)  # a query after anything longer would see the gap
        return hit

    def _first_column(self, kind: Kind, hit: int) -> int:
        """The first column that a query after `hit` columns sees."""
        if kind.window is None:
            return 0
        return max(0, hit * self.block_size - kind.window + 1) // self.block_size

    def _cost(self, s: Sequence, hit: int, given: int) -> int:
        """How many available blocks it takes to admit a sequence with that hit, and `given` columns
        (at least the hit's) that are filled from elsewhere."""
        columns = -(-len(s.tokens) // self.block_size)
        cost = 0
        for kind in self._kinds:
            first = self._first_column(kind, given)
            new = max(0, min(columns, self._span(kind)) - max(0, hit - first))
            revived = sum(not kind.found[key].refs for key in s.keys[first:hit])
            cost += kind.size * (new + revived)
        return cost

    def _keys(self, s: Sequence, columns: int) -> list[bytes]:
        """The sequence's content keys, at least the first `columns`."""
        keys, size = s.keys, self.block_size
        for start in range(len(keys) * size, columns * size, size):
            parent = keys[-1] if keys else _root(s.request.cache_salt, s.request.adapter)
            keys.append(blake2b(parent + self._pack(*s.tokens[start : start + size])).digest())
        return keys

    def _settle(self, s: Sequence, columns: int) -> None:
        """Nobody need wait for the sequence's first `columns` pages any more."""
        for key in s.keys[s.registered : min(columns, s.promised)]:
            if self._coming.get(key) is s:
                del self._coming[key]

    # --- single pages -----------------------------------------------------------------------

    def _take(self, kind: Kind) -> Page:
        free, size = self._free, kind.size
        while len(free) < size:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._idle_blocks -= page.kind.size
            free += page.blocks
        page = Page(kind, free[-size:])
        del free[-size:]
        return page

    def _hold(self, page: Page) -> None:
        if not page.refs:
            del self._idle[page]
            self._idle_blocks -= page.kind.size
        page.refs += 1

    def _drop(self, pages: Iterable[Page | None]) -> None:
        for page in pages:
            assert page is not None
            page.refs -= 1
            if not page.refs:
                if page.key is None:
                    self._free += page.blocks
                else:
                    self._idle[page] = None
                    self._idle_blocks += page.kind.size

    def _forget(self, page: Page) -> None:
        if page.key is not None:
            del page.kind.found[page.key]
            page.key = None


def _root(salt: str, adapter: int) -> bytes:
    """What keys begin from: no two adapters, nor versions of one, have a page in common."""
    return blake2b(salt.encode(), person=adapter.to_bytes(16, "little")).digest()
