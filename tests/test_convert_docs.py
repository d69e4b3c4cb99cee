"""docs/convert.md and docs/optimizers.md: their examples run as they stand and print what is shown there."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = "".join((ROOT / "docs" / name).read_text() for name in ("convert.md", "optimizers.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_there_are_three_examples_with_their_output() -> None:
    assert [language for language, _ in BLOCKS] == ["python", "", "python", "", "python", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the output shown is a CPU's")
@pytest.mark.parametrize("example", [0, 1, 2], ids=["torch.nn", "transformers", "optimizers"])
def test_an_example_prints_what_is_shown(example: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables word for word; a loss to what another processor's sums may make of it after some steps."""
    (_, code), (_, shown) = BLOCKS[2 * example : 2 * example + 2]
    if "transformers" in code and find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install -e '.[dev]'")
    monkeypatch.chdir(tmp_path)
    run = forked.run(["-c", code], os.environ)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [line.partition(": loss ") for line in run.stdout.splitlines()]
    expected = [line.partition(": loss ") for line in shown.splitlines()]
    assert [before for before, _, _ in found] == [before for before, _, _ in expected]
    for (_, _, loss), (_, _, wanted) in zip(found, expected, strict=True):
        assert bool(loss) == bool(wanted)
        assert not loss or float(loss) == pytest.approx(float(wanted), rel=0.05)
