"""weights/halve.py: the shipped model is the trained one, in half precision."""

import importlib.util
import json

import pytest
import test_llama
import torch
from runs import ROOT

from checkpoint import read_tensors
from llama import Llama

spec = importlib.util.spec_from_file_location("halve", ROOT / "weights/halve.py")
halve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(halve)


def test_what_is_shipped_stays_as_it_is_when_it_is_halved_again(tmp_path):
    halve.halve(ROOT / "weights/tiny", tmp_path)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in paths} == set(halve.PARTS)
    for path in paths:
        shipped = ROOT / "weights/tiny" / path.relative_to(tmp_path)
        if path.suffix == ".safetensors":
            now, before = read_tensors(path), read_tensors(shipped)
            assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
        elif path.name == "config.json":
            assert json.loads(path.read_text()) == json.loads(shipped.read_text())
        else:
            assert path.read_bytes() == shipped.read_bytes()


def test_a_model_in_half_precision_is_half_as_large_and_says_so(tmp_path):
    model = test_llama.make()
    model.save_pretrained(tmp_path / "model/llama")
    (tmp_path / "model/text_to_unit").mkdir()
    (tmp_path / "model/text_to_unit/more.txt").write_text("not for talking")
    halve.halve(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["llama"]
    sizes = [(tmp_path / name / "llama/model.safetensors").stat().st_size for name in ("model", "out")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    loaded = Llama.from_pretrained(tmp_path / "out/llama")
    for one, other in zip(loaded.parameters(), model.parameters()):
        assert torch.equal(one, other.half().float())
    assert json.loads((tmp_path / "out/llama/config.json").read_text())["torch_dtype"] == "float16"


def test_a_model_is_not_halved_onto_itself(tmp_path):
    test_llama.make().save_pretrained(tmp_path / "llama")
    before = (tmp_path / "llama/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the model itself"):
        halve.halve(tmp_path, tmp_path)
    assert (tmp_path / "llama/model.safetensors").read_bytes() == before


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no trained model: it has no llama/"):
        halve.halve(tmp_path, tmp_path / "out")
