"""The benchmark of what each GEMM, layer and block costs in FP8: its choices, its arithmetic, what has to come out of a model."""

import json
import math
from collections.abc import Mapping

import pytest
import torch

from benchmarks import selective
from benchmarks.selective import AVERAGED, BF16, WARM, apart, build, choices, records, table
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.train import train
from nanochat.train_config import TrainConfig
from nvfp8.precision import FP8Precision
from nvfp8.recipe import GEMMS

SHAPE = GPTConfig(64, 512, 2, 2, 2, 64, "SL")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHOWN = ("all bf16", "all FP8", *(f"{kind}: {gemm}" for kind in ("bf16", "FP8") for gemm in GEMMS), "bf16: h.0", "FP8: lm_head")


# ----------------------------------------------------------------------------------------------------------------- choices


def in_bf16(patterns: str) -> set[tuple[str, str]]:
    """Layers and GEMMs of a model that the patterns leave in bf16."""
    precision = build(SHAPE, patterns, torch.device("cpu")).precision
    assert isinstance(precision, FP8Precision) and len(precision.made) == 4 * SHAPE.n_layer + 1
    return {(name, gemm) for name in precision.made for gemm in precision.recipe.gemms_in_bf16(name)}


def test_a_choice_alone_and_all_but_it_are_complements() -> None:
    left = {name: in_bf16(patterns) for name, patterns in choices(SHAPE.n_layer).items()}
    every = left["all bf16"]
    assert len(every) == 3 * (4 * SHAPE.n_layer + 1) and not left["all FP8"]
    without = {name.removeprefix("bf16: "): gemms for name, gemms in left.items() if name.startswith("bf16: ")}
    alone = {name.removeprefix("FP8: "): gemms for name, gemms in left.items() if name.startswith("FP8: ")}
    assert without.keys() - alone.keys() == {"h.0", "h.1"} and len(alone) == 8
    assert all(alone[name] == every - without[name] for name in alone)
    for parts in (GEMMS, selective.KINDS, ("h.0", "h.1", "lm_head")):  # each is everything, nothing twice
        assert sorted(gemm for part in parts for gemm in without[part]) == sorted(every)


# -------------------------------------------------------------------------------------------------------------- arithmetic


def test_errors_by_hand() -> None:
    """(3, 4) beside (3, 0): 4/3 off, cosine 3/5; (0, 2) beside (0, 1): 1 off, cosine 1; together √(16+1) of √(9+1)."""
    exact = {"a": torch.tensor([3.0, 0]), "b": torch.tensor([0, 1.0])}
    whole, each = apart({"a": torch.tensor([3.0, 4]), "b": torch.tensor([0, 2.0], dtype=torch.bfloat16)}, exact)
    assert each == {"a": (pytest.approx(4 / 3), pytest.approx(0.6)), "b": (pytest.approx(1), pytest.approx(1))}
    assert whole == (pytest.approx(math.sqrt(1.7)), pytest.approx((9 + 2) / math.sqrt(10 * 29)))


def test_a_table_has_a_line_a_choice() -> None:
    row = {"choice": "all FP8", "loss": 1.5, "loss_error": 0.25, "error_of_one": 0.0625, "error": 0.05, "cosine": 0.99}
    row |= {"median": 0.04, "worst": 0.5, "worst_cosine": 0.75, "worst_matrix": "lm_head"}
    lines = table([{"choice": "fp32", "loss": -1.0, "loss_error": 0.5}, row])
    assert lines[1].split() == ["fp32", "-1.000", "±", "0.500"]
    assert " ".join(lines[2].split()) == "all FP8 +1.500 ± 0.250 6.25% 5.00% 0.990000 4.00% 50.00% 0.750000 lm_head"


# ------------------------------------------------------------------------------------------------------------------ a model


def batches(count: int, device: torch.device) -> selective.Batches:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, SHAPE.vocab_size, (4, SHAPE.sequence_len + 1), generator=generator) for _ in range(count)]
    return [(rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)) for rows in tokens]


@pytest.fixture(scope="module", params=DEVICES)
def found(request: pytest.FixtureRequest) -> Mapping[str, Mapping[str, float]]:
    device = torch.device(request.param)
    model, generator = build(SHAPE, BF16, device), torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained: nothing is zero, logits tell tokens apart
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        model.lm_head.weight.normal_(std=0.05, generator=generator)
    wanted = {name: patterns for name, patterns in choices(SHAPE.n_layer).items() if name in SHOWN}
    rows = list(records(SHAPE, model.state_dict(), wanted, batches(WARM + AVERAGED, device), device))
    assert [row["choice"] for row in rows] == ["fp32", *wanted]
    return {str(row["choice"]): row for row in rows}  # type: ignore[misc]


def test_bf16_differs_from_itself_in_nothing(found: Mapping[str, Mapping[str, float]]) -> None:
    row = found["all bf16"]
    assert row["loss"] == row["loss_error"] == 0
    assert 0 < row["error"] < 0.02 and found["fp32"]["loss_error"] > 0


def test_a_forward_in_bf16_has_the_loss_of_bf16(found: Mapping[str, Mapping[str, float]], request: pytest.FixtureRequest) -> None:
    """Only fprop is part of it; what backward does in FP8 shows in gradients alone. On a GPU fused kernels may round elsewhere."""
    most = 0 if request.node.callspec.params["found"] == "cpu" else 0.5 * found["all FP8"]["loss_error"]
    for choice in ("bf16: fprop", "FP8: dgrad", "FP8: wgrad"):
        assert found[choice]["loss_error"] <= most
        assert found[choice]["error"] > 2 * found["all bf16"]["error"]


def test_more_in_bf16_is_a_smaller_error(found: Mapping[str, Mapping[str, float]]) -> None:
    both, none = found["all FP8"], found["all bf16"]
    for choice in set(SHOWN) - {"all FP8", "all bf16"}:
        assert none["error"] < found[choice]["error"] < both["error"], choice
        assert none["error_of_one"] < found[choice]["error_of_one"] < both["error_of_one"], choice
        assert both["cosine"] < found[choice]["cosine"] < none["cosine"], choice
    for gemm in GEMMS:  # two GEMMs in bf16 err less than one does
        others = [found[f"bf16: {other}"]["error"] for other in GEMMS if other != gemm]
        assert found[f"FP8: {gemm}"]["error"] < min(others)


def test_errors_of_the_three_gemms_add_as_squares(found: Mapping[str, Mapping[str, float]]) -> None:
    alone = math.sqrt(sum(found[f"FP8: {gemm}"]["error"] ** 2 for gemm in GEMMS))
    assert alone == pytest.approx(found["all FP8"]["error"], rel=0.1)


def test_worst_is_above_the_median(found: Mapping[str, Mapping[str, float]]) -> None:
    for choice in SHOWN:
        row = found[choice]
        assert row["median"] < row["worst"] and 1 - row["worst_cosine"] > 0.2 * row["worst"] ** 2


# -------------------------------------------------------------------------------------------------------------- the command

TINY = TrainConfig(
    depth=1, aspect_ratio=64, head_dim=32, max_seq_len=32, device_batch_size=4, total_batch_size=128, num_iterations=3,
    eval_every=-1, sample_every=-1, core_metric_every=-1, model_tag="tiny",
)  # fmt: skip


def test_a_checkpoint_is_measured(torch_texts: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(**{**vars(TINY), "data": torch_texts}))
    capsys.readouterr()
    named = choices(1)
    monkeypatch.setattr(selective, "LOSSES", AVERAGED)
    monkeypatch.setattr(selective, "choices", lambda blocks: {name: named[name] for name in ("all bf16", "all FP8")})
    monkeypatch.setattr("sys.argv", ["selective", "--model-tag", "tiny", "--data", torch_texts, "--batch", "4"])
    selective.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    assert [row["choice"] for row in rows] == ["fp32", "all bf16", "all FP8"]
    assert rows[1]["loss"] == 0 and rows[1]["error"] < rows[2]["error"]
    assert "4 × 32 tokens of validation text" in lines[4] and [line[:8] for line in lines[6:]] == [
        "fp32    ",
        "all bf16",
        "all FP8 ",
    ]


def test_an_empty_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["selective", "--model-tag", "tiny", "--batch", "0"])
    with pytest.raises(BadInput, match="--batch must be at least 1"):
        selective.main()
