"""Pushing a run with the Hub's own client, to a local server with every fault that a Hub can have."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, make_workspace
from fakes.hub_write_server import ServedHub, serve_hub
from pushing import BASE, TOKEN, client, writes

pytest_plugins = ("push_fixtures",)


def sent(hub: ServedHub) -> list[str]:
    return [path for kind in ("regular", "lfs") for path in hub.received(kind)]


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.manual_seed(0)
ids = torch.randint(0, 300, (2, 24))
with torch.inference_mode():
    for name, kind, options in json.loads(sys.argv[1]):
        if kind == "adapter":
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("qwen/tiny"), name, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
        logits = model(ids).logits
        has_template = AutoTokenizer.from_pretrained(name, **options).chat_template is not None
        print(json.dumps([logits.double().sum().item(), logits.flatten()[::997].tolist(), has_template]))
"""


def test_a_pushed_model_answers_as_the_trained_one(hub, push, run, tmp_path):
    first = push(run, "me/lighthouse", *BASE)
    assert first.returncode == 0, first.stderr
    assert f"pushed adapter of quickstart: {hub.address}/me/lighthouse (private)" in first.stdout
    second = push(run, "me/both", "--what", "adapter", "--what", "merged", *BASE)
    assert second.returncode == 0, second.stderr
    third = push(run, "me/full", "--what", "merged", "--public", *BASE)
    assert third.returncode == 0, third.stderr
    private = {name: hub.repository(f"me/{name}").private for name in ("lighthouse", "both", "full")}
    assert private == {"lighthouse": True, "both": True, "full": False}

    # No file names this machine, and only files of the model were sent.
    for name in private:
        for path, data in hub.repository(f"me/{name}").files().items():
            assert str(run.parent).encode() not in data, path
            assert str(Path.home()).encode() + b"/" not in data, path
    files = hub.repository("me/lighthouse").files()
    assert files.keys() == {
        *(".gitattributes", "README.md", "recipe.yaml", "loss.png", "adapter_config.json"),
        *("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        "chat_template.jinja",
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "qwen/tiny"
    facts = json.loads((run / "run.json").read_text())
    assert f"refs/tags/quickstart-{facts['fingerprint'][:12]}" in hub.repository("me/lighthouse").refs

    # As others load it: with an empty cache, from the server alone.
    elsewhere = {**client(hub, tmp_path), "HF_HOME": str(tmp_path / "elsewhere")}
    wanted: list[Any] = [["me/lighthouse", "adapter", {}], ["me/full", "merged", {}]]
    wanted += [["me/both", kind, {"subfolder": kind}] for kind in ("adapter", "merged")]
    wanted += [[str(run / "adapter"), "adapter", {}], [str(run / "merged"), "merged", {}]]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(wanted)], env=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert loaded.returncode == 0, loaded.stderr
    answers = [json.loads(line) for line in loaded.stdout.splitlines() if line.startswith("[")]
    assert answers[0] == answers[2] == answers[4]
    assert answers[1] == answers[3] == answers[5]
    # The published recipe can be loaded again, given the data.
    (tmp_path / "quickstart.jsonl").write_bytes((ROOT / "data" / "quickstart.jsonl").read_bytes())
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    from qwen_tune.recipe.files import load_recipe

    assert load_recipe(tmp_path / "recipe.yaml").model.base == "qwen/tiny"


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_existing_files_are_not_sent_again(base, run, tmp_path, xet):
    with serve_hub(token=TOKEN, lfs=not xet) as hub:
        hub.add_folder("qwen/tiny", base)
        command = [
            str(Path(sys.executable).with_name("qwen-tune")),
            "push",
            str(run),
            "me/x",
            "--what",
            "merged",
            *BASE,
        ]
        env = client(hub, tmp_path, HF_HUB_DISABLE_XET="0" if xet else "1")
        for expected in (True, False):
            hub.forget()
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            assert bool(sent(hub)) == expected, sent(hub)
        head = hub.repository("me/x").refs["refs/heads/main"]
        assert len(hub.repository("me/x").commits[head].files) > 5


def test_offline_mode_is_reported(hub, run, tmp_path, qwen_tune):
    offline = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    result = qwen_tune("push", str(run), "me/x", *BASE, cwd=tmp_path, **offline)
    assert result.returncode == 2
    assert "the Hub's client is set to offline mode (HF_HUB_OFFLINE). Fix: unset it" in result.stderr


def test_a_dry_run_lists_everything_and_writes_nothing(hub, push, own_run):
    (own_run / "adapter" / "training_args.bin").write_text("hub_token=secret")
    (own_run / "adapter" / "notes.docx").write_text("mine")
    result = push(own_run, "me/x", "--dry-run", *BASE)
    assert result.returncode == 0, result.stderr
    assert "the Hub: me/x (private, will be created), as me" in result.stdout
    assert re.search(r"MB|kB", result.stdout)
    for name in ("adapter_model.safetensors", "README.md", "recipe.yaml", "loss.png"):
        assert name in result.stdout
    assert "training_args.bin: it holds settings of the trainer, which can include tokens" in result.stdout
    assert "notes.docx: not known as a part of a model" in result.stdout
    assert writes(hub) == []


def test_a_public_repository_is_refused_without_public(hub, push, run, base):
    hub.add_folder("me/open", base)
    before = hub.repository("me/open").refs["refs/heads/main"]
    result = push(run, "me/open", *BASE)
    assert result.returncode == 2
    assert "me/open: this repository is public, and the push would be public as well" in result.stderr
    assert hub.repository("me/open").refs["refs/heads/main"] == before
    assert push(run, "me/open", "--public", "--what", "merged", *BASE).returncode == 0


def test_only_weights_of_an_earlier_push_are_deleted(hub, push, run):
    assert push(run, "me/x", "--what", "merged", *BASE).returncode == 0
    model = hub.repository("me/x").files()
    refused = push(run, "me/x", *BASE)
    assert refused.returncode == 2
    assert "me/x: it holds a full model in its root, where the adapter would go" in refused.stderr
    # In folders they are next to it, and nothing at the root changes.
    put(hub, "me/x", "consolidated.safetensors", "by hand")
    both = push(run, "me/x", "--what", "merged", "--what", "adapter", "--what", "adapter", *BASE)
    assert both.returncode == 0, both.stderr
    files = hub.repository("me/x").files()
    assert files["model.safetensors"] == model["model.safetensors"]
    assert {"consolidated.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors"} <= files.keys()
    # Other shards of an earlier push are deleted, and the dry run says so.
    put(hub, "me/x", "merged/model-00001-of-00002.safetensors", "old")
    planned = push(run, "me/x", "--what", "adapter", "--what", "merged", "--dry-run", *BASE)
    assert "would delete, as weights of an earlier push:\n  merged/model-00001-of-00002.safetensors" in planned.stdout
    done = push(run, "me/x", "--what", "adapter", "--what", "merged", *BASE)
    assert "1 old weight files deleted" in done.stdout
    assert hub.repository("me/x").files().keys() == files.keys()


def test_a_part_is_in_one_folder_only(hub, push, run):
    assert push(run, "me/x", "--what", "merged", "--what", "adapter", *BASE).returncode == 0
    refused = push(run, "me/x", *BASE)
    assert refused.returncode == 2
    assert "me/x: an earlier push put this part into adapter/; there would be another one at the root" in refused.stderr


def test_a_model_is_refused_next_to_an_adapter(hub, push, run):
    assert push(run, "me/x", *BASE).returncode == 0
    hub.forget()
    refused = push(run, "me/x", "--what", "merged", "--create-pr", "--dry-run", *BASE)
    assert refused.returncode == 2
    assert "it holds an adapter in its root, where the full model would go" in refused.stderr
    assert writes(hub) == []


def test_a_pull_request_to_another_owner_is_possible(hub, push, run, base):
    hub.add_folder("bob/open", base)
    put(hub, "bob/open", "config.json", "{}")
    files = hub.repository("bob/open").at("main").files
    hub.repository("bob/open").commit("refs/heads/main", "clean", {"README.md": files["README.md"]}, "bob")
    theirs = hub.repository("bob/open").open_pull_request("Upload adapter of quickstart", "", "bob", "draft")
    done = push(run, "bob/open", "--create-pr", "--public", *BASE)
    assert done.returncode == 0, done.stderr
    assert theirs.status == "draft"
    ours = hub.repository("bob/open").pull_requests[-1]
    assert (ours.author, ours.status) == ("me", "open")


def test_files_that_are_not_of_the_model_are_not_sent(hub, push, own_run):
    for name in ("customers.txt", "train_rows.json", "all_results.json"):
        (own_run / "merged" / name).write_text("{}")
    planned = push(own_run, "me/x", "--what", "merged", "--dry-run", *BASE)
    assert planned.returncode == 0, planned.stderr
    for name in ("customers.txt", "train_rows.json", "all_results.json"):
        assert f"{name}: not known as a part of a model" in planned.stdout


def test_a_run_is_found_from_within(hub, commands, run, tmp_path):
    result = commands("push", ".", "me/x", "--dry-run", *BASE, cwd=run / "adapter")
    assert result.returncode == 0, result.stderr
    assert "recipe.yaml" in result.stdout


def test_a_bare_adapter_has_a_shorter_card(hub, push, run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, bare)
    result = push(bare, "me/bare", *BASE)
    assert result.returncode == 0, result.stderr
    card = hub.repository("me/bare").files()["README.md"].decode()
    assert "AutoTokenizer.from_pretrained(base)" in card
    assert "qwen-tune" not in card.split("<!--")[0]
    assert "Made with" not in card


def test_the_owners_text_is_kept(hub, push, run):
    assert push(run, "me/x", *BASE).returncode == 0
    repository = hub.repository("me/x")
    card = repository.files()["README.md"].decode()
    matter = front_matter(card.encode())
    assert (matter["base_model"], matter["base_model_relation"]) == ("qwen/tiny", "adapter")
    assert (matter["license"], matter["language"]) == ("apache-2.0", ["en"])
    assert {"qwen", "lora", "chatml"} <= set(matter["tags"])
    for section in ("How to use it", "Training", "Data", "Results", "Compute", "Limits", "Recipe"):
        assert f"## {section}\n" in card
    assert "![Loss over steps](loss.png)" in card
    put(hub, "me/x", "README.md", card.replace("is kept -->\n", "is kept -->\n## About\n\nMy words.\n"))
    assert push(run, "me/x", *BASE).returncode == 0
    renewed = repository.files()["README.md"].decode()
    assert "## About\n\nMy words." in renewed
    # A card that was written by hand is not lost either.
    put(hub, "me/x", "README.md", "---\nlicense: mit\n---\n\n# By hand\n\nLong work.\n")
    assert push(run, "me/x", *BASE).returncode == 0
    assert "# By hand\n\nLong work.\n" in repository.files()["README.md"].decode()


def put(hub: ServedHub, id: str, name: str, text: str) -> None:
    from fakes.hub_store import Blob

    repository = hub.repository(id)
    repository.commit("refs/heads/main", "by hand", {**repository.at("main").files, name: Blob(text.encode())}, "me")


def test_a_branch_and_a_pull_request(hub, push, run):
    assert push(run, "me/x", *BASE).returncode == 0
    assert push(run, "me/x", "--revision", "v2", *BASE).returncode == 0
    assert "adapter_model.safetensors" in hub.repository("me/x").files("v2")
    # A pull request that failed is resumed.
    put(hub, "me/x", "adapter_config.json", "{}")
    hub.fail("POST .*/commit/", status=403, times=1)
    assert push(run, "me/x", "--create-pr", *BASE).returncode == 2
    done = push(run, "me/x", "--create-pr", *BASE)
    assert done.returncode == 0, done.stderr
    (request,) = hub.repository("me/x").pull_requests
    assert f"{hub.address}/me/x/discussions/{request.num}" in done.stdout
    assert request.status == "open"
    assert hub.repository("me/x").files()["adapter_config.json"] == b"{}"
    assert b"qwen/tiny" in hub.repository("me/x").files(request.ref)["adapter_config.json"]


def test_a_renamed_repository_is_found(hub, push, run):
    assert push(run, "me/old", *BASE).returncode == 0
    hub.rename("me/old", "me/new")
    hub.forget()
    result = push(run, "me/old", *BASE)
    assert result.returncode == 0, result.stderr
    assert f"{hub.address}/me/new" in result.stdout
    assert ("models", "me/old") not in hub.repositories


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "is_retried"),
    [
        ("POST .*/commit/", 429, {"Retry-After": "1"}, True),
        ("POST .*/commit/", 500, {}, True),
        ("GET /api/whoami", 503, {"Retry-After": "0"}, True),
        ("POST .*/objects/batch", 502, {}, True),
        ("POST /api/repos/create", 409, {}, False),
        ("POST .*/commit/", 403, {}, False),
        ("POST .*/preupload/", 401, {}, False),
        ("POST .*/commit/", 404, {"X-Error-Code": "RepoNotFound"}, False),
    ],
)
def test_a_fault_of_the_hub_is_retried_or_reported(hub, push, run, pattern, status, headers, is_retried):
    hub.fail(pattern, status=status, headers=headers, times=1)
    result = push(run, "me/x", *BASE)
    if is_retried:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 2, result.stdout
        assert "Fix: " in result.stderr
        assert push(run, "me/x", *BASE).returncode == 0
    assert "adapter_model.safetensors" in hub.repository("me/x").files()


def test_a_cut_connection_and_a_slow_answer_are_retried(hub, push, run):
    hub.cut("PUT ", after_bytes=100_000)
    hub.lose("POST .*/commit/")
    hub.slow("GET /api/models/", seconds=1.0)
    result = push(run, "me/x", *BASE)
    assert result.returncode == 0, result.stderr
    sizes = {name: len(data) for name, data in hub.repository("me/x").files().items()}
    assert sizes["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_hub_that_does_not_answer_is_reported(hub, push, run):
    hub.fail("GET /api/whoami", status=503, headers={"Retry-After": "3600"}, times=math.inf)
    result = push(run, "me/x", *BASE)
    assert result.returncode == 2
    assert "the Hub is busy or has an error (503)" in result.stderr
    assert writes(hub) == []


def test_a_killed_push_resumes(hub, push, run, tmp_path):
    arrived, go = hub.hold("POST .*/commit/")
    command = [str(Path(sys.executable).with_name("qwen-tune")), "push", str(run), "me/x", "--what", "merged", *BASE]
    process = subprocess.Popen(command, env=client(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert arrived.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go.set()
    assert hub.received("lfs") == ["model.safetensors"] or hub.repository("me/x").lfs
    hub.forget()
    result = push(run, "me/x", "--what", "merged", *BASE)
    assert result.returncode == 0, result.stderr
    assert not [path for method, path, _ in hub.requests if method == "PUT"]
    assert hub.repository("me/x").files()["model.safetensors"] == (run / "merged" / "model.safetensors").read_bytes()


def test_a_recipe_pushes_after_training_and_a_failed_push_does_not_fail_the_run(hub, tmp_path):
    make_workspace(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    pushed = "hub: {repo_id: me/small, base_id: qwen/tiny, push: [adapter, merged], repo_ids: {merged: me/full}}\n"
    recipe.write_text(recipe.read_text() + "export: {merge: true}\n" + pushed)
    hub.fail("POST /api/repos/create", status=403, times=1)
    hub.fail("GET /api/whoami", status=200, body={"name": None}, times=1)  # when training begins
    command = [str(Path(sys.executable).with_name("qwen-tune")), "train", "recipe.yaml"]
    result = subprocess.run(
        command, cwd=tmp_path, env=client(hub, tmp_path), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "runs/small/run.json").read_text())["state"] == "finished"
    assert "warning: the push after training would fail: the Hub: does not name the owner of the token" in result.stdout
    assert "warning: not pushed to me/small: me/small: the token does not allow this" in result.stdout
    again = "qwen-tune push runs/small me/small --what adapter --base-id qwen/tiny"
    assert f"resume with: {again}" in result.stdout
    assert f"pushed merged of small: {hub.address}/me/full (private)" in result.stdout
    assert "model.safetensors" in hub.repository("me/full").files()
    words = [str(Path(sys.executable).with_name("qwen-tune")), *again.split()[1:]]
    result = subprocess.run(words, cwd=tmp_path, env=client(hub, tmp_path), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "adapter_model.safetensors" in hub.repository("me/small").files()
    # Run again, the recipe prints the command to push.
    result = subprocess.run(
        command, cwd=tmp_path, env=client(hub, tmp_path), capture_output=True, text=True, timeout=300
    )
    assert f"to push it: {again}" in result.stdout
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
