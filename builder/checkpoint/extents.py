"""Where a checkpoint's files lie: in a directory, or inside a tar archive, read in place.

Either way a file is an `Extent`, a range of bytes, so that an archive is never unpacked.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.tensor import DataFile

_MAX_FILES = 1_000_000
_MAX_JSON = 64 << 20


class TransientFile(DataFile):
    """A file that is open only while it is read: there may be more than a process can have open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.close()

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        opened = DataFile(self.path)
        try:
            return opened.read(offset, count)
        finally:
            opened.close()


@dataclass(frozen=True)
class Extent:
    """`size` bytes of a file from `start` on; `where` names them in messages."""

    file: DataFile
    start: int
    size: int
    where: str

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of the extent; raises CheckpointError if they are not all in it."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                f"{self.where}: truncated: bytes {offset} to {offset + count} are wanted, of "
                f"{self.size}; copy or download it again"
            )
        return self.file.read(self.start + offset, count).tobytes()

    def part(self, offset: int, size: int) -> Extent:
        """A range of the extent, checked to be in it."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(
                f"{self.where}: truncated: bytes {offset} to {offset + size} are wanted, of "
                f"{self.size}; copy or download it again"
            )
        return Extent(self.file, self.start + offset, size, self.where)

    def json(self) -> dict[str, Any]:
        """The JSON object it holds; raises CheckpointError if it isn't one."""
        if self.size > _MAX_JSON:
            raise CheckpointError(f"{self.where}: {self.size} bytes of JSON")
        try:
            value = json.loads(self.read(0, self.size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.where}: not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: a JSON object was expected")
        return value


def whole(path: Path) -> Extent:
    """A file as one extent."""
    file = TransientFile(path)
    return Extent(file, 0, file.size, str(path))


class ExtentReader(io.RawIOBase):
    """An extent as a seekable binary stream, for libraries that want one."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._extent.size}[whence]
        if base + offset < 0:
            raise OSError("negative seek position")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = max(0, min(len(view), self._extent.size - self._at))
        view[:count] = self._extent.read(self._at, count)
        self._at += count
        return count


def list_files(path: Path) -> dict[str, Extent]:
    """The files under a directory, or in an uncompressed tar archive, by their paths in it.

    Raises CheckpointError for what is neither, for compressed archives (whose tensors can't be read
    in place), and for archives that name a file twice.
    """
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return {file.relative_to(path).as_posix(): whole(file) for file in files}
    return _archive(path)


def _archive(path: Path) -> dict[str, Extent]:
    extent = whole(path)
    if extent.size >= 2 and extent.read(0, 2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
        raise CheckpointError(
            f"{path}: a compressed archive, whose tensors can't be read in place; unpack it "
            f"(mkdir DIR && tar xf {path.name} -C DIR) and give the directory"
        )
    found: dict[str, Extent] = {}
    try:
        with tarfile.open(fileobj=io.BufferedReader(ExtentReader(extent)), mode="r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue  # directories; a link's target is a member as well
                name = member.name.removeprefix("./")
                if name in found or len(found) >= _MAX_FILES:
                    raise CheckpointError(f"{path}: a damaged archive: {name!r} is in it twice")
                part = extent.part(member.offset_data, member.size)
                found[name] = Extent(part.file, part.start, part.size, f"{path}: {name}")
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a tar archive: {error}") from error
    return found
