"""The command line."""

import pytest

import helpers


def test_the_command_line_as_a_program(run_python):
    result = run_python("helpers.py", "train", "nonsense")
    assert result.returncode != 0
    assert "nonsense" in result.stderr and all(name in result.stderr for name in helpers.RECIPES)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        helpers.main(arguments)
    assert end.value.code == 0
    assert "python helpers.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["score", "nonsense"], "token_vae"),
        (["train", "token_vae", "--steps", "0"], "ValueError: steps=0: expected a whole number of at least 1"),
        (["train", "token_vae", "--steps", "many"], "invalid int value: 'many'"),
        (["notebook", "none.ipynb"], "none.ipynb"),
        (["study"], "required: number"),
        (["study", "99"], "ValueError: no study in notebook '99'"),
    ],
)
def test_wrong_commands_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        helpers.main(arguments)
    assert end.value.code not in (0, None)
    assert message in capsys.readouterr().err
