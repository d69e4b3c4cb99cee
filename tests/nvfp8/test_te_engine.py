"""The logic around Transformer Engine's modules, on any machine: a stand-in for the engine shows what it is told and when."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp8 import te_engine
from nvfp8.precision import te as te_precision
from nvfp8.recipe import RECIPES, recipe

WIDTH = 32


class Module(nn.Module):
    """As much of a module as an engine touches: it records its calls and multiplies by its weight."""

    def __init__(self, width: int, out: int, **options: Any):
        super().__init__()
        self.options, self.calls, self.fp8_meta = options, [], {}
        split = options.get("parameters_split")
        self.weight_names = [f"{part}_weight" for part in split] if split else ["weight"]
        for name, rows in zip(self.weight_names, split.values() if split else [out], strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(rows, width)))
        self.register_parameter("layer_norm_weight", nn.Parameter(torch.empty(width)))
        self.fails = False

    def init_fp8_metadata(self, num_gemms: int) -> None:
        for key, rows in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(rows), amax_history=torch.zeros(16, rows))
        self.fp8_meta["fp8_max_fwd"] = 448.0

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self.calls.append(is_first_microbatch)
        if self.fails:
            raise RuntimeError("out of memory")
        return x @ torch.cat([getattr(self, name) for name in self.weight_names]).to(x.dtype).t()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def autocast(**options: Any) -> Iterator[None]:
        yield

    engine = SimpleNamespace(Linear=Module, LayerNormLinear=Module, autocast=autocast)
    monkeypatch.setattr(te_engine, "engine", lambda: engine)
    monkeypatch.setattr(te_engine, "te_recipe", lambda given: given)


def layer(name: str = "delayed") -> nn.Module:
    made = te_precision(RECIPES[name]).linear(WIDTH, WIDTH)
    nn.init.normal_(made.weight)
    return made


def x() -> Tensor:
    return torch.randn(16, WIDTH, dtype=torch.bfloat16)


def test_weights_are_first_where_they_have_changed() -> None:
    made = layer("current")
    with te_engine.autocast(RECIPES["current"], 1e-5):
        made(x()), made(x())
        with torch.no_grad():
            made.weight.mul_(0.5)
        made(x()), made(x())
    made(x())  # evaluation
    with te_engine.autocast(RECIPES["current"], 1e-5):
        made(x())
    assert made.engine.module.calls == [True, False, True, False, None, False]


def test_a_forward_that_failed_leaves_the_change_to_be_cast() -> None:
    made = layer("current")
    with te_engine.autocast(RECIPES["current"], 1e-5):
        made(x())
        made.engine.module.fails = True
        with torch.no_grad():
            made.weight.mul_(0.5)
        with pytest.raises(RuntimeError, match="out of memory"):
            made(x())
        made.engine.module.fails = False
        made(x())
    assert made.engine.module.calls == [True, True, True]


def test_the_module_is_built_again_around_other_parameters() -> None:
    made = layer()
    made(x())
    first = made.engine.module
    made(x())
    assert made.engine.module is first and first.weight is made.weight
    made.load_state_dict({"weight": torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)}, assign=True)
    made(x())
    second = made.engine.module
    assert second is not first and second.weight is made.weight
    made.weight.data = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16)
    with te_engine.autocast(RECIPES["delayed"], 1e-5):
        made(x())
    assert made.engine.module is not second and made.engine.module.calls == [True]


def test_what_is_built_while_generating_can_be_trained() -> None:
    made = layer()
    projections = [layer() for _ in range(3)]
    joined = te_precision(RECIPES["delayed"]).norm_linear(*projections)
    with torch.inference_mode():
        made(x()), joined.engine(x())
    made(x()).sum().backward(), joined.engine(x()).sum().backward()
    assert all(each.weight.grad is not None for each in (made, *projections))


def test_stacked_weights_are_views_of_one_buffer_and_keep_their_values() -> None:
    projections = [layer() for _ in range(3)]
    before = torch.cat([projection.weight.detach().clone() for projection in projections])
    joined = te_precision(RECIPES["delayed"]).norm_linear(*projections)
    joined.engine(x())
    assert torch.equal(torch.cat([projection.weight for projection in projections]), before)
    assert len({projection.weight.untyped_storage().data_ptr() for projection in projections}) == 1
    assert [p for p in joined.parameters()] == []  # the projections are their owner's, gamma is nobody's


def gradient_scale(made: nn.Module) -> float:
    return float(made.engine.module.fp8_meta["scaling_bwd"].scale[0])


@pytest.mark.parametrize("before", ["nothing", "evaluation", "evaluation and assign", "evaluation, saved and loaded"])
def test_gradients_begin_with_the_losses_scale_whatever_came_before(before: str) -> None:
    made = layer()
    if before != "nothing":
        made(x())
    if before == "evaluation and assign":
        made.load_state_dict({"weight": made.weight.detach().clone()}, assign=True)
    if before == "evaluation, saved and loaded":
        saved = made.engine.scaling_state()
        made = layer()
        made.engine.load_scaling_state(saved)
    with te_engine.autocast(RECIPES["delayed"], 2.0**-18):
        made(x())
    assert gradient_scale(made) == 64 * 2**18


def test_a_history_goes_on() -> None:
    made = layer()
    with te_engine.autocast(RECIPES["delayed"], 2.0**-18):
        made(x())
    state = made.engine.scaling_state()
    state["amax_history_bwd"][3, 1], state["scale_bwd"][:] = 0.25, 1792.0
    other = layer()
    other.engine.load_scaling_state({name: value.clone() for name, value in state.items()})
    with te_engine.autocast(RECIPES["delayed"], 2.0**-10):
        other(x())
    assert gradient_scale(other) == 1792.0
    assert torch.equal(other.engine.scaling_state()["amax_history_bwd"], state["amax_history_bwd"])


def test_a_weight_takes_the_scale_of_its_own_amax() -> None:
    made = te_precision(recipe("delayed", margin=1)).linear(WIDTH, WIDTH)
    with torch.no_grad():
        made.weight.zero_()
        with te_engine.autocast(RECIPES["delayed"], 1e-5):
            made(x())
            assert made.engine.scaling_state()["scale_fwd"].tolist() == [1, 1, 1]  # of zeros there is none
            made.weight[3, 5] = -0.5
            made(x())
    assert made.engine.scaling_state()["scale_fwd"].tolist() == [1, 448, 1]


def test_what_was_not_finite_is_forgotten() -> None:
    made = layer()
    with te_engine.autocast(RECIPES["delayed"], 1e-5):
        made(x())
    history = made.engine.scaling_state()["amax_history_bwd"]
    history[0, 0], history[1, 0], history[2, 0] = torch.inf, torch.nan, 3.0
    made.engine.forget_nonfinite()
    assert history[:3, 0].tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scale_fwd": None}, r"scale_fwd is missing"),
        ({"amax_history_bwd": torch.zeros(4, 2)}, r"amax_history_bwd is \(4, 2\), \(16, 2\) is needed"),
        ({"scale_bwd": torch.ones(4)}, r"scale_bwd is \(4,\), \(2,\) is needed"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Tensor | None], line: str) -> None:
    made = layer()
    made(x())
    state = {**made.engine.scaling_state(), **change}
    with pytest.raises(ValueError, match=line):
        layer().engine.load_scaling_state({name: value for name, value in state.items() if value is not None})


def test_autocast_ends_with_an_exception() -> None:
    made = layer()
    with pytest.raises(RuntimeError, match="stop"), te_engine.autocast(RECIPES["delayed"], 1e-5):
        raise RuntimeError("stop")
    made(x())
    assert made.engine.module.calls == [None]


def test_gradients_of_fp8_weights_are_handed_over_and_summed() -> None:
    holders = [nn.Linear(WIDTH, rows, bias=False) for rows in (8, 24)]
    hook = te_engine._hand_over(tuple(holders))
    weight = nn.Parameter(torch.zeros(32, WIDTH, dtype=torch.bfloat16))
    total = torch.zeros(32, WIDTH)
    for _ in range(3):
        weight.grad = torch.randn(32, WIDTH).bfloat16()
        total += weight.grad.float()
        hook(weight)
        assert weight.grad is None
    grads = [holder.weight.grad for holder in holders]
    assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in grads)
    torch.testing.assert_close(torch.cat(grads).float(), total, rtol=2**-7, atol=2**-7)


def test_a_joined_projection_has_no_scaling_state_of_its_own() -> None:
    """A checkpoint holds the state of what computes; asked for that of c_q too, no run could be resumed."""
    precision = te_precision(RECIPES["delayed"])
    projections = [precision.linear(WIDTH, WIDTH) for _ in range(3)]
    joined, mlp = precision.norm_linear(*projections), precision.mlp(WIDTH, 4 * WIDTH)
    assert all(part.engine is None for part in (*projections, mlp.c_fc, mlp.c_proj))
    assert joined.engine.weights == {"weight": tuple(projections)}
    assert mlp.engine.weights == {"fc1_weight": (mlp.c_fc,), "fc2_weight": (mlp.c_proj,)}
