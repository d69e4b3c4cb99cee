"""From a source the user names to a stream of documents.

A source is `python` (the *.py files of this interpreter's standard library: 30 MB of text that every machine already
has, so a first run downloads nothing), `python+site` (all installed packages as well), or a file or directory of .txt
.md .py (a file is a document) and .jsonl .parquet (a row's `text` field is a document), each also as .gz or .zst.

Three rules make a validation loss mean something (where installed Python code is cut into pieces, they hold for files):

- The same text counts once, whatever file it is in. Copies (vendored modules, crawled mirrors) are common, and one on
  either side of the split would let the model recite.
- Which documents are held out depends on what they say, not where they are: one in 50 by content hash, so the split
  outlives a rename or a new file. Only for a directory of several parquet files the last one is held out, which is
  nanochat's rule and gives its validation set.
- What cannot be read ends the run and names its file and line. Skipping it in silence would train on other data than
  was asked for.

Reading is streamed, file by file; the memory held is about 100 bytes a document, for the hashes that find copies.
"""

import hashlib
import io
import json
import os
import site
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.errors import BadInput

Split = Literal["train", "val"]

_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ACCEPTED = "a file or directory of .txt .md .py .jsonl .parquet (also .gz or .zst of each)"
_HELD_OUT_ONE_IN = 50
# Characters from which on a piece of installed code ends at the next top-level line: about 1,200 tokens.
_PIECE = 4_000
# Names the rules above in every fingerprint: change it when the same files would give other documents or another split.
_RULES = "documents 2"


def base_dir() -> Path:
    """The directory for everything a run writes: $NANOCHAT_BASE_DIR, else ./out."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "out")


@dataclass(frozen=True)
class Source:
    """Documents of one named source.

    Attributes:
        name: what the user wrote.
        files: absolute paths, sorted.
        holds_out_last_file: validation is the last file; otherwise it is chosen by content hash.
        installed: Python code of an installation. Files that are not UTF-8 are left out (the tests of source encodings
            are such on purpose, and nobody's to mend), and long files are cut, see `pieces`.
        left_out: files of other kinds that the directory also holds.
    """

    name: str
    files: tuple[Path, ...]
    holds_out_last_file: bool = False
    installed: bool = False
    left_out: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits from the paths, sizes and modification times: changes when the documents may have changed.

        Raises:
            BadInput: a file is gone.
        """
        digest = hashlib.sha256(f"{_RULES} {self.holds_out_last_file} {self.installed}".encode())
        for path in self.files:
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people: how many files, how many bytes, what was left out."""
        size = sum(path.stat().st_size for path in self.files)
        others = f"; {self.left_out} files of other kinds left out" if self.left_out else ""
        return f"{self.name}: {len(self.files)} files, {size / 1e6:.1f} MB{others}"

    def documents(self, split: Split) -> Iterator[str]:
        """The distinct, non-empty documents of one split, in the order of the files.

        Raises:
            BadInput: a file cannot be read as what its suffix says, or a split would be empty.
        """
        files = self.files[-1:] if self.holds_out_last_file and split == "val" else self.files
        held_out = self._held_out
        seen: set[bytes] = set()
        none_yet = True
        for digest, text in self._hashed(files):
            if digest not in seen:
                seen.add(digest)
                if (digest in held_out) == (split == "val"):
                    none_yet = False
                    yield from pieces(text) if self.installed else (text,)
        if none_yet:
            raise BadInput(f"{self.name}: no text to train on that is not also in {files[-1].name}, the validation set")

    @cached_property
    def _held_out(self) -> set[bytes]:
        """Digests of the validation documents; costs one pass over the files that may hold them."""
        digests = {digest for digest, _ in self._hashed(self.files[-1:] if self.holds_out_last_file else self.files)}
        if self.holds_out_last_file:
            if not digests:
                raise BadInput(f"{self.files[-1]}: holds no text, and the last parquet file is the validation set: remove it")
            return digests
        if len(digests) < 2:
            raise BadInput(
                f"{self.name}: {len(digests)} distinct documents with text, but training and validation need one each: "
                'add files, or cut the text into documents (.jsonl, one {"text": "..."} a line)'
            )
        held_out = {digest for digest in digests if int.from_bytes(digest[:8], "little") % _HELD_OUT_ONE_IN == 0}
        return held_out if held_out and held_out != digests else {min(digests)}

    def _hashed(self, files: tuple[Path, ...]) -> Iterator[tuple[bytes, str]]:
        """Non-empty documents, each with 128 bits of its sha256: copies are found without keeping any text."""
        for path in files:
            try:
                for where, text in _texts(path):
                    if text:
                        try:
                            encoded = text.encode()
                        except UnicodeEncodeError as error:
                            raise BadInput(
                                f"{where}: the text holds half a surrogate pair, which is no text: drop that line"
                            ) from error
                        yield hashlib.sha256(encoded).digest()[:16], text
            except UnicodeDecodeError as error:
                if not self.installed:
                    raise BadInput(f"{path}: not UTF-8 text ({error.reason}): convert it with iconv or remove it") from error


def pieces(text: str) -> Iterator[str]:
    """Cut Python source into documents of about 4,000 characters, each beginning at a top-level line after a blank one.

    Packing keeps the beginning of a document that is longer than a row and drops the rest. Half of the library's files
    are longer than 1,500 tokens: uncut, an epoch at 2,048 tokens a row would show 7% of the text, mostly imports.
    """
    lines = text.splitlines(keepends=True)
    start = size = 0
    for number, line in enumerate(lines):
        starts_something = not line[0].isspace() and number > 0 and lines[number - 1].isspace()
        if size >= _PIECE and starts_something:
            yield "".join(lines[start:number])
            start, size = number, 0
        size += len(line)
    yield "".join(lines[start:])


def resolve(source: str) -> Source:
    """Find the files that `source` names: `python`, `python+site`, or a path (write ./python for a path of that name).

    Raises:
        BadInput: nothing of that name, a suffix nobody reads, or a directory without one readable file.
    """
    if source in ("python", "python+site"):
        return _installed_python(source)
    path = Path(source).expanduser().absolute()
    if path.is_file():
        if _kind(path) is None:
            raise BadInput(f"{source}: unknown suffix '{path.suffix}': data is {_ACCEPTED}")
        return Source(source, (path,))
    if not path.is_dir():
        raise BadInput(f"no such data '{source}': give python, python+site, or {_ACCEPTED}")
    found = _walk(path)
    files = tuple(file for file in found if _kind(file) is not None)
    if not files:
        raise BadInput(f"{source}: holds no file that can be read ({len(found)} others): data is {_ACCEPTED}")
    all_parquet = all(_kind(file) == ".parquet" for file in files)
    return Source(source, files, holds_out_last_file=all_parquet and len(files) > 1, left_out=len(found) - len(files))


def _installed_python(name: str) -> Source:
    library = Path(sysconfig.get_path("stdlib")).resolve()
    # The library's own folder also holds the packages of the base installation, a virtual environment's or not.
    files = [path for path in _walk(library) if not {"site-packages", "dist-packages"}.intersection(path.parts)]
    if name == "python+site":
        packages = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        for directory in {Path(package).resolve() for package in packages if Path(package).is_dir()}:
            files += _walk(directory)
    sources = tuple(sorted({path for path in files if path.suffix == ".py"}))
    if not sources:
        raise BadInput(f"{name}: no *.py files in {library}: this Python comes without its sources; give --data a directory")
    return Source(name, sources, installed=True)


def _walk(directory: Path) -> list[Path]:
    """All files below `directory`, sorted; hidden ones (.git, .ipynb_checkpoints) are not data."""
    found: list[Path] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted(found)


def _kind(path: Path) -> str | None:
    """The suffix that says how to read `path`, compression aside; None when nobody reads it."""
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix
    return suffix if suffix in _KINDS else None


def _open(path: Path) -> BinaryIO:
    """`path` as a stream of uncompressed bytes. pyarrow reads both compressions and notices truncation in both."""
    if path.suffix in _COMPRESSIONS:
        return io.BufferedReader(pa.input_stream(str(path), compression=_COMPRESSIONS[path.suffix]))
    return path.open("rb")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """The (place, text) pairs of one file; `place` is 'file', 'file:line' or 'file row n' for messages."""
    try:
        with _open(path) as stream:
            match _kind(path):
                case ".jsonl":
                    yield from _json_lines(path, stream)
                case ".parquet":
                    yield from _parquet_rows(path, stream)
                case _:
                    yield str(path), stream.read().decode()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(stream, 1):
        where = f"{path}:{number}"
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: not UTF-8 text ({error.reason}): convert the file with iconv") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not a line of JSON ({error}): mend or drop that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise BadInput(f'{where}: no \'text\' string: every line must be an object like {{"text": "..."}}')
        yield where, row["text"]


def _parquet_rows(path: Path, stream: BinaryIO) -> Iterator[tuple[str, str]]:
    # Parquet is read from its end, so a compressed file is unpacked into memory; others stream, a row group at a time.
    table = pq.ParquetFile(pa.BufferReader(stream.read()) if path.suffix in _COMPRESSIONS else stream)
    if "text" not in table.schema_arrow.names:
        raise BadInput(f"{path}: no column 'text' (columns: {', '.join(table.schema_arrow.names)}): rename the one that holds it")
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{path}: not UTF-8 text in rows {row} to {row + len(batch) - 1} ({error.reason}): write the file anew"
            ) from error
        for text in texts:
            if not isinstance(text, str):
                raise BadInput(f"{path} row {row}: 'text' is {type(text).__name__}, not a string: drop or mend that row")
            yield f"{path} row {row}", text
            row += 1


def _unreadable(path: Path, error: Exception) -> BadInput:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return BadInput(f"{path}: cannot be read ({reason.rstrip('.')}): mend it, fetch it again, or remove it")
