"""Every config file: its settings exist, it fits the hardware it names, and its sizes are the published ones."""
import runpy
import sys

import pytest
from conftest import ROOT

RANKS = {"diffucoder_7b": 80, "small": 1, "toy": 1, "toy_ar": 1}  # the others: a node of eight
PARAMETERS = {"8b": "8,250,462,208", "seed_coder_8b_ar": "8,250,462,208", "coda_1p7b": "1,720,574,976",
              "coda_1p7b_mid": "1,720,574,976", "diffucoder_7b": "7,615,616,512", "small": "125,854,464"}


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("config/*.py"))])
def test_a_config_is_planned_on_its_hardware(name, capsys, monkeypatch):
    more = ["--vocab_size=4096"] if name.startswith("toy") else []
    monkeypatch.setattr(sys, "argv", ["plan.py", f"config/{name}.py", f"--ranks={RANKS.get(name, 8)}", *more])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "plan.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "of gpu_memory=80" in printed  # it fits
    assert PARAMETERS.get(name, "parameters") in printed
