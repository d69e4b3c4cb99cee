"""The tokenizer against a plain one: splitting by Python's `re`, merging one pair at a time."""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import BadInput
from nanochat.tokenizer import SPECIALS, SPLIT_PATTERN, Tokenizer

CORPUS = [
    Path(json.__file__).read_text(),
    Path(json.__file__).with_name("decoder.py").read_text(),
    "naïve café 文字 🌍",
]
NASTY = [
    "",
    " ",
    "\x00\x7f\r\n\r\n  \t x",
    "I'm we'LL 12345 ½ x1y2 don't",
    "<|bos|> is text here, <|user_start|> too",
    "e\u0301 \u202e 🌍🏳️‍🌈 文字\u3000",
    "".join(map(chr, range(1, 400))),
    "a" * 5000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 600)


def plain_split(text: str) -> list[str]:
    """The split pattern on ASCII, where `re` can say what a letter and a number are."""
    pattern = SPLIT_PATTERN.replace(r"[^\r\n\p{L}\p{N}]", "[^\r\na-zA-Z0-9]").replace(r"[^\s\p{L}\p{N}]", r"[^\sa-zA-Z0-9]")
    return re.findall(pattern.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]"), text)


def plain_encode(text: str, tokens: list[str], merges: list[tuple[str, str]]) -> list[int]:
    """BPE as it is told: in every piece join the earliest-learned pair, leftmost first, until none is left."""
    rank = {tuple(pair): i for i, pair in enumerate(merges)}
    ids = []
    for piece in plain_split(text):
        parts = list(piece.replace(" ", "Ġ").replace("\n", "Ċ").replace("\t", "ĉ").replace("\r", "č"))
        while True:
            pairs = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [tokens.index(part) for part in parts]
    return ids


def test_equal_to_a_plain_bpe_on_random_ascii(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(tokenizer.save(tmp_path).read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [tuple(pair) for pair in model["merges"]]
    draw = random.Random(0)
    pieces = [*"abcdefgh'\n\r\t  .,()=:_0123456789", " the", "self", "'ll", "'S", "return", "\n    ", "  ", "if"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=60))
        assert tokenizer.encode(text, bos=False) == plain_encode(text, tokens, merges)


def test_numbers_and_contractions_split_as_nanochat_does(tokenizer: Tokenizer) -> None:
    text = "I'm 12345 x!!\n\n\n  y"
    assert plain_split(text) == ["I", "'m", " ", "12", "34", "5", " x", "!!\n\n\n", " ", " y"]
    model = tokenizer._model.pre_tokenizer
    assert [text[a:b] for _, (a, b) in model.pre_tokenize_str(text)] == plain_split(text)


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == "<|bos|>" + text
    draw = random.Random(0)
    for _ in range(100):
        text = "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(50))
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_list_is_each_of_its_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(NASTY, bos=True) == [tokenizer.encode(text, bos=True) for text in NASTY]
    assert tokenizer.encode([], bos=True) == []


def test_specials_have_the_last_ids_and_text_cannot_forge_them(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.specials.items()) == [(name, 591 + i) for i, name in enumerate(SPECIALS)]
    assert tokenizer.vocab_size == 600 and tokenizer.bos_id == 591
    for text in ("<|bos|>", *SPECIALS, "a<|output_end|>b"):
        assert max(tokenizer.encode(text, bos=False)) < 591
        assert tokenizer.encode(text, bos=True)[0] == 591


def test_specials_stay_text_after_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(NASTY, bos=True) == tokenizer.encode(NASTY, bos=True)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.bos_id) == (tokenizer.fingerprint, 600, 591)
    assert torch.equal(loaded.token_bytes(), tokenizer.token_bytes())


def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == torch.int32 and sizes.shape == (600,)
    assert sizes[591:].eq(0).all() and sizes[:591].ge(1).all() and sizes[:256].eq(1).all()
    for text in NASTY:
        assert sizes[tokenizer.encode(text, bos=True)].sum() == len(text.encode())


def test_a_small_corpus_gives_fewer_ids_without_gaps() -> None:
    small = Tokenizer.train(["abc abc"], 5000)
    # 256 bytes, two merges inside "abc", one with the space before it, nine specials.
    assert small.vocab_size == 268
    assert list(small.specials.values()) == list(range(259, 268))
    assert small.decode(list(range(259, 268))) == "".join(SPECIALS)
    assert len(small.encode(" abc", bos=False)) == 1
    assert Tokenizer.train([], 265).vocab_size == 265


def test_training_is_repeatable_and_fingerprints_tell_tokenizers_apart(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(CORPUS, 600).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(CORPUS, 599).fingerprint != tokenizer.fingerprint
    assert Tokenizer.train(CORPUS[:1], 600).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("size", [264, 0, -1])
def test_vocabulary_too_small(size: int) -> None:
    with pytest.raises(BadInput, match=f"vocabulary of {size} is too small.*at least 265"):
        Tokenizer.train(CORPUS, size)


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for ids in ([600], [1, -1]):
        with pytest.raises(ValueError, match=r"0 … 599"):
            tokenizer.decode(ids)


def test_bad_input_from_the_texts_passes_through_training() -> None:
    def texts() -> Any:
        yield "a"
        raise BadInput("data.jsonl:7: broken")

    with pytest.raises(BadInput, match=r"data\.jsonl:7: broken"):
        Tokenizer.train(texts(), 300)


def test_missing_and_pickled_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer in .*tok_train"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(BadInput, match=r"tokenizer\.pkl: a pickle can run code.*tok_train"):
        Tokenizer.load(tmp_path)


def drop_special(content: dict[str, Any]) -> None:
    content["added_tokens"].pop()


def swap_specials(content: dict[str, Any]) -> None:
    first, second = content["added_tokens"][:2]
    first["content"], second["content"] = second["content"], first["content"]


def other_pattern(content: dict[str, Any]) -> None:
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("{1,2}", "{1,3}")


def lower_case(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def gap(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["Ġ"] = 10_000


def other_model(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "!"}


def missing_byte(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["not a byte"] = vocabulary.pop("ÿ")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_special, "special tokens are not its last ids"),
        (swap_specials, "special tokens are not its last ids"),
        (other_pattern, "pre_tokenizer differs"),
        (lower_case, "normalizer differs"),
        (gap, ""),
        (other_model, ""),
        (missing_byte, "256 bytes"),
    ],
)
def test_other_tokenizers_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, damage: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = tokenizer.save(tmp_path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert str(path) in message and reason in message and "tok_train" in message and "\n" not in message


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"model": ', b"\xff\xfe"])
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(BadInput, match=r"tokenizer\.json: damaged.*tok_train"):
        Tokenizer.load(tmp_path)


def test_truncated_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/tokenizer\.json: cannot be written"):
        tokenizer.save(tmp_path / "file")
