"""Files that are on the disk when the call returns, written as they are hashed.

A checkpoint's promise rests on three things that `open().write()` does not give: the data is flushed to the disk
before a rename makes it visible, the directory that holds the new name is flushed too, and the checksum is that of
the bytes sent, not of a second reading. Tensors go out in the safetensors format by our own short writer, because the
library's wants all of them in CPU memory at once; ours copies one tensor at a time from wherever it lives.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 16 << 20  # bytes written and hashed at a time: bounds nothing but the latency of an error
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: u64 header length, JSON header, data.

    Args:
        tensors: any shapes, strides and devices, dtypes of `DTYPES`; one at a time is copied to CPU memory.

    Raises:
        KeyError: a dtype the format does not have.
    """
    # Widest elements first and a header padded to 8 bytes keep every tensor aligned in the reader's memory map.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        flat = tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data
        for at in range(0, len(flat), CHUNK):
            yield flat[at : at + CHUNK]


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write `chunks` to a new file, flush it to the disk, and return {"bytes": size, "sha256": hex digest}.

    Raises:
        OSError: as the system reports it; what was written so far is left behind.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync(directory: Path) -> None:
    """Flush a directory, that is the names in it.

    Raises:
        OSError: as the system reports it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hex digest of a file, read in small pieces.

    Raises:
        OSError: as the system reports it.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
