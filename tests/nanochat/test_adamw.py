"""AdamW against its formula in fp64, storage in bf16, and its state by name."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.errors import BadInput
from nvfp8.state import MASTERS, STATE_DTYPES, Stored, codec_of, read_weight

HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


def make(values: dict[str, Tensor], **hyper: Any) -> tuple[dict[str, Tensor], AdamW]:
    params = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
    return params, AdamW([{"params": list(params.values()), "param_names": list(params), **HYPER, "master": False, **hyper}])


def twin(p: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Tensor:
    """The recurrence as written in the paper, in fp64."""
    p, m, v = p.double(), torch.zeros_like(p, dtype=torch.float64), torch.zeros_like(p, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        p = p - lr * weight_decay * p
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def run(params: dict[str, Tensor], opt: AdamW, grads: list[dict[str, Tensor]]) -> None:
    for step in grads:
        for name, p in params.items():
            p.grad = step[name].clone()
        opt.step()


def test_fp32_follows_the_formula() -> None:
    torch.manual_seed(0)
    start = {"a": torch.randn(8, 6), "b": torch.randn(1)}
    grads = [{k: torch.randn_like(v) * 10.0 ** -torch.randint(0, 6, v.shape) for k, v in start.items()} for _ in range(7)]
    params, opt = make(start)
    run(params, opt, grads)
    for name, p in params.items():
        expected = twin(start[name], [g[name] for g in grads], **HYPER)
        torch.testing.assert_close(p.double(), expected, rtol=2e-6, atol=2e-6)


def test_bf16_tables_keep_bf16_moments_and_round_each_write_once() -> None:
    torch.manual_seed(1)
    start, grad = torch.randn(64, 4).bfloat16(), torch.randn(64, 4).bfloat16()
    params, opt = make({"t": start})
    run(params, opt, [{"t": grad}])
    state = opt.state_tensors()
    assert params["t"].dtype == state["t.exp_avg"].dtype == state["t.exp_avg_sq"].dtype == torch.bfloat16
    exact = twin(start, [grad], **HYPER)
    nearest = (exact.bfloat16().double() - exact).abs()
    # fp32 before the rounding may fall on the other side of a tie: one rounding, and fp32's own error
    assert ((params["t"].double() - exact).abs() <= nearest + 1e-6 * exact.abs()).all()
    assert torch.equal(state["t.exp_avg"], (0.2 * grad.double()).bfloat16())
    assert torch.equal(state["t.exp_avg_sq"], (0.05 * grad.double() ** 2).bfloat16())


def test_formats_asked_for_override_the_parameters_dtype() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = AdamW([{"params": [p], "param_names": ["p"], **HYPER, "master": False}], exp_avg="fp32", exp_avg_sq="e4m3")
    state = opt.state_tensors()
    assert state["p.exp_avg"].dtype == torch.float32 and state["p.exp_avg_sq"].dtype == torch.float8_e4m3fn
    assert state["p.exp_avg_sq.scale"].shape == (1,)


def test_bf16_gradients_of_fp32_weights_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    start, grad = torch.randn(50), torch.randn(50).bfloat16()
    wide, opt = make({"w": start})
    run(wide, opt, [{"w": grad.float()}])
    narrow, opt = make({"w": start})
    monkeypatch.setattr("nanochat.optimizer.gradient", lambda p: grad)
    opt.step()
    assert torch.equal(wide["w"], narrow["w"])
    assert not torch.equal(wide["w"], start)


def test_no_gradient_counts_as_zeros() -> None:
    params, opt = make({"w": torch.ones(3)})
    opt.step()
    torch.testing.assert_close(params["w"].detach(), torch.full((3,), 1 - 0.02 * 0.1))


def test_eps_bounds_the_step_of_tiny_gradients() -> None:
    params, opt = make({"w": torch.zeros(2)}, lr=1.0)
    run(params, opt, [{"w": torch.tensor([1e-10, 0.0])}])
    torch.testing.assert_close(params["w"].detach(), torch.tensor([-0.5, 0.0]))


def test_hyperparameters_are_read_at_every_step() -> None:
    start, grad = torch.randn(4), torch.randn(4)
    params, opt = make({"w": start}, weight_decay=0.0)
    opt.param_groups[0]["lr"] = 0.5
    run(params, opt, [{"w": grad}])
    torch.testing.assert_close(params["w"].detach(), start - 0.5 * grad.sign())


def test_resuming_gives_the_same_run() -> None:
    torch.manual_seed(2)
    start = {"a": torch.randn(4, 3), "t": torch.randn(5, 2).bfloat16()}
    grads = [{k: torch.randn_like(v) for k, v in start.items()} for _ in range(4)]
    whole, opt = make(start)
    run(whole, opt, grads)
    half, first = make(start)
    run(half, first, grads[:2])
    saved = {k: v.clone() for k, v in first.state_tensors().items()}
    rest, second = make({k: v.detach() for k, v in half.items()})
    second.load_state_tensors({**saved, "of.another.rank": torch.zeros(1)}, {})
    assert second.steps == 2
    run(rest, second, grads[2:])
    for name in start:
        assert torch.equal(whole[name], rest[name])


def test_a_master_keeps_what_bf16_cannot() -> None:
    torch.manual_seed(5)
    start = torch.randn(40).bfloat16()
    grads = [torch.rand(40).bfloat16() for _ in range(200)]  # one way: without a master nothing would move
    params, opt = make({"w": start}, master=True, lr=1e-4)
    run(params, opt, [{"w": grad} for grad in grads])
    exact = twin(start, grads, **{**HYPER, "lr": 1e-4})
    assert set(opt.state_tensors()) == {"w.exp_avg", "w.exp_avg_sq", "w.master", "adamw.steps"}
    # 200 roundings to fp32 of values up to 4, 1.2e-7 each; the way is 2e-2
    torch.testing.assert_close(opt.state_tensors()["w.master"].double(), exact, rtol=0, atol=5e-5)
    assert torch.equal(params["w"].detach(), opt.state_tensors()["w.master"].bfloat16())
    alone, own = make({"w": start}, master=False, lr=1e-4)
    run(alone, own, [{"w": grad} for grad in grads])
    assert (alone["w"].double() - exact).abs().mean() > 2 * (params["w"].double() - exact).abs().mean()


def test_masters_follow_the_dtype_of_the_weights_that_resume() -> None:
    torch.manual_seed(6)
    start = torch.randn(6)
    wide, precise = make({"w": start}, master=True)
    run(wide, precise, [{"w": torch.randn(6)}])
    narrow, low = make({"w": start.bfloat16()}, master=True)
    low.load_state_tensors(precise.state_tensors(), {"w": wide["w"].detach()})
    assert torch.equal(low.state_tensors()["w.master"], wide["w"].detach())
    back, again = make({"w": torch.zeros(6)}, master=True)
    again.load_state_tensors(low.state_tensors(), {"w": narrow["w"].detach()})
    assert torch.equal(back["w"].detach(), wide["w"].detach())


def test_a_step_raises_version_counters() -> None:
    params, opt = make({"w": torch.zeros(3)})
    before = params["w"]._version
    opt.step()
    assert params["w"]._version > before


def test_state_that_does_not_fit_is_named() -> None:
    _, opt = make({"a": torch.zeros(4, 3), "b": torch.zeros(2)})
    good = {k: v.clone() for k, v in opt.state_tensors().items()}
    assert set(good) == {"a.exp_avg", "a.exp_avg_sq", "b.exp_avg", "b.exp_avg_sq", "adamw.steps"}
    lacking = {k: v for k, v in good.items() if not k.startswith("b.")}
    with pytest.raises(BadInput, match=r"lacks the optimizer state b\.exp_avg and 1 more"):
        opt.load_state_tensors(lacking, {})
    opt.load_state_tensors({**good, "a.exp_avg": torch.ones(4, 3), "adamw.steps": torch.tensor(9)}, {})
    assert opt.steps == 9
    assert torch.equal(opt.state_tensors()["a.exp_avg"], torch.ones(4, 3))
    with pytest.raises(BadInput, match=r"a\.exp_avg is torch\.float32 \(3, 4\), \(4, 3\) is needed"):
        opt.load_state_tensors({**good, "a.exp_avg": torch.zeros(3, 4)}, {})
    with pytest.raises(BadInput, match=r"a\.exp_avg is torch\.uint8, which no format here is; resume with"):
        opt.load_state_tensors({**good, "a.exp_avg": torch.zeros(4, 3).byte()}, {})  # FusedAdam's FP8


def test_names_must_match_parameters_and_torchs_own_state_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="1 parameters but 2 names"):
        AdamW([{"params": [p], "param_names": ["a", "b"], **HYPER, "master": False}])
    q = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="two parameters are called 'a'"):
        AdamW([{"params": [p, q], "param_names": ["a", "a"], **HYPER, "master": False}])
    opt = AdamW([{"params": [p], "param_names": ["a"], **HYPER, "master": False}])
    with pytest.raises(NotImplementedError, match="state_tensors"):
        opt.state_dict()
    with pytest.raises(NotImplementedError, match="state_tensors"):
        opt.load_state_dict({})


def test_an_empty_group_is_a_rank_that_owns_nothing() -> None:
    opt = AdamW([{"params": [], "param_names": [], **HYPER, "master": False}])
    opt.step()
    assert opt.state_tensors() == {}
    opt.load_state_tensors({}, {})


FORMATS = list(itertools.product(STATE_DTYPES, STATE_DTYPES, MASTERS))
STEPS = {"fp32": 0.0, "bf16": 2.0**-8, "e4m3": 2.0**-3, "e5m2": 2.0**-2}  # of a stored number, relative


def head_and_table(first: str, second: str, kept: str, **more: Any) -> tuple[dict[str, Tensor], AdamW]:
    """A bf16 head with its master and a bf16 table without, both of more than a block of 128."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(24, 11, generator=generator).bfloat16()) for name in ("head", "table")}
    groups = [
        {"params": [p], "param_names": [name], **HYPER, "master": name == "head"} for name, p in params.items()
    ]  # fmt: skip
    return params, AdamW(groups, exp_avg=first, exp_avg_sq=second, master=kept, **more)


def gradients(steps: int, begin: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7 + begin)
    return [{name: torch.randn(24, 11, generator=generator).bfloat16() for name in ("head", "table")} for _ in range(steps)]


@pytest.mark.parametrize(("first", "second", "kept"), FORMATS)
def test_in_any_formats_a_run_resumes_bit_for_bit(first: str, second: str, kept: str) -> None:
    whole, opt = head_and_table(first, second, kept, seed=3)
    run(whole, opt, gradients(2) + gradients(2, 2))
    half, before = head_and_table(first, second, kept, seed=3)
    run(half, before, gradients(2))
    rest, after = head_and_table(first, second, kept, seed=3)
    for name, p in rest.items():
        p.data.copy_(half[name])
    after.load_state_tensors({k: v.clone() for k, v in before.state_tensors().items()}, {k: p.detach() for k, p in half.items()})
    run(rest, after, gradients(2, 2))
    assert opt.state_tensors().keys() == after.state_tensors().keys()
    for name, value in {**opt.state_tensors(), **whole}.items():
        assert torch.equal(value.detach().float(), {**after.state_tensors(), **rest}[name].detach().float()), name
    beside = {"fp32": {"head.master"}, "bf16": set(), "bf16+8": {"head.remainder"}, "bf16+16": {"head.remainder"}}[kept]
    assert {key for key in opt.state_tensors() if key.endswith(("master", "remainder"))} == beside


def moment(state: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    data = state[f"{name}.{what}"]
    return codec_of(data.dtype, second_moment=what == "exp_avg_sq").decode(Stored(data, state.get(f"{name}.{what}.scale")))


def whole_weight(state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    return read_weight(weight.detach(), state.get("head.master", state.get("head.remainder")))


@pytest.mark.parametrize(("first", "second", "kept"), FORMATS)
@pytest.mark.parametrize(
    "wanted", [("fp32", "fp32", "fp32"), ("bf16", "e5m2", "bf16"), ("e4m3", "e4m3", "bf16+8"), ("e5m2", "bf16", "bf16+16")]
)
def test_any_formats_are_taken_into_any_others(first: str, second: str, kept: str, wanted: tuple[str, str, str]) -> None:
    params, opt = head_and_table(first, second, kept)
    run(params, opt, gradients(3))
    taken, other = head_and_table(*wanted)
    for name, p in taken.items():
        p.data.copy_(params[name])
    saved = opt.state_tensors()
    other.load_state_tensors(saved, {name: p.detach() for name, p in params.items()})
    assert other.steps == 3
    for name in params:
        for what, form in zip(("exp_avg", "exp_avg_sq"), wanted, strict=False):
            before, after = moment(saved, name, what), moment(other.state_tensors(), name, what)
            step = STEPS[form] * (2.3 if what == "exp_avg_sq" and form[0] == "e" else 1)  # of a root: (1 + s)² is 1 + 2s + s²
            assert ((before - after).abs() <= step * (before.abs() + 2.0**-6 * before.abs().max())).all()
    error = {"fp32": 0.0, "bf16": 2.0**-7, "bf16+8": 2.0**-15, "bf16+16": 0.0}[wanted[2]]
    before, after = whole_weight(saved, params["head"]), whole_weight(other.state_tensors(), taken["head"])
    assert ((before - after).abs() <= error * before.abs()).all()


def test_16_bits_of_remainder_are_fp32_bit_for_bit() -> None:
    split, one = head_and_table("fp32", "fp32", "bf16+16")
    copied, other = head_and_table("fp32", "fp32", "fp32")
    for step in gradients(20):
        run(split, one, [step])
        run(copied, other, [step])
    ours, theirs = whole_weight(one.state_tensors(), split["head"]), whole_weight(other.state_tensors(), copied["head"])
    assert torch.equal(ours, theirs)


def updated(kept: str, names: tuple[str, ...], steps: int) -> tuple[dict[str, torch.nn.Parameter], AdamW]:
    """The head, a table or both after updates of 2^-20 each, on weights around 1, whose spacing is 2^-7."""
    params = {name: torch.nn.Parameter(torch.full((512,), 1.0, dtype=torch.bfloat16)) for name in names}
    hyper = {**HYPER, "lr": 2.0**-20, "weight_decay": 0.0}
    opt = AdamW([{"params": [p], "param_names": [n], **hyper, "master": n == "head"} for n, p in params.items()], master=kept)
    for p in params.values():
        p.grad = torch.full_like(p, -1)
    for _ in range(steps):
        opt.step()
    return params, opt


@pytest.mark.parametrize("kept", MASTERS)
def test_10000_updates_far_below_bf16s_spacing_survive(kept: str) -> None:
    """Of tables too, but where masters are fp32 (nanochat's way); the test below stands for those of two more forms."""
    params, opt = updated(kept, ("head", "table") if kept in ("fp32", "bf16+8") else ("head",), 10_000)
    bound = {"fp32": 0.001, "bf16": 0.1, "bf16+8": 0.01, "bf16+16": 0.001}[kept]
    moved = float(whole_weight(opt.state_tensors(), params["head"]).double().mean() - 1)
    assert abs(moved / (10_000 * 2**-20) - 1) < bound
    if "table" in params:
        table = float(params["table"].detach().double().mean() - 1)
        assert table == 0 if kept == "fp32" else abs(table / (10_000 * 2**-20) - 1) < 0.1


def test_tables_are_updated_alike_whatever_bf16_masters_keep() -> None:
    """Bit for bit: nothing in a table's update depends on it."""
    (one, kept), *others = (updated(form, ("table",), 500) for form in MASTERS if form != "fp32")
    assert len(others) == 2 and not torch.equal(one["table"], torch.ones(512))
    for params, opt in others:
        assert torch.equal(params["table"], one["table"])
        assert opt.state_tensors().keys() == kept.state_tensors().keys()
        assert all(torch.equal(value, kept.state_tensors()[name]) for name, value in opt.state_tensors().items())


@pytest.mark.parametrize("first", STATE_DTYPES)
@pytest.mark.parametrize("second", STATE_DTYPES)
@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e6])
def test_no_step_is_larger_than_the_formats_allow(first: str, second: str, outlier: float) -> None:
    """Small gradients beside an outlier, then none.

    A second moment that vanished would make steps of m/eps, and a first one rounded up to its smallest code, where √v is smaller,
    thousands of lr. Without either, m and √v are each off by at most a code: an eighth of themselves, or their smallest.
    """
    grad = torch.cat((torch.tensor([outlier]), torch.logspace(-7, 0, 255)))
    p = torch.nn.Parameter(torch.zeros(256))
    hyper = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 0.0}
    opt = AdamW([{"params": [p], "param_names": ["p"], **hyper, "master": True}], exp_avg=first, exp_avg_sq=second)
    largest = 0.0
    for step in range(60):
        before = p.detach().clone()
        p.grad = grad if step % 3 == 0 else torch.zeros(256)
        opt.step()
        largest = max(largest, float((p.detach() - before).abs().max()))
    assert 0.9 < largest < 2


def test_a_rounding_depends_on_seed_step_and_name_alone() -> None:
    params, opt = head_and_table("e4m3", "e4m3", "bf16")
    run(params, opt, gradients(3))
    alone = torch.nn.Parameter(torch.randn(24, 11, generator=torch.Generator().manual_seed(0)).bfloat16())
    other = AdamW(
        [{"params": [alone], "param_names": ["head"], **HYPER, "master": True}], exp_avg="e4m3", exp_avg_sq="e4m3", master="bf16"
    )
    run({"head": alone}, other, gradients(3))
    assert torch.equal(alone, params["head"])
    assert torch.equal(other.state_tensors()["head.exp_avg"].float(), opt.state_tensors()["head.exp_avg"].float())
    again, seeded = head_and_table("e4m3", "e4m3", "bf16", seed=1)
    run(again, seeded, gradients(3))
    assert not torch.equal(again["head"], params["head"])
