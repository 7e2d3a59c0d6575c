"""Bases and data sets from the Hub, read by its real client from a local server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY
from fakes.hub_server import COMMIT, serve


@pytest.fixture
def hub(tmp_path):
    data = tmp_path / "dataset"
    data.mkdir()
    call = {"role": "assistant", "content": "", "tool_calls": None}
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {**call, "content": f"{i}!"}]} for i in range(40)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (data / "more").mkdir()
    (data / "more" / "train.jsonl").write_text(json.dumps(rows[7]) + "\n")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  default: true\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: more\n  data_files: more/train.jsonl\n---\n"
    )
    with serve({"models/me/tiny": TINY, "datasets/me/rows": data}) as address:
        yield {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }


def recipe(folder: Path, **changes: str) -> Path:
    path = folder / "hub.yaml"
    base, data = changes.get("base", "me/tiny"), changes.get("data", "me/rows")
    path.write_text(
        f"model: {{base: {base}}}\n"
        f"data: {{train: [{{path: {data}{changes.get('more', '')}}}], max_length_tokens: 256}}\n"
        "train: {max_steps: 2, global_batch_size: 1}\n"  # the first step of a warm-up has no learning rate
    )
    return path


def test_a_base_and_data_from_the_hub_are_trained_and_recorded(hub, qwen_tune, tmp_path):
    result = qwen_tune("train", str(recipe(tmp_path)), cwd=tmp_path, **hub)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "hub"
    facts = json.loads((run / "run.json").read_text())
    assert facts["base"]["id"] == "me/tiny"
    assert facts["base"]["revision"] == COMMIT
    assert facts["rows"]["read"] == 40
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", COMMIT)
    assert "base_model: me/tiny" in (run / "adapter" / "README.md").read_text()
    merged = qwen_tune("merge", str(run), cwd=tmp_path, **{**hub, "HF_HUB_OFFLINE": "1"})
    assert merged.returncode == 0, merged.stderr
    # The published adapter, on a machine that has neither it nor its base.
    with serve({"models/me/tiny": TINY, "models/me/adapter": run / "adapter"}) as address:
        elsewhere = {**hub, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "elsewhere")}
        published = qwen_tune("merge", "me/adapter", cwd=tmp_path, **elsewhere)
        assert published.returncode == 0, published.stderr
        unknown = qwen_tune("merge", "me/other", cwd=tmp_path, **elsewhere)
    assert unknown.returncode == 2
    assert "me/other: neither a directory nor an adapter that the Hub gives us" in unknown.stderr
    models = [folder / "model.safetensors" for folder in (run / "merged", tmp_path / "adapter-merged")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_split_is_chosen_and_a_preview_downloads_no_weights(hub, qwen_tune, tmp_path):
    path = recipe(tmp_path, more=", split: test")
    result = qwen_tune("preview", str(path), "--json", "--all", cwd=tmp_path, **hub)
    assert result.returncode == 0, result.stderr
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sample["source"] for sample in samples] == [f"me/rows[test]:{number}" for number in range(1, 6)]
    assert samples[0]["supervised_text"] == ["0!<|im_end|>"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_subset_and_a_revision_are_chosen(hub, qwen_tune, tmp_path):
    path = recipe(tmp_path, more=f", subset: more, revision: {COMMIT}")
    result = qwen_tune("preview", str(path), "--json", "--all", cwd=tmp_path, **hub)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["supervised_text"] for line in result.stdout.splitlines()] == [["7!<|im_end|>"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base": "me/other"}, "me/other: neither a directory nor a model that the Hub gives us"),
        ({"data": "me/other"}, "me/other: not a local file or folder, nor a data set that the Hub lets us read"),
        ({"more": ", split: dev"}, "dev"),
    ],
)
def test_what_the_hub_does_not_have_is_reported_in_one_message(hub, qwen_tune, tmp_path, changes, expected):
    result = qwen_tune("train", str(recipe(tmp_path, **changes)), cwd=tmp_path, **hub)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
