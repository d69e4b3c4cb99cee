"""Pretraining, from flags to a finished run: build everything once, then one straight loop.

Each step: micro-batches accumulate gradients, ranks sum them, the optimizers update what their rank owns. Loss, gradient norm
and whether all was finite come back to the host in between, where the GPU and Python wait for each other; in FP8 the amaxes come
next. A step with a non-finite loss or gradient is not applied.

A step begins with what is due before it (validation, sample, checkpoint), so the checkpoint of step n is the state after n
updates, and a run resumed from it goes on as if it had never stopped.

With --update-early backward itself updates (`nvfp8/optim/early.py`), so a step can be refused in part only.

Ranks agree once a step, before what is due: whether a signal asked to stop, and whether one met a failure (rank 0 alone
writes metrics). All of them then end, rather than wait for one that is gone.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from nanochat import ahead, checkpoint, gauges, memory, parallel, process, report, run_page, schedule, step_profile
from nanochat.build import build_model, build_optimizers, check_tokenizer, choose_precision, config_of, load_weights
from nanochat.clock import Clock
from nanochat.dataloader import BatchLoader
from nanochat.dataset import Split, base_dir, resolve
from nanochat.earlier_runs import move_earlier_run, set_aside_after
from nanochat.errors import BadInput
from nanochat.evaluate import bits_per_byte
from nanochat.generate import PROMPTS, continuations
from nanochat.metrics import Metrics, StepRecord, require_wandb
from nanochat.micro_batches import MicroBatches, refusal
from nanochat.optimizer import StoredByName
from nanochat.param_groups import backward_position, groups, ownership, set_hyperparameters
from nanochat.plan import make_plan
from nanochat.shards import open_or_build, unigram_bits_per_byte
from nanochat.signals import StopRequest
from nanochat.te_adam import check as check_adamw
from nanochat.tokenizer import Tokenizer
from nanochat.train_config import TrainConfig
from nanochat.updates import Updates
from nvfp8.optim import UpdateEarly

WARMUP_STEPS = 3  # of this process: kernels are compiled, memory is taken; they say nothing about its speed


@dataclass
class Progress:
    """What a checkpoint must know of the loop besides tensors.

    Attributes:
        step: updates done, skipped ones included.
        best_bpb: lowest validation loss, bits per byte; None before there is a finite one.
        bad_steps: non-finite steps in a row.
        seconds: time spent training, evaluation and checkpoints not counted.
    """

    step: int = 0
    best_bpb: float | None = None
    bad_steps: int = 0
    seconds: float = 0.0


class Run:
    """One training run on one rank: what was built, and what is done with it."""

    def __init__(self, config: TrainConfig, world: parallel.World, directory: Path | None = None):
        """Build data, model and optimizers, and load the checkpoint to resume from.

        Args:
            config: the flags.
            world: this process among all.
            directory: what the run writes to; None is the tag's, below the base directory.

        Raises:
            BadInput: something the flags ask for cannot be had.
        """
        self.config, self.world = config, world
        self.metrics: Metrics | None = None
        self.failure: Exception | None = None
        with parallel.together():
            # First what no other flag can mend; the width does not depend on the vocabulary.
            tokens, width = config.device_batch_size * config.max_seq_len, config.shape(1).n_embd
            precision, why = choose_precision(config.precision, world.device.type, config.engine, (tokens, width))
            self.tokenizer = Tokenizer.load(config.tokenizer or base_dir() / "tokenizer")
            source = resolve(config.data)
            shape = config.shape(self.tokenizer.vocab_size)
            check_adamw(config.adamw, world.device.type, precision.matrix_dtype)
            precision = config.formats(precision).stored_by(precision, world.device.type, config.adamw)
            self.token_bytes = self.tokenizer.token_bytes().to(world.device)
            self.model = build_model(shape, precision, world.device, config.attention, config.seed)
            self.plan = make_plan(config, self.model, world.size)
            if config.update_early and self.plan.accumulation * world.size != 1:
                parts = f"{self.plan.accumulation} micro-batches on {world.size} ranks"
                raise BadInput(
                    f"--update-early: a step must be one micro-batch of one process, this one is {parts}: see --total-batch-size"
                )
        say = print if world.rank == 0 else lambda line: None
        self.store = open_or_build(source, self.tokenizer, base_dir() / "shards", say)
        self.unigram = unigram_bits_per_byte(self.store, self.tokenizer.token_bytes())
        ahead.compile_kernels(self.model, config.device_batch_size, config.adamw, config.formats(precision))  # while memory is free
        self._build_optimizers()
        self.directory = directory or base_dir() / "base_checkpoints" / config.tag
        self.progress = Progress()
        self.changed: list[str] = []
        loader_state = self._resume()
        parallel.broadcast_parameters(self.parameters, self.owner)  # one truth, also among unlike devices
        self.start_step = self.progress.step
        with parallel.together():
            if config.profile and self.plan.steps - self.start_step <= WARMUP_STEPS:
                raise BadInput(f"--profile looks at a step behind {WARMUP_STEPS} of warm-up: this run has too few left")
            if config.run != "dummy":
                require_wandb()  # before anything is moved
            self.batches = self._loader("train", loader_state)
            if world.rank == 0:
                if not self._resuming and (moved := move_earlier_run(self.directory)):
                    say(moved)
                self.metrics = self._open_metrics()
        self._introduce(why, source.describe())
        self.clock = Clock(world.device)

    def _build_optimizers(self) -> None:
        config, model = self.config, self.model
        all_groups = groups(
            model, model.config, embedding_lr=config.embedding_lr, unembedding_lr=config.unembedding_lr,
            matrix_lr=config.matrix_lr, scalar_lr=config.scalar_lr, weight_decay=self.plan.weight_decay,
            batch_lr_scale=schedule.batch_lr_scale(self.plan.batch_tokens),
        )  # fmt: skip
        # In the order in which backward reaches them: what is not finite spreads that way, so the first bad name is
        # the closest to where it arose.
        self.parameters = dict(sorted(model.named_parameters(), key=lambda item: backward_position(item[0])))
        self.owner = ownership(all_groups, self.world.size)
        formats = config.formats(model.precision)
        self.optimizers = build_optimizers(
            all_groups, self.owner, self.world.rank, model.precision.compute_dtype, config.adamw, formats, config.seed
        )
        own = [optimizer for optimizer in self.optimizers if isinstance(optimizer, StoredByName)]
        self.early = UpdateEarly(own) if config.update_early else None
        singly = "--no-cuda-graphs" if config.no_cuda_graphs else refusal(model, self.world.size, config.update_early)
        self.micro_batches = MicroBatches(model, singly)
        self.updates = Updates(self.optimizers, self.micro_batches)

    @property
    def _resuming(self) -> bool:
        return self.config.resume or self.config.resume_from_step >= 0

    def _resume(self) -> dict[str, Any] | None:
        """Load weights, optimizer state, progress and random state if asked; return the data position."""
        if not self._resuming:
            return None
        path = Path(parallel.from_rank_0(self._find))
        with parallel.together():
            return self._load(checkpoint.Checkpoint(path))

    def _find(self) -> str:
        """The path of the checkpoint to resume from. All its files are read and hashed: by one rank."""
        step = None if self.config.resume else self.config.resume_from_step
        path = checkpoint.find(self.directory, step).path
        if step is not None:
            set_aside_after(self.directory, step)
        return str(path)

    def _load(self, saved: checkpoint.Checkpoint) -> dict[str, Any]:
        """Take everything from the checkpoint but the data position, and return that."""
        shape, config = config_of(saved), self.config
        if shape != self.model.config:
            raise BadInput(f"{saved.path} holds another shape, {shape}: give its --depth and the like, or another --model-tag")
        check_tokenizer(self.tokenizer, saved)
        if "progress" not in saved.state:
            raise BadInput(f"{saved.path} holds weights only, no optimizer state: it can be evaluated and sampled, not resumed")
        load_weights(self.model, saved)
        state, weights = saved.optimizer(), saved.model()
        for optimizer in self.optimizers:
            optimizer.load_state_tensors(state, weights)
        try:
            self.model.load_scaling_state(saved.scaling())
        except ValueError as error:
            raise BadInput(f"{saved.path} cannot go on with --recipe {config.recipe}: {error}") from error
        self.progress = Progress(**saved.state["progress"])
        if self.progress.best_bpb == math.inf:  # how earlier versions wrote None
            self.progress.best_bpb = None
        before, now = asdict(TrainConfig()) | saved.state["train_config"], asdict(config)  # what did not exist was as by default
        names = now.keys() - {"resume", "resume_from_step", "profile"}  # none of which changes what the run comes to
        self.changed = [f"{name} {before[name]} -> {now[name]}" for name in sorted(names) if before[name] != now[name]]
        checkpoint.set_rng_state(saved.state["rng"])
        return saved.state["data"]["position"]

    def _loader(self, split: Split, state: dict[str, Any] | None = None) -> BatchLoader:
        return BatchLoader(
            self.store.split(split), self.config.device_batch_size, self.config.max_seq_len, rank=self.world.rank,
            world_size=self.world.size, device=self.world.device, seed=self.config.seed, state=state,
        )  # fmt: skip

    def _open_metrics(self) -> Metrics:
        name = None if self.config.run == "dummy" else self.config.run
        asked = {**asdict(self.config), "plan": asdict(self.plan), "model": asdict(self.model.config), **self.layers()}
        asked["unigram_bits_per_byte"] = self.unigram
        return Metrics(self.directory, self.plan.steps, asked, wandb_run=name, start_step=self.start_step)

    def layers(self) -> dict[str, str]:
        """What every part of the model really runs in."""
        precision = self.model.precision
        layers = {**precision.describe(), "attention": self.model.describe_attention(), "AdamW": self.config.adamw}
        layers |= {"micro-batches": self.micro_batches.how, "optimizers": self.updates.how}
        return {**layers, **self.config.formats(precision).describe(precision, self.config.adamw)}

    def _tell(self, what: Callable[[Metrics], None]) -> None:
        """Record something on rank 0. What that fails with waits until the ranks next agree: the others cannot know of it."""
        if self.metrics is None or self.failure is not None:
            return
        try:
            what(self.metrics)
        except Exception as error:
            self.failure = error

    def say(self, text: str) -> None:
        """Print and record a line, on rank 0."""
        self._tell(lambda metrics: metrics.message(text))

    def _leave(self, status: int) -> NoReturn:
        """Exit on all ranks."""
        parallel.agree(self.failure)
        sys.exit(status)

    def _introduce(self, why: str, data: str) -> None:
        model, plan, config = self.model, self.plan, self.config
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        counts = ", ".join(f"{name} {count:,}" for name, count in model.parameter_counts().items())
        self.say(f"device: {self.world.size} x {device}; precision {model.precision.name} ({why})")
        self.say("runs: " + "; ".join(f"{part} {what}" for part, what in self.layers().items()))
        self.say(f"data: {data}; tokenizer: {self.tokenizer.vocab_size:,} entries")
        self.say(f"parameters: {counts}; {model.flops_per_token():.3g} FLOPs per token")
        self.say(f"plan: {plan.describe(config, self.world.size)}")
        if config.core_metric_every > 0:
            self.say("CORE is not evaluated here: --core-metric-every has no effect (-1 silences this line)")
        if self.start_step:
            self.say(f"resumed from {self.directory} at step {self.start_step}")
        if self.changed:
            self.say(f"changed since it was saved: {', '.join(self.changed)}")

    def loop(self) -> None:
        """Train to the end, or to a signal.

        Raises:
            SystemExit: 1 after too many non-finite steps in a row, 128 + number after a signal, and where another rank
                failed, its status.
        """
        profiled = self.start_step + WARMUP_STEPS if self.config.profile and self.world.rank == 0 else None
        try:
            with StopRequest(speaks=self.world.rank == 0) as request:
                while (step := self.progress.step) < self.plan.steps:
                    self._before_step(step, request)
                    (self._profile if step == profiled else self.step)()
                self._before_step(self.plan.steps, request)
            self._tell(self._finish)
            parallel.agree(self.failure)
        finally:
            self.batches.close()
            if self.metrics is not None:
                self.metrics.close()

    def _before_step(self, step: int, request: StopRequest) -> None:
        """Do what is due after `step` updates; leave the loop here if a signal asked for it."""
        config, last = self.config, step == self.plan.steps
        stop = parallel.agree(self.failure, request.signal is not None)
        if config.eval_every > 0 and not stop and (last or step % config.eval_every == 0):
            with self.clock.stopped():
                stop = not self._evaluate(request)
        if config.sample_every > 0 and not stop and step > 0 and (last or step % config.sample_every == 0):
            with self.clock.stopped():
                self._tell(self._sample)
        due = last or (step > 0 and config.save_every > 0 and step % config.save_every == 0)
        if (due or stop) and (step != self.start_step or step == 0):
            with self.clock.stopped():
                self._save()
        if stop:
            signal = request.signal
            who = signal.name if signal else "a signal to another rank"
            self.say(f"stopped by {who}: step {step} is saved, --resume goes on from it")
            self._leave(128 + (signal.value if signal else 15))

    def step(self) -> None:
        """One update from `accumulation` micro-batches, and its record, which is written while the GPU still updates."""
        step, plan, config = self.progress.step, self.plan, self.config
        multiplier = schedule.lr_multiplier(step, plan.steps, config.warmup_steps, config.warmdown_ratio, config.final_lr_frac)
        self._set_rates(multiplier)
        check = self._backward() if self.early is None else self._backward_and_update(self.early)
        seconds = self._seconds = self.clock.lap()
        bad = check.bad if math.isfinite(check.loss) else "the loss"
        if bad is not None:
            self.model.scaling.forget()
        elif cast := self.model.scaling.update():  # a cast saturates: what was not finite may leave finite gradients behind
            bad = f"{cast[0]}, cast to FP8,"
        elif self.early is None:
            self.updates.step()
            parallel.broadcast_parameters(self.parameters, self.owner)
        self.model.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.seconds += seconds
        self._tell(lambda metrics: self._record(metrics, step, check.loss, multiplier, seconds, check.norm))
        self._count_bad(step, bad)
        if step == self.start_step:
            process.stop_collecting()

    def _profile(self) -> None:
        """One update under the profiler, on rank 0; the others wait for it in theirs, so what it alone may meet waits too."""
        directory, device, usual = self.directory / "profile", self.world.device, self._seconds

        def write(metrics: Metrics) -> None:
            least = step_profile.floor_of(self.config, self.model, self.plan.accumulation, self.world.size)
            metrics.message("\n".join(["profile of one step", *step_profile.write(done, directory, least, usual)]))

        def step() -> None:
            self.clock.restart()  # the profiler takes long to begin, and to end
            self.step()

        with self.clock.stopped():
            self._tell(lambda _: step_profile.begin(directory, device))
        done = step_profile.recorded(step, device)
        self._tell(write)
        self.clock.restart()

    def _backward(self) -> parallel.GradientCheck:
        """Gradients of `accumulation` micro-batches, summed over ranks and looked at."""
        loss_sum = torch.zeros((), device=self.world.device)
        self.micro_batches.begin()
        for _ in range(self.plan.accumulation):
            loss_sum += self.micro_batches.run(*next(self.batches), 1 / (self.plan.accumulation * self.world.size))
        self.updates.prepare()
        parallel.reduce_gradients(self.parameters, self.owner)
        return parallel.check_gradients(self.parameters, self.owner, loss_sum)

    def _backward_and_update(self, early: UpdateEarly) -> parallel.GradientCheck:
        """The one micro-batch of a step whose backward updates as it goes; the loss is looked at before."""
        loss = self.model(*next(self.batches))
        value = loss.item()
        early.begin()
        if math.isfinite(value):
            loss.backward()
        else:
            early.bad = "the loss"
        return parallel.GradientCheck(early.finish(), early.bad, value)

    def _set_rates(self, multiplier: float) -> None:
        step, plan = self.progress.step, self.plan
        for optimizer in self.optimizers:
            set_hyperparameters(
                optimizer.param_groups, lr_multiplier=multiplier,
                muon_momentum=schedule.muon_momentum(step, plan.steps, self.config.warmdown_ratio),
                muon_weight_decay=schedule.muon_weight_decay(step, plan.steps, plan.weight_decay),
            )  # fmt: skip

    def _count_bad(self, step: int, bad: str | None) -> None:
        progress = self.progress
        progress.bad_steps = 0 if bad is None else progress.bad_steps + 1
        if bad is None:
            return
        what = bad if bad.startswith("the ") else f"the gradient of {bad}"
        left = "the step is not applied"
        if self.early is not None and self.early.updated:
            left = f"{self.early.updated} of {len(self.parameters)} parameters were updated before it, the others are not"
            for optimizer in self.optimizers:
                optimizer.steps = optimizer.steps  # one made in part counts for all: a checkpoint holds one count
        self.say(f"step {step}: {what} is not finite, {left} ({progress.bad_steps} in a row)")
        if progress.bad_steps >= self.config.max_bad_steps:
            self.say(f"stopping after {progress.bad_steps} such steps; the last good checkpoint in {self.directory} is as it was")
            self._leave(1)

    def _record(self, metrics: Metrics, step: int, loss: float, multiplier: float, seconds: float, norm: float) -> None:
        rate = self.plan.batch_tokens / seconds
        metrics.step(
            StepRecord(
                step=step, loss=loss, lr_multiplier=multiplier, seconds=seconds, tokens=self.plan.batch_tokens,
                tokens_per_second=rate, mfu=gauges.mfu(rate, self.model, self.world.size),
                memory_gib=gauges.peak_gib(self.world.device, self.micro_batches.hidden), epoch=self.batches.epoch, grad_norm=norm,
                eta_seconds=self.clock.estimate(step + 1 - self.start_step - WARMUP_STEPS, self.plan.steps - step - 1),
            )
        )  # fmt: skip

    def _evaluate(self, request: StopRequest) -> bool:
        """Measure and record the validation loss; False if a signal to any rank ended that early."""
        config = self.config
        micro_tokens = config.device_batch_size * config.max_seq_len * self.world.size
        steps = max(1, min(config.eval_tokens, self.store.split("val").total_tokens) // micro_tokens)
        batches = self._loader("val")
        try:
            # Asked once a batch: the ranks exchange one number for it, one process alone asks nobody.
            bpb = bits_per_byte(self.model, batches, steps, self.token_bytes, lambda: parallel.any_rank(request.signal is not None))
        finally:
            batches.close()
        if bpb is None:
            return False
        best = self.progress.best_bpb
        if math.isfinite(bpb) and (best is None or bpb < best):
            self.progress.best_bpb = bpb
        self._tell(lambda metrics: metrics.evaluation(self.progress.step, bpb))
        return True

    def _sample(self, metrics: Metrics) -> None:
        for text in continuations(self.model, self.tokenizer, PROMPTS):
            metrics.sample(self.progress.step, text)

    def _save(self) -> None:
        optimizer = {name: value for part in self.optimizers for name, value in part.state_tensors().items()}
        state = {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "plan": asdict(self.plan),
            "layers": self.layers(),
            "tokenizer": {"fingerprint": self.tokenizer.fingerprint, "vocab_size": self.tokenizer.vocab_size},
            "data": {"source": self.config.data, "position": self.batches.state_dict()},
            "progress": asdict(self.progress),
            "rng": checkpoint.rng_state(),
            "environment": checkpoint.environment(),
        }
        path = checkpoint.save(
            self.directory, self.progress.step, self.model.state_dict(), optimizer, state,
            scaling=self.model.scaling_state(), keep=self.config.keep, rank=self.world.rank, world=self.world.size,
        )  # fmt: skip
        self.say(f"saved {path}")

    def _finish(self, metrics: Metrics) -> None:
        best = self.progress.best_bpb
        if best is not None:
            metrics.message(f"best validation loss {best:.4f} bits per byte; token frequencies alone reach {self.unigram:.4f}")
        measured = gauges.peak_gib(self.world.device, self.micro_batches.hidden)
        peak = memory.beside(metrics, self.config, self.model, self.plan.accumulation, self.world.size, measured)
        report.draw(self.directory)
        metrics.message(f"trained for {self.progress.seconds:.0f} s, {peak}; report in {run_page.write(self.directory)}")


def train(config: TrainConfig) -> None:
    """Run a pretraining job as `config` says; every rank calls this.

    Raises:
        BadInput: something the user asked for cannot be done.
        SystemExit: as `Run.loop`.
    """
    with process.restored():
        if config.deterministic:
            process.make_deterministic()
        world = parallel.init(config.device_type)
        try:
            Run(config, world).loop()
        finally:
            parallel.shutdown()
