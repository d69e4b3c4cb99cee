"""The optimizers' step, one launch: captured in a CUDA graph behind the micro-batches' and replayed from then on.

AdamW and Muon launch some 300 kernels a step at d24, and on a machine with a slow host took 38 to 44 ms for 33 to 35 ms of work.
Rates and keys of rounding are numbers that kernels read from memory (`nvfp8/optim/update.py`), so a step is an upload for each
optimizer, and the replay. All but the replay can be done while the GPU still works on the micro-batches (`Updates.prepare`). Behind
them the host waits to see whether the step is to be made; what it did only then, 3 to 4 ms at d24, the GPU would wait for in turn.

It is captured in the first step whose micro-batches are replayed: then gradients lie where they always will, and every kernel has
been launched before, which is what loads it. The micro-batches' graphs being dropped, it is dropped with them; and where anything
else has moved (`StoredOptimizer.fixed`), that step is launched kernel by kernel, and the next captured anew.
"""

from collections.abc import Sequence

import torch

from nanochat.micro_batches import MicroBatches
from nanochat.optimizer import NamedOptimizer, StoredByName
from nvfp8.optim.update import Replayed, repeatable


class Updates:
    """Runs the steps of a model's optimizers.

    Attributes:
        how: "CUDA graphs", or why not, to print.
    """

    def __init__(self, optimizers: Sequence[NamedOptimizer], micro_batches: MicroBatches):
        """Replay steps where `micro_batches` are replayed and all `optimizers` are ours."""
        self._optimizers, self._micro_batches = optimizers, micro_batches
        self._own = [optimizer for optimizer in optimizers if isinstance(optimizer, StoredByName)]
        foreign = micro_batches.capturing and len(self._own) < len(optimizers)
        self.how = "launched kernel by kernel: Transformer Engine's AdamW decides on the host" if foreign else micro_batches.how

    def prepare(self) -> None:
        """Do what can be done before it is known whether the step is made; all its micro-batches have been launched.

        Rates are set. Until `step` nothing may change but scales (`Scaling.update`). A step that is then not made is as if this had
        not been called, and a step for which it was not called does all of it itself.
        """
        graphs = self._micro_batches
        if graphs.behind is not None:
            graphs.prepared = graphs.behind.prepare()

    def step(self) -> None:
        """Update every parameter; all micro-batches of the step have run."""
        graphs = self._micro_batches
        if graphs.replaying and len(self._own) == len(self._optimizers):
            if graphs.behind is None and repeatable(self._own):
                graphs.behind = Replayed(self._own)
            # As PyTorch marks a step, for `step_profile.py`.
            with torch.profiler.record_function("Optimizer.step#replayed"):
                prepared, graphs.prepared = graphs.prepared, None
                if graphs.behind is not None and graphs.behind.step(graphs.capture, prepared):
                    return
            graphs.behind = None
        for optimizer in self._optimizers:
            optimizer.step()
