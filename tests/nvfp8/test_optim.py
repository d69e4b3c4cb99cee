"""AdamW and Muon as torch optimizers on models that are not ours: a Transformer encoder of torch.nn, an MLP."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nvfp8.optim import AdamW, Muon, UpdateEarly
from nvfp8.optim.stored import StoredOptimizer
from nvfp8.state import MASTERS, STATE_DTYPES, codec_of, read_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FP8: dict[str, Any] = {"exp_avg_dtype": "e4m3", "exp_avg_sq_dtype": "e4m3", "master_weights": "bf16+8"}


def encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE, dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Reproduce a rolled input: something that attention has to learn."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, 32, generator=generator).to(DEVICE, next(model.parameters()).dtype)
    with sdpa_kernel(SDPBackend.MATH):  # others' backward may differ from run to run on a GPU
        return nn.functional.mse_loss(model(x).float(), x.roll(1, 1).float())


def train(model: nn.Module, optimizers: list[Any], steps: int, begin: int = 0) -> list[float]:
    losses = []
    for step in range(begin, begin + steps):
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def both(model: nn.Module, **formats: Any) -> list[StoredOptimizer]:
    """Muon for matrices, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [(name, p) for name, p in named.items() if p.ndim == 2]
    rest = [(name, p) for name, p in named.items() if p.ndim != 2]
    muon = {key: value for key, value in formats.items() if not key.startswith("exp_avg")}
    adamw = {key: value for key, value in formats.items() if key != "momentum_dtype"}
    return [Muon(matrices, lr=0.01, compute_dtype=torch.float32, **muon), AdamW(rest, lr=3e-3, **adamw)]


def test_in_fp32_it_is_torchs_adamw() -> None:
    ours, theirs = encoder(), encoder()
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    one, other = AdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    for step in range(10):
        other.zero_grad()
        loss_of(theirs, step).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):  # a key's bias has no gradient but fp32's noise
            p.grad = None if q.grad is None else q.grad.clone()
        one.step()
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", MASTERS)
def test_a_bf16_model_with_fp8_state_learns_as_an_fp32_one_does(kept: str) -> None:
    plain, small = encoder(), encoder(torch.bfloat16)
    whole = train(plain, [AdamW(plain.parameters(), lr=3e-3)], 60)
    optimizer = AdamW(small.named_parameters(), lr=3e-3, **{**FP8, "master_weights": kept})
    low = train(small, [optimizer], 60)
    assert whole[-1] < 0.9 * whole[0]
    assert sum(low[-10:]) == pytest.approx(sum(whole[-10:]), rel=0.05)
    count = sum(p.numel() for p in small.parameters())
    beside = {"fp32": 4, "bf16": 0, "bf16+8": 1, "bf16+16": 2}[kept]
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert held <= (2 * 1.05 + beside) * count + 12 * len(list(small.parameters()))


def test_matrices_by_muon_the_rest_by_adamw() -> None:
    plain, small = encoder(), encoder(torch.bfloat16)
    whole = train(plain, both(plain), 40)
    low = train(small, both(small, momentum_dtype="e4m3", **FP8), 40)
    assert whole[-1] < 0.8 * whole[0]
    assert sum(low[-10:]) == pytest.approx(sum(whole[-10:]), rel=0.1)


FORMATS = [
    {"exp_avg_dtype": a, "exp_avg_sq_dtype": b, "momentum_dtype": a, "master_weights": m}
    for a, b, m in itertools.product(STATE_DTYPES, ("fp32", "e4m3"), MASTERS)
]


@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: "-".join(formats.values()))
def test_a_state_dict_survives_a_file_bit_for_bit(formats: dict[str, str]) -> None:
    whole = encoder(torch.bfloat16)
    optimizers = both(whole, **formats)
    train(whole, optimizers, 2)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, file)
    train(whole, optimizers, 2, begin=2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = encoder(torch.bfloat16)
    again.load_state_dict(saved["model"])
    resumed = both(again, **formats)
    for optimizer, state in zip(resumed, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    train(again, resumed, 2, begin=2)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_is_taken_into_other_formats_and_misfits_are_named() -> None:
    model = encoder(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), lr=3e-3, **FP8)
    train(model, [optimizer], 3)
    other = AdamW(model.named_parameters(), lr=1.0, master_weights="bf16+16", exp_avg_sq_dtype="bf16")
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["exp_avg_sq_dtype"], group["master_weights"]) == (3e-3, "bf16", "bf16+16")
    p = next(model.parameters())
    assert float(other.state[p]["step"]) == 3
    assert {key: value.dtype for key, value in other.state[p].items()} == {
        "step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.bfloat16, "remainder": torch.int16
    }  # fmt: skip
    state = optimizer.state_dict()
    del state["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"^the state of layers\.0\.self_attn\.in_proj_weight lacks exp_avg_sq$"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="groups of other numbers or sizes"):
        AdamW(list(model.parameters())[:3]).load_state_dict(optimizer.state_dict())


def test_a_load_is_all_or_nothing_and_what_does_not_fit_is_named() -> None:
    p, q = (nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2))
    one, other = AdamW([p, q], lr=1.0), AdamW([p, q], lr=2.0)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    one.step()
    state = one.state_dict()
    del state["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"^the state of 0\.1 lacks exp_avg$"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 2.0
    assert all(float(value.abs().max()) == 0 for entries in other.state.values() for value in entries.values())


def test_state_of_torchs_adamw_is_taken_over_with_its_steps() -> None:
    ours, theirs = (nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0}
    one, other = AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(1001):
        theirs.grad = ours.grad = torch.ones_like(theirs)
        if step == 1000:
            ours.data.copy_(theirs.data)
            one.load_state_dict(other.state_dict())
            one.step()
        other.step()
    assert float(one.state[ours]["step"]) == 1001
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for flag in ("amsgrad", "maximize"):
        with pytest.raises(ValueError, match=f"saved with {flag}, which does not exist here"):
            one.load_state_dict(torch.optim.AdamW([theirs], **{flag: True}).state_dict())


def test_steps_are_a_parameters_own() -> None:
    """Torch's bias correction: a first gradient is a first one, however late it comes."""
    moved = []
    for made in (AdamW, torch.optim.AdamW):
        a, b = (nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2))
        optimizer = made([a, b], lr=1e-3, weight_decay=0.0)
        for _ in range(100):
            a.grad = torch.ones_like(a)
            optimizer.step()
        b.grad = torch.ones_like(b)
        optimizer.step()
        moved.append(1 - float(b.detach()[0]))
    assert moved[0] == pytest.approx(moved[1], rel=1e-5)


def test_parameters_are_found_by_name_and_others_are_refused() -> None:
    a, b = (nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2))
    one = AdamW([("a", a), ("b", b)], lr=0.1, seed=3)
    a.grad, b.grad = torch.ones_like(a), -torch.ones_like(b)
    one.step()
    other = AdamW([("b", b), ("a", a)], lr=0.1, stochastic=False)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.state[a]["exp_avg"], one.state[a]["exp_avg"])
    assert other.param_groups[0]["seed"] == 3 and other.param_groups[0]["stochastic"] is False
    with pytest.raises(ValueError, match="the state is of other parameters: this group of it has none called c"):
        AdamW([("c", a), ("b", b)]).load_state_dict(one.state_dict())


@pytest.mark.parametrize("kept", ["fp32", "bf16+8", "bf16+16"])
def test_a_completed_bf16_weight_is_taken_into_an_fp32_parameter(kept: str) -> None:
    for shape in ((4, 6), (4, 1)):
        low = nn.Parameter(torch.randn(shape).to(DEVICE, torch.bfloat16))
        one = AdamW([low], lr=1e-3, master_weights=kept)
        low.grad = torch.randn_like(low)
        one.step()
        high = nn.Parameter(low.detach().float())
        AdamW([high]).load_state_dict(one.state_dict())
        assert torch.equal(high, read_weight(low.detach(), one._kept(low)))
        assert not torch.equal(high, low.float()) and torch.allclose(high, low.float(), rtol=2**-8)
        with pytest.raises(ValueError, match="completes bf16 weights, and the parameter holds another: load the model's before"):
            AdamW([nn.Parameter(torch.randn(shape, device=DEVICE))]).load_state_dict(one.state_dict())


@pytest.mark.parametrize("kept", MASTERS)
@pytest.mark.parametrize("made", [AdamW, Muon])
def test_weights_that_are_loaded_after_construction_count(made: type[StoredOptimizer], kept: str) -> None:
    weight = nn.Parameter(torch.randn(6, 4).to(DEVICE, torch.bfloat16))
    optimizer = made([weight], lr=1e-5, master_weights=kept, weight_decay=0.0)
    for value in (7.0, -3.0):  # before the first step, and between two; not even a version counter tells of .data
        weight.data.fill_(value)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        assert float((weight.detach().float() - value).abs().max()) <= 2**-6


def test_rates_that_cannot_be_are_refused_and_a_refused_group_leaves_nothing() -> None:
    p, q = nn.Parameter(torch.ones(8, device=DEVICE)), nn.Parameter(torch.ones(8, device=DEVICE).half())
    wrong: list[dict[str, Any]] = [{"lr": -1.0}, {"lr": torch.nan}, {"betas": (1.5, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}]
    for option in wrong:
        with pytest.raises(ValueError, match=f"^{next(iter(option))} is .*: it must be"):
            AdamW([p], **option)
    for option in ({"momentum": 1.0}, {"beta2": -0.1}):
        with pytest.raises(ValueError, match=f"^{next(iter(option))} is"):
            Muon([nn.Parameter(torch.ones(2, 2))], **option)
    with pytest.raises(ValueError, match=r"^Muon takes matrices, 0\.0 has shape \(0, 8\)$"):
        Muon([nn.Parameter(torch.ones(0, 8))])
    optimizer = AdamW([p], lr=0.1)
    with pytest.raises(ValueError, match="must be fp32 or bf16"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1 and q not in optimizer.state
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    optimizer.param_groups[0]["exp_avg_dtype"] = "e4m3"
    with pytest.raises(ValueError, match="exp_avg_dtype of a group was 'fp32' when its state was made: it cannot become 'e4m3'"):
        optimizer.step()


def through_a_file(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["copy", "file", "pickle"])
def test_an_optimizer_can_be_copied_and_pickled_and_goes_on(way: str) -> None:
    model = encoder(torch.bfloat16)
    optimizers = both(model, **({} if way == "pickle" else {"momentum_dtype": "e4m3", **FP8}))  # no pickle takes FP8, but torch's
    train(model, optimizers, 2)
    made = {"copy": copy.deepcopy, "file": through_a_file, "pickle": lambda what: pickle.loads(pickle.dumps(what))}[way]
    again, copies = made((model, optimizers))
    for left, right in ((model, optimizers), (again, copies)):
        train(left, right, 2, begin=2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
    for one, other in zip(optimizers, copies, strict=True):
        for left, right in zip(one.state.values(), other.state.values(), strict=True):
            assert all(torch.equal(value.float(), right[what].float()) for what, value in left.items())


def test_state_that_was_moved_away_and_back_is_gone_on_with() -> None:
    plain, moved = encoder(), encoder()
    one, other = both(plain), both(moved)
    train(plain, one, 4)
    train(moved, other, 2)
    for optimizer in other:
        for entries in optimizer.state.values():
            for what, value in list(entries.items()):
                entries[what] = value.to("cpu", copy=True).to(value.device)
    train(moved, other, 2, begin=2)
    for p, q in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(one[0].state, other[0].state, strict=True):
        assert torch.equal(one[0].state[p]["momentum"], other[0].state[q]["momentum"])
    other[0].state[next(iter(other[0].state))]["momentum"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"momentum in the state of .* is not the torch\.float32"):
        train(moved, other, 1)


@pytest.mark.parametrize("form", ["bf16", "e4m3", "e5m2"])
def test_a_second_moment_does_not_freeze(form: str) -> None:
    """Rounded to nearest, bf16's at 0.999 stays where it is for ever: gradients stop, and 2000 steps leave 13 % of it."""
    p = nn.Parameter(torch.zeros(128, device=DEVICE))
    optimizer = AdamW([p], exp_avg_sq_dtype=form, weight_decay=0.0)
    moments = []
    for step in range(2001):
        p.grad = torch.full_like(p, float(step == 0))
        optimizer.step()
        moments.append(read(optimizer, p)) if step in (0, 2000) else None
    assert moments[1] / moments[0] == pytest.approx(0.999**2000, rel=0.1)


def read(optimizer: AdamW, p: Tensor) -> float:
    stored = optimizer._stored(p, "exp_avg_sq")
    return float(codec_of(stored.data.dtype, second_moment=True).decode(stored).mean())


def test_a_step_of_kernels_raises_version_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write past autograd, and layers cast a weight when its counter has risen."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    monkeypatch.setattr("nvfp8.optim.adamw.ops", lambda x: kernels)
    p, still = (nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2))
    before = p._version, still._version
    p.grad = torch.ones_like(p)
    AdamW([p, still]).step()
    assert p._version > before[0] and still._version == before[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_may_lie_on_several_gpus() -> None:
    results = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        params = [nn.Parameter(torch.ones(16, 32, device=device)) for device in devices]
        for optimizer in (AdamW(params, lr=0.1), Muon(params, lr=0.1)):
            for p in params:
                p.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(p.device)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_schedulers_set_its_rates() -> None:
    model = nn.Linear(4, 4, device=DEVICE)
    optimizer = AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for _ in range(3):
        before = model.weight.detach().clone()
        model(torch.ones(1, 4, device=DEVICE)).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        moved.append(float((model.weight.detach() - before).abs().mean()))
    assert moved == pytest.approx([0.5, 0.25, 0.125], rel=1e-4)  # gradients of 1, always


def test_a_compiled_model_sees_the_updates() -> None:
    plain, compiled = encoder(), encoder()
    run = torch.compile(compiled, backend="aot_eager")
    one = train(plain, [AdamW(plain.parameters(), lr=3e-3)], 5)
    other = train(run, [AdamW(run.parameters(), lr=3e-3)], 5)
    assert one == pytest.approx(other, rel=1e-4)


def test_a_parameter_without_gradient_is_left_alone_and_groups_may_come_later() -> None:
    a, b, c = (nn.Parameter(torch.ones(6, 6, device=DEVICE)) for _ in range(3))
    for optimizer in (AdamW([a, b], lr=0.1), Muon([a, b], lr=0.1, compute_dtype=torch.float32)):
        for p in (a, b, c):
            p.data.fill_(1)
        optimizer.add_param_group({"params": [c], "lr": 0.2})
        a.grad, b.grad, c.grad = None, torch.eye(6, device=DEVICE), torch.eye(6, device=DEVICE)
        optimizer.step()
        assert (a == 1).all() and not (b == 1).all()
        assert float((c.detach() - 1).abs().max()) == pytest.approx(2 * float((b.detach() - 1).abs().max()), rel=0.02)


def test_a_closure_is_run_with_gradients() -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(AdamW([p]).step(closure).detach()) == 3.0
    assert (p != 1).all()


def test_what_cannot_be_updated_is_refused_by_name() -> None:
    half, strided = nn.Parameter(torch.ones(4).half()), nn.Parameter(torch.ones(4, 6).t())
    with pytest.raises(ValueError, match=r"^w is torch\.float16: weights must be fp32 or bf16$"):
        AdamW([("w", half)])
    with pytest.raises(ValueError, match=r"^0\.0 is not contiguous"):
        AdamW([strided])
    with pytest.raises(ValueError, match=r"^Muon takes matrices, w has shape \(4,\)$"):
        Muon([("w", nn.Parameter(torch.ones(4)))])
    with pytest.raises(ValueError, match=r"'fp9'.*fp32, bf16, e4m3, e5m2"):
        AdamW([nn.Parameter(torch.ones(4))], exp_avg_dtype="fp9")
    with pytest.raises(ValueError, match=r"bf16\+4.*bf16\+8"):
        AdamW([nn.Parameter(torch.ones(4))], master_weights="bf16+4")
    with pytest.raises(ValueError, match="two parameters are called 'w'"):
        AdamW([("w", nn.Parameter(torch.ones(4))), ("w", nn.Parameter(torch.ones(4)))])


@pytest.mark.parametrize("formats", [{}, {"momentum_dtype": "e4m3", **FP8}])
def test_updated_early_gradients_are_freed_and_nothing_else_changes(formats: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if formats else torch.float32
    late, early = encoder(dtype), encoder(dtype)
    train(late, both(late, **formats), 4)
    optimizers = both(early, **formats)
    update = UpdateEarly(optimizers)
    held: list[int] = []
    for p in early.parameters():  # called after ours
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in early.parameters())))
    for step in range(4):
        loss = loss_of(early, step)
        update.begin()
        loss.backward()
        norm = update.finish()
        assert norm > 0 and update.bad is None and update.updated == len(list(early.parameters()))
    for p, q in zip(late.parameters(), early.parameters(), strict=True):
        assert torch.equal(p, q)
    # Of 24 gradients those of Muon's stacks wait for the first layer's: two matrices of each of four shapes.
    assert max(held) <= 5 and len(held) == 4 * len(list(early.parameters()))
    update.remove()
    loss_of(early, 5).backward()
    assert all(p.grad is not None for p in early.parameters())
