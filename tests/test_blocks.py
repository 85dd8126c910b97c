"""The block manager by itself: what a sequence holds, what is found again, what is evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.actors.protocol import KVGroups, Sampling
from tensorray.cluster.blocks import BlockManager
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.sequence import Sequence

SIZE = 4


def manager(
    windows: list[int | None], num_blocks: int = 100, *, caching: bool = True
) -> BlockManager:
    return BlockManager(KVGroups(windows, num_blocks, SIZE), enable_prefix_caching=caching)


def sequence(tokens: list[int], *, salt: str = "", reuse: bool = True) -> Sequence:
    request = GenerationRequest("r", tokens, Sampling(), 100, cache_salt=salt, reuse_prefix=reuse)
    return Sequence(0, request, Sampling())


def compute(blocks: BlockManager, s: Sequence, upto: int | None = None) -> None:
    """Run all (or `upto`) of a sequence's known tokens in one step, and confirm it."""
    s.computed = len(s.tokens) if upto is None else upto
    assert blocks.grow(s, s.computed) is not None
    blocks.register(s, s.computed)


def leave_behind(blocks: BlockManager, tokens: list[int], salt: str = "") -> None:
    """Compute a sequence and end it."""
    s = sequence(tokens, salt=salt)
    assert blocks.admit(s, 0)
    compute(blocks, s)
    blocks.release(s)


def hit(blocks: BlockManager, tokens: list[int], **options: object) -> int:
    """How many tokens a sequence would find, leaving everything as it was."""
    s = sequence(tokens, **options)  # type: ignore[arg-type]
    assert blocks.admit(s, 0)
    found = s.computed
    blocks.release(s)
    return found


def ids(blocks: BlockManager, s: Sequence) -> list[list[int]]:
    return blocks.block_tables(s)


# --- how much ------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    windows=st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=4),
    length=st.integers(1, 60),
    size=st.integers(1, 6),
)
def test_blocks_needed_is_exactly_what_one_sequence_comes_to_hold(
    windows: list[int | None], length: int, size: int
) -> None:
    blocks = BlockManager(KVGroups(windows, 1000, size))
    s = sequence([0])
    assert blocks.admit(s, 0)
    most = 0
    for position in range(length):
        s.computed = position
        blocks.register(s, position)
        blocks.trim(s)
        blocks.grow(s, position + 1)
        s.tokens.append(position)
        most = max(most, blocks.held(s))
    assert blocks.blocks_needed(length) == most


@pytest.mark.parametrize("windows", [[None], [None, 9], [9], [None, None, 30]])
@pytest.mark.parametrize("num_blocks", [2, 3, 4, 7, 20])
def test_longest_is_the_last_length_that_fits(windows: list[int | None], num_blocks: int) -> None:
    blocks = manager(windows, num_blocks)
    lengths = [n for n in range(1, 201) if blocks.blocks_needed(n) <= num_blocks - 1]
    assert blocks.longest(200) == max(lengths, default=0)


def test_admission_takes_what_all_known_tokens_need_and_leaves_the_reserve() -> None:
    blocks = manager([None, None], num_blocks=1 + 8)
    s = sequence(list(range(13)))  # four columns of two blocks
    assert not blocks.admit(s, reserve=1)
    assert blocks.available == 8
    assert blocks.shortfall(s, reserve=1) == 1
    assert blocks.admit(s, reserve=0)
    assert blocks.available == 0
    assert len({block for table in ids(blocks, s) for block in table}) == 8
    assert blocks.grow(s, 16) == [[], []]  # its last page holds three more
    assert blocks.grow(s, 17) is None
    assert blocks.held(s) == 8


def test_a_sequence_just_admitted_has_tables_to_show() -> None:
    blocks = manager([None, 6, 6])
    s = sequence(list(range(5)))
    assert blocks.admit(s, 0)
    full, *windowed = ids(blocks, s)
    assert len(full) == 2
    assert windowed == [[], []]  # a windowed group takes blocks chunk by chunk


def test_a_window_frees_a_page_once_no_later_query_sees_it() -> None:
    blocks = manager([None, 6], num_blocks=100)
    s = sequence(list(range(20)))
    assert blocks.admit(s, 0)
    compute(blocks, s, upto=9)  # the query at 9 sees 4..9
    blocks.trim(s)
    full, windowed = ids(blocks, s)
    assert len(full) == 5
    assert windowed[0] == 0
    assert windowed[1] != 0
    compute(blocks, s, upto=12)  # the query at 12 sees 7..12
    blocks.trim(s)
    assert ids(blocks, s)[1][1] != 0
    compute(blocks, s, upto=13)
    blocks.trim(s)
    assert ids(blocks, s)[1][:2] == [0, 0]
    assert ids(blocks, s)[1][2:4] == windowed[2:] + ids(blocks, s)[1][3:4]


def test_a_page_out_of_the_window_stays_until_it_is_confirmed() -> None:
    blocks = manager([4], num_blocks=100)
    s = sequence(list(range(40)))
    assert blocks.admit(s, 0)
    blocks.grow(s, 40)
    s.computed = 40  # planned; the result is not back
    assert not blocks.trim(s)
    assert blocks.held(s) == 10
    blocks.register(s, 40)
    assert blocks.trim(s)
    assert blocks.held(s) == 1
    assert hit(blocks, [*range(20), 99]) == 20  # what fell out can still be found


# --- reuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (list(range(16)), 12),  # all there, but one token must be computed
        (list(range(17)), 16),
        (list(range(12)), 8),
        ([*range(9), 99, 98, 97, 96], 8),
        ([99, *range(1, 16)], 0),
        ([*range(4, 16), 99], 0),  # the same pages, but not from the start
        (list(range(3)), 0),
    ],
)
def test_full_pages_of_equal_prefixes_are_found(prompt: list[int], expected: int) -> None:
    blocks = manager([None])
    leave_behind(blocks, list(range(16)))
    assert hit(blocks, prompt) == expected


def test_only_a_full_page_is_found() -> None:
    blocks = manager([None])
    leave_behind(blocks, list(range(15)))
    assert hit(blocks, list(range(20))) == 12


def test_a_salt_keeps_prefixes_apart() -> None:
    blocks = manager([None])
    leave_behind(blocks, list(range(16)), salt="a")
    assert hit(blocks, list(range(16)), salt="b") == 0
    assert hit(blocks, list(range(16))) == 0
    assert hit(blocks, list(range(16)), salt="a") == 12


def test_reuse_can_be_declined_or_switched_off() -> None:
    blocks = manager([None])
    leave_behind(blocks, list(range(16)))
    assert hit(blocks, list(range(16)), reuse=False) == 0
    blocks = manager([None], caching=False)
    leave_behind(blocks, list(range(16)))
    assert blocks.cached == 0
    assert hit(blocks, list(range(16))) == 0


def test_running_sequences_share_pages() -> None:
    blocks = manager([None, 8], num_blocks=100)
    first, second = sequence(list(range(16))), sequence([*range(12), 50, 51])
    assert blocks.admit(first, 0)
    compute(blocks, first)
    assert blocks.admit(second, 0)
    assert second.computed == 12
    assert ids(blocks, first)[0][:3] == ids(blocks, second)[0][:3]
    # The query at 12 sees 5..12: the windowed group needs columns 1 and 2 only.
    assert ids(blocks, second)[1] == [0, *ids(blocks, first)[1][1:3]]
    blocks.release(first)
    assert blocks.available == 99 - 6
    blocks.release(second)
    assert blocks.available == 99


def test_a_hit_needs_the_last_window_and_no_more() -> None:
    blocks = manager([None, 6])
    s = sequence(list(range(24)))
    assert blocks.admit(s, 0)
    compute(blocks, s)
    windowed = s.tables[1].pages
    blocks.release(s)

    def without(column: int) -> int:
        page = windowed[column]
        assert page is not None
        key = page.key
        assert key is not None
        del page.kind.found[key]
        found = hit(blocks, [*range(24), 99])
        page.kind.found[key] = page
        return found

    # A query at 24 sees 19..24, one at 20 sees 15..20, one at 16 sees 11..16.
    assert hit(blocks, [*range(24), 99]) == 24
    assert without(5) == 20
    assert without(4) == 16
    assert without(3) == 24
    assert without(0) == 24


def test_a_model_of_windows_only_reuses_the_last_window() -> None:
    blocks = manager([6])
    leave_behind(blocks, list(range(24)))
    s = sequence([*range(24), 99])
    assert blocks.admit(s, 0)
    assert s.computed == 24
    assert [block > 0 for block in ids(blocks, s)[0]] == [False] * 4 + [True] * 2


def test_equal_pages_computed_twice_are_kept_once() -> None:
    blocks = manager([None])
    twins = [sequence(list(range(8))), sequence(list(range(8)))]
    for s in twins:
        assert blocks.admit(s, 0)
    for s in twins:
        compute(blocks, s)
    for s in twins:
        blocks.release(s)
    assert blocks.cached == 2
    assert blocks.available == blocks.total


# --- eviction ------------------------------------------------------------------------------


def test_cached_pages_go_only_when_memory_is_needed_and_suffixes_first() -> None:
    blocks = manager([None], num_blocks=1 + 8)
    leave_behind(blocks, list(range(16)))  # four pages
    other = sequence([77] * 16)
    assert blocks.admit(other, 0)  # the four others
    assert blocks.cached == 4
    assert blocks.grow(other, 17) is not None
    assert blocks.cached == 3
    blocks.release(other)
    assert hit(blocks, [*range(16), 99]) == 12  # the prefix outlived the suffix


def test_the_least_recently_used_goes_first() -> None:
    blocks = manager([None], num_blocks=1 + 4)
    leave_behind(blocks, [1] * 4)
    leave_behind(blocks, [2] * 4)
    assert hit(blocks, [1] * 5) == 4  # makes it the more recent one
    s = sequence([3] * 12)
    assert blocks.admit(s, 0)
    blocks.release(s)
    assert hit(blocks, [2] * 5) == 0
    assert hit(blocks, [1] * 5) == 4


def test_what_is_reused_is_not_evicted_for_the_same_sequence() -> None:
    blocks = manager([None], num_blocks=1 + 4)
    leave_behind(blocks, [1] * 8)
    s = sequence([1] * 8 + [2] * 8)
    assert blocks.admit(s, 0)
    assert s.computed == 8
    assert blocks.available == 0
    assert len(set(ids(blocks, s)[0])) == 4


def test_a_hit_counts_against_what_is_left() -> None:
    """Cached pages are available; reviving them uses them up."""
    blocks = manager([None], num_blocks=1 + 4)
    leave_behind(blocks, [1] * 12)
    s = sequence([1] * 13)
    assert not blocks.admit(s, reserve=1)
    assert blocks.admit(s, reserve=0)


def test_pages_of_several_groups_are_evicted_together() -> None:
    blocks = manager([None, None, None], num_blocks=1 + 6)
    leave_behind(blocks, [1] * 8)
    assert blocks.cached == 6
    assert hit(blocks, [2]) == 0
    assert blocks.cached == 3
    assert hit(blocks, [1] * 5) == 4


def test_a_failed_sequence_leaves_nothing_to_be_found_but_what_others_use() -> None:
    blocks = manager([None])
    good, failed = sequence([1] * 5), sequence([1] * 4 + [2] * 5)
    assert blocks.admit(good, 0)
    compute(blocks, good)
    assert blocks.admit(failed, 0)
    compute(blocks, failed)
    blocks.release(failed, forget=True)
    assert blocks.available == blocks.total - 2
    assert hit(blocks, [1] * 4 + [2] * 5) == 4


# --- prefixes on their way -------------------------------------------------------------------


def test_a_page_about_to_be_computed_is_announced_until_it_is_there() -> None:
    blocks = manager([None])
    first, second = sequence(list(range(12))), sequence(list(range(12)))
    assert blocks.awaited(second) is None
    assert blocks.admit(first, 0)
    assert blocks.awaited(second) is first
    compute(blocks, first, upto=4)
    assert blocks.awaited(second) is first
    compute(blocks, first, upto=12)
    assert blocks.awaited(second) is None  # it can reuse two pages and must compute the last
    assert blocks.awaited(sequence(list(range(50, 70)))) is None
    assert blocks.awaited(sequence(list(range(12)), reuse=False)) is None


def test_an_announcement_ends_with_its_sequence() -> None:
    blocks = manager([None])
    first = sequence(list(range(12)))
    assert blocks.admit(first, 0)
    blocks.release(first)
    assert blocks.awaited(sequence(list(range(12)))) is None


@settings(max_examples=30, deadline=None)
@given(
    windows=st.sampled_from([[None], [None, 6], [3, None], [5], [None, 1, 9]]),
    prompt=st.integers(1, 14),
    caching=st.booleans(),
    steps=st.lists(
        # Whom each beam prolongs, of those there are, and the token it takes.
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5),
        min_size=1,
        max_size=14,
    ),
)
def test_beams_write_to_no_page_that_another_holds(
    windows: list[int | None], prompt: int, caching: bool, steps: list[list[tuple[int, int]]]
) -> None:
    """Forks and writes in any order: blocks hold what their beams' tokens are, none is lost, and
    there are never more of them than were reckoned with."""
    blocks = manager(windows, 400, caching=caching)
    content: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> tokens up to it
    width = max(map(len, steps))
    most = blocks.blocks_needed_by_beams(prompt, prompt + len(steps), width)

    def write(s: Sequence) -> None:
        for position in range(s.computed, len(s.tokens)):
            for table in blocks.block_tables(s):
                block = table[position // SIZE]
                content[block, position % SIZE] = tuple(s.tokens[: position + 1])
        s.computed = len(s.tokens)
        blocks.register(s, s.computed)

    leader = sequence(list(range(100, 100 + prompt)))
    assert blocks.admit(leader, 0)
    assert blocks.grow(leader, prompt) is not None
    write(leader)
    beams = [leader]
    for step in steps:
        heirs = []
        for parent, token in step:
            child = sequence(beams[parent % len(beams)].tokens)
            blocks.fork(beams[parent % len(beams)], child)
            child.tokens.append(token)
            heirs.append(child)
        for s in beams:
            blocks.release(s)
        for s in heirs:
            blocks.trim(s)
            assert blocks.grow(s, len(s.tokens)) is not None
            copies = blocks.unshare(s)
            assert copies is not None
            for source, target in copies:
                for offset in range(SIZE):
                    content.pop((target, offset), None)
                    if (source, offset) in content:
                        content[target, offset] = content[source, offset]
            column = s.computed // SIZE
            own = [table[column] for table in blocks.block_tables(s)]
            others = [t[column:] for o in heirs if o is not s for t in blocks.block_tables(o)]
            assert not {*own} & {block for table in others for block in table}
        for s in heirs:
            write(s)
        for s in heirs:
            for window, table in zip(windows, blocks.block_tables(s), strict=True):
                first = 0 if window is None else max(0, len(s.tokens) - window)
                for position in range(first, len(s.tokens)):
                    held = content[table[position // SIZE], position % SIZE]
                    assert held == tuple(s.tokens[: position + 1])
        assert blocks.total - blocks.available <= most
        beams = heirs
    for s in beams:
        blocks.release(s)
    assert blocks.available == blocks.total
