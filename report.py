"""What the verdicts add up to: pass@k, the rates that explain it, tables, a page of the failures.

    OUT/report.md      the tables as they are printed, and every setting
    OUT/report.json    {"scores", "speed", "settings"}
    OUT/failures.html  each failure: prompt, answer, program, verdict (assets/samples.html)

The scores are a function of the samples and their verdicts: neither batches, processes nor restarts
change them. The speed is that of the machine.

Not covered: comparing two reports.
"""
import json
import math
import re
from collections import Counter
from pathlib import Path

from configurator import visible
from files import read_text, write_json, write_text
from tasks import message

TEMPLATE = Path(__file__).parent / "assets" / "samples.html"
MOST_SHOWN = 1000  # failures in the page
LONGEST_SHOWN = 20_000  # characters of a text in it


# --- counting -------------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """The probability that one of k samples passes, drawn without replacement from n of which c do:
    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, §2.1). A float.

    In integers up to the division, so exact up to its rounding. 0 <= c <= n, 1 <= k <= n.
    """
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def count(tasks, results, ks):
    """The scores of a complete Results: {name: number or dict}."""
    n = results.n
    samples = [results.samples[row] for row in range(len(results))]
    verdicts = [results.verdicts[row] for row in range(len(results))]
    passed = [verdict["status"] == "passed" for verdict in verdicts]
    correct = [sum(passed[i * n:(i + 1) * n]) for i in range(len(tasks))]
    scores = {"tasks": len(tasks), "samples": len(samples)} | estimates(correct, n, ks)
    scores["rates"] = {
        "empty answer": mean([not sample["answer"].strip() for sample in samples]),
        "of these, nothing but <eos>": mean([sample["all_eos"] for sample in samples]),
        "truncated at max_new_tokens": mean([sample["truncated"] for sample in samples]),
        "no program in the answer": mean([not sample["found"] for sample in samples])}
    scores["status"] = dict(Counter(verdict["status"] for verdict in verdicts).most_common())
    scores["judged by"] = dict(Counter(verdict["judged"] for verdict in verdicts).most_common())
    scores["tokens"] = sum(sample["tokens"] for sample in samples)
    forwards = sum(sample["forwards"] for sample in samples)
    scores["tokens per forward"] = scores["tokens"] / max(1, forwards)
    families = {}
    for task, c in zip(tasks, correct):
        if task.family:
            families.setdefault(task.family, []).append(c)
    scores["families"] = {name: {"tasks": len(cs)} | estimates(cs, n, ks)
                          for name, cs in sorted(families.items())}
    return scores


def estimates(correct, n, ks):
    """pass@k over tasks with so many correct samples of n, and its standard error over the tasks.

    The tasks count as drawn from many like them: with 164, a pass@1 of 50 % is known to ± 3.9 %.
    """
    scores = {}
    for k in ks:
        values = [pass_at_k(n, c, k) for c in correct]
        scores[f"pass@{k}"] = mean(values)
        spread = mean([(value - mean(values)) ** 2 for value in values])
        scores[f"pass@{k} stderr"] = math.sqrt(spread / max(1, len(values) - 1))
    return scores


def mean(values):
    return sum(values) / len(values)


def speed_of(results):
    """Tokens and seconds of decoding, of all processes and restarts together."""
    tokens = sum(sample["tokens"] for sample in results.samples.values())
    seconds = sum(sample["seconds"] for sample in results.samples.values())
    return {"decoding seconds, of all processes": seconds,
            "tokens/s per process": tokens / max(seconds, 1e-9)}


# --- tables ---------------------------------------------------------------------------------------

def write(folder, tasks, results, ks, settings):
    """Write the three files of a complete Results. Returns the tables, str."""
    scores, speed = count(tasks, results, ks), speed_of(results)
    write_json(folder / "report.json", {"scores": scores, "speed": speed, "settings": settings})
    tables = passk_tables(scores, speed, ks)
    text = f"{tables}\n| setting | |\n|---|---|\n"
    for name, value in settings.items():
        text += f"| {name} | {cell(json.dumps(value))} |\n"
    write_text(folder / "report.md", text)
    write_text(folder / "failures.html", page(tasks, results, scores, settings))
    return f"{visible(tables)}\n--- {folder}: report.md, report.json, failures.html, samples.jsonl"


def passk_tables(scores, speed, ks):
    """The scores as Markdown."""
    n = scores["samples"] // scores["tasks"]
    names = " | ".join(f"pass@{k}" for k in ks)
    lines = [f"| {scores['tasks']} tasks, n = {n} | {names} |", "|---|" + "---|" * len(ks),
             f"| all | {estimates_in_words(scores, ks)} |"]
    for name, family in scores["families"].items():
        title = f"{cell(name)} ({family['tasks']})"
        lines.append(f"| {title} | {estimates_in_words(family, ks)} |")
    lines += ["", "| of the samples | |", "|---|---|"]
    for name, rate in scores["rates"].items():
        lines.append(f"| {name.replace('<', '&lt;')} | {rate:.1%} |")
    for kind in ("status", "judged by"):
        for name, number in scores[kind].items():
            lines.append(f"| {kind}: {name} | {number / scores['samples']:.1%} |")
    lines += [f"| tokens per forward | {scores['tokens per forward']:.2f} |",
              f"| tokens/s per process | {speed['tokens/s per process']:.0f} |"]
    return "\n".join(lines) + "\n"


def estimates_in_words(scores, ks):
    return " | ".join(f"{scores[f'pass@{k}']:.1%} ± {scores[f'pass@{k} stderr']:.1%}" for k in ks)


def cell(text):
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def settings_line(settings):
    """What decides a score, in a line, without what is off or empty. settings: {name: value}."""
    chosen = {name: value for name, value in settings.items()
              if value is not None and value != "" and value != []}
    return "--- " + visible(", ".join(f"{name}={value!r}" for name, value in chosen.items()))


def likelihood_table(scores, settings):
    """The figures of evaluate.score_rows as Markdown, below what decides them."""
    error = ""
    if scores["nelbo_stderr"]:
        error = f" ± {scores['nelbo_stderr']:.4f}"
    title = "NELBO, an upper bound"
    if settings["objective"] == "ar":
        title = "likelihood"
    lines = [settings_line(settings), "",
             f"| {scores['tokens']:,} tokens, {scores['bytes']:,} bytes | nats per token | "
             "bits per byte |", "|---|---|---|",
             f"| {title} | {scores['nelbo']:.4f}{error} | {scores['bits_per_byte']:.4f} |"]
    if "left_to_right" in scores:
        lines.append(f"| left to right inside the blocks | {scores['left_to_right']:.4f} | "
                     f"{scores['left_to_right_bits_per_byte']:.4f} |")
    return "\n".join(lines)


# --- the page -------------------------------------------------------------------------------------

def page(tasks, results, scores, settings):
    """All failures as a self-contained HTML file, str. Texts are data in it, never HTML."""
    failures = []
    for row in range(len(results)):
        if results.verdicts[row]["status"] != "passed":
            task = tasks[row // results.n]
            failures.append(failure(task, results.samples[row], results.verdicts[row], settings))
    scored = [[name, f"{value:.1%}"] for name, value in scores.items()
              if name.startswith("pass@") and "stderr" not in name]
    chosen = [[name, str(value)] for name, value in settings.items()]
    return filled(f"{len(failures)} of {len(results)} samples failed", failures, scored + chosen)


def samples_page(lines, tasks, style):
    """The answers of a rollout as such a page, str.

    lines: of rl.py's samples.jsonl, dicts. tasks: the Task of each. style: base or instruct.
    """
    shown = []
    for line, task in zip(lines, tasks):
        asked = message(task) if style == "instruct" else task.prompt
        texts = {"task": task.task_id, "family": task.family, "prompt": asked,
                 "answer": line["answer"], "tests": "\n".join(task.tests) or task.test,
                 "detail": line["detail"]}
        notes = [f"reward {line['total']:.2f}", f"advantage {line['advantage']:+.2f}",
                 f"{line['passed']:.0%} of the cases passed"]
        shown.append({name: shortened_text(text) for name, text in texts.items()}
                     | {"sample": line["row"], "status": line["status"], "notes": notes})
    return filled(f"Rollout {lines[0]['rollout']}, step {lines[0]['step']}: {len(lines)} answers",
                  shown, [])


def filled(title, shown, settings):
    """The template with data: a title, what there is to read, and [name, value] pairs."""
    data = {"title": title, "shown": shown[:MOST_SHOWN], "settings": settings,
            "left_out": max(0, len(shown) - MOST_SHOWN)}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    for character in "<>&":  # a </script> in a text must not end the script
        text = text.replace(character, f"\\u{ord(character):04x}")
    return re.sub(r"\{\{data\}\}", lambda _: text, read_text(TEMPLATE))


def failure(task, sample, verdict, settings):
    """What the page shows of one, {name: str, bool or number}."""
    asked = message(task) if settings["style"] == "instruct" else task.prompt
    shown = {"task": task.task_id, "family": task.family, "prompt": asked,
             "answer": sample["answer"], "program": sample["solution"],
             "tests": "\n".join(task.tests) or task.test,
             "detail": verdict["detail"], "output": verdict["output"]}
    shown = {name: shortened_text(text) for name, text in shown.items()}
    notes = [f"judged by {verdict['judged']}"]
    if len(verdict["cases"]) > 1:
        notes.append(f"{sum(verdict['cases'])} of {len(verdict['cases'])} cases passed")
    if not sample["found"]:
        notes.append("no program in the answer")
    if sample["truncated"]:
        notes.append("truncated at max_new_tokens")
    return shown | {"sample": sample["sample"], "status": verdict["status"], "notes": notes}


def shortened_text(text):
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}\n… {len(text) - LONGEST_SHOWN:,} more characters"
