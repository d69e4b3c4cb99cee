"""Muon against its rule in fp64, written one matrix at a time; bf16 against the same rule rounded everywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.errors import BadInput
from nanochat.muon import Muon
from nvfp8 import reference
from nvfp8.polar_express import POLAR_EXPRESS, room
from nvfp8.rounding import key
from nvfp8.state import MASTERS, STATE_DTYPES, Stored, codec, codec_of, read_weight

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
    return params, Muon([{"params": list(params.values()), "param_names": list(params), **HYPER}], dtype, **kwargs)


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
        assert opt._chunk(opt._stacks[0]) == chunk
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
    monkeypatch.setattr("nanochat.optimizer.gradient", lambda p: p.grad.bfloat16())
    run(narrow, opt, grads)
    for k in start:
        assert torch.equal(wide[k], narrow[k])


def test_a_bf16_momentum_is_kept_as_bf16() -> None:
    start, grads = problem(1)
    params, opt = make(start, state="bf16")
    run(params, opt, grads)
    state = opt.state_tensors()
    exact = (1 - HYPER["momentum"]) * grads[0]["tall"]
    assert state["tall.momentum"].dtype == torch.bfloat16
    assert ((state["tall.momentum"].float() - exact).abs() <= 2**-7 * exact.abs()).all()
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


FORMATS = [(state, kept) for state in STATE_DTYPES for kept in MASTERS]


@pytest.mark.parametrize(("state", "kept"), FORMATS)
def test_in_any_format_a_run_resumes_bit_for_bit(state: str, kept: str) -> None:
    start, grads = problem(4)
    start = {name: value.bfloat16() for name, value in start.items()}
    grads = [{name: grad.bfloat16() for name, grad in step.items()} for step in grads]
    whole, opt = make(start, state=state, master=kept, seed=5)
    run(whole, opt, grads)
    half, first = make(start, state=state, master=kept, seed=5)
    run(half, first, grads[:2])
    rest, second = make({name: p.detach() for name, p in half.items()}, state=state, master=kept, seed=5)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()}, {k: p.detach() for k, p in half.items()})
    run(rest, second, grads[2:])
    assert opt.state_tensors().keys() == second.state_tensors().keys()
    for name, value in {**opt.state_tensors(), **whole}.items():
        other = {**second.state_tensors(), **rest}[name]
        assert torch.equal(value.detach().float(), other.detach().float()), name
    beside = {"fp32": ["master"], "bf16": [], "bf16+8": ["remainder"], "bf16+16": ["remainder"]}[kept]
    scale = ["momentum.scale"] if state in ("e4m3", "e5m2") else []
    assert {key.removeprefix("gate.") for key in opt.state_tensors() if key.startswith("gate.")} == {
        "momentum", "second_moment", *scale, *beside
    }  # fmt: skip


def test_a_matrix_is_rounded_alike_wherever_it_is_stacked_and_anew_each_step() -> None:
    start, grads = problem(3)
    start = {name: value.bfloat16() for name, value in start.items()}
    grads = [{name: grad.bfloat16() for name, grad in step.items()} for step in grads]
    params, opt = make(start, state="e4m3", master="bf16")
    alone, other = make({name: start[name] for name in ("square2", "wide2")}, state="e4m3", master="bf16")
    run(params, opt, grads)
    run(alone, other, grads)
    for name in alone:
        ours, theirs = (o.state_tensors()[f"{name}.momentum"].float() for o in (opt, other))
        assert torch.equal(ours, theirs)
    states = []
    for seed in (1, 2):
        again, third = make(start, state="e4m3", master="bf16", seed=seed)
        run(again, third, grads)
        states.append(third.state_tensors()["tall.momentum"].float())
    assert not torch.equal(*states)


@pytest.mark.parametrize("saved", FORMATS)
@pytest.mark.parametrize("wanted", [("fp32", "fp32"), ("bf16", "bf16"), ("e4m3", "bf16+8"), ("e5m2", "bf16+16"), ("e4m3", "whole")])
def test_a_checkpoint_of_any_format_is_taken_into_any_other(saved: tuple[str, str], wanted: tuple[str, str]) -> None:
    start, grads = problem(2)
    bf16 = {name: value.bfloat16() for name, value in start.items()}
    params, first = make(bf16, state=saved[0], master=saved[1])
    run(params, first, [{name: grad.bfloat16() for name, grad in step.items()} for step in grads])
    state, weights = first.state_tensors(), {name: p.detach() for name, p in params.items()}
    begun = {name: value.float() if wanted[1] == "whole" else value.clone() for name, value in weights.items()}
    taken, second = make(begun, state=wanted[0], master="fp32" if wanted[1] == "whole" else wanted[1])
    second.load_state_tensors(state, weights)
    assert second.steps == 2
    for name, p in taken.items():
        before, after = (decoded(tensors, name) for tensors in (state, second.state_tensors()))
        step = {"fp32": 0.0, "bf16": 2.0**-8, "e4m3": 2.0**-3, "e5m2": 2.0**-2}[wanted[0]]
        assert ((before - after).abs() <= step * (before.abs() + 2.0**-6 * before.abs().max())).all()
        assert torch.equal(state[f"{name}.second_moment"], second.state_tensors()[f"{name}.second_moment"])
        before, after = whole(state, name, weights[name]), whole(second.state_tensors(), name, p.detach())
        step = {"fp32": 0.0, "whole": 0.0, "bf16": 2.0**-7, "bf16+8": 2.0**-15, "bf16+16": 0.0}[wanted[1]]
        assert ((before - after).abs() <= step * before.abs()).all()


def decoded(state: dict[str, Tensor], name: str) -> Tensor:
    data = state[f"{name}.momentum"]
    return codec_of(data.dtype).decode(Stored(data, state.get(f"{name}.momentum.scale")))


def whole(state: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    return read_weight(weight, state.get(f"{name}.master", state.get(f"{name}.remainder")))


@pytest.mark.parametrize("state", ["e4m3", "e5m2"])
def test_an_fp8_momentum_follows_the_fp32_one_over_100_steps(state: str) -> None:
    """A stochastic rounding errs by at most half a code's step, root mean square: 2^-4 of the value in E4M3, 2^-3 in E5M2.

    Each error decays by μ a step, so they add up to μ/√(1 − μ²) of one; x = (1 − μ)g + μm has μ of that, and where gradients
    have a mean in common, as here and in training, x is as large as m.
    """
    torch.manual_seed(4)
    mu, shape, common = 0.95, (1, 96, 128), torch.randn(1, 96, 128)
    plain, stored = codec("fp32").allocate(shape, "cpu", True), codec(state).allocate(shape, "cpu", True)
    one = {"e4m3": 2**-4, "e5m2": 2**-3}[state]
    worst, along, size = 0.0, 0.0, 0.0
    for step in range(100):
        gradients = (common + torch.randn(shape)).unbind()
        exact, ours = torch.empty(shape), torch.empty(shape)
        reference.muon_nesterov_(gradients, *plain, exact, 1 - mu, mu)
        reference.muon_nesterov_(gradients, *stored, ours, 1 - mu, mu, [key(0, step, 0, 0)])
        worst = max(worst, float((ours - exact).norm() / exact.norm()))
        along, size = along + float(((ours - exact) * exact).sum()), size + float(exact.square().sum())
    assert one / 4 < worst <= one * mu**2 / math.sqrt(1 - mu**2)
    # Nor does it lag: 12,288 independent errors leave 1/111 of one along x, which five standard deviations bound.
    assert abs(along / size) <= 5 * worst / math.sqrt(exact.numel())


@pytest.mark.parametrize("products", ["full", "half", "gram"])
def test_on_kernels_it_follows_the_rule(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter without a GPU; some gradients missing, one strided, chunks of one and two matrices."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    monkeypatch.setattr("nvfp8.optim.muon.ops", lambda x: kernels)
    monkeypatch.setattr("nvfp8.polar_express.ops", lambda x: kernels)
    # TMA moves rows of whole 16 bytes.
    monkeypatch.setattr("nvfp8.optim.muon.fastest_products", lambda r, c, dtype, capability: "full" if r % 4 or c % 4 else products)
    start, grads = problem(3)
    workspace = 2 * room(8, 24, torch.float32, products)
    params, opt = make({name: value.to(DEVICE) for name, value in start.items()}, workspace=workspace)
    assert {opt._chunk(stack) for stack in opt._stacks} == {1, 2}
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
    # d24 in small: the kernels distinguish columns that 16 divides, those that 128 divides, and the descent a scale by row from one
    # by column; columns of two kinds by row, and the wide ones
    shapes = {"q": (32, 32), "k": (32, 32), "fc": (128, 32), "proj": (32, 128), "gate": (6, 12), "gate2": (8, 12), "row": (1, 12)}
    start = {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}
    params, opt = make(start, torch.bfloat16, workspace=1)
    for lr, momentum, decay in ((0.1, 0.85, 0.1), (0.02, 0.97, 0.05), (1, 0, 0), (0.0, 1.0, 0.0)):
        opt.param_groups[0].update(lr=lr, momentum=momentum, weight_decay=decay)
        run(params, opt, [{name: torch.randn_like(value) for name, value in start.items()}])
        assert [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in both] == [3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("kept", MASTERS)
@pytest.mark.parametrize("products", ["full", "half", "gram"])
def test_after_its_first_step_nothing_is_compiled(kept: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvfp8.kernels.muon import _muon_descend, _muon_nesterov
    from nvfp8.kernels.muon_norms import _nesterov_squares
    from nvfp8.kernels.symmetric import _symmetric_product

    monkeypatch.setattr("nvfp8.optim.muon.fastest_products", lambda r, c, dtype, capability: "full" if r % 8 or c % 8 else products)
    start = {k: torch.randn(s, device="cuda").bfloat16() for k, s in {**SHAPES, "q": (32, 32), "fc": (128, 32)}.items()}
    params, opt = make(start, torch.bfloat16, workspace=1, state="e5m2", master=kept)
    counts = []
    for lr, momentum, decay in ((0.1, 0.85, 0.1), (0.02, 0.97, 0.05), (1, 0, 0), (0.0, 1.0, 0.0)):
        opt.param_groups[0].update(lr=lr, momentum=momentum, weight_decay=decay)
        run(params, opt, [{name: torch.randn_like(value) for name, value in start.items()}])
        device = torch.cuda.current_device()
        every = _nesterov_squares, _muon_nesterov, _muon_descend, _symmetric_product
        counts.append([len(kernel.device_caches[device][0]) for kernel in every])
        assert all(p.isfinite().all() for p in params.values())
    assert counts == counts[:1] * 4
