"""data.py and rows.py: every kind of file, every split, every error sentence."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from foreword.data import Row, load_classification, read_labelled, read_rows, read_texts
from foreword.errors import InputError

AG_NEWS = Path(__file__).parents[2] / "shared/data/ag_news"


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8", newline="")
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rows_of(labels: str, text: str = "text") -> list[dict[str, Any]]:
    """One row for each letter of `labels`."""
    return [{"text": f"{text} {i}", "label": label} for i, label in enumerate(labels)]


def test_import_is_light() -> None:
    code = "import sys, foreword.data; print([m for m in ('torch', 'pandas', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- files


def test_csv_quotes_numbers_and_long_cells(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'id,text,label\r\n007,"a, ""b""\nc",1.0\r\n\r\n008,{long},2\r\n')
    assert read_rows(path) == [
        {"id": "007", "text": 'a, "b"\nc', "label": "1.0"},
        {"id": "008", "text": long, "label": "2"},
    ]


def test_tsv_does_not_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\r\n"so" it was, 5\tx\r\nb\u2028c\ty\r\n')
    assert read_labelled(path) == [Row('"so" it was, 5', "x"), Row("b\u2028c", "y")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_jsonl_byte_order_mark_line_ends_and_separators(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '\ufeff{"text": "a\u2028b\x85c", "label": 1}\r\n\r\n{"text": "d", "label": 2.0}')
    assert read_labelled(path) == [Row("a\u2028b\x85c", "1"), Row("d", "2")]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"], "label": pa.array([1, 0], pa.int8())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_labelled(tmp_path / "a.parquet") == [Row("a", "1"), Row("b", "0")]


def test_texts_need_no_labels(tmp_path: Path) -> None:
    assert read_texts(jsonl(tmp_path / "a.jsonl", [{"anything": "a"}, {"anything": "b"}])) == ["a", "b"]
    path = jsonl(tmp_path / "b.jsonl", [{"x": "a", "y": "b"}])
    assert read_texts(path, "y") == ["b"]
    with pytest.raises(InputError, match="no column that is clearly the text among 'x', 'y'; name it"):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.csv", b"text,label\n", r"a\.csv has no rows"),
        ("a.jsonl", b"\n\n", r"a\.jsonl has no rows"),
        ("a.csv", b"text,label\na,b\nc\n", r"a\.csv, line 3 has 1 cells and the header 2"),
        ("a.tsv", b"text\tlabel\na\tb\tc\n", r"a\.tsv, line 2 has 3 cells and the header 2"),
        ("a.csv", b'text,label\n"a,b\n', r"a\.csv, line \d is not valid CSV"),
        ("a.csv", b"text,text\na,b\n", r"more than one column 'text'"),
        ("a.csv", b"text,label\nok,1\ncaf\xe9,2\n", r"a\.csv is not UTF-8 at line 3 \(byte 19\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl, line 2 is not a JSON object"),
        ("a.json", b"[" * 100_000, r"a\.json, line 1 is not valid JSON"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a Parquet file"),
        ("a.txt", b"hello", r"a\.txt is not a kind of file that can be read; give one of \.csv, \.tsv"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_classification(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match=r"a\.csv cannot be read \(Is a directory\)"):
        read_rows(tmp_path / "a.csv")


# --- rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " \n", "label": "a"}, r"a\.jsonl, row 5 has an empty text; fill it or remove the row"),
        ({"label": "a"}, "row 5 has an empty text"),
        ({"text": 5, "label": "a"}, "row 5 has int in 'text' where a text belongs"),
        ({"text": "x", "label": " "}, "row 5 has no label"),
        ({"text": "x", "label": None}, "row 5 has no label"),
        ({"text": "x", "label": float("nan")}, "row 5 has no label"),
        ({"text": "x"}, "row 5 has no label"),
        ({"text": "x", "label": ["a"]}, "row 5 has list in 'label'; give one label"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_classification(jsonl(tmp_path / "a.jsonl", [*rows_of("abab"), row]))


def test_half_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud800", "label": "a"}\n')
    with pytest.raises(InputError, match="row 1 holds half a character"):
        read_labelled(path)


# --- columns


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"Label": "1", "Text": "a b"}, ("Text", "Label")),
        ({"class": "1", "title": "t", "description": "a b"}, ("description", "class")),
        ({"foo": "1", "bar": "longer"}, ("bar", "foo")),
        ({"foo": 1, "text": "a"}, ("text", "foo")),
        ({"intent": "longer", "foo": "a"}, ("foo", "intent")),
    ],
)
def test_columns_are_found(tmp_path: Path, row: dict[str, Any], found: tuple[str, str]) -> None:
    label = found[1]
    rows = [row | {label: f"{row[label]}{i % 2}"} for i in range(20)]
    data = load_classification(jsonl(tmp_path / "a.jsonl", rows))
    assert (data.text_column, data.label_column) == found


def test_columns_are_named(tmp_path: Path) -> None:
    rows = [{"text": "no", "label": "no", "mine": "yes", "kind": i % 2} for i in range(20)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = load_classification(path, text_column="mine", label_column="kind")
    assert (data.train[0].text, data.labels) == ("yes", ["0", "1"])
    with pytest.raises(InputError, match="no text column 'txt'; its columns are 'text', 'label', 'mine', 'kind'"):
        load_classification(path, text_column="txt")
    with pytest.raises(InputError, match="no label column 'lbl'; its columns are"):
        load_classification(path, label_column="lbl")


def test_columns_are_not_found(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "text": "z"}])
    with pytest.raises(InputError, match=r"clearly the label among 'a', 'b', 'text'; name it as label_column"):
        load_classification(path)


# --- splits


def test_one_file_is_split_the_same_each_time(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows_of("a" * 60 + "b" * 30 + "c" * 9 + "d"))
    data, again, other = (load_classification(path, seed=seed) for seed in (0, 0, 1))
    assert data == again and data.test != other.test
    assert [len(data.train), len(data.validation), len(data.test)] == [80, 10, 10]
    texts = [row.text for split in (data.train, data.validation, data.test) for row in split]
    assert len(set(texts)) == 100
    assert Counter(row.label for row in data.test) == {"a": 6, "b": 3, "c": 1}
    assert "d" in {row.label for row in data.train}


def test_split_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows_of("abcde" * 20))
    code = f"from foreword.data import load_classification as l; print(l({str(path)!r}, train_rows=9))"
    outputs = {
        subprocess.check_output([sys.executable, "-c", code], text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_train_rows_are_stratified_and_nested(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows_of("aaab" * 50))
    large, small = (load_classification(path, train_rows=n).train for n in (80, 20))
    assert set(small) < set(large)
    assert Counter(row.label for row in small) == {"a": 15, "b": 5}
    with pytest.raises(InputError, match="train_rows is 161; give a number from 1 to 160"):
        load_classification(path, train_rows=161)
    with pytest.raises(InputError, match="train_rows is 0"):
        load_classification(path, train_rows=0)


def test_folder_of_any_kinds(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", rows_of("ab" * 20))
    write(tmp_path / "dev.csv", "text,label\nx,a\n")
    write(tmp_path / "test.tsv", "text\tlabel\ny\tb\n")
    write(tmp_path / "README.md", "train")
    data = load_classification(tmp_path)
    assert (len(data.train), data.validation, data.test) == (40, [Row("x", "a")], [Row("y", "b")])


@pytest.mark.parametrize(("there", "made"), [("test", "validation"), ("validation", "test")])
def test_folder_without_a_split(tmp_path: Path, there: str, made: str) -> None:
    jsonl(tmp_path / "train.jsonl", rows_of("ab" * 20))
    jsonl(tmp_path / f"{there}.jsonl", rows_of("ab", "other"))
    data = load_classification(tmp_path)
    assert (len(data.train), len(getattr(data, there)), len(getattr(data, made))) == (36, 2, 4)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no train file; name one train"):
        load_classification(tmp_path)
    train = jsonl(tmp_path / "train.jsonl", rows_of("ab" * 20))
    jsonl(tmp_path / "test.jsonl", rows_of("abghijkl"))
    with pytest.raises(InputError, match=r"test\.jsonl has labels that .* lack: 'g', 'h', 'i', 'j', 'k', \.\.\.;"):
        load_classification(tmp_path)
    write(tmp_path / "test.jsonl", "")
    with pytest.raises(InputError, match=r"test\.jsonl has no rows"):
        load_classification(tmp_path)
    jsonl(tmp_path / "test.jsonl", [{"sentence": "a", "label": "a"}])
    with pytest.raises(InputError, match=r"test\.jsonl has no text column 'text'; its columns are 'sentence', 'label'"):
        load_classification(tmp_path)
    write(tmp_path / "train.csv", train.read_text())
    with pytest.raises(InputError, match=r"has train\.csv and train\.jsonl, both train; keep one"):
        load_classification(tmp_path)


def test_labels_in_order(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": i % 11} for i in range(110)]
    assert load_classification(jsonl(tmp_path / "a.jsonl", rows)).labels == [str(i) for i in range(11)]


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has one label, 'a'; give rows of two labels or more"):
        load_classification(jsonl(tmp_path / "a.jsonl", rows_of("aaaa")))
    with pytest.raises(InputError, match="has 2 rows, too few to cut test and validation from"):
        load_classification(jsonl(tmp_path / "b.jsonl", rows_of("ab")))


# --- names


@pytest.mark.parametrize("name", ["none.csv", "./none", "/none", "~/none-such", "a/b/c", "org/none.v1x"])
def test_missing_paths(name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist; check the path"):
        load_classification(name)


def test_hub_names_and_hidden_labels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    train = {"text": [f"t{i}" for i in range(40)] + [""], "label": [0, 1] * 20 + [0]}
    splits = {"train": train, "validation": {"text": ["v"], "label": [1]}, "test": {"text": ["h"], "label": [-1]}}
    hub = datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features) for k, v in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    data = load_classification("some/set-v1.0")
    assert (data.name, data.labels, data.validation) == ("some/set-v1.0", ["z", "a"], [Row("v", "a")])
    assert (len(data.train), len(data.test)) == (36, 4)
    assert "some/set-v1.0 (train): left out 1 rows without text" in capsys.readouterr().err
    del hub["train"]
    with pytest.raises(InputError, match="has no train split, only 'validation', 'test'"):
        load_classification("some/set")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str) -> None:
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"some/set is no local path .* \(Couldn't reach .* Hub\); check the id"):
        load_classification("some/set")


@pytest.mark.skipif(not AG_NEWS.exists(), reason="the shared AG News folder is not on this machine")
def test_ag_news() -> None:
    data = load_classification(AG_NEWS, train_rows=1000)
    assert data.labels == ["Business", "Sci/Tech", "Sports", "World"]
    assert [len(data.train), len(data.validation), len(data.test)] == [1000, 1000, 2000]
