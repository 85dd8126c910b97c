"""What launches count by: an array of its own for each purpose, device and stream."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tensorray.kernels.cuda import scratch


def test_each_purpose_device_and_stream_has_its_own_counters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = SimpleNamespace(device=0, stream=0)
    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=here.stream))
    runtime = SimpleNamespace(getDevice=lambda: here.device)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, **vars(stream)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(scratch, "_counters", {})
    monkeypatch.setattr(scratch, "lasting_zeros", np.zeros)
    found = {}
    for _ in range(2):
        for here.device in range(2):
            for here.stream in range(2):
                for purpose, count in (("decode", 8), ("prefill", 2)):
                    array = scratch.counters(purpose, count)
                    assert array.shape == (count,)
                    assert array.dtype == np.uint32
                    where = purpose, here.device, here.stream
                    assert found.setdefault(where, array) is array
    assert len({id(array) for array in found.values()}) == len(found) == 8
