"""Codecs: what goes in comes out, to the rounding of the stored dtype."""

import dataclasses

import pytest
import torch

from nvfp8.state import codec, codec_of


def test_every_bf16_value_survives_a_round_trip_through_bf16_and_fp32() -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[values.isfinite()].float()
    for name in ("bf16", "fp32"):
        c = codec(name)
        stored = c.allocate(values.shape, "cpu")
        c.encode_(stored, values)
        decoded = c.decode(stored)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, values)


def test_bf16_rounds_to_nearest_even() -> None:
    c = codec("bf16")
    stored = c.allocate((3,), "cpu")
    c.encode_(stored, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]))  # ties to even, then above a tie
    assert c.decode(stored).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_state_starts_as_zeros_of_the_codecs_dtype() -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stored = codec(name).allocate((2, 3), "cpu")
        assert stored.dtype == dtype
        assert torch.equal(codec(name).decode(stored), torch.zeros(2, 3))


def test_an_unknown_codec_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'fp9'.*fp32, bf16"):
        codec("fp9")
    with pytest.raises(ValueError, match=r"float16.*float32.*bfloat16"):
        codec_of(torch.float16)


def test_a_codec_is_found_by_dtype_and_is_frozen() -> None:
    assert codec_of(torch.bfloat16) is codec("bf16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec("bf16").name = "other"  # type: ignore[misc]
