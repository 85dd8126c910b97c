"""This machine's target, remembered: asking TensorRT for it starts its builder, which takes seconds
and which a shard whose plans are stored has no other use for."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import msgspec

from tensorray.builder import tensorrt_flavour
from tensorray.builder.store import PlanStore, StoreError
from tensorray.builder.tensorrt_flavour import GPU, Flavour, Target

logger = logging.getLogger(__name__)


def local_target(flavour: Flavour, gpu: GPU, store: PlanStore) -> Target:
    """`flavour.target` of this machine's GPU, from the store if it was asked for before.

    Its settings follow from the flavour's version and from what `tensorrt_flavour` asks of it, so
    both are part of the name it is stored under. Raises TargetError as `flavour.target` does.
    """
    source = hashlib.sha256(Path(tensorrt_flavour.__file__).read_bytes()).hexdigest()
    parts = [flavour.name, flavour.version, gpu.architecture, gpu.name, source]
    name = f"targets/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
    try:
        stored = store.read(name)
        if stored is not None:
            return msgspec.json.decode(stored, type=Target)
    except (StoreError, msgspec.DecodeError) as error:
        logger.warning("%s: %s; asking TensorRT", store.locate(name), error)
    target = flavour.target(gpu.architecture)
    try:
        store.write(name, msgspec.json.encode(target))
    except StoreError as error:
        logger.warning("%s", error)
    return target
