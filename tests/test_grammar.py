"""The language of expressions: what is spelled is parsed again, values are right, wrong sequences are found."""

import ast

import numpy as np
import pytest

from molecule_diffusion import grammar, viewers
from molecule_diffusion.exercises import notebook_05


@pytest.fixture(scope="module")
def table():
    return grammar.random_expressions(400, seed=1)


def padded(text):
    return grammar.sequence_rules(grammar.expression_sequences([text]))[0]


def test_the_shape_is_that_of_the_earlier_project(table):
    data = grammar.expression_sequences(table["expr"])
    assert data.shape == (400, 1, 72, 53) and (data.sum(-1) == 1).all()
    assert len(grammar.EXPRESSION_TYPES) == 8 and len(grammar.EXPRESSION_PARTS) == 20
    assert set(table["type"]) == set(grammar.EXPRESSION_TYPES) and set(table["part"]) == set(grammar.EXPRESSION_PARTS)


def test_round_trip_and_description(table):
    rules = grammar.sequence_rules(grammar.expression_sequences(table["expr"]))
    assert [grammar.spell_expression(row) for row in rules] == table["expr"].tolist()
    assert [grammar.describe_expression(row) for row in rules] == list(zip(table["type"], table["part"]))


def test_values_are_those_of_python(table):
    x = np.array([0.3, 1.7, 2.5])
    names = {name: getattr(np, name) for group in grammar.FUNCTIONS.values() for name in group}
    for text in table["expr"][:100]:
        with np.errstate(all="ignore"):
            code = compile(ast.parse(text.replace("^", "**"), mode="eval"), "expression", "eval")
            expected = eval(code, {**names, "x": x, "pi": np.pi, "e": np.e, "__builtins__": {}})
        expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_allclose(grammar.expression_value(padded(text), x), expected, rtol=1e-6, err_msg=text)


def test_by_hand():
    """x^2 takes five rules: E -> T, T -> F, F -> B ^ K, B -> x, K -> 2."""
    rules = grammar.parse_expression("x^2")
    assert [grammar.EXPRESSION_RULES[rule][0] for rule in rules] == ["E", "T", "F", "B", "K"]
    assert grammar.spell_expression(rules) == "x^2" and grammar.expression_value(rules, [3.0]) == 9
    assert grammar.describe_expression(rules) == ("power", "0 of two, 1 of one")
    assert grammar.describe_expression(grammar.parse_expression("((x))")) == ("none", "0 of two, 0 of one")
    assert grammar.expression_value(grammar.parse_expression("7-2-1"), [0.0]) == 4  # from the left
    assert grammar.expression_value(grammar.parse_expression("2.5*10"), [0.0]) == 25


def test_a_broken_sequence_spells_nothing():
    whole = padded("sin(x)+2")
    end = int((whole != grammar.PADDING).sum())
    unfinished, early, doubled, wrong = (whole.copy() for _ in range(4))
    unfinished[end - 1] = grammar.PADDING
    early[2] = grammar.PADDING
    doubled[end] = whole[end - 1]
    wrong[1] = whole[end - 1]
    assert grammar.spell_expression(whole) == "sin(x)+2"
    assert [grammar.spell_expression(row) for row in (unfinished, early, doubled, wrong, whole * 0)] == [None] * 5


def test_only_the_rules_of_a_symbol_are_allowed():
    assert grammar.allowed_rules("E").sum() == 3 and grammar.allowed_rules(None).nonzero()[0].tolist() == [52]
    assert sum(grammar.allowed_rules(symbol).sum() for symbol in grammar.SYMBOLS) == 52
    with pytest.raises(ValueError, match="symbol='Q': expected one of E, T"):
        grammar.allowed_rules("Q")


def test_scores_that_follow_the_grammar_are_spelled(table):
    """As exercise 05.6 has it, row after row."""
    rules = grammar.sequence_rules(grammar.expression_sequences(table["expr"][:50]))
    assert (grammar.follow_grammar(np.eye(53)[rules]) == rules).all()
    scores = np.eye(53)[rules] + 1.2 * np.random.default_rng(0).random((50, 72, 53))
    found, reference = grammar.follow_grammar(scores), notebook_05.decode_with_grammar
    assert found.tolist() == [reference(rows, list(grammar.EXPRESSION_RULES), "E") for rows in scores]
    ended = found[:, -1] == grammar.PADDING
    assert ended.any() and all(grammar.spell_expression(row) is not None for row in found[ended])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at letter 1, expected x, pi, e, a number"),
        ("x+", "at letter 3, expected x"),
        ("x)", "at letter 2, expected the end"),
        ("sin(x", "at letter 6, expected"),
        ("x^x", "at letter 3, expected 2 or 3"),
        ("foo(x)", "at letter 1, expected x"),
        (3, "expected an expression as a text"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        grammar.parse_expression(text)


def test_too_long_an_expression_is_refused():
    with pytest.raises(ValueError, match="rules; a sequence has 72 rows"):
        grammar.expression_sequences(["+".join(["x"] * 40)])


def test_curves_are_shown(shown):
    viewers.show_expressions(["x^2", "log(x)", None], "Three.")
    assert "x^2, log(x), None" in shown[0][0]["text/plain"]
    with pytest.raises(ValueError, match="at most 24"):
        viewers.show_expressions(["x"] * 25)
