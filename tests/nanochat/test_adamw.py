"""AdamW against its formula in fp64, storage in bf16, and its state by name."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from nanochat import optimizer
from nanochat.adamw import AdamW
from nanochat.errors import BadInput
from nvfp8.state import codec

HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


def make(values: dict[str, Tensor], **hyper: Any) -> tuple[dict[str, Tensor], AdamW]:
    params = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
    return params, AdamW([{"params": list(params.values()), "names": list(params), **HYPER, "master": False, **hyper}])


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


def test_a_codec_overrides_the_parameters_dtype() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    opt = AdamW([{"params": [p], "names": ["p"], **HYPER, "master": False}], codec("fp32"))
    assert opt.state_tensors()["p.exp_avg"].dtype == torch.float32


def test_bf16_gradients_of_fp32_weights_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    start, grad = torch.randn(50), torch.randn(50).bfloat16()
    wide, opt = make({"w": start})
    run(wide, opt, [{"w": grad.float()}])
    narrow, opt = make({"w": start})
    monkeypatch.setattr("nanochat.adamw.gradient", lambda p: grad)
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


def test_a_remainder_is_not_dropped_in_silence() -> None:
    params, opt = make({"w": torch.ones(6).bfloat16()}, master=True)
    saved = opt.state_tensors()
    del saved["w.master"]
    with pytest.raises(BadInput, match=r"completes w by w\.remainder; resume with --adamw te-remainders"):
        opt.load_state_tensors({**saved, "w.remainder": torch.zeros(6, dtype=torch.int16)}, {"w": params["w"].detach()})


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
    with pytest.raises(BadInput, match=r"a\.exp_avg is torch\.float32 \(3, 4\).*needs torch\.float32 \(4, 3\)"):
        opt.load_state_tensors({**good, "a.exp_avg": torch.zeros(3, 4)}, {})
    with pytest.raises(BadInput, match=r"a\.exp_avg is torch\.bfloat16"):
        opt.load_state_tensors({**good, "a.exp_avg": torch.zeros(4, 3).bfloat16()}, {})


def test_names_must_match_parameters_and_torchs_own_state_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="1 parameters but 2 names"):
        AdamW([{"params": [p], "names": ["a", "b"], **HYPER, "master": False}])
    q = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="two parameters are called 'a'"):
        AdamW([{"params": [p, q], "names": ["a", "a"], **HYPER, "master": False}])
    opt = AdamW([{"params": [p], "names": ["a"], **HYPER, "master": False}])
    with pytest.raises(NotImplementedError, match="state_tensors"):
        opt.state_dict()
    with pytest.raises(NotImplementedError, match="state_tensors"):
        opt.load_state_dict({})


def test_an_empty_group_is_a_rank_that_owns_nothing() -> None:
    opt = AdamW([{"params": [], "names": [], **HYPER, "master": False}])
    opt.step()
    assert list(opt.state_tensors()) == ["adamw.steps"]


def test_compiles_one_graph_for_each_dtype_whatever_shapes_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    once: dict[Any, Any] = {}

    def compiled(function: Any, tensor: Tensor) -> Any:
        if function not in once:
            once[function] = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
        return once[function]

    monkeypatch.setattr("nanochat.adamw.fused", compiled)
    shapes = {"wte": (64, 16), "ve": (64, 8), "lm_head": (64, 16), "other": (33, 7)}
    start = {k: torch.randn(s, dtype=torch.float32 if k == "lm_head" else torch.bfloat16) for k, s in shapes.items()}
    params, opt = make(start)
    plain_params, plain = make(start)
    for step in range(3):
        grads = {k: torch.randn_like(v) for k, v in start.items()}
        opt.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.1 * (step + 1)
        run(params, opt, [grads])
        with monkeypatch.context() as m:
            m.setattr("nanochat.adamw.fused", lambda function, _: function)
            run(plain_params, plain, [grads])
    assert counter.frame_count == 2
    for name in start:
        assert torch.equal(params[name], plain_params[name])


def test_on_a_cpu_functions_stay_eager() -> None:
    def function() -> None: ...

    assert optimizer.fused(function, torch.empty(10_000)) is function
    assert math.isclose(float(optimizer.scalar(0.1)), 0.1, rel_tol=1e-7)
