"""Gemma 3 270M on a GPU says greedily what the CPU path says, real weights and all.

The model is the demo's package, or the GGUF file that TENSORRAY_GEMMA_GGUF names. The CPU path's
tokens are the recorded ones, to which test_gemma_golden.py holds it. The residual stream reaches
104,000, which float16 can't hold: under float16 it is float32, and so are the norms.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.equality import MARGIN, DType, assert_same_tokens

from tensorray.actors.device import find_device
from tensorray.cluster.llm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "gemma3_270m_golden.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def model() -> str:
    if named := os.environ.get("TENSORRAY_GEMMA_GGUF"):
        return named
    demo = pytest.importorskip("tensorray.cluster.demo")
    try:
        return str(demo.model_path())
    except demo.UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_greedy_tokens_are_those_of_the_cpu(model: str, dtype: DType, graphs: bool) -> None:
    """All prompts at once, of 2 to 597 tokens; each answer is told, right or wrong."""
    records = GOLDEN["records"]
    with LLM(
        model,
        device="cuda",
        dtype=dtype,
        max_model_len=1024,
        num_kv_blocks=2048,
        enforce_eager=not graphs,
    ) as llm:
        outputs = llm.generate(
            [record["prompt_token_ids"] for record in records],
            SamplingParams(temperature=0.0, max_tokens=GOLDEN["max_tokens"]),
        )
    wrong, whole = [], 0
    for record, output in zip(records, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        whole += tokens == record["token_ids"]
        try:
            assert_same_tokens(tokens, record["token_ids"], record["margins"], dtype)
        except AssertionError as error:
            wrong.append(f"{record['prompt'][:30]!r}: {error}")
    print(f"{dtype}: {whole} of {len(records)} answers equal to the last token")
    print(f"{len(wrong)} part where the choice was clear (margin at least {MARGIN[dtype]})")
    assert not wrong, "\n".join(wrong)
