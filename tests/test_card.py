"""The card of a push, and what is looked for in all that leaves this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qwen_tune.publishing.card import BEGIN, END, Description, Licence, compose, kept_text, languages_of, licence_of
from qwen_tune.publishing.compute import duration, energy_kwh
from qwen_tune.publishing.curve import draw_losses
from qwen_tune.publishing.leaks import look_through
from qwen_tune.publishing.parts import PublishedBase

ABOUT = Description(
    title="lighthouse",
    repo_id="me/lighthouse",
    places={"adapter": ""},
    base=PublishedBase("Qwen/Qwen3-0.6B", "c" * 40),
    licence=Licence("apache-2.0"),
)


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_no_more_than_is_known():
    card = compose(ABOUT)
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "## Data" not in card
    assert "## Results" not in card
    assert "None" not in card
    assert "nan" not in card


def test_a_card_of_a_quantized_run_on_a_gpu_has_its_energy():
    facts = {
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 2,
        "quantization": {"load_in_4bit": True},
        "dtype": "bfloat16",
        "tokens_per_second": 10_000.0,
        "tokens": {"prepared": 10, "processed": 36_000_000, "supervised": 5},
    }
    card = compose(replace(ABOUT, facts=facts))
    # An hour on two boards of 700 W.
    assert energy_kwh(facts) == pytest.approx(1.4)
    assert "| Energy, estimated | 1.4 kWh (rated power of the board times these hours) |" in card
    assert "qlora" in front_matter(card)["tags"]
    assert "| Base held as | NF4, computed in bfloat16 |" in card
    assert "| Time in steps | 60 minutes |" in card
    assert energy_kwh({**facts, "device": "cpu (x86_64, 2 cores)"}) is None


def test_what_vllm_does_not_load_is_said():
    card = compose(replace(ABOUT, adapter={"r": 24, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 40}}))
    assert "vLLM does not load modules trained as a whole: serve the merged model." in card
    assert "--max-lora-rank 64" in card


def test_modelscope_is_loaded_from_there():
    card = compose(replace(ABOUT, is_on_modelscope=True))
    assert 'name = snapshot_download("me/lighthouse")' in card
    assert "modelscope download --model me/lighthouse" in card


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (None, ""),
        ("---\nlicense: mit\n---\n", ""),
        ("---\nlicense: mit\n---\n# Mine\n\ntext\n", "# Mine\n\ntext"),
        (f"---\na: b\n---\n# x\n{BEGIN}\nmy words\n{END}\nold", "my words"),
        (f"{BEGIN}\r\nmine\r\n{END}\r\n", "mine"),
        ("# x\n\nA LoRA adapter (rank 8) for `b`, trained with qwen-tune.", ""),
        ("---\n: : broken\n---\ntext", "text"),
    ],
)
def test_what_is_kept_of_a_card(card, kept):
    assert kept_text(card).strip() == kept


def test_what_is_kept_stays_through_many_pushes():
    card = compose(ABOUT, "a --- b\n\n```yaml\nx: 1\n```")
    for _ in range(3):
        card = compose(ABOUT, kept_text(card))
    assert kept_text(card) == "a --- b\n\n```yaml\nx: 1\n```"


def test_licence_and_languages_come_from_the_bases_card():
    card = "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://x/LICENSE\nlanguage: en\n---\n"
    assert licence_of(card) == Licence("other", "qwen-research", "https://x/LICENSE")
    assert languages_of(card) == ("en",)
    assert licence_of("# no front matter") is None
    assert licence_of(None) is None


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/models/qwen",
        '{"path": "/root/base"}',
        "~/models/base",
        "C:\\\\Users\\\\ann\\\\base",
        "see (/mnt/disk/rows.jsonl)",
        "hf_" + "a1" * 17,
        "https://ann:secret@example.com/x",
        "token THE-TOKEN-ITSELF here",
    ],
)
def test_what_must_not_leave_is_found(text):
    (problem,) = look_through("README.md", text, ["THE-TOKEN-ITSELF"], [], where="card")
    assert problem.fix
    assert "THE-TOKEN-ITSELF" not in problem.what
    assert "a1a1" not in problem.what


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/user/x",
        "write /think or /no_think",
        "an hour/two, and/or ~3 hours",
        "data/rows.jsonl",
        '{"eos_token": "<|im_end|>"}',
        "tmp/x ./home/y ../work/z",
    ],
)
def test_what_may_leave_is_let_through(text):
    assert look_through("README.md", text, ["THE-TOKEN-ITSELF"], [], where="card") == []


def test_words_of_a_vocabulary_are_no_paths():
    text = json.dumps({"vocab": {"/home/": 1, "~/x": 2}})
    assert look_through("tokenizer.json", text, [], [], where="x") == []
    assert look_through("tokenizer.json", text + "THE-TOKEN", ["THE-TOKEN"], [], where="x")


def test_the_same_losses_are_the_same_picture(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 3.0}, *({"step": n, "loss": 3 / n} for n in range(1, 5000))]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4999, "eval_loss": 0.1}]))
    picture = draw_losses(metrics)
    assert picture is not None
    assert picture == draw_losses(metrics)
    (tmp_path / "loss.png").write_bytes(picture)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (840, 384)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    metrics.write_text("")
    assert draw_losses(metrics) is None
    assert draw_losses(tmp_path / "none") is None


def test_durations_are_read_easily():
    assert [duration(seconds) for seconds in (5, 89, 90, 3600, 7260)] == [
        "5 seconds",
        "89 seconds",
        "2 minutes",
        "60 minutes",
        "2 h 1 min",
    ]
