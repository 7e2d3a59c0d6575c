"""What is refused, with its fix, before anything is sent."""

from __future__ import annotations

import json
import shutil

import pytest
from pushing import BASE, TOKEN, writes

pytest_plugins = ("push_fixtures",)


def no_token(run, hub):
    return {"HF_TOKEN": ""}


def unknown_token(run, hub):
    return {"HF_TOKEN": "hf_" + "y" * 34}


def read_only(run, hub):
    hub.add_user("me", "hf_" + "r" * 34, role="read")
    return {"HF_TOKEN": "hf_" + "r" * 34}


def narrow(run, hub):
    hub.add_user("me", "hf_" + "n" * 34, role="fineGrained", scoped={"me": ["repo.content.read"]})
    return {"HF_TOKEN": "hf_" + "n" * 34}


def unfinished(run, hub):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "state": "interrupted"}))


def another_adapter(run, hub):
    record = json.loads((run / "merged" / "merge.json").read_text())
    record["adapters"] = [{"sha256": "0" * 64}]
    (run / "merged" / "merge.json").write_text(json.dumps(record))
    return ["--what", "merged"]


def changed_weights(run, hub):
    file = run / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return ["--what", "merged"]


def cut_weights(run, hub):
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def not_merged(run, hub):
    shutil.rmtree(run / "merged")
    return ["--what", "merged"]


def token_in_a_file(run, hub):
    path = run / "adapter" / "generation_config.json"
    path.write_text(json.dumps({"note": f"{TOKEN}"}))


def path_in_a_file(run, hub):
    path = run / "adapter" / "generation_config.json"
    path.write_text(json.dumps({"note": "/home/someone/models/qwen"}))


def path_in_the_metadata(run, hub):
    from qwen_tune.model.tensor_files import set_metadata

    set_metadata(run / "adapter" / "adapter_model.safetensors", {"format": "pt", "from": "/home/someone/base"})


def broken_metrics(run, hub):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (run / "run.json").write_text((run / "run.json").read_text().replace('"trained"', '"other"'))


def rank_as_text(run, hub):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": "16"}))


def malformed_merge_record(run, hub):
    path = run / "merged" / "merge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": [1]}))
    return ["--what", "merged"]


def no_weights(run, hub):
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x04")


def formats(run, hub):
    return ["--what", "export"]


FAULTS = [
    (no_token, "there is no token on this machine. Fix: make a token that can write"),
    (unknown_token, "the Hub does not accept the token"),
    (read_only, "the token of me can only read"),
    (narrow, "the token of me cannot write to any repository"),
    (unfinished, "the run has not finished (its state is interrupted)"),
    (another_adapter, "this model was not merged from the run's adapter. Fix: run `qwen-tune merge"),
    (changed_weights, "model.safetensors: it is not the file that the merge wrote"),
    (cut_weights, "adapter_model.safetensors: the file has"),
    (not_merged, "the run has no merged/. Fix: run `qwen-tune merge"),
    (token_in_a_file, "generation_config.json: it holds something that looks like a token"),
    (path_in_a_file, "generation_config.json: it holds a path of this machine (/home/someone/models/qwen)"),
    (path_in_the_metadata, "adapter_model.safetensors (its metadata): it holds a path of this machine"),
    (
        broken_metrics,
        "the record of the run is not as this version writes it "
        "(UndefinedError: 'dict object' has no attribute 'trained')",
    ),
    (rank_as_text, "adapter_config.json: its rank (r, rank_pattern) is not a number"),
    (malformed_merge_record, "merge.json: it is not what this version writes"),
    (no_weights, "adapter_model.safetensors"),
    (formats, "exported formats cannot be pushed yet"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_reported_before_anything_is_sent(hub, push, own_run, fault, message):
    given = fault(own_run, hub)
    changes = given if isinstance(given, dict) else {}
    result = push(own_run, "me/x", *(given if isinstance(given, list) else []), *BASE, **changes)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
    assert "Fix: " in result.stderr
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{run}", "lighthouse"), "lighthouse: this is not a name for the repository; expected owner/name"),
        (("{run}", "others/x", *BASE), "others/x: me cannot write under others"),
        (("{run}", "me/x"), "its base is a local directory, which nobody else has. Fix: name the base"),
        (("{run}", "me/x", "--base-id", "qwen/unknown"), "the licence of qwen/unknown is not known"),
        (("{run}/nothing", "me/x", *BASE), "there is no such directory"),
        (("{run}/logs", "me/x", *BASE), "expected a run directory"),
        (("{run}/merged", "me/x", "--what", "adapter", *BASE), "merged"),
        (("{run}", "me/x", "--create-pr", *BASE), "there is no such repository to open a pull request in"),
    ],
)
def test_a_wrong_command_line_is_reported(hub, push, own_run, arguments, message):
    (own_run / "logs").mkdir(exist_ok=True)
    result = push(*(word.replace("{run}", str(own_run)) for word in arguments))
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
    assert writes(hub) == []
