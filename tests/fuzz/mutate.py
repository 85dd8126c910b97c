"""Changes an input a little: as JSON where it is JSON, else as text and bytes.

The same generator makes the same input, so that a short run can be repeated exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

# What has broken parsers before: limits of types, empty and odd values, text that is none.
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, -0.0, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1,
    2**63, 2**64, -(2**63) - 1, 10**30, 1e308, 5e-324, "", "a", " ", "\0", "\ud800", "é" * 9, "😀",
    "a" * 3000, "1", "NaN", "{{ x }}", "</s>", [], {}, [[]], [None], [0], ["a"], {"": None},
    {"type": "text", "text": "a"}, [[[[[[[[]]]]]]]],
]  # fmt: skip
_BYTES = [
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"\x01\0\0\0",
    b"\r\n", b"\n", b'"', b"{", b"}", b"[", b"]", b"\\u0000", b"\\ud800", b"NaN", b"1e999",
    b"{{", b"}}", b"{%", b"%}", b" for x in y ", b" if ", b"|", b"..", b"\xef\xbb\xbf", b"[" * 3000,
]  # fmt: skip


def mutated(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """`data` after one to four changes; `others` are inputs it may take parts from."""
    for _ in range(random.choice([1, 1, 1, 2, 3, 4])):
        head, split, rest = data.partition(b"\n")  # targets may keep a line of their own first
        body = rest if split else head
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            tree = None
        if isinstance(tree, dict | list) and random.random() < 0.75:
            changed = json.dumps(_in_json(tree, random), ensure_ascii=random.random() < 0.9)
            body = changed.encode("utf-8", "surrogatepass")
            data = head + split + body if split else body
        else:
            data = _in_bytes(data, others, random)
    return data


def _in_json(tree: Any, random: Random) -> Any:
    """The value with one of its places changed."""
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                stack.append(value)
    value: Any = random.choice(_VALUES)
    if not places:
        return value
    node, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node[key:key] = [node[key]] * random.choice([1, 2, 50])
        case 2:  # what stands elsewhere
            other, there = random.choice(places)
            node[key] = json.loads(json.dumps(other[there]))
        case 3 if isinstance(node, dict):
            node[str(value)[:20]] = node[key]
        case 4 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = random.choice([-node[key], node[key] + 1, node[key] * 1000, node[key] / 7])
        case _:
            node[key] = value
    return tree


def _in_bytes(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice([1, 1, 2, 4, 8, 64]))
    match random.randrange(6):
        case 0:
            return data[:at] + data[end:]
        case 1:
            return data[:at] + data[at:end] * random.choice([2, 3, 100]) + data[end:]
        case 2:
            return data[:at] + random.choice(_BYTES) + data[end:]
        case 3:
            return data[:at] + random.randbytes(end - at) + data[end:]
        case 4 if others:
            other = random.choice(others)
            start = random.randrange(len(other) + 1)
            return data[:at] + other[start : start + random.choice([4, 16, 200])] + data[at:]
        case _:
            return data[:at] + random.choice(_BYTES) + data[at:]
