"""Convert checkpoints between karpathy/nanochat and this program.

    python -m scripts.convert import ~/.cache/nanochat/base_checkpoints/d12 --to out/base_checkpoints/d12
    python -m scripts.convert export out/base_checkpoints/d12 --to ~/.cache/nanochat/base_checkpoints/d12

Weights and configuration cross. Optimizer state does not, so neither program can resume the other's training run; it
can evaluate the model and sample from it.
"""

from pathlib import Path

from nanochat.checkpoint import STEP_NAME, environment, find, save, steps
from nanochat.errors import BadInput, Parser, run
from nanochat.interchange import export_model, import_model

# What nanochat keeps in its metadata beside the step and the model's configuration, as far as our state has it.
META = ("val_bpb", "user_config", "device_batch_size", "max_seq_len", "total_batch_size")


def import_nanochat(source: Path, step: int | None, target: Path) -> Path:
    """Save the model that nanochat left in `source` as a checkpoint in `target`; return the checkpoint's path.

    Raises:
        BadInput: see `import_model` and `save`; or `target` has that step already.
    """
    config, tensors, meta = import_model(source, step)
    present = steps(target)
    if meta["step"] in present:
        raise BadInput(f"{target} has a checkpoint of step {meta['step']} already; choose another --to")
    state = {"model_config": config, "nanochat_meta": meta, "environment": environment()}
    return save(target, meta["step"], tensors, {}, state, keep=len(present) + 1)


def export_nanochat(source: Path, step: int | None, target: Path) -> Path:
    """Write the checkpoint of `step` (or the newest) in `source` as nanochat's files; return the model file's path.

    `source` may also be one checkpoint's own directory.

    Raises:
        BadInput: see `find` and `export_model`; or the checkpoint does not say what model it is of.
    """
    if step is None and (match := STEP_NAME.fullmatch(source.resolve().name)):
        source, step = source.resolve().parent, int(match[1])
    found = find(source, step)
    if "model_config" not in found.state:
        raise BadInput(f"{found.path / 'state.json'} has no model_config: not a checkpoint of a GPT")
    meta = found.state.get("nanochat_meta") or {name: found.state[name] for name in META if name in found.state}
    weights, optimizer = found.model(), found.optimizer()
    # What is stored below fp32 has a master with the optimizer's state.
    exact = {name: optimizer.get(f"{name}.master", weight) for name, weight in weights.items()}
    return export_model(target, found.step, exact, found.state["model_config"], meta)


def main() -> None:
    """Parse the command line and convert."""
    parser = Parser(prog="python -m scripts.convert", description="Convert checkpoints to and from karpathy/nanochat's.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, target in (
        ("import", "directory with nanochat's model_*.pt", "directory that gets step_*/"),
        ("export", "directory with our step_*/, or one of those", "directory that gets model_*.pt and meta_*.json"),
    ):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, help=source)
        command.add_argument("--step", type=int, help="default: the last one there")
        command.add_argument("--to", type=Path, required=True, help=target)
    args = parser.parse_args()
    convert = import_nanochat if args.command == "import" else export_nanochat
    written = convert(args.source.expanduser(), args.step, args.to.expanduser())
    print(f"wrote {written} (weights and configuration; optimizer state is not converted)")


if __name__ == "__main__":
    run(main)
