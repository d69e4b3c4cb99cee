"""Recipes are what they say, impossible ones are refused by name, and each chip is offered what it has."""

import dataclasses

import pytest

from nvfp8.hardware import FEATURES, best_recipe, missing
from nvfp8.recipe import BF16, RECIPES, Gemm, Operand, parse_recipe, recipe

# Which features each compute capability has, from Transformer Engine 2.20's availability functions and, for block
# scaling, from where cuBLAS runs it natively (10.0 and later emulate it).
HAVE = {
    (7, 5): set(),
    (8, 0): {"bf16"},
    (8, 6): {"bf16"},
    (8, 9): {"bf16", "fp8"},
    (9, 0): {"bf16", "fp8", "fp8_block", "wgmma", "tma"},
    (10, 0): {"bf16", "fp8", "mxfp8", "nvfp4", "tma"},
    (10, 3): {"bf16", "fp8", "mxfp8", "nvfp4", "tma"},
    (12, 0): {"bf16", "fp8", "nvfp4", "tma"},
    (12, 1): {"bf16", "fp8", "nvfp4", "tma"},
}


@pytest.mark.parametrize("capability", HAVE)
def test_features_by_capability(capability: tuple[int, int]) -> None:
    assert {feature for feature in FEATURES if missing(feature, capability) is None} == HAVE[capability]
    for feature in set(FEATURES) - HAVE[capability]:
        assert f"this is compute capability {capability[0]}.{capability[1]}" in str(missing(feature, capability))


def test_the_best_recipe_of_each_chip_runs_on_it() -> None:
    best = {capability: best_recipe(capability) for capability in HAVE if capability >= (8, 9)}
    assert best == {
        (8, 9): "delayed", (9, 0): "delayed", (10, 0): "mxfp8", (10, 3): "mxfp8", (12, 0): "current", (12, 1): "current",
    }  # fmt: skip
    for capability, name in best.items():
        assert [missing(feature, capability) for feature in RECIPES[name].features] == [None]
    with pytest.raises(ValueError, match="FP8 units came with 8"):
        best_recipe((8, 0))


@pytest.mark.parametrize(
    ("name", "feature"),
    [("delayed", "fp8"), ("rowwise", "fp8"), ("blockwise", "fp8_block"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4")],
)
def test_features_of_recipes(name: str, feature: str) -> None:
    assert RECIPES[name].features == (feature,)


def test_hybrid_gradients_are_e5m2_and_wgrad_never_accumulates_fast() -> None:
    for name in ("delayed", "current", "rowwise"):
        it = RECIPES[name]
        assert (it.fprop.left.format, it.dgrad.left.format, it.wgrad.left.format) == ("e4m3", "e5m2", "e5m2")
    assert RECIPES["e4m3"].dgrad.left.format == "e4m3"
    assert [it.name for it in RECIPES.values() if it.wgrad.fast_accumulation] == []
    fast = ["delayed", "current", "rowwise", "e4m3"]
    assert fast == [it.name for it in RECIPES.values() if it.fprop.fast_accumulation and it.dgrad.fast_accumulation]
    assert not RECIPES["blockwise"].fprop.fast_accumulation and not RECIPES["blockwise"].dgrad.fast_accumulation


def test_description_names_all_three_gemms() -> None:
    assert RECIPES["delayed"].describe() == (
        "fprop e4m3×e4m3 delayed, fast accumulation; dgrad e5m2×e4m3 delayed, fast accumulation; wgrad e5m2×e4m3 delayed"
    )
    assert "block1x128/block128x128" in RECIPES["blockwise"].describe()


def test_a_recipe_is_frozen_and_can_be_varied() -> None:
    varied = recipe("delayed", margin=2, amax_history_len=1024, amax_compute_algo="most_recent")
    assert (varied.margin, RECIPES["delayed"].margin) == (2, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        varied.margin = 3  # type: ignore[misc]
    assert recipe("current", dgrad=Gemm(BF16, BF16)).features == ("fp8",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe("hybrid"), "unknown recipe 'hybrid'"),
        (lambda: recipe("delayed", interval=4), "interval 4"),
        (lambda: recipe("delayed", amax_history_len=0), "amax_history_len is 0"),
        (lambda: recipe("delayed", amax_compute_algo="mean"), "amax_compute_algo 'mean'"),
        (lambda: recipe("delayed", marign=1), "marign"),
        (lambda: Operand("e5m2", "block1x128"), "e5m2 takes scaling"),
        (lambda: Operand("fp6", "current"), "unknown format 'fp6'"),
        (lambda: Gemm(Operand("e5m2", "current"), Operand("e5m2", "current")), "e5m2 times e5m2"),
        (lambda: Gemm(BF16, Operand("e4m3", "current")), "both operands must be of one width"),
        (lambda: Gemm(Operand("e4m3", "row"), Operand("e4m3", "current")), "do not go together"),
    ],
)
def test_impossible_recipes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_flag_names_a_recipe_and_changes_it() -> None:
    assert parse_recipe("current") == RECIPES["current"]
    changed = parse_recipe("delayed:margin=1,amax_history_len=32,amax_compute_algo=most_recent,interval=1")
    assert changed == recipe("delayed", margin=1, amax_history_len=32, amax_compute_algo="most_recent")


def test_layers_and_single_gemms_of_them_are_left_in_bf16_by_name() -> None:
    it = parse_recipe("delayed:margin=1,bf16=h.0+h.*.attn.qkv:dgrad+h.1:wgrad+*.*.mlp.c_fc:fprop")
    assert it.margin == 1
    expected = {
        "h.0.attn.qkv": {"fprop", "dgrad", "wgrad"}, "h.1.attn.qkv": {"dgrad", "wgrad"}, "h.10.attn.qkv": {"dgrad"},
        "h.1.mlp.c_fc": {"fprop", "wgrad"}, "h.1.mlp.c_proj": {"wgrad"}, "h.2.mlp.c_fc": {"fprop"}, "h.2.mlp.c_proj": set(),
    }  # fmt: skip
    assert {name: it.gemms_in_bf16(name) for name in expected} == expected
    whole, parts = parse_recipe("delayed:bf16=*"), parse_recipe("delayed:bf16=*:fprop+*:dgrad+*:wgrad")
    assert whole.gemms_in_bf16("h.3.mlp.c_fc") == parts.gemms_in_bf16("h.3.mlp.c_fc") == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("delayed:interval=4", "interval 4"),
        ("delayed:margin=much", "margin takes a whole number, not 'much'"),
        ("delayed:fprop=1", "'fprop' cannot be set; what can: margin"),
        ("delay", "unknown recipe 'delay'"),
        ("delayed:amax_compute_algo=mean", "choose max or most_recent"),
        ("delayed:margin=-1", "below 0 every scale would overflow"),
        ("current:margin=1", "'current' has no history"),
        ("mxfp8:amax_history_len=99", "'mxfp8' has no history"),
        ("delayed:bf16=h.0:wgrat", "bf16=h.0:wgrat: 'wgrat' is no GEMM of a layer: choose fprop, dgrad, wgrad, or none for all"),
        ("delayed:bf16=h.0:", "bf16=h.0:: '' is no GEMM of a layer"),
    ],
)
def test_flags_that_name_no_recipe_are_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        parse_recipe(text)
