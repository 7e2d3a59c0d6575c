"""The preview: pieces that read as text, colours that tell what is supervised, and a page that a browser shows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import browser
import numpy as np
import pytest
from conftest import make_workspace
from rich.console import Console

from qwen_tune.chatml.template import IGNORED, TokenizedExample
from qwen_tune.cli import run_command
from qwen_tune.data.token_store import Samples
from qwen_tune.errors import QwenTuneError
from qwen_tune.preview import page as preview_page
from qwen_tune.preview.terminal import Piece, Spelling, coloured, first_of_each_source, show_samples

# What an example may hold that would act in a page or a terminal, were it more than text.
ACTS = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b>"
FILE = "<img src=x onerror=document.title=1>.jsonl"


@pytest.fixture(scope="module")
def spelling(tiny_tokenizer):
    return Spelling(tiny_tokenizer)


def example(tokenizer, context: str, supervised: str) -> TokenizedExample:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (context, supervised)]
    return TokenizedExample("rows.jsonl:1", "rows", ids[0] + ids[1], [IGNORED] * len(ids[0]) + ids[1])


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 1234 of them\n\n\tand  space ",
        "日本語 한국어 नमस्ते",
        "👩🏽‍🚀🎉 𠜎 é \u00a0\u200b",
        "<|im_start|>user\n語<|im_end|>",
        "a \ufffd b",
        "",
    ],
)
def test_pieces_are_whole_characters_and_keep_every_id(spelling, tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    pieces = list(spelling.pieces(ids, [IGNORED] * len(ids)))
    assert "".join(piece.text for piece in pieces) == text
    assert [id_ for piece in pieces for id_ in piece.ids] == ids
    assert [piece.text for piece in pieces if piece.control] == re.findall(r"<\|\w+\|>", text)
    assert all(len(piece.ids) == 1 or not piece.text.isascii() for piece in pieces)


def test_a_character_of_which_a_part_is_missing_is_shown_as_such(spelling, tiny_tokenizer):
    ids = tiny_tokenizer.encode("𠜎", add_special_tokens=False)
    assert len(ids) > 2
    control = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    cut = [*ids[:-1], control]
    assert list(spelling.pieces(cut, [IGNORED, *cut[1:]])) == [
        Piece("\ufffd", (ids[0],), supervised=False, control=False),
        *(Piece("\ufffd", (id_,), supervised=True, control=False) for id_ in ids[1:-1]),
        Piece("<|im_end|>", (control,), supervised=True, control=True),
    ]


def test_samples_are_the_first_of_each_source_in_equal_numbers():
    def chosen(sources: list[int], count: int) -> list[int]:
        rows = np.array(sources)
        return first_of_each_source(Samples((), rows, rows, rows, rows), count)

    assert chosen([0, 0, 0, 0, 1, 1, 2], 3) == [0, 4, 6]
    assert chosen([0, 0, 0, 0, 1, 1, 2], 6) == [0, 1, 2, 4, 5, 6]
    assert chosen([0, 0, 0], 2) == [0, 1]
    assert chosen([1, 0], 9) == [0, 1]


def shown(spelling, sample: TokenizedExample, **terminal) -> str:
    console = Console(file=io.StringIO(), width=80, **terminal)
    show_samples([sample], spelling, console)
    return console.file.getvalue()


def test_supervised_text_has_a_colour_or_brackets(spelling, tiny_tokenizer):
    sample = example(tiny_tokenizer, "<|im_start|>user\nHi", "Hello<|im_end|>\n")
    plain = shown(spelling, sample, color_system=None)
    assert plain.splitlines()[1:] == ["<|im_start|>user", "Hi⟦Hello<|im_end|>↵", "⟧", ""]
    colours = shown(spelling, sample, color_system="standard", force_terminal=True)
    assert "\x1b[35m<|im_start|>\x1b[0m\x1b[2muser\x1b[0m\n" in colours
    assert "\x1b[1;32mHello\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m\x1b[1;32m↵" in colours


def test_white_space_is_visible_only_at_the_borders_of_supervised_text(spelling, tiny_tokenizer):
    sample = example(tiny_tokenizer, "a  \n", "\n b\n c\t ")
    assert shown(spelling, sample, color_system=None).partition("\n")[2] == "a  \n⟦↵\n·b\n c⇥·⟧\n\n"
    blank = example(tiny_tokenizer, "a", " \n")
    assert "a⟦·↵\n⟧" in shown(spelling, blank, color_system=None)


def test_control_characters_of_an_example_do_not_reach_the_terminal(spelling, tiny_tokenizer):
    text = shown(spelling, example(tiny_tokenizer, "", "red \x1b[31m\x07\r\x9b1m"), color_system=None)
    assert "red ␛[31m␇␍\ufffd1m" in text


def test_the_short_form_keeps_to_one_line(spelling, tiny_tokenizer):
    sample = example(tiny_tokenizer, "<|im_start|>system\n" + "word " * 100 + "<|im_end|>\n", "\nyes<|im_end|>")
    pieces = spelling.pieces(sample.input_ids, sample.labels)
    text = coloured(pieces, Console(file=io.StringIO(), color_system=None), longest_run=20).plain
    assert text == "<|im_start|>system↵ wor … word word <|im_end|>↵ ⟦↵ yes<|im_end|>⟧"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The bundled examples, and examples of which some are dropped, repeat others or would act in a page."""
    folder = make_workspace(tmp_path_factory.mktemp("preview"))

    def row(question: str, answer: str, **flags: bool) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flags}]
        return json.dumps({"messages": messages}) + "\n"

    odd = [
        row("Break out", ACTS),
        row("Say a lot", "many " * 600),
        row("Nothing", "nothing", train=False),
        row("Emoji", "👩🏽‍🚀\n\n語 "),
        *[row("Twice", "the same")] * 2,
        row("Some more", "many " * 150),
    ]
    (folder / FILE).write_text("".join(odd), encoding="utf-8")
    recipe = (folder / "recipe.yaml").read_text().replace("fraction: 0.1", "fraction: 0.05")
    recipe = recipe.replace("{path: rows.jsonl}", f'{{path: rows.jsonl}}, {{path: "{FILE}", name: odd}}')
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_the_terminal_shows_what_became_of_all_examples(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("COLUMNS", "120")
    assert run_command(["preview", "recipe.yaml", "--rows", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("<|im_start|>user") == 2
    assert f"\n{FILE}:" in text  # one sample of each source
    told = re.sub(r"\s+", " ", text)
    assert re.search(r"data: 215 examples read = \d+ train \+ \d+ evaluate \+ 2 dropped", told)
    assert re.search(r"1 over data.max_length_tokens 256: 90% fit into \d+, 99% into \d+, 100% into 6\d\d", told)
    assert f"dropped: 1 example: longer than data.max_length_tokens ({FILE}:2); 6" in told
    assert f"dropped: 1 example: no supervised tokens ({FILE}:3)" in told
    assert f"similar: 1 example: the same as an earlier example ({FILE}:6)" in told


def test_train_tells_the_same_in_short_before_it_starts(workspace, qwen_tune):
    result = qwen_tune("train", "recipe.yaml", "--dry-run", cwd=workspace, COLUMNS="120")
    assert result.returncode == 0, result.stderr
    facts = [re.sub(" +", " ", line).strip() for line in result.stdout.splitlines()]
    assert any(line.startswith("sources rows: 208 x messages, 35% of 7,") for line in facts)
    assert any(line.startswith("odd: 7 x messages") for line in facts)
    assert f"dropped 1 example: no supervised tokens ({FILE}:3)" in facts
    assert any(line.startswith("sample rows.jsonl:") for line in facts)
    assert result.stdout.count("⟦") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "no/such/page.html"], "the folder no/such does not exist. Fix: mkdir -p no/such"),
        (["--html", "."], "this is a folder; expected a file name"),
        (["--html", "page.html", "--json"], "not allowed with"),
        (["--rows", "0"], "0 is not at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_any_work(arguments, message, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert run_command(["preview", "recipe.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    preview_page.write(page, "new \udcff")
    assert page.read_text() == "new ?"
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(QwenTuneError, match="the page cannot be written"):
        preview_page.write(folder, "new")
    assert sorted(tmp_path.iterdir()) == [folder, page]


@pytest.fixture(scope="module")
def page(workspace, qwen_tune):
    """The page that the command writes."""
    result = qwen_tune("preview", "recipe.yaml", "--html", "page.html", "--all", cwd=workspace)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("page.html: ")
    return workspace / "page.html"


def data_of(page: Path) -> dict:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert not set("<>&") & set(text)
    return json.loads(text)


def test_the_page_holds_what_trains_and_asks_nobody_for_anything(page, workspace, qwen_tune):
    data = data_of(page)
    assert data["of"] == len(data["samples"]) > 190
    lines = qwen_tune("preview", "recipe.yaml", "--json", "--all", cwd=workspace).stdout.splitlines()
    for sample, line in zip(data["samples"], lines, strict=True):
        told = json.loads(line)
        assert sample["at"] == told["source"]
        assert "".join(piece[0] for piece in sample["pieces"]) == told["text"]
        assert [id_ for piece in sample["pieces"] for id_ in piece[2:]] == told["input_ids"]
        supervised = [id_ for piece in sample["pieces"] if piece[1] & preview_page.SUPERVISED for id_ in piece[2:]]
        assert supervised == [label for label in told["labels"] if label != IGNORED]
    shell = page.read_text("utf-8").replace(json.dumps(data), "")
    assert "http://" not in shell.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https:|@import|url\(|<link|src=|innerHTML|{{", preview_page_parts())


def preview_page_parts() -> str:
    module = Path(preview_page.__file__)
    return "".join(module.with_suffix(f".{kind}").read_text("utf-8") for kind in ("css", "js"))


def test_the_page_is_bounded_and_says_so(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(preview_page, "TOKENS_OF_A_SAMPLE", 20)
    monkeypatch.setattr(preview_page, "TOKENS_OF_A_PAGE", 100)
    assert run_command(["preview", "recipe.yaml", "--html", "small.html"]) == 0
    data = data_of(workspace / "small.html")
    assert len(data["samples"]) == 5
    assert all(sum(len(piece) - 2 for piece in sample["pieces"]) == 20 for sample in data["samples"])
    assert all(sample["tokens"] > 20 for sample in data["samples"])


# Run in a copy of the page, after its own script: what a reader would do, and what comes of it.
PROBE = """<script>
const facts = { title: document.title, images: document.images.length, scripts: document.scripts.length };
facts.overflow = document.documentElement.scrollWidth - innerWidth;
const shownNow = () => [...document.querySelectorAll(".sample b")].map((name) => name.textContent);
const say = (id, value, event) => { at(id).value = value; at(id).dispatchEvent(new Event(event)); return shownNow(); };
const press = (key) => {
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  return shownNow();
};
facts.first = shownNow();
facts.right = press("ArrowRight");
facts.left = press("ArrowLeft");
facts.jumped = say("jump", "57", "change");
facts.odd = say("source", "odd", "change");
facts.found = say("search", "break OUT", "input");
facts.hits = [...document.querySelectorAll(".hit")].map((token) => token.textContent).join("");
facts.text = document.querySelector(".tokens").textContent;
facts.emoji = say("search", "emoji", "input");
const joined = [...document.querySelectorAll(".tokens .supervised")].find((token) => token.dataset.ids.includes(" "));
joined.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
facts.joined = joined.textContent;
facts.tip = at("tip").textContent;
facts.none = say("search", "no such words", "input");
say("search", "", "input");
facts.late = { title: document.title, images: document.images.length };
document.body.append(make("pre", { id: "probe" }, JSON.stringify(facts)));
</script></body>"""


def probed(page: Path, profile: Path, width: int) -> tuple[dict, str]:
    """What the probe found in a window of some width, and the document."""
    copy = page.with_name(f"probed-{width}.html")
    copy.write_text(page.read_text("utf-8").replace("</body>", PROBE), encoding="utf-8")
    document = browser.dom(copy, profile, f"--window-size={width},1000")
    [facts] = re.findall(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    return json.loads(facts.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), document


def test_a_browser_shows_the_page_and_examples_stay_text(page, tmp_path):
    data = data_of(page)
    facts, document = probed(page, tmp_path / "profile", 1280)
    body = document.partition("<body>")[2]
    assert facts["title"] == facts["late"]["title"] == "small · preview"
    assert (facts["images"], facts["late"]["images"], facts["scripts"]) == (0, 0, 3)
    assert facts["overflow"] <= 0
    rows = data["audit"]["facts"]["rows"]
    assert f'<span class="value">{rows["read"]}</span>' in body
    assert f"{rows['trained']} train" in body
    assert "<b>odd</b>" in body
    assert "1 example: no supervised tokens" in body
    assert "1 example: longer than data.max_length_tokens" in body
    assert re.search(r'<span class="token supervised" data-ids="[\d ]+" data-at="\d+">', body)
    assert re.search(r'<span class="token control" data-ids="\d+" data-at="0">&lt;\|im_start\|&gt;</span>', body)
    numbers = [f"#{number}" for number in range(1, len(data["samples"]) + 1)]
    assert facts["first"] == facts["left"] == numbers[:10]
    assert facts["right"] == numbers[10:20]
    assert facts["jumped"] == numbers[50:60]
    odd = [name for name, sample in zip(numbers, data["samples"], strict=True) if sample["source"] == "odd"]
    assert facts["odd"] == odd
    [found] = facts["found"]
    assert found in odd
    assert facts["hits"].lower() == "break out"
    assert ACTS in facts["text"]
    assert len(facts["emoji"]) == 1
    assert (len(facts["joined"]), facts["none"]) == (1, [])
    assert re.fullmatch(
        r"ids \d+(, \d+)+ · positions \d+–\d+ · one character of several tokens · supervised", facts["tip"]
    )


def test_a_narrow_window_has_to_scroll_in_one_direction_only(page, tmp_path):
    assert probed(page, tmp_path / "profile", 420)[0]["overflow"] <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_looks_as_it_should(scheme, page, tmp_path):
    image_of = pytest.importorskip("PIL.Image")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", half)) for half in halves())
    colours = {name: int(value[1:], 16) for name, value in (light if scheme == "light" else dark).items()}
    picture = tmp_path / "page.png"
    browser.screenshot(page, tmp_path / "profile", picture, width=1280, height=1600, dark=scheme == "dark")
    with image_of.open(picture) as image:
        assert image.size == (1280, 1600)
        pixels = np.asarray(image.convert("RGB")).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    share = {name: float((pixels == colour).mean()) for name, colour in colours.items()}
    assert share["page"] + share["panel"] > 0.7
    assert 0.004 < share["supervised"] < 0.2
    assert 0.004 < share["control"] < 0.2
    assert share["accent"] > 0.0005
    assert share["warn-soft"] > 0.0005
    assert len(np.unique(pixels)) > 200  # letters have soft edges


def halves() -> list[str]:
    styles = Path(preview_page.__file__).with_suffix(".css").read_text("utf-8")
    return styles.split("prefers-color-scheme: dark")
