"""Sources: what is read, how it is split, and one clear line for whatever cannot be read."""

import gzip
import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.dataset import Source, base_dir, pieces, resolve
from nanochat.errors import BadInput


def write_parquet(path: Path, texts: list[object], column: str = "text") -> None:
    pq.write_table(pa.table({column: texts}), path, row_group_size=2)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts))


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def both(source: Source) -> list[str]:
    return [*source.documents("train"), *source.documents("val")]


TEXTS = [f"document {i}: naïve 文\r\n" for i in range(120)]


def make_all_kinds(folder: Path) -> None:
    for i, suffix in enumerate((".txt", ".md", ".py")):
        (folder / f"file{suffix}").write_bytes(TEXTS[i].encode())
    (folder / "packed.txt.gz").write_bytes(gzip.compress(TEXTS[3].encode()))
    (folder / "sub").mkdir()
    (folder / "sub" / "packed.md.zst").write_bytes(zst(TEXTS[4].encode()))
    write_jsonl(folder / "rows.jsonl", TEXTS[5:20])
    write_jsonl(folder / "plain", TEXTS[20:30])
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "plain").read_bytes()))
    write_jsonl(folder / "plain", TEXTS[30:40])
    (folder / "rows.jsonl.zst").write_bytes(zst((folder / "plain").read_bytes()))
    write_parquet(folder / "plain", list(TEXTS[40:50]))
    (folder / "rows.parquet.gz").write_bytes(gzip.compress((folder / "plain").read_bytes()))
    (folder / "plain").unlink()
    write_parquet(folder / "rows.parquet", list(TEXTS[50:]))


def test_every_kind_and_compression_is_read_whole(tmp_path: Path) -> None:
    make_all_kinds(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("not data")
    source = resolve(str(tmp_path))
    assert sorted(both(source)) == sorted(TEXTS)
    assert source.left_out == 1 and "1 files of other kinds left out" in source.describe()


def test_gzip_and_zstd_files_of_several_members_are_read_to_the_end(tmp_path: Path) -> None:
    line = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS[:4]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line[0]) + gzip.compress(line[1]))
    (tmp_path / "b.jsonl.zst").write_bytes(zst(line[2]) + zst(line[3]))
    assert sorted(both(resolve(str(tmp_path)))) == TEXTS[:4]


def test_equal_text_counts_once_across_kinds_and_splits(tmp_path: Path) -> None:
    make_all_kinds(tmp_path)
    write_jsonl(tmp_path / "again.jsonl", TEXTS)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"copy{i}.txt").write_bytes(text.encode())
    found = both(resolve(str(tmp_path)))
    assert len(found) == len(set(found)) == len(TEXTS)


def test_split_follows_content_not_place(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(2000)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "a" / "one.jsonl", texts)
    write_jsonl(tmp_path / "b" / "x.jsonl", texts[::-1][:1000])
    write_parquet(tmp_path / "b" / "y.parquet", [*texts[:1000], "one more"])
    one, two = resolve(str(tmp_path / "a")), resolve(str(tmp_path / "b"))
    held_out = set(one.documents("val"))
    assert 20 <= len(held_out) <= 64  # 40 ± 4 standard deviations: one in 50
    assert held_out.isdisjoint(one.documents("train"))
    assert set(two.documents("val")) - {"one more"} == held_out


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_documents_still_give_both_splits(tmp_path: Path, count: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:count])
    source = resolve(str(tmp_path / "a.jsonl"))
    assert len(list(source.documents("val"))) == 1
    assert len(list(source.documents("train"))) == count - 1


def test_last_of_several_parquet_files_is_validation_and_keeps_shared_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "shard_00000.parquet", ["a", "b", "shared"])
    write_parquet(tmp_path / "shard_00001.parquet", ["c", "a", ""])
    write_parquet(tmp_path / "shard_00002.parquet", ["v", "shared", "v"])
    (tmp_path / "shard_00003.parquet.tmp").write_bytes(b"half a download")
    source = resolve(str(tmp_path))
    assert list(source.documents("train")) == ["a", "b", "c"]
    assert list(source.documents("val")) == ["v", "shared"]


def test_one_parquet_file_is_split_by_content(tmp_path: Path) -> None:
    write_parquet(tmp_path / "only.parquet", list(TEXTS))
    source = resolve(str(tmp_path))
    assert sorted(both(source)) == sorted(TEXTS)
    assert list(source.documents("train")) and list(source.documents("val"))


def test_large_strings_and_dictionaries_are_text_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array(TEXTS[:5], pa.large_string()))
    write_parquet(tmp_path / "b.parquet", pa.array(TEXTS[5:9]).dictionary_encode())
    assert sorted(both(resolve(str(tmp_path)))) == sorted(TEXTS[:9])


def test_python_is_the_standard_library_without_packages() -> None:
    source = resolve("python")
    library = Path(sysconfig.get_path("stdlib")).resolve()
    assert library / "argparse.py" in source.files
    assert all(path.suffix == ".py" and path.is_relative_to(library) for path in source.files)
    assert not any("site-packages" in path.parts for path in source.files)
    more = set(resolve("python+site").files)
    assert set(source.files) < more and Path(pytest.__file__).resolve() in more


def test_python_leaves_out_what_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "b.py").write_text("b = 1")
    files = tuple(sorted(tmp_path.iterdir()))
    assert sorted(both(Source("python", files, installed=True))) == ["a = 1", "b = 1"]


def test_fingerprint_changes_with_files_and_only_with_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    first = resolve(str(tmp_path)).fingerprint
    assert resolve(str(tmp_path)).fingerprint == first
    os.utime(tmp_path / "a.jsonl", (1, 1))
    touched = resolve(str(tmp_path)).fingerprint
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:5])
    assert len({first, touched, resolve(str(tmp_path)).fingerprint}) == 3


def test_base_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    assert base_dir() == Path("out")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/somewhere")
    assert base_dir() == Path("/somewhere")


# Bad input: (file name, maker of its bytes or None for `write`, fragments of the message).


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def parquet_bytes(texts: object, column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: texts}), sink)
    return bytes(sink.getvalue())


def parquet_not_utf8() -> bytes:
    raw = pa.array([b"\xff\xfe", b"ok"], pa.binary())
    return parquet_bytes(pa.Array.from_buffers(pa.string(), 2, raw.buffers()))


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
NOISE = bytes(os.urandom(5000).hex(), "ascii")

BAD: list[tuple[str, Callable[[], bytes], list[str]]] = [
    ("bad.txt", lambda: b"ok \xff", ["bad.txt", "not UTF-8", "iconv"]),
    ("bad.py", lambda: b"# caf\xe9\n", ["bad.py", "not UTF-8"]),
    ("bad.jsonl", lambda: GOOD + b'{"text": "thr\n', ["bad.jsonl:3", "not a line of JSON"]),
    ("bad.jsonl", lambda: GOOD + b"[" * 100_000 + b"\n", ["bad.jsonl:3", "not a line of JSON"]),
    ("bad.jsonl", lambda: GOOD + b'{"content": "x"}\n', ["bad.jsonl:3", "no 'text' string"]),
    ("bad.jsonl", lambda: GOOD + b'{"text": null}\n', ["bad.jsonl:3", "no 'text' string"]),
    ("bad.jsonl", lambda: GOOD + b'["text"]\n', ["bad.jsonl:3", "no 'text' string"]),
    ("bad.jsonl", lambda: GOOD + b'{"text": "\xff"}\n', ["bad.jsonl:3", "not UTF-8"]),
    ("bad.jsonl", lambda: GOOD + b'{"text": "\\ud800"}\n', ["bad.jsonl:3", "surrogate"]),
    ("bad.jsonl", lambda: GOOD.decode().encode("utf-16"), ["bad.jsonl:1", "not UTF-8"]),
    ("bad.parquet", lambda: b"PAR1 this is none", ["bad.parquet", "cannot be read"]),
    ("bad.parquet", lambda: b"", ["bad.parquet", "cannot be read"]),
    ("bad.parquet", lambda: truncated(parquet_bytes(TEXTS)), ["bad.parquet", "cannot be read"]),
    ("bad.parquet", lambda: parquet_bytes(TEXTS, "content"), ["bad.parquet", "no column 'text'", "content"]),
    ("bad.parquet", lambda: parquet_bytes(["a", None]), ["bad.parquet row 1", "NoneType"]),
    ("bad.parquet", lambda: parquet_bytes([1, 2]), ["bad.parquet row 0", "int"]),
    ("bad.parquet", parquet_not_utf8, ["bad.parquet", "not UTF-8", "rows 0 to 1"]),
    ("bad.txt.gz", lambda: b"no gzip at all", ["bad.txt.gz", "cannot be read"]),
    ("bad.txt.gz", lambda: truncated(gzip.compress(NOISE)), ["bad.txt.gz", "cannot be read", "runcated"]),
    ("bad.txt.gz", lambda: gzip.compress(NOISE)[:-8] + bytes(8), ["bad.txt.gz", "cannot be read"]),
    ("bad.txt.zst", lambda: b"no zstandard", ["bad.txt.zst", "cannot be read"]),
    ("bad.jsonl.zst", lambda: truncated(zst(NOISE)), ["bad.jsonl.zst"]),
    ("bad.parquet.gz", lambda: gzip.compress(b"no parquet"), ["bad.parquet.gz", "cannot be read"]),
    ("bad.txt", lambda: b"the only one", ["bad.txt", "1 distinct documents", "one each", ".jsonl"]),
    ("bad.txt", lambda: b"", ["bad.txt", "0 distinct documents"]),
    ("bad.jsonl", lambda: b"\n\n", ["bad.jsonl", "0 distinct documents"]),
    ("bad.jsonl", lambda: b'{"text": "same"}\n' * 3, ["bad.jsonl", "1 distinct documents"]),
]


@pytest.mark.parametrize(("name", "make", "fragments"), BAD)
def test_bad_files_end_with_one_line(tmp_path: Path, name: str, make: Callable[[], bytes], fragments: list[str]) -> None:
    (tmp_path / name).write_bytes(make())
    with pytest.raises(BadInput) as caught:
        both(resolve(str(tmp_path / name)))
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_damage_inside_a_parquet_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [NOISE.decode() + str(i) for i in range(9)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the first page header
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.parquet: cannot be read"):
        both(resolve(str(path)))


def test_missing_data_unknown_suffix_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no such data 'pythn'.*python\+site.*\.jsonl"):
        resolve("pythn")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(BadInput, match=r"a\.csv: unknown suffix '\.csv'.*\.parquet"):
        resolve(str(tmp_path / "a.csv"))
    (tmp_path / "a.tar.gz").write_text("x")
    with pytest.raises(BadInput, match="unknown suffix"):
        resolve(str(tmp_path / "a.tar.gz"))
    (tmp_path / "a.tar.gz").unlink()
    with pytest.raises(BadInput, match=r"holds no file that can be read \(1 others\)"):
        resolve(str(tmp_path))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    source = resolve(str(tmp_path))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(BadInput, match=r"a\.jsonl: cannot be read \(No such file"):
        both(source)
    with pytest.raises(BadInput, match=r"a\.jsonl: cannot be read \(No such file"):
        _ = source.fingerprint


def test_several_parquet_files_with_an_empty_side(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    write_parquet(tmp_path / "b.parquet", ["", ""])
    with pytest.raises(BadInput, match=r"b\.parquet: holds no text, and the last parquet file is the validation set"):
        both(resolve(str(tmp_path)))
    write_parquet(tmp_path / "c.parquet", ["b", "a", "c"])
    with pytest.raises(BadInput, match=r"no text to train on that is not also in c\.parquet"):
        both(resolve(str(tmp_path)))


def test_long_installed_files_are_cut_at_top_level_lines_and_nothing_is_lost() -> None:
    function = "def f{0}(x):\n    if x:\n\n        return {0}\n" + "    # filler\n" * 30 + "\n\n"
    text = "".join(function.format(number) for number in range(40))
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(piece.startswith("def f") for piece in cut)
    assert all(4_000 <= len(piece) < 4_800 for piece in cut[:-1])
    assert list(pieces("x = 1\n")) == ["x = 1\n"]


def test_pieces_of_a_file_stay_in_one_split() -> None:
    """A held-out file contributes nothing to training, whatever its length."""
    library = resolve("python")
    train, val = set(library.documents("train")), set(library.documents("val"))
    assert max(map(len, val)) > 4_000 and len(val) > len(train) / 100  # one file in 50 is held out
    long_files = [path.read_text() for path in library.files if path.name in ("argparse.py", "ast.py", "bdb.py")]
    for text in long_files:
        assert len({piece in train for piece in pieces(text)}) == 1
