"""Ids and labels at speed against those of the checkpoint's own tokenizer."""

from __future__ import annotations

import copy
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conversations import tokenize
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen_tune.chatml import encoder as encoder_module
from qwen_tune.chatml import fast_encoder
from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.chatml.encoder import Encoder
from qwen_tune.chatml.fast_encoder import FastEncoder, FastEncoderError, probes
from qwen_tune.chatml.template import IGNORED, ChatTemplate, RenderedSample, render_samples
from qwen_tune.errors import ModelError
from qwen_tune.recipe.schema import DataSpec, SourceSpec

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
MARKUP = ("<tool_call>", "</think>", "<think>", "<|im_", "im_end|>")
REAL = Path(os.environ.get("QWEN_TUNE_REAL_BASE", "not-there"))  # a real checkpoint's directory, for those who have one

pieces = st.one_of(
    st.text(max_size=10),
    st.text(st.characters(min_codepoint=0x10000, exclude_categories=["Cs"]), max_size=3),
    st.text(st.sampled_from("e\u0301\u0308가\u1100\u1161Å\u212b\u0344\u0958ｱﾞ"), max_size=6),
    st.sampled_from(
        [
            "🙂",
            "👩🏽\u200d🔬",
            "🇩🇪",
            "e\u0301",
            "é",
            "\n\n",
            "  ",
            "\r\n",
            " \n ",
            "\u00a0",
            "'s",
            "'LL",
            "1234",
            "x=1;\n\t",
        ]
    ),
    st.sampled_from(MARKUP),
)
texts = st.lists(pieces, max_size=8).map("".join)


def spec(**changes) -> DataSpec:
    return DataSpec(train=[SourceSpec(path="rows.jsonl")], **changes)


def encoders(template: ChatTemplate) -> tuple[Encoder, Encoder]:
    """One with a fast encoder from the start, and one without."""
    return Encoder(template, fast=FastEncoder.verified(template.tokenizer)), Encoder(template, fast=None)


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return encoders(ChatTemplate(tiny_tokenizer))


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("needs a tokenizer of Qwen2.5")
    return encoders(ChatTemplate(AutoTokenizer.from_pretrained(REAL)))


@st.composite
def samples(draw):
    """Texts of a few parts, control tokens between them or not, and ranges along the parts."""
    made: list[RenderedSample] = []
    for _ in range(draw(st.integers(1, 4))):
        text, spans = "", []
        for _ in range(draw(st.integers(0, 4))):
            text += draw(texts) + draw(st.sampled_from(["", *CONTROL[:2]]))
            start = len(text)
            text += draw(texts) + draw(st.sampled_from(["", "<|im_end|>", "<|im_end|>"]))
            if len(text) > start and draw(st.booleans()):
                spans.append((start, len(text)))
        made.append(RenderedSample(text, tuple(spans)))
    return made


def same(one, other) -> None:
    assert one.ids.tolist() == other.ids.tolist()
    assert one.lengths.tolist() == other.lengths.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert one.straddling.tolist() == other.straddling.tolist()
    assert one.ended.tolist() == other.ended.tolist()


def alone(encoded, index: int) -> tuple[list[int], list[bool]]:
    stop = int(encoded.lengths[: index + 1].sum())
    part = slice(stop - int(encoded.lengths[index]), stop)
    return encoded.ids[part].tolist(), encoded.loss_mask[part].tolist()


def by_definition(sample: RenderedSample, tokenizer) -> tuple[list[int], list[bool], int, bool]:
    """Ids and mask as `shared` ranges say it: the tokens that lie in them whole, but for the first of all."""
    encoding = tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    supervised = [any(a <= start and end <= b for a, b in sample.spans) for start, end in offsets]
    straddling = sum(any(start < a < end for start, end in offsets) for a, b in sample.spans)
    ended = True
    for a, b in sample.spans:
        inside = [token for token, (start, end) in zip(ids, offsets, strict=True) if a <= start and end <= b]
        ended = ended and bool(inside) and inside[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    return ids, [False, *supervised[1:]] if supervised else [], straddling, ended


@pytest.mark.parametrize("which", ["tiny", "real"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=samples())
def test_the_fast_way_gives_what_the_tokenizer_gives(request, which, drawn):
    fast, exact = request.getfixturevalue(which)
    assert fast.fast is not None
    event("settled" if all(map(fast.agree_on, (sample.text for sample in drawn))) else "not settled")
    one, other = fast.encode(drawn), exact.encode(drawn)
    assert fast.fast is not None
    same(one, other)
    for index, sample in enumerate(drawn):
        ids, supervised, straddling, ended = by_definition(sample, exact.tokenizer)
        if unicodedata.is_normalized("NFC", sample.text):
            assert alone(other, index) == (ids, supervised)
            assert (int(other.straddling[index]), bool(other.ended[index])) == (straddling, ended)
        else:
            assert alone(other, index)[0] == ids


def test_every_character_is_encoded_alike(tiny_tokenizer):
    """Each by itself between letters and blanks, where tables of letters and spaces of two versions could part."""
    fast, exact = encoders(ChatTemplate(tiny_tokenizer))
    assert fast.fast is not None
    chosen = random.Random(3)
    codes = [*range(0x20, 0x3100), *chosen.sample(range(0x3100, 0xD800), 2000), *range(0xF900, 0xFFFE)]
    codes += [*range(0x1D400, 0x1D800), *range(0x1F000, 0x1FAFF), *chosen.sample(range(0x10000, 0x110000), 3000)]
    drawn = []
    for start in range(0, len(codes), 8):
        letters = [chr(code) for code in codes[start : start + 8]]
        text = "".join(f"a{letter} {letter}{letter}1{letter}\n{letter}'s" for letter in letters)
        drawn.append(RenderedSample(text, ((3, len(text) - 3),)))
    same(fast.encode(drawn), exact.encode(drawn))
    assert fast.fast is not None


def test_batches_do_not_matter(tiny):
    fast, exact = tiny
    chosen = random.Random(5)
    words = ["hello ", "wörld", "\n\n", "🙂", "<|im_end|>", "e\u0301", "漢字", " 12", ""]
    drawn = []
    for _ in range(60):
        text = "".join(chosen.choices(words, k=9))
        cuts = sorted(chosen.sample(range(len(text) + 1), 2))
        drawn.append(RenderedSample(text, (tuple(cuts),)))
    whole = fast.encode(drawn)
    one_by_one = [fast.encode([sample]) for sample in drawn]
    assert whole.ids.tolist() == [token for part in one_by_one for token in part.ids.tolist()]
    assert whole.loss_mask.tolist() == [flag for part in one_by_one for flag in part.loss_mask.tolist()]
    assert whole.straddling.tolist() == [part.straddling[0] for part in one_by_one]
    same(whole, exact.encode(drawn))


def test_nothing_is_encoded_to_nothing(tiny):
    for encoder in tiny:
        nothing = encoder.encode([])
        assert (len(nothing.ids), len(nothing.lengths), len(nothing.ended)) == (0, 0, 0)
        empty = encoder.encode([RenderedSample("", ()), RenderedSample("a", ((0, 1),)), RenderedSample("", ())])
        assert empty.lengths.tolist() == [0, 1, 0]
        assert not empty.loss_mask.any()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(st.one_of(texts, st.sampled_from(CONTROL)), min_size=1, max_size=6))
def test_spelled_control_tokens_are_plain_pieces(tiny, drawn):
    fast, exact = tiny
    chat = Conversation(
        "r:1", "r", (Message("user", "q" + "".join(drawn)), Message("assistant", "a" + "".join(reversed(drawn))))
    )
    if any("think" in text for text in drawn):
        return
    template = ChatTemplate(exact.tokenizer)
    rendered = render_samples(chat, template, spec(special_tokens_in_text="neutralize"))
    same(fast.encode(rendered), exact.encode(rendered))
    control = {exact.tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    for sample in rendered:
        ids, offsets = exact.encode_exactly(sample)
        spelled = "".join(drawn).count
        assert len(sample.literals) == 2 * sum(spelled(token) for token in CONTROL)
        written = [
            match for match in template.control_tokens.finditer(sample.text) if match.span() not in sample.literals
        ]
        assert [token for token in ids if token in control] == [
            exact.tokenizer.convert_tokens_to_ids(match.group()) for match in written
        ]
        assert exact.tokenizer.decode(ids) == unicodedata.normalize("NFC", sample.text)
        assert all(0 <= start <= end <= len(sample.text) for start, end in offsets)


def test_tokenize_is_the_exact_way(tiny_tokenizer):
    template = ChatTemplate(tiny_tokenizer)
    chat = Conversation("r:1", "r", (Message("user", "a question"), Message("assistant", "an\nanswer 🙂")))
    [sample] = render_samples(chat, template, spec())
    [example] = tokenize(chat, template, spec())
    ids, supervised, straddling, _ = by_definition(sample, tiny_tokenizer)
    assert example.input_ids == ids
    assert [label != IGNORED for label in example.labels] == supervised
    assert [label for label in example.labels if label != IGNORED] == [
        token for token, flag in zip(ids, supervised, strict=True) if flag
    ]
    assert example.straddling == straddling


def rebuilt(tokenizer, change) -> PreTrainedTokenizerFast:
    """The tokenizer with a part of it replaced."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed = change(backend) or backend
    made = PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = tokenizer.chat_template
    return made


def _pattern(pattern: str):
    def change(backend):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return change


def _spelled(**parts):
    """Changes entries of tokenizer.json."""

    def change(backend):
        spelled = json.loads(backend.to_str())
        spelled |= parts
        return Tokenizer.from_str(json.dumps(spelled))

    return change


def _normalizer(normalizer):
    def change(backend):
        backend.normalizer = normalizer

    return change


def _prefix_space(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _byte_level(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _fewer_merges(backend):
    spelled = json.loads(backend.to_str())
    spelled["model"]["merges"] = spelled["model"]["merges"][::-1]
    return Tokenizer.from_str(json.dumps(spelled))


def _ignores_merges(backend):
    spelled = json.loads(backend.to_str())
    spelled["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(spelled))


def _added(**options):
    def change(backend):
        backend.add_tokens([AddedToken("QQ", normalized=False, **options), AddedToken("wörd", normalized=True)])

    return change


def _strips_around_ends(backend):
    spelled = json.loads(backend.to_str())
    for token in spelled["added_tokens"]:
        token["rstrip"] = True
    return Tokenizer.from_str(json.dumps(spelled))


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHANGES = {
    "the same pattern": _pattern(_QWEN),
    "as it is": lambda backend: None,
    "no normalizer": _normalizer(None),
    "NFD": _normalizer(normalizers.NFD()),
    "NFKC": _normalizer(normalizers.NFKC()),
    "lower case": _normalizer(normalizers.Lowercase()),
    "NFC and lower case": _normalizer(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "replaced": _normalizer(normalizers.Replace("a", "b")),
    "stripped": _normalizer(normalizers.Strip()),
    "GPT-2": _byte_level,
    "a space before": _prefix_space,
    "words and white space": _pattern(r"\s+|\S+"),
    "all in one": _pattern(r"[\s\S]+"),
    "three digits": _pattern(_QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")),
    "letters with marks": _pattern(
        _QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
    ),
    "contractions in small letters": _pattern(_QWEN.replace("(?i:", "(?:")),
    "merges the other way round": _fewer_merges,
    "merges ignored": _ignores_merges,
    "an added token": _added(),
    "an added word": _added(single_word=True),
    "an added token that takes blanks before": _added(lstrip=True),
    "an added token that takes blanks after": _added(rstrip=True),
    "ends that take blanks after": _strips_around_ends,
    "dropout": lambda backend: setattr(backend.model, "dropout", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fast_encoder_is_verified_or_refused(tiny_tokenizer, name):
    """Whatever is changed: where it says that it is proven, all else is the same too."""
    try:
        tokenizer = rebuilt(tiny_tokenizer, CHANGES[name])
        template = ChatTemplate(tokenizer)
    except ModelError:
        return  # it cannot spell the end of a turn, so nothing is trained with it
    fast, exact = encoders(template)
    if name == "as it is":
        assert fast.fast is not None
    if fast.fast is None:
        return
    chosen = random.Random(11)
    parts = [
        *"abcXYZ 019\n\t.,'!-_éß漢🙂",
        "QQ",
        " QQ ",
        "wörd",
        "the ",
        "'S",
        "'s",
        "'LL",
        "\n\n",
        "  ",
        "<|im_end|>",
        " <|im_end|> \n",
        "<think>",
        "123",
        "e\u0301",
        "ﬁ",
        "Å",
        "ǅ",
        "½",
    ]
    drawn = []
    for _ in range(600):
        text = "".join(chosen.choices(parts, k=chosen.randint(1, 20)))
        cuts = sorted(chosen.sample(range(len(text) + 1), 2))
        drawn.append(RenderedSample(text, (tuple(cuts),)))
    same(fast.encode(drawn), exact.encode(drawn))


def test_probes_hold_what_encoders_differ_in(tiny_tokenizer):
    texts = probes(list(tiny_tokenizer.get_added_vocab()))
    assert len(texts) > 800
    assert texts == probes(list(tiny_tokenizer.get_added_vocab()))
    assert all(any(token in text for text in texts) for token in tiny_tokenizer.get_added_vocab())


def test_a_fast_encoder_that_goes_wrong_is_detected(tiny_tokenizer):
    """It is compared now and then; here it is another tokenizer's, which nobody has proven."""
    other = rebuilt(tiny_tokenizer, _fewer_merges)
    wrong = FastEncoder(other.backend_tokenizer.to_str())
    encoder = Encoder(ChatTemplate(tiny_tokenizer), fast=wrong)
    ids = tiny_tokenizer.backend_tokenizer.encode
    differs = next(text for text in probes(["QQ"]) if wrong.encode(text).tolist() != ids(text).ids)
    with pytest.raises(FastEncoderError):
        encoder.encode([RenderedSample(differs, ((0, 1),))] * (encoder_module.CHECKED_EVERY + 1))


def test_it_restarts_before_it_fills_the_memory(tiny, monkeypatch):
    fast, exact = tiny
    monkeypatch.setattr(fast_encoder, "MEMORY_CHECKED_EVERY", 1000)
    monkeypatch.setattr(fast_encoder, "LARGEST_GROWTH", -(1 << 40))
    drawn = [RenderedSample(f"text {number} " * 20, ((4, 40),)) for number in range(50)]
    starts = fast.fast.starts
    same(fast.encode(drawn), exact.encode(drawn))
    assert fast.fast.starts > starts


def test_it_is_started_when_there_is_enough_to_encode(tiny_tokenizer):
    encoder = Encoder(ChatTemplate(tiny_tokenizer))
    small = [RenderedSample("a text", ())]
    encoder.encode(small)
    assert encoder.fast is None
    encoder.encode([RenderedSample("a text, " * (1 << 17), ()), *small])
    assert encoder.fast is not None


def test_ids_do_not_depend_on_the_tokenizers_state(tiny_tokenizer):
    """Encoding what looks like control tokens turns a switch of the tokenizer, which has to be turned back."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    encoder = Encoder(ChatTemplate(tokenizer), fast=None)
    plain = RenderedSample("a<|im_end|>", ((0, 11),))
    literal = RenderedSample("a<|im_end|>", ((0, 11),), ((1, 11),))
    once, between, again = (encoder.encode([sample]).ids.tolist() for sample in (plain, literal, plain))
    assert once == again
    assert len(between) > len(once)
    assert np.array_equal(encoder.encode([plain, literal, plain]).ids, [*once, *between, *again])
