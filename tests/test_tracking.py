from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from fakes.wandb_server import wandb_records
from test_house import loaded_modules

from qwen_tune.errors import RunError
from qwen_tune.recipe.schema import LoraSpec, TrackingSpec, TrainSpec
from qwen_tune.tracking import sinks as trackers
from qwen_tune.tracking import tracking
from qwen_tune.tracking.tracking import Tracker, check_trackers, is_installed, public_facts

KEY = "canary0123" * 4
LOSSES = {1: 2.0, 2: 1.0, 3: 0.5, 4: 0.25}
FACTS = {
    "overrides": ["data.train.0.path=/home/someone/canary/rows.jsonl"],
    "device": "NVIDIA H100 80GB HBM3",
    "world_size": 1,
    "versions": {"torch": "2.13.0+cu130", "odd": "file:///home/someone/canary/torch"},
    "base": {
        "id": "Qwen/Qwen3-0.6B",
        "revision": "0a1b",
        "local_path": "/home/someone/canary/hub",
    },
    "dtype": "bfloat16",
    "sources": {"/home/someone/canary/rows.jsonl": {"train": 3}},
    "rows": {"read": 4, "dropped": {"too long, cut": 1, "of /home/someone/canary/rows.jsonl": 2}},
    "adapter": {"targets": ["q_proj", "v_proj"], "init": True, "trainable_parameters": 10},
    "quantization": None,
    "train": {
        "learning_rate": 2e-4,
        "seed": 42,
        "resume": "/home/someone/canary/run",
        "eval_prompts": ["the canary asks"],
    },
    "lora": {"r": 16, "target_modules": "all-linear"},
    "environment": {"HF_TOKEN": "canary"},
}
PUBLIC = {
    "device": "NVIDIA H100 80GB HBM3",
    "world_size": 1,
    "versions.torch": "2.13.0+cu130",
    "base.id": "Qwen/Qwen3-0.6B",
    "base.revision": "0a1b",
    "dtype": "bfloat16",
    "rows.read": 4,
    "rows.dropped.too long, cut": 1,
    "adapter.targets": "q_proj, v_proj",
    "adapter.init": True,
    "adapter.trainable_parameters": 10,
    "train.learning_rate": 2e-4,
    "train.seed": 42,
    "lora.r": 16,
    "lora.target_modules": "all-linear",
}

# What a job does with its trackers, in a separate process: W&B and MLflow keep global state.
JOB = """
import json, socket, sys, time
socket.gethostname = lambda: "canary-host"

class Socket(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX and json.loads(sys.argv[1]).get("is_local"):
            print("uses the network:", address, file=sys.stderr, flush=True)
        super().connect(address)

socket.socket = Socket
from pathlib import Path
from qwen_tune.tracking import sinks
from qwen_tune.tracking import tracking
from qwen_tune.recipe.schema import TrackingSpec
job = json.loads(sys.argv[1])
for name, value in job.get("constants", {}).items():
    setattr(sinks, name, value)
spec = TrackingSpec(report_to=job["trackers"])
print(json.dumps(tracking.check_trackers(spec)))
for part in job["parts"]:
    trackers = tracking.start_trackers(
        spec, name="small", directory=Path(job["run"]), facts=job["facts"], resumed_step=part.get("resumed_step")
    )
    for step, loss in part["losses"].items():
        for tracker in trackers:
            tracker.log(int(step), {"loss": loss})
    print(json.dumps([tracker.view for tracker in trackers]), flush=True)
    for tracker in trackers:
        tracker.finish(part["exit"])
"""


def run_job(folder: Path, trackers: list[str], parts: list[dict[str, Any]], **more: Any):
    """Runs a job with canaries wherever a tracker might look. Returns the process's result."""
    (folder / "canary-home").mkdir(exist_ok=True)
    (folder / "canary-cwd").mkdir(exist_ok=True)
    env = environment(
        HOME=str(folder / "canary-home"),
        USER="canary",
        LOGNAME="canary",
        HF_TOKEN="hf_canary",
        WANDB_API_KEY=KEY,
        TRACKIO_DIR=str(folder / "trackio"),
        **more.pop("variables", {}),
    )
    job = {"run": str(folder / "run"), "trackers": trackers, "parts": parts, "facts": FACTS, **more}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", JOB, json.dumps(job), "--token=canary"],
        cwd=folder / "canary-cwd",
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert not list((folder / "canary-cwd").iterdir()), "nothing is left in the working directory"
    return result


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """A run that was interrupted after step 3, its checkpoint being of step 2, and then resumed; tracked locally."""
    for package in ("tensorboard", "trackio", "mlflow", "sqlalchemy", "alembic"):
        if util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed; pip install "qwen-tune[tracking]"')
    folder = tmp_path_factory.mktemp("tracked")
    parts = [
        {"losses": {step: LOSSES[step] for step in (1, 2, 3)}, "exit": 130},
        {"losses": {step: LOSSES[step] for step in (3, 4)}, "exit": 0, "resumed_step": 2},
    ]
    trackers = ["wandb", "tensorboard", "trackio", "mlflow"]
    result = run_job(folder, trackers, parts, is_local=True, variables={"WANDB_MODE": "offline"})
    assert result.stderr == ""
    return folder


def test_the_module_loads_no_tracker():
    loaded = loaded_modules("import qwen_tune.tracking.tracking")
    assert not loaded & {*trackers.TRACKERS, "torch", "numpy", "sqlalchemy"}


def test_only_listed_facts_are_public_and_no_path_among_them():
    assert public_facts(FACTS) == PUBLIC
    assert "canary" not in json.dumps(public_facts(FACTS))


def test_only_listed_hyperparameters_and_no_text_of_the_user_are_public():
    train = TrainSpec(
        learning_rate=1e-4,
        eval_prompts=["the canary asks"],
        resume="canary-run",
        trainer_args={"canary": 1, "lr_scheduler_kwargs": {"canary": "learning_rate", "min_lr": 1e-6}},
        max_hours=1.5,
    )
    lora = LoraSpec(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"canary": 4},
        alpha_pattern={"canary.r": 8},
        exclude_modules=["canary"],
        modules_to_save=["canary"],
        trainable_token_indices={"canary": [1]},
        target_parameters=["canary"],
    )
    public = public_facts({"train": train.model_dump(), "lora": lora.model_dump()})
    assert "canary" not in json.dumps(public)
    assert (public["train.learning_rate"], public["lora.target_modules"]) == (1e-4, "q_proj, v_proj")
    # Those that are None are not there.
    assert set(public) == {
        *(f"train.{key}" for key in ("num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps")),
        *(f"train.{key}" for key in ("global_batch_size", "per_device_train_batch_size", "optim", "weight_decay")),
        *(f"train.{key}" for key in ("max_grad_norm", "logging_steps", "early_stopping_threshold", "seed")),
        *(f"lora.{key}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules")),
        *(f"lora.{key}" for key in ("use_rslora", "use_dora", "init_lora_weights", "bias")),
    }


def test_every_listed_hyperparameter_is_a_key_of_the_recipe():
    listed = [key.split(".") for key in tracking.CONFIG_FACTS if key.startswith(("train.", "lora."))]
    fields = {"train": TrainSpec.model_fields, "lora": LoraSpec.model_fields}
    assert [f"{section}.{key}" for section, key in listed if key not in fields[section]] == []


@pytest.mark.parametrize(
    "base",
    [
        {"id": "./canary", "revision": None},
        {"id": "models/canary", "revision": None},
        {"id": "/home/someone/canary/qwen", "revision": "0a1b"},
        {"id": "~/canary", "revision": "0a1b"},
        {"id": "../canary/qwen", "revision": "0a1b"},
    ],
)
def test_a_local_base_is_not_named(base):
    assert public_facts({"base": base, "dtype": "float32"}) == {"dtype": "float32"}


def test_missing_packages_are_reported_together_before_anything_starts(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("trackio", "alembic") else find(name))
    with pytest.raises(RunError) as caught:
        check_trackers(TrackingSpec(report_to=["trackio", "mlflow"]))
    first, second = caught.value.problems
    assert str(first) == (
        'tracking.report_to: trackio needs trackio, which is not installed. Fix: pip install "qwen-tune[tracking]"'
    )
    assert "MLflow needs alembic" in second.what
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a server has the database
    assert check_trackers(TrackingSpec(report_to=["mlflow"])) == []


def test_a_folder_in_the_working_directory_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "old_trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert util.find_spec("old_trackio") is not None
    assert not is_installed("old_trackio")
    assert is_installed("wandb")


def test_a_failing_tracker_is_reported_once_and_dropped(capsys):
    class Failing:
        view = run_id = ""
        calls = 0

        def log(self, step, metrics):
            self.calls += 1
            raise ConnectionError("no route to host\nat line 3")

        finish = log

    sink = Failing()
    tracker = Tracker("W&B", sink)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish(0)
    assert sink.calls == 1
    assert capsys.readouterr().err == (
        "W&B failed (ConnectionError: no route to host); the metrics it missed are in the run's metrics.jsonl\n"
    )


def test_a_tracker_that_cannot_start_is_dropped(tmp_path, capsys, monkeypatch):
    def fails(start):
        raise PermissionError("read-only")

    monkeypatch.setitem(trackers.TRACKERS, "trackio", fails)
    spec = TrackingSpec(report_to=["trackio"])
    assert tracking.start_trackers(spec, name="small", directory=tmp_path, facts={}) == []
    assert capsys.readouterr().err == (
        "trackio could not be started (PermissionError: read-only); this run is not tracked there\n"
    )


def test_tensorboard_reads_one_resumed_run(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked / "run" / "logs" / "tensorboard"
    assert all(re.fullmatch(r"events\.out\.tfevents\.\d{10}\.qwen-tune", file.name) for file in folder.iterdir())
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    assert {event.step: event.value for event in accumulator.Scalars("loss")} == LOSSES
    assert len(accumulator.Scalars("loss")) == len(LOSSES)
    assert "_hparams_/session_start_info" in accumulator.summary_metadata


def test_trackio_reads_one_resumed_run(tracked):
    code = (
        "import json\n"
        "from trackio.sqlite_storage import SQLiteStorage as storage\n"
        "[run] = storage.get_run_records('qwen-tune')\n"
        "logs = storage.get_logs('qwen-tune', run['name'], run_id=run['id'])\n"
        "print(json.dumps([run['name'], logs, storage.get_run_config('qwen-tune', run['name'])]))"
    )
    name, logs, config = read(code, TRACKIO_DIR=str(tracked / "trackio"))
    assert name == "small"
    assert {line["step"]: line["loss"] for line in logs} == LOSSES
    assert {key: value for key, value in config.items() if not key.startswith("_")} == PUBLIC


def test_mlflow_reads_one_resumed_run(tracked):
    code = (
        "import json\n"
        "from mlflow import MlflowClient\n"
        f"client = MlflowClient('sqlite:///{tracked}/run/logs/mlflow.db')\n"
        "[run] = client.search_runs([client.get_experiment_by_name('qwen-tune').experiment_id])\n"
        "losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, 'loss')]\n"
        "print(json.dumps([run.info.run_name, run.info.status, losses, run.data.params, run.data.tags]))"
    )
    name, status, losses, params, tags = read(code)
    assert (name, status) == ("small", "FINISHED")
    assert dict(losses) == LOSSES
    assert params == {key.replace(",", "_"): str(value) for key, value in PUBLIC.items()}
    assert set(tags) == {"mlflow.runName"}


def test_mlflow_records_how_each_run_ended(tmp_path):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    parts = [{"losses": {1: 2.0}, "exit": code} for code in (0, 130, 2)]
    run_job(tmp_path, ["mlflow"], parts, is_local=True)
    code = (
        "import json\n"
        "from mlflow import MlflowClient\n"
        f"client = MlflowClient('sqlite:///{tmp_path}/run/logs/mlflow.db')\n"
        "runs = client.search_runs([client.get_experiment_by_name('qwen-tune').experiment_id])\n"
        "print(json.dumps([run.info.status for run in sorted(runs, key=lambda run: run.info.start_time)]))"
    )
    assert read(code) == ["FINISHED", "KILLED", "FAILED"]


def test_wandb_wrote_every_step_and_only_public_facts(tracked):
    files = sorted((tracked / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "offline a resumed run is a separate run"
    losses, configs, texts = {}, [], ""
    for file in files:
        for record in wandb_records(file.read_bytes()):
            texts += str(record)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses[row["_step"]] = row["loss"]
            if record.WhichOneof("record_type") == "run":
                configs.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.run.config.update})
                assert (record.run.display_name, record.run.project) == ("small", "qwen-tune")
                assert (record.run.host, record.run.git.remote_url) == ("", "")
    assert losses == LOSSES
    for config in configs:
        assert {key: value for key, value in config.items() if key != "_wandb"} == PUBLIC
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", texts)


def test_local_files_of_trackers_do_not_contain_machine_user_or_secrets(tracked):
    files = [file for file in (tracked / "run", tracked / "trackio") for file in file.rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        content = file.read_bytes() + str(file.relative_to(tracked)).encode()
        for needle in ("canary", str(tracked), str(Path.home()), *long_names()):
            assert needle.encode() not in content, f"{file}: {needle}"
        assert not file.is_symlink()


def test_unreachable_servers_do_not_fail_a_run(tmp_path):
    result = run_job(
        tmp_path,
        ["wandb", "mlflow"],
        [{"losses": LOSSES, "exit": 0}],
        constants={"WANDB_START_SECONDS": 2},
        variables={
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        },
    )
    first, second = result.stderr.splitlines()
    assert first.startswith("W&B cannot be reached (CommError: ")
    assert first.endswith("; this run is tracked offline")
    assert second.startswith("MLflow could not be started (MlflowException: ")
    assert list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb"))


def read(code: str, **variables: str) -> Any:
    """What a script prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(**variables), capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def long_names() -> list[str]:
    """The names of this host and user, if they are too long to be in a file by chance."""
    return [name for name in (socket.gethostname(), os.environ.get("USER", "")) if len(name) > 7]


def test_a_run_is_tracked_as_its_metrics_say(workspace, qwen_tune, tmp_path_factory):
    """Through the command: without a login W&B stays offline with a warning; the figures are those of metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = tmp_path_factory.mktemp("nobody")
    result = qwen_tune(
        *("train", "recipe.yaml", "run.dir=run", "tracking.report_to=[wandb, tensorboard]"),
        cwd=workspace,
        HOME=str(home),
    )
    assert result.returncode == 0, result.stderr
    assert "W&B: no login found" in result.stdout
    lines = [json.loads(line) for line in (workspace / "run" / "metrics.jsonl").read_text().splitlines()]
    logs = workspace / "run" / "logs"
    events = EventAccumulator(str(logs / "tensorboard"))
    events.Reload()
    for key in ("loss", "eval_loss", "eval_rows_loss"):
        expected = [(line["step"], line[key]) for line in lines if key in line]
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in read] == [step for step, _ in expected]
        assert [value for _, value in read] == pytest.approx([value for _, value in expected], rel=1e-6)
    [offline] = logs.glob("wandb/offline-run-*/*.wandb")
    for file in (offline, *logs.glob("tensorboard/*")):
        assert str(workspace).encode() not in file.read_bytes()
