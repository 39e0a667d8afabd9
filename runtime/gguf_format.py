"""Reading the header of a GGUF file: metadata, and where each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian throughout:

    magic "GGUF" · version u32 · tensor count u64 · metadata count u64
    metadata:  key string · type u32 · value           (an array is: element type u32 · length u64 · elements)
    tensors:   name string · rank u32 · dims u64[rank], fastest first · type u32 · offset u64 from the data section
    padding to `general.alignment`, then the data section

`gguf.GGUFReader` makes a numpy view of every string, which takes seconds for a vocabulary; here the same 150 000 strings take
a tenth of one. What the tensor types mean (bytes per block, dequantisation) stays with the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from fusec.errors import UserError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF type -> struct code
LARGEST_RANK = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.  shape: row-major (slowest first).  kind: the ggml type's name, e.g. "Q4_K".
    start: byte offset in the file.  nbytes: stored size, quantised."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file.  metadata: key -> int, float, bool, str, or a list of these.  data: the whole file, mapped."""

    path: Path
    metadata: dict
    tensors: dict[str, TensorInfo]
    data: mmap.mmap


class _End(Exception):
    """The header runs past the end of the file."""


class _Cursor:
    """Reads values one after another, never past the end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise _End
        return start

    def number(self, code):
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def string(self):
        size = self.number("Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", "replace")

    def strings(self, count):
        """`count` strings: the one hot loop of opening a file, so it works on local names."""
        data, at, end, length, found = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if at + 8 > end:
                raise _End
            start = at + 8
            at = start + length(data, at)[0]
            if at > end:
                raise _End
            found.append(data[start:at].decode("utf-8", "replace"))
        self.at = at
        return found

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                return self.strings(count)
            code = self._code(kind)
            start = self.take(count * struct.calcsize(code))
            return list(struct.unpack_from(f"<{count}{code}", self.data, start))
        return self.number(self._code(kind))

    @staticmethod
    def _code(kind):
        if kind not in SCALARS:
            raise ValueError(f"a metadata value of unknown type {kind}")
        return SCALARS[kind]


def read_gguf(path) -> GGUFFile:
    """Opens a GGUF file (version 2 or 3, little-endian) and checks that every tensor lies inside it; reads no tensor data.

    Raises UserError if the file is missing, is not GGUF, is truncated, or is one part of a split model.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise UserError(f"{path} is no GGUF file", expected="a header of 24 bytes", found=f"a file of {size} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot open {path}", found=error.strerror) from None

    cursor = _Cursor(data)
    try:
        tensor_count, metadata_count = _read_preamble(cursor, path)
        metadata = {}
        for _ in range(metadata_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        tensors = _read_tensors(cursor, tensor_count, metadata, path)
    except _End:
        raise _truncated(path, "a complete header", f"the file ends after {len(data):,} bytes, inside the header") from None
    except ValueError as error:
        raise UserError(f"{path} has a damaged header", found=str(error), hint="download the file again") from None
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"{path} is one part of a split model",
            expected="a single .gguf file",
            found=f"part {metadata.get('split.no', 0) + 1} of {metadata['split.count']}",
            hint="merge the parts first: llama-gguf-split --merge FIRST_PART OUTPUT.gguf",
        )
    return GGUFFile(path, metadata, tensors, data)


def _read_preamble(cursor, path):
    """The two counts, after the magic and the version."""
    magic = cursor.data[cursor.take(4) : 4]
    if magic != MAGIC:
        raise UserError(f"{path} is no GGUF file", expected=f"it begins with {MAGIC!r}", found=repr(magic))
    version = cursor.number("I")
    if version not in (2, 3):
        found = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise UserError(f"cannot read {path}", expected="little-endian GGUF, version 2 or 3", found=found)
    return cursor.number("Q"), cursor.number("Q")


def _read_tensors(cursor, count, metadata, path):
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    entries = []
    for _ in range(count):
        name, rank = cursor.string(), cursor.number("I")
        if rank > LARGEST_RANK:
            raise ValueError(f"tensor {name} has {rank} dims, more than {LARGEST_RANK}")
        dims = tuple(cursor.number("Q") for _ in range(rank))
        entries.append((name, dims[::-1], cursor.number("I"), cursor.number("Q")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    section = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor {name} has unknown type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = 1
        for dim in shape:
            elements *= dim
        if name in tensors or elements == 0 or (shape[-1] if shape else 1) % block:
            raise ValueError(f"tensor {name} of shape {list(shape)} and type {kind.name} is repeated, empty or no whole blocks")
        tensors[name] = TensorInfo(name, shape, kind.name, section + offset, elements // block * block_bytes)
    last = max(tensors.values(), key=lambda tensor: tensor.start + tensor.nbytes, default=None)
    if last and last.start + last.nbytes > len(cursor.data):
        raise _truncated(path, f"{last.start + last.nbytes:,} bytes", f"{len(cursor.data):,} bytes")
    return tensors


def _truncated(path, expected, found):
    return UserError(f"{path} is truncated", expected=expected, found=found, hint="download the file again")
