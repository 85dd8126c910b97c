"""LoRA (arXiv 2106.09685): what an adapter adds to the weights of a definition, which knows
nothing of it.

A definition says of each weight which of the checkpoint's tensors go into it, and how a rank slices
them. An adapter names the same tensors' modules, so its matrices follow: to the rows of a weight
that a module's tensor fills, the module's B; to the columns that a rank takes, its A. A rank whose
product is a partial sum adds its part of the adapter's before the sum is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.peft import AdapterFiles
from tensorray.builder.model import Model, Part, Weight
from tensorray.builder.shares import slice_of, weight_shape
from tensorray.kernels.low_rank import Block, LowRank

#: A declared weight: its group (a layer's index, or "head") and name.
Place = tuple[int | str, str]


@dataclass(frozen=True)
class _Declared:
    """A weight that a linear layer may multiply by, and the modules its parts are of."""

    place: Place
    weight: Weight
    modules: tuple[str, ...]


def read_adapter(
    files: AdapterFiles, model: Model, layers: range, *, max_rank: int
) -> dict[Place, LowRank]:
    """An adapter's share of a shard that holds `layers`, in float32, by the weight it belongs to.

    Checked first against the whole model, so that all shards of a replica agree. Raises
    CheckpointError naming the module.
    """
    declared = list(_declared(model))
    _check(files, model, declared, max_rank)
    return {
        each.place: _read(files, model, each)
        for each in declared
        if _is_held(each, model, layers) and not files.modules.keys().isdisjoint(each.modules)
    }


def adaptable(model: Model, layers: range) -> dict[Place, tuple[slice, ...]]:
    """The weights of a shard that holds `layers` to which an adapter may add, each with the
    outputs of every module in it."""
    found = {}
    for each in _declared(model):
        if not _is_held(each, model, layers):
            continue
        starts: list[int] = []
        names: list[str] = []
        row = 0
        for name, part in zip(each.modules, each.weight.parts, strict=True):
            if not names or names[-1] != name:
                starts.append(row)
                names.append(name)
            row += slice_of(part, model.layout).shape[0]
        found[each.place] = tuple(map(slice, starts, [*starts[1:], row]))
    return found


def _is_held(each: _Declared, model: Model, layers: range) -> bool:
    group = each.place[0]
    return group in layers if isinstance(group, int) else layers[-1] == model.num_layers - 1


def _declared(model: Model) -> Iterator[_Declared]:
    groups: list[tuple[int | str, dict[str, Weight]]] = [
        (layer, model.layer_weights(layer)) for layer in range(model.num_layers)
    ]
    groups.append(("head", model.head_weights()))
    for group, weights in groups:
        for name, weight in weights.items():
            if weight.stack is None and all(len(part.shape) == 2 for part in weight.parts):
                # A head tied to the embedding has that tensor's name; PEFT calls it lm_head.
                modules = ("lm_head",) if group == "head" else tuple(map(_module, weight.parts))
                yield _Declared((group, name), weight, modules)


def _module(part: Part) -> str:
    return part.name.removesuffix(".weight")


def _size(part: Part) -> tuple[int, int]:
    """A tensor's outputs and inputs."""
    first, second = part.shape
    return (second, first) if part.transpose else (first, second)


def _check(files: AdapterFiles, model: Model, declared: list[_Declared], max_rank: int) -> None:
    sizes = {
        module: _size(part)
        for each in declared
        for module, part in zip(each.modules, each.weight.parts, strict=True)
    }
    for module, pair in files.modules.items():
        where = f"{files.path}: {module}"
        if module not in sizes:
            raise CheckpointError(f"{where}: {_why_not(module, model)}{_trained_on(files)}")
        rows, columns = sizes[module]
        if (pair.b.shape[0], pair.a.shape[1]) != (rows, columns):
            raise CheckpointError(
                f"{where}: the adapter is for {pair.a.shape[1]} inputs and {pair.b.shape[0]} "
                f"outputs, the model has {columns} and {rows}{_trained_on(files)}"
            )
        if pair.rank > max_rank:
            raise CheckpointError(
                f"{where}: rank {pair.rank} is above this server's limit of {max_rank} "
                "(--max-lora-rank)"
            )


def _trained_on(files: AdapterFiles) -> str:
    return f" (it was trained on {files.config.base})" if files.config.base else ""


def _why_not(module: str, model: Model) -> str:
    embeddings = {_module(part) for w in model.embed_weights().values() for part in w.parts}
    if module in embeddings:
        return "adapters of embeddings are not supported"
    experts = {
        _module(part)
        for layer in range(model.num_layers)
        for weight in model.layer_weights(layer).values()
        if weight.stack is not None
        for part in weight.parts
    }
    if module in experts or ".experts." in module:
        return "adapters of a mixture's experts are not supported"
    return "the model has no such linear layer"


def _read(files: AdapterFiles, model: Model, each: _Declared) -> LowRank:
    """Modules of one weight: A's side by side, a block for each one's B."""
    modules = {name: files.modules[name] for name in each.modules if name in files.modules}
    rank = sum(module.rank for module in modules.values())
    a = np.empty((rank, weight_shape(each.weight, model.layout)[1]), np.float32)
    ranks: dict[str, slice] = {}
    blocks: list[Block] = []
    row = filled = 0
    for name, part in zip(each.modules, each.weight.parts, strict=True):
        piece = slice_of(part, model.layout)
        outputs = slice(row, row + piece.shape[0])
        row = outputs.stop
        module = modules.get(name)
        if module is None:
            continue
        whole = slice(0, module.rank)
        if name not in ranks:
            ranks[name] = slice(filled, filled + module.rank)
            filled += module.rank
            module.a.read(a[ranks[name]], whole, piece.columns, False)
        b = np.empty((piece.shape[0], module.rank), np.float32)
        module.b.read(b, piece.rows, whole, False)
        b *= np.float32(module.scale)
        last = blocks[-1] if blocks else None
        if last is not None and last.ranks == ranks[name]:  # parts of one module
            outputs = slice(last.outputs.start, outputs.stop)
            b = np.concatenate([last.b, b])
            blocks.pop()
        blocks.append(Block(outputs, ranks[name], b))
    if not all(np.isfinite(array).all() for array in (a, *(block.b for block in blocks))):
        raise CheckpointError(f"{files.path}: {', '.join(modules)}: values that are not finite")
    return LowRank(a, tuple(blocks))
