"""The command line."""

import json

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
        (["sample", "latent_diffusion", "3"], "required: --out"),
        (["sample", "latent_diffusion", "many", "--out", "a.csv"], "invalid int value: 'many'"),
        (["sample", "latent_diffusion", "3", "--out", "a.txt"], "ValueError: a.txt: expected a file that ends in .csv"),
        (
            ["sample", "latent_diffusion", "0", "--out", "a.csv"],
            "num_molecules=0: expected a whole number of at least 1",
        ),
        (["sample", "latent_diffusion", "3", "--out", "a.csv", "--gap", "5"], "latent_diffusion takes no condition"),
        (["sample", "nonsense", "3", "--out", "a.csv"], "no checkpoint 'nonsense'; here are: "),
        (["evaluate", "none.csv"], "FileNotFoundError: no file at none.csv"),
        (["train", "token_vae", "--seed", "-1"], "seed=-1"),
        (["study", "*"], "study '*': expected the two digits of a notebook"),
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


def test_sample_and_evaluate(run_python, tmp_path):
    """As a practitioner does: both as programs, in another folder."""
    sample = [
        "sample",
        "diffusion_prior",
        "60",
        "--out",
        "a.csv",
        "--type",
        "ester",
        "--steps",
        "10",
        "--guidance",
        "1.5",
    ]
    result = run_python(helpers.ROOT / "helpers.py", *sample, "--logP", "0.5", "--guidance", "1.5", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "a.csv: 60 of 60 molecules\n", result.stderr
    again = run_python(helpers.ROOT / "helpers.py", *sample, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.endswith(
        "ValueError: a.csv is there already; delete it, or choose another name\n"
    )
    assert "Traceback" not in again.stderr
    shown = run_python(helpers.ROOT / "helpers.py", "evaluate", "a.csv", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:3] == ["N", "valid", "%"] and len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[1:]] == ["a", "training molecules", "random graphs"]
    printed = run_python(helpers.ROOT / "helpers.py", "evaluate", "a.csv", "--json", cwd=tmp_path)
    score, *framing = json.loads(printed.stdout)
    assert score["name"] == "a" and score["N"] == 60 and score["valid"] > 0.8 and len(framing) == 2
