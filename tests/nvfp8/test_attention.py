"""Attention is exact on every backend: windows, grouped heads, lengths that no block divides."""

from collections.abc import Iterator

import pytest
import torch

from nvfp8 import attention, cudnn_attention
from nvfp8.attention import BACKENDS, band_mask, causal_attention, choose_backend, masked_attention, passed_over, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("length", "window"), [(256, 256), (256, 128), (384, 130), (257, 64), (40, 3), (40, 0), (300, 299), (300, 298)]
)
def test_forward_and_gradients(backend: str, heads: tuple[int, int], length: int, window: int) -> None:
    size = 128 if DEVICE == "cuda" else 16
    reason = why_not(backend, DEVICE, DTYPE, size, length)
    if reason is not None:
        pytest.skip(f"attention {backend}: {reason}")
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
    assert choose_backend("cpu", torch.float32, 32, 64) == "sdpa"
    assert passed_over("cpu", torch.float32, 32, 64) == dict.fromkeys(("fa3", "cudnn"), "it needs a CUDA device")
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        choose_backend("cpu", torch.float32, 32, 64, "flash")
    with pytest.raises(ValueError, match=r"'cudnn' cannot run here: it needs a CUDA device; use auto"):
        choose_backend("cpu", torch.bfloat16, 32, 64, "cudnn")
    with pytest.raises(ValueError, match="quadratic"):
        choose_backend("cuda", torch.bfloat16, 32, 64, "plain")


class Machine:
    """A pretended GPU: Hopper with every package, unless a test says otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.has((9, 0))

    def has(self, capability: tuple[int, int], fa3: bool = True, cudnn: bool = True) -> None:
        why_not.cache_clear()
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        self.monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if fa3 else None)
        self.monkeypatch.setattr(cudnn_attention, "available", lambda: cudnn)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    why_not.cache_clear()  # a pretended machine's answers are not this one's


def test_auto_takes_the_best_that_the_machine_has(machine: Machine) -> None:
    shape = "cuda", torch.bfloat16, 128, 2048
    assert (choose_backend(*shape), passed_over(*shape)) == ("fa3", {})
    machine.has((9, 0), fa3=False)
    assert (choose_backend(*shape), passed_over(*shape)) == ("cudnn", {"fa3": "flash_attn_interface is not installed"})
    machine.has((12, 1), cudnn=False)
    assert choose_backend(*shape) == "sdpa"
    assert "Hopper's (9.0) alone, this is compute capability 12.1" in passed_over(*shape)["fa3"]
    assert "pip install -e '.[cuda]'" in passed_over(*shape)["cudnn"]
    machine.has((7, 5))
    assert "bf16 units came with 8.0" in passed_over(*shape)["cudnn"]


@pytest.mark.parametrize(
    ("capability", "head_dim", "length", "reason"),
    [
        ((9, 0), 128, 2048, None),
        ((9, 0), 8, 2, None),
        ((9, 0), 256, 257, None),  # odd lengths are fine, and Hopper's backward reaches 256
        ((9, 0), 264, 2048, "a multiple of 8 up to 256 on this device, not 264"),
        ((9, 0), 20, 2048, "a multiple of 8 up to 256 on this device, not 20"),
        ((8, 0), 128, 2048, None),
        ((8, 0), 136, 2048, "a multiple of 8 up to 128 on this device, not 136"),
        ((10, 0), 192, 2048, "a multiple of 8 up to 128 on this device, not 192"),
        ((12, 1), 256, 2048, "a multiple of 8 up to 128 on this device, not 256"),
        ((9, 0), 128, 1, "no backward for a single position"),
    ],
)
def test_shapes_that_cudnn_refuses(
    machine: Machine, capability: tuple[int, int], head_dim: int, length: int, reason: str | None
) -> None:
    machine.has(capability, fa3=False)
    shape = "cuda", torch.bfloat16, head_dim, length
    if reason is None:
        assert choose_backend(*shape) == choose_backend(*shape, "cudnn") == "cudnn"
        return
    assert choose_backend(*shape) == "sdpa"
    assert reason in passed_over(*shape)["cudnn"]
    with pytest.raises(ValueError, match=f"'cudnn' cannot run here: .*{reason}"):
        choose_backend(*shape, "cudnn")


def test_fa3_and_dtypes_have_limits_too(machine: Machine) -> None:
    with pytest.raises(ValueError, match=r"'fa3' cannot run here: .*multiple of 8 up to 256, not 260"):
        choose_backend("cuda", torch.bfloat16, 260, 2048, "fa3")
    assert choose_backend("cuda", torch.bfloat16, 128, 1) == "fa3"
    for dtype in (torch.float32, torch.float16):  # cuDNN's graphs here are built for bfloat16
        assert choose_backend("cuda", dtype, 128, 2048) == "sdpa"
        assert "it runs in bfloat16, not float" in passed_over("cuda", dtype, 128, 2048)["cudnn"]
