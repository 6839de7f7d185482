"""data/containers.py: a file whose header lies gives all of its sound or one line, never other sound."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from data import audio, containers

RATE = 16000
TIME = np.arange(8007) / RATE
SOUND = (0.4 * np.sin(2 * np.pi * 220 * TIME) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * TIME))).astype(np.float32)
SOUND += 0.1 * np.sin(2 * np.pi * 700 * TIME).astype(np.float32)


def written(format_: str, subtype: str | None = None, sound: np.ndarray = SOUND, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, subtype, format=format_)
    return file.getvalue()


@pytest.fixture
def load(tmp_path):
    """content -> what audio.load makes of it, twice: memory that was never written varies."""

    def load(content: bytes, name: str = "a.wav") -> np.ndarray:
        (tmp_path / name).write_bytes(content)
        first = audio.load(tmp_path / name)
        np.full(len(first) + 1000, 0.5, np.float32)  # what freed memory may hold
        np.testing.assert_array_equal(first, audio.load(tmp_path / name))
        assert first.dtype == np.float32 and np.isfinite(first).all()
        return first

    return load


def refused(load, content: bytes, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        load(content)
    message = str(error.value)
    assert message.isprintable() and len(message) < 300 and all(word in message for word in words), message


def decibels(sound: np.ndarray, truth: np.ndarray = SOUND) -> float:
    """Signal-to-noise ratio."""
    sound = sound[: len(truth)]
    return 10 * np.log10(np.sum(truth**2) / max(np.sum((sound - truth) ** 2), 1e-20))


# ---- What libsndfile can write -----------------------------------------------------------------------------

READ = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3")
LEAST = {"PCM_S8": 30, "PCM_U8": 30, "GSM610": 18, "VORBIS": 20, "OPUS": 20, "MPEG_LAYER_III": 20}
LEAST |= {"ULAW": 30, "ALAW": 30, "IMA_ADPCM": 25, "MS_ADPCM": 25, "DWVW_16": 75, "DWVW_24": 100}
LEAST |= {"G721_32": 25, "G723_24": 25, "G723_40": 25}
LEAST |= {"NMS_ADPCM_16": 20, "NMS_ADPCM_24": 25, "NMS_ADPCM_32": 30}
BLOCK = 600  # samples: codecs with blocks fill up the last one


@pytest.mark.parametrize("format_", READ)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_encoding_comes_back_as_it_was(load, format_, channels):
    read = 0
    for subtype in soundfile.available_subtypes(format_):
        try:
            content = written(format_, subtype, np.stack([SOUND] * channels, 1))
        except soundfile.LibsndfileError:  # listed, but not written, or not for two channels
            continue
        loaded = load(content)
        assert len(SOUND) <= len(loaded) < len(SOUND) + BLOCK, subtype
        assert decibels(loaded) > LEAST.get(subtype, 75), subtype
        read += 1
    assert read


def test_no_encoding_of_another_format_is_other_sound(load):
    for format_ in soundfile.available_formats():
        if format_ in READ or format_ in ("RAW", "SD2"):  # without a header of its own
            continue
        for subtype in soundfile.available_subtypes(format_):
            refused(load, written(format_, subtype), "not a sound file that can be read", "convert it")


@pytest.mark.parametrize("format_", READ)
def test_parts_and_lengths_are_those_of_load(tmp_path, format_):
    for subtype in soundfile.available_subtypes(format_):
        try:
            content = written(format_, subtype)
        except soundfile.LibsndfileError:
            continue
        (tmp_path / "a.wav").write_bytes(content)
        whole = audio.load(tmp_path / "a.wav")
        assert audio.measure(tmp_path / "a.wav") == len(whole) / RATE == audio.seconds(tmp_path / "a.wav")
        spans = list(audio.cut(tmp_path / "a.wav", [(0.1, 0.2), (0.15, 9.0), (9.0, 9.5)]))
        assert [len(span) for span in spans] == [1600, len(whole) - 2400, 0]
        np.testing.assert_array_equal(spans[0], whole[1600:3200])
        for start, n in ((0, 400), (3001, 1000), (7900, 107), (7900, 5000), (9000, 10)):
            part = audio.load_part(tmp_path / "a.wav", start, n)
            np.testing.assert_array_equal(part, whole[start : start + n], err_msg=subtype)


# ---- Headers with a length ---------------------------------------------------------------------------------


def with_length(content: bytes, format_: str, length: int | None = None, more: int = 0) -> bytes:
    """A file whose header says that its sound is `length` bytes, or `more` than it is."""
    name, field, skip = LENGTHS[format_]
    position = content.index(name) + len(name) + skip
    content = bytearray(content)
    if length is None:
        length = struct.unpack_from(field, content, position)[0] + more
    struct.pack_into(field, content, position, length)
    return bytes(content)


LENGTHS = {  # format: name of the chunk, format of its length, bytes between them
    "WAV": (b"data", "<I", 0), "WAVEX": (b"data", "<I", 0), "RF64": (b"ds64", "<Q", 12),
    "W64": (b"data", "<Q", 12), "AIFF": (b"SSND", ">I", 0), "CAF": (b"data", ">Q", 0),
    "AU": (b".snd", ">I", 4),
}  # fmt: skip
PIPED = {  # what programs write that do not know the length
    "WAV": (0, 2**32 - 1, 2**31, 0x7FFFF000, 2**32 - 1 - 36), "WAVEX": (0, 2**32 - 1), "RF64": (0, 2**64 - 1),
    "W64": (2**63 - 1, 2**64 - 1, 0), "AIFF": (0, 0x7F000008), "CAF": (2**64 - 1,), "AU": (2**32 - 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("format_", LENGTHS)
def test_a_length_that_means_unknown(load, tmp_path, format_):
    content = written(format_)
    for unknown in PIPED[format_]:
        piped = with_length(content, format_, unknown)
        whole = load(piped)
        np.testing.assert_array_equal(whole, load(content), err_msg=str(unknown))
        load(piped)
        assert audio.seconds(tmp_path / "a.wav") == len(whole) / RATE
        np.testing.assert_array_equal(audio.load_part(tmp_path / "a.wav", 500, 900), whole[500:1400])


@pytest.mark.parametrize("format_", LENGTHS)
def test_a_length_that_is_wrong(load, format_):
    content = written(format_)
    for more in (1, 2, 1000, 10**6, 2**30):
        refused(load, with_length(content, format_, more=more), "cut short")
    for less in (1000, 8000, 15001):
        refused(load, with_length(content, format_, more=-less), "goes on for")
    for less in (1, 2):  # an odd length: the last sample is not whole
        assert len(load(with_length(content, format_, more=-less))) in (8006, 8007)


@pytest.mark.parametrize("format_", [*LENGTHS, "NIST"])
def test_a_file_that_is_cut_off(load, format_):
    content = written(format_)
    for kept in (4, 12, 20, 30, 43, 70, 100, len(content) - 1000, len(content) - 1):
        refused(load, content[:kept], "copy it again" if kept > 12 else "")


@pytest.mark.parametrize("format_", [*LENGTHS, "NIST"])
def test_what_is_no_sound_is_not_decoded(load, format_):
    for subtype in soundfile.available_subtypes(format_):
        try:
            content = written(format_, subtype)
        except soundfile.LibsndfileError:
            continue
        for follows in (bytes(2000), b"?" * 300):
            np.testing.assert_array_equal(load(content + follows), load(content), err_msg=subtype)


@pytest.mark.parametrize("format_", ["WAV", "AIFF", "W64", "CAF"])
def test_what_may_follow_the_sound(load, format_):
    content = written(format_)
    loaded = load(content)
    assert len(loaded) == len(SOUND)
    aligned = content + bytes(-len(content) % (8 if format_ == "W64" else 2 if format_ != "CAF" else 1))
    length = {"WAV": "<I", "AIFF": ">I", "W64": "<Q", "CAF": ">Q"}[format_]
    counted, rest = (
        (24, b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a") if format_ == "W64" else (0, b"")
    )
    note = b"note" + rest + struct.pack(length, 1000 + counted) + b"word" * 250
    for follows in (note, note + note, bytes(5000), b"?" * 100):
        np.testing.assert_array_equal(load(aligned + follows), loaded)
    refused(load, aligned + b"\x01\xfe" * 1000, "goes on for")
    refused(load, content + content, "export it again")


def test_a_chunk_of_odd_length_with_and_without_padding(load):
    content = written("WAV", "PCM_U8", SOUND[:8001])
    note = b"LIST" + struct.pack("<I", 1000) + b"INFO" + b"word" * 249
    for padding in (b"", b"\0"):
        assert len(load(content[: 44 + 8001] + padding + note)) == 8001
    refused(load, content[:36] + b"data" + bytes(4) + content[36:], "two pieces")
    refused(load, content[:36] + b"none\0\0\0\0" * 20_000 + content[36:], "is missing")
    refused(load, content[:20] + b"\x55" + content[21:], "not a sound file")  # mp3 in wav


def test_telephone_sound_in_gsm(load):
    sound = SOUND[::2]  # of 8 kHz
    loaded = load(written("WAV", "GSM610", sound, 8000))
    assert 8006 <= len(loaded) < 8006 + 2 * BLOCK and decibels(loaded[::2], sound) > 10


def test_a_sphere_file_without_a_count(load):
    content = written("NIST")
    piped = content.replace(b"sample_count -i 8007\n", b"").replace(b"end_head\n", b"end_head\n" + b"\0" * 21)
    assert len(piped) == len(content)
    np.testing.assert_array_equal(load(piped), load(content))
    refused(load, content.replace(b"-i 8007", b"-i 4007"), "goes on for")
    refused(load, content.replace(b"-i 8007", b"-i 9007"), "cut short")


# ---- Flac --------------------------------------------------------------------------------------------------

ID3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
ID3_AT_THE_END = b"TAG" + bytes(125)


def flac_with(content: bytes, total: int) -> bytes:
    numbers = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
    return content[:18] + numbers.to_bytes(8, "big") + content[26:]


def test_flac_of_unknown_or_wrong_length(load, tmp_path):
    content = written("FLAC")
    truth = load(content)
    assert len(truth) == len(SOUND)
    for total in (0, 1, 100, 8006):  # all that is there is sound, whatever the header says
        np.testing.assert_array_equal(load(flac_with(content, total)), truth)
        assert audio.measure(tmp_path / "a.wav") == len(truth) / RATE
        np.testing.assert_array_equal(audio.load_part(tmp_path / "a.wav", 50, 5000), truth[50:5050])
    for total in (8008, 100_000, 2**36 - 1):
        with pytest.raises(ValueError, match="cut short|too long"):
            load(flac_with(content, total))


def test_flac_with_tags_and_padding(load):
    content = written("FLAC")
    truth = load(content)
    for before in (b"", ID3):
        for after in (b"", ID3_AT_THE_END, bytes(3000), b"?" * 50):
            np.testing.assert_array_equal(load(before + content + after), truth)


def test_flac_that_is_cut_off_or_damaged(load):
    content = written("FLAC")
    for kept in np.linspace(5, len(content) - 1, 40).astype(int):
        refused(load, content[:kept])
    for place in np.linspace(len(content) // 2, len(content) - 1, 40).astype(int):  # of the frames
        damaged = bytearray(content)
        damaged[place] ^= 16
        refused(load, bytes(damaged), "damaged")


# ---- Ogg ---------------------------------------------------------------------------------------------------


def ogg_pages(content: bytes) -> list[bytes]:
    pages, position = [], 0
    while position < len(content):
        n = content[position + 26]
        stop = position + 27 + n + sum(content[position + 27 : position + 27 + n])
        pages.append(content[position:stop])
        position = stop
    return pages


def with_granule(page: bytes, granule: int) -> bytes:
    page = page[:6] + struct.pack("<q", granule) + page[14:]
    return page[:22] + struct.pack("<I", containers.ogg_checksum(page)) + page[26:]


@pytest.fixture(params=["VORBIS", "OPUS"])
def ogg(request):
    """Three seconds: some pages of sound."""
    return written("OGG", request.param, np.tile(SOUND, 6))


def test_the_checksum_of_ogg(ogg):
    for page in ogg_pages(ogg):
        assert containers.ogg_checksum(page) == struct.unpack_from("<I", page, 22)[0]


def test_ogg_with_lost_pages_or_positions_that_lie(load, ogg):
    pages = ogg_pages(ogg)
    truth = load(ogg)
    assert len(truth) == 6 * len(SOUND) and len(pages) > 3
    np.testing.assert_array_equal(load(ogg + b"?" * 999), truth)
    for i in range(len(pages)):
        with pytest.raises(ValueError):
            load(b"".join(pages[:i] + pages[i + 1 :]))
    before = struct.unpack_from("<q", pages[-2], 6)[0]
    for granule in (before - 1, 10**7, 2**62, -1, -5):
        with pytest.raises(ValueError):
            load(b"".join([*pages[:-1], with_granule(pages[-1], granule)]))


def test_vorbis_that_begins_in_the_middle(load):
    """As it is cut by programs that copy its pages: libsndfile would leave out as much of the end."""
    noise = np.random.default_rng(0).normal(0, 0.1, 80_000).astype(np.float32)
    pages = ogg_pages(written("OGG", "VORBIS", noise))
    positions = [struct.unpack_from("<q", page, 6)[0] for page in pages]
    assert sum(position > 0 for position in positions) > 2
    for shift in (-5000, -128, 1, 30_000):
        moved = [with_granule(page, n + shift if n > 0 else n) for page, n in zip(pages, positions)]
        refused(load, b"".join(moved), "cut")
    assert len(load(b"".join(pages))) == 80_000


def test_ogg_that_is_cut_off_or_damaged(load, ogg):
    for kept in np.linspace(5, len(ogg) - 1, 40).astype(int):
        refused(load, ogg[:kept], "copy it again")
    for place in np.linspace(0, len(ogg) - 1, 60).astype(int):
        damaged = bytearray(ogg)
        damaged[place] ^= 16
        refused(load, bytes(damaged))


def test_two_ogg_streams_at_once(load):
    first, second = ogg_pages(written("OGG", "VORBIS")), ogg_pages(written("OGG", "VORBIS"))
    refused(load, b"".join(page for pair in zip(first, second) for page in pair), "several streams at once")


# ---- Mp3 ---------------------------------------------------------------------------------------------------


def mp3_frames(content: bytes) -> list[bytes]:
    frames, position = [], 0
    while position < len(content):
        length = containers._mp3_frame(content[position : position + 4]).length
        frames.append(content[position : position + length])
        position += length
    return frames


@pytest.fixture(scope="module")
def mp3():
    """Quiet, then loud: the frames grow, so that the first ones say nothing about the length."""
    noise = np.random.default_rng(0).normal(0, 0.2, 16000).astype(np.float32)
    return written("MP3", None, np.concatenate([np.zeros(16000, np.float32), SOUND, noise]))


N = 16000 + len(SOUND) + 16000
DECODER_DELAY = 529  # samples that come out of a decoder before its first frame does


def test_mp3_with_its_note_and_without(load, mp3, tmp_path):
    truth = load(mp3)
    note, *frames = mp3_frames(mp3)
    assert b"Xing" in note and len(truth) == N and len({len(frame) for frame in frames}) > 2
    vbri = note[:4] + bytes(32) + b"VBRI" + bytes(10) + struct.pack(">I", len(frames))  # of another encoder
    for content in (frames, [vbri.ljust(len(note), b"\0"), *frames]):
        bare = load(b"".join(content))
        assert audio.seconds(tmp_path / "a.wav") == len(bare) / RATE
        np.testing.assert_array_equal(audio.load_part(tmp_path / "a.wav", 30_000, 900), bare[30_000:30_900])
        assert len(bare) == 576 * len(frames) - DECODER_DELAY
        padding = (len(bare) - N) // 2
        found = max(decibels(bare[shift:], truth) for shift in range(padding + 200))
        assert found > 60


def test_mp3_whose_note_is_wrong(load, mp3):
    note, *frames = mp3_frames(mp3)
    place = note.index(b"Xing") + 8
    for count in (0, 1, len(frames) - 1):
        wrong = note[:place] + struct.pack(">I", count) + note[place + 4 :]
        assert len(load(wrong + b"".join(frames))) == 576 * len(frames) - DECODER_DELAY
    for count in (len(frames) + 2, 2**32 - 1):
        wrong = note[:place] + struct.pack(">I", count) + note[place + 4 :]
        refused(load, wrong + b"".join(frames), "cut short")


def test_mp3_whose_note_counts_itself(load, mp3):
    """As mp3splt writes it. That the file is whole is known by its number of bytes, which follows."""
    note, *frames = mp3_frames(mp3)
    place = note.index(b"Xing") + 8
    assert struct.unpack_from(">I", note, place + 4)[0] == len(mp3)
    content = note[:place] + struct.pack(">I", len(frames) + 1) + mp3[place + 4 :]
    assert len(load(content)) == 576 * len(frames) - DECODER_DELAY
    for missing in (1, len(frames[-1])):
        refused(load, content[:-missing], "cut short")
        refused(load, mp3[:-missing], "cut short")


def test_mp3_with_tags(load, mp3):
    truth = load(mp3)
    ape = (
        b"APETAGEX" + struct.pack("<III", 2000, 32, 0) + struct.pack("<I", 0x20 << 24) + bytes(8) + bytes(32)
    )
    for before in (b"", ID3, ID3 + ID3, ID3 + bytes(999)):
        for after in (b"", ID3_AT_THE_END, ape + ID3_AT_THE_END, bytes(500), b"?" * 500):
            np.testing.assert_array_equal(load(before + mp3 + after), truth)


def test_mp3_that_is_cut_off(load, mp3, capfd):
    note, *frames = mp3_frames(mp3)
    for kept in np.linspace(1, len(mp3) - 1, 150).astype(int):
        refused(load, mp3[:kept])
    bare = b"".join(frames)
    ends = set(np.cumsum([len(frame) for frame in frames]))  # without a note nothing is missing there
    for kept in set(np.linspace(5, len(bare) - 1, 150).astype(int)) - ends:
        refused(load, bare[:kept])
    assert not capfd.readouterr().err, "the decoder has written to the terminal"


def test_mpeg_layers_1_and_2_are_refused(load):
    for second in (0xFD, 0xFF):
        refused(load, bytes([0xFF, second, 0x90, 0xC0]) + bytes(5000), "not a sound file")


# ---- Several streams in one file ---------------------------------------------------------------------------


@pytest.mark.parametrize("format_, between", [
    ("OGG", b""), ("FLAC", b""), ("FLAC", ID3_AT_THE_END), ("MP3", b""), ("MP3", ID3_AT_THE_END + ID3),
])  # fmt: skip
def test_streams_one_after_another(load, tmp_path, format_, between):
    first = written(format_, None, SOUND)
    second = written(format_, None, np.stack([SOUND[::-2]] * 2, 1), 8000)  # another rate, two channels
    expected = np.concatenate([load(first), load(second), load(first)])
    np.testing.assert_array_equal(load(first + between + second + between + first), expected)
    assert len(expected) >= 3 * len(SOUND) - 2
    assert audio.seconds(tmp_path / "a.wav") == len(expected) / RATE
    part = audio.load_part(tmp_path / "a.wav", 5000, 10_000)  # over the end of the first
    np.testing.assert_array_equal(part, expected[5000:15_000])


# ---- Damaged bytes -----------------------------------------------------------------------------------------

FUZZED = {
    "wav": written("WAV", "PCM_16"), "gsm": written("WAV", "GSM610"), "aiff": written("AIFF"),
    "w64": written("W64"), "flac": written("FLAC"), "ogg": written("OGG", "VORBIS"),
    "opus": written("OGG", "OPUS"), "mp3": written("MP3"),
}  # fmt: skip


def damaged(content: bytes, draw) -> bytes:
    """Bytes of it replaced, taken out, repeated, cut off; more often in the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        most = draw(st.sampled_from([64, 600, len(content)]))
        place = draw(st.integers(0, min(most, len(content)) - 1)) if content else 0
        length = draw(st.sampled_from([1, 2, 4, 8, 1000]))
        what = draw(st.integers(0, 4))
        if what == 0:
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif what == 1:
            content[place : place + 4] = draw(
                st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"data"])
            )
        elif what == 2:
            del content[place : place + length]
        elif what == 3:
            content[place:place] = content[place : place + length]
        else:
            del content[len(content) - place :]
    return bytes(content)


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_are_their_sound_or_one_line(tmp_path, kind, capfd):
    path = tmp_path / "a.wav"
    path.write_bytes(FUZZED[kind])
    truth = audio.load(path)
    outcomes = []

    @seed(0)
    @settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        content = damaged(FUZZED[kind], data.draw)
        path.write_bytes(content)
        results = []
        for filling in (0.5, -0.25):
            np.full(20_000, filling, np.float32)  # what freed memory may hold
            try:
                results.append(audio.load(path))
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) < 300
                results.append(str(error))
        outcomes.append(type(results[0]))
        if isinstance(results[0], str):
            assert results[0] == results[1]
            return
        np.testing.assert_array_equal(results[0], results[1])
        assert np.isfinite(results[0]).all()
        if kind in ("flac", "ogg", "opus"):  # formats with checksums
            n = min(len(truth), len(results[0]))
            assert len(results[0]) in (len(truth), 2 * len(truth)) or content == FUZZED[kind]
            np.testing.assert_array_equal(results[0][:n], truth[:n])

    check()
    assert str in outcomes
