"""The specification of the six files, in their order. Test names are sentences.

    python test_all.py              # these, and the tests of harness/, assignments/, study/, ...
    python test_all.py Surrogate    # one class, or one test

Plain unittest; no network, GPU or data set. harness/test_planted.py tests these tests.
"""
import ast
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import types
import unittest
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_flatten

import ddpm
import reward
import rl_distill as rl
import sample
import student
import teacher
from ddpm import hand_solver, seeded_noise
from harness import images as pictures
from harness.checkpoints import half_weights, load_checkpoint, save_checkpoint, save_network
from harness.runs import BadInput, checksum, read_log, run_main

HERE = Path(__file__).resolve().parent
MODULES = [ddpm, teacher, student, reward, rl, sample]
TINY = dict(width=16, mults=[1, 2], blocks=1, attention=[4], dropout=0.0, image_size=8)
CPU, ROWS, AB = torch.device("cpu"), torch.arange(4), ddpm.linear_alpha_bar()


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


class Working(Case):
    """In a temporary folder, with a target of three steps, and tiny checkpoints in `tiny`."""
    tiny = None

    def setUp(self):
        folder = self.folder()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        for module in (teacher, student, rl, sample):
            self.patch(module, TARGET=hand_solver("DDIM", "quadratic", 3))
        if Working.tiny is None:
            Working.keep = tempfile.TemporaryDirectory()
            Working.tiny = Path(Working.keep.name)
            torch.manual_seed(0)
            save_network(self.tiny / "teacher.pt", "teacher", randomised(ddpm.UNet(**TINY)), {})
            first = randomised(student.JumpUNet(**TINY), 1)
            save_network(self.tiny / "student.pt", "student", first, dict(
                teacher=checksum([self.tiny / "teacher.pt"])))
            c, j, x = reward.Coach().eval(), reward.Judge().eval(), images(64)
            mean, covariance = reward.moments(reward.encode(j, x))
            for name, net, more in (
                    ("coach", c, dict(scales=reward.term_scales(c, x))),
                    ("judge", j, dict(mean=mean, covariance=covariance,
                                      features=reward.encode(j, x).half()))):
                save_checkpoint(self.tiny / f"{name}.pt", name, config=dict(classes=10),
                                weights=half_weights(net), provenance={}, **more)
        self.net, self.first = (sample.load_model(self.tiny / f"{name}.pt", CPU)[0]
                                for name in ("teacher", "student"))
        self.words = ["--teacher", f"{self.tiny}/teacher.pt", "--encoders", f"{self.tiny}"]
        self.job = self.words + ["--student", f"{self.tiny}/student.pt", "--smoke"]

    def patch(self, module, **values):
        patcher = mock.patch.multiple(module, **values)
        patcher.start()
        self.addCleanup(patcher.stop)

    def run_main(self, module, *words):
        """Run a script's main on the CPU; returns what it printed."""
        return quiet(module.main, [str(w) for w in words] + ["--device", "cpu"])[1]


def noise(n, size=8):
    return seeded_noise(range(n), (3, size, size))


def by_hand(kind, grid):
    """The policy that is a hand solver of three jumps."""
    return rl.JumpPolicy(hand_solver(kind, grid, 3))


def minus_mse(x, y):
    score = -(x - y).square().mean((1, 2, 3))
    return score, dict(mse=score)


class Toy(torch.nn.Module):
    """Linear network: v = w x + b. Small enough for exact answers."""
    clip = False

    def __init__(self, w=0.2, b=-0.1):
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(torch.tensor(value)) for value in (w, b))

    def forward(self, x, t, t_next=None):
        return self.w * x + self.b


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
        self.close(ddpm.dpm_leans([900, 500, 0]), [0.0, 0.0])
        self.close(ddpm.dpm_leans([900, 500, 1]), [0.0, expected[1]], 1e-3)


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
        for grid in ([1000, 500, 600, 0], [1000, 500, 500, 0], [999, 0, 0], [1000, 9, 1]):
            solver = ddpm.Solver(grid, [0.0] * 3)
            self.assertRaises(ValueError, ddpm.sample, PAIR, randn(2, 1), solver, AB)
        level = torch.logit(AB[ddpm.make_grid("logsnr", 8)[:-1]])          # equal steps in lambda
        self.close(level.diff() / level.diff()[0], torch.ones(7), 0.05)

    def test_samples_have_the_numbers_of_diffusers(self):
        for (kind, name), rows in DIFFUSERS.items():
            for steps, millionths in zip((3, 5, 10, 20, 50), rows):
                solver = ddpm.hand_solver(kind, name, steps)
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
                D = x0 = net.x0(x, full(6, t))
                if h_last and (t_next and kind == "DPM++" or kind == "AB2"):
                    r = h_last / h if kind == "DPM++" else 1
                    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
                x = s_next / s * x - math.sqrt(ab[t_next]) * math.expm1(-h) * D
                x0_last, h_last = x0, h
            out = ddpm.sample(PAIR, x_T.float(), ddpm.hand_solver(kind, name, steps), AB)
            self.close(out, x, 1e-5, (kind, name, steps))

    def test_solvers_converge_to_the_flow_of_a_gaussian_with_their_order(self):
        x_T = randn(200, 2)
        exact = ddpm.gaussian_flow(x_T, self.mean, 0.3, AB)
        for kind, name, counts, rate in (("DDIM", "uniform", (10, 100, 1000), 5),
                                         ("DPM++", "logsnr", (16, 32, 64), 3),
                                         ("AB2", "logsnr", (16, 32, 64), 3)):
            e = [(ddpm.sample(self.gaussian, x_T, ddpm.hand_solver(kind, name, k), AB)
                  - exact).square().mean().sqrt().item() for k in counts]
            self.assertTrue(e[0] > rate * e[1] > rate ** 2 * e[2] and e[2] < 0.01, e)

    def test_with_eta_1_every_jump_adds_the_noise_of_its_seed(self):
        x, solver, t = randn(4, 2), ddpm.hand_solver("DDIM", "uniform", 2), full(4, 500)
        end = ddpm.sample(self.gaussian, x, solver, AB, 1.0, seeds=range(4))
        mean, sigma = ddpm.jump(x, self.gaussian.x0(x, 2 * t), 2 * t, t, AB, eta=1.0)
        x = mean + sigma[:, None] * ddpm.seeded_noise(range(4), (2,), stream=1)
        self.close(end, self.gaussian.x0(x, t))

    def test_noise_depends_on_its_seed_and_stream_alone(self):
        a, b = ddpm.seeded_noise([3, 4, 5], (3, 8, 8)), ddpm.seeded_noise([5], (3, 8, 8))
        self.close(a[2], b[0], 0)
        for noise in (a[0], *ddpm.seeded_noise([4, 5], (3, 8, 8), stream=1)):
            self.assertGreater((noise - b[0]).abs().max(), 0.5)

    def test_the_last_jump_has_no_noise_the_first_no_lean(self):
        ends = [ddpm.sample(self.gaussian, randn(2, 2), ddpm.Solver([1000, 0], [lean]), AB, eta, s)
                for lean, eta, s in ((0.0, 0.0, None), (0.0, 1.0, [3, 4]), (5.0, 0.0, None))]
        self.close(torch.stack(ends[1:]), torch.stack([ends[0]] * 2), 0)

    def test_estimates_of_images_stay_in_range(self):
        x, t, v = 3 * randn(3, 3, 8, 8), torch.tensor([1, 400, 1000]), randn(3, 3, 8, 8, seed=1)
        free = ab4(t).sqrt() * x - (1 - ab4(t)).sqrt() * v
        for kind, expected in ((student.JumpUNet, free), (ddpm.UNet, free.clamp(-1, 1))):
            self.close(ddpm.estimate(kind(**TINY), x, t, v, AB), expected)

    def test_only_the_states_asked_for_are_kept(self):
        alive, most = weakref.WeakValueDictionary(), []

        def net(x, t, t_next):
            alive[t[0].item()] = x
            most.append(len(alive))
            return 0.1 * x
        net.clip = False
        x_T, solver = randn(2, 2), ddpm.hand_solver("DDIM", "uniform", 1000)
        kept = ddpm.sample(net, x_T, solver, AB, keep=[0, 500, 1000])
        self.assertLess(max(most), 8)
        every = ddpm.sample(net, x_T, solver, AB, keep=range(1001))
        self.close(torch.stack(kept), torch.stack([x_T, every[500], every[1000]]), 0)
        self.close(ddpm.sample(net, x_T, solver, AB), kept[2], 0)


class Network(Case):
    def test_the_papers_has_35_7_million_parameters(self):
        with torch.device("meta"):
            self.assertEqual(ddpm.parameter_count(ddpm.UNet(**ddpm.PAPER_UNET)), 35_746_307)
        self.assertRaises(ValueError, ddpm.UNet, **{**TINY, "width": 10 ** 9})

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
        self.close(net.x0(x, full(1, t))[0], x0, 0.01)
        self.close(net(x, full(1, t))[0], a.sqrt() * eps - (1 - a).sqrt() * x0, 0.01)


# ==== teacher.py ==============================================================================

def train_args(**more):
    return types.SimpleNamespace(**{**vars(student.parse_args(["--smoke"])), "lr": 4e-3, **more})


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


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
        with mock.patch.object(teacher, "chunk_size", lambda device: 2):
            self.close(teacher.draw(TEACHER, teacher.TARGET, z, AB), fifty, 1e-4)
        teacher.save_samples(path, TEACHER, CPU, n=2)
        self.assertTrue(torch.equal(before, torch.get_rng_state()) and path.exists())

    def test_algorithm_1_lowers_the_loss_on_one_image(self):
        out, args = self.folder(), train_args(updates=40, batch_size=16)
        torch.manual_seed(0)
        net, ema = ddpm.UNet(**TINY), ddpm.UNet(**TINY)
        with mock.patch.multiple(teacher, LOG_EVERY=8, WARMUP=4,
                                 TARGET=ddpm.hand_solver("DDIM", "uniform", 2)):
            quiet(teacher.train, net, ema, (images(1) * 127.5 + 127.5).byte(), args, out, CPU)
        self.assertLess(losses(out)[-1], 0.7 * losses(out)[0])
        self.comes_back(teacher.load_teacher(out / "teacher.pt")[0], ema)


# ==== student.py ==============================================================================

class Cloning(Case):
    @classmethod
    def setUpClass(cls):
        cls.z = ddpm.seeded_noise(range(4), (3, 8, 8))
        cls.paths = student.teacher_paths(TEACHER, cls.z, AB)

    def by_heart(self):
        """A student that knows the teacher's paths: it lands on them, whatever t_next."""
        class Cheat(student.JumpUNet):
            def forward(net, x, t, t_next):
                return student.secant_velocity(
                    x, student.state_at(self.paths, ROWS, t_next, AB), t, t_next, AB)
        return Cheat(**TINY)

    def test_a_secant_jump_lands_where_it_should(self):
        x, y = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
        t, t_next = torch.tensor([1000, 900, 500, 20]), torch.tensor([0, 100, 490, 0])
        v = student.secant_velocity(x, y, t, t_next, AB)
        self.close(ddpm.jump(x, ddpm.x0_and_eps(x, t, v, AB)[0], t, t_next, AB)[0], y, 1e-3)

    def test_a_copied_teacher_is_the_teacher(self):
        copied = student.student_from_teacher(TEACHER)
        with mock.patch.object(TEACHER, "clip", False):           # as the student
            for solver in (ddpm.hand_solver("DDIM", name, 4) for name in ddpm.GRIDS):
                self.close(ddpm.sample(copied, self.z, solver, AB),
                           ddpm.sample(TEACHER, self.z, solver, AB))
        copied(self.z, full(4, 500), full(4, 200)).square().sum().backward()
        self.assertGreater(copied.jump_mlp[-1].weight.grad.abs().max(), 1e-6)

    def test_states_between_the_paths_own_are_ddims(self):
        ends = torch.stack([self.z, teacher.draw(TEACHER, teacher.TARGET, self.z, AB)], 1)
        self.close(self.paths[:, [0, -1]], ends, 0)
        for target in (teacher.TARGET, ddpm.hand_solver("DDIM", "uniform", 50)):
            with mock.patch.object(student, "TARGET", target):
                paths = student.teacher_paths(TEACHER, self.z, AB)
                for k in torch.tensor([[0, 5, 25, 30], [50, 49, 1, 2]]):       # one for each image
                    x, t = paths[ROWS, k], torch.tensor(target.grid)[k]
                    self.close(student.state_at(paths, ROWS, t, AB), x)
                x, t = (v[ROWS, [0, 5, 25, 30]] for v in (paths, torch.tensor([target.grid] * 4)))
                t_mid = t - torch.tensor([10, 3, 2, 6])
                x0_hat = ddpm.estimate(TEACHER, x, t, TEACHER(x, t), AB)
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
            solver = ddpm.hand_solver("DDIM", "uniform", steps)
            self.close(ddpm.sample(self.by_heart(), self.z, solver, AB), self.paths[:, -1], 1e-4)

    def test_the_pool_keeps_the_newest_paths(self):
        with mock.patch.object(student, "TARGET", ddpm.hand_solver("DDIM", "quadratic", 4)):
            pool, again = (student.PathPool(TEACHER, 8, AB, CPU) for _ in range(2))
            pool.grow(3)
            self.assertEqual({*pool.draw(50, rng()).tolist()}, {0, 1, 2, 3})
            pool.grow(10)
            again.load_state_dict(dict(made=10))
            for newest in ([8, 9, *range(2, 8)], [*range(8, 12), *range(4, 8)]):
                seeds = student.CLONE_SEEDS + torch.tensor(newest)
                self.close(pool.paths[:, 0], ddpm.seeded_noise(seeds, (3, 8, 8)), 0)
                self.assertTrue(torch.equal(pool.paths, again.paths))
                pool.grow(12)
                again.grow(12)
        self.assertEqual(pool.state_dict(), dict(made=12))

    def test_cloning_lowers_its_loss_and_uses_its_own_seeds(self):
        torch.manual_seed(0)
        net, ema, out = student.JumpUNet(**TINY), student.JumpUNet(**TINY), self.folder()
        args, few = train_args(updates=32, batch_size=16), ddpm.hand_solver("DDIM", "quadratic", 4)
        with mock.patch.multiple(student, LOG_EVERY=8, TARGET=few), mock.patch.object(
                teacher, "WARMUP", 4), mock.patch.object(
                student, "seeded_noise", wraps=student.seeded_noise) as spy:
            (_, made), _ = quiet(student.clone, net, ema, TEACHER, args, out, CPU)
        seen = [seed for call in spy.call_args_list for seed in call.args[0]]
        self.assertEqual(seen, [student.CLONE_SEEDS + i for i in range(made)])
        self.assertLess(losses(out)[-1], 0.8 * losses(out)[0])
        self.comes_back(student.load_student(out / "student.pt")[0], ema)

    def test_the_table_is_of_noise_never_trained_on(self):
        net = frozen(student.JumpUNet)
        with mock.patch.object(teacher, "seeded_noise", wraps=teacher.seeded_noise) as spy:
            rows, pictures = student.evaluate(net, TEACHER, 3, AB, CPU)
        seeds = [seed for call in spy.call_args_list for seed in call.args[0]]
        self.assertEqual(seeds, [teacher.HELD_OUT + i for i in range(3)])
        self.assertLess(student.CLONE_SEEDS + 10 ** 8, teacher.HELD_OUT)
        z = ddpm.seeded_noise(seeds, (3, 8, 8))
        target = teacher.draw(TEACHER, teacher.TARGET, z, AB)
        self.close(pictures[:3], target, 0)
        for name, model, t in (("student uniform", net, 500), ("teacher quadratic", TEACHER, 250)):
            x = ddpm.sample(model, z, ddpm.Solver([1000, t, 0], [0, 0]), AB).clamp(-1, 1)
            self.close(rows[1][name], (x - target).square().mean())


# ==== reward.py ===============================================================================

class Rewards(Case):
    scales = dict(feature=0.005, perceptual=0.13, mse=0.15, histogram=0.22)

    def view(self, x):
        return reward.look(COACH, x)

    def test_no_reward_depends_on_the_batch(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            best, other = (term.function(self.view(a), self.view(x)) for a in (x, y))
            self.close(best, full(5, float(term.best)), 1e-5, name)
            self.assertTrue((other < term.best).all(), name)
            alone = torch.cat([term.function(self.view(y[i:i + 1]), self.view(x[i:i + 1]))
                               for i in range(5)])
            self.close(other, alone, 1e-5, name)

    def test_gradients_pass_a_frozen_net(self):
        path, net = self.folder() / "coach.pt", reward.Coach()
        save_checkpoint(path, "coach", config=dict(classes=10), weights=half_weights(net),
                        scales=self.scales)
        coach, content = reward.load_encoder(path, "coach")
        self.comes_back(coach, net)
        for name in reward.TERMS:
            x, made = images(2).requires_grad_(True), reward.Reward(name, coach, content["scales"])
            value, through = made(x, images(2, seed=1))[0], name != "histogram"
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
            for name, expected in (("feature", f @ g / (f.norm() * g.norm())), ("histogram", -kl),
                                   ("perceptual", -np.mean(layers)),
                                   ("mse", -((x[i] - y[i]) ** 2).mean())):
                self.close(reward.TERMS[name].function(a, b)[i], expected, 1e-5, name)

    def test_weights_and_scales_enter_as_written(self):
        x, y = images(3), images(3, seed=1)
        total, raw = reward.Reward("feature:2 + mse", COACH, self.scales)(x, y)
        self.close(total, 2 * (raw["feature"] - 1) / 0.005 + raw["mse"] / 0.15, 1e-3)
        self.close(raw["mse"], reward.mse_reward(self.view(x), self.view(y)), 0)
        for text, spec in (("'clip'", "clip"), ("named twice", "mse:1+mse:2"), ("much", "mse:much"),
                           ("-1", "mse:-1"), ("nan", "mse:nan")):
            self.assertRaisesRegex(BadInput, text, reward.parse_reward, spec)

    def test_more_distortion_means_less_reward(self):
        x = images(8, size=32)
        for kind, name in itertools.product(reward.DISTORTIONS, reward.TERMS):
            term = reward.Reward(name, COACH, self.scales)
            values = [term(reward.distort(x, kind, level, rng()), x)[0].mean().item()
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

    def test_precision_and_recall_agree_with_loops(self):
        real, fake, k = randn(30, 2, seed=1), randn(25, 2, seed=2) + 0.7, 3
        across, *own = ([[(p - q).norm().item() for q in b] for p in a]
                        for a, b in ((fake, real), (real, real), (fake, fake)))
        r_real, r_fake = ([sorted(row)[k] for row in table] for table in own)
        hits = [[d <= r for d, r in zip(row, r_real)] for row in across]
        got = reward.precision_recall(real, fake, k)
        self.close([got[name] for name in ("precision", "density", "recall", "coverage")], [
            np.mean([any(row) for row in hits]), np.sum(hits) / (k * 25),
            np.mean([any(d <= r for d, r in zip(c, r_fake)) for c in zip(*across)]),
            np.mean([min(c) <= r for c, r in zip(zip(*across), r_real)])])

    def test_a_verdict_is_made_of_its_parts(self):
        judge, reals = frozen(reward.Judge, classes=10), images(40, 32)
        real, fake = judge(reals)[1], judge(images(20, 32, seed=1))[1]
        file = dict(zip(("mean", "covariance"), reward.moments(real)), features=real.half())
        self.close(reward.encode(judge, reals, 7), real, 1e-5)
        expected = dict(
            frechet=reward.frechet_distance(*reward.moments(real), *reward.moments(fake)),
            **reward.precision_recall(file["features"].float(), fake, reward.NEIGHBOURS))
        got = reward.judged(images(20, 32, seed=1), judge, file)
        self.close([got[name] for name in expected], [*expected.values()], 1e-4)


# ==== rl_distill.py ==========================================================================

class LogProbabilities(Case):
    def test_a_decision_is_a_gaussian_of_what_acts(self):
        mean, u = randn(2, 5, 2)
        for k, K, acts in ((0, 1, [0, 0]), (0, 3, [1, 0]), (1, 3, [1, 1]), (2, 3, [0, 1])):
            self.assertEqual(rl.acting(k, K).tolist(), acts)
            self.close(rl.jump_logp(mean, u, 0.3, torch.tensor(acts)),
                       (Normal(mean, 0.3).log_prob(u) * torch.tensor(acts)).sum(1), 1e-4)

    def test_a_landing_and_its_kl_are_gaussian_and_averaged_over_dimensions(self):
        a, b, sigma = images(3), images(3, seed=1), torch.tensor([0.1, 0.5, 1.0])
        one, other = (Normal(x, sigma[:, None, None, None]) for x in (a, b))
        constant = -(sigma.log() + 0.5 * math.log(2 * math.pi))
        self.close(rl.pixel_logp(a, b, sigma), one.log_prob(b).mean((1, 2, 3)) - constant, 1e-4)
        self.close(rl.gaussian_kl(a, b, sigma), kl_divergence(one, other).mean((1, 2, 3)), 1e-4)


class Deployment(Working):
    def test_landing_leaves_room_and_ends_at_0(self):
        logit = torch.cat([torch.tensor([-200.0, -5, 0, 5, 200]), 3 * randn(200)])
        for K in (1, 2, 5, 64):
            t = full(len(logit), ddpm.T)
            for n in range(K, 0, -1):
                then, rho_t = rl.next_time(t, logit, n), (torch.sigmoid(logit) * t).tolist()
                self.assertEqual(then.tolist(), [max(min(round(r), s - 1), n - 1) * (n > 1)
                                                 for r, s in zip(rho_t, t.tolist())])
                self.assertTrue((then < t).all() and (then >= n - 1).all())
                t = then

    def test_the_policy_starts_at_the_hand_solver_exactly(self):
        z, ends, cases = noise(2), {}, [(self.net, 1), (self.net, 2), (self.net, 5),
                                        (self.first, 3), (Toy(), 64)]
        for kind, grid, (net, K) in itertools.product(ddpm.SOLVERS, ddpm.GRIDS, cases):
            solver = hand_solver(kind, grid, K)
            policy = rl.JumpPolicy(solver)
            x, jumps = rl.rollout(net, policy, z, AB)
            ends[kind, grid, K] = ddpm.sample(net, z, solver, AB).clamp(-1, 1)
            self.close(x, ends[kind, grid, K], 1e-6, (kind, grid, K))
            self.assertEqual(policy.solver().grid, solver.grid)
            self.assertEqual([j.t.tolist() for j in jumps], [[t] * 2 for t in solver.grid[:-1]])
            self.close(policy.solver().leans, solver.leans, 0)
            row = rl.deployed(net, solver, z, z, minus_mse, AB)
            self.close(row["images"], x, 1e-6)
            self.close(row["reward"], minus_mse(x, z)[0], 1e-6)
        ddim, dpm, ab2 = (ends[kind, "uniform", 5] for kind in ddpm.SOLVERS)
        for other in (dpm, ab2):
            self.assertGreater((ddim - other).abs().max(), 1e-3)

    def test_a_rollout_that_does_not_explore_is_the_policys_solver_to_the_bit(self):
        for net in self.net, self.first:
            policy, z = randomised(by_hand("AB2", "logsnr"), 3, 0.5), noise(4)
            x, solver = rl.rollout(net, policy, z, AB)[0], policy.solver()
            self.assertNotEqual(solver.grid, hand_solver("AB2", "logsnr", 3).grid)
            self.assertEqual(solver.leans[0], 0)
            self.close(x, rl.deployed(net, solver, z, z, minus_mse, AB)["images"], 0)

    def test_a_very_sharp_policy_is_the_deployment(self):
        z, policy = noise(4), by_hand("DPM++", "uniform")
        x, jumps = rl.rollout(self.net, policy, z, AB, std=0.5, eta=1.0)
        self.close(x, ddpm.sample(self.net, z, hand_solver("DPM++", "uniform", 3), AB), 1e-6)
        for j in jumps:
            self.assertEqual((j.logp, j.logp_pixels, j.sigma.max().item()), (None, None, 0))
        self.patch(rl, SIGMA_FLOOR=1e-6)
        for channel, eta in (("jump", 0.0), ("pixels", 0.0), ("pixels", 1e-6)):
            sharp, _ = rl.rollout(self.net, policy, z, AB, channel, 4, 1e-6, eta, rng())
            self.close(sharp, x.repeat_interleave(4, 0), 1e-4, (channel, eta))

    def test_hand_solvers_come_with_their_best_grid_and_the_best_one_first(self):
        z = noise(6)
        self.patch(teacher, chunk_size=lambda device: 4)
        for seed in range(2):
            target, scores = images(6, seed=seed), {}
            for kind, grid in itertools.product(ddpm.SOLVERS, ddpm.GRIDS):
                x = ddpm.sample(self.net, z, hand_solver(kind, grid, 3), AB)
                scores[f"{kind} {grid}"] = minus_mse(x, target)[0].mean().item()
            found = rl.best_by_hand(self.net, 3, z, target, minus_mse, AB)
            expected = [max((name for name in scores if name.startswith(kind)), key=scores.get)
                        for kind in ddpm.SOLVERS]
            self.assertEqual(list(found), sorted(expected, key=scores.get, reverse=True))
            for name, solver in found.items():
                self.assertEqual(solver, hand_solver(*name.split(), 3))
        self.assertEqual(rl.hand_kinds(self.first), ("DDIM",))         # secants have no trend


class Advantages(Case):
    reward = randn(24) + torch.arange(24) // 4 * 10

    def test_they_are_centred_by_group_and_scaled_by_batch(self):
        for group in (2, 4, 24):
            groups = self.reward.reshape(-1, group).tolist()
            centred = [x - np.mean(g) for g in groups for x in g]
            self.close(rl.advantages(self.reward, group), np.array(centred) / np.std(centred), 1e-4)
        for shift in (5, 7 * (torch.arange(24) < 4)):                  # all, or one group alone
            self.close(rl.advantages(self.reward + shift, 4), rl.advantages(self.reward, 4), 1e-4)

    def test_ties_give_exactly_0_and_never_scaled_noise(self):
        flat = torch.full((8,), -0.7) + 2e-7 * randn(8)
        mixed = torch.cat([flat[:4], torch.tensor([0.0, 1, 2, 3])])
        for tied, group in ((flat, 2), (flat, 8), (torch.zeros(8), 4), (mixed, 4)):
            self.close(rl.advantages(tied, group)[:4], torch.zeros(4), 0)


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
        self.close(self.gradient(self.logp, math.inf), -self.adv, 1e-6)
        self.close(self.gradient(self.old, math.inf), -self.adv * self.logp.exp(), 1e-6)

    def test_the_score_function_gradient_agrees_with_the_pathwise_one(self):
        """Linear-Gaussian toy, quadratic reward: the same number, within 4 standard errors."""
        net, n = Toy(), 20_000
        x, u = randn(1, 3, 2, 2, seed=1).expand(n, 3, 2, 2), torch.zeros(n, 2)
        mean = rl.take_jump(net, x, full(n, 800), full(n, 300), u, x, AB, 0.0)[0]
        x_next = (mean + 0.4 * randn(n, 3, 2, 2, seed=2)).detach()
        score = -(x_next - 0.3).square().sum((1, 2, 3))
        logp, adv = rl.pixel_logp(mean, x_next, full(n, 0.4)), score - score.mean()
        loss, _ = rl.clipped_surrogate(logp, logp.detach(), adv, math.inf)
        got, slope, exact = (torch.autograd.grad(y, net.b, retain_graph=True)[0].item() for y in (
            12 * loss.mean(), mean[0].mean(), (mean[0] - 0.3).square().sum()))
        each = adv * ((x_next - mean).detach() / 0.16 * slope).sum((1, 2, 3))
        error = each.std().item() / math.sqrt(n)
        self.assertLess(abs(got - exact), 4 * error)
        self.assertGreater(abs(exact), 15 * error)


class Loop(Working):
    def play(self, channel, eta=0.0, net=None, group=4, z=None):
        """Three exploring jumps from DPM++ on uniform times. Returns (net, policy, jumps)."""
        net, z = net or self.net, noise(3) if z is None else z
        net.requires_grad_(True)
        policy = by_hand("DPM++", "uniform")
        return net, policy, rl.rollout(net, policy, z, AB, channel, group, 0.1, eta, rng())[1]

    def update(self, net, policy, jumps, adv, eta=0.0, kl=0.0, ref=None, lr=0.0):
        """A step as train() makes it, the gradient unclipped: (diagnostics, parameters)."""
        part, losses = policy, lambda: rl.jump_losses(policy, jumps, adv, 0.1)
        if jumps[0].logp is None:
            part, jumps = net, [j for j in jumps if j.logp_pixels is not None]
            losses = lambda: rl.pixel_losses(net, ref or net, jumps, adv, eta, kl, AB)  # noqa
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda parameters, most:
                               torch.stack([p.grad.norm() for p in parameters]).norm()):
            return rl.policy_update(losses, len(adv) * len(jumps), torch.optim.SGD(
                part.parameters(), lr), 1e-4, 1), [*part.parameters()]

    def means(self, net, j, eta):
        """Where each rollout is expected to land."""
        x0_hat = ddpm.estimate(net, j.x_t, j.t, net(j.x_t, j.t, j.t_next), AB)
        return ddpm.jump(j.x_t, x0_hat, j.t, j.t_next, AB, j.u[:, 1], j.x0_last, eta)[0]

    def train(self, net, *words, scale=1.0, score=minus_mse, policy=None):
        """The real train() on toys of three jumps, each noise its own target; rows of its log."""
        args, out, z = rl.parse_args(["--steps", "3", *words]), self.folder(), scale * noise(6, 2)
        quiet(rl.train, net, policy or by_hand("DDIM", "quadratic"), (z, z), (z, z), score, args,
              out, CPU)
        return read_log(out / "log.jsonl")

    def test_exploration_is_antithetic_and_of_the_right_spread(self):
        toy, z = Toy(), noise(3, 2)
        for j in self.play("jump", 0.0, toy, 2000, z)[2]:
            acts = rl.acting(j.k, 3)
            off = j.u - by_hand("DPM++", "uniform").hand[j.k] * acts
            self.close(off[0::2], -off[1::2], 1e-6)
            self.close(off.std(0), 0.1 * acts, 0.005)
        for j in self.play("pixels", 0.3, toy, 400, z)[2]:
            off = (j.x_next - self.means(toy, j, 0.3)).detach()
            self.close(off[0::2], -off[1::2], 1e-5)
            sigma = ddpm.ddim_sigma(j.t, j.t_next, 0.3, AB)[0] if j.k < 2 else rl.SIGMA_FLOOR
            self.close(off.std() / sigma, 1.0, 0.03)
            self.close(j.sigma / sigma, torch.ones(1200), 1e-5)

    def test_with_eta_0_only_the_last_jump_explores(self):
        jumps = self.play("pixels", group=8)[2]
        self.assertEqual([j.logp_pixels is None for j in jumps], [True, True, False])
        clean = ddpm.sample(self.net, noise(3), hand_solver("DPM++", "uniform", 3), AB)
        off = (jumps[2].x_next - clean.repeat_interleave(8, 0)).reshape(3, -1).std(1)
        self.close(off / rl.SIGMA_FLOOR, torch.ones(3), 0.1)

    def test_the_ratio_is_1_from_what_is_stored(self):
        adv = randn(12)
        for channel, eta, net in itertools.product(("jump", "pixels"), (0.0, 0.3),
                                                   (self.first, self.net)):
            net, policy, jumps = self.play(channel, eta, net)
            result, _ = self.update(net, policy, jumps, adv, eta)
            self.close(result["ratio_t0"], 1.0, 1e-6, (channel, eta))
            self.assertGreater(result["grad_norm"], 0)
        for j in jumps:
            mean = self.means(net, j, 0.3).detach()
            self.close(rl.pixel_logp(mean, j.x_next, j.sigma), j.logp_pixels, 1e-5)
        lost = self.means(net, jumps[1]._replace(x0_last=jumps[1].x_t), 0.3).detach()
        self.assertGreater((lost - mean).abs().max(), 0.01)            # DPM++ has a memory

    def test_the_first_gradient_is_reinforces_row_by_row(self):
        """Against torch.distributions, every rollout evaluated by itself, before any clipping:
        surrogate, its weights sigma / mean sigma, and the KL."""
        adv, ref = randn(12), randomised(copy.deepcopy(self.net), 9, 0.02)
        for channel, eta, kl in (("jump", 0.0, 0.0), ("pixels", 0.0, 0.0), ("pixels", 0.3, 0.0),
                                 ("pixels", 0.0, 0.5), ("pixels", 0.3, 0.5)):
            net, policy, jumps = self.play(channel, eta)
            _, trained = self.update(net, policy, jumps, adv, eta, kl, ref)
            jumps, total = [j for j in jumps if channel == "jump" or j.logp_pixels is not None], 0
            mean_sigma = sum(j.sigma.sum() for j in jumps) / 12 / len(jumps)
            for j in jumps:
                if channel == "jump":
                    logp = Normal(policy(j.k), 0.1).log_prob(j.u)
                    total = total - (adv * logp[:, rl.acting(j.k, 3)].sum(1)).sum()
                else:
                    now, start = (Normal(self.means(some, j, eta), j.sigma[:, None, None, None])
                                  for some in (net, ref))
                    score = adv * now.log_prob(j.x_next).mean((1, 2, 3)) * j.sigma / mean_sigma
                    total = total + (kl * kl_divergence(now, start).mean((1, 2, 3)) - score).sum()
            exact = torch.autograd.grad(total / (12 * len(jumps)), trained)
            size = max(g.abs().max().item() for g in exact)
            self.assertGreater(size, 1e-4)
            for p, g in zip(trained, exact):
                self.close(p.grad, g, 1e-4 * size, (channel, eta, kl))
            if channel == "jump":                # every entry that acts has one, and no other
                self.assertEqual((p.grad != 0).tolist(), [[1, 0], [1, 1], [0, 1]])

    def test_without_advantage_the_kl_alone_pulls_back(self):
        ref, zero = copy.deepcopy(self.net), torch.zeros(12)
        randomised(self.net, 9)
        for channel, eta in (("jump", 0.0), ("pixels", 0.0), ("pixels", 0.3)):
            played = self.play(channel, eta)
            self.assertEqual(self.update(*played, zero, eta)[0]["grad_norm"], 0)
        kl = [self.update(*played, zero, 0.3, 1.0, ref, 1e-5)[0]["kl"] for _ in range(4)]
        self.assertTrue(all(a > b > 0 for a, b in zip(kl, kl[1:])), kl)

    def test_it_finds_the_optimum_of_a_known_reward(self):
        """The landing of jump 1 must move from 667 to 300, the lean of jump 2 from 0 to 0.7."""
        net, g, policy = Toy(), rng(), by_hand("DDIM", "uniform")
        optimizer = torch.optim.Adam(policy.parameters(), 0.05)
        for _ in range(50):
            _, jumps = rl.rollout(net, policy, noise(4, 2), AB, "jump", 8, 0.1, 0.0, g)
            score = -((jumps[0].t_next - 300) / 300) ** 2 - (jumps[1].u[:, 1] - 0.7) ** 2
            adv = rl.advantages(score, 8)
            rl.policy_update(lambda: rl.jump_losses(policy, jumps, adv, 0.1), 96, optimizer, 0.2, 4)
        _, jumps = rl.rollout(net, policy, noise(4, 2), AB)
        self.close(jumps[0].t_next / 1000, full(4, 0.3), 0.05)
        self.close(jumps[1].u[:, 1], full(4, 0.7), 0.1)

    def test_a_group_shares_a_noise_and_its_target(self):
        """Through real updates. A network that says v = 0 only scales its noise, so each image
        must point where the noise points that its own target is."""
        for channel, eta in (("jump", "0"), ("pixels", "0"), ("pixels", "0.01")):
            seen, words = [], ["--group", "4", "--updates", "2", "--channel", channel, "--eta", eta]
            with mock.patch.object(rl, "advantages", mock.Mock(side_effect=rl.advantages)) as adv:
                self.train(Toy(0.0, 0.0), *words, scale=0.3, score=lambda x, y: (
                    seen.append((x, y)), minus_mse(x, y))[1])
            self.assertEqual([call[0][1] for call in adv.call_args_list], [4] * 2)
            for x, y in seen:
                self.assertGreater(F.cosine_similarity(x.flatten(1), y.flatten(1)).min(), 0.9)
            for _, y in seen[:2]:                          # then the monitor's
                self.assertEqual(len(y.reshape(6, 4, 12)[:, 0].unique(dim=0)), 6)
                self.close(y.reshape(6, 4, 12).std(1), torch.zeros(6, 12), 1e-6)

    def test_one_part_learns_at_a_rate_that_falls_to_0(self):
        update, play = rl.policy_update, rl.rollout
        for channel, words, rates, moves in (
                ("jump", ["--lr", "0.04"], [0.04, 0.03, 0.02, 0.01], [0, 1]),
                ("pixels", [], [1e-5, 7.5e-6, 5e-6, 2.5e-6], [1, 0])):
            parts, trail, std = [Toy(), by_hand("DDIM", "quadratic")], [], []

            def watched(losses, actions, optimizer, *more):
                before = [[p.detach().clone() for p in part.parameters()] for part in parts]
                result = update(losses, actions, optimizer, *more)
                trail.append((optimizer.param_groups[0]["lr"], [
                    any(not torch.equal(p, old) for p, old in zip(part.parameters(), olds))
                    for part, olds in zip(parts, before)]))
                return result
            self.patch(rl, policy_update=watched,
                       rollout=lambda *a: (std.extend(a[6:7]), play(*a))[1])
            self.train(parts[0], "--channel", channel, "--updates", "4", *words, policy=parts[1])
            self.assertEqual([moved for _, moved in trail], [moves] * 4)
            self.close([rate for rate, _ in trail], rates, 1e-12)
            high, low = rl.STD
            self.close(std, [low + (high - low) * left for left in (1, 0.75, 0.5, 0.25)], 1e-9)


class Results(Working):
    def test_training_monitor_and_table_share_no_noise(self):
        spies = {name: mock.Mock(side_effect=getattr(rl, name)) for name in
                 ("best_by_hand", "train", "deployed")}
        seeds = mock.Mock(side_effect=seeded_noise)
        self.patch(rl, **spies)
        self.patch(teacher, seeded_noise=seeds)
        self.run_main(rl, *self.job)
        base, train, table = (spy.call_args[0] for spy in spies.values())
        drawn = [set(call[0][0]) for call in seeds.call_args_list]
        for one, other in itertools.combinations(drawn, 2):
            self.assertFalse(one & other)
        for z, n, trains in ((train[2][0], 4, True), (base[2], 4, True), (table[2], 8, False),
                             (train[3][0], 8, False)):
            seeds, = [s for s in drawn if torch.equal(seeded_noise(sorted(s), (3, 8, 8)), z)]
            self.assertEqual(len(seeds), n)
            self.assertTrue(max(seeds) < student.CLONE_SEEDS if trains else
                            min(seeds) >= teacher.HELD_OUT)

    def test_the_printed_table_is_right(self):
        n, g = 40, np.random.default_rng(0)
        common = 3 * g.normal(size=n) - 10                 # hard noises are hard for everybody
        s = {"target": 0.3 * g.normal(size=n), "AB2 uniform": common - 1.5 + 0.1 * g.normal(size=n),
             "DDIM uniform": common - 2.5, "policy": common - 1 + g.normal(size=n)}
        rows = {name: dict(reward=torch.tensor(x), images=i)
                for i, (name, x) in enumerate(s.items())}
        self.patch(reward, encode=lambda judge, x: x + judge, judged_frechet=lambda x, m: m * x)
        table, text = quiet(reward.print_comparison, rows, (1, 1.5))
        json.dumps(table, allow_nan=False)
        for i, (name, x) in enumerate(s.items()):
            gains = s["policy"] - x
            gain, error, closed = gains.mean(), gains.std(ddof=1) / math.sqrt(n), gains.mean() / (
                1e-9 + (s["target"] - x).mean())
            for key, value in dict(gain=gain, gain_error=error, closed=closed).items():
                if i in (1, 2):
                    self.close(table[name][key], value, 1e-5, (name, key))
            end = rf" +{gain:.4f} ± +{error:.4f} +{100 * closed:.0f}%" if i in (1, 2) else ""
            self.assertRegex(text, rf"\n{re.escape(name)} +-?{abs(x.mean()):.4f} ± +"
                             rf"{x.std(ddof=1) / math.sqrt(n):.4f} +{1.5 * (i + 1):.3f}{end}\n")

    def test_a_saved_policy_comes_back_as_it_was(self):
        first, net = self.first, randomised(self.net, 5, 1e-6)         # too little for fp16
        for net, half in itertools.product((net, first), (True, False)):
            policy = randomised(by_hand("DPM++", "uniform"), 1, 0.3).solver()
            rl.save_policy("p.pt", net, policy, dict(a=1), half)
            back, again, content = rl.load_policy("p.pt")
            self.assertEqual((type(back), again), (type(net), policy))
            self.assertFalse(back.training or any(p.requires_grad for p in back.parameters()))
            x, y = (ddpm.sample(some, noise(2), policy, AB) for some in (net, back))
            self.close(x, y, 0.01 if half else 0)
            self.assertEqual({w.dtype for w in content["net"]["weights"].values()},
                             {torch.float16 if half else torch.float32})
        content["net"]["kind"] = "Another"
        save_checkpoint("q.pt", **{k: v for k, v in content.items() if k != "format"})
        self.bad_input("no usable policy", rl.load_policy, "q.pt")

    def test_who_jumps_is_the_teachers_copy_or_the_student(self):
        for more, kind in (([], ddpm.UNet), (["--init", "student"], student.JumpUNet)):
            args = rl.parse_args(self.job + more)
            net, jumps, _, _ = rl.load_inputs(args, CPU)
            self.assertEqual((type(jumps), jumps is net), (kind, False))
            self.assertEqual(args.student is None, not more)      # no part of a run without it


# ==== sample.py ==============================================================================

class Samples(Working):
    def models(self):
        """(net, solver) of a teacher, a student, and a policy of four jumps from its file."""
        solver = hand_solver("DDIM", "uniform", 3)
        policy = randomised(rl.JumpPolicy(hand_solver("DPM++", "quadratic", 4)), 0, 0.2)
        rl.save_policy("policy.pt", self.net, policy.solver(), {})
        return (self.net, solver), (self.first, solver), sample.load_model("policy.pt", CPU)[:2]

    def test_an_image_is_the_same_in_any_batch(self):
        seeds = range(5, 10)
        z = seeded_noise(seeds, (3, 8, 8))
        for (net, solver), eta in itertools.product(self.models(), (0.0, 0.7)):
            many = sample.draw(net, solver, z, AB, eta, seeds)
            with mock.patch.object(teacher, "chunk_size", lambda device: 2):
                self.close(sample.draw(net, solver, z, AB, eta, seeds), many)
            self.close(sample.draw(net, solver, z[2:3], AB, eta, seeds[2:3]), many[2:3])
            self.assertLessEqual(many.abs().max(), 1)

    def test_the_path_goes_from_noise_to_image_in_11_states(self):
        z, real = noise(2), sample.sample
        more = [(net, hand_solver("DDIM", "uniform", K)) for net, K in (
            (Toy(), 10), (Toy(), 12), (Toy(), 1000))]
        for net, solver in [*self.models(), *more]:
            K = len(solver.leans)
            with mock.patch.object(sample, "sample", mock.Mock(side_effect=real)) as spy:
                path = sample.draw_path(net, solver, z, AB, 0.0, range(2))
            self.assertEqual(path.shape, (2, min(K + 1, 11), 3, 8, 8))
            self.close(path[:, 0], z, 0)
            self.close(path[:, -1].clamp(-1, 1), sample.draw(net, solver, z, AB), 1e-6)
            self.assertEqual(len(set(spy.call_args[0][-1])), path.shape[1])
            self.close(path[:, 1], real(net, z, solver, AB, keep=[round(K / 10) or 1])[0], 0)

    def test_everything_a_checkpoint_can_do_is_compared(self):
        self.models()
        names = [(f"{kind} {grid}", K) for K in (2, 5) for kind in ddpm.SOLVERS
                 for grid in ddpm.GRIDS]
        for path, expected in ((self.tiny / "teacher.pt", names + [("its target", 3)]),
                               (self.tiny / "student.pt", names[:3] + names[9:12]),
                               ("policy.pt", [("learned", 4)])):
            found = [(name.split(", ")[1], len(solver.leans), solver)
                     for name, _, solver in sample.contenders(path, [2, 5], CPU)]
            self.assertEqual([c[:2] for c in found], expected)
            for name, K, solver in [c for c in found if c[1] in (2, 5)]:
                self.assertEqual(solver, hand_solver(*name.split(), K))

    def test_the_npz_is_what_fid_tools_read(self):
        big = randomised(ddpm.UNet(**{**TINY, "image_size": 32}))
        save_network("big.pt", "teacher", big, {})
        words = shlex.split("--model big.pt --steps 2 --n 3 --npz new/a.npz --seed 7")
        self.run_main(sample, *words)
        with np.load("new/a.npz") as file:
            array = file["arr_0"]
        self.assertEqual((array.shape, array.dtype), ((3, 32, 32, 3), np.uint8))
        x = sample.draw(teacher.load_teacher("big.pt")[0], hand_solver(
            "DDIM", "quadratic", 2), seeded_noise([7, 8, 9], (3, 32, 32)), AB)
        self.close(array, pictures.to_uint8(x).permute(0, 2, 3, 1), 1)
        before = Path("new/a.npz").read_bytes()
        self.bad_input("exists already", self.run_main, sample, *words)
        self.assertEqual(Path("new/a.npz").read_bytes(), before)


# ==== COMMANDS: every script end to end, tiny; resume; bad input =============================

def parser_of(module):
    """The argument parser of a script."""
    found = []
    with mock.patch("argparse.ArgumentParser.parse_args", autospec=True,
                    side_effect=lambda p, argv: found.append(p) or sys.exit()), \
            contextlib.suppress(SystemExit):
        module.parse_args([])
    return found[0]


class Commands(Working):
    def fails(self, module, *words):
        """Must end with code 2 and one sentence, which is returned, and touch nothing."""
        text, before = io.StringIO(), sorted(Path().rglob("*"))
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(text), \
                contextlib.redirect_stdout(text):
            run_main(lambda: module.main([str(w) for w in words]))
        self.assertEqual((caught.exception.code, sorted(Path().rglob("*"))), (2, before))
        self.assertNotIn("Traceback", text.getvalue())
        return text.getvalue().strip().splitlines()[-1]

    def resumes(self, module, *words):
        """Run to `a`, and to `b` with a kill after the first checkpoint: the same bits."""
        def killed(*args):
            save(*args)
            raise KeyboardInterrupt
        save, text = module.save_state, self.run_main(module, *words, "--out", "a")
        with mock.patch.object(module, "save_state", killed), \
                self.assertRaises(KeyboardInterrupt):
            self.run_main(module, *words, "--out", "b")
        self.assertNotEqual(*(Path(f, "state.pt").read_bytes() for f in "ab"))
        self.assertIn("resumed at", self.run_main(module, *words, "--out", "b", "--resume"))
        a, b = (tree_flatten(load_checkpoint(f"{f}/state.pt", "state")["parts"])[0] for f in "ab")
        self.assertEqual(len(a), len(b))
        self.assertTrue(all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                            for x, y in zip(a, b)))
        self.assertEqual(*([{**row, "seconds": 0} for row in read_log(f"{f}/log.jsonl")]
                           for f in "ab"))
        return text

    def test_every_script_explains_itself_and_refuses_numbers_out_of_range(self):
        for module in MODULES:
            p = parser_of(module)
            text = io.StringIO()
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stdout(text):
                module.parse_args(["--help"])
            self.assertEqual(caught.exception.code, 0)
            self.assertIn("example: python", text.getvalue())
            for flag, value in itertools.product(
                    [a.option_strings[0] for a in p._actions if a.type],
                    ["nan", "inf", "-inf", "-1", "1e400", "x", "", "1e-400j", "-0.5"]):
                with self.subTest(flag=flag, value=value), self.assertRaises(SystemExit) as caught:
                    quiet(p.parse_args, [f"{flag}={value}"])
                self.assertEqual(caught.exception.code, 2)

    def test_every_flag_is_read_after_parsing_and_there_are_not_too_many(self):
        for module in MODULES:
            tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
            read = {node.attr for part in tree.body if getattr(part, "name", "") != "parse_args"
                    for node in ast.walk(part) if isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name) and node.value.id == "args"}
            own = set(vars(module.parse_args([]))) - {"out", "resume", "smoke"}    # the harness's
            self.assertEqual(own - read, set(), module.__name__)
        self.assertLessEqual(len(parser_of(rl)._actions) - 1, 21)
        self.assertLessEqual(Path(rl.__file__).read_text(encoding="utf-8").count("p.error("), 3)

    def test_importing_prints_nothing_and_optimised_python_parses_from_any_folder(self):
        names = [module.__name__ for module in MODULES]
        done = subprocess.run(
            [sys.executable, "-OO", "-c", f"import {', '.join(names)}\n"
             f"for m in {', '.join(names)}: m.parse_args([])"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_bundled_files_are_found_from_another_folder(self):
        rl.load_inputs(rl.parse_args(["--init", "student"]), CPU)
        path, = sample.parse_args([]).model
        here = (HERE / path).exists()
        _, policy, _ = sample.load_model(path if here else "checkpoints/teacher.pt", CPU)
        self.assertEqual(policy is not None, here)

    def test_the_commands_of_readme_and_sources_parse(self):
        files = [HERE / "README.md", *(Path(module.__file__) for module in MODULES)]
        text = "\n".join(f.read_text(encoding="utf-8") for f in files).replace("\\\n", " ")
        commands = re.findall(r"python ([\w/]+\.py)([^`\"\n#]*)", text)
        self.assertGreater(len(commands), 20)
        scripts = {Path(module.__file__).name: module for module in MODULES}
        for script, words in commands:
            with self.subTest(command=script + words):
                self.assertTrue((HERE / script).exists())
                try:
                    quiet(scripts[script].parse_args, shlex.split(words))
                except SystemExit:
                    self.fail("does not parse")
                except KeyError:                           # in a folder with tests of its own
                    self.assertIn("/", script.replace("test_all.py", "/"))

    def test_the_demonstration_and_the_rewards_are_shown(self):
        self.patch(ddpm, POINTS=20, hand_solver=lambda kind, grid, steps: hand_solver(
            kind, grid, min(steps, 20)))
        self.assertIn("wrote d/ddpm.png", self.run_main(ddpm, "--out", "d"))
        self.assertIn("standardised", self.run_main(reward, *self.words, "--out", "r"))
        self.assertTrue(Path("d/ddpm.png").exists() and Path("r/rewards.png").exists())

    def test_the_teacher_trains_and_resumes_to_the_same_bits(self):
        self.patch(teacher, SAVE_EVERY=2, LOG_EVERY=1, SMALL_UNET=TINY,
                   load_images=lambda data: pictures.shapes_images(60, 8))
        text = self.resumes(teacher, "--data", "shapes", "--smoke")
        self.assertIn("wrote a/teacher.pt", text)
        self.assertEqual(teacher.load_teacher("a/teacher.pt")[1]["provenance"]["images"], 16)
        words = "--data shapes --smoke --lr 1e-7 --seed 5 --init a/teacher.pt --out c"
        self.run_main(teacher, *words.split())
        self.close(*(next(teacher.load_teacher(f"{f}/teacher.pt")[0].parameters()) for f in "ac"))

    def test_the_student_clones_and_resumes_to_the_same_bits(self):
        self.patch(student, SAVE_EVERY=1, LOG_EVERY=1, STUDENT_UNET=TINY)
        self.assertIn("3-step image", self.resumes(student, *self.words[:2], "--smoke"))
        self.run_main(student, *self.words[:2], "--smoke", "--init", "teacher", "--out", "c")
        self.assertEqual(student.load_student("c/student.pt")[0].config, TINY)

    def test_the_main_job_resumes_to_the_same_bits_and_its_policy_is_sampled_and_evaluated(self):
        text = self.resumes(rl, *self.job, "--channel", "pixels", "--init", "student", "--kl",
                            "0.1")
        self.assertRegex(text, r"1\.000000 [^@]*closed[^@]*wrote a/policy.pt")
        for name in re.search(r"wrote (.*)", text)[1].removeprefix("a/").split(", "):
            self.assertTrue(Path("a", name).exists(), name)
        kept = load_checkpoint("a/policy.pt", "policy")["net"]
        self.assertTrue(all(w.dtype == torch.float32 for w in kept["weights"].values()))
        text = self.run_main(sample, "--model", "a/policy.pt", "--n", "5", "--npz", "n/i.npz")
        self.assertIn("5 images", text)
        text = self.run_main(sample, "--evaluate", "--n", "8", "--steps", "2", *self.words, "--out",
                             "e", "--model", "a/policy.pt", self.tiny / "teacher.pt")
        self.assertRegex(text, r"a/policy, learned +4 [^@]*its target +3 +-?0\.0000 ± 0\.0000")
        self.assertTrue(Path("e/frontier.png").exists())

    def test_bad_input_is_one_sentence_and_code_2_and_touches_nothing(self):
        Path("cut.pt").write_bytes((self.tiny / "student.pt").read_bytes()[:5000])
        Path("empty").mkdir()
        save_network("another.pt", "teacher", self.net, dict(seed=1))
        Samples.models(self)
        cloned, coach = [*self.job, "--init", "student"], f"{self.tiny}/coach.pt"
        plain = self.words[1]
        for expected, module, *words in [
                ("no checkpoint", rl, *cloned, "--student", "none.pt"),
                ("cannot be read", rl, *cloned, "--student", "cut.pt"),
                ("a student is needed", rl, *cloned, "--student", coach),
                ("not cloned from", rl, *cloned, "--teacher", "another.pt"),
                ("no checkpoint empty", rl, *self.job, "--encoders", "empty"),
                ("'clip' is unknown", rl, *self.job, "--reward", "clip+mse"),
                ("must be even", rl, *self.words, "--group", "3"),
                ("leaves no jump", rl, *self.job, "--steps", "1"),
                ("belong to the pixels", rl, *self.job, "--kl", "1"),
                ("is not empty", rl, *self.job, "--out", "."),
                ("--resume needs", rl, *self.job, "--resume"),
                ("no checkpoint", sample, "--model", "none.pt"),
                ("student or policy is needed", sample, "--model", coach),
                *(("learned its own jumps", sample, "--model", "policy.pt", *f.split()) for f in (
                    "--eta 1", "--steps 8", "--solver DDIM", "--grid uniform")),
                ("takes all solvers", sample, "--evaluate", "--grid", "uniform"),
                ("no images to lean on", sample, "--solver", "AB2", "--model",
                 f"{self.tiny}/student.pt"),
                ("go with --evaluate", sample, "--model", plain, "--steps", "1", "2"),
                ("goes with --solver DDIM", sample, *"--eta 1 --solver AB2 --model".split(), plain),
                ("does not go with", teacher, "--paper-shape", "--smoke"),
                ("at least 8", sample, "--evaluate", "--model", plain, "--n", "7"),
                ("no such folder", teacher, "--data", "nowhere"),
                ("--updates: must be", student, "--updates", "0"),
                ("invalid choice", student, "--init", "nobody")]:
            with self.subTest(expected=expected, words=words[-2:]):
                self.assertTrue(expected)
                self.assertIn(expected, self.fails(module, *words))


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
