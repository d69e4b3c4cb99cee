"""docs/nanochat.patch: how long it is, that its document shows it, and that nanochat's model has the same parameters with it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCH = ROOT / "docs" / "nanochat.patch"
DOCUMENT = (ROOT / "docs" / "nanochat-patch.md").read_text()
PEER = Path(os.environ.get("NANOCHAT_CHECKOUT", "/tmp/peer"))  # karpathy/nanochat at 92d63d4, with or without its .git
needs_peer = pytest.mark.skipif(
    not (PEER / "nanochat" / "gpt.py").exists(), reason=f"no karpathy/nanochat in {PEER} (set NANOCHAT_CHECKOUT)"
)

PARAMETERS = """
import json, torch
from nanochat.gpt import GPT, GPTConfig
with torch.device("meta"):
    model = GPT(GPTConfig(n_layer=4, n_embd=256, n_head=2, n_kv_head=2, vocab_size=1024))
shapes = {name: [list(value.shape), str(value.dtype)] for name, value in model.named_parameters()}
print(json.dumps([shapes, model.num_matmul_params(), model.estimate_flops()], sort_keys=True))
kinds = {type(module).__name__ for module in model.modules()}
print(sorted(kinds & {"TELinear", "TEMLP", "MLP"}))
"""

# A CPU has no FP8: with fp32 layers of nvfp8 in their place, what is joined to what must still be nanochat.
LOSS = """
import json, torch
from nanochat import gpt
if hasattr(gpt, "PRECISION"):
    gpt.PRECISION = gpt.precision.fp32()
model = gpt.GPT(gpt.GPTConfig(sequence_len=64, n_layer=4, n_embd=256, n_head=2, n_kv_head=2, vocab_size=1024))
model.init_weights()
generator = torch.Generator().manual_seed(0)
for name, value in sorted(model.named_parameters()):
    value.data = torch.randn(value.shape, generator=generator) * (0.05 if value.ndim == 2 else 0.5)
ids = torch.randint(1024, (2, 65), generator=generator)
x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
model(x, y).backward()
loss = model(x, y, loss_reduction="none")
print(json.dumps([loss.tolist(), {name: float(value.grad.norm()) for name, value in model.named_parameters()}]))
"""


def changed(sign: str) -> list[str]:
    """Lines of the patch that begin with `sign`, without those that name a file."""
    lines = PATCH.read_text().splitlines()
    return [line for line in lines if line.startswith(sign) and not line.startswith(sign * 3)]


def test_it_adds_at_most_fifteen_lines() -> None:
    added, removed = changed("+"), changed("-")
    assert len(added) <= 15 and len(removed) <= 15
    assert f"changes {len(removed)} lines of its code into {len(added)} " in DOCUMENT
    # Lines quoted around them: no more than one on either side.
    for hunk in re.split(r"^@@.*\n", PATCH.read_text(), flags=re.MULTILINE)[1:]:
        lines = re.split(r"^--- ", hunk, flags=re.MULTILINE)[0].splitlines()
        assert sum(line[:1] in ("", " ") for line in lines) <= 2


def test_the_document_shows_the_patch_itself() -> None:
    shown = re.findall(r"^```diff\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert shown == [PATCH.read_text()]


def test_every_touched_file_is_copied_first_and_can_be_put_back() -> None:
    touched = re.findall(r"^\+\+\+ b/(\S+)\.py$", PATCH.read_text(), re.MULTILINE)
    assert touched == ["nanochat/gpt", "nanochat/optim", "scripts/base_train"]
    assert all(f"    cp {file}.py {file}_bf16.py\n" in DOCUMENT for file in touched)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PEER, tmp_path / "nanochat", ignore=shutil.ignore_patterns(".git")))


def run(checkout: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # nanochat computes in fp32 where it sees no GPU
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_peer
@pytest.mark.parametrize("command", [["git", "apply"], ["patch", "-p1", "-i"]], ids=["git", "patch"])
def test_it_applies_and_can_be_taken_back(checkout: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    files = {file: (checkout / file).read_text() for file in ("nanochat/gpt.py", "nanochat/optim.py", "scripts/base_train.py")}
    run(checkout, *command, str(PATCH))
    for file, text in files.items():
        assert (checkout / file).read_text() != text
        compile((checkout / file).read_text(), file, "exec")
    run(checkout, command[0], *command[1:2], "-R", *command[2:], str(PATCH))
    assert {file: (checkout / file).read_text() for file in files} == files


@needs_peer
def test_parameters_and_flops_stay_nanochats(checkout: Path) -> None:
    plain, kinds = run(checkout, sys.executable, "-c", PARAMETERS).splitlines()
    assert kinds == "['MLP']"
    run(checkout, "git", "apply", str(PATCH))
    (checkout / "nvfp8").symlink_to(ROOT / "nvfp8")
    patched, kinds = run(checkout, sys.executable, "-c", PARAMETERS).splitlines()
    assert patched == plain
    assert kinds == "['TELinear', 'TEMLP']"


@needs_peer
def test_layers_are_joined_as_nanochats(checkout: Path) -> None:
    loss, gradients = json.loads(run(checkout, sys.executable, "-c", LOSS))
    run(checkout, "git", "apply", str(PATCH))
    (checkout / "nvfp8").symlink_to(ROOT / "nvfp8")
    found, others = json.loads(run(checkout, sys.executable, "-c", LOSS))
    # fp32 on both sides, sums in another order
    assert found == pytest.approx(loss, rel=1e-5)
    assert others == pytest.approx(gradients, rel=1e-4)
