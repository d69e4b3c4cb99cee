"""Codecs and master weights: what goes in comes out, to the rounding of what is stored."""

import dataclasses

import pytest
import torch

from nvfp8.rounding import draw
from nvfp8.state import MASTERS, STATE_DTYPES, codec, codec_of, master, read_weight, write_weight


def test_every_bf16_value_survives_a_round_trip_through_bf16_and_fp32() -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[values.isfinite()].float()
    for name in ("bf16", "fp32"):
        c = codec(name)
        stored = c.allocate(values.shape, "cpu")
        c.encode_(stored, values, None)
        decoded = c.decode(stored)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, values)


def test_bf16_rounds_to_nearest_even() -> None:
    c = codec("bf16")
    stored = c.allocate((3,), "cpu")
    c.encode_(stored, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]), None)  # ties to even, then above a tie
    assert c.decode(stored).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_state_starts_as_zeros_of_the_codecs_dtype() -> None:
    for name, dtype in STATE_DTYPES.items():
        stored = codec(name).allocate((2, 3), "cpu")
        assert stored.data.dtype == dtype
        assert torch.equal(codec(name).decode(stored), torch.zeros(2, 3))


def test_blocks_of_128_have_scales_and_every_tensor_of_a_stack_has_its_own() -> None:
    assert codec("bf16").allocate((3, 100), "cpu").scale is None
    alone, stack = codec("e4m3").allocate((3, 100), "cpu"), codec("e4m3").allocate((3, 10, 20), "cpu", stacked=True)
    assert alone.scale is not None and alone.scale.shape == (3,)
    assert stack.scale is not None and stack.scale.shape == (3, 2)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_the_smallest_code_is_what_no_stored_number_is_below(name: str) -> None:
    c = codec(name)
    stored = c.allocate((3, 100), "cpu")
    value = torch.logspace(-30, 0, 300).view(3, 100) * torch.tensor([[1.0], [-1e3], [1e-3]])
    c.encode_(stored, value, draw(value, 1))
    least, decoded = c.smallest(stored), c.decode(stored).abs()
    assert least is not None and least.shape == (3, 100)
    assert torch.equal(torch.unique(torch.sign(decoded - least * 0.999)), torch.tensor([-1.0, 1.0]))  # zeros, and the rest
    assert (decoded[decoded > 0] >= 0.999 * least[decoded > 0]).all()
    assert codec("bf16").smallest(codec("bf16").allocate((3,), "cpu")) is None


def test_an_unknown_codec_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'fp9'.*fp32, bf16"):
        codec("fp9")
    with pytest.raises(ValueError, match=r"float16.*float32.*bfloat16"):
        codec_of(torch.float16)


def test_a_codec_is_found_by_dtype_and_is_frozen() -> None:
    for name, dtype in STATE_DTYPES.items():
        assert codec_of(dtype) == codec(name)
        assert codec_of(dtype, second_moment=True) == codec(name, second_moment=True)
    assert not codec("e4m3").root and codec("e4m3", second_moment=True).root and not codec("bf16", second_moment=True).root
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec("bf16").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 128)])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_keeps_shapes_and_the_sign_of_the_error_is_a_coin(name: str, shape: tuple[int, ...]) -> None:
    c, value = codec(name), torch.rand(shape) + 0.5
    stored = c.allocate(shape, "cpu")
    total = torch.zeros(shape)
    for key in range(300):
        c.encode_(stored, value, draw(value, key * 7919))
        assert c.decode(stored).shape == value.shape
        total += c.decode(stored)
    assert ((total / 300 - value).abs() < 0.02 if name == "e4m3" else (total / 300 - value).abs() < 0.04).all()


@pytest.mark.parametrize("name", MASTERS)
def test_a_weight_is_what_it_and_its_master_make(name: str) -> None:
    value = torch.randn(40, 3) * 3
    weight = torch.zeros(40, 3, dtype=torch.bfloat16)
    rest = master(name).allocate(weight)
    assert torch.equal(read_weight(weight, rest), torch.zeros(40, 3))
    for key in (None, 5):
        write_weight(weight, rest, value, None if key is None else draw(value, key))
        bits = {"fp32": 24, "bf16": 8, "bf16+8": 16, "bf16+16": 24}[name]
        bound = value.abs() * (0.0 if bits == 24 else 2.0 ** (1 - bits))
        assert ((read_weight(weight, rest) - value).abs() <= bound).all()
    if name != "bf16":  # the weight alone is the nearest bf16, whatever is drawn
        assert ((weight.float() - value).abs() <= value.abs() * (2**-8 + 2**-15)).all()
    whole = torch.zeros(40, 3)
    assert master(name).allocate(whole) is None
    write_weight(whole, None, value, draw(value, 5))
    assert torch.equal(read_weight(whole, None), value)


def test_a_weight_that_is_not_a_number_shows_in_bf16() -> None:
    bad = torch.tensor([0x7FFFFFFF, -1, 0x7F800000], dtype=torch.int32).view(torch.float32)  # what GPUs make; NaN; inf
    for name in MASTERS:
        for key in (None, 5):
            weight = torch.zeros(3, dtype=torch.bfloat16)
            write_weight(weight, rest := master(name).allocate(weight), bad, None if key is None else draw(bad, key))
            assert not weight.isfinite().any() and not read_weight(weight, rest).isfinite().any()
