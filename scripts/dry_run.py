"""What this machine can do: `python -m scripts.dry_run --check` prints a table of formats, recipes and attention backends."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.errors import Parser, run
from nanochat.machine import check


def main() -> None:
    """Parse the command line, look, print."""
    parser = Parser("dry_run", description="what this machine can do")
    parser.add_argument("--check", action="store_true", required=True, help="print the table")
    parser.parse_args()
    table = Table(box=None, show_header=False)
    for row in check():
        mark = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.usable]
        table.add_row(row.what, mark, "" if row.detail == "yes" else escape(row.detail))
    Console().print(table)


if __name__ == "__main__":
    run(main)
