"""Chat templates: programs that come with a downloaded folder, run at arm's length.

`render` has a process of its own write a template's text, with limits of time and memory.

Not covered: `{% generation %}`, templates that need more than messages (tools, documents).
"""
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from configurator import Mistake

TEMPLATE_SECONDS = 20  # for one chat, Python's and jinja2's start included
TEMPLATE_LIMITS = 2**31, 10**6  # bytes of address space, where the system can limit it; characters


def render(template, values):
    """What a jinja2 template writes, set up as transformers has it. values: a dict for JSON.

    A template comes with a downloaded folder. jinja2's sandbox keeps it from files and from
    Python; nothing in jinja2 keeps it from nested loops and texts without end. So it runs in a
    process of its own, with limits of time and memory, kept for the next chat: a millisecond each.
    Works in any thread. Raises Mistake where the template fails or meets a limit.
    """
    request = json.dumps([template, values])
    with one_at_a_time:
        process = worker_process()
        timer = threading.Timer(TEMPLATE_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        except BaseException:  # Ctrl-C: the answer to come must not be taken for the next chat's
            process.kill()
            process.wait()
            raise
        finally:
            timer.cancel()
            timer.join()
        if not answer.endswith("\n"):
            process.kill()
            process.wait()
            raise Mistake(f"it was stopped after {TEMPLATE_SECONDS} seconds, or its process ended")
    text, error = json.loads(answer)
    if error:
        raise Mistake(error)
    return text


one_at_a_time = threading.Lock()
workers = {}  # {id of the process that uses it: the worker}: a fork must not share its pipes


def worker_process():
    """This process's renderer, started where there is none."""
    process = workers.get(os.getpid())
    if process is None or process.poll() is not None:
        source = inspect.getsource(answer_requests) + f"answer_requests{TEMPLATE_LIMITS}"
        process = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8", cwd=Path(__file__).parent,
            start_new_session=True)  # Ctrl-C is for the parent; at its end the worker's input ends
        workers[os.getpid()] = process
    return process


def answer_requests(memory, characters):
    """The worker's program: read [template, values] a line, write [text, error] a line."""
    import json
    import sys
    from datetime import datetime
    from functools import cache, partial

    def raise_exception(message):
        raise ValueError(message)

    @cache
    def compiled(template):
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's escapes HTML
        env.globals["raise_exception"] = raise_exception
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return env.from_string(template)

    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):  # Windows, macOS: the limit of time still holds
        pass
    for line in sys.stdin:
        try:
            template, values = json.loads(line)
            text = compiled(template).render(**values)
            answer = [text, None]
            if len(text) > characters:
                answer = [None, f"it writes {len(text):,} characters, more than {characters:,}"]
        except MemoryError:
            answer = [None, f"it needs more than {memory:,} bytes of memory"]
        except Exception as error:  # whatever the template's own code runs into
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            answer = [None, first_line]
        print(json.dumps(answer), flush=True)
