"""experiments/ar_ness.py: its prompts, its table, and what it says of input that cannot be used."""
import random
import re

import pytest
from reference import write_tiny_run

from configurator import Mistake
from experiments import ar_ness


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_folder):
    """A run of a block model, K = 4, that never ends a text."""
    return write_tiny_run(tmp_path_factory.mktemp("run"), data_folder).parent


def measured(run, out, *settings):
    """The tables that a run gives: {"local" or "global": {label: [shares]}}."""
    ar_ness.main([f"--init_from={run}", f"--out={out}", "--device=cpu", "--samples=1",
                  "--max_new_tokens=14", *settings])
    tables, kind = {}, None
    for line in (out / "ar_ness.md").read_text().splitlines():
        head = re.match(r"\| (local|global) AR-ness", line)
        if head:
            kind = tables.setdefault(head[1], {})
        elif line.startswith("| "):
            label, *shares = [cell.strip() for cell in line.strip("|").split("|")]
            kind[label] = list(map(float, shares))
    assert (out / "ar_ness.png").read_bytes().startswith(b"\x89PNG")
    return tables


def test_left_to_right_scores_one_at_every_temperature(run, tmp_path):
    tables = measured(run, tmp_path / "out", "--confidence=left_to_right", "--temperatures=[0, 1]")
    for kind in ("local", "global"):
        assert list(tables[kind]) == ["temperature 0", "temperature 1", "random inside blocks of 4"]
        for label in ("temperature 0", "temperature 1"):
            assert tables[kind][label] == [1.0] * 8
        assert tables[kind]["random inside blocks of 4"][0] < 0.9


def test_a_random_order_scores_what_the_table_has_for_it(run, tmp_path):
    """300 texts of about 14 tokens in blocks of 4. A text's global@1 has a standard deviation of
    0.12 (twelve steps, p near 1/2), the mean of 300 one of 0.008: 0.05 is six of them."""
    (tmp_path / "prompts").write_text("x\n" * 300)
    tables = measured(run, tmp_path / "out", "--confidence=random", "--temperatures=[0]",
                      f"--prompts={tmp_path / 'prompts'}", "--batch=100")
    for kind in ("local", "global"):
        found, expected = tables[kind]["temperature 0"], tables[kind]["random inside blocks of 4"]
        assert found[0] == pytest.approx(expected[0], abs=0.05)


@pytest.mark.parametrize("L, block", [(10, 4), (7, 7), (5, 1), (3, 8)])
def test_random_orders_stay_in_their_blocks(L, block):
    state = random.getstate()
    orders = ar_ness.random_orders(L, block)
    assert random.getstate() == state  # nobody else's stream is touched
    for order in orders[:50]:
        assert sorted(order) == list(range(L))
        assert [p // block for p in order] == sorted(p // block for p in order)
    assert (orders[0] == orders[1] == orders[2]) == (block == 1)


@pytest.mark.parametrize("setting, words", [
    ("--temperatures=[]", "is empty"),
    ("--temperatures=[-1]", "temperatures=-1 does not fit"),
    ("--temperatures=['a']", "temperatures='a' does not fit"),
    ("--prompts=none/there", "is missing"),
])
def test_settings_that_cannot_be_used(run, tmp_path, setting, words):
    with pytest.raises(Mistake, match=re.escape(words)):
        measured(run, tmp_path / "out", setting)
    assert not (tmp_path / "out").exists()


def test_a_prompt_longer_than_the_context(run, tmp_path):
    (tmp_path / "file").write_text("x = 1; " * 100)
    with pytest.raises(Mistake, match="the model's context is 64: shorten it"):
        measured(run, tmp_path / "out", f"--prompts={tmp_path / 'file'}")
