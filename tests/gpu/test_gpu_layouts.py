"""Two GPUs: sums over peers' memory, and layouts that choose one GPU's tokens."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import gpu_ranks, odd_tokens
from helpers.equality import assert_same_tokens
from helpers.gpu_ranks import on_gpus
from helpers.tiny_models import directory

from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.kernels.cuda.all_reduce import most_bytes

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def gpus() -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpus() < 2, reason="needs two GPUs that CuPy can use"),
]

SMALL: dict[str, Any] = {"num_kv_blocks": 512, "block_size": 16, "max_num_batched_tokens": 64}
SMALL |= {"max_num_seqs": 8, "max_model_len": 64, "device": "cuda", "dtype": "float32"}
DTYPES = (np.float16, np.float32, np.int32)
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP2 = TP2 | {"enable_expert_parallel": True}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sums_over_peers_memory(dtype: str) -> None:
    """Sizes from one pack of 16 bytes up, in turn, so that turns and shares all change."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    sizes = [16 // kind.itemsize * n for n in (1, 7, 64, 513, 5000, 1, 40000, 3, 100000)] * 5
    sizes.append(most_bytes(2) // kind.itemsize)
    parts = [[rng.standard_normal(n).astype(kind) for n in sizes] for _ in range(2)]

    ours, theirs = on_gpus(2, gpu_ranks.sums, parts)
    for a, b, x, y in zip(ours, theirs, *parts, strict=True):
        assert a.tobytes() == b.tobytes()
        expected = (x.astype(np.float32) + y.astype(np.float32)).astype(kind)
        assert a.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        *(("float16", "float32"), ("float16", "float16")),
        *(("bfloat16", "bfloat16"), ("float32", "float32")),
    ],
)
def test_sums_that_are_added_and_normed(dtype: str, stream: str) -> None:
    """Rows of one warp to those of the most threads, and as many as there are blocks: what the two
    kernels give, one after the other, to the rounding of the norm, whose sum has another order."""
    kind, wide = (np.dtype(getattr(ml_dtypes, name, name)) for name in (dtype, stream))
    rng = np.random.default_rng(0)
    columns = (16 // kind.itemsize, 640, 4096, 16384 // kind.itemsize)
    shapes = [(rows, n) for n in columns for rows in (1, 3, 16)] + [(128, 512), (1, 4096)]
    cases = [
        {
            "x": rng.standard_normal(shape).astype(wide),
            "deltas": [rng.standard_normal(shape).astype(kind) for _ in range(2)],
            "weight": rng.standard_normal(shape[1]).astype(kind),
            "delta_weight": rng.standard_normal(shape[1]).astype(kind) if i % 3 == 0 else None,
        }
        for i, shape in enumerate(shapes)
    ]
    ours, theirs = on_gpus(2, gpu_ranks.normed_sums, cases)
    step = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}[dtype]
    for (a, expected), (b, _) in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()
        np.testing.assert_allclose(
            a.astype(np.float64), expected.astype(np.float64), rtol=2 * step, atol=step
        )


def test_what_nccl_does() -> None:
    for ours, theirs, dtype in zip(*on_gpus(2, gpu_ranks.collectives), DTYPES, strict=True):
        x = np.arange(1000, dtype=dtype) % 100
        for rank, found in enumerate((ours, theirs)):
            gathered, both, total, sent, told = found
            assert (gathered == np.stack([x, x + 1])).all()
            assert (both == 2 * (x + rank)).all()
            assert (total == 2 * x + 1).all()
            assert (sent == x).all()
            assert (told == np.arange(10) + 5).all()


def test_a_group_that_is_aborted_waits_no_more() -> None:
    assert on_gpus(2, gpu_ranks.unanswered) == [4096.0, 4096.0]


def like_one_gpu(
    name: str, layout: dict[str, Any], params: list[SamplingParams], **settings: Any
) -> None:
    """What a layout answers to some prompts, to near-ties, is what one GPU does."""
    prompts = [[(7 * i + j) % 80 + 3 for j in range(3 + 4 * (i % 6))] for i in range(len(params))]
    found = []
    for changes in ({}, layout):
        with LLM(str(directory(name)), **SMALL, **settings, **changes) as llm:
            found.append(llm.generate(prompts, params))
    for whole, split in zip(*found, strict=True):
        (one,), (many,) = whole.outputs, split.outputs
        assert one.logprobs is not None
        margins = [entry.top[0].logprob - entry.top[1].logprob for entry in one.logprobs]
        assert_same_tokens(many.token_ids, one.token_ids, margins)
        for entry, other in zip(
            whole.prompt_logprobs or [], split.prompt_logprobs or [], strict=True
        ):
            assert (entry and entry.token_id) == (other and other.token_id)
            assert (entry and entry.logprob) == pytest.approx(other and other.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama3", TP2), ("llama3", PP2), ("gemma3", TP2), ("gemma3", PP2), ("mixtral", EP2)],
    ids=str,
)
def test_a_layout_chooses_the_tokens_of_one_gpu(name: str, layout: Any) -> None:
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=4 + i,
            logprobs=2,
            prompt_logprobs=1 if i % 3 == 0 else None,
            ignore_eos=True,
        )
        for i in range(12)
    ]
    like_one_gpu(name, layout, params)


@pytest.mark.parametrize("layout", [TP2, PP2], ids=str)
def test_a_layout_steers_as_one_gpu_does(layout: Any) -> None:
    """What steers a sequence has to see its last token, or its logits, before the next choice,
    while a pipeline has planned the steps that follow."""
    steered: list[dict[str, Any]] = [
        {"structured_outputs": StructuredOutputs(regex="[a-z]{24}")},
        {"logits_processors": [{"name": "Odd"}]},
        {"bad_words": [[5, 6], [7]]},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {},
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=16 + i, logprobs=2, **steered[i % len(steered)])
        for i in range(12)
    ]
    like_one_gpu("qwen3", layout, params, logits_processors=[f"{odd_tokens.__file__}:Odd"])
