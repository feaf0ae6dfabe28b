"""Wrong answers to the exercises of notebook 04, each with words that answer it; `test_exercises` tries them."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler

import helpers
from molecule_diffusion.exercises import notebook_04


def scale_of(z):
    return helpers.standardise(z)[2]


def loop(change, share=1.0):
    """The right loop with another network answer or noise share, as a function for exercise 04.3."""

    def answer(predict_v, z, timesteps, alpha_bar, generator):
        for k, t in enumerate(timesteps):
            last = k == len(timesteps) - 1
            now = alpha_bar[t]
            after = torch.ones_like(now) if last else alpha_bar[timesteps[k + 1]]
            if change == "t - 1":
                after = alpha_bar[t - 1]
            if change == "-1" and last:
                after = alpha_bar[-1]
            v, alpha = predict_v(z, t), now / after
            z_0 = now.sqrt() * z - (1 - now).sqrt() * v
            if change == "epsilon":
                z_0 = (z - (1 - now).sqrt() * v) / now.sqrt()
            if change == "sample":
                z_0 = v
            z = (after.sqrt() * (1 - alpha) * z_0 + alpha.sqrt() * (1 - after) * z) / (1 - now)
            variance = (1 - alpha) * (1 if change == "large" else (1 - after) / (1 - now))
            root = variance if change == "variance" else variance.sqrt()
            if not last or change in {"t - 1", "-1"}:
                z = z + share * root * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return z

    return answer


def first_guess(predict_v, z, timesteps, alpha_bar, generator):
    now = alpha_bar[timesteps[0]]
    return now.sqrt() * z - (1 - now).sqrt() * predict_v(z, timesteps[0])


def ddpm(**changes):
    """An answer to 04.4: the right scheduler with changes."""
    return lambda: DDPMScheduler(**helpers.NOISE_SCHEDULE | {"clip_sample": False} | changes)


def swap_of(*names, **settings):
    """An answer to 04.5 that hands over only these settings."""
    return lambda kind, scheduler: kind(**{name: scheduler.config[name] for name in names} | settings)


def swap_and_change(kind, scheduler):
    scheduler.register_to_config(clip_sample=True)
    return notebook_04.swap(kind, scheduler)


def painting(change=""):
    """The right loop of 04.8 with one change, as a function."""

    def answer(step, known, keep, timesteps, alpha_bar, repeats, n, generator):
        mask = {"inverted": ~keep[:, None], "numbers": keep}.get(change, keep[:, None])
        z = torch.randn((n, *known.shape), generator=generator)
        for k, t in enumerate(timesteps):
            s = timesteps[k + 1] if k + 1 < len(timesteps) else None
            visits = 1 if s is None or change == "once" else repeats
            if change == "one more" and s is not None:
                visits = repeats + 1
            for visit in range(visits):
                if visit and change != "no way up":
                    kept = alpha_bar[t] if change == "all the way" else alpha_bar[t] / alpha_bar[s]
                    root, other = (kept, 1 - kept) if change == "up roots" else (kept.sqrt(), (1 - kept).sqrt())
                    z = root * z + other * torch.randn(z.shape, generator=generator)
                noise = torch.randn(z.shape, generator=generator)
                share = alpha_bar[t]
                noised = share.sqrt() * known + (1 - share).sqrt() * noise
                if change == "roots":
                    noised = share * known + (1 - share) * noise
                if change == "clean":
                    noised = known.expand_as(z)
                if change == "after":
                    z = torch.where(mask, noised, step(z, t, s, generator))
                else:
                    z = step(torch.where(mask, noised, z), t, s, generator)
        return z if change == "end" else torch.where(mask, known, z)

    return answer


RIGHT = notebook_04.diagnosis

WRONG = {
    "04.1": [
        (lambda z: ((z - z.mean()) / scale_of(z), z.mean(), scale_of(z)), "one mean for everything"),
        (lambda z: (z, z.mean((0, 1)), scale_of(z)), "each of the 9 tokens has its own mean"),
        (lambda z: ((z - z.mean(0)) / z.std(0), z.mean(0), z.std(0)), "one scale for every dimension"),
        (lambda z: ((z - z.mean(0)) / z.std(0).mean(), z.mean(0), z.std(0).mean()), "without information count"),
        (lambda z: ((z - z.mean(0)) / z.std(), z.mean(0), z.std()), "mixes in the differences between the means"),
        (lambda z: (z / scale_of(z), z.mean(0), scale_of(z)), "the mean is not subtracted"),
        (lambda z: (z / scale_of(z) - z.mean(0), z.mean(0), scale_of(z)), "subtract first"),
        (lambda z: helpers.standardise(z)[0], "return three things"),
    ],
    "04.2": [
        (lambda z_0, eps, t, ab: helpers.q_sample(z_0, t, eps, ab), "this is z_t"),
        (lambda z_0, eps, t, ab: notebook_04.v_target(-z_0, eps, t, ab), "v \\*subtracts"),
        (lambda z_0, eps, t, ab: -notebook_04.v_target(z_0, eps, t, ab), "this is -v"),
        (lambda z_0, eps, t, ab: notebook_04.v_target(eps, z_0, t, ab), "exchanged"),
        (lambda z_0, eps, t, ab: ab[t][:, None] * eps - (1 - ab[t][:, None]) * z_0, "both square roots"),
        (lambda z_0, eps, t, ab: ab[t].sqrt() * eps - (1 - ab[t]).sqrt() * z_0, "add axes"),
        (lambda z_0, eps, t, ab: notebook_04.v_target(z_0, eps, t, 1 - ab), "the weights are exchanged"),
        (lambda z, eps, t, ab: notebook_04.v_target(z.flatten(1), eps.flatten(1), t, ab), r"z_0 of shape \(2, 9, 8\)"),
    ],
    "04.3": [
        (loop("", share=0.0), "fresh noise is missing"),
        (loop("variance"), "take its square root"),
        (loop("large"), "the noise is too large"),
        (loop("epsilon"), "as if it were ε"),
        (loop("sample"), "as if it were z_0"),
        (loop("t - 1"), "not t - 1"),
        (loop("-1"), "After the last step ᾱ_s is 1"),
        (first_guess, "stops after the first guess"),
        (lambda predict_v, z, timesteps, alpha_bar, generator: z, "nothing changed"),
        (loop("", share=0.5), "expected"),
    ],
    "04.4": [
        (ddpm(clip_sample=True), "draws the mean 0.9.*no guess of z_0 above 1 gets through"),
        (ddpm(clip_sample=True, clip_sample_range=1.5), "no guess of z_0 above 1.5"),
        (ddpm(prediction_type="epsilon"), "prediction_type was right"),
        (ddpm(timestep_spacing="leading"), "timestep_spacing was right"),
        (ddpm(beta_schedule="linear"), "beta_schedule was right"),
        (ddpm(thresholding=True), "thresholding cuts the guesses, too"),
        (lambda: DDPMScheduler, "this is the class"),
        (lambda: helpers.sampler("DDIM"), "return a DDPMScheduler; DDIMScheduler came"),
        (lambda: None, "returns nothing yet"),
    ],
    "04.5": [
        (lambda kind, scheduler: kind.from_config(scheduler.config), "beta_start is .*nobody wrote it down"),
        (lambda kind, scheduler: kind(**helpers.NOISE_SCHEDULE), "beta_schedule is .*not every network"),
        (swap_of("beta_start", "beta_end", "beta_schedule"), "prediction_type is 'epsilon' .*hand it over as well"),
        (swap_of(*helpers.NOISE_SCHEDULE), "clip_sample has become True again in DDIMScheduler"),
        (lambda kind, scheduler: scheduler, "asked for a HeunDiscreteScheduler, a DDPMScheduler came"),
        (lambda kind, scheduler: kind, "this is the class"),
        (swap_and_change, "has been changed"),
        (lambda kind, scheduler: DDIMScheduler.from_config(scheduler.config), "asked for a HeunDiscreteScheduler"),
    ],
    "04.6": [
        (RIGHT | {"A": "diffusion", "B": "decoder"}, "A is not 'diffusion': compare the molecules"),
        (RIGHT | {"B": "nothing", "E": "diffusion"}, "B is not 'nothing': its VAE rebuilds"),
        (RIGHT | {"C": "memorised", "D": "clipping"}, "C is not 'memorised': look at the spread"),
        (RIGHT | {"D": "nothing", "E": "memorised"}, "D is not 'nothing': look at how many draws"),
        (RIGHT | {"A": "vae"}, "A is 'vae': expected one of decoder, diffusion"),
        (RIGHT | {"E": "diffusion"}, "each of the five names belongs to one letter"),
        ({"A": "decoder"}, "expected a dictionary with the keys A, B, C, D, E"),
    ],
    "04.7": [
        ({"strength": 0.1, "num_inference_steps": 50}, "most molecules come back unchanged: more noise"),
        ({"strength": 1.0, "num_inference_steps": 12}, "too little is kept: less noise"),
        ({"strength": 0.5, "num_inference_steps": 50}, "25 network calls per molecule; 12 are allowed"),
        ({"strength": 0.02, "num_inference_steps": 20}, "no step at all"),
        ({"strength": 50, "num_inference_steps": 20}, "strength=50: expected a number from 0 to 1"),
        ({"strength": 0.5, "num_inference_steps": 20.0}, "expected a whole number"),
        ({"strength": 0.5}, "expected a dictionary with the keys"),
    ],
    "04.8": [
        (painting("inverted"), "the mask is inverted"),
        (painting("numbers"), "keep.:, None"),
        (painting("clean"), "noise them to step t first"),
        (painting("roots"), "square roots are missing where the known"),
        (painting("after"), r"\*after\* the step"),
        (painting("once"), "`repeats` has no effect"),
        (painting("one more"), "repeats . 1 times"),
        (painting("no way up"), "without noising z from s up to t"),
        (painting("all the way"), "not ᾱ_t"),
        (painting("up roots"), "square roots are missing on the way up"),
        (painting("end"), "at the very end"),
        (lambda *given: torch.zeros(3, 9, 9), "expected"),
        (lambda *given: None, "returns nothing yet"),
    ],
}
