"""The card of a push, and what is looked for in all that leaves this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qwen_tune.errors import PublishError
from qwen_tune.publishing.card import (
    BEGIN,
    END,
    Description,
    Licence,
    compose,
    duration,
    energy_kwh,
    kept_text,
    languages_of,
    licence_of,
)
from qwen_tune.publishing.curve import draw_losses
from qwen_tune.publishing.leaks import look_through
from qwen_tune.publishing.parts import PublishedBase
from qwen_tune.publishing.public_recipe import public_recipe
from qwen_tune.recipe.schema import Recipe

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
    others = ["cpu (x86_64, 2 cores)", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090 Laptop GPU"]
    assert [energy_kwh({**facts, "device": name}) for name in others] == [None] * len(others)
    assert energy_kwh({**facts, "device": "NVIDIA A100 80GB PCIe"}) == pytest.approx(0.6)


def test_what_vllm_does_not_load_is_said():
    card = compose(replace(ABOUT, adapter={"r": 24, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 40}}))
    assert "vLLM does not load modules trained as a whole: serve the merged model." in card
    assert "--max-lora-rank 64" in card


def test_modelscope_is_loaded_from_there():
    card = compose(replace(ABOUT, site="modelscope"))
    assert 'name = snapshot_download("me/lighthouse")' in card
    assert "modelscope download --model me/lighthouse" in card
    assert "huggingface.co" not in card


def test_a_card_speaks_of_the_step_whose_adapter_it_is():
    facts = {"steps": 90, "best": {"step": 60, "loss": 0.5}, "losses": {"eval_before": 2.0, "eval_after": 0.5}}
    assert "| Taken from step | 60, of the lowest held-out loss |" in compose(replace(ABOUT, facts=facts))


def test_a_card_tells_what_changed_on_the_way_and_names_no_folder():
    drift = [
        {"step": 6, "field": "train.learning_rate", "was": 0.001, "now": 0.0005},
        {"step": 9, "field": "data.train[0].path", "was": "/canary/old.jsonl", "now": "/canary/new.jsonl"},
    ]
    bad = [{"step": step, "loss": None, "grad_norm": None, "rows": ["canary.jsonl:3"]} for step in (4, 99)]
    card = compose(replace(ABOUT, facts={"steps": 12, "drift": drift, "bad_steps": bad}))
    changes = "`train.learning_rate` from 0.001 to 0.0005 after step 6, `data.train[0].path` after step 9"
    assert f"| Changed on the way | {changes} |" in card
    assert "| Steps left out | 1, as their loss was not finite" in card
    assert "canary" not in card


def test_modules_by_a_pattern_are_shown_as_it():
    assert "| Trained modules | `.*_proj\\|head` |" in compose(
        replace(ABOUT, adapter={"r": 8, "target_modules": ".*_proj|head"})
    )


def test_the_tokenizer_is_the_bases_where_none_is_sent():
    assert 'AutoTokenizer.from_pretrained(base, revision="ccc' in compose(ABOUT)
    whole = replace(ABOUT, files=frozenset({"tokenizer_config.json"}))
    assert "AutoTokenizer.from_pretrained(name)" in compose(whole)


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (None, ""),
        ("---\nlicense: mit\n---\n", ""),
        ("---\nlicense: mit\n---\n# Mine\n\ntext\n", "# Mine\n\ntext"),
        (f"---\na: b\n---\n# x\n{BEGIN}\nmy words\n{END}\nold", "my words"),
        (f"{BEGIN}\r\nmine\r\n{END}\r\n", "mine"),
        (
            "# x\n\nA model trained with qwen-tune for our museum.",
            "# x\n\nA model trained with qwen-tune for our museum.",
        ),
        ("# x\n\n[More Information Needed]", "# x\n\n[More Information Needed]"),
        ("# x\n" + "- **a:** [More Information Needed]\n" * 40, ""),
        ("---\n: : broken\n---\ntext", "text"),
    ],
)
def test_what_is_kept_of_a_card(card, kept):
    assert kept_text(card).strip() == kept


@pytest.mark.parametrize("card", [f"# x\n{BEGIN}\nmine", f"# x\nmine\n{END}", f"{END}\nmine\n{BEGIN}"])
def test_broken_markers_are_told(card):
    with pytest.raises(PublishError, match="one of the two markers"):
        kept_text(card)


def test_the_card_that_training_leaves_is_not_kept(trained):
    assert kept_text((trained[0] / "adapter" / "README.md").read_text()) == ""


def test_what_its_owner_put_at_the_top_stays():
    keep = {"license": "mit", "extra_gated_prompt": "please ask", "tags": ["museum"], "base_model": "old/base"}
    values = front_matter(compose(replace(ABOUT, facts={"steps": 1}), keep=keep))
    assert values["extra_gated_prompt"] == "please ask"
    assert {"museum", "lora"} <= set(values["tags"])
    assert values["base_model"] == "Qwen/Qwen3-0.6B"


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
    assert languages_of("---\nlanguage: [en, no, zh]\n---\n") == ("en", "no", "zh")


@pytest.mark.parametrize(
    "text",
    [
        "/home/someone/models/qwen",
        '{"path": "/ro' + 'ot/base"}',
        "~/models/base",
        "C:\\\\Users\\\\ann\\\\base",
        "see (/mnt/disk/rows.jsonl)",
        "hf_" + "a1" * 17,
        "https://ann:secret@example.com/x",
        "file:///home/someone/x",
        "C:/Users/someone/base",
        "/lustre/ann/x",
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
        "https://huggingface.co/home/someone/x",
        "write /think or /no_think",
        "an hour/two, and/or ~3 hours",
        "data/rows.jsonl",
        '{"eos_token": "<|im_end|>"}',
        "tmp/x ./home/someone ../srv/z",
    ],
)
def test_what_may_leave_is_let_through(text):
    assert look_through("README.md", text, ["THE-TOKEN-ITSELF"], [], where="card") == []


@pytest.mark.parametrize(
    "value",
    ["/any/folder/at/all", "../client/base", "~/x", "\\\\server\\share", "D:\\rows", "file:///x"],
)
def test_a_value_that_is_a_path_is_found_wherever_it_points(value):
    assert look_through("config.json", json.dumps({"a": [{"b": value}]}), [], where="x")


@pytest.mark.parametrize("values", [{"hub_password": "hunter2"}, {"wandb_api_key": "0123456789abcdef" * 2}])
def test_a_key_that_names_a_secret_is_enough(values):
    (problem,) = look_through("config.json", json.dumps({"x": values}), [], where="x")
    assert "token or a password" in problem.what
    assert look_through("config.json", json.dumps({"eos_token": "<|im_end|>", "pad_token_id": 3}), [], where="x") == []


def test_a_working_directory_of_a_common_name_is_no_path_in_every_text():
    assert look_through("README.md", "the content of it", [], ["/content"], where="x", guess=False) == []
    assert look_through("README.md", "see /srv/jobs/a/rows", [], ["/srv/jobs/a"], where="x", guess=False)
    assert look_through("README.md", "see /srv/jobs/another", [], ["/srv/jobs/a"], where="x", guess=False) == []


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


def test_a_recipe_is_public_without_its_folders():
    recipe = Recipe.model_validate(
        {
            "name": "job",
            "model": {"base": "./base", "chat_template": "../../acme/t.jinja"},
            "data": {
                "train": [
                    {"path": "s3://u:pw@bucket/rows.jsonl?sig=abc"},
                    {"path": "C:\\Users\\ann\\rows2.jsonl"},
                    {"path": "data/clients"},
                    {"path": "tatsu-lab/alpaca"},
                ],
                "system": "You work in /workspace/repo.",
            },
            "train": {"max_steps": 3, "eval_prompts": ["secret plan?"], "eval_steps": 1},
            "tracking": {"report_to": ["wandb"], "project": "acme"},
        }
    )
    text = public_recipe(recipe, PublishedBase("Qwen/Qwen3-0.6B"), ["tatsu-lab/alpaca"])
    values = yaml.safe_load(text)
    assert [source["path"] for source in values["data"]["train"]] == [
        "rows.jsonl",
        "rows2.jsonl",
        "clients",
        "tatsu-lab/alpaca",
    ]
    assert values["model"] == {"base": "Qwen/Qwen3-0.6B", "chat_template": "chat_template.jinja"}
    assert values["data"]["system"] == "You work in /workspace/repo."
    assert "tracking" not in values
    assert "eval_prompts" not in values["train"]
