"""What a tag's directory holds from before is never overwritten: a run that starts anew or goes back moves it aside."""

import itertools
from pathlib import Path

from nanochat import checkpoint
from nanochat.errors import BadInput


def set_aside_after(directory: Path, step: int) -> None:
    """Going back to `step` abandons the steps after it: kept, but no longer what --resume would take."""
    for later in (number for number in checkpoint.steps(directory) if number > step):
        path = directory / f"step_{later:06d}"
        names = (path.with_suffix(f".abandoned{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        _rename(path, aside)
        print(f"resuming from step {step}: {path} is now {aside.name}")


def move_earlier_run(directory: Path) -> str | None:
    """Leave an earlier run of the same tag whole, under another name; say so, if there was one."""
    if not directory.exists():
        return None
    taken = (directory.with_name(f"{directory.name}.{number}") for number in itertools.count(1))
    moved = next(path for path in taken if not path.exists())
    _rename(directory, moved)
    return f"{directory} held an earlier run: it is now {moved} (--resume would have gone on with it)"


def _rename(path: Path, to: Path) -> None:
    try:
        path.rename(to)
    except OSError as error:
        raise BadInput(f"cannot rename {path} to {to.name}: {error.strerror}; rename it by hand, or mend its directory") from error
