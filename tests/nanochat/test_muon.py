"""Muon against its rule in fp64, written one matrix at a time; bf16 against the same rule rounded everywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.errors import BadInput
from nanochat.muon import POLAR_EXPRESS, Muon, polar_express
from nvfp8.state import codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER = {"lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.3}
SHAPES = {"wide": (8, 24), "wide2": (8, 24), "tall": (24, 8), "square": (12, 12), "square2": (12, 12), "gate": (1, 12)}


def orthogonalize(x: Tensor) -> Tensor:
    """From the Nesterov gradient to the polar factor, in x's dtype throughout."""
    r, c = x.shape
    target = x.float().norm() / math.sqrt(r) if x.dtype == torch.bfloat16 else x.norm() / math.sqrt(r)
    rows = x.to(target.dtype).norm(dim=1, keepdim=True).clamp_min(1e-6)
    x = x * (target / rows).to(x.dtype)
    x = x / (x.norm() * 1.01 + 1e-6)
    for a, b, c2 in POLAR_EXPRESS:
        if r > c:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c2 * (gram @ gram))
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c2 * (gram @ gram)) @ x
    return x


def twin_step(
    w: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, momentum: float, beta2: float, weight_decay: float
) -> Tensor:
    """One step of one fp64 matrix; `state` holds m and v."""
    r, c = w.shape
    state["m"] = momentum * state["m"] + (1 - momentum) * g
    u = orthogonalize((1 - momentum) * g + momentum * state["m"])
    u = u * math.sqrt(min(r, c)) / u.norm().clamp_min(1e-6)
    norm = u.norm()
    mean_square = (u**2).mean(dim=1 if r >= c else 0, keepdim=True)
    state["v"] = beta2 * state["v"] + (1 - beta2) * mean_square
    u = u / state["v"].clamp_min(1e-10).sqrt()
    u = u * norm / u.norm().clamp_min(1e-10)
    lr = lr * math.sqrt(max(1, r / c))
    return w - lr * u - lr * weight_decay * w * (u * w >= 0)


def make(start: dict[str, Tensor], dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[dict[str, Tensor], Muon]:
    params = {name: torch.nn.Parameter(v.clone()) for name, v in start.items()}
    return params, Muon([{"params": list(params.values()), "names": list(params), **HYPER}], dtype, **kwargs)


def run(params: dict[str, Tensor], opt: Muon, grads: list[dict[str, Tensor]]) -> None:
    for step in grads:
        for name, p in params.items():
            p.grad = step[name].clone()
        opt.step()


def problem(steps: int, scale: float = 1e-2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    start = {k: torch.randn(s) for k, s in SHAPES.items()}
    return start, [{k: scale * torch.randn(s) for k, s in SHAPES.items()} for _ in range(steps)]


def test_fp32_follows_the_rule() -> None:
    start, grads = problem(4)
    params, opt = make(start)
    run(params, opt, grads)
    for name, p in params.items():
        w = start[name].double()
        r, c = w.shape
        state = {"m": torch.zeros_like(w), "v": torch.zeros((r, 1) if r >= c else (1, c), dtype=torch.float64)}
        for g in grads:
            w = twin_step(w, g[name].double(), state, **HYPER)
        torch.testing.assert_close(p.double(), w, rtol=1e-5, atol=1e-5)
        saved = opt.state_tensors()
        torch.testing.assert_close(saved[f"{name}.momentum"].double(), state["m"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(saved[f"{name}.second_moment"].double(), state["v"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_bf16_errs_no_more_than_the_rule_rounded_at_each_operation(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, *shape).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02)
    exact, rounded = torch.stack([orthogonalize(m.double()) for m in x]), torch.stack([orthogonalize(m) for m in x])
    w = {str(i): torch.zeros(shape) for i in range(2)}
    params, opt = make(w, torch.bfloat16)
    for group in opt.param_groups:
        group.update(momentum=0.0, weight_decay=0.0, beta2=1.0 - 1e-12, lr=1.0)  # the second moment stays at its floor
    run(params, opt, [{str(i): m.float() for i, m in enumerate(x)}])
    got = -torch.stack([params[str(i)].detach() for i in range(2)]).double()
    exact, rounded, got = (t / t.double().norm(dim=(-2, -1), keepdim=True) for t in (exact, rounded.double(), got))
    assert (got - exact).norm() <= 1.05 * (rounded - exact).norm()
    assert (got - exact).norm() > 0  # it did run in bf16


def test_polar_express_brings_singular_values_near_one_and_keeps_vectors() -> None:
    torch.manual_seed(2)
    for shape in ((3, 16, 16), (2, 16, 40), (2, 40, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True))
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        y = polar_express(x.clone())
        inner = u.mT @ y @ vh.mT
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-9
        assert diagonal.min() > 0.5
        assert diagonal.max() < 1.2


def test_a_zero_gradient_only_decays_and_makes_no_nan() -> None:
    start, _ = problem(0)
    params, opt = make(start)
    run(params, opt, [{k: torch.zeros(s) for k, s in SHAPES.items()}])
    for name, p in params.items():
        r, c = p.shape
        lr = HYPER["lr"] * math.sqrt(max(1, r / c))
        torch.testing.assert_close(p.detach(), start[name] * (1 - lr * HYPER["weight_decay"]))


def test_a_row_without_gradient_is_no_trouble() -> None:
    start, grads = problem(1)
    grads[0]["square"][3] = 0
    params, opt = make(start)
    run(params, opt, grads)
    w, state = start["square"].double(), {"m": torch.zeros(12, 12).double(), "v": torch.zeros(12, 1).double()}
    torch.testing.assert_close(
        params["square"].double(), twin_step(w, grads[0]["square"].double(), state, **HYPER), rtol=1e-5, atol=1e-5
    )


def test_chunks_change_nothing_and_obey_the_bound() -> None:
    torch.manual_seed(3)
    start = {str(i): torch.randn(6, 10) for i in range(7)}
    grads = [{k: torch.randn_like(v) for k, v in start.items()} for _ in range(2)]
    matrix = 4 * 2 * (60 + 36)
    results = []
    for workspace, chunk in ((1, 1), (3 * matrix, 3), (2**20, 7)):
        params, opt = make(start, workspace=workspace)
        assert opt._chunk(opt._stacks[0][0]) == chunk
        run(params, opt, grads)
        results.append(torch.stack([p.detach() for p in params.values()]))
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=1e-5, atol=1e-6)


def test_bf16_gradients_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    start, grads = problem(2)
    grads = [{k: v.bfloat16().float() for k, v in g.items()} for g in grads]
    wide, opt = make(start)
    run(wide, opt, grads)
    narrow, opt = make(start)
    monkeypatch.setattr("nanochat.muon.gradient", lambda p: p.grad.bfloat16())
    run(narrow, opt, grads)
    for k in start:
        assert torch.equal(wide[k], narrow[k])


def test_a_bf16_momentum_is_kept_as_bf16() -> None:
    start, grads = problem(1)
    params, opt = make(start, codec=codec("bf16"))
    run(params, opt, grads)
    state = opt.state_tensors()
    assert torch.equal(state["tall.momentum"], ((1 - HYPER["momentum"]) * grads[0]["tall"]).bfloat16())
    assert state["tall.second_moment"].dtype == torch.float32


def test_resuming_gives_the_same_run_and_misfits_are_named() -> None:
    start, grads = problem(4)
    whole, opt = make(start)
    run(whole, opt, grads)
    half, first = make(start)
    run(half, first, grads[:2])
    saved = {k: v.clone() for k, v in first.state_tensors().items()}
    assert saved["gate.second_moment"].shape == (1, 12)
    assert saved["tall.second_moment"].shape == (24, 1)
    # Another owner's share: the order of matrices in a stack differs from the one that saved.
    rest, second = make({k: half[k].detach() for k in reversed(start)})
    second.load_state_tensors(saved, {})
    assert second.steps == 2
    run(rest, second, grads[2:])
    for name in start:
        torch.testing.assert_close(whole[name].detach(), rest[name].detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(BadInput, match=r"lacks the optimizer state wide\.momentum"):
        second.load_state_tensors({k: v for k, v in saved.items() if k != "wide.momentum"}, {})
    with pytest.raises(BadInput, match=r"tall\.momentum is .*\(8, 24\)"):
        second.load_state_tensors({**saved, "tall.momentum": torch.zeros(8, 24)}, {})


def test_bf16_matrices_have_fp32_masters() -> None:
    start, grads = problem(5)
    start = {name: value.bfloat16().float() for name, value in start.items()}
    wide, opt = make(start)
    run(wide, opt, grads)
    narrow, low = make({name: value.bfloat16() for name, value in start.items()})
    run(narrow, low, [{name: grad.bfloat16() for name, grad in step.items()} for step in grads])
    rounded, other = make(start)
    run(rounded, other, [{name: grad.bfloat16().float() for name, grad in step.items()} for step in grads])
    for name in start:
        master = low.state_tensors()[f"{name}.master"]
        torch.testing.assert_close(master, rounded[name].detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(narrow[name].detach(), master.bfloat16())
    # Resumed by a run with fp32 matrices, and from there by one with bf16 matrices again.
    back, second = make(start)
    second.load_state_tensors(low.state_tensors(), {name: p.detach() for name, p in narrow.items()})
    assert all(torch.equal(back[name].detach(), low.state_tensors()[f"{name}.master"]) for name in start)
    _, third = make({name: value.bfloat16() for name, value in start.items()})
    third.load_state_tensors(second.state_tensors(), {name: p.detach() for name, p in back.items()})
    assert all(torch.equal(third.state_tensors()[f"{name}.master"], back[name].detach()) for name in start)


def test_a_vector_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, lambdas has shape \(3,\)"):
        make({"lambdas": torch.zeros(3)})


def test_on_kernels_it_follows_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter without a GPU; some gradients missing, one strided, chunks of one and two matrices."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    monkeypatch.setattr("nanochat.muon.ops", lambda x: kernels)
    start, grads = problem(3)
    params, opt = make({name: value.to(DEVICE) for name, value in start.items()}, workspace=4 * 2 * 2 * (8 * 24 + 8 * 8))
    assert {opt._chunk(stack) for stack in opt._stacks[0]} == {1, 2}
    for i, step in enumerate(grads):
        for name, p in params.items():
            p.grad = step[name].to(DEVICE)
        params["tall"].grad = step["tall"].mT.contiguous().mT.to(DEVICE)
        if i:
            params["wide2"].grad, step["wide2"] = None, torch.zeros(8, 24)
        opt.step()
    for name, p in params.items():
        w = start[name].double()
        r, c = w.shape
        state = {"m": torch.zeros_like(w), "v": torch.zeros((r, 1) if r >= c else (1, c), dtype=torch.float64)}
        for g in grads:
            w = twin_step(w, g[name].double(), state, **HYPER)
        torch.testing.assert_close(p.detach().cpu().double(), w, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_schedule_compiles_nothing_anew_and_shapes_little(dtype: torch.dtype) -> None:
    from nvfp8.kernels import muon as kernels

    both = kernels._muon_nesterov, kernels._muon_descend
    for kernel in both:
        kernel.device_caches.clear()  # what other tests compiled
    # d24 in small: the kernels distinguish columns that 16 divides, and the descent a scale by row from one by column
    shapes = {"q": (32, 32), "k": (32, 32), "fc": (128, 32), "proj": (32, 128), "gate": (6, 12), "gate2": (8, 12), "row": (1, 12)}
    start = {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}
    params, opt = make(start, torch.bfloat16, workspace=1)
    for lr, momentum, decay in ((0.1, 0.85, 0.1), (0.02, 0.97, 0.05), (1, 0, 0), (0.0, 1.0, 0.0)):
        opt.param_groups[0].update(lr=lr, momentum=momentum, weight_decay=decay)
        run(params, opt, [{name: torch.randn_like(value) for name, value in start.items()}])
        assert [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in both] == [2, 3]
