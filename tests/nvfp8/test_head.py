"""The chunked head against cross-entropy over whole logits, and its contract about gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvfp8 import head as head_module
from nvfp8.head import LinearCrossEntropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def make(
    tokens: int = 300, width: int = 32, vocab: int = 100, dtype: torch.dtype = torch.float32
) -> tuple[LinearCrossEntropy, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = LinearCrossEntropy(width, vocab, 128, 15.0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    x = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
    targets[::7] = -1
    return head.to(DEVICE), x, targets


def exact_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    logits = 15 * torch.tanh(F.linear(x, weight)[:, :vocab] / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float, upstream: float) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda *_: 128)  # 300 tokens: two whole chunks and a short one
    head, x, targets = make(dtype=dtype)
    loss = head.loss(x, targets, scale)
    (loss * upstream).backward()
    wide, weight = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    truth = exact_loss(wide, weight, targets, head.vocab) * scale
    (truth * upstream).backward()
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert abs(float(loss.detach()) / float(truth.detach()) - 1) < bound
    for ours, exact in ((x.grad, wide.grad), (head.weight.grad, weight.grad)):
        assert float((ours.double() - exact).norm() / exact.norm()) < bound
    assert (head.weight.grad[head.vocab :] == 0).all(), "padding rows must get no gradient"


def test_token_losses_sum_to_the_loss() -> None:
    head, x, targets = make()
    losses = head.token_losses(x, targets)
    assert losses.shape == targets.shape and (losses[targets < 0] == 0).all()
    torch.testing.assert_close(losses.sum() / (targets >= 0).sum(), head.loss(x, targets, 1.0).detach())


def test_no_valid_target_gives_zero() -> None:
    head, x, targets = make(tokens=5)
    loss = head.loss(x, torch.full_like(targets, -1), 1.0)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all() and (head.weight.grad == 0).all()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, targets = make(tokens=5)
    monkeypatch.setattr(head_module, "add_matmul_", lambda *_: pytest.fail("a gradient GEMM ran under no_grad"))
    with torch.no_grad():
        assert head.loss(x, targets, 1.0) > 0


def test_second_backward_is_refused() -> None:
    head, x, targets = make(tokens=5)
    loss = head.loss(x, targets, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward may run once"):
        loss.backward()


def test_logits_never_stand_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens × vocabulary is ever made."""
    head, x, targets = make(tokens=1024)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 128 * 128 * 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*arguments, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        head.loss(x, targets, 1.0).backward()
    assert largest == x.numel() < 1024 * head.vocab
