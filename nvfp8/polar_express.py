"""Polar Express: a matrix's singular values brought near 1, its singular vectors kept, by matrix products alone.

Each of five steps is an odd polynomial of X (arXiv 2505.16932), with A = XXᵀ on the short side m of X:
    X ← aX + (bA + cA²)X
"""

import torch
from torch import Tensor

from nvfp8.ops import ops

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
RESTART = 2
LIFT = 32.0


def polar_express(x: Tensor, products: str = "full") -> Tensor:
    return {"full": _full, "half": _half, "gram": _gram}[products](x)


def _full(x: Tensor) -> Tensor:
    tall = x.size(-2) > x.size(-1)
    short, other = min(x.shape[-2:]), torch.empty_like(x)
    gram, poly = x.new_empty(x.size(0), short, short), x.new_empty(x.size(0), short, short)
    for a, b, c in POLAR_EXPRESS:
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a, out=other)
        x, other = other, x
    return x


def _half(x: Tensor) -> Tensor:
    tall, product = x.size(-2) > x.size(-1), ops(x).symmetric_product_
    short, other = min(x.shape[-2:]), torch.empty_like(x)
    gram, poly = x.new_empty(x.size(0), short, short), x.new_empty(x.size(0), short, short)
    for a, b, c in POLAR_EXPRESS:
        rows = x.mT if tall else x
        product(rows, rows, gram)
        product(gram, gram, poly, alpha=c, c=gram, beta=b)
        torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a, out=other)
        x, other = other, x
    return x


def _gram(x: Tensor) -> Tensor:
    tall, product = x.size(-2) > x.size(-1), ops(x).symmetric_product_
    dtype = torch.float16 if x.dtype == torch.bfloat16 else x.dtype
    short, lift = min(x.shape[-2:]), LIFT
    x, other = torch.mul(x, lift, out=torch.empty_like(x, dtype=dtype)), x.view(dtype)
    g, p, q, t = (x.new_empty(x.size(0), short, short) for _ in range(4))
    for part in (POLAR_EXPRESS[:RESTART], POLAR_EXPRESS[RESTART:]):
        if not part: continue
        rows = x.mT if tall else x
        product(rows, rows, g)
        for step, (a, b, c) in enumerate(part):
            product(g, g, p, alpha=c / lift**4, c=g, beta=b / lift**2, diagonal=a)
            if step < len(part) - 1:
                product(p, g, t)
                product(t, p, g)
            if step == 0:
                p, q = q, p
            else:
                product(p, q, t)
                q, t = t, q
        torch.baddbmm(other, *((x, q) if tall else (q, x)), beta=0, alpha=1 / lift, out=other)
        x, other, lift = other, x, 1.0
    return x
