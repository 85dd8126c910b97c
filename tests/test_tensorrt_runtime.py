"""What engines and contexts tell TensorRT, by a stand-in that keeps it; a GPU is not needed."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tensorray.builder.graph import ROWS, DTypes
from tensorray.builder.plan import Binding, Plan, Profile, ProfileSet
from tensorray.builder.tensorrt_flavour import Flavour, Target, TensorRTError
from tensorray.builder.tensorrt_runtime import Engine, Scratch

STREAM = 7
SCRATCH = Scratch(address=1024, size=4096)
PLAN = Plan(
    key="0123456789abcdef",
    segment="",
    dtypes=DTypes(),
    profiles=ProfileSet((Profile(1, 1, 1), Profile(8, 8, 8), Profile(9, 64, 64))),
    target=Target("tensorrt", "10.9", "sm_90", "NVIDIA H200", ()),
    inputs=(Binding("x0", (ROWS, 64), "bfloat16"), Binding("x1", (ROWS, 4, 16), "bfloat16")),
    weights=(Binding("w0", (64, 64), "bfloat16"),),
    outputs=(Binding("y0", (ROWS, 64), "bfloat16"),),
    seconds=1.0,
    data=b"plan",
)


class StandIn:
    """Flavour, engine and context in one; refuses what `refuses` names."""

    num_io_tensors = 4

    def __init__(self, names: str = "x0 x1 w0 y0") -> None:
        self.names = names.split()
        self.told: list[tuple[Any, ...]] = []
        self.refuses = ""
        self.messages = self

    def take(self) -> str:
        return "TensorRT's reason"

    def load(self, data: bytes) -> StandIn:
        assert data == PLAN.data
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def scratch_bytes(self, engine: StandIn) -> int:
        return 4096

    def create_context(self, engine: StandIn) -> StandIn | None:
        return None if self.refuses == "context" else self

    def set_scratch(self, context: StandIn, address: int, size: int) -> None:
        self.told.append(("scratch", address, size))

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return self._tell("profile", index, stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._tell("shape", name, shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self._tell("address", name, address)

    def execute_async_v3(self, stream: int) -> bool:
        return self._tell("execute", stream)

    def _tell(self, *words: Any) -> bool:
        self.told.append(words)
        return words[0] != self.refuses


def engine(stand_in: StandIn) -> Engine:
    return Engine(PLAN, cast(Flavour, stand_in))


def test_a_context_takes_the_profile_that_serves_its_rows() -> None:
    trt = StandIn()
    context = engine(trt).context(5, SCRATCH, STREAM)
    assert context.rows == 8
    assert trt.told == [
        ("scratch", 1024, 4096),
        ("profile", 1, STREAM),
        ("shape", "x0", (8, 64)),
        ("shape", "x1", (8, 4, 16)),
    ]
    assert engine(trt).context(33, SCRATCH, STREAM).rows == 33


def test_enqueue_binds_by_name_and_runs() -> None:
    trt = StandIn()
    context = engine(trt).context(1, SCRATCH, STREAM)
    trt.told.clear()
    context.enqueue([256, 512], [768], [1024], STREAM)
    assert trt.told == [
        ("address", "x0", 256),
        ("address", "x1", 512),
        ("address", "w0", 768),
        ("address", "y0", 1024),
        ("execute", STREAM),
    ]
    with pytest.raises(ValueError, match="zip"):
        context.enqueue([256], [768], [1024], STREAM)


def test_rows_stay_in_the_profile() -> None:
    context = engine(StandIn()).context(10, SCRATCH, STREAM)
    context.set_rows(64)
    assert context.rows == 64
    for rows in (8, 65):
        with pytest.raises(ValueError, match=f"{rows} rows; the context's profile is"):
            context.set_rows(rows)


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("context", "making a context"),
        ("profile", "choosing profile 0"),
        ("shape", "setting x0 to 1 rows"),
        ("address", "binding x0"),
        ("execute", "running"),
    ],
)
def test_what_tensorrt_refuses_is_named(refuses: str, message: str) -> None:
    trt = StandIn()
    trt.refuses = refuses
    with pytest.raises(TensorRTError, match=f"{message}, plan 0123456789ab: TensorRT's reason"):
        engine(trt).context(1, SCRATCH, STREAM).enqueue([256, 512], [768], [1024], STREAM)


def test_scratch_that_does_not_do() -> None:
    with pytest.raises(ValueError, match="100 bytes of scratch; needs 4096"):
        engine(StandIn()).context(1, Scratch(1024, 100), STREAM)
    with pytest.raises(ValueError, match="aligned to 256"):
        engine(StandIn()).context(1, Scratch(1000, 4096), STREAM)


def test_a_plan_of_other_tensors_is_refused() -> None:
    with pytest.raises(TensorRTError, match="plan 0123456789ab has tensors"):
        engine(StandIn("x0 x1 w0 other"))
