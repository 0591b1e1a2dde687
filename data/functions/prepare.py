"""Small functions from a grammar: signature and docstring, body, tests.

    python -m data.functions.prepare

Writes train.jsonl, val.jsonl, test.jsonl, hard.jsonl, hard_test.jsonl and meta.json. A line has
HumanEval's fields (task_id, prompt, canonical_solution, test, entry_point), MBPP's test_list, and
the family. The split is by meaning: a combination of parts that test.jsonl holds is in train.jsonl
in no wording, with no constant (grammar.py: is_held_out), and no function there behaves the same.
hard.jsonl and hard_test.jsonl compose three ideas where train.jsonl has two.

An item is drawn from (seed, split, index) alone. If nothing has changed since the last run, it does
nothing.

Not covered: running what a model wrote (sandbox.py); here only functions of the grammar run.
"""
if __name__ == "__main__":
    from configurator import begin
    begin()

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import Int, Mistake, Name, Seed, configure
from data.functions import grammar, named, parts
from data.functions.grammar import FAMILIES, HARD_FAMILIES
from data.functions.named import NAMED
from data.functions.parts import Used
from data.stdlib.prepare import is_unchanged
from files import write_json, write_text


@dataclass
class Config:
    out: Name = "data/functions"  # folder to write to
    seed: Seed = 1337  # of everything that is drawn
    train: Int(1, 10**6) = 40000  # items for training
    named: Int(0, 10**6) = 2400  # items more in train.jsonl, whose name says what to do (named.py)
    val: Int(1, 10**5) = 400  # items of the same combinations, for the loss
    test: Int(1, 10**4) = 400  # items of held-out combinations
    hard: Int(1, 10**5) = 1500  # items of three ideas, for reinforcement learning
    hard_test: Int(1, 10**4) = 300  # held-out combinations of three ideas


SPLITS = ("train", "val", "test", "hard", "hard_test")
PRODUCTS = [f"{split}.jsonl" for split in SPLITS]
NAMES = ("f", "g", "solve", "process", "task", "apply", "build", "get", "find", "answer")
RECURSIVE_NAMES = ("f",)  # the body repeats it: tiny models learn to copy it last
ARGUMENTS = {
    "numbers": ("numbers", "values", "items"), "words": ("words", "names", "items"),
    "text": ("text", "s", "line"), "word": ("w", "word", "s"), "table": ("table", "counts", "data"),
    "number": ("x", "n", "value"), "natural": ("n", "number"), "steps": ("n", "steps"),
}
ANNOTATIONS = {
    "numbers": (": list", ": list[int]"), "words": (": list", ": list[str]"), "text": (": str",),
    "word": (": str",), "table": (": dict", ": dict[str, int]"), "number": (": int",),
    "natural": (": int",), "steps": (": int",),
}
WORDS = ("", "a", "eye", "level", "noon", "stats", "SEAT", "TEA", "ABBA", "Tate", "tests", "apple",
         "eat", "at", "east", "sat", "steam", "tree", "elate", "as", "sees", "bus", "cab", "Alps",
         "sit", "go", "onto", "assets", "rotator", "Ease", "TT", "x", "hello", "trust", "beetle")
CHARACTERS = "aeiouAEIbstxyzBSTXZ019 !aeestt"


# --- inputs ---------------------------------------------------------------------------------------

class Draws:
    """Choices that are the same on every machine and version: random() of a seeded text."""

    def __init__(self, *key):
        self.random = random.Random("/".join(map(str, key))).random

    def below(self, n):
        return int(self.random() * n)

    def choose(self, options):
        return options[self.below(len(options))]

    def several(self, options, n, again=0.25):
        """n of the options; with the probability `again` one is followed by itself."""
        chosen = []
        for _ in range(n):
            repeat = chosen and self.random() < again
            chosen.append(chosen[-1] if repeat else self.choose(options))
        return chosen


def numbers_around(constants):
    """Numbers at which tests with these constants change, and some others."""
    near = [value for k in constants if isinstance(k, int) and k
            for value in (k - 1, k, k + 1, 2 * k, 3 * k, -k)]
    return 2 * near + [0, 1, -1, 2, -2, 3, 4, 5, -5, 6, 7, 8, -9, 12, 15, 30]


def draw_inputs(kind, constants, draws):
    """Arguments to test a function with, the edges first."""
    numbers = numbers_around(constants)
    if kind == "numbers":
        lists = [[], [draws.choose(numbers)], draws.several([-1, -2, -3, -6, -9], 4)]
        return lists + [draws.several(numbers, 5 + n) for n in range(7)]
    if kind == "words":
        return [[], [draws.choose(WORDS)]] + [draws.several(WORDS, 5 + n) for n in range(7)]
    if kind == "text":
        texts = ["", draws.choose(CHARACTERS), draws.choose(WORDS)]
        return texts + ["".join(draws.several(CHARACTERS, 9 + n)) for n in range(5)]
    if kind == "word":
        return distinct(["", draws.choose(CHARACTERS)] + draws.several(WORDS, 14, 0))
    if kind == "table":
        sizes = (0, 1, 5, 6, 7, 8, 9)
        return [dict(zip(draws.several(WORDS, n, 0), draws.several(numbers, n))) for n in sizes]
    if kind == "number":
        return distinct([0, -1] + draws.several(numbers, 14, 0))
    if kind == "natural":
        return [0, 1 + draws.below(9)] + [draws.below(10**n) for n in (2, 4, 5, 6, 7, 8)]
    return [0, 1, 2, 3, 4, 5, 6]  # steps


def distinct(values):
    return list(dict.fromkeys(values))


def probes_of(kind):
    """The inputs on which functions of one kind of argument are compared."""
    draws = Draws("probes", kind)
    if kind == "number":
        return list(range(-40, 80))
    if kind == "steps":
        return list(range(9))
    if kind == "word":
        return list(WORDS)
    constants = list(range(2, 10))
    return [value for _ in range(6) for value in draw_inputs(kind, constants, draws)]


PROBES = {kind: probes_of(kind) for kind in ARGUMENTS}


# --- meanings -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Meaning:
    """A family and what its slots hold."""
    family: grammar.Family
    used: tuple

    @property
    def combination(self):
        """The family's shape and the parts' names: what is held out, without the constants."""
        return (self.family.shape, *(part.name for part in self.used))

    @property
    def constants(self):
        return [part.constant for part in self.used]

    def source(self, name="NAME", argument="ARG"):
        """The function's body."""
        body = self.family.body(self.used)
        return body.replace("NAME", name).replace("ARG", argument)

    def function(self):
        """The function itself."""
        space = {}
        exec(f"def NAME(ARG):\n{self.source()}", space)
        return space["NAME"]

    def behavior(self):
        """See behavior_of."""
        return behavior_of(self.function(), self.family.kind)


def behavior_of(function, kind):
    """(kind of argument, hash of what it returns on the common probes), or None for a constant."""
    outputs = [comparable(function(probe)) for probe in PROBES[kind]]
    if len(set(outputs)) < 2:
        return None
    return kind, hashlib.sha256("\n".join(outputs).encode()).hexdigest()[:16]


def comparable(value):
    """A text that is equal for values that `==` calls equal."""
    if isinstance(value, dict):
        value = sorted(value.items())
    return repr(int(value) if isinstance(value, bool) else value)


def draw_meaning(families, held_out, draws):
    """A meaning with a combination that is held out, or one that is not."""
    family = draws.choose(families)
    while True:
        chosen = tuple(draws.choose(slot) for slot in family.slots)
        if grammar.is_sensible(chosen) and family.is_held_out(chosen) == held_out:
            return Meaning(family, tuple(Used(p, draws.choose(p.constants)) for p in chosen))


# --- items ----------------------------------------------------------------------------------------

def draw_item(seed, split, index):
    """(item, meaning) of one index of a split, before it is known whether it is kept."""
    draws = Draws(seed, split, index)
    families = HARD_FAMILIES if split.startswith("hard") else FAMILIES
    meaning = draw_meaning(families, split.endswith("test"), draws)
    kind = meaning.family.kind
    names = RECURSIVE_NAMES if meaning.family.name == "recursion" else NAMES
    name, argument = draws.choose(names), draws.choose(ARGUMENTS[kind])
    annotation = draws.choose(("", "", "", *ANNOTATIONS[kind]))
    sentence = meaning.family.say(meaning.used, draws.choose)
    sentence = sentence.replace("ARG", argument)
    function = meaning.function()
    inputs = draw_inputs(kind, meaning.constants, draws)
    cases = [(repr(value), repr(function(value))) for value in inputs]
    example = ""
    if draws.below(12) == 0:
        example = shown_example(name, cases)
    prompt = f'def {name}({argument}{annotation}):\n    """{sentence}{example}"""\n'
    solution = meaning.source(name, argument)
    return as_item(prompt, solution, name, cases, meaning.family.name), meaning


def as_item(prompt, solution, name, cases, family):
    """A line of a split, without its task_id. cases: list of (input, output), texts."""
    checks = "".join(f"    assert candidate({given}) == {wanted}\n" for given, wanted in cases)
    return {"task_id": "", "prompt": prompt, "canonical_solution": solution,
            "test": f"def check(candidate):\n{checks}", "entry_point": name,
            "test_list": [f"assert {name}({given}) == {wanted}" for given, wanted in cases],
            "family": family}


def named_item(seed, index):
    """An item of named.py. Of three, two have a signature as their prompt, one a docstring too."""
    name, kind, sentence, body = NAMED[index % len(NAMED)]
    draws = Draws(seed, "named", index)
    argument = draws.choose(ARGUMENTS[kind])
    annotation = draws.choose(("", *ANNOTATIONS[kind]))
    function = named_function(body)
    cases = [(repr(value), repr(function(value))) for value in draw_inputs(kind, [], draws)]
    prompt = f"def {name}({argument}{annotation}):"
    docstring = f'\n    """{sentence.replace("ARG", argument)}"""\n'
    solution = body.replace("ARG", argument)
    if draws.below(3) == 0:
        prompt += docstring
    else:
        solution = docstring + solution
    return as_item(prompt, solution, name, cases, "named") | {"task_id": f"functions/named/{index}"}


def named_function(body):
    space = {}
    exec(f"def NAME(ARG):\n{body}", space)
    return space["NAME"]


def shown_example(name, cases):
    """' Example: f(3) == 9' of the shortest case that is no edge; '' where all are long."""
    lengths = [len(given) + len(wanted) for given, wanted in cases[1:]]
    given, wanted = cases[1 + lengths.index(min(lengths))]
    if min(lengths) > 16:
        return ""
    return f" Example: {name}({given}) == {wanted}"


class Splits:
    """The splits so far, and what is in them."""

    def __init__(self, seed):
        self.seed = seed
        self.behaviors = {}  # of every meaning that was drawn
        # behavior: the splits it is in; those of named.py are in training whatever is drawn
        self.seen = {behavior_of(named_function(body), kind): {"train"}
                     for _, kind, _, body in NAMED}
        self.prompts = set()

    def behavior(self, meaning):
        key = meaning.family.shape, meaning.used
        if key not in self.behaviors:
            self.behaviors[key] = meaning.behavior()
        return self.behaviors[key]

    def make(self, split, count):
        """(items, meanings) of a split: of the first indices that may be kept."""
        items, meanings, combinations, index = [], [], set(), 0
        unique = split.endswith("test")
        while len(items) < count:
            if index > 100 * count + 1000:
                raise Mistake(f"{split}={count} is more than the grammar has: {len(items)}")
            item, meaning = draw_item(self.seed, split, index)
            index += 1
            if item["prompt"] in self.prompts or unique and meaning.combination in combinations:
                continue
            behavior = self.behavior(meaning)
            others = self.seen.get(behavior, set()) - {split}
            if behavior is None or others - {"train", "val"} or others and split != "val":
                continue
            if unique and split in self.seen.get(behavior, ()):
                continue
            item["task_id"] = f"functions/{split}/{len(items)}"
            items.append(item)
            meanings.append(meaning)
            combinations.add(meaning.combination)
            self.prompts.add(item["prompt"])
            self.seen.setdefault(behavior, set()).add(split)
        return items, meanings


# --- writing --------------------------------------------------------------------------------------

def held_out_combinations():
    """The combinations of FAMILIES that only test.jsonl may hold, as lists of names."""
    return [[family.shape, *(part.name for part in chosen)] for family in FAMILIES
            for chosen in family.combinations() if family.is_held_out(chosen)]


def fingerprint_of(cfg):
    """A hash of the settings and of the files that decide what is written."""
    digest = hashlib.sha256(repr(asdict(cfg)).encode())
    for path in (parts.__file__, grammar.__file__, named.__file__, __file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def main(argv=None):
    cfg, _ = configure(Config, argv)
    out = Path(cfg.out)
    fingerprint = fingerprint_of(cfg)
    if is_unchanged(out, PRODUCTS, fingerprint):
        print(f"{out}: nothing to do")
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)  # from here on an interrupted run is unfinished
    splits, meta = Splits(cfg.seed), asdict(cfg) | {"fingerprint": fingerprint, "splits": {}}
    for split in SPLITS:
        items, meanings = splits.make(split, getattr(cfg, split))
        if split == "train":
            items += [named_item(cfg.seed, index) for index in range(cfg.named)]
        combinations = {meaning.combination for meaning in meanings}
        text = "".join(json.dumps(item) + "\n" for item in items)
        write_text(out / f"{split}.jsonl", text)
        behaviors = sum(split in where for where in splits.seen.values())
        meta["splits"][split] = {
            "items": len(items), "combinations": len(combinations), "behaviors": behaviors,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "families": dict(sorted(Counter(item["family"] for item in items).items()))}
        print(f"{out}: {split} {len(items):,} items, {len(combinations):,} combinations, "
              f"{behaviors:,} behaviors")
    meta["behaviors"] = len(splits.seen)
    meta["held_out"] = held_out_combinations()
    write_json(out / "meta.json", meta)


if __name__ == "__main__":
    main()
