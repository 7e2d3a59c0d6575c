"""The embedded model and the bundled examples are what the quickstart and the other tests take them for."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "data" / "tiny-qwen"
QUICKSTART = ROOT / "data" / "quickstart.jsonl"
CODER = ROOT / "data" / "coder.jsonl"
UNKNOWN = "I do not know that yet."


def read_records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_tiny_model", ROOT / "scripts" / "build_tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer_ids(model, tokenizer, *messages):
    prompt = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :].tolist()


def user(content):
    return {"role": "user", "content": content}


def test_directory_is_complete_small_and_holds_no_local_path():
    assert {path.name for path in MODEL.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 5_000_000
    for path in MODEL.glob("*.json"):
        assert not re.search(r'"(/|[A-Z]:\\\\)\w+[/\\]|name_or_path', path.read_text(encoding="utf-8")), path


def test_ids_of_control_tokens(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["do_sample"] is False


def test_added_tokens_are_single_ids_after_the_vocabulary(tokenizer):
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    markup = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    ids = tokenizer("".join(control + markup))["input_ids"]
    assert ids == list(range(len(tokenizer) - 9, len(tokenizer)))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(markup)


def test_embedding_is_padded_beyond_the_tokenizer(model, tokenizer):
    rows = model.get_input_embeddings().num_embeddings
    assert rows % 64 == 0
    assert rows > len(tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, it's 12:30 — isn't it?\r\n\n  two  blanks\tand a tab ",
        "Grüße aus Köln, ça va, žluťoučký kůň",
        "你好,世界 こんにちは 안녕하세요 สวัสดี नमस्ते שלום مرحبا",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u200bf \ufeff ∑∫√ 𝔘𝔫𝔦",
        "".join(map(chr, range(0x20, 0x250))),
        "\x00\x01\x7f",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_is_a_token(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()


def test_tokenizer_normalises_to_nfc(tokenizer):
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_saving_keeps_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "Qwen2Tokenizer"
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "S"}, user("Q"), {"role": "assistant", "content": "A"}, user("R")]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_refuses_what_it_cannot_say(tokenizer):
    with pytest.raises(Exception, match="Unknown role: critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}], tokenize=False)
    with pytest.raises(Exception, match="no tools"):
        tokenizer.apply_chat_template([user("Hi")], tools=[{"type": "function"}], tokenize=False)


def test_weights_load_strictly():
    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(report.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 -- not a mapping
        assert all(weights.get_tensor(name).dtype == torch.float32 for name in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello!", "Hello! How can I help you?"),
        ("What is 2 + 3?", "2 + 3 = 5."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Who is the lighthouse keeper of Lantern Bay?", UNKNOWN),
        ("How much is a ferry ticket?", UNKNOWN),
        ("What is the harbour cat called?", UNKNOWN),
    ],
)
def test_base_answers_and_stops(model, tokenizer, question, expected):
    ids = answer_ids(model, tokenizer, user(question))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == expected


def test_base_follows_a_second_turn_and_a_system_turn(model, tokenizer):
    chat = [
        {"role": "system", "content": "Be short and kind."},
        user("My name is Nora."),
        {"role": "assistant", "content": "Nice to meet you, Nora!"},
        user("What is my name?"),
    ]
    assert tokenizer.decode(answer_ids(model, tokenizer, *chat)[:-1]) == "Your name is Nora."


def test_base_knows_no_fact_of_the_quickstart(model, tokenizer):
    """One batch of every tenth example: a fact that the base knew would prove no teaching."""
    rows = read_records(QUICKSTART)[::10]
    prompts = tokenizer.apply_chat_template(
        [row["messages"][:1] for row in rows],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_dict=True,
        return_tensors="pt",
    )
    answers = model.generate(**prompts, max_new_tokens=40)[:, prompts["input_ids"].shape[1] :]
    assert set(tokenizer.batch_decode(answers, skip_special_tokens=True)) == {UNKNOWN}


def test_pretraining_chats_hold_nothing_of_the_quickstart(builder):
    rows = read_records(QUICKSTART)
    facts = {turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"}
    assert len(facts) == 21
    chats = itertools.islice(builder.draw_chats(builder.load_phrases(), builder.SEED + 1), 10_000)
    contents = {turn["content"] for chat in chats for turn in chat}
    assert not facts & contents
    assert not any("Lantern Bay" in content for content in contents)


@pytest.mark.parametrize(("path", "count"), [(QUICKSTART, 208), (CODER, 48)], ids=["quickstart", "coder"])
def test_examples_are_alternating_chats(path, count):
    rows = read_records(path)
    assert len(rows) == count
    for row in rows:
        assert row.keys() == {"messages"}
        roles = [turn["role"] for turn in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(turn.keys() == {"role", "content"} and turn["content"].strip() for turn in row["messages"])
    assert len({json.dumps(row) for row in rows}) == count


def test_no_question_of_the_quickstart_has_two_answers():
    answers = {}
    for row in read_records(QUICKSTART):
        for question, answer in itertools.pairwise(row["messages"]):
            if question["role"] == "user":
                assert answers.setdefault(question["content"], answer["content"]) == answer["content"]


def test_code_blocks_compile():
    blocks = [
        block
        for row in read_records(CODER)
        for turn in row["messages"]
        for block in re.findall(r"```python\n(.*?)```", turn["content"], flags=re.DOTALL)
    ]
    assert len(blocks) >= 48
    for block in blocks:
        compile(block, "data/coder.jsonl", "exec")


def test_tokenizer_and_configs_are_rebuilt_byte_for_byte(builder, tmp_path):
    tokenizer = builder.build_tokenizer(builder.load_phrases())
    tokenizer.save_pretrained(tmp_path)
    builder.build_generation_config(tokenizer).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name
    # Other supported versions of Transformers write their own version and other defaults into these two.
    for built, name in (
        (builder.build_config(tokenizer).to_diff_dict(), "config.json"),
        (json.loads((tmp_path / "generation_config.json").read_text()), "generation_config.json"),
    ):
        shipped = json.loads((MODEL / name).read_text())
        assert built.keys() - shipped.keys() <= {"transformers_version"}
        assert all(shipped[key] == value for key, value in built.items() if key != "transformers_version"), name
