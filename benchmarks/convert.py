"""What `nvfp8.convert` does to a model of torch.nn: tokens a second, memory and loss beside bf16. One JSON line a row.

    python -m benchmarks.convert [--widths 1024 2048] [--layers 8] [--tokens 32768] [--recipes delayed current] [--steps 20]

Two models, trained from the same weights on the same random tokens by fused AdamW, in bf16 parameters and in one graph of
`torch.compile` (or, with --eager, without):

* `blocks`   pre-norm blocks of four nn.Linear (q, k and v as one, output, fc, projection; GELU, biases, causal SDPA): all convert.
* `encoder`  nn.TransformerEncoderLayer, whose attention keeps its weights from nn.Linear: only the two of its MLP convert.

Rows of one width run one after the other on one GPU, so they can be compared: `bf16`, each recipe, and torchao's tensorwise and
row-wise FP8 training where torchao is installed. `speedup` is beside the bf16 row. The embedding and the output layer, `skip`ped,
are small here (4,096 tokens) so that the blocks are what is timed; a step is forward, backward and optimizer.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp8 import convert

LENGTH, HEAD, VOCABULARY = 2048, 128, 4096
WARM = 5  # steps before the timed ones: compilation, and a history for delayed scaling


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int):
        """All of its matrices are nn.Linear."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class Model(nn.Module):
    """Embedding, blocks, output layer and loss."""

    def __init__(self, kind: str, width: int, layers: int):
        """Make `kind` blocks, "blocks" or "encoder"."""
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.blocks = nn.ModuleList(
            Block(width)
            if kind == "blocks"
            else nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of (B, T) ids."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def torchao_converted(recipe: str) -> Callable[[nn.Module], object]:
    """Torchao's own conversion of the same layers."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    return lambda model: convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and "head" not in name
    )


def ways(recipes: list[str]) -> dict[str, Callable[[nn.Module], object]]:
    """What is done to the bf16 model, by the name of its row."""
    found: dict[str, Callable[[nn.Module], object]] = {"bf16": lambda model: None}
    for recipe in recipes:
        found[recipe] = lambda model, recipe=recipe: convert(model, recipe, skip="head")  # type: ignore[misc]
    if importlib.util.find_spec("torchao"):
        found |= {f"torchao {recipe}": torchao_converted(recipe) for recipe in ("tensorwise", "rowwise")}
    return found


def measure(kind: str, width: int, way: Callable[[nn.Module], object], arguments: argparse.Namespace) -> dict[str, object]:
    """Train one model; wall time of a step, since what the host does counts too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: nn.Module = Model(kind, width, arguments.layers).to("cuda", torch.bfloat16)
    way(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    run = model if arguments.eager else torch.compile(model, fullgraph=True)
    generator = torch.Generator("cuda").manual_seed(0)
    rows = arguments.tokens // LENGTH
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for step in range(WARM + arguments.steps):
        ids = torch.randint(VOCABULARY, (rows, LENGTH + 1), device="cuda", generator=generator)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= WARM:
            times.append(time.perf_counter() - begin)
        losses.append(loss.item())
    seconds = statistics.median(times)
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(rows * LENGTH / seconds),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
    }


def main() -> None:
    """Print a row for each model, width and way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["blocks", "encoder"], choices=["blocks", "encoder"])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help=f"a step, rounded down to a multiple of {LENGTH}")
    parser.add_argument("--recipes", nargs="+", default=["delayed", "current"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "compiled": not arguments.eager}
    print(json.dumps(device), flush=True)
    for kind in arguments.models:
        for width in arguments.widths:
            base: float | None = None
            for name, way in ways(arguments.recipes).items():
                row = measure(kind, width, way, arguments)
                gc.collect()
                torch.cuda.empty_cache()
                base = base or float(str(row["ms"]))
                speedup = round(base / float(str(row["ms"])), 3)
                print(json.dumps({"model": kind, "width": width, "way": name, **row, "speedup": speedup}), flush=True)


if __name__ == "__main__":
    main()
