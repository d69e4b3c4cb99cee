"""What FP8 does on this machine: the same few steps in several precisions, side by side.

    python -m scripts.dry_run [--depth 12] [--steps 20] [--precisions bf16,fp8,te]
    python -m scripts.dry_run --check

Each precision trains in a process of its own, from the same seed and data. One table is printed; report.html, report.png and
report.json are written. Exit status 1, naming the precision, where one diverges, meets a value that is not finite, or is FP8 and
saves neither time nor memory. Without a GPU fp32 is compared with emulated FP8, and speed is not judged. `--check` trains nothing:
it prints which formats, recipes and attention backends this machine has.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

# Before torch touches CUDA, as in base_train; the processes that train inherit it.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat import dry_run_page
from nanochat.dataset import base_dir
from nanochat.dry_run import Comparison, compare, defaults, parse_precisions
from nanochat.errors import BadInput, Parser, run
from nanochat.machine import check


def main() -> None:
    """Parse the command line, then look or train, and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = defaults(device)
    precisions = "bf16,fp8,te" if device == "cuda" else "fp32,fp8-emulated"
    parser = Parser("dry_run", description="what FP8 does on this machine")
    parser.add_argument("--check", action="store_true", help="only print what this machine can do")
    parser.add_argument("--depth", type=int, default=config.depth, help="number of blocks (default: %(default)s here)")
    parser.add_argument("--steps", type=int, default=config.num_iterations, help="of each precision (default: %(default)s)")
    parser.add_argument("--precisions", default=precisions, help="of te, fp8, fp8-emulated, bf16, fp32 (default: %(default)s here)")
    parser.add_argument(
        "--device-batch-size", type=int, default=None,
        help=f"rows of a micro-batch (default: {config.device_batch_size}, on a GPU as many of these as all have room for)",
    )  # fmt: skip
    parser.add_argument("--data", default=config.data, help="as for base_train (default: %(default)s)")
    parser.add_argument("--tokenizer", default="", help="directory of tokenizer.json; empty = <base>/tokenizer")
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (default: <base>/dry_run)")
    flags = parser.parse_args()
    if flags.check:
        _print_check()
        return
    config = replace(
        config, depth=flags.depth, num_iterations=flags.steps, data=flags.data,
        device_batch_size=config.device_batch_size if flags.device_batch_size is None else flags.device_batch_size,
        tokenizer=flags.tokenizer or str(base_dir() / "tokenizer"),
    )  # fmt: skip
    names, out = parse_precisions(flags.precisions), flags.out or base_dir() / "dry_run"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from error
    try:
        done = compare(config, names, out, fit=flags.device_batch_size is None)
    except KeyboardInterrupt:
        sys.exit(130)
    _write(done, out)
    _print(done, out)
    if problems := done.problems():
        print("\n".join(f"FAILED {problem}" for problem in problems), file=sys.stderr)
        sys.exit(1)


def _write(done: Comparison, out: Path) -> None:
    try:
        (out / "report.json").write_text(json.dumps(done.record(), indent=1, default=str) + "\n", encoding="utf-8")
        (out / "report.html").write_text(dry_run_page.render(done), encoding="utf-8")
        dry_run_page.draw(done, out / "report.png")
    except OSError as error:
        raise BadInput(f"cannot write the report into {out}: {error.strerror}") from error


def _print(done: Comparison, out: Path) -> None:
    console, cells = Console(), dry_run_page.table(done)
    table = Table(title=escape(dry_run_page.headline(done)), title_justify="left")
    for i, name in enumerate(cells[0]):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    console.print(table)
    for remark in dry_run_page.remarks(done):
        console.print(escape(remark), highlight=False)
    console.print(f"{out}/report.html, report.png, report.json", highlight=False, markup=False, soft_wrap=True)


def _print_check() -> None:
    table = Table(box=None, show_header=False)
    for row in check():
        mark = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.usable]
        table.add_row(row.what, mark, "" if row.detail == "yes" else escape(row.detail))
    Console().print(table)


if __name__ == "__main__":
    run(main)
