"""Pickles are data: nothing in one is ever run, whatever it says."""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import torch_files
from helpers.torch_files import Call, Global
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tensorray.builder.checkpoint import CheckpointError, torch_file
from tensorray.builder.checkpoint.extents import whole
from tensorray.builder.checkpoint.tensor import FileTensor
from tensorray.builder.checkpoint.unpickle import UnsafePickleError, unpickle

FIXTURE = Path(__file__).parent / "fixtures" / "torch_saved.pt"

CALLED: list[Any] = []
HERE = __name__


def touch(*values: Any) -> None:
    """What a malicious pickle would call."""
    CALLED.append(values)


class Victim:
    """What a malicious pickle would set the state of."""

    def __setstate__(self, state: Any) -> None:
        CALLED.append(state)


@pytest.fixture(autouse=True)
def nothing_was_called(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Under its own name, so that an unpickler that imports would find what to call."""
    monkeypatch.setitem(sys.modules, "victim", sys.modules.get(HERE) or _this_module())
    CALLED.clear()
    yield
    assert CALLED == []


def _this_module() -> Any:
    import types

    module = types.ModuleType("victim")
    module.touch, module.Victim = touch, Victim  # type: ignore[attr-defined]
    return module


def state_dict(path: Path, content: bytes) -> dict[str, FileTensor]:
    path.write_bytes(content)
    return torch_file.state_dict(whole(path))


def values(tensor: FileTensor) -> Any:
    out = np.empty(tensor.shape, tensor.fetch(0, 0).dtype)
    tensor.read(out, slice(None), slice(None), False)
    return out


class _Reduced:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/never",)


ATTACKS: dict[str, tuple[Any, str]] = {
    "a function": (Call("victim.touch", 1), "'victim.touch'"),
    "os.system": (pickle.dumps(_Reduced(), 2), "system'"),
    "os.system, protocol 4": (pickle.dumps(_Reduced(), 4), "system'"),
    "eval": (Call("builtins.eval", "1+1"), "'builtins.eval'"),
    "python 2's eval": (Call("__builtin__.eval", "1+1"), "'__builtin__.eval'"),
    "getattr": (Call("builtins.getattr", Global("torch.Size"), "__class__"), "getattr'"),
    "a dotted name": (Global("torch.Size.__init__"), "'torch.Size.__init__'"),
    "a name inside an admitted one": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "'collections.OrderedDict.__init__'",
    ),
    "nested": (Call("torch.Size", (Call("victim.touch", 2),)), "'victim.touch'"),
    "a class": (Call("victim.Victim", new=True, state={"x": 1}), "'victim.Victim'"),
    "a loader": (Call("torch.load", "x"), "'torch.load'"),
    "a storage's bytes": (Call("torch.storage._load_from_bytes", b""), "_load_from_bytes'"),
    "a call of a name": (Call("torch.FloatStorage", 1), "calls 'torch.FloatStorage'"),
    "a call of text": (b"\x80\x02X\x02\x00\x00\x00hi)R.", "calls a str"),
    "a memo put back as a function": (b"\x80\x02]q\x00h\x00)R.", "calls a list"),
    "a state for a list": (b"\x80\x02]}b.", "the state of a list"),
    "a state for text": (b"\x80\x02X\x02\x00\x00\x00hi}b.", "the state of a str"),
    "INST": (b"(ivictim\ntouch\n.", "uses INST"),
    "OBJ": (b"(cvictim\ntouch\no.", "'victim.touch'"),
    "NEWOBJ_EX": (b"\x80\x04)}\x92.", "uses NEWOBJ_EX"),
    "an extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "a buffer": (b"\x80\x05\x97.", "uses NEXT_BUFFER"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_no_data_is_refused_by_name(name: str, tmp_path: Path) -> None:
    attack, message = ATTACKS[name]
    pickled = attack if isinstance(attack, bytes) else torch_files.encode({"weight": attack})
    with pytest.raises(UnsafePickleError) as caught:
        state_dict(tmp_path / "model.bin", torch_files.torch_bytes({}, pickled=pickled))
    assert message in str(caught.value)
    assert "nothing of it was run" in str(caught.value)


def test_the_victim_would_have_noticed() -> None:
    """The check of the checks: the standard library does call it."""
    pickle.loads(torch_files.encode(Call("victim.touch", 1)))
    assert CALLED == [(1,)]
    CALLED.clear()


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "an unknown memo": b"\x80\x02h\x07.",
    "a memo of nothing": b"\x80\x02q\x00.",
    "a length beyond the end": b"\x80\x02X\xff\xff\xff\x7fhi.",
    "a long length beyond the end": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fhi.",
    "no mark": b"\x80\x02}u.",
    "a mark as a value": b"\x80\x02(.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "a key without a value": b"\x80\x02}(K\x01u.",
    "a list that is none": b"\x80\x02}K\x01a.",
    "a strange persistent id": b"\x80\x02K\x01Q.",
    "a tensor of nothing": torch_files.encode(Call("torch._utils._rebuild_tensor_v2", 1)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error(name: str, tmp_path: Path) -> None:
    content = torch_files.torch_bytes({}, pickled=DAMAGED[name] or b"x")
    with pytest.raises(CheckpointError):
        state_dict(tmp_path / "model.bin", content)


def test_bombs_are_small_again(tmp_path: Path) -> None:
    """Dicts in dicts by reference, 2 ** 60 of them, which would take for ever; tuples 200,000 deep;
    itself in itself."""
    doubling = b"\x80\x02}q\x00"
    for i in range(60):
        doubling += b"}(" + _text("a") + _get(i) + _text("b") + _get(i) + b"uq" + bytes([i + 1])
    deep = b"\x80\x02)" + b"\x85" * 200_000
    itself = b"\x80\x02}q\x00(" + _text("a") + b"h\x00u"
    for pickled in (doubling, deep, itself):
        with pytest.raises(CheckpointError):
            state_dict(tmp_path / "bomb", torch_files.torch_bytes({}, pickled=pickled + b"."))


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _get(slot: int) -> bytes:
    return b"h" + bytes([slot])


SOUND = torch_files.encode(
    {"state_dict": {"a": np.ones((2, 3), np.float32), "b": Call("torch.Size", (1, 2))}, "n": 3}
)
EVIL = torch_files.encode({"a": Call("victim.touch", 1), "b": Call("builtins.eval", "1")})


@settings(max_examples=250)
@given(st.data())
def test_mutated_pickles_never_run(data: st.DataObject) -> None:
    """Bytes changed, cut out, doubled or spliced from an attack: a value or a CheckpointError."""
    content = bytearray(data.draw(st.sampled_from([SOUND, EVIL])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(at, min(len(content), at + 12)))
        new = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([bytes(content[at:end]) * 2, b"cvictim\ntouch\n", b")R", b"}b"]),
            )
        )
        content[at:end] = new
    check_harmless(bytes(content))


@settings(max_examples=300)
@given(st.binary(max_size=60))
@example(b"cvictim\ntouch\n)R.")
def test_random_pickles_never_run(content: bytes) -> None:
    check_harmless(b"\x80\x02" + content + b".")


def check_harmless(content: bytes) -> None:
    makers = {**torch_file.MAKERS, "torch._utils._rebuild_tensor_v2": lambda *a: list(a)}
    with contextlib.suppress(CheckpointError):
        unpickle(content, "fuzz", makers, torch_file.NAMES, lambda key: ["storage", key])
    assert CALLED == []


# --- the archive around it --------------------------------------------------------------------


WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def test_archives_that_lie(tmp_path: Path) -> None:
    sound = torch_files.torch_bytes(WEIGHTS)
    assert set(state_dict(tmp_path / "sound", sound)) == {"a", "b"}
    first = torch_files.local_header_offset(sound, "archive/data/0")
    overlapping = torch_files.point_entry_at(sound, "archive/data/1", first)
    with pytest.raises(CheckpointError, match="overlaps"):
        state_dict(tmp_path / "overlapping", overlapping)
    with pytest.raises(CheckpointError, match="truncated"):
        state_dict(tmp_path / "cut", sound[:-40])
    packed = tmp_path / "packed"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.state_dict(whole(packed))
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # how files began before the archives
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        state_dict(tmp_path / "old", old)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (2, 2), (1, 1), "strides"),
        (0, (9,), (1,), "truncated"),
        (-1, (2,), (1,), "damaged"),
        (1 << 60, (2,), (1,), "damaged"),
        (0, (2,), (2, 1), "damaged"),
        (0, (True,), (1,), "damaged"),
    ],
)
def test_tensors_that_are_not_in_their_storage(
    offset: int, shape: Any, strides: Any, message: str, tmp_path: Path
) -> None:
    sound = torch_files.encode({"a": np.zeros(4, np.float32)}, [])
    own = torch_files.encode((0, (4,), (1,), False))[3:-2]
    new = torch_files.encode((offset, shape, strides, False))[3:-2]
    assert own in sound
    content = torch_files.torch_bytes(
        {"a": np.zeros(4, np.float32)}, pickled=sound.replace(own, new)
    )
    with pytest.raises(CheckpointError, match=message):
        state_dict(tmp_path / "model.bin", content)


def test_a_file_that_torch_wrote() -> None:
    """Of PyTorch 2.13: a module's state in every dtype, a view, a transpose, a parameter."""
    tensors = torch_file.state_dict(whole(FIXTURE))
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(values(tensors["a"]), grid)
    np.testing.assert_array_equal(values(tensors["d"]), grid.T)
    np.testing.assert_array_equal(values(tensors["e"]), grid[1])
    np.testing.assert_array_equal(values(tensors["b"]).astype(np.float32), np.ones(4))
    np.testing.assert_array_equal(values(tensors["f8"]).astype(np.float32), np.ones(3))
    assert values(tensors["s"]) == [5]
    assert values(tensors["c"]).shape == (2,)
    assert "_extra_state" not in tensors
