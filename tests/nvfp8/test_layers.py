"""The layers' hand-written backward against autograd through the definition, in fp64-checked fp32 and bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp8.attention import project_heads
from nvfp8.gates import smeared, value_gate
from nvfp8.layers import Linear, NormLinear, Pending, ReluSquaredMLP, RMSNorm, mix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
EPS = 2.0**-23
# Largest relative error against fp64 of a chain of roundings in each dtype: a few units in the last place.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def set_weight(layer: Linear, seed: int) -> Tensor:
    layer.to(DEVICE)
    with torch.no_grad():
        layer.weight.copy_(leaf(*layer.weight.shape, seed=seed) / layer.weight.shape[1] ** 0.5)
    return layer.weight


def check(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for position, (value, truth) in enumerate(zip(ours, exact, strict=True)):
        assert value.shape == truth.shape
        error = float((value.double() - truth).norm() / truth.norm())
        assert error <= BOUND[dtype], (position, error)


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_rms_norm_is_pytorchs(dtype: torch.dtype) -> None:
    x = leaf(3, 7, 48, seed=1, dtype=dtype)
    y = RMSNorm()(x)
    # nanochat calls rms_norm without eps and so gets fp32's epsilon even in bf16.
    torch.testing.assert_close(y, F.rms_norm(x, (48,)), rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    weights = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, weights)
    (wide,) = doubles(x)
    (exact,) = torch.autograd.grad(norm(wide), wide, weights.double())
    check([dx], [exact], dtype)


def test_norm_linear(dtype: torch.dtype) -> None:
    projections = nn.ModuleList([Linear(48, 32), Linear(48, 16), Linear(48, 16)])
    weights = [set_weight(layer, seed) for seed, layer in enumerate(projections)]
    layer = NormLinear(*projections)
    assert not list(layer.parameters()), "the projections belong to their owner alone"
    x, x0, lambdas = leaf(2, 9, 48, seed=5, dtype=dtype), leaf(2, 9, 48, seed=6, dtype=dtype), leaf(2, seed=7)
    outputs = layer(x, x0, lambdas, 12)
    gradients = [torch.randn_like(t) for t in outputs]
    ours = torch.autograd.grad(outputs, [x, x0, lambdas, *weights], gradients)

    wide = doubles(x, x0, lambdas, *weights)
    stream = wide[0] * wide[2][0] + wide[1] * wide[2][1]
    exact_outputs = [stream, wide[1].clone(), norm(stream)[..., :12], F.linear(norm(stream), torch.cat(wide[3:]))]
    exact = torch.autograd.grad(exact_outputs, wide, [g.double() for g in gradients])
    check([*outputs, *ours], [*exact_outputs, *exact], dtype)


def test_norm_linear_with_unused_outputs() -> None:
    """The last block's x0 has no reader, and a layer without value embedding does not look at x̂."""
    projection = Linear(32, 32)
    weight = set_weight(projection, 1)
    x, x0, lambdas = leaf(2, 4, 32, seed=2), leaf(2, 4, 32, seed=3), leaf(2, seed=4)
    *_, out = NormLinear(projection)(x, x0, lambdas, 12)
    ours = torch.autograd.grad(out.square().sum(), [x, x0, lambdas, weight])
    wide = doubles(x, x0, lambdas, weight)
    exact_out = F.linear(norm(wide[0] * wide[2][0] + wide[1] * wide[2][1]), wide[3])
    check(list(ours), list(torch.autograd.grad(exact_out.square().sum(), wide)), torch.float32)


def test_linear(dtype: torch.dtype) -> None:
    layer = Linear(40, 24)
    weight = set_weight(layer, 1)
    x = leaf(2, 5, 40, seed=3, dtype=dtype)
    out = layer(x)
    gradient = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x, weight], gradient)
    wide = doubles(x, weight)
    exact_out = F.linear(*wide)
    check([out, *ours], [exact_out, *torch.autograd.grad(exact_out, wide, gradient.double())], dtype)


@pytest.mark.parametrize("pending", [False, True])
def test_mlp(dtype: torch.dtype, pending: bool) -> None:
    layer = ReluSquaredMLP(32, 128)
    weights = [set_weight(layer.c_fc, 1), set_weight(layer.c_proj, 2)]
    parts = [leaf(2, 7, 32, seed=3 + i, dtype=dtype) for i in range(1 + pending)]
    out = layer(Pending(*parts) if pending else parts[0])
    gradient = torch.randn_like(out)
    ours = torch.autograd.grad(out, [*parts, *weights], gradient)
    wide = doubles(*parts, *weights)
    x = sum(wide[:-2])
    exact_out = x + F.linear(F.linear(norm(x), wide[-2]).relu().square(), wide[-1])
    check([out, *ours], [exact_out, *torch.autograd.grad(exact_out, wide, gradient.double())], dtype)


def test_mlp_keeps_two_tensors() -> None:
    """Its input and relu(h)² are all that backward needs: 2·D + 2·4D bytes a token in bf16, besides weights."""
    layer = ReluSquaredMLP(64, 256)
    set_weight(layer.c_fc, 1)
    set_weight(layer.c_proj, 2)
    x = leaf(2, 16, 64, seed=1, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {layer.c_fc.weight.data_ptr(), layer.c_proj.weight.data_ptr()}
    kept_bytes = sum(t.nbytes for t in kept if t.data_ptr() not in weights)
    assert kept_bytes == 2 * 16 * (2 * 64 + 2 * 256 + 4)  # … and 1/rms of each row


def test_project_heads_takes_ids_of_any_strides() -> None:
    """`tokens[:, :-1]` is how batches are usually cut; kernels address tokens as if they lay side by side."""
    tokens = torch.randint(13, (3, 12), device=DEVICE)
    qkv, table = leaf(3, 11, 64, seed=1), leaf(13, 16, seed=2)
    gate = leaf(3, 11, 1, seed=3)
    cos, sin = torch.ones(11, 8, device=DEVICE), torch.zeros(11, 8, device=DEVICE)
    cut = tokens[:, :-1]
    assert not cut.is_contiguous()
    results = [project_heads(qkv, cos, sin, (2, 1), gate, table, ids)[2] for ids in (cut, cut.contiguous())]
    assert torch.equal(*results)
    results[0].square().sum().backward()
    gradient, table.grad = table.grad, None
    results[1].square().sum().backward()
    assert torch.equal(gradient, table.grad)


@pytest.mark.parametrize("readers", [1, 2])
def test_smear(readers: int, dtype: torch.dtype) -> None:
    x, weight = leaf(3, 7, 64, seed=1, dtype=dtype), leaf(1, 24, seed=2, dtype=dtype)
    smear = torch.tensor([0.3], device=DEVICE, requires_grad=True)
    previous = leaf(3, 1, 64, seed=3, dtype=dtype).detach()
    outputs = smeared(x, None, weight, smear)[:readers]
    gradients = [torch.randn_like(t) for t in outputs]
    torch.autograd.backward(outputs, gradients)
    wide = doubles(x, weight, smear)

    def plain(before: Tensor) -> Tensor:
        gate = wide[2] * torch.sigmoid(wide[0][..., :24] @ wide[1].t())
        return wide[0] + gate * torch.cat((before.double(), wide[0][:, :-1]), 1)

    exact = plain(torch.zeros_like(previous))
    ours = [*outputs, x.grad, weight.grad, smear.grad]
    check(ours, [*[exact] * readers, *torch.autograd.grad([exact] * readers, wide, [g.double() for g in gradients])], dtype)
    with torch.no_grad():
        check([smeared(x, previous, weight, smear)[0]], [plain(previous)], dtype)


def test_value_gate(dtype: torch.dtype) -> None:
    x, weight = leaf(3, 7, 12, seed=1, dtype=dtype), leaf(4, 12, seed=2, dtype=dtype)
    gate = value_gate(x, weight)
    d_gate = torch.randn_like(gate)
    gate.backward(d_gate)
    wide = doubles(x, weight)
    exact = 3 * torch.sigmoid(wide[0] @ wide[1].t())
    check([gate, x.grad, weight.grad], [exact, *torch.autograd.grad(exact, wide, d_gate.double())], dtype)


def test_second_derivatives_are_refused() -> None:
    """Backward is written by hand and not differentiable: asking for its gradient is an error, not a wrong number."""
    x = leaf(3, 16, seed=1)
    (dx,) = torch.autograd.grad(RMSNorm()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("values", [True, False])
def test_project_heads(values: bool, dtype: torch.dtype) -> None:
    batch, length, n_head, n_kv, size = 2, 11, 4, 2, 16
    qkv = leaf(batch, length, (n_head + 2 * n_kv) * size, seed=1, dtype=dtype)
    angle = torch.rand(length, size // 2, device=DEVICE) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gate = leaf(batch, length, n_kv, seed=2, dtype=dtype) if values else None
    table = leaf(13, n_kv * size, seed=3, dtype=dtype) if values else None
    ids = torch.randint(13, (batch, length), device=DEVICE) if values else None
    outputs = project_heads(qkv, cos, sin, (n_head, n_kv), gate, table, ids)
    gradients = [torch.randn_like(t) for t in outputs]
    inputs = [t for t in (qkv, gate, table) if t is not None]
    torch.autograd.backward(outputs, gradients)
    ours = [t.grad for t in inputs]

    wide = doubles(*inputs)
    q, k, v = wide[0].unflatten(-1, (-1, size)).split((n_head, n_kv, n_kv), 2)
    c, s = cos.double()[:, None], sin.double()[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * c + b * s, b * c - a * s), -1)

    if values:
        v = v + wide[1][..., None] * F.embedding(ids, wide[2]).view_as(v)
    exact_outputs = [norm(rotate(q)) * 1.2, norm(rotate(k)) * 1.2, v]
    exact = torch.autograd.grad(exact_outputs, wide, [g.double() for g in gradients])
    check([*outputs, *ours], [*exact_outputs, *exact], dtype)


def test_an_mlps_branch_below_the_last_bit_of_a_bf16_stream_is_not_lost() -> None:
    """Branches begin at zero and grow: added by itself, a tenth of the stream's last bit leaves the stream as it is."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    stream = (1 + torch.rand(1024, 1024, device=DEVICE, generator=generator)).bfloat16()  # in [1, 2]: the last bit is 2^-7
    x0 = torch.randn(1024, 1024, device=DEVICE, generator=generator).bfloat16()
    size = 2.0**-7 / 10
    branch = torch.full_like(stream, size)
    assert torch.equal(stream + branch, stream)

    def mean(x: Tensor) -> float:
        return float(x.float().mean(dtype=torch.float64))

    # The mix rounds to nearest, so what it rounds must lie anywhere between two bf16 numbers. With λ = (1.1, 0.1) a third of it
    # are multiples of a tenth of a step, ties among them: 0.11 of a step then carries 9 % too many over, or 15 % where a fused
    # multiply-add leaves ties just below.
    lambdas = torch.tensor([1.0717, 0.1093], device=DEVICE)
    with_branch, without = (mean(mix(x, x0, lambdas)[0]) for x in (Pending(stream, branch), stream))
    # A tenth of 2^20 elements takes a step, so their number is uncertain by 0.3 %, 1 / √(2^20 / 10).
    assert abs((with_branch - without) / (1.0717 * size) - 1) < 0.02
