"""Reading a pickle without running it: a machine for the few opcodes that data needs.

Pickle is a program for a stack machine, whose GLOBAL and REDUCE call anything importable. Here
nothing is ever imported: a global is a name, only names in a table are admitted, and "calling" one
makes a value by this module's own code or a plain record of the arguments. What is not admitted is
refused by name before the first value is made of it.

Opcodes are decoded by the standard library's `pickletools.genops`, which executes nothing; the
protocol is documented there.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorray.builder.checkpoint.base import CheckpointError

#: Bytes of a pickle that are read at most; tensors' bytes are not in it.
MAX_PICKLE = 256 << 20


@dataclass(frozen=True)
class Global:
    """The name of an importable thing, which is not imported."""

    name: str


@dataclass(eq=False)
class Record:
    """An object as the pickle describes it: its class's name, arguments, and state."""

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None

    def get(self, key: str) -> Any:
        """A field of its state; None if there is none."""
        return self.state.get(key) if isinstance(self.state, dict) else None


#: Makes a value from a global's arguments; raises TypeError or ValueError if it can't.
Maker = Callable[..., Any]


class UnsafePickleError(CheckpointError):
    """A pickle wants something that is not data; names it."""


class _Mark:
    """Where a run of arguments begins on the stack."""


_MARK = _Mark()
_KEYS = (str, int, float, bytes, bool, type(None), Global, Record)
#: Opcodes that push their argument.
_PUSH = frozenset(
    name
    for names in (
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT",
        "STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8",
        "BINBYTES SHORT_BINBYTES BINBYTES8",
    )
    for name in names.split()
)
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(
    data: bytes,
    where: str,
    makers: Mapping[str, Maker],
    names: Iterable[str] = (),
    persistent: Maker | None = None,
) -> Any:
    """The value of a pickle of protocol 2 to 5.

    `makers` are the globals that may be called, by "module.name"; `names` those that may only be
    mentioned; `persistent` makes a value of a persistent id. Raises UnsafePickleError naming any
    other global or an opcode that data doesn't need, CheckpointError for damage.
    """
    if len(data) > MAX_PICKLE:
        raise CheckpointError(f"{where}: a pickle of {len(data)} bytes; at most {MAX_PICKLE}")
    machine = _Machine(where, makers, frozenset(names), persistent)
    try:
        return machine.run(data)
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{where}: a damaged pickle: {error}") from error


class _Machine:
    def __init__(
        self,
        where: str,
        makers: Mapping[str, Maker],
        names: frozenset[str],
        persistent: Maker | None,
    ) -> None:
        self._where = where
        self._makers = makers
        self._names = names
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("APPEND", "APPENDS"):
            items = self._marked() if name == "APPENDS" else [self._pop()]
            self._top_of(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(
                self._marked() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
            )
        elif name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            stack.append(self._global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self._pop(), self._pop()
            stack.append(self._make(function, arguments))
        elif name == "BUILD":
            self._build(self._pop())
        elif name == "BINPERSID" and self._persistent is not None:
            stack.append(self._persistent(self._pop()))
        elif name == "POP":
            self._stack.pop()
        else:
            raise UnsafePickleError(
                f"{self._where}: the pickle uses {name}, which weights do not need; nothing of it "
                f"was run. Save the model's state_dict alone, or as safetensors"
            )

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value was expected")
        return value

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value was expected")
        return self._stack[-1]

    def _top_of(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"a {kind.__name__} was expected")
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        """What lies above the last mark, taken off with it."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self._top_of(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A deep tuple as a key would be hashed by recursion.
            if not isinstance(key, _KEYS):
                raise ValueError(f"a key of type {type(key).__name__}")
            target[key] = value

    def _global(self, module: Any, attribute: Any) -> Global:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("a global's name is not text")
        name = f"{module}.{attribute}"
        if name not in self._makers and name not in self._names:
            raise UnsafePickleError(
                f"{self._where}: the pickle refers to {name[:200]!r}, which is no part of weights, "
                f"and could run code; nothing of it was run. Save the model's state_dict alone, or "
                f"as safetensors"
            )
        return Global(name)

    def _make(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UnsafePickleError(
                f"{self._where}: the pickle calls a {type(function).__name__}; nothing of it was "
                f"run"
            )
        maker = self._makers.get(function.name)
        if maker is None:
            raise UnsafePickleError(
                f"{self._where}: the pickle calls {function.name!r}, which may only be mentioned; "
                f"nothing of it was run"
            )
        return maker(*arguments)

    def _build(self, state: Any) -> None:
        target = self._top()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes are not weights
            raise UnsafePickleError(
                f"{self._where}: the pickle sets the state of a {type(target).__name__}; nothing "
                f"of it was run"
            )


def record(kind: str) -> Maker:
    """A maker that keeps the arguments and does nothing."""
    return lambda *arguments: Record(kind, arguments)
