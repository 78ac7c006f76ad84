"""What a file may say in the place of a value: every type of JSON, numbers at their ends, texts that are attacks."""

import json

ESCAPES = (
    "\x1b[2J\x1b[1;1Hok",  # clears the screen
    "\x1b]0;title\x07",  # sets the window's title
    "\x9b31mred",  # the one-byte form of ESC [
    "a\rb\nloraloom: done",  # a line of its own
    "abc\u202edef",  # reads from right to left
    "\u0000",
    "\ud800",  # half of a pair: cannot be encoded
)
MARKUP = ("[red]x[/red]", "[/x]", "[link=file:///etc/passwd]x[/link]", "{{ 7 * 7 }}", "<script>alert(1)</script>")
PATHS = ("../../outside", "/etc/passwd", "~/.ssh/id_rsa", "a/../../b", "C:\\x", "")
LONG = "x" * 10_000
DEEP = "a." * 5_000 + "q_proj"

# Each takes an ordinary backtracking engine for ever, or a compiler all memory, on some name of the model.
SLOW = (
    r"(([a-z._0-9])+)+!$",
    r"(.*)*(.*)*(.*)*(.*)*!",
    r"(a|a|[a-z_.0-9])*!",
    r"(?:.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*)!",
    r"^(\w+\.?)+\1\1\1!",
)
HUGE = (
    r"((a{1,1000}){1,1000}){1,1000}",
    r"(x{0,60000}){0,60000}",
    r"a{99999999999999999999}",
    "(" * 5_000 + ")" * 5_000,
    "|".join("ab" * 50 for _ in range(2_000)),
)
BROKEN = ("(", "*", "[", "(?P<x", "\\", "(?<=a*)b", "(?R)", "a{2,1}", "(?P=none)", "[[:alpha:]", "(?i-u:x)")
EXPRESSIONS = SLOW + HUGE + BROKEN

# Written as they stand: some are no JSON by the letter, and Python's reader takes them.
NUMBERS = ("0", "-1", "1.5", "1e400", "-Infinity", "NaN", "1e999999", "-0.0", "1000000000", str(2**63), "9" * 5_000)
SIMPLE = ("null", "true", "false", '"false"', '"true"', '"0"', '""')
NESTED = ("[]", "{}", "[1]", '["x"]', "[[]]", "[null]", "[true]", '{"a": 1}', '{"": null}', '{"q_proj": "x"}')
NESTED += ('{"q_proj": NaN}', '{"q_proj": -1}', '{"q_proj": 1000000000}', "[" * 200 + "]" * 200, '[{"a": [{}]}]')
TEXTS = (*map(json.dumps, (*ESCAPES, *MARKUP[:3], *PATHS[:3], LONG)),)
EVERYTHING = NUMBERS + SIMPLE + NESTED + TEXTS
# Of no reader of JSON, and not of ours.
NO_JSON = (
    *("", "nul", "{", '{"r": 4', '{"r": 4,}', "[]", "4", '"x"', "null", "\ufeff{}", '{"r": 4} {}', "{'r': 4}"),
    *("[" * 100_000, '{"a":' * 100_000, '{"r": ' + "9" * 5_000 + "}", '{"r": "\ud800'),
)
