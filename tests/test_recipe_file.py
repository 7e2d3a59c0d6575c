"""Recipe files: loading, extends, overrides, the resolved recipe, and random damage."""

# ruff: noqa: E501 - a table of messages is read line by line

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from recipe_texts import FULL, MINIMAL, load, problems_of, problems_of_file, recipe, write

from qwen_tune.errors import RecipeError
from qwen_tune.recipe.errors import known_sections
from qwen_tune.recipe.files import load_recipe, resolved_mapping, to_yaml
from qwen_tune.recipe.yaml_reader import dump_yaml

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_recipe_loads() -> None:
    recipe = load(FULL)
    assert recipe.name == "coder-lora"
    assert recipe.run_dir == Path("out/coder")
    assert [source.name for source in recipe.data.train] == ["coder", "chat"]
    assert recipe.data.train[0].columns == {"messages": "chat"}
    assert recipe.data.thinking == "off"
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.trainer_args == {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 0.5}}


def test_the_file_names_the_recipe() -> None:
    assert load_recipe(write(MINIMAL, "recipes/coder.v2.yaml")).run_dir == Path("runs/coder.v2")
    assert load("name: null\n" + MINIMAL).name == "job"
    (problem,) = problems_of_file(write(MINIMAL, "my recipe.yaml"))
    assert problem.startswith("my recipe.yaml:1: name: is missing")
    assert problem.endswith("Fix: add `name: my-recipe`")


def test_missing_files_suggest_the_nearest_name() -> None:
    write(MINIMAL, "recipes/qwen3/coder-lora.yaml")
    write(MINIMAL, "recipes/chat-lora.yaml")
    assert problems_of_file("recipes/qwen3/coder-lra.yaml") == [
        "recipes/qwen3/coder-lra.yaml: does not exist. Fix: did you mean recipes/qwen3/coder-lora.yaml?"
    ]
    assert problems_of_file("chat-lora")[0].endswith("did you mean recipes/chat-lora.yaml?")
    assert "name one of recipes/chat-lora.yaml" in problems_of_file("xyz.yaml")[0]
    assert problems_of_file("recipes")[0].startswith("recipes: is a folder; must be a recipe file. Fix: ")
    assert problems_of_file("recipes/chat-lora.yaml/x.yaml")[0].startswith(
        "recipes/chat-lora.yaml/x.yaml: cannot be read"
    )
    assert "cannot be read" in problems_of_file("\0")[0]
    assert "cannot be read" in problems_of_file("x" * 5000)[0]


def test_loading_needs_nothing_heavy() -> None:
    write(FULL)
    program = (
        "import sys\n"
        "from qwen_tune.recipe.files import load_recipe\n"
        "load_recipe('job.yaml', ['train.trainer_args.adam_beta1=0.9'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'numpy', 'wandb'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# extends


def test_extends_merges_mappings_and_replaces_lists() -> None:
    write(FULL, "bases/base.yaml")
    write("extends: base.yaml\nlora: {r: 4}\ntrain: {max_steps: null}\n", "bases/middle.yaml")
    recipe = load("extends: bases/middle.yaml\nname: job\ndata:\n  train: [{path: x.jsonl}]\nlora: {lora_alpha: 8}\n")
    assert recipe.name == "job"
    assert [source.path for source in recipe.data.train] == ["x.jsonl"]
    assert recipe.data.max_length_tokens == 2048
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (4, 8, ["q_proj", "v_proj"])
    assert (recipe.train.max_steps, recipe.train.num_train_epochs) == (None, 3.0)
    assert "extends" not in resolved_mapping(recipe)


def test_extends_unsets_with_null() -> None:
    write(FULL, "base.yaml")
    recipe = load(
        "extends: base.yaml\nlora: null\ndata: {eval: null, train: [{path: a, columns: {x: null}}]}\nexport: ~\n"
    )
    assert recipe.lora.r == 16
    assert recipe.data.eval is None
    assert recipe.data.train[0].columns == {}
    assert recipe.export.merge is False


def test_extends_keeps_places() -> None:
    write(MINIMAL + "lora:\n  r: 0\n", "recipes/base.yaml")
    assert problems_of_file(write("extends: base.yaml\n", "recipes/job.yaml"))[0].startswith(
        "recipes/base.yaml:7: lora.r: got 0"
    )
    (problem,) = problems_of_file(write("extends: base.yaml\nlora:\n\n  r: -1\n", "recipes/job.yaml"))
    assert problem.startswith("recipes/job.yaml:4: lora.r: got -1")


def test_extends_of_another_folder() -> None:
    write(MINIMAL, "shared/base.yaml")
    assert (
        load_recipe(write("extends: ../shared/base.yaml\n", "recipes/job.yaml")).data.train[0].path == "data/rows.jsonl"
    )
    assert load_recipe(write(f"extends: {Path('shared/base.yaml').resolve()}\n", "recipes/job.yaml")).name == "job"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nextends: bse.yaml\n", "job.yaml:2: extends: got bse.yaml; bse.yaml does not exist or is not a file. Fix: did you mean base.yaml?"),
        ("extends: [base.yaml]\n", "job.yaml:1: extends: got a list of 1; must be the name of one file"),
        ("extends: 3\n", "job.yaml:1: extends: got 3 (a whole number); must be the name of one file"),
        ("extends: ''\n", 'job.yaml:1: extends: got "" (text); must be the name of one file'),
        ("extends: .\n", "job.yaml:1: extends: got .; . does not exist or is not a file"),
        ("extends: 'x\\0'\n", "job.yaml:1: extends: got x\\0;"),
        ("extends: job.yaml\n", "job.yaml:1: extends: a cycle: job.yaml → job.yaml"),
        ("name: x\nextends: base.yaml\n", "base.yaml:1: extends: a cycle: job.yaml → base.yaml → job.yaml"),
    ],
)  # fmt: skip
def test_extends_that_cannot_be_followed(text: str, what: str) -> None:
    write("extends: job.yaml\n", "base.yaml")
    (problem,) = problems_of(text)
    assert problem.startswith(what)


def test_extends_null_is_none() -> None:
    assert load("extends: null\n" + MINIMAL).name == "job"


def test_extends_a_broken_file() -> None:
    write("model: [", "base.yaml")
    (problem,) = problems_of("extends: base.yaml\n")
    assert problem.startswith("base.yaml:1: not valid YAML")


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("data.packing=false", "data.packing", False),
        ("data.thinking=off", "data.thinking", "off"),
        ("data.system=You are: kind, *very* kind # yes", "data.system", "You are: kind, *very* kind # yes"),
        ("data.system=- not a list", "data.system", "- not a list"),
        ("data.system=a=b", "data.system", "a=b"),
        ("data.system='12'", "data.system", "12"),
        ('data.system="a\\nb"', "data.system", "a\nb"),
        ("data.eval={fraction: 0.1}", "data.eval.fraction", 0.1),
        ("train.max_steps=", "train.max_steps", None),
        ("train.max_steps=null", "train.max_steps", None),
        ("lora.target_modules=[up_proj]", "lora.target_modules", ["up_proj"]),
        ("run.dir=/elsewhere", "run.dir", "/elsewhere"),
        ("model.base=./model", "model.base", "./model"),
        ("export={merge: false}", "export.merge", False),
        ("export=", "export.merge", False),
    ],
)
def test_overrides(override: str, key: str, value: Any) -> None:
    found: Any = load(FULL, override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_of_lists() -> None:
    recipe = load(FULL, "data.train.1.path=other.jsonl", "data.train[0].name=first")
    assert [(source.path, source.name) for source in recipe.data.train] == [
        ("data/coder.jsonl", "first"),
        ("other.jsonl", "chat"),
    ]
    assert load(FULL, "data.train=[{path: x}]").data.train[0].path == "x"
    assert load(FULL, "data.train=[{path: x}]", "data.train.0.path=y").data.train[0].path == "y"
    assert load("lora: {r: 4}\n", "model.base=x", "data.train=[{path: x}]").model.base == "x"
    assert load(MINIMAL, "data.train.0.columns.messages=chat").data.train[0].columns == {"messages": "chat"}


def test_later_overrides_win_and_mappings_merge() -> None:
    recipe = load(FULL, "lora.r=2", "lora.r=3", "train={seed: 7}")
    assert (recipe.lora.r, recipe.train.seed, recipe.train.max_steps) == (3, 7, 10)


def test_the_later_layer_determines_how_long_to_train(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "train: {num_train_epochs: 3}\n")
    short = load_recipe(tmp_path / "base.yaml", ["train.max_steps=5"])
    assert short.train.max_steps == 5
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {max_steps: 7}\n")
    assert load_recipe(tmp_path / "child.yaml").train.max_steps == 7
    again = load_recipe(tmp_path / "child.yaml", ["train.num_train_epochs=1"])
    assert (again.train.max_steps, again.train.num_train_epochs) == (None, 1)
    with pytest.raises(RecipeError, match="both set the length"):
        load_recipe(tmp_path / "base.yaml", ["train.max_steps=5", "train.num_train_epochs=1"])


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.learning_rate=-1", "command line: train.learning_rate=-1: got -1; must be greater than 0."),
        ("train.lerning_rate=1", "command line: train.lerning_rate=1: unknown key. Fix: did you mean learning_rate?"),
        ("trian.seed=1", "command line: trian.seed=1: trian: unknown key. Fix: did you mean train?"),
        ("data.eval={fraction: 3}", "command line: data.eval=…: data.eval.fraction: got 3; must be less than 1"),
        ("lora.init_lora_weights=eva", "command line: lora.init_lora_weights=eva: not yet: got eva"),
        ("nonsense", "command line: override 1 has no `=`"),
        ("=3", "command line: override 1 does not name a key"),
        ("a..b=3", "command line: override 1 does not name a key"),
        (".a=3", "command line: override 1 does not name a key"),
        ("a\n=3", "command line: override 1 does not name a key"),
        ("a." * 200 + "a=3", "command line: override 1 does not name a key"),
        ("lora.r.x=3", "command line: lora.r.x=3: lora.r is 8 (a whole number), so it has no `x` in it"),
        ("data.train.2.path=x", "command line: data.train.2.path=x: data.train is a list of 2 and has no item `2`. Fix: write a number from 0 to 1"),
        ("data.train.x=3", "command line: data.train.x=3: data.train is a list of 2 and has no item `x`"),
        ("data.train.-1.path=x", "command line: data.train.-1.path=x: data.train is a list of 2"),
        ("hub.0=3", "command line: hub.0=3: hub is null, so it has no `0` in it"),
        ("lora.target_modules=[a", "command line: lora.target_modules=…: not valid YAML: a bracket that is never closed"),
        ("data.system='a", "command line: data.system='a: not valid YAML: a quote that is never closed"),
        ("extends=x.yaml", "command line: extends=x.yaml: `extends` cannot be overridden"),
        (f"train.seed={'9' * 200}", "command line: train.seed="),
        ("data.system=\ud800", 'command line: data.system="\\ud800": contains an invalid character'),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, what: str) -> None:
    (problem,) = problems_of(FULL, override)
    assert problem.startswith(what)


# Writing


def test_the_resolved_recipe_reads_back() -> None:
    for text in (MINIMAL, FULL):
        recipe = load(text)
        written = to_yaml(recipe)
        again = load_recipe(write(written, "runs/x/recipe.yaml"))
        assert again == recipe
        assert to_yaml(again) == written
    assert "learning_rate: 0.0002\n" in to_yaml(load(FULL))


def test_resolved_mapping_holds_every_key() -> None:
    resolved = resolved_mapping(recipe(hub={"repo_id": "me/job"}, data={"train": [{"path": "a"}], "eval": None}))
    for section, model in known_sections().items():
        if "[]" in section or section == "data.eval":
            continue
        value = resolved
        for part in filter(None, section.split(".")):
            value = value[part]
        assert set(value) == set(model.model_fields)
    assert "num_train_epochs" not in resolved_mapping(recipe(train={"max_steps": 3}))["train"]


# Random recipes


_KEYS = sorted({name for section in known_sections().values() for name in section.model_fields} | {"extends", "token"})
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "none", "2e-4", "012", "job.yaml", "a/b", "hf_" + "a1" * 16, "s3://x/y", "messages"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_SETTINGS = settings(
    max_examples=200,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


def loads_or_reports(overrides: list[str]) -> None:
    error = None
    try:
        recipe = load_recipe("job.yaml", overrides)
    except RecipeError as caught:
        error = caught
    if error:
        assert error.problems
        assert all(problem.what for problem in error.problems)
        assert "hf_a1a1" not in str(error)
    else:
        Path("again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load_recipe("again.yaml") == recipe


@_SETTINGS
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_mutated_recipes_load_or_report(data: st.DataObject, seed: int) -> None:
    chance = random.Random(seed)
    mapping: Any = yaml.safe_load(FULL)
    for _ in range(chance.randint(1, 3)):
        node = mapping
        while isinstance(node, (dict, list)) and node:
            key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.3:
                change = chance.random()
                if change < 0.2:
                    del node[key]
                elif change < 0.4 and isinstance(node, dict):
                    node[data.draw(st.sampled_from(_KEYS))] = data.draw(_VALUES)
                else:
                    node[key] = data.draw(_VALUES)
                break
            node = node[key]
    Path("job.yaml").write_text(dump_yaml(mapping), encoding="utf-8", errors="replace")
    loads_or_reports([])


@_SETTINGS
@given(position=st.integers(0, len(FULL)), cut=st.integers(0, 20), inserted=st.text(max_size=6))
@example(position=0, cut=0, inserted="? ")
@example(position=5, cut=0, inserted="&a ")
@example(position=211, cut=20, inserted="¼")
def test_mutated_text_loads_or_reports(position: int, cut: int, inserted: str) -> None:
    text = FULL[:position] + inserted + FULL[position + cut :]
    Path("job.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    loads_or_reports([])


@_SETTINGS
@given(
    path=st.lists(st.sampled_from([*_KEYS, "0", "1", "9", "[0]", ""]) | st.text(max_size=3), min_size=1, max_size=4),
    value=st.text(max_size=10)
    | _VALUES.map(lambda value: json.dumps(value))
    | st.sampled_from(["[", "{a", "'", "*a", "!x"]),
)
def test_random_overrides_load_or_tell(path: list[str], value: str) -> None:
    Path("job.yaml").write_text(FULL, encoding="utf-8")
    loads_or_reports([f"{'.'.join(path)}={value}"])
