"""Tables that others wrote: rows of TSV, CSV, `id|text` lists, JSON lines and long JSON, one row at a time.

    clips.tsv       path <tab> sentence <tab> client_id          a header, then a row a line
    metadata.csv    LJ001-0001|Printing, in the only sense|...   no header: the columns are "1", "2", "3"
    list.jsonl      {"audio_filepath": "a.wav", "text": "Hi."}   an object a line
    corpus.json     {"audios": [{...}, {...}]}                   a list of objects, gigabytes of it

They come with a byte order mark, in UTF-16, with the line ends of three systems, cut in half by a download,
with one quotation mark too many. A row that cannot be read is a row with a `problem`, and the reading goes
on. No file is held in memory, whatever its size; no line or object of more than MAX_ITEM characters is.

References: CSV, RFC 4180; JSON, RFC 8259; byte order marks, https://www.unicode.org/faq/utf_bom.html.
"""

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from files import show

MAX_ITEM = 1 << 26  # characters of one JSON object: a recording of GigaSpeech with all its segments has 1e6
MAX_LINE = 1 << 20  # characters
MAX_LINES = 20  # of one row of CSV, whose quoted fields may contain line ends
FIRST_ONLY = (":", " ")  # these separate a name from a text in which they occur, too
JSON = "json"


class Row(NamedTuple):
    where: str  # "clips.tsv, line 17"
    fields: dict[str, str]  # column -> content, "" if the row ends before; without header: "1", "2", ...
    problem: str = ""  # why the row cannot be read
    position: int = 0  # bytes of the file read so far, about


def rows(path: Path, separator: str, header: bool, encoding: str = "") -> Iterator[Row]:
    """The rows of a table, one at a time; separator JSON reads objects, one a line or in a list."""
    if separator == JSON:
        yield from (_json_lines if _has_object_lines(path, encoding) else _json_list)(path, encoding)
        return
    names: list[str] = []
    for where, fields, problem, position in _split(path, separator, encoding):
        if problem:
            yield Row(where, {}, problem, position)
        elif header and not names:
            names = [name.strip() for name in fields]
        elif header and len(fields) > len(names):
            problem = f"more columns than the header: {len(fields)}, not {len(names)}"
            yield Row(where, {}, problem, position)
        else:
            columns = names or [str(n) for n in range(1, len(fields) + 1)]
            fields += [""] * (len(columns) - len(fields))
            yield Row(where, dict(zip(columns, fields)), "", position)


def column_names(path: Path, separator: str, encoding: str = "") -> list[str]:
    """The fields of the first row that can be read."""
    for _, fields, problem, _ in _split(path, separator, encoding):
        if not problem:
            return [name.strip() for name in fields]
    return []


def read_text(path: Path, encoding: str = "", limit: int = MAX_LINE) -> str:
    """All of a short text file; ValueError if it is longer than `limit` characters or not in its encoding."""
    with open_text(path, encoding) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"text too long: more than {limit} characters")
    if "\ufffd" in text:
        raise ValueError(NOT_UTF8)
    return text


# ---- Characters and lines ----------------------------------------------------------------------------------

NOT_UTF8 = "not UTF-8: save the table as UTF-8, or name its --encoding"


def open_text(path: Path, encoding: str = "") -> TextIO:
    """A text file, opened in its encoding; what is not of that encoding is read as U+FFFD."""
    return open(path, encoding=encoding or find_encoding(path), errors="replace", newline="")


def find_encoding(path: Path) -> str:
    """UTF-8 or UTF-16, by the byte order mark or by where the zeros are. Others cannot be recognized
    for sure."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 8:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def _lines(path: Path, encoding: str, comments: bool = False) -> Iterator[tuple[int, str, str, int]]:
    """(number, line without its end, problem, position); `comments` begin with # or ; and are left out."""
    with open_text(path, encoding) as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            problem = ""
            if len(line) == MAX_LINE:
                problem = f"line too long: more than {MAX_LINE} characters"
                while line and not line.endswith(("\n", "\r")):
                    line = file.readline(MAX_LINE)
            elif "\ufffd" in line:
                problem = NOT_UTF8
            line = line.rstrip("\r\n")
            if (line.strip() or problem) and not (comments and line.startswith(("#", ";"))):
                yield number, line, problem, file.buffer.tell()


# ---- TSV, CSV, lists ---------------------------------------------------------------------------------------


def _split(path: Path, separator: str, encoding: str) -> Iterator[tuple[str, list[str], str, int]]:
    """(where, fields, problem, position) of each line, or of each row of CSV."""
    lines = _lines(path, encoding, comments=separator in FIRST_ONLY)
    if separator in (",", ";"):
        lines = _quoted(lines)
    for number, line, problem, position in lines:
        where = f"{path.name}, line {number}"
        if problem:
            yield where, [], problem, position
        elif separator in (",", ";"):
            try:
                fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            except (csv.Error, StopIteration) as error:
                fields, problem = [], f"damaged row: {error}"
            yield where, fields, problem, position
        else:
            yield where, line.split(separator, 1 if separator in FIRST_ONLY else -1), "", position


def _quoted(lines: Iterator[tuple[int, str, str, int]]) -> Iterator[tuple[int, str, str, int]]:
    """Lines of CSV, those joined that belong to one row: a quoted field may contain line ends.

    A quotation mark that is not closed within MAX_LINES costs its own line, not all that follow."""
    waiting: deque = deque()
    while waiting or (first := next(lines, None)):
        number, line, problem, position = waiting.popleft() if waiting else first
        if not problem and line.count('"') % 2:
            more = []
            while len(more) < MAX_LINES:
                following = waiting.popleft() if waiting else next(lines, None)
                if following is None:
                    break
                more.append(following)
                if following[1].count('"') % 2:
                    break
            if more and more[-1][1].count('"') % 2 and not any(other[2] for other in more):
                line = "\n".join([line, *(other[1] for other in more)])
            else:
                problem = "damaged row: a quotation mark is not closed"
                waiting.extendleft(reversed(more))
        yield number, line, problem, position


# ---- JSON --------------------------------------------------------------------------------------------------


def _has_object_lines(path: Path, encoding: str) -> bool:
    """Many a .json holds JSON lines: its first line is a whole object, and no list."""
    if path.suffix.lower() != ".json":
        return True
    for _, line, _, _ in _lines(path, encoding):
        try:
            return isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            break
    return False


def _json_lines(path: Path, encoding: str) -> Iterator[Row]:
    for number, line, problem, position in _lines(path, encoding):
        where = f"{path.name}, line {number}"
        try:
            value = {} if problem else json.loads(line)
        except (ValueError, RecursionError):
            value, problem = {}, "damaged row: not JSON"
        yield _json_row(where, value, problem, position)


def _json_list(path: Path, encoding: str) -> Iterator[Row]:
    for number, (value, position) in enumerate(json_items(path, encoding=encoding), 1):
        problem = str(value) if isinstance(value, ValueError) else ""
        yield _json_row(f"{path.name}, object {number}", {} if problem else value, problem, position)


def _json_row(where: str, value: object, problem: str, position: int) -> Row:
    if not problem and not isinstance(value, dict):
        problem = "damaged row: not an object"
    if problem:
        return Row(where, {}, problem, position)
    simple = {key: content for key, content in value.items() if isinstance(content, str | int | float)}
    return Row(where, {key: str(content) for key, content in simple.items()}, "", position)


def json_items(path: Path, key: str = "", encoding: str = "") -> Iterator[tuple[object, int]]:
    """(element, position in bytes) of the list in a JSON file, or of the list under `key` of its object.

    Elements are parsed one by one, so that a file of gigabytes needs no more memory than its largest element.
    Where the file is damaged or ends early, the last element is a ValueError, given, not raised."""
    with open_text(path, encoding) as file:
        reader = _JsonReader(file)
        try:
            opening = reader.symbol("[{")
            while opening == "{":  # find the list: the values of other keys are parsed and forgotten
                name = reader.value()
                reader.symbol(":")
                if name == key or (not key and reader.peek() == "["):
                    opening = reader.symbol("[")
                    break
                reader.value()
                if reader.symbol(",}") == "}":
                    raise ValueError(f"not the expected file: there is no list {show(key) if key else ''}")
            if reader.peek() == "]":
                return
            while True:
                value = reader.value()
                following = reader.symbol(",]")
                yield value, file.buffer.tell()
                if following == "]":
                    return
        except (ValueError, RecursionError) as error:
            reason = error if type(error) is ValueError else "damaged from here on"
            yield ValueError(f"{reason}"), file.buffer.tell()


class _JsonReader:
    """Values and symbols of a JSON text, read as far as needed."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = ""
        self.place = 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Reads on, as much again as there is; False at the end of the file."""
        self.text = self.text[self.place :]
        self.place = 0
        if len(self.text) > MAX_ITEM:
            raise ValueError(f"damaged: an element of more than {MAX_ITEM} characters")
        block = self.file.read(max(1 << 16, len(self.text)))
        self.text += block
        return bool(block)

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def symbol(self, allowed: str) -> str:
        found = self.peek()
        if not found:
            raise ValueError("cut short: the JSON ends in the middle")
        if found not in allowed:
            raise ValueError(f"damaged from here on: expected one of {allowed}, found {show(found)}")
        self.place += 1
        return found

    def value(self) -> object:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if end < len(self.text):  # a number at the very end might go on
                    self.place = end
                    return value
            except json.JSONDecodeError:
                pass
            if not self.more():
                raise ValueError("cut short or damaged: the JSON ends in the middle")
