"""AdamW's kernel in every storage format against its twin, and the twin against fp64.

In the interpreter what is stored is the twin's exactly, but where a square root or a division was rounded otherwise, which moves a
value over the border of two codes now and then; on a GPU fused multiply-adds do so too.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from nvfp8 import reference
from nvfp8.reference import AdamWTensor
from nvfp8.state import STATE_DTYPES, codec, master, read_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")

SIZES = ((1,), (7, 5), (130,), (3, 1376), (16, 512))  # a scalar; within a block; over one; over a program's 4096, odd and even
# Every format of one moment beside every other, every form of weights; not all of their product.
FORMATS = [(first, second, "bf16+8") for first, second in itertools.product(STATE_DTYPES, STATE_DTYPES)]
FORMATS += [(first, first, kept) for first in ("fp32", "e4m3") for kept in ("fp32", "bf16", "bf16+16", "whole", "nearest")]
FORMATS += [("bf16", "bf16", "nearest")]  # which moments in bf16 follow


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def numbers(key: int, *factors: float) -> Tensor:
    """What `AdamWTensor.numbers` are, of six factors."""
    row = torch.tensor([0.0, *factors, math.sqrt(factors[3])])
    row.view(torch.int32)[0] = key
    return row.to(DEVICE)


def of_step(step: int, key: int) -> Tensor:
    return numbers(key, 0.1, 0.01, 0.02 / (1 - 0.9**step), 1 / (1 - 0.99**step), 1e-10, 1 - 0.02 * 0.1)


def made(first: str, second: str, kept: str, dtype: torch.dtype) -> list[AdamWTensor]:
    """A tensor of each size, its gradient to be replaced."""
    tensors = []
    for i, shape in enumerate(SIZES):
        parameter = random(shape, i, torch.float32 if kept == "whole" else torch.bfloat16)
        states = codec(first).allocate(shape, DEVICE), codec(second, second_moment=True).allocate(shape, DEVICE)
        rest = None if kept in ("whole", "nearest") else master(kept).allocate(parameter)
        gradient = torch.zeros(shape, device=DEVICE, dtype=dtype)
        tensors.append(AdamWTensor(parameter, gradient, *states, rest, of_step(1, 0), kept not in ("whole", "nearest")))
    return tensors


def with_gradients(tensors: list[AdamWTensor], step: int) -> list[AdamWTensor]:
    spread = [torch.logspace(-3, 3, t.parameter.numel(), device=DEVICE).view(t.parameter.shape) for t in tensors]
    return [
        t._replace(
            gradient=(random(SIZES[i], 100 * step + i) * spread[i]).to(t.gradient.dtype), numbers=of_step(step, step * 31 + i)
        )
        for i, t in enumerate(tensors)
    ]


def off(ours: Tensor, twins: Tensor, near: Tensor | None = None) -> tuple[float, int]:
    """Which part of two stored tensors differs, and by how many codes at most where it is by more than `near`."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    codes = [t.contiguous().view(size).long() if t.is_floating_point() else t.long() for t in (ours, twins)]
    ordered = [torch.where(code < 0, -(code & torch.iinfo(size).max), code) if ours.is_floating_point() else code for code in codes]
    distance = (ordered[0] - ordered[1]).abs()
    far = distance if near is None else distance * ((ours.float() - twins.float()).abs() > near)
    return float((distance > 0).double().mean()), int(far.max())


@pytest.mark.parametrize(("first", "second", "kept"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_the_twins(first: str, second: str, kept: str, dtype: torch.dtype) -> None:
    ours, twins = made(first, second, kept, dtype), made(first, second, kept, dtype)
    sizes = [torch.zeros_like(t.parameter, dtype=torch.float32) for t in twins]  # of what has gone into the first moments
    for step in (1, 2):
        ours, twins = with_gradients(ours, step), with_gradients(twins, step)
        kernels.adamw_(ours)
        reference.adamw_(twins)
        sizes = [size.maximum(t.gradient.float().abs()) for size, t in zip(sizes, twins, strict=True)]
    for one, other, g in zip(ours, twins, sizes, strict=True):
        for stored, expected, size in ((one.exp_avg, other.exp_avg, g), (one.exp_avg_sq, other.exp_avg_sq, g * g)):
            if stored.data.dtype != torch.float32:
                # m + (1 - β)(g - m) may cancel: what a GPU rounds once less is then many codes of what is left
                left = 2**-23 * size
                part, codes = off(stored.data, expected.data, left if stored.scale is None else None)
                assert part <= 2e-3 + 1 / stored.data.numel() * (part > 0) and codes <= 1
                if stored.scale is not None and expected.scale is not None:
                    torch.testing.assert_close(stored.scale, expected.scale, rtol=2**-20, atol=0)
            else:
                # m + (1 - β)(g - m) may cancel; a GPU rounds it once less
                assert ((stored.data - expected.data).abs() <= 2**-21 * expected.data.abs() + 2**-23 * size).all()
        if kept != "whole":  # a moment on the other side of a border moves the weight over one, at times
            part, _ = off(one.parameter, other.parameter)
            assert part <= 5e-3 + 1 / other.parameter.numel() * (part > 0)
        if kept == "fp32":
            assert one.rest is not None and torch.equal(one.parameter, one.rest.bfloat16())
        wholes = [read_weight(t.parameter, t.rest) for t in (one, other)]
        code = {"bf16": 2**-7, "nearest": 2**-7, "bf16+8": 2**-15}.get(kept, 2**-21)
        # A moment on the other side of a border changes its step, at most 2 lr here, by a code: 2^-2 of it.
        coded = {first, second} != {"fp32"}
        assert ((wholes[0] - wholes[1]).abs() <= code * wholes[1].abs() + (0.02 if coded else 2e-6)).all()


@pytest.mark.parametrize(("first", "second", "kept"), FORMATS)
def test_the_twin_follows_the_formula_in_fp64(first: str, second: str, kept: str) -> None:
    """One step from zeros: nothing is decoded, so what is stored is one rounding from exact."""
    tensors = with_gradients(made(first, second, kept, torch.float32), 1)
    before = [t.parameter.double() for t in tensors]
    reference.adamw_(tensors)
    for t, weight in zip(tensors, before, strict=True):
        g = t.gradient.double()
        m, v = 0.1 * g, 0.01 * g**2
        exact = weight * (1 - 0.002) - 0.02 / 0.1 * m / ((v / 0.01).sqrt() + 1e-10)
        code = {"bf16": 2**-7, "nearest": 2**-8, "bf16+8": 2**-15}.get(kept, 2**-22)
        assert ((read_weight(t.parameter, t.rest) - exact).abs() <= code * exact.abs() + 1e-8).all()
        for stored, value, form, root in ((t.exp_avg, m, first, False), (t.exp_avg_sq, v, second, True)):
            c = codec(form, second_moment=root)
            error, step = (c.decode(stored) - value).abs(), {"fp32": 2**-22, "bf16": 2**-7, "e4m3": 2**-3, "e5m2": 2**-2}[form]
            if root and c.blocked:  # (1 + s)² − 1 of a root rounded by s
                step = 2 * step + step**2
            least = 0.0 if form in ("fp32", "bf16") else 2.0**-9 / 448 * (2 if form == "e4m3" else 1)
            assert (error <= step * value.abs() + least * value.abs().max()).all()


def test_tensors_do_not_see_each_other_and_neither_do_steps() -> None:
    """Alone or among others, a tensor comes out the same; a key decides how it is rounded."""
    together, alone = (with_gradients(made("e4m3", "e4m3", "bf16", torch.float32), 1) for _ in range(2))
    kernels.adamw_(together)
    for t in alone:
        kernels.adamw_([t])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.parameter, other.parameter)
        assert torch.equal(one.exp_avg.data.view(torch.uint8), other.exp_avg.data.view(torch.uint8))
    another = with_gradients(made("e4m3", "e4m3", "bf16", torch.float32), 1)
    for t in another:
        t.numbers.view(torch.int32)[0] += 1
    kernels.adamw_(another)
    changed = another[-1].exp_avg.data.view(torch.uint8) != together[-1].exp_avg.data.view(torch.uint8)
    assert changed.float().mean() > 0.2


def test_memory_around_a_tensor_is_left_alone() -> None:
    buffers = [torch.full((300,), 7.0, device=DEVICE, dtype=d) for d in (torch.bfloat16, torch.bfloat16, torch.float32)]
    weight, m, v = (b[100:235] for b in buffers)
    states = codec("bf16").allocate((135,), DEVICE)._replace(data=m), codec("fp32").allocate((135,), DEVICE)._replace(data=v)
    kernels.adamw_([AdamWTensor(weight, random((135,), 1), *states, None, of_step(1, 1), True)])
    for buffer in buffers:
        assert (buffer[:100] == 7).all() and (buffer[235:] == 7).all() and (buffer[100:235] != 7).all()


def test_nothing_to_do_is_no_launch() -> None:
    kernels.adamw_([])
    empty = torch.zeros(0, device=DEVICE)
    states = codec("fp32").allocate((0,), DEVICE), codec("fp32").allocate((0,), DEVICE)
    kernels.adamw_([AdamWTensor(empty, empty, *states, None, of_step(1, 0), False)])


def test_a_weight_that_was_written_beside_its_master_counts_and_no_other_does() -> None:
    results = []
    for module in (kernels, reference):
        t = with_gradients(made("fp32", "fp32", "fp32", torch.float32), 1)[-1]
        assert t.rest is not None
        t.rest.mul_(1 + 2.0**-12)
        before, rest = t.parameter.clone(), t.rest.clone()
        t.parameter[:8] = 7.0
        rest[:8] = 7.0
        assert torch.equal(before.float()[8:], rest.bfloat16().float()[8:])
        module.adamw_([t])
        assert ((t.rest - rest).abs() <= 0.3).all(), "a step is at most lr, and decay"
        assert torch.equal(t.parameter, t.rest.bfloat16())
        results.append(t.rest)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["outlier", "equal", "zero", "denormal", "wide", "steep", "largest"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_adversarial_blocks_of_roots_come_out_of_the_kernel_as_of_the_twin(block: str, form: str) -> None:
    gradient = {
        "outlier": torch.cat((torch.full((127,), 1e-3), torch.tensor([7.0]))), "equal": torch.full((128,), 0.37),
        "zero": torch.zeros(128), "denormal": torch.full((128,), 1e-20), "wide": torch.logspace(-22, 3, 128),
        "steep": torch.cat((torch.full((127,), 1e-18), torch.tensor([1e19]))), "largest": torch.full((128,), 1e19),
    }[block].to(DEVICE)  # fmt: skip
    results = []
    for module in (kernels, reference):
        states = codec(form).allocate((128,), DEVICE), codec(form, second_moment=True).allocate((128,), DEVICE)
        weight, whole = torch.zeros(128, device=DEVICE), numbers(3, 1.0, 1.0, 0.1, 1.0, 1e-8, 1.0)
        module.adamw_([AdamWTensor(weight, gradient, *states, None, whole, True)])
        second = states[1].data.float()
        assert second.isfinite().all() and torch.equal(second > 0, gradient * gradient > 0), (
            "what is not 0 has a root that is not 0"
        )
        results.append(states)
    for ours, twins in zip(*results, strict=True):
        assert off(ours.data, twins.data)[0] <= (0 if DEVICE == "cpu" else 0.02)
        torch.testing.assert_close(ours.scale, twins.scale, rtol=2**-20, atol=0)


def test_gradients_may_be_strided_and_addresses_odd() -> None:
    """16 divides the size but not the address: a GPU that was told it does would fault or read another's."""
    results = []
    for module in (kernels, reference):
        buffer, strided = random((4104,), 1, torch.bfloat16), random((128, 32), 2).t()
        states = codec("bf16").allocate((32, 128), DEVICE), codec("fp32", second_moment=True).allocate((32, 128), DEVICE)
        weight = buffer[1 : 1 + 4096].view(32, 128)
        module.adamw_([AdamWTensor(weight, strided, *states, None, of_step(1, 1), True)])
        results.append((buffer, states[0].data, states[1].data))
    for ours, twins in zip(*results, strict=True):
        part, _ = off(ours, twins)
        assert part <= (2e-3 if ours.dtype == torch.bfloat16 else 0.2)
        torch.testing.assert_close(ours, twins, rtol=2**-7, atol=0)


def test_a_launch_is_told_of_alignment_only_where_16_divides_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Listening:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: told.append(options["ALIGNED"])

    monkeypatch.setattr("nvfp8.kernels.adamw._adamw", Listening())
    for offset, size in ((0, 4096), (1, 4096), (8, 4096), (0, 4095)):
        weight = torch.zeros(4104, device=DEVICE, dtype=torch.bfloat16)[offset : offset + size]
        states = codec("bf16").allocate((size,), DEVICE), codec("bf16", second_moment=True).allocate((size,), DEVICE)
        kernels.adamw_([AdamWTensor(weight, random((size,), 1), *states, None, of_step(1, 1), True)])
    assert told == [True, False, True, False]


def test_what_is_worked_out_of_sizes_is_kept_with_the_optimizer_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvfp8.kernels import adamw

    monkeypatch.setattr("nvfp8.kernels.adamw._adamw", MagicMock())
    plans: dict[Any, Tensor] = {}
    built = MagicMock(wraps=adamw._blocks)
    monkeypatch.setattr("nvfp8.kernels.adamw._blocks", built)
    for blocks in (*range(1, 81), *range(60, 81), 80):
        size = blocks * adamw.BLOCK
        states = codec("fp32").allocate((size,), DEVICE), codec("fp32").allocate((size,), DEVICE)
        empty = torch.zeros(size, device=DEVICE)
        kernels.adamw_([AdamWTensor(empty, empty, *states, None, of_step(1, 0), False)], plans)
        assert len(plans) <= adamw.PLANS
    assert built.call_count == 80


def test_state_on_another_device_is_refused() -> None:
    if DEVICE == "cpu":
        states = codec("fp32").allocate((8,), "meta"), codec("fp32").allocate((8,), DEVICE)
    else:
        states = codec("fp32").allocate((8,), "cpu"), codec("fp32").allocate((8,), DEVICE)
    with pytest.raises(AssertionError, match="lies on one device"):
        kernels.adamw_([AdamWTensor(random((8,), 1), random((8,), 2), *states, None, of_step(1, 0), False)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    """In the weight, and in both moments' blocks; not beyond."""
    for module in (kernels, reference):
        t = with_gradients(made("e4m3", "e4m3", "bf16+8", torch.float32), 1)[-1]
        t.gradient.view(-1)[200] = bad
        module.adamw_([t])
        assert not read_weight(t.parameter, t.rest).view(-1)[200].isfinite()
        for stored, root in ((t.exp_avg, False), (t.exp_avg_sq, True)):
            decoded = codec("e4m3", second_moment=root).decode(stored).view(-1)
            assert not decoded[128:256].isfinite().all() and decoded[:128].isfinite().all() and decoded[256:].isfinite().all()
