"""Faults from several files and the command line: their order, and the places they point at."""

from __future__ import annotations

import pytest
from recipe_texts import MINIMAL, problems_of, write

pytestmark = pytest.mark.usefixtures("own_folder")


def test_every_fault_is_reported_in_the_order_of_the_file() -> None:
    write("lora: {r: 0}\nlearnin_rate: 3\nmodel: {attention: fast}\n", "base.yaml")
    problems = problems_of(
        """\
extends: base.yaml
train:
  max_steps: 0
  lerning_rate: 1
  global_batch_size: 10
  per_device_train_batch_size: 4
  eval_steps: 5
  trainer_args: {output_dir: x}
  seed: 1
  seed: 2
data:
  train:
    - path: 3
    - path: a.jsonl
      format: alpca
model:
  base: Qwen/x
""",
        "train.weight_decay=-1",
        "nonsense",
    )
    starts = [problem.split(": ")[0] + " " + problem.split(": ")[1] for problem in problems]
    assert starts == [
        "job.yaml:3 train.max_steps",
        "job.yaml:4 train.lerning_rate",
        "job.yaml:5 train.global_batch_size",
        "job.yaml:7 train.eval_steps",
        "job.yaml:8 train.trainer_args.output_dir",
        "job.yaml:10 train.seed",
        "job.yaml:13 data.train[0].path",
        "job.yaml:15 data.train[1].format",
        "base.yaml:1 lora.r",
        "base.yaml:2 learnin_rate",
        "base.yaml:3 model.attention",
        "command line train.weight_decay=-1",
        "command line override 2 has no `=`. Fix",
    ]


def test_rules_skip_broken_keys() -> None:
    """No finding depends on a refused value."""
    assert len(problems_of(MINIMAL + "train: {global_batch_size: 10, per_device_train_batch_size: four}\n")) == 1
    assert len(problems_of(MINIMAL + "train: {max_steps: 0, num_train_epochs: 3}\n")) == 1


def test_a_rule_points_at_the_key_that_is_written() -> None:
    (problem,) = problems_of(MINIMAL + "train:\n  seed: 1\n  per_device_train_batch_size: 3\n")
    assert problem.startswith("job.yaml:8: train.global_batch_size: got 16, which leaves a remainder of 1;")
