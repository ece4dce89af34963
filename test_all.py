"""The specification of the six files, in their order. Test names are sentences.

    python test_all.py              # these, and the tests of harness/, assignments/, study/, ...
    python test_all.py Surrogate    # one class, or one test

Plain unittest; no network, GPU or data set. What the files do as commands, sample.py with them, is
in harness/test_harness.py; harness/test_planted.py tests these tests.
"""
import contextlib
import copy
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
import types
import unittest
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.utils._pytree import tree_flatten

import ddpm
import reward
import rl_distill as rl
import sample
import student
import teacher
from ddpm import baseline_solver, seeded_noise
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.images import save_picture
from harness.runs import BadInput, read_log

HERE = Path(__file__).resolve().parent
MODULES = [ddpm, teacher, student, reward, rl, sample]
TINY = dict(width=16, mults=[1, 2], blocks=1, attention=[4], dropout=0.0, image_size=8)
torch.set_num_threads(1)          # tiny networks, whose threads would wait for each other
CPU, ROWS, AB = torch.device("cpu"), torch.arange(4), ddpm.linear_alpha_bar()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def images(n, size=8, seed=0):
    """Smooth random images in [-1, 1]: (n, 3, size, size)."""
    return F.interpolate(randn(n, 3, 4, 4, seed=seed), size=(size, size), mode="bilinear").tanh()


def randomised(net, seed=0, scale=0.05):
    """Give the zero-initialised layers something to say."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * randn(*p.shape, seed=seed + p.numel()))
    return net.eval()


def frozen(kind, **config):
    """A network that is the same in any order of the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(kind(**(config or TINY))).requires_grad_(False)


def full(n, t):
    return torch.full((n,), t)


def ab4(t):
    return AB[t].reshape(-1, 1, 1, 1)


TEACHER, COACH = frozen(ddpm.UNet), frozen(reward.Coach, classes=10)


class Case(unittest.TestCase):
    def close(self, a, b, tol=1e-5, msg=None):
        """Same shape, same dtype kind, no NaN, every difference below tol."""
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        self.assertEqual((a.shape, a.is_floating_point()), (b.shape, b.is_floating_point()), msg)
        self.assertFalse(torch.isnan(a.double()).any() or torch.isnan(b.double()).any(),
                         "NaN never passes")
        worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        self.assertLessEqual(worst, tol, msg)

    def comes_back(self, again, net):
        """What was loaded is the network that was saved, frozen, in eval mode."""
        self.assertFalse(again.training or any(p.requires_grad for p in again.parameters()))
        for p, q in zip(again.parameters(), net.parameters()):
            self.close(p, q.detach(), 1e-3)

    def folder(self, enter=False):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        if enter:                                  # what is written beside --out goes there too
            self.addCleanup(os.chdir, os.getcwd())
            os.chdir(keep.name)
        return Path(keep.name)

    def patch(self, module, **values):
        patcher = mock.patch.multiple(module, **values)
        patcher.start()
        self.addCleanup(patcher.stop)


def quiet(function, *args, **kw):
    """Call with the output caught; returns (result, what was printed)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        return function(*args, **kw), text.getvalue()


class Nets(Case):
    def setUp(self):
        self.net, self.first = frozen(ddpm.UNet), frozen(student.JumpUNet)


def noise(n, size=8):
    return seeded_noise(range(n), (3, size, size))


def plain(x):
    """A View of targets of which only the pixels are looked at."""
    return reward.View(x, [], x)


def minus_mse(x, target):
    return -(x - target.images).square().mean((1, 2, 3))


class Toy(torch.nn.Module):
    """Linear network, v = w x + b, two "residual blocks" of 2 and 3 channels."""
    estimates_image, branches = False, [2, 3]

    def __init__(self, w=0.2, b=-0.1):
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(torch.tensor(value)) for value in (w, b))

    def forward(self, x, t, t_next=None, gains=None):
        more = 0 if gains is None else sum(ddpm.expand_like(gain, x) for gain in gains.T)
        return (self.w + more) * x + self.b


# ==== ddpm.py =================================================================================

class Jump(Case):
    x_t, eps, x0, x0_last = *randn(2, 4, 3, 8, 8), images(4), images(4, seed=1)
    t, t_next = torch.tensor([1000, 800, 500, 20]), torch.tensor([700, 1, 0, 10])

    def test_alpha_bar_equals_the_loop(self):
        expected = [1.0]
        for i in range(1000):
            expected.append(expected[-1] * (1 - (1e-4 + (0.02 - 1e-4) * i / 999)))
        self.close(ddpm.linear_alpha_bar(), expected, 1e-6)

    def test_q_sample_is_eq_4(self):
        t = torch.tensor([0, 1, 500, 1000])
        for b, out in enumerate(ddpm.q_sample(self.x0, t, self.eps, AB)):
            a = AB[t[b]].item()
            self.close(out, math.sqrt(a) * self.x0[b] + math.sqrt(1 - a) * self.eps[b])

    def test_x0_and_eps_explain_x_t(self):
        a, x_t = ab4(self.t), ddpm.q_sample(self.x0, self.t, self.eps, AB)
        pair = ddpm.x0_and_eps(x_t, self.t, a.sqrt() * self.eps - (1 - a).sqrt() * self.x0, AB)
        self.close(torch.stack(pair), torch.stack([self.x0, self.eps]))
        x0_hat, eps_hat = ddpm.x0_and_eps(x_t, self.t, 3 * randn(4, 3, 8, 8, seed=2), AB)
        self.close(a.sqrt() * x0_hat + (1 - a).sqrt() * eps_hat, x_t)

    def test_simple_loss_is_a_mean(self):
        w, squares = torch.tensor(0.3, requires_grad=True), []
        loss = ddpm.simple_loss(lambda x, t: w * x, self.x0, self.t, self.eps, AB)
        for a, x0, eps in zip(AB[self.t].tolist(), self.x0, self.eps):
            x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
            squares += ((math.sqrt(1 - a) * x + math.sqrt(a) * 0.3 * x - eps) ** 2).flatten()
        self.close(loss.detach(), np.mean(squares))
        self.assertTrue(loss.requires_grad and torch.autograd.grad(loss, w)[0].abs() > 1e-3)

    def test_it_is_eq_12_with_the_sigma_of_eq_16(self):
        for eta in (0.0, 0.7):
            mean, sigma = ddpm.jump(self.x_t, self.x0, self.t, self.t_next, AB, eta=eta)
            for b, (a, a_next) in enumerate(zip(AB[self.t].tolist(), AB[self.t_next].tolist())):
                s = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
                eps = (self.x_t[b] - math.sqrt(a) * self.x0[b]) / math.sqrt(1 - a)
                self.close(sigma[b], s, 1e-6)
                expected = math.sqrt(a_next) * self.x0[b] + math.sqrt(1 - a_next - s * s) * eps
                self.close(mean[b], expected)
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

    def test_dpm_lean_is_h_over_2_h_last_but_0_at_the_ends(self):
        times = [(1000, 600, 250), (900, 500, 1), (300, 200, 190)]         # t_last, t, t_next
        levels = [[math.log(AB[t].item() / (1 - AB[t].item())) / 2 for t in row] for row in times]
        expected = [(c - b) / (2 * (b - a)) for a, b, c in levels]
        t_last, t, t_next = torch.tensor([*times, (1000, 1000, 500), (1000, 1000, 0), (90, 5, 0)]).T
        self.close(ddpm.dpm_lean(t, t_next, t_last, AB), [*expected, 0, 0, 0], 1e-3)
        solver = baseline_solver("DPM++", "uniform", 3)
        t_last, t, t_next = torch.tensor([solver.times[0], *solver.times[:2]]), *(
            torch.tensor(solver.times[i:i + 3]) for i in (0, 1))
        self.close(solver.leans, ddpm.dpm_lean(t, t_next, t_last, AB), 0)


# What diffusers 0.42.1 makes, in millionths, in 3, 5, 10, 20, 50 evaluations, of x_T = -2, -1, 0, 1
# and 2 if the data are half N(-0.5, 0.2^2), half N(0.6, 0.2^2): linear betas 1e-4 .. 0.02; epsilon
# = -sqrt(1 - ab) d/dx log p_t(x) by autograd, float64; its time i is our t = i + 1. DDIM: .step of
# DDIMScheduler(clip_sample=False), eta 0, num_inference_steps = 1000 / (t - t_next). DPM++:
# DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
# lower_order_final=True, final_sigmas_type="zero").set_timesteps(timesteps=[t - 1, ..]).
DIFFUSERS = {
    ("DDIM", "quadratic"): [[-589882, -444286, 49764, 544143, 689812],
        [-681157, -485436, 49523, 585276, 781054], [-751730, -542493, 49135, 642337, 851610],
        [-793181, -568518, 48618, 668355, 893050], [-819412, -584284, 47988, 684116, 919274]],
    ("DPM++", "quadratic"): [[-601274, -455681, 49751, 555541, 701201],
        [-785979, -589661, 49337, 689484, 885882], [-848569, -620804, 48256, 720649, 948430],
        [-850716, -602122, 47363, 701946, 950568], [-840168, -596094, 47245, 695921, 940023]],
    ("DPM++", "logsnr"): [[-540482, -394464, 49772, 494340, 640400],
        [-821630, -604343, 49533, 704133, 921528], [-866609, -630624, 48740, 730448, 966471],
        [-847363, -604134, 47990, 703961, 947219], [-839280, -596336, 47400, 696164, 939137]],
}
PAIR = ddpm.MixtureNet(torch.tensor([[-0.5], [0.6]]), 0.2, AB)


def x0_of(net, x, t):
    return ddpm.x0_and_eps(x, t, net(x, t), net.alpha_bar)[0]


class Sampler(Case):
    mean = torch.tensor([[0.4, -0.2]])
    gaussian = ddpm.MixtureNet(mean, 0.3, AB)

    def test_grids_decrease_from_T_to_0_and_others_are_refused(self):
        for name, steps in itertools.product(ddpm.GRIDS, (1, 2, 3, 50, 999, 1000)):
            grid = ddpm.make_grid(name, steps)
            self.assertEqual((len(grid), grid[0], grid[-1]), (steps + 1, ddpm.T, 0))
            self.assertTrue(all(a > b for a, b in zip(grid, grid[1:])))
        self.assertEqual(ddpm.make_grid("quadratic", 4), [1000, 562, 250, 62, 0])
        for name, steps in (("uniform", 0), ("uniform", 1001), ("cubic", 4)):
            self.assertRaises(ValueError, ddpm.make_grid, name, steps)
        self.assertRaises(ValueError, baseline_solver, "Euler", "uniform", 3)
        good = [1000, 500, 250, 0]
        for times in ([1000, 500, 600, 0], [1000, 500, 500, 0], [999, 2, 1, 0], [1000, 9, 2, 1],
                      [1000, 500, 0], torch.tensor([good, [1000, 500, 500, 0]]), good):
            leans = torch.zeros(2, 3) if torch.is_tensor(times) else [0.0] * 3
            solver = ddpm.Solver(times, leans, [[0.1]] * 2 if times is good else None)
            self.assertRaises(ValueError, ddpm.sample, PAIR, randn(2, 1), solver, AB)
        self.assertRaises(ValueError, ddpm.sample, PAIR, randn(2, 1), ddpm.Solver(good, [0.0] * 3),
                          AB, 0.5)                                       # noise, and no seeds
        level = torch.logit(AB[ddpm.make_grid("logsnr", 8)[:-1]])          # equal steps in lambda
        self.close(level.diff() / level.diff()[0], torch.ones(7), 0.05)

    def test_samples_have_the_numbers_of_diffusers(self):
        for (kind, name), rows in DIFFUSERS.items():
            for steps, millionths in zip((3, 5, 10, 20, 50), rows):
                solver = baseline_solver(kind, name, steps)
                x_0 = ddpm.sample(PAIR, torch.linspace(-2, 2, 5)[:, None], solver, AB)
                self.close(x_0[:, 0], np.array(millionths) / 1e6, 1e-5, (kind, name, steps))

    def test_dpm_is_algorithm_2_of_lu_ddim_its_order_1_and_ab2(self):
        ab, x_T = AB.double().tolist(), randn(6, 1).double()
        net = ddpm.MixtureNet(PAIR.means.double(), 0.2, AB.double())
        for kind, name, steps in itertools.product(ddpm.SOLVERS, ddpm.GRIDS, (1, 2, 3, 7, 20)):
            grid, x, x0_last, h_last = ddpm.make_grid(name, steps), x_T, None, None
            for t, t_next in zip(grid, grid[1:]):
                s, s_next = math.sqrt(1 - ab[t]), math.sqrt(1 - ab[t_next])
                h = (math.log(math.sqrt(ab[t_next]) / s_next) - math.log(math.sqrt(ab[t]) / s)
                     if t_next else math.inf)
                D = x0 = x0_of(net, x, full(6, t))
                if h_last and (t_next and kind == "DPM++" or kind == "AB2"):
                    r = h_last / h if kind == "DPM++" else 1
                    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
                x = s_next / s * x - math.sqrt(ab[t_next]) * math.expm1(-h) * D
                x0_last, h_last = x0, h
            out = ddpm.sample(PAIR, x_T.float(), baseline_solver(kind, name, steps), AB)
            self.close(out, x, 1e-5, (kind, name, steps))

    def test_solvers_converge_to_the_flow_of_a_gaussian_with_their_order(self):
        x_T = randn(200, 2)
        spread = (AB[-1] * 0.3 ** 2 + 1 - AB[-1]).sqrt()                   # x_T's, of such data
        exact = self.mean + 0.3 * (x_T - AB[-1].sqrt() * self.mean) / spread
        for kind, name, counts, rate in (("DDIM", "uniform", (10, 100, 1000), 5),
                                         ("DPM++", "logsnr", (16, 32, 64), 3),
                                         ("AB2", "logsnr", (16, 32, 64), 3)):
            e = [(ddpm.sample(self.gaussian, x_T, baseline_solver(kind, name, k), AB)
                  - exact).square().mean().sqrt().item() for k in counts]
            self.assertTrue(e[0] > rate * e[1] > rate ** 2 * e[2] and e[2] < 0.01, e)

    def test_with_eta_1_every_jump_adds_the_noise_of_its_seed(self):
        x, solver, t = randn(4, 2), baseline_solver("DDIM", "uniform", 2), full(4, 500)
        end = ddpm.sample(self.gaussian, x, solver, AB, 1.0, seeds=range(4))
        mean, sigma = ddpm.jump(x, x0_of(self.gaussian, x, 2 * t), 2 * t, t, AB, eta=1.0)
        x = mean + sigma[:, None] * ddpm.seeded_noise(range(4), (2,), stream=1)
        self.close(end, x0_of(self.gaussian, x, t))

    def test_noise_depends_on_its_seed_and_stream_alone(self):
        a, b = ddpm.seeded_noise([3, 4, 5], (3, 8, 8)), ddpm.seeded_noise([5], (3, 8, 8))
        self.close(a[2], b[0], 0)
        for noise in (a[0], *ddpm.seeded_noise([4, 5], (3, 8, 8), stream=1)):
            self.assertGreater((noise - b[0]).abs().max(), 0.5)

    def test_the_last_jump_has_no_noise_the_first_no_lean(self):
        ends = [ddpm.sample(self.gaussian, randn(2, 2), ddpm.Solver([1000, 0], [lean]), AB, eta, s)
                for lean, eta, s in ((0.0, 0.0, None), (0.0, 1.0, [3, 4]), (5.0, 0.0, None))]
        self.close(torch.stack(ends[1:]), torch.stack([ends[0]] * 2), 0)
        solver = ddpm.Solver([1000, 500, 0], [5.0, 2.0])               # in rollouts too
        self.close(solver.per_image(1, CPU)[1], [[0.0, 2.0]], 0)

    def test_estimates_of_images_stay_in_range(self):
        x, t, v = 3 * randn(3, 3, 8, 8), torch.tensor([1, 400, 1000]), randn(3, 3, 8, 8, seed=1)
        free = ab4(t).sqrt() * x - (1 - ab4(t)).sqrt() * v
        for kind, expected in ((student.JumpUNet, free), (ddpm.UNet, free.clamp(-1, 1))):
            net = mock.Mock(return_value=v, estimates_image=kind.estimates_image)
            self.close(ddpm.estimate(net, x, t, t, None, AB), expected)

    def test_states_are_kept_only_where_the_path_is_asked_for(self):
        class Net(Toy):
            def forward(net, x, *more):
                alive[id(x)] = x
                most.append(len(alive))
                return 0.1 * x
        alive, most, x_T = weakref.WeakValueDictionary(), [], randn(2, 2)
        solver = baseline_solver("DDIM", "uniform", 500)
        end, few = ddpm.sample(Net(), x_T, solver, AB), max(most)
        path = ddpm.sample(Net(), x_T, solver, AB, path=True)
        self.assertTrue(few < 8 and max(most) == 500 and len(path) == 501)
        self.close(torch.stack(path[::500]), torch.stack([x_T, end]), 0)

    def test_gains_0_and_leans_0_are_the_plain_sampler_to_the_bit(self):
        times = [1000, 600, 200, 0]
        for net in (frozen(ddpm.UNet), frozen(student.JumpUNet)):
            path = [noise(3)]
            for t, t_next in zip(torch.tensor(times[:-1]), torch.tensor(times[1:])):
                x, t, t_next = path[-1], t.expand(3), t_next.expand(3)
                x0_hat = ddpm.estimate(net, x, t, t_next, None, AB)
                path.append(ddpm.jump(x, x0_hat, t, t_next, AB)[0])
            for n in (0, len(net.branches), sum(net.branches)):
                for gains in (None, [[0.0] * n] * 3):
                    solver = ddpm.Solver(times, [0.0] * 3, gains)
                    out = ddpm.sample(net, noise(3), solver, AB, path=True)
                    self.assertTrue(torch.equal(torch.stack(out), torch.stack(path)), n)

    def test_a_solver_a_row_is_image_by_image_what_its_lists_are(self):
        nets = frozen(ddpm.UNet), frozen(student.JumpUNet)
        for net, per, eta in itertools.product(nets, (len, sum), (0.0, 0.7)):
            rows, z = ddpm.solver_of(0.5 * randn(4, 3, 2 + per(net.branches))), noise(4)
            many = ddpm.sample(net, z, rows, AB, eta, range(4))
            for i in range(4):
                solver = ddpm.Solver(*(part[i].tolist() for part in rows))
                alone = ddpm.sample(net, z, solver, AB, eta, range(4))
                self.close(many[i], alone[i], 1e-4)
                self.assertGreater((many - alone).abs().amax((1, 2, 3)).sort()[0][1], 0.02)


class Numbers(Case):
    def test_action_is_the_inverse_of_solver_of_for_all_baseline_solvers(self):
        gains, counts = randn(64, 3).tolist(), (*range(1, 10), 16, 25, 33, 50, 63, 64)
        for kind, grid, K in itertools.product(ddpm.SOLVERS, ddpm.GRIDS, counts):
            solver = baseline_solver(kind, grid, K)
            for n, had in ((0, None), (3, None), (3, gains[:K])):
                u = solver._replace(gains=had).action(n)
                self.assertEqual((u.shape, u.dtype), ((K, 2 + n), torch.float32))
                back = [part[0].tolist() for part in ddpm.solver_of(u[None])]
                self.assertEqual(back, [*solver[:2], had or [[0.0] * n] * K], (kind, grid, K))

    def test_times_decrease_and_leave_room_whatever_u(self):
        for K in (1, 2, 5, 64, 1000):
            u = torch.cat([torch.tensor([-200.0, -5, 0, 5, 200])[:, None, None] * torch.ones(K, 3),
                           3 * randn(40 if K < 99 else 2, K, 3)])
            times, leans, gains = ddpm.solver_of(u)
            self.assertEqual((times.dtype, times.shape), (torch.int64, (len(u), K + 1)))
            for i, row in enumerate(times.tolist()):
                self.assertEqual((row[0], row[-1]), (ddpm.T, 0))
                for k in range(K - 1):
                    rho_t = (torch.sigmoid(u[i, k, 0]) * row[k]).item()
                    self.assertEqual(row[k + 1], min(max(round(rho_t), K - 1 - k), row[k] - 1))
            self.assertTrue((times.diff(dim=1) < 0).all())
            self.close(leans[:, 1:], u[:, 1:, 1], 0)
            self.close(gains, u[:, :, 2:], 0)

    def test_the_mask_is_of_what_changes_a_solver(self):
        for K, n in ((1, 0), (1, 2), (3, 0), (3, 2)):
            u = baseline_solver("DPM++", "uniform", K).action(n)[None]
            for where, acts in np.ndenumerate(ddpm.action_mask(K, n).numpy()):
                moved = u.clone()
                moved[0][where] += 0.5
                self.assertEqual(acts, any(not torch.equal(a, b) for a, b in zip(*(
                    ddpm.solver_of(x).per_image(1, CPU) for x in (u, moved)))), (K, where))

    def test_a_policy_gradient_improves_on_its_start_for_points_it_has_not_seen(self):
        x, began = randn(2, 300, 2), time.process_time()
        corners = torch.tensor([[0.7, 0.0], [-0.35, 0.6], [-0.35, -0.6]])
        net = ddpm.MixtureNet(corners, 0.07, AB)
        ends = [ddpm.sample(net, part, baseline_solver("DDIM", "uniform", 200), AB) for part in x]
        start = min((baseline_solver("DDIM", grid, 3) for grid in ddpm.GRIDS), key=lambda s: (
            ddpm.sample(net, x[0], s, AB) - ends[0]).square().sum())
        learned = ddpm.policy_gradient(net, x[0], ends[0], start, AB, rng())
        error = [(ddpm.sample(net, x[1], solver, AB) - ends[1]).square().sum(1).mean().sqrt()
                 for solver in (start, learned)]
        self.assertGreater(error[0], 2 * error[1], error)
        self.assertEqual(learned.leans[0], 0)
        self.assertLess(time.process_time() - began, 20)           # of two cores: seconds alone


class Network(Case):
    def test_the_papers_has_35_7_million_parameters(self):
        with torch.device("meta"):
            self.assertEqual(ddpm.parameter_count(ddpm.UNet(**ddpm.PAPER_UNET)), 35_746_307)

    def test_every_time_is_seen_and_every_parameter_gets_a_gradient(self):
        for kind, times in ((ddpm.UNet, [(499, 0), (500, 0), (501, 0)]),
                            (student.JumpUNet, [(499, 0), (500, 0), (500, 1), (501, 1)])):
            net, (t, t_next) = randomised(kind(**TINY)), torch.tensor(times).T
            x = images(1).expand(len(t), 3, 8, 8)
            out = net(x, t, t_next)
            for i, j in itertools.combinations(range(len(t)), 2):
                self.assertGreater((out[i] - out[j]).abs().max(), 1e-5)
            self.close(net(x[:1], t[:1], t_next[:1]), out[:1])             # alone as in a batch
            out.square().sum().backward()
            for name, p in net.named_parameters():
                self.assertTrue(p.grad is not None and p.grad.abs().max() > 1e-6, name)

    def test_a_gain_scales_the_branch_of_its_block_and_not_the_shortcut(self):
        def scaled(block, by):
            """Brute force: what the network says while one block's branch is times `by`."""
            with block.conv2.register_forward_hook(lambda _, x, out: out * by[:, :, None, None]):
                return net(*args)
        for kind in (ddpm.UNet, student.JumpUNet):
            net, order, at = frozen(kind, **{**TINY, "blocks": 2}), [], 0
            args = images(2), torch.tensor([700, 300]), torch.tensor([200, 0])
            with contextlib.ExitStack() as hooks:
                for block in (m for m in net.modules() if isinstance(m, ddpm.ResBlock)):
                    hooks.enter_context(block.register_forward_hook(lambda m, *_: order.append(m)))
                plain_v = net(*args)
            self.assertEqual(net.branches, [block.conv2.out_channels for block in order])
            gains = 2 * randn(2, len(order))
            for i, (block, width) in enumerate(zip(order, net.branches)):
                one, channels = 0 * gains, torch.zeros(2, sum(net.branches))
                one[:, i], channels[:, at:at + width] = gains[:, i], gains[:, i:i + 1]
                expected = scaled(block, 1 + gains[:, i:i + 1])
                for given in (one, channels):                  # constant in the block, or its own
                    self.close(net(*args, given), expected, 1e-5, (kind, i))
                channels[:, at:at + width - 1] = 0                     # its last channel alone
                self.close(net(*args, channels), scaled(block, 1 + channels[:, at:at + width]),
                           1e-5, (kind, i))
                self.assertGreater((expected - plain_v).abs().amax((1, 2, 3)).min(), 2e-3)
                at += width
            many = net(*args, gains)
            for i in range(2):                                         # rows of different gains
                alone = net(*(part[i:i + 1] for part in (*args, gains)))
                self.close(many[i:i + 1], alone, 1e-4)

    def test_attention_is_softmax_of_qk_over_sqrt_c_times_v(self):
        block, x = frozen(ddpm.Attention, channels=16), randn(2, 16, 4, 4)
        h = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, 1e-6)
        for b, out in enumerate(block(x)):
            q, k, v = (h[b].flatten(1).T @ block.qkv.weight.T + block.qkv.bias).split(16, 1)
            mixed = torch.softmax(q @ k.T / math.sqrt(16), 1) @ v
            added = (mixed @ block.out.weight.T + block.out.bias).T.reshape(16, 4, 4)
            self.close(out, x[b] + added)

    def test_the_optimal_prediction_for_a_mixture_is_a_brute_force_average(self):
        means, x, t = torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), torch.tensor([[0.3, -0.1]]), 300
        x0 = means[torch.randint(2, (200_000,), generator=rng(1))] + 0.2 * randn(200_000, 2, seed=2)
        a, net = AB[t], ddpm.MixtureNet(means, 0.2, AB)
        weight = torch.softmax(-((x - a.sqrt() * x0) ** 2).sum(1) / (2 * (1 - a)), 0)[:, None]
        eps = (weight * (x - a.sqrt() * x0) / (1 - a).sqrt()).sum(0)
        x0 = (weight * x0).sum(0)
        self.close(x0_of(net, x, full(1, t))[0], x0, 0.01)
        self.close(net(x, full(1, t))[0], a.sqrt() * eps - (1 - a).sqrt() * x0, 0.01)


# ==== teacher.py ==============================================================================

def train_args(**more):
    return types.SimpleNamespace(**{**vars(student.parse_args(["--smoke"])), "lr": 4e-3, **more})


class Training(Case):
    def test_half_of_the_images_are_mirrored(self):
        ramp = torch.arange(16)[None, :] * 2 + torch.arange(7)[:, None] * 30
        data = ramp[:, None, None, :].expand(7, 3, 16, 16).byte()
        x = teacher.draw_batch(data, 500, rng())
        numbers = ((x + 1) * 127.5).mean((1, 2, 3)).div(30).long()
        self.close(x.sort(-1).values, data[numbers].float() / 127.5 - 1, 0)
        self.assertEqual({*numbers.tolist()}, {*range(7)})
        self.assertAlmostEqual((x[:, 0, 0, 12] < x[:, 0, 0, 4]).float().mean().item(), 0.5,
                               delta=0.07)
        self.close(x[:, :, 0], x[:, :, -1], 0)                         # rows stay rows

    def test_times_are_uniform_from_1_to_T(self):
        t = teacher.draw_times(100_000, rng())
        self.assertEqual((t.min().item(), t.max().item()), (1, ddpm.T))
        self.close(torch.bincount(t)[1:].reshape(10, 100).sum(1) / 1e5, full(10, 0.1), 0.005)

    def test_ema_averages_parameters(self):
        for update, decay in ((10 ** 6, 0.9), (0, 0.1), (10, 11 / 20)):
            net, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            expected = decay * ema.weight.detach() + (1 - decay) * net.weight.detach()
            teacher.ema_update(ema, net, update, 0.9)
            self.close(ema.weight.detach(), expected, 1e-6)

    def test_the_learning_rate_warms_up_and_ends_at_0(self):
        rates = [teacher.learning_rate(i, 1000, 1e-3) for i in range(1000)]
        self.assertEqual(rates.index(max(rates)), teacher.WARMUP - 1)
        self.close([rates[0], rates[-1]], [1e-3 / teacher.WARMUP, 0], 1e-8)

    def test_the_target_is_50_quadratic_ddim_steps_and_a_picture_leaves_the_rng_alone(self):
        z, path = ddpm.seeded_noise(range(3), (3, 8, 8)), self.folder() / "s.png"
        solver = ddpm.Solver(ddpm.make_grid("quadratic", 50), [0.0] * 50)
        fifty = ddpm.sample(TEACHER, z, solver, AB)
        before = torch.get_rng_state()
        with mock.patch.dict(teacher.CHUNK, cpu=2):
            self.close(teacher.draw(TEACHER, teacher.TARGET, z, AB), fifty, 1e-4)
        save_picture(path, fifty)
        self.assertTrue(torch.equal(before, torch.get_rng_state()) and path.exists())

    def test_algorithm_1_lowers_the_loss_on_one_image(self):
        out, args = self.folder(enter=True), train_args(updates=40, batch_size=16)
        torch.manual_seed(0)
        net, ema = ddpm.UNet(**TINY), ddpm.UNet(**TINY)
        with mock.patch.multiple(teacher, LOG_EVERY=8, WARMUP=4,
                                 TARGET=baseline_solver("DDIM", "uniform", 2)):
            quiet(teacher.train, net, ema, (images(1) * 127.5 + 127.5).byte(), args, out, CPU)
        first, *_, last = read_log(out / "log.jsonl")
        self.assertLess(last["loss"], 0.7 * first["loss"])
        self.comes_back(student.load_model(out / "teacher.pt")[0], ema)


# ==== student.py ==============================================================================

class Cloning(Case):
    @classmethod
    def setUpClass(cls):
        cls.z = ddpm.seeded_noise(range(4), (3, 8, 8))
        cls.paths = student.teacher_paths(TEACHER, cls.z, AB)

    def by_heart(self):
        """A student that knows the teacher's paths: it lands on them, whatever t_next."""
        class Cheat(student.JumpUNet):
            def forward(net, x, t, t_next, gains=None):
                return student.average_velocity(
                    x, student.state_at(self.paths, ROWS, t_next, AB), t, t_next, AB)
        return Cheat(**TINY)

    def test_a_jump_at_the_average_velocity_lands_where_it_should(self):
        x, y = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
        t, t_next = torch.tensor([1000, 900, 500, 20]), torch.tensor([0, 100, 490, 0])
        v = student.average_velocity(x, y, t, t_next, AB)
        self.close(ddpm.jump(x, ddpm.x0_and_eps(x, t, v, AB)[0], t, t_next, AB)[0], y, 1e-3)

    def test_a_copied_teacher_is_the_teacher(self):
        copied = student.student_from_teacher(TEACHER)
        with mock.patch.object(TEACHER, "estimates_image", False):           # as the student
            for solver in (baseline_solver("DDIM", name, 4) for name in ddpm.GRIDS):
                self.close(ddpm.sample(copied, self.z, solver, AB),
                           ddpm.sample(TEACHER, self.z, solver, AB))
        copied(self.z, full(4, 500), full(4, 200)).square().sum().backward()
        self.assertGreater(copied.jump_mlp[-1].weight.grad.abs().max(), 1e-6)

    def test_states_between_the_paths_own_are_ddims(self):
        ends = torch.stack([self.z, teacher.draw(TEACHER, teacher.TARGET, self.z, AB)], 1)
        self.close(self.paths[:, [0, -1]], ends, 0)
        for target in (teacher.TARGET, baseline_solver("DDIM", "uniform", 50)):
            with mock.patch.object(student, "TARGET", target):
                paths = student.teacher_paths(TEACHER, self.z, AB)
                for k in torch.tensor([[0, 5, 25, 30], [50, 49, 1, 2]]):       # one for each image
                    x, t = paths[ROWS, k], torch.tensor(target.times)[k]
                    self.close(student.state_at(paths, ROWS, t, AB), x)
                x, t = (v[ROWS, [0, 5, 25, 30]] for v in (paths, torch.tensor([target.times] * 4)))
                t_mid = t - torch.tensor([10, 3, 2, 6])
                x0_hat = ddpm.estimate(TEACHER, x, t, t_mid, None, AB)
                self.close(student.state_at(paths, ROWS, t_mid, AB),
                           ddpm.jump(x, x0_hat, t, t_mid, AB)[0], 2e-4)

    def test_jumps_reach_both_ends(self):
        t, t_next = student.draw_jumps(20_000, rng())
        self.assertEqual((t.max().item(), t_next.min().item()), (ddpm.T, 0))
        self.assertEqual((t - t_next).min().item(), student.SHORTEST_JUMP)
        self.assertAlmostEqual((t == ddpm.T).float().mean().item(), student.START_SHARE, delta=0.02)
        self.assertAlmostEqual((t_next == 0).float().mean().item(), student.LAND_SHARE, delta=0.05)
        self.assertTrue({*range(10, 1001)} <= {*t.tolist()})

    def test_the_loss_is_measured_in_v_space_and_0_for_who_knows_the_paths_by_heart(self):
        t, t_next = torch.tensor([1000, 1000, 700, 333]), torch.tensor([0, 400, 13, 0])
        cheat, zero = (student.clone_loss(net, self.paths, ROWS, t, t_next, AB).item()
                       for net in (self.by_heart(), student.JumpUNet(**TINY)))     # zero: v = 0
        x, y = (student.state_at(self.paths, ROWS, s, AB) for s in (t, t_next))
        d = ab4(t).sqrt().acos() - ab4(t_next).sqrt().acos()
        landing = ((d.cos() * x - y) ** 2 / d.sin() ** 2).mean().item()
        self.close([cheat, zero], [0, landing], 1e-4 * landing)
        for steps in (1, 4, 7):                                # and whoever has no loss lands
            solver = baseline_solver("DDIM", "uniform", steps)
            self.close(ddpm.sample(self.by_heart(), self.z, solver, AB), self.paths[:, -1], 1e-4)

    def test_the_pool_keeps_the_newest_paths(self):
        with mock.patch.object(student, "TARGET", baseline_solver("DDIM", "quadratic", 4)):
            pool, again = (student.PathPool(TEACHER, 8, AB, CPU) for _ in range(2))
            pool.grow(3)
            self.assertEqual({*pool.draw(50, rng()).tolist()}, {0, 1, 2, 3})
            pool.grow(10)
            again.grow(10)                                         # as after a kill
            for newest in ([8, 9, *range(2, 8)], [*range(8, 12), *range(4, 8)]):
                seeds = student.CLONE_SEEDS + torch.tensor(newest)
                self.close(pool.paths[:, 0], ddpm.seeded_noise(seeds, (3, 8, 8)), 0)
                self.assertTrue(torch.equal(pool.paths, again.paths))
                pool.grow(12)
                again.grow(12)
        self.assertEqual((pool.made, again.made), (12, 12))

    def test_cloning_lowers_its_loss_and_uses_its_own_seeds(self):
        torch.manual_seed(0)
        net, ema, out = student.JumpUNet(**TINY), student.JumpUNet(**TINY), self.folder()
        args, few = train_args(updates=32, batch_size=16), baseline_solver("DDIM", "quadratic", 4)
        with mock.patch.object(student, "TARGET", few), mock.patch.multiple(
                teacher, LOG_EVERY=8, WARMUP=4), mock.patch.object(
                student, "seeded_noise", wraps=student.seeded_noise) as spy:
            quiet(student.clone, net, ema, TEACHER, args, out, CPU)
        made = student.load_model(out / "student.pt")[1]["provenance"]["teacher_paths"]
        seen = [seed for call in spy.call_args_list for seed in call.args[0]]
        self.assertEqual(seen, [student.CLONE_SEEDS + i for i in range(made)])
        first, *_, last = read_log(out / "log.jsonl")
        self.assertLess(last["loss"], 0.8 * first["loss"])
        self.comes_back(student.load_model(out / "student.pt")[0], ema)

    def test_the_table_is_of_noise_never_trained_on(self):
        net, out = frozen(student.JumpUNet), self.folder(enter=True)
        with mock.patch.object(teacher, "seeded_noise", wraps=teacher.seeded_noise) as spy:
            quiet(student.evaluate, net, TEACHER, 3, out, CPU)
        seeds = [seed for call in spy.call_args_list for seed in call.args[0]]
        self.assertEqual(seeds, [teacher.HELD_OUT + i for i in range(3)])
        self.assertLess(student.CLONE_SEEDS + 10 ** 8, teacher.HELD_OUT)
        z = ddpm.seeded_noise(seeds, (3, 8, 8))
        target = teacher.draw(TEACHER, teacher.TARGET, z, AB)
        row, = (row for row in read_log(out / "log.jsonl") if row["steps"] == 2)
        for name, model in (("student", net), ("teacher", TEACHER)):
            x = ddpm.sample(model, z, ddpm.Solver([1000, 250, 0], [0, 0]), AB).clamp(-1, 1)
            self.close(row[name], (x - target).square().mean())
        self.assertTrue((out / "samples.png").exists())


# ==== reward.py ===============================================================================

class Rewards(Case):
    scales = dict(feature=0.005, perceptual=0.13, mse=0.15, histogram=0.22)

    def view(self, x):
        return reward.view_of(COACH, x)

    def test_no_reward_depends_on_the_batch(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            best, other = (term(self.view(a), self.view(x)) for a in (x, y))
            self.close(best, torch.zeros(5), 1e-6, name)
            self.assertLess(other.max(), -1e-4, name)
            alone = torch.cat([term(self.view(y[i:i + 1]), self.view(x[i:i + 1]))
                               for i in range(5)])
            self.close(other, alone, 1e-5, name)

    def test_gradients_pass_a_frozen_net(self):
        path, net = self.folder() / "coach.pt", reward.Coach()
        save_checkpoint(path, "coach", config=dict(classes=10), weights=net.state_dict(),
                        scales=self.scales)
        coach, content = reward.load_encoder(path, "coach")
        self.comes_back(coach, net)
        for name in reward.TERMS:
            x, made = images(2).requires_grad_(True), reward.Reward(name, coach, content["scales"])
            value, through = made(x, made.view(images(2, seed=1))), name != "histogram"
            self.assertEqual(value.requires_grad, through, name)
            if through:
                self.assertGreater(torch.autograd.grad(value.sum(), x)[0].abs().max(), 1e-6, name)

    def test_every_term_agrees_with_loops(self):
        x, y = images(2), images(2, seed=1)
        a, b = self.view(x), self.view(y)
        for i in range(2):
            f, g = a.features[i], b.features[i]
            layers = [np.mean([((p / p.norm() - q / q.norm()) ** 2).sum().item() for p, q in zip(
                m[i].flatten(1).T, n[i].flatten(1).T)]) for m, n in zip(a.maps, b.maps)]
            counts = [[np.histogram(s[i, c].numpy(), reward.BINS, (-1, 1))[0] + 1.0
                       for c in range(3)] for s in (y, x)]
            kl = np.mean([(p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum()
                          for p, q in zip(*counts)])
            for name, expected in dict(
                    feature=f @ g / (f.norm() * g.norm()) - 1, histogram=-kl,
                    perceptual=-np.mean(layers), mse=-((x[i] - y[i]) ** 2).mean()).items():
                self.close(reward.TERMS[name](a, b)[i], expected, 1e-5, name)

    def test_weights_and_scales_enter_as_written(self):
        x, y = images(3), images(3, seed=1)
        made, raw = reward.Reward("feature:2 + mse", COACH, self.scales), (
            term(self.view(x), self.view(y)) for term in (reward.feature_reward, reward.mse_reward))
        feature, mse = raw
        self.close(made(x, made.view(y)), 2 * feature / 0.005 + mse / 0.15, 1e-3)
        for text, spec in (("'clip'", "clip"), ("named twice", "mse:1+mse:2"), ("much", "mse:much"),
                           ("-1", "mse:-1"), ("nan", "mse:nan")):
            self.assertRaisesRegex(BadInput, text, reward.parse_reward, spec)

    def test_a_view_of_many_targets_is_seen_in_batches_and_its_rows_are_theirs(self):
        x, y, index = images(7), images(4, seed=1), torch.tensor([6, 0, 0, 3])
        made = reward.Reward("+".join(reward.TERMS), COACH, self.scales)
        whole = made.view(x, batch=3)
        for part, of in ((whole, x), (whole.rows(index), x[index]), (whole.rows(slice(2)), x[:2])):
            for a, b in zip(tree_flatten(part)[0], tree_flatten(self.view(of))[0], strict=True):
                self.close(a, b)
        self.close(reward.rewards(made, y, whole, index, batch=3), torch.cat([
            made(y[i:i + 1], self.view(x[j:j + 1])) for i, j in enumerate(index)]), 1e-3)

    def test_more_distortion_means_less_reward(self):
        x = images(8, size=32)
        for kind, name in itertools.product(reward.DISTORTIONS, reward.TERMS):
            term = reward.Reward(name, COACH, self.scales)
            values = [term(reward.distort(x, kind, level, rng()), term.view(x)).mean().item()
                      for level in (0, 0.25, 0.5)]
            self.assertAlmostEqual(values[0], 0, delta=1e-4)
            self.assertTrue(values[0] > values[1] > values[2], (kind, name, values))


class Judging(Case):
    def test_frechet_distance_of_known_gaussians(self):
        m1, m2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        c1, c2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
        self.close(reward.frechet_distance(m1, c1, m2, c2), 4.0 + (1 - 3) ** 2 + (2 - 1) ** 2, 1e-6)
        a, b = randn(200, 5, seed=1).double(), 0.5 * randn(300, 5, seed=2).double() + 1
        (m1, c1), (m2, c2) = reward.moments(a), reward.moments(b)
        cross = torch.linalg.eigvals(c1 @ torch.from_numpy(np.cov(b.numpy().T))).sqrt().real.sum()
        expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross
        self.close(reward.frechet_distance(m1, c1, m2, c2), expected, 1e-6)
        m, c = reward.moments(randn(5, 20))                            # of low rank
        self.close(reward.frechet_distance(m, c, m + 1, c), 20.0, 1e-4)

    def test_a_verdict_is_the_distance_to_the_training_images_moments(self):
        judge, reals, fakes = frozen(reward.Judge, classes=10), images(40, 32), images(20, 32, 1)
        real, fake = judge(reals)[1], judge(fakes)[1]
        self.close(reward.encode(judge, reals, 7), real, 1e-5)
        expected = reward.frechet_distance(*reward.moments(real), *reward.moments(fake))
        self.close(reward.judged(fakes, (judge, reward.moments(real))), expected, 1e-4)
        self.assertGreater(expected, 0.01)


# ==== rl_distill.py ==========================================================================

def by_hand(kind, grid, n_gains=0, K=3):
    """The policy that is a baseline solver."""
    return rl.JumpPolicy(baseline_solver(kind, grid, K), n_gains)


class Watched(torch.optim.SGD):
    """Takes one step, and remembers the last gradients."""

    def step(self):
        group, = self.param_groups
        self.grads, rate = [p.grad.clone() for p in group["params"]], group["lr"]
        super().step()
        group["lr"] = 0 * rate


class LogProbabilities(Case):
    std, mask = torch.tensor([0.05, 0.05, 0.2, 0.2, 0.1]), ddpm.action_mask(3, 3)

    def test_a_draw_is_antithetic_of_the_std_of_its_kind_and_0_where_masked(self):
        policy = randomised(by_hand("DPM++", "uniform", 3), 1, 0.3)
        off = policy.draw(20_000, self.std, rng()) - policy.mean().detach()
        self.close(off[0::2], -off[1::2], 1e-6)
        self.close(off.std(0) / self.std, self.mask.float(), 0.03)
        self.assertEqual(off[:, ~self.mask].abs().max(), 0)
        off = off[0::2, self.mask] / off[:, self.mask].std(0)
        self.close(off.T @ off / len(off), torch.eye(off.shape[1]), 0.05)      # independent

    def test_its_log_density_is_a_gaussians_up_to_a_constant(self):
        u, values, grads = randn(6, 3, 5), [], []
        for policy in (randomised(by_hand("DPM++", "uniform", 3), seed, 0.3) for seed in (1, 2)):
            for logp in (policy.logp(u, self.std), (
                    Normal(policy.mean(), self.std).log_prob(u) * self.mask).sum((1, 2))):
                values.append(logp.detach())
                grads.append(torch.cat(torch.autograd.grad(
                    (logp * torch.arange(6)).sum(), [*policy.parameters()]), 1))
        self.close((values[0] - values[2]) / 100, (values[1] - values[3]) / 100)
        self.close(grads[0] / 1000, grads[1] / 1000)
        self.assertEqual((grads[0] != 0).tolist(), self.mask.tolist())

    def test_that_of_a_landing_is_a_mean_over_dimensions(self):
        a, b, sigma = images(3), images(3, seed=1), torch.tensor([0.1, 0.5, 1.0])
        constant = -(sigma.log() + 0.5 * math.log(2 * math.pi))
        self.close(rl.landing_logp(a, b, sigma), Normal(a, sigma[:, None, None, None]).log_prob(
            b).mean((1, 2, 3)) - constant, 1e-4)


class Deployment(Nets):
    def test_a_policy_starts_at_its_solver_to_the_bit_and_with_std_0_stays_there(self):
        z, rows = noise(2), torch.tensor([0, 0, 1, 1])
        for kind, grid, (net, K) in itertools.product(ddpm.SOLVERS, ddpm.GRIDS, (
                (self.net, 1), (self.net, 3), (self.first, 2), (Toy(), 64))):
            start, n = baseline_solver(kind, grid, K), len(net.branches)
            policy, end = rl.JumpPolicy(start, n), ddpm.sample(net, z, start, AB)
            self.assertEqual(policy.solver(), (*start[:2], [[0.0] * n] * K), (kind, grid, K))
            self.close(ddpm.sample(net, z, policy.solver(), AB), end, 0)
            u = randomised(policy, 3, 0.3).draw(4, torch.zeros(2 + n), rng())
            drawn, mean = (ddpm.sample(net, z[rows], solver, AB) for solver in (
                ddpm.solver_of(u), policy.solver()))
            self.close(drawn, mean, 0)
            self.assertGreater((mean[::2] - end).abs().max(), 1e-3)

    def test_a_rollout_that_adds_no_noise_is_the_deployment_to_the_bit(self):
        self.patch(rl, SIGMA_FLOOR=1e-30)
        for net, K in itertools.product((self.net, self.first), (1, 3)):
            solver = randomised(by_hand("AB2", "logsnr", len(net.branches), K), 3, 0.3).solver()
            end = teacher.draw(net, solver, noise(3), AB).repeat_interleave(4, 0)
            for eta, tol in ((0.0, 0), (1e-7, 1e-4)):
                x, landings = rl.rollout(net, solver, noise(3), 4, eta, AB, rng())
                self.close(x, end, tol)
                self.assertEqual(len(landings), K if eta else 1)

    def test_the_best_grid_of_each_kind_is_found_and_the_best_kind_comes_first(self):
        self.patch(teacher, CHUNK=dict(cpu=4))
        for seed in range(2):
            target, scores = plain(images(6, seed=seed)), {}
            for pair in itertools.product(ddpm.SOLVERS, ddpm.GRIDS):
                solver = baseline_solver(*pair, 3)
                x = ddpm.sample(self.net, noise(6), solver, AB).clamp(-1, 1)
                made, R = reward.deploy(self.net, solver, noise(6), target, minus_mse, AB)
                self.close(made, x)
                self.close(R, minus_mse(x, target))
                scores[pair] = R.mean().item()
            found = reward.best_baselines(self.net, 3, noise(6), target, minus_mse, AB)
            best = [max((p for p in scores if p[0] == k), key=scores.get) for k in ddpm.SOLVERS]
            self.assertEqual([(kind, *rest) for kind, rest in found.items()], [
                (kind, grid, baseline_solver(kind, grid, 3))
                for kind, grid in sorted(best, key=scores.get, reverse=True)])
        self.assertEqual([ddpm.baseline_kinds(net, K) for net, K in (
            (self.net, 2), (self.net, 1), (self.first, 3))], [ddpm.SOLVERS, ("DDIM",), ("DDIM",)])


class Advantages(Case):
    reward = randn(24) + torch.arange(24) // 4 * 10

    def test_they_are_centred_by_group_and_scaled_by_batch(self):
        for group in (2, 4, 24):
            groups = self.reward.reshape(-1, group).tolist()
            centred = [x - np.mean(g) for g in groups for x in g]
            self.close(rl.advantages(self.reward, group), np.array(centred) / np.std(centred), 1e-4)
        for shift in (5, 7 * (torch.arange(24) < 4)):                  # all, or one group alone
            self.close(rl.advantages(self.reward + shift, 4), rl.advantages(self.reward, 4), 1e-4)

    def test_ties_give_exactly_0_and_tiny_rewards_that_differ_do_not(self):
        flat = torch.full((8,), -0.7) + 2e-7 * randn(8)
        mixed = torch.cat([flat[:4], torch.tensor([0.0, 1, 2, 3])])
        for (tied, group), size in itertools.product(
                ((flat, 2), (flat, 8), (torch.zeros(8), 4), (mixed, 4)), (1, 1e-9)):
            self.close(rl.advantages(size * tied, group)[:4], torch.zeros(4), 0)
        for size in (1e-9, 1e6):
            self.close(rl.advantages(size * self.reward, 4), rl.advantages(self.reward, 4), 1e-4)


class Surrogate(Case):
    adv, old = torch.tensor([1.0, 1, 1, -1, -1, -1]), torch.zeros(6)
    logp = torch.tensor([-0.5, 0.0, 0.5, -0.5, 0.0, 0.5])

    def gradient(self, old, clip_range):
        logp = self.logp.clone().requires_grad_(True)
        rl.clipped_surrogate(logp, old, self.adv, clip_range)[0].sum().backward()
        return logp.grad

    def test_it_is_eq_7_and_the_policy_gradient_without_a_clip_range(self):
        loss, ratio = rl.clipped_surrogate(self.logp, self.old, self.adv, 0.2)
        self.close(ratio, self.logp.exp(), 1e-6)
        self.close(loss, [-math.exp(-0.5), -1, -1.2, 0.8, 1, math.exp(0.5)], 1e-6)
        self.assertEqual((self.gradient(self.old, 0.2) != 0).tolist(), [1, 1, 0, 0, 1, 1])
        self.close(self.gradient(self.logp, 0.2), -self.adv, 1e-6)
        self.close(self.gradient(self.old, math.inf), -self.adv * self.logp.exp(), 1e-6)
        far, ratio = rl.clipped_surrogate(200 * self.logp, self.old, self.adv, 0.2)
        self.assertTrue(far.isfinite().all() and ratio.isfinite().all() and far[5] > 1e6)

    def agree(self, pairs, signal):
        """Of independent (estimate, exact): equal within 4 standard errors, and not by being 0."""
        got, exact = (torch.stack(values).double() for values in zip(*pairs))
        error = (got - exact).std(0) / math.sqrt(len(got))
        self.assertLess(((got - exact).mean(0) / error).abs().max(), 4)
        self.assertGreater((exact.mean(0) / error).abs().max(), signal)

    def test_an_update_of_the_jumps_goes_along_the_pathwise_gradient(self):
        """Images that are linear in the gains, -|s u - c|^2 as reward: d/du is -2 s (s u - c)."""
        policy, s, z, pairs = by_hand("DDIM", "uniform", 4), 0.2, torch.zeros(250, 3, 1, 1), []
        c, std = 0.1 * randn(3, 4, 1, seed=1), torch.tensor([0.05] * 2 + [0.1] * 4)
        self.patch(rl, solver_of=lambda u: u, sample=lambda net, z, u, ab: s * u[:, :, 2:, None])
        policy.gains.data = 0.3 * randn(3, 4, seed=2)
        exact, args, g = -2 * s * (s * policy.gains.data - c[..., 0]), flags(group=2), rng()
        for _ in range(40):
            optimizer = Watched([policy.gains], lr=0.0)
            R, *_ = rl.update_jumps(None, policy, z, plain(z), lambda x, target: -(x - c).square(
                ).sum((1, 2, 3)), optimizer, args, std, AB, g)
            rms = (R - R.reshape(-1, 2).mean(1).repeat_interleave(2)).square().mean().sqrt()
            pairs.append((-rms * optimizer.grads[0], exact))
        self.agree(pairs, 50)

    def test_the_scores_of_one_landing_and_of_two_are_the_pathwise_gradient(self):
        """Linear toy, quadratic reward, no leans: x0_last is no action. The mean of a group is a
        baseline without bias but for G / (G - 1), since its copies are independent."""
        self.patch(rl, SIGMA_FLOOR=0.3)
        for K, eta, group in ((1, 0.0, 2), (2, 0.6, 2), (2, 0.6, 4)):
            net, solver, pairs, g = Toy(0.5, 0.3), baseline_solver("DDIM", "uniform", K), [], rng(1)
            for i in range(60):
                z = randn(200, 3, 2, 2, seed=i)
                _, landings = rl.rollout(net, solver, z, group, eta, AB, g)
                self.assertEqual(len(landings), K)
                R = -(landings[-1][1] - 0.3).square().sum((1, 2, 3)).reshape(-1, group)
                A, score = (R - R.mean(1, keepdim=True)).flatten(), 0
                x = z.repeat_interleave(group, 0)
                for state, x_next, sigma, _ in landings:
                    mean = ddpm.step(net, *state, AB, eta)[0]
                    mean = mean.repeat_interleave(len(x_next) // len(mean), 0)
                    score = score + 12 * (A * rl.landing_logp(mean, x_next, sigma)).mean()
                    t, t_next = (full(len(x), time[0]) for time in state[2:4])
                    x0_hat = ddpm.estimate(net, x, t, t_next, None, AB)
                    x = ddpm.jump(x, x0_hat, t, t_next, AB, eta=eta)[0] + (x_next - mean).detach()
                exact = -(x - 0.3).square().sum((1, 2, 3)).mean()      # through all of the path
                pairs.append([torch.stack(torch.autograd.grad(y, [net.w, net.b])) for y in (
                    score * group / (group - 1), exact)])
            self.agree(pairs, 15)


def flags(**more):
    return types.SimpleNamespace(**{"group": 4, "eta": 0.0, "epochs": 1, **more})


class Loop(Nets):
    passes = [("jumps", 0.0, 1), ("jumps", 0.0, 2), ("weights", 0.0, 1), ("weights", 0.3, 1)]

    def update(self, learn, net, eta=0.0, z=None, lr=0.0, epochs=1, group=4):
        """An update from DPM++ on uniform times, in fp32. Returns what is in it."""
        z, n = noise(3) if z is None else z, len(net.branches)
        policy, target = by_hand("DPM++", "uniform", n), plain(images(3, z.shape[-1], 5))
        learns, std = policy if learn == "jumps" else net.requires_grad_(True), torch.tensor(
            [0.05] * 2 + [0.1] * n)
        optimizer, args, spied = Watched(learns.parameters(), lr), flags(
            group=group, eta=eta, epochs=epochs), []

        def spy(real):
            return lambda *a: spied.append(real(*a)) or spied[0]
        with mock.patch.multiple(rl, rollout=spy(rl.rollout), autocast=contextlib.nullcontext), \
                mock.patch.object(rl.JumpPolicy, "draw", spy(rl.JumpPolicy.draw)):
            R, *ratios = (
                rl.update_jumps(net, policy, z, target, minus_mse, optimizer, args, std, AB, rng())
                if learn == "jumps" else rl.update_weights(
                    net, policy.solver(), z, target, minus_mse, optimizer, args, AB, rng()))
        return types.SimpleNamespace(policy=policy, learns=learns, std=std, z=z, drawn=spied[0],
                                     R=R, ratios=ratios, grads=optimizer.grads)

    def means(self, old, net, solver, landings, z, eta, group=4):
        """Where net is expected to land, and with what spread, from the states of `old`: every copy
        is evaluated, from its noise on."""
        x, last, landings = z.repeat_interleave(group, 0), None, iter(landings)
        for t, t_next, lean in zip(*(torch.tensor(part).expand(len(x), -1).T for part in (
                solver.times[:-1], solver.times[1:], solver.leans))):
            means = []
            for some in (old, net):
                x0_hat = ddpm.estimate(some, x, t, t_next, None, AB)
                means.append((*ddpm.jump(x, x0_hat, t, t_next, AB, lean,
                                         x0_hat if last is None else last, eta), x0_hat.detach()))
            (x, sigma, last), (mean, *_) = means
            x = x.detach()
            if eta > 0 or t_next[0] == 0:
                yield mean, sigma if sigma.any() else full(len(x), rl.SIGMA_FLOOR)
                x = next(landings)[1]

    def train(self, net, *words, scale=1.0, score=minus_mse, start=None):
        """The real train() on toys, each noise its own target. Returns (Solver, log, folder)."""
        args, out, z = rl.parse_args(["--steps", "3", *words]), self.folder(), scale * noise(6, 2)
        start = start or baseline_solver("DDIM", "quadratic", 3)
        (solver, _), _ = quiet(rl.train, net, start, (z, plain(z)), (z, plain(z)), score, args, out)
        return solver, read_log(out / "log.jsonl"), out

    def test_each_epochs_gradient_is_that_of_eq_7_row_by_row(self):
        """Against torch.distributions, every copy evaluated. The first is REINFORCE's."""
        for (learn, eta, last), old in itertools.product(self.passes, (self.net, self.first)):
            net, mask, pairs = copy.deepcopy(old), ddpm.action_mask(3, len(old.branches)), []
            clip = rl.CLIP_JUMPS if learn == "jumps" else rl.CLIP_LANDING
            it = self.update(learn, net, eta, lr=1e-3 if last == 2 else 0.0, epochs=last)
            if learn == "jumps":
                policies = it.policy, by_hand("DPM++", "uniform", len(net.branches))
                pairs = [(*((Normal(policy.mean(), it.std).log_prob(it.drawn) * mask).sum((1, 2))
                            for policy in policies), 1)]
            else:
                solver, (x, landings) = by_hand("DPM++", "uniform").solver(), it.drawn
                now, then = ([*self.means(old, some, solver, landings, it.z, eta)]
                             for some in (net, old))
                weigh = np.mean([sigma.mean() for _, sigma in then])
                for (mean, _), (start, sigma), (_, x_next, its, _) in zip(
                        now, then, landings, strict=True):
                    wide = sigma[:, None, None, None]
                    self.close(its, sigma, 1e-6)
                    self.close(((x_next - start.detach()) / wide).std(), 1.0, 0.06)
                    pairs.append((*(Normal(m, wide).log_prob(x_next).mean((1, 2, 3))
                                    for m in (mean, start)), sigma / weigh))
                self.close(x, x_next.clamp(-1, 1), 0)
            adv, ratios, total = rl.advantages(it.R, 4), [], 0
            for logp, logp_old, weight in pairs:
                ratio = (logp - logp_old.detach()).exp()
                inside = ratio.clamp(1 - clip, 1 + clip)
                total = total - (torch.minimum(ratio * adv, inside * adv) * weight).mean()
                ratios.append(ratio.detach())
            most = max((r - 1).abs().max().item() for r in (*it.ratios, *ratios) if r is not None)
            self.close(torch.cat(ratios), it.ratios[last - 1], most / 100, (learn, eta))
            self.close(it.ratios[0], torch.ones(12 * len(pairs)), 1e-6, (learn, eta))
            out = ((torch.cat(ratios) - 1).abs() > clip).float().mean()
            self.assertTrue(0.05 < out < 0.95 if last == 2 else out == 0, (learn, eta, out))
            exact = torch.autograd.grad(total / len(pairs), [*it.learns.parameters()])
            size = max(g.abs().max().item() for g in exact)
            self.assertGreater(size, 1e-4)
            for g, got, (name, _) in zip(exact, it.grads, it.learns.named_parameters()):
                self.close(got / size, g / size, 2e-3, (learn, eta, last, name))
                if learn == "jumps":             # every entry that acts has one, and no other
                    acts = mask[:, :2] if name == "jumps" else mask[:, 2:]
                    self.assertEqual((got != 0).tolist(), acts.tolist())
                else:
                    self.assertGreater(got.abs().max() / size, 1e-7, name)

    def test_it_finds_the_optimum_of_a_known_reward(self):
        """The first landing must move to 300, the second lean to 0.7, a gain to -0.4."""
        policy, g, z, std = by_hand("DDIM", "uniform", 1), rng(), noise(4, 1), full(3, 0.1)
        best = torch.tensor([0.3, 0.7, -0.4])
        self.patch(rl, sample=lambda net, z, at, ab: torch.stack([
            at.times[:, 1] / ddpm.T, at.leans[:, 1], at.gains[:, 2, 0]], 1)[..., None, None])
        optimizer = torch.optim.Adam(policy.parameters(), 0.05)
        for _ in range(60):
            rl.update_jumps(None, policy, z, plain(z), lambda x, target: -(x[:, :, 0, 0] - best)
                            .square().sum(1), optimizer, flags(group=8, epochs=2), std, AB, g)
        times, leans, gains = policy.solver()
        self.close([times[1] / ddpm.T, leans[1], gains[2][0]], best, 0.08)

    def test_a_group_shares_a_noise_and_its_target(self):
        """Through real updates. A network that says v = 0 only scales its noise, so each image
        must point where the noise points that its own target is."""
        for learn, eta in (("jumps", "0"), ("weights", "0"), ("weights", "0.01")):
            seen, words = [], ["--group", "4", "--updates", "2", "--learn", learn, "--eta", eta,
                               *["--gains", "none"] * (learn == "jumps")]
            with mock.patch.object(rl, "advantages", mock.Mock(side_effect=rl.advantages)) as adv:
                self.train(Toy(0.0, 0.0), *words, scale=0.3, score=lambda x, y: (
                    seen.append((x, y.images)), minus_mse(x, y))[1])
            self.assertEqual([call[0][1] for call in adv.call_args_list], [4] * 2)
            for x, y in seen:
                self.assertGreater(F.cosine_similarity(x.flatten(1), y.flatten(1)).min(), 0.9)
            groups = [y.reshape(6, 4, 12) for _, y in seen if len(y) == 24]
            self.assertEqual(len(groups), 2)                           # the others: the monitor's
            for y in groups:
                self.assertEqual(len(y[:, 0].unique(dim=0)), 6)
                self.close(y.std(1), torch.zeros(6, 12), 1e-6)

    def test_training_takes_as_many_evaluations_as_it_says(self):
        class Counting(Toy):
            def forward(net, x, *args):
                rows.append(len(x) * (3 if torch.is_grad_enabled() else 1))     # backward is two
                return super().forward(x, *args)
        self.patch(rl, deploy=lambda *args: (None, torch.zeros(1)))              # not the monitor
        for (learn, eta, epochs), K in itertools.product(self.passes, "13"):
            rows, words = [], (f"--learn {learn} --eta {eta} --epochs {epochs} --steps {K} "
                               "--updates 2 --group 4").split()
            self.train(Counting(), *words, start=baseline_solver("DDIM", "uniform", int(K)))
            self.assertEqual(sum(rows), rl.training_evaluations(rl.parse_args(words), 6), words)

    def test_rates_fall_to_0_the_std_to_a_fifth_and_what_is_masked_never_moves(self):
        start = baseline_solver("DPM++", "quadratic", 3)
        for learn, gains, n in (("jumps", "block", 2), ("jumps", "channel", 5),
                                ("weights", "block", 0)):
            def watched(*args, real=getattr(rl, f"update_{learn}")):
                optimizer, = (a for a in args if isinstance(a, torch.optim.Optimizer))
                spied.append(([g["lr"] for g in optimizer.param_groups], args[-3]))
                return real(*args)
            net, spied, jumps = Toy(), [], learn == "jumps"
            self.patch(rl, USUAL_STEPS=4.5)                            # a scale that is not 1
            with mock.patch.object(rl, f"update_{learn}", watched):
                words = f"--learn {learn} --gains {gains} --updates 4 --lr 0.01 --group 4".split()
                solver, _, out = self.train(net, *words, start=start)
            first = torch.tensor([rl.STD["jump"]] * 2 + [rl.STD[gains]] * n)
            scale = 1.5 * rl.CLONED if jumps else 1
            for (rates, std), left in zip(spied, (1, 0.75, 0.5, 0.25), strict=True):
                most = [rl.JUMPS_FASTER, 1] if jumps else [1]
                self.close(rates, [0.01 * scale * rate * left for rate in most], 1e-9)
                if jumps:
                    self.close(std, scale * first * (0.2 + 0.8 * left), 1e-6)
            self.assertEqual([p.item() != q.item() for p, q in zip(
                net.parameters(), Toy().parameters())], [not jumps] * 2)
            learns = load_checkpoint(out / "state.pt", "state")["parts"]["learns"]
            if jumps:
                u = torch.cat([learns["jumps"], learns["gains"]], 1)
                self.assertEqual((u != start.action(n)).tolist(),
                                 ddpm.action_mask(3, n).tolist())
                self.close(solver.leans, [0.0, *learns["jumps"][1:, 1].tolist()], 0)
            else:
                self.assertEqual((solver, {*learns}), (start, {"w", "b"}))

    def test_more_jumps_and_a_clone_explore_less(self):
        for net, share in ((self.net, 1), (self.first, rl.CLONED)):
            for K, most in ((1, 2), (2, 2), (4, 4), (12, 12)):
                n, std, scale = rl.exploration(net, rl.parse_args(["--steps", str(K)]))
                self.close(scale, share * rl.USUAL_STEPS / most, 1e-9)
                self.close(std, scale * torch.tensor([rl.STD["jump"]] * 2 + [rl.STD["block"]] * n))
                self.assertEqual(n, len(net.branches))

    def test_the_log_begins_before_the_first_update_and_no_column_of_it_is_dead(self):
        self.patch(rl, LOG_EVERY=2)
        start, z = baseline_solver("AB2", "uniform", 3), noise(6, 2)
        for learn, lr, eta in (("jumps", "0.1", "0"), ("weights", "0.01", "0.3")):
            first = minus_mse(ddpm.sample(Toy(), z, start, AB).clamp(-1, 1), plain(z)).mean()
            _, rows, _ = self.train(Toy(), "--learn", learn, "--lr", lr, "--eta", eta, "--updates",
                                    "5", "--group", "4", start=start)
            self.assertEqual([row["update"] for row in rows], [0, 2, 4, 5])
            self.close(rows[0]["validation"], first, 1e-6)
            self.assertEqual((rows[0]["times"], rows[0]["leans"]), start[:2])
            self.assertNotIn("batch", rows[0])
            for name in {*rows[-1]} - ({"gains"} if learn == "weights" else set()):
                self.assertTrue(any(tree_flatten([row.get(name, 0) for row in rows])[0]), name)
            self.assertGreater(abs(rows[-1]["validation"] - rows[0]["validation"]), 1e-4)

    def test_the_printed_columns_are_what_they_say(self):
        R, before, after = randn(12), 1 + 1e-3 * randn(12), (0.3 * randn(12, seed=1)).exp()
        expected = dict(batch=np.mean(R.tolist()), std=np.std(R.tolist(), ddof=1),
                        in_group=np.mean([np.std(R[i:i + 4].tolist(), ddof=1) for i in (0, 4, 8)]),
                        ratio_before=max(before.tolist(), key=lambda r: abs(r - 1)),
                        approx_kl=np.mean([r - 1 - math.log(r) for r in after.tolist()]),
                        clipped=np.mean([abs(r - 1) > rl.CLIP_JUMPS for r in after.tolist()]))
        for looked, n in ((after, 6), (None, 4)):                      # none after: of weights
            found = rl.diagnostics(flags().group, R, before, looked)
            self.assertEqual([*found], [*expected][:n])
            self.close([*found.values()], [*expected.values()][:n], 1e-5)


class Results(Case):
    def test_the_printed_table_is_right(self):
        n, g = 40, np.random.default_rng(0)
        common = 3 * g.normal(size=n) - 10                 # hard noises are hard for everybody
        s, rows = {"AB2": common - 1.5 + 0.1 * g.normal(size=n), "DDIM": common - 2.5,
                   "learned": common - 1 + g.normal(size=n), "target": np.zeros(n)}, {}
        for i, (name, x) in enumerate(s.items()):
            rows[name] = reward.Row(name, i + 2, 1234567 * i, i, torch.tensor(x),
                                    rows["AB2"] if name == "learned" else None)
        self.patch(reward, judged=lambda x, judge: judge * (x + 1))
        _, text = quiet(reward.print_table, [*rows.values()], 1.5, path := self.folder() / "r.json")
        table = json.loads(path.read_text(), parse_constant=self.fail)["rows"]
        gain, way, again = s["learned"] - s["AB2"], -s["AB2"], g.integers(n, size=(4000, n))
        share = gain.mean() / way.mean()
        error = np.sqrt(np.sum((gain - share * way) ** 2) / (n - 1) / n) / way.mean()
        bootstrap = np.std([gain[i].mean() / way[i].mean() for i in again])
        self.assertTrue(np.isfinite(reward.closed(*torch.zeros(2, 9))).all())  # starts at the end
        self.close(error / bootstrap, 1.0, 0.1)
        for i, ((name, x), row) in enumerate(zip(s.items(), table, strict=True)):
            spread, end = x.std(ddof=1) / math.sqrt(n), " +"
            numbers = dict(nfe=i + 2, trained=1234567 * i, reward=x.mean(), error=spread,
                           frechet=1.5 * (i + 1))
            if name == "learned":
                numbers.update(closed=share, closed_error=error)
                self.assertEqual(row.pop("start"), "AB2")
                end = rf"{100 * share:.0f}% ± +{100 * error:.0f}% +"
            self.assertEqual((row.pop("name"), {*row}), (name, {*numbers}))
            for key, value in numbers.items():
                self.close(float(row[key]), float(value), 1e-5, (name, key))
            self.assertRegex(text, rf"\n{name} +{i + 2} +{1234567 * i:,d} +-?{abs(x.mean()):.3f} "
                             rf"± {spread:.3f} +{end}{1.5 * (i + 1):.2f}\n")


# ==== MAIN: the tests of the folders run too; the closing line counts ========================

if __name__ == "__main__":
    def load_tests(loader, tests, pattern):
        for path in ("harness/test_harness.py", "harness/test_planted.py",
                     "checkpoints/test_train_encoders.py", "assignments/test_assignments.py",
                     "study/test_study.py"):
            if (HERE / path).exists():
                folder, file = (HERE / path).parent, Path(path).name
                tests.addTests(loader.discover(str(folder), file, str(folder)))
        return tests

    outcome = unittest.main(exit=False, verbosity=2 if "-v" in sys.argv else 1).result
    failed = len(outcome.failures) + len(outcome.errors) + len(outcome.unexpectedSuccesses)
    print(f"{max(0, outcome.testsRun - failed)} passed, {failed} failed")
    sys.exit(1 if failed or not outcome.testsRun else 0)
