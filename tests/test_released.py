"""data/released/prepare.py against a real server on this machine that misbehaves as servers do."""

import hashlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.released import prepare
from data.released.prepare import PARTS, Part, Remote

ROOT = Path(__file__).resolve().parent.parent
CONTENT = np.random.default_rng(0).bytes(300_000)
HUGGING_FACE = "https://huggingface.co"


class Server:
    """Serves `files` (path -> bytes); the other attributes say how badly."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.ranges = True  # understands Range
        self.cut_after: list[int] = []  # each answer is cut after so many bytes, until the list is empty
        self.hold_after: int | None = None  # stops sending, but keeps the line open
        self.etag = '"1"'
        self.redirects: dict[str, str] = {}
        self.linked_etag: str | None = None
        self.length: str | None = ""  # what it says how long the answer is; "": the truth, None: nothing
        self.modified: str | None = None
        self.content_range: str | None = None  # what it says instead of the truth
        self.versions: list[bytes] = []  # what each answer is of, until the list is empty
        self.endless = False  # goes on after the end, in chunks
        self.drip: int | None = None  # bytes at a time, with a pause of 0.02 s after each
        self.sent = 0  # bytes by `endless`
        self.seen: list[tuple[str, str | None]] = []  # (path, Range)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler):
        wanted = handler.headers.get("Range")
        self.seen.append((handler.path, wanted))
        if handler.path in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[handler.path])
            if self.linked_etag:
                handler.send_header("X-Linked-Etag", f'"{self.linked_etag}"')
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if handler.path not in self.files:
            return handler.send_error(404)
        if self.versions:
            self.files[handler.path] = self.versions.pop(0)
        body, start = self.files[handler.path], 0
        if wanted and self.ranges and handler.headers.get("If-Range", self.etag) == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(body)}")
                handler.send_header("Content-Length", "0")
                return handler.end_headers()
            handler.send_response(206)
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            handler.send_header("Content-Range", self.content_range or span)
        else:
            handler.send_response(200)
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.modified:
            handler.send_header("Last-Modified", self.modified)
        if self.length is not None:
            handler.send_header("Content-Length", self.length or str(len(body) - start))
        if self.endless:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            try:
                while True:
                    handler.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
                    self.sent += len(body)
            except OSError:  # hung up on
                return
        handler.end_headers()
        body = body[start:]
        if self.drip:
            try:
                for i in range(0, len(body), self.drip):
                    handler.wfile.write(body[i : i + self.drip])
                    threading.Event().wait(0.02)
            except OSError:
                return
        if self.cut_after:
            body = body[: self.cut_after.pop(0)]
        if self.hold_after is not None:
            handler.wfile.write(body[: self.hold_after])
            handler.wfile.flush()
            return threading.Event().wait(20)
        handler.wfile.write(body)
        handler.wfile.flush()
        handler.connection.close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    server.files["/big.bin"] = CONTENT
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def small(monkeypatch):
    """One part of one file instead of the 28 GB; and no waiting between attempts."""
    remote = Remote("llama/big.bin", f"{HUGGING_FACE}/big.bin", f"{len(CONTENT)} B", "a test")
    monkeypatch.setattr(prepare, "PARTS", {"llama": Part([remote], "none")})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return remote


def get(server, out, parts=("llama",)):
    prepare.prepare(out, list(parts), [f"{HUGGING_FACE}={server.url}"])


def fails(server, out, *expected: str) -> str:
    with pytest.raises((OSError, ValueError)) as error:
        get(server, out)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in expected), message
    assert not (out / "llama/big.bin").exists(), "a file got its name though it is not what was asked for"
    return message


def left(out) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def whole(out) -> bool:
    note = json.loads((out / "downloaded.json").read_text())["llama/big.bin"]
    assert (note["size"], note["sha256"]) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert left(out) == {"llama/big.bin", "downloaded.json"}, "a .part or its tag was left behind"
    return (out / "llama/big.bin").read_bytes() == CONTENT


# ---- The network -------------------------------------------------------------------------------------------


def test_a_download(server, small, tmp_path):
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen == [("/big.bin", None)]
    get(server, tmp_path)
    assert len(server.seen) == 1, "a complete file was fetched again"


def test_a_connection_cut_in_the_middle_goes_on_from_there(server, small, tmp_path):
    server.cut_after = [100_000, 50_000, 0, 1]
    get(server, tmp_path)
    assert whole(tmp_path)
    assert [wanted for _, wanted in server.seen] == [
        None, "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150001-"]  # fmt: skip


def test_a_server_that_cannot_resume_sends_all_of_it(server, small, tmp_path):
    server.ranges, server.cut_after = False, [100_000]
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen[1] == ("/big.bin", "bytes=100000-")


def test_a_connection_that_never_works_gives_up_and_keeps_what_it_has(server, small, tmp_path):
    server.cut_after = [100_000] + [0] * 20
    fails(server, tmp_path, "100 kB are kept", "run the same command again")
    assert (tmp_path / "llama/big.bin.part").read_bytes() == CONTENT[:100_000]
    server.cut_after = []
    server.seen.clear()
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen == [("/big.bin", "bytes=100000-")]


def test_a_silent_server_is_given_up_on(server, small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    monkeypatch.setattr(prepare, "PATIENCE", 2)
    server.hold_after = 0
    fails(server, tmp_path, "timed out")


def test_no_server(small, tmp_path):
    with pytest.raises(OSError, match="refused"):
        prepare.prepare(tmp_path, ["llama"], [f"{HUGGING_FACE}=http://127.0.0.1:9"])


def test_a_file_that_changed_in_between_is_not_glued_together(server, small, tmp_path):
    server.cut_after = [100_000] + [0] * 20
    fails(server, tmp_path, "kept")
    server.cut_after, server.etag = [], '"2"'
    server.files["/big.bin"] = bytes(reversed(CONTENT))
    get(server, tmp_path)
    assert (tmp_path / "llama/big.bin").read_bytes() == bytes(reversed(CONTENT))


def test_a_part_that_is_already_whole(server, small, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin.part").write_bytes(CONTENT)
    get(server, tmp_path)
    assert whole(tmp_path)


def test_a_part_that_is_longer_than_the_file(server, small, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin.part").write_bytes(CONTENT + b"more")
    get(server, tmp_path)
    assert whole(tmp_path)


def test_missing_on_the_server(server, small, tmp_path):
    server.files.clear()
    fails(server, tmp_path, "404", "--mirror")
    assert len(server.seen) == 1 and not left(tmp_path)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"<html>Please log in</html>", b""])
def test_a_file_of_the_wrong_size(server, small, tmp_path, content):
    server.files["/big.bin"] = content
    fails(server, tmp_path, f"{len(content):,} bytes, expected 300000 B")
    assert not left(tmp_path)


def test_an_answer_of_unknown_length(server, small, tmp_path):
    for length in (None, "many", "-1", "300000, 300000", "9" * 5000):
        server.length = length
        fails(server, tmp_path, "does not say how large")


def test_the_checksum_of_hugging_face_is_used(server, small, tmp_path):
    server.redirects["/big.bin"] = f"{server.url}/storage"
    server.files["/storage"] = CONTENT
    server.linked_etag = hashlib.sha256(CONTENT).hexdigest()
    get(server, tmp_path / "good")
    assert whole(tmp_path / "good")
    server.files["/storage"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])  # one bit, the same size
    fails(server, tmp_path / "bad", "SHA-256")
    assert not left(tmp_path / "bad"), "damaged bytes were kept to be resumed"


@pytest.mark.parametrize(
    "target",
    [
        "http://example.com/big.bin",
        "ftp://example.com/big.bin",
        "file:///etc/passwd",
        "http://127.0.0.1.example.com/",
    ],
)
def test_a_redirect_away_from_https_is_refused(server, small, tmp_path, target):
    server.redirects["/big.bin"] = target
    message = fails(server, tmp_path)
    assert "refused" in message or "not allowed" in message


def test_from_the_internet_a_redirect_to_this_machine_is_refused():
    request = prepare.urllib.request.Request("https://huggingface.co/x")
    with pytest.raises(OSError, match="refused"):
        prepare.Redirects().redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1:8000/x")
    assert (
        prepare.Redirects().redirect_request(request, None, 302, "Found", {}, "https://cdn.example/x")
        is not None
    )


@pytest.mark.parametrize("mirror", ["https://huggingface.co", "https://huggingface.co=http://example.com",
                                    "https://huggingface.co=file:///tmp", "=ftp://127.0.0.1/"])  # fmt: skip
def test_a_mirror_must_be_safe(small, tmp_path, mirror):
    with pytest.raises(ValueError, match="FROM=TO"):
        prepare.prepare(tmp_path, ["llama"], [mirror])


def test_a_full_disk_is_noticed_before_the_download(server, small, tmp_path, monkeypatch):
    usage = prepare.shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    fails(server, tmp_path, "300 kB are needed", "1 kB are free")
    assert not server.seen


# ---- Downloads that would never end ------------------------------------------------------------------------


def test_a_server_that_sends_on_past_the_announced_size(server, small, tmp_path):
    server.endless, server.length = True, "300000"
    fails(server, tmp_path, "more than the 300,000 bytes that it announced")
    assert not left(tmp_path) and len(server.seen) == 1
    assert server.sent < 50 * len(CONTENT)  # what the buffers between us hold


def test_a_server_that_begins_at_zero_each_time(server, small, tmp_path, capsys):
    server.ranges, server.cut_after = False, [100_000, 200_000, 250_000, 100_000] * 10
    fails(server, tmp_path, "for the second time")
    assert [wanted for _, wanted in server.seen] == [None, "bytes=100000-", None, "bytes=250000-"]
    assert capsys.readouterr().err.count("begins again") == 1 and not left(tmp_path)


@pytest.mark.parametrize(
    "span", ["bytes 5-299999/300000", "bytes 100000-299999/*", "bytes 100000-299999/" + "9" * 5000, "?"]
)
def test_a_server_that_sends_another_part_than_was_asked_for(server, small, tmp_path, span):
    server.content_range, server.cut_after = span, [100_000]
    get(server, tmp_path)
    assert whole(tmp_path) and [wanted for _, wanted in server.seen] == [None, "bytes=100000-", None]
    (tmp_path / "llama/big.bin").unlink()
    server.cut_after = [100_000] * 50
    fails(server, tmp_path, "for the second time")
    assert len(server.seen) == 3 + 4


def test_a_login_page_in_between_costs_nothing(server, small, tmp_path):
    server.cut_after = [100_000] + [0] * 20
    fails(server, tmp_path, "100 kB are kept")
    server.versions, server.cut_after, server.ranges = [b"<html>Please log in</html>"], [], False
    fails(server, tmp_path, "26 bytes")
    assert (tmp_path / "llama/big.bin.part").read_bytes() == CONTENT[:100_000]


@pytest.mark.parametrize(
    "note",
    [None, b"", b"\xff\xfe\0", b'"1"\r\nHost: example.com', b'"' + b"1" * 10**6, b'"1"\n-5\n', b'W/"1"\n5\n'],
)
def test_a_part_of_unknown_origin_is_not_continued(server, small, tmp_path, note, capsys):
    part = tmp_path / "llama/big.bin.part"
    part.parent.mkdir()
    part.write_bytes(bytes(1000))
    if note is not None:
        part.with_name("big.bin.part.etag").write_bytes(note)
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen == [("/big.bin", None)]
    assert "begins again" in capsys.readouterr().err


def test_a_part_of_an_earlier_version_of_this_program_is_continued(server, small, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "llama/big.bin.part.etag").write_text('"1"')
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen == [("/big.bin", "bytes=1000-")]


@pytest.mark.parametrize("etag, modified", [("", None), ('W/"1"', "Tue, 01 Feb 2022 00:00:00 GMT")])
def test_a_size_that_changes_between_two_attempts(server, small, tmp_path, monkeypatch, etag, modified):
    remote = small._replace(size="300 kB")
    monkeypatch.setattr(prepare, "PARTS", {"llama": Part([remote], "none")})
    server.etag, server.modified, server.cut_after = etag, modified, [100_000]
    server.versions = [CONTENT, bytes(300_500), bytes(300_500)]
    get(server, tmp_path)
    assert (tmp_path / "llama/big.bin").read_bytes() == bytes(300_500), "two versions in one file"
    assert len(server.seen) == 3


def test_the_date_of_a_file_is_asked_for_where_there_is_no_etag(server, small, tmp_path):
    server.etag, server.modified, server.cut_after = "", "Tue, 01 Feb 2022 00:00:00 GMT", [100_000]
    asked = []
    answer = server.answer
    server.answer = lambda handler: (asked.append(handler.headers.get("If-Range")), answer(handler))
    server.ranges = False
    get(server, tmp_path)
    assert whole(tmp_path) and asked == [None, "Tue, 01 Feb 2022 00:00:00 GMT", None]


def test_a_redirect_in_a_circle(server, small, tmp_path):
    server.redirects["/big.bin"] = f"{server.url}/other"
    server.redirects["/other"] = f"{server.url}/big.bin"
    message = fails(server, tmp_path, "302")
    assert len(message) < 300 and len(server.seen) < 15


def test_a_connection_that_drips_is_given_up_on(server, small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.1)
    monkeypatch.setattr(prepare, "SLOWEST", 1_000_000)
    monkeypatch.setattr(prepare, "PATIENCE", 3)
    server.drip = 100
    fails(server, tmp_path, "bytes a second", "kept")
    assert len(server.seen) == 3 and 0 < (tmp_path / "llama/big.bin.part").stat().st_size < 10_000


def test_a_few_bytes_each_time_are_no_progress(server, small, tmp_path):
    server.cut_after = [1] * 50
    fails(server, tmp_path, "5 B are kept")
    assert len(server.seen) == prepare.PATIENCE


def test_a_disk_that_fills_up(server, small, tmp_path, monkeypatch):
    class Full:
        """A file on a disk with room for 100 kB."""

        def __init__(self, path, mode):
            self.file = open(path, mode, buffering=0)

        def write(self, block):
            room = 100_000 - self.file.tell()
            self.file.write(block[:room])
            if len(block) > room:
                raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def on_a_small_disk(path, mode):
        return Full(path, mode) if mode == "ab" else open(path, mode)

    with monkeypatch.context() as small_disk:
        small_disk.setattr(prepare, "open", on_a_small_disk, raising=False)
        fails(server, tmp_path, "the disk is full", "100 kB are kept")
    assert len(server.seen) == 1
    get(server, tmp_path)
    assert whole(tmp_path) and server.seen[1] == ("/big.bin", "bytes=100000-")


def test_a_file_of_unpublished_size_must_fit_onto_the_disk(server, small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PARTS", {"llama": Part([small._replace(size="")], "none")})
    usage = prepare.shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    fails(server, tmp_path, "300 kB are needed", "1 kB are free")
    assert not left(tmp_path)


def test_what_a_server_says_is_one_short_line(server, small, tmp_path):
    def answer(handler):
        handler.wfile.write(b"HTTP/1.0 500 \x1b[31m" + b"x" * 1000 + b"\r\n\r\n")

    server.answer = answer
    message = fails(server, tmp_path, "500", "xxx")
    assert len(message) < 300 and message.isprintable()


# ---- The folder --------------------------------------------------------------------------------------------


def test_what_we_expect_is_plausible():
    remotes = [remote for part in PARTS.values() for remote in part.files]
    assert all(remote.url.startswith("https://") and ".." not in remote.path for remote in remotes)
    assert {remote.path.split("/")[0] for remote in remotes} == {"llama", "lora", "hubert", "vocoder"}
    assert prepare.bounds("507 B") == (507, 507) and prepare.bounds("18 kB") == (17_000, 19_000)
    assert prepare.bounds("16.8 MB") == (16_700_000, 16_900_000)
    language_model = PARTS["llama"].files[0]
    assert prepare.fits(4 * 6_742_609_920, language_model) and not prepare.fits(
        2 * 6_742_609_920, language_model
    )
    vocoder = PARTS["vocoder"].files[0]
    assert prepare.fits(4 * 13_485_443 + 50_000, vocoder)


@pytest.mark.parametrize(
    "size, text", [(0, "0 B"), (999, "999 B"), (300_000, "300 kB"), (26_990_000_000, "27 GB")]
)
def test_show(size, text):
    assert prepare.show(size) == text


def table(capsys, out) -> tuple[int, str]:
    bad = prepare.check(out, ["llama"])
    return bad, next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("llama/big.bin")
    )


def test_a_file_that_was_not_downloaded_is_not_replaced(server, small, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin").write_bytes(b"my own")
    with pytest.raises(
        OSError, match="big.bin is none of the files that this program downloads: move it away"
    ):
        get(server, tmp_path)
    assert (tmp_path / "llama/big.bin").read_bytes() == b"my own" and left(tmp_path) == {"llama/big.bin"}


def test_check_says_what_is_there(server, small, tmp_path, capsys):
    bad, line = table(capsys, tmp_path)
    assert bad == 1 and "missing" in line and "300000 B" in line and "a test" in line
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin.part").write_bytes(CONTENT[:1000])
    assert "incomplete (1 kB)" in table(capsys, tmp_path)[1]
    get(server, tmp_path)
    assert table(capsys, tmp_path)[0] == 0
    (tmp_path / "llama/big.bin").write_bytes(CONTENT[:-1] + b"?")  # the disk forgets a byte
    bad, line = table(capsys, tmp_path)
    assert bad == 1 and "damaged" in line
    (tmp_path / "llama/big.bin").write_bytes(CONTENT[:-1])
    assert "wrong size" in table(capsys, tmp_path)[1]
    get(server, tmp_path)
    assert table(capsys, tmp_path)[0] == 0


def test_a_file_put_there_by_hand_is_checked_by_size(small, tmp_path, capsys):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/big.bin").write_bytes(bytes(300_000))
    bad, line = table(capsys, tmp_path)
    assert bad == 0 and "SHA-256" not in line


def test_an_equivalent_file_is_enough(tmp_path, monkeypatch, capsys):
    remote = Remote("vocoder/g", f"{HUGGING_FACE}/g", "3 B", "a test", ("vocoder/vocoder.pt",))
    monkeypatch.setattr(prepare, "PARTS", {"vocoder": Part([remote], "none")})
    (tmp_path / "vocoder").mkdir()
    (tmp_path / "vocoder/vocoder.pt").write_bytes(b"any size")
    assert prepare.check(tmp_path, ["vocoder"]) == 0 and "vocoder/vocoder.pt" in capsys.readouterr().out
    prepare.prepare(tmp_path, ["vocoder"], [])  # nothing to fetch, so no network


@pytest.mark.parametrize(
    "notes", ["", "[]", '{"llama/big.bin": 3}', '{"llama/big.bin": {"size": "x", "sha256": "y"}}']
)
def test_spoiled_notes(small, tmp_path, notes):
    (tmp_path / "downloaded.json").write_text(notes)
    with pytest.raises(ValueError, match="remove it"):
        prepare.check(tmp_path, ["llama"])


# ---- The command line, with the real table of files --------------------------------------------------------


def command(*arguments) -> list:
    return [sys.executable, ROOT / "data/released/prepare.py", *map(str, arguments)]


@pytest.mark.parametrize("arguments, words", [
    (("OUT", "--check"), "12 files are missing"), (("OUT", "--parts", "brain"), "unknown part 'brain'"),
    ((), "out"),
    (("OUT", "--parts", "hubert", "mhubert-base"), "choose one"), (("OUT", "--fast"), "--fast"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, words):
    arguments = [tmp_path / "new" if a == "OUT" else a for a in arguments]
    result = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "new").exists()


def test_a_killed_download_goes_on(server, tmp_path):
    base = prepare.VOCODER.removeprefix(prepare.META)
    generator = CONTENT * 180  # 54.0 MB
    server.files = {f"/{base}g_00500000": generator, f"/{base}config.json": b"{}"}
    server.hold_after = 20_000_000
    run = command(tmp_path, "--parts", "vocoder", "--mirror", f"{prepare.META}={server.url}")
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    part = tmp_path / "vocoder/g_00500000.part"
    for _ in range(600):
        if part.exists() and part.stat().st_size > 10_000_000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert kept > 10_000_000 and not (tmp_path / "vocoder/g_00500000").exists()
    server.hold_after = None
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert server.seen[1] == (f"/{base}g_00500000", f"bytes={kept}-")
    assert (tmp_path / "vocoder/g_00500000").read_bytes() == generator
    assert "ok, SHA-256" in result.stdout and "MIT" in result.stdout
