"""The sinks that trackers are: W&B, TensorBoard, trackio and MLflow. Each imports its package when it starts.

The integrations in Transformers are not used: they send whole argument objects, with paths and the host's name. Here
a tracker gets a `Start`, and is reported not to look around by itself.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from qwen_tune.console import report
from qwen_tune.tracking.wandb_login import wandb_mode

WANDB_START_SECONDS = 30
WANDB_END_SECONDS = 30
SEND_SECONDS = 5.0
MLFLOW_BATCH = {"metrics": 1000, "params": 100}
"""What MLflow takes in one request."""


@dataclass(frozen=True)
class Start:
    """What a tracker starts with."""

    project: str
    name: str
    folder: Path
    """The run's logs, for local files."""
    config: Mapping[str, Any]
    """Public facts."""
    resumed_step: int | None = None
    """The step that a resumed run resumes from."""
    run_id: str | None = None
    """The tracker's own name of the run that goes on."""


class Sink(Protocol):
    """A tracker as it is built here: it may raise whatever its package raises."""

    view: str

    @property
    def run_id(self) -> str | None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class WandbTracker:
    """W&B, online where there is a login, else in files that `wandb sync` sends."""

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
        # Offline there is no run to resume with: a resumed one is a run of its own.
        self.run_id = str(self._run.id) if mode == "online" else None
        self.view = str(self._run.url) if mode == "online" else f"wandb sync {Path(self._run.dir).parent}"

    def _init(self, start: Start, mode: str) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True, symlink=False))
        logging.getLogger("wandb").setLevel(logging.WARNING)  # below that, its debug.log tells of paths
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
            # The steps of a resumed run that were sent before are dropped by W&B; they are the same ones.
            id=start.run_id if mode == "online" else None,
            resume="allow" if mode == "online" and start.run_id else None,
            reinit="create_new",
            settings=settings,
        )
        # A link into the user's home.
        (Path(run.dir).parent / "logs" / "debug-core.log").unlink(missing_ok=True)
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics; W&B sends them by itself."""
        self._run.log(dict(metrics), step=step)

    def finish(self, exit_code: int) -> None:
        """Ends the run.

        Raises:
            TimeoutError: W&B did not take all of it in time; the rest stays in its files.
        """
        self._run.finish(exit_code=exit_code)


class TensorBoardTracker:
    """An event file, written record by record: TensorBoard's own writer puts the host's name into the file's."""

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
            # Takes back what the interrupted run had logged after its checkpoint.
            self._write(step=start.resumed_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write(summary=hparams_pb(dict(start.config), trial_id=start.name))

    def _write(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a step's metrics."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(step=step, summary=self._summary(value=values))

    def finish(self, exit_code: int) -> None:
        """Closes the file."""
        self._file.close()


@dataclass(frozen=True)
class Row:
    """A step's metrics and when they came."""

    step: int
    seconds: float
    metrics: dict[str, float]


class Gathering:
    """Gathers rows and sends those of some seconds at once: a request a step would hold training up."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._last_sent = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a step's metrics."""
        self._rows.append(Row(step, time.time(), dict(metrics)))
        if time.monotonic() - self._last_sent >= SEND_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends what was gathered."""
        rows, self._rows = self._rows, []
        if rows:
            self._send(rows)
        self._last_sent = time.monotonic()

    def _send(self, rows: list[Row]) -> None:
        raise NotImplementedError


class TrackioTracker(Gathering):
    """trackio's local database, where `trackio show` looks (`TRACKIO_DIR`, else its folder in the Hub's cache).

    `trackio.init` is not used: it asks the Hub for the user's name and stores it, watches CPU and GPU, and prints.
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

    def _send(self, rows: list[Row]) -> None:
        self._storage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self.run_id,
            metrics_list=[row.metrics for row in rows],
            steps=[row.step for row in rows],
            timestamps=[_iso_time(row.seconds) for row in rows],
            config=self._config,
        )
        self._config = None

    def finish(self, exit_code: int) -> None:
        """Sends what is left."""
        self.flush()


class MlflowTracker(Gathering):
    """MLflow: the server of `MLFLOW_TRACKING_URI`, else a database in the run's logs.

    Runs are made by the client: `mlflow.start_run` tags them with user, script and commit.
    """

    def __init__(self, start: Start) -> None:
        super().__init__()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its own patience, 7 times 2 minutes, is training's time.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # Nothing is stored there; the default, noted in the database, is a path below the working directory.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        server = os.environ.get("MLFLOW_TRACKING_URI")
        database = f"sqlite:///{start.folder.resolve() / 'mlflow.db'}"
        with warnings.catch_warnings():
            # MLflow uses what SQLAlchemy 2.1 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
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
            return None  # another server, or the run was deleted there
        return run_id

    def _create(self, start: Start) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(start.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(start.project)
        run = self._client.create_run(experiment_id, run_name=start.name)
        params = [Param(_mlflow_name(key), str(value)) for key, value in start.config.items()]
        for batch in _batches(params, MLFLOW_BATCH["params"]):
            self._client.log_batch(run.info.run_id, params=batch)
        return str(run.info.run_id)

    def _send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(key), value, int(row.seconds * 1000), row.step)
            for row in rows
            for key, value in row.metrics.items()
        ]
        for batch in _batches(metrics, MLFLOW_BATCH["metrics"]):
            self._client.log_batch(self.run_id, metrics=batch)

    def finish(self, exit_code: int) -> None:
        """Sends what is left and ends the run."""
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


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mlflow_name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat()


def in_one_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
