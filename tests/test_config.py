"""Every config file: its settings exist, it fits the hardware it names, its sizes are published."""
import ast
import re

import pytest
from conftest import ROOT

import rl
import train
from configurator import configure

NAMES = sorted(path.stem for path in ROOT.glob("config/*.py"))
CONFIGS = [name for name in NAMES if not name.endswith("_rl")]
RANKS = {"diffucoder_7b": 80, "small": 1, "toy": 1, "toy_ar": 1}  # the others: a node of eight
PARAMETERS = {"8b": "8,250,462,208", "seed_coder_8b_ar": "8,250,462,208",
              "coda_1p7b": "1,720,574,976", "coda_1p7b_mid": "1,720,574,976",
              "diffucoder_7b": "7,615,616,512", "small": "125,854,464"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_planned_on_its_hardware(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [f"config/{name}.py", "--dry_run=true", f"--ranks={RANKS.get(name, 8)}"]
    if name.startswith("toy") or name == "box":
        words.append("--vocab_size=4096")
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    assert "of gpu_memory=80" in printed  # it fits
    assert PARAMETERS.get(name, "parameters") in printed


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_to_plan_it_and_names_settings_that_exist(name):
    text = ast.get_docstring(ast.parse((ROOT / "config" / f"{name}.py").read_text("utf-8")))
    assert f"python train.py config/{name}.py --dry_run=true" in text
    known = set(train.Config.__dataclass_fields__)
    for command in re.findall(r"train\.py ((?:[^`\n\\]|\\\n)*)", text):
        assert {key for key in re.findall(r"--(\w+)=", command)} <= known, command


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_rl")])
def test_a_config_of_rl_goes_together(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, _ = configure(rl.Config, [f"config/{name}.py"])
    rl.check(cfg)
    text = ast.get_docstring(ast.parse((ROOT / "config" / f"{name}.py").read_text("utf-8")))
    assert f"rl.py config/{name}.py" in text
