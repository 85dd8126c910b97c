"""What was found out about a plan on a device: whether it is right, and where it is the faster.

Kept beside the plans, under a name that is a digest of all the findings depend on: the plan's own
bytes, the GPU, its driver, and the kernels it was compared with. Whatever of these changes, what
was found before is not found again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field

import msgspec

from tensorray.builder.plan import Plan
from tensorray.builder.store import PlanStore, StoreError

logger = logging.getLogger(__name__)

#: Version of the format; a record of another is made again.
SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """A plan with one number of rows. The backend that is to run it, and what was measured."""

    backend: str
    error: float  # the plan's, relative
    microseconds: dict[str, float]  # of a run, by backend; empty if none was timed


@dataclass
class TrialRecord:
    """All trials of one plan on one kind of device."""

    plan: str  # its key
    wrong: str = ""  # why it must not serve, if so
    trials: dict[int, Trial] = field(default_factory=dict)  # by number of rows
    schema: int = SCHEMA


def record_name(plan: Plan, circumstances: str) -> str:
    """Where a plan's record is in a store; `circumstances` is what else findings depend on."""
    parts = [plan.key, hashlib.sha256(plan.data).hexdigest(), circumstances]
    return f"trials/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"


def read_record(store: PlanStore, name: str, plan: Plan) -> TrialRecord:
    """What is known of a plan; an empty record if nothing is, or nothing that can be read."""
    try:
        data = store.read(name)
        if data is not None:
            record = msgspec.json.decode(data, type=TrialRecord)
            if record.plan == plan.key and record.schema == SCHEMA:
                return record
            logger.warning("%s is of another plan or version; trying again", store.locate(name))
    except StoreError as error:
        logger.warning("%s; trying plans again", error)
    except msgspec.DecodeError as error:
        logger.warning("%s cannot be read (%s); trying again", store.locate(name), error)
    return TrialRecord(plan.key)


def write_record(store: PlanStore, name: str, record: TrialRecord) -> None:
    """Keep a record. A store that can't be written is logged: the next start tries again."""
    try:
        store.write(name, msgspec.json.encode(record))
    except StoreError as error:
        logger.warning("%s; what was found out about plans is lost with this process", error)
