"""Wrong answers to the exercises of notebook 05, each with words that answer it; `test_exercises` tries them."""

import numpy as np
import torch

import helpers


def bar(betas):
    return (1 - betas).cumprod(0)


def sampling(change=""):
    """The right loop of exercise 05.3 with one change, as a function."""

    def answer(denoiser, z, timesteps, alpha_bar, asked, unwanted, scale):
        guess = None
        for k, t in enumerate(timesteps):
            last = k == len(timesteps) - 1
            now, after = alpha_bar[t], torch.tensor(1.0, dtype=z.dtype) if last else alpha_bar[timesteps[k + 1]]
            if change == "t - 1":
                after = alpha_bar[t - 1]
            if change == "-1" and last:
                after = alpha_bar[-1]
            one = denoiser(z, t, asked, guess)
            other = denoiser(z, t, unwanted * (change != "zeros"), guess)
            v = {
                "asked": one + scale * (one - other),
                "sum": other + scale * one,
                "swapped": one + scale * (other - one),
                "conditions": denoiser(z, t, unwanted + scale * (asked - unwanted), guess),
                "plain": one,
            }.get(change, other + scale * (one - other))
            z_0, eps = now.sqrt() * z - (1 - now).sqrt() * v, (1 - now).sqrt() * z + now.sqrt() * v
            if change != "forgetful":
                guess = now.sqrt() * z - (1 - now).sqrt() * one if change == "own guess" else z_0
            if change == "first guess":
                return z_0
            z = after.sqrt() * z_0 + (1 - after).sqrt() * (v if change == "v" else eps)
        return z

    return answer


def scales(change):
    """The right answer to exercise 05.2 with one change, as a function."""

    def answer(denoiser, z_t, t, guess, nothing, asked, unwanted, s, w):
        guess = None if change == "no guess" else guess
        v_0, v_c, v_n = (denoiser(z_t, t, condition, guess) for condition in (nothing, asked, unwanted))
        return {
            "plus": v_0 + s * (v_c - v_0) + w * (v_n - v_0),
            "negative condition": v_n + s * (v_c - v_n),
            "from unwanted": v_n + s * (v_c - v_n) - w * (v_n - v_0),
            "answer": v_0 + s * (v_c - v_0) - w * v_n,
            "from asked": v_c + s * (v_c - v_0) - w * (v_n - v_0),
            "arrows": s * (v_c - v_0) - w * (v_n - v_0),
            "conditions": denoiser(z_t, t, nothing + s * (asked - nothing) - w * (unwanted - nothing), guess),
        }.get(change, v_0 + s * (v_c - v_0) - w * (v_n - v_0))

    return answer


def decoding(change=""):
    """The right answer to exercise 05.6 with one change, as a function."""

    def answer(scores, rules, start):
        symbols = {left for left, right in rules}
        waiting, chosen = [start], []
        for row in scores:
            if not waiting:
                if change != "short":
                    chosen.append(len(rules))
                continue
            symbol = waiting[-1] if change == "kept" else waiting.pop()
            allowed = [k for k, (left, _) in enumerate(rules) if left == symbol]
            if change == "padding":
                allowed.append(len(rules))
            best = allowed[0] if change == "first" else max(allowed, key=lambda k: row[k])
            chosen.append(best)
            right = rules[best][1] if best < len(rules) else ()
            right = right if change == "order" else right[::-1]
            waiting.extend(part for part in right if part in symbols)
        return chosen

    return answer


def filled_up(output, asked):
    found = helpers.describe(output.valid_smiles)["type"].to_numpy()
    return (np.pad(found, (0, len(asked) - len(found))) == asked).mean()


def ordered(draws=40, scale=3.0, away="aromatic", measured=True):
    """An answer to exercise 05.5."""

    def answer(pipe, seed):
        away_from = away and {"type": away}
        generator = torch.Generator().manual_seed(seed)
        output = pipe(draws, {"part": "ring 5"}, scale, negative_condition=away_from, generator=generator)
        table = helpers.describe(sorted(set(output.valid_smiles)))
        fits = (table["part"] == "ring 5") & (table["type"] != "aromatic")
        return table["smiles"][fits | (not measured)].tolist()

    return answer


def types_of(output):
    return helpers.describe(output.valid_smiles)["type"].to_numpy()


WRONG = {
    "05.1": [
        (lambda c, groups, u, p: c * (u < p)[:, groups], "the other way round"),
        (lambda c, groups, u, p: c * (u >= p)[:, groups] / (1 - p), "nothing is scaled up"),
        (lambda c, groups, u, p: c * (u[:, :1] >= p), "each group is forgotten on its own"),
        (lambda c, groups, u, p: (u >= p)[:, groups].float(), "multiply the condition"),
        (lambda c, groups, u, p: c, "nothing was forgotten"),
        (lambda c, groups, u, p: c * (u >= p)[:1, groups], "each molecule of the batch"),
    ],
    "05.2": [
        (scales("plus"), r"goes \*towards\* what is unwanted"),
        (scales("negative condition"), "w has no effect"),
        (scales("from unwanted"), "both arrows start at the answer for `nothing`"),
        (scales("answer"), r"a \*difference\* of answers"),
        (scales("from asked"), "s = w = 0 must leave it alone"),
        (scales("arrows"), "they are added to the answer for `nothing`"),
        (scales("conditions"), "guide the answers, not the conditions"),
        (scales("no guess"), "never sees the guess"),
    ],
    "05.3": [
        (sampling("asked"), "start from the answer for `unwanted`"),
        (sampling("sum"), r"\*difference\*"),
        (sampling("swapped"), "exchanged"),
        (sampling("conditions"), "not the conditions"),
        (sampling("zeros"), "`unwanted` has no effect"),
        (sampling("forgetful"), "never sees its last guess"),
        (sampling("own guess"), r"the \*guided\* one"),
        (sampling("v"), "as if it were ε"),
        (sampling("t - 1"), "not of t - 1"),
        (sampling("-1"), "ᾱ is 1"),
        (sampling("first guess"), "stops after the first guess"),
        (sampling("plain"), "expected"),
        (lambda denoiser, z, *others: z, "nothing changed"),
    ],
    "05.4": [
        (lambda output, asked: (types_of(output) == asked[: len(types_of(output))]).mean(), "others' wishes"),
        (lambda output, asked: (types_of(output) == asked[output.valid]).sum() / len(asked), "divide by how many"),
        (lambda output, asked: (types_of(output) == asked[output.valid]).sum(), "not a number of molecules"),
        (filled_up, "still shifted"),
    ],
    "05.5": [
        (lambda pipe, seed: ["CC1CCCC1"] * 33, "more than once"),
        (lambda pipe, seed: ["CC1CCCC1"], r"1 molecules came \(seed 0\), 33 are needed"),
        (ordered(away=None), "33 are needed"),
        (ordered(scale=1.0), "33 are needed"),  # there a negative condition has no effect
        (ordered(scale=2.0), r"31 molecules came \(seed 1\), 33 are needed"),  # 33 with seed 0
        (ordered(draws=80), "80 draws, where 40 are paid for"),
        (ordered(measured=False), "is aromatic|has the part"),
        (lambda pipe, seed: "CC1CCCC1", "expected a list of SMILES"),
        (lambda pipe, seed: [None] * 33, "leave out the invalid ones"),
        (lambda pipe, seed: ["not a molecule"] * 33, "not all of them are molecules"),
        (lambda pipe, seed: ["CC1CCC1"], "has the part ring 4"),
    ],
    "05.6": [
        (lambda scores, rules, start: scores.argmax(1).tolist(), "whatever the grammar says"),
        (decoding("short"), "fill up with padding, number 6"),
        (decoding("padding"), "padding stands in row 2"),
        (decoding("order"), "is put on the stack last"),
        (decoding("kept"), "waits on top|nothing waits any more"),
        (decoding("first"), "is the likeliest of those that replace"),
    ],
    "05.7": [
        (lambda x, e, t, b: (x - b[t] / (1 - bar(b)[t]) * e) / (1 / bar(b)[t].sqrt()), "both bugs"),
        (
            lambda x, e, t, b: (x - b[t] / (1 - bar(b)[t]).sqrt() * e) / (1 / bar(b)[t].sqrt()),
            "shrinks where it should",
        ),
        (lambda x, e, t, b: (x - b[t] / (1 - bar(b)[t]).sqrt() * e) / bar(b)[t].sqrt(), "undoes α_t"),
        (lambda x, e, t, b: (x - b[t] / (1 - bar(b)[t]) * e) / (1 - b[t]).sqrt(), "weight of the noise"),
        (lambda x, e, t, b: (x - (1 - bar(b)[t]).sqrt() * e) / bar(b)[t].sqrt(), "expected"),
    ],
    "05.8": [
        (lambda drawn, mean: 1 - drawn / mean, r"But a prior \*draws\*"),
        (lambda drawn, mean: drawn / (2 * mean), "what they explain is the rest"),
        (lambda drawn, mean: drawn / mean, "nothing is asked"),
        (lambda drawn, mean: 2 - drawn / mean, "the share must then be 1"),
        (lambda drawn, mean: 1 - 2 * drawn / mean, "not half of it"),
        (lambda drawn, mean: 1 - (drawn / (2 * mean)) ** 2, "a square already"),
        (lambda drawn, mean: 0.1, "expected"),
    ],
}
