"""TRL's SFTTrainer with our loss, our order of samples and our evaluation.

TRL keeps the loop, the optimizer, the scheduler, accumulation and processes. Each method below replaces a stock one in
one respect, named in its docstring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from qwen_tune.chatml import IGNORED
from qwen_tune.collator import PackCollator
from qwen_tune.errors import Problem, RecipeError
from qwen_tune.loss import add_labelled_loss
from qwen_tune.machine import is_main_process, uses_gpu
from qwen_tune.model import lora_config, target_modules
from qwen_tune.packing import Pack
from qwen_tune.progress import Display, MetricsLog
from qwen_tune.recipe import Recipe, TrainSpec
from qwen_tune.run_dir import RunDir
from qwen_tune.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pack_dataset(packs: Sequence[Pack], *, multiple: int, pad_id: int) -> Dataset:
    """Rows for the trainer.

    Args:
        packs: The samples of each row.
        multiple: The rows are filled up to a multiple of this with one token without loss, so that every process gets
            equally many and none is trained twice: processes times rows of each, or 1 for one process.
        pad_id: That token.

    Returns:
        Columns `input_ids`, `labels` and `lengths` (tokens of each sample in the row). Fillers come last.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "lengths": []}
    for samples in packs:
        rows["input_ids"].append([token for sample in samples for token in sample.input_ids])
        rows["labels"].append([label for sample in samples for label in sample.labels])
        rows["lengths"].append([len(sample.input_ids) for sample in samples])
    for _ in range(-len(packs) % multiple):
        rows["input_ids"].append([pad_id])
        rows["labels"].append([IGNORED])
        rows["lengths"].append([1])
    return Dataset.from_dict(rows)


class SeededOrder(Sampler[int]):
    """A new order of the rows every epoch, from the seed and the epoch alone; fillers stay at the end."""

    def __init__(self, rows: int, fillers: int, seed: int) -> None:
        self.rows = rows
        self.fillers = fillers
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, self.rows + self.fillers)


class LoraTrainer(SFTTrainer):
    """Trains an adapter on rows of `pack_dataset`."""

    loss_is_scaled_for_ga = True

    metrics: MetricsLog
    targets: list[str]

    def __init__(self, model: PreTrainedModel, *, fillers: int, **kwargs: Any) -> None:
        self.fillers = fillers
        self.tokens_processed = 0
        self.padding_processed = 0
        add_labelled_loss(model)
        super().__init__(model=model, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and gives the terminal back however that ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.metrics.display.stop()

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
        tokens = inputs["input_ids"].shape[1]
        self.tokens_processed += tokens
        if inputs["targets"].shape[0] == 0:
            self.padding_processed += tokens
        # DDP averages gradients over processes, and the count is over all of them.
        scale: float = self.accelerator.num_processes / max(int(num_items_in_batch), 1)
        return nll * scale

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        """The labelled tokens of a step; the stock method counts labels that our batches do not carry."""
        count: int = sum(batch["targets"].shape[0] for batch in batch_samples)
        if self.accelerator.num_processes > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum"))
        return count

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """An order that depends on seed and epoch alone; the stock one depends on the generator's history."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SeededOrder(len(dataset) - self.fillers, self.fillers, self.args.seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the stock estimate walks over all parameters for every micro-batch."""
        return 0

    def evaluation_loss(self) -> float | None:
        """The loss on the held-out rows in nats a token; None without such rows."""
        if self.eval_dataset is None:
            return None
        return float(self.evaluate()["eval_loss"])

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluation loss as the sum over all labelled tokens divided by their number.

        The stock loss averages the means of batches, so that a batch of few tokens counts like one of many.
        """
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # summed loss, labelled tokens
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                total[0] += self.compute_loss(self.model, inputs)
            total[1] += inputs["targets"].shape[0]
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        nll, tokens = total.tolist()
        metrics = {f"{metric_key_prefix}_loss": nll / max(tokens, 1)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader))


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    run: RunDir,
    schedule: Schedule,
    packs: Sequence[Pack],
    evaluation_packs: Sequence[Pack],
) -> LoraTrainer:
    """Puts the adapter on the model and makes a trainer that is ready to train.

    Raises:
        ModelError: The recipe's target modules are not in the model.
        RecipeError: The recipe's `trainer_args` do not suit the trainer.
    """
    targets = target_modules(model, recipe.lora)
    rows = schedule.num_processes * schedule.per_device_train_batch_size if schedule.num_processes > 1 else 1
    pad_id = int(tokenizer.pad_token_id)
    trainer = LoraTrainer(
        model,
        fillers=-len(packs) % rows,
        args=sft_config(recipe, schedule, run, model.dtype),
        train_dataset=pack_dataset(packs, multiple=rows, pad_id=pad_id),
        eval_dataset=pack_dataset(evaluation_packs, multiple=rows, pad_id=pad_id) if evaluation_packs else None,
        data_collator=PackCollator(),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, targets),
    )
    trainer.targets = targets
    trainer.remove_callback(PrinterCallback)
    trainer.metrics = MetricsLog(run.metrics, trainer, Display(quiet=not is_main_process()))
    trainer.add_callback(trainer.metrics)
    if recipe.train.trainer_args:
        _try_optimization(trainer, schedule)
    return trainer


def _try_optimization(trainer: LoraTrainer, schedule: Schedule) -> None:
    """Makes optimizer and scheduler once before anything is written: `trainer_args` may not suit them.

    Raises:
        RecipeError: They refuse their arguments.
    """
    try:
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=schedule.max_steps)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise _unsuitable_arguments(error) from error
    trainer.optimizer = trainer.lr_scheduler = None


def _unsuitable_arguments(error: Exception) -> RecipeError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RecipeError(Problem("train.trainer_args", f"the trainer refuses them: {line}", "change or remove them"))


def sft_config(recipe: Recipe, schedule: Schedule, run: RunDir, dtype: torch.dtype) -> SFTConfig:
    """TRL's configuration for a recipe. Everything that the toolkit does itself is switched off here.

    Raises:
        RecipeError: The recipe's `trainer_args` do not suit.
    """
    on_cpu = not uses_gpu()
    train = recipe.train
    settings = {
        "output_dir": str(run.path),
        # Rows come tokenized, packed and collated by us.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "remove_unused_columns": False,
        # Files, logs and progress are ours.
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": train.logging_steps,
        # This filter waits for the device at every micro-batch; `MetricsLog` stops on a loss that is no number.
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": schedule.per_device_train_batch_size,
        "per_device_eval_batch_size": schedule.per_device_train_batch_size,
        "gradient_accumulation_steps": schedule.gradient_accumulation_steps,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optim,
        "seed": train.seed,
        "gradient_checkpointing": checkpoints_gradients(train),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    try:
        return SFTConfig(**{**settings, **train.trainer_args})
    except (TypeError, ValueError, KeyError, ImportError) as error:
        if not train.trainer_args:
            raise
        raise _unsuitable_arguments(error) from error


def checkpoints_gradients(train: TrainSpec) -> bool:
    """Whether activations are recomputed in the backward; `auto` does so on a GPU, where memory is what runs out."""
    if train.gradient_checkpointing == "auto":
        return uses_gpu()
    return train.gradient_checkpointing == "full"
