"""The specification, part 1: ddpm.py, teacher.py, student.py, reward.py, in the order of the files.
Plain unittest; no network, GPU, data set or checkpoint needed. Test names are sentences. PLANTED_1
plants known mistakes into the sources, one at a time, and shows that a test notices each of them.
"""
import contextlib
import functools
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
AB = ddpm.linear_alpha_bar()


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


@functools.cache
def frozen(kind, **config):
    """One network of a kind for all tests, the same in any order of the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(kind(**(config or TINY))).requires_grad_(False)


def full(n, t):
    return torch.full((n,), t)


def ab4(t):
    """alpha_bar of each image: (B,) -> (B, 1, 1, 1)."""
    return AB[t].reshape(-1, 1, 1, 1)


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
    def test_comparing_looks_at_shapes_and_kinds_first_and_never_passes_nan(self):
        one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
        self.close(one, [1.0, 1.0], 0)
        for a, b in ((one, one[:, None]), (one, one.long()), (nan, nan), (one, 1.1 * one)):
            self.assertRaises(AssertionError, self.close, a, b, 0.01)


# ==== ddpm.py =================================================================================

class Schedule(Case):
    def test_alpha_bar_starts_at_one_and_equals_the_loop(self):
        product, expected = 1.0, [1.0]
        for i in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
            expected.append(product)
        self.close(ddpm.linear_alpha_bar(), expected, 1e-6)

    def test_q_sample_is_eq_4_for_every_image(self):
        x0, eps, t = images(4), randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 1000])
        for b, out in enumerate(ddpm.q_sample(x0, t, eps, AB)):
            a = AB[t[b]].item()
            self.close(out, math.sqrt(a) * x0[b] + math.sqrt(1 - a) * eps[b], 1e-5)

    def test_x0_and_eps_undo_v_and_explain_x_t_whatever_v(self):
        x0, eps, t = images(4), randn(4, 3, 8, 8), torch.tensor([1, 300, 700, 1000])
        x_t, a = ddpm.q_sample(x0, t, eps, AB), ab4(t)
        pair = ddpm.x0_and_eps(x_t, t, a.sqrt() * eps - (1 - a).sqrt() * x0, AB)
        self.close(torch.stack(pair), torch.stack([x0, eps]), 1e-5)
        x0_hat, eps_hat = ddpm.x0_and_eps(x_t, t, 3 * randn(4, 3, 8, 8, seed=2), AB)
        self.close(a.sqrt() * x0_hat + (1 - a).sqrt() * eps_hat, x_t, 1e-5)

    def test_simple_loss_is_a_mean_and_reaches_the_network(self):
        x0, t, eps = images(2), torch.tensor([100, 900]), randn(2, 3, 8, 8)
        w = torch.tensor(0.3, requires_grad=True)
        loss = ddpm.simple_loss(lambda x, t: w * x, x0, t, eps, AB)
        x = ddpm.q_sample(x0, t, eps, AB)
        squares = [(math.sqrt(1 - a) * u + math.sqrt(a) * 0.3 * u - e) ** 2
                   for b, a in enumerate(AB[t].tolist())
                   for u, e in zip(x[b].flatten().tolist(), eps[b].flatten().tolist())]
        self.close(loss.detach(), np.mean(squares))
        self.assertTrue(loss.requires_grad)
        loss.backward()
        self.assertGreater(w.grad.abs().item(), 1e-3)


class Jump(Case):
    x_t, x0, x0_last = randn(4, 3, 8, 8, seed=3), images(4), images(4, seed=1)
    t, t_next = torch.tensor([1000, 800, 500, 20]), torch.tensor([700, 1, 0, 10])

    def test_it_is_eq_12_with_the_sigma_of_eq_16_element_by_element(self):
        for eta in (0.0, 0.7):
            mean, sigma = ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, eta=eta)
            for b in range(4):
                a, a_next = AB[self.t[b]].item(), AB[self.t_next[b]].item()
                s = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
                self.close(sigma[b], s, 1e-6)
                expected = [math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - s * s)
                            * (x - math.sqrt(a) * x0) / math.sqrt(1 - a) for x, x0 in
                            zip(self.x_t[b].flatten().tolist(), self.x0[b].flatten().tolist())]
                self.close(mean[b].flatten(), expected, 1e-5)
        self.assertEqual(sigma[2], 0)                                      # into t = 0

    def test_eta_1_one_step_apart_is_ddpms_posterior(self):
        ab, x0, x_t = AB.double(), self.x0.double(), self.x_t.double()
        for t in (2, 10, 500, 1000):
            mean, sigma = ddpm.jump(x_t, x0, full(4, t), full(4, t - 1), ab, eta=1.0)
            a, a1 = ab[t].item(), ab[t - 1].item()
            alpha, beta = a / a1, 1 - a / a1
            self.close(mean, math.sqrt(a1) * beta / (1 - a) * x0
                       + math.sqrt(alpha) * (1 - a1) / (1 - a) * x_t, 1e-9)
            self.close(sigma ** 2, full(4, (1 - a1) / (1 - a) * beta).double(), 1e-8)

    def test_no_lean_is_lean_0_to_the_bit(self):
        for eta in (0.0, 1.0):
            args = self.x_t, self.x0, self.t, self.t_next, AB
            plain, lean = ddpm.jump(*args, eta=eta), ddpm.jump(*args, 0 * AB[:4], self.x0_last, eta)
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(plain, lean)))

    def test_leaning_moves_the_estimate_on_along_its_trend(self):
        lean = torch.tensor([0.5, -0.3, 1.7, 0.1])
        D = torch.stack([x + k * (x - y) for k, x, y in zip(lean.tolist(), self.x0, self.x0_last)])
        self.close(ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, lean, self.x0_last)[0],
                   ddpm.jump(self.x_t, D, self.t, self.t_next, AB)[0], 1e-5)

    def test_dpm_lean_is_h_over_2_h_last_but_0_at_both_ends(self):
        last, now, then = (1000, 900, 300), (600, 500, 200), (250, 1, 190)
        a, b, c = ([math.log(AB[t].item() / (1 - AB[t].item())) / 2 for t in s]
                   for s in (last, now, then))
        expected = [(c[i] - b[i]) / (2 * (b[i] - a[i])) for i in range(3)]
        t_last, t, t_next = (torch.tensor(s) for s in (
            (*last, 1000, 1000, 500), (*now, 1000, 1000, 20), (*then, 500, 0, 0)))
        self.close(ddpm.dpm_lean(t, t_next, t_last, AB), [*expected, 0, 0, 0], 1e-3)


# What diffusers 0.42.1 makes (in millionths, after 3, 5, 10, 20, 50 evaluations) of x_T = -2, -1, 0,
# 1, 2 if the data are half N(-0.5, 0.2^2) and half N(0.6, 0.2^2): betas linear from 1e-4 to 0.02,
# epsilon = -sqrt(1 - ab) d/dx log p_t(x) by autograd in float64; its time i is our t = i + 1. DDIM:
# DDIMScheduler(clip_sample=False).step, eta 0, with num_inference_steps = 1000 / (t - t_next). DPM++:
# DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
# lower_order_final=True, final_sigmas_type="zero").set_timesteps(timesteps=[t - 1, ..]).
DIFFUSERS = {
    ("DDIM", "uniform"): {
        3: [-350446, -172861, 49926, 272730, 450351], 5: [-543711, -357650, 49846, 457468, 643638],
        10: [-652736, -516193, 49622, 616080, 752661], 20: [-729780, -551260, 49150, 651128, 829677],
        50: [-790558, -575944, 48306, 675789, 890433]},
    ("DDIM", "quadratic"): {
        3: [-589882, -444286, 49764, 544143, 689812], 5: [-681157, -485436, 49523, 585276, 781054],
        10: [-751730, -542493, 49135, 642337, 851610], 20: [-793181, -568518, 48618, 668355, 893050],
        50: [-819412, -584284, 47988, 684116, 919274]},
    ("DPM++", "quadratic"): {
        3: [-601274, -455681, 49751, 555541, 701201], 5: [-785979, -589661, 49337, 689484, 885882],
        10: [-848569, -620804, 48256, 720649, 948430], 20: [-850716, -602122, 47363, 701946, 950568],
        50: [-840168, -596094, 47245, 695921, 940023]},
    ("DPM++", "logsnr"): {
        3: [-540482, -394464, 49772, 494340, 640400], 5: [-821630, -604343, 49533, 704133, 921528],
        10: [-866609, -630624, 48740, 730448, 966471], 20: [-847363, -604134, 47990, 703961, 947219],
        50: [-839280, -596336, 47400, 696164, 939137]},
}
PAIR = ddpm.MixtureNet(torch.tensor([[-0.5], [0.6]]), 0.2, AB)


class HandSolvers(Case):
    def test_every_grid_decreases_from_T_to_0(self):
        for name, steps in itertools.product(ddpm.GRIDS, (1, 2, 3, 50, 999, 1000)):
            grid = ddpm.make_grid(name, steps)
            self.assertEqual((len(grid), grid[0], grid[-1]), (steps + 1, ddpm.T, 0))
            self.assertTrue(all(a > b for a, b in zip(grid, grid[1:])))
        self.assertEqual(ddpm.make_grid("uniform", 3), [1000, 667, 333, 0])
        self.assertEqual(ddpm.make_grid("quadratic", 4), [1000, 562, 250, 62, 0])
        level = torch.logit(AB[ddpm.make_grid("logsnr", 8)[:-1]])          # equal steps in lambda
        self.close(level.diff() / level.diff()[0], torch.ones(7), 0.05)

    def test_a_grid_that_cannot_be_is_refused(self):
        for name, steps in (("uniform", 0), ("uniform", 1001), ("cubic", 4)):
            self.assertRaises(ValueError, ddpm.make_grid, name, steps)
        for grid in ([1000, 500, 600, 0], [1000, 500, 500, 0], [999, 500, 0], [1000, 500, 1]):
            solver = ddpm.Solver(grid, [0.0] * (len(grid) - 1))
            self.assertRaises(ValueError, ddpm.sample, PAIR, randn(2, 1), solver, AB)

    def test_ddim_never_leans_and_dpm_does_between_its_first_and_last_jump(self):
        for steps, name in itertools.product((1, 2, 3, 8), ddpm.GRIDS):
            ddim, dpm = (ddpm.hand_solver(kind, name, steps) for kind in ddpm.SOLVERS)
            self.assertEqual(ddim, (ddpm.make_grid(name, steps), [0.0] * steps))
            self.assertEqual(dpm.grid, ddim.grid)
            self.assertEqual([lean > 0 for lean in dpm.leans],
                             [0 < k < steps - 1 for k in range(steps)])

    def test_sampling_gives_the_numbers_of_diffusers(self):
        for (kind, name), table in DIFFUSERS.items():
            for steps, millionths in table.items():
                x_0 = ddpm.sample(PAIR, torch.linspace(-2, 2, 5)[:, None],
                                  ddpm.hand_solver(kind, name, steps), AB)
                self.close(x_0[:, 0], np.array(millionths) / 1e6, 1e-5, (kind, name, steps))

    def test_dpm_is_algorithm_2_of_lu_et_al(self):
        ab, x_T = AB.double().tolist(), randn(6, 1).double()
        net = ddpm.MixtureNet(PAIR.means.double(), 0.2, AB.double())
        for name, steps in itertools.product(ddpm.GRIDS, (1, 2, 3, 7, 20)):
            grid, x, x0_last, h_last = ddpm.make_grid(name, steps), x_T, None, None
            for t, t_next in zip(grid, grid[1:]):
                sigma, sigma_next = math.sqrt(1 - ab[t]), math.sqrt(1 - ab[t_next])
                h = (math.log(math.sqrt(ab[t_next]) / sigma_next)
                     - math.log(math.sqrt(ab[t]) / sigma)) if t_next else math.inf
                D = x0 = net.x0(x, full(6, t))
                if h_last and t_next:
                    r = h_last / h
                    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
                x = sigma_next / sigma * x - math.sqrt(ab[t_next]) * math.expm1(-h) * D
                x0_last, h_last = x0, h
            out = ddpm.sample(PAIR, x_T.float(), ddpm.hand_solver("DPM++", name, steps), AB)
            self.close(out, x, 1e-5, (name, steps))


class Sampler(Case):
    mean = torch.tensor([[0.4, -0.2]])
    gaussian = ddpm.MixtureNet(mean, 0.3, AB)

    def test_solvers_of_a_gaussian_follow_their_recursion_and_converge_to_the_flow(self):
        x_T, grid = randn(200, 2), ddpm.make_grid("uniform", 7)
        y, exact = x_T.double(), ddpm.gaussian_flow(x_T, self.mean, 0.3, AB)
        for t, t_next in zip(grid, grid[1:]):                   # E[x0 | x_t] is linear in x_t
            a, b = AB[t].item(), AB[t_next].item()
            x0 = self.mean + a ** 0.5 * 0.09 / (a * 0.09 + 1 - a) * (y - a ** 0.5 * self.mean)
            y = b ** 0.5 * x0 + (1 - b) ** 0.5 * (y - a ** 0.5 * x0) / (1 - a) ** 0.5
        self.close(ddpm.sample(self.gaussian, x_T, ddpm.Solver(grid, [0.0] * 7), AB), y, 1e-5)
        for kind, name, counts, rate in (("DDIM", "uniform", (10, 100, 1000), 5),
                                         ("DPM++", "logsnr", (16, 32, 64), 3)):
            e = [(ddpm.sample(self.gaussian, x_T, ddpm.hand_solver(kind, name, k), AB)
                  - exact).square().mean().sqrt().item() for k in counts]
            self.assertLess(e[2], 0.01)
            self.assertTrue(e[0] > rate * e[1] > rate ** 2 * e[2], e)

    def test_ddpm_on_a_gaussian_gives_its_mean_and_spread(self):
        solver, variance = ddpm.hand_solver("DDIM", "uniform", 100), 1.0
        end = ddpm.sample(self.gaussian, randn(300, 2), solver, AB, 1.0, seeds=range(300))
        for t, t_next in zip(solver.grid, solver.grid[1:]):     # exact recursion of the variance
            a, b = AB[t].item(), AB[t_next].item()
            sigma2 = (1 - b) / (1 - a) * (1 - a / b)
            gain = (1 - a) ** 0.5 / (a * 0.09 + 1 - a)          # d eps* / d x
            slope = (b ** 0.5 * (1 - (1 - a) ** 0.5 * gain) / a ** 0.5
                     + max(1 - b - sigma2, 0) ** 0.5 * gain)
            variance = slope ** 2 * variance + sigma2
        self.close(end.mean(0), self.mean[0], 4 * 0.3 / math.sqrt(300))
        self.close(end.std(0) / math.sqrt(variance), torch.ones(2), 4 / math.sqrt(600))

    def test_a_seed_is_the_same_image_in_any_batch_and_streams_differ(self):
        a, b = ddpm.seeded_noise([3, 4, 5], (3, 8, 8)), ddpm.seeded_noise([5], (3, 8, 8))
        self.close(a[2], b[0], 0)
        others = [a[0], *(ddpm.seeded_noise([seed], (3, 8, 8), stream=1)[0] for seed in (4, 5))]
        for noise in others:
            self.assertGreater((noise - b[0]).abs().max(), 0.5)

    def test_samples_depend_on_their_seed_and_not_on_the_batch(self):
        x_T, solver = ddpm.seeded_noise(range(4), (2,)), ddpm.hand_solver("DDIM", "uniform", 20)
        one, other = (ddpm.sample(self.gaussian, x_T, solver, AB, 1.0, seeds=range(s, s + 4))
                      for s in (0, 4))
        alone = [ddpm.sample(self.gaussian, x_T[i:i + 1], solver, AB, 1.0, seeds=[i])
                 for i in range(4)]
        self.close(one, torch.cat(alone), 1e-5)
        self.assertGreater((one - other).abs().max(), 0.1)

    def test_the_last_jump_adds_no_noise_and_the_first_does_not_lean(self):
        x_T = randn(2, 2)
        ends = [ddpm.sample(self.gaussian, x_T, ddpm.Solver([1000, 0], [lean]), AB, eta, seeds)
                for lean, eta, seeds in ((0.0, 0.0, None), (0.0, 1.0, [3, 4]), (5.0, 0.0, None))]
        self.close(ends[1], ends[0], 0)
        self.close(ends[2], ends[0], 0)

    def test_an_estimate_of_an_image_is_kept_in_range(self):
        x, t, v = 3 * randn(3, 3, 8, 8), torch.tensor([1, 400, 1000]), randn(3, 3, 8, 8, seed=1)
        free = ab4(t).sqrt() * x - (1 - ab4(t)).sqrt() * v
        for kind, expected in ((student.JumpUNet, free), (ddpm.UNet, free.clamp(-1, 1))):
            self.close(ddpm.estimate(kind(**TINY), x, t, v, AB), expected, 1e-5)

    def test_only_the_states_asked_for_are_kept(self):
        refs, alive = [], []

        def net(x, t, t_next):
            refs.append(weakref.ref(x))
            alive.append(sum(r() is not None for r in refs) if t[0] < 20 else 0)
            return 0.1 * x
        net.clip = False
        x_T, solver = randn(2, 2), ddpm.hand_solver("DDIM", "uniform", 1000)
        kept = ddpm.sample(net, x_T, solver, AB, keep=[0, 500, 1000])
        self.assertEqual(len(kept), 3)
        self.assertLess(max(alive), 8)
        self.close(torch.stack([kept[0], kept[2]]),
                   torch.stack([x_T, ddpm.sample(net, x_T, solver, AB)]), 0)
        self.close(ddpm.sample(net, x_T, solver, AB, keep=range(1001))[500], kept[1], 0)


class Network(Case):
    def test_the_papers_has_35_7_million_parameters_and_absurd_sizes_are_refused(self):
        with torch.device("meta"):
            self.assertEqual(ddpm.parameter_count(ddpm.UNet(**ddpm.PAPER_UNET)), 35_746_307)
        for absurd in (dict(width=10 ** 9), dict(blocks=-1), dict(mults=[1] * 9)):
            self.assertRaises(ValueError, ddpm.UNet, **{**TINY, **absurd})

    def test_a_time_is_its_sines_and_cosines(self):
        for t, out in zip((3, 1000), ddpm.time_embedding(torch.tensor([3, 1000]), 8)):
            angles = [t / 10000 ** (i / 4) for i in range(4)]
            self.close(out, [*map(math.sin, angles), *map(math.cos, angles)], 1e-4)

    def test_an_untrained_network_is_right_at_the_highest_noise(self):
        x, t = randn(2, 3, 8, 8), full(2, 1000)
        v = ddpm.UNet(**TINY)(x, t).detach()
        self.close(ddpm.x0_and_eps(x, t, v, AB)[1], x, 1e-3)

    def test_a_batch_is_the_same_as_one_by_one(self):
        net, x, t = frozen(ddpm.UNet), randn(3, 3, 8, 8), torch.tensor([1, 500, 1000])
        self.close(net(x, t), torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(3)]), 1e-5)

    def test_every_time_is_seen_and_every_parameter_gets_a_gradient(self):
        for kind, times in ((ddpm.UNet, [(499, 0), (500, 0), (501, 0)]),
                            (student.JumpUNet, [(499, 0), (500, 0), (500, 1), (501, 1)])):
            net, (t, t_next) = randomised(kind(**TINY)), torch.tensor(times).T
            out = net(images(1).expand(len(t), 3, 8, 8), t, t_next)
            for a, b in itertools.combinations(out.detach(), 2):
                self.assertGreater((a - b).abs().max(), 1e-5)
            out.square().sum().backward()
            for name, p in net.named_parameters():
                self.assertIsNotNone(p.grad, name)
                self.assertGreater(p.grad.abs().max().item(), 1e-6, name)

    def test_attention_is_softmax_of_qk_over_sqrt_c_times_v(self):
        block, x = frozen(ddpm.Attention, channels=16), randn(2, 16, 4, 4)
        h = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, 1e-6)
        for b, out in enumerate(block(x)):
            q, k, v = (h[b].flatten(1).T @ block.qkv.weight.T + block.qkv.bias).split(16, 1)
            mixed = torch.softmax(q @ k.T / math.sqrt(16), 1) @ v
            added = (mixed @ block.out.weight.T + block.out.bias).T.reshape(16, 4, 4)
            self.close(out, x[b] + added, 1e-5)

    def test_upsampling_repeats_every_pixel_and_convolves(self):
        layer, x = ddpm.Upsample(4, 6, 3, padding=1), randn(2, 4, 3, 5)
        doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        self.close(layer(x).detach(), F.conv2d(doubled, layer.weight, layer.bias, padding=1), 1e-5)

    def test_the_optimal_prediction_for_a_mixture_is_a_brute_force_average(self):
        means, x, t = torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), torch.tensor([[0.3, -0.1]]), 300
        x0 = means[torch.randint(2, (200_000,), generator=rng(1))] + 0.2 * randn(200_000, 2, seed=2)
        a, net = AB[t], ddpm.MixtureNet(means, 0.2, AB)
        weight = torch.softmax(-((x - a.sqrt() * x0) ** 2).sum(1) / (2 * (1 - a)), 0)[:, None]
        eps = (weight * (x - a.sqrt() * x0) / (1 - a).sqrt()).sum(0)
        x0 = (weight * x0).sum(0)
        self.close(net.x0(x, full(1, t))[0], x0, 0.01)
        self.close(net(x, full(1, t))[0], a.sqrt() * eps - (1 - a).sqrt() * x0, 0.01)

    def test_energy_distance_tells_shifted_samples_from_equal_ones(self):
        x, y = randn(500, 2, seed=1), randn(500, 2, seed=2)
        self.assertLess(abs(ddpm.energy_distance(x, y)), 0.02)
        self.assertGreater(ddpm.energy_distance(x, y + 1), 0.3)


# ==== teacher.py ==============================================================================

def train_args(**more):
    return types.SimpleNamespace(seed=0, lr=4e-3, resume=False, smoke=True, out=None, **more)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


class TeacherTraining(Case):
    def test_a_batch_holds_images_of_the_set_half_of_them_mirrored(self):
        data, seen = torch.randint(0, 256, (4, 3, 5, 5), generator=rng()).byte(), []
        for image in teacher.draw_batch(data, 1000, rng()):
            found = [(i, m) for i in range(4) for m in (0, 1) if torch.equal(
                image, (data[i].flip(-1) if m else data[i]).float() / 127.5 - 1)]
            self.assertEqual(len(found), 1)
            seen += found
        for which in itertools.product(range(4), (0, 1)):
            self.assertAlmostEqual(seen.count(which) / 1000, 1 / 8, delta=0.04)

    def test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn(self):
        t = teacher.draw_times(100_000, rng())
        self.assertEqual((t.min().item(), t.max().item()), (1, ddpm.T))
        self.close(torch.bincount(t)[1:].reshape(10, 100).sum(1) / 1e5, full(10, 0.1), 0.005)

    def test_ema_averages_parameters_with_a_shorter_memory_at_first(self):
        for update, decay in ((10 ** 6, 0.9), (0, 0.1), (10, 11 / 20)):
            net, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            expected = decay * ema.weight.detach() + (1 - decay) * net.weight.detach()
            teacher.ema_update(ema, net, update, 0.9)
            self.close(ema.weight.detach(), expected, 1e-6)

    def test_the_learning_rate_warms_up_and_falls_to_0(self):
        rates = [teacher.learning_rate(i, 1000, 1e-3) for i in range(1000)]
        self.assertAlmostEqual(rates[0], 1e-3 / teacher.WARMUP, delta=1e-7)
        self.assertLess(rates[-1], 1e-8)
        self.assertEqual(rates.index(max(rates)), teacher.WARMUP - 1)

    def test_the_target_is_50_quadratic_ddim_steps_in_any_batch(self):
        net, z = frozen(ddpm.UNet), ddpm.seeded_noise(range(3), (3, 8, 8))
        fifty = ddpm.sample(net, z, ddpm.Solver(ddpm.make_grid("quadratic", 50), [0.0] * 50), AB)
        with mock.patch.object(teacher, "chunk_size", lambda device: 2):
            self.close(teacher.targets(net, z, AB), fifty, 1e-4)
        self.assertLessEqual(fifty.abs().max().item(), 1)

    def test_a_picture_leaves_the_random_numbers_of_training_alone(self):
        before, path, few = torch.get_rng_state(), self.folder() / "s.png", ddpm.hand_solver
        with mock.patch.object(teacher, "TARGET", few("DDIM", "uniform", 2)):
            teacher.save_samples(path, frozen(ddpm.UNet), CPU, n=2)
        self.assertTrue(torch.equal(before, torch.get_rng_state()) and path.exists())

    def test_algorithm_1_lowers_the_loss_on_one_image_and_its_average_comes_back(self):
        data, out, args = (images(1) + 1) * 127.5, self.folder(), train_args(updates=40, batch_size=16)
        torch.manual_seed(0)
        net, ema = ddpm.UNet(**TINY), ddpm.UNet(**TINY)
        with mock.patch.multiple(teacher, LOG_EVERY=8, WARMUP=4,
                                 TARGET=ddpm.hand_solver("DDIM", "uniform", 2)):
            quiet(teacher.train, net, ema, data.byte(), args, out, CPU)
        self.assertEqual(len(losses(out)), 5)
        self.assertLess(losses(out)[-1], 0.6 * losses(out)[0])
        again, content = teacher.load_teacher(out / "teacher.pt")
        self.assertFalse(again.training or any(p.requires_grad for p in again.parameters()))
        self.assertEqual(content["provenance"]["images"], 40 * 16)
        for p, q in zip(again.parameters(), ema.parameters()):
            self.close(p, q.detach(), 1e-3)
        self.assertGreater((net.conv_in.weight - ema.conv_in.weight).abs().max().item(), 1e-3)


# ==== student.py ==============================================================================

class Jumps(Case):
    @classmethod
    def setUpClass(cls):
        cls.teacher, cls.z = frozen(ddpm.UNet), ddpm.seeded_noise(range(4), (3, 8, 8))
        cls.paths = student.teacher_paths(cls.teacher, cls.z, AB)

    def by_heart(self):
        """A student that knows the teacher's paths: it lands on them, whatever t_next."""
        class Cheat(student.JumpUNet):
            def forward(net, x, t, t_next):
                return student.secant_velocity(
                    x, student.state_at(self.paths, ROWS, t_next, AB), t, t_next, AB)
        return Cheat(**TINY)

    def few(self):
        """A target of 4 steps instead of 50: faster."""
        return mock.patch.object(student, "TARGET", ddpm.hand_solver("DDIM", "quadratic", 4))

    def test_a_jump_with_the_secant_velocity_lands_where_it_should(self):
        x, y = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
        t, t_next = torch.tensor([1000, 900, 500, 20]), torch.tensor([0, 100, 490, 0])
        v = student.secant_velocity(x, y, t, t_next, AB)
        self.close(ddpm.jump(x, ddpm.x0_and_eps(x, t, v, AB)[0], t, t_next, AB)[0], y, 1e-3)
        d = ab4(t).sqrt().acos() - ab4(t_next).sqrt().acos()
        self.close(d.cos() * x - d.sin() * v, y, 1e-3)

    def test_a_copy_of_the_teacher_is_the_teacher_and_can_learn_jumps(self):
        copied = student.student_from_teacher(self.teacher)
        with mock.patch.object(self.teacher, "clip", False):           # as the student
            for name, steps in (("quadratic", 5), ("uniform", 3)):
                solver = ddpm.hand_solver("DDIM", name, steps)
                self.close(ddpm.sample(copied, self.z, solver, AB),
                           ddpm.sample(self.teacher, self.z, solver, AB), 1e-5)
        copied(self.z, full(4, 500), full(4, 200)).square().sum().backward()
        self.assertGreater(copied.jump_mlp[-1].weight.grad.abs().max(), 1e-6)

    def test_a_path_starts_at_the_noise_and_ends_at_the_target(self):
        self.assertEqual(self.paths.shape, (4, 51, 3, 8, 8))
        self.close(self.paths[:, 0], self.z, 0)
        self.close(self.paths[:, -1], teacher.targets(self.teacher, self.z, AB), 0)

    def test_states_are_the_paths_own_and_ddims_in_between_on_any_grid(self):
        for target in (teacher.TARGET, ddpm.hand_solver("DDIM", "uniform", 50)):
            with mock.patch.object(student, "TARGET", target):
                paths = student.teacher_paths(self.teacher, self.z, AB)
                for k in (0, 1, 25, 49, 50):
                    self.close(student.state_at(paths, ROWS, full(4, target.grid[k]), AB),
                               paths[:, k], 1e-5)
                k = torch.tensor([0, 5, 25, 30])                       # a jump for each image
                x, t = paths[ROWS, k], torch.tensor(target.grid)[k]
                t_mid = t - torch.tensor([10, 3, 2, 6])
                x0_hat = ddpm.estimate(self.teacher, x, t, self.teacher(x, t), AB)
                self.close(student.state_at(paths, ROWS, t_mid, AB),
                           ddpm.jump(x, x0_hat, t, t_mid, AB)[0], 2e-4)

    def test_drawn_jumps_go_down_far_enough_and_reach_both_ends(self):
        t, t_next = student.draw_jumps(20_000, rng())
        self.assertEqual((t.max().item(), t_next.min().item()), (ddpm.T, 0))
        self.assertEqual((t - t_next).min().item(), student.SHORTEST_JUMP)
        self.assertAlmostEqual((t == ddpm.T).float().mean().item(), student.START_SHARE, delta=0.02)
        self.assertAlmostEqual((t_next == 0).float().mean().item(), student.LAND_SHARE, delta=0.05)
        self.assertEqual(set(range(10, 1001)) - set(t.tolist()), set())

    def test_cloning_aims_at_the_landing_point_in_v_space(self):
        t, t_next = torch.tensor([1000, 1000, 700, 333]), torch.tensor([0, 400, 13, 0])
        zero = student.JumpUNet(**TINY)                        # conv_out is zero: predicts v = 0
        cheat, loss = (student.clone_loss(net, self.paths, ROWS, t, t_next, AB)
                       for net in (self.by_heart(), zero))
        self.assertLess(cheat.item(), 1e-8)
        x, y = (student.state_at(self.paths, ROWS, s, AB) for s in (t, t_next))
        d = ab4(t).sqrt().acos() - ab4(t_next).sqrt().acos()
        landing = ((d.cos() * x - y) ** 2 / d.sin() ** 2).mean()
        self.close(loss.detach(), landing, 1e-4 * landing.item())
        loss.backward()
        self.assertGreater(zero.conv_out.bias.grad.abs().max(), 1e-4)

    def test_whoever_knows_the_paths_by_heart_lands_on_them_in_any_number_of_jumps(self):
        for name, steps in (("quadratic", 4), ("uniform", 1), ("uniform", 7)):
            solver = ddpm.hand_solver("DDIM", name, steps)
            self.close(ddpm.sample(self.by_heart(), self.z, solver, AB), self.paths[:, -1], 1e-4)

    def test_the_pool_keeps_the_newest_paths_each_of_new_noise(self):
        with self.few():
            pool = student.PathPool(self.teacher, 8, AB, CPU)
            pool.grow(3)
            self.assertEqual((pool.size, pool.made), (8, 4))
            self.assertEqual(set(pool.draw(50, rng()).tolist()), {0, 1, 2, 3})
            pool.grow(10)
        seeds = student.CLONE_SEEDS + torch.tensor([8, 9, *range(2, 8)])
        self.close(pool.paths[:, 0], ddpm.seeded_noise(seeds, (3, 8, 8)), 0)
        self.assertEqual(set(pool.draw(200, rng()).tolist()), set(range(8)))

    def test_the_pool_comes_back_from_the_number_made_alone_to_the_same_bits(self):
        with self.few():
            pool, again = (student.PathPool(self.teacher, 8, AB, CPU) for _ in range(2))
            pool.grow(10)
            self.assertEqual(pool.state_dict(), dict(made=10))
            again.load_state_dict(pool.state_dict())
            self.assertTrue(torch.equal(pool.paths, again.paths))
            pool.grow(12)
            again.grow(12)
        self.assertTrue(torch.equal(pool.paths, again.paths))

    def test_cloning_lowers_its_loss_and_never_sees_held_out_noise(self):
        torch.manual_seed(0)
        net, ema, out = student.JumpUNet(**TINY), student.JumpUNet(**TINY), self.folder()
        args = train_args(updates=40, batch_size=32)
        with self.few(), mock.patch.object(student, "LOG_EVERY", 8), mock.patch.object(
                teacher, "WARMUP", 4), mock.patch.object(
                student, "seeded_noise", wraps=student.seeded_noise) as spy:
            (_, made), _ = quiet(student.clone, net, ema, self.teacher, args, out, CPU)
            rows, pictures = student.evaluate(ema, self.teacher, 5, AB, CPU)
        *seen, judged = (list(call.args[0]) for call in spy.call_args_list)
        self.assertEqual(sum(seen, []), [student.CLONE_SEEDS + i for i in range(made)])
        self.assertEqual(judged, [student.HELD_OUT + i for i in range(5)])
        self.assertLess(student.CLONE_SEEDS + 10 ** 8, student.HELD_OUT)
        self.assertLess(losses(out)[-1], 0.8 * losses(out)[0])
        again, _ = student.load_student(out / "student.pt")
        self.assertFalse(again.training or any(p.requires_grad for p in again.parameters()))
        for p, q in zip(again.parameters(), ema.parameters()):
            self.close(p, q.detach(), 1e-3)
        z = ddpm.seeded_noise(judged, (3, 8, 8))               # the table, by hand
        target = teacher.targets(self.teacher, z, AB)
        self.close(pictures[:5], target, 0)
        for name, net in (("student", ema), ("teacher", self.teacher)):
            for grid, times in (("uniform", [1000, 500, 0]), ("quadratic", [1000, 250, 0])):
                x = ddpm.sample(net, z, ddpm.Solver(times, [0.0, 0.0]), AB).clamp(-1, 1)
                self.close(rows[1][f"{name} {grid}"], (x - target).square().mean(), 1e-5)


# ==== reward.py ===============================================================================

class Rewards(Case):
    scales = dict(feature=0.005, perceptual=0.13, mse=0.15, histogram=0.22)

    def view(self, x):
        return reward.look(frozen(reward.Coach, classes=10), x)

    def reward(self, spec):
        return reward.Reward(spec, frozen(reward.Coach, classes=10), self.scales)

    def test_the_teachers_own_image_gets_the_best_value_and_others_less(self):
        x, y = self.view(images(6)), self.view(images(6, seed=1))
        for name, term in reward.TERMS.items():
            self.close(term.function(x, x), full(6, float(term.best)), 1e-5, name)
            other = term.function(y, x)
            self.assertTrue((other < term.best).all() and (other >= term.worst).all(), name)

    def test_no_reward_depends_on_the_batch_it_is_computed_in(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            alone = torch.cat([term.function(self.view(x[i:i + 1]), self.view(y[i:i + 1]))
                               for i in range(5)])
            self.close(term.function(self.view(x), self.view(y)), alone, 1e-5, name)

    def test_a_frozen_coach_lets_gradients_reach_the_pixels_where_the_registry_says(self):
        path, net = self.folder() / "coach.pt", reward.Coach()
        save_checkpoint(path, "coach", config=dict(classes=10), weights=half_weights(net),
                        scales=self.scales)
        coach, content = reward.load_encoder(path, "coach")
        self.assertFalse(coach.training or any(p.requires_grad for p in coach.parameters()))
        for name, term in reward.TERMS.items():
            x, made = images(2).requires_grad_(True), reward.Reward(name, coach, content["scales"])
            value, _ = made(x, images(2, seed=1))
            self.assertEqual([value.requires_grad, made.differentiable],
                             [name != "histogram"] * 2, name)
            if term.differentiable:
                value.sum().backward()
                self.assertGreater(x.grad.abs().max().item(), 1e-6, name)
        self.assertFalse(self.reward("mse+histogram").differentiable)

    def test_every_term_agrees_with_loops(self):
        x, y = images(2), images(2, seed=1)
        a, b = self.view(x), self.view(y)
        for i in range(2):
            f, g = a.features[i], b.features[i]
            layers = [np.mean([((p / p.norm() - q / q.norm()) ** 2).sum().item() for p, q in
                               zip(m[i].flatten(1).T, n[i].flatten(1).T)])
                      for m, n in zip(a.maps, b.maps)]
            counts = [[np.histogram(s[i, c].numpy(), reward.BINS, (-1, 1))[0] + 1.0
                       for c in range(3)] for s in (y, x)]
            kl = np.mean([(p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum()
                          for p, q in zip(*counts)])
            for name, expected in (("feature", f @ g / (f.norm() * g.norm())), ("histogram", -kl),
                                   ("perceptual", -np.mean(layers)),
                                   ("mse", -((x[i] - y[i]) ** 2).mean())):
                self.close(reward.TERMS[name].function(a, b)[i], expected, 1e-5, name)

    def test_weights_and_scales_enter_as_written(self):
        x, y = images(3), images(3, seed=1)
        total, raw = self.reward("feature:2+mse")(x, y)
        self.close(total, 2 * (raw["feature"] - 1) / 0.005 + raw["mse"] / 0.15, 1e-3)
        self.close(raw["mse"], reward.mse_reward(self.view(x), self.view(y)), 0)
        self.assertEqual(reward.parse_reward("feature:2 + mse"), dict(feature=2.0, mse=1.0))

    def test_what_is_no_reward_is_refused(self):
        for text, spec in (("unknown reward 'clip'", "clip"), ("named twice", "mse:1+mse:2"),
                           ("must be a number", "mse:much"), ("positive and finite", "mse:-1"),
                           ("positive and finite", "mse:nan")):
            self.bad_input(text, reward.parse_reward, spec)

    def test_more_distortion_means_less_reward(self):
        x = images(8, size=32)
        for kind, name in itertools.product(reward.DISTORTIONS, reward.TERMS):
            values = [self.reward(name)(reward.distort(x, kind, level, rng()), x)[0].mean().item()
                      for level in (0, 0.25, 0.5)]
            self.assertAlmostEqual(values[0], 0, delta=1e-4)
            self.assertTrue(values[0] > values[1] > values[2], (kind, name, values))

    def test_distortions_are_what_they_are_called(self):
        x, dot = images(3, size=32), torch.zeros(1, 3, 33, 33)
        self.close(reward.distort(x, "shift", 0.5, rng())[..., 4:], x[..., :-4], 0)
        self.close(reward.distort(x, "wrong", 0.25, rng())[1], 0.75 * x[1] + 0.25 * x[0], 1e-6)
        noise = reward.distort(torch.zeros(4, 3, 32, 32), "noise", 0.5, rng())
        self.assertAlmostEqual(noise.std().item(), 0.25, delta=0.01)
        dot[..., 16, 16] = 1
        bell = torch.exp(-(torch.arange(33) - 16) ** 2 / 2) / math.sqrt(2 * math.pi)
        self.close(reward.distort(dot, "blur", 0.5, rng())[0, 0], bell[:, None] * bell, 1e-4)

    def test_a_scale_is_the_std_over_all_distortions(self):
        x, generator, values = images(4, size=32), rng(), []
        for kind, level in itertools.product(reward.DISTORTIONS, (0.25, 0.5, 0.75, 1.0)):
            y = reward.distort(x, kind, level, generator)
            values += [-((a - b) ** 2).mean().item() for a, b in zip(x, y)]
        scales = reward.term_scales(frozen(reward.Coach, classes=10), x)
        self.assertEqual(set(scales), set(reward.TERMS))
        self.close(scales["mse"], np.std(values, ddof=1), 1e-5)


class Metrics(Case):
    def test_frechet_distance_of_known_gaussians_even_of_low_rank(self):
        m1, m2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        c1, c2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
        self.close(reward.frechet_distance(m1, c1, m2, c2), 4.0 + (1 - 3) ** 2 + (2 - 1) ** 2, 1e-6)
        a, b = randn(200, 5, seed=1).double(), 0.5 * randn(300, 5, seed=2).double() + 1
        (m1, c1), (m2, c2) = reward.moments(a), reward.moments(b)
        cross = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
        expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross
        self.close(reward.frechet_distance(m1, c1, m2, c2), expected, 1e-6)
        self.close(c1, torch.from_numpy(np.cov(a.numpy().T)), 1e-9)
        m, c = reward.moments(randn(5, 20))
        self.close(reward.frechet_distance(m, c, m + 1, c), 20.0, 1e-4)

    def test_precision_and_recall_agree_with_loops(self):
        real, fake, k = randn(30, 2, seed=1), randn(25, 2, seed=2) + 0.7, 3
        across, *own = ([[(p - q).norm().item() for q in b] for p in a]
                        for a, b in ((fake, real), (real, real), (fake, fake)))
        r_real, r_fake = ([sorted(row)[k] for row in table] for table in own)
        hits = [[d <= r for d, r in zip(row, r_real)] for row in across]
        expected = dict(
            precision=np.mean([any(row) for row in hits]), density=np.sum(hits) / (k * 25),
            recall=np.mean([any(d <= r for d, r in zip(c, r_fake)) for c in zip(*across)]),
            coverage=np.mean([min(c) <= r for c, r in zip(zip(*across), r_real)]))
        got = reward.precision_recall(real, fake, k)
        self.assertEqual(set(got), set(expected))
        for name, value in got.items():
            self.assertAlmostEqual(value, expected[name], places=5, msg=name)

    def test_precision_takes_any_ball_not_the_nearest_neighbours(self):
        real = torch.tensor([[0.0, 0], [0.01, 0], [0, 0.01], [3, 0], [6, 0], [3, 3]])
        fake = torch.tensor([[0.5, 0.0], [99, 99], [100, 100], [101, 101]])
        self.assertEqual(reward.precision_recall(real, fake, k=1)["precision"], 0.25)

    def test_a_verdict_is_made_of_its_parts(self):
        judge, data = frozen(reward.Judge, classes=10), (images(40, 32) * 127.5 + 127.5).byte()
        real, fake = judge(data.float() / 127.5 - 1)[1], judge(images(20, 32, seed=1))[1]
        with mock.patch.object(reward, "REFERENCE", 30):
            file = reward.judge_reference(judge, data)
        same = torch.cdist(file["features"].float(), real) < 1e-2      # 30 different ones of the 40
        self.assertEqual((same.sum(1).tolist(), same.any(0).sum().item()), ([1] * 30, 30))
        (m1, c1), (m2, c2) = ((f.double().mean(0), np.cov(f.double().numpy().T))
                              for f in (real, fake))
        self.close(file["covariance"], c1, 1e-5)
        c1, c2 = map(torch.from_numpy, (c1, c2))
        expected = dict(frechet=reward.frechet_distance(m1, c1, m2, c2),
                        **reward.precision_recall(file["features"].float(), fake, 5))
        got = reward.judged(images(20, 32, seed=1), judge, file)
        self.assertEqual(set(got), set(expected))
        for name, value in got.items():
            self.assertAlmostEqual(value, expected[name], places=4, msg=name)


class Encoders(Case):
    def test_the_crop_shifts_images_and_nothing_else(self):
        x, seen = images(50, size=16), []
        padded = F.pad(x, [4] * 4, mode="reflect")
        for i, y in enumerate(reward.random_crop(x, rng())):
            found = [(a, b) for a in range(9) for b in range(9)
                     if torch.equal(y, padded[i, :, a:a + 16, b:b + 16])]
            self.assertEqual(len(found), 1)
            seen += found
        self.assertEqual([set(side) for side in zip(*seen)], [set(range(9))] * 2)

    def test_drawing_keeps_image_and_label_together_and_mirrors_half_of_them(self):
        ramp = torch.arange(16)[None, :] * 2 + torch.arange(7)[:, None] * 30
        data = ramp[:, None, None, :].expand(7, 3, 16, 16).byte()
        x, y = reward.draw_labelled(data, torch.arange(7), 500, rng())
        self.assertEqual(((x + 1) * 127.5).mean((1, 2, 3)).div(30).long().tolist(), y.tolist())
        self.assertEqual(set(y.tolist()), set(range(7)))
        mirrored = (x[:, 0, 0, 12] < x[:, 0, 0, 4]).float().mean().item()
        self.assertAlmostEqual(mirrored, 0.5, delta=0.07)
        self.close(x[:, :, 0], x[:, :, -1], 0)                         # rows stay rows

    def test_training_learns_two_colours_and_accuracy_counts(self):
        labels = torch.arange(64) % 2
        data = (labels * 150 + 40)[:, None, None, None].expand(64, 3, 8, 8).byte()
        args = train_args(epochs=4, batch_size=16)
        (net, _), _ = quiet(reward.train_encoder, "judge", data, labels, args, self.folder(), CPU)
        self.assertEqual(reward.accuracy(net, data, labels, batch=10), 1)
        self.assertEqual(reward.accuracy(net, data, 0 * labels, batch=10), 0.5)


# ==== PLANTED MISTAKES: (module, what the source says, the mistake, the test that notices) ====

PLANTED_1 = [
    (ddpm, "sqrt() * x0 + (1 - ab).sqrt() * eps", "sqrt() * x0 - (1 - ab).sqrt() * eps",
     "Schedule.test_q_sample_is_eq_4_for_every_image"),
    (ddpm, "torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])",
     "torch.cumprod(1 - torch.cat([beta, beta[-1:]]), 0)",
     "Schedule.test_alpha_bar_starts_at_one_and_equals_the_loop"),
    (ddpm, "(1 - ab).sqrt() * x_t + ab.sqrt() * v", "(1 - ab).sqrt() * x_t - ab.sqrt() * v",
     "Schedule.test_x0_and_eps_undo_v_and_explain_x_t_whatever_v"),
    (ddpm, "F.mse_loss(eps_hat, eps)", "F.mse_loss(eps_hat, eps, reduction='sum')",
     "Schedule.test_simple_loss_is_a_mean_and_reaches_the_network"),
    (ddpm, "F.mse_loss(eps_hat, eps)", "F.mse_loss(eps_hat.detach(), eps)",
     "Schedule.test_simple_loss_is_a_mean_and_reaches_the_network"),
    (ddpm, "sqrt() * (1 - ab / ab_next).sqrt()", "sqrt() * (1 - ab).sqrt()",
     "Jump.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, " - spread(sigma, x_t) ** 2)", ")",
     "Jump.test_it_is_eq_12_with_the_sigma_of_eq_16_element_by_element"),
    (ddpm, "* (x0_hat - x0_last)\n    ab", "* (x0_last - x0_hat)\n    ab",
     "HandSolvers.test_sampling_gives_the_numbers_of_diffusers"),
    (ddpm, "eps = (x_t - ab.sqrt() * D)", "eps = (x_t - ab.sqrt() * x0_hat)",
     "HandSolvers.test_dpm_is_algorithm_2_of_lu_et_al"),
    (ddpm, "(t_last > t) & (t_next > 0)", "t_last > t",
     "Jump.test_dpm_lean_is_h_over_2_h_last_but_0_at_both_ends"),
    (ddpm, "lean if k > 1 else 0.0", "lean",
     "Sampler.test_the_last_jump_adds_no_noise_and_the_first_does_not_lean"),
    (ddpm, "x0_last = x0_hat\n", "x0_last = x\n",
     "HandSolvers.test_sampling_gives_the_numbers_of_diffusers"),
    (ddpm, "int(s) * 1009 + stream", "int(s) + stream",
     "Sampler.test_a_seed_is_the_same_image_in_any_batch_and_streams_differ"),
    (ddpm, "if keep is not None and k in keep:", "if True:",
     "Sampler.test_only_the_states_asked_for_are_kept"),
    (ddpm, "x0_hat.clamp(-1, 1) if net.clip", "x0_hat.clamp(-1, 1) if not net.clip",
     "Sampler.test_an_estimate_of_an_image_is_kept_in_range"),
    (teacher, "None], x.flip(-1)", "None], x.flip(-2)",
     "TeacherTraining.test_a_batch_holds_images_of_the_set_half_of_them_mirrored"),
    (teacher, "torch.randint(1, T + 1,", "torch.randint(1, T,",
     "TeacherTraining.test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn"),
    (teacher, "p_ema.lerp_(p, 1 - decay)", "p_ema.lerp_(p, decay)",
     "TeacherTraining.test_ema_averages_parameters_with_a_shorter_memory_at_first"),
    (teacher, '"quadratic", 50)', '"uniform", 50)',
     "TeacherTraining.test_the_target_is_50_quadratic_ddim_steps_in_any_batch"),
    (student, "(d.cos() * x_t - x_next) / d.sin()", "(x_next - d.cos() * x_t) / d.sin()",
     "Jumps.test_a_jump_with_the_secant_velocity_lands_where_it_should"),
    (student, "    zeroed(student.jump_mlp[-1])\n", "",
     "Jumps.test_a_copy_of_the_teacher_is_the_teacher_and_can_learn_jumps"),
    (student, ">= t[:, None]).sum(1) - 1)", "> t[:, None]).sum(1))",
     "Jumps.test_states_are_the_paths_own_and_ddims_in_between_on_any_grid"),
    (student, "u[0] < START_SHARE, T,", "u[0] < START_SHARE, T - 1,",
     "Jumps.test_drawn_jumps_go_down_far_enough_and_reach_both_ends"),
    (student, "range(CLONE_SEEDS + self.made, CLONE_SEEDS + self.made + self.chunk)",
     "range(CLONE_SEEDS, CLONE_SEEDS + self.chunk)",
     "Jumps.test_the_pool_keeps_the_newest_paths_each_of_new_noise"),
    (student, "range(HELD_OUT, HELD_OUT + n)", "range(CLONE_SEEDS, CLONE_SEEDS + n)",
     "Jumps.test_cloning_lowers_its_loss_and_never_sees_held_out_noise"),
    (reward, "_ = encoder(images)\n", "_ = torch.no_grad()(encoder)(images)\n",
     "Rewards.test_a_frozen_coach_lets_gradients_reach_the_pixels_where_the_registry_says"),
    (reward, "- F.normalize(b, dim=1)).square()", "- F.normalize(b, dim=0)).square()",
     "Rewards.test_no_reward_depends_on_the_batch_it_is_computed_in"),
    (reward, "square().sum(1).mean((1, 2))", "square().mean((1, 2, 3))",
     "Rewards.test_every_term_agrees_with_loops"),
    (reward, "-(p * (p / q).log())", "-(q * (q / p).log())",
     "Rewards.test_every_term_agrees_with_loops"),
    (reward, "return -(seen.images", "return (seen.images",
     "Rewards.test_more_distortion_means_less_reward"),
    (reward, "- 2 * cross).item()", "- cross).item()",
     "Metrics.test_frechet_distance_of_known_gaussians_even_of_low_rank"),
    (reward, "in_real.any(0)", "in_real[distance.argmin(0), torch.arange(len(fake))]",
     "Metrics.test_precision_takes_any_ball_not_the_nearest_neighbours"),
    (reward, "kthvalue(k + 1, dim=1).values  # k + 1", "kthvalue(k, dim=1).values  # k + 1",
     "Metrics.test_precision_and_recall_agree_with_loops"),
    (reward, "x), labels[index]", "x), labels[index.flip(0)]",
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
