"""Kernels against plain definitions in float64: the NumPy twins and each instruction set."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorray import kernels
from tensorray.kernels import activation, attention, linear, moe, native, norm, rope
from tensorray.kernels import threads as threads_module

Floats = NDArray[np.float32]

WAYS = ("numpy", *(native.library.instruction_sets() if native.native_available() else ()))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test the NumPy way and with each instruction set of this machine."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "library", None)
        yield request.param
        return
    before = native.library.instruction_set()
    native.library.use_instruction_set(request.param)
    yield request.param
    native.library.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    kernels.set_num_threads(1)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def test_the_native_kernels_are_compiled_and_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name != "posix":
        pytest.skip("the C kernels need GCC or Clang")
    assert kernels.native_available(), "the C extension was not compiled: see setup.py"

    def unused(*arguments: object, **named: object) -> None:
        raise AssertionError("the NumPy twin ran")

    for module in (activation, attention, linear, norm, rope):
        for name in [name for name in vars(module) if name.endswith("_numpy")]:
            monkeypatch.setattr(module, name, unused)
    rng = np.random.default_rng(0)
    x, heads = normal(rng, 3, 16), normal(rng, 3, 2, 8)
    pages, ones = normal(rng, 2, 2, 4, 8), np.array([0, 3], np.int32)
    linear.linear(x, normal(rng, 5, 16))
    norm.rms_norm(x, x[0], 1e-6)
    for function in (activation.silu, activation.gelu_tanh):
        function(x)
    activation.softcap(x, 30.0)
    rope.rope(heads, heads, normal(rng, 4, 8), np.arange(3))
    attention.append_kv(heads, heads, pages, pages, np.arange(3))
    attention.paged_attention(heads, pages, pages, ones, ones[1:], np.array([[1]]), scale=1.0)


# --- linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 15, 16, 17, 64, 100, 640])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 13, 16, 32, 33, 96, 97])
def test_linear(way: str, rows: int, inner: int) -> None:
    rng = np.random.default_rng(rows * 1000 + inner)
    for out in (1, 3, 4, 7, 8, 13, 150):
        x, weight, bias = normal(rng, rows, inner), normal(rng, out, inner), normal(rng, out)
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        np.testing.assert_allclose(linear.linear(x, weight), exact, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            linear.linear(x, weight, bias), exact + bias, rtol=1e-4, atol=1e-4
        )


def test_linear_reads_strided_rows(way: str) -> None:
    rng = np.random.default_rng(1)
    wide, weight = normal(rng, 6, 100), normal(rng, 9, 40)
    view = wide[:, 30:70]
    np.testing.assert_allclose(linear.linear(view, weight), view @ weight.T, rtol=1e-4, atol=1e-4)


def test_linear_rows_do_not_depend_on_their_batch(way: str) -> None:
    if way == "numpy":
        pytest.skip("BLAS chooses its order of addition by shape")
    rng = np.random.default_rng(2)
    x, weight = normal(rng, 70, 333), normal(rng, 1003, 333)
    alone = np.concatenate([linear.linear(x[i : i + 1], weight) for i in range(len(x))])
    for rows in (2, 3, 5, 8, 16, 31, 32, 33, 70):
        assert np.array_equal(linear.linear(x[:rows], weight), alone[:rows]), rows


@pytest.mark.skipif(not native.native_available(), reason="native kernels only")
def test_linear_refuses_what_does_not_fit() -> None:
    x, weight, y = np.zeros((2, 8), np.float32), np.zeros((4, 8), np.float32), np.zeros((2, 4))
    with pytest.raises(ValueError, match="last axis"):
        linear.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="bias"):
        linear.linear(x, weight, np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="type 'f'"):
        native.library.linear(x, weight, None, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another shape"):
        native.library.linear(x, weight, None, np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.usefixtures("threads")
def test_products_of_many_rows_are_shared_among_threads(way: str, count: int) -> None:
    kernels.set_num_threads(count)
    rng = np.random.default_rng(15)
    x, weight, bias = normal(rng, 130, 256), normal(rng, 1003, 256), normal(rng, 1003)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    np.testing.assert_allclose(linear.linear(x, weight, bias), exact, rtol=1e-4, atol=1e-4)
    wide = linear.linear(x.astype(np.float64), weight, bias)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("threads")
def test_an_error_on_another_thread_is_raised_here() -> None:
    kernels.set_num_threads(3)
    here = threading.get_ident()
    started = threading.Barrier(3)

    def work() -> None:
        started.wait(60)
        if threading.get_ident() != here:
            raise ArithmeticError("on a helper")

    with pytest.raises(ArithmeticError, match="on a helper"):
        threads_module.on_all_threads(work)


# --- elementwise, norms, rope -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1, 16), (3, 100), (2, 3, 31), (64, 2048)])
def test_norms(way: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x, weight, bias = normal(rng, *shape) * 100, normal(rng, shape[-1]), normal(rng, shape[-1])
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(norm.rms_norm(x, weight, 1e-6), exact, rtol=1e-5, atol=1e-6)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        norm.layer_norm(x, weight, bias, 1e-5), exact * weight + bias, rtol=1e-4, atol=1e-4
    )


def test_rms_norm_survives_large_activations(way: str) -> None:
    x = np.full((1, 640), 104_000, np.float32)  # what Gemma 3 270M's residual stream reaches
    np.testing.assert_allclose(norm.rms_norm(x, np.ones(640, np.float32), 1e-6), 1.0, rtol=1e-6)


def assert_near(got: Floats, want: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (4, 33), (3, 5, 16), (64, 2048)])
def test_activations(way: str, shape: tuple[int, ...]) -> None:
    x = normal(np.random.default_rng(4), *shape) * 8
    wide = x.astype(np.float64)
    assert_near(activation.silu(x), wide / (1 + np.exp(-wide)))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    assert_near(activation.gelu_tanh(x), 0.5 * wide * (1 + np.tanh(inner)))
    assert_near(activation.softcap(x, 5.0), 5 * np.tanh(wide / 5))


@pytest.mark.filterwarnings("error")
def test_activations_at_the_extremes(way: str) -> None:
    x = np.array([-3e38, -1e20, -1e4, -100, -1e-30, 0, 1e-30, 100, 1e4, 1e20, 3e38], np.float32)
    for y in (activation.silu(x), activation.gelu_tanh(x)):
        np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-30)
    np.testing.assert_allclose(activation.softcap(x, 30.0), 30 * np.tanh(x / 30), atol=1e-5)


def test_nan_stays_nan(way: str) -> None:
    x = np.zeros((2, 20), np.float32)
    x[1, 7] = np.nan
    for y in (activation.silu(x), activation.gelu_tanh(x), activation.softcap(x, 30.0)):
        assert np.isnan(y).sum() == 1
    assert np.isnan(norm.rms_norm(x, x[0], 1e-6)).all(axis=1).tolist() == [False, True]
    assert np.isnan(linear.linear(x, np.ones((3, 20), np.float32))).all(axis=1)[1]


def test_kernels_take_slices_of_a_wider_product(way: str) -> None:
    rng = np.random.default_rng(5)
    wide = normal(rng, 6, 90)
    gate, heads = wide[:, 20:61], wide[:, 10:74].reshape(6, 4, 16)
    weight = normal(rng, 16)
    assert np.array_equal(activation.silu(gate), activation.silu(gate.copy()))
    assert np.array_equal(
        norm.rms_norm(heads, weight, 1e-6), norm.rms_norm(heads.copy(), weight, 1e-6)
    )


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (64, 64), (80, 32), (256, 256)])
def test_rope(way: str, head_dim: int, rotary_dim: int) -> None:
    rng = np.random.default_rng(6)
    wide = normal(rng, 5, 6 * head_dim)
    q, k = wide[:, : 4 * head_dim].reshape(5, 4, -1), wide[:, 4 * head_dim :].reshape(5, 2, -1)
    angles = rng.uniform(0, 6, (50, rotary_dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    positions = np.array([3, 0, 49, 7, 7], np.int32)
    before = wide.copy()
    for x, y in zip((q, k), rope.rope(q, k, table, positions), strict=True):
        half = rotary_dim // 2
        pairs = x[..., :half] + 1j * x[..., half:rotary_dim].astype(np.complex128)
        turned = pairs * np.exp(1j * angles[positions])[:, None, :]
        exact = np.concatenate([turned.real, turned.imag, x[..., rotary_dim:]], axis=-1)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    assert np.array_equal(wide, before)


# --- paged attention --------------------------------------------------------------------------


def exact_attention(
    q: Floats,
    keys: list[Floats],
    values: list[Floats],
    starts: list[int],
    scale: float,
    window: int | None,
    cap: float | None,
) -> NDArray[np.float64]:
    """One query and head at a time, over keys and values of each sequence laid out plainly."""
    out = np.empty(q.shape)
    heads = q.shape[1]
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        length, kv_heads = k.shape[:2]
        for row in range(starts[s], starts[s + 1]):
            position = length - (starts[s + 1] - row)
            low = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                shared = head * kv_heads // heads
                seen = slice(low, position + 1)
                scores = k[seen, shared].astype(np.float64) @ q[row, head] * scale
                if cap:
                    scores = cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v[seen, shared] / weights.sum()
    return out


class Scene:
    """Sequences in a paged cache whose unused slots are poison."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, block_size: int, seed: int
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.lengths, self.block_size = lengths, block_size
        widths = [-(-length // block_size) for length in lengths]
        blocks = 1 + sum(widths)
        self.k_pages = np.full((blocks, kv_heads, block_size, head_dim), np.nan, np.float32)
        self.v_pages = self.k_pages.copy()
        ids = 1 + self.rng.permutation(blocks - 1)
        self.table = np.zeros((len(lengths), max(widths) + 1), np.int32)
        for s, width in enumerate(widths):
            self.table[s, :width], ids = ids[:width], ids[width:]
        self.keys = [normal(self.rng, n, kv_heads, head_dim) for n in lengths]
        self.values = [normal(self.rng, n, kv_heads, head_dim) for n in lengths]
        for s, length in enumerate(lengths):
            self.append(s, 0, length)

    def slots(self, s: int, begin: int, end: int) -> NDArray[np.int64]:
        at = np.arange(begin, end)
        blocks = self.table[s, at // self.block_size].astype(np.int64)
        slots: NDArray[np.int64] = blocks * self.block_size + at % self.block_size
        return slots

    def append(self, s: int, begin: int, end: int) -> None:
        attention.append_kv(
            self.keys[s][begin:end],
            self.values[s][begin:end],
            self.k_pages,
            self.v_pages,
            self.slots(s, begin, end),
        )

    def forget_before(self, s: int, position: int) -> None:
        """Poison what no query at `position` or later may read."""
        for pages in (self.k_pages, self.v_pages):
            slots = self.slots(s, 0, max(0, position))
            pages[slots // self.block_size, :, slots % self.block_size] = np.nan


@st.composite
def attention_cases(draw: st.DrawFn) -> dict[str, object]:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    sequences = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), max_size=6))
    return {
        "queries": [n for n, _ in sequences] or [1],
        "cached": [n for _, n in sequences] or [0],
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 4, 7])),
        "head_dim": draw(st.sampled_from([4, 16, 24, 64, 256])),
        "block_size": draw(st.sampled_from([1, 3, 16, 128])),
        "window": draw(st.sampled_from([None, 1, 5, 16, 64, 100])),
        "cap": draw(st.sampled_from([None, 2.0, 50.0])),
        "seed": draw(st.integers(0, 1000)),
    }


def check_attention(case: dict) -> None:  # type: ignore[type-arg]
    lengths = [n + cached for n, cached in zip(case["queries"], case["cached"], strict=True)]
    scene = Scene(lengths, case["kv_heads"], case["head_dim"], case["block_size"], case["seed"])
    starts = [0, *np.cumsum(case["queries"]).tolist()]
    window, cap = case["window"], case["cap"]
    if window is not None:
        for s, cached in enumerate(case["cached"]):
            scene.forget_before(s, cached - window + 1)
    q = normal(scene.rng, starts[-1], case["heads"], case["head_dim"])
    scale = case["head_dim"] ** -0.5
    got = attention.paged_attention(
        q,
        scene.k_pages,
        scene.v_pages,
        np.array(starts, np.int32),
        np.array(lengths, np.int32),
        scene.table,
        scale=scale,
        window=window,
        softcap=cap,
    )
    want = exact_attention(q, scene.keys, scene.values, starts, scale, window, cap)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=25, deadline=None)
@given(case=attention_cases())
def test_attention_of_any_mix(name: str, case: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if name == "numpy":
            patch.setattr(native, "library", None)
            check_attention(case)
            return
        before = native.library.instruction_set()
        native.library.use_instruction_set(name)
        try:
            check_attention(case)
        finally:
            native.library.use_instruction_set(before)


def test_attention_of_a_chunk_equals_one_query_at_a_time(way: str) -> None:
    if way == "numpy":
        pytest.skip("BLAS chooses its order of addition by shape")
    scene = Scene([150], kv_heads=1, head_dim=64, block_size=16, seed=8)
    q = normal(scene.rng, 100, 4, 64)
    for window in (None, 20, 70):

        def attend(first: int, last: int, window: int | None = window) -> Floats:
            out: Floats = attention.paged_attention(
                q[first:last],
                scene.k_pages,
                scene.v_pages,
                np.array([0, last - first]),
                np.array([50 + last]),
                scene.table,
                scale=0.125,
                window=window,
            )
            return out

        whole = attend(0, 100)
        for cut in (1, 7, 33):
            pieces = [attend(i, min(i + cut, 100)) for i in range(0, 100, cut)]
            assert np.array_equal(np.concatenate(pieces), whole), (window, cut)


def test_append_skips_negative_slots(way: str) -> None:
    rng = np.random.default_rng(9)
    k_pages, v_pages = np.zeros((2, 3, 2, 4, 8), np.float32)
    k, v = normal(rng, 4, 2, 8), normal(rng, 4, 2, 8)
    attention.append_kv(k, v, k_pages, v_pages, np.array([5, -1, 11, -1], np.int64))
    for pages, rows in ((k_pages, k), (v_pages, v)):
        assert np.array_equal(pages[1, :, 1], rows[0])
        assert np.array_equal(pages[2, :, 3], rows[2])
        assert np.count_nonzero(pages) == 2 * rows[0].size


@pytest.mark.skipif(not native.native_available(), reason="native kernels only")
def test_nothing_outside_the_arrays_is_touched() -> None:
    pages = np.zeros((2, 1, 4, 8), np.float32)
    token = np.zeros((1, 1, 8), np.float32)
    for slot in (8, -2):
        with pytest.raises(ValueError, match="slot"):
            attention.append_kv(token, token, pages, pages, np.array([slot]))
    with pytest.raises(ValueError, match="position"):
        rope.rope(token, token, np.zeros((4, 8), np.float32), np.array([4]))
    for table, length, message in (([[2]], 3, "block"), ([[-1]], 3, "block"), ([[1]], 5, "fit")):
        with pytest.raises(ValueError, match=message):
            attention.paged_attention(
                token, pages, pages, np.array([0, 1]), np.array([length]), np.array(table), scale=1
            )


# --- mixture of experts -----------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
def test_route(renormalize: bool) -> None:
    logits = np.array([[0.0, 3.0, 1.0, 3.0], [900.0, -900.0, 0.0, 899.0]], np.float32)
    weights, ids = moe.route(logits, 2, renormalize)
    assert ids.tolist() == [[1, 3], [0, 3]]
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    exact = np.take_along_axis(shares, ids, 1)
    if renormalize:
        exact /= exact.sum(1, keepdims=True)
    np.testing.assert_allclose(weights, exact, rtol=1e-6)
    assert weights.dtype == np.float32


def test_experts(way: str) -> None:
    rng = np.random.default_rng(10)
    x, gate_up, down = normal(rng, 9, 16), normal(rng, 5, 24, 16), normal(rng, 5, 16, 12)
    weights, ids = moe.route(normal(rng, 9, 5), 2, True)
    exact = np.zeros((9, 16))
    for row in range(9):
        for weight, expert in zip(weights[row], ids[row], strict=True):
            gate, up = np.split(gate_up[expert].astype(np.float64) @ x[row], 2)
            exact[row] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    got = moe.experts(x, weights, ids, gate_up, down)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


def test_experts_of_one_rank_of_several(way: str) -> None:
    rng = np.random.default_rng(13)
    x, gate_up, down = normal(rng, 9, 16), normal(rng, 6, 24, 16), normal(rng, 6, 16, 12)
    weights, ids = moe.route(normal(rng, 9, 6), 2, True)

    def part(first: int, end: int) -> Floats:
        own = slice(first, end)
        result: Floats = moe.experts(x, weights, ids, gate_up[own], down[own], first)
        return result

    whole = moe.experts(x, weights, ids, gate_up, down)
    assert np.array_equal(part(0, 6), whole)
    np.testing.assert_allclose(part(0, 3) + part(3, 6), whole, rtol=1e-4, atol=1e-4)
    weights, ids = moe.route(normal(rng, 9, 3), 2, True)  # all of the first half
    assert np.array_equal(part(0, 3), moe.experts(x, weights, ids, gate_up, down))
    assert not part(3, 6).any()
    ids += 3  # all of the second
    assert np.array_equal(part(3, 6), moe.experts(x, weights, ids, gate_up, down))
    assert not part(0, 3).any()


# --- threads ----------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(not native.native_available(), reason="native kernels only")


@needs_native
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    rng = np.random.default_rng(11)
    x, weight = normal(rng, 5, 512), normal(rng, 4099, 512)
    kernels.set_num_threads(1)
    want = linear.linear(x, weight)
    for count in (2, 3, 8):
        kernels.set_num_threads(count)
        assert native.library.get_num_threads() == count
        for _ in range(20):
            assert np.array_equal(linear.linear(x, weight), want)


@needs_native
@pytest.mark.usefixtures("threads")
def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(12)
    weight = normal(rng, 2048, 256)
    xs = [normal(rng, 3, 256) for _ in range(4)]
    want = [linear.linear(x, weight) for x in xs]
    kernels.set_num_threads(3)
    wrong: list[int] = []

    def call(index: int) -> None:
        results = (linear.linear(xs[index], weight) for _ in range(50))
        wrong.extend(index for y in results if not np.array_equal(y, want[index]))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@needs_native
@pytest.mark.usefixtures("threads")
def test_idle_threads_take_no_time() -> None:
    rng = np.random.default_rng(13)
    kernels.set_num_threads(4)
    linear.linear(normal(rng, 4, 512), normal(rng, 4096, 512))
    deadline = time.monotonic() + 60

    def used() -> float:
        before = time.process_time()
        time.sleep(0.5)
        return time.process_time() - before

    # Three threads that spin would take up to 1.5 s, for ever; others of this process may do
    # something for a while.
    while used() > 0.1:
        assert time.monotonic() < deadline, "idle threads spin"


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_a_forked_child_computes_too() -> None:
    rng = np.random.default_rng(14)
    x, weight = normal(rng, 4, 512), normal(rng, 4096, 512)
    kernels.set_num_threads(2)
    want = linear.linear(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(linear.linear(x, weight), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_thread_counts_below_one_are_refused(way: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        kernels.set_num_threads(0)
