"""TRL's SFTTrainer with our loss, our order of packs, our evaluation and our checkpoints.

TRL keeps the loop, the optimizer, the scheduler, accumulation and processes. Each method below replaces a stock one in
one respect, named in its docstring; what it does stands in the objects that the constructor is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerControl, TrainerState, set_seed
from trl import SFTTrainer

from qwen_tune.artifacts.adapter_writer import AdapterWriter
from qwen_tune.compat import check_trainer
from qwen_tune.distributed.engine import adapter_tensors, gather_objects, optimizer_state
from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Interrupted, Problem, RunError, TrainingError
from qwen_tune.evaluation.chat import greedy_answer
from qwen_tune.evaluation.held_out import held_out_losses
from qwen_tune.fused.compiled import compiling_layers
from qwen_tune.runs.checkpoints import fault_of, step_of
from qwen_tune.training.bad_steps import BadStep, StepWatch
from qwen_tune.training.batches import BatchShape, PackCollator, SeededOrder, StepPacks, count_fillers, pack_dataset
from qwen_tune.training.checkpointing import (
    SavedCheckpoints,
    load_optimizer,
    random_state,
    save_optimizer,
    set_random_state,
)
from qwen_tune.training.evaluation import Evaluations
from qwen_tune.training.loss import add_supervised_loss
from qwen_tune.training.progress import Display, MetricsLog
from qwen_tune.training.steps import Steps, StopRequest, TokenCounts
from qwen_tune.training.trainer_config import fuse_layers, sft_config, try_trainer_args

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from qwen_tune.training.job import Job

PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"  # Transformers looks for it under this name
PROMPT_ANSWER_TOKENS = 128


class LoraTrainer(SFTTrainer):
    """Trains an adapter on packs of `pack_dataset`.

    Args:
        model: The base model.
        job: What trains.
        writer: Writes and reads the adapter.
        steps: Counts the tokens of steps, and agrees on the last one.
        metrics: Writes and shows what is measured.
        **kwargs: SFTTrainer's.
    """

    loss_is_scaled_for_ga = True

    control: TrainerControl
    data_collator: Any
    optimizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        job: Job,
        writer: AdapterWriter,
        steps: Steps,
        metrics: MetricsLog,
        **kwargs: Any,
    ) -> None:
        check_trainer(SFTTrainer)
        self.job = job
        self.writer = writer
        self.steps = steps
        self.metrics = metrics
        self.evaluations = Evaluations(job.recipe.train, job.base.id)
        self.saved = SavedCheckpoints(job.run, job.recipe.train.save_total_limit, metrics.display.note)
        add_supervised_loss(model, neftune_noise_alpha=job.recipe.train.neftune_noise_alpha)
        super().__init__(model=model, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(metrics)
        # TRL casts the trained tensors of a quantized model to bfloat16, in which small updates are lost.
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        writer.remember_start(adapter_tensors(self.model))
        self.fused = fuse_layers(self.model, job.recipe, job.schedule)
        self.watch = StepWatch(
            model.config.get_text_config().vocab_size,
            skips=job.recipe.train.on_bad_step == "skip",
            judges_gradients=self.accelerator.scaler is None,
            gather=self.accelerator.gather,
            places_of=steps.packs.places,
        )
        steps.connect(self.accelerator)

    def train(self, checkpoint: Path | None = None) -> None:
        """Trains, from a checkpoint on where one is given; a signal ends it after a step and a checkpoint.

        Raises:
            Interrupted: It was asked to stop.
            TrainingError: A step that would ruin the model (see `bad_steps`), or layers that cannot be compiled.
        """
        if checkpoint is not None:
            self._load_progress(checkpoint)
            if step_of(checkpoint) >= self.job.schedule.max_steps or self.evaluations.patience_is_over():
                self.writer.read(checkpoint, self.model)
                self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
                return
        try:
            with self.steps.stop.listening(quiet=not is_main_process()), compiling_layers():
                super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.metrics.display.stop()
            self.saved.settle()
        if self.steps.stop_agreed and self.state.global_step < self.job.schedule.max_steps:
            raise Interrupted(self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The summed loss over the step's supervised tokens, of all processes and micro-batches.

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
        """The supervised tokens of a step, from `Steps`; the stock method counts labels that our batches have not."""
        self.saved.settle(wait=False)
        return self.steps.begin(self.state.global_step + 1, batch_samples)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The stock one; its loss is kept, on the device, to be looked at later."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The stock one, after the last micro-batch of a step: a step that is to be skipped loses its gradient here.

        An optimizer passes over parameters without one, with their states and their decay.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.end_step(norm)
        if self.watch.skips and (bad := self._judge_steps(self.state.global_step + 1)):
            self.watch.require_good(bad)
            self.metrics.display.note(f"warning: step {bad[0].step} is skipped: {bad[0]}")
            model.zero_grad(set_to_none=True)
        return norm

    def _judge_steps(self, last_step: int) -> list[BadStep]:
        bad = self.watch.judge(last_step)
        if bad and is_main_process():
            self.job.run.record({"bad_steps": self.watch.facts()})
        return bad

    def _require_good_steps(self) -> None:
        """Checks the steps since the last check: whatever is saved or evaluated after a bad one is ruined."""
        self.watch.require_good(self._judge_steps(self.state.global_step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock one, with the mean loss over the steps that counted; a run may end here for what it sees."""
        bad: list[BadStep] = []
        if "loss" in logs:
            bad = self._judge_steps(self.state.global_step)
            logs["loss"] = self.watch.mean_loss()
        super().log(logs, start_time)
        self.watch.require_good(bad)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """An order that depends on seed and epoch alone; the stock one depends on the generator's history."""
        order = self.steps.packs.sampler
        return SeededOrder(order.packs, order.fillers, order.seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: the stock estimate walks over all parameters for every micro-batch."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """LoRA+ gives the `B` matrices a learning rate of their own."""
        ratio = self.job.recipe.train.loraplus_lr_ratio
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

    def held_out_loss(self) -> float | None:
        """The loss on the held-out examples in nats/token, evaluated if need be; None without such examples."""
        if not self.eval_dataset:
            return None
        if self.evaluations.latest(self.state.global_step) is None:
            self.evaluate()
        return self.evaluations.latest(self.state.global_step)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The stock one; its packs are never filled up to a fixed shape."""
        filling, self.data_collator = self.data_collator, PackCollator()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = filling

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses of `held_out_losses`, and answers to the recipe's prompts; the stock method averages batch means.

        Raises:
            TrainingError: The loss is not finite, or a step before it would ruin the model.
        """
        self._require_good_steps()
        with self.metrics.paused():
            batches = {name: map(self._prepare_inputs, self.get_eval_dataloader(name)) for name in self.eval_dataset}
            losses = held_out_losses(self.model, batches, self.compute_loss, self.accelerator)
            metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()}
            self.evaluations.add(self.state.global_step, losses["loss"])
            self.log(dict(metrics))
            self._answer_prompts()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.evaluations.patience_is_over():
            train = self.job.recipe.train
            self.control.should_training_stop = self.control.should_log = True
            self.control.should_save = train.save_steps is not None
            patience = train.early_stopping_patience
            self.metrics.display.note(f"stopping early: {patience} evaluations without a lower loss")
        return metrics

    def _answer_prompts(self) -> None:
        for prompt in self.job.recipe.train.eval_prompts if is_main_process() else ():
            messages = [{"role": "user", "content": prompt}]
            with self.accelerator.autocast():  # modules that are trained whole are float32 in a bfloat16 model
                answer = greedy_answer(self.model, self.processing_class, messages, max_new_tokens=PROMPT_ANSWER_TOKENS)
            self.metrics.show_answer(self.state.global_step, prompt, answer)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint of safetensors and JSON, whole or not at all; the stock one pickles its arguments and states.

        Raises:
            TrainingError: A step before it would ruin the model, or it does not fit on the disk.
        """
        self._require_good_steps()
        self.evaluations.add_checkpoint(self.state.global_step)
        # Gathered by every process, written by the first one.
        randoms = gather_objects(self.accelerator, random_state())
        tensors, optimizer = adapter_tensors(self.model), optimizer_state(self.optimizer)

        def write(directory: Path) -> None:
            self.writer.write(directory, self.model.peft_config["default"], tensors)
            save_optimizer(directory, optimizer, self.lr_scheduler, self.accelerator.scaler)
            progress = {
                "counts": vars(self.steps.counts),
                "seconds": self.metrics.seconds,
                **self.evaluations.facts(),
                "start_sha256": self.writer.start_sha256(),
                "random": randoms,
            }
            (directory / PROGRESS).write_text(json.dumps(progress) + "\n", encoding="utf-8")
            self.state.save_to_json(str(directory / TRAINER_STATE))

        failure: TrainingError | None = None
        if is_main_process():
            best = self.evaluations.best
            try:
                with self.metrics.paused():
                    self.saved.save(self.state.global_step, best.step if best else None, write)
            except TrainingError as error:
                failure = error
        # Each waits here for the first one, and ends with it.
        if self.steps.any_process(failure is not None):
            raise failure or TrainingError("the first process could not save", met_by_all=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The adapter's tensors; the stock method also takes pickles."""
        self.writer.read(Path(resume_from_checkpoint), self.model)

    def _load_progress(self, checkpoint: Path) -> None:
        """Restores counts, bad steps, evaluations and clock from a checkpoint."""
        progress = _read_progress(checkpoint)
        if progress["start_sha256"] != self.writer.start_sha256():
            what = "the adapter's start cannot be made again here as it was (another machine or library version)"
            raise RunError(Problem(str(checkpoint), what, "resume where the run was started"))
        self.watch.restore(self.job.run.recorded_facts().get("bad_steps", []), step_of(checkpoint))
        if is_main_process():
            self.job.run.record({"bad_steps": self.watch.facts()})
        self.steps.counts = TokenCounts(**progress["counts"])
        self.evaluations.restore(progress)
        best = self.evaluations.best
        # It may have been rotated away since, for a better one that this run was rewound past.
        if best and best.step != step_of(checkpoint) and self._fault_of(best.step):
            self.evaluations.best = None
        self.metrics.restore(progress["seconds"], self.steps.counts.real)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """From safetensors and JSON; the stock method unpickles."""
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """From JSON; the stock method unpickles."""
        states = _read_progress(Path(checkpoint))["random"] if checkpoint is not None else []
        if self.args.process_index < len(states):  # of more processes than before, the new ones start as they are
            set_random_state(states[self.args.process_index])

    def _fault_of(self, step: int) -> str | None:
        return fault_of(self.job.run.checkpoints / f"step-{step}")

    def load_best(self) -> None:
        """Takes the adapter of the checkpoint with the lowest held-out loss, where the recipe wants that."""
        best = self.evaluations.best
        if not self.job.recipe.train.load_best_model_at_end or not best or best.step == self.state.global_step:
            return
        if fault := self._fault_of(best.step):
            self.metrics.display.note(f"warning: the best checkpoint is damaged ({fault}); the last adapter stays")
            return
        self.writer.read(self.job.run.checkpoints / f"step-{best.step}", self.model)
        self.evaluations.add(self.state.global_step, best.loss)
        self.metrics.display.note(
            f"the adapter is that of step {best.step}, with the lowest held-out loss ({best.loss:.4f})"
        )


def _read_progress(checkpoint: Path) -> Mapping[str, Any]:
    progress: Mapping[str, Any] = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    return progress


def build_trainer(job: Job, model: PreTrainedModel, adapter: LoraConfig, writer: AdapterWriter) -> LoraTrainer:
    """Puts the adapter on the model and makes a trainer that is ready to train.

    Args:
        job: What trains.
        model: The base model.
        adapter: What to put on the model.
        writer: Writes and reads the adapter.

    Raises:
        RecipeError: Optimizer, scheduler or loader refuse what the recipe says.
    """
    recipe, schedule, packs = job.recipe, job.schedule, job.packs
    size = schedule.per_device_train_batch_size
    multiple = schedule.num_processes * size if schedule.num_processes > 1 else 1
    pad_id = int(job.tokenizer.pad_token_id)
    shape = BatchShape.holding(packs, size, recipe.data.max_length_tokens) if recipe.train.torch_compile else None
    step_packs = StepPacks(packs, schedule, count_fillers(len(packs), multiple), recipe.train.seed, shape)
    steps = Steps(step_packs, StopRequest(recipe.train.max_hours))
    held_out = {name: pack_dataset(each, multiple=multiple, pad_id=pad_id) for name, each in job.held_out.items()}
    # The adapter's matrices are random, and TRL 1.14 seeds only after it has made them (1.16 before).
    set_seed(recipe.train.seed)
    trainer = LoraTrainer(
        model,
        job=job,
        writer=writer,
        steps=steps,
        metrics=MetricsLog(job.run, steps, Display(quiet=not is_main_process())),
        args=sft_config(recipe, schedule, model.dtype),
        train_dataset=pack_dataset(packs, multiple=multiple, pad_id=pad_id),
        eval_dataset=held_out or None,
        data_collator=PackCollator(shape, pad_id),
        processing_class=job.tokenizer,
        peft_config=adapter,
    )
    try_trainer_args(trainer, recipe, schedule)
    return trainer
