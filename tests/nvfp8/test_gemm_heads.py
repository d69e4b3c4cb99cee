"""The projections' GEMM that ends in attention's inputs: kernel and twin against the two steps they replace; who may read what.

On a CPU the kernel runs in Triton's interpreter over small heads and in fp32 (its bf16 truncates), on a GPU as compiled.
"""

import weakref

import pytest
import torch
from one_block import TOKENS, WIDTH, block, inputs
from torch import Tensor

from nvfp8 import reference
from nvfp8.attention import project_heads
from nvfp8.precision import fp8
from nvfp8.recipe import GEMMS, parse_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
E4M3 = torch.float8_e4m3fn
OUTPUTS = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = [64, 128] if DEVICE == "cuda" else [16]
# Rows and length: less than a tile; lengths that end inside a tile, so that positions begin again there; whole tiles. On a GPU more
# tiles than it has processors, so that programs walk over several.
SHAPES = [(1, 5), (3, 37), (2, 64)] if DEVICE == "cpu" else [(1, 5), (3, 300), (2, 2048), (9, 1000)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def arguments(shape: tuple[int, int], heads: tuple[int, int], size: int, k: int, values: bool) -> tuple[object, ...]:
    """All of `gemm_heads` but shape, dtype and fast."""
    (batch, length), (n_head, n_kv), rows = shape, heads, 11
    x, w = random(batch * length, k, seed=1).to(E4M3), random((n_head + 2 * n_kv) * size, k, seed=2).to(E4M3)
    angle = random(length, size // 2, seed=3)
    gate = random(*shape, n_kv, dtype=OUTPUTS, seed=4) if values else None
    table = random(rows, n_kv * size, dtype=OUTPUTS, seed=5) if values else None
    ids = (torch.arange(batch * length, device=DEVICE) % rows).view(shape) if values else None
    inverses = torch.tensor(0.5, device=DEVICE), torch.tensor(0.25, device=DEVICE)
    return x, w, *inverses, angle.cos().to(OUTPUTS), angle.sin().to(OUTPUTS), heads, gate, table, ids


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def exact_of(given: tuple[object, ...], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The two steps apart, in fp64."""
    x, w, x_inverse, w_inverse, *more = (t.double() if isinstance(t, Tensor) and t.dtype != torch.int64 else t for t in given)
    return reference.heads_forward((x @ w.t() * (x_inverse * w_inverse)).unflatten(0, shape), *more)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 2)])
def test_twin(heads: tuple[int, int], values: bool) -> None:
    shape = (2, 21)
    given = arguments(shape, heads, 16, 48, values)
    found = reference.gemm_heads(*given, shape, torch.float32, True)
    assert [t.dtype for t in reference.gemm_heads(*given, shape, torch.bfloat16, True)] == [torch.bfloat16] * 3 + [torch.float32]
    for ours, exact in zip(found, exact_of(given, shape), strict=True):
        assert ours.shape == exact.shape and ours.is_contiguous() and error(ours, exact) < 1e-6


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 2)])  # five heads: the last tile of two has but one
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fast", [True, False])  # tiles of two heads, and of one
def test_kernel(fast: bool, size: int, shape: tuple[int, int], heads: tuple[int, int], values: bool) -> None:
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    k = 80 if DEVICE == "cpu" else 784
    given = arguments(shape, heads, size, k, values)
    found = kernels.gemm_heads(*given, shape, OUTPUTS, fast)
    twin = reference.gemm_heads(*given, shape, OUTPUTS, fast)
    # A tensor core adds 32 terms at a time to a sum of 14 bits or so, every time cutting off up to 2^-13 of it: all the way, or
    # over 128 terms. What is stored in bf16 is rounded by up to 2^-9.
    least = 2e-6 if DEVICE == "cpu" else (k if fast else 128) / 32 * 2.0**-13
    for ours, theirs, exact in zip(found, twin, exact_of(given, shape), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        assert error(ours, exact) < least + (2.0**-9 if ours.dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("where", [2, 3, 7])
def test_what_is_not_finite_is_seen(where: int) -> None:
    """In a scale: everywhere; in one gate: in that head of that token of v alone."""
    kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
    shape, heads = (2, 64), (2, 2)
    given = arguments(shape, heads, SIZES[-1], 32, True)
    tensor = given[where]
    assert isinstance(tensor, Tensor)
    tensor.view(-1)[-1] = torch.nan
    for module in (kernels, reference):
        q, k, v, rstd = module.gemm_heads(*given, shape, OUTPUTS, True)
        if where < 4:
            assert all(bool(t.isnan().all()) for t in (q, k, v, rstd))
        else:
            assert not any(bool(t.isnan().any()) for t in (q, k, rstd, v[..., 0, :], v[0], v[1, :-1]))
            assert bool(v[-1, -1, -1].isnan().all())


# Who may read what stands in for the projections


def projected(recipe: str = "delayed", table: bool = True) -> tuple[Tensor, ...]:
    """What the joined projections of a block return, and the tensors that `project_heads` takes beside."""
    precision = fp8(parse_recipe(recipe), emulated=True)
    made = block(precision.at("attn"), DEVICE, table)
    precision.scaling(made)
    x, x0, lambdas, _ = inputs(DEVICE, torch.bfloat16)
    with precision.autocast(1 / TOKENS):
        qkv = made["qkv"](x.view(2, -1, WIDTH), x0.view(2, -1, WIDTH), lambdas, 0)[3]
    angle = random(TOKENS // 2, WIDTH // 8, seed=3)
    return qkv, angle.cos().bfloat16(), angle.sin().bfloat16()


def test_projections_are_left_to_the_heads() -> None:
    qkv, cos, sin = projected()
    assert qkv.shape == (2, TOKENS // 2, 3 * WIDTH) and qkv.untyped_storage().nbytes() == 2 and bool(qkv.isnan().all())
    plain, *_ = projected(table=False)
    (q, k, v), apart = (project_heads(t, cos, sin, (4, 4), None, None, None) for t in (qkv, plain))
    assert torch.equal(v, apart[2]), "the same product, rounded once"
    for ours, theirs in ((q, apart[0]), (k, apart[1])):
        # Apart the product is rounded to bf16 in between, by up to 2^-9, and then the results are by as much.
        assert 0 < error(ours, theirs.double()) < 3 * 2.0**-9


@pytest.mark.parametrize("recipe", ["delayed", "current", "e4m3"])
def test_every_scale_a_tensor_is_known_for_it(recipe: str) -> None:
    assert bool(projected(recipe)[0].isnan().all())


@pytest.mark.parametrize("recipe", ["rowwise", "delayed:bf16=attn", *(f"delayed:bf16=attn:{gemm}" for gemm in GEMMS)])
def test_what_is_not_fused_is_there(recipe: str) -> None:
    assert bool(projected(recipe)[0].isfinite().all())


def test_read_once_and_as_it_is() -> None:
    qkv, cos, sin = projected()
    with pytest.raises(RuntimeError, match="from the very tensor that a layer returned, not from a view of it"):
        project_heads(qkv.view(2, -1, 3 * WIDTH), cos, sin, (4, 4), None, None, None)
    project_heads(qkv, cos, sin, (4, 4), None, None, None)
    with pytest.raises(RuntimeError, match="a deferred product can be read once"):
        project_heads(qkv, cos, sin, (4, 4), None, None, None)


def test_the_operand_goes_with_the_product() -> None:
    qkv, cos, sin = projected()
    operand = weakref.ref(qkv.fp8_deferred.x)
    outputs = project_heads(qkv, cos, sin, (4, 4), None, None, None)
    assert operand() is None and outputs[0].grad_fn is not None
