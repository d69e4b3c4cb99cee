"""Stochastic rounding, block scales and split weights: every FP8 code, adversarial blocks, and what nearest rounding does."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nvfp8 import rounding
from nvfp8.rounding import (
    BLOCK,
    FORMATS,
    decode,
    draw,
    encode,
    join,
    key,
    keys,
    random_bits,
    split,
    spread,
    square_root,
    three,
    to_grid,
    uniform,
)

DTYPES = list(FORMATS)


def codes(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a format, ascending, fp32."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()].sort().values


def bits(count: int, seed: int = 0) -> Tensor:
    return random_bits(torch.arange(count), key(seed, 1, 2, 3))


def test_bits_are_uniform_and_independent_of_each_other() -> None:
    bits = random_bits(torch.arange(1 << 18), key(7, 0, 0, 0))
    assert bits.unique().numel() > (1 << 18) - 60  # 8 collisions are expected of 2^18 draws out of 2^32
    for position in range(32):
        assert abs(float((bits >> position & 1).float().mean()) - 0.5) < 0.005
    other = random_bits(torch.arange(1 << 18), key(7, 1, 0, 0))
    assert abs(float(torch.corrcoef(torch.stack((uniform(bits), uniform(other))))[0, 1])) < 0.01
    assert (
        len(
            {
                key(seed, step, tensor, purpose)
                for seed in range(4)
                for step in range(50)
                for tensor in range(20)
                for purpose in range(3)
            }
        )
        == 12000
    )


def test_python_and_tensor_hash_alike() -> None:
    index, k = torch.arange(100), key(1, 2, 3, 4)
    assert random_bits(index, k).tolist() == [rounding.mix(i * 0x9E3779B1 + k) for i in range(100)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_its_own_rounding(dtype: torch.dtype) -> None:
    values = codes(dtype)
    for how in (None, torch.zeros_like(values).long(), torch.full_like(values, 2**32 - 1, dtype=torch.int64)):
        assert torch.equal(to_grid(values, dtype, how), values)
    roots = values.clamp_min(0)
    assert torch.equal(to_grid(roots, dtype, torch.full_like(roots, 2**32 - 1, dtype=torch.int64), squared=True), roots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("squared", [False, True])
def test_between_two_codes_the_mean_is_kept(dtype: torch.dtype, part: float, squared: bool) -> None:
    values = codes(dtype).clamp_min(0).unique()[1 if squared else 0 :]  # what is squared never falls to 0
    low, high = values[:-1], values[1:]
    between = (low + (high - low) * part)[:, None].expand(-1, 4000)
    drawn = to_grid(between.flatten(), dtype, bits(between.numel()), squared).view_as(between)
    assert ((drawn == low[:, None]) | (drawn == high[:, None])).all()
    power = 2 if squared else 1
    width = high.double() ** power - low.double() ** power
    error = (drawn.double() ** power).mean(1) - between[:, 0].double() ** power
    assert (error.abs() < 5 * width * 0.5 / math.sqrt(4000)).all()  # five standard deviations of a coin
    signed = to_grid(-between.flatten(), dtype, bits(between.numel()), squared)
    assert torch.equal(signed, -drawn.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_root_never_becomes_0_and_other_numbers_do(dtype: torch.dtype) -> None:
    first = codes(dtype).clamp_min(0).unique()[1]
    values = torch.cat((torch.logspace(-30, 0, 500) * first * 0.999, torch.zeros(1)))
    for drawn in (torch.zeros(501).long(), torch.full((501,), 2**32 - 1)):
        assert torch.equal(to_grid(values, dtype, drawn, squared=True) > 0, values > 0)
    assert (to_grid(values, dtype, torch.zeros(501).long())[:400] == 0).all()
    # Beside a value that holds the scale: its second moment is kept, however small, if fp32 can hold it.
    block = torch.cat((torch.ones(1), torch.logspace(-30, 0, BLOCK - 1)))
    assert (decode(*encode(block, dtype, bits(BLOCK), root=True), root=True) > 0).all()


def assert_uniform_and_pairwise_independent(parts: Sequence[Tensor]) -> None:
    """Of 2^18 draws each, by their 16 upper bits; all equal, or one a simple function of another, would show."""
    for part in parts:
        upper = part >> 16
        assert upper.unique().numel() > 0.97 * 65536  # 98.2 % of 2^16 values are expected
        for position in range(16):
            assert abs(float((upper >> position & 1).float().mean()) - 0.5) < 0.005
    for one, other in itertools.combinations(parts, 2):
        table = torch.zeros(64, 64)  # by their six upper bits: 64 a cell, ± 8
        table.view(-1).index_add_(0, (one >> 26) * 64 + (other >> 26), torch.ones(1 << 18))
        chi_squared = float((table - 64).square().sum() / 64)
        assert abs(chi_squared - 4095) < 5 * (2 * 4095) ** 0.5


def test_one_draw_gives_three_that_are_pairwise_independent() -> None:
    assert_uniform_and_pairwise_independent(three(random_bits(torch.arange(1 << 18), key(3, 0, 0, 0))))


def test_four_neighbours_share_a_hash_and_are_pairwise_independent() -> None:
    drawn = draw(torch.zeros(1 << 20), key(3, 0, 0, 0))
    assert_uniform_and_pairwise_independent(drawn.view(-1, 4).unbind(1))
    # What rounds four neighbours' moments and weights: all twelve.
    assert_uniform_and_pairwise_independent([part for parts in three(drawn) for part in parts.view(-1, 4).unbind(1)])
    assert torch.equal(drawn[::4], random_bits(torch.arange(1 << 18), key(3, 0, 0, 0)))
    assert torch.equal(draw(torch.zeros(3, 7), 5).flatten(), draw(torch.zeros(40), 5)[:21]), "an element's place alone decides"


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_pytorchs_but_for_ties(dtype: torch.dtype) -> None:
    values = torch.randn(20_000) * torch.logspace(-4, 2, 20_000)
    values = values.clamp(-FORMATS[dtype][2], FORMATS[dtype][2])
    assert torch.equal(to_grid(values, dtype, None), values.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_visible(dtype: torch.dtype) -> None:
    values = torch.ones(2 * BLOCK)
    values[3], values[BLOCK + 1] = torch.nan, torch.inf
    stored, scale = encode(values, dtype, bits(len(values)), root=False)
    back = decode(stored, scale, root=False)
    assert not back[:BLOCK].isfinite().all() and not back[BLOCK:].isfinite().all()


BLOCKS = {
    "one outlier": torch.cat((torch.full((BLOCK - 1,), 1e-3), torch.tensor([7.0]))),
    "all equal": torch.full((BLOCK,), 0.37),
    "zero": torch.zeros(BLOCK),
    "denormal": torch.full((BLOCK,), 1e-40),
    "wide": torch.logspace(-12, 3, BLOCK),
    "a part of a block": torch.linspace(0.1, 1, 37),
    "largest": torch.full((BLOCK,), 3e38),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("root", [False, True])
def test_adversarial_blocks(name: str, dtype: torch.dtype, root: bool) -> None:
    value = BLOCKS[name]
    stored, scale = encode(value, dtype, bits(len(value)), root)
    back = decode(stored, scale, root)
    assert back.isfinite().all() and len(scale) == -(-len(value) // BLOCK)
    smallest, mantissa, largest = FORMATS[dtype]
    kept = square_root(value) if root else value
    step = torch.maximum(kept * 2.0**-mantissa, kept.max() / largest * 2.0 ** (smallest - mantissa))
    below, above = (kept - step).clamp_min(0), kept + step
    if name == "denormal" and not root:
        assert (back == 0).all()  # a scale for it would be no normal number
    elif root:
        assert ((back.sqrt() >= below * 0.999) & (back.sqrt() <= above * 1.001)).all()
    else:
        assert ((back >= below * 0.999) & (back <= above * 1.001)).all()


def test_the_root_of_no_other_number_than_0_is_0() -> None:
    value = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 4.0, torch.inf, torch.nan])
    assert square_root(value)[:-1].tolist() == [0.0, 2.0**-63, 2.0**-63, 2.0**-63, 2.0, math.inf] and square_root(value)[-1].isnan()


def ema(dtype: torch.dtype | None, beta: float, root: bool, stochastic: bool, start: float, steps: int) -> float:
    """How far an average of zeros has fallen, beside a value that holds the block's scale; 1 is where exact math is."""
    value = torch.full((BLOCK,), start)
    value[0] = 1.0
    for step in range(steps):
        if dtype is not None:
            drawn = random_bits(torch.arange(BLOCK), key(0, step, 0, 0)) if stochastic else None
            value = decode(*encode(value, dtype, drawn, root), root)
        value[1:] *= beta
    return float(value[1:].mean() / (start * beta**steps))


def test_a_nearest_rounded_average_freezes_and_a_stochastic_one_does_not() -> None:
    """What the traps of this project saw: E4M3 at 0.97 stays 6.9 times too large after 66 steps, E5M2 at 0.995 3.4 times."""
    assert ema(torch.float8_e4m3fn, 0.97, False, False, 0.3, 66) > 5
    assert abs(ema(torch.float8_e4m3fn, 0.97, False, True, 0.3, 66) - 1) < 0.1
    assert ema(torch.float8_e5m2, 0.995, False, False, 0.3, 250) > 3
    assert abs(ema(torch.float8_e5m2, 0.995, False, True, 0.3, 250) - 1) < 0.25
    # Second moments as roots, in E4M3.
    assert ema(torch.float8_e4m3fn, 0.995, True, False, 0.3, 250) > 3
    assert abs(ema(torch.float8_e4m3fn, 0.995, True, True, 0.3, 250) - 1) < 0.15


REMAINDERS = [None, torch.int8, torch.int16]


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_split_weights_are_the_nearest_bf16_and_join_again(remainder: torch.dtype | None) -> None:
    value = torch.randn(50_000) * torch.logspace(-30, 30, 50_000)
    value[:3] = torch.tensor([0.0, -0.0, 1.0 + 2**-8])
    weight, rest = split(value, remainder, random_bits(torch.arange(len(value)), 5))
    back = join(weight, rest)
    kept = {None: 8, torch.int8: 16, torch.int16: 24}[remainder]  # bits of mantissa, the leading one included
    assert ((back - value).abs() <= value.abs() * 2.0 ** (1 - kept)).all()
    if remainder is torch.int16:
        assert torch.equal(back.view(torch.int32), value.view(torch.int32))
    if remainder is not None:
        near = value.bfloat16().float()
        assert ((weight.float() - value).abs() <= (near - value).abs() * 1.02 + value.abs() * 2.0**-16).all()


@pytest.mark.parametrize("remainder", REMAINDERS[1:])
def test_a_weight_that_was_set_to_0_is_0_whatever_was_beside_it(remainder: torch.dtype) -> None:
    value = torch.randn(1000)
    weight, rest = split(value, remainder, random_bits(torch.arange(1000), 5))
    weight[:400], weight[400:800] = 0.0, -0.0
    back = join(weight, rest)
    # Below 2^-126 · 2^-7, where fp32 has no more than what is left beside a 0.
    assert rest[:800].min() < 0 and (back[:800].abs() < 2.0**-133).all() and torch.equal(back[800:], join(weight[800:], rest[800:]))
    again, beside = split(back, remainder, random_bits(torch.arange(1000), 6))
    assert torch.equal(join(again, beside), back)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_an_update_far_below_bf16s_spacing_survives(remainder: torch.dtype | None) -> None:
    """10,000 steps of 2^-20 on a weight of 1, whose spacing is 2^-7: rounded to nearest bf16 it would not move."""
    weight, rest = split(torch.ones(512), remainder, None)
    nearest = torch.ones(512, dtype=torch.bfloat16)
    exact = torch.ones(512)
    for step in range(10_000):
        exact = exact + 2**-20
        bits = random_bits(torch.arange(512), key(0, step, 0, 0))
        weight, rest = split(join(weight, rest) + 2**-20, remainder, bits)
        nearest = (nearest.float() + 2**-20).bfloat16()
    assert (nearest == 1).all()
    moved = join(weight, rest).double().mean() - 1
    assert abs(float(moved) / (10_000 * 2**-20) - 1) < (0.15 if remainder is None else 0.02)
    if remainder is torch.int16:
        assert torch.equal(join(weight, rest), exact)


def test_keys_of_many_tensors_are_the_keys_of_each() -> None:
    seeds, steps, names, purposes = [0, 7, 7, -3], [1, 2, 900_000, 2], [0xFFFFFFFF, 5, 0, 2**31], [0, 4, 1]
    every = keys(seeds, steps, torch.tensor([spread(name) for name in names]), purposes)
    each = zip(seeds, steps, names, strict=True)
    assert every.tolist() == [[key(seed, step, name, purpose) for purpose in purposes] for seed, step, name in each]
