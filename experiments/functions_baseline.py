"""How far retrieval gets on data/functions: the nearest training item, renamed.

    python -m experiments.functions_baseline

For each held-out prompt the training items are ranked by TF-IDF over the character n-grams and the
words of the sentence, the best are ranked anew by the edit distance of their words, and the first
one's body is the answer, with the function's and the argument's names replaced by the prompt's. The
second row replaces its constants too, one after the other, where both sentences have as many.
Prints pass@1 of each. A high score would say that the split can be solved by looking up.

Not covered: retrieval by a trained model.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from configurator import Int, Mistake, Name, configure
from sandbox import Sandbox
from tasks import program, read_tasks


@dataclass
class Config:
    data: Name = "data/functions"  # folder that data.functions.prepare wrote
    candidates: Int(1, 1000) = 50  # training items that are compared by edit distance
    unsafe_execution: bool = False  # run the answers though the sandbox has too few layers here


SIZES = (3, 4, 5)  # of character n-grams
CONSTANT = re.compile(r"\b\d+\b|'[^']*'")


def signature(task):
    """(function, argument) of a prompt."""
    found = re.match(r"def (\w+)\((\w+)", task.prompt)
    if not found:
        raise Mistake(f"{task.where} has a prompt that does not begin with a function of one "
                      "argument: only data/functions is compared here")
    return found.groups()


def sentence(task):
    """The docstring, with the argument's name as a blank, without an example."""
    text = task.prompt.partition('"""')[2].rpartition('"""')[0].partition(" Example:")[0]
    return re.sub(rf"\b{signature(task)[1]}\b", "_", text)


def features(text):
    """Character n-grams and words with their neighbors, and how often each occurs."""
    found = Counter(text[i:i + n] for n in SIZES for i in range(len(text) - n + 1))
    words = text.split()
    found.update(("word", word) for word in words)
    found.update(("pair", *both) for both in zip(words, words[1:]))
    return found


class Index:
    """TF-IDF over texts: which of them are nearest to another by the cosine."""

    def __init__(self, texts):
        counts = [features(text) for text in texts]
        documents = Counter(feature for found in counts for feature in found)
        self.idf = {feature: math.log(len(texts) / n) for feature, n in documents.items()}
        postings = {feature: ([], []) for feature in documents}
        for number, found in enumerate(counts):
            weights = self.weighted(found)
            length = math.sqrt(sum(w * w for w in weights.values())) or 1.0
            for feature, weight in weights.items():
                postings[feature][0].append(number)
                postings[feature][1].append(weight / length)
        self.size = len(texts)
        self.postings = {feature: (np.array(numbers), np.array(weights))
                         for feature, (numbers, weights) in postings.items()}

    def weighted(self, found):
        return {feature: (1 + math.log(n)) * self.idf[feature]
                for feature, n in found.items() if feature in self.idf}

    def nearest(self, text, n):
        """Numbers of the n nearest texts, the best first."""
        scores = np.zeros(self.size)
        for feature, weight in self.weighted(features(text)).items():
            numbers, weights = self.postings[feature]
            scores[numbers] += weight * weights
        return np.argsort(-scores, kind="stable")[:n].tolist()


def edit_distance(a, b):
    """How many words must be inserted, removed or replaced to make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = diagonal + (word != other)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


def renamed(found, wanted):
    """A found task's body with the function's and the argument's names of the wanted one."""
    names = dict(zip(signature(found), signature(wanted)))
    pattern = r"\b(?:" + "|".join(map(re.escape, names)) + r")\b"
    return re.sub(pattern, lambda match: names[match[0]], found.solution)


def adapted(found, wanted):
    """The same with the wanted sentence's constants, where both sentences have as many."""
    body = renamed(found, wanted)
    old, new = CONSTANT.findall(sentence(found)), CONSTANT.findall(sentence(wanted))
    if not old or len(old) != len(new):
        return body
    replaced = {a.replace("'", '"'): b.replace("'", '"') for a, b in zip(old, new)}
    pattern = "|".join(rf"(?<!\w){re.escape(a)}(?!\w)" for a in replaced)
    return re.sub(pattern, lambda match: replaced[match[0]], body)


def nearest_task(task, index, train, texts, candidates):
    """The training task whose sentence is nearest to this one's."""
    text = sentence(task)
    words = text.split()
    ranked = index.nearest(text, candidates)
    return train[min(ranked, key=lambda number: edit_distance(words, texts[number].split()))]


def pass_rate(sandbox, tasks, found, adapt):
    """Share of the tasks that pass with the found tasks' bodies."""
    answers = [task.prompt + adapt(other, task) for task, other in zip(tasks, found)]
    verdicts = sandbox.judge(map(program, tasks, answers))
    return sum(verdict.status == "passed" for verdict in verdicts) / len(tasks)


def main(argv=None):
    cfg, _ = configure(Config, argv)
    train = read_tasks(f"{cfg.data}/train.jsonl")
    held_out = {split: read_tasks(f"{cfg.data}/{split}.jsonl") for split in ("test", "hard_test")}
    texts = [sentence(task) for task in train]
    index = Index(texts)
    with Sandbox(unsafe_execution=cfg.unsafe_execution) as sandbox:
        active = [layer for layer, is_active in sandbox.layers.items() if is_active]
        print(f"sandbox: {', '.join(active) or 'no isolation'}")
        for split, tasks in held_out.items():
            found = [nearest_task(task, index, train, texts, cfg.candidates) for task in tasks]
            for name, adapt in (("renamed", renamed), ("renamed, its constants too", adapted)):
                share = pass_rate(sandbox, tasks, found, adapt)
                print(f"{split}: pass@1 {100 * share:.1f} % of {len(tasks)}: the nearest training "
                      f"item, {name}")


if __name__ == "__main__":
    main()
