"""Rollouts: a policy writes G completions of each prompt, and when it wrote what is kept.

    prompts --write_completions--> Rows --stacked--> Completions (estimators.py)

A Rollout is plain values, so that a checkpoint can hold one that is half used.

A row's noise depends on its number alone, and its number on the rollout, the prompt and the
completion: neither on the batch it was written in nor on the number of processes.

Not covered: rewards (rewards.py), what is learned from them (rl.py).
"""
import json
import math
from dataclasses import asdict, dataclass, field

import torch

import files
from configurator import Mistake
from decode import decode, write
from estimators import GIVEN, NEVER, Completions
from evaluate import prompt_ids
from loader import epoch_order
from report import samples_page
from rewards import Reward
from watch import global_ar, local_ar

MOST_ROWS = 2**32  # numbers of rows that decoding has noise for


@dataclass
class Row:
    """A prompt and what was written after it, as plain values.

    number: in the random streams. task: which of the tasks. ids: prompt and completion, None where
    nothing was written. written: as in Completions, a number per id. prompt: tokens of the prompt.
    forwards: steps in which something was written. order: positions as they were written, those of
    one step by confidence, ties from left to right.
    """
    number: int
    task: int
    ids: list
    written: list
    prompt: int
    forwards: int = 0
    order: list = field(default_factory=list)

    def end(self, stop_ids):
        """Where the completion ends: after its first stop id, or its last token."""
        ends = [i for i, token in enumerate(self.ids) if i >= self.prompt and token in stop_ids]
        holes = [i for i, token in enumerate(self.ids) if token is None]
        if ends and not (holes and holes[0] < ends[0]):
            return ends[0] + 1
        return min([*holes, len(self.ids)])

    def length(self, stop_ids):
        """Tokens of the completion, its first stop id included."""
        return self.end(stop_ids) - self.prompt

    def idle(self):
        """This row with nothing to learn from: what fills up a process's share."""
        ids = [token or 0 for token in self.ids]
        return Row(self.number, self.task, ids, [GIVEN] * len(ids), len(ids))


@dataclass
class Rollout:
    """All processes' answers.

    rows, rewards: those to a task side by side. learned: places of the rows whose group has rewards
    that differ; the others do not say what is better. advantage: of these. reference: for each
    update and each of these, a list of a number per token: log_probs under the reference. old: the
    same under the policy that wrote them, for each update but the first.
    """
    number: int
    rows: list
    rewards: list
    learned: list = field(default_factory=list)
    advantage: list = field(default_factory=list)
    old: list = field(default_factory=list)
    reference: list = field(default_factory=list)

    @classmethod
    def read(cls, path, updates, with_reference):
        """What `write` wrote, of so many updates, with what the reference says or not.

        Raises Mistake for a damaged file.
        """
        values = files.read_json(path)
        try:
            values["rows"] = [Row(**row) for row in values["rows"]]
            values["rewards"] = [Reward(**reward) for reward in values["rewards"]]
            made = cls(**values)
            sound = made.fits(updates, with_reference)
        except (TypeError, KeyError, AttributeError) as error:
            raise Mistake(f"{path} is damaged: it is no rollout of rl.py's") from error
        if not sound:
            raise Mistake(f"{path} is damaged or of another version: its lists do not "
                          "fit each other")
        return made

    def fits(self, updates, with_reference):
        """Whether all lists have the lengths that they must have."""
        enough = len(self.old) == updates - 1
        if with_reference:
            enough = enough and len(self.reference) == updates
        estimates = self.old + self.reference
        lengths = [len(part) for part in (self.advantage, *estimates)]
        return (enough and len(self.rewards) == len(self.rows) > 0
                and all(length == len(self.learned) for length in lengths)
                and all(0 <= place < len(self.rows) for place in self.learned)
                and all(len(row.ids) == len(row.written) for row in self.rows)
                and all(len(of_row) <= len(self.rows[place].ids) for values in estimates
                        for place, of_row in zip(self.learned, values)))

    def write(self, path):
        files.write_json(path, asdict(self))


def chosen_tasks(seed, rollout, prompts, tasks):
    """The tasks of a rollout, a list of their numbers. Every epoch visits all in its own order.

    prompts: how many. tasks: how many there are.
    """
    places = range(rollout * prompts, (rollout + 1) * prompts)
    return [int(epoch_order(seed, place // tasks, tasks)[place % tasks]) for place in places]


def rows_of(number, tasks, completions, prompts, block):
    """The Rows of rollout `number`, still empty: `completions` of each of these tasks.

    tasks: numbers of tasks, in the order of the rollout. prompts: (ids, room) of every task, see
    with_prompts. block: K, whose last block is whole; None: a text without blocks.
    """
    rows = []
    first = number * len(tasks) * completions
    if first + len(tasks) * completions > MOST_ROWS:
        raise Mistake(f"rollout {number} would be beyond the {MOST_ROWS:,} rows that have noise")
    for i in range(len(tasks) * completions):
        task = tasks[i // completions]
        ids, room = prompts[task]
        end = end_of(ids, room, block)
        if end <= len(ids):
            raise Mistake(f"a prompt of {len(ids)} tokens leaves no room for a block: raise "
                          "--max_new_tokens, or leave the task out")
        masks = end - len(ids)
        rows.append(Row(first + i, task, [*ids, *[None] * masks],
                        [GIVEN] * len(ids) + [NEVER] * masks, len(ids)))
    return rows


def with_prompts(tasks, described, cfg, world):
    """The tasks that have room for an answer, and of each its prompt's ids and that room.

    described: see huggingface.read_description.
    """
    model_cfg, tok, recipe = described
    kept, prompts = [], []
    for task in tasks:
        ids = prompt_ids(task, tok, cfg.style, cfg.answer_prefix)
        room = min(cfg.max_new_tokens, model_cfg.context - len(ids))
        has_room = end_of(ids, room, recipe.causal_block) > len(ids)
        if has_room and len(ids) <= (cfg.max_prompt_tokens or len(ids)):
            kept.append(task)
            prompts.append((ids, room))
    if len(kept) < len(tasks):
        said = (f"{len(tasks) - len(kept)} of {len(tasks)} tasks leave no room for an answer in "
                f"the context of {model_cfg.context} tokens")
        if cfg.max_prompt_tokens:
            said += f", or have more than max_prompt_tokens={cfg.max_prompt_tokens}"
        if not kept:
            more = " or --max_prompt_tokens" if cfg.max_prompt_tokens else ""
            raise Mistake(f"{said}: give shorter ones, or a larger --max_new_tokens{more}")
        world.say(f"{said}, and are left out")
    return kept, prompts


def terms_of(row, stop_ids, estimator):
    """How many terms of the loss a row has: its tokens, its decisions under `trace`, and 1 under
    `sequence`."""
    if estimator == "sequence":
        return 1
    if estimator == "trace":
        return len(row.order)
    return row.length(stop_ids)


def end_of(ids, room, block):
    """How long a text becomes that has `room` after these ids, and ends with a whole block."""
    return (len(ids) + room) // (block or 1) * (block or 1)


def write_completions(model, tok, recipe, how, rows, batch):
    """Decode these Rows in place, `batch` at a time: a generator of each batch when it is done.

    how: a Decoding, without `remask` and `stop`.
    """
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        texts = [list(row.ids) for row in part]
        steps_done = [{} for _ in part]  # of each noise block
        for step in decode(model, tok, recipe, texts, how, [row.number for row in part]):
            write(texts, step)
            note(step, part, steps_done, recipe.causal_block or 2**31, how.verified)
        for row, text in zip(part, texts):
            row.ids = text
        yield part


def note(step, rows, steps_done, block, verified):
    """Note when the tokens of a step were written: in which step of their noise block.

    verified: the forward did several steps at once, from left to right.
    """
    b, n = step.taken.nonzero(as_tuple=True)  # (m,) each, from left to right
    found = zip(step.rows[b].tolist(), step.positions[b, n].tolist(),
                step.confidence[b, n].tolist())
    if not verified:
        found = sorted(found, key=lambda one: (-one[2], one[1]))
    now = {}
    for i, position, _ in found:
        if position >= len(rows[i].ids):
            continue
        rows[i].order.append(position)
        place = i, position // block
        if place not in now or verified:
            now[place] = steps_done[i].get(place[1], 0)
            steps_done[i][place[1]] = now[place] + 1
        rows[i].written[position] = now[place]
    for i in {i for i, _ in now}:
        rows[i].forwards += 1


def stacked(rows, block, stop_ids, device):
    """Rows as Completions, padded on the right.

    A block model has read nothing beyond the block with the first stop id: there its text ends. A
    model without blocks has read all masks.
    """
    ends = [row.end(stop_ids) for row in rows]
    lengths = [len(row.ids) for row in rows]
    if block is not None:
        lengths = [-(-end // block) * block for end in ends]
    B, T = len(rows), max(lengths)
    tokens = torch.zeros(B, T, dtype=torch.long)
    written = torch.full((B, T), GIVEN)
    scored = torch.zeros(B, T, dtype=torch.bool)
    doc_end = torch.zeros(B, T, dtype=torch.int32)
    for i, (row, end, length) in enumerate(zip(rows, ends, lengths)):
        tokens[i, :length] = torch.tensor([token or 0 for token in row.ids[:length]])
        written[i, :length] = torch.tensor(row.written[:length])
        scored[i, row.prompt:end] = True
        doc_end[i, :length] = length
    return Completions(tokens=tokens.to(device), written=written.to(device),
                       scored=scored.to(device), doc_start=torch.zeros_like(doc_end).to(device),
                       doc_end=doc_end.to(device), rows=[row.number for row in rows])


def text_of(row, tok):
    """What was written, without the stop id, str."""
    end = row.end(tok.stop_ids)
    ids = row.ids[row.prompt:end]
    if ids and ids[-1] in tok.stop_ids:
        ids = ids[:-1]
    return tok.decode(ids)


def my_share(learned, world):
    """Which of the learned rows this process computes, a list of their places; None fills it up.

    With FSDP all processes make the same number of forwards.
    """
    each = math.ceil(len(learned) / world.size)
    places = range(world.rank * each, (world.rank + 1) * each)
    return [place if place < len(learned) else None for place in places]


def rows_at(made, share):
    """The Rows at these places."""
    return [made.rows[0].idle() if place is None else made.rows[made.learned[place]]
            for place in share]


def padded(values, places, like):
    """Lists of numbers at these places, 0 where None, as a tensor shaped like `like`, (B, T)."""
    tensor = torch.zeros(like.shape)
    for i, place in enumerate(places):
        if place is not None:
            tensor[i, :len(values[place])] = torch.tensor(values[place])
    return tensor.to(like.device)


def figures(made, tok):
    """{name: number} of a Rollout: rewards, lengths, rates, AR-ness (watch.py), means over rows."""
    rows, rewards = made.rows, made.rewards
    ends = [row.end(tok.stop_ids) for row in rows]
    lengths = [row.length(tok.stop_ids) for row in rows]
    ended = [row.ids[end - 1] in tok.stop_ids and end > row.prompt for end, row in zip(ends, rows)]
    orders = [row.order for row in rows]
    return {"reward": mean(reward.total for reward in rewards),
            "passed": mean(reward.passed for reward in rewards),
            "solved": mean(reward.status == "passed" for reward in rewards),
            "format": mean(reward.format for reward in rewards),
            "learned": len(made.learned) / len(rows),
            "length": mean(lengths),
            "empty": mean(end and length == 1 for end, length in zip(ended, lengths)),
            "truncated": mean(not end for end in ended),
            "tokens_per_forward": sum(map(len, orders)) / max(1, sum(r.forwards for r in rows)),
            "local_ar": mean(local_ar(order, 1) for order in orders if len(order) > 1),
            "global_ar": mean(global_ar(order, 1) for order in orders if len(order) > 1)}


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else math.nan


def lines_of(made, step, tasks, tok, prefix):
    """A rollout's answers with their rewards, as lines of samples.jsonl: a list of dicts.

    prefix: what all answers begin with, str.
    """
    learned = dict(zip(made.learned, made.advantage))
    return [{"step": step, "rollout": made.number, "row": row.number,
             "task_id": tasks[row.task].task_id, "answer": prefix + text_of(row, tok),
             "advantage": learned.get(i, 0.0), **asdict(reward)}
            for i, (row, reward) in enumerate(zip(made.rows, made.rewards))]


def keep_samples(folder, made, step, tasks, tok, cfg):
    """Append a rollout to samples.jsonl, and show it in samples.html."""
    lines = lines_of(made, step, tasks, tok, cfg.answer_prefix)
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines))
    page = samples_page(lines, [tasks[row.task] for row in made.rows], cfg.style)
    files.write_text(folder / "samples.html", page)
