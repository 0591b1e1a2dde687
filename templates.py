"""Chat templates: programs that come with a downloaded folder, run at arm's length.

`render` has a process of its own write a template's text, with limits of time and memory.
`parts_of_chat` says which parts of that text are the assistant's.

Not covered: `{% generation %}`, templates that need more than messages (tools, documents).
"""
import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from configurator import Mistake, shortened

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


# --- whose words are whose ------------------------------------------------------------------------

def parts_of_chat(messages, tok):
    """A conversation as its template writes it, as a list of (text, whether it is an answer).

    An answer is what the assistant's message adds to the text that asks for it, the token that ends
    its turn included; it is found by rendering the conversation up to there. Some templates write
    an answer differently once others follow it (Qwen3's drops its thoughts): such an answer, which
    the model would not be asked for, counts as context. What follows the last answer is left out.
    tok: its `render` writes. Raises Mistake for messages that are not a conversation with answers,
    and for a template that does not tell where an answer begins.
    """
    answers = check_messages(messages)
    whole = tok.render(messages[:answers[-1] + 1], add_generation_prompt=False)
    parts, done = [], 0  # done: characters of `whole` in `parts`
    for i in answers:
        before = tok.render(messages[:i], add_generation_prompt=True)
        after = whole
        if i != answers[-1]:
            after = tok.render(messages[:i + 1], add_generation_prompt=False)
        check_answer(messages[:i + 1], before, after, tok)
        if whole.startswith(after) and len(before) >= done:
            parts += [(whole[done:len(before)], False), (after[len(before):], True)]
            done = len(after)
    return parts


def check_messages(messages):
    """The numbers of the assistant's messages. Raises Mistake for anything that is not a chat."""
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise Mistake('its "messages" must be a list of objects with a "role" and a "content", '
                      f"both texts, not {shortened(messages)}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Mistake("none of its messages is the assistant's, so there is nothing to learn")
    if answers[0] == 0:
        raise Mistake("its messages begin with the assistant's, before any question")
    if not all(messages[i]["content"] for i in answers):
        raise Mistake("an answer of the assistant's is empty: leave the line out, or write what "
                      "the model is to answer")
    return answers


def is_message(value):
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def check_answer(messages, before, after, tok):
    """Raise Mistake where a template does not tell where the last message, an answer, begins.

    before: the text that asks for the answer. after: with the answer.
    """
    template = f"the chat template in {tok.folder}"
    if not after.startswith(before) or after == before:
        raise Mistake(f"{template} does not write an answer where it asks for one")
    if after[len(before):].lstrip().startswith(messages[-1]["content"].strip()):
        return
    if before == tok.render(messages[:-1], add_generation_prompt=False):
        raise Mistake(f"{template} ignores add_generation_prompt: the model would be asked without "
                      "the words that begin an answer")
