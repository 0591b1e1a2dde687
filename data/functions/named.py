"""Functions that everybody knows by name: a signature is prompt enough.

    def is_palindrome(text):    ->    a docstring and a body

Items of the grammar say in words what to compute, under names that say nothing. These teach the
other way to ask. Each is (name, kind of argument, sentence, body), ARG its argument.

Not covered: draws and tests (prepare.py).
"""
TESTS = {
    "even": "x % 2 == 0",
    "odd": "x % 2 == 1",
    "positive": "x > 0",
    "negative": "x < 0",
}
OVER_TESTS = (  # name, sentence, body; ADJECTIVE and TEST are those of a test
    ("count_ADJECTIVE", "Count the ADJECTIVE numbers.",
     "    return sum(1 for x in ARG if TEST)\n"),
    ("sum_ADJECTIVE", "Return the sum of the ADJECTIVE numbers.",
     "    return sum(x for x in ARG if TEST)\n"),
    ("filter_ADJECTIVE", "Return a list of the ADJECTIVE numbers.",
     "    return [x for x in ARG if TEST]\n"),
    ("has_ADJECTIVE", "Return whether any of the numbers is ADJECTIVE.",
     "    return any(TEST for x in ARG)\n"),
    ("all_ADJECTIVE", "Return whether all of the numbers are ADJECTIVE.",
     "    return all(TEST for x in ARG)\n"),
)
ALONE = (
    # strings
    ("is_palindrome", "word", "Return whether ARG is a palindrome.",
     "    return ARG == ARG[::-1]\n"),
    ("reverse_string", "word", "Return ARG in reverse.", "    return ARG[::-1]\n"),
    ("count_vowels", "text", "Count the vowels in ARG.",
     '    return sum(1 for c in ARG if c in "aeiou")\n'),
    ("remove_vowels", "text", "Return ARG without its vowels.",
     '    return "".join(c for c in ARG if c not in "aeiou")\n'),
    ("count_digits", "text", "Count the digits in ARG.",
     "    return sum(1 for c in ARG if c.isdigit())\n"),
    ("remove_spaces", "text", "Return ARG without its spaces.",
     '    return ARG.replace(" ", "")\n'),
    ("count_words", "text", "Count the words in ARG.", "    return len(ARG.split())\n"),
    ("to_upper", "word", "Return ARG in upper case.", "    return ARG.upper()\n"),
    ("is_upper", "word", "Return whether ARG is in upper case.", "    return ARG.isupper()\n"),
    ("first_letter", "word", "Return the first letter of ARG.", "    return ARG[:1]\n"),
    ("char_counts", "text", "Count each character of ARG.",
     "    result = {}\n    for c in ARG:\n        result[c] = result.get(c, 0) + 1\n"
     "    return result\n"),
    # lists of words
    ("longest_word", "words", "Return the longest of the words, or ''.",
     '    return max(ARG, key=len, default="")\n'),
    ("shortest_word", "words", "Return the shortest of the words, or ''.",
     '    return min(ARG, key=len, default="")\n'),
    ("word_lengths", "words", "Return a list of the lengths of the words.",
     "    return [len(w) for w in ARG]\n"),
    ("join_words", "words", "Join the words with spaces.", '    return " ".join(ARG)\n'),
    ("total_length", "words", "Return the sum of the lengths of the words.",
     "    return sum(len(w) for w in ARG)\n"),
    ("word_counts", "words", "Count each of the words.",
     "    result = {}\n    for w in ARG:\n        result[w] = result.get(w, 0) + 1\n"
     "    return result\n"),
    # lists of numbers
    ("sum_of_squares", "numbers", "Return the sum of the squares of the numbers.",
     "    return sum(x * x for x in ARG)\n"),
    ("square_all", "numbers", "Return a list of the squares of the numbers.",
     "    return [x * x for x in ARG]\n"),
    ("double_all", "numbers", "Return a list of 2 times each of the numbers.",
     "    return [x * 2 for x in ARG]\n"),
    ("sum_all", "numbers", "Return the sum of the numbers.", "    return sum(ARG)\n"),
    ("product", "numbers", "Return the product of the numbers.",
     "    result = 1\n    for x in ARG:\n        result *= x\n    return result\n"),
    ("average", "numbers", "Return the average of the numbers, or 0.",
     "    if not ARG:\n        return 0\n    return sum(ARG) / len(ARG)\n"),
    ("maximum", "numbers", "Return the maximum of the numbers, or 0.",
     "    return max(ARG, default=0)\n"),
    ("minimum", "numbers", "Return the minimum of the numbers, or 0.",
     "    return min(ARG, default=0)\n"),
    ("unique", "numbers", "Sort the numbers and drop duplicates.",
     "    return sorted(set(ARG))\n"),
    ("reverse_list", "numbers", "Return the numbers in reverse.", "    return ARG[::-1]\n"),
    ("is_sorted", "numbers", "Return whether the numbers are sorted.",
     "    return all(a <= b for a, b in zip(ARG, ARG[1:]))\n"),
    ("running_sum", "numbers", "Return a list of the running sums of the numbers.",
     "    result = []\n    total = 0\n    for x in ARG:\n        total += x\n"
     "        result.append(total)\n    return result\n"),
    # numbers
    ("is_even", "number", "Return whether ARG is even.", "    return ARG % 2 == 0\n"),
    ("is_odd", "number", "Return whether ARG is odd.", "    return ARG % 2 == 1\n"),
    ("is_prime", "number", "Return whether ARG is a prime number.",
     "    if ARG < 2:\n        return False\n"
     "    return all(ARG % k != 0 for k in range(2, ARG))\n"),
    ("square", "number", "Return the square of ARG.", "    return ARG * ARG\n"),
    ("double", "number", "Return 2 times ARG.", "    return ARG * 2\n"),
    ("absolute", "number", "Return the absolute value of ARG.", "    return abs(ARG)\n"),
    ("sign", "number", "Return the sign of ARG: 1, 0 or -1.",
     "    if ARG > 0:\n        return 1\n    if ARG < 0:\n        return -1\n    return 0\n"),
    ("factorial", "steps", "Return the factorial of ARG.",
     "    result = 1\n    for k in range(2, ARG + 1):\n        result *= k\n    return result\n"),
    ("fibonacci", "steps", "Return the Fibonacci number ARG.",
     "    a, b = 0, 1\n    for _ in range(ARG):\n        a, b = b, a + b\n    return a\n"),
    ("sum_to", "steps", "Return the sum of the numbers from 1 to ARG.",
     "    return sum(range(1, ARG + 1))\n"),
    ("sum_digits", "natural", "Return the sum of the digits of ARG.",
     "    return sum(int(d) for d in str(ARG))\n"),
    ("count_down", "steps", "Return a list of the numbers from ARG down to 1.",
     "    return list(range(ARG, 0, -1))\n"),
)


def over_tests():
    """OVER_TESTS with each of TESTS."""
    for name, sentence, body in OVER_TESTS:
        for adjective, test in TESTS.items():
            yield (name.replace("ADJECTIVE", adjective), "numbers",
                   sentence.replace("ADJECTIVE", adjective), body.replace("TEST", test))


NAMED = (*ALONE, *over_tests())
