"""W&B, TensorBoard, trackio and MLflow. Each imports its package when it starts.

The integrations in Transformers are not used: they send whole argument objects, with paths and the host's name. Here a
tracker gets a `Start`, and its own collection of facts is turned off.
"""

from __future__ import annotations

import configparser
import logging
import netrc
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from qwen_tune.console import report
from qwen_tune.disk import path_fault

WANDB_BASE_URL = "https://api.forge.coreweave.com"
WANDB_START_SECONDS = 30
WANDB_END_SECONDS = 30
SEND_SECONDS = 5.0
MLFLOW_BATCH = {"metrics": 1000, "params": 100}
"""MLflow's limits for one request."""


@dataclass(frozen=True)
class Start:
    project: str
    name: str
    folder: Path
    """For local files: the run's logs."""
    config: Mapping[str, Any]  # public facts
    resumed_step: int | None = None
    run_id: str | None = None
    """The tracker's id of the run to resume."""


class Sink(Protocol):
    """What a tracker implements; it may raise whatever its package raises."""

    view: str

    @property
    def run_id(self) -> str | None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class WandbTracker:
    """W&B, online if there is a login, else in files for `wandb sync`."""

    def __init__(self, start: Start) -> None:
        # Its crash reports go to a third party.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = wandb_mode()
        try:
            self._run = self._init(start, mode)
        except Exception as error:
            if mode != "online":
                raise
            mode = "offline"
            report(f"W&B cannot be reached ({in_one_line(error)}); this run is tracked offline")
            self._run = self._init(start, mode)
        # Offline there is no run to resume: a resumed one becomes a separate run.
        self.run_id = str(self._run.id) if mode == "online" else None
        self.view = str(self._run.url) if mode == "online" else f"wandb sync {Path(self._run.dir).parent}"

    def _init(self, start: Start, mode: str) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True, symlink=False))
        logging.getLogger("wandb").setLevel(logging.WARNING)  # at lower levels, its debug.log contains paths
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            docker="",
            email="",
            finish_timeout=WANDB_END_SECONDS,
            finish_timeout_raises=True,
            host="",
            init_timeout=WANDB_START_SECONDS,
            program="",
            program_abspath="",
            program_relpath="",
            save_code=False,
            silent=True,
            symlink=False,
            use_dot_wandb=False,
            username="",
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_executable="",
            x_save_requirements=False,
        )
        run = wandb.init(
            project=start.project,
            name=start.name,
            dir=str(start.folder),
            config=dict(start.config),
            mode="online" if mode == "online" else "offline",
            # W&B drops steps of a resumed run that were sent before; they are identical.
            id=start.run_id if mode == "online" else None,
            resume="allow" if mode == "online" and start.run_id else None,
            reinit="create_new",
            settings=settings,
        )
        # A link into the user's home
        (Path(run.dir).parent / "logs" / "debug-core.log").unlink(missing_ok=True)
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, exit_code: int) -> None:
        """Raises TimeoutError if W&B did not accept everything in time; the rest stays in its files."""
        self._run.finish(exit_code=exit_code)


def wandb_mode() -> str:
    """`online`, `offline` or `disabled`, by W&B's environment and settings; offline without a login.

    Found without importing W&B.
    """
    mode = os.environ.get("WANDB_MODE") or _wandb_settings().get("mode", "")
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return "disabled"
    return "online" if has_wandb_login() else "offline"


def has_wandb_login() -> bool:
    """Whether W&B will find a key in its environment, netrc or settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(_place("NETRC", "~/.netrc"))
    except (OSError, UnicodeError, netrc.NetrcParseError):
        return bool(_wandb_settings().get("api_key"))
    host = wandb_host()
    # W&B's cloud has moved, and still accepts the entry of its old name.
    hosts = [host, "api.wandb.ai"] if host.endswith("forge.coreweave.com") else [host]
    return any(entries.authenticators(name) for name in hosts) or bool(_wandb_settings().get("api_key"))


def wandb_host() -> str:
    """The host that gets the runs and that a login is for."""
    address = os.environ.get("WANDB_BASE_URL") or _wandb_settings().get("base_url") or WANDB_BASE_URL
    return urlsplit(address).netloc


def _place(variable: str, usual: str) -> Path:
    """The path in the environment, or the usual one; a path without a file if that is impossible."""
    text = os.environ.get(variable) or usual
    return Path(os.devnull, "none") if path_fault(text) else Path(text).expanduser()


def _wandb_settings() -> dict[str, str]:
    """W&B's settings files: the user's, overridden by those of this directory."""
    local = _place("WANDB_DIR", ".")
    files = (
        _place("WANDB_CONFIG_DIR", "~/.config/wandb") / "settings",
        local / (".wandb" if (local / ".wandb").exists() else "wandb") / "settings",
    )
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
            settings.update(parser["default"])
        except (OSError, UnicodeError, KeyError, configparser.Error):
            continue  # missing, or W&B will report it
    return settings


class TensorBoardTracker:
    """An event file, written record by record: TensorBoard's own writer puts the host's name into the file name."""

    run_id = None

    def __init__(self, start: Start) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = start.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.view = f"tensorboard --logdir {folder}"
        self._file = RecordWriter((folder / f"events.out.tfevents.{int(time.time())}.qwen-tune").open("ab"))
        self._write(file_version="brain.Event:2")
        if start.resumed_step is not None:
            # Removes what the interrupted run had logged after its checkpoint
            self._write(step=start.resumed_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write(summary=hparams_pb(dict(start.config), trial_id=start.name))

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(step=step, summary=self._summary(value=values))

    def finish(self, exit_code: int) -> None:
        self._file.close()


class LoggedStep(NamedTuple):
    number: int
    seconds: float  # since 1970
    metrics: dict[str, float]


class Buffered:
    """Sends the steps of some seconds at once: one request per step would delay training."""

    def __init__(self) -> None:
        self._steps: list[LoggedStep] = []
        self._last_sent = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._steps.append(LoggedStep(step, time.time(), dict(metrics)))
        if time.monotonic() - self._last_sent >= SEND_SECONDS:
            self.flush()

    def flush(self) -> None:
        steps, self._steps = self._steps, []
        if steps:
            self._send(steps)
        self._last_sent = time.monotonic()

    def _send(self, steps: list[LoggedStep]) -> None:
        raise NotImplementedError


class TrackioTracker(Buffered):
    """trackio's local database, for `trackio show` (`TRACKIO_DIR`, else its folder in the Hub's cache).

    `trackio.init` is not used: it gets the user's name from the Hub and stores it, monitors CPU and GPU, and prints.
    """

    def __init__(self, start: Start) -> None:
        super().__init__()
        from trackio.sqlite_storage import SQLiteStorage

        self._storage = SQLiteStorage
        self._storage.validate_project_name(start.project)
        self._project, self._name = start.project, start.name
        self._config: dict[str, Any] | None = dict(start.config)
        self.run_id = start.run_id or uuid.uuid4().hex
        self.view = f"trackio show --project {start.project}"

    def _send(self, steps: list[LoggedStep]) -> None:
        self._storage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self.run_id,
            metrics_list=[step.metrics for step in steps],
            steps=[step.number for step in steps],
            timestamps=[datetime.fromtimestamp(step.seconds, tz=timezone.utc).isoformat() for step in steps],
            config=self._config,
        )
        self._config = None

    def finish(self, exit_code: int) -> None:
        self.flush()


class MlflowTracker(Buffered):
    """MLflow: the server of `MLFLOW_TRACKING_URI`, else a database in the run's logs.

    The client creates runs: `mlflow.start_run` would tag them with user, script and commit.
    """

    def __init__(self, start: Start) -> None:
        super().__init__()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its default, 7 tries of 2 minutes, would delay training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # Nothing is stored there; the default, which the database records, is a path below the working directory.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        server = os.environ.get("MLFLOW_TRACKING_URI")
        database = f"sqlite:///{start.folder.resolve() / 'mlflow.db'}"
        with warnings.catch_warnings():
            # MLflow uses what SQLAlchemy 2.1 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it creates
            self._client = MlflowClient(tracking_uri=server or database, registry_uri=server or database)
            self.run_id = self._resume(start.run_id) or self._create(start)
        self.view = f"run {self.run_id}" if server else f"mlflow ui --backend-store-uri {database}"

    def _resume(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return None  # a different server, or the run was deleted
        return run_id

    def _create(self, start: Start) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(start.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(start.project)
        run = self._client.create_run(experiment_id, run_name=start.name)
        params = [Param(_mlflow_name(key), str(value)) for key, value in start.config.items()]
        for batch in _batches(params, "params"):
            self._client.log_batch(run.info.run_id, params=batch)
        return str(run.info.run_id)

    def _send(self, steps: list[LoggedStep]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(key), value, int(step.seconds * 1000), step.number)
            for step in steps
            for key, value in step.metrics.items()
        ]
        for batch in _batches(metrics, "metrics"):
            self._client.log_batch(self.run_id, metrics=batch)

    def finish(self, exit_code: int) -> None:
        self.flush()
        status = {0: "FINISHED", 130: "KILLED"}.get(exit_code, "FAILED")
        self._client.set_terminated(self.run_id, status=status)


LABELS = {"wandb": "W&B", "tensorboard": "TensorBoard", "trackio": "trackio", "mlflow": "MLflow"}
"""The trackers' names for people."""

TRACKERS: dict[str, Callable[[Start], Sink]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


def _batches(items: list[Any], kind: str) -> Iterator[list[Any]]:
    size = MLFLOW_BATCH[kind]
    return (items[start : start + size] for start in range(0, len(items), size))


def _mlflow_name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)


def in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
