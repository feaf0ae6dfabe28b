"""Files of a user's own molecules, good and bad."""

import pytest

import helpers
from molecule_diffusion.smiles_files import smiles_in_file


def test_a_csv_file(tmp_path):
    path = tmp_path / "mine.csv"
    lines = [
        "name,SMILES",
        "ethanol,OCC",
        '"with, comma",C=O',
        "salt,C[NH3+]",
        "large,CCCCCCCCCC",
        "chlorine,CCl",
        "",
        "typo,C1CC",
        "nothing,",
        "short",
        'open,"C',
    ]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    read = helpers.load_smiles(path)
    assert read.smiles == ["CCO", "C=O"] and len(read) == 2
    assert read.atoms.shape == (2, 9) and read.bonds.shape == (2, 9, 9)
    assert helpers.to_smiles(read.atoms, read.bonds) == read.smiles
    expected = {
        4: "formal charges",
        5: "10 heavy atoms",
        6: "contains Cl",
        8: "not a valid SMILES",
        9: "no value in the smiles column",
        10: "no value in the smiles column",
        11: "a quoting error",
    }
    assert {number: text for number, text, _ in read.rejected} == {n: lines[n - 1] for n in expected}
    for number, _, reason in read.rejected:
        assert expected[number] in reason
        assert f"line {number}: {reason}" in str(read)
    assert str(read).startswith("2 molecules read, 7 lines not used")


def test_a_smi_file(tmp_path):
    path = tmp_path / "mine.smi"
    path.write_bytes(b"OCC ethanol\r\n\r\nxyz what\r\nC#N\r\n")
    read = helpers.load_smiles(str(path))
    assert read.smiles == ["CCO", "C#N"]
    assert [(number, text) for number, text, _ in read.rejected] == [(3, "xyz what")]


def test_a_file_of_which_nothing_can_be_used(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("CCl\n")
    read = helpers.load_smiles(path)
    assert len(read) == 0 and len(read.rejected) == 1
    assert read.atoms.shape == (0, 9) and read.bonds.shape == (0, 9, 9)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.smi", b"", "a.smi is empty"),
        ("a.csv", b"\n \n", "a.csv is empty"),
        ("a.csv", b"smiles\n", "holds a header and no molecule"),
        ("a.csv", b"name,structure\nx,C\n", "has the columns name, structure; expected one of them to be named smiles"),
        ("a.smi", b"\x89PNG\r\n\x1a\n\x00\x00", "is not a text file .*UTF-8"),
        ("a.smi", "C\nCC\n".encode("utf-16"), "is not a text file .*UTF-8"),
        ("a.csv", b"smiles\nC,\xff\n", "is not a text file .*UTF-8"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        helpers.load_smiles(path)


def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at .*give the path of a .csv or .smi file"):
            helpers.load_smiles(path)


def test_a_line_break_in_quotes_costs_no_row(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('name,smiles\n"two\nlines",CCO\nplain,C#N\n"open,CC\nlast,CN\n')
    read = helpers.load_smiles(path)
    assert read.smiles == ["CCO", "C#N", "CN"]
    assert [(number, text) for number, text, _ in read.rejected] == [(5, '"open,CC')]
    assert "a quoting error" in read.rejected[0][2]


def test_twenty_rejected_lines_are_shown_and_all_are_kept(tmp_path):
    path = tmp_path / "mine.smi"
    path.write_text("\n".join(["C", *["CCl"] * 500]))
    read = helpers.load_smiles(path)
    assert len(read.rejected) == 500 and len(str(read).splitlines()) == 22
    assert str(read).endswith("… and 480 more: see .rejected")


def test_long_lines_are_quoted_in_part(tmp_path):
    path = tmp_path / "mine.smi"
    path.write_text("C" * 1_000_000 + "\nCCO\n")
    read = helpers.load_smiles(path)
    assert read.smiles == ["CCO"] and "a SMILES of 1,000,000 letters" in read.rejected[0][2]
    assert len(str(read)) < 300


def test_the_texts_of_a_file_as_they_stand(tmp_path):
    (tmp_path / "a.csv").write_text("smiles,valid\nCCO,True\n,False\nxyz,True\n")
    (tmp_path / "a.smi").write_text("CCO ethanol\n\nxyz\n")
    assert smiles_in_file(tmp_path / "a.csv") == ["CCO", None, "xyz"]
    assert smiles_in_file(tmp_path / "a.smi") == ["CCO", "xyz"]
