"""The cross-entropy that writes its gradient in FP8, both ways, against its twin and fp64."""

import pytest
import torch
from test_fp8_kernels import DEVICE, E5M2, assert_codes, assert_same, codes, dtype, error, random, scalar, stream

from nvfp8 import reference

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
__all__ = ["dtype", "stream"]  # fixtures


@pytest.mark.parametrize(("vocab", "padded", "m"), [(50, 64, 9), (300, 320, 150), (128, 256, 40), (4096, 4096, 130)])
@pytest.mark.parametrize("layouts", ["both", "rows", "columns", "rows and over the logits", "columns and over the logits"])
def test_cross_entropy(vocab: int, padded: int, m: int, layouts: str, dtype: torch.dtype, stream: torch.dtype) -> None:
    logits, targets = 4 * random(m, padded, dtype=stream, seed=1), torch.randint(vocab, (m,), device=DEVICE)
    targets[[0, 4, m - 1]] = torch.tensor([-1, vocab - 1, 0], device=DEVICE)
    scale = scalar(2.0**15 if dtype == E5M2 else 256.0)
    factor = scalar(0.125) if "over" in layouts else None
    results = []
    for function in (kernels.softcap_cross_entropy_quantize, reference.softcap_cross_entropy_quantize):
        q = torch.zeros(m, padded, device=DEVICE).to(dtype) if layouts.startswith(("both", "rows")) else None
        # A part of longer rows, of which what is beside it must stay.
        longer = torch.full((padded, m + 39), 3.0, device=DEVICE).to(dtype)
        q_t = longer[:, 16 : 16 + m] if layouts.startswith(("both", "columns")) else None
        given = logits.clone()
        losses = torch.empty(m + 20, device=DEVICE).fill_(-7.0)  # a part of longer ones too
        function(given, targets, losses[16:-4], vocab, 15.0, scale, factor, q, q_t)
        assert (losses[:16] == -7).all() and (losses[-4:] == -7).all()
        assert (longer[:, :16].float() == 3).all() and (longer[:, 16 + m :].float() == 3).all()
        results.append((losses[16:-4], given, q, None if q_t is None else q_t.contiguous()))
    assert_same(*results)
    assert factor is not None or torch.equal(results[0][1], logits)
    exact = logits.double()
    losses = reference.softcap_cross_entropy_(exact, targets, vocab, 15.0, scalar(1.0).double())
    assert error(results[0][0], losses) < 2e-6
    for found, true in ((results[0][2], exact), (results[0][3], exact.t())):
        if found is not None:
            assert_codes(found, codes(true, scale, dtype).contiguous())
            found = found if found.shape == exact.shape else found.t()
            assert (found[0].float() == 0).all() and (found[:, vocab:].float() == 0).all()


def test_logits_that_are_no_numbers_show_but_for_ignored_tokens(stream: torch.dtype) -> None:
    """In the losses and the gradient; an ignored token has neither."""
    logits, targets = random(40, 64, dtype=stream, seed=1), torch.zeros(40, dtype=torch.int64, device=DEVICE)
    logits[5:8, 3], targets[5] = torch.nan, -1
    losses, q = torch.zeros(40, device=DEVICE), torch.zeros(40, 64, device=DEVICE).to(E5M2)
    kernels.softcap_cross_entropy_quantize(logits, targets, losses, 64, 15.0, scalar(2.0**15), None, q, None)
    broken = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    broken[6:8] = True
    assert torch.equal(losses.isnan(), broken) and losses[5] == 0
    assert torch.equal(q.float().isnan().all(1), broken) and q[~broken].float().isfinite().all() and (q[5].float() == 0).all()
