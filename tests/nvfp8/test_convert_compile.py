"""Converted layers under torch.compile: one graph, no recompilation, the numbers of eager, and nothing stale in a later step."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvfp8 import convert

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for a CPU; test_convert_gpu.py compiles for a GPU")]
WIDTH, HEADS = 64, 2


class Block(nn.Module):
    """A pre-norm transformer block with four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc, self.proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(recipe: str, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(layers)))
    convert(model, recipe, emulate=True)
    return model


def batch(seed: int, tokens: int = 7) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, run: Any, steps: int = 3) -> list[Tensor]:
    """Gradients of each step, two micro-batches long, with an optimizer that raises no version counter."""
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-2, fused=True), []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            # With a gradient of its own, as what any later block is given: else the first block is another graph.
            run(batch(2 * step + micro).requires_grad_()).square().mean().backward()
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return found


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise"])
def test_one_graph_with_the_numbers_of_eager(recipe: str) -> None:
    """`aot_eager` traces forward and backward and computes the same operations: so equal bit for bit."""
    eager, model = stack(recipe, 2), stack(recipe, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(model, compiled)
    assert all(torch.equal(a, b) for a, b in zip(found, train(eager, eager), strict=True))
    for it in (eager, model):
        assert it[0].qkv.casts.shared.turn == 2


def test_inductor_computes_the_same() -> None:
    """The default backend sums norms in another order, so a code here and there is another one: E4M3's step is 1/8 at most."""
    eager, model = stack("delayed", 1), stack("delayed", 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(model, torch.compile(model, fullgraph=True), 2)
    for a, b in zip(found, train(eager, eager, 2), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def test_blocks_compiled_one_by_one_share_one_graph() -> None:
    """A handle that were a number would be a constant: the ninth block would run eager."""
    eager, model = stack("delayed", 10), stack("delayed", 10)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(model, model, 1)
    assert counter["stats"]["unique_graphs"] == 1
    assert all(torch.equal(a, b) for a, b in zip(found, train(eager, eager, 1), strict=True))


def test_any_number_of_tokens_in_one_dynamic_graph() -> None:
    eager, model = stack("delayed", 1), stack("delayed", 1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 16, 33):
            for run in (compiled, eager):
                run(batch(tokens, tokens)).square().mean().backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_checkpointing_inside_the_graph() -> None:
    eager, model = stack("delayed", 2), stack("delayed", 2)

    def run(x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    found = train(model, torch.compile(run, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(found, train(eager, eager), strict=True))


def test_evaluation_and_autocast_compile_too() -> None:
    model = stack("delayed", 1)
    plain = copy.deepcopy(model).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(batch(0)).float().sum().backward()
    with torch.no_grad():
        model.eval()
        assert torch.equal(compiled(batch(1)), plain(batch(1)))


def test_a_compiled_optimizer_ends_steps_too() -> None:
    """The hook that counts them breaks no graph of its own and is compiled once."""
    eager, model = stack("delayed", 1), stack("delayed", 1)
    counter = torch._dynamo.utils.counters
    for it in (eager, model):
        optimizer = torch.optim.AdamW(it.parameters(), torch.tensor(1e-3))
        counter.clear()
        step = torch.compile(optimizer.step, backend="aot_eager") if it is model else optimizer.step
        with torch._dynamo.config.patch(error_on_recompile=True):
            for micro in range(4):
                optimizer.zero_grad()
                it(batch(micro)).square().mean().backward()
                step()
    assert counter["stats"]["unique_graphs"] == 1
    assert model[0].qkv.casts.shared.turn == eager[0].qkv.casts.shared.turn == 3
    histories = [it[0].qkv.casts.shared.scaling.history for it in (model, eager)]
    # Of what enters first, whose input no update has changed but the norm's.
    torch.testing.assert_close(histories[0][:, 0], histories[1][:, 0], rtol=1e-2, atol=0)


def test_operators_hold_what_they_promise() -> None:
    """Fake shapes and strides, and where the gradient is registered, by torch's own checks; its schema's cannot clone FP8."""
    for recipe in ("delayed", "rowwise"):
        layer = nn.Linear(64, 48)
        convert(layer, recipe, emulate=True)
        x = torch.randn(7, 64, requires_grad=True)
        for keep in (True, False):
            arguments = (x, layer.weight, layer.handle, keep, True, recipe == "rowwise")
            checks = ("test_faketensor", "test_autograd_registration")
            torch.library.opcheck(torch.ops.nvfp8.linear, arguments, test_utils=checks)
        _, kept, inverse = torch.ops.nvfp8.linear(x, layer.weight, layer.handle, True, True, recipe == "rowwise")
        arguments = (torch.randn(7, 48), layer.weight, kept, inverse, layer.handle, True, True, True, recipe == "rowwise")
        torch.library.opcheck(torch.ops.nvfp8.linear_backward, arguments, test_utils="test_faketensor")
    assert torch.Tag.cudagraph_unsafe in torch.ops.nvfp8.linear.default.tags
