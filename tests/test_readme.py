"""What README.md and docs/ say exists: files, headings, functions, commands, their settings."""
import ast
import re
import shlex

import pytest
from conftest import ROOT

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
EQUATIONS = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def definitions(path):
    """The functions and classes at the top of a file: {name: node}."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    return {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def names_in(path):
    """All functions, classes and methods of a file: 'f', 'Class', 'Class.method'."""
    found = definitions(path)
    names = set(found)
    for name, node in found.items():
        names |= {f"{name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


def settings_of(path):
    """The settings of a script: the fields of its Config, or of evaluate.py's several, and of
    those that these extend, such as decode.Decoding. Without a Config: none."""
    own = definitions(path)
    found = dict(own)
    for other in ("decode.py", "evaluate.py", "estimators.py", "rewards.py"):
        found = definitions(other) | found
    classes = [own[name] for name in ("Config", "Likelihood", "PassK") if name in own]
    settings = set()
    while classes:
        config = classes.pop()
        settings |= {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)}
        classes += [found[base.id] for base in config.bases]
    return settings


def anchors_of(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


# --- commands: a line of a code block, or a span of code in the text, that starts a script --------

STARTERS = ("python", "bash", "torchrun")


def commands_in(text):
    """Every such command as a list of words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = re.findall(r"`([^`]+)`", prose)
    for block in blocks:
        lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        words = without_prefix(line)
        if words and words[0] in STARTERS:
            yield words


def without_prefix(line):
    """The words of a command, without a prompt and without VARIABLE=value before it."""
    if not any(re.search(rf"(^|\s){starter}\s", line) for starter in STARTERS):
        return []
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def split(words):
    """A command as (the path of its script, the words after that)."""
    if words[:2] == ["python", "-m"]:
        return words[2].replace(".", "/") + ".py", words[3:]
    at = next((i for i, word in enumerate(words) if re.search(r"\.(py|sh)$", word)), None)
    assert at is not None, f"{words} names no script"
    return words[at], words[at + 1:]


def test_commands_are_found_and_split():
    text = ("```\n$ python train.py config/toy.py --out=x  # why\nA=1 torchrun --nnodes=8 \\\n"
            "    train.py --resume=true\n```\nor `python -m data.stdlib.prepare --out=y`, `x = 1`")
    found = [split(words) for words in commands_in(text)]
    assert found == [("data/stdlib/prepare.py", ["--out=y"]),
                     ("train.py", ["config/toy.py", "--out=x"]),
                     ("train.py", ["--resume=true"])]


@each_page
def test_commands_name_scripts_configs_and_settings_that_exist(page):
    for words in commands_in(page.read_text(encoding="utf-8")):
        script, rest = split(words)
        if page.name == "serving.md" and not (ROOT / script).is_file():
            continue  # an engine's
        assert (ROOT / script).is_file(), words
        if script.endswith(".sh"):
            continue
        known = settings_of(script) | {"help"}
        for word in rest:
            key, _, value = word.partition("=")
            if key.startswith("--"):
                assert key[2:] in known, f"{script} has no setting {key}: {words}"
            for name in (word, value):
                if re.match(r"(config|data/stack)/\S+\.(py|json)$", name):
                    assert (ROOT / name).is_file(), words


def test_the_settings_in_its_commands_exist():
    """The same by a plainer reading, in case a command is written in a way not known above."""
    for page in PAGES:
        found = re.findall(r"python (train|sample)\.py ([^\n`]*)", page.read_text(encoding="utf-8"))
        for script, arguments in found:
            files = ["train.py"] if script == "train" else ["sample.py", "decode.py"]
            known = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
            for key in re.findall(r"--(\w+)", arguments):
                assert re.search(rf"^    {key}: ", known, re.M) or key == "help", (script, key)


def test_the_two_commands_are_there():
    assert "bash demo.sh" in README and "bash test.sh" in README
    assert "sample.py" in README


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 150


# --- links, files, functions ----------------------------------------------------------------------

@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_every_file_named_exists_and_every_source_file_is_named():
    linked = re.findall(r"\]\((?!http)([\w./]+)\)", README)
    assert linked and not [p for p in linked if not (ROOT / p).exists()]
    assert not [p.name for p in ROOT.glob("*.py") if p.name not in README]
    assert not [p.name for p in PAGES[1:] if f"docs/{p.name}" not in README]


def test_every_function_of_the_map_exists():
    named = re.findall(r"`(\w+\.py): ([\w.]+)`", EQUATIONS)
    assert len(named) >= 20
    for page in PAGES:
        named += re.findall(r"`(\w+\.py): ([\w.]+)`", page.read_text(encoding="utf-8"))
    missing = [(path, name) for path, name in named if name not in names_in(path)]
    assert not missing


def test_the_warmup_is_found_from_the_readme():
    assert "diffusion.py: u_max" in README and "docs/equations.md" in README
    assert re.search(r"warmup.*`diffusion.py: u_max`", EQUATIONS)


# --- what a command is said to print --------------------------------------------------------------

def test_the_plan_in_the_docs_is_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.main(["config/8b.py", "--dry_run=true", "--ranks=64"])
    printed = capsys.readouterr().out
    printed = printed[printed.index("parameters "):]  # before: whether the weights are at hand
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert printed.strip() in page, "print it anew into docs/scaling.md"
    peak = re.search(r"peak ([\d.]+ GB)", printed)[1]
    hours = re.search(r"([\d,]+)\.\d hours", printed)[1]
    for name in ("README.md", "docs/results.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert peak in text and hours in text, f"{name}: the 8B takes {peak} and {hours} hours"
