"""Where a shard gets its plans: from the store, or built at start if that is asked for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from tensorray.builder.build import Compile, NamedSegment, PlanRequest, compile_plan, plan_for
from tensorray.builder.graph import DTypes
from tensorray.builder.plan import Plan, ProfileSet, default_profiles
from tensorray.builder.store import PlanStore, StoreError
from tensorray.builder.targets import local_target
from tensorray.builder.tensorrt_flavour import (
    Flavour,
    Target,
    TargetError,
    TensorRTError,
    installed,
    load_flavour,
    local_gpu,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanSource:
    """Plans for one target, compiled in some dtypes."""

    flavour: Flavour
    target: Target
    dtypes: DTypes
    store: PlanStore
    #: What to look for, by the numbers of rows it serves, best first; the last is what is built.
    profiles: tuple[ProfileSet, ...]
    build: bool = False
    compile: Compile = compile_plan

    def find(self, each: NamedSegment) -> Plan | None:
        """A segment's plan; None where there is none, and none is to be built or can be."""
        requests = [
            PlanRequest(each.name, each.segment, self.dtypes, profiles, self.target)
            for profiles in self.profiles
        ]
        try:
            for request in requests:
                if (plan := self.store.get(request.key)) is not None:
                    return plan
        except StoreError as error:
            logger.warning("%s", error)
        return self._build(requests[-1]) if self.build else None

    def _build(self, request: PlanRequest) -> Plan | None:
        logger.info("building a plan: %s", request)
        began = time.perf_counter()
        try:
            plan = plan_for(request, self.store, self.compile)
        except (TensorRTError, TargetError) as error:
            logger.warning("no plan for %s: %s", request, error)
            return None
        logger.info("built in %.1f s: %s", time.perf_counter() - began, request)
        return plan


def open_source(
    dtypes: DTypes,
    store: PlanStore,
    *,
    max_decode: int,
    max_rows: int,
    build: bool = False,
) -> PlanSource:
    """Plans for this machine's GPU by the TensorRT that is installed.

    Looks for plans made for `max_decode` and `max_rows` (see `default_profiles`), then for those
    that `tensorray build` makes by default. Raises TargetError saying what is missing.
    """
    gpu = local_gpu()
    if gpu is None:
        raise TargetError("there is no GPU to run plans on")
    problems = []
    for name in installed():
        try:
            flavour = load_flavour(name)
            target = local_target(flavour, gpu, store)
            for dtype in (dtypes.compute, dtypes.residual):
                flavour.check_dtype(dtype, target)
        except (TargetError, TensorRTError) as error:
            problems.append(str(error))
            continue
        own = default_profiles(target, max_decode=max_decode, max_rows=max_rows)
        profiles = tuple(dict.fromkeys((own, default_profiles(target))))
        return PlanSource(flavour, target, dtypes, store, profiles, build)
    raise TargetError("; ".join(problems) or "TensorRT is not installed: pip install tensorrt")
