"""A small language of analytic expressions in x: its grammar, and expressions as one-hot sequences of its rules.

An expression such as `2*sin(x)+x^3` is written down by the rules that build it from the start symbol E, where each rule
replaces the leftmost symbol that still stands for something (a leftmost derivation). A sequence has 72 rows of 53
numbers: one rule per row, and padding, the last of the 53, after the end.
"""

import random

import numpy as np

from molecule_diffusion.checks import check_count, check_seed, quoted

# ---------------------------------------------------------------------------------------------------------------------
# The grammar
# ---------------------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "trigonometric": ("sin", "cos", "tan", "arcsin", "arccos", "arctan"),
    "hyperbolic": ("sinh", "cosh", "tanh", "arcsinh"),
    "exponential": ("exp", "log", "log2", "log10"),
    "power": ("sqrt", "cbrt", "abs"),  # and the powers, B ^ K
}
EXPONENTS = ("2", "3", "4", "5", "6", "(-1)", "(-2)", "(-3)", "(-4)")

EXPRESSION_RULES = (  # left side, right side; symbols that stand for something else are capital letters
    ("E", ("E", "+", "T")),
    ("E", ("E", "-", "T")),
    ("E", ("T",)),
    ("T", ("T", "*", "F")),
    ("T", ("T", "/", "F")),
    ("T", ("F",)),
    ("F", ("B", "^", "K")),
    ("F", ("B",)),
    ("B", ("(", "E", ")")),
    ("B", ("x",)),
    ("B", ("N",)),
    ("B", ("pi",)),
    ("B", ("e",)),
    *(("B", (name, "(", "E", ")")) for names in FUNCTIONS.values() for name in names),
    ("N", ("D",)),
    ("N", ("D", "D")),
    ("N", ("D", ".", "D")),
    *(("D", (digit,)) for digit in "0123456789"),
    *(("K", (exponent,)) for exponent in EXPONENTS),
)
START = "E"
SYMBOLS = ("E", "T", "F", "B", "N", "D", "K")
PADDING = len(EXPRESSION_RULES)  # 52
LENGTH, WIDTH = 72, len(EXPRESSION_RULES) + 1

_RULE = {rule: number for number, rule in enumerate(EXPRESSION_RULES)}
_BINARY = {"+": "sum", "-": "difference", "*": "product", "/": "quotient"}
EXPRESSION_TYPES = (*_BINARY.values(), *FUNCTIONS)  # eight: the operation that is done last
EXPRESSION_PARTS = tuple(f"{two} of two, {one} of one" for two in range(1, 6) for one in range(4))  # twenty


def _operation_of(right):
    """What a rule does: an expression type where it computes something, None where it only hands on."""
    if len(right) == 3 and right[1] in _BINARY and right[0] != "D":
        return _BINARY[right[1]]
    if right[-1] == "K":
        return "power"
    for operation, names in FUNCTIONS.items():
        if right[0] in names:
            return operation
    return None


_OPERATIONS = tuple(_operation_of(right) for _, right in EXPRESSION_RULES)

# ---------------------------------------------------------------------------------------------------------------------
# From rules to texts and numbers
# ---------------------------------------------------------------------------------------------------------------------


def allowed_rules(symbol):
    """Which of the 53 rows' entries may stand where `symbol` is to be replaced; None: after the end. bool (53,)."""
    mask = np.array([left == symbol for left, _ in EXPRESSION_RULES] + [symbol is None])
    if not mask.any():
        raise ValueError(f"symbol={quoted(symbol)}: expected one of {', '.join(SYMBOLS)}, or None after the end")
    return mask


def follow_grammar(scores):
    """The likeliest rule of every row among those that the grammar allows there: whatever ends is grammatical.

    Shapes: scores (N, 72, 53) -> uint8 (N, 72).
    """
    masks = {symbol: allowed_rules(symbol) for symbol in (*SYMBOLS, None)}
    return np.array([_followed(rows, masks) for rows in scores], np.uint8)


def _followed(rows, masks):
    waiting, rules = [START], []
    for row in rows:
        symbol = waiting.pop() if waiting else None
        rule = int(np.where(masks[symbol], row, -np.inf).argmax())
        if rule != PADDING:
            waiting.extend(part for part in reversed(EXPRESSION_RULES[rule][1]) if part in SYMBOLS)
        rules.append(rule)
    return rules


def spell_expression(rules):
    """The expression that a sequence of rules spells: a text; None where it breaks the grammar or does not end.

    Args: rules: whole numbers (L,), 52 for padding, which may only stand after the end.
    """
    rules = [int(rule) for rule in rules]
    end = rules.index(PADDING) if PADDING in rules else len(rules)
    if any(rule != PADDING for rule in rules[end:]):
        return None
    waiting, text = [START], []
    for rule in rules[:end]:
        left, right = EXPRESSION_RULES[rule]
        if not waiting or waiting.pop() != left:
            return None
        waiting.extend(reversed(right))
        while waiting and waiting[-1] not in SYMBOLS:  # what stands for itself is written down
            text.append(waiting.pop())
    return None if waiting else "".join(text)


def expression_value(rules, x):
    """What a grammatical sequence of rules computes at x, a float array. NaN where there is no real number."""
    with np.errstate(all="ignore"):
        value = _value(iter(rules), np.asarray(x, float))
    value = np.broadcast_to(value, np.shape(x)).astype(float)
    return np.where(np.isfinite(value), value, np.nan)


def _value(rules, x):
    """The value of the symbol that the next rule replaces; takes this rule and all below it from the iterator."""
    left, right = EXPRESSION_RULES[int(next(rules))]
    below = [_value(rules, x) for symbol in right if symbol in SYMBOLS]
    if left == "N":
        return below[0] if len(below) == 1 else _number(right, *below)
    if left in "DK":
        return float(right[0].strip("()"))
    if not below:
        return {"x": x, "pi": np.pi, "e": np.e}[right[0]]
    if len(below) == 2:
        return _combined(right[1], *below)
    return getattr(np, right[0])(below[0]) if right[0].islower() else below[0]


def _number(right, first, second):
    return first + second / 10 if "." in right else 10 * first + second


def _combined(sign, a, b):
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign == "*":
        return a * b
    if sign == "/":
        return a / b
    return a**b


def describe_expression(rules):
    """Type and part of a grammatical sequence of rules.

    The type is the operation that is done last: the first rule that computes something, for rules stand from the
    outside in. The part counts operations: those of two operands (+ - * /) and those of one (functions and powers).
    Returns: (type, part); type "none" where nothing is computed.
    """
    found = [_OPERATIONS[rule] for rule in map(int, rules) if rule < PADDING and _OPERATIONS[rule] is not None]
    of_two = sum(operation in _BINARY.values() for operation in found)
    return (found[0] if found else "none"), f"{of_two} of two, {len(found) - of_two} of one"


# ---------------------------------------------------------------------------------------------------------------------
# From texts to rules
# ---------------------------------------------------------------------------------------------------------------------


def parse_expression(text):
    """The rules of an expression, a list of numbers without padding: the only leftmost derivation there is.

    Raises: ValueError for a text that the grammar does not spell, with the place.
    """
    tokens = _Tokens(text)
    rules = _parse_chain(tokens, "E", "T", "+-", _parse_term)
    if tokens.rest:
        tokens.refuse("the end")
    return rules


class _Tokens:
    """A text that is read from left to right."""

    def __init__(self, text):
        if not isinstance(text, str):
            raise ValueError(f"{quoted(text)}: expected an expression as a text, such as '2*sin(x)+x^3'")
        self.text = self.rest = text.replace(" ", "")

    def take(self, choices):
        """The longest of the choices that the text goes on with, None for none of them."""
        found = max((choice for choice in choices if self.rest.startswith(choice)), key=len, default=None)
        if found is not None:
            self.rest = self.rest[len(found) :]
        return found

    def need(self, choices):
        found = self.take(choices)
        return found if found is not None else self.refuse(" or ".join(choices))

    def refuse(self, expected):
        place = len(self.text.replace(" ", "")) - len(self.rest)
        raise ValueError(f"{quoted(self.text)} is no expression: at letter {place + 1}, expected {expected}")


def _parse_chain(tokens, left, inner, signs, parse_inner):
    """E or T: operands with signs between them, of which the last sign is the outermost."""
    operands, between = [parse_inner(tokens)], []
    while sign := tokens.take(signs):
        between.append(sign)
        operands.append(parse_inner(tokens))
    rules = [_RULE[left, (left, sign, inner)] for sign in reversed(between)]
    rules.append(_RULE[left, (inner,)])
    for operand in operands:
        rules += operand
    return rules


def _parse_term(tokens):
    return _parse_chain(tokens, "T", "F", "*/", _parse_factor)


def _parse_factor(tokens):
    base = _parse_base(tokens)
    if not tokens.take("^"):
        return [_RULE["F", ("B",)], *base]
    exponent = tokens.need(EXPONENTS)
    return [_RULE["F", ("B", "^", "K")], *base, _RULE["K", (exponent,)]]


def _parse_base(tokens):
    names = [name for group in FUNCTIONS.values() for name in group]
    found = tokens.take([*(f"{name}(" for name in names), "(", "x", "pi", "e"])
    if found in ("x", "pi", "e"):
        return [_RULE["B", (found,)]]
    if found is None:
        return [_RULE["B", ("N",)], *_parse_number(tokens)]
    inside = _parse_chain(tokens, "E", "T", "+-", _parse_term)
    tokens.need([")"])
    right = ("(", "E", ")") if found == "(" else (found[:-1], "(", "E", ")")
    return [_RULE["B", right], *inside]


def _parse_number(tokens):
    digits = "0123456789"
    first = tokens.take(digits) or tokens.refuse("x, pi, e, a number, a function or (")
    second = tokens.take(digits)
    if second:
        return [_RULE["N", ("D", "D")], _RULE["D", (first,)], _RULE["D", (second,)]]
    if tokens.take("."):
        return [_RULE["N", ("D", ".", "D")], _RULE["D", (first,)], _RULE["D", (tokens.need(digits),)]]
    return [_RULE["N", ("D",)], _RULE["D", (first,)]]


# ---------------------------------------------------------------------------------------------------------------------
# As one-hot sequences
# ---------------------------------------------------------------------------------------------------------------------


def expression_sequences(texts):
    """Expressions as one-hot sequences, padded: uint8 (N, 1, 72, 53). Raises: ValueError for one that does not fit."""
    rows = np.full((len(texts), LENGTH), PADDING)
    for row, text in zip(rows, texts):
        rules = parse_expression(text)
        if len(rules) > LENGTH:
            raise ValueError(f"{quoted(text)} takes {len(rules)} rules; a sequence has {LENGTH} rows")
        row[: len(rules)] = rules
    return np.eye(WIDTH, dtype=np.uint8)[rows][:, None]


def sequence_rules(data):
    """The likeliest rule of each row: (N, 1, 72, 53), one-hot or probabilities -> whole numbers (N, 72)."""
    data = np.asarray(data)
    if data.ndim != 4 or data.shape[1:] != (1, LENGTH, WIDTH):
        raise ValueError(f"sequences of shape {data.shape}: expected (N, 1, {LENGTH}, {WIDTH})")
    return data[:, 0].argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Random expressions
# ---------------------------------------------------------------------------------------------------------------------


def random_expressions(number, seed=0):
    """Different random expressions with their types and parts: a DataFrame with the columns type, part, expr.

    Of each, its type and part are drawn first, all pairs that can exist equally often; then where the operations stand;
    then names and numbers. Every function has an x inside, and a derivation has at most 72 rules.
    """
    import pandas as pd

    check_count("number", number)
    check_seed(seed)
    rng = random.Random(seed)
    wishes = [(kind, two, one) for kind in EXPRESSION_TYPES for two in range(1, 6) for one in range(4)]
    wishes = [wish for wish in wishes if wish[2] > 0 or wish[0] in _BINARY.values()]
    found = {}
    while len(found) < number:
        kind, two, one = rng.choice(wishes)
        text, _, x_inside = _random_tree(rng, two, one, kind)
        if x_inside and text not in found and len(parse_expression(text)) <= LENGTH:
            found[text] = (kind, f"{two} of two, {one} of one")
    rows = [(*described, text) for text, described in found.items()]
    return pd.DataFrame(rows, columns=["type", "part", "expr"])


_STRENGTH = {"sum": 1, "difference": 1, "product": 2, "quotient": 2}  # how tightly an operation holds its operands


def _random_tree(rng, two, one, operation=None):
    """A random expression with so many operations of two operands and of one, the outermost given or drawn.

    Returns: its text, how tightly its outermost operation holds (1 sum, 2 product, 3 power, 4 what needs no brackets),
        and whether every function in it, and it itself, has an x inside.
    """
    if two + one == 0:
        return _random_leaf(rng)
    if operation is None:
        of_two = rng.random() * (two + one) < two
        operation = rng.choice([*_BINARY.values()] if of_two else [*FUNCTIONS])
    if operation in _STRENGTH:
        left_two, left_one = rng.randrange(two), rng.randrange(one + 1)
        left = _random_tree(rng, left_two, left_one)
        right = _random_tree(rng, two - 1 - left_two, one - left_one)
        return _joined(operation, left, right)
    inside, strength, x_inside = _random_tree(rng, two, one - 1)
    names = FUNCTIONS[operation]
    if operation == "power" and rng.random() < 0.5:
        return f"{_bracketed(inside, strength < 4)}^{rng.choice(EXPONENTS)}", 3, x_inside
    return f"{rng.choice(names)}({inside})", 4, x_inside


def _joined(operation, left, right):
    """Two expressions with a sign between them, and brackets where the grammar would read them otherwise."""
    sign = next(sign for sign, name in _BINARY.items() if name == operation)
    own = _STRENGTH[operation]
    (left_text, left_strength, left_x), (right_text, right_strength, right_x) = left, right
    left_text = _bracketed(left_text, left_strength < own)
    right_text = _bracketed(right_text, right_strength <= own)
    # a part without x is fine as long as the other has one, and no function stands in it
    fine = (left_x or _is_number(left_text)) and (right_x or _is_number(right_text)) and (left_x or right_x)
    return f"{left_text}{sign}{right_text}", own, fine


def _bracketed(text, needed):
    return f"({text})" if needed else text


def _is_number(text):
    """Whether a text is a single number, pi or e."""
    return text in ("pi", "e") or text.replace(".", "").isdigit()


def _random_leaf(rng):
    """x in six of ten cases, else a number."""
    if rng.random() < 0.6:
        return "x", 4, True
    first, second = rng.randrange(1, 10), rng.randrange(10)
    return rng.choice([f"{first}", f"{first}", f"{first}{second}", f"{second}.{first}", "pi", "e"]), 4, False
