from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from fakes.wandb_server import serve
from test_tracking import KEY, LOSSES, long_names, run_job

from qwen_tune.errors import RunError
from qwen_tune.recipe.schema import TrackingSpec
from qwen_tune.tracking.sinks import has_wandb_login, wandb_mode
from qwen_tune.tracking.tracking import check_trackers


@pytest.fixture
def clean(monkeypatch, tmp_path) -> Path:
    """An environment in which no tracker was ever set up. Returns its home."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")) or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_login_wandb_is_offline_and_says_so(clean):
    [warning] = check_trackers(TrackingSpec(report_to=["wandb"]))
    assert warning.startswith("W&B: no login found (WANDB_API_KEY, `wandb login`); this run is tracked offline.")
    assert wandb_mode() == "offline"


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandbs_environment_decides(clean, monkeypatch, variables, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == mode
    assert len(check_trackers(TrackingSpec(report_to=["wandb"]))) == (mode == "disabled")


def test_wandb_that_must_be_online_needs_a_login(clean, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(RunError, match=r"no login for api\.forge\.coreweave\.com.*`wandb login`"):
        check_trackers(TrackingSpec(report_to=["wandb"]))


@pytest.mark.parametrize(
    ("machine", "address", "found"),
    [
        ("api.wandb.ai", None, True),
        ("api.forge.coreweave.com", None, True),
        ("elsewhere.org", None, False),
        ("wandb.firm.org:8080", "http://wandb.firm.org:8080", True),
        ("api.wandb.ai", "http://wandb.firm.org:8080", False),
    ],
)
def test_logins_are_found_where_wandb_looks(clean, monkeypatch, machine, address, found):
    (clean / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    if address is not None:
        settings = clean / ".config" / "wandb" / "settings"  # where `wandb login --host` notes it
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[default]\nbase_url = {address}\n")
        assert has_wandb_login() == found
        settings.unlink()
        monkeypatch.setenv("WANDB_BASE_URL", address)
    assert has_wandb_login() == found
    (clean / "other").write_text("not a netrc")
    monkeypatch.setenv("NETRC", "~/other")
    assert not has_wandb_login()


def test_wandb_that_was_switched_off_here_stays_off(clean, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (clean / "wandb").mkdir()
    (clean / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_mode() == "offline"
    assert check_trackers(TrackingSpec(report_to=["wandb"])) == []


def test_wandb_gets_the_losses_online_and_nothing_else(tmp_path):
    with serve() as wandb:
        parts = [
            {"losses": {step: LOSSES[step] for step in (1, 2, 3)}, "exit": 130},
            {"losses": {step: LOSSES[step] for step in (3, 4)}, "exit": 0, "resumed_step": 2},
        ]
        result = run_job(tmp_path, ["wandb"], parts, variables={"WANDB_BASE_URL": wandb.address})
        assert result.stderr == ""
        [address] = json.loads(result.stdout.splitlines()[1])
        assert address.startswith(f"{wandb.address}/team/qwen-tune/runs/")
    # Step 3 was logged twice and sent once: the run was resumed under its id.
    losses = [(line["_step"], line["loss"]) for line in wandb.lines["wandb-history.jsonl"]]
    assert losses == list(LOSSES.items())
    assert wandb.finished == [130, 0]
    streams = {path for _, path, _ in wandb.requests if path.endswith("/file_stream")}
    assert streams == {f"/files/team/qwen-tune/{address.split('/')[-1]}/file_stream"}
    assert "RunResumeStatus" in wandb.operations()
    for headers, path, body in wandb.requests:
        sent = re.sub(r"Authorization: .*", "", headers) + path + body
        for needle in ("canary", str(tmp_path), str(Path.home()), *long_names()):
            assert needle not in sent
        if "mutation UpsertBucket" in body:
            variables = json.loads(body)["variables"]
            assert not any(variables.get(key) for key in ("host", "program", "repo", "commit"))
