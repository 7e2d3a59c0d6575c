"""TRL's SFTTrainer with our loss, our order of samples, our evaluation and our checkpoints.

TRL keeps the loop, the optimizer, the scheduler, accumulation and processes. Each method below replaces a stock one in
one respect, named in its docstring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerState, set_seed

from qwen_tune.artifacts.adapter_writer import AdapterWriter
from qwen_tune.data.packing import Packs
from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Interrupted, Problem, RunError, TrainingError
from qwen_tune.fused.compiled import compiling_layers
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.checkpoints import fault_of, step_of
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.resume import Plan
from qwen_tune.training.bad_steps import BadStep, StepWatch
from qwen_tune.training.batch_plan import Schedule
from qwen_tune.training.batches import BatchShape, PackCollator, SeededOrder, StepRows, count_fillers, pack_dataset
from qwen_tune.training.checkpointing import (
    SavedCheckpoints,
    load_optimizer,
    random_state,
    save_optimizer,
    set_random_state,
)
from qwen_tune.training.evaluation import EvaluatingTrainer, Evaluation
from qwen_tune.training.loss import add_supervised_loss
from qwen_tune.training.progress import Display, MetricsLog
from qwen_tune.training.recording import StopRequest
from qwen_tune.training.trainer_config import fuse_layers, sft_config, try_trainer_args

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"  # Transformers looks for it under this name


@dataclass
class TokenCounts:
    """Tokens that went through the model, over all processes; `padding` are those among them that no row has."""

    processed: int = 0
    padding: int = 0

    @property
    def real(self) -> int:
        """Those of rows."""
        return self.processed - self.padding


class LoraTrainer(EvaluatingTrainer):
    """Trains an adapter on rows of `pack_dataset`."""

    loss_is_scaled_for_ga = True

    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        recipe: Recipe,
        run: RunDir,
        schedule: Schedule,
        writer: AdapterWriter,
        rows: StepRows,
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.schedule = schedule
        self.writer = writer
        self.rows = rows
        self.counts = TokenCounts()
        self.stop = StopRequest(recipe.train.max_hours)
        self.stop_agreed = False
        self.saved = SavedCheckpoints(run, recipe.train.save_total_limit, lambda text: self.metrics.display.note(text))
        self.evaluations = []
        self.best: Evaluation | None = None  # of those that have a checkpoint
        add_supervised_loss(model, neftune_noise_alpha=recipe.train.neftune_noise_alpha)
        super().__init__(model=model, **kwargs)
        # TRL casts the trained tensors of a quantized model to bfloat16, in which small updates are lost.
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        writer.remember_start(self.model)
        self.fused = fuse_layers(self.model, recipe, schedule)
        self.watch = StepWatch(
            model.config.get_text_config().vocab_size,
            skips=recipe.train.on_bad_step == "skip",
            judges_gradients=self.accelerator.scaler is None,
            gather=self.accelerator.gather,
            rows_of=rows.places,
        )
        # Words between processes go past the GPUs: asking these would make each wait for its own.
        several = self.accelerator.num_processes > 1
        self.control_group = torch.distributed.new_group(backend="gloo") if several else None

    def train(self, checkpoint: Path | None = None) -> None:
        """Trains, from a checkpoint on where one is given; a signal ends it after a step and a checkpoint.

        Raises:
            Interrupted: It was asked to stop.
            TrainingError: A step that would ruin the model (see `bad_steps`), or layers that cannot be compiled.
        """
        if checkpoint is not None:
            self._load_progress(checkpoint)
            if step_of(checkpoint) >= self.schedule.max_steps or self.patience_is_over():
                self.writer.read(checkpoint, self.model)
                self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
                return
        try:
            with self.stop.listening(quiet=not is_main_process()), compiling_layers():
                super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.metrics.display.stop()
            self.saved.settle()
        if self.stop_agreed and self.state.global_step < self.schedule.max_steps:
            raise Interrupted(self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The summed loss over the step's labelled tokens, of all processes and micro-batches.

        The stock method waits for the GPU three times a micro-batch to keep entropy and accuracy; here nothing waits.
        Without `num_items_in_batch` (evaluation) the plain sum is returned.
        """
        nll: Tensor = model(**inputs)
        if num_items_in_batch is None:
            return nll
        # DDP averages gradients over processes, and the count is over all of them.
        scale: float = self.accelerator.num_processes / max(int(num_items_in_batch), 1)
        return nll * scale

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        """The labelled tokens of a step; the stock method counts labels that our batches do not carry.

        Tokens are counted here as well, and processes agree here on whether to stop after this step.
        """
        step = self.state.global_step + 1
        mine = self.rows.count(step, self.args.process_index)
        there = sum(batch["targets"].shape[0] for batch in batch_samples)
        assert there == mine.labels, f"step {step} has {there} labels here, and {mine.labels} by the order of its rows"
        everywhere = self.rows.count(step)
        self.counts.processed += everywhere.tokens
        self.counts.padding += everywhere.padding
        if self.control_group is not None:
            self.stop_agreed = self._any_process(self.stop.requested)
        self.saved.settle(wait=False)
        return everywhere.labels

    def _any_process(self, yes: bool) -> bool:
        """Whether one of the processes says yes."""
        if self.control_group is None:
            return yes
        said = torch.tensor(int(yes))
        torch.distributed.all_reduce(said, group=self.control_group)
        return bool(said)

    def must_stop(self) -> bool:
        """Whether this step is the last because someone asked for it; the same in all processes."""
        if self.accelerator.num_processes == 1:
            self.stop_agreed = self.stop.requested
        return self.stop_agreed

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The stock one; its loss is kept, on the device, to be looked at later."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The stock one, after the last micro-batch of a step: here a step that is to be left out loses its gradient.

        An optimizer passes over parameters without one, with their states and their decay.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.end_step(norm)
        if self.watch.skips and (bad := self._judge_steps(self.state.global_step + 1)):
            self.watch.require_good(bad)
            self.metrics.display.note(f"warning: step {bad[0].step} is left out: {bad[0]}")
            model.zero_grad(set_to_none=True)
        return norm

    def _judge_steps(self, last_step: int) -> list[BadStep]:
        bad = self.watch.judge(last_step)
        if bad and is_main_process():
            self.run.record({"bad_steps": self.watch.facts()})
        return bad

    def _require_good_steps(self) -> None:
        """Looks at the steps that nobody has looked at yet: what is saved or evaluated after a bad one is ruined."""
        self.watch.require_good(self._judge_steps(self.state.global_step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock one, with the mean loss over the steps that counted; a run may end here for what it sees."""
        if "loss" in logs:
            bad = self._judge_steps(self.state.global_step)
            logs["loss"] = self.watch.mean_loss()
            super().log(logs, start_time)
            self.watch.require_good(bad)
        else:
            super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """An order that depends on seed and epoch alone; the stock one depends on the generator's history."""
        order = self.rows.sampler
        return SeededOrder(order.rows, order.fillers, order.seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the stock estimate walks over all parameters for every micro-batch."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """LoRA+ gives the `B` matrices a learning rate of their own."""
        ratio = self.recipe.train.loraplus_lr_ratio
        if ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(
            self.model,
            optimizer_class,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            loraplus_lr_embedding=self.args.learning_rate,
            **settings,
        )
        return self.optimizer

    def loss_before(self, plan: Plan) -> float | None:
        """The evaluation loss before the first step, which a run that goes on has recorded."""
        if plan.checkpoint is not None:
            recorded: float | None = self.run.facts.get("losses", {}).get("eval_before")
            return recorded
        before = self.evaluation_loss()
        if is_main_process():
            self.run.record({"losses": {"eval_before": before}})
        return before

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `EvaluatingTrainer`.

        Raises:
            TrainingError: The loss is not finite, or a step before it would ruin the model.
        """
        self._require_good_steps()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint of safetensors and JSON, whole or not at all; the stock one pickles its arguments and states.

        Raises:
            TrainingError: A step before it would ruin the model, or it does not fit on the disk.
        """
        self._require_good_steps()
        randoms = gather_object([random_state()]) if self.accelerator.num_processes > 1 else [random_state()]
        latest = self.evaluations[-1] if self.evaluations else None
        if latest and latest.step == self.state.global_step and (self.best is None or latest.loss < self.best.loss):
            self.best = latest
        failure: TrainingError | None = None
        if is_main_process():
            best_step = self.best.step if self.best else None
            try:
                with self.metrics.paused():
                    self.saved.save(
                        self.state.global_step, best_step, lambda directory: self._write_checkpoint(directory, randoms)
                    )
            except TrainingError as error:
                failure = error
        # Each waits here for the first one, and ends with it.
        if self._any_process(failure is not None):
            raise failure or TrainingError("the first process could not save", met_by_all=True)

    def _write_checkpoint(self, directory: Path, randoms: Sequence[Mapping[str, Any]]) -> None:
        self.writer.write(directory, self.model)
        save_optimizer(directory, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
        progress = {
            "counts": vars(self.counts),
            "seconds": self.metrics.seconds,
            "evaluations": [vars(evaluation) for evaluation in self.evaluations],
            "best": vars(self.best) if self.best else None,
            "start_sha256": self.writer.start_sha256(),
            "random": randoms,
        }
        (directory / PROGRESS).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        self.state.save_to_json(str(directory / TRAINER_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter's tensors; the stock method also takes pickles."""
        self.writer.read(Path(resume_from_checkpoint), self.model)

    def _load_progress(self, checkpoint: Path) -> None:
        """What the run has counted, met and evaluated up to a checkpoint."""
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        if progress["start_sha256"] != self.writer.start_sha256():
            what = "the adapter's start cannot be made again here as it was (another machine or library version)"
            raise RunError(Problem(str(checkpoint), what, "resume where the run was begun"))
        self.watch.restore(self.run.recorded_facts().get("bad_steps", []), step_of(checkpoint))
        if is_main_process():
            self.run.record({"bad_steps": self.watch.facts()})
        self.counts = TokenCounts(**progress["counts"])
        self.evaluations = [Evaluation(**evaluation) for evaluation in progress["evaluations"]]
        best = Evaluation(**progress["best"]) if progress["best"] else None
        # It may have been rotated away since, for a better one that this run has gone back after.
        self.best = best if best and (best.step == step_of(checkpoint) or not self._fault_of_best(best)) else None
        self.metrics.restore(progress["seconds"], self.counts.real)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From safetensors and JSON."""
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Of this process, from JSON."""
        if checkpoint is not None:
            progress = json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
            states = progress["random"]
            if self.args.process_index < len(states):  # of more processes than before, the new ones begin as they are
                set_random_state(states[self.args.process_index])

    def _fault_of_best(self, best: Evaluation) -> str | None:
        return fault_of(self.run.checkpoints / f"step-{best.step}")

    def load_best(self) -> None:
        """Takes the adapter of the checkpoint with the lowest evaluation loss, where the recipe wants that."""
        wanted = self.recipe.train.load_best_model_at_end
        if not wanted or self.best is None or self.best.step == self.state.global_step:
            return
        if fault := self._fault_of_best(self.best):
            self.metrics.display.note(f"warning: the best checkpoint is damaged ({fault}); the last adapter stays")
            return
        self.writer.read(self.run.checkpoints / f"step-{self.best.step}", self.model)
        self.evaluations.append(Evaluation(self.state.global_step, self.best.loss))
        self.metrics.display.note(
            f"the adapter is that of step {self.best.step}, with the lowest evaluation loss ({self.best.loss:.4f})"
        )


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    run: RunDir,
    schedule: Schedule,
    packs: Packs,
    evaluation_packs: Mapping[str, Packs],
    adapter: LoraConfig,
    writer: AdapterWriter,
) -> LoraTrainer:
    """Puts the adapter on the model and makes a trainer that is ready to train.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        recipe: The recipe.
        run: Where the run's files go.
        schedule: Batch and steps.
        packs: The rows to train on.
        evaluation_packs: The rows to evaluate on, by the names of their sources.
        adapter: What to put on the model.
        writer: Writes and reads the adapter.

    Raises:
        RecipeError: Optimizer, scheduler or loader refuse what the recipe says.
    """
    rows = schedule.num_processes * schedule.per_device_train_batch_size if schedule.num_processes > 1 else 1
    pad_id = int(tokenizer.pad_token_id)
    evaluation = {name: pack_dataset(source, multiple=rows, pad_id=pad_id) for name, source in evaluation_packs.items()}
    shape = None
    if recipe.train.torch_compile:
        shape = BatchShape.holding(packs, schedule.per_device_train_batch_size, recipe.data.max_length_tokens)
    # The adapter's matrices are random, and TRL 1.14 seeds only after it has made them (1.16 before).
    set_seed(recipe.train.seed)
    trainer = LoraTrainer(
        model,
        recipe=recipe,
        run=run,
        schedule=schedule,
        writer=writer,
        rows=StepRows(packs, schedule, count_fillers(len(packs), rows), recipe.train.seed, shape),
        args=sft_config(recipe, schedule, model.dtype),
        train_dataset=pack_dataset(packs, multiple=rows, pad_id=pad_id),
        eval_dataset=evaluation or None,
        data_collator=PackCollator(shape, pad_id),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.metrics = MetricsLog(run, trainer, Display(quiet=not is_main_process()))
    trainer.add_callback(trainer.metrics)
    try_trainer_args(trainer, recipe, schedule)
    return trainer
