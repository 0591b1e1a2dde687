"""Verdicts per second of the sandbox, beside bare starts of Python.

    python -m bench.sandbox    # writes a table

The smallest program with one test, judged by each of the three judges, and `python -I -c pass`, on
as many cores. They take turns, so that a busy moment of the machine meets all of them; CPU time,
of all processes together, says what a verdict costs where other work slows the clock down.

Not covered: what programs do beyond that, many cores.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tqdm import tqdm

from configurator import Int, Mistake, Name, configure
from files import check_out, write_text
from sandbox import Program, Sandbox, cores


@dataclass
class Config:
    programs: Int(1, 10**6) = 1000  # judged in each round, by each judge
    starts: Int(1, 10**6) = 100  # of bare Python, in each round
    rounds: Int(1, 1000) = 5  # turns of each
    workers: Int(0, 1024) = 0  # processes at a time; 0: one for each core
    out: Name = "bench/results/sandbox.md"  # where the table goes


CODE = "def f(x):\n    return x + 1\n"
PROGRAMS = {
    "values": Program(CODE, "f", ("assert f(1) == 2",)),
    "caller": Program(CODE, "f", ("assert abs(f(1) - 2) < 1e-6",)),
    "one process": Program(CODE, "f", ("assert f(f.__defaults__ or 1) == 2",)),
}
BARE = "python -I -c pass"


def cpu_seconds():
    """Of this process and of those below it that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measured(count, work):
    """(per second, CPU milliseconds each) of `work`, which does `count` things."""
    cpu, began = cpu_seconds(), time.perf_counter()
    seconds = work() or time.perf_counter() - began
    return count / seconds, (cpu_seconds() - cpu) / count * 1e3


def judge(cfg, title):
    """Seconds of the verdicts alone; the CPU time holds the start of the workers too."""
    with Sandbox(cfg.workers, seconds=60) as sandbox:
        program = PROGRAMS[title]
        list(sandbox.judge([program] * 10 * len(sandbox.workers)))
        began = time.perf_counter()
        for verdict in sandbox.judge([program] * cfg.programs):
            if (verdict.status, verdict.judged) != ("passed", title):
                raise Mistake(f"a right program was judged wrong: {verdict}")
        return time.perf_counter() - began


def start_python(cfg):
    with ThreadPoolExecutor(cfg.workers or cores()) as pool:
        list(pool.map(lambda _: subprocess.run([sys.executable, "-I", "-c", "pass"], check=True),
                      range(cfg.starts)))


def table(cfg):
    """Markdown lines."""
    found = {title: [] for title in (*PROGRAMS, BARE)}
    for _ in tqdm(range(cfg.rounds), desc="rounds"):
        found[BARE].append(measured(cfg.starts, lambda: start_python(cfg)))
        for title in PROGRAMS:
            found[title].append(measured(cfg.programs, lambda: judge(cfg, title)))
    lines = ["| judged by | verdicts/s, median | range | CPU ms each | against bare starts |",
             "|---|---|---|---|---|"]
    for title, rounds in found.items():
        rates, costs = zip(*rounds)
        ratio = statistics.median(rate / bare for rate, (bare, _) in zip(rates, found[BARE]))
        lines.append(f"| {title} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to "
                     f"{max(rates):,.0f} | {statistics.median(costs):.2f} | {ratio:.1f} |")
    return lines


def priority():
    """Whether other work could take turns with this: `chrt -f 10 python -m …` keeps it away."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (1, 2):
        return "at real-time priority (chrt -f), so that other work did not take turns"
    return "at ordinary priority"


def heading(cfg, words):
    with Sandbox(workers=1) as sandbox:
        active = ", ".join(name for name, on in sandbox.layers.items() if on)
        missing = ", ".join(name for name, on in sandbox.layers.items() if not on)
    return [f"# Verdicts of the sandbox, {date.today()}", "",
            f"    python -m bench.sandbox {' '.join(words)}".rstrip(), "",
            f"{platform.machine()}, {cfg.workers or cores()} at a time on {cores()} cores, "
            f"{priority()}; load before {os.getloadavg()[0]:.1f}; Linux {platform.release()}, "
            f"Python {platform.python_version()}. Layers: {active}; missing: {missing or 'none'}. "
            f"{cfg.rounds} rounds of {cfg.programs:,} verdicts by each judge and {cfg.starts:,} "
            "bare starts, taking turns. CPU time is that of all processes, the workers' start "
            "among them. Ratios are medians of the rounds'.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    path = Path(cfg.out)
    check_out(path)
    words = sys.argv[1:] if argv is None else argv
    text = "\n".join([*heading(cfg, words), *table(cfg), ""])
    print(text)
    write_text(path, text)


if __name__ == "__main__":
    main()
