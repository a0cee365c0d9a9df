"""Record files: formats, encodings, splits of a folder; a file that cannot be read is refused by name, never trained on as text."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli import main
from minilora.data.records import is_dataset, kind_of, read_records, split_files
from minilora.data.text import read_text, split_text

ROWS = [{"prompt": f"question {i}: ", "completion": f"é {i}\nmore"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\n" + "".join('"{prompt}","{completion}"\n'.format(**row) for row in ROWS)

FILES = {
    "a.jsonl": LINES.encode(),
    "a.JSONL": LINES.encode("utf-8-sig"),
    "a.ndjson": LINES.replace("\n", "\r\n").encode(),
    "lines.json": LINES.encode(),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "list.jsonl": ("\n\n " + json.dumps(ROWS)).encode(),
    "two files joined.jsonl": LINES.encode() + b"\xef\xbb\xbf",
    "a.csv": TABLE.encode("utf-8-sig"),
    "a.tsv": TABLE.replace(",", "\t").encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.CSV.gz": gzip.compress(TABLE.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_records_from_every_format(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert [record for _, record in read_records(tmp_path / name)] == ROWS
    assert is_dataset(tmp_path / name)


def test_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'minilora[oracle]'")
    from pyarrow.parquet import write_table

    write_table(pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]}), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == list(enumerate(ROWS, start=1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        list(read_records(tmp_path / "b.parquet"))


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=3), min_size=1, max_size=6),
    st.none() | st.just(1),
)
def test_a_json_list_matches_the_json_library(tmp_path_factory, rows, indent):
    file = tmp_path_factory.mktemp("list") / "a.json"
    file.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    assert list(read_records(file)) == list(enumerate(rows, start=1))


def test_a_long_field_of_a_table_is_read(tmp_path):
    text = "a b " * 50_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{text}",x\n')
    assert list(read_records(tmp_path / "a.csv")) == [(2, {"text": text, "label": "x"})]


def test_encodings_are_declared_not_guessed(tmp_path):
    file = tmp_path / "a.jsonl"
    for encoding in ("latin-1", "utf-16"):
        file.write_bytes(LINES.encode(encoding))
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: this is .*--encoding"):
            list(read_records(file))
        assert [record for _, record in read_records(file, encoding)] == ROWS
    with pytest.raises(ValueError, match="there is no encoding 'klingon'"):
        list(read_records(file, "klingon"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "this is not JSON .*line 2 column 2"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "this is not JSON .*line 2 column 7"),
        ("a.json", b'[{"a": 1}', "this is not JSON .*line 1 column 10"),
        ("a.json", b'[{"a": 1}]\n[]', "this is not JSON .*line 2 column 1"),
        ("a.json", b"[1]", "line 1: expected a JSON object, got int"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b'{"a": 1, "a": 2}', "line 1: .*the key 'a' appears twice"),
        ("a.jsonl", b'{"a": "\x00"}', "line 1: this is binary data"),
        ("a.csv", b"text;label\na;b\n", "line 1: the columns are separated by ';'"),
        ("a.csv", b"text,label\n,\n", None),
        ("a.jsonl.gz", b"\x1f\x8b" + bytes(9), "is not a whole gzip file"),
        ("a.xlsx", b"PK\x03\x04", "is not a record file"),
    ],
)
def test_unparsable_files_are_refused_with_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    if message is None:  # two empty fields are a record, not an empty line
        assert list(read_records(tmp_path / name)) == [(2, {"text": "", "label": ""})]
        return
    with pytest.raises(ValueError, match=message) as caught:
        list(read_records(tmp_path / name))
    assert name in str(caught.value)


def test_suffixes_ignore_letter_case():
    assert [kind_of(n) for n in ("a.JSONL", "b.csv.gz", "c.v2.tsv", "d.txt", "e.gz", "json")] == [
        ".jsonl",
        ".csv",
        ".tsv",
        None,
        None,
        None,
    ]


# ---- folders -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train.jsonl valid.jsonl test.jsonl", "train valid test"),
        ("train.jsonl validation.jsonl", "train valid"),
        ("TRAIN.csv Dev.CSV", "train valid"),
        ("training.ndjson eval.tsv test.jsonl.gz", "train valid test"),
        ("train.json val.json", "train valid"),
    ],
)
def test_splits_by_common_names(names, splits, tmp_path):
    for name in names.split():
        (tmp_path / name).write_text("")
    found = split_files(tmp_path)
    assert {split: file.name for split, file in found.items()} == dict(zip(splits.split(), names.split(), strict=True))
    assert is_dataset(tmp_path)


def test_two_files_for_one_split_are_refused_and_unused_ones_named(tmp_path, capsys):
    for name in ("train.jsonl", "valid.jsonl", "train-00001.jsonl", "README.md", ".hidden"):
        (tmp_path / name).write_text("")
    split_files(tmp_path, quiet=False)
    assert "README.md, train-00001.jsonl are not used." in capsys.readouterr().err
    (tmp_path / "dev.csv").write_text("")
    with pytest.raises(ValueError, match=r"has both dev\.csv and valid\.jsonl, which are the same split"):
        split_files(tmp_path)


def test_a_folder_of_records_without_a_split_is_not_read_as_text(tmp_path):
    (tmp_path / "data.jsonl").write_text(LINES)
    (tmp_path / "README.md").write_text("about the data " * 100)
    with pytest.raises(ValueError, match=r"holds records \(data\.jsonl\), but no file is named train"):
        is_dataset(tmp_path)


def test_the_splits_of_a_text_are_not_joined_into_one(tmp_path):
    for name in ("train.txt", "Valid.txt"):
        (tmp_path / name).write_text("the cat sat on the mat ")
    with pytest.raises(ValueError, match=r"holds train\.txt and Valid\.txt, which would be learnt as one text"):
        read_text(tmp_path)
    (tmp_path / "train.txt").rename(tmp_path / "one.txt")
    assert len(read_text(tmp_path)) == 2 * 23 + 2


# ---- plain text ----------------------------------------------------------------------------------------------------------------------


def test_plain_text_is_the_text_of_the_file(tmp_path, capsys):
    text = "Über die Straße gehen naïve Gäste.\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8-sig"))
    assert read_text(tmp_path / "a.txt").tobytes().decode() == text
    (tmp_path / "b.md").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.md, line 1: this is not UTF-8 text"):
        read_text(tmp_path / "b.md")
    assert read_text(tmp_path / "b.md", "latin-1").tobytes().decode() == text
    (tmp_path / "b.md").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "c.rst").write_text("not read")
    assert read_text(tmp_path).tobytes().decode() == text + "\n\n" + text
    assert "only .py, .txt and .md files are read; c.rst is not." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", bytes(range(256)), "not UTF-8 text .*binary data"),
        ("a.txt", b"abc\x00def", "line 1: this is binary data"),
        ("a.txt", LINES.encode(), "holds records, but its name is not that of a record file"),
        ("a.log", ("[\n" + LINES.strip().replace("\n", ",\n") + "]").encode(), "holds records, but its name is not that of a record file"),
        ("a.txt", b" \n", "is empty"),
    ],
)
def test_binary_files_are_never_trained_on(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["finetune", "--data", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 1
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@given(st.text(min_size=1, max_size=60))
def test_text_is_split_between_characters(text):
    raw = np.frombuffer(text.encode("utf-8", errors="ignore"), dtype=np.uint8)
    parts = split_text(raw)
    assert b"".join(part.tobytes() for part in parts) == raw.tobytes()
    for part in parts:
        part.tobytes().decode("utf-8")
