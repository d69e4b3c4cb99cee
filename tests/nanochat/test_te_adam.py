"""Transformer Engine's FusedAdam against the formula in fp64, its state stored as each choice says, and what is refused."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from nanochat.adamw import AdamW
from nanochat.dataset import base_dir
from nanochat.errors import BadInput
from nanochat.te_adam import CHOICES, TEAdam, check
from nanochat.tokenizer import Tokenizer
from nanochat.train import train
from nanochat.train_config import TrainConfig
from nvfp8 import te
from nvfp8.state import read_weight
from scripts.base_train import _parser

needs_engine = [pytest.mark.gpu, pytest.mark.skipif(te.unavailable() is not None, reason=str(te.unavailable()))]
THEIRS = CHOICES[1:]
LR, BETAS, EPS, DECAY = 0.02, (0.8, 0.95), 1e-10, 0.1
# What a rounding that falls on the other side of a tie changes a moment by, relative to it, at most.
ULP = {"te-fp32": 2**-23, "te-bf16": 2**-7, "te-fp8": 2**-3, "te-remainders": 2**-23}

Weights = dict[str, Tensor]


def start() -> Weights:
    """A bf16 weight with a master, fp32 ones of the sizes that scalars have, and a bf16 table that is its own master."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"head": (64, 48), "lambdas": (12,), "gate": (1, 24), "scalar": (1,), "table": (96, 32)}
    dtypes = {"head": torch.bfloat16, "table": torch.bfloat16}
    return {k: torch.randn(s, generator=generator).to("cuda", dtypes.get(k, torch.float32)) for k, s in shapes.items()}


def gradients(values: Weights, steps: int) -> list[Weights]:
    """Between 0.5 and 2 with either sign, but the gate's are 0 for two steps, as smear_gate's and a value embedding's are."""
    generator = torch.Generator().manual_seed(1)

    def one(like: Tensor) -> Tensor:
        size, sign = torch.rand(like.shape, generator=generator) * 1.5 + 0.5, torch.randn(like.shape, generator=generator).sign()
        return (size * sign).to(like)

    made = [{k: one(v) for k, v in values.items()} for _ in range(steps)]
    for step in made[:2]:
        step["gate"].zero_()
    return made


def groups(values: Weights) -> tuple[Weights, list[dict[str, Any]]]:
    params = {k: torch.nn.Parameter(v.clone()) for k, v in values.items()}
    common = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    tables = {"params": [params["table"]], "param_names": ["table"], **common, "master": False}
    rest = [k for k in params if k != "table"]
    empty = {"params": [], "param_names": [], **common, "master": True}  # as on a rank that owns none of a group
    return params, [empty, {"params": [params[k] for k in rest], "param_names": rest, **common, "master": True}, tables]


def run(params: Weights, opt: TEAdam | AdamW, grads: list[Weights]) -> None:
    for step in grads:
        for name, p in params.items():
            p.grad = step[name].clone()
        opt.step()


def stored(choice: str) -> Callable[[Tensor], Tensor]:
    """How a choice keeps a moment between two steps: fp64 to fp64."""

    def fp8(x: Tensor) -> Tensor:
        scale = x.abs().max() / 448
        return x if scale == 0 else (x / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale

    return {"te-bf16": lambda x: x.bfloat16().double(), "te-fp8": fp8}.get(choice, lambda x: x)


def formula(value: Tensor, grads: list[Tensor], keep: Callable[[Tensor], Tensor], own_master: bool) -> Tensor:
    """The recurrence in fp64 with moments rounded as `keep` does; a table that is its own master is rounded too."""
    p, m, v = value.double(), torch.zeros_like(value, dtype=torch.float64), torch.zeros_like(value, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        p = p - LR * DECAY * p - LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        p = p.to(value.dtype).double() if own_master else p
        m, v = keep(m), keep(v)
    return p


def masters(params: Weights, opt: TEAdam) -> Weights:
    """What each weight is in full: its fp32 master, put together from its two halves where it is kept so."""
    state, found = opt.state_tensors(), {}
    for name, p in params.items():
        found[name] = state.get(f"{name}.master", p.detach())
        if f"{name}.remainder" in state:
            low = state[f"{name}.remainder"].int()
            high = p.detach().view(torch.int16).int() - (low < 0).int()  # it was rounded up
            found[name] = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
    return found


def assert_follows(found: Tensor, expected: Tensor, choice: str, steps: int, table: bool) -> None:
    """Equal to fp32's rounding but where a stored value fell on the other side of a tie, which few do and by one place.

    Few: an error of up to 5e-6 (ten roundings of 6e-8, 1 - beta in fp32), against bf16's places of 4e-3, in 20 or 30 values that
    are stored one after the other.
    """
    error = (found.double() - expected).detach().abs()
    largest = float(expected.abs().max())
    # Each step rounds the weight once, and its update, up to 4·lr here, in some ten operations.
    exact = steps * (largest * 2**-23 + 4 * LR * 10 * 2**-23)
    flipped = steps * 4 * LR * ULP[choice] + (steps * largest * 2**-8 if table else 0)
    assert float((error <= exact).double().mean()) >= (0.95 if choice in ("te-bf16", "te-fp8") or table else 1)
    assert float(error.max()) <= exact + flipped


class TestFusedAdam:
    pytestmark = needs_engine

    @pytest.mark.parametrize("steps", [1, 10])
    @pytest.mark.parametrize("choice", THEIRS)
    def test_it_follows_the_formula(self, choice: str, steps: int) -> None:
        values = start()
        grads = gradients(values, steps)
        params, made = groups(values)
        opt = TEAdam(made, choice)
        run(params, opt, grads)
        assert opt.steps == steps
        for name, found in masters(params, opt).items():
            expected = formula(values[name], [g[name] for g in grads], stored(choice), name == "table")
            assert_follows(found, expected, choice, steps, name == "table")
            # bf16 is the master rounded to nearest; te-remainders rounds ties up, at most half a place either way
            assert float((params[name].double() - found.double()).detach().abs().max()) <= float(found.abs().max()) * 2**-8

    @pytest.mark.parametrize(("choice", "as_ours"), [("te-fp32", "fp32"), ("te-bf16", "bf16")])
    def test_it_is_our_adamw_with_that_codec(self, choice: str, as_ours: str) -> None:
        values = start()
        grads = gradients(values, 10)
        theirs, made = groups(values)
        opt = TEAdam(made, choice)
        run(theirs, opt, grads)
        ours, made = groups(values)
        own = AdamW(made, exp_avg=as_ours, exp_avg_sq=as_ours)
        for group in own.param_groups:
            group["stochastic"] = False  # FusedAdam rounds to nearest; by itself ours does so of tables only
        run(ours, own, grads)
        for name, found in masters(theirs, opt).items():
            expected = own.state_tensors().get(f"{name}.master", ours[name].detach())
            assert_follows(found, expected.double(), choice, 10, name == "table")

    @pytest.mark.parametrize("choice", THEIRS)
    def test_resuming_gives_the_same_run(self, choice: str) -> None:
        values = start()
        grads = gradients(values, 4)
        whole, made = groups(values)
        run(whole, last := TEAdam(made, choice), grads)
        half, made = groups(values)
        run(half, first := TEAdam(made, choice), grads[:2])
        saved = load(save({k: v.cpu().contiguous() for k, v in first.state_tensors().items()}))  # plain tensors, no pickle
        rest, made = groups({k: v.detach() for k, v in half.items()})
        second = TEAdam(made, choice)
        second.load_state_tensors({**saved, "of.another.rank": torch.zeros(1)}, {})
        run(rest, second, grads[2:])
        for name in values:
            assert torch.equal(whole[name], rest[name]), name
        for key, value in last.state_tensors().items():
            assert torch.equal(value, second.state_tensors()[key]), key

    def test_state_takes_the_bytes_it_says(self) -> None:
        expected = {
            "te-fp32": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master": torch.float32},
            "te-bf16": {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "master": torch.float32},
            "te-remainders": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "remainder": torch.int16},
            "te-fp8": {"exp_avg": torch.uint8, "exp_avg_scale_inv": torch.float32,
                       "exp_avg_sq": torch.uint8, "exp_avg_sq_scale_inv": torch.float32, "master": torch.float32},
        }  # fmt: skip
        for choice in THEIRS:
            values = start()
            params, made = groups(values)
            opt = TEAdam(made, choice)
            run(params, opt, gradients(values, 2))
            state = opt.state_tensors()
            assert {k.removeprefix("head."): v.dtype for k, v in state.items() if k.startswith("head.")} == expected[choice]
            # A table is its own master, and fp32 weights need none.
            completing = {k for k in state if k.endswith((".master", ".remainder"))}
            assert completing == {"head.remainder" if choice == "te-remainders" else "head.master"}
            if choice == "te-fp8":  # nothing beside the codes, such as their transpose
                assert all(moment._transpose is None for moment in opt._fp8_moments())

    @pytest.mark.parametrize("choice", THEIRS)
    def test_no_gradient_counts_as_zeros_and_rates_are_read_at_every_step(self, choice: str) -> None:
        params, made = groups(start())
        opt = TEAdam(made, choice)
        before = {k: v.detach().clone() for k, v in masters(params, opt).items()}
        versions = {k: v._version for k, v in params.items()}
        for group in opt.param_groups:
            group["weight_decay"] = 5.0
        for _ in range(2):
            opt.step()
        for name, found in masters(params, opt).items():
            rtol = 2 * 2**-8 if name == "table" else 4 * 2**-23  # two roundings
            torch.testing.assert_close(found.float(), before[name].float() * 0.81, rtol=rtol, atol=0)
            assert params[name]._version > versions[name]

    def test_state_in_another_form_is_refused(self) -> None:
        _, made = groups(start())
        saved = TEAdam(made, "te-fp32").state_tensors()
        with pytest.raises(BadInput, match=r"head\.exp_avg is torch\.float32.*needs torch\.bfloat16"):
            TEAdam(groups(start())[1], "te-bf16").load_state_tensors(saved, {})
        with pytest.raises(BadInput, match=r"lacks the optimizer state head\.exp_avg_scale_inv"):
            TEAdam(groups(start())[1], "te-fp8").load_state_tensors(saved, {})
        with pytest.raises(BadInput, match=r"lacks the optimizer state head\.remainder"):
            TEAdam(groups(start())[1], "te-remainders").load_state_tensors(saved, {})


class FakeFusedAdam(torch.optim.Optimizer):
    """As much of FusedAdam as its state and a step of nothing need: what `TEAdam` makes of it is seen without a GPU."""

    def __init__(
        self, parts: list[dict[str, Any]], master_weights: bool, store_param_remainders: bool, **dtypes: torch.dtype
    ) -> None:
        super().__init__(parts, {})
        self.master_weights, self.store_param_remainders, self.dtypes = master_weights, store_param_remainders, dtypes

    def initialize_state(self, p: Tensor, remainders: bool) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            self.state[p][key] = torch.zeros_like(p, dtype=self.dtypes[f"{key}_dtype"])
        if self.master_weights:
            kept = torch.zeros_like(p, dtype=torch.int16) if remainders else p.detach().float()
            self.state[p]["master_param"] = kept

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(te, "engine", lambda: None)


def one_weight(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[dict[str, Any]]]:
    p = torch.nn.Parameter(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    common = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    return p, [{"params": [p], "param_names": ["w"], **common, "master": True}]


def test_a_remainder_is_not_dropped_in_silence(fake_engine: None) -> None:
    for kept, advice in (("bf16+8", "own"), ("bf16+16", "te-remainders")):
        p, made = one_weight()
        saved = AdamW(made, master=kept).state_tensors()
        with pytest.raises(BadInput, match=rf"completes w by w\.remainder; resume with --adamw {advice}$"):
            TEAdam(one_weight()[1], "te-fp32").load_state_tensors(saved, {"w": p.detach()})
    with pytest.raises(BadInput, match=r"w\.remainder is torch\.int8 \(40, 3\), this run needs torch\.int16"):
        TEAdam(one_weight()[1], "te-remainders").load_state_tensors(AdamW(one_weight()[1], master="bf16+8").state_tensors(), {})


@pytest.mark.parametrize("choice", ["te-fp32", "te-bf16", "te-remainders"])
@pytest.mark.parametrize("kept", ["fp32", "bf16+8", "bf16+16"])
def test_its_state_goes_on_in_ours(choice: str, kept: str, fake_engine: None) -> None:
    """Its remainders are ours: the low half of the master, and a bf16 weight that was rounded up where that is negative."""
    p, made = one_weight()
    theirs = TEAdam(made, choice)
    for key, value in theirs.named_state().items():
        generator = torch.Generator().manual_seed(1)
        if value.dtype == torch.int16:
            value.copy_(torch.randint(-(2**15), 2**15, value.shape, generator=generator))
        elif not key.endswith("master"):
            value.copy_(torch.rand(value.shape, generator=generator))
    theirs.step()
    ours_p, made = one_weight()
    ours = AdamW(made, master=kept, exp_avg="fp32", exp_avg_sq="bf16")
    ours.load_state_tensors(theirs.state_tensors(), {"w": p.detach()})
    assert ours.steps == 1
    assert torch.equal(ours.state_tensors()["w.exp_avg"], theirs.state_tensors()["w.exp_avg"].float())
    state = ours.state_tensors()
    whole = read_weight(ours_p.detach(), state.get("w.master", state.get("w.remainder")))
    exact = masters({"w": p}, theirs)["w"]
    assert ((whole - exact).abs() <= (2.0**-15 if kept == "bf16+8" else 0.0) * exact.abs()).all()


@pytest.mark.parametrize("choice", THEIRS)
def test_without_a_cuda_device_it_is_refused(choice: str) -> None:
    with pytest.raises(BadInput, match=rf"^--adamw {choice}: it needs a CUDA device; or use --adamw own$"):
        check(choice, "cpu", torch.bfloat16)
    check("own", "cpu", torch.float32)


def test_where_transformer_engine_is_missing_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "unavailable", lambda: "transformer-engine is not installed: pip install it")
    with pytest.raises(BadInput, match=r"^--adamw te-bf16: transformer-engine is not installed: pip install it; or"):
        check("te-bf16", "cuda", torch.float32)
    monkeypatch.setattr(te, "unavailable", lambda: None)
    check("te-bf16", "cuda", torch.float32)


def test_remainders_need_bf16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te, "unavailable", lambda: None)
    with pytest.raises(BadInput, match="completes bf16 weights, and this precision stores float32: use --adamw te-fp32"):
        check("te-remainders", "cuda", torch.float32)
    check("te-remainders", "cuda", torch.bfloat16)


def test_a_run_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.train(["nothing is read after it"], 290).save(base_dir() / "tokenizer")
    with pytest.raises(BadInput, match="--adamw te-fp32: it needs a CUDA device"):
        train(TrainConfig(device_type="cpu", adamw="te-fp32"))
    assert _parser().parse_args(["--adamw", "te-fp8"]).adamw == "te-fp8"
    with pytest.raises(SystemExit) as error:
        _parser().parse_args(["--adamw", "fused"])
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
