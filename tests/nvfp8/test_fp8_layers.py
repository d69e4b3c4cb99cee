"""FP8 layers of our own against fp64; what travels between them in FP8; what they keep; when they cast."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import one_block
import pytest
import torch
import torch.nn.functional as F
from one_block import HIDDEN, TOKENS, WIDTH, block, decibels, gradients, inputs, least_db, run, run_attention, truth
from torch import Tensor, nn

from nvfp8 import reference
from nvfp8.attention import causal_attention, choose_backend, project_heads
from nvfp8.layers import Pending
from nvfp8.precision import FP8Precision, bf16, fp8
from nvfp8.recipe import RECIPES, parse_recipe
from nvfp8.scaling import Scaling, Site

RECIPE_NAMES = ["delayed", "current", "e4m3"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    HAS_FP8 = torch.cuda.get_device_capability() >= (8, 9)
    WAYS = [
        pytest.param(True, id="emulated"),
        pytest.param(False, id="native", marks=pytest.mark.skipif(not HAS_FP8, reason="no FP8")),
    ]
    pytestmark = [pytest.mark.gpu]
else:
    WAYS = [pytest.param(True, id="emulated")]
Loss = Callable[[nn.ModuleDict, list[Tensor]], Tensor]


def made_of(precision: FP8Precision, table: bool = False) -> tuple[nn.ModuleDict, Scaling]:
    made = block(precision, DEVICE, table)
    scaling = precision.scaling(made)
    assert isinstance(scaling, Scaling)
    return made, scaling


def step(
    precision: FP8Precision, made: nn.ModuleDict, given: list[Tensor], loss: Loss = run, loss_scale: float = 1 / TOKENS
) -> Tensor:
    """Forward and backward of one micro-batch; gradients are those of this one alone."""
    for p in [*made.parameters(), *given]:
        p.grad = None
    with precision.autocast(loss_scale):
        out = loss(made, given)
    out.backward()
    return out.detach()


def too_low(found: dict[str, Tensor], exact: dict[str, Tensor], least: float) -> dict[str, float]:
    report = {key: round(decibels(found[key], exact[key]), 1) for key in exact}
    print(report)
    # Two numbers, each a sum with much cancellation, are noisier than a tensor.
    return {key: value for key, value in report.items() if value < least - (6 if key == "lambdas" else 0)}


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool, bool]]:
    """(shape, rows, columns) of every tensor that layers cast by itself, rather than in the kernel that makes it."""
    seen: list[tuple[tuple[int, ...], bool, bool]] = []
    original = reference.quantize

    def counted(x: Tensor, *more: Any, rows: bool, columns: bool) -> Any:
        seen.append((tuple(x.shape), rows, columns))
        return original(x, *more, rows=rows, columns=columns)

    monkeypatch.setattr(reference, "quantize", counted)
    return seen


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.parametrize("loss", [run, run_attention], ids=["layers", "attention"])
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_forward_and_every_gradient(name: str, loss: Loss, emulated: bool) -> None:
    exact_out, exact = truth(loss)
    precision = fp8(RECIPES[name], emulated=emulated)
    made, scaling = made_of(precision, loss is run_attention)
    given = inputs(DEVICE, torch.bfloat16)
    weigh = given[3].requires_grad_()
    for when in ("first", "second", "third"):  # at first nothing is known of activations, nor of gradients but the loss's scale
        step(precision, made, given, loss)
        assert weigh.grad is not None and decibels(weigh.grad, exact_out) > one_block.least_db_of_output(name), when
        found = gradients(made, given)
        assert found.keys() == exact.keys()
        # Softmax's gradient is a difference from a mean, which costs those of q and k another dB.
        assert too_low(found, exact, least_db(name) - (loss is run_attention)) == {}, when
        assert scaling.update() == []


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the layers run over the kernels anyway")
def test_layers_over_the_kernels_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which shows what layers pass to kernels and get back; its bf16 casts truncate, so a dB is lost."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    for name, value in (("WIDTH", 64), ("HIDDEN", 256), ("TOKENS", 64)):
        monkeypatch.setattr(one_block, name, value)
    monkeypatch.setattr(Site, "kernels", lambda self, x: kernels)
    _, exact = truth(run_attention)
    for name, steps in (("delayed", 2), ("current", 1)):
        precision = fp8(RECIPES[name], emulated=True)
        made, scaling = made_of(precision, table=True)
        given = inputs(DEVICE, torch.bfloat16)
        for _ in range(steps):
            step(precision, made, given, run_attention, 1 / 64)
            assert scaling.update() == []
        assert too_low(gradients(made, given), exact, least_db(name) - 1) == {}


# ------------------------------------------------------------------------------------------------------- layer by layer


def leaf(*shape: int, seed: int, factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (factor * torch.randn(*shape, generator=generator)).to(DEVICE, torch.bfloat16).requires_grad_()


def check(
    precision: FP8Precision, layer: nn.Module, ours: Callable[[], list[Tensor]], exact: Callable[[list[Tensor]], list[Tensor]],
    tensors: list[Tensor], least: float = 24,
) -> None:  # fmt: skip
    """Outputs and gradients of one layer, which see fewer roundings than a block's."""
    weights = [p for p in layer.parameters()]
    with precision.autocast(1.0):
        outputs = ours()
    d_outputs = [leaf(*out.shape, seed=90 + i).detach() for i, out in enumerate(outputs)]
    found = [*outputs, *torch.autograd.grad(outputs, [*tensors, *weights], d_outputs)]
    wide = [t.detach().double().requires_grad_() for t in (*tensors, *weights)]
    exact_outputs = exact(wide)
    true = [*exact_outputs, *torch.autograd.grad(exact_outputs, wide, [d.double() for d in d_outputs])]
    report = [round(decibels(a, b), 1) for a, b in zip(found, true, strict=True)]
    assert min(report) > least, report


def filled(layer: nn.Module) -> nn.Module:
    layer.to(DEVICE)
    for seed, p in enumerate(layer.parameters()):
        p.data.copy_(leaf(*p.shape, seed=seed, factor=p.shape[-1] ** -0.5).detach())
    return layer


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_linear(name: str) -> None:
    precision = fp8(RECIPES[name], emulated=True)
    layer = filled(precision.linear(64, 48))
    scaling = precision.scaling(layer)
    x = leaf(2, 16, 64, seed=11)
    for _ in range(2):
        check(precision, layer, lambda: [layer(x)], lambda wide: [F.linear(*wide)], [x])
        scaling.update()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("pending", [False, True])
def test_norm_linear(name: str, pending: bool) -> None:
    precision = fp8(RECIPES[name], emulated=True)
    parts = filled(nn.ModuleList([precision.linear(64, rows) for rows in (32, 16, 16)]))
    layer = precision.norm_linear(*parts)
    assert not list(layer.parameters()), "the projections belong to their owner alone"
    scaling = precision.scaling(nn.ModuleList([parts, layer]))
    x, branch, x0 = (leaf(2, 16, 64, seed=seed) for seed in (10, 11, 12))
    lambdas = torch.tensor([1.1, 0.2], device=DEVICE, requires_grad=True)

    def ours() -> list[Tensor]:
        return list(layer(Pending(x, branch) if pending else x, x0, lambdas, 12))

    def exact(wide: list[Tensor]) -> list[Tensor]:
        x, *rest = wide
        if pending:
            x, rest = x + rest[0], rest[1:]
        x0, lambdas, *weights = rest
        mixed = x * lambdas[0] + x0 * lambdas[1]
        return [mixed, x0 * 1, norm(mixed)[..., :12], F.linear(norm(mixed), torch.cat(weights))]

    for _ in range(2):
        check(precision, parts, ours, exact, [x, branch, x0, lambdas] if pending else [x, x0, lambdas])
        scaling.update()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("left_in_bf16", ["", ":bf16=mlp.c_fc", ":bf16=mlp.c_proj", ":bf16=mlp"])
def test_mlp(name: str, pending: bool, left_in_bf16: str) -> None:
    precision = fp8(parse_recipe(name + left_in_bf16), emulated=True)
    layer = filled(precision.at("mlp").mlp(64, 256))
    scaling = precision.scaling(layer)
    x, branch = leaf(2, 16, 64, seed=10), leaf(2, 16, 64, seed=11)

    def ours() -> list[Tensor]:
        return list(layer(Pending(x, branch) if pending else x, settle=False))

    def exact(wide: list[Tensor]) -> list[Tensor]:
        x, w_fc, w_proj = sum(wide[:-2]), wide[-2], wide[-1]
        return [x * 1, F.linear(F.linear(norm(x), w_fc).relu().square(), w_proj)]

    for _ in range(2):
        least = 40 if left_in_bf16.endswith("mlp") else 19
        check(precision, layer, ours, exact, [x, branch] if pending else [x], least)
        scaling.update()
    with precision.autocast(1.0):
        apart = layer(x, settle=False)
        torch.testing.assert_close(layer(x), apart.stream + apart.branch)


# ------------------------------------------------------------------------------------- what travels between layers in FP8


def second_step(name: str, casts: list[Any]) -> None:
    """Two steps of a block with attention; `casts` are left to be those of the second, whose sites have a history."""
    precision = fp8(RECIPES[name], emulated=True)
    made, scaling = made_of(precision, table=True)
    given = inputs(DEVICE, torch.bfloat16)
    for _ in range(2):
        casts.clear()
        step(precision, made, given, run_attention)
        scaling.update()


def test_gradients_arrive_in_fp8_and_only_the_last_is_cast_by_itself(casts: list[Any]) -> None:
    second_step("delayed", casts)
    # The weights have not changed. o is cast for the forward GEMM, and again, transposed, in backward. Of all gradients only the
    # one of the projections behind the block is cast by itself: its reader is no layer of ours.
    tokens = (TOKENS, WIDTH)
    assert casts == [(tokens, True, False), (tokens, True, True), (tokens, False, True)]


def test_current_scaling_measures_every_gradient(casts: list[Any]) -> None:
    second_step("current", casts)
    gradients_cast = [shape for shape, rows, columns in casts if rows and columns]
    # Of next, the MLP's output, attention's output, q k v; the one before relu² is cast where it is made.
    assert gradients_cast == [(TOKENS, WIDTH), (TOKENS, WIDTH), (TOKENS, WIDTH), (TOKENS, 3 * WIDTH)]


# ------------------------------------------------------------------------------------------------- what is kept, and cast when


def test_a_block_keeps_sixteen_bytes_a_token_and_channel() -> None:
    """Stream 2, stream before the MLP 2, q k v o 8, aᵀ 4; besides 1/rms and attention's statistics, bytes a token and head."""
    precision = fp8(RECIPES["delayed"], emulated=True)
    made, scaling = made_of(precision, table=True)
    given = inputs(DEVICE, torch.bfloat16)
    step(precision, made, given, run_attention)
    scaling.update()
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, x0, lambdas, _ = given
    head_dim = WIDTH // 4
    cos = torch.ones(TOKENS // 2, head_dim // 2, device=DEVICE, dtype=torch.bfloat16)
    stream_in = (x.view(2, TOKENS // 2, WIDTH) * 1, x0.view(2, TOKENS // 2, WIDTH) * 1)
    backend = choose_backend(DEVICE, torch.bfloat16, head_dim, TOKENS // 2)
    with precision.autocast(1 / TOKENS), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        stream, _, _, qkv = made["qkv"](*stream_in, lambdas, 0)
        q, k, v = project_heads(qkv, cos, cos, (4, 4), None, None, None)
        out = causal_attention(q, k, v, TOKENS, backend)
        made["mlp"](Pending(stream, made["c_proj"](out.flatten(2))), settle=False)
    copies = [t for module in made.modules() for part in getattr(module, "projections", ()) for t in part.weight() if t is not None]
    for t in (*stream_in, lambdas, cos, *made.parameters(), *copies):  # there in any case
        kept.pop(t.untyped_storage().data_ptr(), None)
    unit = TOKENS * WIDTH
    statistics = 4 * TOKENS * (2 + 2 * 4 + 4)  # 1/rms of two norms and of q and k in 4 heads each, log-sum-exp
    assert 16 * unit <= sum(kept.values()) <= 16 * unit + statistics + 4096, sum(kept.values()) / unit


def test_without_tma_casts_are_passes_behind_the_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ada: relu² and its derivative are cast from bf16, with the scales and amaxes that epilogues would use."""
    _, exact = truth()
    found, amaxes = [], []
    for epilogues in (True, False):
        monkeypatch.setattr("nvfp8.fp8_layers._has_epilogues", lambda site, x, epilogues=epilogues: epilogues)
        precision = fp8(RECIPES["delayed"], emulated=True)
        made, scaling = made_of(precision)
        given = inputs(DEVICE, torch.bfloat16)
        for _ in range(2):
            step(precision, made, given)
            amaxes.append(scaling.amax.clone())
            assert scaling.update() == []
        found.append(gradients(made, given))
        assert too_low(found[-1], exact, least_db("delayed")) == {}
    assert not torch.equal(found[0]["mlp.c_proj.weight"], found[1]["mlp.c_proj.weight"])
    assert torch.allclose(amaxes[1], amaxes[3], rtol=2**-6)


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.parametrize("name", ["delayed", "current"])
def test_relu_squared_made_again_gives_the_same_gradients_and_is_not_kept(name: str, emulated: bool) -> None:
    results, kept = [], []
    for recompute in (False, True):
        precision = fp8(RECIPES[name], emulated=emulated, recompute=recompute)
        made, scaling = made_of(precision, table=True)
        given = inputs(DEVICE, torch.bfloat16)
        for _ in range(2):  # the second with a history
            step(precision, made, given, run_attention)
            amax = None if scaling.amax is None else scaling.amax.clone()
            scaling.update()
        results.append((gradients(made, given), amax))
        sizes: dict[int, int] = {}
        with (
            precision.autocast(1 / TOKENS),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t,
                lambda t: t,
            ),
        ):
            made["mlp"](given[0].view(2, TOKENS // 2, WIDTH) * 1, settle=False)
        kept.append(sum(sizes.values()))
    (plain, plain_amax), (again, again_amax) = results
    assert torch.equal(plain_amax, again_amax), "what was measured once is not measured again"
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    assert kept[0] - kept[1] == HIDDEN * TOKENS - HIDDEN * WIDTH, "aᵀ is not kept, c_fc's copy in FP8 is"


def test_what_is_not_fused_cannot_be_made_again() -> None:
    precision = fp8(parse_recipe("delayed:bf16=mlp.c_proj:wgrad"), emulated=True, recompute=True)
    made = nn.ModuleDict({"mlp": precision.at("mlp").mlp(WIDTH, HIDDEN)})
    with pytest.raises(
        ValueError, match="relu² is made again where an MLP is in FP8 as a whole: delayed leaves some of mlp in bf16"
    ):
        precision.scaling(made)


def test_a_graph_that_somebody_holds_lets_the_steps_copies_of_weights_go() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    made, _ = made_of(precision)
    with precision.autocast(1 / TOKENS):
        out = run(made, inputs(DEVICE, torch.bfloat16))
    out.backward()
    old = [weakref.ref(t) for module in made.modules() for part in getattr(module, "projections", ()) for t in part.weight()[:2]]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.5)
    step(precision, made, inputs(DEVICE, torch.bfloat16))
    assert out.grad_fn is not None and old and all(held() is None for held in old)


def test_weights_are_cast_once_a_step(casts: list[Any]) -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    made, _ = made_of(precision)
    given = inputs(DEVICE, torch.bfloat16)
    shapes = {(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)}

    def cast() -> int:
        casts.clear()
        for _ in range(3):  # micro-batches
            step(precision, made, given)
        return sum(shape in shapes and rows and columns for shape, rows, columns in casts)

    assert cast() == 5  # q k v, c_proj, c_fc, the MLP's c_proj, next
    assert cast() == 0
    with torch.no_grad():
        made["mlp"].c_fc.weight.mul_(0.5)
        made["c_k"].weight.mul_(0.5)
    assert cast() == 2
    made.load_state_dict({name: value.clone() for name, value in made.state_dict().items()}, assign=True)
    assert cast() == 5


def test_outside_autocast_it_is_bf16_and_leaves_the_scales() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    made, scaling = made_of(precision, table=True)
    given = inputs(DEVICE, torch.bfloat16)
    step(precision, made, given, run_attention)
    before = copy.deepcopy((scaling.state(), scaling.amax))
    for p in [*made.parameters(), *given[:3]]:
        p.grad = None
    run_attention(made, given).backward()
    for name, value in before[0].items():
        assert torch.equal(value, scaling.state()[name])
    assert torch.equal(before[1], scaling.amax)
    _, exact = truth(run_attention)
    assert too_low(gradients(made, given), exact, 36) == {}


def test_gradients_do_not_vanish_before_there_is_a_history() -> None:
    """With scale 1 a gradient of 1/(32768·8) is zero in E5M2."""
    _, exact = truth()
    for name in ("delayed", "e4m3"):
        precision = fp8(RECIPES[name], emulated=True)
        made, _ = made_of(precision)
        given = inputs(DEVICE, torch.bfloat16)
        tiny = 1 / (32768 * 8)
        with torch.no_grad():
            given[3].mul_(TOKENS * tiny)
        step(precision, made, given, loss_scale=tiny)
        found = {key: value.double() / (TOKENS * tiny) for key, value in gradients(made, given).items()}
        assert too_low(found, exact, least_db(name) - 2) == {}


def test_layers_without_scaling_say_what_is_missing() -> None:
    precision = fp8(RECIPES["delayed"], emulated=True)
    layer = filled(precision.linear(32, 32))
    with pytest.raises(RuntimeError, match=r"keep what precision.scaling\(model\) returns"), precision.autocast(1.0):
        layer(leaf(16, 32, seed=1))


def test_parameters_are_those_of_every_precision() -> None:
    ours, plain = (block(precision, "meta").state_dict() for precision in (fp8(RECIPES["delayed"]), bf16()))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}
    assert {value.dtype for value in ours.values() if value.ndim == 2} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_recipes_that_are_not_made_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"recipe {name}: our own FP8 layers have delayed, current, e4m3, rowwise and blockwise"):
        fp8(RECIPES[name])


def test_micro_batches_that_do_not_divide_are_refused() -> None:
    precision = fp8(RECIPES["delayed"])
    assert precision.refuses(64, 768) is None
    assert precision.refuses(24, 768) == "recipe delayed needs a multiple of 16 tokens a micro-batch, not 24"
    assert precision.refuses(64, 72) == "recipe delayed needs a multiple of 16 channels, not 72"
    blocks = fp8(RECIPES["blockwise"])
    assert blocks.refuses(256, 1536) is None
    assert blocks.refuses(64, 1536) == "recipe blockwise needs a multiple of 128 tokens a micro-batch, not 64"
    assert blocks.refuses(256, 768) == "recipe blockwise needs a multiple of 512 channels, not 768"


def test_a_recipe_that_excepts_what_is_not_there_is_refused() -> None:
    precision = fp8(parse_recipe("delayed:bf16=mlp.c_fc+attn.c_q"))
    layer = precision.at("mlp").mlp(32, 128)
    with pytest.raises(ValueError, match=r"bf16=attn.c_q is no part of this model, whose layers are mlp.c_fc, mlp.c_proj"):
        precision.scaling(layer)


def test_what_runs_where_is_told() -> None:
    precision = fp8(parse_recipe("delayed:bf16=h.0+h.*.mlp.c_proj"), emulated=True)
    for layer in range(3):
        part = precision.at(f"h.{layer}")
        part.at("mlp").mlp(32, 128)
        part.at("c_proj").linear(32, 32)
    told = precision.describe()
    assert told["GEMMs left in bf16"] == "h.0, h.*.mlp.c_proj (15 of 27 GEMMs)" and told["FP8"] == "emulated in fp32"
    assert told["recipe"].startswith("delayed: fprop e4m3×e4m3 delayed, fast accumulation; dgrad e5m2")
