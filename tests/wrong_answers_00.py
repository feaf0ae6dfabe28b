"""Wrong answers to the exercises of notebook 00, each with words that answer it; `test_exercises` tries them."""

from molecule_diffusion.exercises import notebook_00

COUNTS = [
    (lambda N, valid, unique, novel: N * novel, "share of the distinct valid ones"),
    (lambda N, valid, unique, novel: N * valid * novel, "duplicates are still counted"),
    (lambda N, valid, unique, novel: N * unique * novel, "invalid draws are still counted"),
    (lambda N, valid, unique, novel: N * valid * unique, "how many of them are new"),
    (lambda N, valid, unique, novel: valid * unique * novel, "this is a share; the question is how many"),
    (lambda N, valid, unique, novel: N * (valid + unique + novel) / 3, "expected 180, got 650"),
    (lambda N, valid, unique, novel: 180, "500 draws, valid 1.0, unique 0.5, novel 0.5: expected 125, got 180"),
]


def scorer(pieces=False, unique_of="valid", novel_of="distinct", new=lambda one, other: one - other, factor=1):
    """The right scorer with something changed, as an answer. `pieces`: whether pieces count as valid."""

    def answer(smiles, training):
        drawn = [text for text in smiles if text is not None]
        valid = [text for text in drawn if pieces or "." not in text]
        distinct = set(valid)
        size = {"all": smiles, "drawn": drawn, "valid": valid, "distinct": distinct}
        unique = len(distinct) / len(size[unique_of])
        novel = len(new(distinct, training)) / len(size[novel_of])
        return factor * len(valid) / len(smiles), factor * unique, factor * novel

    return answer


def of_the_drawn(smiles, training):
    valid, unique, novel = notebook_00.score_draws(smiles, training)
    return valid * len(smiles) / sum(text is not None for text in smiles), unique, novel


def pieces_are_distinct(smiles, training):
    return notebook_00.score_draws(smiles, training)[0], *scorer(pieces=True)(smiles, training)[1:]


def pieces_are_novel(smiles, training):
    return *notebook_00.score_draws(smiles, training)[:2], scorer(pieces=True)(smiles, training)[2]


SCORERS = [
    (scorer(pieces=True, unique_of="all"), "`CC.O` still counts, but it is in two pieces"),  # as the notebook shows it
    (scorer(pieces=True), "`CC.O` still counts, but it is in two pieces"),
    (scorer(unique_of="all"), "unique is 4/8: it is a share of the valid draws, not of all"),
    (scorer(unique_of="drawn"), "unique is 4/6: divide by the valid draws"),
    (scorer(novel_of="valid"), "novel is 1/5: it is a share of the distinct molecules"),
    (scorer(novel_of="all"), "novel is 1/8"),
    (scorer(new=lambda one, other: one & other), "novel is 3/4: these are the known ones"),
    (of_the_drawn, "valid is 5/6: the draws that are no molecule count, too"),
    (pieces_are_distinct, "unique is 5/6: `CC.O` still counts here"),
    (pieces_are_novel, "novel is 2/5: `CC.O` still counts here"),
    (scorer(factor=100), "return numbers from 0 to 1, not counts or per cent"),
    (lambda smiles, training: notebook_00.score_draws(smiles, training)[:2], "return three things"),
    (lambda smiles, training: (5 / 8, 4 / 5, 1 / 4), "CCF and CCF, of which CCO is known: expected 0.75"),
]


def diagnosis(**changed):
    return notebook_00._MADE_BY | changed


COPIES, REPEATS, CHAINS, BREAKS = notebook_00.MAKERS
DIAGNOSES = [
    (diagnosis(A=REPEATS, B=CHAINS), "2 of 4 are not right. A is not the maker that repeats itself: .*look at unique"),
    (diagnosis(B=COPIES, D=REPEATS), "B is not the maker that copies its examples|nothing that is novel"),
    (diagnosis(C=CHAINS, A=BREAKS), "A is not the maker that breaks valences: .*not valid"),
    (diagnosis(D=CHAINS), "1 of 4 are not right. D is not the maker that draws only chains: .*W.rings"),
    (diagnosis(D="copies"), "D: 'copies' is none of the four"),
    (diagnosis(D=...), "no answer yet for D"),
    ({"A": CHAINS, "B": REPEATS}, "expected an entry for each of A, B, C and D"),
    ([CHAINS, REPEATS, BREAKS, COPIES], "expected a dictionary"),
]

WRONG = {"00.1": COUNTS, "00.2": SCORERS, "00.3": DIAGNOSES}
