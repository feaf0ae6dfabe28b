"""Wrong answers to the longer exercises of notebook 03, each with words that answer it; `test_exercises` tries them."""

import torch
from torch.nn import functional as F

import helpers
from molecule_diffusion.exercises import notebook_03, notebook_03_lab

# ---------------------------------------------------------------------------------------------------------------------
# 03.4: a schedule
# ---------------------------------------------------------------------------------------------------------------------


def early_end(steps):
    """A cosine that ends at ᾱ = 0.009."""
    alpha_bar = torch.cos(torch.linspace(0.14, 1.475, steps)) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])


# ---------------------------------------------------------------------------------------------------------------------
# 03.3: reading schedules
# ---------------------------------------------------------------------------------------------------------------------


def faults(**changes):
    return notebook_03.FAULTS | changes


FAULTS = [
    ({"A": ..., "B": ..., "C": ..., "D": ...}, "no answer yet for A, B, C, D"),
    (faults(A="fine"), "A is not “fine”: more than two fifths of its steps"),
    (faults(B="fine"), "B is not “fine”: look at its last step"),
    (faults(C="signal left"), "C is not “signal left”: it ends near 0"),
    (faults(D="nothing to learn at the noisy end"), "D is not .* above 0.95"),
    (faults(B="something"), "B: 'something' is none of fine, nothing to learn at the clean end"),
    (faults(E="fine"), "there is no schedule 'E'"),
    (["fine"], "a dictionary was expected"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.6: the loss
# ---------------------------------------------------------------------------------------------------------------------


def loss(
    jump=helpers.q_sample,
    share=2,
    first=None,
    read=lambda guess, half: guess,
    scale=lambda nats, atoms, pairs, batch: nats / batch,
    reduction="sum",
    told=lambda logits: logits,
):
    """The right loss with one thing changed, as an answer."""

    def answer(model, x_0, t, eps, alpha_bar):
        x_t = jump(x_0, t, eps, alpha_bar)
        half = len(x_0) // share
        guess = torch.zeros_like(x_0)
        with torch.no_grad():
            guess[:half] = helpers.expected_graph(model(x_t[:half], t[:half], first))
        parts = helpers.split_vector(model(x_t, t, read(guess, half)))
        nats = []
        for part, true in zip(parts, helpers.split_vector(x_0)):
            wanted = true.argmax(-1).flatten()
            nats.append(F.cross_entropy(told(part.flatten(0, 1)), wanted, reduction=reduction))
        return scale(sum(nats), *nats, len(x_0))

    return answer


def one_call(model, x_0, t, eps, alpha_bar):
    x_t = helpers.q_sample(x_0, t, eps, alpha_bar)
    told = helpers.split_vector(model(x_t, t, None))
    true = helpers.split_vector(x_0)
    nats = [F.cross_entropy(a.flatten(0, 1), b.argmax(-1).flatten(), reduction="sum") for a, b in zip(told, true)]
    return sum(nats) / len(x_0)


def with_gradients(model, x_0, t, eps, alpha_bar):
    x_t = helpers.q_sample(x_0, t, eps, alpha_bar)
    half = len(x_0) // 2
    first = helpers.expected_graph(model(x_t[:half], t[:half], None))
    guess = torch.cat([first, torch.zeros_like(x_0[half:])])
    return model(x_t, t, guess).square().mean()


def without_any(*given):
    with torch.no_grad():
        return notebook_03.graph_loss(*given)


def squared(model, x_0, t, eps, alpha_bar):
    x_t = helpers.q_sample(x_0, t, eps, alpha_bar)
    guess = torch.zeros_like(x_0)
    with torch.no_grad():
        guess[:3] = helpers.expected_graph(model(x_t[:3], t[:3], None))
    return (helpers.expected_graph(model(x_t, t, guess)) - x_0).square().sum(1).mean()


LOSSES = [
    (loss(scale=lambda nats, atoms, pairs, batch: nats), "divide by the number of molecules"),
    (loss(reduction="mean", scale=lambda nats, atoms, pairs, batch: nats), "a mean over all entries"),
    (loss(scale=lambda nats, atoms, pairs, batch: atoms / batch), "the pairs are missing"),
    (loss(scale=lambda nats, atoms, pairs, batch: pairs / batch), "the atoms are missing"),
    (loss(scale=lambda nats, atoms, pairs, batch: -nats / batch), "the sign"),
    (loss(told=lambda logits: logits.softmax(-1)), "softmax is taken twice"),
    (loss(jump=lambda x_0, t, eps, alpha_bar: x_0), "shown the clean graph itself"),
    (loss(jump=lambda x_0, t, eps, alpha_bar: x_0 + eps), "not the jump of exercise 03.2"),
    (loss(share=1), "first call was for 6 of 6 molecules"),
    (loss(read=lambda guess, half: None), "made and not read"),
    (loss(read=lambda guess, half: guess.roll(half, 0)), "second half of the batch must read zeros"),
    (loss(read=lambda guess, half: guess.sign()), "the expected one-hot"),
    (one_call, "called 1 times"),
    (with_gradients, "made with gradients"),
    (without_any, "carries no gradient|with gradients"),
    (squared, "this is a squared error"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.7: the sampler, whole
# ---------------------------------------------------------------------------------------------------------------------


def drawing(
    start=torch.randn,
    walk=reversed,
    told=lambda timesteps, k: timesteps[k],
    guess=lambda logits: helpers.expected_graph(logits),
    shown=lambda guess, logits: guess,
    mean=helpers.posterior_mean,
    long=lambda kept, before: 1 - kept / before,
    spread=lambda variance, beta: variance.sqrt(),
    last=False,
    read=helpers.vector_graph,
):
    """The right sampler with one thing changed, as an answer."""

    def answer(model, n, timesteps, alpha_bar, generator):
        kept = alpha_bar[timesteps]
        betas = long(kept, torch.cat([torch.ones(1), kept[:-1]]))
        x, now = start(n, 189, generator=generator), None
        for k in walk(range(len(timesteps))):
            logits = model(x, told(timesteps, k), now)
            x_0 = guess(logits)
            now = shown(x_0, logits)
            x = mean(x_0, x, k, betas)
            if k > 0 or last:
                variance = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
                x = x + spread(variance, betas[k]) * torch.randn(x.shape, generator=generator)
        return read(x)

    return answer


def single_steps(model, n, timesteps, alpha_bar, generator):
    """The β of single steps, although the walk takes long ones."""
    betas = helpers.cosine_betas(1000)
    x, guess = torch.randn(n, 189, generator=generator), None
    for t in reversed(timesteps):
        guess = helpers.expected_graph(model(x, t, guess))
        x = helpers.posterior_mean(guess, x, t, betas)
        if t > timesteps[0]:
            variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * betas[t]
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
    return helpers.vector_graph(x)


def as_noise(model, n, timesteps, alpha_bar, generator):
    """Takes what the network says for ε."""
    kept = alpha_bar[timesteps]
    betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
    x, guess = torch.randn(n, 189, generator=generator), None
    for k in reversed(range(len(timesteps))):
        guess = helpers.expected_graph(model(x, timesteps[k], guess))
        x_0 = (x - (1 - kept[k]).sqrt() * guess) / kept[k].sqrt()
        x = helpers.posterior_mean(x_0, x, k, betas)
        if k > 0:
            variance = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
    return helpers.vector_graph(x)


def jumps(model, n, timesteps, alpha_bar, generator):
    """Noises the guess anew instead of stepping back."""
    x, guess = torch.randn(n, 189, generator=generator), None
    for k in reversed(range(len(timesteps))):
        guess = x = helpers.expected_graph(model(x, timesteps[k], guess))
        if k > 0:
            x = helpers.q_sample(guess, timesteps[k - 1], torch.randn(n, 189, generator=generator), alpha_bar)
    return helpers.vector_graph(x)


DRAWN = [
    (drawing(walk=lambda steps: steps), "the walk begins at t = 30, the clean end"),
    (drawing(walk=lambda steps: reversed(steps[1:])), "called 6 times for 7 timesteps"),
    (drawing(told=lambda timesteps, k: torch.tensor(k)), "the number k of the step"),
    (drawing(told=lambda timesteps, k: k), "wants t as a tensor"),
    (drawing(start=lambda *shape, generator: torch.zeros(shape)), "must start from pure noise"),
    (drawing(start=lambda n, width, generator: torch.randn(width, generator=generator)), "n = 200 graphs"),
    (drawing(shown=lambda guess, logits: None), "reads its last guess"),
    (drawing(shown=lambda guess, logits: logits), "are its logits"),
    (drawing(shown=lambda guess, logits: guess.sign()), "does not read its own last guess"),
    (drawing(guess=lambda logits: logits, shown=lambda guess, logits: helpers.expected_graph(logits)), "taken for x_0"),
    (single_steps, "this is a single step back from t"),
    (as_noise, "the guess is taken for noise"),
    (jumps, "x_t is thrown away"),
    (drawing(mean=lambda x_0, x, k, betas: x_0, spread=lambda *_: 0), "the guess takes the place of x"),
    (drawing(mean=lambda x_0, x, k, betas: helpers.posterior_mean(x, x_0, k, betas)), "are exchanged"),
    (drawing(spread=lambda variance, beta: 0), "fresh noise is missing"),
    (drawing(spread=lambda variance, beta: variance), "multiply it by its root"),
    (drawing(spread=lambda variance, beta: 1), "the fresh noise has the variance 1"),
    (drawing(spread=lambda variance, beta: beta.sqrt()), "the fresh noise has the variance β"),
    (drawing(spread=lambda variance, beta: 0.5 * variance.sqrt()), "in the step from t = 999 back to t = 850"),
    (drawing(last=True), "the graphs are not those of the last guess"),
    (drawing(read=lambda x: x), "numbers came back, no graphs"),
    (drawing(read=lambda x: helpers.vector_graph(x)[0]), "return two things"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.8: the sampler that explodes
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
    (lambda *given: notebook_03_lab.draw_with_eps(*given).tolist(), "expected a tensor like x, got list"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 03.9: a layer that knows no order
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
# 03.10: a step with a share of the noise
# ---------------------------------------------------------------------------------------------------------------------


def step(shape=lambda signal, old, fresh, guess, z: signal + old.sqrt() * z[0] + fresh.sqrt() * z[1], share=None):
    """The right step with the sum put together in another way, or with another η, as an answer."""

    def answer(x_t, guess, now, later, eta, z):
        eps = (x_t - now.sqrt() * guess) / (1 - now).sqrt()
        eta = eta if share is None else share(eta)
        fresh = eta**2 * (1 - later) / (1 - now) * (1 - now / later)
        return shape(later.sqrt() * guess, 1 - later - fresh, fresh, guess, (eps, z))

    return answer


def sum_of(old, fresh):
    return step(lambda signal, a, b, guess, noises: signal + old(a, b) * noises[0] + fresh(b) * noises[1])


STEPS = [
    (sum_of(lambda a, b: a.sqrt(), lambda b: 0), "the fresh noise is missing"),
    (sum_of(lambda a, b: (a + b).sqrt(), torch.sqrt), "must make room for the fresh"),
    (sum_of(lambda a, b: (a + b).sqrt(), lambda b: 0), "the fresh noise is missing"),
    (sum_of(lambda a, b: a.sqrt(), lambda b: b), "multiplied by σ²"),
    (sum_of(lambda a, b: a, torch.sqrt), "the root at 1 - ᾱ_s - σ² is missing"),
    (step(lambda signal, a, b, guess, z: guess + a.sqrt() * z[0] + b.sqrt() * z[1]), "the guess is not shrunk"),
    (step(share=lambda eta: eta**0.5), "σ² has η squared"),
    (step(share=lambda eta: 1.0), "η is not used"),
    (lambda x, g, now, later, eta, z: notebook_03_lab.step_back(x, g, later, now, eta, z), "are exchanged"),
    (lambda x, g, now, later, eta, z: notebook_03_lab.step_back(g, x, now, later, eta, z), "expected"),
]

WRONG = {
    "03.3": FAULTS,
    "03.6": LOSSES,
    "03.7": DRAWN,
    "03.8": EXPLODING,
    "03.9": LAYERS,
    "03.10": STEPS,
}
