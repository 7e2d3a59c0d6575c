"""No token of the environment is in anything that a run writes, prints or sends: all of it is searched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import TINY, environment, make_workspace
from fakes.hub_write_server import serve_hub
from fakes.wandb_server import serve
from fork_server import MODULES, fork_server

HUB = "hf_" + "CanaryOfTheHub" + "0123456789abcdef"
SECRETS = {
    "HF_TOKEN": HUB,
    "WANDB_API_KEY": "canary0of0wandb0" + "0123456789abcdef" * 2,  # of the length that its client wants
    "MODELSCOPE_API_TOKEN": "ms-canary-of-modelscope",
    "AWS_SECRET_ACCESS_KEY": "CanaryOfAmazon/0123456789",
    "OPENAI_API_KEY": "sk-CanaryOfOpenAI0123456789",
}
RUN = (
    "hub={repo_id: me/canary-lora, push: [adapter, merged], base_id: qwen/tiny, license: apache-2.0}",
    "tracking.report_to=[wandb, tensorboard, trackio, mlflow]",
    "export.merge=true",
    "train.max_steps=2",
    "train.save_steps=1",
    'train.eval_prompts=["Hello!"]',
    "train.eval_steps=1",
)


def leaks(name: str, data: bytes) -> Iterator[str]:
    for variable, secret in SECRETS.items():
        if secret.encode() in data:
            yield f"{variable} in {name}"


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, bytes]:
    """Everything from a run that trains, tracks, merges and pushes, and from one that crashes with a traceback."""
    folder = make_workspace(tmp_path_factory.mktemp("canary"))
    found = {}
    with serve_hub(token=HUB) as hub, serve() as wandb:
        hub.add_folder("qwen/tiny", TINY)
        variables = environment(
            **SECRETS,
            HF_ENDPOINT=hub.address,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HOME=str(folder / "hf"),
            HOME=str(folder / "home"),
            QWEN_TUNE_CACHE=str(folder / "cache"),
            WANDB_BASE_URL=wandb.address,
            WANDB_DIR=str(folder / "wandb"),
        )
        with fork_server((*MODULES, "wandb", "trackio", "mlflow"), variables) as server:
            runs = {
                "run": server("train", "recipe.yaml", "run.dir=run", *RUN, cwd=folder),
                "crash": server(
                    "train", "recipe.yaml", "run.dir=crash", *RUN, cwd=folder, ACCELERATE_MIXED_PRECISION="nonsense"
                ),
                "refused": server("push", "run", "me/other", "--base-id", "qwen/absent", cwd=folder),
            }
        assert [result.returncode for result in runs.values()] == [0, 1, 2], [result.stderr for result in runs.values()]
        assert "Traceback" in runs["crash"].stderr
        for name, result in runs.items():
            found |= {f"{name}: stdout": result.stdout.encode(), f"{name}: stderr": result.stderr.encode()}
        found["pushed"] = hub.bodies
        assert {"README.md", "adapter/adapter_config.json", "merged/config.json"} <= set(hub.received("regular"))
        for number, (headers, path, body) in enumerate(wandb.requests):
            # Only this header may have the token.
            sent = "\n".join(line for line in headers.splitlines() if not line.lower().startswith("authorization:"))
            found[f"W&B: {number}"] = f"{sent}\n{path}\n{body}".encode()
    files = [path for path in folder.rglob("*") if path.is_file() and "tiny-qwen" not in path.parts]
    return found | {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_secret_is_written_printed_or_sent(traces):
    assert not [leak for name, data in traces.items() for leak in leaks(name, data)]


def test_the_search_covers_everything_that_a_run_leaves(traces):
    names = set(traces)
    expected = {
        "run/run.json",
        "run/recipe.yaml",
        "run/metrics.jsonl",
        "run/answers.jsonl",
        "run/adapter/README.md",
        "run/adapter/adapter_model.safetensors",
        "run/merged/merge.json",
        "run/checkpoints/step-2/trainer_state.json",
        "run/checkpoints/step-2/manifest.json",
        "crash: stderr",
        "W&B: 0",
        "pushed",
    }
    assert expected <= names, expected - names
    for part in ("run/logs/wandb/", "run/logs/tensorboard", "run/logs/mlflow", "trackio/", "cache/prepared"):
        assert any(part in name for name in names), (part, sorted(names))
    assert len(traces["pushed"]) > 500_000
