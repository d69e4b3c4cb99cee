"""A recipe says how each of a linear layer's three GEMMs is computed: operand formats, scaling, accumulation.

    fprop   y  = x · wᵀ
    dgrad   dx = dy · w
    wgrad   dw = dyᵀ · x

It is frozen data, the same for every backend: Transformer Engine is configured from it, and so are our own layers. A pair that
no tensor core multiplies is refused when the recipe is made, so nothing has to fall back later.

Formats: E4M3 (±448, 3 bits of mantissa) for what needs precision, E5M2 (±57344, 2 bits) for gradients, whose range is wide
(arXiv 2209.05433). Scaling maps a tensor's largest magnitude, its amax, to the format's largest value: `current` measures it
first, an extra pass; `delayed` takes it from the steps before, no pass; `row` one scale a row; blocks have one scale for 1×128
or 128×128 elements (arXiv 2412.19437), MX blocks one power of two for 32 (arXiv 2310.10537), NVFP4 one E4M3 scale for 16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["bf16", "e4m3", "e5m2", "e2m1"]
Scaling = Literal["none", "delayed", "current", "row", "block1x128", "block128x128", "mx32", "nv16"]

GEMMS = ("fprop", "dgrad", "wgrad")
_PER_TENSOR = ("delayed", "current")
# What hardware must offer for a scaling (`nvfp8.hardware.missing`).
_FEATURES = {
    "delayed": "fp8", "current": "fp8", "row": "fp8", "block1x128": "fp8_block", "block128x128": "fp8_block",
    "mx32": "mxfp8", "nv16": "nvfp4",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """Format and scaling of one GEMM input."""

    format: Format
    scaling: Scaling

    def __post_init__(self) -> None:
        """Refuse a format with a scaling that is not made for it."""
        scalings = {
            "bf16": ("none",),
            "e5m2": (*_PER_TENSOR, "row", "mx32"),
            "e4m3": (*_PER_TENSOR, "row", "block1x128", "block128x128", "mx32"),
            "e2m1": ("nv16",),
        }
        if self.format not in scalings:
            raise ValueError(f"unknown format {self.format!r}: choose among {', '.join(scalings)}")
        if self.scaling not in scalings[self.format]:
            raise ValueError(f"{self.format} takes scaling {' or '.join(scalings[self.format])}, not {self.scaling!r}")


BF16 = Operand("bf16", "none")


@dataclass(frozen=True)
class Gemm:
    """One product left · right.

    Attributes:
        left: the activation or gradient.
        right: the weight, or the activation in wgrad.
        fast_accumulation: sum in the tensor core's 14 bits or so rather than promote to fp32 now and then. On gradients of a
            trained d12 that adds 0.04 to 0.13 % to fprop and dgrad, whose casts err by 4 and 6 %, and 0.5 to 3.6 % to wgrad,
            which sums over all tokens (`benchmarks/accumulation.py`): so the first two use it.
    """

    left: Operand
    right: Operand
    fast_accumulation: bool = False

    def __post_init__(self) -> None:
        """Refuse a pair that tensor cores do not multiply."""
        formats, scalings = {self.left.format, self.right.format}, {self.left.scaling, self.right.scaling}
        if formats == {"e5m2"}:
            raise ValueError("e5m2 times e5m2 is not a product that tensor cores offer: make one operand e4m3")
        if len(formats & {"bf16", "e2m1"}) == 1 and len(formats) > 1:
            raise ValueError(f"{self.left.format} times {self.right.format}: both operands must be of one width")
        families = {_family(scaling) for scaling in scalings}
        if len(families) > 1:
            raise ValueError(f"scalings {self.left.scaling} and {self.right.scaling} do not go together in one GEMM")


def _family(scaling: Scaling) -> str:
    return "tensor" if scaling in _PER_TENSOR else "block" if scaling.startswith("block") else scaling


@dataclass(frozen=True)
class Recipe:
    """How the GEMMs of every linear layer run.

    Attributes:
        name: what flags and printouts call it.
        fprop: x, w.
        dgrad: dy, w.
        wgrad: dy, x.
        margin: delayed scaling leaves 2^margin of room above the amax it expects.
        amax_history_len: how many amaxes delayed scaling remembers.
        amax_compute_algo: which of them counts: the largest ("max") or the newest ("most_recent").
        interval: steps between updates of the scale; Transformer Engine dropped the choice, so 1.
        bf16: what stays in bf16: dotted names of blocks, layers or projections ("h.0", "h.11.mlp", "h.3.attn.c_proj"), * for any
            part of a name. c_q, c_k and c_v are one GEMM, "attn.qkv". With a GEMM behind a colon that one alone does, of all
            that the name covers: "h.*.mlp.c_proj:wgrad", "*:dgrad".
    """

    name: str
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm
    margin: int = 0
    amax_history_len: int = 16
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    interval: int = 1
    bf16: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that no backend follows."""
        if self.interval != 1:
            raise ValueError(f"interval {self.interval}: scales are updated every step (Transformer Engine ignores it): use 1")
        if self.amax_history_len < 1:
            raise ValueError(f"amax_history_len is {self.amax_history_len}: it must be at least 1")
        if self.margin < 0:
            raise ValueError(f"margin is {self.margin}: below 0 every scale would overflow")
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo {self.amax_compute_algo!r}: choose max or most_recent")
        history = (self.margin, self.amax_history_len, self.amax_compute_algo)
        if history != (0, 16, "max") and not any(operand.scaling == "delayed" for operand in self.operands):
            raise ValueError(f"recipe {self.name!r} has no history: margin, amax_history_len and amax_compute_algo go with delayed")
        for pattern in self.bf16:
            _, colon, gemm = pattern.partition(":")
            if colon and gemm not in GEMMS:
                raise ValueError(f"bf16={pattern}: {gemm!r} is no GEMM of a layer: choose {', '.join(GEMMS)}, or none for all")

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Both of fprop, dgrad and wgrad."""
        return tuple(operand for gemm in (self.fprop, self.dgrad, self.wgrad) for operand in (gemm.left, gemm.right))

    @property
    def features(self) -> tuple[str, ...]:
        """What a device must have, names of `nvfp8.hardware.FEATURES`, sorted."""
        return tuple(sorted({_FEATURES[operand.scaling] for operand in self.operands if operand.scaling != "none"}))

    def gemms_in_bf16(self, name: str) -> frozenset[str]:
        """Which of GEMMS stay in bf16 in the layer `name` ("h.11.mlp.c_fc"), by its own name or that of what holds it."""
        named = [pattern.partition(":")[2] for pattern in self.bf16 if covers(pattern, name)]
        return frozenset(GEMMS if "" in named else named)

    def describe(self) -> str:
        """One line: the three GEMMs with formats, scaling and accumulation."""
        gemms = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        return "; ".join(f"{name} {_line(gemm)}" for name, gemm in gemms.items())


def covers(pattern: str, name: str) -> bool:
    """Whether a dotted `pattern`, but for a GEMM behind it, is `name` or a beginning of it; * stands for any one part."""
    parts, of = pattern.partition(":")[0].split("."), name.split(".")
    return len(parts) <= len(of) and all(part in ("*", other) for part, other in zip(parts, of, strict=False))


def _line(gemm: Gemm) -> str:
    left, right = gemm.left, gemm.right
    scaling = left.scaling if left.scaling == right.scaling else f"{left.scaling}/{right.scaling}"
    return f"{left.format}×{right.format} {scaling}" + (", fast accumulation" if gemm.fast_accumulation else "")


def _scaled(name: str, scaling: Scaling, gradient: Format, weight: Scaling | None = None) -> Recipe:
    """E4M3 activations and weights, `gradient` for dy; scaled by tensor or row, fast accumulation but in wgrad."""
    x, w, dy = Operand("e4m3", scaling), Operand("e4m3", weight or scaling), Operand(gradient, scaling)
    fast = _family(scaling) in ("tensor", "row")
    return Recipe(name, Gemm(x, w, fast), Gemm(dy, w, fast), Gemm(dy, x))


_NVFP4 = Operand("e2m1", "nv16")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        _scaled("delayed", "delayed", "e5m2"),
        _scaled("current", "current", "e5m2"),
        _scaled("rowwise", "row", "e5m2"),
        _scaled("e4m3", "delayed", "e4m3"),
        _scaled("blockwise", "block1x128", "e4m3", "block128x128"),
        _scaled("mxfp8", "mx32", "e4m3"),
        Recipe("nvfp4", Gemm(_NVFP4, _NVFP4), Gemm(_NVFP4, _NVFP4), Gemm(_NVFP4, _NVFP4)),
    )
}


def recipe(name: str, **changes: object) -> Recipe:
    """A named recipe, with fields changed.

    Args:
        name: a key of RECIPES.
        changes: fields of Recipe, such as margin=1.

    Raises:
        ValueError: unknown name, or a field that makes no recipe; the message names it.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose auto or one of {', '.join(RECIPES)}")
    try:
        return replace(RECIPES[name], **changes)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"recipe {name!r}: {error}") from error


def parse_recipe(text: str) -> Recipe:
    """The recipe a flag names: `<name>` or `<name>:<field>=<value>,…`, such as "delayed:margin=1,bf16=h.0+h.11.mlp:wgrad".

    Raises:
        ValueError: no such name or field, or a value that makes no recipe; the message says what can be written.
    """
    name, _, changes = text.partition(":")
    kinds: dict[str, Callable[[str], object]] = {
        "margin": int, "amax_history_len": int, "amax_compute_algo": str, "interval": int,
        "bf16": lambda names: tuple(filter(None, names.split("+"))),
    }  # fmt: skip
    fields: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        field, _, value = change.partition("=")
        if field not in kinds:
            raise ValueError(f"recipe {text!r}: {field!r} cannot be set; what can: {', '.join(kinds)}")
        try:
            fields[field] = kinds[field](value)
        except ValueError as error:
            raise ValueError(f"recipe {text!r}: {field} takes a whole number, not {value!r}") from error
    return recipe(name, **fields)
