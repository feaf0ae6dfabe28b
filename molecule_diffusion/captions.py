"""Words for molecules: structural facts with SMARTS and names, captions made of them, and what a query asks for."""

import functools
import re
from dataclasses import dataclass

import numpy as np
from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from molecule_diffusion.checks import check_seed, check_smiles_list, quoted
from molecule_diffusion.chemistry import read_smiles


@dataclass(frozen=True)
class Fact:
    """Something about a molecule's structure that RDKit can decide and a caption can say.

    Attributes:
        group: "element", "shape", "aromatic", "ring" (of a certain kind) or "family" (functional groups).
        smarts: the pattern; the fact holds where it matches, or, with `absent`, where it does not.
        words: noun phrases that say it; captions for training use these.
        unseen: further phrases for the same, kept out of every training caption, to ask with.
        adjective: one more known word, that stands before a noun.
    """

    group: str
    smarts: str
    words: tuple
    unseen: tuple
    adjective: str | None = None
    absent: bool = False


# [kN] is an atom in a ring of N atoms. ([rN] is one whose *smallest* ring has N atoms, which misses the larger of two
# fused rings.) xN is an atom with N bonds in rings, @ a bond in a ring, XN an atom with N neighbours.
FACTS = {
    # elements
    "fluorine": Fact("element", "F", ("fluorine", "a fluorine atom"), ("an organofluorine centre",), "fluorinated"),
    "nitrogen": Fact("element", "[#7]", ("nitrogen", "a nitrogen atom"), ("azote",), "nitrogenous"),
    "oxygen": Fact("element", "[#8]", ("oxygen", "an oxygen atom"), ("the element of breath",), "oxygenated"),
    "two nitrogens": Fact("element", "[#7].[#7]", ("two nitrogens", "at least two nitrogen atoms"), ("an N,N pair",)),
    "two oxygens": Fact("element", "[#8].[#8]", ("two oxygens", "at least two oxygen atoms"), ("an O,O pair",)),
    "hydrocarbon": Fact(
        "element", "[!#6]", ("only carbon and hydrogen", "no heteroatom"), ("nothing but hydrocarbon",), absent=True
    ),
    # the shape of the skeleton
    "ring": Fact("shape", "[R]", ("a ring", "a cycle"), ("a closed loop of atoms",), "cyclic"),
    "no ring": Fact(
        "shape", "[R]", ("no ring", "an open chain"), ("an unclosed skeleton",), adjective="acyclic", absent=True
    ),
    "ring of 3": Fact("shape", "[k3]", ("a three-membered ring", "a ring of three atoms"), ("a triangle",)),
    "ring of 4": Fact("shape", "[k4]", ("a four-membered ring", "a ring of four atoms"), ("a square",)),
    "ring of 5": Fact("shape", "[k5]", ("a five-membered ring", "a ring of five atoms"), ("a pentagon",)),
    "ring of 6": Fact("shape", "[k6]", ("a six-membered ring", "a ring of six atoms"), ("a hexagon",)),
    "ring of 7": Fact("shape", "[k7]", ("a seven-membered ring", "a ring of seven atoms"), ("a heptagon",)),
    "spiro": Fact("shape", "[x4]", ("a spiro atom", "two rings sharing one atom"), ("a common corner of two cycles",)),
    "fused": Fact(
        "shape", "[x3]@[x3]", ("fused rings", "two rings sharing a bond"), ("annelated cycles",), adjective="bicyclic"
    ),
    "methyl": Fact("shape", "[CH3]", ("a methyl group", "a methyl"), ("a CH3 end",), "methylated"),
    "tert-butyl": Fact(
        "shape", "[CX4]([CH3])([CH3])[CH3]", ("a tert-butyl group", "three methyls on one carbon"), ("a t-Bu unit",)
    ),
    # aromatic rings
    "aromatic": Fact("aromatic", "a", ("an aromatic ring", "an aromatic system"), ("a Hückel ring",), "aromatic"),
    "benzene": Fact("aromatic", "c1ccccc1", ("a benzene ring", "a phenyl ring"), ("an all-carbon arene",)),
    "pyridine": Fact(
        "aromatic", "n1ccccc1", ("a pyridine", "an aromatic six-ring with one nitrogen"), ("an azabenzene",)
    ),
    "pyrimidine": Fact(
        "aromatic", "n1cnccc1", ("a pyrimidine", "an aromatic six-ring with two nitrogens apart"), ("a 1,3-diazine",)
    ),
    "pyrrole": Fact(
        "aromatic", "[nX3]1cccc1", ("a pyrrole", "an aromatic five-ring with one nitrogen"), ("a 1H-azole",)
    ),
    "furan": Fact("aromatic", "o1cccc1", ("a furan", "an aromatic five-ring with one oxygen"), ("an oxole",)),
    "imidazole": Fact(
        "aromatic",
        "n1c[nX3]cc1",
        ("an imidazole", "an aromatic five-ring with two nitrogens apart"),
        ("a 1,3-diazole",),
    ),
    "pyrazole": Fact(
        "aromatic",
        "n1[nX3]ccc1",
        ("a pyrazole", "an aromatic five-ring with a bond between nitrogens"),
        ("a 1,2-diazole",),
    ),
    "oxazole": Fact(
        "aromatic",
        "o1cncc1",
        ("an oxazole", "an aromatic five-ring with oxygen and nitrogen apart"),
        ("a 1,3-azoxole",),
    ),
    "isoxazole": Fact(
        "aromatic",
        "o1nccc1",
        ("an isoxazole", "an aromatic five-ring with a bond from oxygen to nitrogen"),
        ("a 1,2-azoxole",),
    ),
    # rings of a certain kind
    "cyclopropane": Fact(
        "ring", "[CX4]1[CX4][CX4]1", ("a cyclopropane", "a three-membered ring of carbon"), ("a trimethylene ring",)
    ),
    "epoxide": Fact("ring", "[CX4]1[CX4]O1", ("an epoxide", "a three-membered ring with oxygen"), ("an oxirane",)),
    "aziridine": Fact(
        "ring", "[CX4]1[CX4][NX3]1", ("an aziridine", "a three-membered ring with nitrogen"), ("an ethylenimine",)
    ),
    "oxetane": Fact(
        "ring", "[CX4]1[CX4][CX4]O1", ("an oxetane", "a four-membered ring with oxygen"), ("an oxacyclobutane",)
    ),
    "lactone": Fact("ring", "[CX3](=O)@[OX2]", ("a lactone", "a cyclic ester"), ("an olide",)),
    "lactam": Fact("ring", "[CX3](=O)@[NX3]", ("a lactam", "a cyclic amide"), ("an azacycloalkanone",)),
    # functional groups
    "alcohol": Fact("family", "[OX2H][CX4]", ("an alcohol", "a hydroxyl group"), ("an OH group", "a carbinol")),
    "diol": Fact("family", "[$([OX2H][CX4])].[$([OX2H][CX4])]", ("a diol", "two hydroxyl groups"), ("a glycol",)),
    "ether": Fact(
        "family",
        "[OX2]([#6;!$(C=O)])[#6;!$(C=O)]",
        ("an ether", "an oxygen between two carbons"),
        ("an alkoxy group",),
    ),
    "aldehyde": Fact("family", "[CX3H1](=O)[#6]", ("an aldehyde", "a formyl group"), ("an alkanal",)),
    "ketone": Fact("family", "[#6][CX3](=O)[#6]", ("a ketone", "a carbonyl between two carbons"), ("an alkanone",)),
    "ester": Fact("family", "[CX3](=O)[OX2][#6]", ("an ester", "an ester group"), ("an alkanoate",)),
    "amide": Fact("family", "[CX3](=O)[NX3]", ("an amide", "an amide bond"), ("a peptide link",)),
    "nitrile": Fact("family", "C#N", ("a nitrile", "a cyano group"), ("a cyanide", "a carbonitrile")),
    "alkyne": Fact("family", "C#C", ("an alkyne", "a carbon-carbon triple bond"), ("an acetylene unit",)),
    "alkene": Fact("family", "[CX3]=[CX3]", ("an alkene", "a carbon-carbon double bond"), ("an olefin",)),
    "imine": Fact("family", "[CX3]=[NX2]", ("an imine", "a carbon-nitrogen double bond"), ("a Schiff base",)),
    "oxime": Fact("family", "[CX3]=[NX2][OX2H]", ("an oxime", "a hydroxyl on an imine"), ("an isonitroso group",)),
    "primary amine": Fact("family", "[NX3H2][CX4]", ("a primary amine", "an amino group"), ("an NH2 group",)),
    "secondary amine": Fact(
        "family", "[NX3H1]([CX4])[CX4]", ("a secondary amine", "an amine with one hydrogen"), ("an NH link",)
    ),
    "tertiary amine": Fact(
        "family",
        "[NX3]([CX4])([CX4])[CX4]",
        ("a tertiary amine", "an amine without hydrogen"),
        ("a trialkyl nitrogen",),
    ),
    "trifluoromethyl": Fact(
        "family", "C(F)(F)F", ("a trifluoromethyl group", "three fluorines on one carbon"), ("a CF3 group",)
    ),
}
_NAMES = list(FACTS)

MAX_QUERY_LENGTH = 300  # letters

# ---------------------------------------------------------------------------------------------------------------------
# Facts of molecules
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _patterns():
    return [(Chem.MolFromSmarts(fact.smarts), fact.absent) for fact in FACTS.values()]


def facts_of(mol):
    """Which facts hold for a sanitised RDKit molecule: a list of booleans, in the order of FACTS."""
    return [mol.HasSubstructMatch(pattern) != absent for pattern, absent in _patterns()]


def fact_table(smiles):
    """Which facts hold for which molecules. Returns: bool (N, facts), columns in the order of FACTS.

    Raises: ValueError where RDKit cannot read one.
    """
    rows = []
    for text in check_smiles_list("fact_table", smiles):
        mol = read_smiles(text)
        if mol is None:
            raise ValueError(f"{quoted(text)} is not a valid SMILES (syntax or valence)")
        rows.append(facts_of(mol))
    return np.array(rows, bool).reshape(-1, len(FACTS))


def relevance(asked, table):
    """Whether a molecule has every fact that a query asks for, for each query and each molecule.

    Shapes: asked bool (Q, facts), table bool (N, facts) -> bool (Q, N).
    """
    asked, table = np.asarray(asked, bool), np.asarray(table, bool)
    if asked.ndim != 2 or table.ndim != 2 or asked.shape[1] != table.shape[1]:
        raise ValueError(f"asked {asked.shape} and table {table.shape}: expected (Q, facts) and (N, facts)")
    missing = asked.astype(np.float32) @ (~table).T.astype(np.float32)  # how many of the facts a molecule lacks
    return missing == 0


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A text about a molecule, and the names of the facts that it states."""

    text: str
    facts: tuple


# {} takes noun phrases: "a nitrile and a ring".
TEMPLATES = (
    "a molecule with {}",
    "a compound that has {}",
    "a structure containing {}",
    "find molecules with {}",
    "{}",
    "it contains {}",
)
UNSEEN_TEMPLATES = (
    "I am looking for something in which there is {}",
    "could you show me candidates that feature {}, please",
    "in this substance a chemist would recognise {}",
)
WORDS = ("known", "sentences", "unseen")  # kinds of captions
_NOUNS = ("molecule", "compound", "structure")


def write_captions(table, seed, words="known", most=3):
    """Write one caption for each molecule: some of its facts, in random words and order.

    Args:
        table: bool (N, facts), as `fact_table` makes it.
        seed: of all choices.
        words: "known": the words and templates of training; "sentences": known words in other templates; "unseen":
            known templates with other words.
        most: how many facts a caption states at most; 1 to `most` are equally likely.

    Returns: list of N Captions.
    """
    if words not in WORDS:
        raise ValueError(f"words={quoted(words)}: expected one of {', '.join(WORDS)}")
    check_seed(seed)
    random = np.random.default_rng(seed)
    captions = []
    for row in np.asarray(table, bool):
        true = row.nonzero()[0]
        if len(true) == 0:
            raise ValueError(
                "a molecule for which no fact holds; fact_table finds one for every molecule of the course"
            )
        number = min(len(true), int(random.integers(1, most + 1)))
        names = [_NAMES[place] for place in random.permutation(true)[:number]]
        captions.append(make_caption(names, random, words))
    return captions


def make_caption(names, random, words="known"):
    """A caption that states exactly these facts, in this order. Args: random: numpy's Generator; others as above."""
    for name in names:
        if name not in FACTS:
            raise ValueError(f"unknown fact {quoted(name)}; there are {', '.join(FACTS)}")
    names = list(names)
    templates = UNSEEN_TEMPLATES if words == "sentences" else TEMPLATES
    adjective = FACTS[names[0]].adjective
    if words == "known" and adjective is not None and random.random() < 0.3:
        start = f"{_article(adjective)} {adjective} {random.choice(_NOUNS)}"
        rest = [_phrase(name, random, words) for name in names[1:]]
        text = f"{start} with {_joined(rest, random)}" if rest else start
    else:
        text = random.choice(templates).format(_joined([_phrase(name, random, words) for name in names], random))
    return Caption(str(text), tuple(names))


def _phrase(name, random, words):
    return random.choice(FACTS[name].unseen if words == "unseen" else FACTS[name].words)


def _joined(phrases, random):
    if len(phrases) == 1:
        return phrases[0]
    last = random.choice([" and ", ", and also ", " together with "])
    return ", ".join(phrases[:-1]) + last + phrases[-1]


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def caption_table(captions):
    """Which facts captions ask for: bool (N, facts), columns in the order of FACTS."""
    table = np.zeros((len(captions), len(FACTS)), bool)
    for row, caption in enumerate(captions):
        table[row, [_NAMES.index(name) for name in caption.facts]] = True
    return table


def describe_facts(table):
    """All facts of molecules as one plain text each, for baselines that compare words. Args: table: bool (N, facts)."""
    descriptions = []
    for row in np.asarray(table, bool):
        descriptions.append(", ".join(FACTS[_NAMES[place]].words[0] for place in row.nonzero()[0]))
    return descriptions


def leaks(text, smiles):
    """Whether a caption gives its molecule away: by its SMILES, its formula, or its number in QM9.

    Args: text: the caption; smiles: of the molecule.
    """
    words = [word.strip(".,;:!?\"'") for word in text.split()]
    formula = CalcMolFormula(read_smiles(smiles))
    named = any(word.lower().startswith("gdb") for word in words)
    return named or smiles in words or formula in words or (len(smiles) > 3 and smiles in text)


# ---------------------------------------------------------------------------------------------------------------------
# What a query asks for
# ---------------------------------------------------------------------------------------------------------------------


def check_query(text):
    """The query, without spaces around it. Raises: ValueError for what is no text, an empty one, or too long a one."""
    if not isinstance(text, str):
        raise ValueError(f"{quoted(text)}: expected a query, a text such as 'a ring with a nitrile'")
    if not text.strip():
        raise ValueError("the query is empty: say what the molecule should have, such as 'a ring with a nitrile'")
    if len(text) > MAX_QUERY_LENGTH:
        raise ValueError(f"a query of {len(text):,} letters, {quoted(text, 40)}: at most {MAX_QUERY_LENGTH} are read")
    return text.strip()


@functools.cache
def known_phrases():
    """Every word of FACTS without its article, unseen ones too, longest first: a list of (phrase, name of the fact)."""
    pairs = []
    for name, fact in FACTS.items():
        adjectives = () if fact.adjective is None else (fact.adjective,)
        for phrase in (name, *fact.words, *fact.unseen, *adjectives):
            pairs.append((_without_article(phrase).lower(), name))
    return sorted(dict.fromkeys(pairs), key=lambda pair: -len(pair[0]))


def _without_article(phrase):
    return re.sub(r"^(a|an|the) ", "", phrase)


def facts_in(text):
    """The names of the facts whose words stand in a text, each once, in its order.

    Long words are found first and then taken away, so that "cyclic ester" is a lactone and not also an ester.
    """
    left = check_query(text).lower()
    found = {}
    for phrase, name in known_phrases():
        pattern = rf"(?<![\w-]){re.escape(phrase)}(?:s|es)?(?![\w-])"
        for match in re.finditer(pattern, left):
            found[name] = min(match.start(), found.get(name, len(left)))
            left = left[: match.start()] + "·" * len(match.group()) + left[match.end() :]
    return sorted(found, key=found.get)


def why(query, smiles):
    """What a query asks for, as far as its words are known, and whether a molecule has it: a dict {fact: bool}."""
    mol = read_smiles(smiles)
    if mol is None:
        raise ValueError(f"{quoted(smiles)} is not a valid SMILES (syntax or valence)")
    holds = dict(zip(FACTS, facts_of(mol)))
    return {name: holds[name] for name in facts_in(query)}
