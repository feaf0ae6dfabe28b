"""The judge's network and what it reads, against RDKit; its order of atoms does not matter."""

import numpy as np
import pytest
import torch
from rdkit import Chem

import helpers
from molecule_diffusion.oracle import PropertyOracle, graph_features, ring_sizes, shortest_ways


@pytest.fixture(scope="module")
def some(qm9):
    rows = qm9.test[::500]
    return rows, torch.from_numpy(qm9.atoms[rows]), torch.from_numpy(qm9.bonds[rows])


def test_ways_and_hydrogens_are_rdkit_s(qm9, some):
    rows, atoms, bonds = some
    ways, (of_atoms, _) = shortest_ways(bonds.long()), graph_features(atoms, bonds)
    for k, i in enumerate(rows):
        mol = Chem.MolFromSmiles(qm9.smiles[i])
        n = mol.GetNumAtoms()
        np.testing.assert_array_equal(ways[k, :n, :n], Chem.GetDistanceMatrix(mol).astype(int))
        assert (ways[k, n:, :n] == 9).all()
        assert of_atoms[k, :n, 5:10].argmax(-1).tolist() == [atom.GetTotalNumHs() for atom in mol.GetAtoms()]


def test_rings_are_rdkit_s(qm9, some):
    rows, atoms, bonds = some
    sizes = ring_sizes(bonds.long())
    row, column = np.triu_indices(9, 1)
    for k, i in enumerate(rows):
        mol = Chem.MolFromSmiles(qm9.smiles[i])
        for a, b, size in zip(row, column, sizes[k].tolist()):
            bond = None
            if max(a, b) < mol.GetNumAtoms():
                bond = mol.GetBondBetweenAtoms(int(a), int(b))
            smallest = 0 if bond is None else next((s for s in range(3, 10) if bond.IsInRingSize(s)), 0)
            assert size == smallest, qm9.smiles[i]


def test_by_hand_cyclopropane_with_a_tail():
    _, bonds = helpers.to_graphs(["CC1CC1"])
    sizes = ring_sizes(torch.from_numpy(bonds).long())[0]
    assert sorted(sizes[sizes > 0].tolist()) == [3, 3, 3]


def test_the_order_of_the_atoms_does_not_matter(some):
    _, atoms, bonds = some
    torch.manual_seed(0)
    oracle = PropertyOracle(nodes=16, edges=8, layers=2).eval()
    order = torch.randperm(9)
    with torch.no_grad():
        plain = oracle(*graph_features(atoms, bonds))
        shuffled = oracle(*graph_features(atoms[:, order], bonds[:, order][:, :, order]))
    assert plain.shape == (len(atoms), 8)
    torch.testing.assert_close(plain, shuffled, atol=1e-5, rtol=1e-4)
