"""The FP8 head against cross-entropy in fp64: its three GEMMs, each in FP8 or bf16; what it computes when; what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_head import exact_loss
from torch import Tensor, nn

from nvfp8 import head as head_module
from nvfp8 import quantize, reference, reference_fp8
from nvfp8.fp8_head import FP8LinearCrossEntropy
from nvfp8.head import LinearCrossEntropy
from nvfp8.precision import FP8Precision, fp8
from nvfp8.recipe import GEMMS, parse_recipe
from nvfp8.scaling import OF_LOGITS, Scaling, Site

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [pytest.param(True, id="emulated")]
if DEVICE == "cuda":
    HAS_FP8 = torch.cuda.get_device_capability() >= (8, 9)
    WAYS += [pytest.param(False, id="native", marks=pytest.mark.skipif(not HAS_FP8, reason="no FP8"))]
    pytestmark = [pytest.mark.gpu]
VOCAB, PADDED, WIDTH = 100, 128, 64


class Made:
    """A head with its scaling, and inputs for it, on which logits have a standard deviation of 1."""

    def __init__(self, tokens: int = 300, recipe: str = "delayed", emulated: bool = True, dtype: torch.dtype = torch.bfloat16):
        self.precision: FP8Precision = fp8(parse_recipe(recipe), emulated=emulated)
        self.model = nn.ModuleDict({"lm_head": self.precision.head(WIDTH, VOCAB, PADDED, 15.0)}).to(DEVICE, dtype)
        head = self.model["lm_head"]
        assert isinstance(head, LinearCrossEntropy)
        self.head = head
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(WIDTH))
        self.scaling = self.precision.scaling(self.model)
        x = F.rms_norm(torch.randn(tokens, WIDTH, generator=generator), (WIDTH,))
        self.x = x.to(DEVICE, dtype).requires_grad_()
        self.targets = torch.randint(VOCAB, (tokens,), generator=generator).to(DEVICE)
        self.targets[::7] = -1

    def loss(self, scale: float = 1.0) -> Tensor:
        with self.precision.autocast(scale / len(self.x)):
            return self.head.loss(self.x, self.targets, scale)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = (t.detach().double().requires_grad_() for t in (self.x, self.head.weight))
        loss = exact_loss(x, weight, self.targets, VOCAB)
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows of logits at a time, 256 of their gradient: of 300 tokens a chunk in four parts, and a short one."""
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 256 * PADDED)


def decibels(value: Tensor, exact: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (value.double() - exact).norm()))


def least_db(product: str, in_bf16: frozenset[str]) -> float:
    """What roundings leave of a gradient: E4M3 is 31.5 dB beneath a tensor, E5M2 25.5, and noises add up.

    Rounding x and W moves a logit of size 1 by as much as itself is moved, and a probability by as much in proportion.
    """
    noise = 10**-4.5  # bf16's roundings
    noise += 0 if "fprop" in in_bf16 else 2 * 10**-3.15
    noise += 0 if product in in_bf16 else 10**-3.15 + 10**-2.55
    return -10 * math.log10(noise)


SOME = [frozenset(some) for n in range(3) for some in itertools.combinations(GEMMS, n)]


@pytest.mark.parametrize("emulated", WAYS)
@pytest.mark.parametrize("tokens", [300, 256, 5])
@pytest.mark.parametrize("in_bf16", SOME, ids=lambda some: "+".join(sorted(some)) or "none")
def test_loss_and_gradients(in_bf16: frozenset[str], tokens: int, emulated: bool) -> None:
    made = Made(tokens, "delayed:bf16=" + "+".join(f"lm_head:{gemm}" for gemm in sorted(in_bf16)), emulated)
    assert isinstance(made.head, FP8LinearCrossEntropy) and made.head.projections[0].in_bf16 == in_bf16
    exact, dx, dw = made.exact()
    loss = made.loss(0.125)
    (loss * -3).backward()
    assert float(loss.detach()) == pytest.approx(float(exact) * 0.125, rel=1e-2 if tokens > 5 else 5e-2)
    assert made.x.grad is not None and made.head.weight.grad is not None
    assert made.x.grad.shape == made.x.shape and made.head.weight.grad.dtype == torch.bfloat16
    found = decibels(made.x.grad, dx * -0.375), decibels(made.head.weight.grad, dw * -0.375)
    assert found[0] > least_db("dgrad", in_bf16) and found[1] > least_db("wgrad", in_bf16), found
    assert (made.head.weight.grad[VOCAB:] == 0).all(), "padding rows must get no gradient"
    assert (made.x.grad[made.targets < 0] == 0).all()
    assert made.scaling.update() == []


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the head runs over the kernels anyway")
@pytest.mark.parametrize("in_bf16", SOME, ids=lambda some: "+".join(sorted(some)) or "none")
def test_over_the_kernels_themselves(monkeypatch: pytest.MonkeyPatch, in_bf16: frozenset[str]) -> None:
    """In Triton's interpreter, in fp32, for its bf16 casts truncate."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    recipe = "delayed:bf16=" + "+".join(f"lm_head:{gemm}" for gemm in sorted(in_bf16))
    results = []
    for module in (reference, kernels):
        monkeypatch.setattr(Site, "kernels", lambda self, x, module=module: module)
        made = Made(300, recipe, dtype=torch.float32)
        loss = made.loss()
        loss.backward()
        assert made.x.grad is not None and made.head.weight.grad is not None
        results.append((loss.detach(), made.x.grad, made.head.weight.grad))
    for ours, twin in zip(results[1], results[0], strict=True):
        # A code in a thousand may be one off, by an eighth of itself at most: 2⁻³ · √10⁻³.
        assert float((ours - twin).norm() / twin.norm()) < 4e-3


def test_no_valid_target_gives_zero() -> None:
    made = Made(37)
    made.targets.fill_(-1)
    loss = made.loss()
    loss.backward()
    assert made.x.grad is not None and made.head.weight.grad is not None
    assert loss.item() == 0 and (made.x.grad == 0).all() and (made.head.weight.grad == 0).all()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    with_gradients = made.loss().detach()
    monkeypatch.setattr(reference, "softcap_cross_entropy_quantize", lambda *_: pytest.fail("a gradient was taken under no_grad"))
    with torch.no_grad():
        torch.testing.assert_close(made.loss(), with_gradients, rtol=1e-6, atol=0)


def test_evaluation_is_in_bf16() -> None:
    """Outside of autocast, of any number of tokens, and nothing is remembered."""
    made, plain = Made(13), LinearCrossEntropy(WIDTH, VOCAB, PADDED, 15.0, torch.bfloat16).to(DEVICE)
    plain.load_state_dict(made.head.state_dict())
    assert torch.equal(made.head.token_losses(made.x, made.targets), plain.token_losses(made.x, made.targets))
    assert torch.equal(made.head.loss(made.x, made.targets, 1.0), plain.loss(made.x, made.targets, 1.0))
    assert torch.equal(made.head.logits(made.x), plain.logits(made.x))
    assert made.scaling.update() == []


def test_second_backward_is_refused() -> None:
    loss = Made().loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward may run once"):
        loss.backward()


def test_the_gradients_scale_is_that_of_every_batch() -> None:
    """Of a confident mistake it is 1 and does not saturate; of a probability of 2⁻²⁴ something is left."""
    logits = torch.full((16, 128), -10.0)  # z = −8.7
    logits[:, 3] = 60.0  # z = 15, where tanh's derivative is nearly 0
    logits[8:, 3] = 2.8
    q, q_t = (torch.empty(shape, dtype=torch.float8_e5m2) for shape in ((16, 128), (128, 16)))
    targets, scale, of_rows = torch.full((16,), 5), torch.tensor(OF_LOGITS), torch.empty(2, 16)
    targets[8:] = 3
    reference.softcap_cross_entropy_quantize(logits, targets, of_rows[0], of_rows[1], 128, 15.0, scale, q, q_t)
    exact = logits.double()
    reference.softcap_cross_entropy_(exact, targets, 128, 15.0, torch.tensor(1.0, dtype=torch.float64))
    assert exact.abs().max() <= 1 and q.float().abs().max() <= OF_LOGITS and ((of_rows[1] - 1).abs() < 0.126).all()
    small = exact[0, 0]
    assert 2.0**-36 < small < 2.0**-32 and q[0, 0].float() == 0
    assert 2.0**-24 * OF_LOGITS == 2.0**-16 and torch.tensor(2.0**-16).to(torch.float8_e5m2).float() == 2.0**-16
    kept = exact.abs() > 2.0**-22
    assert kept.sum() > 1000 and ((q.double() / OF_LOGITS - exact)[kept] / exact[kept]).abs().max() <= 2.0**-3


@pytest.mark.skipif(DEVICE == "cuda", reason="of the twin, whose known entries can be made few")
def test_of_a_large_vocabulary_logits_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of dx and of x carry what the known part of a softmax lacks: as good with 16 known entries as with all 100."""
    original, found, factors = reference.scale_rows_, [], list[Tensor]()
    monkeypatch.setattr(reference, "scale_rows_", lambda x, f: factors.append(f.clone()) or original(x, f))
    for known in (1024, 16):
        monkeypatch.setattr(reference_fp8, "known_entries", lambda vocab, known=known: known)
        factors.clear()
        made = Made(300)
        with torch.no_grad():
            made.head.weight[50] += made.x[9] * 3  # all of a row's probability on entry 50, which is not its target
        exact, dx, dw = made.exact()
        loss = made.loss()
        loss.backward()
        assert made.x.grad is not None and made.head.weight.grad is not None
        assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-2)
        found.append((decibels(made.x.grad, dx), decibels(made.head.weight.grad, dw)))
    assert found[1][0] > found[0][0] - 0.5 and found[1][1] > found[0][1] - 0.5, found
    of_rows = torch.cat(factors)[:300]
    assert (of_rows[made.targets >= 0] > 0).all() and (of_rows[made.targets < 0] == 0).all()
    assert float(of_rows[made.targets >= 0].median()) < 0.3 and abs(of_rows[9] - 1) < 0.126


@pytest.mark.skipif(DEVICE == "cpu", reason="the kernels, natively")
def test_mistakes_of_a_large_vocabulary() -> None:
    """8,192 entries, of which 1,024 are known, and rows whose probability lies elsewhere: dx and dW as good as without those."""
    found = []
    for of_rows in (0, 5):
        precision = fp8(parse_recipe("delayed"), emulated=False)
        model = nn.ModuleDict({"lm_head": precision.head(256, 8192, 8192, 15.0)}).to(DEVICE, torch.bfloat16)
        head, scaling = model["lm_head"], precision.scaling(model)
        x = F.rms_norm(torch.randn(640, 256, generator=torch.Generator().manual_seed(1)), (256,)).to(DEVICE, torch.bfloat16)
        targets = torch.randint(8192, (640,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
        with torch.no_grad():
            head.weight.copy_(torch.randn(8192, 256, generator=torch.Generator().manual_seed(3)) / 16)
            for row in range(of_rows):
                head.weight[8000 + row] = x[row] / 8  # z = 15·tanh(32/15)
        x.requires_grad_()
        with precision.autocast(1 / 640):
            loss = head.loss(x, targets, 1.0)
        loss.backward()
        wide, weight = (t.detach().double().requires_grad_() for t in (x, head.weight))
        exact = exact_loss(wide, weight, targets, 8192)
        dx, dw = torch.autograd.grad(exact, (wide, weight))
        assert x.grad is not None and float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-2)
        found.append((decibels(x.grad, dx), decibels(head.weight.grad, dw)))
        assert scaling.update() == []
    assert min(found[1]) > min(found[0]) - 3 and min(found[0]) > least_db("dgrad", frozenset()), found


def test_the_weight_is_cast_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    casts = []
    original = quantize.Projection._cast
    monkeypatch.setattr(quantize.Projection, "_cast", lambda self: casts.append(self.weights[0].shape) or original(self))
    made = Made()
    for _ in range(2):
        for _ in range(3):
            made.loss().backward()
        with torch.no_grad():
            made.head.weight.mul_(1.5)
    assert casts == [(PADDED, WIDTH)] * 2


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("in_bf16", SOME, ids=lambda some: "+".join(sorted(some)) or "none")
def test_an_fp32_weight_becomes_bf16_once_and_only_for_gemms_that_read_it(in_bf16: frozenset[str], with_gradients: bool) -> None:
    made = Made(600, "delayed:bf16=" + "+".join(f"lm_head:{gemm}" for gemm in sorted(in_bf16)))  # three chunks
    same = made.head.weight.detach().float()
    expected = made.loss()
    expected.backward()
    dx, dw, made.x.grad = made.x.grad, made.head.weight.grad, None
    made.head.weight = nn.Parameter(same)
    rounded = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal rounded
            of_weight = function is torch.ops.aten._to_copy.default and arguments[0].data_ptr() == same.data_ptr()
            result = function(*arguments, **(kwargs or {}))
            rounded += of_weight and result.dtype == torch.bfloat16
            return result

    with Watch(), torch.set_grad_enabled(with_gradients):
        loss = made.loss()
    assert rounded == ("fprop" in in_bf16 or ("dgrad" in in_bf16 and with_gradients))
    assert torch.equal(loss.detach(), expected.detach())
    if with_gradients:
        loss.backward()
        assert torch.equal(made.x.grad, dx) and torch.equal(made.head.weight.grad.to(torch.bfloat16), dw)


def test_what_is_not_finite_is_named() -> None:
    made = Made()
    with torch.no_grad():
        made.x[3, 5] = torch.nan
    loss = made.loss()
    loss.backward()
    assert made.x.grad is not None and made.head.weight.grad is not None
    assert not loss.isfinite() and made.x.grad[3].isnan().all() and made.head.weight.grad[:VOCAB].isnan().all()
    assert made.x.grad[:3].isfinite().all() and made.x.grad[4:].isfinite().all()
    assert made.scaling.update() == ["the input of lm_head"]


def test_its_only_state_is_the_weights() -> None:
    made = Made()
    made.loss().backward()
    made.scaling.update()
    state = made.scaling.state()
    assert state.keys() == {"lm_head.scale", "lm_head.amax_history"}
    assert (state["lm_head.scale"] > 0).tolist() == [False, True, False]
    assert isinstance(made.scaling, Scaling)
    assert made.scaling.names == ["the input of lm_head", "the weight of lm_head", "the gradient that reaches lm_head"]


def test_logits_never_stand_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens × vocabulary is ever made, and of a chunk's rows only a quarter in bf16."""
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 512 * PADDED)  # none of its sizes is the width
    made = Made(2048)
    largest, in_bf16 = 0, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest, in_bf16
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, Tensor) and PADDED in result.shape and WIDTH not in result.shape:
                largest = max(largest, result.numel())
                in_bf16 = max(in_bf16, result.numel() * (result.dtype == torch.bfloat16))
            return result

    with Watch():
        made.loss().backward()
    assert (largest, in_bf16) == (512 * PADDED, 128 * PADDED)


def test_which_gemms_stay_in_bf16_is_the_recipes() -> None:
    made = Made(recipe="delayed:bf16=lm_head")
    assert type(made.head) is LinearCrossEntropy and made.scaling.update() == []
    assert made.precision.describe()["head"] == "bf16 operands in chunks"
    assert Made().precision.describe()["head"] == "FP8 GEMMs in chunks, logits' gradient in E5M2"
    line = Made(recipe="delayed:bf16=lm_head:wgrad").precision.describe()["head"]
    assert line == "FP8 GEMMs in chunks, logits' gradient in E5M2, wgrad in bf16"
    all_three = "+".join(f"lm_head:{gemm}" for gemm in GEMMS)
    assert type(Made(recipe=f"delayed:bf16={all_three}").head) is LinearCrossEntropy
    assert type(Made(recipe="blockwise").head) is LinearCrossEntropy, "one scale a tensor only"
    for name in ("current", "e4m3"):
        made = Made(recipe=name)
        assert isinstance(made.head, FP8LinearCrossEntropy) and made.head.projections[0].dy.dtype == torch.float8_e5m2
        made.loss().backward()
    with pytest.raises(ValueError, match=r"bf16=lm_tail is no part of this model, whose layers are lm_head"):
        Made(recipe="delayed:bf16=lm_tail")
