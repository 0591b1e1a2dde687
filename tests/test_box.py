"""The weights that come with the repository, assets/toy: a real trained model, small enough to test
with. What the README promises of them, and decoding on something that has learned.
"""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import huggingface
from decode import Decoding, completion, decode, generate, write

BOX = ROOT / "assets" / "toy"
# prompts and a call of what has to come out; all of these names are in the training data
KNOWN = {
    "def is_palindrome(s):": ["is_palindrome('abcba')", "not is_palindrome('abcb')"],
    "def count_vowels(text):": ["count_vowels('a diffusion') == 5"],
    "def factorial(n):": ["factorial(5) == 120", "factorial(0) == 1"],
    "def fibonacci(n):": ["fibonacci(10) == 55"],
    "def is_prime(n):": ["is_prime(97)", "not is_prime(91)", "not is_prime(1)"],
}


@pytest.fixture(scope="module")
def loaded():
    return huggingface.load(BOX)


def ids_of(tok, prompts):
    return [[tok.bos_id, *tok.encode(prompt)] for prompt in prompts]


def test_it_is_small_and_says_what_it_is():
    assert sum(path.stat().st_size for path in BOX.iterdir()) <= 6_000_000
    card = (BOX / "README.md").read_text()
    for word in ("PSF", "pass@1", "huggingface.py export out/box", "data.functions.prepare"):
        assert word in card


def test_the_readmes_first_example(tmp_path):
    """Where nothing was trained: sample.py in a folder of its own, without an out/."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    command = [sys.executable, "sample.py", "--prompt", "def is_palindrome(s):"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'def is_palindrome(s):\n    """' in done.stdout
    assert "return s == s[::-1]" in done.stdout


@pytest.mark.parametrize("how", [Decoding(), Decoding(verified=True), Decoding(threshold=0.9),
                                 Decoding(cache="none")])
def test_what_it_writes_works(loaded, how):
    model, tok, recipe = loaded
    for ids, prompt in zip(generate(model, tok, recipe, ids_of(tok, KNOWN), how, 80), KNOWN):
        names = {}
        exec(prompt + tok.decode(ids), names)  # our own weights: nobody else wrote this
        for check in KNOWN[prompt]:
            assert eval(check, names), check


def test_verified_is_left_to_right_in_half_the_forwards(loaded):
    """On a model that has learned: the same tokens, at least two in a forward."""
    model, tok, recipe = loaded
    prompts = ids_of(tok, KNOWN)
    plain = generate(model, tok, recipe, prompts, Decoding(confidence="left_to_right"), 80)
    tokens = forwards = 0
    for ids, expected in zip(prompts, plain):
        texts = [[*ids, *[None] * 80]]
        for step in decode(model, tok, recipe, texts, Decoding(verified=True)):
            write(texts, step)
            forwards += bool(step.taken.any())
        written = completion(texts[0][len(ids):], tok.stop_ids)
        assert written == expected
        tokens += len(written) + 1  # and <eos>
    assert tokens / forwards >= 2


def test_sampling_varies_and_greedy_does_not_depend_on_the_batch(loaded):
    model, tok, recipe = loaded
    prompts = ids_of(tok, KNOWN)
    together = generate(model, tok, recipe, prompts, Decoding(), 80)
    assert [generate(model, tok, recipe, [ids], Decoding(), 80)[0] for ids in prompts] == together
    hot = [generate(model, tok, recipe, prompts[:1], Decoding(temperature=5.0, seed=seed), 80)[0]
           for seed in range(4)]
    assert len(set(map(tuple, hot))) > 1


def test_it_is_bfloat16_and_loads_as_float32(loaded):
    assert json.loads((BOX / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model, _, recipe = loaded
    assert model.embed_tokens.weight.dtype == torch.float32
    assert (recipe.objective, recipe.block_size, recipe.shift) == ("block", 4, False)


@pytest.mark.slow
def test_pass_at_1_of_held_out_functions(tmp_path):
    """At least 97 % of 400: what the model card says is 99.8 %."""
    tasks = tmp_path / "functions"
    subprocess.run([sys.executable, "-m", "data.functions.prepare", f"--out={tasks}"], cwd=ROOT,
                   check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "evaluate.py", "passk", f"--init_from={BOX}",
                    f"--tasks={tasks}/test.jsonl", "--max_new_tokens=80", "--batch=100",
                    f"--out={tmp_path}/scores"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    assert report["scores"]["pass@1"] >= 0.97
