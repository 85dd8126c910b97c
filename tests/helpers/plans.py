"""Plan requests, and plans of nonsense for them, for tests of everything but compiling."""

from __future__ import annotations

import hashlib

from tensorray.builder.build import PlanRequest
from tensorray.builder.graph import ROWS, DTypes, Spec, trace_segment
from tensorray.builder.plan import Binding, Plan, Profile, ProfileSet
from tensorray.builder.tensorrt_flavour import Target

TARGET = Target("tensorrt_rtx", "1.7", "sm_89", None, (("flags", 0),))


def request(size: int = 8, target: Target = TARGET) -> PlanRequest:
    """A request for an activation of some width; another width is another key."""
    segment = trace_segment(lambda op, x: op.silu(x), [Spec((ROWS, size), "compute")])
    profiles = ProfileSet((Profile(1, 4, 16),))
    return PlanRequest(f"silu {size}", segment, DTypes(), profiles, target)


def nonsense(request: PlanRequest) -> Plan:
    """A plan in all but its bytes, which are some that text handling would damage."""
    return Plan(
        key=request.key,
        segment=request.segment.digest(),
        dtypes=request.dtypes,
        profiles=request.profiles,
        target=request.target,
        inputs=(Binding("x0", request.segment.inputs[0].shape, "bfloat16"),),
        weights=(),
        outputs=(Binding("y0", request.segment.inputs[0].shape, "bfloat16"),),
        seconds=0.25,
        data=b"\r\n\n\x00\xff" + hashlib.sha256(request.key.encode()).digest() * 50,
    )
