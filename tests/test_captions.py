"""Facts and their words: what RDKit says of known molecules, captions that are true and give nothing away, queries."""

import re

import numpy as np
import pytest
from rdkit import Chem

import helpers
from molecule_diffusion import captions
from molecule_diffusion.captions import WORDS, Caption, Fact

# What holds for some molecules, written down by hand. What is not named does not hold.
KNOWN = {
    "CCO": "oxygen, no ring, methyl, alcohol",
    "c1ccccc1": "hydrocarbon, ring, ring of 6, aromatic, benzene",
    "C1CC1C#N": "nitrogen, ring, ring of 3, cyclopropane, nitrile",
    "O=C1CCO1": "oxygen, two oxygens, ring, ring of 4, lactone, ester",
    "O=C1CCN1": "nitrogen, oxygen, ring, ring of 4, lactam, amide",
    "C1OC1C=O": "oxygen, two oxygens, ring, ring of 3, epoxide, ether, aldehyde",
    "FC(F)(F)C=C": "fluorine, no ring, alkene, trifluoromethyl",
    "c1ccncc1": "nitrogen, ring, ring of 6, aromatic, pyridine",
    "c1cc[nH]c1": "nitrogen, ring, ring of 5, aromatic, pyrrole",
    "Cc1ccoc1": "oxygen, ring, ring of 5, methyl, aromatic, furan",
    "c1c[nH]cn1": "nitrogen, two nitrogens, ring, ring of 5, aromatic, imidazole",
    "c1cn[nH]c1": "nitrogen, two nitrogens, ring, ring of 5, aromatic, pyrazole",
    "c1cocn1": "nitrogen, oxygen, ring, ring of 5, aromatic, oxazole",
    "c1cnoc1": "nitrogen, oxygen, ring, ring of 5, aromatic, isoxazole",
    "c1cncnc1": "nitrogen, two nitrogens, ring, ring of 6, aromatic, pyrimidine",
    "C1CC12CC2": "hydrocarbon, ring, ring of 3, spiro, cyclopropane",
    "C1CC2CCC12": "hydrocarbon, ring, ring of 4, fused",
    "CC(C)(C)C#C": "hydrocarbon, no ring, methyl, tert-butyl, alkyne",
    "CC(=O)C=NO": "nitrogen, oxygen, two oxygens, no ring, methyl, ketone, imine, oxime",
    "OCCO": "oxygen, two oxygens, no ring, alcohol, diol",
    "NCCNC": "nitrogen, two nitrogens, no ring, methyl, primary amine, secondary amine",
    "C1CCCCCC1N(C)C": "nitrogen, ring, ring of 7, methyl, tertiary amine",
    "C1CN1": "nitrogen, ring, ring of 3, aziridine, secondary amine",
    "C1COC1": "oxygen, ring, ring of 4, oxetane, ether",
}


@pytest.mark.parametrize("smiles, expected", KNOWN.items())
def test_the_facts_of_known_molecules(smiles, expected):
    [row] = helpers.fact_table([smiles])
    assert {name for name, holds in zip(helpers.FACTS, row) if holds} == set(expected.split(", "))


def test_every_fact_occurs_among_the_known_molecules():
    said = {name for expected in KNOWN.values() for name in expected.split(", ")}
    assert said == set(helpers.FACTS)


@pytest.mark.parametrize("name, fact", helpers.FACTS.items())
def test_facts_are_well_formed(name, fact):
    assert isinstance(fact, Fact) and Chem.MolFromSmarts(fact.smarts) is not None
    assert fact.group in ("element", "shape", "aromatic", "ring", "family")
    assert len(fact.words) >= 2 and len(fact.unseen) >= 1


def test_a_phrase_belongs_to_one_fact_and_is_known_or_unseen():
    phrases = captions.known_phrases()
    assert len({phrase for phrase, _ in phrases}) == len(phrases)
    seen = {phrase for fact in helpers.FACTS.values() for phrase in fact.words}
    assert not seen & {phrase for fact in helpers.FACTS.values() for phrase in fact.unseen}


def test_rings_are_counted_as_rdkit_counts_them(qm9):
    """[rN] would miss the larger of two fused rings."""
    rows = np.random.default_rng(0).choice(len(qm9), 2000, replace=False)
    table = helpers.fact_table([qm9.smiles[i] for i in rows])
    columns = [list(helpers.FACTS).index(f"ring of {size}") for size in range(3, 8)]
    for row, found in zip(rows, table[:, columns]):
        mol = Chem.MolFromSmiles(qm9.smiles[row])
        sizes = {len(ring) for ring in mol.GetRingInfo().AtomRings()}
        assert [size in sizes for size in range(3, 8)] == found.tolist(), qm9.smiles[row]


@pytest.fixture(scope="module")
def some(qm9):
    rows = np.random.default_rng(1).choice(qm9.train, 1500, replace=False)
    smiles = [qm9.smiles[i] for i in rows]
    return smiles, helpers.fact_table(smiles)


@pytest.mark.parametrize("words", WORDS)
def test_captions_are_true_and_are_read_as_they_were_meant(some, words):
    smiles, table = some
    written = helpers.write_captions(table, 0, words)
    assert all((table & helpers.caption_table(written)).sum(1) == helpers.caption_table(written).sum(1))
    for caption in written:
        assert set(helpers.facts_in(caption.text)) == set(caption.facts), caption
    assert {len(caption.facts) for caption in written} == {1, 2, 3}


@pytest.mark.parametrize("words", WORDS)
def test_captions_give_nothing_away(some, words):
    smiles, table = some
    written = helpers.write_captions(table, 0, words)
    assert not any(helpers.leaks(caption.text, text) for caption, text in zip(written, smiles))


def test_the_leak_check_notices():
    for text in ("is it CC(=O)OC=C?", "a molecule of C4H6O2", "gdb_1234 please", "CC(=O)OC=C"):
        assert helpers.leaks(text, "CC(=O)OC=C"), text
    assert helpers.leaks("what about CCO, then", "CCO")
    assert not helpers.leaks("an ester with an alkene", "CC(=O)OC=C")


def test_unseen_words_are_in_no_caption_for_training(some):
    """Nor are unseen templates."""
    _, table = some
    text = "\n".join(caption.text for caption in helpers.write_captions(table, 0))
    for fact in helpers.FACTS.values():
        for phrase in fact.unseen:
            assert not re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text), phrase
    for template in captions.UNSEEN_TEMPLATES:
        assert template.split("{}")[0].strip() not in text


def test_the_seed_decides(some):
    _, table = some
    first, again, other = (helpers.write_captions(table[:100], seed) for seed in (0, 0, 1))
    assert first == again != other


def test_words_templates_and_orders_vary(some):
    _, table = some
    texts = [caption.text for caption in helpers.write_captions(table, 0)]
    assert len(set(texts)) > 1200
    random = np.random.default_rng(0)
    said = {helpers.make_caption(["nitrile", "ring"], random).text for _ in range(200)}
    assert len(said) > 30


def test_relevance_is_having_every_fact_asked_for():
    table = helpers.fact_table(["C1CC1C#N", "C1CC1", "CC#N"])
    random = np.random.default_rng(0)
    asked = helpers.caption_table([helpers.make_caption(names, random) for names in (["nitrile"], ["nitrile", "ring"])])
    assert helpers.relevance(asked, table).tolist() == [[True, False, True], [True, False, False]]
    with pytest.raises(ValueError, match="expected"):
        helpers.relevance(asked[:, :3], table)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a fluorinated ring with a nitrile", ["fluorine", "ring", "nitrile"]),
        ("Nitriles and PYRIDINES", ["nitrile", "pyridine"]),
        ("a cyclic ester", ["lactone"]),
        ("an ester, cyclic", ["ester", "ring"]),
        ("an isoxazole", ["isoxazole"]),
        ("something with a peptide link", ["amide"]),
        ("pizza", []),
        ("a brick ringing", []),
    ],
)
def test_what_a_query_asks_for(text, expected):
    assert helpers.facts_in(text) == expected


def test_why_says_what_a_molecule_has_of_a_query():
    assert helpers.why("a fluorinated ring with a nitrile", "C1CC1C#N") == {
        "fluorine": False,
        "ring": True,
        "nitrile": True,
    }
    with pytest.raises(ValueError, match="not a valid SMILES"):
        helpers.why("a ring", "C1CC")


def test_descriptions_name_every_fact():
    table = helpers.fact_table(["CCO"])
    assert helpers.describe_facts(table) == ["oxygen, no ring, a methyl group, an alcohol"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: helpers.fact_table("CCO"),
        lambda: helpers.fact_table(["C1CC"]),
        lambda: helpers.write_captions(helpers.fact_table(["C"]), 0, "new"),
        lambda: helpers.write_captions(helpers.fact_table(["C"]), -1),
        lambda: helpers.make_caption(["nitril"], np.random.default_rng(0)),
        lambda: helpers.facts_in(""),
        lambda: helpers.facts_in(None),
        lambda: helpers.facts_in("x" * 10_000),
    ],
)
def test_bad_arguments_are_explained(call):
    with pytest.raises(ValueError) as error:
        call()
    assert len(str(error.value)) < 1200


def test_methane_has_a_caption():
    [caption] = helpers.write_captions(helpers.fact_table(["C"]), 0)
    assert isinstance(caption, Caption) and set(caption.facts) <= {"hydrocarbon", "no ring"}
