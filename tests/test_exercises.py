"""Every exercise of the notebooks: its solution passes, its stub is unsolved, wrong answers are told apart."""

import ast
import copy
import re

import nbformat
import numpy as np
import pytest
import torch
import wrong_answers_00
import wrong_answers_01
import wrong_answers_02
import wrong_answers_03
import wrong_answers_04
import wrong_answers_05
import wrong_answers_06
import wrong_answers_07

import helpers
from molecule_diffusion.exercises import checking, notebook_00

NOTEBOOKS = sorted((helpers.ROOT / "notebooks").glob("*.ipynb"))
NUMBERS = list(checking.EXERCISES)


@pytest.fixture(autouse=True)
def nothing_solved(monkeypatch):
    monkeypatch.setattr(checking, "SOLVED", set())


# ---------------------------------------------------------------------------------------------------------------------
# What the notebooks hold
# ---------------------------------------------------------------------------------------------------------------------


def read_exercises(notebook):
    """{number: (code cells from the box to the solution, the solution's code)}; prose and cells are in their order."""
    found, number = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if number and not found[number][1]:
                found[number][0].append(cell.source)
            continue
        if box := re.search(r"\*\*Exercise (\d\d\.\d+)", cell.source):
            number = box[1]
            found[number] = [], []
        for details in re.findall(r"<details>\s*<summary>Solution</summary>(.*?)</details>", cell.source, re.S):
            found[number][1].extend(re.findall(r"```python\n(.*?)```", details, re.S))
    return found


@pytest.fixture(scope="module")
def exercises():
    """{number: (code cells, solutions, a fresh copy of the names that the notebook's imports give)}"""
    found = {}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        code = [line for c in notebook.cells if c.cell_type == "code" for line in ast.parse(plain(c.source)).body]
        imports = ast.Module([line for line in code if isinstance(line, (ast.Import, ast.ImportFrom))], [])
        names = {}
        exec(compile(imports, path.name, "exec"), names)
        found |= {number: (*parts, names) for number, parts in read_exercises(notebook).items()}
    return found


def plain(source):
    """A cell's source without its magic lines."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))


def checked_name(cells, number):
    """The name that is handed to `helpers.checked(number, name)` in one of the cells."""
    found = re.findall(rf'^(\w+) = helpers\.checked\("{re.escape(number)}", (\w+)\)', "\n".join(cells), re.M)
    assert len(found) == 1 and found[0][0] == found[0][1], f"exercise {number}: expected one line x = helpers.checked"
    return found[0][0]


def test_notebooks_and_checks_name_the_same_exercises(exercises):
    assert sorted(exercises) == sorted(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_folded_solution_passes(exercises, number, capsys):
    cells, solutions, names = exercises[number]
    assert len(solutions) == 1, "expected one folded solution"
    names = dict(names)
    exec(solutions[0], names)
    answer = names[checked_name(cells, number)]
    assert helpers.checked(number, answer) is answer
    assert capsys.readouterr().out == f"✓ {number} solved.\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_stub_is_unsolved_and_the_notebook_goes_on(exercises, number, capsys):
    cells, _, names = exercises[number]
    names = dict(names)
    for cell in cells:
        exec(plain(cell), names)
    assert names[checked_name(cells, number)] is checking.EXERCISES[number][1]
    said = capsys.readouterr().out
    assert said.startswith(f"✗ {number}: ") and "The notebook goes on with the reference solution." in said
    assert "nothing yet" in said or "no answer yet" in said or "return two things" in said


@pytest.mark.parametrize("number", NUMBERS)
def test_the_reference_passes_its_own_check(number, capsys):
    _, reference = checking.EXERCISES[number]
    answer = copy.copy(reference)  # a dict; a function would be the same one
    if callable(reference):

        def answer(*given):
            return reference(*given)

    assert helpers.checked(number, answer) is answer
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("number", NUMBERS)
def test_the_reference_itself_does_not_count_as_solved(number, capsys):
    _, reference = checking.EXERCISES[number]  # as a student's name holds it after a first wrong answer
    assert helpers.checked(number, reference) is reference
    assert "run the cell with your own answer first" in capsys.readouterr().out
    assert number not in checking.SOLVED


# ---------------------------------------------------------------------------------------------------------------------
# Wrong answers
# ---------------------------------------------------------------------------------------------------------------------


def thresholds(adjacency, bond, atom, axis):
    exists = adjacency.diagonal(dim1=1, dim2=2) > atom
    return (adjacency > bond) & exists.unsqueeze(axis) & ~torch.eye(9, dtype=torch.bool)


def with_loops(adjacency, bond, atom):
    exists = adjacency.diagonal(dim1=1, dim2=2) > atom
    return exists, (adjacency > bond) & exists[:, :, None] & exists[:, None]


def slerp_without_lengths(a, b, share):
    theta = torch.arccos((a @ b / 27).clamp(-1, 1))
    return (torch.sin((1 - share) * theta) * a + torch.sin(share * theta) * b) / torch.sin(theta)


def posterior(x_0, x_t, t, betas, divide=True):
    alpha_bar = (1 - betas).cumprod(0)
    before = alpha_bar[t - 1] if t else torch.ones(())
    sum_ = before.sqrt() * betas[t] * x_0 + (1 - betas[t]).sqrt() * (1 - before) * x_t
    return sum_ / (1 - alpha_bar[t]) if divide else sum_


def no_roots(x_0, x_t, t, betas):
    alpha_bar = (1 - betas).cumprod(0)
    before = alpha_bar[t - 1]
    return (before * betas[t] * x_0 + (1 - betas[t]) * (1 - before) * x_t) / (1 - alpha_bar[t])


# number: what a student might write, and what the check must say to it
WRONG = {
    "03.1": [
        (lambda betas: 1 - betas, "α of single steps"),
        (lambda betas: betas.cumprod(0), "multiplies the β"),
        (lambda betas: (1 - betas).cumsum(0), "this adds"),
        (lambda betas: (1 - betas).prod(), "one for every step"),
        (lambda betas: (1 - betas).cumprod(0).sqrt(), "without the root"),
        (lambda betas: 1 - betas.cumsum(0), "this subtracts"),
    ],
    "03.2": [
        (lambda x, t, eps, ab: ab[t][:, None] * x + (1 - ab[t][:, None]) * eps, "both square roots"),
        (lambda x, t, eps, ab: ab[t][:, None].sqrt() * x + (1 - ab[t][:, None]) * eps, "at the noise is missing"),
        (lambda x, t, eps, ab: ab[t][:, None] * x + (1 - ab[t][:, None]).sqrt() * eps, "at x_0 is missing"),
        (lambda x, t, eps, ab: helpers.q_sample(eps, t, x, ab), "exchanged"),
        (lambda x, t, eps, ab: ab[t].sqrt() * x + (1 - ab[t]).sqrt() * eps, "add an axis"),
        (lambda x, t, eps, ab: helpers.q_sample(x.flatten(1), t, eps.flatten(1), ab), r"x_0 of shape \(2, 9, 9\)"),
    ],
    "03.4": [
        (lambda steps: torch.linspace(1e-4, 0.02, steps), "still signal"),
        (lambda steps: torch.full((steps,), 0.0202), "still signal"),
        (wrong_answers_03.early_end, r"ᾱ_T = 0.0091.: 0.91% of the variance is still signal.*Reach 0.0001 or less"),
        (lambda steps: torch.full((steps,), 0.5), "the first of 100 steps"),
        (lambda steps: torch.linspace(1e-4, 0.02, 1000), r"β has shape \(1000,\)"),
        (lambda steps: torch.linspace(-0.1, 0.5, steps), "each must be between 0 and 1"),
        (lambda steps: torch.linspace(1e-4, 20 / steps, steps), "signal and noise mix"),
        (helpers.cosine_betas, "only 72% of the 100 steps lie where signal and noise mix.*Reach 75 %"),
    ],
    "03.5": [
        (lambda x_0, x_t, t, betas: helpers.posterior_mean(x_t, x_0, t, betas), "exchanged"),
        (no_roots, "square roots are missing"),
        (lambda x_0, x_t, t, betas: helpers.posterior_mean(x_0, x_t, 2, betas), "only x_0 is left"),
        (lambda x_0, x_t, t, betas: posterior(x_0, x_t, t, betas, divide=False), "divide by"),
        (lambda x_0, x_t, t, betas: (x_0 + x_t) / 2, "expected"),
        (lambda x_0, x_t, t, betas: helpers.posterior_mean(x_0, x_t, max(t - 1, 0), betas), "expected"),
    ],
}
for answers in (
    wrong_answers_00,
    wrong_answers_01,
    wrong_answers_02,
    wrong_answers_03,
    wrong_answers_04,
    wrong_answers_05,
    wrong_answers_06,
    wrong_answers_07,
):
    WRONG |= answers.WRONG


def test_every_exercise_has_wrong_answers():
    assert WRONG.keys() == checking.EXERCISES.keys() and min(map(len, WRONG.values())) >= 3


@pytest.mark.parametrize("number, answer, message", [(number, *case) for number in WRONG for case in WRONG[number]])
def test_a_wrong_answer_is_told_why(number, answer, message, capsys):
    assert helpers.checked(number, answer) is checking.EXERCISES[number][1]
    said = capsys.readouterr().out
    assert said.startswith(f"✗ {number}: ")
    assert re.search(message, said), said
    assert "your code stopped" not in said


def test_answers_may_be_lists_floats_or_tensors(capsys):
    for number, answer in {
        "01.1": lambda atoms: [[float(atom == k) for k in range(5)] for atom in atoms],
        "01.2": lambda atoms, bonds: torch.from_numpy(helpers.count_hydrogens(atoms, bonds)),
    }.items():
        assert helpers.checked(number, answer) is answer
    assert capsys.readouterr().out.count("✓") == 2


# ---------------------------------------------------------------------------------------------------------------------
# The mechanism
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, message", [(None, "no answer yet"), (..., "no answer yet"), (3, "int came")])
def test_something_else_than_an_answer(answer, message, capsys):
    assert helpers.checked("01.1", answer) is helpers.one_hot
    assert message in capsys.readouterr().out


def test_a_crash_shows_the_students_own_line(capsys):
    def crashing(atoms):
        table = np.eye(4)
        return table[atoms]  # 'none' is class 4

    helpers.checked("01.1", crashing)
    said = capsys.readouterr().out
    line = crashing.__code__.co_firstlineno + 2
    assert f"your code stopped at line {line}, `return table[atoms]" in said
    assert "IndexError: index 4 is out of bounds" in said


def test_a_crash_inside_a_library_shows_the_line_that_called_it(capsys):
    def crashing(atoms):
        return np.linalg.inv("not a matrix")

    helpers.checked("01.1", crashing)
    assert '`return np.linalg.inv("not a matrix")`, with' in capsys.readouterr().out


@pytest.mark.parametrize("value", [[["C"] * 5] * 9, "text", [[1], [2, 3]], {1: 2}])
def test_an_answer_of_no_use_is_not_blamed_on_a_librarys_line(value, capsys):
    assert helpers.checked("01.1", lambda atoms: value) is helpers.one_hot
    said = capsys.readouterr().out
    assert "your code stopped" not in said, "the student's code did not stop; its answer is unusable"


def test_a_wrong_signature_is_explained(capsys):
    helpers.checked("01.1", lambda: None)
    assert "takes 0 positional arguments but 1 was given" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts",
    [
        ("Lib", "json", "decoder.py"),  # as on Windows, where no folder is called lib/python
        ("Lib", "site-packages", "numpy", "core.py"),
        ("lib", "python3.11", "dist-packages", "numpy", "core.py"),
    ],
)
def test_a_librarys_line_is_known_on_every_system(parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checking.sysconfig, "get_path", lambda name: str(tmp_path / "Lib"))
    library = tmp_path.joinpath(*parts)
    library.parent.mkdir(parents=True)
    names = {}
    exec(compile("def load(x):\n    raise KeyError(x)", str(library), "exec"), names)

    def crashing(atoms):
        return names["load"](atoms[0])

    helpers.checked("01.1", crashing)
    assert '`return names["load"](atoms[0])`, with KeyError' in capsys.readouterr().out


def test_an_unknown_number_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown exercise '9.9'; known ones: 00.1, 00.2"):
        helpers.checked("9.9", None)


def test_solved_counts_the_solved_ones(capsys):
    helpers.solved("00")
    helpers.checked("00.1", lambda *shares: notebook_00.new_molecules(*shares))
    helpers.solved("00")
    helpers.checked("00.1", lambda *shares: 0)  # and not any more
    helpers.solved("00")
    helpers.checked("01.1", lambda atoms: helpers.one_hot(atoms))
    helpers.solved("01")
    lines = [line for line in capsys.readouterr().out.splitlines() if "solved." in line and "✓" not in line]
    total = sum(number.startswith("01.") for number in NUMBERS)
    rest = ", 00.2, 00.3."
    assert lines[:3] == [
        f"0 of 3 solved. Still open: 00.1{rest}",
        "1 of 3 solved. Still open: 00.2, 00.3.",
        f"0 of 3 solved. Still open: 00.1{rest}",
    ]
    assert lines[3].startswith(f"1 of {total} solved. Still open: 01.2, 01.3")
    with pytest.raises(ValueError, match="no exercises for notebook '99'; there are some for"):
        helpers.solved("99")
