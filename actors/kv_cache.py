"""The paged KV cache: one pool of blocks, shared by groups of layers.

Layers with the same attention window form groups of at most `layers_per_group` layers, and all
groups draw blocks from one pool: block b of group g holds 16 (say) tokens' keys and values for
that group's layers. The i-th layer of every group lives in the same pair of page arrays, so a
block weighs the same whichever group takes it, and a model that mixes local and global attention
wastes no memory on a fixed split between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorray.actors.protocol import KVGroups
from tensorray.builder.array_ops import LayerKV
from tensorray.builder.model import KVSpec, Model, stage_layers

# More groups mean more block tables a sequence, which costs the scheduler time.
_MAX_GROUPS = 8


class KVCacheError(ValueError):
    """The cache can't be built as configured; says what to change."""


@dataclass(frozen=True)
class KVPlan:
    """How a shard's layers fall into groups. `groups[g]` lists them by their index in the model;
    where a pipeline has several stages, a group may have layers in some of them only."""

    groups: list[list[int]]
    windows: list[int | None]
    layers_per_group: int
    kv_heads: int
    head_dim: int
    block_size: int

    def block_bytes(self, itemsize: int) -> int:
        """Bytes of one block: keys and values of `layers_per_group` layers."""
        per_layer = 2 * self.kv_heads * self.block_size * self.head_dim * itemsize
        return self.layers_per_group * per_layer

    def blocks_for(self, tokens: int, step_tokens: int) -> int:
        """Blocks one sequence of `tokens` tokens takes at most, over all groups.

        A windowed group holds the window before the oldest query of a step of `step_tokens`
        tokens, and that step's own tokens.
        """
        total = 0
        for window in self.windows:
            held = tokens if window is None else min(tokens, window + step_tokens)
            # A window need not start on a block's border.
            ragged = 0 if window is None or held == tokens else 1
            total += -(-held // self.block_size) + ragged
        return total


def plan_groups(
    specs: list[KVSpec], block_size: int, stages: Sequence[range] | None = None, stage: int = 0
) -> KVPlan:
    """Cut layers into equal groups by window: the least padding, then the fewest groups.

    `specs` are those of all layers of the model, `stages` the layers of each stage of its pipeline
    (None: one stage has all). One block table serves a group on every stage, so all stages have the
    same groups, each with a share of the stage's layers; the plan's layers are those of `stage`.
    """
    shapes = {(spec.kv_heads, spec.head_dim) for spec in specs}
    if len(shapes) != 1:
        raise KVCacheError(
            f"layers keep KV of different shapes {sorted(shapes)}; one pool of blocks needs one"
        )
    kv_heads, head_dim = shapes.pop()
    stages = stages or [range(len(specs))]
    # By window, the layers of each stage that have it.
    kinds: dict[int | None, list[list[int]]] = {}
    for layer, spec in enumerate(specs):
        by_stage = kinds.setdefault(spec.window, [[] for _ in stages])
        by_stage[next(i for i, own in enumerate(stages) if layer in own)].append(layer)

    def groups_of(by_stage: list[list[int]], size: int) -> int:
        return max(-(-len(layers) // size) for layers in by_stage)

    def cost(size: int) -> tuple[bool, int, int]:
        groups = sum(groups_of(by_stage, size) for by_stage in kinds.values())
        padding = groups * size * len(stages) - len(specs)
        return groups > max(_MAX_GROUPS, len(kinds)), padding, groups

    size = min(range(1, max(map(len, stages)) + 1), key=cost)
    groups: list[list[int]] = []
    windows: list[int | None] = []
    for window, by_stage in kinds.items():
        own = by_stage[stage]
        for group in range(groups_of(by_stage, size)):
            groups.append(own[group * size : (group + 1) * size])
            windows.append(window)
    return KVPlan(groups, windows, size, kv_heads, head_dim, block_size)


def plan_stage(model: Model, block_size: int) -> tuple[KVPlan, range]:
    """The groups of the model's stage of the pipeline, and its layers."""
    layout = model.layout
    stages = [
        stage_layers(model.num_layers, layout.pp_size, stage) for stage in range(layout.pp_size)
    ]
    specs = [model.kv_spec(layer) for layer in range(model.num_layers)]
    return plan_groups(specs, block_size, stages, layout.pp_rank), stages[layout.pp_rank]


class KVCache:
    """The page arrays, `[num_blocks, kv_heads, block_size, head_dim]` each, one pair a layer slot.

    `layers[i]` is the view that layer i of the model, one of the shard's, reads and appends to.
    """

    def __init__(self, plan: KVPlan, num_blocks: int, xp: Any, dtype: Any) -> None:
        self._plan = plan
        self._xp = xp
        self._dtype = dtype
        self.layers: dict[int, LayerKV] = {}
        self._pages: list[Any] = []
        self.resize(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Have another number of blocks, all empty."""
        plan, xp, dtype = self._plan, self._xp, self._dtype
        self.layers, self._pages = {}, []  # what there was goes before the new comes
        shape = (num_blocks, plan.kv_heads, plan.block_size, plan.head_dim)
        pages = [
            (xp.zeros(shape, dtype), xp.zeros(shape, dtype)) for _ in range(plan.layers_per_group)
        ]
        views: dict[int, LayerKV] = {}
        for group, layers in enumerate(plan.groups):
            for place, layer in enumerate(layers):
                keys, values = pages[place]
                views[layer] = LayerKV(keys, values, group, plan.windows[group])
        self.layers = views
        self._pages = [array for pair in pages for array in pair]
        self.nbytes = num_blocks * plan.block_bytes(pages[0][0].itemsize)
        self.groups = KVGroups(
            windows=plan.windows, num_blocks=num_blocks, block_size=plan.block_size
        )

    @property
    def page_layout(self) -> str:
        """Equal where pages are the same bytes: shapes, dtype, and which layers a group has."""
        plan, array = self._plan, self._pages[0]
        shape = "x".join(map(str, array.shape[1:]))
        groups = ", ".join(
            f"{layers} of window {window}"
            for layers, window in zip(plan.groups, plan.windows, strict=True)
        )
        return f"{len(self._pages)} times {array.dtype} {shape}, for layers {groups}"

    @property
    def block_bytes(self) -> int:
        return self._plan.block_bytes(self._pages[0].itemsize)

    def read_blocks(self, blocks: Any) -> Any:
        """A copy of what blocks `[n]` hold: `[arrays, n, kv_heads, block_size, head_dim]`."""
        xp, pages = self._xp, self._words()
        found = xp.empty((len(pages), len(blocks), *pages[0].shape[1:]), pages[0].dtype)
        for place, array in enumerate(pages):
            xp.take(array, blocks, axis=0, out=found[place])
        return found

    def write_blocks(self, blocks: Any, data: Any) -> None:
        """Have blocks `[n]` hold what `read_blocks` gave, as bytes."""
        pages = self._words()
        shape = (len(pages), len(blocks), *pages[0].shape[1:])
        for array, part in zip(pages, data.view(pages[0].dtype).reshape(shape), strict=True):
            array[blocks] = part

    def _words(self) -> list[Any]:
        """The pages without a meaning: some libraries copy few dtypes."""
        return [array.view(f"u{array.itemsize}") for array in self._pages]

    def copy_blocks(self, copies: Any) -> None:
        """Have blocks hold what others do: (from, to) pairs, int `[n, 2]` of `xp`. All of them are
        read before any is written; no block is written twice."""
        for array in self._pages:
            array[copies[:, 1]] = array[copies[:, 0]]


def choose_num_blocks(
    plan: KVPlan,
    itemsize: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    step_tokens: int,
    available: int,
    cache_bytes: int | None = None,
    num_blocks: int | None = None,
) -> int:
    """The pool's size in blocks (placeholder block 0 included).

    `num_blocks` or `cache_bytes` decide if given; else the `available` bytes, but no more than
    `max_num_seqs` sequences of full length could fill. Raises KVCacheError when not even one
    sequence of `max_model_len` tokens fits.
    """
    block_bytes = plan.block_bytes(itemsize)
    one_sequence = plan.blocks_for(max_model_len, step_tokens)
    if num_blocks is None:
        if cache_bytes is None:
            cache_bytes = min(available, (1 + max_num_seqs * one_sequence) * block_bytes)
        num_blocks = cache_bytes // block_bytes
    if num_blocks < 1 + one_sequence:
        raise KVCacheError(
            f"the KV cache has room for {max(num_blocks, 0)} blocks, and one sequence of "
            f"max_model_len={max_model_len} tokens needs {1 + one_sequence} "
            f"({(1 + one_sequence) * block_bytes / 2**20:.0f} MiB): lower --max-model-len or "
            "give more by --kv-cache-memory-bytes or --num-kv-blocks"
        )
    return num_blocks
