"""data/functions: meanings are split cleanly, references are right, tests are strong."""
import ast
import copy
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from data.functions import prepare
from data.functions.grammar import FAMILIES, HARD_FAMILIES
from data.functions.named import NAMED
from data.functions.prepare import PROBES, SPLITS, Config, Splits, draw_item, named_item
from sandbox import Program, Sandbox

COUNTS = {"train": 4000, "val": 100, "test": 300, "hard": 1000, "hard_test": 200}


@pytest.fixture(scope="module")
def drawn():
    """A smaller draw: {split: (items, meanings)}."""
    splits = Splits(Config.seed)
    return {split: splits.make(split, COUNTS[split]) for split in SPLITS}


def everything(drawn, step=1):
    """(item, meaning) of all splits, or of each `step`-th."""
    for items, meanings in drawn.values():
        yield from list(zip(items, meanings))[::step]


def function_of(code, name):
    space = {}
    exec(code, space)
    return space[name]


def reference(item):
    return function_of(item["prompt"] + item["canonical_solution"], item["entry_point"])


def cases_of(item):
    """(argument, expected value) of each assert, as values."""
    for case in item["test_list"]:
        comparison = ast.parse(case).body[0].test
        given, wanted = comparison.left.args[0], comparison.comparators[0]
        yield ast.literal_eval(given), ast.literal_eval(wanted)


# --- items ----------------------------------------------------------------------------------------

def test_the_fields_of_an_item(drawn):
    fields = ["task_id", "prompt", "canonical_solution", "test", "entry_point", "test_list",
              "family"]
    for split, (items, meanings) in drawn.items():
        assert len(items) == len(meanings) == COUNTS[split]
        for n, item in enumerate(items):
            assert list(item) == fields
            assert item["task_id"] == f"functions/{split}/{n}"
            assert item["prompt"].startswith(f"def {item['entry_point']}(")
            assert item["prompt"].endswith('"""\n')
            assert item["canonical_solution"].startswith("    ")
            assert item["canonical_solution"].endswith("\n")
            assert len(item["test_list"]) >= 5


def test_no_placeholder_is_left(drawn):
    left = {"NOUN", "NP", "VP", "EP", "SP", "AP", "BP", "IT", "ONE", "ARG", "NAME", "VALUE", "TEST",
            "SOURCE", "ITEMS", "STOP", "REST", "X", "K"}
    for item, _ in everything(drawn):
        tree = ast.parse(item["prompt"] + item["canonical_solution"])
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & left
        sentence = item["prompt"].partition('"""')[2].partition(" Example: ")[0]
        assert not set(sentence.replace("'", " ").split()) & left


def test_no_name_stands_for_two_things(drawn):
    """A local variable never has the name of the argument or of the function."""
    for item, _ in everything(drawn):
        tree = ast.parse(item["prompt"] + item["canonical_solution"])
        stored = {node.id for node in ast.walk(tree)
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not stored & {item["entry_point"], tree.body[0].args.args[0].arg}


def test_references_pass_both_kinds_of_tests(drawn):
    for item, _ in everything(drawn, 3):
        function = reference(item)
        for given, wanted in cases_of(item):
            got = function(copy.deepcopy(given))
            assert got == wanted and type(got) is type(wanted)
        space = {}
        exec(item["test"], space)
        space["check"](function)


def test_references_pass_in_the_sandbox(drawn):
    items = [item for item, _ in everything(drawn, 40)]
    programs = [Program(item["prompt"] + item["canonical_solution"], item["entry_point"],
                        tests=tuple(item["test_list"])) for item in items]
    with Sandbox(workers=1, seconds=20, unsafe_execution=True) as sandbox:  # from the grammar
        verdicts = list(sandbox.judge(programs))
    assert [v.detail for v in verdicts if v.status != "passed"] == []
    assert all(all(v.cases) and len(v.cases) >= 5 for v in verdicts)


def test_examples_in_prompts_are_true(drawn):
    shown = 0
    for item, _ in everything(drawn):
        _, found, example = item["prompt"].partition(" Example: ")
        if found:
            assert eval(example.partition('"""')[0], {item["entry_point"]: reference(item)})
            shown += 1
    assert shown > 100


def test_edges_are_tested(drawn):
    for item, _ in everything(drawn):
        arguments = [given for given, _ in cases_of(item)]
        assert arguments[0] in ([], "", {}, 0)
        if isinstance(arguments[0], list):
            assert len(arguments[1]) == 1
            assert any(len(set(x)) < len(x) for x in arguments)  # duplicates


# --- splits ---------------------------------------------------------------------------------------

def test_no_prompt_is_in_two_splits(drawn):
    prompts = Counter(item["prompt"] for item, _ in everything(drawn))
    assert max(prompts.values()) == 1


def places_of(meaning):
    """A combination's places by the names of its parts."""
    names = [[part.name for part in slot] for slot in meaning.family.slots]
    assert all(len(set(slot)) == len(slot) for slot in names)
    return [slot.index(used.name) for slot, used in zip(names, meaning.used)]


def test_combinations_are_held_out_by_the_rule(drawn):
    for split, (_, meanings) in drawn.items():
        for meaning in meanings:
            total = sum((n + 1) * place for n, place in enumerate(places_of(meaning)))
            assert (total % 7 == 3) == split.endswith("test")


def test_combinations_of_a_test_split_are_distinct(drawn):
    for split, least in (("test", 300), ("hard_test", 200)):
        assert len({meaning.combination for meaning in drawn[split][1]}) == least


def test_every_part_is_learned_in_other_combinations(drawn):
    """What a held-out combination has in some slot, training has in that slot of that family."""
    for family in FAMILIES:
        shown = [parts for parts in family.combinations() if not family.is_held_out(parts)]
        for parts in filter(family.is_held_out, family.combinations()):
            for slot, part in enumerate(parts):
                assert any(other[slot] == part for other in shown)
    used = {used.part for meaning in drawn["train"][1] for used in meaning.used}
    needed = {part for family in FAMILIES + HARD_FAMILIES for slot in family.slots for part in slot}
    assert used == needed


def behavior(item, meaning):
    """What the item's own text returns on the common probes; True and 1 are equal, as in assert."""
    function = reference(item)
    return [function(copy.deepcopy(probe)) for probe in PROBES[meaning.family.kind]]


def test_held_out_functions_behave_like_no_others(drawn):
    """test, hard and hard_test: against each other, train and val, by == of values."""
    groups = {}
    for split, (items, meanings) in drawn.items():
        for item, meaning in zip(items, meanings):
            outputs = behavior(item, meaning)
            key = (meaning.family.kind, repr(outputs).replace("True", "1").replace("False", "0"))
            groups.setdefault(key, set()).add(split)
    assert len(groups) >= 1000
    for splits in groups.values():
        assert len(splits) == 1 or splits == {"train", "val"}


def test_no_function_ignores_its_argument(drawn):
    for item, meaning in everything(drawn, 5):
        outputs = behavior(item, meaning)
        assert any(value != outputs[0] for value in outputs)


# --- functions with a name ------------------------------------------------------------------------

def test_named_functions_pass_their_tests_and_are_in_no_other_split(drawn):
    items = [named_item(1337, n) for n in range(6 * len(NAMED))]
    prompts = {item["prompt"] for split in SPLITS for item in drawn[split][0]}
    for item in items:
        function = reference(item)
        assert len(item["test_list"]) >= 5 and item["prompt"] not in prompts
        for given, wanted in cases_of(item):
            assert function(given) == wanted
    ends = Counter(item["prompt"][-1] for item in items)
    assert set(ends) == {":", "\n"} and ends[":"] > ends["\n"] > 60  # without a docstring, with
    assert len({item["entry_point"] for item in items}) == len(NAMED)
    known = {prepare.behavior_of(prepare.named_function(body), kind) for _, kind, _, body in NAMED}
    assert None not in known
    for split in SPLITS[2:]:
        assert not known & {meaning.behavior() for meaning in drawn[split][1]}


# --- draws ----------------------------------------------------------------------------------------

def test_an_item_depends_on_seed_split_and_index_alone():
    alone = draw_item(1, "train", 7)
    draw_item(2, "hard", 3)
    assert draw_item(1, "train", 7) == alone
    different = [draw_item(*key)[0]["prompt"] for key in
                 ((1, "train", 7), (2, "train", 7), (1, "val", 7), (1, "train", 8))]
    assert len(set(different)) == 4


def test_every_machine_draws_the_same():
    items = [draw_item(1337, split, n)[0] for split in SPLITS for n in range(40)]
    assert hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16] == "f06d6c45bd5c1784"


def run_script(out, *settings):
    command = [sys.executable, "-m", "data.functions.prepare", f"--out={out}", "--train=50",
               "--named=7", "--val=5", "--test=9", "--hard=9", "--hard_test=9", *settings]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONHASHSEED": str(len(settings))})
    return ran.returncode, ran.stdout, ran.stderr


def test_the_script(tmp_path):
    """It writes all files, does nothing the second time, and mends what is missing."""
    out = tmp_path / "functions"
    assert run_script(out)[0] == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == sorted([f"{split}.jsonl" for split in SPLITS] + ["meta.json"])
    meta = json.loads(first["meta.json"])
    for split in SPLITS:
        lines = first[f"{split}.jsonl"].splitlines()
        named = meta["named"] if split == "train" else 0
        assert len(lines) == meta["splits"][split]["items"] == meta[split] + named
        digest = hashlib.sha256(first[f"{split}.jsonl"]).hexdigest()
        assert digest == meta["splits"][split]["sha256"]
    held_out = {tuple(names) for names in meta["held_out"]}
    assert len(held_out) > 500
    assert "nothing to do" in run_script(out)[1]
    (out / "test.jsonl").unlink()
    assert run_script(out, "--seed=1337")[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_too_many_items_are_refused(monkeypatch):
    few = tuple(family for family in FAMILIES if family.shape == "digits")
    monkeypatch.setattr(prepare, "FAMILIES", few)
    with pytest.raises(prepare.Mistake, match="test=30 is more than the grammar has: "):
        Splits(1).make("test", 30)


# --- the tests of an item are strong --------------------------------------------------------------

SWAPPED = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
           ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
           ast.And: ast.Or}
OFF_BY_ONE = {ast.Lt: ast.LtE, ast.Gt: ast.GtE}
RENAMED = {"max": "min", "min": "max", "any": "all", "all": "any", "upper": "lower",
           "lower": "upper", "startswith": "endswith", "endswith": "startswith",
           "isupper": "islower", "islower": "isupper", "isdigit": "isalpha", "isalpha": "isdigit"}


def changes_of(node, names):
    """What could stand in place of an expression: nodes."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield from (ast.Constant(node.value - 1), ast.Constant(node.value + 1))
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and type(node.value) is str:
        yield ast.Constant(node.value + "o")
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        yield from (ast.Name(name, ast.Load()) for name in sorted(names - {node.id}))
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Name) and node.id in RENAMED:
        yield ast.Name(RENAMED[node.id], ast.Load())
    if isinstance(node, ast.Attribute) and node.attr in RENAMED:
        yield ast.Attribute(node.value, RENAMED[node.attr], ast.Load())
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    for table in (SWAPPED, OFF_BY_ONE):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in table:
            yield ast.Compare(node.left, [table[type(node.ops[0])]()], node.comparators)
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        changed = copy.deepcopy(node)
        changed.op = SWAPPED[type(node.op)]()
        yield changed


def changes_of_statement(node):
    """What could stand in place of a statement or a comprehension's `for`."""
    changed = copy.deepcopy(node)
    if isinstance(node, ast.If):
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    if isinstance(node, ast.AugAssign):
        changed.op = SWAPPED[type(node.op)]()
        yield changed
    if isinstance(node, ast.Break):
        yield ast.Continue()
    if isinstance(node, ast.comprehension) and node.ifs:
        changed.ifs = []
        yield changed


def mutants_of(item):
    """Source of functions that differ from the reference in one place."""
    tree = ast.parse(item["prompt"] + item["canonical_solution"])
    function = tree.body[0]
    names = {node.id for node in ast.walk(function)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names.add(function.args.args[0].arg)
    for node in [inner for statement in function.body[1:] for inner in ast.walk(statement)]:
        for new in [*changes_of(node, names), *changes_of_statement(node)]:
            mutated = copy.deepcopy(tree, {id(node): new})  # the copy holds `new` in its place
            yield ast.unparse(ast.fix_missing_locations(mutated))


STEPS = 20_000  # lines a mutant may run for one argument: the references take below 200
BITS = 2_000  # of a mutant's numbers: `result *= result` grows without end


def outcome(function, argument):
    """repr of what it returns, or 'failed': an exception, an endless loop or a huge number."""
    left = STEPS

    def watch(frame, *_):
        nonlocal left
        left -= 1
        numbers = [x for x in frame.f_locals.values() if type(x) is int]
        if left < 0 or any(x.bit_length() > BITS for x in numbers):
            raise TimeoutError
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        value = function(copy.deepcopy(argument))
    except Exception:
        return "failed"
    finally:
        sys.settrace(before)
    return repr(value)


def killed(code, item, meaning):
    """Whether the item's tests fail a mutant; None where it behaves as the reference."""
    right, mutant = reference(item), function_of(code, item["entry_point"])
    for argument, wanted in cases_of(item):
        if outcome(mutant, argument) != repr(wanted):
            return True
    for probe in PROBES[meaning.family.kind]:
        if outcome(mutant, probe) != repr(right(copy.deepcopy(probe))):
            return False
    return None


@pytest.mark.parametrize("split", ["train", "test", "hard_test"])
def test_mutants_fail(drawn, split):
    """At least 95 % of those that behave differently on the common probes."""
    verdicts, survivors = Counter(), []
    for item, meaning in list(zip(*drawn[split]))[:60]:
        for code in mutants_of(item):
            verdict = killed(code, item, meaning)
            verdicts[verdict] += 1
            if verdict is False:
                survivors.append(code)
    print(split, dict(verdicts))
    assert verdicts[True] > 500
    share = verdicts[True] / (verdicts[True] + verdicts[False])
    assert share >= 0.95, "\n".join(survivors)
