"""training/stages.py: what a stage was begun with, what has changed since, and that the advice given helps.

The stages here train nothing: they write what they were given. tests/test_train.py has the true ones."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from files import write_json, write_jsonl
from run import Run
from training import stages
from training.stages import SOUND, Stage, check_unchanged, run_stage


@dataclass
class Part:
    lr: float = 0.1
    mix: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    save_every: int = 5


@dataclass
class Config:
    seed: int = 0
    name: str = "x"
    sound: Part = field(default_factory=Part)
    text: Part = field(default_factory=Part)
    talk: Part = field(default_factory=Part)


class Killed(BaseException):
    pass


def work(name: str):
    def train(run: Run, config: Config):
        part = getattr(config, name)
        if "bad" in part.mix:
            raise ValueError(f"{name}.mix: there is no kind 'bad'")
        (run.state(name) / "state.safetensors").write_text(str(part.lr))
        if "killed" in config.name:
            raise Killed
        made = run.out / f"{name}.txt"
        made.write_text(f"{config.seed} {part.lr} {run.manifest.read_text()}")

    return train


def row(work, after, *sections, **more) -> Stage:
    return Stage("", "", "", "", "", work, after, sections, **more)


def read_corpus(run: Run, config: Config):
    for path in run.corpus.iterdir():
        shutil.copy(path, run.out)


TABLE = {
    "corpus": row(read_corpus, ()),
    "sound": row(work("sound"), ("corpus",), "sound", fields=lambda config: SOUND),
    "text": row(work("text"), ("corpus",), "text"),
    "talk": row(work("talk"), ("sound", "text"), "talk"),
}
ROWS = [{"id": "a", "wav": "a.wav", "speaker": 0, "split": "train", "seconds": 1.0, "text": "One."}]


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus/manifest.jsonl", ROWS)
    return Run(tmp_path / "out", tmp_path / "corpus", 0, torch.device("cpu"))


def go(run: Run, config: Config, *names: str):
    for name in names or TABLE:
        run_stage(TABLE, name, run, config)


def refused(run: Run, config: Config, *names: str) -> str:
    with pytest.raises(ValueError) as problem:
        go(run, config, *names)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def follow(run: Run, config: Config):
    """Does what the messages say until the run finishes, and returns how many there were."""
    for number in range(9):
        try:
            go(run, config)
            return number
        except ValueError as problem:
            folder, more = re.search(
                r"delete (\S+?) to begin anew(?:, and (.*) beside it)?", str(problem)
            ).groups()
            for name in [Path(folder).name, *(more.split(", ") if more else [])]:
                shutil.rmtree(run.state(name))
    raise AssertionError("the advice does not help")


def test_stages_run_once_and_a_finished_one_leaves_no_state(run, capsys):
    (run.state("sound") / "normalize").mkdir(parents=True)
    (run.state("sound") / "normalize/state.safetensors").write_text("")
    go(run, Config())
    assert "finished before" not in capsys.readouterr().out
    assert not [*run.out.rglob("state*.safetensors")]
    (run.out / "talk.txt").unlink()
    go(run, Config())
    assert capsys.readouterr().out.count("finished before") == 4 and not (run.out / "talk.txt").exists()


def test_a_refused_setting_binds_nobody(run):
    said = refused(run, Config(sound=Part(mix={"bad": 1.0})))
    assert "no kind 'bad'" in said
    go(run, Config(sound=Part(mix={"b": 1.0})))  # the corrected config
    assert (run.out / "talk.txt").exists()


def test_settings_of_what_was_begun_are_kept_and_nothing_is_lost(run):
    go(run, Config(), "corpus")
    with pytest.raises(Killed):
        go(run, Config(name="killed"), "sound")
    saved = (run.state("sound") / "state.safetensors").read_bytes()
    for changed, said in [
        (Config(sound=Part(lr=0.2)), "[sound] lr = 0.1, now it is 0.2"),
        (Config(sound=Part(mix={"a": 1.0, "b": 2.0})), "[sound] mix.b = None, now it is 2.0"),
        (Config(seed=5), "stage corpus was begun with seed = 0, now it is 5"),
    ]:
        assert said in refused(run, changed, "corpus", "sound") or said in refused(run, changed, "sound")
        assert (run.state("sound") / "state.safetensors").read_bytes() == saved
    go(run, Config(sound=Part(save_every=9)), "sound")


def test_every_stage_has_the_seed_in_its_record(run):
    go(run, Config())
    for name in TABLE:
        assert "was begun with seed = 0, now it is 5" in refused(run, Config(seed=5), name)
    follow(run, Config(seed=5))
    for name in ("sound", "text", "talk"):
        assert (run.out / f"{name}.txt").read_text().startswith("5 ")


def test_the_advice_for_a_changed_setting_helps(run):
    go(run, Config())
    changed = Config(sound=Part(lr=0.7))
    said = refused(run, changed)
    assert f"delete {run.state('sound')} to begin anew, and talk beside it" in said
    assert follow(run, changed) == 1  # once is enough
    assert (run.out / "sound.txt").read_text().startswith("0 0.7")


def test_a_stage_made_anew_is_noticed_by_those_after_it(run):
    go(run, Config())
    shutil.rmtree(run.state("text"))
    assert "stage talk was begun before stage text was made anew" in refused(run, Config())
    assert follow(run, Config()) == 1


def test_a_changed_corpus_is_read_again_and_told(run, capsys):
    go(run, Config())
    capsys.readouterr()
    write_jsonl(run.corpus / "manifest.jsonl", [*ROWS, ROWS[0] | {"id": "b"}])
    said = refused(run, Config())
    assert "has changed since and is read again" in capsys.readouterr().out
    assert "stage sound was begun with other recordings or texts" in said
    assert "and text, talk beside it" in said
    assert follow(run, Config()) == 1  # all of them are named at once
    for name in ("sound", "text", "talk"):
        assert '"b"' in (run.out / f"{name}.txt").read_text()


def test_a_text_that_is_mended_does_not_concern_those_who_only_listen(run):
    go(run, Config())
    write_jsonl(run.corpus / "manifest.jsonl", [ROWS[0] | {"text": "Two."}])
    assert "stage text was begun with other" in refused(run, Config())
    write_jsonl(run.corpus / "manifest.jsonl", ROWS)
    go(run, Config())
    write_jsonl(run.corpus / "dialogues.jsonl", [{"question": "?", "answer": "!"}])
    assert "stage text was begun with other" in refused(run, Config())
    assert follow(run, Config()) == 1


def test_a_stage_may_depend_on_one_key_of_a_section(run):
    table = TABLE | {"text": row(work("text"), ("corpus",), "text", "sound.lr")}
    go(run, Config(), "corpus", "text")
    shutil.rmtree(run.state("text"))
    run_stage(table, "text", run, Config())
    check_unchanged(table, "text", run, Config(sound=Part(mix={"b": 2.0})))
    (run.state("text") / "state.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"begun with sound.lr = 0.1, now it is 0.2; put the old value back"):
        check_unchanged(table, "text", run, Config(sound=Part(lr=0.2)))


def test_a_record_of_an_older_version_goes_on(run):
    go(run, Config(), "corpus")
    with pytest.raises(Killed):
        go(run, Config(name="killed"), "sound")
    path = run.state("sound") / "config.json"
    write_json(path, {"sections": {"sound": {"lr": 0.1, "gone": 3}}, "after": {"corpus": 1.5}})
    go(run, Config(), "sound")
    (run.state("sound") / "done.json").unlink()
    (run.state("sound") / "state.safetensors").write_text("")
    write_json(path, {"sections": {"sound": {"lr": 0.3}}, "after": {}})
    assert "[sound] lr = 0.3, now it is 0.1" in refused(run, Config(), "sound")


DAMAGED = [b"", b"[]", b"{", b"7", b"null", b'{"a": 1}', b'{"sections": 1, "after": {}}', b"\xff", b"[" * 999,
           b'{"sections": {"sound": 7}, "after": {}}', b'{"sections": {"sound": {"lr": "a"}}, "after": {}}',
           b'{"sections": {"sound": {"lr": NaN}}, "after": {}}', b'{"sections": {"seed": {}}, "after": {}}',
           b'{"sections": {"sound": {"mix": [1]}}, "after": {}}', b'{"sections": {}, "after": {"text": 5}}',
           b'{"sections": {"sound": {"lr": 1' + b"0" * 400 + b'}}, "after": {}}']  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_records_and_marks_are_one_line(run, damaged):
    go(run, Config())
    for file, fine in (("config.json", 14), ("done.json", None)):
        path = run.state("sound") / file
        before = path.read_bytes()
        path.write_bytes(damaged)
        if file == "config.json" and damaged == DAMAGED[fine]:
            go(run, Config(), "sound")  # of an older version: it knows less
        else:
            said = refused(run, Config(), "sound", "talk")
            assert said.isprintable() and f"delete {run.state('sound')} to begin anew" in said
        path.write_bytes(before)
    for when in (True, -1, "5", None, [], float("inf")):
        (run.state("sound") / "done.json").write_text(json.dumps({"finished": when}))
        assert "must be a time; delete" in refused(run, Config(), "talk")


def test_before_the_first_stage_only_settings_are_compared(run):
    go(run, Config())
    write_jsonl(run.corpus / "manifest.jsonl", [*ROWS, ROWS[0] | {"id": "b"}])
    check_unchanged(TABLE, "talk", run, Config(), settings_alone=True)
    with pytest.raises(ValueError, match="lr = 0.1, now it is 0.2"):
        check_unchanged(TABLE, "talk", run, Config(talk=Part(lr=0.2)), settings_alone=True)
    assert stages.followers(TABLE, "text") == ["talk"]


def test_a_stage_without_anything_to_do_says_so(run, capsys):
    table = TABLE | {"talk": row(work("talk"), ("sound", "text"), "talk", skip=lambda config: True)}
    run_stage(table, "talk", run, Config())
    assert capsys.readouterr().out == "stage talk: nothing to do with these settings\n"
    assert not run.state("talk").exists()
