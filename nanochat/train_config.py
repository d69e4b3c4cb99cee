"""What a training run is told: the flags of `scripts.base_train` as frozen data, and what can be refused before any work."""

from dataclasses import dataclass
from typing import Literal

from nanochat.build import EngineOptions
from nanochat.errors import BadInput
from nanochat.gpt import GPTConfig
from nanochat.state_formats import NANOCHAT, StateFormats, default_formats, parse_formats
from nvfp8.precision import Precision


@dataclass(frozen=True)
class TrainConfig:
    """One field a flag, nanochat's names and defaults; -1 stands for "not given" as there."""

    # model
    depth: int = 20
    aspect_ratio: int = 64
    head_dim: int = 128
    max_seq_len: int = 2048
    window_pattern: str = "SSSL"
    # horizon
    num_iterations: int = -1
    target_flops: float = -1.0
    target_param_data_ratio: float = 12.0
    # optimization
    device_batch_size: int = 32
    total_batch_size: int = -1
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.28
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    # checkpoints
    resume: bool = False
    resume_from_step: int = -1
    save_every: int = -1
    keep: int = 3
    model_tag: str | None = None
    # evaluation
    eval_every: int = 250
    eval_tokens: int = 80 * 524288
    sample_every: int = 2000
    core_metric_every: int = 2000
    core_metric_max_per_task: int = 500
    # runtime
    run: str = "dummy"
    device_type: str = ""
    fp8: bool = False
    fp8_recipe: str = "tensorwise"
    precision: str = "auto"
    recipe: str = "auto"
    te_layers: Literal["fused", "separate"] = "fused"
    te_head: Literal["auto", "chunked", "te"] = "auto"
    te_weights: Literal["bf16", "fp8"] = "bf16"
    norm_weight: bool = False
    recompute_mlp: bool = False
    adamw: str = "own"
    state_dtype: str = "auto"
    master_weights: str = "auto"
    update_early: bool = False
    no_cuda_graphs: bool = False
    attention: str = "auto"
    deterministic: bool = False
    profile: bool = False
    max_bad_steps: int = 5
    seed: int = 42
    data: str = "python"
    tokenizer: str = ""

    def __post_init__(self) -> None:
        """Refuse what no run can do.

        Raises:
            BadInput: a number out of its range, an FP8 recipe or a format of state that there is not, or flags against each other.
        """
        if self.fp8:
            recipe = {"tensorwise": "delayed"}.get(self.fp8_recipe, self.fp8_recipe)  # one scale a tensor, from its history
            if (self.precision, self.recipe) not in (("auto", "auto"), ("fp8", recipe)):
                raise BadInput(f"--fp8 is nanochat's way to say --precision fp8 --recipe {recipe}: give the one or the other")
            object.__setattr__(self, "precision", "fp8")
            object.__setattr__(self, "recipe", recipe)
        for name in ("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{_flag(name)} is {getattr(self, name)}: it must be at least 1")
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{_flag(name)} is {getattr(self, name)}: it must be a finite number from 0 on")
        for name in ("warmdown_ratio", "final_lr_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{_flag(name)} is {getattr(self, name)}: it must be between 0 and 1")
        if self.eval_every > 0 and self.eval_tokens < 1:
            raise BadInput(f"--eval-tokens is {self.eval_tokens}: it must be at least 1, or --eval-every -1 for no evaluation")
        parse_formats(self.state_dtype, self.master_weights, NANOCHAT)
        if self.update_early and self.adamw != "own":
            raise BadInput(f"--update-early updates tensor by tensor, --adamw {self.adamw} all at once: use --adamw own")
        if self.update_early and self.te_weights == "fp8":
            raise BadInput(
                "--update-early: with --te-weights fp8 gradients reach their matrices past autograd, and all would wait for the "
                "end of backward; use --te-weights bf16"
            )
        if self.resume and self.resume_from_step >= 0:
            raise BadInput("--resume takes the newest checkpoint, --resume-from-step a given one: use one of them")

    @property
    def engine(self) -> EngineOptions:
        """What FP8 layers are told, where they are used."""
        return EngineOptions(self.recipe, self.te_layers, self.te_head, self.te_weights, self.norm_weight, self.recompute_mlp)

    def formats(self, precision: Precision) -> StateFormats:
        """How optimizer state and weights are stored beside what a run computes in."""
        return parse_formats(self.state_dtype, self.master_weights, default_formats(precision, self.adamw))

    def shape(self, vocab_size: int, depth: int | None = None) -> GPTConfig:
        """The shape of the model.

        Args:
            vocab_size: of the tokenizer.
            depth: number of blocks; None takes `depth`.

        Raises:
            BadInput: it cannot be built.
        """
        try:
            return GPTConfig.from_depth(
                self.depth if depth is None else depth, aspect_ratio=self.aspect_ratio, head_dim=self.head_dim,
                sequence_len=self.max_seq_len, vocab_size=vocab_size, window_pattern=self.window_pattern,
            )  # fmt: skip
        except ValueError as error:
            raise BadInput(str(error)) from error

    @property
    def tag(self) -> str:
        """Name of the run's checkpoint directory: nanochat's d<depth> unless one is given."""
        return self.model_tag or f"d{self.depth}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
