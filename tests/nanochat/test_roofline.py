"""Throughput that the roofline predicts beside what was measured (docs/results.md), and what its efficiencies are made from."""

from dataclasses import replace

import pytest

from nanochat.gpt import GPTConfig
from nanochat.memory import GIB, Counted, Setup, predict
from nanochat.roofline import (
    EFFICIENCY,
    KEYS_MORE,
    MEASURED,
    MICRO_BATCHES,
    PUBLISHED_SPARK,
    Measured,
    keys,
    seconds,
    tokens_per_second,
    work,
)
from nanochat.state_formats import NANOCHAT, StateFormats
from nvfp8.hardware import peaks
from nvfp8.precision import Precision, bf16, fp8, te
from nvfp8.recipe import recipe

LENGTH = 2048


def precision(label: str) -> Precision:
    """What the planner calls so: "bf16", "fp8 delayed", "te current", "te delayed, head in chunks"."""
    kind, _, scaling = label.partition(",")[0].partition(" ")
    if kind == "te":
        return te(recipe(scaling), te_head="chunks" not in label)
    return {"bf16": bf16, "fp8": lambda: fp8(recipe(scaling))}[kind]()


def counted(depth: int, window: str, label: str, rows: int, formats: StateFormats = NANOCHAT) -> Counted:
    stored = formats.stored_by(precision(label), "cpu")
    return Counted(Setup(GPTConfig.from_depth(depth, window_pattern=window), stored, rows, formats=formats))


@pytest.mark.parametrize("run", MEASURED, ids=lambda m: f"d{m.depth}-{m.window}-{m.label}-{m.formats.momentum}")
def test_predictions_are_within_15_percent_of_measurements(run: Measured) -> None:
    device, what = peaks(run.device), counted(run.depth, run.window, run.label, run.rows, run.formats)
    assert device is not None
    rate = tokens_per_second(work(what, run.rows), device, what.setup.precision, run.rows * LENGTH, MICRO_BATCHES)
    assert rate == pytest.approx(run.tokens_per_second, rel=0.15)
    # What the planner's notes say.
    assert rate == pytest.approx(run.tokens_per_second, rel=0.08 if run.depth == 8 else 0.04)


@pytest.mark.parametrize("run", MEASURED, ids=lambda m: f"d{m.depth}-{m.window}-{m.label}-{m.formats.momentum}")
def test_peaks_are_within_5_percent_of_measurements(run: Measured) -> None:
    what = counted(run.depth, run.window, run.label, run.rows, run.formats)
    setup = replace(what.setup, graphs=run.graphs, captured_updates=run.captured_updates)
    assert predict(setup, what).total / GIB == pytest.approx(run.gib, rel=0.05)
    assert predict(setup, what).total / GIB == pytest.approx(run.gib, rel=0.011)  # what the planner's notes say


def test_efficiencies_are_those_of_the_profile() -> None:
    """d24, own FP8, 16 x 2048 tokens, docs/results.md: ms of GEMMs, attention and all else; and what a run takes longer."""
    device, what, longer = peaks("NVIDIA H200"), counted(24, "L", "fp8 delayed", 16), 189.5 / 183.42
    assert device is not None and device.fp8 is not None
    done = work(what, 16)
    assert done.fp8 / 111.76e-3 / longer / device.fp8 == pytest.approx(EFFICIENCY["FP8 GEMMs"], rel=0.01)
    assert done.attention / 44.90e-3 / longer / device.bf16 == pytest.approx(EFFICIENCY["attention"], rel=0.01)
    assert done.moved / 26.76e-3 / longer / device.bandwidth == pytest.approx(EFFICIENCY["bytes of own FP8"], rel=0.01)
    micro, _ = seconds(done, device, what.setup.precision)
    assert sum(micro.values()) == pytest.approx(189.5e-3, rel=0.01)


def test_polar_express_is_counted_as_muon_goes() -> None:
    """d24, the table in nvfp8/polar_express.py: 26.1 TFLOP by full products; on Hopper 96 squares by "half", 48 by "gram"."""
    full = Counted(Setup(GPTConfig.from_depth(24), bf16(), 1, capability=(8, 0)))
    assert work(full, 1).polar == {"full": pytest.approx(26.1e12, rel=0.01)}
    polar = work(counted(24, "L", "bf16", 1), 1).polar
    assert polar == {"half": 96 * 20 * 1536**3, "gram": 48 * 40 * 1536**3}
    assert sum(polar.values()) == pytest.approx(13.9e12, rel=0.01)
    device = peaks("NVIDIA H200")
    assert device is not None
    took = seconds(work(counted(24, "L", "bf16", 1), 1), device, bf16())[1]["Muon's products"]
    assert took == pytest.approx(11.14e-3 + 6.18e-3 + 6.27e-3, rel=0.01)  # 6a0b4b3


@pytest.mark.parametrize(
    ("left", "gemms", "copies"),
    [
        ("", 0, 0),
        ("h.0", 3 * 12, 2 * 12),
        ("h.*.mlp.c_fc:wgrad", 6 * 4, 0),
        ("h.1.attn.qkv:fprop+h.1.attn.qkv:dgrad", 2 * 3, 2 * 3),
        ("h.2.mlp:dgrad", 8, 8),
    ],
)
def test_what_a_recipe_leaves_in_bf16_is_counted_so(left: str, gemms: int, copies: int) -> None:
    """Six layers of 12 D² parameters; numbers are in D² of one GEMM, and of copies."""
    shape = GPTConfig.from_depth(6)
    width, tokens = shape.n_embd, 4 * LENGTH
    names = tuple(filter(None, left.split("+")))
    one, other = (Counted(Setup(shape, fp8(recipe("delayed", bf16=parts)), 4)) for parts in ((), names))
    all_fp8, some = work(one, 4), work(other, 4)
    assert all_fp8.fp8 - some.fp8 == some.bf16 - all_fp8.bf16 == 2 * gemms * width**2 * tokens
    line = "FP8 copies of weights, both layouts"
    assert one.lasting()[line] - other.lasting()[line] == copies * width**2
    assert all_fp8.updated >= some.updated + copies * width**2


def test_gemms_that_backward_makes_again_are_counted() -> None:
    """c_fc's, 2 · 4 D² FLOPs a token and layer."""
    shape = GPTConfig.from_depth(6)
    for asked in (recipe("delayed"), recipe("delayed", bf16=("h.0.attn", "h.1.attn.c_proj:wgrad"))):
        once, again = (work(Counted(Setup(shape, fp8(asked, recompute=recompute), 4)), 4) for recompute in (False, True))
        assert again.fp8 - once.fp8 == 6 * 2 * 4 * shape.n_embd**2 * 4 * LENGTH
        assert again.bf16 == once.bf16
        assert again.moved - once.moved == 6 * 7 * shape.n_embd * 4 * LENGTH


def test_keys_are_those_a_query_sees() -> None:
    config = GPTConfig.from_depth(4, sequence_len=256, window_pattern="SL")
    for layer, window in ((0, 128), (1, 255)):
        seen = [min(t, window) + 1 for t in range(256)]
        assert keys(config, layer) == pytest.approx(sum(seen) / 256)


def test_windows_of_attention_lie_on_one_line() -> None:
    """cuDNN on an H200, 16 x 12 heads, T = 2048, forward + backward in ms."""
    times = {2047: 0.375 + 1.21, 768: 0.279 + 0.913, 512: 0.231 + 0.777}
    paid = {w: w + 1 - w * (w + 1) / (2 * LENGTH) + KEYS_MORE for w in times}
    for window, milliseconds in times.items():
        assert milliseconds / times[2047] == pytest.approx(paid[window] / paid[2047], rel=0.01)


def test_a_spark_is_where_others_measured_it() -> None:
    """nanochat's own FP8 scales currently: te's current is its nearest relative here, not the same program."""
    device, what = peaks("NVIDIA GB10"), counted(24, "SSSL", "te current", 16)
    assert device is not None
    rate = tokens_per_second(work(what, 16), device, what.setup.precision, 16 * LENGTH, 32)
    assert rate == pytest.approx(PUBLISHED_SPARK, rel=0.15)
