"""What is tracked besides metrics.jsonl, and how a run uses its trackers; the sinks themselves are in `trackers`.

Facts leave the machine only if `CONFIG_FACTS` lists them.

A tracker never fails a run. What is missing is reported before anything heavy loads (`check_trackers`); a tracker that
cannot start, or fails later, is left out with one warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen_tune.console import print_once, report
from qwen_tune.disk import make_private_folder, parse_json, write_atomically
from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Problem, RunError
from qwen_tune.runs.checkpoints import step_of
from qwen_tune.tracking.sinks import LABELS, TRACKERS, Sink, Start, in_one_line
from qwen_tune.tracking.wandb_login import has_wandb_login, wandb_host, wandb_mode

if TYPE_CHECKING:
    from qwen_tune.recipe.schema import Recipe, TrackingSpec
    from qwen_tune.runs.resume import Plan

DEFAULT_PROJECT = "qwen-tune"

CONFIG_FACTS = (
    "base.id",
    "base.revision",
    "engine",
    "world_size",
    "device",
    "dtype",
    "attention",
    "gradient_checkpointing",
    *(f"{section}.*" for section in ("versions", "rows", "samples", "tokens", "schedule")),
    *(f"{section}.*" for section in ("adapter", "quantization", "masking")),
    *(
        f"lora.{key}"
        for key in (
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "use_dora",
            "init_lora_weights",
            "bias",
        )
    ),
    # One by one: the section also holds the user's prompts and a checkpoint's path.
    *(
        f"train.{key}"
        for key in (
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_steps",
            "global_batch_size",
            "per_device_train_batch_size",
            "optim",
            "loraplus_lr_ratio",
            "weight_decay",
            "max_grad_norm",
            "neftune_noise_alpha",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "early_stopping_patience",
            "early_stopping_threshold",
            "seed",
        )
    ),
)
"""The facts that trackers get, as dotted keys; `*` stands for everything below."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LONGEST_FACT = 1000
EXTRA = 'pip install "qwen-tune[tracking]"'


class Tracker(Protocol):
    """Where metrics go while a run trains."""

    name: str
    """Its name for people."""

    view: str
    """How the run is looked at: an address or a command."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics."""

    def finish(self, exit_code: int) -> None:
        """Ends the tracked run: 0 finished, 130 interrupted, anything else failed."""


def check_trackers(tracking: TrackingSpec) -> list[str]:
    """Looks whether the recipe's trackers can start, importing none of them and asking no network.

    Returns:
        What the user should be told.

    Raises:
        RunError: A tracker's package is not installed, or W&B must be online and there is no login.
    """
    problems, told = [], []
    for name in dict.fromkeys(tracking.report_to):
        if missing := [package for package in _packages(name) if not _is_installed(package)]:
            what = f"{LABELS[name]} needs {' and '.join(missing)}, which is not installed"
            problems.append(Problem("tracking.report_to", what, EXTRA))
        elif name == "wandb":
            mode = wandb_mode()
            if mode == "offline" and os.environ.get("WANDB_MODE") == "online":
                what = f"WANDB_MODE=online, and there is no login for {wandb_host()}"
                problems.append(Problem("tracking.report_to", what, "`wandb login`, or unset WANDB_MODE"))
            elif mode == "disabled":
                told.append("W&B: it is disabled (WANDB_MODE or W&B's settings); nothing is tracked there")
            elif mode == "offline" and not has_wandb_login():
                told.append(
                    "W&B: no login found (WANDB_API_KEY, `wandb login`); this run is tracked offline. "
                    "Send it later with `wandb sync` and the folder in the run's logs/wandb"
                )
    if problems:
        raise RunError(problems)
    return told


def warn_of_trackers(tracking: TrackingSpec) -> None:
    """Warns of what `check_trackers` finds, once for all processes."""
    for warning in check_trackers(tracking) if is_main_process() else ():
        print_once(f"warning: {warning}")


def start_trackers(
    tracking: TrackingSpec, *, name: str, directory: Path, facts: Mapping[str, Any], resumed_step: int | None = None
) -> list[Tracker]:
    """Starts the recipe's trackers. One that cannot start is left out with a warning on stderr.

    Args:
        tracking: The recipe's section.
        name: The run's name.
        directory: The run directory; local files go into its `logs`.
        facts: The record of the run, with the recipe's hyperparameters in `train` and `lora`. Only `public_facts` of
            it leave.
        resumed_step: The step of the checkpoint from which a resumed run goes on; its trackers go on too.
    """
    folder = directory / "logs"
    make_private_folder(folder)
    run_ids = _read_run_ids(folder) if resumed_step is not None else {}
    config = public_facts(facts)
    trackers: list[Tracker] = []
    for key in dict.fromkeys(tracking.report_to):
        if key == "wandb" and wandb_mode() == "disabled":
            continue
        start = Start(tracking.project or DEFAULT_PROJECT, name, folder, config, resumed_step, run_ids.get(key))
        try:
            sink = TRACKERS[key](start)
        except Exception as error:
            report(f"{LABELS[key]} could not be started ({in_one_line(error)}); this run is not tracked there")
            continue
        if sink.run_id is not None:
            run_ids[key] = sink.run_id
        trackers.append(Guarded(LABELS[key], sink))
    write_atomically(folder / "trackers.json", json.dumps(run_ids, indent=2) + "\n")
    return trackers


@contextmanager
def tracked(recipe: Recipe, directory: Path, facts: Mapping[str, Any], plan: Plan) -> Iterator[list[Tracker]]:
    """Holds the recipe's trackers open for the length of a run, and tells them how it has ended.

    Args:
        recipe: The recipe.
        directory: The run directory.
        facts: The record of the run.
        plan: Where it resumes from, if it does.

    Yields:
        The trackers; none in the processes beside the first.
    """
    trackers: list[Tracker] = []
    if is_main_process() and recipe.tracking.report_to:
        trackers = start_trackers(
            recipe.tracking,
            name=recipe.name,
            directory=directory,
            facts={**facts, "train": recipe.train.model_dump(), "lora": recipe.lora.model_dump()},
            resumed_step=step_of(plan.checkpoint) if plan.checkpoint else None,
        )
    code = 1
    try:
        yield trackers
        code = 0
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        for tracker in trackers:
            tracker.finish(code)


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that may leave this machine, flat, with dotted keys.

    A text with a slash is left out even where its key is listed, so that no path slips through; a base's id and
    revision are there only if they are the Hub's.
    """
    public = {
        key: value
        for key, value in _flatten(facts)
        if any(fnmatchcase(key, listed) for listed in CONFIG_FACTS) and (key == "base.id" or not _like_path(key, value))
    }
    base = facts.get("base") or {}
    is_hub_id = base.get("revision") is not None and HUB_ID.fullmatch(str(base.get("id")))
    if not is_hub_id:
        for key in ("base.id", "base.revision"):
            public.pop(key, None)
    return public


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in facts.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (str, int)) for item in value):
            yield key, ", ".join(map(str, value))
        elif isinstance(value, (bool, int, float, str)):
            yield key, value


def _like_path(key: str, value: object) -> bool:
    text = f"{key} {value}"
    return any(sign in text for sign in "/\\~") or len(text) > LONGEST_FACT


class Guarded:
    """A tracker that cannot fail the run: its first error is reported, and it is left alone from then on."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.view = sink.view
        self._sink: Sink | None = sink

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics."""
        if self._sink is None:
            return
        try:
            self._sink.log(step, metrics)
        except Exception as error:
            self._drop(error)

    def finish(self, exit_code: int) -> None:
        """Ends the tracked run."""
        if self._sink is None:
            return
        try:
            self._sink.finish(exit_code)
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._sink = None
        report(f"{self.name} failed ({in_one_line(error)}); what it did not get is in the run's metrics.jsonl")


def _packages(name: str) -> tuple[str, ...]:
    """The packages that a tracker is imported from."""
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return ("mlflow", "sqlalchemy", "alembic")  # for a database of its own
    return (name,)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory, where trackers like to make one, has no origin.
    return spec is not None and spec.origin is not None


def _read_run_ids(folder: Path) -> dict[str, str]:
    """The trackers' names of the run that is resumed; none where they cannot be read."""
    try:
        run_ids = parse_json((folder / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(run_id) for key, run_id in run_ids.items()} if isinstance(run_ids, dict) else {}
