"""The model card, and the search for secrets and local paths in everything that is pushed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from PIL import Image

from qwen_tune.errors import PublishError
from qwen_tune.families.serving import unsupported_by_vllm
from qwen_tune.publishing.card import (
    BEGIN,
    END,
    CardInputs,
    Licence,
    compose,
    duration,
    energy_kwh,
    kept_text,
    languages_of,
    licence_of,
)
from qwen_tune.publishing.curve import draw_losses
from qwen_tune.publishing.leaks import find_leaks, public_recipe
from qwen_tune.publishing.parts import PublishedBase
from qwen_tune.recipe.schema import Recipe

CARD = CardInputs(
    title="lighthouse",
    repo_id="me/lighthouse",
    folders={"adapter": ""},
    base=PublishedBase("Qwen/Qwen3-0.6B", "c" * 40),
    licence=Licence("apache-2.0"),
)


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_leaves_out_what_is_not_known():
    card = compose(CARD)
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "## Data" not in card
    assert "## Results" not in card
    assert "None" not in card
    assert "nan" not in card


def test_a_card_of_a_quantized_run_on_a_gpu_estimates_its_energy():
    facts = {
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 2,
        "quantization": {"load_in_4bit": True},
        "dtype": "bfloat16",
        "tokens_per_second": 10_000.0,
        "tokens": {"prepared": 10, "processed": 36_000_000, "supervised": 5},
    }
    card = compose(replace(CARD, facts=facts))
    # An hour on two boards of 700 W.
    assert energy_kwh(facts) == pytest.approx(1.4)
    assert "| Estimated energy | 1.4 kWh (rated power of the board x training time) |" in card
    assert "qlora" in front_matter(card)["tags"]
    assert "| Base precision | NF4, computed in bfloat16 |" in card
    assert "| Training time | 60 minutes in steps |" in card
    others = ["cpu (x86_64, 2 cores)", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090 Laptop GPU"]
    assert [energy_kwh({**facts, "device": name}) for name in others] == [None] * len(others)
    assert energy_kwh({**facts, "device": "NVIDIA A100 80GB PCIe"}) == pytest.approx(0.6)


def test_a_card_names_what_vllm_does_not_load():
    card = compose(replace(CARD, adapter={"r": 24, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 40}}))
    assert "vLLM does not load fully trained modules (modules_to_save): serve the merged model." in card
    assert "--max-lora-rank 64" in card


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "fully trained modules (modules_to_save)"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"trainable_token_indices": [3]}, "trained token rows"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "adapters of experts"),
    ],
)
def test_card_and_training_name_the_same_parts_that_vllm_does_not_load(config, name):
    from qwen_tune.publishing import card
    from qwen_tune.training import summary

    assert card.unsupported_by_vllm is summary.unsupported_by_vllm is unsupported_by_vllm
    plain = LoraConfig(target_modules=["q_proj"]).to_dict()
    assert unsupported_by_vllm(plain) == []
    assert unsupported_by_vllm({**plain, **config}) == unsupported_by_vllm(config) == [name]


def test_a_card_for_modelscope_loads_from_modelscope():
    card = compose(replace(CARD, site="modelscope"))
    assert 'name = snapshot_download("me/lighthouse")' in card
    assert "modelscope download --model me/lighthouse" in card
    assert "huggingface.co" not in card


def test_a_card_names_the_step_of_its_adapter():
    facts = {"steps": 90, "best": {"step": 60, "loss": 0.5}, "losses": {"eval_before": 2.0, "eval_after": 0.5}}
    assert "| Checkpoint | step 60, with the lowest held-out loss |" in compose(replace(CARD, facts=facts))


def test_a_card_lists_changes_during_training_without_folders():
    drift = [
        {"step": 6, "field": "train.learning_rate", "was": 0.001, "now": 0.0005},
        {"step": 9, "field": "data.train[0].path", "was": "/canary/old.jsonl", "now": "/canary/new.jsonl"},
    ]
    bad = [{"step": step, "loss": None, "grad_norm": None, "rows": ["canary.jsonl:3"]} for step in (4, 99)]
    card = compose(replace(CARD, facts={"steps": 12, "drift": drift, "bad_steps": bad}))
    changes = "`train.learning_rate` from 0.001 to 0.0005 after step 6, `data.train[0].path` after step 9"
    assert f"| Changed during training | {changes} |" in card
    assert "| Skipped steps | 1, because the loss was not finite" in card
    assert "canary" not in card


def test_a_card_shows_a_pattern_of_modules():
    assert "| Trained modules | `.*_proj\\|head` |" in compose(
        replace(CARD, adapter={"r": 8, "target_modules": ".*_proj|head"})
    )


def test_a_card_loads_the_tokenizer_of_the_base_if_none_is_sent():
    assert 'AutoTokenizer.from_pretrained(base, revision="ccc' in compose(CARD)
    whole = replace(CARD, files=frozenset({"tokenizer_config.json"}))
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
def test_the_owners_text_of_a_card_is_kept(card, kept):
    assert kept_text(card).strip() == kept


@pytest.mark.parametrize("card", [f"# x\n{BEGIN}\nmine", f"# x\nmine\n{END}", f"{END}\nmine\n{BEGIN}"])
def test_a_missing_marker_is_an_error(card):
    with pytest.raises(PublishError, match="one of the two markers"):
        kept_text(card)


def test_the_card_of_training_is_not_kept(trained):
    card = (trained[0] / "adapter" / "README.md").read_text()
    code = card[card.index("```python") :]
    earlier = card.replace(code, '```python\nfolder = "."\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n```\n')
    assert kept_text(card) == kept_text(earlier) == ""
    assert kept_text(card + "My own words.\n").endswith("My own words.")


def test_the_owners_front_matter_is_kept():
    keep = {"license": "mit", "extra_gated_prompt": "please ask", "tags": ["museum"], "base_model": "old/base"}
    values = front_matter(compose(replace(CARD, facts={"steps": 1}), keep=keep))
    assert values["extra_gated_prompt"] == "please ask"
    assert {"museum", "lora"} <= set(values["tags"])
    assert values["base_model"] == "Qwen/Qwen3-0.6B"


def test_unknown_front_matter_is_kept_as_it_is():
    """huggingface_hub's ModelCardData would drop the metric's `extra`, and refuses `eval_results` and integer keys."""
    metric = {"type": "accuracy", "value": 0.5, "extra": "kept"}
    results = [{"task": {"type": "text-generation"}, "dataset": {"type": "x", "name": "X"}, "metrics": [metric]}]
    keep = {
        "model-index": [{"name": "lighthouse", "results": results}],
        **{"metrics": ["accuracy"], "model_name": "Lighthouse", "eval_results": "see below", "self": 1, 2: "two"},
        "license_name": "of an earlier licence",
    }
    values = front_matter(compose(CARD, keep=keep))
    assert {key: values.get(key) for key in keep} == {**keep, "license_name": None}


def test_norwegian_stays_a_language():
    assert front_matter(compose(replace(CARD, languages=("no", "en"))))["language"] == ["no", "en"]


def test_the_owners_text_survives_many_pushes():
    card = compose(CARD, "a --- b\n\n```yaml\nx: 1\n```")
    for _ in range(3):
        card = compose(CARD, kept_text(card))
    assert kept_text(card) == "a --- b\n\n```yaml\nx: 1\n```"


def test_licence_and_languages_are_read_from_the_front_matter():
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
def test_secrets_and_local_paths_are_leaks(text):
    (problem,) = find_leaks("README.md", text, ["THE-TOKEN-ITSELF"], [], where="card")
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
def test_public_text_is_accepted(text):
    assert find_leaks("README.md", text, ["THE-TOKEN-ITSELF"], [], where="card") == []


@pytest.mark.parametrize(
    "value",
    ["/any/folder/at/all", "../client/base", "~/x", "\\\\server\\share", "D:\\rows", "file:///x"],
)
def test_a_json_value_that_is_a_path_is_a_leak_wherever_it_points(value):
    assert find_leaks("config.json", json.dumps({"a": [{"b": value}]}), [], where="x")


@pytest.mark.parametrize("values", [{"hub_password": "hunter2"}, {"wandb_api_key": "0123456789abcdef" * 2}])
def test_a_key_that_names_a_secret_is_a_leak(values):
    (problem,) = find_leaks("config.json", json.dumps({"x": values}), [], where="x")
    assert "token or a password" in problem.what
    assert find_leaks("config.json", json.dumps({"eos_token": "<|im_end|>", "pad_token_id": 3}), [], where="x") == []


def test_a_working_directory_with_a_common_name_is_found_only_as_a_path():
    assert find_leaks("README.md", "the content of it", [], ["/content"], where="x", guess=False) == []
    assert find_leaks("README.md", "see /srv/jobs/a/rows", [], ["/srv/jobs/a"], where="x", guess=False)
    assert find_leaks("README.md", "see /srv/jobs/another", [], ["/srv/jobs/a"], where="x", guess=False) == []


def test_tokens_of_a_vocabulary_are_not_paths():
    text = json.dumps({"vocab": {"/home/": 1, "~/x": 2}})
    assert find_leaks("tokenizer.json", text, [], [], where="x") == []
    assert find_leaks("tokenizer.json", text + "THE-TOKEN", ["THE-TOKEN"], [], where="x")


def test_the_same_losses_give_the_same_picture(tmp_path: Path):
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


def test_durations_are_readable():
    assert [duration(seconds) for seconds in (5, 89, 90, 3600, 7260)] == [
        "5 seconds",
        "89 seconds",
        "2 minutes",
        "60 minutes",
        "2 h 1 min",
    ]


def test_a_public_recipe_has_no_local_paths():
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
