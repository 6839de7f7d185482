"""The released SpeechGPT-7B: downloads the official files into one folder that sample.py can talk with.

    python data/released/prepare.py weights/speechgpt-7b           # 28 GB; an interrupted download is resumed
    python data/released/prepare.py weights/speechgpt-7b --check   # lists what is there and what is missing
    python sample.py --model weights/speechgpt-7b question.wav

Nothing that is downloaded is run or opened here: a file is written to NAME.part, its size is checked, and its
SHA-256 where the server states one; only then does it get its name. Sizes and SHA-256 are noted in
OUT/downloaded.json, and --check, which needs no network, compares the files with these notes.

    OUT/llama/     fnlp/SpeechGPT-7B-cm: LLaMA-7B after stage 2, float32, with its tokenizer
    OUT/lora/      fnlp/SpeechGPT-7B-com: the adapter of stage 3
    OUT/hubert/    mHuBERT and the k-means of its 11th layer; or with --parts mhubert-base the same encoder
                   from voidful/mhubert-base, a third of the size (without the state of its optimizer)
    OUT/vocoder/   unit HiFi-GAN, voice of LJSpeech

Behind a firewall, or from a copy of your own: --mirror https://huggingface.co=https://YOUR.MIRROR

References: https://github.com/0nutation/SpeechGPT (what to download)
            https://huggingface.co/fnlp, https://huggingface.co/voidful (sizes)
            examples/speech_to_speech/docs/textless_s2st_real_data.md of fairseq (mHuBERT)
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if __package__ in (None, ""):  # run as a script: let it find the other files
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, command_line
from files import read_json, write_json

PATIENCE = 5  # attempts in a row that bring fewer than LEAST bytes before giving up
LEAST = 1 << 16
TIMEOUT = 30  # seconds of silence from a server
SLOWEST = 1000  # bytes a second; a slower connection is closed and opened again
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Remote(NamedTuple):
    path: str  # below OUT
    url: str
    size: str  # as its page shows it: "507 B" is exact, "16.8 MB" is rounded, "" is not published
    purpose: str
    instead: tuple[str, ...] = ()  # files that make it unnecessary


class Part(NamedTuple):
    files: list[Remote]
    license: str


HUGGING_FACE = "https://huggingface.co/"
CM = HUGGING_FACE + "fnlp/SpeechGPT-7B-cm/resolve/main/"
COM = HUGGING_FACE + "fnlp/SpeechGPT-7B-com/resolve/main/"
META = "https://dl.fbaipublicfiles.com/"
VOCODER = (
    META + "fairseq/speech_to_speech/vocoder/code_hifigan/mhubert_vp_en_es_fr_it3_400k_layer11_km1000_lj/"
)
MHUBERT = HUGGING_FACE + "voidful/mhubert-base/resolve/main/"
KM1000 = "mhubert_base_vp_en_es_fr_it3_L11_km1000.bin"
LLAMA_LICENSE = "no license on its page; derived from LLaMA-1, whose weights are for research only"
FAIRSEQ_LICENSE = "MIT (fairseq, which states that this covers its models)"

PARTS = {
    "llama": Part(
        [
            Remote(
                "llama/pytorch_model.bin",
                CM + "pytorch_model.bin",
                "27 GB",
                "the language model",
                (
                    "llama/model.safetensors",
                    "llama/model.safetensors.index.json",
                    "llama/pytorch_model.bin.index.json",
                ),
            ),
            Remote("llama/config.json", CM + "config.json", "507 B", "its shape"),
            Remote("llama/tokenizer.model", CM + "tokenizer.model", "500 kB", "pieces of text"),
            Remote(
                "llama/added_tokens.json", CM + "added_tokens.json", "18 kB", "ids of the units and markers"
            ),
            Remote(
                "llama/special_tokens_map.json",
                CM + "special_tokens_map.json",
                "435 B",
                "names of <s> and </s>",
            ),
            Remote(
                "llama/tokenizer_config.json", CM + "tokenizer_config.json", "747 B", "how text is prepared"
            ),
        ],
        LLAMA_LICENSE,
    ),
    "lora": Part(
        [
            Remote(
                "lora/adapter_model.bin",
                COM + "adapter_model.bin",
                "16.8 MB",
                "stage 3, chain of modality",
                ("lora/adapter_model.safetensors",),
            ),
            Remote(
                "lora/adapter_config.json",
                COM + "adapter_config.json",
                "406 B",
                "its rank, alpha and targets",
            ),
        ],
        LLAMA_LICENSE,
    ),
    "hubert": Part(
        [
            Remote(
                "hubert/mhubert_base_vp_en_es_fr_it3.pt",
                META + "hubert/mhubert_base_vp_en_es_fr_it3.pt",
                "",
                "speech -> frames",
                ("hubert/pytorch_model.bin", "hubert/model.safetensors"),
            ),
            Remote(
                "hubert/" + KM1000,
                META + "hubert/" + KM1000,
                "3.08 MB",
                "frames -> 1000 units",
                ("hubert/kmeans.safetensors",),
            ),
        ],
        FAIRSEQ_LICENSE,
    ),
    "vocoder": Part(
        [
            Remote(
                "vocoder/g_00500000",
                VOCODER + "g_00500000",
                "53.9 MB",
                "units -> speech",
                ("vocoder/vocoder.pt", "vocoder/generator.safetensors"),
            ),
            Remote("vocoder/config.json", VOCODER + "config.json", "", "its shape"),
        ],
        FAIRSEQ_LICENSE,
    ),
    "mhubert-base": Part(
        [
            Remote(
                "hubert/pytorch_model.bin",
                MHUBERT + "pytorch_model.bin",
                "378 MB",
                "speech -> frames",
                ("hubert/model.safetensors",),
            ),
            Remote("hubert/config.json", MHUBERT + "config.json", "1.38 kB", "its shape"),
            Remote("hubert/" + KM1000, MHUBERT + KM1000, "3.08 MB", "frames -> 1000 units"),
        ],
        FAIRSEQ_LICENSE,
    ),
}
TALKING = ("llama", "lora", "hubert", "vocoder")


# ---- Sizes and sums ----------------------------------------------------------------------------------------


def bounds(size: str) -> tuple[int, int]:
    """Least and most bytes: "507 B" -> (507, 507); "16.8 MB" -> (16_700_000, 16_900_000), one step of the
    last digit either way; "" -> anything."""
    if not size:
        return 1, 1 << 62
    number, unit = size.split()
    scale = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
    step = 0 if unit == "B" else scale / 10 ** len(number.partition(".")[2])
    return round(float(number) * scale - step), round(float(number) * scale + step)


def fits(size: int, remote: Remote) -> bool:
    low, high = bounds(remote.size)
    return low <= size <= high


def show(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar(f"checking {path.name}", path.stat().st_size) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _bar(title: str, total: int | None, done: int = 0) -> tqdm:
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        leave=total is None or total > 1 << 20,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


# ---- One file ----------------------------------------------------------------------------------------------


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to https, or from this machine to itself.

    Hugging Face redirects to its storage, and names the SHA-256 of large files in that first answer."""

    sha256: str | None = None

    def redirect_request(self, request, file, code, message, headers, url):
        if not _allowed(url, local=urllib.parse.urlsplit(request.full_url).hostname in LOOPBACK):
            raise OSError(
                f"{_plain(request.full_url)} redirects to {_plain(url)}, which is not https: refused"
            )
        named = (headers.get("X-Linked-Etag") or "").strip('"')
        self.sha256 = named if re.fullmatch("[0-9a-f]{64}", named) else self.sha256
        return super().redirect_request(request, file, code, message, headers, url)


def _allowed(url: str, local: bool) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or (local and parts.scheme == "http" and parts.hostname in LOOPBACK)


def _plain(text: object) -> str:
    """What a server says, as one short line without control characters."""
    words = "".join(c if c.isprintable() else " " for c in str(text)).split()
    return " ".join(words)[:100]


class BeginAgain(ConnectionError):
    """What was received cannot be continued; it was removed."""


def fetch(remote: Remote, url: str, out: Path) -> dict:
    """Downloads one file, from where an earlier attempt stopped. Returns its entry in downloaded.json.

    It ends: an attempt that brings little is one of PATIENCE, and only once it begins from zero again."""
    path = out / remote.path
    part = out / (remote.path + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = restarts = 0
    most = _size(part)
    while True:
        try:
            total, named = _receive(remote, url, part)
            break
        except urllib.error.HTTPError as error:
            reason = f"the server says {error.code} {_plain(error.reason)}"
            raise OSError(f"{url}: {reason}; {_advice(error.code)}") from None
        except BeginAgain as error:
            restarts += 1
            if restarts > 1:
                raise OSError(
                    f"{url}: {error} for the second time: try later, or use another --mirror"
                ) from None
            print(f"{remote.path}: {error}: begins again", file=sys.stderr)
            most = 0
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            kept = _size(part)
            failures = 0 if kept >= most + LEAST else failures + 1
            most = max(most, kept)
            if failures >= PATIENCE:
                reason = _plain(getattr(error, "reason", None) or error)
                raise OSError(f"{url}: {reason}; {show(kept)} are kept, run the same command again") from None
            time.sleep(min(30, 0.1 * 4**failures))
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            kept = show(_size(part))
            raise OSError(
                f"{path}: the disk is full; {kept} are kept, make room and run the command again"
            ) from None
    found = _size(part)
    if found != total or not fits(found, remote):  # two programs at once, or a part put there by hand
        _forget(part)
        raise OSError(
            f"{path}: {found:,} bytes, expected {remote.size or f'{total:,}'}; removed, run the command again"
        )
    digest = sha256(part)
    if named and digest != named:
        _forget(part)
        raise OSError(
            f"{url}: SHA-256 is {digest[:16]}..., should be {named[:16]}...; removed, run the command again"
        )
    os.replace(part, path)
    _forget(part)
    return {"url": url, "size": total, "sha256": digest}


def _receive(remote: Remote, url: str, part: Path) -> tuple[int, str | None]:
    """Appends to `part` until it is whole; returns its size, and its SHA-256 if the server named it.

    Raises what urllib raises when the connection is cut, and BeginAgain."""
    done = _size(part)
    version = _read_version(part)
    if done and not version:
        raise _begin_again(part, "nothing tells what the bytes that are there are a part of")
    headers = {"User-Agent": "speechgpt", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if version.name:
            headers["If-Range"] = version.name  # another version by now: the server sends all of it
    redirects = Redirects()
    opener = urllib.request.build_opener(redirects)
    request = urllib.request.Request(url, headers=headers)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: nothing is left to send
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":
            return done, redirects.sha256
        raise _begin_again(part, "the file has changed on the server") from None
    with response:
        total, continues = _announced(response, done)
        if total is None and not done:
            raise OSError(f"{url}: the server does not say how large it is; use another --mirror")
        if total is not None and not fits(total, remote):
            raise OSError(
                f"{url} has {total:,} bytes, expected {remote.size}: moved or replaced? See its page"
            )
        if done and not (continues and version.total in (None, total)):
            raise _begin_again(part, "the server cannot continue it, or has another version by now")
        free = shutil.disk_usage(part.parent).free
        if total - done > free:
            needed = show(total - done)
            raise OSError(
                f"{part.parent}: {needed} are needed and {show(free)} are free: choose another disk"
            )
        if not done:
            _forget(part)
            part.touch()
            _write_version(part, response.headers, total)
        surplus = _append(response, part, done, total, remote.path)
    if surplus:
        _forget(part)
        raise OSError(f"{url} sends more than the {total:,} bytes that it announced: use another --mirror")
    done = _size(part)
    if done < total:
        raise ConnectionError(f"the connection ended at {done:,} of {total:,} bytes")
    return total, redirects.sha256


def _announced(response: http.client.HTTPResponse, done: int) -> tuple[int | None, bool]:
    """Size of the whole file, if the server says it; whether it sends what follows on `done`."""
    if response.status == 206:
        span = response.headers.get("Content-Range", "")
        numbers = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", span)
        return (int(numbers[2]), int(numbers[1]) == done) if numbers else (None, False)
    length = re.fullmatch(r"\d{1,15}", response.headers.get("Content-Length", ""))
    return (int(length[0]) if length else None), done == 0


def _append(response: http.client.HTTPResponse, part: Path, done: int, total: int, title: str) -> bool:
    """Writes what comes, up to `total` bytes; says whether more has come. TimeoutError if it comes slowly."""
    since, fresh = time.monotonic(), 0
    with open(part, "ab") as file, _bar(title, total, done) as bar:
        while block := response.read1(1 << 18):
            file.write(block[: total - done])
            if done + len(block) > total:
                return True
            done += len(block)
            fresh += len(block)
            bar.update(len(block))
            if (passed := time.monotonic() - since) > TIMEOUT:
                if fresh < SLOWEST * passed:
                    raise TimeoutError(f"fewer than {SLOWEST:,} bytes a second arrive")
                since, fresh = time.monotonic(), 0
    return False


class Version(NamedTuple):
    """Which version of the file the bytes so far belong to."""

    name: str  # ETag or, without a strong one, Last-Modified; "": the server gives neither
    total: int | None  # bytes; None in notes of older programs


def _write_version(part: Path, headers: http.client.HTTPMessage, total: int) -> None:
    names = (headers.get("ETag", ""), headers.get("Last-Modified", ""))
    name = next((name for name in names if re.fullmatch(VERSION, name)), "")
    _note(part).write_bytes(f"{name}\n{total}\n".encode("ascii"))


def _read_version(part: Path) -> Version | None:
    """None if there is no note, or if it is not what `_write_version` writes."""
    if not _note(part).is_file():
        return None
    with open(_note(part), "rb") as file:
        text = file.read(1000).decode("ascii", "replace")
    found = re.fullmatch(rf"({VERSION}|)(?:\n(\d{{1,15}})\n)?", text) if text else None
    return Version(found[1], int(found[2]) if found[2] else None) if found else None


# Not W/"...", a weak ETag, which promises nothing about bytes.
VERSION = r'"[!#-~]{0,200}"|[A-Z][a-z]{2}, [A-Za-z0-9 :]{1,40}'


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _begin_again(part: Path, reason: str) -> BeginAgain:
    _forget(part)
    return BeginAgain(reason)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _advice(code: int) -> str:
    return {
        401: "the page may ask for an account: download it in a browser and put it into place",
        403: "the page may ask for an account: download it in a browser and put it into place",
        404: "it may have moved: look at its page, or use --mirror",
    }.get(code, "try again later, what is there is kept")


# ---- The folder --------------------------------------------------------------------------------------------


def read_notes(out: Path) -> dict:
    path = out / "downloaded.json"
    if not path.exists():
        return {}
    try:
        notes = read_json(path)
        if all(isinstance(note["size"], int) and isinstance(note["sha256"], str) for note in notes.values()):
            return notes
        raise ValueError("unexpected fields")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what this program wrote ({error}): remove it") from None


def present(out: Path, remote: Remote) -> Path | None:
    """The file itself or one that makes it unnecessary, whatever is in it."""
    return next((out / name for name in (remote.path, *remote.instead) if (out / name).is_file()), None)


def verdict(out: Path, remote: Remote, notes: dict, deep: bool) -> str:
    """ "ok", or what is wrong with a file; `deep` compares its SHA-256, too, with the noted one."""
    path = present(out, remote)
    if path is None:
        part = out / (remote.path + ".part")
        return f"incomplete ({show(part.stat().st_size)})" if part.exists() else "missing"
    if path != out / remote.path:
        return "ok"
    size = path.stat().st_size
    note = notes.get(remote.path)
    if not fits(size, remote) or (note and note["size"] != size):
        return "wrong size"
    if deep and note and sha256(path) != note["sha256"]:
        return "damaged"
    return "ok"


def check(out: Path, parts: list[str]) -> int:
    """Prints the table of files, and the licenses; returns how many files are not as they should be."""
    notes = read_notes(out)
    bad = 0
    width = max(len(remote.path) for part in parts for remote in PARTS[part].files)
    print(f"{'file':{width}}  {'found':>8}  {'expected':>8}  {'':12}  what it is for")
    for part in parts:
        for remote in PARTS[part].files:
            path = present(out, remote)
            state = verdict(out, remote, notes, deep=True)
            bad += state != "ok"
            found = show(path.stat().st_size) if path else "-"
            name = remote.path if path in (None, out / remote.path) else str(path.relative_to(out))
            if state == "ok" and name in notes:
                state = "ok, SHA-256"
            print(f"{name:{width}}  {found:>8}  {remote.size or '?':>8}  {state:12}  {remote.purpose}")
    print()
    for part in parts:
        print(f"{part}: {PARTS[part].license}")
    return bad


def prepare(out: str | Path, parts: list[str] = TALKING, mirrors: list[str] = ()) -> None:
    """Downloads what is missing of `parts` into `out`. OSError or ValueError, one line each."""
    out = Path(out)
    remotes = [remote for part in check_parts(parts) for remote in PARTS[part].files]
    notes = read_notes(out)
    wanted = [remote for remote in remotes if verdict(out, remote, notes, deep=False) != "ok"]
    urls = {remote: mirrored(remote.url, mirrors) for remote in wanted}
    out.mkdir(parents=True, exist_ok=True)
    needed = 0
    for remote in wanted:
        if (out / remote.path).exists() and remote.path not in notes:
            raise OSError(
                f"{out / remote.path} is none of the files that this program downloads: move it away"
            )
        part = out / (remote.path + ".part")
        needed += bounds(remote.size)[1] if remote.size else 0
        needed -= part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(f"{out}: {show(needed)} are needed and {show(free)} are free: choose another disk")
    for remote in wanted:
        notes[remote.path] = fetch(remote, urls[remote], out)
        write_json(out / "downloaded.json", notes)


def check_parts(parts: list[str]) -> list[str]:
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part '{part}'; choose from {', '.join(PARTS)}")
    if {"hubert", "mhubert-base"} <= set(parts):
        raise ValueError("hubert and mhubert-base are the same model in two forms: choose one")
    return list(dict.fromkeys(parts))


def mirrored(url: str, mirrors: list[str]) -> str:
    """url with the first fitting FROM replaced by its TO; each mirror is FROM=TO, two beginnings of URLs."""
    for mirror in mirrors:
        old, equals, new = mirror.partition("=")
        if not equals or not _allowed(new, local=True):
            raise ValueError(
                f"--mirror {mirror}: expected FROM=TO, as in https://huggingface.co=https://YOUR.MIRROR"
            )
        if url.startswith(old):
            return new.rstrip("/") + "/" + url[len(old) :].lstrip("/")
    return url


def main() -> None:
    parser = Parser("Downloads the released SpeechGPT-7B, or checks a copy of it.")
    parser.add_argument("out", type=Path, help="folder to fill or to check")
    parser.add_argument("--check", action="store_true", help="download nothing, print what is there")
    parser.add_argument(
        "--parts", nargs="+", default=list(TALKING), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="FROM=TO", help="another place to fetch from"
    )
    options = parser.parse_args()
    parts = check_parts(options.parts)
    if not options.check:
        prepare(options.out, parts, options.mirror)
    bad = check(options.out, parts)
    if bad:
        raise ValueError(
            f"{options.out}: {bad} files are missing or wrong; run again without --check to fetch them"
        )


if __name__ == "__main__":
    command_line(main)
