"""Of Ray's long errors the one line that says why."""

from __future__ import annotations

from tensorray.actors.ray_reason import reason_of

# As ray 2.55 words the end of an actor that was killed.
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: ShardActor
\tactor_id: 3d1cb2ee9be0ee33ab2bcc2101000000
\tpid: 32315
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop \
--force was called, or (3) the worker crashed unexpectedly due to SIGSEGV.
"""


def test_what_is_known_of_an_end_is_told_and_what_is_guessed_is_not() -> None:
    told = reason_of(RuntimeError(KILLED))
    assert told == (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
        "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
    )


def test_other_errors_are_told_by_their_first_line() -> None:
    assert reason_of(ValueError("\n  too small\nmore of it")) == "too small"
    assert reason_of(KeyError()) == "KeyError"
