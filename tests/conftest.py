"""What every test relies on: one thread, no writes outside a temporary directory, and GPU tests that skip aloud."""

import gc
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before torch and Triton are imported. Tests are tiny: a second thread only gets in the way of the next process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Looked at once, at the process's first GEMM: runs that ask for --deterministic must not depend on the tests before them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import forked
import pytest
import torch
from torch.utils._device import _device_constructors

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, kernels run in Triton's interpreter
    if find_spec("triton") is not None:
        import quick_interpreter

        quick_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_compile.py")  # minutes each: begun last, they would end alone
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="marked gpu: torch finds no NVIDIA GPU here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def base_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, tokenizers and shard caches of a test go to a directory of its own, not to ./out."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))


_unfreeze, _thawed = gc.unfreeze, [True]


def _note_that_all_is_thawed() -> None:
    _unfreeze()
    _thawed[0] = True


gc.unfreeze = _note_that_all_is_thawed  # `gc.get_freeze_count` would count all objects, 30 ms a test


@pytest.fixture(autouse=True)
def nothing_older_is_searched_for_cycles() -> None:
    """Every run collects garbage when it begins (`nanochat.process.stop_collecting`): 0.2 s, nearly all among modules' objects."""
    if _thawed[0]:  # as a run leaves it
        gc.freeze()
        _thawed[0] = False


@pytest.fixture
def free_port() -> Callable[[], str]:
    """Finds a port on which processes can meet."""

    def find() -> str:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return str(s.getsockname()[1])

    return find


@pytest.fixture
def two_ranks(free_port: Callable[[], str]) -> Iterator[Callable[..., list[Any]]]:
    """Start `python <arguments>` twice, as torchrun would start its ranks; what still runs after the test is killed."""
    started: list[subprocess.Popen[str] | forked.Forked] = []

    def start(*arguments: str) -> list[subprocess.Popen[str] | forked.Forked]:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common["PYTHONPATH"] = str(Path(__file__).parents[1])
        for rank in ("0", "1"):
            environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            started.append(forked.start(arguments, environment))
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def train_on_two_ranks(two_ranks: Callable[..., list[Any]]) -> Callable[[Any], None]:
    """Train what a TrainConfig says, on two ranks, deterministically."""

    def run(config: Any) -> None:
        arguments = ["-m", "scripts.base_train", "--deterministic"]
        for flag, value in vars(config).items():
            if not isinstance(value, bool) and value not in (None, ""):
                arguments += [f"--{flag.replace('_', '-')}={value}"]
        for process in two_ranks(*arguments):
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error

    return run


@pytest.fixture
def torch_texts(tmp_path: Path) -> str:
    """The beginnings of PyTorch's own modules as a .jsonl, and a tokenizer of them where runs look for theirs."""
    from nanochat.dataset import base_dir
    from nanochat.tokenizer import Tokenizer

    texts = [path.read_text()[:4000] for path in sorted(Path(torch.nn.modules.__file__).parent.glob("*.py"))]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 512).save(base_dir() / "tokenizer")
    return str(path)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what kernels' wrappers allocate with NaN, so an element that no program writes is seen."""
    # `with torch.device(...)` lists the functions that it directs when it is first used: not those that stand in here, or whatever
    # is made in such a block later on, in any test, lies on the CPU.
    _device_constructors()
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
