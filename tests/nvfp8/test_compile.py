"""Every Triton kernel compiles for GPUs that are not here: what the interpreter accepts, the compiler may refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 121: 99}  # KiB a block may take (CUDA programming guide, technical specifications)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = json.loads(result.stdout)
    paths = (ROOT / "nvfp8" / "kernels").glob("*.py")
    # Triton has no E4M3 before 8.9; GEMMs in FP8 move tiles by TMA, which came with 9.0.
    left = {80: r".*_fp8\.py", 89: r"gemm_.*_?fp8\.py"}.get(capability, "none")
    sources = "".join(path.read_text() for path in paths if not re.fullmatch(left, path.name))
    launched = set(re.findall(r"^ +(_\w+)\[\S", sources, re.MULTILINE))
    assert launched and launched == compiled.keys()
    assert max(compiled.values()) <= SHARED_MEMORY[capability] * 1024
