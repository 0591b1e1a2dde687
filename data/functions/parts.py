"""The vocabulary of a grammar of small Python functions: tests, changes, ways to collect.

    Part + constant -> Used          "greater than 3", `x > 3`

A part's words always mean the same code, so the meaning of a composition follows from its parts:
whoever knows the parts can write functions that were never shown.

Placeholders of code: X a variable, K the part's constant, ARG the argument, NAME the function.
Of words: NOUN, NP, VP, … another phrase, IT a single thing.

Not covered: how parts are composed (grammar.py).
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """words: of several things ("the even NOUN", "the squares of NP"). one: of a single one, IT."""
    name: str
    code: str
    words: tuple = ()
    one: str = ""
    constants: tuple = (0,)  # what K may be


@dataclass(frozen=True)
class Used:
    """A part with its constant."""
    part: Part
    constant: object = 0

    @property
    def name(self):
        return self.part.name

    def fill(self, text):
        return text.replace("K", str(self.constant))

    def code(self, variable):
        """Its code; of the part `any`, the empty string; of `same`, the variable."""
        return self.fill(self.part.code).replace("X", variable)

    def words(self, choose):
        """One of its phrases. choose: a function that picks one of a tuple."""
        return self.fill(choose(self.part.words))

    def one(self, it):
        """Its phrase about a single thing."""
        return self.fill(self.part.one).replace("IT", it)


# --- tests ----------------------------------------------------------------------------------------

def adjective(name, code, constants=(0,), word=None):
    """A test of numbers whose word stands before the noun: "even"."""
    word = word or name
    return Part(name, code, (f"{word} NOUN", f"NOUN that are {word}"), f"is {word}", constants)


def comparison(name, code, words, constants):
    """A test of numbers whose words stand behind the noun: "greater than 3"."""
    return Part(name, code, (f"NOUN {words}", f"NOUN that are {words}"), f"is {words}", constants)


def verb(name, code, single, many, constants=(0,)):
    """A test of words: "starts with", "start with"."""
    return Part(name, code, (f"NOUN that {many}",), single, constants)


ANY = Part("any", "", ("NOUN",), "")
SAME = Part("same", "X", ("NP",), "IT")

NUMBER_TESTS = (
    adjective("even", "X % 2 == 0"),
    adjective("odd", "X % 2 == 1"),
    adjective("positive", "X > 0"),
    adjective("negative", "X < 0"),
    comparison("greater", "X > K", "greater than K", (2,)),
    comparison("less", "X < K", "less than K", (5,)),
    comparison("divisible", "X % K == 0", "divisible by K", (3,)),
)
DIGIT_TESTS = tuple(p for p in NUMBER_TESTS if p.name not in ("positive", "negative"))
WORD_TESTS = (
    verb("longer", "len(X) > K", "is longer than K", "are longer than K", (3,)),
    verb("shorter", "len(X) < K", "is shorter than K", "are shorter than K", (5,)),
    verb("starts", 'X.startswith("K")', "starts with 'K'", "start with 'K'", ("a",)),
    verb("ends", 'X.endswith("K")', "ends with 'K'", "end with 'K'", ("s",)),
    verb("contains", '"K" in X', "contains 'K'", "contain 'K'", ("e",)),
    verb("upper", "X.isupper()", "is in upper case", "are in upper case"),
    verb("palindrome", "X == X[::-1]", "is a palindrome", "are palindromes"),
)
CHAR_TESTS = (
    Part("vowel", 'X in "aeiou"', ("vowels",)),
    Part("digit", "X.isdigit()", ("digits",)),
    Part("letter", "X.isalpha()", ("letters",)),
    Part("upper", "X.isupper()", ("upper case letters",)),
    Part("unequal", 'X != "K"', ("characters other than 'K'",), constants=("a",)),
)

# --- changes --------------------------------------------------------------------------------------

NUMBER_CHANGES = (
    Part("square", "X * X", ("the squares of NP", "the square of each of NP"), "the square of IT"),
    Part("cube", "X ** 3", ("the cubes of NP", "the cube of each of NP"), "the cube of IT"),
    Part("abs", "abs(X)", ("the absolute values of NP",), "the absolute value of IT"),
    Part("negate", "-X", ("the negatives of NP",), "the negative of IT"),
    Part("half", "X // 2", ("half of each of NP",), "half of IT"),
    Part("times", "X * K", ("K times each of NP",), "K times IT", (2, 3)),
    Part("plus", "X + K", ("K plus each of NP",), "K plus IT", (1,)),
    Part("minus", "X - K", ("each of NP minus K",), "IT minus K", (2,)),
    Part("remainder", "X % K", ("the remainders modulo K of NP",),
         "the remainder modulo K of IT", (5,)),
)
SLOW_CHANGES = NUMBER_CHANGES[2:]  # they may be applied again and again
DIGIT_CHANGES = tuple(p for p in NUMBER_CHANGES if p.name != "abs")
OPPOSITES = ({"even", "odd"}, {"positive", "negative"}, {"greater", "less"}, {"longer", "shorter"})
WORD_CHANGES = (
    Part("upper", "X.upper()", ("the upper case of NP",), "the upper case of IT"),
    Part("lower", "X.lower()", ("the lower case of NP",), "the lower case of IT"),
    Part("reverse", "X[::-1]", ("the reverses of NP", "the reverse of each of NP"),
         "the reverse of IT"),
    Part("copies", "X * K", ("K copies of each of NP",), "K copies of IT", (2,)),
    Part("head", "X[:K]", ("the first K letters of each of NP",), "the first K letters of IT",
         (2,)),
    Part("tail", "X[-K:]", ("the last K letters of each of NP",), "the last K letters of IT",
         (3,)),
    Part("without", 'X.replace("K", "")', ("each of NP without 'K'",), "IT without 'K'", ("e",)),
)
WORD_KEYS = WORD_CHANGES + (
    Part("size", "len(X)", ("the lengths of NP", "the length of each of NP"), "the length of IT"),)
CHAR_CHANGES = WORD_CHANGES[:2] + WORD_CHANGES[3:4]

# --- ways to collect ------------------------------------------------------------------------------
# ITEMS becomes `value for x in source if test`; a line that begins with ? stands under that test.

NUMBER_LISTS = (
    Part("list", "    return [ITEMS]\n", ("Return a list of NP.", "List NP.")),
    Part("distinct", "    return sorted(set(ITEMS))\n",
         ("Sort and deduplicate NP.", "Sort NP and drop duplicates.")),
    Part("descending", "    return sorted((ITEMS), reverse=True)\n",
         ("Sort NP from high to low.", "Return a list of NP from high to low.")),
    Part("ascending", "    return sorted(ITEMS)\n",
         ("Sort NP.", "Return a sorted list of NP.")),
)
NUMBER_SUMS = (
    Part("sum", "    return sum(ITEMS)\n", ("Return the sum of NP.", "Add up NP.")),
    Part("max", "    return max((ITEMS), default=0)\n",
         ("Return the maximum of NP, or 0.", "Find the maximum of NP, or 0.")),
    Part("min", "    return min((ITEMS), default=0)\n",
         ("Return the minimum of NP, or 0.", "Find the minimum of NP, or 0.")),
    Part("product", "    result = 1\n    for X in SOURCE:\n?result *= VALUE\n    return result\n",
         ("Return the product of NP.", "Multiply NP.")),
)
NUMBER_LOOPS = (
    Part("running_sum", "    total = 0\n    result = []\n    for X in SOURCE:\n?total += VALUE\n"
         "        result.append(total)\n    return result\n",
         ("Return the running sum of NP.", "List the running sum of NP.")),
    Part("running_max", "    best = 0\n    result = []\n    for X in SOURCE:\n"
         "?best = max(best, VALUE)\n        result.append(best)\n    return result\n",
         ("Starting at 0, list the running maximum of NP.",)),
    Part("first", "    for X in SOURCE:\n?return VALUE\n    return 0\n",
         ("Return the first of NP, or 0.", "Find the first of NP, or 0.")),
    Part("last", "    result = 0\n    for X in SOURCE:\n?result = VALUE\n    return result\n",
         ("Return the last of NP, or 0.", "Find the last of NP, or 0.")),
)
WORD_LISTS = (
    Part("list", "    return [ITEMS]\n", ("Return a list of NP.", "List NP.")),
    Part("ascending", "    return sorted(ITEMS)\n", ("Sort NP.", "Return a sorted list of NP.")),
    Part("join", '    return "K".join(ITEMS)\n', ("Use 'K' to join NP.",), "", (",",)),
    Part("longest", '    return max((ITEMS), key=len, default="")\n',
         ("Return the longest of NP, or ''.", "Find the longest of NP, or ''.")),
    Part("shortest", '    return min((ITEMS), key=len, default="")\n',
         ("Return the shortest of NP, or ''.", "Find the shortest of NP, or ''.")),
    Part("distinct", "    return sorted(set(ITEMS))\n",
         ("Sort and deduplicate NP.", "Sort NP and drop duplicates.")),
    Part("size", "    return sum(len(VALUE) for X in SOURCE if TEST)\n",
         ("Return the total length of NP.", "Add up the lengths of NP.")),
)
CHAR_LISTS = (
    Part("list", "    return [ITEMS]\n", ("Return a list of NP.", "List NP.")),
    Part("text", '    return "".join(ITEMS)\n', ("Return a string of NP.", "Join NP.")),
    Part("join", '    return "K".join(ITEMS)\n', ("Use 'K' to join NP.",), "", (",",)),
    Part("distinct", "    return sorted(set(ITEMS))\n",
         ("Sort and deduplicate NP.", "Sort NP and drop duplicates.")),
    Part("ascending", "    return sorted(ITEMS)\n", ("Sort NP.", "Return a sorted list of NP.")),
)
KEYED = (
    Part("map", "    return {X: VALUE for X in SOURCE if TEST}\n",
         ("Map NP to VP.", "Return a dictionary of NP and VP.")),
    Part("group", "    result = {}\n    for X in SOURCE:\n?result.setdefault(VALUE, []).append(X)\n"
         "    return result\n", ("Group NP by VP.",)),
    Part("tally", "    result = {}\n    for X in SOURCE:\n"
         "?result[VALUE] = result.get(VALUE, 0) + 1\n    return result\n", ("Count NP by VP.",)),
)
TABLE_LISTS = (
    Part("table", "    return {w: VALUE for X in SOURCE if TEST}\n",
         ("For EP, map the key to VP.",)),
    Part("values", "    return [VALUE for X in SOURCE if TEST]\n", ("For EP, list VP.",)),
    Part("total", "    return sum(VALUE for X in SOURCE if TEST)\n", ("For EP, add up VP.",)),
)
QUANTIFIERS = (
    Part("all", "all(ITEMS)", ("Check that each of NP ONE.", "Return whether each of NP ONE.")),
    Part("any", "any(ITEMS)", ("Check that any of NP ONE.", "Return whether any of NP ONE.")),
)
UNTIL = (
    Part("sum", "    total = 0\n    for X in SOURCE:\n        if STOP:\n            break\n"
         "?total += VALUE\n    return total\n", ("Add up NP, but stop at the first SP.",)),
    Part("list", "    result = []\n    for X in SOURCE:\n        if STOP:\n            break\n"
         "?result.append(VALUE)\n    return result\n", ("List NP, but stop at the first SP.",)),
    Part("max", "    best = 0\n    for X in SOURCE:\n        if STOP:\n            break\n"
         "?best = max(best, VALUE)\n    return best\n",
         ("Starting at 0, find the maximum of NP, but stop at the first SP.",)),
)
DIGIT_SUMS = (
    Part("sum", "VALUE + REST", ("Use recursion to add up NP.",)),
    Part("max", "max(VALUE, REST)", ("Starting at 0, use recursion to find the maximum of NP.",)),
)
STARTS = (Part("start", "K", ("Start at K.",), constants=(3,)),)
VALUES = (
    Part("sum", "sum(ITEMS)", ("the sum of NP",)),
    Part("count", "sum(1 for X in SOURCE if TEST)", ("the number of NP",)),
    Part("max", "max((ITEMS), default=0)", ("the maximum of NP or 0",)),
)
OPERATORS = (
    Part("plus", "a + b", ("Return AP plus BP.",)),
    Part("minus", "a - b", ("Return AP minus BP.",)),
    Part("times", "a * b", ("Return AP times BP.",)),
)
SOURCES = (
    Part("first", "ARG[:K]", ("NOUN among the first K",), constants=(3,)),
    Part("last", "ARG[-K:]", ("NOUN among the last K",), constants=(2,)),
    Part("rest", "ARG[K:]", ("NOUN after the first K",), constants=(1,)),
    Part("second", "ARG[::2]", ("NOUN among every second one",)),
)
