"""What runs a shard's segments, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from tensorray.actors.protocol import SegmentInfo


def table(infos: Sequence[SegmentInfo]) -> str:
    """What runs what, a line a segment: `1-16 kernels, 32 tensorrt (81 us; kernels 95), …`."""
    lines = []
    for info in infos:
        spans: list[tuple[str, list[int]]] = []
        for rows, backend in info.backends.items():
            if rows in info.microseconds or not spans or spans[-1][0] != backend:
                spans.append((backend, []))
            spans[-1][1].append(rows)
        lines.append(f"  {info.name}: " + ", ".join(_span(info, *each) for each in spans))
    return "\n".join(lines)


def _span(info: SegmentInfo, backend: str, rows: list[int]) -> str:
    text = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]}-{rows[-1]}"
    times = info.microseconds.get(rows[0])
    if not times:
        return f"{text} {backend}"
    others = [f"{name} {value:.0f}" for name, value in times.items() if name != backend]
    return f"{text} {backend} ({'; '.join([f'{times[backend]:.0f} us', *others])})"
