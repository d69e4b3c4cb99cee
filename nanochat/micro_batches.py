"""A step's micro-batches, each one launch: forward and backward are captured in CUDA graphs once, and replayed from then on.

A micro-batch is some 900 kernels, and Python needs about 90 µs for each: on an H200 d12's kernels took 76.5 ms of a micro-batch of
83.3, for the rest the GPU waited. Nothing in them depends on a number that the host must know, so the same launches, on the same
memory, do for every micro-batch.

* Two graphs share one pool of memory: a step's first micro-batch writes the gradients, further ones add to them. The gradients
  stay where they are; `zero_grad` takes them off the parameters, and the next first micro-batch puts them back.
* Autograd adds to a gradient tensor by tensor: 78 additions for d12's matrices, 8 µs each where memory would take 2. Here an FP8
  GEMM that makes a weight's gradient adds it itself (`Projection.adding`); other gradients of a further micro-batch's blocks are
  gathered first, while its activations go, and added in a few launches, the same bits.
* What the host decides by must stay: scales come from a history once there is one (`Scaling.seen`), FP8 copies of weights lie where
  optimizers write them. `ScalingState.fixed` says all of it; graphs are captured once two steps in a row began with the same, and
  another answer drops them. So the first steps run as ever, and compile what has to be compiled.
* The pool is the graphs' alone. Activations lie in it that nobody else can use the memory of, and the allocator counts them as
  free: `hidden` is what has to be added to what it says. What follows the micro-batches in a step may be captured into the same
  pool (`capture`): activations are dead by then, so Muon's workspace lies where they did.

Not captured are several processes (FP8 copies of what others own are cast anew each step, elsewhere), updates in the middle of
backward, and Transformer Engine, whose modules decide on the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nvfp8.precision import TEPrecision
from nvfp8.quantize import Projection
from nvfp8.rounding import BLOCK
from nvfp8.scaling import Scaling


def refusal(model: GPT, ranks: int = 1, update_early: bool = False) -> str | None:
    """Why a model's micro-batches are launched kernel by kernel on a GPU, or None where they can be captured.

    Args:
        model: on any device.
        ranks: processes that train it.
        update_early: `--update-early`.
    """
    if isinstance(model.precision, TEPrecision):
        return "Transformer Engine decides on the host"
    kinds = {site.kind for site in model.scaling.sites} if isinstance(model.scaling, Scaling) else set()
    if "weight" in kinds or (kinds and model.config.n_embd % BLOCK):
        return "not every weight's FP8 copies are written by an optimizer"
    if ranks > 1:
        return "several processes train"
    return "updates come in the middle of backward" if update_early else None


class _Captured(NamedTuple):
    replay: Callable[[], None]
    loss: Tensor


class MicroBatches:
    """Runs forward and backward of a model's micro-batches.

    Attributes:
        capturing: whether graphs are captured, as soon as that is possible.
        how: "CUDA graphs", or why not, to print.
        replaying: whether the step that has begun is made of graphs.
        behind: what whoever captures what follows keeps here, to be dropped with the micro-batches' graphs: None at first.
        prepared: what they have done of it ahead in this step, to be dropped when the next one begins.
        hidden: bytes in the graphs' pool that the allocator counts as free, and nobody else can have.
    """

    def __init__(self, model: GPT, singly: str | None):
        """Capture graphs once that is possible; with a reason to launch kernels `singly`, never."""
        if singly is None and not model.cos.is_cuda:
            singly = "there is no CUDA device"
        self.model, self.capturing = model, singly is None
        modules = [module for block in model.blocks for module in block.modules()]
        every = [projection for module in modules for projection in getattr(module, "projections", ())]
        self._projections = [projection for projection in every if isinstance(projection, Projection)]
        self.how = f"launched kernel by kernel: {singly}" if singly else "CUDA graphs"
        self._fixed: object = None
        self.prepared: Any = None
        self.replaying = False
        self._stream: torch.cuda.Stream | None = None
        self._drop()

    def _drop(self) -> None:
        self._captured: list[_Captured] = []
        self._pool: Any = None  # torch's id of it
        self.behind: Any = None
        self._gradients: list[Tensor | None] = []
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._scale, self.hidden = 0.0, 0

    def begin(self) -> None:
        """Before a step's first micro-batch, when no parameter has a gradient."""
        fixed = self.model.scaling.fixed() if self.capturing else None
        self.replaying = fixed is not None and fixed == self._fixed
        self._fixed, self._index, self.prepared = fixed, 0, None
        if not self.replaying:
            self._drop()

    def run(self, inputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Forward and backward of the step's next micro-batch.

        Args:
            inputs: (B, T) int64.
            targets: (B, T) int64, −1 ignored.
            scale: factor of the loss, 1 / accumulation steps / ranks; the same every time.

        Returns:
            The loss times `scale`, 0-D fp32; the next call may overwrite it.
        """
        which, self._index = min(self._index, 1), self._index + 1
        if not self.replaying:
            return self._forward_and_backward(inputs, targets, scale)
        if self._inputs is None:
            self._inputs, self._scale = (inputs.clone(), targets.clone()), scale
        if inputs.shape != self._inputs[0].shape or scale != self._scale:
            raise ValueError(f"captured were {tuple(self._inputs[0].shape)} tokens with a loss times {self._scale}")
        for mine, given in zip(self._inputs, (inputs, targets), strict=True):
            mine.copy_(given)
        if which == len(self._captured):
            self._capture(self._inputs)
        if which == 0:
            for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
                parameter.grad = gradient
        replay, loss = self._captured[which]
        replay()
        return loss

    def _forward_and_backward(self, inputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        loss: Tensor = self.model(inputs, targets, scale)
        added = {weight for projection in self._projections if projection.sums() is not None for weight in projection.weights}
        # Tables' gradients are added to past autograd, and lm_head's is large enough, and there while memory is short.
        held = [(p, p.grad) for block in self.model.blocks for p in block.parameters() if p.grad is not None and p not in added]
        for parameter, _ in held:
            parameter.grad = None
        for projection in self._projections:
            projection.adding = True
        try:
            loss.backward()
        finally:
            for projection in self._projections:
                projection.adding = False
        both = [(gradient, p.grad) for p, gradient in held if p.grad is not None]
        if both:
            sums, new = zip(*both, strict=True)
            torch._foreach_add_(sums, new)
        for parameter, gradient in held:
            parameter.grad = gradient
        return loss.detach()

    def _capture(self, inputs: tuple[Tensor, Tensor]) -> None:
        """Capture the first micro-batch of a step, or, once that is, a further one."""
        losses = list[Tensor]()
        replay = self.capture(lambda: losses.append(self._forward_and_backward(*inputs, self._scale)))
        self._captured.append(_Captured(replay, losses[0]))
        self._gradients = [parameter.grad for parameter in self.model.parameters()]

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function launches into the graphs' pool, in which what it leaves there is overwritten by the next replay.

        Nothing is computed.

        Args:
            launch: launches what comes next in a step, the same and in this order every time.

        Returns:
            What replays it.
        """
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:  # one for all, or memory would not be shared; with priority over what a graph has beside it
            self._stream = torch.cuda.Stream(priority=-1)
        # Other threads, which bring the next batch, may go on allocating pinned memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        self._pool = graph.pool()
        peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        self.hidden = max(self.hidden, peak - now)
        torch.cuda.reset_peak_memory_stats()
        return graph.replay
