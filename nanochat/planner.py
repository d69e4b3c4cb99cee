"""What a run will need before one owns the machine: memory, the largest micro-batch and depth, tokens a second, days, energy.

Nothing here runs on a GPU. Memory is counted (`nanochat/memory.py`), time is a roofline with efficiencies measured on an H100
(`nanochat/roofline.py`), peaks are of datasheets (`nvfp8/hardware.py`). Every table says which of its figures are predictions and
which were measured; where no run of a setup was made, it says so.

What fits: the allocator can have the device's memory but what a process takes beside it (CUDA's context, the kernels it has
loaded) and a part that is reserved and cannot be used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nanochat import roofline
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.memory import GIB, Counted, Prediction, Setup, largest_batch, predict
from nanochat.micro_batches import refusal
from nanochat.plan import Plan, make_plan
from nanochat.state_formats import NANOCHAT, STATES, StateFormats
from nanochat.train_config import TrainConfig
from nvfp8.hardware import NICKNAMES, Peaks, best_recipe, missing, peaks, unstorable
from nvfp8.precision import Precision, bf16, fp8, te
from nvfp8.recipe import Recipe, parse_recipe

# Assumptions, to be replaced by measurements: NVML's figure of a process less the allocator's reserved, and reserved less allocated
# with expandable segments. Where memory is the system's too, what that and other programs take.
CONTEXT = 1.0 * GIB
UNUSABLE = 0.03
SYSTEM = 8.0 * GIB
DEEPEST = 256
LAUNCHES = 1e-3  # seconds: about 100 kernels of a block, forward and backward, at 10 µs each for an eager Python


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        label: what tables call it.
        precision: with its matrices as the formats want them.
        formats: of optimizer state and masters.
    """

    label: str
    precision: Precision
    formats: StateFormats


@dataclass(frozen=True)
class Row:
    """What a choice comes to on a device.

    Attributes:
        choice: what.
        rows: of a micro-batch: the largest power of two that fits and divides the batch, or what was asked for.
        any_rows: the largest that fits, whatever the batch.
        memory: the peak at `rows`; at one row where not even that fits.
        fits: whether `rows` fit.
        tokens_per_second: of whole steps; None where nothing fits.
        plan: steps and batch.
        time: of a micro-batch and of the optimizers, seconds by family.
        depth: the largest of this shape whose step fits with one row.
        measured: a run of just this, if one was made, and the peak predicted of it: it may have been made without CUDA graphs.
        layers: blocks of the model.
    """

    choice: Choice
    rows: int
    any_rows: int
    memory: Prediction
    fits: bool
    tokens_per_second: float | None
    plan: Plan
    time: tuple[dict[str, float], dict[str, float]]
    depth: int
    measured: tuple[roofline.Measured, Prediction] | None
    layers: int


@dataclass(frozen=True)
class Device:
    """A GPU to plan for."""

    name: str
    peaks: Peaks

    @property
    def usable(self) -> float:
        """Bytes the allocator's tensors can have."""
        return (self.peaks.memory - CONTEXT - SYSTEM * self.peaks.shared) * (1 - UNUSABLE)


def device(name: str) -> Device:
    """A GPU by a nickname or by its whole name.

    Raises:
        BadInput: none is called so.
    """
    whole = NICKNAMES.get(name.lower().replace("rtx", "").strip(" -"), name)
    known = peaks(whole)
    if known is None:
        raise BadInput(f"--gpu {name}: no such GPU is known; there are {', '.join(NICKNAMES)}")
    return Device(whole, known)


def choices(where: Device, config: TrainConfig, wanted: str, recipe: str, recompute: bool = False) -> list[Choice]:
    """Ways to train on a device.

    Args:
        where: the device.
        config: says how optimizer state is stored.
        wanted: "all", "bf16", "fp8" or "te".
        recipe: of FP8; "auto" takes delayed for our own layers, the device's best for Transformer Engine.
        recompute: whether our own FP8 layers make relu² again in backward.

    Raises:
        BadInput: the device cannot do what is asked for, or nothing that is planned does it.
    """
    capability = where.peaks.capability
    found: list[tuple[str, Precision]] = [("bf16", bf16())] if wanted in ("all", "bf16") else []
    reason = missing("fp8", capability)
    if wanted in ("fp8", "te") and reason is not None:
        raise BadInput(f"--precision {wanted}: {reason}")
    if wanted == "fp8" or (wanted == "all" and reason is None and recipe == "auto"):
        chosen = _recipe("delayed" if recipe == "auto" else recipe, where)
        try:
            found.append((f"fp8 {chosen.name}" + ", relu² again" * recompute, fp8(chosen, recompute=recompute)))
        except ValueError as error:
            raise BadInput(f"--recipe: {error}") from error
    elif recompute:
        raise BadInput("--recompute-mlp goes with our own FP8 layers: give --precision fp8, on a GPU with FP8 units")
    if wanted in ("all", "te") and reason is None:
        chosen = _recipe(recipe, where)
        if chosen.name == "rowwise":
            raise BadInput("--recipe rowwise: Transformer Engine has no row-wise scaling: use current, or delayed")
        found += [
            (f"te {chosen.name}", te(chosen, te_head=True)),
            (f"te {chosen.name}, head in chunks", te(chosen)),
        ]
    made = []
    for label, precision in found:
        formats = config.formats(precision)
        for name in STATES:
            reason = unstorable(getattr(formats, name) or "fp32", capability)
            if reason is not None:
                raise BadInput(f"--state-dtype {name}={getattr(formats, name)}: {reason}")
        made.append(Choice(label, formats.stored_by(precision, "cpu"), formats))
    return made


def _recipe(name: str, where: Device) -> Recipe:
    try:
        chosen = parse_recipe(best_recipe(where.peaks.capability) if name == "auto" else name)
    except ValueError as error:
        raise BadInput(f"--recipe: {error}") from error
    for feature in chosen.features:
        reason = missing(feature, where.peaks.capability)
        if reason is not None:
            raise BadInput(f"--recipe {chosen.name} on {where.name}: {reason}")
    return chosen


def plan(where: Device, config: TrainConfig, wanted: Choice, vocab_size: int, rows: int | None, attention: str) -> Row:
    """Plan one choice on one device, one GPU.

    Args:
        where: the device.
        config: shape, batch and horizon; its `device_batch_size` is not read.
        wanted: how to train.
        vocab_size: of the tokenizer.
        rows: of a micro-batch; None takes what fits.
        attention: the backend.

    Raises:
        BadInput: a shape that cannot be built, a recipe that does not fit it, or rows that do not divide the batch.
    """
    shape = config.shape(vocab_size)
    setup = Setup(
        shape, wanted.precision, 1, 2, wanted.formats, attention, config.deterministic, config.update_early,
        capability=where.peaks.capability,
    )  # fmt: skip
    try:
        counted = Counted(setup)
    except ValueError as error:
        raise BadInput(f"--recipe: {error}") from error
    setup = replace(setup, graphs=refusal(counted.model, 1, config.update_early) is None)
    # A batch that any power of two of rows divides, for a first plan: it says how many tokens a step has.
    one = make_plan(replace(config, device_batch_size=1), counted.model, 1)
    if one.accumulation == 1 or config.update_early:
        setup = replace(setup, accumulation=1)
    any_rows = min(largest_batch(setup, where.usable, counted), one.accumulation)
    if config.update_early:  # a step is one micro-batch
        rows = one.accumulation
    chosen = rows or max((n for n in _powers(any_rows) if one.accumulation % n == 0), default=1)
    planned = make_plan(replace(config, device_batch_size=chosen), counted.model, 1)
    memory = predict(replace(setup, rows=chosen, accumulation=planned.accumulation), counted)
    fits = memory.total <= where.usable
    done = roofline.work(counted, chosen)
    micro_tokens = chosen * shape.sequence_len
    rate = roofline.tokens_per_second(done, where.peaks, wanted.precision, micro_tokens, planned.accumulation) if fits else None
    time = roofline.seconds(done, where.peaks, wanted.precision)
    depth = _deepest(lambda depth: predict(replace(setup, shape=config.shape(vocab_size, depth))).total <= where.usable)
    made = _measured(where, config, shape, wanted, chosen)
    compared = None
    if made is not None:
        then = replace(
            setup, rows=chosen, accumulation=roofline.MICRO_BATCHES, graphs=made.graphs, captured_updates=made.captured_updates
        )
        compared = made, predict(then, counted)
    return Row(wanted, chosen, any_rows, memory, fits, rate, planned, time, depth, compared, shape.n_layer)


def _powers(largest: int) -> Iterator[int]:
    n = 1
    while n <= largest:
        yield n
        n *= 2


def _deepest(fits: Callable[[int], bool]) -> int:
    """The largest depth up to DEEPEST that fits, 0 where none does."""
    low, high = 0, 8
    while high <= DEEPEST and fits(high):  # by doubling first: the deepest models take seconds to count
        low, high = high, 2 * high
    high = min(high, DEEPEST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _measured(where: Device, config: TrainConfig, shape: GPTConfig, wanted: Choice, rows: int) -> roofline.Measured | None:
    standard = shape == GPTConfig.from_depth(config.depth, window_pattern=config.window_pattern)
    asked = (where.name, config.depth, rows, config.window_pattern, wanted.label, wanted.formats)
    found = (m for m in roofline.MEASURED if (m.device, m.depth, m.rows, m.window, m.label, m.formats) == asked)
    return next(found, None) if standard else None


# What is printed


def report(where: Device, config: TrainConfig, rows: list[Row], tokens: float | None) -> list[str]:
    """The lines to print.

    Args:
        where: the device.
        config: shape, batch and horizon.
        rows: of `plan`, at least one.
        tokens: of the run; None is the horizon that the plan has.
    """
    known, first = where.peaks, rows[0].plan
    total = tokens or first.steps * first.batch_tokens
    rates = f"{known.bf16 / 1e12:.0f} bf16"
    rates += "".join(f", {rate / 1e12:.0f} {name}" for name, rate in (("FP8", known.fp8), ("FP4", known.fp4)) if rate)
    lines = [
        f"{where.name}: {rates} TFLOP/s, {known.bandwidth / 1e12:.2f} TB/s, {known.memory / GIB:.1f} GiB, {known.power:.0f} W "
        "(datasheets, dense rates)",
        f"d{config.depth}, T = {config.max_seq_len}, windows {config.window_pattern}, {first.batch_tokens:,} tokens a step, "
        f"{total / 1e9:.3g} G tokens in all",
        *_states([row.choice for row in rows]),
        f"room for tensors: {where.usable / GIB:.1f} GiB (assumed: {_reserve(known)})",
        "",
        "PREDICTED, one GPU",
        f"{'':<30}{'rows':>6}{'at most':>9}{'GiB':>10}{'tok/s':>12}{'days':>10}{'kWh':>9}{'largest depth':>15}",
    ]
    for row in rows:
        lines.append(_line(row, known, total))
    lines += ["", f"MEASURED, the same setups, {roofline.MICRO_BATCHES} micro-batches a step (docs/results.md)"]
    made = [(row, *row.measured) for row in rows if row.measured is not None]
    for row, m, memory in made:
        micro, step = row.time
        seconds = roofline.MICRO_BATCHES * sum(micro.values()) + sum(step.values())
        rate = row.rows * config.max_seq_len * roofline.MICRO_BATCHES / seconds
        errors = memory.total / GIB / m.gib - 1, rate / m.tokens_per_second - 1
        error = f"commit {m.commit}; the predictions err by {errors[0]:+.1%} and {errors[1]:+.1%}"
        lines.append(f"{m.label:<30}{m.rows:>6}{'':>9}{m.gib:>10.2f}{m.tokens_per_second:>12,}  {error}")
    if not made:
        lines.append("none: no run of these setups was made")
    if known.shared and (config.depth, config.window_pattern) == (24, "SSSL"):
        lines.append(f"by others: karpathy/nanochat in its own FP8, {roofline.PUBLISHED_SPARK:,} tok/s")
    lines += ["", *_side_by_side("memory, GiB, predicted", rows, [_memory(row) for row in rows], 2)]
    lines += ["", *_side_by_side("time of a step, ms, predicted", rows, [_times(row) for row in rows], 1)]
    return [*lines, "", *_notes(known, rows)]


def _states(ways: list[Choice]) -> list[str]:
    found: dict[str, list[str]] = {}
    for way in ways:
        if way.formats == NANOCHAT:
            stored = "fp32, bf16 for moments of tables; masters fp32"
        else:
            stored = f"{way.formats.describe(way.precision)['optimizer state']}; masters {way.formats.master or 'fp32'}"
        found.setdefault(stored, []).append(way.label)
    return [f"optimizer state of {', '.join(labels)}: {stored}" for stored, labels in found.items()]


def _reserve(known: Peaks) -> str:
    system = f", {SYSTEM / GIB:.0f} GiB for the system" if known.shared else ""
    return f"{CONTEXT / GIB:.0f} GiB for CUDA's context and kernels{system}, {UNUSABLE:.0%} fragments"


def _line(row: Row, known: Peaks, total: float) -> str:
    line = f"{row.choice.label:<30}{row.rows:>6}{row.any_rows:>9}{row.memory.total / GIB:>10.2f}"
    if row.tokens_per_second is None:
        return line + f"{'does not fit':>31}{_depth(row):>15}"
    days = total / row.tokens_per_second / 86400
    return line + f"{row.tokens_per_second:>12,.0f}{_short(days):>10}{_short(days * 24 * known.power / 1000):>9}{_depth(row):>15}"


def _depth(row: Row) -> str:
    return f"{row.depth}" if row.depth < DEEPEST else f"{DEEPEST} or more"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"


def _side_by_side(title: str, rows: list[Row], columns: list[dict[str, float]], digits: int) -> list[str]:
    """A table of what adds up, one column a row of the plan; what is next to nothing in all of them in one line."""
    names = list(dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column))
    small = [name for name in names if all(column.get(name, 0) < 0.5 * 10**-digits for column in columns)]
    shown: dict[str, list[float]] = {name: [column.get(name, 0) for column in columns] for name in names if name not in small}
    if small:
        shown[f"{len(small)} smaller ones"] = [sum(column.get(name, 0) for name in small) for column in columns]
    shown["in all"] = [sum(column.values()) for column in columns]
    width = max(len(name) for name in (*shown, title)) + 2
    heads = [[*row.choice.label.split(", "), f"{row.rows} rows"] for row in rows]
    deep = max(map(len, heads))
    above = [[""] * (deep - len(head)) + head for head in heads]
    lines = [f"{title * (i == deep - 1):<{width}}" + "".join(f"{head[i]:>16}" for head in above) for i in range(deep)]
    for name, values in shown.items():
        lines.append(f"{name:<{width}}" + "".join(f"{f'{value:,.{digits}f}' if value else '-':>16}" for value in values))
    return lines


def _memory(row: Row) -> dict[str, float]:
    return {what: size / GIB for what, size in row.memory.lines.items()}


def _times(row: Row) -> dict[str, float]:
    """Milliseconds of a step, all its micro-batches together."""
    micro, step = row.time
    return {name: 1e3 * row.plan.accumulation * value for name, value in micro.items()} | {
        f"optimizers: {name}": 1e3 * value for name, value in step.items()
    }


def _notes(known: Peaks, rows: list[Row]) -> list[str]:
    notes = [
        "The peaks: " + "; ".join(f"{row.choice.label}: {row.memory.moment}" for row in rows) + ".",
        "Memory is counted; beside 25 measured runs on an H100 and an H200 it errs by 1.1 % at most; on other chips nothing was",
        "measured. Time takes efficiencies measured on an H200 as parts of this GPU's peaks: within 4 % of 11 runs there, of which",
        "it is partly made, two of d8 6 and 8 % too fast, and within 4 % of 10 runs on an H100, all but two not part of it; on",
        "other GPUs it is a prediction that no run of ours has tested. Attention is taken to be cuDNN's.",
        "kWh: the board at its power limit, the rest of the machine not counted. At most: rows of any number that fit.",
    ]
    if any(sum(row.time[0].values()) < LAUNCHES * row.layers for row in rows):
        notes.append("Micro-batches so short may wait for Python to launch kernels, which is not in the count: take more rows.")
    unmeasured = sorted({row.choice.label for row in rows} - {m.label for m in roofline.MEASURED})
    if unmeasured:
        notes.append(f"Never run, so neither speed nor memory of it was ever checked: {'; '.join(unmeasured)}.")
    return notes
