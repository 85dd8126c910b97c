"""Plans: one segment compiled by TensorRT, and the key a plan is stored under.

A plan depends on the segment, the dtypes, the profiles and the target, and on nothing else: not
on the layer, the rank or the checkpoint. `plan_key` is a digest of just these, so equal work is
done once, wherever it is met.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from tensorray.builder.graph import ROWS, DTypes, Segment, Shape, Spec, trace_segment
from tensorray.builder.quantized_segment import Product, products, quantized_segment
from tensorray.builder.tensorrt_flavour import (
    Flavour,
    NeedsKernels,
    ShapeRange,
    Target,
    TensorRTError,
    TimingCache,
)
from tensorray.builder.tensorrt_ops import LOWERING, TensorRTOps

#: Row counts that decode steps are padded to; each has a captured graph and a profile of its own.
DECODE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Profile:
    """Row counts a plan is made for: any from `smallest` to `largest`, tuned at `best`."""

    smallest: int
    best: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ValueError(f"rows must rise from 1: {self}")


@dataclass(frozen=True)
class ProfileSet:
    """The profiles of one plan, in order of rows and apart from each other."""

    profiles: tuple[Profile, ...]

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("a plan needs a profile")
        for below, above in zip(self.profiles, self.profiles[1:], strict=False):
            if below.largest >= above.smallest:
                raise ValueError(f"profiles overlap or are out of order: {below}, {above}")

    @property
    def max_rows(self) -> int:
        return self.profiles[-1].largest

    def pick(self, rows: int) -> tuple[int, int]:
        """The profile that serves a number of rows, and the number it has to be padded to.

        Rows between two profiles go up to the next one's smallest.
        """
        if rows < 1 or rows > self.max_rows:
            raise ValueError(f"{rows} rows; the plan serves 1 to {self.max_rows}")
        for index, profile in enumerate(self.profiles):
            if rows <= profile.largest:
                return index, max(rows, profile.smallest)
        raise AssertionError("max_rows is the last profile's")


def decode_profiles(max_rows: int = DECODE_BUCKETS[-1]) -> tuple[Profile, ...]:
    """A fixed shape a decode bucket, up to the bucket that holds `max_rows`.

    TensorRT tunes for a profile's best shape, and most for one that is its only shape.
    """
    below = [bucket for bucket in DECODE_BUCKETS if bucket < max_rows]
    return tuple(Profile(bucket, bucket, bucket) for bucket in (*below, max_rows))


def prefill_profiles(first: int, max_rows: int) -> tuple[Profile, ...]:
    """Ranges from `first` rows on, each ending at a power of two or at `max_rows`.

    Tuned at the end, as chunked prefill fills its steps.
    """
    profiles = []
    while first <= max_rows:
        last = min(1 << first.bit_length(), max_rows)
        profiles.append(Profile(first, last, last))
        first = last + 1
    return tuple(profiles)


def default_profiles(target: Target, *, max_decode: int = 256, max_rows: int = 8192) -> ProfileSet:
    """Profiles for steps of up to `max_rows` rows, of which decode has up to `max_decode`.

    Where kernels are timed at build, each decode bucket and each doubling of a prefill has its
    own. Where they are made when a plan is loaded, for the shapes it then meets, one range each
    does, and keeps plans small.
    """
    max_decode = min(max_decode, max_rows)
    if target.gpu is not None:
        return ProfileSet(decode_profiles(max_decode) + prefill_profiles(max_decode + 1, max_rows))
    ranges = [Profile(1, min(16, max_decode), max_decode)]
    if max_rows > max_decode:
        best = max(max_decode + 1, max_rows // 4)
        ranges.append(Profile(max_decode + 1, best, max_rows))
    return ProfileSet(tuple(ranges))


@dataclass(frozen=True)
class Binding:
    """A tensor that a plan reads or writes, by TensorRT's name for it."""

    name: str
    shape: Shape  # ROWS where the number of rows goes
    dtype: str

    def at(self, rows: int) -> Shape:
        """Its shape with the number of rows filled in."""
        return tuple(rows if size == ROWS else size for size in self.shape)


@dataclass(frozen=True)
class Plan:
    """A compiled segment. Bindings come in the segment's order."""

    key: str
    segment: str  # its digest
    dtypes: DTypes
    profiles: ProfileSet
    target: Target
    inputs: tuple[Binding, ...]
    weights: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    seconds: float  # what building took
    data: bytes


def plan_key(segment: Segment, *, dtypes: DTypes, profiles: ProfileSet, target: Target) -> str:
    """The digest (SHA-256, hexadecimal) of everything a plan depends on. Needs no TensorRT."""
    parts = {
        "segment": segment.digest(),
        "lowering": LOWERING,
        "dtypes": asdict(dtypes),
        "profiles": asdict(profiles),
        "target": asdict(target),
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def build_plan(
    segment: Segment,
    *,
    dtypes: DTypes,
    profiles: ProfileSet,
    target: Target,
    flavour: Flavour,
    timing_cache: TimingCache | None = None,
) -> Plan:
    """Compile a segment.

    `target` comes from `flavour.target(architecture)`. Raises TargetError for a dtype the target
    lacks, TensorRTError naming the op and TensorRT's own message for a segment it rejects, and
    NeedsKernels for one with quantized weights of a kind that it has no product for.
    `timing_cache` is read and brought up to date.
    """
    for dtype in (dtypes.compute, dtypes.residual):
        flavour.check_dtype(dtype, target)
    if (target.flavour, target.version) != (flavour.name, flavour.version):
        raise ValueError(f"a target of {target.flavour} {target.version} for another flavour")
    started = time.perf_counter()
    for product in products(segment):
        lack = what_lacks(flavour, target, dtypes.compute, product)
        if lack:
            raise NeedsKernels(
                f"{flavour.name} {flavour.version} can't multiply by {product}: {lack}"
            )
    inputs = _bindings("x", segment.inputs, dtypes)
    weights = _bindings("w", segment.weights, dtypes)
    outputs = _bindings("y", segment.output_specs, dtypes)
    data = _compile(
        segment, (inputs, weights, outputs), dtypes, profiles, target, flavour, timing_cache
    )
    return Plan(
        key=plan_key(segment, dtypes=dtypes, profiles=profiles, target=target),
        segment=segment.digest(),
        dtypes=dtypes,
        profiles=profiles,
        target=target,
        inputs=inputs,
        weights=weights,
        outputs=outputs,
        seconds=time.perf_counter() - started,
        data=data,
    )


@cache
def what_lacks(flavour: Flavour, target: Target, dtype: str, product: Product) -> str:
    """Why TensorRT can't multiply by weights of a kind, in its own words; "" if it can.

    Found out by building a small network.
    """
    form, compute = product.example(), DTypes(dtype, dtype)
    x, weight = Spec((ROWS, form.shape[1]), "compute"), Spec(form.shape, "compute")
    linear = trace_segment(lambda op, x, w: op.linear(x, w), [x], [weight])
    segment = quantized_segment(linear, [form])
    groups = (("x", segment.inputs), ("w", segment.weights), ("y", segment.output_specs))
    bindings = tuple(_bindings(prefix, specs, compute) for prefix, specs in groups)
    try:
        _compile(segment, bindings, compute, ProfileSet((Profile(1, 8, 16),)), target, flavour)
    except TensorRTError as error:
        return str(error)
    return ""


def _compile(
    segment: Segment,
    bindings: tuple[tuple[Binding, ...], ...],  # of inputs, weights and outputs
    dtypes: DTypes,
    profiles: ProfileSet,
    target: Target,
    flavour: Flavour,
    timing_cache: TimingCache | None = None,
) -> bytes:
    inputs, weights, outputs = bindings
    with flavour.lock:
        flavour.messages.take()
        network = flavour.create_network()
        ops = TensorRTOps(flavour, network, dtypes)
        arguments = [
            [ops.input(binding.name, spec) for binding, spec in zip(some, specs, strict=True)]
            for some, specs in ((inputs, segment.inputs), (weights, segment.weights))
        ]
        for binding, value in zip(outputs, segment.run(ops, *arguments), strict=True):
            ops.output(binding.name, value)
        try:
            return flavour.compile(network, target, _shapes(inputs, profiles), timing_cache)
        except TensorRTError as error:
            names = " ".join(node.op for node in segment.nodes)
            raise TensorRTError(f"segment [{names}]: {error}") from None


def _bindings(prefix: str, specs: Sequence[Spec], dtypes: DTypes) -> tuple[Binding, ...]:
    return tuple(
        Binding(f"{prefix}{index}", spec.shape, dtypes.of(spec.dtype))
        for index, spec in enumerate(specs)
    )


def _shapes(inputs: Sequence[Binding], profiles: ProfileSet) -> list[dict[str, ShapeRange]]:
    return [
        {
            binding.name: (
                binding.at(profile.smallest),
                binding.at(profile.best),
                binding.at(profile.largest),
            )
            for binding in inputs
        }
        for profile in profiles.profiles
    ]
