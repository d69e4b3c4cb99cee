"""Schedules and horizons against values worked out by hand."""

import math

import pytest

from nanochat import schedule
from nanochat.errors import BadInput


def test_learning_rate_warms_up_holds_and_warms_down() -> None:
    # 1,000 steps: up over 40, constant to 350, down over 650 to 5%
    expected = {0: 1 / 40, 19: 0.5, 39: 1.0, 40: 1.0, 350: 1.0, 351: 649 / 650 + 0.05 / 650, 675: 0.525, 1000: 0.05}
    for step, value in expected.items():
        assert schedule.lr_multiplier(step, 1000) == pytest.approx(value, abs=1e-12)
    assert schedule.lr_multiplier(0, 10, warmup_steps=0, warmdown_ratio=0) == 1.0
    assert schedule.lr_multiplier(10, 10, warmup_steps=0, warmdown_ratio=0) == 1.0
    assert schedule.lr_multiplier(5, 10, warmup_steps=0, warmdown_ratio=1, final_lr_frac=0) == 0.5
    assert schedule.lr_multiplier(0, 1) == 1 / 40


def test_momentum_rises_holds_and_falls() -> None:
    # 2,000 steps: up over 400, held to 700, down over 1,300
    expected = {0: 0.85, 200: 0.91, 400: 0.97, 699: 0.97, 700: 0.97, 1350: 0.935, 2000: 0.90}
    for step, value in expected.items():
        assert schedule.muon_momentum(step, 2000) == pytest.approx(value, abs=1e-12)
    # A short run: the ramp goes first, then the warm-down where it stands by then
    assert schedule.muon_momentum(399, 500) == pytest.approx(0.85 + 0.12 * 399 / 400)
    assert schedule.muon_momentum(400, 500) == pytest.approx(0.97 - 0.07 * (400 - 175) / 325)
    assert schedule.muon_momentum(1000, 1000, warmdown_ratio=0) == 0.97


def test_weight_decay_is_half_a_cosine() -> None:
    for step, value in {0: 0.28, 250: 0.28 * (2 + math.sqrt(2)) / 4, 500: 0.14, 1000: 0.0}.items():
        assert schedule.muon_weight_decay(step, 1000, 0.28) == pytest.approx(value, abs=1e-12)


def test_scaling_with_batch_and_horizon() -> None:
    assert schedule.scaled_weight_decay(0.28, 2**19, 100, 100) == 0.28
    assert schedule.scaled_weight_decay(0.28, 2**21, 400, 100) == pytest.approx(0.14)
    assert schedule.batch_lr_scale(2**19) == 1.0
    assert schedule.batch_lr_scale(2**17) == 0.5
    # (D/D_ref)^0.383 at 1, 6.62 (d24 over d12) and 1/16: 1, 2.06, 0.346
    assert schedule.batch_tokens(100, 100) == 2**19
    assert schedule.batch_tokens(662, 100) == 2**20
    assert schedule.batch_tokens(100, 1600) == 2**17
    assert isinstance(schedule.batch_tokens(100, 1600), int)


def test_accumulation_divides_or_names_the_nearest_that_does() -> None:
    assert schedule.accumulation_steps(2**19, 32, 2048, 1) == 8
    assert schedule.accumulation_steps(2**19, 32, 2048, 8) == 1
    with pytest.raises(BadInput, match=r"524,288 tokens.*49,152 \(24 rows x 2048 tokens\).*--total-batch-size 540672"):
        schedule.accumulation_steps(2**19, 24, 2048, 1)
    with pytest.raises(BadInput, match=r"x 16 processes.*--total-batch-size 1048576"):
        schedule.accumulation_steps(2**19, 32, 2048, 16)
    with pytest.raises(BadInput, match=r"--total-batch-size 2048\b"):
        schedule.accumulation_steps(5, 1, 2048, 1)
    with pytest.raises(BadInput, match="--total-batch-size must be 1 or more"):
        schedule.accumulation_steps(0, 1, 2048, 1)


def steps(num_iterations: int = -1, target_flops: float = -1.0, ratio: float = -1.0) -> int:
    return schedule.horizon(
        num_iterations=num_iterations,
        target_flops=target_flops,
        ratio=ratio,
        scaling_params=1_000_000,
        flops_per_token=6_000_000,
        batch_tokens=4096,
    )


def test_horizon_takes_iterations_then_flops_then_ratio() -> None:
    assert steps(7, 1e15, 12) == 7
    assert steps(-1, 1e12, 12) == round(1e12 / 6e6 / 4096) == 41
    assert steps(-1, -1, 12) == 12_000_000 // 4096 == 2929
    assert steps(-1, -1, 0.5) == 122


def test_an_impossible_horizon_is_refused() -> None:
    with pytest.raises(BadInput, match="--num-iterations, --target-flops, --target-param-data-ratio"):
        steps()
    with pytest.raises(BadInput, match=r"--target-flops asks for less than one step of 4,096 tokens.*2\.46e\+10 FLOPs"):
        steps(target_flops=1e9)
    with pytest.raises(BadInput, match=r"--target-param-data-ratio asks for less than one step.*a ratio of 0\.0041"):
        steps(ratio=0.001)
    with pytest.raises(BadInput, match="--target-flops must be a finite number"):
        steps(target_flops=math.inf)
    with pytest.raises(BadInput, match="--target-param-data-ratio must be a finite number"):
        steps(ratio=math.inf)
