"""Text to token ids and back: byte-level BPE with nanochat's split pattern and nine special tokens.

BPE starts from the 256 bytes and joins the most frequent neighbouring pair into a new token, again and again, but never
across a border set by the split pattern (so that "dog." and "dog!" share "dog"). Any text whatever can be encoded, and
decoding gives it back byte for byte.

Special tokens take the last ids and mean structure: `<|bos|>` opens a document. Text that happens to contain the
characters "<|bos|>" is encoded as those characters, so no document can forge structure.

Stored as `tokenizer.json`, which any program with Hugging Face's `tokenizers` reads; nanochat's own `tokenizer.pkl` is
a pickle, which can run code when opened, and is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat.errors import BadInput

SPECIALS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# In order: contractions; words with one other character before; one or two digits; punctuation; line ends; spaces.
SPLIT_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable characters, one for each byte
_MEND = "train one with python -m scripts.tok_train"


class Tokenizer:
    """A trained tokenizer; build one with `train` or `load`.

    Attributes:
        vocab_size: number of ids, specials included; ids run from 0 to vocab_size − 1.
        specials: id of each special token, by name; always the last nine ids.
        bos_id: id of `<|bos|>`, the first token of every document.
        fingerprint: sha256 (hex) of the vocabulary, merges and split pattern: equal means equal ids for every text.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers.Tokenizer` made by this module; whether it is one is checked.

        Raises:
            ValueError: not a byte-level BPE of this kind; the message says what differs.
        """
        content = json.loads(model.to_str())
        self._tokens = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
        _check(content, self._tokens, model)
        # Not stored in the file: without it the characters "<|bos|>" in a document would become the token.
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = len(self._tokens)
        self.specials = {name: self.vocab_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)}
        self.bos_id = self.specials["<|bos|>"]
        identity = json.dumps([SPLIT_PATTERN, self._tokens, content["model"]["merges"]])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids, or of fewer when the texts have no more pairs to join.

        Raises:
            BadInput: `vocab_size` leaves no room for the 256 bytes and the nine specials.
        """
        least = len(_BYTES) + len(SPECIALS)
        if vocab_size < least:
            raise BadInput(f"a vocabulary of {vocab_size} is too small: 256 bytes and 9 special tokens need at least {least}")
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = _pre_tokenizer()
        model.decoder = decoders.ByteLevel()
        # The trainer would give specials the first ids; added afterwards they get the last ones.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS), min_frequency=0, initial_alphabet=_BYTES, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        model.add_special_tokens(list(SPECIALS))
        return cls(model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json` from `directory`.

        Raises:
            BadInput: the file is missing, damaged, of another kind, or only nanochat's pickle is there.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            if (path.parent / "tokenizer.pkl").exists():
                raise BadInput(f"{path.parent / 'tokenizer.pkl'}: a pickle can run code, so it is not opened: {_MEND}")
            raise BadInput(f"no tokenizer in {path.parent} (tokenizer.json is missing): {_MEND}")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot parse
            reason = str(error).splitlines()[0]
            raise BadInput(f"{path}: damaged, or not a tokenizer of this repository ({reason}): {_MEND}") from error

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `tokenizer.json` into `directory` (made if missing) and return its path; never leaves half a file.

        Raises:
            BadInput: the directory cannot be written.
        """
        path = Path(directory) / "tokenizer.json"
        aside = path.with_name("tokenizer.json.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(self._model.to_str(), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error.strerror}): free space or choose another place") from error
        return path

    @overload
    def encode(self, text: str, bos: bool) -> list[int]: ...

    @overload
    def encode(self, text: list[str], bos: bool) -> list[list[int]]: ...

    def encode(self, text: str | list[str], bos: bool) -> list[int] | list[list[int]]:
        """Ids of one text, or of each text of a list (on all cores); led by `<|bos|>` if `bos`."""
        if isinstance(text, str):
            return self.encode([text], bos)[0]
        lead = [self.bos_id] if bos else []
        return [lead + row.ids for row in self._model.encode_batch_fast(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, specials by name; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"ids must lie in 0 … {self.vocab_size - 1}, got {min(ids)} … {max(ids)}")
        return str(self._model.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self) -> torch.Tensor:
        """Bytes of text that each id stands for, int32 (vocab_size,), 0 for specials: the units of bits per byte."""
        return torch.tensor([0 if token in self.specials else len(token) for token in self._tokens], dtype=torch.int32)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    to_byte_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_byte_characters])


def _check(content: dict[str, object], tokens: list[str], model: tokenizers.Tokenizer) -> None:
    """Compare what was loaded with what `train` makes; a silent difference would change every id and every loss."""
    expected = tokenizers.Tokenizer(models.BPE())
    expected.pre_tokenizer = _pre_tokenizer()
    expected.decoder = decoders.ByteLevel()
    blank = json.loads(expected.to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        if content[part] != blank[part]:
            raise ValueError(f"its {part} differs")
    if not isinstance(model.model, models.BPE):
        raise ValueError("not a BPE model")
    if tuple(tokens[-len(SPECIALS) :]) != SPECIALS:
        raise ValueError("the nine special tokens are not its last ids")
    if [model.token_to_id(token) for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not contiguous")
    if not set(_BYTES).issubset(tokens):
        raise ValueError("some of the 256 bytes have no token")
