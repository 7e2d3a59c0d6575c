"""Losses on held-out rows over a run, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerControl
from trl import SFTTrainer

from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Problem, TrainingError
from qwen_tune.evaluation.chat import greedy_answer
from qwen_tune.recipe.schema import Recipe
from qwen_tune.training.batches import PackCollator
from qwen_tune.training.progress import MetricsLog

PROMPT_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Evaluation:
    """The loss on the held-out rows after a step, in nats/token."""

    step: int
    loss: float


def evaluations_without_gain(evaluations: Sequence[Evaluation], threshold: float) -> int:
    """How many evaluations at the end were not lower, by more than a threshold, than the lowest before them."""
    lowest, since = float("inf"), 0
    for evaluation in evaluations:
        since += 1
        if evaluation.loss < lowest - threshold:
            lowest, since = evaluation.loss, 0
    return since


class EvaluatingTrainer(SFTTrainer):
    """TRL's trainer with our evaluation; its `compute_loss` gives the summed loss of a batch."""

    recipe: Recipe
    metrics: MetricsLog
    control: TrainerControl
    evaluations: list[Evaluation]
    data_collator: Any

    def evaluation_loss(self) -> float | None:
        """The loss on the held-out rows in nats/token; None without such rows."""
        if not self.eval_dataset:
            return None
        if not self.evaluations or self.evaluations[-1].step != self.state.global_step:
            self.evaluate()
        return self.evaluations[-1].loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The stock one; its rows stay as long as they are where those of training are filled up."""
        filling, self.data_collator = self.data_collator, PackCollator()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = filling

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluation loss as the sum over all labelled tokens divided by their number, in all and for each source.

        The stock loss averages the means of batches, so that a batch of few tokens counts like one of many. Logits are
        never gathered. Random numbers are as they were after it, so that how often it happens changes no training.

        Raises:
            TrainingError: It is not finite.
        """
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.metrics.paused(), torch.random.fork_rng(devices):
            self.model.eval()
            # a row a source: summed loss, labelled tokens
            sums = torch.zeros((len(self.eval_dataset), 2), dtype=torch.float64, device=self.args.device)
            for row, name in zip(sums, self.eval_dataset, strict=True):
                for inputs in self.get_eval_dataloader(name):
                    inputs = self._prepare_inputs(inputs)
                    with self.accelerator.autocast():
                        row[0] += self.compute_loss(self.model, inputs)
                    row[1] += inputs["targets"].shape[0]
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            nll, tokens = sums.sum(dim=0).tolist()
            metrics = {f"{metric_key_prefix}_loss": nll / max(tokens, 1)}
            for name, (source_nll, source_tokens) in zip(self.eval_dataset, sums.tolist(), strict=True):
                metrics[f"{metric_key_prefix}_{name}_loss"] = source_nll / max(source_tokens, 1)
            self._require_number(metrics[f"{metric_key_prefix}_loss"])
            self.evaluations.append(Evaluation(self.state.global_step, metrics[f"{metric_key_prefix}_loss"]))
            self.log(dict(metrics))
            self._answer_prompts()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._stop_early()
        return metrics

    def _require_number(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        step, where = self.state.global_step, f"step {self.state.global_step}"
        fix = "lower train.learning_rate, and resume from an earlier checkpoint with train.resume="
        if not step:
            where, fix = self.recipe.model.base, "download the base again, or take a wider model.dtype"
        what = f"the loss on the held-out rows is not finite {'after it' if step else 'before anything was trained'}"
        raise TrainingError(Problem(where, what, fix), met_by_all=True)

    def _stop_early(self) -> None:
        if self.patience_is_over():
            self.control.should_training_stop = self.control.should_log = True
            self.control.should_save = self.recipe.train.save_steps is not None
            patience = self.recipe.train.early_stopping_patience
            self.metrics.display.note(f"stopping early: {patience} evaluations without a lower loss")

    def patience_is_over(self) -> bool:
        """Whether so many evaluations have brought nothing that the run is to end."""
        train = self.recipe.train
        if train.early_stopping_patience is None:
            return False
        without_gain = evaluations_without_gain(self.evaluations, train.early_stopping_threshold)
        return without_gain >= train.early_stopping_patience

    def _answer_prompts(self) -> None:
        if not is_main_process():
            return
        for prompt in self.recipe.train.eval_prompts:
            with self.accelerator.autocast():  # modules that are trained whole are float32 in a bfloat16 model
                answer = greedy_answer(
                    self.model,
                    self.processing_class,
                    [{"role": "user", "content": prompt}],
                    max_new_tokens=PROMPT_ANSWER_TOKENS,
                )
            self.metrics.show_answer(self.state.global_step, prompt, answer)
