"""FP8 copies of weights that optimizers write: when they count, by which scale they are, and that a resumed run has the same.

Whether an optimizer or the layer writes them must not be seen in a code: the layer's cast is what every test compares with.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvfp8 import reference
from nvfp8.optim import AdamW, Muon, UpdateEarly
from nvfp8.optim.stored import StoredOptimizer
from nvfp8.precision import FP8Precision, fp8
from nvfp8.quantize import Projection, Quantized
from nvfp8.recipe import RECIPES, recipe
from nvfp8.scaling import ROOM, Scaling, Site

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_FP8 = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.skipif(not HAS_FP8, reason="no instruction casts to FP8")]
pytestmark += [pytest.mark.gpu] if DEVICE == "cuda" else []
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")

E4M3, WIDTH = torch.float8_e4m3fn, 128


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


class Model:
    """q, k, v as one GEMM, a linear layer that begins with zeros, and what trains them."""

    def __init__(self, chosen: FP8Precision | None = None, seed: int = 0) -> None:
        self.precision = chosen or fp8(RECIPES["delayed"], emulated=DEVICE == "cpu")
        with torch.device(DEVICE):
            parts = [self.precision.at("qkv").linear(WIDTH, rows) for rows in (WIDTH, 64, 64)]
            joined = self.precision.at("qkv").norm_linear(*parts)
            self.layers = nn.ModuleDict({
                "q": parts[0], "k": parts[1], "v": parts[2], "qkv": joined, "out": self.precision.at("out").linear(256, WIDTH)
            })  # fmt: skip
        with torch.no_grad():
            for i, part in enumerate(parts):
                part.weight.copy_(random(*part.weight.shape, seed=seed + i) / WIDTH**0.5)
            self.layers["out"].weight.zero_()
        scaling = self.precision.scaling(self.layers)
        assert isinstance(scaling, Scaling)
        self.scaling = scaling
        self.projections: list[Projection] = [*joined.projections, *self.layers["out"].projections]

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.layers.named_parameters())

    def backward(self, seed: int) -> None:
        x, x0 = (random(2, 32, WIDTH, seed=100 * seed + i, dtype=torch.bfloat16) for i in range(2))
        lambdas = torch.tensor([1.0, 0.5], device=DEVICE)
        with self.precision.autocast(1 / 64):
            _, _, _, qkv = self.layers["qkv"](x, x0, lambdas, 0)
            out = self.layers["out"](qkv)
        (out * random(*out.shape, seed=100 * seed + 7)).float().mean().backward()

    def step(self, optimizer: StoredOptimizer, seed: int) -> None:
        """As nanochat/train.py does it."""
        optimizer.zero_grad()
        self.backward(seed)
        assert self.scaling.update() == []
        optimizer.step()


def muon(model: Model, named: list[tuple[str, nn.Parameter]] | None = None, lr: float = 0.02, kept: str = "bf16+8") -> Muon:
    given = model.named if named is None else named
    return Muon(given, lr=lr, momentum_dtype="e4m3", master_weights=kept, compute_dtype=torch.float32)


def adamw(model: Model, lr: float = 1e-3) -> AdamW:
    return AdamW(model.named, lr=lr, exp_avg_dtype="e4m3", exp_avg_sq_dtype="e4m3", master_weights="bf16+8")


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[Projection]:
    """Whose weights were cast by their layer."""
    seen: list[Projection] = []
    original = Projection._cast

    def counted(self: Projection) -> Any:
        seen.append(self)
        return original(self)

    monkeypatch.setattr(Projection, "_cast", counted)
    return seen


def codes(quantized: Quantized) -> list[Tensor]:
    assert quantized.q is not None and quantized.t is not None
    return [x.clone() for x in (quantized.q.view(torch.uint8), quantized.t.view(torch.uint8), quantized.scale, quantized.inverse)]


def assert_casts(model: Model) -> None:
    """Each projection's copies are what its layer would cast by the same scale."""
    for projection in model.projections:
        given, w = projection.weight(), torch.cat([weight.detach() for weight in projection.weights])
        q, t = reference.quantize(w, given.scale, E4M3, None, rows=True, columns=True)
        assert q is not None and t is not None
        expected = codes(Quantized(q, t, given.scale, given.scale.reciprocal()))
        assert all(torch.equal(*pair) for pair in zip(codes(given), expected, strict=True))
        assert projection.w.amax == w.float().abs().max(), "amax is the copies'"


@pytest.mark.parametrize("made", [muon, adamw])
def test_copies_are_written_by_the_optimizer_and_layers_cast_nothing(
    made: Callable[[Model], StoredOptimizer], casts: list[Projection]
) -> None:
    model = Model()
    optimizer = made(model)
    for step in range(5):
        casts.clear()
        model.step(optimizer, step)
        # The first has no history, nor has the second of what began with zeros.
        assert len(casts) == {0: 2, 1: 1}.get(step, 0)
    casts.clear()
    places = [x.data_ptr() for projection in model.projections for x in projection.weight()[:2]]
    assert_casts(model)
    assert casts == []
    model.step(optimizer, 9)
    assert places == [x.data_ptr() for projection in model.projections for x in projection.weight()[:2]], "the same memory"
    for projection in model.projections:
        amax = projection.w.amax * projection.weight().scale
        assert 448 / ROOM / 2 < float(amax) <= 448 and torch.equal(projection.weight().scale, projection.w.scale)


def test_an_edited_a_loaded_and_a_foreign_weight_are_cast_by_the_layer(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model, kept="fp32")
    for step in range(3):
        model.step(optimizer, step)
    qkv, out = model.projections

    def edited(change: Callable[[], object]) -> list[Projection]:
        casts.clear()
        with torch.no_grad():
            change()
        assert_casts(model)
        return casts

    k = model.layers["k"].weight
    assert edited(lambda: k.mul_(0.5)) == [qkv]
    assert torch.equal(qkv.weight().scale, qkv.w.scale), "the history's scale serves while it fits"
    assert edited(lambda: k.mul_(64)) == [qkv]
    assert float(k.detach().abs().max() * qkv.weight().scale) == pytest.approx(448), "measured where it does not"
    assert edited(lambda: model.layers.load_state_dict(Model(seed=3).layers.state_dict())) == [qkv, out]
    other = torch.optim.SGD(model.layers.parameters(), lr=0.1)
    for p in model.layers.parameters():
        p.grad = torch.ones_like(p)
    assert edited(other.step) == [qkv, out]
    model.step(optimizer, 7)
    assert edited(lambda: None) == []


def test_a_projection_that_is_updated_in_part_is_cast_by_its_layer(casts: list[Projection]) -> None:
    """By another process, by another optimizer, or because a gradient is missing."""
    for named in (["q.weight", "k.weight", "out.weight"], ["v.weight"], None):
        model = Model()
        qkv, _ = model.projections
        optimizer = muon(model, None if named is None else [(name, p) for name, p in model.named if name in named])
        for step in range(4):
            casts.clear()
            optimizer.zero_grad()
            model.backward(step)
            model.scaling.update()
            if named is None:
                model.layers["v"].weight.grad = None
            before = codes(qkv.weight())[0]
            memory = qkv.weight().q
            optimizer.step()
        assert memory is not None and torch.equal(memory.view(torch.uint8), before) == (named is not None), (
            "not written for nothing"
        )
        assert_casts(model)
        assert casts == [qkv, qkv]


def test_parts_may_be_written_at_different_times(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    optimizer.zero_grad()
    model.backward(3)
    model.scaling.update()
    casts.clear()
    for _, p in reversed(model.named):
        optimizer.update([p])
    assert_casts(model)
    assert casts == []
    before = codes(model.projections[0].weight())
    optimizer.update([model.layers["q"].weight])  # a round that nobody ends
    optimizer.update([model.layers["k"].weight])
    assert_casts(model)
    assert casts == [model.projections[0]]
    assert not torch.equal(before[0], codes(model.projections[0].weight())[0])


def test_updated_early_it_is_the_same_but_for_a_step_of_history(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model)
    early = UpdateEarly([optimizer])
    for step in range(5):
        casts.clear()
        optimizer.param_groups[0]["lr"] = 0.02 * (step + 1)  # what begins with zeros has 1, 3, 6 of the first rate
        early.begin()
        model.backward(step)
        early.finish()
        assert early.bad is None and model.scaling.update() == []
        assert all(float(part.weight().scale * part.w.amax) < 448.001 for part in model.projections)
    assert casts == []
    assert_casts(model)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("made", "algorithm"), [(muon, "max"), (muon, "most_recent"), (adamw, "max")])
def test_a_resumed_run_computes_with_the_same_codes(
    early: bool, made: Callable[[Model], StoredOptimizer], algorithm: str
) -> None:  # fmt: skip
    chosen = recipe("delayed", amax_history_len=2, amax_compute_algo=algorithm)  # so short that every entry counts
    runs = []
    for resumes_at in (None, 2, 3, 4):
        model = Model(fp8(chosen, emulated=DEVICE == "cpu"))
        optimizer = made(model)
        updates = UpdateEarly([optimizer]) if early else None
        seen: list[Tensor] = []
        for step in range(7):
            if step == resumes_at:
                file = io.BytesIO()
                torch.save((model.layers.state_dict(), optimizer.state_dict(), model.scaling.state()), file)
                file.seek(0)
                weights, state, scales = torch.load(file, map_location="cpu")
                model = Model(fp8(chosen, emulated=DEVICE == "cpu"), seed=9)
                optimizer = made(model)
                updates = UpdateEarly([optimizer]) if early else None
                model.layers.load_state_dict(weights)
                optimizer.load_state_dict(state)
                model.scaling.load({key: value.clone() for key, value in scales.items()})
            optimizer.param_groups[0]["lr"] *= step + 1
            if step == 3:  # one that is not applied
                model.backward(step)
                model.scaling.forget()
                optimizer.zero_grad()
            elif updates is not None:
                updates.begin()
                model.backward(step)
                updates.finish()
                assert model.scaling.update() == []
            else:
                model.step(optimizer, step)
                optimizer.zero_grad()
            if step >= 4:
                seen += [x for projection in model.projections for x in codes(projection.weight())]
                seen.append(model.scaling.history.clone())
        runs.append(seen)
    for resumed in runs[1:]:
        assert len(resumed) == len(runs[0]) and all(torch.equal(*pair) for pair in zip(runs[0], resumed, strict=True))


def test_the_state_of_earlier_versions_is_taken_and_its_weights_are_measured(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    saved = {key: value.clone() for key, value in model.scaling.state().items()}
    places = {"qkv": 1, "out": 1}
    for layer, place in places.items():
        assert saved[f"{layer}.scale"][place] > 0
        saved[f"{layer}.scale"][place] = 0  # as it was
    other = Model()
    other.layers.load_state_dict(model.layers.state_dict())
    other.scaling.load(saved)
    other.backward(1)
    assert len(casts) == len(other.projections) + 2 * 2 - 1
    for projection in other.projections:
        assert not projection.w.ready and float(projection.w.amax * projection.weight().scale) == pytest.approx(448)
    head = Scaling({"head": [Site("{}", "copies", RECIPES["delayed"].fprop.right, True)]}, RECIPES["delayed"])
    head.load({"qkv.amax_history": torch.zeros(16, 3)})
    assert head.seen == [False]


def test_a_weight_may_grow_fourfold_in_a_step_and_one_that_saturates_is_scaled_anew(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model, lr=0.0)
    for step in range(2):
        model.step(optimizer, step)
    qkv = model.projections[0]
    for growth, fits in ((3.0, True), (3.9, True), (20.0, False)):
        before = codes(qkv.weight())
        with torch.no_grad():  # as if a step had made it: the optimizer writes what it finds, with a rate of 0
            for part in qkv.weights:
                part.mul_(growth)
        casts.clear()
        optimizer.step()
        assert casts == []
        w, amax = torch.cat([p.detach() for p in qkv.weights]).float(), qkv.w.amax
        given = qkv.weight()
        assert casts == [] and given.q is not None and amax == w.abs().max()
        assert bool((given.q.float() * given.inverse - w).norm() < 2**-4.5 * w.norm()) == fits, growth
        for _ in range(2):  # the history follows
            model.step(optimizer, step := step + 1)
        assert_casts(model)
        after = qkv.weight()
        assert after.q is not None and (after.q.float() * after.inverse - w).norm() < 2**-4.5 * w.norm()
        assert not torch.equal(before[2], after.scale)


def test_a_graph_from_before_the_step_does_not_see_the_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvfp8.optim.muon.ops", lambda x: kernels)  # which raise no version
    model = Model()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    with model.precision.autocast(1 / 64):
        old = model.layers["out"](random(16, 256, seed=1, dtype=torch.bfloat16).requires_grad_())
    copies = [x for x in model.projections[1].weight()[:2] if x is not None]
    before = [x._version for x in copies]
    optimizer.step()
    assert len(copies) == 2 and all(x._version > version for x, version in zip(copies, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()


def test_what_is_not_applied_leaves_copies_and_their_amax() -> None:
    model = Model()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    before, amaxes = [codes(p.weight()) for p in model.projections], [p.w.amax.clone() for p in model.projections]
    model.backward(3)
    model.scaling.forget()
    model.backward(4)
    assert model.scaling.amax is not None
    model.scaling.amax[0] = torch.inf
    assert model.scaling.update() == [model.scaling.names[0]]
    for projection, was, amax in zip(model.projections, before, amaxes, strict=True):
        assert torch.equal(projection.w.amax, amax) and amax > 0
        assert all(torch.equal(*pair) for pair in zip(codes(projection.weight()), was, strict=True))


@pytest.mark.parametrize("name", ["current", "delayed:dgrad", "delayed:fprop"])
def test_other_scales_and_other_layouts_are_the_layers(name: str, casts: list[Projection]) -> None:
    chosen, _, left = name.partition(":")
    model = Model(fp8(recipe(chosen, **({"bf16": (f"*:{left}",)} if left else {})), emulated=DEVICE == "cpu"))
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
        casts.clear()
        for projection in model.projections:
            scale, w = projection.weight().scale, torch.cat([p.detach() for p in projection.weights])
            assert float(w.abs().max() * scale) == pytest.approx(448, rel=1e-5)
        assert casts == model.projections


def test_weights_in_fp32_are_cast_from_fp32(casts: list[Projection]) -> None:
    model = Model()
    model.layers.float()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    casts.clear()
    assert_casts(model)
    assert casts == []


def test_a_copied_model_has_copies_of_its_own(casts: list[Projection]) -> None:
    model = Model()
    optimizer = muon(model)
    for step in range(3):
        model.step(optimizer, step)
    other = copy.deepcopy(model)
    before = [codes(projection.weight()) for projection in other.projections]
    model.step(optimizer, 3)
    for projection, was in zip(other.projections, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(codes(projection.weight()), was, strict=True))
