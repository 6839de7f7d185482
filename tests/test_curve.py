"""evaluation/curve.py: a curve from reports, or one line that says why there is none."""

import json

import pytest

from evaluation import curve


def write_report(folder, speakers, value, keys=tuple(curve.ROWS)):
    rows = [{"key": key, "value": value, "low": value - 0.05, "high": value + 0.05} for key in keys]
    folder.mkdir()
    about = {"speakers": speakers} if speakers else {}
    (folder / "report.json").write_text(json.dumps({"about": about, "rows": rows, "examples": []}))
    return folder


def test_a_curve_has_a_point_for_each_report_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    reports = [write_report(tmp_path / str(n), n, 1 / n) for n in (16, 5)]
    monkeypatch.setattr("sys.argv", ["curve", *map(str, reports), "--out", str(tmp_path / "out/curve")])
    curve.main()
    text = (tmp_path / "out/curve.md").read_text()
    assert text.index("| 5 | 20.0 % (15.0 to 25.0) |") < text.index("| 16 | 6.2 % (1.2 to 11.2) |")
    assert text in capsys.readouterr().out
    assert (tmp_path / "out/curve.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("speakers", "keys", "why"),
    [(0, tuple(curve.ROWS), "no number of speakers"), (3, ("asr.unseen",), "no unseen voices")],
)
def test_a_report_without_voices_is_one_line(tmp_path, speakers, keys, why):
    report = write_report(tmp_path / "report", speakers, 0.5, keys)
    with pytest.raises(ValueError, match=why) as error:
        curve.read_point(report)
    assert "\n" not in str(error.value)
    (report / "report.json").write_text("[]")
    with pytest.raises(ValueError, match="no report"):
        curve.read_point(report)
