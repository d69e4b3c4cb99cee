"""Polar Express: a matrix's singular values brought near 1, its singular vectors kept, by matrix products alone.

Five steps, each an odd polynomial of X (arXiv 2505.16932), with A = XXᵀ on the short side m of X (m × km):
    X ← aX + (bA + cA²)X

Three ways to compute the same five polynomials, in units of m³ floating-point operations and for d24's matrices in all:

| products | a step | in all | k = 1 | k = 4 | d24, TFLOP |
| --- | --- | --- | --- | --- | --- |
| full | XXᵀ 2k, A² 2, (bA + cA²)X 2k | 20k + 10 | 30 | 90 | 26.1 |
| half | symmetric products once: XXᵀ k, A² 1, then 2k | 15k + 5 | 20 | 65 | 18.3 |
| gram | steps 1, 2: squares 5; 3 to 5: squares 11; twice XXᵀ k and QX 2k | 6k + 16 | 22 | 40 | 14.6 |

With "half" for square matrices and "gram" for those of 1:4, as below, 13.9.

**full**: `torch.baddbmm`, so that bA + cA² and aX + BX are one GEMM each, summed in fp32: against aX + (BX rounded to bf16) the
error falls 2.5 to 5 times.

**half**: XXᵀ and A² are symmetric: half of their tiles are computed (`nvfp8/kernels/symmetric.py`). aX is folded into
P = aI + bA + cA², which costs the kernel nothing, so X ← PX is a product and no sum: `torch.baddbmm`, which copies what it adds,
took 1.44 times as long for a sum (24 of 1536 × 1536: 0.348 against 0.242 ms; H100, torch 2.11). In fp16: as fast as bf16, and it
rounds to an eighth.

**small**: one kernel makes all steps of a matrix of up to 32 × 32 (`nvfp8/kernels/polar_express.py`), in fp32.

**gram**: all five polynomials are of the same G = XXᵀ, so X itself need not follow. P takes X to PX and G to PGP; P and G commute,
so every product of them is symmetric. Q, the product of all P, is applied to X in the end. What it costs is accuracy: G is rounded
relative to its largest eigenvalue, so a singular value below √ε of the largest is lost in G, and where an eigenvalue comes out
negative, P grows it like any other. Hence fp16 (ε = 2⁻¹¹; bf16 has 2⁻⁸), and a restart after two steps: Q, up to 33 by then, is
applied to X, and G made anew. The other three multiply small singular values by 30, their squares in G by 900, and G's error of
3·10⁻⁵ with them. Another restart, after the third, would cost 3k units more; without it PG, PGP and a product for Q take 3, and
two more units keep what matters:

* G's rest, in a second fp16 number (`symmetric_product_`): (G + rest)P₃ = GP₃ + rest·P₃. Where P₃ is 3.9, at small eigenvalues, the
  rest weighs 15 times what it weighs in a G that is rounded after the third step, so from there on one number will do.
* The order of P₅P₄P₃. P₃'s rounding does not commute with G, so it turns the eigenvectors of PGP, and of P₅P₄ with them. What it
  takes from large singular vectors to small ones, P₅P₄ takes back; in P₃P₄P₅ it is multiplied by 30, in a symmetric product, half
  of one and half of the other, by 15. So Q = (P₅P₄)P₃ is the one whole product of squares, 2 units.

Of a 384 × 1536 matrix, the largest deviation of a singular value from fp64's and ‖X − X₆₄‖ / ‖X₆₄‖ (products summed in fp32 and
rounded once, computed on a CPU), beside restarts without a rest, all products symmetric:

| spectrum | full, bf16 | restart after 2 | after 2 and 3 | gram |
| --- | --- | --- | --- | --- |
| Gaussian | 0.005, 1.0 % | 0.002, 0.2 % | 0.002, 0.3 % | 0.002, 0.3 % |
| decay to 10⁻³ | 0.016, 5.0 % | 0.121, 7.1 % | 0.002, 0.5 % | 0.006, 0.9 % |
| decay to 10⁻⁴ | 0.030, 6.8 % | 0.096, 7.5 % | 0.002, 0.6 % | 0.004, 1.0 % |
| decay to 10⁻⁶ | 0.035, 9.2 % | 0.097, 7.6 % | 0.002, 0.6 % | 0.004, 1.0 % |
| 12 equal, noise 10⁻¹ | 0.005, 1.0 % | 0.002, 0.2 % | 0.002, 0.2 % | 0.002, 0.2 % |
| 12 equal, noise 10⁻² | 0.002, 2.6 % | 0.001, 0.2 % | 0.001, 0.2 % | 0.001, 0.2 % |
| 12 equal, noise 10⁻³ | 0.015, 20 % | 0.003, 0.5 % | 0.003, 0.5 % | 0.003, 0.5 % |
| 1/i | 0.001, 1.4 % | 0.046, 1.6 % | 0.001, 0.3 % | 0.002, 0.4 % |
| i^−1.5 | 0.004, 4.6 % | 0.010, 2.7 % | 0.002, 0.4 % | 0.005, 0.6 % |
| i^−2 | 0.005, 6.8 % | 0.019, 4.0 % | 0.016, 0.7 % | 0.016, 0.8 % |
| half of them 10⁻² | 0.017, 6.9 % | 0.281, 18 % | 0.001, 0.7 % | 0.012, 2.0 % |
| half of them 10⁻³ | 0.036, 9.2 % | 0.271, 23 % | 0.001, 0.9 % | 0.012, 2.3 % |

At 768 × 3072 i^−1.5 is off by 0.005, 0.5 %, and i^−2 by 0.033, 1.6 % (full: 0.003, 4.9 %; 0.004, 7.0 %; restarts after 2 and 3:
0.006, 0.4 %; 0.034, 1.5 %): Q's rounding, relative to its largest eigenvalue, falls on the first singular vector, whose own is
small.

Of a 1536 × 1536 matrix, with the largest singular value in fp64:

| spectrum before | largest, fp64 | full, bf16 | half, fp16 | half, fp16, aX added in fp32 |
| --- | --- | --- | --- | --- |
| Gaussian | 1.141 | 0.0023, 0.9 % | 0.0009, 0.1 % | 0.0004, 0.1 % |
| decay to 10⁻³ | 1.141 | 0.0057, 2.6 % | 0.0010, 0.3 % | 0.0005, 0.3 % |
| decay to 10⁻⁴ | 1.141 | 0.0079, 3.8 % | 0.0009, 0.5 % | 0.0005, 0.5 % |
| decay to 10⁻⁶ | 1.141 | 0.0210, 5.4 % | 0.0012, 0.7 % | 0.0007, 0.7 % |
| 48 equal, noise 10⁻² | 1.141 | 0.0024, 3.0 % | 0.0005, 0.4 % | 0.0003, 0.4 % |
| 48 equal, noise 10⁻³ | 1.105 | 0.0111, 16 % | 0.0005, 2.1 % | 0.0005, 2.1 % |
| 1/i | 1.141 | 0.0026, 1.8 % | 0.0006, 0.2 % | 0.0002, 0.2 % |
| all equal | 0.924 | 0.0354, 2.1 % | 0.0035, 0.3 % | 0.0017, 0.2 % |
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from nvfp8 import cublaslt
from nvfp8.hardware import Capability, missing
from nvfp8.ops import ops
from nvfp8.reference_optim import REST

# (a, b, c) for 5 steps with safety factor 2e-2 and cushion 2 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# What X is multiplied by in fp16 until it is first multiplied. Of norm 1, a 1536 × 6144 matrix's G has elements of 8e-6 off the
# diagonal, where fp16 has few bits left (below 6e-5); times 32² they are normal numbers, and G's largest eigenvalue, at most 1024,
# is far below 65504. The first P multiplies small singular values by 8, and G's elements by 64, so nothing is lifted after it.
LIFT = 32.0
SMALL = 32  # the longer side up to which a matrix is kept in registers for all of its steps
# Tiles of symmetric products that run at once: 132 multiprocessors of an H100 or H200 have two each (`nvfp8/kernels/symmetric.py`).
TILE, ROUND = 128, 264
SMALLEST = 768  # short side from which another way than "full" is taken: below it no symmetric product was measured


def fastest_products(rows: int, columns: int, dtype: torch.dtype, capability: Capability | None) -> str:
    """The way that Muon goes for a shape.

    From the times of single products (`nvfp8/kernels/symmetric.py`; PX as cuBLAS's whole XXᵀ at k = 4, as many operations, 0.0093k
    ms) the five steps of a 1536 × 1536k matrix should take an H200 0.079k + 0.035 ms by "half", 0.032k + 0.111 by "gram", the same
    at k = 1.6; by "full" an H100 took 0.19 (k = 1) and 0.53 (k = 4). "gram" is taken from k = 2 on, the least at which its
    accuracy was computed.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        dtype: that Muon computes in.
        capability: CUDA compute capability of the GPU; None on a CPU. The kernel is measured with wgmma alone.

    Returns:
        On GPUs, for bf16: "small" for sides of at most SMALL, "gram" or "half" for a short side of at least SMALLEST and sides that
        8 divides (TMA). Else "full".
    """
    if dtype == torch.bfloat16 and capability is not None and max(rows, columns) <= SMALL:
        return "small"
    if dtype != torch.bfloat16 or capability is None or missing("wgmma", capability) is not None:
        return "full"
    short, long = sorted((rows, columns))
    if short < SMALLEST or short % 8 or long % 8:
        return "full"
    return "gram" if long >= 2 * short else "half"


def room(rows: int, columns: int, dtype: torch.dtype, products: str) -> int:
    """Bytes that `polar_express` works in for one matrix, x itself included: two of X, and two or four of its Gram matrix."""
    short = min(rows, columns)
    return dtype.itemsize * (2 * rows * columns + (4 if products == "gram" else 2) * short * short)


def together(count: int, bytes_: int, rows: int, columns: int, dtype: torch.dtype, products: str) -> int:
    """How many of `count` matrices to take at once, of `room` for no more than `bytes_`, but for one at least.

    Tiles of symmetric products run in rounds, of which a launch's last may be nearly empty: those of eight 1536 × 6144 matrices
    fill 2.4. So where there are such products it is the number that makes the fewest rounds of all matrices, the largest of them:
    9 + 9 + 6 take 3 + 3 + 2 rounds, 8 + 8 + 8 nine. Elsewhere parts come out nearly equal.
    """
    most = min(count, max(1, bytes_ // room(rows, columns, dtype, products)))
    parts = math.ceil(count / most)
    if products not in ("half", "gram"):
        return math.ceil(count / parts)
    blocks = math.ceil(min(rows, columns) / TILE)

    def rounds(matrices: int) -> int:
        return math.ceil(matrices * blocks * (blocks + 1) / 2 / ROUND)

    return min(range(most, 0, -1), key=lambda n: count // n * rounds(n) + rounds(count % n))


def worked_in(products: str, dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """The dtype in which `polar_express` works where it computes in `dtype`, and by what X is multiplied there."""
    if products not in ("half", "gram"):
        return dtype, 1.0
    return torch.float16 if dtype == torch.bfloat16 else dtype, LIFT


def polar_express(x: Tensor, products: str, *, lifted: bool = False) -> Tensor:
    """Return x (n, r, c), each of Frobenius norm at most 1, with all singular values brought near 1; overwrites x.

    Args:
        x: fp32 or bf16, computed in as it is; by "half" and "gram" bf16 becomes fp16.
        products: "full", "half", "gram" or "small".
        lifted: x is in the dtype, and multiplied by the factor, that `worked_in` says.

    Returns:
        (n, r, c) in the dtype worked in.
    """
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"full": _full, "half": _half, "gram": _gram}
    if products == "small":
        return _small(x)
    if lifted or products == "full":
        return ways[products](x, torch.empty_like(x))
    dtype, factor = worked_in(products, x.dtype)
    # x's own memory is room for another one.
    return ways[products](torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype)), x.view(dtype))


def _full(x: Tensor, other: Tensor) -> Tensor:
    tall, (gram, poly) = x.size(-2) > x.size(-1), _squares(x, 2)
    for a, b, c in POLAR_EXPRESS:
        _product(gram, *((x.mT, x) if tall else (x, x.mT)))
        _product(poly, gram, gram, c, gram, b)
        _product(other, *((x, poly) if tall else (poly, x)), 1.0, x, a)
        x, other = other, x
    return x


def _half(x: Tensor, other: Tensor) -> Tensor:
    tall, lift, product = x.size(-2) > x.size(-1), LIFT, ops(x).symmetric_product_
    g, p = _squares(x, 2)
    for a, b, c in POLAR_EXPRESS:
        rows = x.mT if tall else x
        product(rows, rows, g)  # lift² XXᵀ
        product(g, g, p, alpha=c / lift**4, c=g, beta=b / lift**2, diagonal=a)
        _product(other, *((x, p) if tall else (p, x)), 1 / lift)
        x, other, lift = other, x, 1.0
    return x


def _gram(x: Tensor, other: Tensor) -> Tensor:
    tall, product = x.size(-2) > x.size(-1), ops(x).symmetric_product_
    g, p, q, spare = _squares(x, 4)

    def polynomial(step: int, out: Tensor, lift: float = 1.0) -> None:
        a, b, c = POLAR_EXPRESS[step]
        product(g, g, out, alpha=c / lift**4, c=g, beta=b / lift**2, diagonal=a)

    rows = x.mT if tall else x
    product(rows, rows, g)  # LIFT² XXᵀ
    polynomial(0, q, LIFT)
    product(q, g, spare)
    product(spare, q, g)  # LIFT² PGP
    polynomial(1, p, LIFT)
    product(p, q, spare)
    _product(other, *((x, spare) if tall else (spare, x)), 1 / LIFT)

    rows = other.mT if tall else other
    product(rows, rows, g, rest=spare)
    polynomial(2, p)
    product(p, spare, q)
    product(p, g, spare, c=q, beta=1 / REST)  # P(G + rest)
    product(spare, p, g)
    polynomial(3, q)
    product(q, g, spare)
    product(spare, q, g)
    polynomial(4, spare)
    product(spare, q, g)
    _product(q, g, p)  # P₅P₄ · P₃, whole
    _product(x, *((other, q.mT) if tall else (q, other)))
    return x


def _small(x: Tensor) -> Tensor:
    result: Tensor = ops(x).polar_express_(x, tuple(factor for step in POLAR_EXPRESS for factor in step))
    return result


def _product(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0) -> None:
    """Write alpha · left · right + beta · add, rounded once: all (n, ?, ?) of one dtype, `out` none of the operands."""
    if out.is_cuda and out.dtype.itemsize == 2 and add is None and not any(side % 8 for side in (*left.shape[1:], right.shape[2])):
        # Several processes may each update the same weights, as under DDP.
        cublaslt.matmul(left, right, out, alpha=alpha, alike=_several_processes())
    elif out.is_cuda or out.dtype.itemsize > 2:
        torch.baddbmm(out if add is None else add, left, right, beta=beta, alpha=alpha, out=out)
    else:  # a CPU without instructions for narrow floats takes 10 to 60 times as long over them (an EPYC, one thread)
        value = left.float() @ right.float() * alpha
        out.copy_(value if add is None else value + beta * add.float())


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _squares(x: Tensor, count: int) -> list[Tensor]:
    """Room for `count` Gram matrices of each matrix of x (n, r, c), on the short side."""
    short = min(x.shape[-2:])
    return [x.new_empty(x.size(0), short, short) for _ in range(count)]
