"""Every Triton kernel against its PyTorch twin and fp64.

On a CPU the kernels run in Triton's interpreter, in fp32 only (its bf16 truncates); on a GPU they run as compiled, in bf16
and fp32. A kernel may err at most 1.05 times as much as its twin, plus a few fp32 epsilons for another order of summation.
"""

import math

import pytest
import torch
from torch import Tensor

from nvfp8 import reference
from nvfp8.embedding import token_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
SHAPES = [(2, 5, 64), (1, 33, 96), (3, 16, 384)]

kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def compare(kernel: tuple[Tensor | None, ...], twin: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> None:
    for position, (ours, theirs, truth) in enumerate(zip(kernel, twin, exact, strict=True)):
        if truth is None:
            assert ours is None and theirs is None
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, position
        assert error(ours, truth) <= 1.05 * error(theirs, truth) + 1e-6, position


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_stream", [True, False])
def test_norm(shape: tuple[int, ...], with_stream: bool, dtype: torch.dtype) -> None:
    x, d_normed = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    d_stream = random(*shape, dtype=dtype, seed=3) if with_stream else None
    exact = reference.norm_forward(x.double())
    compare(kernels.norm_forward(x), reference.norm_forward(x), exact)
    rstd = exact[1].float()
    compare(
        kernels.norm_backward(d_normed, x, rstd, d_stream),
        reference.norm_backward(d_normed, x, rstd, d_stream),
        reference.norm_backward(*double(d_normed, x, rstd, d_stream)),
    )
    alone = kernels.norm_backward(d_normed, x, rstd, d_stream, again=False)
    assert torch.equal(alone[0], kernels.norm_backward(d_normed, x, rstd, d_stream)[0])
    assert alone[1] is reference.norm_backward(d_normed, x, rstd, d_stream, again=False)[1] is None


@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stream, branch = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    kernel, twin = kernels.add_norm_forward(stream, branch), reference.add_norm_forward(stream, branch)
    assert torch.equal(kernel[0], twin[0])
    compare(kernel[1:], twin[1:], reference.norm_forward(twin[0].double()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_pending", [True, False])
@pytest.mark.parametrize("with_x0", [True, False])
def test_mix_norm(shape: tuple[int, ...], with_x0: bool, with_pending: bool, dtype: torch.dtype) -> None:
    x, x0, d_normed, d_stream = (random(*shape, dtype=dtype, seed=seed) for seed in range(4))
    d_x0 = random(*shape, dtype=dtype, seed=5) if with_x0 else None
    pending = random(*shape, dtype=dtype, seed=7) if with_pending else None
    # Short mantissas: products are exact, so a fused multiply-add rounds the bf16 stream as the twin does.
    lambdas = torch.tensor([1.125, 0.1875], device=DEVICE)
    width = shape[-1]
    twin, exact = (
        reference.mix_forward(x, pending, x0, lambdas, width),
        reference.mix_forward(*double(x, pending, x0, lambdas), width),
    )
    compare(kernels.mix_forward(x, pending, x0, lambdas, width), twin, exact)
    arguments = (d_stream, d_normed, x, pending, x0, lambdas, twin[2], d_x0)
    kernel, twin = kernels.mix_norm_backward(*arguments), reference.mix_norm_backward(*arguments)
    exact = reference.mix_norm_backward(*double(*arguments))
    # dλ is a sum with much cancellation: its error is measured against the size of its terms, not of what is left.
    terms = (exact[0].norm() / lambdas[0] * torch.stack((x.double().norm(), x0.double().norm()))).norm()
    assert (kernel[2] - exact[2]).norm() <= 1.05 * (twin[2] - exact[2]).norm() + 1e-6 * terms
    compare(*(tuple(t for i, t in enumerate(result) if i != 2) for result in (kernel, twin, exact)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("with_head", "with_x0"), [(True, True), (False, False)])
def test_mix(shape: tuple[int, ...], with_head: bool, with_x0: bool, dtype: torch.dtype) -> None:
    x, x0, d_stream, d_branch, d_x0 = (random(*shape, dtype=dtype, seed=seed) for seed in range(5))
    lambdas = torch.tensor([1.125, 0.1875], device=DEVICE)
    pending = random(*shape, dtype=dtype, seed=7) if with_head else None
    twin = reference.mix_forward(x, pending, x0, lambdas, 12)
    exact = reference.mix_forward(*double(x, pending, x0, lambdas), 12)
    compare(kernels.mix_forward(x, pending, x0, lambdas, 12), twin, exact)
    d_head = random(*shape[:-1], 12, dtype=dtype, seed=6) if with_head else None
    arguments = (d_stream, d_branch if with_x0 else None, d_head, twin[0], x0, lambdas, twin[2], d_x0 if with_x0 else None)
    kernel, twin = kernels.mix_backward(*arguments), reference.mix_backward(*arguments)
    exact = reference.mix_backward(*double(*arguments))
    terms = (exact[0].norm() / lambdas[0] * torch.stack((x.double().norm(), x0.double().norm()))).norm()
    assert (kernel[2] - exact[2]).norm() <= 1.05 * (twin[2] - exact[2]).norm() + 1e-6 * terms
    compare(kernel[:2], twin[:2], exact[:2])


@pytest.mark.parametrize("shape", [*SHAPES, (70, 1, 64)])
@pytest.mark.parametrize("both", [True, False])
def test_smear(shape: tuple[int, ...], both: bool, dtype: torch.dtype) -> None:
    """Texts end inside a program's rows, and at their ends; `previous` in forward alone."""
    x, d_out, d_x0 = (random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    weight, smear = random(1, 24, dtype=dtype, seed=3), torch.tensor([0.375], device=DEVICE)
    previous = random(shape[0], 1, shape[2], dtype=dtype, seed=4) if both else None
    arguments = (x, previous, weight, smear)
    kernel, twin, exact = (m.smear_forward(*of) for m, of in ways(arguments))
    compare((kernel,), (twin,), (exact,))
    arguments = (d_out, d_x0 if both else None, x, weight, smear)
    kernel, twin, exact = (m.smear_backward(*of) for m, of in ways(arguments))
    compare(kernel[:1], twin[:1], exact[:1])
    # Sums over all tokens, of either sign: measured against the size of their terms.
    for ours, theirs, true in zip(kernel[1:], twin[1:], exact[1:], strict=True):
        terms = d_out.double().norm() * x.double().norm() / shape[2] ** 0.5
        assert ours.shape == true.shape and ours.dtype == theirs.dtype == torch.float32
        assert (ours - true).norm() <= 1.05 * (theirs - true).norm() + 1e-6 * terms


@pytest.mark.parametrize(("shape", "heads"), [((2, 5, 12), 6), ((1, 33, 12), 3), ((3, 64, 16), 8)])
def test_value_gate(shape: tuple[int, ...], heads: int, dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype, seed=1), random(heads, shape[2], dtype=dtype, seed=2)
    kernel, twin, exact = (m.value_gate_forward(*of) for m, of in ways((x, weight)))
    compare((kernel,), (twin,), (exact,))
    arguments = random(*shape[:2], heads, dtype=dtype, seed=3), x, weight
    compare(*(m.value_gate_backward(*of) for m, of in ways(arguments)))


def ways(arguments: tuple[Tensor | None, ...]) -> list[tuple[object, list[Tensor | None]]]:
    """The kernel, the twin, and the twin in fp64."""
    return [(kernels, list(arguments)), (reference, list(arguments)), (reference, double(*arguments))]


@pytest.mark.parametrize(("heads", "size"), [((2, 1), 16), ((3, 3), 32), ((4, 2), 128)])
@pytest.mark.parametrize("values", [True, False])
def test_heads(heads: tuple[int, int], size: int, values: bool, dtype: torch.dtype) -> None:
    batch, length, rows = 2, 19, 11
    n_head, n_kv = heads
    qkv = random(batch, length, (n_head + 2 * n_kv) * size, dtype=dtype, seed=1)
    cos, sin = (random(length, size // 2, dtype=dtype, seed=seed) for seed in (2, 3))
    angle = torch.atan2(sin.float(), cos.float())
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gate = random(batch, length, n_kv, dtype=dtype, seed=4) if values else None
    table = random(rows, n_kv * size, dtype=dtype, seed=5) if values else None
    ids = torch.randint(rows, (batch, length), device=DEVICE) if values else None
    arguments = (qkv, cos, sin, heads, gate, table, ids)
    twin = reference.heads_forward(*arguments)
    exact = reference.heads_forward(*double(qkv, cos, sin), heads, *double(gate, table), ids)
    compare(kernels.heads_forward(*arguments), twin, exact)
    dq, dk, dv = (torch.randn_like(x) for x in twin[:3])
    arguments = (dq, dk, dv, twin[0], twin[1], twin[3], cos, sin, gate, table, ids)
    compare(kernels.heads_backward(*arguments), reference.heads_backward(*arguments), reference.heads_backward(*double(*arguments)))


@pytest.mark.parametrize(("rows", "width", "heads"), [(2, 16, 1), (7, 48, 3), (40, 600, 2), (300, 16, 1)])
@pytest.mark.parametrize("shape", [(3, 50), (2, 64), (1, 1)])
@pytest.mark.parametrize("gated", [True, False])
def test_add_rows(rows: int, width: int, heads: int, shape: tuple[int, int], gated: bool, dtype: torch.dtype) -> None:
    # From runs longer than several programs' chunks to ids that occur once; half of them never do.
    ids = torch.randint(rows, shape, device=DEVICE) // 2
    ids[0, 0] = rows - 1
    grad, values = random(rows, width, dtype=dtype, seed=1), random(*shape, width, dtype=dtype, seed=2)
    gate = random(*shape, heads, dtype=dtype, seed=3) if gated else None
    order = token_order(ids)
    results = []
    for function, given in (
        (kernels.add_rows_, grad.clone()),
        (reference.add_rows_, grad.clone()),
        (reference.add_rows_, grad.double()),
    ):
        exact = given.dtype == torch.float64
        function(given, values.double() if exact else values, gate.double() if exact and gated else gate, *order)
        results.append(given)
    compare(*((result,) for result in results))
    untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill(0, ids.flatten(), False)
    assert torch.equal(results[0][untouched], grad[untouched])
    weights = values if gate is None else (values.unflatten(-1, (heads, -1)) * gate[..., None]).flatten(-2)
    plain = grad.double().index_add(0, ids.flatten(), weights.double().flatten(0, 1))
    assert error(results[2], plain) < 1e-2 if dtype == torch.bfloat16 else error(results[2], plain) < 1e-6


@pytest.mark.parametrize("shape", [(7,), (3, 5000), (2, 4096)])
def test_relu_squared(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden, gradient = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    exact = hidden.double().relu().square()
    activated = kernels.relu_squared_(hidden.clone())
    compare((activated,), (reference.relu_squared_(hidden.clone()),), (exact,))
    arguments = (gradient.clone(), activated)
    exact = gradient.double() * 2 * activated.double().sqrt()
    ours = kernels.relu_squared_backward_(*arguments)
    compare((ours,), (reference.relu_squared_backward_(gradient.clone(), activated),), (exact,))


@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_scale(factor: float, dtype: torch.dtype) -> None:
    x, scalar = random(3, 5000, dtype=dtype, seed=1), torch.tensor(factor, device=DEVICE)
    exact = x.double() * scalar.double()
    given = x.clone()
    assert kernels.scale_(given, scalar) is given
    compare((given,), (reference.scale_(x.clone(), scalar),), (exact,))


@pytest.mark.parametrize(("vocab", "padded"), [(50, 64), (4096, 4096), (5000, 5056)])
def test_cross_entropy(vocab: int, padded: int, dtype: torch.dtype) -> None:
    logits = 8 * random(9, padded, dtype=dtype, seed=1)
    targets = torch.randint(vocab, (9,), device=DEVICE)
    targets[[0, 4]] = torch.tensor([-1, vocab - 1], device=DEVICE)
    scale = torch.tensor(0.125, device=DEVICE)
    results = []
    for function, given in (
        (kernels.softcap_cross_entropy_, logits.clone()),
        (reference.softcap_cross_entropy_, logits.clone()),
        (reference.softcap_cross_entropy_, logits.double()),
    ):
        results.append((function(given, targets, vocab, 15.0, scale), given))
    compare(*results)
    assert (results[0][1][0] == 0).all() and (results[0][1][:, vocab:] == 0).all()
    assert results[0][0][0] == 0
    untouched = logits.clone()
    losses = kernels.softcap_cross_entropy_(untouched, targets, vocab, 15.0, None)
    assert torch.equal(untouched, logits) and torch.equal(losses, results[0][0])


# Matrices of a stack: a gate; odd and inside one block; odd over two blocks; 16 divides the columns; wide and of three blocks
STACKS = [(4, 1, 12), (3, 5, 7), (2, 67, 93), (3, 96, 48), (2, 40, 272)]


def unaligned(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `matrix` at an address that 16 does not divide, and the memory around it: one NaN before, one after."""
    memory = matrix.new_full((matrix.numel() + 2,), float("nan"))
    inside = memory[1:-1].view(matrix.shape)
    inside.copy_(matrix)
    assert inside.data_ptr() % 16
    return inside, memory


@pytest.mark.parametrize("first, slope", [(0.0, 1.0), (15 / math.log(2), -30 / math.log(2))])  # r itself, and log₂ exp(z)
def test_the_softcaps_polynomial(first: float, slope: float) -> None:
    """Off by no more than its comment says, in fp32 with fused multiply-adds."""
    from nvfp8.kernels.cross_entropy import scaled

    x = torch.linspace(-15, 15, 200_001, dtype=torch.float64).float().double()
    square = (x * x).float().double()
    highest, *lower = torch.tensor(scaled(15.0, slope)).double().flip(0)
    q = highest.expand_as(x)
    for constant in lower:
        q = (q * square + constant).float().double()
    result = (x * q + (first + slope / 2)).float().double()
    assert (result - (first + slope / (1 + (2 * x / 15).exp()))).abs().max() <= 7e-8 * abs(slope)


def test_softcap_of_logits_of_any_size(dtype: torch.dtype) -> None:
    """Below the cap, where a polynomial serves on a GPU, at it, far above, infinite; and what is not a number stays visible."""
    steps = torch.linspace(-45, 45, 509, device=DEVICE).to(dtype)
    logits = torch.stack((steps, steps.flip(0) / 3, torch.full_like(steps, 15.0), steps.clamp(-15, 15)))
    logits[0, :2] = torch.tensor([torch.inf, -torch.inf])
    targets = torch.tensor([7, 3, 0, 508], device=DEVICE)
    kernel, twin, exact = (
        (module.softcap_cross_entropy_(given, targets, 509, 15.0, scale), given)
        for module, given, scale in (
            (kernels, logits.clone(), torch.ones((), device=DEVICE)),
            (reference, logits.clone(), torch.ones((), device=DEVICE)),
            (reference, logits.double(), torch.ones((), device=DEVICE, dtype=torch.float64)),
        )
    )
    compare(kernel, twin, exact)
    logits[1, 200] = torch.nan
    losses = kernels.softcap_cross_entropy_(logits, targets, 509, 15.0, None)
    assert losses.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_muon_nesterov(shape: tuple[int, int, int], stored: torch.dtype, dtype: torch.dtype) -> None:
    n, r, c = shape
    gradients = random(*shape, dtype=dtype, seed=1)
    before = random(n + 2, r, c, dtype=stored, seed=2)
    results = []
    for function, of_x, of_momentum in (
        (kernels.muon_nesterov_, dtype, stored),
        (reference.muon_nesterov_, dtype, stored),
        (reference.muon_nesterov_, torch.float64, torch.float64),
    ):
        buffer, x = before.to(of_momentum, copy=True), torch.empty(shape, dtype=of_x, device=DEVICE)
        # bf16 is rounded stochastically, by the same bits here and there; fp64 is not rounded
        function(gradients.to(of_x).unbind(), buffer[1:-1], None, x, 0.1, 0.9, range(n))
        assert torch.equal(buffer[[0, -1]], before[[0, -1]].to(of_momentum)), "what another chunk owns is left alone"
        results.append((buffer[1:-1], x))
    compare(*results)


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("case", ["strided", "unaligned", "two dtypes"])
def test_muon_takes_gradients_as_they_come(shape: tuple[int, int, int], case: str, dtype: torch.dtype) -> None:
    plain = list(random(*shape, dtype=dtype, seed=1))
    odd = list(plain)
    if case == "strided":
        odd[1] = plain[1].mT.contiguous().mT
        assert odd[1].is_contiguous() == (1 in shape)
    elif case == "unaligned":
        odd[1], _ = unaligned(plain[1])
    else:
        odd[1] = plain[1].bfloat16() if dtype == torch.float32 else plain[1].float()
        plain = [g.float() for g in odd]
    results = []
    for gradients in (plain, odd):
        momentum, x = random(*shape, dtype=torch.float32, seed=2), torch.empty(shape, dtype=dtype, device=DEVICE)
        kernels.muon_nesterov_(gradients, momentum, None, x, 0.1, 0.9)
        results.append((momentum, x))
    assert all(torch.equal(ours, same) and ours.isfinite().all() for ours, same in zip(*results, strict=True))


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("decay", [0.25, 0.0])
def test_muon_descend(shape: tuple[int, int, int], by_row: bool, decay: float, dtype: torch.dtype) -> None:
    n, r, c = shape
    x = random(*shape, dtype=dtype, seed=1)
    scale = random(*((n, r, 1) if by_row else (n, 1, c)), dtype=torch.float32, seed=2)
    start = random(*shape, dtype=torch.float32, seed=3)
    results = []
    for function, wide in (
        (kernels.muon_descend_, torch.float32),
        (reference.muon_descend_, torch.float32),
        (reference.muon_descend_, torch.float64),
    ):
        first, memory = unaligned(start[0].to(wide))
        weights = [first, *start[1:].to(wide, copy=True)]
        function(weights, None, x, scale.to(wide), 0.5, decay)
        assert memory[[0, -1]].isnan().all(), "nothing is written beside a weight"
        results.append((torch.stack(weights),))
    compare(*results)


def test_muon_descends_aligned_weights_alike(dtype: torch.dtype) -> None:
    shape, keys = (2, 40, 272), [1, 2]
    x, scale = random(*shape, dtype=dtype, seed=1), random(2, 1, 272, dtype=torch.float32, seed=2)
    aligned = list(random(*shape, dtype=dtype, seed=3).clone().unbind())
    others = [unaligned(w)[0] for w in aligned]
    assert all(w.data_ptr() % 16 == 0 for w in aligned)
    for weights in (aligned, others):
        kernels.muon_descend_(weights, None, x, scale, 0.5, 0.25, keys)
    assert all(torch.equal(a, b) for a, b in zip(aligned, others, strict=True))
