"""data/tokens.py: SpeechInstruct lines as memory maps; whole, resumed, damaged."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokenizer
from data import tokens
from data.tokens import Mixture, TokenMap, lines_between, to_document, tokenize
from files import write_jsonl
from tokenizer import Tokenizer

TINY = "weights/tiny/llama"


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained(TINY)


def rows(n: int, seed: int = 0) -> list[dict]:
    """Lines as data/speechinstruct/prepare.py writes them, in both styles."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        units = tokenizer.units_to_text(draw.randrange(1000) for _ in range(draw.randrange(3, 60)))
        style = draw.choice(("paper", "released"))
        prompt, answer = tokenizer.cross_modal("Recognize this speech.", units, f"Number {i}.", style)
        prefix = tokenizer.META if style == "released" else ""
        found.append({"prefix": prefix, "plain_text": prompt[len(prefix) :] + answer})
    return found


def lengths_of(table: TokenMap) -> np.ndarray:
    return np.concatenate([table.lengths(number) for number in range(len(table.sizes))])


def test_a_line_is_the_document_of_its_template(tok):
    speech = tokenizer.units_to_text([3, 7])
    for style in ("paper", "released"):
        prompt, answer = tokenizer.cross_modal("Recognize this speech.", speech, "Hello.", style)
        prefix = tokenizer.META if style == "released" else ""
        ids, mask = to_document({"prefix": prefix, "plain_text": prompt[len(prefix) :] + answer}, tok)
        assert (ids, mask) == tok.document(prompt, answer)
        assert tok.decode([i for i, target in zip(ids, mask) if target]).startswith("Hello. <eoa>")
    # a file that repeats the prefix at the start of the text
    row = {"prefix": tokenizer.META, "plain_text": prompt + answer}
    assert to_document(row, tok) == tok.document(prompt, answer)


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "not an object"),
        ({"plain_text": "x"}, "needs the texts"),
        ({"prefix": "", "plain_text": "no answer"}, "no '[SpeechGPT]: '"),
        ({"prefix": "", "plain_text": "[Human]: a<eoh>. [SpeechGPT]: "}, "nothing after"),
        ({"prefix": "", "plain_text": "[Human]: <1000><eoh>. [SpeechGPT]: a<eoa>."}, "a unit outside 0..999"),
    ],
)
def test_a_line_that_is_no_document(tok, row, message):
    with pytest.raises(ValueError) as error:
        to_document(row, tok)
    assert message in str(error.value)


def test_lines_belong_to_the_part_in_which_they_begin(tmp_path):
    content = b"".join(b"%d\n" % (10**length) for length in (0, 5, 1, 1, 9, 0, 3))
    path = tmp_path / "a"
    path.write_bytes(content)
    for part in range(1, len(content) + 2):
        found = []
        for start in range(0, len(content), part):
            found += lines_between(path, start, min(start + part, len(content)))
        assert b"".join(found) == content, part


@pytest.mark.parametrize("part", [1 << 20, 700])
def test_the_map_is_what_was_written(tmp_path, tok, part):
    source = tmp_path / "a.jsonl"
    table = rows(40)
    write_jsonl(source, table)
    totals = tokenize(source, tmp_path / "map", TINY, part=part)
    expected = [to_document(row, tok) for row in table]
    found = TokenMap(tmp_path / "map", len(tok))
    assert [found[i] for i in range(len(found))] == expected
    assert lengths_of(found).tolist() == [len(ids) for ids, _ in expected]
    assert totals == (40, sum(len(ids) for ids, _ in expected), {})
    assert found.part(0).ids.dtype == np.uint16
    with pytest.raises(IndexError):
        found[40]


def test_what_cannot_be_used_is_counted_and_nothing_is_cut(tmp_path, tok):
    table = rows(10)
    lengths = [len(to_document(row, tok)[0]) for row in table]
    longest = max(lengths)
    source = tmp_path / "a.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in table)
    source.write_text(text + '{"prefix": "", "plain_text": "x"}\n\n{"prefix": "", "pl', encoding="utf-8")
    totals = tokenize(source, tmp_path / "map", TINY, max_len=longest - 1)
    too_long = lengths.count(longest)
    assert totals.documents == 10 - too_long
    assert totals.skipped.pop(f"longer than {longest - 1} tokens") == too_long
    assert sum(totals.skipped.values()) == 2
    found = TokenMap(tmp_path / "map")
    kept = [n for n in lengths if n != longest]
    assert lengths_of(found).tolist() == kept


def test_a_killed_run_makes_only_what_is_missing(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, rows(60))
    tokenize(source, tmp_path / "whole", TINY, part=2000)
    made = []
    make_part = tokens.make_part

    def killed(job):
        if job.number == 3:
            raise KeyboardInterrupt
        made.append(job.number)
        return make_part(job)

    monkeypatch.setattr(tokens, "make_part", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tmp_path / "map", TINY, part=2000)
    with pytest.raises(FileNotFoundError, match="completes the folder"):
        TokenMap(tmp_path / "map")
    (tmp_path / "map" / "00001.ids").write_bytes(b"")  # nobody asks: its record is there, and Reading notices
    (tmp_path / "map" / "00001.json").write_text("{", encoding="utf-8")  # half a record: made again
    again = []
    monkeypatch.setattr(tokens, "make_part", lambda job: again.append(job.number) or make_part(job))
    tokenize(source, tmp_path / "map", TINY, part=2000)
    assert made == [0, 1, 2] and again[:2] == [1, 3] and 0 not in again and 2 not in again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "map").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "map" / name).read_bytes()
    # with another limit, or of a file that has changed, everything is made anew
    again.clear()
    tokenize(source, tmp_path / "map", TINY, max_len=500, part=2000)
    assert again[0] == 0 and len(again) == len(names) // 4


def test_processes_make_the_same(tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, rows(30))
    tokenize(source, tmp_path / "one", TINY, part=1500)
    tokenize(source, tmp_path / "two", TINY, workers=2, part=1500)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("00000.ids", b"1", "has 1 bytes, not"),
        ("00000.mask", b"", "has 0 bytes, not"),
        ("00000.json", b'{"documents": 5.5, "tokens": 3}', "'documents' is"),
        ("tokens.json", b'{"vocab_size": 0}', "'vocab_size' is 0"),
        ("tokens.json", b'{"vocab_size": 1634, "parts": 1, "documents": 4}', "counts other documents"),
        ("tokens.json", b"[]", "'vocab_size' is"),
    ],
)
def test_a_damaged_map_is_one_line(tmp_path, name, content, message):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, rows(5))
    tokenize(source, tmp_path / "map", TINY)
    (tmp_path / "map" / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        TokenMap(tmp_path / "map")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ends_and_ids_of_a_damaged_map(tmp_path, tok):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, rows(5))
    tokenize(source, tmp_path / "map", TINY)
    ids = tmp_path / "map" / "00000.ids"
    whole = np.fromfile(ids, np.uint16)
    whole[0] = 60000
    whole.tofile(ids)
    with pytest.raises(ValueError, match="document 0 has id 60000"):
        TokenMap(tmp_path / "map")[0]
    ends = tmp_path / "map" / "00000.ends"
    ends.write_bytes(np.fromfile(ends, np.uint64)[::-1].tobytes())
    with pytest.raises(ValueError, match="do not follow each other"):
        TokenMap(tmp_path / "map")[0]
    with pytest.raises(ValueError, match="this one has 7"):
        TokenMap(tmp_path / "map", 7)


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"{}\n", "no document that can be used")])
def test_a_source_without_documents(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize(tmp_path / "a.jsonl", tmp_path / "map", TINY)


def test_a_mixture_has_each_map_whole_and_by_its_share(tmp_path):
    maps = {}
    for name, n, share in (("a", 300, 0.75), ("b", 20, 0.25)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(n, seed=n))
        tokenize(tmp_path / f"{name}.jsonl", tmp_path / name, TINY, part=9000)
        maps[TokenMap(tmp_path / name)] = share
    a, b = maps
    limit = int(np.sort(lengths_of(a))[-3]) - 1
    long = set(np.flatnonzero(lengths_of(a) > limit).tolist()) - set(range(297, 300))
    mixture = Mixture(maps, limit)
    found = [mixture[i] for i in range(len(mixture))]
    trained = [a[i] for i in range(297) if i not in long]  # three are held out
    assert found[: len(trained)] == trained and mixture.too_long >= len(long) > 0
    short = [b[i] for i in range(20) if len(b[i][0]) <= limit]
    assert all(document in short for document in found[len(trained) :])
    assert all(document in found for document in short)
    assert len(found) - len(trained) == round(len(trained) / 3)
    held_out = Mixture(maps, 1 << 20, held_out=True)
    assert [held_out[i] for i in range(len(held_out))] == [a[297], a[298], a[299]]
    with pytest.raises(ValueError, match="no document of at most 3 tokens"):
        Mixture(maps, 3)
    with pytest.raises(IndexError):
        mixture[len(mixture)]


# ---- Of any size -------------------------------------------------------------------------------------------


def test_speech_alone_is_all_target(tok):
    text = tokenizer.units_to_text([3, 7, 999])
    ids, mask = to_document({"prefix": "", "plain_text": text}, tok)
    assert ids == tok.encode(text) and all(mask) and len(mask) == len(ids)
    with pytest.raises(ValueError, match="a unit outside"):
        to_document({"prefix": "", "plain_text": "<sosp><1000><eosp>"}, tok)


def test_noise_is_drawn_for_input_units_alone_anew_in_each_epoch(tmp_path, tok):
    source = tmp_path / "a.jsonl"
    table = []
    for i in range(6):
        speech = tokenizer.units_to_text(range(100 * i, 100 * i + 80))
        slots = ("Recognize this.", speech, "Hi.") if i % 2 else ("Read this.", "Hi.", speech)
        table.append({"prefix": "", "plain_text": "".join(tokenizer.cross_modal(*slots))})
    write_jsonl(source, table)
    tokenize(source, tmp_path / "map", TINY)
    mixture = Mixture({TokenMap(tmp_path / "map"): 1.0}, 1024)
    read = tokens.shuffled(mixture, 5, 0.1, tok.unit_ids)
    changed = []
    for index in range(2 * len(mixture)):
        item, epoch = tokens.order(index, len(mixture), 5)
        (ids, mask), (noisy, noisy_mask) = mixture[item], read(index)
        assert read(index) == (noisy, noisy_mask) and len(noisy) == len(noisy_mask)
        targets = [token for token, target in zip(ids, mask) if target]
        assert targets == [token for token, target in zip(noisy, noisy_mask) if target]
        others = [token for token in ids if token not in tok.unit_ids]
        assert others == [token for token in noisy if token not in tok.unit_ids]
        if item % 2:  # speech is input
            assert noisy != ids and all(a != b for a, b in zip(noisy, noisy[1:]) if a in tok.unit_ids)
            changed.append((item, epoch, noisy))
        else:
            assert (noisy, noisy_mask) == (ids, mask)
    assert len(changed) == 6 and len({str(noisy) for *_, noisy in changed}) == 6


def test_a_map_has_no_more_files_open_than_it_needs(tmp_path, tok, monkeypatch):
    source = tmp_path / "a.jsonl"
    table = rows(60)
    write_jsonl(source, table)
    tokenize(source, tmp_path / "map", TINY, part=600)
    monkeypatch.setattr(TokenMap, "OPEN", 3)
    found = TokenMap(tmp_path / "map")
    assert len(found.sizes) > 10
    assert [found[i] for i in range(60)] == [to_document(row, tok) for row in table]
    assert found.part.cache_info().currsize == 3


def test_a_map_of_another_tokenizer_or_other_units_is_refused_by_name(tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, rows(5))
    (tmp_path / "made_of.json").write_text('{"units": "abc"}')
    tokenize(source, tmp_path / "map", TINY)
    found = TokenMap(tmp_path / "map")
    for clusters in ("abc", ""):
        tokens.check_map(found, TINY, clusters)
    with pytest.raises(ValueError, match="map was made of units of another HuBERT"):
        tokens.check_map(found, TINY, "abd")
    other = Tokenizer.train(["Some words of another text."] * 20, tmp_path / "tokenizer", 700, 1000)
    assert other.n_units == 1000
    with pytest.raises(ValueError, match="map was made with another tokenizer than .* --tokenizer") as error:
        tokens.check_map(found, tmp_path / "tokenizer", "")
    assert "\n" not in str(error.value)


MILLION = """
import sys, time
from data import batches, tokens

def anonymous():  # bytes that are this process's own; what is mapped belongs to the disk
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

before, began = anonymous(), time.perf_counter()
mixture = tokens.Mixture({tokens.TokenMap(sys.argv[1], 33006): 1.0}, 1024)
batch_at = batches.documents(tokens.shuffled(mixture, 0), 64, 1024, 1)
(batch,) = batch_at(0)
assert len(mixture) == 1_998_000 and batch.ids.shape == (64, 1000)
print(time.perf_counter() - began, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_two_million_documents_are_opened_in_no_time_and_no_memory(tmp_path):
    n, length = 2_000_000, 1000  # 4 GB of ids, all 0: files of nothing but their size
    for suffix, size in ((".ids", 2 * n * length), (".mask", n * length // 8)):
        with open(tmp_path / f"00000{suffix}", "wb") as file:
            file.truncate(size)
    np.arange(length, (n + 1) * length, length, dtype=np.uint64).tofile(tmp_path / "00000.ends")
    record = {"documents": n, "tokens": n * length, "longest": length}
    (tmp_path / "00000.json").write_text(json.dumps(record))
    (tmp_path / "tokens.json").write_text(json.dumps({"vocab_size": 33006, "parts": 1, "documents": n}))
    command = [sys.executable, "-c", MILLION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, taken = map(float, done.stdout.split())
    assert seconds < 10 and taken < 64 << 20
