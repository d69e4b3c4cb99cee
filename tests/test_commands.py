"""What README, docs and the docstrings of programs say to type: it is parsed by the programs themselves, as far as flags go."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.quality import arm
from nanochat.train_config import TrainConfig
from nvfp8.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    f"{path.parent.name}.{path.stem}": path
    for folder in ("scripts", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "def main(" in path.read_text()
}
WITH_FLAGS = {name for name, path in PROGRAMS.items() if "parse_args()" in path.read_text()}  # the others just begin
OTHERS = {"--nproc_per_node", "--logdir", "--strict"}  # torchrun's, tensorboard's, mypy's
COMMAND = re.compile(r"(?:python|torchrun)\b[^`]*? -m ((?:scripts|benchmarks)\.\w+)(.*)")


def codes(text: str) -> list[str]:
    """All code of a Markdown text, or a docstring: fenced and indented lines, continued ones joined, and what is in backticks."""
    text = re.sub(r" *\\\n *", " ", text)
    found = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()]
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found += re.findall(r"^ {4}(?! )(.*)$", text, re.MULTILINE)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return found + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Programs of ours in a text, with their arguments: <what> stands for a path, […] for an option, … for what is left out."""
    found = []
    for code in codes(text):
        if match := COMMAND.search(code):
            arguments = re.sub(r"<[^<>]*>", "path", re.sub(r"[\[\]]|(--[\w-]+[ =])?…", " ", match[2]))
            words = shlex.split(arguments, comments=True)
            found.append((match[1], words[words[:1] == ["--"] :]))
    return found


def sources() -> dict[str, str]:
    """Texts by name."""
    named = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
    return named | {name: ast.get_docstring(ast.parse(path.read_text())) or "" for name, path in PROGRAMS.items()}


class Parsed(Exception):
    """A program has parsed its flags: it shall do no more."""


def begin(program: str, words: list[str], *, whole: bool = True) -> Any:
    """Run a program until it has parsed `words` (or, not `whole`, has all its flags): what they come to, and its parser."""
    parse, result = argparse.ArgumentParser.parse_args, []

    def until_parsed(self: argparse.ArgumentParser) -> argparse.Namespace:
        result.extend((parse(self) if whole else None, self))
        raise Parsed

    with (
        mock.patch.object(sys, "argv", [program, *words]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", until_parsed),
        pytest.raises(Parsed),
    ):
        importlib.import_module(program).main()
    return result


@cache
def flags() -> set[str]:
    """All flags of all programs."""
    found: set[str] = set()
    for name in WITH_FLAGS:
        waiting = [begin(name, [], whole=False)[1]]
        while waiting:
            for action in waiting.pop()._actions:
                found |= {option for option in action.option_strings if option.startswith("--")}
                waiting += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    return found


COMMANDS = [(where, *command) for where, text in sources().items() for command in commands(text)]


@pytest.mark.parametrize(("where", "program", "words"), COMMANDS, ids=[f"{w}: {p} {' '.join(a)}"[:90] for w, p, a in COMMANDS])
def test_every_command_is_parsed(where: str, program: str, words: list[str]) -> None:
    assert program in PROGRAMS, f"{where} names {program}, which is no program here"
    if program not in WITH_FLAGS or words == ["--help"]:
        assert program in WITH_FLAGS or not words
        return
    # A line that only shows some flags is not a whole command: then those alone must be there.
    required = {"--depth": "12", "--batch": "16", "--model-tag": "d12", "--gpu": "h200"}
    parser = begin(program, [], whole=False)[1]
    missing = [a.option_strings[0] for a in parser._actions if a.required and a.option_strings and a.option_strings[0] not in words]
    given, _ = begin(program, [*words, *(word for flag in missing for word in (flag, required[flag]))])
    if getattr(given, "recipe", "auto") != "auto":
        parse_recipe(given.recipe)
    if program == "scripts.base_train":
        TrainConfig(**vars(given))
    for flags_of_run in [arm(run)[1] for run in given.runs] if program == "benchmarks.quality" else []:
        TrainConfig(**vars(begin("scripts.base_train", flags_of_run)[0]))


@pytest.mark.parametrize("where", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_is_there(where: Path) -> None:
    named = {flag for code in codes(where.read_text()) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named - flags() - OTHERS == set()


def test_flags_in_the_readme_have_values_that_are_taken() -> None:
    """`--flag value` by itself, as base_train takes it."""
    spans = {code for code in codes((ROOT / "README.md").read_text()) if re.match(r"--[a-z-]+( |$)", code)}
    assert "--recipe delayed:bf16=h.0+lm_head:wgrad" in spans
    alone = re.compile(r"--(data|run|max-bad-steps)( |$)")  # their values are told, or left open
    for span in sorted(span for span in spans if not alone.match(span)):
        given, _ = begin("scripts.base_train", shlex.split(span))
        parse_recipe("delayed" if given.recipe == "auto" else given.recipe)
        TrainConfig(**vars(given))


def test_every_program_is_shown_somewhere() -> None:
    """In README by its file's name (test_repository.py), and by a command that can be copied."""
    assert PROGRAMS.keys() - {program for _, program, _ in COMMANDS} == set()


@pytest.mark.parametrize("where", DOCUMENTS[:2], ids=lambda path: path.name)
def test_targets_of_make_extras_and_imports_exist(where: Path) -> None:
    code = codes(where.read_text())
    targets = {target for line in code for target in re.findall(r"^make ([a-z-]+)", line)}
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None and targets and targets - {*phony[1].split()} == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for line in code for extra in re.findall(r"'\.\[(\w+)\]'", line)} - extras.keys() == set()
    for line in code:
        if re.match(r"from nvfp8[\w.]* import [\w, ]+$", line):
            exec(line, {})


# The checks see what they are to see


def test_commands_are_found_in_every_form() -> None:
    text = """Say `python -m scripts.plan --depth 24
--gpu spark`, or

    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth 24 \\
        --data <dir>   # many
    python -m benchmarks.step --depth 12 [--recipe …] [--steps 4] …

```
NANOCHAT=x python -m scripts.sample --prompt "def "
```
"""
    assert commands(text) == [
        ("scripts.sample", ["--prompt", "def "]),
        ("scripts.base_train", ["--depth", "24", "--data", "path"]),
        ("benchmarks.step", ["--depth", "12", "--steps", "4"]),
        ("scripts.plan", ["--depth", "24", "--gpu", "spark"]),
    ]


@pytest.mark.parametrize("words", [["--no-such-flag"], ["--precision", "fp7"], ["--depth", "twelve"]])
def test_a_command_that_would_be_refused_is_seen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        begin("scripts.base_train", words)
    assert caught.value.code == 2


# nanochat's


def test_nanochats_flags_and_defaults_are_ours() -> None:
    """Of `scripts/base_train.py` at 92d63d4."""
    theirs = {
        "run": "dummy", "device_type": "", "fp8": False, "fp8_recipe": "tensorwise", "depth": 20, "aspect_ratio": 64,
        "head_dim": 128, "max_seq_len": 2048, "window_pattern": "SSSL", "num_iterations": -1, "target_flops": -1.0,
        "target_param_data_ratio": 12, "device_batch_size": 32, "total_batch_size": -1, "embedding_lr": 0.3,
        "unembedding_lr": 0.008, "weight_decay": 0.28, "matrix_lr": 0.02, "scalar_lr": 0.5, "warmup_steps": 40,
        "warmdown_ratio": 0.65, "final_lr_frac": 0.05, "resume_from_step": -1, "eval_every": 250, "eval_tokens": 80 * 524288,
        "core_metric_every": 2000, "core_metric_max_per_task": 500, "sample_every": 2000, "save_every": -1, "model_tag": None,
    }  # fmt: skip
    given = vars(begin("scripts.base_train", [])[0])
    assert {name: given[name] for name in theirs} == theirs
    words = "--depth=24 --target-param-data-ratio=8 --device-batch-size=16 --fp8 --fp8-recipe=rowwise --run=name --save-every=-1"
    config = TrainConfig(**vars(begin("scripts.base_train", words.split())[0]))
    assert (config.depth, config.device_batch_size, config.precision, config.recipe) == (24, 16, "fp8", "rowwise")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU every test that reads what a program says starts it like this")
def test_a_python_that_is_just_started_imports_all_programs_and_says_nothing() -> None:
    """What tests fork (tests/nvfp8/forked.py) has imported already, and does not end as a Python does."""
    command = [sys.executable, "-c", f"import {', '.join(PROGRAMS)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
