"""Our logits beside karpathy/nanochat's, both in bf16 on one GPU, from one checkpoint that nanochat wrote. One JSON line.

    python -m benchmarks.agreement <folder that holds karpathy/nanochat's package> [--depth 12]

Both packages are called nanochat, so the peer runs in a process of its own: it builds a model, gives every parameter a random
value, saves it with its own code and writes its logits. Then this process imports that checkpoint. Errors are relative to our
fp32 forward of the same weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanochat.build import build_model
from nanochat.gpt import GPTConfig
from nanochat.interchange import import_model
from nvfp8.precision import bf16, fp32

PEER = """
import sys, torch, types
sys.modules["rustbpe"] = types.ModuleType("rustbpe")  # its tokenizer's trainer, not needed here
out, depth = sys.argv[1], int(sys.argv[2])
from nanochat.gpt import GPT, GPTConfig
from nanochat.checkpoint_manager import save_checkpoint
width = depth * 64
shape = dict(sequence_len=2048, vocab_size=32768, n_layer=depth, n_head=width // 128, n_kv_head=width // 128, n_embd=width)
config = GPTConfig(**shape, window_pattern="L")
with torch.device("meta"):
    model = GPT(config)
model.to_empty(device="cuda")
torch.manual_seed(1)
model.init_weights()
with torch.no_grad():
    for name, p in model.named_parameters():
        if p.ndim == 2 and "wte" not in name and "gate" not in name:
            p.normal_(std=p.shape[1] ** -0.5)
    model.smear_lambda.fill_(0.3)
ids = torch.randint(0, 32768, (2, 2048), device="cuda")
with torch.no_grad():
    logits = model(ids)
save_checkpoint(out, 1, model.state_dict(), None, dict(model_config={**shape, "window_pattern": "L"}, step=1))
torch.save({"ids": ids.cpu(), "logits": logits.cpu()}, out + "/logits.pt")
"""


def main() -> None:
    """Run the peer, then ours, and print how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--depth", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": f"{args.peer.resolve()}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", PEER, folder, str(args.depth)]
        subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        config, weights, _ = import_model(Path(folder))
        theirs = torch.load(Path(folder) / "logits.pt", weights_only=True)
    logits = {"nanochat bf16": theirs["logits"].cuda()}
    for precision in (bf16(), fp32()):
        model = build_model(GPTConfig(**config), precision, torch.device("cuda"))
        model.load_state_dict(weights)
        logits[f"ours {precision.name}"] = model.logits(theirs["ids"].cuda())
        del model
    truth = logits.pop("ours fp32").double()
    errors = {name: float((value.double() - truth).norm() / truth.norm()) for name, value in logits.items()}
    between = float((logits["nanochat bf16"].double() - logits["ours bf16"].double()).norm() / truth.norm())
    gpu = torch.cuda.get_device_name()
    print(json.dumps({"depth": args.depth, "relative to fp32": errors, "between both": between, "gpu": gpu}))


if __name__ == "__main__":
    main()
