"""Rules, users' processors and CUDA processors on a GPU, against the sampler on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorray.actors import device as devices
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.logits_processors import CudaLogitsProcessor
from tensorray.actors.protocol import ProcessorCall, Sampling, SequenceStart
from tensorray.actors.sampler import Sampler

pytestmark = pytest.mark.gpu
DEVICE = devices.find_device()
if DEVICE is None:
    pytest.skip("no NVIDIA GPU, or no CuPy", allow_module_level=True)

VOCAB = 1000
PUNISH = """
#include "common.cuh"
extern "C" __global__ void punish(
    float* logits, int vocab, const int* tokens, int prompt, int length, const float* arguments) {
  const int token = blockIdx.x * blockDim.x + threadIdx.x;
  if (token >= vocab) return;
  for (int i = prompt; i < length; ++i)
    if (tokens[i] == token) logits[token] -= arguments[0];
}
"""


class Punish(CudaLogitsProcessor):
    kernel = "punish"
    parameters = ("by",)


class PunishHere:
    """The same on the host."""

    def __init__(self, by: float) -> None:
        self._by = by

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> None:
        for token in output:
            logits[token] -= np.float32(self._by)


class Halve:
    """Queues on the device what it does."""

    on_device = True

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> Any:
        return logits * 0.5


class Spoil:
    on_device = True

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> None:
        logits[3] = float("nan")


def calls(name: str, **arguments: Any) -> list[ProcessorCall]:
    return [ProcessorCall(name, arguments)]


def start(seq: int, sampling: Sampling) -> SequenceStart:
    return SequenceStart(
        seq=seq, tokens=[5, 6], prompt_len=2, computed=0, blocks=[], sampling=sampling
    )


SAMPLINGS = [
    Sampling(temperature=0.0, bad_words=[[3, 4], [5, 6, 7]], no_repeat_ngram_size=1),
    Sampling(temperature=0.0, forced_prefix=[7, 7, 9], repetition_penalty=1.3),
    Sampling(temperature=0.0, logits_processors=calls("Punish", by=100.0)),
    Sampling(temperature=0.0, logits_processors=calls("Halve"), no_repeat_ngram_size=2),
    Sampling(temperature=0.0),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_device_steers_as_the_host_does(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "punish.cu").write_text(PUNISH)
    monkeypatch.setattr(Punish, "source", tmp_path / "punish.cu", raising=False)
    count = len(SAMPLINGS)
    rng = np.random.default_rng(0)
    # The same best tokens again and again, far apart, so that every rule matters.
    steps = np.repeat(rng.permuted(np.arange(VOCAB), axis=0)[None, None], count, axis=1)
    steps = np.repeat(steps / 8.0, 12, axis=0).astype(np.float32)
    host = Sampler(VOCAB, None, {"Punish": PunishHere, "Halve": Halve})
    with DEVICE.current():
        device = DeviceSampler(DEVICE, VOCAB, count, None, None, {"Punish": Punish, "Halve": Halve})
        for seq, sampling in enumerate(SAMPLINGS):
            host.start(start(seq, sampling))
            device.start(start(seq, sampling), seq)
        seqs = list(range(count))
        rows = DEVICE.xp.arange(count, dtype=np.int32)
        under_way, found, expected = [], [], []
        for logits in steps:
            typed = logits.astype(dtype)
            expected.append(host.sample(seqs, typed.astype(np.float32)))
            under_way.append(device.enqueue(seqs, rows, DEVICE.xp.asarray(typed)))
            if len(under_way) == 2:
                found.append(device.collect(under_way.pop(0)))
        found.append(device.collect(under_way.pop()))
    if dtype is np.float32:  # elsewhere many logits are equal, and ties may go either way
        assert [tokens for tokens, _, _ in found] == [tokens for tokens, _, _ in expected]
    assert not any(failed for _, _, failed in found)
    assert [tokens[1] for tokens, _, _ in found[:3]] == [7, 7, 9]
    for place in (0, 2):
        assert len({tokens[place] for tokens, _, _ in found}) == len(found)


def test_what_a_processor_spoils_on_the_device_ends_its_sequence() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (2, VOCAB)).astype(np.float32)
    with DEVICE.current():
        device = DeviceSampler(DEVICE, VOCAB, 2, None, None, {"Spoil": Spoil})
        device.start(start(0, Sampling(logits_processors=calls("Spoil"))), 0)
        device.start(start(1, Sampling(temperature=0.0)), 1)
        rows = DEVICE.xp.arange(2, dtype=np.int32)
        pending = device.enqueue([0, 1], rows, DEVICE.xp.asarray(logits))
        tokens, _, failed = device.collect(pending)
    assert tokens[1] == logits[1].argmax()
    assert "Spoil" in failed[0]
