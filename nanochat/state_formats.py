"""How a run stores optimizer state and weights between steps: `--state-dtype` and `--master-weights`, read and checked once.

    --state-dtype nanochat                     fp32, and bf16 for the moments of bf16 embedding tables
    --state-dtype e4m3                         all of it in one format, tables' too
    --state-dtype exp_avg=bf16,momentum=e4m3   each by itself; what is not named stays as auto has it

    --master-weights fp32          matrices are fp32 parameters, or bf16 ones with fp32 copies where the precision has them in bf16
    --master-weights bf16          matrices are bf16 and nothing else, rounded stochastically
    --master-weights bf16+8        with a byte of what bf16 cuts off, the rest rounded stochastically
    --master-weights bf16+16       with all of it: the update is fp32's, bit for bit

auto, the default of both, is e4m3 and bf16+8 for our own FP8 layers, where that was measured to cost no loss (docs/results.md), and
nanochat and fp32 for all else.

Masters are of the matrices, lm_head among them; `nanochat/adamw.py` says what becomes of tables. Scalars, and NorMuon's mean
squares, one a row, are fp32 in any case.
"""

import dataclasses
from dataclasses import dataclass

import torch

from nanochat.errors import BadInput
from nvfp8 import hardware
from nvfp8.precision import FP8Precision, Precision, TEPrecision
from nvfp8.state import MASTERS, STATE_DTYPES

STATES = ("exp_avg", "exp_avg_sq", "momentum")


@dataclass(frozen=True)
class StateFormats:
    """What the two flags came to for a run.

    Attributes:
        exp_avg: AdamW's first moment, a key of STATE_DTYPES; None is nanochat's way.
        exp_avg_sq: AdamW's second moment.
        momentum: Muon's.
        master: a key of MASTERS; None is nanochat's way.
    """

    exp_avg: str | None = None
    exp_avg_sq: str | None = None
    momentum: str | None = None
    master: str | None = None

    def stored_by(self, precision: Precision, device_type: str, adamw: str = "own") -> Precision:
        """The precision with its matrices as these masters want them.

        Args:
            precision: what the run computes in.
            device_type: "cuda" or "cpu".
            adamw: one of `te_adam.CHOICES`.

        Raises:
            BadInput: the precision, the device or the choice of AdamW cannot have these formats.
        """
        if device_type == "cuda":
            capability = torch.cuda.get_device_capability()
            for name in STATES:
                reason = hardware.unstorable(getattr(self, name) or "fp32", capability)
                if reason is not None:
                    raise BadInput(f"--state-dtype {name}={getattr(self, name)}: {reason}")
        if adamw != "own":
            if self.exp_avg or self.exp_avg_sq:
                raise BadInput(
                    f"--adamw {adamw} stores its moments as it says: give --state-dtype momentum=... only, or --adamw own"
                )
            if self.master not in (None, "fp32"):
                raise BadInput(f"--adamw {adamw} keeps masters of its own: --master-weights {self.master} goes with --adamw own")
        if self.master in (None, "fp32"):
            return precision
        if precision.compute_dtype == torch.float32:
            raise BadInput(
                f"--master-weights {self.master}: precision {precision.name} computes with fp32 matrices, which are whole; "
                "it goes with --precision bf16, te or fp8"
            )
        if isinstance(precision, TEPrecision) and precision.weights == "fp8":
            raise BadInput(f"--master-weights {self.master}: --te-weights fp8 quantizes fp32 matrices; use --te-weights bf16")
        return dataclasses.replace(precision, matrix_dtype=torch.bfloat16)

    def describe(self, precision: Precision, adamw: str = "own") -> dict[str, str]:
        """What is stored how, for the line printed at start and the run's record."""
        tables = str(precision.compute_dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
        moments = [f"{name} {getattr(self, name) or f'fp32, {tables} of tables'}" for name in ("exp_avg", "exp_avg_sq")]
        states = [*(moments if adamw == "own" else ()), f"momentum {self.momentum or 'fp32'}"]
        whole = precision.matrix_dtype == torch.float32
        return {"optimizer state": ", ".join(states), "master weights": "the matrices" if whole else self.master or "fp32"}


NANOCHAT = StateFormats()
SMALL = StateFormats("e4m3", "e4m3", "e4m3", "bf16+8")


def default_formats(precision: Precision, adamw: str = "own") -> StateFormats:
    """What auto is.

    Args:
        precision: what the run computes in.
        adamw: one of `te_adam.CHOICES`; Transformer Engine's stores what it says.
    """
    return SMALL if isinstance(precision, FP8Precision) and adamw == "own" else NANOCHAT


def parse_formats(state_dtype: str, master_weights: str, auto: StateFormats) -> StateFormats:
    """Read the two flags.

    Args:
        state_dtype: what follows `--state-dtype`.
        master_weights: what follows `--master-weights`.
        auto: of `default_formats`.

    Raises:
        BadInput: a state or format that does not exist.
    """
    entries = [entry.partition("=") for entry in state_dtype.split(",")]
    if len(entries) == 1 and not entries[0][1]:
        entries = [(name, "=", entries[0][0]) for name in STATES]
    chosen: dict[str, str | None] = {}
    for name, equals, form in entries:
        if not equals or name not in STATES or name in chosen:
            raise BadInput(
                f"--state-dtype {state_dtype}: give one format for all, or pairs as in exp_avg=bf16,momentum=e4m3 "
                f"with each of {', '.join(STATES)} at most once"
            )
        if form not in ("auto", "nanochat", *STATE_DTYPES):
            raise BadInput(
                f"--state-dtype {state_dtype}: there is no {form!r}; formats are auto, nanochat, {', '.join(STATE_DTYPES)}"
            )
        chosen[name] = getattr(auto, name) if form == "auto" else None if form == "nanochat" else form
    if master_weights not in ("auto", *MASTERS):
        raise BadInput(f"--master-weights {master_weights}: there are auto, {', '.join(MASTERS)}")
    if master_weights != "auto":
        chosen["master"] = master_weights
    return dataclasses.replace(auto, **chosen)
