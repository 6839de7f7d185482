"""data/tables.py: other people's tables, row by row; what is damaged costs its own row."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tables


def read(path, separator="\t", header=True, encoding=""):
    return [(row.where, row.fields or row.problem) for row in tables.rows(path, separator, header, encoding)]


def fields(*arguments, **options):
    return [found for _, found in read(*arguments, **options)]


EXPECTED = [{"path": "a.wav", "text": "Ça va ?"}, {"path": "b.wav", "text": "Tom's here."}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    lines = ["path\ttext", "a.wav\tÇa va ?", "", "b.wav\tTom's here."]
    (tmp_path / "a.tsv").write_bytes((end.join(lines) + end).encode(encoding))
    assert fields(tmp_path / "a.tsv") == EXPECTED


def test_another_encoding_is_named_or_told(tmp_path):
    (tmp_path / "a.tsv").write_bytes("path\ttext\na.wav\tÇa va ?\nb.wav\tTom's here.\n".encode("cp1252"))
    one, two = fields(tmp_path / "a.tsv")
    assert "not UTF-8" in one and "--encoding" in one and two == EXPECTED[1]
    assert fields(tmp_path / "a.tsv", encoding="cp1252") == EXPECTED


def test_csv_with_quotes(tmp_path):
    (tmp_path / "a.csv").write_text(
        'path,text\na.wav,"Yes, ""he"" said,\nand went."\nb.wav, plain\nc.wav,one,two\n'
        'd.wav,"never closed\n' + "".join(f"{n}.wav,row {n}\n" for n in range(30))
    )
    found = fields(tmp_path / "a.csv", separator=",")
    assert found[0] == {"path": "a.wav", "text": 'Yes, "he" said,\nand went.'}
    assert found[1] == {"path": "b.wav", "text": "plain"}
    assert found[2] == "more columns than the header: 3, not 2"
    assert found[3] == "damaged row: a quotation mark is not closed"
    assert found[4:] == [{"path": f"{n}.wav", "text": f"row {n}"} for n in range(30)]


def test_a_row_that_ends_before_the_header(tmp_path):
    (tmp_path / "a.tsv").write_text("path\ttext\tspeaker\na.wav\tOne.\nb.wav\n")
    assert fields(tmp_path / "a.tsv") == [
        {"path": "a.wav", "text": "One.", "speaker": ""},
        {"path": "b.wav", "text": "", "speaker": ""},
    ]


def test_a_table_without_header(tmp_path):
    (tmp_path / "metadata.csv").write_text('LJ1|He said "1455|He said "fourteen\n\nLJ2|Two|Two\n')
    assert read(tmp_path / "metadata.csv", "|", header=False) == [
        ("metadata.csv, line 1", {"1": "LJ1", "2": 'He said "1455', "3": 'He said "fourteen'}),
        ("metadata.csv, line 3", {"1": "LJ2", "2": "Two", "3": "Two"}),
    ]
    (tmp_path / "prompts.txt").write_text("hello: Hello: it is me.\n")
    assert fields(tmp_path / "prompts.txt", ":", header=False) == [{"1": "hello", "2": " Hello: it is me."}]


def test_long_lines_cost_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE", 100)
    (tmp_path / "a.tsv").write_text("path\ttext\na.wav\t" + "x" * 1000 + "\nb.wav\tfine\n")
    assert fields(tmp_path / "a.tsv") == [
        "line too long: more than 100 characters",
        {"path": "b.wav", "text": "fine"},
    ]
    with pytest.raises(ValueError, match="text too long"):
        tables.read_text(tmp_path / "a.tsv", limit=50)


def test_json_lines_cut_in_half(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"wav": "a.wav", "n": 3, "more": [1]}\n[1]\n' + "[" * 9999 + '\n{"wav": "b.w'
    )
    assert fields(tmp_path / "a.jsonl", tables.JSON) == [
        {"wav": "a.wav", "n": "3"},
        "damaged row: not an object",
        "damaged row: not JSON",
        "damaged row: not JSON",
    ]


def test_json_lines_that_are_called_json(tmp_path):
    rows = [{"wav": "a.wav"}, {"wav": "b.wav"}]
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps({"rows": rows}, indent=1)):
        (tmp_path / "a.json").write_text(text)
        assert fields(tmp_path / "a.json", tables.JSON) == rows


# ---- long JSON ---------------------------------------------------------------------------------------------


def items(path, key=""):
    return [value for value, _ in tables.json_items(path, key)]


def test_long_json_is_read_element_by_element(tmp_path):
    rows = [{"n": n, "text": "}]," * 30_000, "list": [{"a": [1, {}]}]} for n in range(10)]  # 90 kB each
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent))
        assert items(tmp_path / "a.json") == rows
        whole = {"audios_": [1], "name": {"audios": [2]}, "audios": rows, "more": 1}
        (tmp_path / "b.json").write_text(json.dumps(whole, indent=indent))
        assert items(tmp_path / "b.json", "audios") == rows
    positions = [position for _, position in tables.json_items(tmp_path / "b.json", "audios")]
    assert positions == sorted(positions) and positions[0] < (tmp_path / "b.json").stat().st_size / 2
    (tmp_path / "c.json").write_text("[]")
    assert items(tmp_path / "c.json") == []


@pytest.mark.parametrize(
    "text, good, words",
    [
        ('[{"a": 1}, {"a": 2}, {"a"', 2, "cut short"),
        ('[{"a": 1}, {"a": 2},', 2, "cut short"),
        ("", 0, "cut short"),
        ('[{"a": 1} {"a": 2}]', 0, "damaged from here on"),
        ('{"a": 1}', 0, "no list"),
        ('{"b": [1]}', 0, "no list"),
        ("[" * 100_000, 0, "damaged"),
        ('"text"', 0, "expected one of"),
        ('{"audios": {"a": 1}}', 0, "expected one of"),
    ],
)
def test_damaged_json(tmp_path, text, good, words):
    (tmp_path / "a.json").write_text(text)
    *found, last = items(tmp_path / "a.json", "audios" if text.startswith("{") else "")
    assert found == [{"a": 1}, {"a": 2}][:good]
    assert isinstance(last, ValueError) and words in str(last)


def test_an_element_without_end_does_not_take_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ITEM", 200_000)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 1_000_000 + '"}]')
    (error,) = items(tmp_path / "a.json")
    assert "more than 200000 characters" in str(error)


# ---- anything ----------------------------------------------------------------------------------------------

GOOD = (
    b'path\ttext\na.wav\tOne.\nb.wav\t"Two", she said.\n',
    b'path,text\na.wav,"One,\nand ""two"""\nb.wav,Three\n',
    b"a|One|one\nb|Two|two\n",
    '{"wav": "a.wav", "text": "Ça"}\n{"wav": "b.wav"}\n'.encode(),
    b'{"name": [1, {"a": null}], "audios": [{"aid": "1", "segments": [{"a": 1.5}]}, {"aid": "2"}]}',
    "path\ttext\na.wav\tÇa\n".encode("utf-16"),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_a_problem_of_a_row(data):
    """Bytes changed, lost or doubled: each reader gives rows, each with fields of text or with a problem."""
    content = bytearray(data.draw(st.sampled_from(GOOD)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 8))
        content[place : place + length] = data.draw(st.binary(max_size=8))
        content = content or bytearray(b"\0")
    with tempfile.TemporaryDirectory() as folder:
        for name, separator in (("a.tsv", "\t"), ("a.csv", ","), ("a.txt", "|"), ("a.txt", ":")):
            path = Path(folder, name)
            path.write_bytes(content)
            for header in (True, False):
                check_rows(tables.rows(path, separator, header))
        for name in ("a.json", "a.jsonl"):
            path = Path(folder, name)
            path.write_bytes(content)
            check_rows(tables.rows(path, tables.JSON, False))
            assert all(type(at) is int for _, at in tables.json_items(path, "audios"))


def check_rows(found) -> None:
    for row in found:
        assert row.where and "\n" not in row.problem and len(row.problem) < 300
        assert all(type(key) is str and type(value) is str for key, value in row.fields.items())
