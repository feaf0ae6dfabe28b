"""Wrong answers to the longer exercises of notebook 03, each with words that answer it; `test_exercises` tries them."""

import torch

import helpers
from molecule_diffusion.exercises import notebook_03

# ---------------------------------------------------------------------------------------------------------------------
# 03.4: a schedule
# ---------------------------------------------------------------------------------------------------------------------


def early_end(steps):
    """A cosine that ends at ᾱ = 0.009."""
    alpha_bar = torch.cos(torch.linspace(0.14, 1.475, steps)) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])


# ---------------------------------------------------------------------------------------------------------------------
# 03.6: the sampler that explodes
# ---------------------------------------------------------------------------------------------------------------------


def sampler(guess=None, state=None, eps=None, noise=1.0, walk=reversed):
    """The faulty sampler with something done to the guess, the state, ε, the noise or the way, as an answer."""

    def answer(predict_eps, x, timesteps, alpha_bar, generator):
        kept = alpha_bar[timesteps]
        betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
        for k in walk(range(len(timesteps))):
            predicted = predict_eps(x, timesteps[k])
            if eps is not None:
                predicted = eps(predicted)
            x_0 = (x - (1 - kept[k]).sqrt() * predicted) / kept[k].sqrt()
            if guess is not None:
                x_0 = guess(x_0)
            x = helpers.posterior_mean(x_0, x, k, betas)
            if k > 0:
                variance = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
                x = x + noise * variance.sqrt() * torch.randn(x.shape, generator=generator)
            if state is not None:
                x = state(x)
        return x

    return answer


def cut(x):
    return x.clamp(-1, 1)


def first_guess(predict_eps, x, timesteps, alpha_bar, generator):
    a = alpha_bar[timesteps[-1]]
    return ((x - (1 - a).sqrt() * predict_eps(x, timesteps[-1])) / a.sqrt()).clamp(-1, 1)


EXPLODING = [
    (sampler(), "with an error of 0.05 in ε, it gets an x of the size 1e[+]03: it still explodes"),
    (sampler(state=cut), "Leave x_t and its noise alone"),
    (sampler(eps=cut), "with the exact network, it gets an x of the size .*still explodes"),
    (sampler(guess=lambda x_0: x_0.clamp(-1000, 1000)), "still explodes"),
    (sampler(guess=cut, noise=0.0), "Leave x_t and its noise alone"),
    (sampler(state=lambda x: (x - x.mean()) / x.std()), "of the numbers are positive; 80 % should be"),
    (sampler(guess=torch.sign), "of the numbers are positive"),
    (sampler(walk=lambda steps: reversed(steps[:25])), "called 25 times for 50 timesteps"),
    (sampler(walk=lambda steps: reversed(steps[1:])), "still explodes"),  # the first step is the last timestep
    (sampler(guess=cut, walk=lambda steps: steps), "of the numbers are positive"),  # in the wrong direction
    (first_guess, "called 1 times for 50 timesteps"),
    (lambda predict_eps, x, timesteps, alpha_bar, generator: x, "called 0 times"),
    (lambda *given: notebook_03.draw_with_eps(*given).tolist(), "expected a tensor like x, got list"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.7: a layer that knows no order
# ---------------------------------------------------------------------------------------------------------------------


def layer(pairs, messages):
    return notebook_03._layer_with(getattr(notebook_03, pairs), getattr(notebook_03, messages))


def only_atoms(h, e, w):
    return notebook_03.graph_layer(h, e, w)[0]


def forgets_atoms(h, e, w):
    new_h, new_e = notebook_03.graph_layer(h, e, w)
    return new_h - h, new_e


def forgets_pairs(h, e, w):
    new_h, new_e = notebook_03.graph_layer(h, e, w)
    return new_h, new_e - e


def averages(h, e, w):
    new_h, new_e = notebook_03.graph_layer(h, e, w)
    return h + (new_h - h) / len(h), new_e


def ignores_pairs(h, e, w):
    return h + (h @ w["value"]).sum(0), notebook_03.graph_layer(h, e, w)[1]


def sum_alone(h, e, w):
    total = h[:, None] + h[None]
    e = e + torch.relu(torch.cat([total, total, e], -1) @ w["pair"])
    return h + (torch.sigmoid(e @ w["gate"]) * (h @ w["value"])[None]).sum(1), e


LAYERS = [
    (layer("_mirrored", "_from_oneself"), "both faults are still in it"),
    (layer("_mirrored", "_from_the_others"), "it matters which atom comes first, also if one half is mirrored"),
    (layer("_sum_and_product", "_from_oneself"), "an atom still hears only itself"),
    (layer("_one_sided", "_from_the_others"), "now the bond from i to j differs"),
    (layer("_both_orders", "_from_the_others"), "use the sum and the product, as asked"),
    (layer("_product_and_sum", "_from_the_others"), "the sum comes first"),
    (sum_alone, "the pairs' new states: expected"),
    (averages, "summed, not averaged"),
    (forgets_atoms, "h is lost"),
    (forgets_pairs, "e is lost"),
    (only_atoms, "return two things"),
    (ignores_pairs, "the atoms' new states: expected"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.8: what message passing can tell apart
# ---------------------------------------------------------------------------------------------------------------------


def colouring(hear=None, own=True, shared=True, compare=sorted, atoms=True, first_round=0):
    """The right search with one thing changed, as an answer."""

    def answer(one, other, rounds):
        graphs = [one, other]
        colours = [[int(atom) if atoms else 0 for atom in graph[0]] for graph in graphs]
        for k in range(rounds + 1):
            if k >= first_round and compare(colours[0]) != compare(colours[1]):
                return k
            names, renewed = {}, []
            for (_, bonds), old in zip(graphs, colours):
                if not shared:
                    names = {}
                seen = [(old[i] if own else 0, hear_of(i, bonds, old)) for i in range(len(old))]
                renewed.append([names.setdefault(what, len(names)) for what in seen])
            colours = renewed
        return -1

    def hear_of(i, bonds, old):
        heard = [(int(bonds[i][j]), old[j]) for j in range(len(old)) if bonds[i][j] > 0]
        return tuple(sorted(heard)) if hear is None else hear(heard)

    return answer


def a_set(heard):
    return tuple(sorted(set(heard)))


def no_bonds(heard):
    return tuple(sorted(colour for _, colour in heard))


def one_late(one, other, rounds):
    found = notebook_03.told_apart(one, other, rounds)
    return found + 1 if found >= 0 else found


def yes_or_no(one, other, rounds):
    return notebook_03.told_apart(one, other, rounds) >= 0


def looks_at_rings(one, other, rounds):
    """Right, and more than a message can tell: whether all atoms can be reached from the first one."""
    found = notebook_03.told_apart(one, other, rounds)
    if found >= 0:
        return found
    reached = []
    for _, bonds in (one, other):
        ways = torch.linalg.matrix_power(torch.from_numpy(bonds > 0).double() + torch.eye(len(bonds)), 9)
        reached.append(int((ways[0] > 0).sum()))
    return rounds if reached[0] != reached[1] else -1


COLOURS = [
    (colouring(hear=a_set), "a ring of three carbons: expected 1.*a set would forget"),
    (colouring(hear=no_bonds), "C=C-C-C.*the class of its bond"),
    (colouring(hear=tuple), "written from either end|two triangles"),
    (colouring(hear=len), "the class of its bond"),
    (colouring(own=False), "holds its own old one"),
    (colouring(shared=False), "one dictionary of names per round"),
    (colouring(compare=list), "renumbered: expected 1, got 0"),
    (colouring(compare=set), "C-C-O and C-O-O: expected 0, got 1"),
    (colouring(atoms=False), "C-C-O and C-O-O: expected 0"),
    (colouring(first_round=1), "C-C-O and C-O-O: expected 0"),
    (one_late, "C-C-O and C-O-O: expected 0, got 1"),
    (yes_or_no, "return a whole number"),
    (lambda one, other, rounds: notebook_03.told_apart(one, other, 9), "only one round was allowed"),
    (looks_at_rings, "two triangles and a ring of six: expected -1"),
]

WRONG = {"03.6": EXPLODING, "03.7": LAYERS, "03.8": COLOURS}
