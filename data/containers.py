"""Containers of sound (wav, flac, ogg, mp3 and others): is everything there that a header promises?

libsndfile believes a header: what is cut off it does not miss, what comes after the first of several streams
it does not look for, and the length of an mp3 that does not state it is a guess from the first frame. So a
file's own structure is walked over first, and only what is whole is decoded:

    wav, rf64, w64, aiff, caf   chunks of (name, length, content); one of them is the sound
    au, sphere (NIST)           a header with the length of what follows it
    flac                        "fLaC", the number of samples or 0 for "unknown", frames with a checksum
    ogg (vorbis, opus)          pages with a number, a checksum and the number of samples so far
    mp3 (layer 3)               frames of 24 to 72 ms, whose headers give their lengths; the first may be a
                                note ("Xing", "Info", "VBRI") of how many there are

Programs that write into a pipe cannot go back to fill in a length. Instead of it ffmpeg 9 writes 2^32 - 1
(wav), 2^63 - 1 (w64), -1 (caf, au) or 0 (rf64, aiff, flac, mp3), sox 14 0x7ffff000 (wav), 0x7f000008 (aiff)
or -1 (au), and arecord 2^31 (wav). Then all the rest of the file is sound.

References: http://soundfile.sapp.org/doc/WaveFormat (wav), EBU Tech 3306 (rf64), RFC 9639 (flac),
            RFC 3533 (ogg), http://mpgedit.org/mpgedit/mpeg_format/mpeghdr.htm (mp3)
"""

import math
import re
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_BYTES = 1 << 30  # of a file that is read whole: 4 hours of mp3 at 320 kbit/s are half of that
SLACK = 400  # bytes after the sound that may be anything: fewer than 25 ms of it

NOT_SOUND = "is not a sound file that can be read (wav, flac, ogg, mp3, aiff): convert it to wav or flac"


class Stream(NamedTuple):
    """What is decoded in one go."""

    content: Path | bytes
    promised: int | None = None  # samples that must be there; None: as many as libsndfile announces
    beginning: tuple[bytes, int] | None = None  # of ogg: see `_ogg_beginning`


def streams(path: Path) -> list[Stream]:
    """The streams of a sound file, one after another; almost always it is one. ValueError, one line, if it is
    no sound file, if some of it is missing, or if more is there than its header says."""
    with open(path, "rb") as file:
        magic = file.read(12)
        size = path.stat().st_size
        layout = CHUNKS.get(magic[:4])
        if layout and (not layout.kinds or any(kind.startswith(magic[8:]) for kind in layout.kinds)):
            return [_chunked(path, file, size, layout)]
        if magic[:4] == b".snd":
            return [_au(path, file, size)]
        if magic[:7] == b"NIST_1A":
            return [_sphere(path, file, size)]
    if magic[:4] == b"OggS":
        return _ogg(path, _read(path))
    if magic[:4] == b"fLaC" or magic[:3] == b"ID3" or _mp3_frame(magic[:4]):
        content = _read(path)
        start = _end_of_tags(content, 0)
        if content.startswith(b"fLaC", start):
            return _flac(content[start:])
        return _mp3(path, content, start)
    raise ValueError(f"{path} {NOT_SOUND}")


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is too large: {size:,} bytes, the limit is {MAX_BYTES:,}; split it")
    return path.read_bytes()


def _cut_short(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is cut short: {reason}; copy it again")


# ---- Chunks, and headers with a length ---------------------------------------------------------------------


class Chunks(NamedTuple):
    first: int  # position of the first chunk
    name: int  # bytes of a chunk's name
    length: str  # struct format of its length
    counted: int  # bytes of name and length, if the length counts them
    align: int  # a chunk begins at a multiple of this
    kinds: tuple[bytes, ...] = ()  # what follows on the first 8 bytes, where it may be something else


CHUNKS = {
    b"RIFF": Chunks(12, 4, "<I", 0, 2, (b"WAVE",)),
    b"RF64": Chunks(12, 4, "<I", 0, 2, (b"WAVE",)),
    b"FORM": Chunks(12, 4, ">I", 0, 2, (b"AIFF", b"AIFC")),
    b"riff": Chunks(40, 16, "<Q", 24, 8),  # w64
    b"caff": Chunks(8, 4, ">Q", 0, 1),
}
MAX_CHUNKS = 10_000
UNKNOWN = (2**31, 2**32 - 1, 0x7FFFF000, 0x7F000008, 2**63 - 1, 2**64 - 1)
SAMPLES = (b"\1\0", b"\3\0", b"\6\0", b"\7\0", b"\xfe\xff")  # encodings of wav that are not in blocks
MP3_IN_WAV = b"\x55\0"


class Chunk(NamedTuple):
    """A piece of a file, by its header."""

    name: bytes
    start: int  # of its content
    length: int
    field: int = 0  # position of the length; 0: there is none that could be replaced
    format: str = ""  # of the length, for struct
    counted: int = 0


def _chunks(file: BinaryIO, size: int, layout: Chunks) -> Iterator[Chunk]:
    """Chunk after chunk, as long as they make sense; the last one may reach beyond the end of the file."""
    long = None
    position = layout.first
    size_of_header = layout.name + struct.calcsize(layout.length)
    for _ in range(MAX_CHUNKS):
        file.seek(position)
        header = file.read(size_of_header)
        name = header[:4]
        is_chunk = name.isascii() and name.decode().isprintable() and name not in CHUNKS
        if len(header) < size_of_header or not is_chunk:
            return
        start = position + len(header)
        length = struct.unpack(layout.length, header[layout.name :])[0] - layout.counted
        chunk = Chunk(name, start, length, position + layout.name, layout.length, layout.counted)
        if name == b"ds64" and start + 16 <= size:  # of rf64: lengths of more than 32 bits
            long = Chunk(b"data", 0, struct.unpack("<xxxxxxxxQ", file.read(16))[0], start + 8, "<Q")
        if name == b"data" and long:
            chunk = long._replace(start=start)
        yield chunk
        end = start + chunk.length
        if not start <= end <= size:
            return
        file.seek(end)
        padding = file.read(-end % layout.align)  # some programs forget it
        position = end + (0 if padding.strip(b"\0") else len(padding))


def _chunked(path: Path, file: BinaryIO, size: int, layout: Chunks) -> Stream:
    sound = None
    codec = SAMPLES[0]
    end = layout.first
    for chunk in _chunks(file, size, layout):
        if chunk.name == b"fmt ":
            file.seek(chunk.start)
            codec = file.read(2)
        elif chunk.name in (b"data", b"SSND"):
            if sound:
                raise ValueError(f"{path} has its sound in two pieces: export it again")
            sound = chunk
        if chunk.start + chunk.length <= size:
            end = max(chunk.start, chunk.start + chunk.length)
    if not sound:
        raise _cut_short(path, "the chunk with its sound is missing")
    if codec == MP3_IN_WAV:
        raise ValueError(f"{path} {NOT_SOUND}")
    return _whole(path, size, sound, end, stops=codec in SAMPLES and layout != CHUNKS[b"riff"])


def _au(path: Path, file: BinaryIO, size: int) -> Stream:
    file.seek(4)
    numbers = file.read(8)
    if len(numbers) < 8:
        raise _cut_short(path, "its header ends early")
    start, length = struct.unpack(">II", numbers)
    return _whole(path, size, Chunk(b"", start, length, 8, ">I"), start + length, stops=False)


def _sphere(path: Path, file: BinaryIO, size: int) -> Stream:
    """A text header of lines like "sample_count -i 48007"; without that line all the rest is sound."""
    file.seek(0)
    header = file.read(1024)
    if b"\nend_head" not in header:
        raise _cut_short(path, "its header ends early")
    numbers = dict(re.findall(rb"(\w+) -i (\d{1,18})\s", header))
    length = size - len(header)
    if b"sample_count" in numbers:
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        length = math.prod(int(numbers.get(name, 1)) for name in names)
    return _whole(path, size, Chunk(b"", len(header), length), len(header) + length, stops=False)


def _whole(path: Path, size: int, sound: Chunk, end: int, stops: bool) -> Stream:
    """The stream of a file that makes sense up to `end`. A length that means "unknown" is replaced by the
    true one. Unless libsndfile `stops` where the sound does, what follows is taken off."""
    missing = sound.start + sound.length - size
    unknown = any(0 <= most - sound.counted - sound.length < 256 for most in UNKNOWN)  # or as much less
    if sound.field and ((missing > 0 and unknown) or (sound.length <= 0 and size - end > SLACK)):
        content = bytearray(_read(path))
        struct.pack_into(sound.format, content, sound.field, size - sound.start + sound.counted)
        return Stream(bytes(content))
    if missing > 0:
        there = max(0, size - sound.start)
        raise _cut_short(path, f"{there:,} of {sound.length:,} bytes of its sound are there")
    if size - end > SLACK and _anything(path, end):
        raise _more(path, size - end)
    if missing < 0 and not stops:
        return Stream(_read(path)[:missing])
    return Stream(path)


def _anything(path: Path, position: int) -> bool:
    """Whether a file has more than zeros from `position` on."""
    with open(path, "rb") as file:
        file.seek(position)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return True
    return False


def _more(path: Path, n_bytes: int) -> ValueError:
    return ValueError(f"{path} goes on for {n_bytes:,} bytes after its sound should end: export it again")


# ---- Flac --------------------------------------------------------------------------------------------------

FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # and STREAMINFO, 34 bytes


def _flac(content: bytes) -> list[Stream]:
    """The number of samples is set to 0, for "unknown", so that libsndfile reads on after it."""
    starts = [0, *(match.start() for match in FLAC_START.finditer(content, 1))]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(content)]):
        stream = bytearray(content[start:stop])
        # 20 bits are the rate, 3 the channels, 5 the bits of a sample, 36 the number of samples.
        numbers = int.from_bytes(stream[18:26], "big")
        stream[18:26] = (numbers >> 36 << 36).to_bytes(8, "big")
        found.append(Stream(bytes(stream), numbers & (1 << 36) - 1))
    return found


# ---- Ogg ---------------------------------------------------------------------------------------------------

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
FIRST_PAGE, LAST_PAGE = 2, 4  # flags


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of a page without its own field, highest bit first and from 0: zlib's of the mirrored bytes."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(REVERSED)
    checksum = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{checksum:032b}"[::-1], 2)


class Page(NamedTuple):
    start: int
    stop: int
    flags: int
    position: int  # of the stream, in samples, after the last packet that ends in this page; -1: none does
    serial: int  # of the stream
    number: int  # in the stream


def _ogg_pages(path: Path, content: bytes) -> Iterator[Page]:
    start = flags = 0
    while start < len(content):
        head = content[start : start + 27]
        if head[:4] != b"OggS" and flags & LAST_PAGE and content.find(b"OggS", start) < 0:
            return  # something else after the end
        segments = content[start + 27 : start + 27 + head[26]] if len(head) == 27 else b""
        stop = start + 27 + len(segments) + sum(segments)
        page = content[start:stop]
        if head[:4] == b"OggS" and (len(head) < 27 or len(segments) < head[26] or stop > len(content)):
            raise _cut_short(path, "its last page is not whole")
        if head[:4] != b"OggS" or ogg_checksum(page) != struct.unpack_from("<I", page, 22)[0]:
            raise ValueError(f"{path} is damaged at byte {start:,}: copy it again")
        flags, position, serial, number = struct.unpack_from("<xxxxxBqII", page)
        if position < -1 or (position == -1 and min(segments, default=255) < 255):  # a packet ends with less
            raise ValueError(f"{path} is damaged at byte {start:,}: copy it again")
        yield Page(start, stop, flags, position, serial, number)
        start = stop


def _ogg(path: Path, content: bytes) -> list[Stream]:
    """Streams may follow each other. Their pages are numbered, and positions never go back."""
    found = []
    pages: list[Page] = []  # of the stream that has begun and not ended
    for page in _ogg_pages(path, content):
        if bool(pages) == bool(page.flags & FIRST_PAGE) or (pages and page.serial != pages[0].serial):
            raise ValueError(f"{path} holds several streams at once: export its sound alone")
        reached = max((before.position for before in pages[-1:]), default=0)
        if pages and (page.number != pages[-1].number + 1 or -1 < page.position < reached):
            raise ValueError(f"{path} is damaged: pages are missing at byte {page.start:,}; copy it again")
        pages.append(page._replace(position=max(page.position, reached)))
        if page.flags & LAST_PAGE:
            found.append(
                Stream(content[pages[0].start : page.stop], beginning=_ogg_beginning(content, pages))
            )
            pages = []
    if pages:
        raise _cut_short(path, "the end of its ogg stream is missing")
    return found


def _ogg_beginning(content: bytes, pages: list[Page]) -> tuple[bytes, int] | None:
    """A vorbis stream up to its first page of sound, and how many samples it should have; None: too short.

    Programs that cut without decoding say by that page's position how much of the beginning to leave out.
    libsndfile leaves out as much of the end."""
    first = next(page for page in pages if page.position > 0 or page is pages[-1])
    if first is pages[-1] or not content.startswith(b"\x01vorbis", pages[0].start + 28):
        return None
    page = bytearray(content[first.start : first.stop])
    struct.pack_into("<Bq", page, 5, first.flags | LAST_PAGE, 1 << 40)
    struct.pack_into("<I", page, 22, ogg_checksum(bytes(page)))
    return content[pages[0].start : first.start] + bytes(page), first.position


# ---- Mp3 ---------------------------------------------------------------------------------------------------

RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # of MPEG 1, 2 and 2.5
KBITS = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KBITS[0] = KBITS[2]
MONO = 3


class Frame(NamedTuple):
    length: int  # bytes
    kind: tuple[int, int, bool]  # version, index of the rate, mono: the same in all frames of a stream
    note: int  # position of "Xing" or "Info" in a frame that is a note


@lru_cache(1024)
def _mp3_frame(header: bytes) -> Frame | None:
    """What the 4 bytes at the beginning of a frame of layer 3 say; None if they are none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version = header[1] >> 3 & 3
    bit_rate = header[2] >> 4
    rate = header[2] >> 2 & 3
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return None
    mono = header[3] >> 6 == MONO
    length = (144_000 if version == 3 else 72_000) * KBITS[version][bit_rate - 1] // RATES[version][rate]
    side_information = {(3, False): 32, (3, True): 17, (2, False): 17, (2, True): 9}[version | 2, mono]
    return Frame(length + (header[2] >> 1 & 1), (version, rate, mono), 4 + side_information)


class Run(NamedTuple):
    """Frames of one kind, one after another."""

    frame: bytes  # header of the first
    promised: int  # frames, by the note before them; 0: there is none, or it does not say
    size: int  # bytes with the note, by the note; 0: the same
    start: int  # position of the first, or of the note
    sound: int  # position of the first
    stop: int
    count: int


def _mp3(path: Path, content: bytes, position: int) -> list[Stream]:
    runs: list[Run] = []
    is_new = True
    while frame := _mp3_frame(content[position : position + 4]):
        stop = position + frame.length
        if stop > len(content):
            break
        note = _mp3_note(content[position:stop], frame)
        header = content[position : position + 4]
        if note:
            runs.append(Run(header, *note, position, stop, stop, 0))
        elif is_new or frame.kind != _mp3_frame(runs[-1].frame).kind:
            runs.append(Run(header, 0, 0, position, position, stop, 1))
        else:
            runs[-1] = runs[-1]._replace(stop=stop, count=runs[-1].count + 1)
        position = _end_of_tags(content, stop)
        is_new = position > stop
    for run in runs:
        counts_itself = run.count + 1 == run.promised and run.size == run.stop - run.start  # as of mp3splt
        if run.count < run.promised and not counts_itself:
            raise _cut_short(path, f"{run.count:,} of {run.promised:,} mp3 frames are there")
    runs = [run for run in runs if run.count]
    if not runs:
        raise ValueError(f"{path} {NOT_SOUND}")
    if position < len(content) and runs[-1].count != runs[-1].promised:
        raise ValueError(f"{path} is damaged or cut short at byte {position:,}: copy it again")
    return [Stream(_mp3_stream(content, run)) for run in runs]


def _mp3_note(frame: bytes, of: Frame) -> tuple[int, int] | None:
    """How many frames and bytes are promised by a frame that holds no sound but a note (0: it does not say);
    None for a frame of sound."""
    if frame[36:40] == b"VBRI":
        size, count = struct.unpack_from(">II", frame.ljust(54, b"\0"), 46)
        return count, size
    if frame[of.note : of.note + 4] in (b"Xing", b"Info") and not any(frame[6 : of.note]):
        flags, *numbers = struct.unpack_from(">III", frame.ljust(of.note + 16, b"\0"), of.note + 4)
        count = numbers.pop(0) if flags & 1 else 0
        return count, numbers[0] if flags & 2 else 0
    return None


def _mp3_stream(content: bytes, run: Run) -> bytes:
    """The frames of a run after a note of how many there are: its own if that is right, which also says how
    much of the first and last frames is padding; else a new one."""
    if run.count == run.promised and content[run.start + 36 : run.start + 40] != b"VBRI":
        return content[run.start : run.stop]
    # Without CRC, of 80 or 128 kbit/s.
    header = bytes([0xFF, run.frame[1] | 1, 0x90 | run.frame[2] & 0x0C, run.frame[3]])
    frame = _mp3_frame(header)
    note = header.ljust(frame.note, b"\0") + struct.pack(">4sII", b"Xing", 1, run.count)
    return note.ljust(frame.length, b"\0") + content[run.sound : run.stop]


def _end_of_tags(content: bytes, position: int) -> int:
    """Where the tags (ID3 1 and 2, APE) and zeros that begin at `position` end."""
    while True:
        tag = content[position : position + 32]
        if tag[:3] == b"ID3" and len(tag) > 9:
            size = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
            position += 10 + size + (10 if tag[5] & 0x10 else 0)
        elif tag[:3] == b"TAG":
            position += 128
        elif tag[:8] == b"APETAGEX" and len(tag) == 32:
            is_header = tag[23] & 0x20
            position += 32 + (struct.unpack_from("<I", tag, 12)[0] if is_header else 0)
        elif tag[:1] == b"\0":
            position = len(content) - len(content[position:].lstrip(b"\0"))
        else:
            return min(position, len(content))
