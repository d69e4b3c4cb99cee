"""What holds for the repository as a whole: the way imports point, the size of files, what is installed, the README."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Imports point from left to right, never back. After the kernels their twins, which say what a kernel computes, and what both
# know of storage: those need nothing.
ORDER = (
    "scripts",
    "nanochat",
    "nvfp8",
    "nvfp8.kernels",
    "nvfp8.reference",
    "nvfp8.reference_optim",
    "nvfp8.reference_fp8",
    "nvfp8.reference_math",
    "nvfp8.state",
    "nvfp8.rounding",
)
SOURCES = sorted(path for package in ("scripts", "nanochat", "nvfp8") for path in (ROOT / package).rglob("*.py"))
PYTHON = sorted({*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
# Where the name that is imported is not the distribution's.
DISTRIBUTIONS = {"cudnn": "nvidia-cudnn-frontend", "pynvml": "nvidia-ml-py", "transformer_engine": "transformer-engine"}
# Used where somebody has built it, and never required: FlashAttention 3 is no package that pip can resolve.
UNDECLARED = {"flash_attn_interface"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that `source` imports, at whatever depth, as an absolute dotted name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def level(module: str) -> int | None:
    """The place of a module in ORDER, by its longest matching prefix; None for anything not ours."""
    places = [place for place, package in enumerate(ORDER) if f"{module}.".startswith(f"{package}.")]
    return max(places, default=None)


def backward(source: str, importer: str, is_package: bool = False) -> list[str]:
    """The imports in `source` that point against ORDER."""
    here = level(importer)
    assert here is not None
    levels = {imported: level(imported) for imported in imports(source, importer, is_package)}
    return sorted(imported for imported, there in levels.items() if there is not None and there < here)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    assert backward(path.read_text(), module(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("importer", "line", "expected"),
    [
        ("nvfp8.head", "import nanochat.gpt", ["nanochat.gpt"]),
        ("nvfp8.head", "def f():\n    from nanochat import gpt", ["nanochat.gpt"]),
        ("nanochat.gpt", "from scripts.base_train import main", ["scripts.base_train.main"]),
        ("nvfp8.kernels.norm", "from nvfp8.scaling import scale", ["nvfp8.scaling.scale"]),
        ("nvfp8.reference", "from nvfp8.kernels import norm", ["nvfp8.kernels.norm"]),
        ("nvfp8.kernels.norm", "from .. import scaling", ["nvfp8.scaling"]),
        ("nvfp8.kernels.norm", "from . import cast\nimport nvfp8.kernels.cast\nimport torch", []),
        ("nvfp8.head", "from nvfp8.kernels import norm\nfrom . import layers", []),
        ("scripts.base_train", "import nanochat, nvfp8, nvfp8.kernels.norm", []),
    ],
)
def test_the_check_of_imports_sees_every_form(importer: str, line: str, expected: list[str]) -> None:
    assert backward(line, importer) == expected


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert imports("from . import norm\nfrom .. import scaling", "nvfp8.kernels", is_package=True) == {
        "nvfp8.kernels.norm",
        "nvfp8.scaling",
    }


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_a_file_has_one_job(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, "name the file after its job"
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=name)
def test_a_file_opens_with_what_it_teaches(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_package_is_installed() -> None:
    """setuptools takes directories with an __init__.py; one without would be missing from the wheel."""
    assert [name(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()] == []


# Dependencies


def distribution(requirement: str) -> str:
    """The normalized name in a requirement: "transformer-engine[pytorch]>=2" gives "transformer-engine"."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_every_dependency_is_pinned() -> None:
    named = {distribution(requirement) for group in (RUNTIME, *EXTRAS.values()) for requirement in group}
    assert named - pins().keys() == set()


def test_torch_is_pinned_to_what_is_tested() -> None:
    assert pins()["torch"] == "2.13.0"
    assert pins()["triton"] == "3.7.1"  # what the CUDA builds of torch 2.13.0 require; another pin cannot be installed


def test_every_dependency_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for group in (RUNTIME, *EXTRAS.values()):
        for requirement in group:
            stated = [line for line in lines if line.strip().startswith(f'"{requirement}"')]
            assert stated, requirement
            assert all(re.search(r",  # \w.{10,}", line) for line in stated), requirement


def third_party(path: Path) -> set[str]:
    """Distributions that a source file imports."""
    modules = imports(path.read_text(), module(path), path.name == "__init__.py")
    tops = {imported.partition(".")[0] for imported in modules} - set(sys.stdlib_module_names) - {*ORDER}
    found = {DISTRIBUTIONS.get(top, top) for top in tops}
    if any(imported.startswith("torch.utils.tensorboard") for imported in modules):
        found.add("tensorboard")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_what_is_imported_is_declared(path: Path) -> None:
    declared = {distribution(requirement) for group in (RUNTIME, *EXTRAS.values()) for requirement in group}
    assert third_party(path) - declared - UNDECLARED == set()


def test_what_is_declared_is_imported() -> None:
    imported = set().union(*(third_party(path) for path in SOURCES))
    assert {distribution(requirement) for requirement in RUNTIME} - imported == set()


# README


def tree(text: str) -> set[str]:
    """Paths in the README's tree: the fenced block that has a line "nanochat/".

    A line is a directory ("nanochat/", then two spaces and what it is for) or one or more files, two spaces apart, then
    what they are for; what stands in a directory is indented deeper than its line.
    """
    blocks = [
        block
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if re.search(r"^ *nanochat/", block, re.MULTILINE)
    ]
    assert len(blocks) == 1, 'the README needs one fenced block with a line "nanochat/"'
    paths: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, blocks[0].splitlines()):
        indent = len(line) - len(line.lstrip())
        parents = [(depth, parent) for depth, parent in parents if depth < indent]
        above = parents[-1][1] if parents else ""
        for word in re.split(r" {2,}", line.strip()):
            if word.endswith("/"):
                parents.append((indent, above + word))
                paths.add(above + word)
            elif re.fullmatch(r"\.?[\w-]+(\.\w+)?|\.ci/run", word) and ("." in word or (ROOT / above / word).exists()):
                paths.add(above + word)
            else:
                break
    return paths


def belongs_in_the_tree() -> set[str]:
    """All source files; of benchmarks/ and docs/ all but pictures; of tests/ its folders and what lies beside them."""
    files = {name(path) for path in SOURCES if path.name != "__init__.py"}
    files |= {name(path) for folder in ("benchmarks", "docs") for path in (ROOT / folder).rglob("*.*") if path.suffix != ".png"}
    files |= {name(path) for path in (ROOT / "tests").glob("test_*.py")}
    folders = {name(path) + "/" for path in (ROOT / "tests").iterdir() if path.is_dir()}
    return {path for path in files | folders if "__pycache__" not in path}


def test_the_readme_shows_the_files_there_are() -> None:
    shown = tree((ROOT / "README.md").read_text())
    assert sorted(path for path in shown if not (ROOT / path).exists()) == []
    assert sorted(belongs_in_the_tree() - shown) == []


def test_what_belongs_in_the_tree_is_more_than_the_packages() -> None:
    wanted = {"benchmarks/steps.csv", "docs/log.md", "tests/nanochat/", "tests/test_repository.py", "nvfp8/ops.py"}
    assert wanted <= belongs_in_the_tree()


def test_nothing_was_left_in_the_root() -> None:
    """What runs and examples write there, and a careless `git add` takes along."""
    listed = subprocess.run(["git", "ls-files", ":(glob)*"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    known = {".gitignore", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert set(listed.stdout.splitlines()) == known


def test_the_check_of_the_readme_reads_a_tree() -> None:
    text = """
```
make train
```

```
nvfp8/    a library
  a.py  b.py   two files on one line
  kernels/
    c.py   deep
nanochat/
  d.py
tests/
  nvfp8/  nanochat/   as those are
  e.csv   data
Makefile  commands
```
"""
    assert tree(text) == {
        "nvfp8/",
        "nvfp8/a.py",
        "nvfp8/b.py",
        "nvfp8/kernels/",
        "nvfp8/kernels/c.py",
        "nanochat/",
        "nanochat/d.py",
        "tests/",
        "tests/nvfp8/",
        "tests/nanochat/",
        "tests/e.csv",
        "Makefile",
    }


# The commands


@pytest.mark.parametrize("target", ["dry-run", "train", "test", "lint"])
def test_every_command_builds_its_environment_first(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}: \$\(INSTALLED\)( |$)", makefile, re.MULTILINE)
    assert re.search(r"^\$\(INSTALLED\): pyproject\.toml constraints\.txt$", makefile, re.MULTILINE)


def test_ci_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == ["make lint", "make test"]
