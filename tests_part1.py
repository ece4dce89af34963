"""The specification, part 1: ddpm.py, teacher.py, student.py, reward.py, in the order of the files.
Plain unittest; no network, GPU, data set or checkpoint needed. Test names are sentences. PLANTED_1
plants known mistakes into the sources, one at a time, and shows that a test notices each of them.
"""
import contextlib
import io
import itertools
import json
import math
import tempfile
import types
import unittest
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import ddpm
import reward
import student
import teacher
from harness.checkpoints import half_weights, save_checkpoint
from harness.runs import BadInput

MODULES = [ddpm, teacher, student, reward]
TINY = dict(width=16, mults=[1, 2], blocks=1, attention=[4], dropout=0.0, image_size=8)
CPU = torch.device("cpu")
ROWS = torch.arange(4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def images(n, size=8, seed=0):
    """Smooth random images in [-1, 1]: (n, 3, size, size)."""
    coarse = torch.randn(n, 3, 4, 4, generator=rng(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear").tanh()


def randomised(net, seed=0, scale=0.05):
    """Give the zero-initialised layers something to say."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=rng(seed + p.numel())))
    return net.eval()


def frozen(net):
    """The same network for every test: what it starts with depends on no other test."""
    torch.manual_seed(0)
    return randomised(net()).requires_grad_(False)


def full(n, t):
    return torch.full((n,), t)


def variant(module, source):
    """A module made from other source, in the place of `module`."""
    made = types.ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(compile(source, module.__file__, "exec"), made.__dict__)
    return made


class Case(unittest.TestCase):
    def close(self, a, b, tol=1e-5, msg=None):
        """Same shape, same dtype kind, no NaN, every difference below tol."""
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        self.assertEqual((a.shape, a.is_floating_point()), (b.shape, b.is_floating_point()), msg)
        self.assertFalse(torch.isnan(a.double()).any() or torch.isnan(b.double()).any(),
                         "NaN never passes")
        worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        self.assertLessEqual(worst, tol, msg)

    def bad_input(self, text, function, *args, **kw):
        with self.assertRaises(BadInput) as caught:
            function(*args, **kw)
        self.assertIn(text, str(caught.exception))

    def folder(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        return Path(keep.name)


def quiet(function, *args, **kw):
    """Call with the output caught; returns (result, what was printed)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        result = function(*args, **kw)
    return result, text.getvalue()


class Comparing(Case):
    def test_shapes_and_kinds_are_compared_first_and_nan_never_passes(self):
        one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
        for a, b in ((one, torch.ones(2, 1)), (one, torch.ones(2).long()), (nan, nan),
                     (one, 1.1 * one), (one, torch.tensor([1.0, math.inf]))):
            with self.assertRaises(AssertionError):
                self.close(a, b, 0.01)
        self.close(one, [1.0, 1.0], 0)


# ==============================================================================================
# ddpm.py
# ==============================================================================================

AB = ddpm.linear_alpha_bar()


class Schedule(Case):
    def test_alpha_bar_starts_at_one_and_equals_the_loop(self):
        ab = ddpm.linear_alpha_bar()
        self.assertEqual(ab.shape, (ddpm.T + 1,))
        product, expected = 1.0, [1.0]
        for i in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
            expected.append(product)
        self.close(ab, torch.tensor(expected), 1e-6)

    def test_q_sample_is_eq_4_for_every_element(self):
        x0, eps, t = images(4), randn(4, 3, 8, 8, seed=1), torch.tensor([0, 1, 500, 1000])
        out = ddpm.q_sample(x0, t, eps, AB)
        for b in range(4):
            a = AB[t[b]].item()
            self.close(out[b], math.sqrt(a) * x0[b] + math.sqrt(1 - a) * eps[b], 1e-5)

    def test_x0_and_eps_undo_v_and_explain_x_t_whatever_v(self):
        x0, eps, t = images(4), randn(4, 3, 8, 8, seed=1), torch.tensor([1, 300, 700, 1000])
        x_t, a = ddpm.q_sample(x0, t, eps, AB), AB[t].reshape(4, 1, 1, 1)
        x0_hat, eps_hat = ddpm.x0_and_eps(x_t, t, a.sqrt() * eps - (1 - a).sqrt() * x0, AB)
        self.close(x0_hat, x0, 1e-5)
        self.close(eps_hat, eps, 1e-5)
        pair = ddpm.x0_and_eps(x_t, t, 3 * randn(4, 3, 8, 8, seed=2), AB)
        self.close(ddpm.q_sample(pair[0], t, pair[1], AB), x_t, 1e-5)

    def test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network(self):
        x0, t, eps = images(2), torch.tensor([100, 900]), randn(2, 3, 8, 8, seed=2)
        w = torch.tensor(0.3, requires_grad=True)
        loss = ddpm.simple_loss(lambda x, t: w * x, x0, t, eps, AB)
        x, squares = ddpm.q_sample(x0, t, eps, AB), []
        for b in range(2):
            a = AB[t[b]].item()
            squares += [(math.sqrt(1 - a) * u + math.sqrt(a) * 0.3 * u - e) ** 2
                        for u, e in zip(x[b].flatten().tolist(), eps[b].flatten().tolist())]
        self.close(loss.detach(), np.mean(squares))
        self.assertTrue(loss.requires_grad)
        loss.backward()
        self.assertGreater(w.grad.abs().item(), 1e-3)


class Jump(Case):
    x_t, x0, x0_last = randn(4, 3, 8, 8, seed=3), images(4), images(4, seed=1)
    t, t_next = torch.tensor([1000, 800, 500, 20]), torch.tensor([700, 1, 0, 10])

    def test_sigma_is_eq_16_and_zero_on_the_jump_into_0(self):
        a, b = AB[1000].item(), AB[500].item()
        self.close(ddpm.ddim_sigma(torch.tensor([1000, 500]), torch.tensor([500, 0]), 0.5, AB),
                   [0.5 * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b), 0.0], 1e-6)

    def test_it_is_eq_12_element_by_element(self):
        for eta in (0.0, 0.7):
            mean, sigma = ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, eta=eta)
            for b in range(4):
                a, a_next = AB[self.t[b]].item(), AB[self.t_next[b]].item()
                s = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
                self.assertAlmostEqual(sigma[b].item(), s, places=5)
                for x, x0, out in zip(*(v[b].flatten().tolist()
                                        for v in (self.x_t, self.x0, mean))):
                    eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
                    self.assertAlmostEqual(
                        out, math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - s * s) * eps, 4)

    def test_eta_1_one_step_apart_is_ddpms_posterior(self):
        ab = AB.double()
        for t in (2, 10, 500, 1000):
            tt, x0, x_t = full(4, t), self.x0.double(), self.x_t.double()
            mean, sigma = ddpm.jump(x_t, x0, tt, tt - 1, ab, eta=1.0)
            a, a1 = ab[t].item(), ab[t - 1].item()
            alpha, beta = a / a1, 1 - a / a1
            posterior = (math.sqrt(a1) * beta / (1 - a) * x0
                         + math.sqrt(alpha) * (1 - a1) / (1 - a) * x_t)
            self.close(mean, posterior, 1e-9)
            self.close(sigma ** 2, full(4, (1 - a1) / (1 - a) * beta).double(), 1e-8)

    def test_no_lean_is_lean_0_to_the_bit(self):
        for eta in (0.0, 1.0):
            plain = ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, eta=eta)
            lean = ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, torch.zeros(4),
                             self.x0_last, eta)
            for a, b in zip(plain, lean):
                self.assertTrue(torch.equal(a, b))

    def test_leaning_is_jumping_to_an_estimate_moved_on_along_its_trend(self):
        lean = torch.tensor([0.5, -0.3, 1.7, 0.1])
        D = torch.stack([x + k * (x - y) for k, x, y in zip(lean.tolist(), self.x0, self.x0_last)])
        self.close(ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, lean, self.x0_last)[0],
                   ddpm.jump(self.x_t, D, self.t, self.t_next, AB)[0], 1e-5)

    def test_dpm_lean_is_h_over_2_h_last_and_0_at_the_first_jump_and_into_0(self):
        def level(t):
            return math.log(AB[t].item() / (1 - AB[t].item())) / 2
        triples = [(1000, 600, 250), (900, 899, 1), (300, 20, 19)]           # t_last, t, t_next
        expected = [(level(c) - level(b)) / (2 * (level(b) - level(a))) for a, b, c in triples]
        t_last, t, t_next = torch.tensor([*triples, (1000, 1000, 500), (1000, 1000, 0),
                                          (500, 20, 0)]).T
        self.close(ddpm.dpm_lean(t, t_next, t_last, AB), [*expected, 0.0, 0.0, 0.0], 1e-4)
        self.assertGreater(min(expected[0], expected[1]), 0.05)


# What diffusers 0.42.1 makes (x_0, to seven decimals) of x_T = -2, -1, 0, 1, 2 and an equal mixture
# of N(-0.5, 0.2^2) and N(0.6, 0.2^2), with epsilon = -sqrt(1 - ab) d/dx log p_t(x) by autograd in
# float64, betas linear from 1e-4 to 0.02. Its time i is our t = i + 1.
# DDIM: DDIMScheduler(clip_sample=False).step, eta 0, num_inference_steps = 1000 / (t - t_next).
# DPM++: DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type=
# "midpoint", lower_order_final=True, final_sigmas_type="zero").set_timesteps(timesteps=grid - 1).
DIFFUSERS = {
    ("DDIM", "uniform", 3): [-0.3504455, -0.1728609, 0.0499263, 0.2727305, 0.4503512],
    ("DDIM", "uniform", 5): [-0.5437111, -0.3576497, 0.0498459, 0.4574679, 0.6436376],
    ("DDIM", "uniform", 10): [-0.6527355, -0.5161933, 0.0496216, 0.6160800, 0.7526611],
    ("DDIM", "uniform", 20): [-0.7297801, -0.5512599, 0.0491498, 0.6511282, 0.8296771],
    ("DDIM", "uniform", 50): [-0.7905583, -0.5759436, 0.0483059, 0.6757892, 0.8904326],
    ("DDIM", "quadratic", 3): [-0.5898825, -0.4442860, 0.0497636, 0.5441428, 0.6898119],
    ("DDIM", "quadratic", 5): [-0.6811572, -0.4854362, 0.0495227, 0.5852763, 0.7810536],
    ("DDIM", "quadratic", 10): [-0.7517297, -0.5424928, 0.0491352, 0.6423373, 0.8516099],
    ("DDIM", "quadratic", 20): [-0.7931807, -0.5685183, 0.0486181, 0.6683554, 0.8930498],
    ("DDIM", "quadratic", 50): [-0.8194125, -0.5842844, 0.0479883, 0.6841161, 0.9192743],
    ("DPM++", "quadratic", 3): [-0.6012741, -0.4556811, 0.0497512, 0.5555409, 0.7012014],
    ("DPM++", "quadratic", 5): [-0.7859793, -0.5896613, 0.0493370, 0.6894836, 0.8858818],
    ("DPM++", "quadratic", 10): [-0.8485692, -0.6208035, 0.0482555, 0.7206489, 0.9484304],
    ("DPM++", "quadratic", 20): [-0.8507157, -0.6021215, 0.0473631, 0.7019464, 0.9505684],
    ("DPM++", "quadratic", 50): [-0.8401675, -0.5960945, 0.0472448, 0.6959213, 0.9400231],
    ("DPM++", "logsnr", 3): [-0.5404823, -0.3944637, 0.0497721, 0.4943404, 0.6404005],
    ("DPM++", "logsnr", 5): [-0.8216303, -0.6043429, 0.0495332, 0.7041330, 0.9215279],
    ("DPM++", "logsnr", 10): [-0.8666086, -0.6306238, 0.0487398, 0.7304475, 0.9664714],
    ("DPM++", "logsnr", 20): [-0.8473626, -0.6041342, 0.0479902, 0.7039612, 0.9472188],
    ("DPM++", "logsnr", 50): [-0.8392804, -0.5963361, 0.0474000, 0.6961636, 0.9391370],
}
PAIR = ddpm.MixtureNet(torch.tensor([[-0.5], [0.6]]), 0.2, AB)


class HandSolvers(Case):
    def test_every_grid_decreases_from_T_to_0(self):
        for name in ddpm.GRIDS:
            for steps in (1, 2, 3, 50, 999, 1000):
                grid = ddpm.make_grid(name, steps)
                self.assertEqual((len(grid), grid[0], grid[-1]), (steps + 1, ddpm.T, 0))
                self.assertTrue(all(a > b for a, b in zip(grid, grid[1:])))
        self.assertEqual(ddpm.make_grid("uniform", 3), [1000, 667, 333, 0])
        self.assertEqual(ddpm.make_grid("quadratic", 4), [1000, 562, 250, 62, 0])
        grid = ddpm.make_grid("logsnr", 8)               # equal steps in lambda, but for the last
        level = 0.5 * torch.log(AB[grid[:-1]] / (1 - AB[grid[:-1]]))
        self.close(level.diff() / level.diff()[0], torch.ones(7), 0.05)

    def test_a_grid_that_cannot_be_is_refused(self):
        for name, steps in (("uniform", 0), ("uniform", 1001), ("cubic", 4)):
            self.assertRaises(ValueError, ddpm.make_grid, name, steps)
        for grid in ([1000, 500, 600, 0], [1000, 500, 500, 0], [999, 500, 0], [1000, 500, 1]):
            with self.assertRaises(ValueError):
                ddpm.sample(PAIR, randn(2, 1), ddpm.Solver(grid, [0.0] * 3), AB)

    def test_ddim_never_leans_and_dpm_leans_between_its_first_and_its_last_jump(self):
        for steps in (1, 2, 3, 8):
            for name in ddpm.GRIDS:
                ddim, dpm = (ddpm.hand_solver(kind, name, steps) for kind in ddpm.SOLVERS)
                self.assertEqual(ddim, (ddpm.make_grid(name, steps), [0.0] * steps))
                self.assertEqual((dpm.grid, len(dpm.leans)), (ddim.grid, steps))
                for k, lean in enumerate(dpm.leans):
                    between = 0 < k < steps - 1
                    t = full(1, dpm.grid[k]), full(1, dpm.grid[k + 1]), full(1, dpm.grid[k - 1])
                    self.close(lean, ddpm.dpm_lean(*t, AB).item() if between else 0.0, 1e-6)
                    self.assertEqual(between, lean > 0)

    def test_sampling_gives_the_numbers_of_diffusers(self):
        for (kind, name, steps), expected in DIFFUSERS.items():
            x_T = torch.linspace(-2, 2, 5)[:, None]
            out = ddpm.sample(PAIR, x_T, ddpm.hand_solver(kind, name, steps), AB)
            self.close(out[:, 0], expected, 1e-5, (kind, name, steps))

    def test_dpm_is_algorithm_2_of_lu_et_al_in_its_own_recursion(self):
        ab = AB.double().tolist()
        net, x_T = ddpm.MixtureNet(PAIR.means.double(), 0.2, AB.double()), randn(6, 1).double()
        for name, steps in itertools.product(ddpm.GRIDS, (1, 2, 3, 7, 20)):
            grid, x, x0_last, h_last = ddpm.make_grid(name, steps), x_T, None, None
            for t, t_next in zip(grid, grid[1:]):
                alpha, sigma, sigma_t = (math.sqrt(ab[t_next]), math.sqrt(1 - ab[t_next]),
                                         math.sqrt(1 - ab[t]))
                lam_t = math.log(math.sqrt(ab[t]) / sigma_t)
                h = math.log(alpha / sigma) - lam_t if t_next else math.inf
                x0, D = net.x0(x, full(6, t)), net.x0(x, full(6, t))
                if h_last is not None and t_next:
                    r = h_last / h
                    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
                x = sigma / sigma_t * x - alpha * (math.exp(-h) - 1) * D
                x0_last, h_last = x0, h
            for dtype in (torch.float64, torch.float32):
                ours = ddpm.MixtureNet(net.means.to(dtype), 0.2, AB.to(dtype))
                out = ddpm.sample(ours, x_T.to(dtype), ddpm.hand_solver("DPM++", name, steps),
                                  AB.to(dtype))
                self.close(out.double(), x, 1e-5, (name, steps))


class Sampler(Case):
    mean = torch.tensor([[0.4, -0.2]])
    gaussian = ddpm.MixtureNet(mean, 0.3, AB)

    def errors(self, kind, grid, counts):
        x_T = randn(200, 2)
        exact = ddpm.gaussian_flow(x_T, self.mean, 0.3, AB)
        return [(ddpm.sample(self.gaussian, x_T, ddpm.hand_solver(kind, grid, k), AB)
                 - exact).square().mean().sqrt().item() for k in counts]

    def test_ddim_on_a_gaussian_follows_the_exact_recursion_and_converges_to_the_flow(self):
        x_T, solver = randn(200, 2), ddpm.hand_solver("DDIM", "uniform", 7)
        y = x_T.double()                        # E[x0 | x_t] and eps are linear in x_t
        for t, t_next in zip(solver.grid, solver.grid[1:]):
            a, b = AB[t].item(), AB[t_next].item()
            x0 = self.mean + a ** 0.5 * 0.09 / (a * 0.09 + 1 - a) * (y - a ** 0.5 * self.mean)
            y = b ** 0.5 * x0 + (1 - b) ** 0.5 * (y - a ** 0.5 * x0) / (1 - a) ** 0.5
        self.close(ddpm.sample(self.gaussian, x_T, solver, AB), y.float(), 1e-5)
        errors = self.errors("DDIM", "uniform", (10, 100, 1000))
        self.assertLess(errors[2], 0.01)
        self.assertTrue(errors[0] > 5 * errors[1] > 25 * errors[2], errors)

    def test_the_second_order_solver_converges_with_the_square(self):
        errors = self.errors("DPM++", "logsnr", (16, 32, 64))
        self.assertTrue(errors[0] > 3 * errors[1] > 9 * errors[2], errors)
        self.assertLess(5 * errors[1], self.errors("DDIM", "logsnr", [32])[0])

    def test_ddpm_on_a_gaussian_gives_its_mean_and_spread(self):
        solver = ddpm.hand_solver("DDIM", "uniform", 100)
        end = ddpm.sample(self.gaussian, randn(300, 2), solver, AB, 1.0, seeds=range(300))
        variance = 1.0                                  # exact recursion of the variance, same grid
        for t, t_next in zip(solver.grid, solver.grid[1:]):
            a, b = AB[t].item(), AB[t_next].item()
            sigma2 = (1 - b) / (1 - a) * (1 - a / b)
            gain = (1 - a) ** 0.5 / (a * 0.09 + 1 - a)  # d eps* / d x
            slope = (b ** 0.5 * (1 - (1 - a) ** 0.5 * gain) / a ** 0.5
                     + max(1 - b - sigma2, 0) ** 0.5 * gain)
            variance = slope ** 2 * variance + sigma2
        self.close(end.mean(0), [0.4, -0.2], 4 * 0.3 / math.sqrt(300))
        self.close(end.std(0) / math.sqrt(variance), [1.0, 1.0], 4 / math.sqrt(600))

    def test_a_seed_is_the_same_image_in_any_batch_and_stream_numbers_differ(self):
        a, b = ddpm.seeded_noise([3, 4, 5], (3, 8, 8)), ddpm.seeded_noise([5], (3, 8, 8))
        self.close(a[2], b[0], 0)
        self.assertGreater((a[0] - a[1]).abs().max(), 0.5)
        for seed in (5, 6):
            self.assertGreater((ddpm.seeded_noise([seed], (3, 8, 8))
                                - ddpm.seeded_noise([5], (3, 8, 8), stream=1)).abs().max(), 0.5)

    def test_samples_do_not_depend_on_the_batch_even_with_noise(self):
        x_T, solver = ddpm.seeded_noise(range(4), (2,)), ddpm.hand_solver("DDIM", "uniform", 20)
        together = ddpm.sample(self.gaussian, x_T, solver, AB, 1.0, seeds=range(4))
        alone = [ddpm.sample(self.gaussian, x_T[i:i + 1], solver, AB, 1.0, seeds=[i])
                 for i in range(4)]
        self.close(together, torch.cat(alone), 1e-5)
        other = ddpm.sample(self.gaussian, x_T, solver, AB, 1.0, seeds=range(4, 8))
        self.assertGreater((together - other).abs().max(), 0.1)

    def test_nothing_adds_noise_at_the_last_jump_and_the_first_has_no_trend_to_follow(self):
        x_T, plain = randn(2, 2), ddpm.Solver([1000, 0], [0.0])
        one, two = (ddpm.sample(self.gaussian, x_T, plain, AB, 1.0, seeds=s)
                    for s in ([1, 2], [3, 4]))
        self.close(one, two, 0)
        self.close(ddpm.sample(self.gaussian, x_T, ddpm.Solver([1000, 0], [5.0]), AB), one, 1e-6)

    def test_an_estimate_of_an_image_is_kept_in_range_and_its_epsilon_explains_x_t(self):
        x_t, t, v = (3 * randn(3, 3, 8, 8, seed=s) if s else torch.tensor([1, 400, 1000])
                     for s in (1, 0, 2))
        free = AB[t].sqrt()[:, None, None, None] * x_t - (
            1 - AB[t]).sqrt()[:, None, None, None] * v
        for net, expected in ((self.gaussian, free), (ddpm.UNet(**TINY), free.clamp(-1, 1))):
            self.close(ddpm.estimate(net, x_t, t, v, AB), expected, 1e-5)
        clipped, t_next = free.clamp(-1, 1), torch.tensor([0, 399, 20])
        a, b = (AB[s].reshape(3, 1, 1, 1) for s in (t, t_next))
        eps = (x_t - a.sqrt() * clipped) / (1 - a).sqrt()
        self.close(ddpm.jump(x_t, clipped, t, t_next, AB)[0],
                   b.sqrt() * clipped + (1 - b).sqrt() * eps, 1e-3)

    def test_only_the_states_asked_for_are_kept(self):
        class Watch:
            clip, refs, most = False, [], 0

            def __call__(self, x, t, t_next):
                self.refs = [r for r in self.refs if r() is not None] + [weakref.ref(x)]
                self.most = max(self.most, len(self.refs))
                return 0.1 * x
        solver, x_T = ddpm.hand_solver("DDIM", "uniform", 1000), randn(2, 2)
        net = Watch()
        kept = ddpm.sample(net, x_T, solver, AB, keep=[0, 500, 1000])
        self.assertEqual(len(kept), 3)
        self.assertLess(net.most, 8)
        self.close(kept[0], x_T, 0)
        self.close(kept[2], ddpm.sample(net, x_T, solver, AB), 0)
        end = ddpm.sample(net, x_T, ddpm.Solver(solver.grid, solver.leans), AB, keep=range(1001))
        self.close(end[500], kept[1], 0)


class Network(Case):
    def test_the_papers_shape_has_35_7_million_parameters(self):
        with torch.device("meta"):
            self.assertEqual(ddpm.parameter_count(ddpm.UNet(**ddpm.PAPER_UNET)), 35_746_307)

    def test_a_time_is_its_sines_and_cosines(self):
        out = ddpm.time_embedding(torch.tensor([3, 1000]), 8)
        for b, t in enumerate((3, 1000)):
            angles = [t / 10000 ** (i / 4) for i in range(4)]
            self.close(out[b], [*map(math.sin, angles), *map(math.cos, angles)], 1e-4)

    def test_an_untrained_network_predicts_v_0_and_so_is_right_at_the_highest_noise(self):
        x, t = randn(2, 3, 8, 8), torch.tensor([1000, 300])
        v = ddpm.UNet(**TINY)(x, t).detach()
        self.close(v, torch.zeros(2, 3, 8, 8), 0)
        self.close(ddpm.x0_and_eps(x, t, v, AB)[1][0], x[0], 1e-3)

    def test_absurd_sizes_are_refused(self):
        for name, value in (("width", 10 ** 9), ("blocks", -1), ("mults", [1] * 9),
                            ("image_size", 0.5)):
            self.assertRaises(ValueError, ddpm.UNet, **{**TINY, name: value})

    def test_a_batch_is_the_same_as_one_by_one(self):
        net, x = frozen(lambda: ddpm.UNet(**TINY)), randn(5, 3, 8, 8)
        t = torch.tensor([1, 100, 500, 900, 1000])
        self.close(net(x, t), torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(5)]), 1e-5)

    def test_every_time_gives_another_output_and_every_parameter_a_gradient(self):
        for kind in (ddpm.UNet, student.JumpUNet):
            net = randomised(kind(**TINY))
            times = [(499, 0), (500, 0), (501, 0), (501, 1)][:4 if kind is student.JumpUNet else 3]
            t, t_next = torch.tensor(times).T
            out = net(images(1).expand(len(t), 3, 8, 8), t, t_next).detach()
            for a, b in itertools.combinations(out, 2):
                self.assertGreater((a - b).abs().max(), 1e-5)
            net(randn(2, 3, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 400])
                ).square().sum().backward()
            for name, p in net.named_parameters():
                self.assertIsNotNone(p.grad, name)
                self.assertGreater(p.grad.abs().max().item(), 1e-6, name)

    def test_attention_is_softmax_of_qk_over_sqrt_c_times_v(self):
        block, x = randomised(ddpm.Attention(16)), randn(2, 16, 4, 4)
        h = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, 1e-6)
        expected = torch.empty_like(x)
        for b in range(2):
            tokens = h[b].reshape(16, 16).T
            q, k, v = (tokens @ block.qkv.weight.T + block.qkv.bias).split(16, 1)
            mixed = torch.softmax(q @ k.T / math.sqrt(16), 1) @ v
            expected[b] = x[b] + (mixed @ block.out.weight.T + block.out.bias).T.reshape(16, 4, 4)
        self.close(block(x).detach(), expected.detach(), 1e-5)

    def test_upsampling_repeats_every_pixel_and_convolves(self):
        layer, x = ddpm.Upsample(4, 6, 3, padding=1), randn(2, 4, 3, 5)
        doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        self.close(layer(x).detach(), F.conv2d(doubled, layer.weight, layer.bias, padding=1), 1e-5)


class KnownAnswers(Case):
    def test_the_optimal_prediction_for_a_mixture_agrees_with_a_brute_force_average(self):
        means, x, t = torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), torch.tensor([[0.3, -0.1]]), 300
        n, net = 200_000, ddpm.MixtureNet(torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), 0.2, AB)
        x0 = means[torch.randint(2, (n,), generator=rng(1))] + 0.2 * randn(n, 2, seed=2)
        a = AB[t]
        weight = torch.softmax(-((x - a.sqrt() * x0) ** 2).sum(1) / (2 * (1 - a)), 0)[:, None]
        eps = (weight * (x - a.sqrt() * x0) / (1 - a).sqrt()).sum(0)
        self.close(net.x0(x, full(1, t))[0], (weight * x0).sum(0), 0.01)
        v = net(x, full(1, t), full(1, 0))
        self.close(v[0], a.sqrt() * eps - (1 - a).sqrt() * (weight * x0).sum(0), 0.01)

    def test_the_flow_of_a_gaussian_keeps_quantiles(self):
        z = torch.tensor([[-2.0], [0.0], [1.5]])          # so many standard deviations away
        spread = math.sqrt(AB[1000].item() * 0.09 + 1 - AB[1000].item())
        x_T = AB[1000].sqrt() * 0.4 + spread * z
        self.close(ddpm.gaussian_flow(x_T, torch.tensor([[0.4]]), 0.3, AB), 0.4 + 0.3 * z, 1e-5)

    def test_energy_distance_agrees_with_loops_and_tells_shifted_samples(self):
        x, y = randn(12, 2, seed=1), randn(9, 2, seed=2)
        far = [[np.mean([(a - b).norm().item() for a in p for b in q if a is not b]) for q in (x, y)]
               for p in ([*x], [*y])]
        far[0][0] *= 12 / 11                               # `a is not b` holds for views of a tensor
        far[1][1] *= 9 / 8
        self.assertAlmostEqual(ddpm.energy_distance(x, y), 2 * far[0][1] - far[0][0] - far[1][1],
                               places=5)
        x, y = randn(500, 2, seed=1), randn(500, 2, seed=2)
        self.assertLess(abs(ddpm.energy_distance(x, y)), 0.02)
        self.assertGreater(ddpm.energy_distance(x, y + 1), 0.3)


# ==============================================================================================
# teacher.py
# ==============================================================================================

def train_args(**more):
    return types.SimpleNamespace(**{**dict(seed=0, lr=2e-3, updates=60, batch_size=16, resume=False,
                                           smoke=True, out=None), **more})


class TeacherTraining(Case):
    def test_a_batch_holds_images_of_the_set_half_of_them_mirrored(self):
        data = torch.randint(0, 256, (4, 3, 5, 5), generator=rng(), dtype=torch.uint8)
        x, which = teacher.draw_batch(data, 2000, rng()), []
        for image in x:
            found = [(i, m) for i in range(4) for m in (0, 1) if torch.equal(
                image, (data[i].flip(-1) if m else data[i]).float() / 127.5 - 1)]
            self.assertEqual(len(found), 1)
            which += found
        for i, m in itertools.product(range(4), (0, 1)):
            self.assertAlmostEqual(which.count((i, m)) / 2000, 1 / 8, delta=0.04)

    def test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn(self):
        t = teacher.draw_times(200_000, rng())
        self.assertEqual((t.min().item(), t.max().item()), (1, ddpm.T))
        self.close(torch.bincount(t, minlength=1001)[1:].reshape(10, 100).sum(1) / 200_000,
                   torch.full((10,), 0.1), 0.005)

    def test_ema_averages_parameters_with_a_shorter_memory_at_first(self):
        for update, decay in ((10 ** 6, 0.9), (0, 0.1), (10, 11 / 20)):
            net, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            expected = [decay * b.detach() + (1 - decay) * a.detach()
                        for a, b in zip(net.parameters(), ema.parameters())]
            teacher.ema_update(ema, net, update, 0.9)
            for p, e in zip(ema.parameters(), expected):
                self.close(p.detach(), e, 1e-6)

    def test_the_learning_rate_warms_up_and_ends_at_0(self):
        rates = [teacher.learning_rate(i, 1000, 1e-3) for i in range(1000)]
        self.assertAlmostEqual(rates[0], 1e-3 / teacher.WARMUP, delta=1e-7)
        self.assertLess(rates[-1], 1e-8)
        self.assertEqual(rates.index(max(rates)), teacher.WARMUP - 1)
        self.assertTrue(all(a > b for a, b in zip(rates[teacher.WARMUP - 1:],
                                                  rates[teacher.WARMUP:])))

    def test_the_target_is_50_quadratic_ddim_steps_of_each_noise_alone(self):
        net, z = frozen(lambda: ddpm.UNet(**TINY)), ddpm.seeded_noise(range(3), (3, 8, 8))
        fifty = ddpm.sample(net, z, ddpm.Solver(ddpm.make_grid("quadratic", 50), [0.0] * 50), AB)
        self.close(teacher.targets(net, z, AB), fifty, 0)
        with mock.patch.object(teacher, "chunk_size", lambda device: 2):
            self.close(teacher.targets(net, z, AB), fifty, 1e-4)
        self.assertLessEqual(fifty.abs().max().item(), 1)

    def test_a_picture_leaves_the_random_numbers_of_training_alone(self):
        before, path = torch.get_rng_state(), self.folder() / "s.png"
        teacher.save_samples(path, frozen(lambda: ddpm.UNet(**TINY)), CPU, n=2)
        torch.manual_seed(0)
        net = randomised(ddpm.UNet(**TINY))
        before = torch.get_rng_state()
        teacher.save_samples(path, net, CPU, n=2)
        self.assertTrue(torch.equal(before, torch.get_rng_state()))
        self.assertTrue(path.exists())

    def test_algorithm_1_lowers_the_loss_on_one_image_and_its_average_comes_back(self):
        torch.manual_seed(0)
        net, out = ddpm.UNet(**TINY), self.folder()
        ema = frozen(lambda: ddpm.UNet(**TINY))
        data = ((images(1) + 1) * 127.5).byte()
        with mock.patch.object(teacher, "LOG_EVERY", 10):
            quiet(teacher.train, net, ema, data, train_args(), out, CPU)
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        self.assertEqual(len(losses), 6)
        self.assertLess(losses[-1], 0.6 * losses[0])
        again, content = teacher.load_teacher(out / "teacher.pt")
        self.assertFalse(again.training or any(p.requires_grad for p in again.parameters()))
        self.assertEqual(content["provenance"]["images"], 60 * 16)
        for p, q in zip(again.parameters(), ema.parameters()):
            self.close(p, q, 1e-3)
        self.assertGreater(max((p - q).abs().max().item() for p, q in
                               zip(net.parameters(), ema.parameters())), 1e-2)


# ==============================================================================================
# student.py
# ==============================================================================================

class Jumps(Case):
    @classmethod
    def setUpClass(cls):
        cls.teacher = frozen(lambda: ddpm.UNet(**TINY))
        cls.z = ddpm.seeded_noise(range(4), (3, 8, 8))
        cls.paths = student.teacher_paths(cls.teacher, cls.z, AB)

    def by_heart(self):
        """A student that knows the teacher's paths: its jumps land on them, whatever t_next."""
        class Cheat(student.JumpUNet):
            def forward(net, x, t, t_next):
                return student.secant_velocity(
                    x, student.state_at(self.paths, ROWS, t_next, AB), t, t_next, AB)
        return Cheat(**TINY)

    def test_a_jump_with_the_secant_velocity_lands_where_it_should(self):
        x, y = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
        t, t_next = torch.tensor([1000, 900, 500, 20]), torch.tensor([0, 100, 490, 0])
        v = student.secant_velocity(x, y, t, t_next, AB)
        x0_hat, _ = ddpm.x0_and_eps(x, t, v, AB)
        self.close(ddpm.jump(x, x0_hat, t, t_next, AB)[0], y, 1e-3)
        d = (student.angle(t, AB, x) - student.angle(t_next, AB, x)).double()
        self.close(d.cos() * x - d.sin() * v, y.double(), 1e-4)
        self.close(student.angle(t, AB, x)[:, 0, 0, 0].cos(), AB[t].sqrt(), 1e-5)

    def test_a_copy_of_the_teacher_is_the_teacher(self):
        copied = student.student_from_teacher(self.teacher)
        t = torch.tensor([1000, 700, 40, 1])
        for t_next in (full(4, 0), t - 1):
            self.close(copied(self.z, t, t_next).detach(), self.teacher(self.z, t), 1e-6)
        with mock.patch.object(self.teacher, "clip", False, create=True):     # one estimate for both
            for name, steps in (("quadratic", 5), ("uniform", 3)):
                solver = ddpm.hand_solver("DDIM", name, steps)
                self.close(ddpm.sample(copied, self.z, solver, AB),
                           ddpm.sample(self.teacher, self.z, solver, AB), 1e-5)
        copied(self.z, t, t - 1).square().sum().backward()
        self.assertGreater(copied.jump_mlp[-1].weight.grad.abs().max(), 1e-6)     # it can learn

    def test_the_path_starts_at_the_noise_and_ends_at_the_target(self):
        self.assertEqual(self.paths.shape, (4, 51, 3, 8, 8))
        self.close(self.paths[:, 0], self.z, 0)
        self.close(self.paths[:, -1], teacher.targets(self.teacher, self.z, AB), 0)

    def test_states_on_any_grid_are_the_paths_own_and_between_them_ddims(self):
        for target in (teacher.TARGET, ddpm.hand_solver("DDIM", "uniform", 50)):
            with mock.patch.object(student, "TARGET", target):
                paths = student.teacher_paths(self.teacher, self.z, AB)
                for k in (0, 1, 25, 49, 50):
                    self.close(student.state_at(paths, ROWS, full(4, target.grid[k]), AB),
                               paths[:, k], 1e-5)
                k = torch.tensor([0, 5, 25, 30])              # another jump for each image
                t = torch.tensor(target.grid)[k]
                t_mid = torch.tensor([990, t[1] - 3, t[2] - 2, t[3] - 6])
                x = paths[ROWS, k]
                x0_hat = ddpm.estimate(self.teacher, x, t, self.teacher(x, t), AB)
                self.close(student.state_at(paths, ROWS, t_mid, AB),
                           ddpm.jump(x, x0_hat, t, t_mid, AB)[0], 2e-4)
                self.close(student.state_at(paths, ROWS.flip(0), t_mid.flip(0), AB),
                           student.state_at(paths, ROWS, t_mid, AB).flip(0), 0)

    def test_drawn_jumps_go_down_far_enough_and_reach_both_ends(self):
        t, t_next = student.draw_jumps(20_000, rng())
        self.assertTrue((t - t_next >= student.SHORTEST_JUMP).all())
        self.assertTrue((t_next >= 0).all() and (t <= ddpm.T).all())
        self.assertAlmostEqual((t == ddpm.T).float().mean().item(), student.START_SHARE, delta=0.02)
        self.assertAlmostEqual((t_next == 0).float().mean().item(), student.LAND_SHARE, delta=0.05)
        self.assertEqual(set(range(10, 1001)) - set(t.tolist()), set())
        self.assertEqual((t - t_next).min().item(), student.SHORTEST_JUMP)

    def test_cloning_aims_at_the_landing_point_in_v_space_and_reaches_the_network(self):
        t, t_next = torch.tensor([1000, 1000, 700, 333]), torch.tensor([0, 400, 13, 0])
        loss = student.clone_loss(self.by_heart(), self.paths, ROWS, t, t_next, AB)
        self.assertLess(loss.item(), 1e-8)
        zero = student.JumpUNet(**TINY)                        # conv_out is zero: predicts v = 0
        x, y = (student.state_at(self.paths, ROWS, s, AB) for s in (t, t_next))
        phi = torch.acos(AB[t].double().sqrt()) - torch.acos(AB[t_next].double().sqrt())
        d = phi.reshape(4, 1, 1, 1)
        landing = ((d.cos() * x - y) ** 2 / d.sin() ** 2).mean()
        loss = student.clone_loss(zero, self.paths, ROWS, t, t_next, AB)
        self.close(loss.detach(), landing, 1e-4 * landing.item())
        self.assertTrue(loss.requires_grad)
        loss.backward()
        self.assertGreater(zero.conv_out.bias.grad.abs().max(), 1e-4)

    def test_a_student_that_knows_the_paths_by_heart_lands_on_them_in_any_number_of_jumps(self):
        for name, steps in (("quadratic", 4), ("uniform", 1), ("uniform", 7)):
            solver = ddpm.hand_solver("DDIM", name, steps)
            self.close(ddpm.sample(self.by_heart(), self.z, solver, AB), self.paths[:, -1], 1e-4)
        errors = student.landing_errors(self.by_heart(), self.paths, AB)
        self.assertLess(max(errors.values()), 1e-8)
        zero = student.landing_errors(student.JumpUNet(**TINY), self.paths, AB, [(500, 250)])
        x, y = (student.state_at(self.paths, ROWS, full(4, s), AB) for s in (500, 250))
        d = math.acos(AB[500].sqrt().item()) - math.acos(AB[250].sqrt().item())
        self.close(zero["500->250"], ((math.cos(d) * x - y) ** 2).mean(), 1e-5)

    def test_the_pool_keeps_the_newest_paths(self):
        pool = student.PathPool(self.teacher, 8, AB, CPU)
        self.assertEqual((pool.chunk, pool.size), (2, 8))
        pool.grow(3)
        self.assertEqual(pool.made, 4)
        self.assertEqual(set(pool.draw(50, rng()).tolist()), {0, 1, 2, 3})
        first = pool.paths.clone()
        pool.grow(10)
        start = ddpm.seeded_noise(student.CLONE_SEEDS + torch.tensor([8, 9, *range(2, 8)]),
                                  (3, 8, 8))
        self.close(pool.paths[:, 0], start, 0)
        self.close(pool.paths[2:4], first[2:4], 0)
        self.assertEqual(set(pool.draw(200, rng()).tolist()), set(range(8)))

    def test_the_pool_comes_back_from_the_number_made_alone_to_the_same_bits(self):
        pool, again = (student.PathPool(self.teacher, 8, AB, CPU) for _ in range(2))
        pool.grow(10)
        self.assertEqual(pool.state_dict(), dict(made=10))
        again.load_state_dict(pool.state_dict())
        self.assertTrue(torch.equal(pool.paths, again.paths))
        for p in (pool, again):
            p.grow(12)
        self.assertTrue(torch.equal(pool.paths, again.paths))

    def test_cloning_lowers_its_loss_and_never_sees_held_out_noise(self):
        torch.manual_seed(0)
        net, out, ema = student.JumpUNet(**TINY), self.folder(), student.JumpUNet(**TINY)
        args = train_args(lr=4e-3, updates=50, batch_size=32)
        with mock.patch.object(student, "LOG_EVERY", 10), mock.patch.object(
                student, "seeded_noise", wraps=student.seeded_noise) as spy:
            (_, made), _ = quiet(student.clone, net, ema, self.teacher, args, out, CPU)
            trained = {s for call in spy.call_args_list for s in call.args[0]}
            spy.reset_mock()
            rows, landing, pictures = student.evaluate(ema, self.teacher, 5, AB, CPU)
            judged = [s for call in spy.call_args_list for s in call.args[0]]
        self.assertEqual((len(trained), made), (24, 24))           # update 49 has used 49 * 32 jumps
        self.assertEqual(sorted(judged), list(range(student.HELD_OUT, student.HELD_OUT + 5)))
        self.assertTrue(student.CLONE_SEEDS <= min(trained) and max(trained) < student.HELD_OUT)
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        self.assertLess(losses[-1], 0.8 * losses[0])
        again, _ = student.load_student(out / "student.pt")
        self.assertFalse(again.training or any(p.requires_grad for p in again.parameters()))
        for p, q in zip(again.parameters(), ema.parameters()):
            self.close(p, q.detach(), 1e-3)

        z = ddpm.seeded_noise(judged, (3, 8, 8))                   # the table, by hand
        target = teacher.targets(self.teacher, z, AB)
        self.assertEqual([row["steps"] for row in rows], [1, 2, 4, 8])
        for name, model in (("student", ema), ("teacher", self.teacher)):
            for grid, times in (("uniform", [1000, 500, 0]), ("quadratic", [1000, 250, 0])):
                x = ddpm.sample(model, z, ddpm.Solver(times, [0.0, 0.0]), AB).clamp(-1, 1)
                self.close(rows[1][f"{name} {grid}"], (x - target).square().mean(), 1e-5)
        self.assertEqual(len(landing), 4)
        self.close(pictures[:5], target, 0)


# ==============================================================================================
# reward.py
# ==============================================================================================

class Rewards(Case):
    @classmethod
    def setUpClass(cls):
        keep = tempfile.TemporaryDirectory()
        cls.addClassCleanup(keep.cleanup)
        net, path = frozen(reward.Coach).requires_grad_(True), Path(keep.name, "coach.pt")
        save_checkpoint(path, "coach", config=dict(classes=10), weights=half_weights(net),
                        scales=reward.term_scales(net, images(8, 32)))
        cls.path = path

    def setUp(self):
        self.coach, content = reward.load_encoder(self.path, "coach")
        self.scales = content["scales"]

    def view(self, x):
        return reward.look(self.coach, x)

    def test_the_teachers_own_image_gets_the_best_value_and_others_stay_in_range(self):
        x, y = images(6), images(6, seed=1)
        for name, term in reward.TERMS.items():
            best = torch.full((6,), float(term.best))
            self.close(term.function(self.view(x), self.view(x)), best, 1e-5, name)
            other = term.function(self.view(y), self.view(x))
            self.assertTrue((other < term.best).all() and (other >= term.worst).all(), name)

    def test_no_reward_depends_on_the_batch_it_is_computed_in(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            alone = torch.cat([term.function(self.view(x[i:i + 1]), self.view(y[i:i + 1]))
                               for i in range(5)])
            self.close(term.function(self.view(x), self.view(y)), alone, 1e-5, name)

    def test_the_registry_says_rightly_where_gradients_reach_the_pixels(self):
        self.assertFalse(any(p.requires_grad for p in self.coach.parameters()))
        self.assertFalse(self.coach.training)
        for name, term in reward.TERMS.items():
            x = images(2).requires_grad_(True)
            value, _ = reward.Reward(name, self.coach, self.scales)(x, images(2, seed=1))
            self.assertEqual((value.requires_grad, name != "histogram"),
                             (term.differentiable, term.differentiable), name)
            if term.differentiable:
                value.sum().backward()
                self.assertGreater(x.grad.abs().max().item(), 1e-6, name)
        for spec, through in (("feature+mse", True), ("mse+histogram", False)):
            made = reward.Reward(spec, self.coach, self.scales)
            self.assertEqual(made.differentiable, through)

    def test_feature_and_perceptual_agree_with_loops(self):
        (maps, features, _), (maps2, features2, _) = self.coach(images(2)), self.coach(
            images(2, seed=1))
        a, b = self.view(images(2)), self.view(images(2, seed=1))
        for i in range(2):
            f, g = features[i], features2[i]
            self.close(reward.feature_reward(a, b)[i], f @ g / (f.norm() * g.norm()), 1e-5)
            layers = []
            for m, n in zip(maps, maps2):
                places = [(m[i, :, r, c], n[i, :, r, c]) for r in range(m.shape[2])
                          for c in range(m.shape[3])]
                layers.append(np.mean([((p / p.norm() - q / q.norm()) ** 2).sum().item()
                                       for p, q in places]))
            self.close(reward.perceptual_reward(a, b)[i], -np.mean(layers), 1e-5)

    def test_mse_and_histogram_agree_with_loops(self):
        x, y = images(2), images(2, seed=1)
        self.close(reward.mse_reward(self.view(x), self.view(y)),
                   -torch.stack([((a - b) ** 2).mean() for a, b in zip(x, y)]))
        for b in range(2):
            kl = 0.0
            for c in range(3):
                p, q = (np.histogram(s[b, c].numpy(), bins=reward.BINS, range=(-1, 1))[0] + 1.0
                        for s in (y, x))
                p, q = p / p.sum(), q / q.sum()
                kl += (p * np.log(p / q)).sum() / 3
            self.close(reward.histogram_reward(self.view(x), self.view(y))[b], -kl, 1e-4)

    def test_weights_and_scales_enter_as_written(self):
        x, y = images(3), images(3, seed=1)
        total, raw = reward.Reward("feature:2+mse", self.coach, self.scales)(x, y)
        expected = (2 * (raw["feature"] - 1) / self.scales["feature"]
                    + raw["mse"] / self.scales["mse"])
        self.close(total, expected, 1e-4)
        self.assertEqual(list(raw), ["feature", "mse"])
        self.close(raw["mse"], reward.mse_reward(self.view(x), self.view(y)), 0)
        self.close(reward.Reward("mse", self.coach, self.scales)(x, x)[0], torch.zeros(3), 1e-6)

    def test_what_is_no_reward_is_refused(self):
        self.assertEqual(reward.parse_reward("feature:2 + mse"), dict(feature=2.0, mse=1.0))
        for text, spec in (("unknown reward 'clip'", "clip"), ("named twice", "mse:1+mse:2"),
                           ("must be a number", "mse:much"), ("positive and finite", "mse:-1"),
                           ("positive and finite", "mse:nan")):
            self.bad_input(text, reward.parse_reward, spec)

    def test_more_distortion_means_less_reward(self):
        x = images(16, size=32)
        for kind, name in itertools.product(reward.DISTORTIONS, reward.TERMS):
            made = reward.Reward(name, self.coach, self.scales)
            values = [made(reward.distort(x, kind, level, rng()), x)[0].mean().item()
                      for level in (0, 0.25, 0.5, 1)]
            self.assertAlmostEqual(values[0], 0, delta=1e-4)
            self.assertTrue(all(a > b for a, b in zip(values, values[1:])), (kind, name, values))

    def test_distortions_are_what_they_are_called(self):
        x, dot = images(3, size=32), torch.zeros(1, 3, 33, 33)
        self.close(reward.distort(x, "shift", 0.5, rng())[..., 4:], x[..., :-4], 0)
        self.close(reward.distort(x, "wrong", 0.25, rng())[1], 0.75 * x[1] + 0.25 * x[0], 1e-6)
        noise = reward.distort(torch.zeros(4, 3, 32, 32), "noise", 0.5, rng())
        self.assertAlmostEqual(noise.std().item(), 0.25, delta=0.01)
        dot[..., 16, 16] = 1
        blurred = reward.distort(dot, "blur", 0.5, rng())[0, 0].double()
        offset = torch.arange(33).double() - 16
        bell = torch.exp(-offset ** 2 / 2) / math.sqrt(2 * math.pi)           # std: 1 pixel
        self.close(blurred, bell[:, None] * bell[None, :], 1e-4)

    def test_a_scale_is_the_std_over_all_distortions_and_the_figure_divides_by_it(self):
        x, generator, values = images(4, size=32), rng(), []
        for kind, level in itertools.product(reward.DISTORTIONS, (0.25, 0.5, 0.75, 1.0)):
            y = reward.distort(x, kind, level, generator)
            values += [-((a - b) ** 2).mean().item() for a, b in zip(x, y)]
        scales = reward.term_scales(self.coach, x)
        self.close(scales["mse"], np.std(values, ddof=1), 1e-5)
        table = reward.plot_rewards(x, self.coach, scales, self.folder() / "rewards.png")
        mse = (x - x.lerp(x.roll(1, 0), 0.5)).square().mean()
        self.close(table["wrong mse"][4], -mse / scales["mse"], 1e-4)
        self.close([row[0] for row in table.values()], torch.zeros(16), 1e-3)


class Metrics(Case):
    def test_frechet_distance_of_known_gaussians(self):
        m1, m2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        c1, c2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
        self.assertAlmostEqual(reward.frechet_distance(m1, c1, m2, c2),
                               4 + (1 - 3) ** 2 + (2 - 1) ** 2, places=6)

    def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product(self):
        a, b = randn(200, 5, seed=1).double(), 0.5 * randn(300, 5, seed=2).double() + 1
        (m1, c1), (m2, c2) = reward.moments(a), reward.moments(b)
        cross = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
        expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross
        self.assertAlmostEqual(reward.frechet_distance(m1, c1, m2, c2), expected.item(), places=6)
        self.close(c1, torch.from_numpy(np.cov(a.numpy().T)), 1e-9)

    def test_frechet_distance_stands_a_rank_deficient_covariance(self):
        m, c = reward.moments(randn(5, 20))
        self.assertAlmostEqual(reward.frechet_distance(m, c, m, c), 0, places=5)
        self.assertAlmostEqual(reward.frechet_distance(m, c, m + 1, c), 20, places=4)

    def test_precision_and_recall_agree_with_loops(self):
        real, fake, k = randn(30, 2, seed=1), randn(25, 2, seed=2) + 0.7, 3

        def far(a, b):
            return [[(p - q).norm().item() for q in b] for p in a]
        r_real, r_fake = ([sorted(row)[k] for row in far(x, x)] for x in (real, fake))
        distance = far(fake, real)
        inside_real = [[d <= r for d, r in zip(row, r_real)] for row in distance]
        expected = dict(precision=np.mean([any(row) for row in inside_real]),
                        density=np.sum(inside_real) / (k * 25),
                        recall=np.mean([any(distance[j][i] <= r_fake[j] for j in range(25))
                                        for i in range(30)]),
                        coverage=np.mean([min(row[i] for row in distance) <= r_real[i]
                                          for i in range(30)]))
        got = reward.precision_recall(real, fake, k)
        self.assertEqual(set(got), set(expected))
        for name, value in got.items():
            self.assertAlmostEqual(value, expected[name], places=5, msg=name)

    def test_precision_takes_any_ball_not_the_nearest_neighbours(self):
        tight = torch.tensor([[0.0, 0], [0.01, 0], [0, 0.01]])
        wide = torch.tensor([[3.0, 0], [6, 0], [3, 3.0]])
        fake = torch.cat([torch.tensor([[0.5, 0.0]]),
                          torch.full((3, 2), 99.0) + torch.arange(3)[:, None]])
        self.assertEqual(reward.precision_recall(torch.cat([tight, wide]), fake, k=1)["precision"],
                         0.25)

    def test_a_verdict_is_made_of_its_parts(self):
        judge, data = frozen(reward.Judge), (images(40, 32) * 127.5 + 127.5).byte()
        fakes, real = images(20, 32, seed=1), judge(data.float() / 127.5 - 1)[1]
        with mock.patch.object(reward, "REFERENCE", 30):
            file = reward.judge_reference(judge, data)
        self.close(file["mean"], real.double().mean(0), 1e-5)
        self.close(file["covariance"], torch.from_numpy(np.cov(real.double().numpy().T)), 1e-5)
        picked = (torch.cdist(file["features"].float(), real) < 1e-2).long()
        self.assertEqual((picked.sum(1).tolist(), picked.sum().item()), ([1] * 30, 30))
        self.assertLessEqual(picked.sum(0).max().item(), 1)
        features = judge(fakes)[1]
        self.close(reward.encode(judge, fakes, batch=7), features, 1e-5)
        mean, cov = features.double().mean(0), torch.from_numpy(np.cov(features.double().numpy().T))
        expected = dict(frechet=reward.frechet_distance(mean, cov, file["mean"],
                                                        file["covariance"]),
                        **reward.precision_recall(file["features"].float(), features, 5))
        got = reward.judged(fakes, judge, file)
        self.assertEqual(set(got), set(expected))
        for name, value in got.items():
            self.assertAlmostEqual(value, expected[name], places=4, msg=name)


class Encoders(Case):
    def test_the_crop_shifts_images_and_nothing_else(self):
        x, seen = images(50, size=16), set()
        y = reward.random_crop(x, rng())
        self.assertEqual(y.shape, x.shape)
        for i in range(50):
            padded = F.pad(x[i:i + 1], [4] * 4, mode="reflect")[0]
            found = [(a, b) for a in range(9) for b in range(9)
                     if torch.equal(y[i], padded[:, a:a + 16, b:b + 16])]
            self.assertEqual(len(found), 1)
            seen |= {*found}
        for side in zip(*seen):
            self.assertEqual(set(side), set(range(9)))

    def test_drawing_keeps_image_and_label_together_and_mirrors_half_of_them(self):
        ramp = torch.arange(16)[None, :] * 2 + torch.arange(7)[:, None] * 30     # (7, 16)
        data = ramp[:, None, None, :].expand(7, 3, 16, 16).byte()
        x, y = reward.draw_labelled(data, torch.arange(7), 500, rng())
        levels = (x + 1) * 127.5
        self.assertEqual((levels.mean((1, 2, 3)) // 30).long().tolist(), y.tolist())
        self.assertEqual(set(y.tolist()), set(range(7)))
        falling = (x[:, 0, 0, 12] < x[:, 0, 0, 4]).float().mean().item()
        self.assertAlmostEqual(falling, 0.5, delta=0.07)
        self.close(x[:, :, 0], x[:, :, -1], 0)                 # never turned: rows stay rows

    def test_training_learns_two_colours_and_accuracy_counts(self):
        labels = torch.arange(64) % 2
        data = (labels * 150 + 40)[:, None, None, None].expand(64, 3, 8, 8).byte()
        for role in reward.ENCODERS:
            args = train_args(epochs=4, batch_size=16)
            (net, _), _ = quiet(reward.train_encoder, role, data, labels, args, self.folder(), CPU)
            self.assertEqual(reward.accuracy(net, data, labels, batch=10), 1, role)
            wrong = torch.cat([1 - labels[:16], labels[16:]])
            self.assertEqual(reward.accuracy(net, data, wrong, batch=10), 0.75)
            self.assertFalse(net.training or any(p.requires_grad for p in net.parameters()))


# ==============================================================================================
# PLANTED MISTAKES
# ==============================================================================================

PLANTED_1 = [  # (module, what the source says, the mistake, the test that notices)
    (ddpm, "return ab.sqrt() * x0 + (1 - ab).sqrt() * eps",
     "return ab.sqrt() * x0 - (1 - ab).sqrt() * eps",
     "Schedule.test_q_sample_is_eq_4_for_every_element"),
    (ddpm,
     "alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])",
     "alpha_bar = torch.cumprod(1 - torch.cat([beta, beta[-1:]]), 0)",
     "Schedule.test_alpha_bar_starts_at_one_and_equals_the_loop"),
    (ddpm, "(1 - ab).sqrt() * x_t + ab.sqrt() * v", "(1 - ab).sqrt() * x_t - ab.sqrt() * v",
     "Schedule.test_x0_and_eps_undo_v_and_explain_x_t_whatever_v"),
    (ddpm, "return F.mse_loss(eps_hat, eps)", "return F.mse_loss(eps_hat, eps, reduction='sum')",
     "Schedule.test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network"),
    (ddpm, "return F.mse_loss(eps_hat, eps)", "return F.mse_loss(eps_hat.detach(), eps)",
     "Schedule.test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network"),
    (ddpm, "sqrt() * (1 - ab / ab_next).sqrt()", "sqrt() * (1 - ab).sqrt()",
     "Jump.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, "- spread(sigma, x_t) ** 2)", ")", "Jump.test_it_is_eq_12_element_by_element"),
    (ddpm, "* (x0_hat - x0_last)\n    ab", "* (x0_last - x0_hat)\n    ab",
     "HandSolvers.test_sampling_gives_the_numbers_of_diffusers"),
    (ddpm, "eps = (x_t - ab.sqrt() * D)", "eps = (x_t - ab.sqrt() * x0_hat)",
     "HandSolvers.test_dpm_is_algorithm_2_of_lu_et_al_in_its_own_recursion"),
    (ddpm, "(t_last > t) & (t_next > 0)", "t_last > t",
     "Jump.test_dpm_lean_is_h_over_2_h_last_and_0_at_the_first_jump_and_into_0"),
    (ddpm, "lean if k > 1 else 0.0", "lean",
     "Sampler.test_nothing_adds_noise_at_the_last_jump_and_the_first_has_no_trend_to_follow"),
    (ddpm, "x0_last = x0_hat\n", "x0_last = x\n",
     "HandSolvers.test_sampling_gives_the_numbers_of_diffusers"),
    (ddpm, "int(s) * 1009 + stream", "int(s) + stream",
     "Sampler.test_a_seed_is_the_same_image_in_any_batch_and_stream_numbers_differ"),
    (ddpm, "if keep is not None and k in keep:", "if True:",
     "Sampler.test_only_the_states_asked_for_are_kept"),
    (ddpm, "x0_hat.clamp(-1, 1) if net.clip", "x0_hat.clamp(-1, 1) if not net.clip",
     "Sampler.test_an_estimate_of_an_image_is_kept_in_range_and_its_epsilon_explains_x_t"),
    (teacher, "mirror[:, None, None, None], x.flip(-1)", "mirror[:, None, None, None], x.flip(-2)",
     "TeacherTraining.test_a_batch_holds_images_of_the_set_half_of_them_mirrored"),
    (teacher, "torch.randint(1, T + 1,", "torch.randint(1, T,",
     "TeacherTraining.test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn"),
    (teacher, "p_ema.lerp_(p, 1 - decay)", "p_ema.lerp_(p, decay)",
     "TeacherTraining.test_ema_averages_parameters_with_a_shorter_memory_at_first"),
    (teacher, 'hand_solver("DDIM", "quadratic", 50)', 'hand_solver("DDIM", "uniform", 50)',
     "TeacherTraining.test_the_target_is_50_quadratic_ddim_steps_of_each_noise_alone"),
    (student, "return (d.cos() * x_t - x_next) / d.sin()",
     "return (x_next - d.cos() * x_t) / d.sin()",
     "Jumps.test_a_jump_with_the_secant_velocity_lands_where_it_should"),
    (student, "    zeroed(student.jump_mlp[-1])\n", "",
     "Jumps.test_a_copy_of_the_teacher_is_the_teacher"),
    (student, ">= t[:, None]).sum(1) - 1)", "> t[:, None]).sum(1))",
     "Jumps.test_states_on_any_grid_are_the_paths_own_and_between_them_ddims"),
    (student, "u[0] < START_SHARE, T,", "u[0] < START_SHARE, T - 1,",
     "Jumps.test_drawn_jumps_go_down_far_enough_and_reach_both_ends"),
    (student, "seeds = range(CLONE_SEEDS + self.made, CLONE_SEEDS + self.made + self.chunk)",
     "seeds = range(CLONE_SEEDS, CLONE_SEEDS + self.chunk)",
     "Jumps.test_the_pool_keeps_the_newest_paths"),
    (student, "range(HELD_OUT, HELD_OUT + n)", "range(CLONE_SEEDS, CLONE_SEEDS + n)",
     "Jumps.test_cloning_lowers_its_loss_and_never_sees_held_out_noise"),
    (reward, "maps, features, _ = encoder(images)\n", "maps, features, _ = torch.no_grad()(encoder)"
     "(images)\n", "Rewards.test_the_registry_says_rightly_where_gradients_reach_the_pixels"),
    (reward, "- F.normalize(b, dim=1)).square()", "- F.normalize(b, dim=0)).square()",
     "Rewards.test_no_reward_depends_on_the_batch_it_is_computed_in"),
    (reward, "square().sum(1).mean((1, 2))", "square().mean((1, 2, 3))",
     "Rewards.test_feature_and_perceptual_agree_with_loops"),
    (reward, "return -(p * (p / q).log()).sum(2).mean(1)",
     "return -(q * (q / p).log()).sum(2).mean(1)",
     "Rewards.test_mse_and_histogram_agree_with_loops"),
    (reward, "return -(seen.images", "return (seen.images",
     "Rewards.test_more_distortion_means_less_reward"),
    (reward, "- 2 * cross).item()", "- cross).item()",
     "Metrics.test_frechet_distance_of_known_gaussians"),
    (reward, "in_real.any(0)", "in_real[distance.argmin(0), torch.arange(len(fake))]",
     "Metrics.test_precision_takes_any_ball_not_the_nearest_neighbours"),
    (reward, "kthvalue(k + 1, dim=1).values  # k + 1", "kthvalue(k, dim=1).values  # k + 1",
     "Metrics.test_precision_and_recall_agree_with_loops"),
    (reward, "x.flip(-1), x), labels[index]", "x.flip(-1), x), labels[index.flip(0)]",
     "Encoders.test_drawing_keeps_image_and_label_together_and_mirrors_half_of_them"),
]
PLANTED = PLANTED_1                                     # + PLANTED_2


class PlantedMistakes(Case):
    def test_every_planted_mistake_is_noticed_by_a_failed_assertion(self):
        for module, right, wrong, test in PLANTED:
            with self.subTest(test=test, wrong=wrong):
                source = Path(module.__file__).read_text(encoding="utf-8")
                self.assertEqual(source.count(right), 1,
                                 f"'{right}' must stand once in {module.__name__}.py")
                result = self.run_with(variant(module, source.replace(right, wrong)), module, test)
                self.assertEqual(result.errors, [], "a crash does not count as noticed")
                self.assertNotEqual(result.failures, [], "the mistake went unnoticed")

    def run_with(self, broken, module, test):
        """Run one test with functions, classes and constants of `module` from the broken one."""
        swaps = [(m, name, old) for name, old in vars(module).items()
                 if name.isupper() or getattr(old, "__module__", None) == module.__name__
                 for m in MODULES if getattr(m, name, None) is old]
        try:
            for m, name, _ in swaps:
                setattr(m, name, getattr(broken, name))
            case, method = test.split(".")
            result = unittest.TestResult()
            unittest.TestSuite([globals()[case](method)]).run(result)    # with its setUpClass
            self.assertEqual(result.testsRun, 1)
            return result
        finally:
            for m, name, old in swaps:
                setattr(m, name, old)


if __name__ == "__main__":
    unittest.main()
