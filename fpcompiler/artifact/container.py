"""The zip container: members stored as they are, each at a multiple of 64 bytes in the file.

Any zip tool can list and unpack it. Reading is stricter than a zip tool: apart from the members'
data there is exactly one way to write an artifact, and a file whose other bytes differ from it is
refused. So nothing can hide between the members, and no two parsers can disagree about the file.
All members use the zip64 fields, which makes the layout the same for small and for large ones.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final, TypeAlias

from fpcompiler.artifact.damage import DamagedFileError

ALIGNMENT: Final = 64
"""Members start at a multiple of this: a cache line, and the alignment of torch's own memory."""

MAX_MEMBERS: Final = 4096
"""A file that claims more members is refused before they are read."""

Buffer: TypeAlias = bytes | bytearray | memoryview

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END: Final = struct.Struct("<4s4H2LH")
_SIZES64: Final = struct.Struct("<2H2Q")
_PLACE64: Final = struct.Struct("<2H3Q")
_PADDING: Final = struct.Struct("<3H")
_PADDING_ID: Final = 0xD935  # The one that Android's zipalign uses.
_VERSION: Final = 45  # The first version of the zip format with zip64.
_MADE_BY: Final = (3 << 8) | _VERSION
_DATE: Final = 0x21  # 1980-01-01: the same model gives the same bytes.
_MODE: Final = 0o100644 << 16
_IN_EXTRA: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One member: where it stands in the file.

    Attributes:
        name: Its name.
        header: Offset of its local header.
        offset: Offset of its data.
        size: Bytes of its data.
        crc: CRC-32 of its data, which other zip tools want; integrity rests on SHA-256.
        sha256: SHA-256 of its data in hex; empty for an entry that was read from a file.
    """

    name: str
    header: int
    offset: int
    size: int
    crc: int
    sha256: str = ""


class Writer:
    """Writes members one after the other; memory for one piece of data at a time is enough."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.entries: list[Entry] = []

    def add(self, name: str, pieces: Iterable[Buffer]) -> Entry:
        """Write one member whose data comes in pieces."""
        header = self._file.tell()
        blank = Entry(name, header, _data_offset(header, name), 0, 0)
        self._file.write(_local_header(blank))
        sha, crc, size = hashlib.sha256(), 0, 0
        for piece in pieces:
            sha.update(piece)
            crc = zlib.crc32(piece, crc)
            size += len(piece)
            self._file.write(piece)
        entry = Entry(name, header, blank.offset, size, crc, sha.hexdigest())
        end = self._file.tell()
        self._file.seek(header)
        self._file.write(_local_header(entry))
        self._file.seek(end)
        self.entries.append(entry)
        return entry

    def close(self, comment: bytes) -> None:
        """Write the directory of the members."""
        self._file.write(_directory(self.entries, self._file.tell(), comment))


def read_directory(view: memoryview) -> tuple[list[Entry], bytes]:
    """Return the members that a zip file lists, and its comment.

    Raises:
        DamagedFileError: If it is no whole zip file, or a member is compressed, encrypted, listed
            twice, or not within the file.
    """
    count, start, size, comment = _read_end(view)
    if count > MAX_MEMBERS:
        raise DamagedFileError(f"it claims to have {count} members; no artifact has as many.")
    entries: list[Entry] = []
    position = start
    for _ in range(count):
        entry, position = _read_entry(view, position, start + size)
        entries.append(entry)
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DamagedFileError(f"the member {twice[0]!r} is there twice.")
    return entries, comment


def check_layout(view: memoryview, entries: Sequence[Entry], comment: bytes) -> None:
    """Check every byte of the file that is not data of a member.

    Raises:
        DamagedFileError: If one differs from what :class:`Writer` writes.
    """
    position = 0
    for entry in entries:
        expected = _local_header(entry) if entry.header == position else b""
        if not expected or view[position : entry.offset] != expected:
            raise DamagedFileError(
                f"the zip header of {entry.name!r} is not as fpcompiler writes it: the file is "
                "damaged, or another program packed it again."
            )
        position = entry.offset + entry.size
    if view[position:] != _directory(entries, position, comment):
        raise DamagedFileError(
            "the zip directory is not as fpcompiler writes it: the file is damaged, or another "
            "program packed it again."
        )


def _data_offset(header: int, name: str) -> int:
    least = header + _LOCAL.size + len(name.encode()) + _SIZES64.size + _PADDING.size
    return -(-least // ALIGNMENT) * ALIGNMENT


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    extra = entry.offset - entry.header - _LOCAL.size - len(name)
    padding = extra - _SIZES64.size - _PADDING.size
    if not 0 <= padding < ALIGNMENT or entry.offset % ALIGNMENT:
        return b""
    fields = (0, 0, 0, _DATE, entry.crc, _IN_EXTRA, _IN_EXTRA, len(name), extra)
    return b"".join(
        (
            _LOCAL.pack(b"PK\3\4", _VERSION, *fields),
            name,
            _SIZES64.pack(1, 16, entry.size, entry.size),
            _PADDING.pack(_PADDING_ID, 2 + padding, ALIGNMENT),
            bytes(padding),
        )
    )


def _directory(entries: Sequence[Entry], start: int, comment: bytes) -> bytes:
    rows = b"".join(_central_header(entry) for entry in entries)
    end64 = start + len(rows)
    count, small = len(entries), min(len(entries), 0xFFFF)
    return b"".join(
        (
            rows,
            _END64.pack(b"PK\6\6", 44, _MADE_BY, _VERSION, 0, 0, count, count, len(rows), start),
            _LOCATOR.pack(b"PK\6\7", 0, end64, 1),
            _END.pack(b"PK\5\6", 0, 0, small, small, _IN_EXTRA, _IN_EXTRA, len(comment)),
            comment,
        )
    )


def _central_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    return b"".join(
        (
            _CENTRAL.pack(
                b"PK\1\2", _MADE_BY, _VERSION, 0, 0, 0, _DATE, entry.crc, _IN_EXTRA, _IN_EXTRA,
                len(name), _PLACE64.size, 0, 0, 0, _MODE, _IN_EXTRA,
            ),
            name,
            _PLACE64.pack(1, 24, entry.size, entry.size, entry.header),
        )
    )  # fmt: skip


def _read_end(view: memoryview) -> tuple[int, int, int, bytes]:
    """Return the number of members, offset and size of the directory, and the comment."""
    tail = bytes(view[-(_END.size + 0xFFFF) :])
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise DamagedFileError("the end of the zip file is missing: the file is truncated.")
    _, _, _, _, count, size, start, length = _END.unpack_from(tail, at)
    comment = tail[at + _END.size :]
    if len(comment) != length:
        more = len(comment) - length
        what = f"{more} bytes follow its end" if more > 0 else "the file is truncated"
        raise DamagedFileError(f"{what}; an artifact ends with its checksum.")
    end = len(view) - len(tail) + at
    if _IN_EXTRA in (size, start):
        _, _, place, _ = _unpack(_LOCATOR, b"PK\6\7", view, end - _LOCATOR.size)
        fields = _unpack(_END64, b"PK\6\6", view, place)
        count, size, start = fields[7], fields[8], fields[9]
    if start + size > end:
        raise DamagedFileError("the zip directory is not within the file: the file is damaged.")
    return count, start, size, comment


def _read_entry(view: memoryview, position: int, end: int) -> tuple[Entry, int]:
    fields = _unpack(_CENTRAL, b"PK\1\2", view, position)
    flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
    position += _CENTRAL.size
    after = position + name_size + extra_size + comment_size
    if after > end:
        raise DamagedFileError("the zip directory is cut off: the file is damaged.")
    name = bytes(view[position : position + name_size]).decode("utf-8", "replace")
    extra = bytes(view[position + name_size : position + name_size + extra_size])
    large = _large_fields(extra)
    size, packed, header = (
        next(large, _IN_EXTRA) if field == _IN_EXTRA else field for field in (size, packed, header)
    )
    if flags & 0x2041:
        raise DamagedFileError(f"the member {name!r} is encrypted; artifacts never are.")
    if method != 0 or size != packed:
        raise DamagedFileError(
            f"the member {name!r} is compressed; artifacts are stored as they are."
        )
    local = _unpack(_LOCAL, b"PK\3\4", view, header)
    offset = header + _LOCAL.size + local[9] + local[10]
    if offset + size > len(view):
        raise DamagedFileError(f"the member {name!r} is not within the file: the file is damaged.")
    return Entry(name, header, offset, size, crc), after


def _large_fields(extra: bytes) -> Iterator[int]:
    """Yield the 64-bit fields of the zip64 extra field, if there is one."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            field = extra[position : position + size]
            for start in range(0, len(field) - 7, 8):
                yield int.from_bytes(field[start : start + 8], "little")
            return
        position += size


def _unpack(form: struct.Struct, magic: bytes, view: memoryview, position: int) -> tuple[int, ...]:
    """Return the fields at a position (the first one is the magic, as 0)."""
    if not 0 <= position <= len(view) - form.size:
        raise DamagedFileError("a zip header is not within the file: the file is damaged.")
    signature, *fields = form.unpack_from(view, position)
    if signature != magic:
        raise DamagedFileError("a zip header is missing: the file is damaged.")
    return (0, *fields)
