"""Transformer Engine's FusedAdam behind the interface of `nanochat.adamw.AdamW`, to compare the two. Muon stays ours.

Its update is the same formula: decoupled decay of the weight as it was, eps outside the root, both biases corrected, in fp32.
What differs is how state lies in memory: all moments have one dtype, tables' too, and there may be 16 bits in a master's place.

    te-fp32        moments and masters in fp32
    te-bf16        moments in bf16, masters in fp32
    te-fp8         moments in E4M3, one scale a tensor, masters in fp32
    te-remainders  moments in fp32; of a bf16 weight's master only the 16 bits that the weight lacks

te-fp8 is not for long runs. A second moment with one scale stores what is below 2⁻¹⁸ of the largest as 0. Where such an element
gets no gradient next, as a row of an embedding table does, the weight moves by lr·m/eps, and eps is 1e-10.

It asks for care in five things. It skips a parameter without gradient, which counts as zeros here. It reads memory as contiguous.
It counts steps by group and has one choice of masters for all its parameters, so there are two of it here and our count. It
raises no version counter. And it divides by a tensor's largest moment, which is 0 where no gradient has come yet.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import BadInput
from nanochat.optimizer import NamedOptimizer, gradient
from nvfp8 import te
from nvfp8.optim.stored import check_names

CHOICES = ("own", "te-fp32", "te-bf16", "te-fp8", "te-remainders")
_MOMENTS = {"te-bf16": torch.bfloat16, "te-fp8": torch.uint8}  # the others: fp32


def check(choice: str, device_type: str, matrix_dtype: torch.dtype) -> None:
    """Refuse one of CHOICES where it cannot be had.

    Args:
        choice: what the user asked for.
        device_type: "cuda" or "cpu".
        matrix_dtype: of the precision's matrices.

    Raises:
        BadInput: Transformer Engine cannot be used here, or the choice does not fit the weights.
    """
    if choice == "own":
        return
    if choice == "te-remainders" and matrix_dtype != torch.bfloat16:
        stored = str(matrix_dtype).removeprefix("torch.")
        raise BadInput(f"--adamw te-remainders completes bf16 weights, and this precision stores {stored}: use --adamw te-fp32")
    reason = "it needs a CUDA device" if device_type != "cuda" else te.unavailable()
    if reason is not None:
        raise BadInput(f"--adamw {choice}: {reason}; or use --adamw own")


class TEAdam(NamedOptimizer):
    """`transformer_engine.pytorch.optimizers.FusedAdam` over groups that each hold lr, betas, eps, weight_decay and master."""

    kind = "adamw"

    def __init__(self, groups: list[dict[str, Any]], choice: str) -> None:
        """Allocate all state.

        Args:
            groups: as for `AdamW`, all parameters on a GPU.
            choice: one of CHOICES but "own".

        Raises:
            ValueError: names do not match parameters.
            RuntimeError: Transformer Engine cannot be used here.
        """
        super().__init__(groups, {"steps": 0})
        check_names(self.param_groups)
        te.engine()
        from transformer_engine.pytorch.optimizers import FusedAdam

        moments = _MOMENTS.get(choice, torch.float32)
        self._fp8 = moments == torch.uint8
        self._fused = []
        for master in (False, True):
            parts = [
                {"params": [p for p in group["params"] if (group["master"] and p.dtype != torch.float32) == master]}
                for group in self.param_groups
            ]
            fused = FusedAdam(
                parts, master_weights=master, exp_avg_dtype=moments, exp_avg_sq_dtype=moments,
                store_param_remainders=choice == "te-remainders",
            )  # fmt: skip
            for p in (p for part in parts for p in part["params"]):
                fused.initialize_state(p, fused.store_param_remainders)
                self.state[p] = fused.state[p]  # the same dict
            self._fused.append(fused)
        for moment in self._fp8_moments():  # a transpose, for GEMMs, would double them
            moment._quantizer.set_usage(columnwise=False)
            moment.update_usage(rowwise_usage=True, columnwise_usage=False)

    def _fp8_moments(self) -> list[Any]:
        return [state[key] for state in self.state.values() for key in ("exp_avg", "exp_avg_sq")] if self._fp8 else []

    def named_state(self) -> dict[str, Tensor]:
        """Return `<name>.exp_avg`, `.exp_avg_sq` and, where there is one, `.master` or `.remainder`, as stored.

        Moments in FP8 are uint8 codes, each with a `.exp_avg_scale_inv` or `.exp_avg_sq_scale_inv` (1,) to multiply them by.
        """
        found: dict[str, Tensor] = {}
        for name, p in self.named_parameters():
            for key, value in self.state[p].items():
                if key == "master_param":
                    found[f"{name}.{'remainder' if value.dtype == torch.int16 else 'master'}"] = value
                elif self._fp8:
                    found[f"{name}.{key}"], found[f"{name}.{key}_scale_inv"] = value._data, value._scale_inv
                else:
                    found[f"{name}.{key}"] = value
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """Update every parameter from its gradient."""
        self.steps += 1
        for _, p in self.named_parameters():
            p.grad = gradient(p).contiguous()
        for fused in self._fused:
            for ours, theirs in zip(self.param_groups, fused.param_groups, strict=True):
                theirs.update({key: ours[key] for key in ("lr", "betas", "eps", "weight_decay")}, step=self.steps - 1)
            fused.step()
        for moment in self._fp8_moments():
            nothing = moment._quantizer.scale.isinf()  # its amax is 0: codes of 0·∞, which would be NaN
            moment._data.masked_fill_(nothing, 0)
            moment._scale_inv.masked_fill_(nothing, 1)
        torch.autograd.graph.increment_version([parameter for _, parameter in self.named_parameters()])

    def load_state_tensors(self, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """See `NamedOptimizer`. Moments must have been saved in this choice's form; masters follow the weights' dtype."""
        wanted = self.state_tensors()
        for name, parameter in self.named_parameters():
            key, rest = f"{name}.master", f"{name}.remainder"
            if key in wanted and rest in saved:
                theirs = "te-remainders" if saved[rest].dtype == torch.int16 else "own"
                raise BadInput(f"the checkpoint completes {name} by {rest}; resume with --adamw {theirs}")
            if key in wanted and key not in saved:
                wanted.pop(key).copy_(weights[name])
            elif key in saved and key not in wanted:
                parameter.detach().copy_(saved[key])
        missing = [key for key in wanted if key not in saved]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(f"the checkpoint lacks the optimizer state {missing[0]}{more}; resume with its own settings")
        for key, place in wanted.items():
            value = saved[key]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise BadInput(
                    f"the checkpoint's optimizer state {key} is {value.dtype} {tuple(value.shape)}, this run needs "
                    f"{place.dtype} {tuple(place.shape)}; resume with the settings it was saved with"
                )
            place.copy_(value)
        self.steps = int(wanted[f"{self.kind}.steps"])
