"""From a model's answer to a program: which part of a text is the code that was asked for.

    "Sure! Here it is:\n```python\ndef f(x): …\n```\nIt …"  --extract-->  "def f(x): …\n"

An answer may be a module or a function's body, in a fence or in none, with prose around it, with
tests or another function after it, and cut off anywhere. Thoughts before it, `<think>…</think>`,
are skipped. It is read in several ways, the likeliest first. The first reading counts that is
Python up to its last complete statement and defines the function with a body. Nothing is ever run
here.

Of the code that was found, only these go: lines after the last complete statement, and statements
at the top level that the function does not need, such as prints, asserts and `if __name__`.

Not covered: a program that is spread over several fenced blocks; diffs; other languages.
"""
import ast
import re
import textwrap
import warnings

from tasks import prelude

# a fence may follow prose on its line, and name a language
OPENING = re.compile(r"(?:.*[^`~])?(`{3,}|~{3,})[ \t]*[\w.+#-]*[ \t]*")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def extract(task, text):
    """The program in an answer: (a whole module, whether it was found).

    task: a tasks.Task. text: what the model wrote after the prompt, or in its turn. Where nothing
    is found, the module is the prompt and the text as they are, which cannot pass.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for code, whole in readings(task, text):
        code = needed_part(code, task.entry_point, whole)
        if code is not None:
            return with_prelude(code, task), True
    return task.prompt + text, False


def readings(task, text):
    """Ways to read an answer, the likeliest first: a generator of (code, whole).

    whole: all of it has to be Python; else what follows its last complete statement goes. A model's
    thoughts before its answer are not read, and thoughts without an end leave no answer.
    """
    if text.lstrip().startswith("<think>"):
        _, end, text = text.partition("</think>")
        if not end:
            return
    blocks = fenced_blocks(text)
    for block in blocks:  # a module in a fence
        yield block, False
        yield textwrap.dedent(block), False
    rest = []  # the rest of the function that the prompt begins
    if begins(task.prompt, task.entry_point):
        rest = [(task.prompt + text, False)]
    found = modules(text, task.entry_point)
    if text.lstrip("\n")[:1].isspace():
        yield from [*rest, *found]
    else:
        yield from [*found, *rest]
    if rest:
        for body in [*blocks, text]:  # a body whose indentation was lost, all or the first line's
            body = body.strip("\n")
            indented = task.prompt + textwrap.indent(textwrap.dedent(body), "    ")
            yield task.prompt + body, False
            yield indented, True
            yield task.prompt + "    " + body.lstrip(" "), False
            yield indented, False


def begins(text, entry_point):
    """Whether a text has the first line of this function, at the top level."""
    pattern = rf"^(?:(?:async )?def|class) +{re.escape(entry_point)}\b"
    return bool(entry_point and re.search(pattern, text, re.M))


def modules(text, entry_point):
    """The text from each of its lines on that can begin a module with this function."""
    lines = text.split("\n")
    if not entry_point:
        return [(text, False)]
    last = max([n for n, line in enumerate(lines) if begins(line, entry_point)], default=-1)
    starts = [n for n in range(last + 1) if lines[n][:1].strip()]
    return [("\n".join(lines[n:]), False) for n in starts]


# --- fences ---------------------------------------------------------------------------------------

def fenced_blocks(text):
    """What stands in the fences of a text, a list of str. A fence without an end goes to the end.

    A block may hold lines that look like its end, in a string of many lines: it ends at the first
    one up to which it is Python, or with the text if that is, else at the first one.
    """
    lines, blocks, n = text.split("\n"), [], 0
    while n < len(lines):
        opening = OPENING.fullmatch(lines[n])
        n += 1
        if not opening:
            continue
        mark = opening[1]
        closing = re.compile(rf"[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*")
        ends = [i for i in range(n, len(lines)) if closing.fullmatch(lines[i])]
        good = (i for i in [*ends, len(lines)] if complete_lines(lines[n:i]) == i - n)
        end = next(good, ends[0] if ends else len(lines))
        blocks.append("\n".join(lines[n:end]) + ("\n" if end < len(lines) else ""))
        n = end + 1
    return blocks


# --- Python ---------------------------------------------------------------------------------------

def complete_lines(lines):
    """How many of these lines, from the first one on, are Python: as many as compile together.

    The compiler reads from the left, so what it stumbles over is out, with all that follows it.
    """
    count = len(lines)
    while count:
        source = "\n".join(lines[:count]) + "\n"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "\d" in a text
                compile(source, "<answer>", "exec", dont_inherit=True)
            return count
        except SyntaxError as error:
            count = min(count, error.lineno or count) - 1
        except ValueError:  # zero bytes, in older Pythons
            count -= 1
        except (RecursionError, MemoryError, OverflowError):
            return 0
    return 0


def needed_part(code, entry_point, whole=False):
    """The code without what its function does not need; None where it does not define it.

    Imports stay, and of the rest what the function reads, directly or not, by name. A function that
    is defined again later has its first body. entry_point: empty where any code will do.
    """
    lines = code.split("\n")
    count = complete_lines(lines)
    if count < len(lines) and whole:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = ast.parse("\n".join(lines[:count]) + "\n").body
    if not entry_point:
        return "\n".join(lines[:count]) if body else None
    body_of = [s for s in body if getattr(s, "name", None) == entry_point and is_written(s)]
    if not body_of:
        return None
    dropped = [s for s in body if s not in needed(body, body_of[0])]
    kept_lines = {n for s in body if s not in dropped for n in lines_of(s)}
    out = {n for s in dropped for n in lines_of(s)} - kept_lines
    kept = [line for n, line in enumerate(lines[:count], 1) if n not in out]
    if out or count < len(lines):
        return "\n".join(kept).rstrip() + "\n"
    return code


def is_written(statement):
    """Whether a definition has more than what a prompt may show of it."""
    shown = (*IMPORTS, ast.Pass)
    return any(not is_text(inner) and not isinstance(inner, shown) for inner in statement.body)


def is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def needed(body, function):
    """The statements of a module that this one needs, itself and imports included."""
    name = function.name
    kept = [s for s in body if isinstance(s, IMPORTS) or is_text(s) or sets_recursion_limit(s)]
    kept.append(function)
    defined, candidates = set(), []
    for s in body:
        again = isinstance(s, DEFINITIONS) and s.name in defined
        if isinstance(s, DEFINITIONS) and is_written(s):
            defined.add(s.name)
        if s not in kept and not again:
            candidates.append(s)
    wanted = reads(function) | {name}
    grown = True
    while grown:
        grown = [s for s in candidates if s not in kept and binds(s) & wanted]
        kept += grown
        wanted |= set().union(*map(reads, grown))
    return kept


def sets_recursion_limit(statement):
    """Whether it is sys.setrecursionlimit(…). Looked up, not unparsed: a statement may be nested
    deeper than Python recurses."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    name = call.func if isinstance(call, ast.Call) else None
    return (isinstance(name, ast.Attribute) and name.attr == "setrecursionlimit"
            and isinstance(name.value, ast.Name) and name.value.id == "sys")


def binds(statement):
    """Names that a statement of a module defines or changes: {str}."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (*DEFINITIONS, ast.ExceptHandler)) and node.name:
            names.add(node.name)
        elif isinstance(node, IMPORTS):
            names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node.ctx, ast.Store):
                names.add(root_of(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names.add(root_of(node.func))  # memo.append(1)
    return names


def root_of(node):
    """'memo' of memo[0].x; empty where it begins with no name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def reads(statement):
    """Names of the module that a statement reads: {str}. A function's own names are not."""
    loaded, own, shared = set(), set(), set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.Global):
            shared |= set(node.names)
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        own = set()
    return loaded - own | shared


def lines_of(statement):
    """The numbers of a statement's lines, from 1, its decorators included."""
    first = [d.lineno for d in getattr(statement, "decorator_list", [])]
    return range(min([statement.lineno, *first]), statement.end_lineno + 1)


def with_prelude(code, task):
    """The code, after the prompt's imports and helpers if it reads one that it does not have."""
    before = prelude(task)
    if not before or code.startswith(before):
        return code
    body = ast.parse(code).body
    has = set().union(*map(binds, body))
    lacks = set().union(*map(reads, body)) - has
    if lacks & set().union(*map(binds, ast.parse(before).body)):
        return before + code
    return code
