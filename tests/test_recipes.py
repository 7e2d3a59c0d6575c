"""The shipped recipes, launcher files and sample examples, each read by the code that reads it in a run."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
import yaml
from conftest import ROOT
from example_files import load_training_examples

from qwen_tune.chatml.template import END_OF_TURN, IGNORED, ChatTemplate
from qwen_tune.data.preparation import prepare_data
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.schema import Recipe

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")

# Qwen2.5-Math's template is Qwen2.5's but for the system text that it brings.
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
MATH_SYSTEM = "Please reason step by step, and put your final answer within \\\\boxed{}."


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


def answers(name: str) -> list[dict]:
    return [turn for row in rows(name) for turn in row["messages"] if turn["role"] == "assistant"]


def header(path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(lines)


@pytest.fixture
def chat_template(tiny_tokenizer, official_template):
    """The template of the family that a recipe's base belongs to, on the tiny model's tokenizer."""

    def load(recipe: Recipe) -> ChatTemplate:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        base = recipe.model.base
        if base.startswith("Qwen/Qwen3"):
            tokenizer.chat_template = official_template("qwen3")
        elif base.startswith("Qwen/Qwen2.5"):
            tokenizer.chat_template = official_template("qwen2_5")
            if "Math" in base:
                assert DEFAULT_SYSTEM in tokenizer.chat_template
                tokenizer.chat_template = tokenizer.chat_template.replace(DEFAULT_SYSTEM, MATH_SYSTEM)
        else:
            assert base == "./data/tiny-qwen"
        return ChatTemplate(tokenizer)

    return load


def test_the_number_of_recipes():
    assert len(RECIPES) == 13


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_what_it_is(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for source in recipe.data.train:
        assert (ROOT / source.path).is_file()
        assert source.tools is None or (ROOT / source.tools).is_file()
    if path.stem != "quickstart":
        assert f"accelerate launch qwen_tune/train.py {path.relative_to(ROOT)}" in header(path)
        [memory] = re.findall(r"Memory \(counted, not measured\): about (\d+ GB) on a GPU", header(path))
        [line] = [line for line in README.splitlines() if line.startswith(f"| `{path.name}`")]
        assert line.split("|")[5].split(",")[0].strip() == memory


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_example_of_a_recipe_becomes_samples(path, chat_template, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    template = chat_template(recipe)
    # The tiny tokenizer knows few words and makes several times the tokens of a real one.
    data = recipe.data.model_copy(update={"eval": None, "max_length_tokens": 1_000_000})
    split = prepare_data(data, template, seed=recipe.train.seed).train
    assert split.examples_read == split.examples_kept == sum(len(rows(source.path[5:])) for source in data.train)
    assert not split.dropped_counts
    assert not split.samples_dropped
    assert not split.warnings
    for example in split.samples:
        assert example.supervised
        # Every stretch that is trained ends with the end of its turn.
        for label, following in itertools.pairwise([*example.labels, IGNORED]):
            if label != IGNORED and following == IGNORED:
                assert label == template.end_of_turn_id, example.source
        assert template.tokenizer.decode(example.input_ids).rstrip("\n").endswith(END_OF_TURN)
    conversations = {conversation.source: conversation for conversation in load_training_examples(data)}
    for example in split.samples:
        for tool in conversations[example.source].tools:
            assert tool.get("function", tool)["name"] in template.tokenizer.decode(example.input_ids)


def test_every_file_of_examples_belongs_to_a_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    used = {source.path for path in RECIPES for source in load_recipe(path).data.train}
    assert used == {f"data/{path.name}" for path in (ROOT / "data").glob("*.jsonl")}


def test_every_file_is_in_the_readme():
    for path in [*RECIPES, *LAUNCHERS]:
        assert f"`{path.relative_to(ROOT / 'recipes')}`" in README


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_file_is_one_that_accelerate_takes(path):
    from accelerate.commands.config.config_args import load_config_from_file

    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Left out, accelerate asks, guesses or warns. A bare NO would be false.
    required = {
        "compute_environment",
        "distributed_type",
        "mixed_precision",
        "num_machines",
        "num_processes",
        "use_cpu",
    }
    assert required <= fields.keys()
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes % config.num_machines == 0
    assert config.distributed_type == ("MULTI_GPU" if config.num_processes > 1 else "NO")
    if config.num_machines > 1:
        assert {"machine_rank", "main_process_ip", "main_process_port"} <= fields.keys()
    assert str(path.relative_to(ROOT)) in header(path)


def test_solutions_end_in_a_box():
    assert all(re.search(r"\\boxed\{.+\}", turn["content"]) for turn in answers("math.jsonl"))


def test_calls_name_tools_of_their_example_and_give_what_these_require():
    shared = json.loads((ROOT / "data" / "tools.json").read_text(encoding="utf-8"))
    without_calls = 0
    for row in rows("tools.jsonl"):
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.get("tools", shared)}
        calls = [call["function"] for turn in row["messages"] for call in turn.get("tool_calls", ())]
        without_calls += not calls
        for call in calls:
            parameters = tools[call["name"]]
            assert set(parameters["required"]) <= set(call["arguments"]) <= set(parameters["properties"])
    assert without_calls >= 4
    assert any("tools" not in row for row in rows("tools.jsonl"))


def test_examples_with_reasoning_and_without_are_mixed():
    thinks = ["reasoning_content" in turn for turn in answers("thinking.jsonl")]
    assert 0.7 < sum(thinks) / len(thinks) < 0.9


def test_some_answers_are_context_only():
    assert sum(turn.get("train") is False for turn in answers("chat.jsonl")) >= 5
