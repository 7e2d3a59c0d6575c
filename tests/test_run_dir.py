from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from qwen_tune.disk import write_atomically
from qwen_tune.errors import RunError
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.resume import Plan

RECIPE = "name: one\n"


def finished(path, recipe=RECIPE) -> RunDir:
    run = RunDir(path)
    with run.recording(recipe):
        run.record({"world_size": 1})
    return run


def test_a_run_is_recorded_from_its_start_to_its_end(tmp_path):
    run = RunDir(tmp_path / "deep" / "run")
    with run.recording(RECIPE):
        assert json.loads(run.run_json.read_text())["state"] == "running"
        run.record({"steps": 3})
    assert json.loads(run.run_json.read_text()) == {"state": "finished", "exit": 0, "steps": 3}
    assert run.recipe.read_text() == RECIPE


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [(KeyboardInterrupt, "interrupted", 130), (RunError("no"), "failed", 2), (ZeroDivisionError, "failed", 1)],
)
def test_however_a_run_ends_it_is_recorded(tmp_path, error, state, code):
    run = RunDir(tmp_path / "run")
    with pytest.raises(BaseException), run.recording(RECIPE):  # noqa: B017, PT011
        raise error
    facts = json.loads(run.run_json.read_text())
    assert (facts["state"], facts["exit"]) == (state, code)


def test_the_same_recipe_has_nothing_to_do_and_another_one_is_refused(tmp_path):
    run = finished(tmp_path / "run")
    assert RunDir(run.path).check(RECIPE, overwrite=False, resume="auto").nothing_to_do
    assert RunDir(run.path).check(RECIPE, overwrite=True, resume="auto") == Plan()
    with pytest.raises(RunError, match=r"finished run.*run\.dir=.*--overwrite"):
        RunDir(run.path).check(RECIPE, overwrite=False, resume="never")
    with pytest.raises(RunError, match="of another recipe"):
        RunDir(run.path).check("train: {seed: 2}\n", overwrite=False, resume="auto")


def test_a_directory_with_other_files_is_never_taken(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"do not belong to a run \(thesis\.txt\)"):
        RunDir(tmp_path).check(RECIPE, overwrite=True, resume="auto")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not a directory"):
        RunDir(tmp_path / "file").check(RECIPE, overwrite=False, resume="auto")


def test_folders_that_only_have_our_names_are_not_taken(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.log").write_text("")
    with pytest.raises(RunError, match=r"do not belong to a run \(logs\)"):
        RunDir(tmp_path).check(RECIPE, overwrite=True, resume="auto")


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    run = finished(tmp_path / "run")
    (run.path / ".adapter.123.tmp").mkdir()
    (run.path / ".run.json.123.tmp").write_text("")
    assert RunDir(run.path).check(RECIPE, overwrite=True, resume="auto") == Plan()
    with RunDir(run.path).recording(RECIPE, overwrite=True):
        assert {entry.name for entry in run.path.iterdir()} == {".lock", "recipe.yaml", "run.json"}


def test_a_run_that_finished_in_the_meantime_is_not_wiped(tmp_path):
    late = RunDir(tmp_path / "run")
    assert late.check(RECIPE, overwrite=False, resume="auto") == Plan()
    finished(late.path)
    with pytest.raises(RunError, match="another process has changed it in the meantime"):
        late.begin(RECIPE)
    assert json.loads(late.run_json.read_text())["state"] == "finished"


def test_an_unwritable_place_is_reported_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file is not a directory.*run\.dir="):
        RunDir(tmp_path / "file" / "run").check(RECIPE, overwrite=False, resume="auto")


def test_overwriting_deletes_the_earlier_run(tmp_path):
    run = finished(tmp_path / "run")
    (run.path / "adapter").mkdir()
    run.metrics.write_text("{}\n")
    with RunDir(run.path).recording(RECIPE, overwrite=True):
        pass
    assert not run.adapter.exists()
    assert not run.metrics.exists()


def test_a_live_process_holds_its_directory_until_it_is_killed(tmp_path):
    path = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from qwen_tune.runs.directory import RunDir\n"
        "with RunDir(Path(sys.argv[1])).recording('name: one\\n'):\n"
        "    print('started', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        with pytest.raises(RunError, match="in use by a process"):
            RunDir(path).check(RECIPE, overwrite=True, resume="auto")
        with pytest.raises(RunError, match="another process uses the run directory"):
            RunDir(path).begin(RECIPE)
    finally:
        process.kill()
        process.communicate()
    assert RunDir(path).check(RECIPE, overwrite=True, resume="auto") == Plan()
    # It ended before its first checkpoint. A run with a damaged checkpoint or an adapter is not discarded like that.
    assert RunDir(path).check(RECIPE, overwrite=False, resume="auto") == Plan(starts_over=True)
    with pytest.raises(RunError, match=r"unfinished run; train\.resume is never"):
        RunDir(path).check(RECIPE, overwrite=False, resume="never")
    (path / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(RunError, match="no checkpoint to resume from; step-3: it has no manifest"):
        RunDir(path).check(RECIPE, overwrite=False, resume="auto")
    shutil.rmtree(path / "checkpoints")
    (path / "adapter").mkdir()
    with pytest.raises(RunError, match="it has no checkpoint to resume from"):
        RunDir(path).check(RECIPE, overwrite=False, resume="auto")


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
