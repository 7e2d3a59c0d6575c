"""How a run uses its trackers, and what they get; `sinks` implements them.

Facts leave the machine only if `CONFIG_FACTS` lists them.

A tracker never fails a run. Missing packages and logins are reported before anything heavy loads (`check_trackers`); a
tracker that cannot start, or fails later, is dropped with one warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.console import print_once, report
from qwen_tune.disk import make_private_folder, parse_json, write_atomically
from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Problem, RunError
from qwen_tune.runs.checkpoints import step_of
from qwen_tune.tracking.sinks import (
    LABELS,
    TRACKERS,
    Sink,
    Start,
    has_wandb_login,
    in_one_line,
    wandb_host,
    wandb_mode,
)

if TYPE_CHECKING:
    from qwen_tune.recipe.schema import Recipe, TrackingSpec
    from qwen_tune.runs.resume import Plan

DEFAULT_PROJECT = "qwen-tune"

_PUBLIC = {
    "base": "id revision",
    **dict.fromkeys(("versions", "rows", "samples", "tokens", "schedule", "adapter", "quantization", "masking"), "*"),
    "lora": "r lora_alpha lora_dropout target_modules use_rslora use_dora init_lora_weights bias",
    # One by one: the section also contains the user's prompts and a checkpoint's path.
    "train": "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps global_batch_size "
    "per_device_train_batch_size optim loraplus_lr_ratio weight_decay max_grad_norm neftune_noise_alpha "
    "logging_steps eval_steps save_steps early_stopping_patience early_stopping_threshold seed",
}
CONFIG_FACTS = (
    *("engine", "world_size", "device", "dtype", "attention", "gradient_checkpointing"),
    *(f"{section}.{key}" for section, keys in _PUBLIC.items() for key in keys.split()),
)
"""The facts that trackers get, as dotted keys; `*` stands for everything below."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LONGEST_FACT = 1000
EXTRA = 'pip install "qwen-tune[tracking]"'


class Tracker:
    """A tracker that cannot fail the run: after its first error, which is reported, it is no longer used.

    `name` is for people; `view` is an address or a command for looking at the run.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.view = sink.view
        self._sink: Sink | None = sink

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.log(step, metrics))

    def finish(self, exit_code: int) -> None:
        """Ends the tracked run: 0 finished, 130 interrupted, anything else failed."""
        self._try(lambda sink: sink.finish(exit_code))

    def _try(self, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:
            self._sink = None
            report(f"{self.name} failed ({in_one_line(error)}); the metrics it missed are in the run's metrics.jsonl")


def check_trackers(tracking: TrackingSpec) -> list[str]:
    """Checks whether the recipe's trackers can start, without importing them or using the network.

    Returns:
        Notices for the user.

    Raises:
        RunError: A tracker's package is not installed, or W&B must be online and there is no login.
    """
    problems, notices = [], []
    for name in dict.fromkeys(tracking.report_to):
        if missing := [package for package in _packages(name) if not is_installed(package)]:
            what = f"{LABELS[name]} needs {' and '.join(missing)}, which is not installed"
            problems.append(Problem("tracking.report_to", what, EXTRA))
        elif name == "wandb":
            mode = wandb_mode()
            if mode == "offline" and os.environ.get("WANDB_MODE") == "online":
                what = f"WANDB_MODE=online, but there is no login for {wandb_host()}"
                problems.append(Problem("tracking.report_to", what, "`wandb login`, or unset WANDB_MODE"))
            elif mode == "disabled":
                notices.append("W&B: it is disabled (WANDB_MODE or W&B's settings); nothing is tracked there")
            elif mode == "offline" and not has_wandb_login():
                notices.append(
                    "W&B: no login found (WANDB_API_KEY, `wandb login`); this run is tracked offline. "
                    "Send it later with `wandb sync` and the folder in the run's logs/wandb"
                )
    if problems:
        raise RunError(problems)
    return notices


def warn_of_trackers(tracking: TrackingSpec) -> None:
    """Warns of what `check_trackers` finds, once for all processes."""
    for warning in check_trackers(tracking) if is_main_process() else ():
        print_once(f"warning: {warning}")


def start_trackers(
    tracking: TrackingSpec, *, name: str, directory: Path, facts: Mapping[str, Any], resumed_step: int | None = None
) -> list[Tracker]:
    """Starts the recipe's trackers. One that cannot start is dropped with a warning on stderr.

    Args:
        tracking: The recipe's section.
        name: The run's name.
        directory: The run directory; local files go into its `logs`.
        facts: run.json, with the recipe's hyperparameters in `train` and `lora`; only `public_facts` are sent.
        resumed_step: The step of the checkpoint that the run, and so its trackers, resume from.
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
        trackers.append(Tracker(LABELS[key], sink))
    write_atomically(folder / "trackers.json", json.dumps(run_ids, indent=2) + "\n")
    return trackers


@contextmanager
def tracked(recipe: Recipe, directory: Path, facts: Mapping[str, Any], plan: Plan) -> Iterator[list[Tracker]]:
    """Keeps the recipe's trackers open for the length of a run, and reports to them how it ended.

    Yields:
        The trackers; none except in the first process.
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
    """The facts that may leave this machine, with dotted keys.

    Text with a slash is left out even if its key is listed, so that no path slips through; a base's id and revision are
    included only if they are the Hub's.
    """
    public = {
        key: value
        for key, value in _flatten(facts)
        if any(fnmatchcase(key, listed) for listed in CONFIG_FACTS)
        and (key == "base.id" or not _may_be_path(key, value))
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


def _may_be_path(key: str, value: object) -> bool:
    text = f"{key} {value}"
    return any(sign in text for sign in "/\\~") or len(text) > LONGEST_FACT


def _packages(name: str) -> tuple[str, ...]:
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return ("mlflow", "sqlalchemy", "alembic")  # for a local database
    return (name,)


def is_installed(package: str) -> bool:
    """Whether a package can be imported from an installation."""
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory, where some trackers make one, has no origin.
    return spec is not None and spec.origin is not None


def _read_run_ids(folder: Path) -> dict[str, str]:
    """The trackers' ids of the resumed run; empty if they cannot be read."""
    try:
        run_ids = parse_json((folder / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(run_id) for key, run_id in run_ids.items()} if isinstance(run_ids, dict) else {}
