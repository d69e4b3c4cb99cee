"""The safetensors writer against the library's reader; streaming; what is flushed."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat import durable


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_librarys_reader_returns_every_dtype_and_layout_bit_for_bit(tmp_path: Path) -> None:
    noise = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3
    tensors = {str(dtype): noise.to(dtype) for dtype in durable.DTYPES}
    tensors |= {
        "transposed": noise.t(),
        "strided": noise[::2, 1:4],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "needs grad": torch.nn.Parameter(noise),
        "Ünï": torch.ones(1),
    }
    durable.write(tmp_path / "t", durable.safetensors(tensors))
    loaded = load_file(tmp_path / "t")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded[name]) == bits(tensor.detach()), name


def test_no_tensors_is_a_file_too(tmp_path: Path) -> None:
    durable.write(tmp_path / "t", durable.safetensors({}))
    assert load_file(tmp_path / "t") == {}


def test_a_dtype_outside_the_format_is_refused() -> None:
    with pytest.raises(KeyError, match="complex64"):
        list(durable.safetensors({"z": torch.zeros(1, dtype=torch.complex64)}))


def test_data_is_aligned_for_the_memory_map() -> None:
    header, *_ = durable.safetensors({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.int64)})
    assert len(header) % 8 == 0
    assert b'"b": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}' in bytes(header)


def test_tensors_are_copied_one_at_a_time_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK", 16)
    tensors = {"a": torch.zeros(6), "b": torch.zeros(6)}
    chunks = durable.safetensors(tensors)
    next(chunks)  # the header
    first = [bytes(next(chunks)), bytes(next(chunks))]
    tensors["b"].fill_(1.0)  # seen only if b was not copied along with the header or a
    second = [bytes(chunk) for chunk in chunks]
    assert [len(chunk) for chunk in first + second] == [16, 8, 16, 8]
    assert b"".join(first) == bytes(24)
    assert b"".join(second) == bits(torch.ones(6))


def test_write_reports_what_is_in_the_file_and_flushes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: dict[str, int] = {}

    def fsync(descriptor: int) -> None:
        flushed[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "file"
    assert durable.write(path, [b"ab", memoryview(b"c")]) == {
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }
    assert path.read_bytes() == b"abc"
    assert durable.sha256(path) == hashlib.sha256(b"abc").hexdigest()
    durable.sync(tmp_path)
    assert flushed.keys() == {str(path), str(tmp_path)}
    assert flushed[str(path)] == 3  # nothing was still in Python's buffer
