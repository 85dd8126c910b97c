"""Logits processors: a user's own code between the model's logits and the choice of a token.

A class is registered when the server starts (`--logits-processors pkg.module:Class`, or
`path/to/file.py:Class`) and goes by its own name, `Class`. A request chooses it with arguments, and
each of its sequences gets an object, `Class(**arguments)`, that is called once for every token:

    class Prefer:
        def __init__(self, token: int, by: float = 5.0) -> None: ...

        def __call__(self, output, prompt, logits):
            logits[self.token] += self.by

`output` and `prompt` are lists of token ids, to be read only; `logits`, float32 [vocab], are the
model's own, and its object's to change. What it returns takes their place; None: it changed them
where they are. They may hold -inf, for tokens not to be chosen, but neither NaN nor +inf. Several
run in the request's order, before everything else in `Sampling`'s order of application, and not
while a forced prefix lasts.

An object may keep what follows from what it was given. A sequence that is preempted gets a new one
later, which finds the whole output in its first call, so what it does must not hang on having been
called before. What it raises ends its sequence, with the message, and no other.

With `on_device = True` on the class, `logits` on a GPU are a CuPy array, and what is done to them
is queued on the current stream (on a CPU they are NumPy's all the same). `CudaLogitsProcessor` does
that with a CUDA kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import SequenceStart
from tensorray.builder.registry import load_file

#: (output, prompt, logits) -> logits, or None where they were changed in place.
LogitsProcessor = Callable[[Sequence[int], Sequence[int], Any], Any]
Registry = Mapping[str, Callable[..., LogitsProcessor]]

UNKNOWN = "there is no logits processor {name!r} here; --logits-processors registers one"
NOT_FINITE = "logits processor {name} left NaN or +inf among the logits"
NOTHING_LEFT = "logits processor {name} left no token to choose: all logits are -inf"

_THREADS = 256

# Classes that were handed over as objects, which no import would find.
_given: dict[str, Callable[..., LogitsProcessor]] = {}


class ProcessorError(ValueError):
    """A logits processor can't be loaded, made or run; the message says which and why."""


class CudaLogitsProcessor:
    """A logits processor that is a CUDA kernel: a subclass names its source and declares arguments.

        class Sharpen(CudaLogitsProcessor):
            source = Path(__file__).with_name("sharpen.cu")
            kernel = "sharpen"
            parameters = ("factor",)

    The kernel is launched with a thread for each token of the vocabulary, in blocks of 256:

        extern "C" __global__ void sharpen(
            float* logits, int vocab, const int* tokens, int prompt, int length,
            const float* arguments)

    `tokens` are the `length` tokens of prompt and output, the first `prompt` of them the prompt's.
    `arguments` are the request's, in the order of `parameters`. Compiled by NVRTC for C++17 when
    first used, and kept; the project's kernels/cuda/common.cuh may be included.
    """

    on_device: ClassVar[bool] = True
    source: ClassVar[str | Path]
    kernel: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **arguments: float) -> None:
        if arguments.keys() != set(self.parameters):
            raise TypeError(
                f"its arguments are {', '.join(self.parameters) or 'none'}, not "
                f"{', '.join(arguments) or 'none'}"
            )
        self._arguments = np.array([arguments[name] for name in self.parameters], np.float32)

    def __call__(self, output: Sequence[int], prompt: Sequence[int], logits: Any) -> None:
        if isinstance(logits, np.ndarray):
            raise TypeError("it is a CUDA kernel, which runs on a GPU and beside its like only")
        import cupy

        from tensorray.kernels.cuda import compiler

        tokens = cupy.asarray(np.array([*prompt, *output], np.int32))
        arguments = cupy.asarray(self._arguments)
        compiler.load(str(Path(self.source).resolve())).function(self.kernel)(
            (-(-len(logits) // _THREADS),),
            (_THREADS,),
            *(logits, len(logits), tokens, len(prompt), len(tokens), arguments),
        )


class ProcessorChain:
    """One sequence's processors, in order, and the tokens they are told."""

    def __init__(self, registry: Registry, start: SequenceStart) -> None:
        """Raises ProcessorError."""
        self.prompt = start.tokens[: start.prompt_len]
        self.output = start.tokens[start.prompt_len :]
        self.names = [call.name for call in start.sampling.logits_processors]
        self._processors = [
            _made(registry, call.name, call.arguments) for call in start.sampling.logits_processors
        ]
        self.on_device = all(getattr(each, "on_device", False) for each in self._processors)

    @property
    def label(self) -> str:
        return ", ".join(self.names)

    def append(self, token: int) -> None:
        self.output.append(token)

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits, float32 [vocab], as all of them leave them; the array given may change.

        Raises ProcessorError for what one of them raises, or for what it leaves.
        """
        for name, processor in zip(self.names, self._processors, strict=True):
            logits = self._run(name, processor, logits)
            best = np.max(logits)
            if best == -np.inf:
                raise ProcessorError(NOTHING_LEFT.format(name=name))
            if not np.isfinite(best):
                raise ProcessorError(NOT_FINITE.format(name=name))
        return logits

    def queue(self, logits: Any) -> None:
        """Change a row on the device, float32 [vocab], without waiting for it.

        Raises ProcessorError for what one of them raises. What they leave is checked by nobody.
        """
        for name, processor in zip(self.names, self._processors, strict=True):
            changed = self._run(name, processor, logits)
            if changed is not logits:
                logits[...] = changed

    def _run(self, name: str, processor: LogitsProcessor, logits: Any) -> Any:
        try:
            changed = processor(self.output, self.prompt, logits)
        except Exception as error:
            raise ProcessorError(
                f"logits processor {name} failed: {type(error).__name__}: {error}"
            ) from error
        if changed is None or changed is logits:
            return logits
        shape, kind = getattr(changed, "shape", None), getattr(changed, "dtype", None)
        if shape != logits.shape or kind is None or kind.kind != "f":
            raise ProcessorError(
                f"logits processor {name} returned {kind or type(changed).__name__} "
                f"{list(shape or [])} for logits, not float32 {list(logits.shape)}"
            )
        return changed.astype(np.float32)


def chain_of(start: SequenceStart, registry: Registry) -> ProcessorChain | None:
    """The processors of a sequence that starts, if it has any. Raises ProcessorError."""
    return ProcessorChain(registry, start) if start.sampling.logits_processors else None


def load_registry(spellings: Iterable[str]) -> dict[str, Callable[..., LogitsProcessor]]:
    """What `--logits-processors` names: each class, by its name. Raises ProcessorError."""
    found: dict[str, Callable[..., LogitsProcessor]] = {}
    for spelling in spellings:
        name = spelling.rpartition(":")[2].rpartition(".")[2]
        loaded = _given.get(spelling) or _load(spelling)
        if name in found and found[name] is not loaded:
            raise ProcessorError(f"--logits-processors: two of them are called {name}")
        found[name] = loaded
    return found


def spell(processor: str | type[Any]) -> str:
    """How settings name a processor that is given as a class, in this process."""
    if isinstance(processor, str):
        return processor
    spelling = f"{processor.__module__}:{processor.__qualname__}"
    _given[spelling] = processor
    return spelling


def _load(spelling: str) -> Callable[..., LogitsProcessor]:
    where, separator, path = spelling.rpartition(":")
    if not (where and separator and path):
        raise ProcessorError(
            f"--logits-processors {spelling}: must be pkg.module:Class or path/to/file.py:Class"
        )
    try:
        found: Any = (
            load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # whatever the user's module raises
        raise ProcessorError(
            f"--logits-processors {spelling}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ProcessorError(f"--logits-processors {spelling}: {path} is not a class")
    return found  # type: ignore[no-any-return]  # checked as far as can be


def _made(registry: Registry, name: str, arguments: Mapping[str, Any]) -> LogitsProcessor:
    if name not in registry:
        raise ProcessorError(UNKNOWN.format(name=name))
    try:
        return registry[name](**arguments)
    except Exception as error:  # whatever the user's class raises
        raise ProcessorError(
            f"logits processor {name} can't be made: {type(error).__name__}: {error}"
        ) from error
