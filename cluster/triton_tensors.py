"""KServe's inference protocol, version 2, on the wire: tensors as JSON or as raw bytes behind it.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from tensorray.cluster.bad_request import BadRequest

HEADER_LENGTH = "Inference-Header-Content-Length"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
INTEGERS = frozenset(name for name in _DTYPES if "INT" in name)
FLOATS = frozenset(name for name in _DTYPES if name.startswith("FP"))


@dataclass(frozen=True)
class Tensor:
    """`values` in row-major order: str for BYTES (which is UTF-8 here), bool, int or float."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: Sequence[Any]


class InferOutput(msgspec.Struct):
    """An output that the client asks for by name."""

    name: str
    parameters: dict[str, Any] = {}


class InferInput(msgspec.Struct):
    """A tensor as sent; `data` is nested by dimension, or flat."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferBody(msgspec.Struct):
    """An inference request's JSON."""

    inputs: list[InferInput]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[InferOutput] | None = None


class AnsweredTensor(msgspec.Struct, omit_defaults=True):
    """An output: `data` in row-major order, or `parameters.binary_data_size` bytes behind."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | UnsetType = UNSET
    parameters: dict[str, int] | UnsetType = UNSET


class InferAnswer(msgspec.Struct, omit_defaults=True):
    """An inference answer's JSON."""

    model_name: str
    model_version: str
    outputs: list[AnsweredTensor]
    id: str = ""


@dataclass(frozen=True)
class InferRequest:
    """An inference request, its tensors read. `outputs` is None where the client names none."""

    id: str
    parameters: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[InferOutput] | None

    def binary(self, output: str) -> bool:
        """Whether the client wants that output as raw bytes."""
        default = bool(self.parameters.get("binary_data_output", False))
        for each in self.outputs or ():
            if each.name == output:
                return bool(each.parameters.get("binary_data", default))
        return default


def read_request(body: bytes, header_length: str | None) -> InferRequest:
    """`header_length` is the HTTP header that says where JSON ends; None: at the end.

    Raises BadRequest.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > end:
            raise BadRequest(
                f"{HEADER_LENGTH} is {header_length[:40]!r}; it must be the length of the "
                f"request's JSON, at most that of the body ({end} bytes)"
            )
        end = int(header_length)
    try:
        header = msgspec.json.decode(body[:end], type=InferBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request is no inference request: {error}") from None
    raw = memoryview(body)[end:]
    tensors = []
    for each in header.inputs:
        size = each.parameters.get("binary_data_size")
        for name in each.parameters:
            if name != "binary_data_size":
                raise BadRequest(
                    f"input {each.name}: parameter {name} is not supported; leave it out"
                )
        if size is None:
            tensors.append(_from_json(each))
            continue
        if type(size) is not int or not 0 <= size <= len(raw):
            raise BadRequest(
                f"input {each.name}: binary_data_size is {size!r}, and {len(raw)} bytes are left "
                "of the body"
            )
        tensors.append(_from_binary(each, bytes(raw[:size])))
        raw = raw[size:]
    if raw:
        raise BadRequest(f"the body has {len(raw)} bytes that belong to no input")
    return InferRequest(header.id, header.parameters, tensors, header.outputs)


def write_answer(
    request: InferRequest, model: str, version: str, outputs: Iterable[Tensor]
) -> tuple[bytes, dict[str, str]]:
    """The body, and the headers that say what it is."""
    told: list[AnsweredTensor] = []
    blobs: list[bytes] = []
    for tensor in outputs:
        entry = AnsweredTensor(tensor.name, tensor.datatype, list(tensor.shape))
        if request.binary(tensor.name):
            blobs.append(_to_binary(tensor))
            entry.parameters = {"binary_data_size": len(blobs[-1])}
        else:
            entry.data = list(tensor.values)
        told.append(entry)
    header = msgspec.json.encode(InferAnswer(model, version, told, request.id))
    if not blobs:
        return header, {"Content-Type": "application/json"}
    return b"".join([header, *blobs]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(header)),
    }


def _count(each: InferInput) -> int:
    if not each.shape or min(each.shape) < 0 or len(each.shape) > 8:
        raise BadRequest(f"input {each.name}: {each.shape} is no shape")
    return prod(each.shape)


def _from_json(each: InferInput) -> Tensor:
    if each.data is None:
        raise BadRequest(f"input {each.name} has neither data nor binary_data_size")
    values: list[Any] = each.data
    while values and isinstance(values[0], list):  # nested by dimension, or flat
        if not all(isinstance(value, list) for value in values):
            raise BadRequest(f"input {each.name}: its data is a list here and a value there")
        values = list(chain.from_iterable(values))
    if len(values) != (count := _count(each)):
        raise BadRequest(
            f"input {each.name}: {len(values)} values do not make the shape {each.shape} ({count})"
        )
    wanted = {"BYTES": (str,), "BOOL": (bool,)}.get(
        each.datatype, (int, float) if each.datatype in FLOATS else (int,)
    )
    for value in values:
        if type(value) not in wanted:
            raise BadRequest(f"input {each.name}: {str(value)[:40]!r} is not {each.datatype}")
    if each.datatype != "BYTES":
        try:
            np.array(values, _dtype(each))
        except OverflowError:
            raise BadRequest(f"input {each.name}: a value exceeds {each.datatype}") from None
    return Tensor(each.name, each.datatype, each.shape, values)


def _from_binary(each: InferInput, raw: bytes) -> Tensor:
    count = _count(each)
    if each.datatype == "BYTES":
        values: list[Any] = []
        at = 0
        while at < len(raw):
            if at + 4 > len(raw):
                raise BadRequest(f"input {each.name}: its bytes end within a length")
            (length,) = struct.unpack_from("<I", raw, at)
            piece = raw[at + 4 : at + 4 + length]
            if len(piece) != length:
                raise BadRequest(f"input {each.name}: its bytes end within a value")
            try:
                values.append(piece.decode())
            except UnicodeDecodeError as error:
                raise BadRequest(f"input {each.name}: text must be UTF-8: {error}") from None
            at += 4 + length
    else:
        dtype = _dtype(each)
        if len(raw) != count * dtype.itemsize:
            raise BadRequest(
                f"input {each.name}: {len(raw)} bytes do not make the shape {each.shape} of "
                f"{each.datatype}"
            )
        values = np.frombuffer(raw, dtype).tolist()
    if len(values) != count:
        raise BadRequest(
            f"input {each.name}: {len(values)} values do not make the shape {each.shape}"
        )
    return Tensor(each.name, each.datatype, each.shape, values)


def _to_binary(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return np.array(tensor.values, _DTYPES[tensor.datatype]).tobytes()
    pieces = [value.encode("utf-8", "replace") for value in tensor.values]
    return b"".join(struct.pack("<I", len(piece)) + piece for piece in pieces)


def _dtype(each: InferInput) -> np.dtype[Any]:
    if each.datatype not in _DTYPES:
        raise BadRequest(f"input {each.name}: {each.datatype[:40]!r} is no datatype known here")
    return _DTYPES[each.datatype]
