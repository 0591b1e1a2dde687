"""What a completion of a task is worth: the share of its tests that pass, its format, and whatever
a function of the user's own says.

    with Sandbox() as sandbox:
        rewards = Rewards(sandbox, cfg, "out/run")
        rewards.submit(0, task, text)          # returns at once; the device writes the next batch
        {0: reward} = rewards.collect()

    a text  --extract.extract-->  a program  --sandbox-->  a Verdict  --reward_of-->  a Reward

A file that --reward names defines the user's function:

    def reward(task, completion, verdict):     # dict, str, dict -> a number
        return -len(completion) / 1000

task and verdict hold the fields of tasks.Task and sandbox.Verdict. The file is code: it runs in
this process, with your rights, and only because you name it.

Where a reward cannot be computed, the program is saved and a Mistake says why: a quiet zero would
train the model on a fault of ours.

Not covered: a limit on the time that the user's function takes; modules beside its file.
"""
import ast
import re
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path

from configurator import Float, Mistake, shortened, visible
from extract import extract, is_written, needed_part
from files import read_text, write_json
from tasks import program

# A fence with its end, on lines of their own, as the prompt of a chat asks for.
FENCE = re.compile(r"^```(?:python)?[ \t]*\n(.*?)^```[ \t]*$", re.M | re.S)
LARGEST = 1e30  # of what the user's function returns; float32 ends at 3e38


@dataclass
class Rewarding:
    """What a reward is made of. The first two weights are DiffuCoder's (recipes/)."""
    passed_weight: Float(0, 1000) = 2.0  # weight of the share of a task's tests that pass
    format_weight: Float(0, 1000) = 0.5  # weight of the format: code that parses
    reward: str = ""  # Python file that defines reward(task, completion, verdict); empty: none
    reward_weight: Float(-1000, 1000) = 1.0  # weight of what that function returns


@dataclass
class Reward:
    """The reward of one completion, in plain values."""
    total: float  # the weighted sum, which the advantage is computed from
    passed: float  # share of the task's cases that passed, 0 to 1
    format: float  # 0 or 1
    own: float  # what the user's function returned; 0 where there is none
    status: str  # of the verdict
    detail: str  # of the verdict


# --- the parts, pure functions --------------------------------------------------------------------

def format_of(task, text, style):
    """1.0 for an answer in the form that was asked for, else 0.0.

    style: "base", where the prompt and the text must be Python to the last character, or
    "instruct", where the text must have a fenced block, with its end, that is. In both the code
    must give the task's function a body, or where the task names none, do something: else writing
    nothing would be worth something.
    """
    codes = [task.prompt + text]
    if style == "instruct":
        codes = FENCE.findall(text.replace("\r\n", "\n"))
    return float(any(is_code(code, task.entry_point) for code in codes))


def is_code(code, entry_point):
    """Whether a text is Python, and has more than what a prompt may show."""
    found = needed_part(code, entry_point, whole=True)
    if found is None or entry_point:
        return found is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a text
        return is_written(ast.parse(found))


def fraction_passed(verdict):
    """The share of a verdict's cases that passed, 0 to 1; 0.0 of a program without tests.

    HumanEval's check is one case. DiffuCoder runs each test for itself and counts the same way.
    """
    return sum(verdict.cases) / len(verdict.cases) if verdict.cases else 0.0


def total(passed, form, own, cfg):
    """The weighted sum. cfg: a Rewarding."""
    return cfg.passed_weight * passed + cfg.format_weight * form + cfg.reward_weight * own


def reward_of(task, text, verdict, cfg, style, own=None):
    """The Reward of a text with this verdict. own: the user's function, as load_own returns it."""
    passed, form, value = fraction_passed(verdict), format_of(task, text, style), 0.0
    if own:
        value = number(own(asdict(task), text, asdict(verdict)))
    return Reward(total(passed, form, value, cfg), passed, form, value, verdict.status,
                  verdict.detail)


def number(value):
    """What the user's function returned, as a float. Raises Mistake for what is no number."""
    if not isinstance(value, Real) or not abs(value) <= LARGEST:  # NaN is not
        raise Mistake(f"reward() returned {shortened(value)}, not a number from {-LARGEST:g} to "
                      f"{LARGEST:g}")
    return float(value)


# --- the user's own function ----------------------------------------------------------------------

def load_own(path):
    """The function `reward` that a Python file defines, None of an empty path.

    Raises Mistake where there is none.
    """
    if not path:
        return None
    space = {"__name__": Path(path).stem, "__file__": path}
    code = read_text(path)
    try:
        exec(compile(code, path, "exec"), space)
    except (Exception, SystemExit) as error:  # it is the user's code: anything can be raised
        raise Mistake(f"reward={path} cannot be read: {explained(error, path)}") from error
    if not callable(space.get("reward")):
        raise Mistake(f"reward={path} defines no function `reward(task, completion, verdict)`")
    return space["reward"]


def explained(error, path):
    """Where in the file an error came from, its type and its message, in one line."""
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
               if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        numbers = [error.lineno]
    place = f"{path}, line {numbers[-1]}: " if path and numbers else ""
    kind = "" if isinstance(error, Mistake) else f"{type(error).__name__}: "
    return place + kind + visible(" ".join(str(error).split()))


# --- many at once ---------------------------------------------------------------------------------

class Rewards:
    """Completions on their way through the sandbox.

    sandbox: an open Sandbox. cfg: a Rewarding. folder: the run's, for failed_reward.json.
    style: see format_of. own: the user's function, see load_own.
    """

    def __init__(self, sandbox, cfg, folder, style="base", own=None):
        self.sandbox, self.cfg, self.folder, self.style = sandbox, cfg, Path(folder), style
        self.own = own
        self.waiting = {}  # key: (Future of a Verdict, Task, text, code)

    def submit(self, key, task, text):
        """Begin to judge a completion. key: what collect returns its Reward by.

        text: all that the model wrote, without its stop id; with what was given as its beginning.
        """
        with self.saving(task, text, task.prompt + text):
            code, _ = extract(task, text)
        self.waiting[key] = (self.sandbox.submit(program(task, code)), task, text, code)

    def collect(self):
        """{key: Reward} of all that was submitted since the last time, once they are judged."""
        rewards, waiting = {}, self.waiting
        self.waiting = {}
        for key, (future, task, text, code) in waiting.items():
            with self.saving(task, text, code):
                verdict = future.result()
                rewards[key] = reward_of(task, text, verdict, self.cfg, self.style, self.own)
        return rewards

    @contextmanager
    def saving(self, task, text, code):
        """Make of whatever is raised a Mistake, and save what it was raised for."""
        try:
            yield
        except (Exception, SystemExit) as error:  # the sandbox, or the user's function: anything
            path = self.folder / "failed_reward.json"
            why = explained(error, self.cfg.reward)
            write_json(path, {"task_id": task.task_id, "text": text, "code": code, "error": why})
            raise Mistake(f"an answer to {shortened(task.task_id)} has no reward: {why}; it is in "
                          f"{path}") from error
