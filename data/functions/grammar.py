"""A grammar of small Python functions: the families that compose the vocabulary of parts.py.

    Family + a Used for each slot -> a sentence, a body

FAMILIES compose two ideas. HARD_FAMILIES compose three, or two that are never together elsewhere,
out of the same parts.

Placeholders: ARG the argument, NAME the function.

Not covered: draws, names, splits and tests (prepare.py).
"""
from dataclasses import dataclass
from itertools import product

from data.functions import parts as p
from data.functions.parts import ANY, SAME, Used

# --- how parts are put together -------------------------------------------------------------------

def noun_phrase(noun, test, change, choose, source=None):
    """'the squares of the even numbers among the first 3'."""
    phrase = test.words(choose).replace("NOUN", noun)
    if source is not None:
        phrase = source.words(choose).replace("NOUN", phrase)
    return change.words(choose).replace("NP", f"the {phrase}")


def written(template, variable, test, value, source="ARG", loop=None):
    """A template with its placeholders filled.

    test: code, or '' for none. value: code. loop: what stands after `for`, if not the variable.
    """
    loop = loop or variable
    lines = []
    for line in template.splitlines(keepends=True):
        if line[0] == "?" and test:
            line = f"        if {test}:\n            {line[1:]}"
        elif line[0] == "?":
            line = f"        {line[1:]}"
        lines.append(line)
    code = "".join(lines)
    if not test and value == loop:
        code = code.replace("[ITEMS]", f"list({source})").replace("((ITEMS)", "(ITEMS")
        code = code.replace("ITEMS", source)
    code = code.replace("ITEMS", "VALUE for X in SOURCE if TEST")
    if not test:
        code = code.replace(" if TEST", "")
    code = code.replace("for X in", f"for {loop} in").replace("X", variable)
    return code.replace("TEST", test).replace("VALUE", value).replace("SOURCE", source)


@dataclass(frozen=True)
class Family:
    """name: of its group, as items tell it. shape: its own. kind: what the argument is.

    slots: a tuple of parts for each. say(used, choose): a sentence about ARG. body(used): code.
    """
    name: str
    shape: str
    kind: str
    slots: tuple
    say: object
    body: object

    def combinations(self):
        """Every tuple of parts, one for each slot, that makes sense."""
        return [parts for parts in product(*self.slots) if is_sensible(parts)]

    def is_held_out(self, parts):
        """Whether a combination is for the test splits alone.

        The parts' places in their slots, the first slot's once, the second's twice and so on, add
        up to 3 modulo 7. So each part, and each pair of parts of a family with three slots or
        more, occurs in training too.
        """
        places = [slot.index(part) for slot, part in zip(self.slots, parts)]
        return sum(n * place for n, place in enumerate(places, 1)) % 7 == 3


def is_sensible(parts):
    """No part is used twice, and no test is beside its opposite."""
    names = [part.name for part in parts if part not in (ANY, SAME)]
    if len(set(names)) < len(names):
        return False
    return not any(pair <= set(names) for pair in p.OPPOSITES)


def optional(tests):
    return (ANY, *tests)


def or_same(changes):
    return (SAME, *changes)


def sliced(used):
    """The slots without the one for a source, if there is one, and that source: (used, source)."""
    if used[1].part in p.SOURCES:
        return (used[0], *used[2:]), used[1]
    return used, None


def code_of(source):
    return source.code("") if source else "ARG"


def collected(noun, variable):
    """say and body for slots (collect, test, change) or (collect, source, test, change)."""
    def say(used, choose):
        (collect, test, change), source = sliced(used)
        phrase = noun_phrase(noun, test, change, choose, source)
        return collect.words(choose).replace("NP", phrase)

    def body(used):
        (collect, test, change), source = sliced(used)
        template = collect.fill(collect.part.code)
        return written(template, variable, test.code(variable), change.code(variable),
                       code_of(source))

    return say, body


def keyed(noun, variable):
    """Slots as those of `collected`: dictionaries out of lists."""
    def say(used, choose):
        (collect, test, change), source = sliced(used)
        sentence = collect.words(choose).replace("VP", change.one("each"))
        return sentence.replace("NP", noun_phrase(noun, test, Used(SAME), choose, source))

    return say, collected(noun, variable)[1]


def of_table(place, variable):
    """Slots (collect, test, change): of the entries of a dictionary. place: 'key' or 'value'."""
    def say(used, choose):
        entries = f"each entry whose {place} {used[1].one('')}"
        return used[0].words(choose).replace("VP", used[2].one("the value")).replace("EP", entries)

    def body(used):
        test, value = used[1].code(variable), used[2].code("x")
        return written(used[0].part.code, variable, test, value, "ARG.items()", "w, x")

    return say, body


def checked(noun, variable):
    """Slots (quantifier, test, test) or (quantifier, source, test, test)."""
    def say(used, choose):
        (quantifier, test, wanted), source = sliced(used)
        phrase = noun_phrase(noun, test, Used(SAME), choose, source)
        sentence = quantifier.words(choose).replace("NP", phrase)
        return sentence.replace("ONE", wanted.one(""))

    def body(used):
        (quantifier, test, wanted), source = sliced(used)
        template = f"    return {quantifier.part.code}\n"
        return written(template, variable, test.code(variable), wanted.code(variable),
                       code_of(source))

    return say, body


def until(noun, variable):
    """Slots (until, stop, test, change)."""
    def say(used, choose):
        phrase = noun_phrase(f"{noun}s", used[2], used[3], choose)
        stop = used[1].fill(used[1].part.words[0]).replace("NOUN", noun)
        return used[0].words(choose).replace("NP", phrase).replace("SP", stop)

    def body(used):
        code = written(used[0].part.code, variable, used[2].code(variable), used[3].code(variable))
        return code.replace("STOP", used[1].code(variable))

    return say, body


def say_score(used, choose):
    """Slots (test, change, change)."""
    plus = noun_phrase("numbers", used[0], used[1], choose)
    minus = used[2].words(choose).replace("NP", "the others")
    return f"Add {plus} and subtract {minus}."


def score(used):
    test, plus, minus = (part.code("x") for part in used)
    return (f"    total = 0\n    for x in ARG:\n        if {test}:\n            total += {plus}\n"
            f"        else:\n            total -= {minus}\n    return total\n")


def say_digits(used, choose):
    """Slots (sum, test, change)."""
    phrase = noun_phrase("digits", used[1], used[2], choose)
    return used[0].words(choose).replace("NP", phrase)


def digits(used):
    test, value = used[1].code("x"), used[2].code("x")
    rest = "NAME(ARG // 10)"
    step = used[0].part.code.replace("VALUE", value).replace("REST", rest)
    code = "    if ARG == 0:\n        return 0\n    x = ARG % 10\n"
    if test:
        return code + f"    if {test}:\n        return {step}\n    return {rest}\n"
    return code + f"    return {step}\n"


def say_sequence(used, choose):
    """Slots (start, test, change, change)."""
    start, test, then, otherwise = used
    return (f"Use recursion. {start.words(choose)} ARG times, take {then.one('it')} if it "
            f"{test.one('')}, otherwise {otherwise.one('it')}.")


def sequence(used):
    start, test, then, otherwise = (part.code("x") for part in used)
    return (f"    if ARG == 0:\n        return {start}\n    x = NAME(ARG - 1)\n"
            f"    if {test}:\n        return {then}\n    return {otherwise}\n")


def say_branch(used, choose):
    """Slots (test, change, change)."""
    test, then, otherwise = used
    return (f"{choose(('If', 'When'))} ARG {test.one('')}, return {then.one('ARG')}, "
            f"otherwise {otherwise.one('ARG')}.")


def branch(used):
    test, then, otherwise = (part.code("ARG") for part in used)
    return f"    if {test}:\n        return {then}\n    return {otherwise}\n"


def say_guard(used, choose):
    """Slots (test, test, change, change): a branch under two conditions."""
    first, second, then, otherwise = used
    return (f"{choose(('If', 'When'))} ARG {first.one('')} and {second.one('')}, return "
            f"{then.one('ARG')}, otherwise {otherwise.one('ARG')}.")


def guard(used):
    first, second, then, otherwise = (part.code("ARG") for part in used)
    return f"    if {first} and {second}:\n        return {then}\n    return {otherwise}\n"


def say_pair(used, choose):
    """Slots (operator, value, test, value, test)."""
    same = Used(SAME)
    left = used[1].words(choose).replace("NP", noun_phrase("numbers", used[2], same, choose))
    right = used[3].words(choose).replace("NP", noun_phrase("numbers", used[4], same, choose))
    return used[0].words(choose).replace("AP", left).replace("BP", right)


def pair(used):
    left = written(f"    a = {used[1].part.code}\n", "x", used[2].code("x"), "x")
    right = written(f"    b = {used[3].part.code}\n", "x", used[4].code("x"), "x")
    return f"{left}{right}    return {used[0].part.code}\n"


def say_both(used, choose):
    """Slots (collect, test, test, change): two conditions."""
    phrase = f"the numbers that are {bare(used[1])} and {bare(used[2])}"
    phrase = used[3].words(choose).replace("NP", phrase)
    return used[0].words(choose).replace("NP", phrase)


def bare(test):
    """'greater than 3' of 'is greater than 3'."""
    return test.one("").removeprefix("is ")


def both(used):
    tests = f"{used[1].code('x')} and {used[2].code('x')}"
    return written(used[0].fill(used[0].part.code), "x", tests, used[3].code("x"))


# --- the families ---------------------------------------------------------------------------------

def family(name, shape, kind, slots, functions):
    return Family(name, shape, kind, slots, *functions)


NUMBER = optional(p.NUMBER_TESTS), or_same(p.NUMBER_CHANGES)
WORD = optional(p.WORD_TESTS), or_same(p.WORD_CHANGES)
CHAR = optional(p.CHAR_TESTS), or_same(p.CHAR_CHANGES)
TABLE_CHANGES = or_same(p.NUMBER_CHANGES)

FAMILIES = (
    family("comprehensions", "list numbers", "numbers", (p.NUMBER_LISTS, *NUMBER),
           collected("numbers", "x")),
    family("aggregates", "sum numbers", "numbers", (p.NUMBER_SUMS, *NUMBER),
           collected("numbers", "x")),
    family("aggregates", "check numbers", "numbers",
           (p.QUANTIFIERS, p.NUMBER_TESTS, p.NUMBER_TESTS), checked("numbers", "x")),
    family("strings", "list words", "words", (p.WORD_LISTS, *WORD), collected("words", "w")),
    family("strings", "list characters", "text", (p.CHAR_LISTS, *CHAR),
           collected("characters", "c")),
    family("dictionaries", "key words", "words",
           (p.KEYED, WORD[0], p.WORD_KEYS), keyed("words", "w")),
    family("dictionaries", "table by value", "table",
           (p.TABLE_LISTS, p.NUMBER_TESTS, TABLE_CHANGES), of_table("value", "x")),
    family("dictionaries", "table by key", "table",
           (p.TABLE_LISTS, p.WORD_TESTS, TABLE_CHANGES), of_table("key", "w")),
    family("loops", "state", "numbers", (p.NUMBER_LOOPS, *NUMBER), collected("numbers", "x")),
    family("loops", "until", "numbers",
           (p.UNTIL, p.NUMBER_TESTS, (ANY,), NUMBER[1]), until("number", "x")),
    family("loops", "score", "numbers",
           (p.NUMBER_TESTS, p.NUMBER_CHANGES, p.NUMBER_CHANGES), (say_score, score)),
    family("recursion", "digits", "natural",
           (p.DIGIT_SUMS, optional(p.DIGIT_TESTS), or_same(p.DIGIT_CHANGES)), (say_digits, digits)),
    family("recursion", "sequence", "steps",
           (p.STARTS, p.NUMBER_TESTS, p.SLOW_CHANGES, p.SLOW_CHANGES), (say_sequence, sequence)),
    family("branches", "branch on a number", "number",
           (p.NUMBER_TESTS, p.NUMBER_CHANGES, p.NUMBER_CHANGES), (say_branch, branch)),
    family("branches", "branch on a word", "word",
           (p.WORD_TESTS, p.WORD_CHANGES, p.WORD_CHANGES), (say_branch, branch)),
    family("branches", "guard, then", "number",
           (p.NUMBER_TESTS, p.NUMBER_TESTS, p.NUMBER_CHANGES, (SAME,)), (say_guard, guard)),
    family("branches", "guard, otherwise", "number",
           (p.NUMBER_TESTS, p.NUMBER_TESTS, (SAME,), p.NUMBER_CHANGES), (say_guard, guard)),
    family("composition", "slice numbers, test", "numbers",
           (p.NUMBER_LISTS + p.NUMBER_SUMS, p.SOURCES, p.NUMBER_TESTS, (SAME,)),
           collected("numbers", "x")),
    family("composition", "slice numbers, change", "numbers",
           (p.NUMBER_LISTS + p.NUMBER_SUMS, p.SOURCES, (ANY,), p.NUMBER_CHANGES),
           collected("numbers", "x")),
    family("composition", "slice words, test", "words",
           (p.WORD_LISTS, p.SOURCES, p.WORD_TESTS, (SAME,)), collected("words", "w")),
    family("composition", "slice words, change", "words",
           (p.WORD_LISTS, p.SOURCES, (ANY,), p.WORD_CHANGES), collected("words", "w")),
    family("composition", "two tests", "numbers",
           (p.NUMBER_LISTS + p.NUMBER_SUMS, p.NUMBER_TESTS, p.NUMBER_TESTS, (SAME,)),
           (say_both, both)),
    family("composition", "pair", "numbers",
           (p.OPERATORS, p.VALUES, p.NUMBER_TESTS, p.VALUES, p.NUMBER_TESTS), (say_pair, pair)),
)

HARD_FAMILIES = (
    family("hard slices", "slice, test and change numbers", "numbers",
           (p.NUMBER_LISTS + p.NUMBER_SUMS, p.SOURCES, p.NUMBER_TESTS, p.NUMBER_CHANGES),
           collected("numbers", "x")),
    family("hard slices", "slice, test and change words", "words",
           (p.WORD_LISTS, p.SOURCES, p.WORD_TESTS, p.WORD_CHANGES),
           collected("words", "w")),
    family("hard conditions", "two tests and a change", "numbers",
           (p.NUMBER_LISTS + p.NUMBER_SUMS, p.NUMBER_TESTS, p.NUMBER_TESTS, p.NUMBER_CHANGES),
           (say_both, both)),
    family("hard branches", "two conditions, two changes", "number",
           (p.NUMBER_TESTS, p.NUMBER_TESTS, p.NUMBER_CHANGES, p.NUMBER_CHANGES),
           (say_guard, guard)),
    family("hard dictionaries", "key a slice", "words",
           (p.KEYED, p.SOURCES, p.WORD_TESTS, p.WORD_KEYS), keyed("words", "w")),
    family("hard aggregates", "check a slice", "numbers",
           (p.QUANTIFIERS, p.SOURCES, p.NUMBER_TESTS, p.NUMBER_TESTS), checked("numbers", "x")),
    family("hard loops", "until, test and change", "numbers",
           (p.UNTIL, p.NUMBER_TESTS, p.NUMBER_TESTS, p.NUMBER_CHANGES), until("number", "x")),
    family("hard loops", "sliced state", "numbers",
           (p.NUMBER_LOOPS, p.SOURCES, p.NUMBER_TESTS, p.NUMBER_CHANGES),
           collected("numbers", "x")),
)
