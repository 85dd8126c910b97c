"""GPU shards over small checkpoints, on NumPy arrays: what CI can run of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensorray.actors.adapter import AdapterSource
from tensorray.actors.array_segment import ArraySegment, Runner
from tensorray.actors.device_adapters import DeviceAdapters
from tensorray.actors.device_draft_model import DeviceDraftModel
from tensorray.actors.device_drafts import DeviceDrafts
from tensorray.actors.gpu_shard import GpuShard, GraphSizes, Limits
from tensorray.actors.kv_cache import plan_stage
from tensorray.actors.protocol import KVGroups, SegmentInfo, StepPlan, StepResult
from tensorray.builder.graph import DTypes, Segment, trace
from tensorray.builder.joining import join
from tensorray.builder.load import plan_bytes
from tensorray.builder.model import Layout

from .host_device import HostDevice
from .running import load


class ArrayRunners:
    """Every segment op by op."""

    rejected: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.rows: set[int] = set()
        self._runners: dict[Segment, Runner] = {}

    def get(self, segment: Segment, rows: int) -> Runner:
        self.rows.add(rows)
        return self._runners.setdefault(segment, ArraySegment(segment, np))

    def prepare(self, body_rows: Sequence[int], head_rows: Sequence[int]) -> None:
        pass

    def report(self) -> list[SegmentInfo]:
        return []


class StepwiseShard(GpuShard):
    """A shard whose steps are waited for one by one."""

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan)()


def make_gpu_shard(
    path: Path,
    *,
    num_blocks: int = 512,
    block_size: int = 4,
    limits: Limits | None = None,
    graphs: GraphSizes | None = None,
    device: HostDevice | None = None,
    runners: ArrayRunners | None = None,
    kv_dtype: Any = None,
    kind: type[StepwiseShard] = StepwiseShard,
    vocabulary: Any = None,
    processors: Any = None,
    layout: Layout | None = None,
    adapters: int = 0,
    drafts: DeviceDrafts | None = None,
) -> StepwiseShard:
    model, weights = load(path, layout)
    groups, layers = plan_stage(model, block_size)
    limits = limits or Limits(max_model_len=64, max_num_seqs=16, step_tokens=64)
    device = device or HostDevice()
    held = None
    if adapters:
        held = DeviceAdapters(
            device,
            model,
            weights,
            layers,
            dtype=np.float32,
            source=AdapterSource(),
            max_rank=16,
            slots=adapters,
        )

    def choose_blocks(free: int) -> int:
        device.offered = free
        return num_blocks

    return kind(
        device,
        model,
        join(trace(model, layers)),
        weights,
        runners or ArrayRunners(),
        groups,
        DTypes("float32", "float32"),
        limits,
        graphs
        or GraphSizes.choose(
            limits, (), False, 0 if drafts is None else drafts.most(limits.max_num_seqs)
        ),
        choose_blocks=choose_blocks,
        kv_dtype=kv_dtype,
        weight_bytes=plan_bytes(model, layers=layers),
        vocabulary=vocabulary,
        processors=processors,
        adapters=held,
        drafts=drafts,
    )


def make_draft_model(
    path: Path, large: Path, limits: Limits, block_size: int = 4
) -> DeviceDraftModel:
    """A small checkpoint as the draft model of another."""
    model, weights = load(path)
    groups, _ = plan_stage(load(large)[0], block_size)
    return DeviceDraftModel(
        HostDevice(),
        model,
        join(trace(model, range(model.num_layers))),
        weights,
        ArrayRunners(),
        KVGroups(groups.windows, 0, block_size),
        DTypes("float32", "float32"),
        kv_dtype=np.float32,
        max_model_len=limits.max_model_len,
        step_tokens=limits.step_tokens,
    )
