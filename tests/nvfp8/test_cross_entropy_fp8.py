"""The cross-entropy that writes its gradient in FP8, both ways, against its twin and fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fp8_kernels import DEVICE, E5M2, assert_codes, assert_same, codes, dtype, error, random, scalar, stream
from torch import Tensor

from nvfp8 import reference
from nvfp8.reference_fp8 import known_entries
from nvfp8.rounding import FORMATS
from nvfp8.scaling import OF_LOGITS

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
kernels = pytest.importorskip("nvfp8.kernels", reason="Triton is not installed")
__all__ = ["dtype", "stream"]  # fixtures


def results(
    function: Callable[..., None], logits: Tensor, targets: Tensor, vocab: int, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, factors, and both layouts, written into parts of longer tensors of which what is beside them must stay."""
    m, padded = logits.shape
    q, longer = torch.full((m, padded), 3.0, device=DEVICE).to(dtype), torch.full((padded, m + 39), 3.0, device=DEVICE).to(dtype)
    of_rows = torch.full((2, m + 20), -7.0, device=DEVICE)
    given = logits.clone()
    function(given, targets, of_rows[0, 16:-4], of_rows[1, 16:-4], vocab, 15.0, scale, q, longer[:, 16 : 16 + m])
    assert torch.equal(given.nan_to_num(1e9), logits.nan_to_num(1e9))
    assert (of_rows[:, :16] == -7).all() and (of_rows[:, -4:] == -7).all()
    assert (longer[:, :16].float() == 3).all() and (longer[:, 16 + m :].float() == 3).all()
    return of_rows[0, 16:-4], of_rows[1, 16:-4], q, longer[:, 16 : 16 + m].contiguous()


@pytest.mark.parametrize("large", [False, True], ids=["", "large scale"])
@pytest.mark.parametrize(
    ("vocab", "padded", "m"), [(50, 64, 9), (300, 320, 150), (128, 256, 40), (4096, 4096, 130), (1100, 1136, 33)]
)
def test_cross_entropy(vocab: int, padded: int, m: int, large: bool, dtype: torch.dtype, stream: torch.dtype) -> None:
    """A large scale leaves no room for codes above it, so rows of a large vocabulary are made over their whole sum."""
    logits, targets = 4 * random(m, padded, dtype=stream, seed=1), torch.randint(vocab, (m,), device=DEVICE)
    logits[:, vocab:] = torch.nan
    targets[[0, 4, m - 1]] = torch.tensor([-1, vocab - 1, 0], device=DEVICE)
    scale = scalar({(E5M2, True): 2.0**15, (E5M2, False): OF_LOGITS}.get((dtype, large), 256.0 if large else 32.0))
    ours, twins = (
        results(module.softcap_cross_entropy_quantize, logits, targets, vocab, scale, dtype) for module in (kernels, reference)
    )
    assert_same(ours, twins)
    losses, factors, q, q_t = ours
    exact = logits.double().nan_to_num(0.0)
    assert error(losses, reference.softcap_cross_entropy_(exact, targets, vocab, 15.0, scalar(1.0).double())) < 2e-6
    assert factors[0] == 0 and (factors[1:] > 0).all() and (factors < 9 / 8 + 1e-6).all()
    over = over_the_known_part(logits, targets, vocab, scale, dtype)
    assert ((factors.double() * over)[1:] - 1).abs().max() < 0.126
    if vocab == 4096:
        assert (over == 1).any() if large else (over[1:] > 2).any()
    check(factors, q, exact, targets, over, scale)
    assert torch.equal(q.t().contiguous().view(torch.uint8), q_t.view(torch.uint8))
    assert (q[0].float() == 0).all() and (q[:, vocab:].float() == 0).all()


def over_the_known_part(logits: Tensor, targets: Tensor, vocab: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ eᶻ over what of it is known early, or 1 where codes would be too large for that, (M,) fp64."""
    exponentials = (15 * torch.tanh(logits[:, :vocab].double() / 15)).exp()
    of_target = exponentials.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    first = known_entries(vocab)
    over = exponentials.sum(1) / (exponentials[:, :first].sum(1) + torch.where(targets < first, 0.0, of_target))
    return torch.where(over * scale > FORMATS[dtype][2], 1.0, over)


def check(factors: Tensor, q: Tensor, exact: Tensor, targets: Tensor, over: Tensor, scale: Tensor) -> None:
    """All codes are those of the exact gradient over the known part, and the target's is exact by its factor."""
    expected = codes(exact * over[:, None], scale, q.dtype)
    assert_codes(q, expected)
    at, valid = targets.clamp_min(0)[:, None], targets >= 0
    of_target = q.double().gather(1, at)[:, 0] * factors / scale
    normal = valid & (q.double().gather(1, at)[:, 0].abs() >= 2.0 ** FORMATS[q.dtype][0])
    assert normal.sum() > 0.5 * valid.sum()
    assert ((of_target / exact.gather(1, at)[:, 0])[normal] - 1).abs().max() < 1e-3  # cancellation where p is nearly 1


def test_a_mistake_that_the_known_part_does_not_show_is_made_again(stream: torch.dtype) -> None:
    """All probability on an entry that is neither the target nor among the first: over the known part its code would saturate."""
    logits = torch.zeros(40, 4096, dtype=stream, device=DEVICE)
    targets = torch.full((40,), 7, device=DEVICE)
    logits[3, 3000] = logits[17, 4095] = logits[18, 1024] = logits[19, 1000] = logits[20, 3000] = 60.0
    targets[20] = 3000
    losses, factors, q, q_t = results(kernels.softcap_cross_entropy_quantize, logits, targets, 4096, scalar(OF_LOGITS), E5M2)
    again = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    again[[3, 17, 18]] = True
    assert torch.equal(over_the_known_part(logits, targets, 4096, scalar(OF_LOGITS), E5M2) == 1, again)
    assert torch.equal(q.t().contiguous().view(torch.uint8), q_t.view(torch.uint8))
    exact = logits.double()
    assert error(losses, reference.softcap_cross_entropy_(exact, targets, 4096, 15.0, scalar(1.0).double())) < 2e-6
    check(factors, q, exact, targets, over_the_known_part(logits, targets, 4096, scalar(OF_LOGITS), E5M2), scalar(OF_LOGITS))


def test_a_target_whose_code_lost_its_bits_corrects_nothing(stream: torch.dtype) -> None:
    """Of a probability of nearly 1, and where tanh has no slope left: the code is subnormal, or 0."""
    logits, targets = torch.full((40, 64), -60.0, dtype=stream, device=DEVICE), torch.full((40,), 7, device=DEVICE)
    logits[:, 7] = torch.linspace(0, 60, 40, device=DEVICE).to(stream)
    losses, factors, q, _ = results(kernels.softcap_cross_entropy_quantize, logits, targets, 64, scalar(OF_LOGITS), E5M2)
    of_target = q[:, 7].float().abs()
    lost = of_target < 2.0**-14
    assert (of_target == 0).any() and (lost & (of_target > 0)).any() and (~lost).any() and losses.isfinite().all()
    assert ((factors - 1).abs() < 1e-6)[lost].all() and ((factors - 1).abs() > 1e-6)[~lost].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's time is elements")
def test_a_part_of_a_chunk_with_mistakes_in_it() -> None:
    """As d12 has it: every row of the gradient, in both layouts, and the same bits whenever it runs."""
    m, vocab = 2048, 32768
    logits, targets = random(m, vocab, dtype=torch.bfloat16, seed=1), torch.randint(vocab, (m,), device=DEVICE)
    logits[::100, 20000], logits[5::100, 32767] = 60.0, 60.0
    twice = [results(kernels.softcap_cross_entropy_quantize, logits, targets, vocab, scalar(OF_LOGITS), E5M2) for _ in range(2)]
    for first, second in zip(*twice, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    losses, factors, q, q_t = twice[0]
    assert torch.equal(q.t().contiguous().view(torch.uint8), q_t.view(torch.uint8))
    exact, over = logits.double(), over_the_known_part(logits, targets, vocab, scalar(OF_LOGITS), E5M2)
    assert (over == 1).sum() > 30
    assert error(losses, reference.softcap_cross_entropy_(exact, targets, vocab, 15.0, scalar(1.0).double())) < 2e-6
    check(factors, q, exact, targets, over, scalar(OF_LOGITS))


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "twin"])
def test_logits_that_are_no_numbers_show_but_for_ignored_tokens(module: Any, stream: torch.dtype) -> None:
    """In the losses, and in what rows of dx are multiplied by; an ignored token has neither."""
    logits, targets = random(40, 2064, dtype=stream, seed=1), torch.zeros(40, dtype=torch.int64, device=DEVICE)
    logits[5:8, 3], logits[9, 2000], targets[5] = torch.nan, torch.nan, -1
    losses, factors, q, _ = results(module.softcap_cross_entropy_quantize, logits, targets, 2064, scalar(OF_LOGITS), E5M2)
    broken = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    broken[[6, 7, 9]] = True
    assert torch.equal(losses.isnan(), broken) and torch.equal(factors.isnan(), broken) and losses[5] == factors[5] == 0
    assert q[~broken].float().isfinite().all() and (q[5].float() == 0).all()


def test_rows_are_scaled(stream: torch.dtype) -> None:
    x, factors = random(37, 200, dtype=stream, seed=2), torch.rand(37, device=DEVICE)
    expected = reference.scale_rows_(x.clone(), factors)
    assert torch.equal(kernels.scale_rows_(x, factors), expected)
