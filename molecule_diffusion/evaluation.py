"""Strict scores: what is valid, unique and novel, FCD, obedience, the rows that frame a table, and the table itself."""

import contextlib
import functools
import hashlib
import html
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from rdkit import Chem, rdBase

from molecule_diffusion.checks import check_count, check_seed, check_smiles_list, quoted
from molecule_diffusion.chemistry import (
    NO_ATOM,
    PAIRS,
    PARTS,
    PROPERTIES,
    TYPES,
    check_graphs,
    corrected_smiles,
    describe,
    matrix_from_pairs,
    pairs_from_matrix,
    properties,
    read_smiles,
    sanitised_smiles,
    to_mols,
    verdict,
)
from molecule_diffusion.conditions import CONDITION_TARGETS
from molecule_diffusion.files import DATA, MADE, RESULTS, atomic, read_json, read_npz, write_json
from molecule_diffusion.models import encode_graphs
from molecule_diffusion.pipelines import MoleculeOutput
from molecule_diffusion.qm9 import shared_qm9

REFERENCE = DATA / "reference.npz"  # FCD statistics and properties of the test molecules
FRAMING = RESULTS / "framing.json"  # the two framing rows at the usual N
OWN_FRAMING = MADE / "framing.json"  # and at others that were asked for on this machine


# ---------------------------------------------------------------------------------------------------------------------
# The strict score
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """The strict score of a set of molecules. Shares are between 0 and 1, or None where nothing can be counted.

    Attributes:
        name, N: of the set; every molecule given counts, None and unreadable ones too.
        valid: share of N that RDKit sanitises fully and that is one connected molecule without formal charges.
        fragmented: share of N that sanitises but is in several pieces (not valid here).
        corrected: share of N that is a molecule after `corrected_smiles` (not valid here; some papers report this).
        unique: distinct canonical SMILES (no stereo) as a share of the valid ones.
        novel: share of the distinct ones that are not in QM9's training split.
        fcd: Fréchet ChemNet Distance of the valid molecules to the 10,000 test molecules (Preuer et al. 2018,
            doi:10.1021/acs.jcim.8b00234). It falls with N: compare equal N only.
        distances: Wasserstein-1 distances of QED, logP, weight (Da) and number of rings to the test molecules.
        smiles: canonical SMILES of the valid molecules.
    """

    name: str
    N: int
    valid: float | None
    fragmented: float | None
    corrected: float | None
    unique: float | None
    novel: float | None
    fcd: float | None
    distances: dict
    smiles: list = field(repr=False, default_factory=list)

    def as_dict(self):
        """All numbers as a dict that JSON can hold (without the SMILES)."""
        return {name: value for name, value in asdict(self).items() if name != "smiles"}

    @property
    def framing(self):
        """The rows that frame it: training molecules (the floor) and random graphs, at the same N."""
        return framing_rows(self.N) if self.N else []

    def _repr_html_(self):
        return results_table([self, *self.framing])

    def __str__(self):
        cells = ", ".join(f"{name} {number_text(value)}" for name, value in list(self.as_dict().items())[2:-1])
        return f"{self.name} (N = {self.N:,}): {cells}"


def evaluate(molecules, name="samples"):
    """Score molecules strictly: nothing is repaired, everything given is counted. See `Evaluation` for each definition.

    Args:
        molecules: a pipeline's output, a pair (atoms, bonds), or a list of SMILES (None counts as invalid).
        name: the row's name in tables.

    Raises: ValueError for a single text, a table, what is no SMILES at all, and a SMILES of over 500 letters.
    Returns: Evaluation. In a notebook it shows itself as a table between the two framing rows.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={quoted(name)}: expected a text, the row's name in tables")
    with rdBase.BlockLogs():
        found = [_judge(mol) for mol in _read(molecules)]
    n = len(found)
    valid = [smiles for state, smiles, _ in found if state == "valid"]
    distinct = set(valid)
    return Evaluation(
        name=name,
        N=n,
        valid=_share(len(valid), n),
        fragmented=_share(sum(state == "fragmented" for state, _, _ in found), n),
        corrected=_share(sum(corrected for _, _, corrected in found), n),
        unique=_share(len(distinct), len(valid)),
        novel=_share(len(distinct - _training_smiles()), len(distinct)),
        fcd=fcd_to_test(valid),
        distances=property_distances(valid),
        smiles=valid,
    )


def _read(molecules):
    """What `evaluate` was given, one after the other as unsanitised RDKit molecules, which are large; None for none."""
    if isinstance(molecules, MoleculeOutput):
        molecules = (molecules.atoms, molecules.bonds)
    if isinstance(molecules, tuple) and len(molecules) == 2 and hasattr(molecules[0], "shape"):
        atoms, bonds = check_graphs(*molecules)
        for start in range(0, len(atoms), 1000):
            yield from to_mols(atoms[start : start + 1000], bonds[start : start + 1000])
        return
    for text in check_smiles_list("evaluate", molecules):
        yield _unsanitised(text)


def _unsanitised(smiles):
    if smiles is not None and not isinstance(smiles, str):
        raise ValueError(f"{quoted(smiles)} among the molecules: expected SMILES strings, or None for an invalid one")
    mol = read_smiles(smiles, sanitize=False) if smiles else None
    if mol is None or any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):  # 0: a placeholder, written *
        return None
    return Chem.RemoveHs(mol, sanitize=False)


def _judge(mol):
    """What one molecule counts as (see `verdict`), its canonical SMILES, and whether a correction would save it."""
    if mol is None:
        return "refused", None, False
    corrected = corrected_smiles(mol) is not None
    smiles = sanitised_smiles(Chem.Mol(mol))
    return verdict(smiles), smiles, corrected


def _share(part, whole):
    return part / whole if whole else None


@functools.cache
def _training_smiles():
    qm9 = shared_qm9()
    return frozenset(qm9.smiles[i] for i in qm9.train)


def property_distances(smiles):
    """Wasserstein-1 distances of the PROPERTIES of molecules to those of the test molecules: a dict."""
    from scipy.stats import wasserstein_distance

    if not smiles:
        return dict.fromkeys(PROPERTIES)
    ours, test = properties(smiles), reference()["properties"]
    return {name: float(wasserstein_distance(ours[:, k], test[:, k])) for k, name in enumerate(PROPERTIES)}


def fcd_statistics(smiles):
    """Mean (512,) and covariance (512, 512) of ChemNet's activations (Preuer et al. 2018)."""
    import fcd

    with torch.random.fork_rng(devices=[]):  # both take some of torch's random numbers, which are the caller's
        network = fcd.load_ref_model()
        activations = fcd.get_predictions(network, list(smiles), n_jobs=0, device="cpu").astype(np.float64)
    return activations.mean(0), np.cov(activations.T)


def fcd_to_test(smiles):
    """Fréchet ChemNet Distance of molecules to the 10,000 test molecules; None for fewer than two."""
    return _fcd(smiles, lambda: (reference()["mean"], reference()["covariance"]))


def fcd_to_validation(smiles):
    """The same distance to the 5,000 validation molecules, for choices, which the test molecules must not make.

    It is larger than that to the test molecules, of which there are twice as many: compare it with itself only.
    """
    return _fcd(smiles, _validation_statistics)


def _fcd(smiles, statistics):
    """FCD between molecules and a set of which `statistics()` gives mean and covariance; None for fewer than two."""
    import fcd

    if len(smiles) < 2:
        return None
    return float(fcd.calculate_frechet_distance(*fcd_statistics(smiles), *statistics()))


@functools.cache
def _validation_statistics():
    qm9 = shared_qm9()
    return fcd_statistics([qm9.smiles[i] for i in qm9.validation])


# ---------------------------------------------------------------------------------------------------------------------
# The reference: the test molecules
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def reference():
    """The content of data/reference.npz: mean and covariance of ChemNet, properties (10,000, 4). Read once."""
    remedy = "make it with: python helpers.py reference"
    try:
        content = read_npz(REFERENCE, ("mean", "covariance", "properties", "test"))
    except FileNotFoundError:
        raise FileNotFoundError(f"data/{REFERENCE.name} is missing; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"data/{error}; {remedy}") from None
    if str(content["test"]) != _fingerprint_of_test():
        raise ValueError(f"data/{REFERENCE.name} belongs to another test split; {remedy}")
    covariance = np.zeros((512, 512))
    covariance[np.triu_indices(512)] = content["covariance"]
    content["covariance"] = covariance + np.triu(covariance, 1).T
    return content


def _fingerprint_of_test():
    qm9 = shared_qm9()
    return hashlib.sha256("\n".join(qm9.smiles[i] for i in qm9.test).encode()).hexdigest()


def make_reference():
    """Write data/reference.npz: what `evaluate` compares with, from the 10,000 test molecules (about half a minute)."""
    qm9 = shared_qm9()
    smiles = [qm9.smiles[i] for i in qm9.test]
    mean, covariance = fcd_statistics(smiles)
    content = {
        "mean": mean.astype(np.float32),
        "covariance": covariance[np.triu_indices(512)].astype(np.float32),
        "properties": properties(smiles).astype(np.float32),
        "test": np.array(_fingerprint_of_test()),
    }
    with atomic(REFERENCE) as part, open(part, "wb") as file:
        np.savez_compressed(file, **content)
    reference.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The rows that frame every table, and the table
# ---------------------------------------------------------------------------------------------------------------------


def training_molecules(n, seed):
    """n training molecules, drawn with replacement as an ideal sampler would: atoms int8 (n, 9), bonds (n, 9, 9)."""
    qm9 = shared_qm9()
    rows = np.random.default_rng(seed).choice(qm9.train, n)
    return qm9.atoms[rows], qm9.bonds[rows]


def random_graphs(n, seed=0):
    """Graphs that know QM9's atoms and how many bonds of each order there are, but not where bonds belong.

    Takes n training molecules and shuffles the bonds of each among the pairs of its atoms.
    Returns: atoms int8 (n, 9), bonds int8 (n, 9, 9).
    """
    check_count("n", n)
    check_seed(seed)
    qm9 = shared_qm9()
    rng = np.random.default_rng(seed)
    rows = rng.choice(qm9.train, n)
    atoms = qm9.atoms[rows]
    pairs = pairs_from_matrix(qm9.bonds[rows])
    real = (atoms[:, PAIRS[0]] != NO_ATOM) & (atoms[:, PAIRS[1]] != NO_ATOM)
    for pair, mask in zip(pairs, real):
        pair[mask] = rng.permutation(pair[mask])
    return atoms, matrix_from_pairs(pairs)


def framing_rows(n):
    """The two rows that frame every table, at N = n: training molecules (the floor), random graphs (the ceiling).

    Read from data/results/framing.json where it has this n, else computed, with a bar (a minute at n = 10,000), and
    kept in data/framing.json, or in the folder that MOLECULE_DIFFUSION_DATA names.
    """
    check_count("n", n)
    for path in (FRAMING, OWN_FRAMING):
        rows = _read_framing(path).get(str(n))
        if rows:
            return [Evaluation(**row) for row in rows]
    rows = compute_framing(n)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs this wait again, nothing else
        write_json(OWN_FRAMING, _read_framing(OWN_FRAMING) | {str(n): [row.as_dict() for row in rows]})
    return rows


def _read_framing(path):
    """The framing rows in a file, by N: a dict, empty where there is no file."""
    try:
        content = read_json(path) if path.exists() else {}
        for rows in content.values():
            [Evaluation(**row) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.name} is damaged ({error}); delete it, then make it with: python helpers.py reference"
        ) from None
    return content


@functools.lru_cache(maxsize=4)
def compute_framing(n):
    """The framing rows at N = n, computed."""
    from tqdm.auto import tqdm

    with tqdm(total=2, desc=f"rows that frame a table at N = {n:,}", unit=" rows") as bar:
        training = evaluate(training_molecules(n, seed=1), "training molecules")
        bar.update()
        noise = evaluate(random_graphs(n, seed=1), "random graphs")
        bar.update()
    return [training, noise]


def make_framing():
    """Write data/results/framing.json: the framing rows at N = 1,000, 2,000 and 10,000."""
    write_json(FRAMING, {n: [row.as_dict() for row in compute_framing(n)] for n in (1000, 2000, 10_000)})


def results_table(evaluations):
    """Evaluations, a list of them or one, as an HTML table, shares in per cent. Pass what `evaluate` returned."""
    head, *rows = _cells(evaluations)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def text_table(evaluations):
    """The same table as plain text."""
    rows = _cells(evaluations)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        lines.append("  ".join([first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:]))]))
    return "\n".join(lines)


def _cells(evaluations):
    """The cells of a results table, the heading first: a list of rows of texts."""
    if isinstance(evaluations, Evaluation):
        evaluations = [evaluations]
    rows = [["", "N", "valid %", "fragmented %", "corrected %", "unique %", "novel %", "FCD"]]
    rows[0] += [f"W({name})" for name in PROPERTIES]
    for score in evaluations:
        shares = (score.valid, score.fragmented, score.corrected, score.unique, score.novel)
        row = [score.name, f"{score.N:,}", *("–" if share is None else f"{100 * share:.1f}" for share in shares)]
        rows.append(row + [number_text(value) for value in (score.fcd, *score.distances.values())])
    return rows


def number_text(value):
    """A number as tables show it: three digits below 1, two decimals above; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Obedience and reconstruction
# ---------------------------------------------------------------------------------------------------------------------


def obedience(output, condition):
    """How many of the valid molecules are what was asked for, by the rules of TYPES and PARTS.

    Args: output: MoleculeOutput of N molecules; condition: dict with type or part or both: a name, or N names.
    Returns: dict with type_obeyed (a share of the valid ones, averaged over classes), type_by_class, and so for part.
    """
    if unknown := sorted(map(str, condition.keys() - {"type", "part", *CONDITION_TARGETS})):
        raise ValueError(f"unknown condition {quoted(unknown[0])}; obedience is counted for type and part")
    valid, found, result = output.valid, describe(output.valid_smiles), {}
    for key, known in (("type", TYPES), ("part", PARTS)):
        if condition.get(key) is None:
            continue
        names = {condition[key]} if isinstance(condition[key], str) else set(condition[key])
        if unknown := sorted(map(str, names - known.keys())):
            raise ValueError(f"unknown {key} {quoted(unknown[0])}; known ones: {', '.join(known)}")
        if not isinstance(condition[key], str) and len(condition[key]) != len(output):
            raise ValueError(
                f"{len(condition[key])} values of {key} for {len(output)} molecules: expected one for each"
            )
        asked = np.broadcast_to(np.array(condition[key], dtype=object), len(output))[valid]
        right = found[key].to_numpy() == asked
        by_class = {name: float(right[asked == name].mean()) for name in sorted(set(asked))}
        result[f"{key}_obeyed"] = float(np.mean(list(by_class.values())))
        result[f"{key}_by_class"] = by_class
    return result


@torch.no_grad()
def reconstruction_accuracy(vae, atoms, bonds, batch_size=2000):
    """Share of graphs that the VAE returns exactly, every atom and bond, from the posterior's mean."""
    z = encode_graphs(vae, atoms, bonds, batch_size)  # refuses what are no graphs
    if not len(z):
        raise ValueError("no graphs: expected at least one to reconstruct")
    atoms, bonds = torch.as_tensor(atoms), torch.as_tensor(bonds)
    exact = 0
    for some_atoms, some_bonds, some_z in zip(atoms.split(batch_size), bonds.split(batch_size), z.split(batch_size)):
        found_atoms, found_bonds = vae.decode_graphs(some_z.to(vae.device))
        same_atoms = (found_atoms.cpu() == some_atoms).all(1)
        same_bonds = (found_bonds.cpu() == some_bonds).flatten(1).all(1)
        exact += (same_atoms & same_bonds).sum().item()
    return exact / len(atoms)


def exact_match(found, true):
    """Share of sequences found exactly: the largest entry of every row is the true one. Shapes: two (N, 1, L, W)."""
    if found.shape != true.shape or found.ndim != 4:
        raise ValueError(f"sequences of shapes {found.shape} and {true.shape}: expected two of one shape (N, 1, L, W)")
    found, true = np.asarray(found), np.asarray(true)
    return (found.argmax(-1) == true.argmax(-1)).all((1, 2)).mean()
