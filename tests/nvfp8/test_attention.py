"""Attention is exact on every backend: windows, grouped heads, lengths that no block divides."""

import pytest
import torch

from nvfp8.attention import BACKENDS, band_mask, causal_attention, choose_backend, masked_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def usable() -> list[str]:
    names = []
    for name in BACKENDS:
        try:
            names.append(choose_backend(DEVICE, DTYPE, name))
        except ValueError:
            continue
    return names


@pytest.mark.parametrize("backend", usable())
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("length", "window"), [(256, 256), (256, 128), (384, 130), (257, 64), (40, 3), (40, 0), (300, 299), (300, 298)]
)
def test_forward_and_gradients(backend: str, heads: tuple[int, int], length: int, window: int) -> None:
    if backend == "cudnn" and length % 8:
        length += 8 - length % 8
    size = 128 if DEVICE == "cuda" else 16
    generator = torch.Generator().manual_seed(length + window)
    shapes = [(2, length, h, size) for h in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, DTYPE).requires_grad_() for s in shapes)
    out = causal_attention(q, k, v, window, backend)
    gradient = torch.randn(out.shape, generator=generator).to(DEVICE, DTYPE)
    ours = (out, *torch.autograd.grad(out, (q, k, v), gradient))

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    positions = torch.arange(length, device=DEVICE)
    exact = masked_attention(*wide, band_mask(positions, positions, window))
    truths = (exact, *torch.autograd.grad(exact, wide, gradient.double()))
    for value, truth in zip(ours, truths, strict=True):
        # With window 0 a position sees itself alone: dq and dk are exactly 0, what remains is rounding.
        scale = truth.norm() if truth.norm() > 1e-9 * gradient.double().norm() else gradient.double().norm()
        bound = 1e-2 if torch.bfloat16 == DTYPE else 1e-6
        assert float((value.detach().double() - truth.detach()).norm() / scale) < bound


def test_window_counts_earlier_positions() -> None:
    """A window of 3 shows four keys: t−3 … t."""
    positions = torch.arange(6)
    assert band_mask(positions, positions, 3)[5].tolist() == [False, False, True, True, True, True]


def test_masked_attention_matches_its_definition_by_hand() -> None:
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]], dtype=torch.float64)
    out = masked_attention(q, k, v, torch.tensor([[True, False], [True, True]]))
    weight = 1 / (1 + torch.tensor(-(2.0**0.5), dtype=torch.float64).exp())
    expected = torch.tensor([[1.0, 0.0], [1 - weight, weight]], dtype=torch.float64)
    torch.testing.assert_close(out[0, :, 0], expected)


def test_choose_backend_says_why_not() -> None:
    assert choose_backend("cpu", torch.float32) == "sdpa"
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        choose_backend("cpu", torch.float32, "flash")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_backend("cpu", torch.bfloat16, "cudnn")
    with pytest.raises(ValueError, match="quadratic"):
        choose_backend("cuda", torch.bfloat16, "plain")
