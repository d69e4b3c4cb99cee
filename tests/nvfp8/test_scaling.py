"""Scales follow amaxes as a recipe says: once a step, over all ranks; what is not finite is named and does not count."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp8 import scaling as module
from nvfp8.quantize import quantize
from nvfp8.recipe import RECIPES, Recipe, recipe
from nvfp8.scaling import Scaling, Site

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def scaling_of(chosen: Recipe) -> Scaling:
    """Of two layers: a norm's output, an activation, a weight and a gradient, and one more activation."""
    x, w, dy = chosen.fprop.left, chosen.fprop.right, chosen.dgrad.left
    first = [Site("the input of {}.c_fc", "normed", x, True, 64), Site("the input of {}.c_proj", "activation", x, True)]
    first += [Site("the weight of {}.c_proj", "weight", w, True), Site("the gradient that reaches {}.c_proj", "gradient", dy, True)]
    return Scaling({"h.0.mlp": first, "h.1.attn": [Site("the input of {}", "activation", x, True)]}, chosen)


def begun(chosen: Recipe) -> Scaling:
    made = scaling_of(chosen)
    made.begin(DEVICE, 2.0**-18)
    return made


def see(scaling: Scaling, *amaxes: float) -> list[str]:
    assert scaling.amax is not None
    scaling.amax.copy_(torch.tensor(amaxes))
    return scaling.update()


def test_scales_before_there_is_a_history() -> None:
    scaling = begun(RECIPES["delayed"])
    assert scaling.scale.tolist() == [448 / 8, 1, 1, 64 * 2**18, 1]
    assert [site.ready for site in scaling.sites] == [True, False, False, True, False]
    # E4M3 spans 2^18 only: there a gradient is measured.
    assert [site.ready for site in begun(RECIPES["e4m3"]).sites] == [True, False, False, False, False]
    assert [site.ready for site in begun(RECIPES["current"]).sites] == [True, False, False, False, False]
    scaling.begin(DEVICE, 2.0**-10)  # another accumulation
    assert scaling.scale[3] == 64 * 2**10


def test_all_views_are_aligned_alike() -> None:
    """A kernel is compiled for pointers that are multiples of 16, and again for those that are not."""
    sites = begun(RECIPES["delayed"]).sites
    assert {view.data_ptr() % 16 for site in sites for view in (site.amax, site.scale, site.inverse)} == {0}


def test_a_norms_output_never_saturates() -> None:
    """|x̂| ≤ √D, reached where one channel holds everything; other rows lose nothing that E4M3 has."""
    site = Site("{}", "normed", RECIPES["delayed"].fprop.left, True, 1536)
    Scaling({"one": [site]}, RECIPES["delayed"]).begin(DEVICE, 1.0)
    rows = torch.randn(64, 1536, device=DEVICE)
    rows[0] = 0
    rows[0, 7] = -3.0
    normed = rows / rows.square().mean(-1, keepdim=True).sqrt()
    cast = quantize(normed, site, columns=False)
    assert cast.q is not None
    back = cast.q.float() * cast.inverse
    assert float(back[0, 7]) == pytest.approx(-math.sqrt(1536), rel=1e-3)
    noise = (back - normed)[1:].norm() / normed[1:].norm()
    assert -20 * math.log10(float(noise)) > 31.4  # as at the best scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_scales_follow_the_history(algorithm: str) -> None:
    scaling = begun(recipe("delayed", margin=1, amax_history_len=3, amax_compute_algo=algorithm))
    expected = {"max": [4, 4, 4, 2, 2], "most_recent": [4, 1, 2, 2, 1]}[algorithm]
    for amax, counts in zip([4, 1, 2, 2, 1], expected, strict=True):
        assert see(scaling, 7, amax, 5, amax / 1024, 3 * amax) == []
        assert scaling.scale.tolist() == [56, 224 / counts, 1, 57344 / 2 * 1024 / counts, pytest.approx(224 / (3 * counts))]
        torch.testing.assert_close(scaling.inverse * scaling.scale, torch.ones(5, device=DEVICE))
        assert scaling.amax is not None and not scaling.amax.any()
    assert scaling.history.shape == (3, 5) and scaling.history[:, 1].tolist() == [1, 2, 2]


def test_zeros_are_no_history_and_leave_the_scale() -> None:
    scaling = begun(recipe("delayed", amax_history_len=2))
    see(scaling, 1, 0, 1, 0, 2)  # as where c_proj begins with zeros
    assert scaling.seen[1:] == [False, True, False, True] and scaling.scale[3] == 64 * 2**18
    see(scaling, 1, 3, 1, 1, 2)
    for _ in range(3):
        see(scaling, 1, 0, 1, 0, 0)
    assert scaling.scale.tolist()[1:] == [pytest.approx(448 / 3), 1, 57344, 224] and scaling.seen[1]


def test_a_scale_has_a_reciprocal() -> None:
    scaling = begun(RECIPES["delayed"])
    see(scaling, 1, 1e-44, 1, 1e-44, 1e38)
    assert scaling.scale[1] == 2.0**126 and bool((scaling.inverse > 1.1e-38).all()) and bool(scaling.inverse.isfinite().all())


@pytest.mark.parametrize("name", ["delayed", "current"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_named_and_does_not_count(value: float, name: str) -> None:
    scaling = begun(RECIPES[name])
    see(scaling, 1, 2, 1, 3, 4)
    before = scaling.state()
    assert see(scaling, 1, value, 1, 8, value) == ["the input of h.0.mlp.c_proj", "the input of h.1.attn"]
    assert all(torch.equal(before[key], value) for key, value in scaling.state().items())
    assert see(scaling, 1, 2, 1, 3, 4) == []


def test_an_overflow_is_seen_behind_the_clamp() -> None:
    scaling = begun(RECIPES["delayed"])
    x = torch.ones(16, 64, device=DEVICE, dtype=torch.bfloat16)
    x[3, 5] = torch.inf
    cast = quantize(x, scaling.sites[0])
    assert cast.q is not None and bool(cast.q.float().isfinite().all())
    assert scaling.update() == ["the input of h.0.mlp.c_fc"]


def test_what_a_step_that_is_not_applied_saw_is_forgotten() -> None:
    scaling = begun(RECIPES["delayed"])
    assert scaling.amax is not None
    scaling.amax.fill_(1e6)
    scaling.forget()
    see(scaling, 1, 2, 1, 3, 4)
    assert scaling.scale[1] == 224
    untouched = scaling_of(RECIPES["delayed"])
    untouched.forget()
    assert untouched.update() == []


def test_a_measured_tensor_is_remembered() -> None:
    scaling = begun(RECIPES["delayed"])
    site = scaling.sites[1]
    cast = quantize(torch.full((16, 64), 3.5, device=DEVICE), site, columns=False)
    assert cast.t is None and float(cast.scale) == 128 and float(cast.inverse) == 1 / 128
    scaling.update()
    assert site.ready and float(site.scale) == 128


def test_state_goes_on_where_it_was() -> None:
    chosen = recipe("delayed", amax_history_len=4)
    scaling = begun(chosen)
    for amax in (3.0, 5.0):
        see(scaling, 1, amax, 1, 0, 2 * amax)
    saved = {key: value.clone().cpu() for key, value in scaling.state().items()}
    assert {key: tuple(value.shape) for key, value in saved.items()} == {
        "h.0.mlp.scale": (4,), "h.0.mlp.amax_history": (4, 4), "h.1.attn.scale": (1,), "h.1.attn.amax_history": (4, 1)
    }  # fmt: skip
    other = scaling_of(chosen)
    if DEVICE.type == "cpu":
        other.begin(DEVICE, 1.0)  # also one that has run
    other.load(saved)
    other.begin(DEVICE, 2.0**-18)
    for amax in (1.0, 1.0, 1.0):
        assert torch.equal(other.scale, scaling.scale) and torch.equal(other.history, scaling.history)
        assert [site.ready for site in other.sites] == [site.ready for site in scaling.sites]
        assert torch.equal(other.sites[1].scale, scaling.sites[1].scale)
        see(scaling, 1, amax, 1, amax, 2)
        see(other, 1, amax, 1, amax, 2)


def continued(scaling: Scaling, chosen: Recipe) -> Scaling:
    other = scaling_of(chosen)
    other.load({key: value.clone().cpu() for key, value in scaling.state().items()})
    other.begin(DEVICE, 2.0**-18)
    return other


def test_another_recipe_makes_its_own_scales_of_the_amaxes() -> None:
    """An E5M2 scale would bring a gradient to 57,344, where E4M3 ends at 448: all of it would saturate, and stay finite."""
    scaling = begun(RECIPES["delayed"])
    for amax in (3.0, 5.0, 0.75):
        see(scaling, 1, amax, 1, amax / 1024, 2 * amax)
    assert scaling.scale.tolist()[1:] == [pytest.approx(448 / 5), 1, pytest.approx(57344 * 1024 / 5), pytest.approx(44.8)]
    in_e4m3 = continued(scaling, RECIPES["e4m3"])
    assert in_e4m3.scale.tolist() == [56, pytest.approx(448 / 5), 1, pytest.approx(448 * 1024 / 5), pytest.approx(44.8)]
    torch.testing.assert_close(in_e4m3.inverse * in_e4m3.scale, torch.ones(5, device=DEVICE))
    assert [site.ready for site in in_e4m3.sites] == [True, True, False, True, True]
    dy = torch.linspace(-5, 5, 1024, device=DEVICE).view(16, 64) / 1024
    cast = quantize(dy, in_e4m3.sites[3], columns=False)
    assert cast.q is not None and (cast.q.float() * cast.inverse - dy).norm() < 2**-5 * dy.norm()
    back = continued(in_e4m3, RECIPES["delayed"])
    assert torch.equal(back.scale, scaling.scale) and torch.equal(back.history, scaling.history)
    with_margin = continued(scaling, recipe("delayed", margin=2))
    assert torch.equal(with_margin.scale[[1, 3, 4]] * 4, scaling.scale[[1, 3, 4]])
    newest = continued(scaling, recipe("delayed", amax_compute_algo="most_recent"))
    assert newest.scale.tolist()[1:] == [pytest.approx(448 / 0.75), 1, pytest.approx(57344 * 1024 / 0.75), pytest.approx(448 / 1.5)]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_a_history_of_zeros_keeps_the_scale_in_the_recipe_that_made_it(algorithm: str) -> None:
    changes: dict[str, Any] = {"amax_history_len": 3, "amax_compute_algo": algorithm}
    scaling = begun(recipe("delayed", **changes))
    see(scaling, 1, 3, 1, 7, 11)
    for amax in (5.0, 0.0, 0.0):
        see(scaling, 1, 0, 1, 0, amax)
    assert not scaling.history[:, [1, 3]].any()
    same = continued(scaling, recipe("delayed", **changes))
    assert torch.equal(same.scale, scaling.scale) and same.scale[3] == 57344 / 7 and same.scale[4] == 448 / 5
    assert [site.ready for site in same.sites] == [site.ready for site in scaling.sites] == [True, True, False, True, True]
    # Elsewhere 448 / 3 and 57344 / 7 are no scales to go by, and what their amaxes were is forgotten.
    other = continued(scaling, recipe("delayed", margin=1, **changes))
    assert [site.ready for site in other.sites] == [True, False, False, True, True]
    assert other.scale[3] == 64 * 2**18 and other.scale[4] == 224 / 5


def test_copies_of_weights_have_room_keep_their_amax_and_the_scale_they_were_made_with() -> None:
    chosen = recipe("delayed", amax_history_len=2, margin=1)
    scaling, other = (
        Scaling({"one": [Site(kind, kind, chosen.fprop.left, True) for kind in ("activation", "copies")]}, chosen) for _ in range(2)
    )
    scaling.begin(DEVICE, 1.0)
    copies = scaling.sites[1]
    see(scaling, 3, 5)
    assert scaling.scale.tolist() == [pytest.approx(224 / 3), pytest.approx(56 / 5)] and copies.ready
    made_with = copies.scale.clone()
    copies.in_use = lambda: (made_with,)
    copies.amax.fill_(2)
    assert scaling.amax is not None
    for _ in range(2):
        assert scaling.update() == []
        scaling.forget()
        assert scaling.amax.tolist() == [0, 2], "the copies are still there"
    assert copies.scale == 28 and scaling.sites[0].ready
    state = scaling.state()
    assert state["one.scale"][1] == made_with, "not what the next ones will be made with"
    other.load(state)
    assert other.sites[1].loaded == float(made_with) and other.sites[0].loaded is None
    other.begin(DEVICE, 1.0)
    # Nor does the copies' age make the activation's scale, of whose history zeros are left, another recipe's.
    assert torch.equal(other.scale, scaling.scale) and other.sites[0].ready


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"h.0.mlp.scale": None}, r"the scaling state of h.0.mlp: scale is missing, \(4,\) is needed"),
        ({"h.1.attn.amax_history": torch.zeros(16, 2)}, r"of h.1.attn: amax_history is \(16, 2\), \(16, 1\) is needed"),
        ({"h.0.mlp.amax_history": torch.zeros(3, 4)}, r"of h.0.mlp: amax_history is \(3, 4\), \(16, 4\) is needed"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Tensor | None], line: str) -> None:
    state = {**begun(RECIPES["delayed"]).state(), **change}
    with pytest.raises(ValueError, match=line):
        scaling_of(RECIPES["delayed"]).load({key: value for key, value in state.items() if value is not None})


def test_the_state_of_others_is_none() -> None:
    scaling = scaling_of(RECIPES["delayed"])
    scaling.load({})
    scaling.load({"h.0.mlp.scale_fwd": torch.ones(3), "h.0.mlp.amax_history_fwd": torch.ones(16, 3)})  # Transformer Engine's
    assert not any(scaling.seen)
    current = begun(RECIPES["current"])
    current.load(begun(RECIPES["delayed"]).state())
    assert current.state() == {}


def test_the_update_after_inference_can_be_trained_with() -> None:
    scaling = scaling_of(RECIPES["delayed"])
    with torch.inference_mode():
        scaling.begin(DEVICE, 1.0)
    see(scaling, 1, 2, 1, 3, 4)
    assert not scaling.scale.is_inference() and not scaling.sites[1].scale.is_inference()


def test_autocast_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="stop"), module.autocast(0.5):
        assert module.active() == 0.5
        raise RuntimeError("stop")
    assert module.active() is None


RANKS = """
import os, torch, torch.distributed as dist
from nvfp8.recipe import RECIPES
from nvfp8.scaling import Scaling, Site
dist.init_process_group("gloo")
rank = dist.get_rank()
sites = [Site("the input of {}", "activation", RECIPES["delayed"].fprop.left, True) for _ in range(2)]
scaling = Scaling({"one": sites[:1], "two": sites[1:]}, RECIPES["delayed"])
scaling.begin(torch.device("cpu"), 1.0)
scaling.amax.copy_(torch.tensor([1.0 + rank, 8.0 - rank]))
print(scaling.update(), scaling.scale.tolist())
scaling.amax.copy_(torch.tensor([1.0, float("nan") if rank == 0 else 1.0]))
print(scaling.update(), scaling.scale.tolist())
dist.destroy_process_group()
"""


def test_amaxes_are_those_of_all_ranks(two_ranks: Callable[..., list[Any]]) -> None:
    for process in two_ranks("-c", RANKS):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert out.splitlines() == ["[] [224.0, 56.0]", "['the input of two'] [224.0, 56.0]"]
