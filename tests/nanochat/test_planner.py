import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat import planner
from nanochat.errors import BadInput
from nanochat.memory import GIB
from nanochat.planner import choices, device, plan, report
from nanochat.train_config import TrainConfig
from nvfp8.hardware import NICKNAMES

D12 = TrainConfig(depth=12, window_pattern="L", total_batch_size=32 * 2048 * 8)


def row(gpu: str, config: TrainConfig, label: str = "bf16", rows: int | None = None) -> planner.Row:
    where = device(gpu)
    wanted = next(choice for choice in choices(where, config, "all", "auto") if choice.label == label)
    return plan(where, config, wanted, 32768, rows, "cudnn")


@pytest.mark.parametrize("name", ["spark", "SPARK", "gb10", "NVIDIA GB10"])
def test_a_gpu_has_several_names(name: str) -> None:
    assert device(name).name == "NVIDIA GB10"


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "4090"])
def test_a_geforce_may_be_called_rtx(name: str) -> None:
    assert device(name).name == "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize("name", sorted(NICKNAMES))
def test_every_gpu_can_be_planned_for(name: str) -> None:
    where = device(name)
    assert 0.8 < where.usable / where.peaks.memory < 1
    labels = [choice.label for choice in choices(where, D12, "all", "auto")]
    assert labels[0] == "bf16"
    assert len(labels) == (1 if where.peaks.fp8 is None else 4)


def test_recipes_are_the_devices_best() -> None:
    best = {gpu: choices(device(gpu), D12, "te", "auto")[0].label for gpu in ("h100", "b200", "spark", "4090")}
    assert best == {"h100": "te delayed", "b200": "te mxfp8", "spark": "te current", "4090": "te delayed"}


@pytest.mark.parametrize(
    ("gpu", "wanted", "recipe", "state", "what"),
    [
        ("a100", "te", "auto", "auto", "FP8 units came with 8.9"),
        ("spark", "te", "mxfp8", "auto", "12.0 and later"),
        ("h100", "te", "nvfp4", "auto", "10.0"),
        ("b200", "fp8", "mxfp8", "auto", "our own FP8 layers have"),
        ("a100", "fp8", "auto", "auto", "FP8 units came with 8.9"),
        ("h100", "te", "rowwise", "auto", "no row-wise scaling"),
        ("h100", "te", "nonsense", "auto", "unknown recipe"),
        ("a100", "bf16", "auto", "exp_avg=e4m3", "use e5m2, bf16 or fp32"),
    ],
)
def test_what_a_device_cannot_do_is_refused(gpu: str, wanted: str, recipe: str, state: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        choices(device(gpu), replace(D12, state_dtype=state), wanted, recipe)


def test_relu_squared_made_again_is_planned_for() -> None:
    """c_fc's GEMM once more: 8 D² FLOPs a token beside the 72 D² of a block's GEMMs."""
    where, config = device("h100"), TrainConfig(depth=12, window_pattern="L", total_batch_size=32 * 2048 * 8)
    kept, again = (
        plan(where, config, choices(where, config, "fp8", "auto", recompute)[0], 32768, 32, "cudnn") for recompute in (False, True)
    )
    assert again.choice.label == "fp8 delayed, relu² again" and again.memory.total < 0.9 * kept.memory.total
    assert again.tokens_per_second is not None and kept.tokens_per_second is not None
    assert again.tokens_per_second < 0.97 * kept.tokens_per_second
    assert [choice.label for choice in choices(where, config, "all", "auto", True)][1] == "fp8 delayed, relu² again"
    for gpu, wanted in (("h100", "te"), ("h100", "bf16"), ("a100", "all")):
        with pytest.raises(BadInput, match="--recompute-mlp goes with our own FP8 layers"):
            choices(device(gpu), config, wanted, "auto", True)


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BadInput, match=r"no such GPU is known; there are h100, .*spark"):
        device("h1000")


def test_the_plan_of_a_run_that_was_made() -> None:
    made = row("h100", D12, rows=32)
    assert made.fits and made.plan.accumulation == 8
    assert made.measured is not None
    measured, predicted = made.measured
    assert measured.gib == 15.17 and predicted.total / GIB == pytest.approx(15.17, rel=0.01)
    assert made.memory.total > predicted.total  # it was made without CUDA graphs
    assert made.tokens_per_second == pytest.approx(542_304, rel=0.04)
    lines = report(device("h100"), D12, [made], None)
    text = "\n".join(lines)
    assert "PREDICTED" in text and "MEASURED" in text
    assert next(line for line in lines if "48cd68f" in line).endswith("err by -0.6% and -0.6%")
    longer = row("h100", replace(D12, total_batch_size=2**20), rows=32)  # compared at the 8 micro-batches that were measured
    assert next(line for line in report(device("h100"), D12, [longer], None) if "48cd68f" in line).endswith(
        "err by -0.6% and -0.6%"
    )
    assert all(len(line) < 160 for line in lines)


def test_the_largest_power_of_two_and_any() -> None:
    free = row("4090", TrainConfig(depth=12))
    assert free.rows & (free.rows - 1) == 0 and free.rows <= free.any_rows < 2 * free.rows
    assert free.memory.total <= device("4090").usable
    # No batch needs more rows than it has.
    assert row("b200", replace(D12, total_batch_size=4 * 2048)).any_rows == 4


def test_short_micro_batches_are_said_to_wait_for_python() -> None:
    tiny = TrainConfig(depth=4, max_seq_len=128, total_batch_size=128 * 64)
    assert "wait for Python" in "\n".join(report(device("h100"), tiny, [row("h100", tiny)], None))
    assert "wait for Python" not in "\n".join(report(device("h100"), D12, [row("h100", D12)], None))


def test_what_does_not_fit_says_so() -> None:
    deep = row("4090", TrainConfig(depth=40))
    assert not deep.fits and deep.tokens_per_second is None and deep.any_rows == 0
    assert deep.depth < 40
    assert "does not fit" in "\n".join(report(device("4090"), TrainConfig(depth=40), [deep], None))


def test_formats_make_room_for_depth() -> None:
    small = TrainConfig(depth=12, state_dtype="e4m3", master_weights="bf16+8")
    assert row("4090", small).depth > row("4090", TrainConfig(depth=12)).depth


def test_the_state_of_each_precision_is_named() -> None:
    where = device("h200")
    rows = [plan(where, D12, choice, 32768, 32, "cudnn") for choice in choices(where, D12, "all", "auto")]
    lines = [line for line in report(where, D12, rows, None) if line.startswith("optimizer state")]
    assert [line.partition(":")[0].removeprefix("optimizer state of ") for line in lines] == [
        "bf16, te delayed, te delayed, head in chunks", "fp8 delayed"
    ]  # fmt: skip
    assert "moments of tables; masters fp32" in lines[0] and "momentum e4m3; masters bf16+8" in lines[1]
    made = [row.measured[0].gib for row in rows if row.measured is not None]
    assert made == [15.14, 12.3, 27.36]  # of these formats
    assert all(len(line) < 160 for line in lines)


def test_the_depth_is_the_largest() -> None:
    assert planner._deepest(lambda depth: depth <= 43) == 43
    assert planner._deepest(lambda depth: depth <= 3) == 3
    assert planner._deepest(lambda depth: False) == 0
    assert planner._deepest(lambda depth: True) == planner.DEEPEST


def test_early_updates_take_a_step_in_one_micro_batch() -> None:
    early = row("h100", replace(D12, total_batch_size=16 * 2048, update_early=True))
    assert early.rows == 16 and early.plan.accumulation == 1


def test_a_spark_says_what_others_measured() -> None:
    config = TrainConfig(depth=24)
    text = "\n".join(report(device("spark"), config, [row("spark", config, "te current")], None))
    assert "none: no run of these setups was made" in text
    assert "by others: karpathy/nanochat in its own FP8, 13,125 tok/s" in text


def test_the_readmes_spark_is_the_planners() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    told = re.findall(r"^\| `--precision (bf16|fp8|te)`[^|]*\| ([\d,]+) \| ([\d.]+) GiB \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in told] == ["bf16", "fp8", "te"]
    for name, rate, gib, days in told:
        label = {"bf16": "bf16", "fp8": "fp8 delayed", "te": "te current"}[name]
        predicted = row("spark", TrainConfig(depth=24), label, rows=32)
        assert predicted.tokens_per_second is not None
        assert float(rate.replace(",", "")) == pytest.approx(predicted.tokens_per_second, rel=0.02)
        assert float(gib) == pytest.approx(predicted.memory.total / GIB, rel=0.02)
        tokens = predicted.plan.steps * predicted.plan.batch_tokens
        assert float(days) == pytest.approx(tokens / predicted.tokens_per_second / 86400, rel=0.02)
