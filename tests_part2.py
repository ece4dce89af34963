"""The specification, part 2: rl_distill.py, sample.py and the commands."""
import ast
import contextlib
import copy
import io
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

import ddpm
import reward
import rl_distill as rl
import sample
import student
import teacher
from ddpm import hand_solver, seeded_noise
from harness import images as pictures
from harness.checkpoints import half_weights, load_checkpoint, save_checkpoint
from harness.runs import BadInput, read_log, run_main

HERE = Path(__file__).resolve().parent
MODULES = [ddpm, teacher, student, reward, rl, sample]
TINY = dict(width=16, mults=[1, 2], blocks=1, attention=[4], dropout=0.0, image_size=8)
CPU = torch.device("cpu")
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


def full(n, t):
    return torch.full((n,), t)


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
            teacher.save_teacher(self.tiny / "teacher.pt", randomised(ddpm.UNet(**TINY)), {})
            student.save_student(self.tiny / "student.pt", randomised(student.JumpUNet(**TINY), 1),
                                 {})
            c, j, x = reward.Coach().eval(), reward.Judge().eval(), images(64)
            for name, net, more in (("coach", c, dict(scales=reward.term_scales(c, x))),
                                    ("judge", j, reward.judge_reference(j, pictures.to_uint8(x)))):
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
                then, rho_t = rl.land(t, logit, n), (torch.sigmoid(logit) * t).tolist()
                self.assertEqual(then.tolist(), [max(min(round(r), s - 1), n - 1) * (n > 1)
                                                 for r, s in zip(rho_t, t.tolist())])
                self.assertTrue((then < t).all() and (then >= n - 1).all())
                t = then

    def test_the_policy_starts_at_the_hand_solver_exactly(self):
        z, ends, cases = noise(2), {}, [(self.net, 1), (self.net, 2), (self.net, 5),
                                        (self.first, 3), (Toy(), 64)]
        for kind, grid, (net, K) in itertools.product(ddpm.SOLVERS, ddpm.GRIDS, cases):
            solver, policy = hand_solver(kind, grid, K), rl.by_hand([net] * K, kind, grid)
            x, jumps = rl.rollout([net] * K, policy, z, AB)
            ends[kind, grid, K] = ddpm.sample(net, z, solver, AB).clamp(-1, 1)
            self.close(x, ends[kind, grid, K], 1e-6, (kind, grid, K))
            times = torch.stack([j.t for j in jumps] + [jumps[-1].t_next], 1)
            self.assertEqual(times.tolist(), [solver.grid] * 2)
            self.close(torch.stack([j.u[0, 1] for j in jumps]), solver.leans, 0)
        ddim, dpm = (ends[kind, "uniform", 5] for kind in ddpm.SOLVERS)
        self.assertGreater((ddim - dpm).abs().max(), 1e-3)

    def test_a_very_sharp_policy_is_the_deployment(self):
        nets, z = [self.net] * 3, noise(4)
        policy = rl.by_hand(nets, "DPM++", "uniform")
        x, jumps = rl.rollout(nets, policy, z, AB, std=0.5, eta=1.0)
        self.close(x, ddpm.sample(self.net, z, hand_solver("DPM++", "uniform", 3), AB), 1e-6)
        for j in jumps:
            self.assertEqual((j.logp, j.logp_pixels, j.sigma.max().item()), (None, None, 0))
        self.patch(rl, SIGMA_FLOOR=1e-6)
        for channel, eta in (("jump", 0.0), ("pixels", 0.0), ("pixels", 1e-6)):
            sharp, _ = rl.rollout(nets, policy, z, AB, channel, 4, 1e-6, eta, rng())
            self.close(sharp, x.repeat_interleave(4, 0), 1e-4, (channel, eta))

    def test_the_base_is_the_best_hand_solver(self):
        z, nets = noise(6), [self.net] * 3
        for seed, size in ((0, 4), (1, 64)):
            self.patch(rl, chunk_size=lambda device: size)
            target, scores = images(6, seed=seed), {}
            for kind, grid in itertools.product(ddpm.SOLVERS, ddpm.GRIDS):
                x = ddpm.sample(self.net, z, hand_solver(kind, grid, 3), AB)
                scores[f"{kind} {grid}"] = minus_mse(x, target)[0].mean()
            name, policy = rl.best_by_hand(nets, z, target, minus_mse, AB)
            self.assertEqual(name, max(scores, key=scores.get))
            self.assertEqual(policy.config["solver"], [*hand_solver(*name.split(), 3)])
            got = rl.deployed(nets, policy, z, target, minus_mse, AB)["reward"]
            self.close(got.mean(), scores[name])


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
        mean = rl.land_at(net, x, full(n, 800), full(n, 300), u, x, AB, 0.0)[0]
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
    def play(self, channel, eta=0.0, nets=None, group=4, z=None):
        """Three exploring jumps from DPM++ on uniform times. Returns (nets, policy, jumps)."""
        nets, z = nets or [self.net] * 3, noise(3) if z is None else z
        nets[-1].requires_grad_(True)
        policy = rl.by_hand(nets, "DPM++", "uniform")
        return nets, policy, rl.rollout(nets, policy, z, AB, channel, group, 0.1, eta, rng())[1]

    def update(self, nets, policy, jumps, adv, eta=0.0, kl=0.0, ref=None, lr=0.0):
        """A step as train() makes it, the gradient unclipped: (diagnostics, parameters)."""
        part, explored, losses = policy, len(jumps), lambda: rl.jump_losses(policy, jumps, adv, 0.1)
        if jumps[0].logp is None:
            part, explored = nets[-1], sum(j.logp_pixels is not None for j in jumps)
            losses = lambda: rl.pixel_losses(nets, ref or nets, jumps, adv, eta, kl, AB)  # noqa
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda parameters, most:
                               torch.stack([p.grad.norm() for p in parameters]).norm()):
            return rl.policy_update(losses, len(adv) * explored, torch.optim.SGD(
                part.parameters(), lr), 1e-4, 1), [*part.parameters()]

    def means(self, nets, j, rows, eta):
        """Where each of `rows` rollouts is expected to land, every row evaluated by itself."""
        i = torch.arange(rows) // (rows // len(j.x_t))
        x, t, then, x0_last, lean = (s[i] for s in (j.x_t, j.t, j.t_next, j.x0_last, j.u[:, 1]))
        x0_hat = ddpm.estimate(nets[j.k], x, t, nets[j.k](x, t, then), AB)
        return ddpm.jump(x, x0_hat, t, then, AB, lean, x0_last, eta)[0]

    def train(self, *words, nets=None, z=None, target=None, score=minus_mse):
        """The real train() on toys of three jumps: (rows of its log, its policy)."""
        args, nets = rl.parse_args(["--steps", "3", *words]), nets or [Toy()] * 3
        policy = rl.by_hand(nets, "DDIM", "quadratic")
        data = (noise(6, 2), torch.zeros(6, 3, 2, 2)) if z is None else (z, target)
        out = self.folder()
        quiet(rl.train, nets, policy, data, data, score, args, out, CPU)
        return read_log(out), policy

    def test_exploration_is_antithetic_and_of_the_right_spread(self):
        toys, z = [Toy()] * 3, noise(3, 2)
        for j in self.play("jump", 0.0, toys, 2000, z)[2]:
            acts = rl.acting(j.k, 3)
            off = j.u - rl.by_hand(toys, "DPM++", "uniform").hand[j.k] * acts
            self.close(off[0::2], -off[1::2], 1e-6)
            self.close(off.std(0), 0.1 * acts, 0.005)
        for j in self.play("pixels", 0.3, toys, 400, z)[2]:
            off = (j.x_next - self.means(toys, j, 1200, 0.3)).detach()
            self.close(off[0::2], -off[1::2], 1e-5)
            sigma = ddpm.ddim_sigma(j.t, j.t_next, 0.3, AB)[0] if j.k < 2 else rl.SIGMA_FLOOR
            self.close(off.std() / sigma, 1.0, 0.03)
            self.close(j.sigma / sigma, torch.ones(1200), 1e-5)

    def test_with_eta_0_only_the_last_jump_explores_and_a_group_shares_its_evaluations(self):
        seen = []
        self.net.register_forward_hook(lambda net, x, y: seen.append(len(x[0])))
        jumps = self.play("pixels", group=8)[2]
        self.assertEqual(seen, [3, 3, 3])                   # 24 rollouts of 3 noises
        self.assertEqual([j.logp_pixels is None for j in jumps], [True, True, False])
        clean = ddpm.sample(self.net, noise(3), hand_solver("DPM++", "uniform", 3), AB)
        off = (jumps[2].x_next - clean.repeat_interleave(8, 0)).reshape(3, -1).std(1)
        self.close(off / rl.SIGMA_FLOOR, torch.ones(3), 0.1)

    def test_the_ratio_is_1_from_what_is_stored(self):
        adv, relay = randn(12), [self.first, self.net, self.net]
        for channel, eta, nets in (("jump", 0.0, None), ("jump", 0.0, relay), ("pixels", 0.0, None),
                                   ("pixels", 0.0, relay), ("pixels", 0.3, None)):
            nets, policy, jumps = self.play(channel, eta, nets)
            result, _ = self.update(nets, policy, jumps, adv, eta)
            self.close(result["ratio_t0"], 1.0, 1e-6, (channel, eta))
            self.assertGreater(result["grad_norm"], 0)
        for j in jumps:
            mean = self.means(nets, j, 12, 0.3).detach()
            self.close(rl.pixel_logp(mean, j.x_next, j.sigma), j.logp_pixels, 1e-5)
        lost = self.means(nets, jumps[1]._replace(x0_last=jumps[1].x_t), 12, 0.3).detach()
        self.assertGreater((lost - mean).abs().max(), 0.01)            # DPM++ has a memory

    def test_the_first_gradient_is_reinforces_row_by_row(self):
        """Against torch.distributions, every rollout evaluated by itself, before any clipping:
        surrogate, its weights sigma / mean sigma, and the KL."""
        self.patch(rl, MINIBATCH=2)
        adv, ref = randn(12), [randomised(copy.deepcopy(self.net), 9, 0.02)] * 3
        for channel, eta, kl in (("jump", 0.0, 0.0), ("pixels", 0.0, 0.0), ("pixels", 0.3, 0.0),
                                 ("pixels", 0.0, 0.5), ("pixels", 0.3, 0.5)):
            nets, policy, jumps = self.play(channel, eta)
            _, trained = self.update(nets, policy, jumps, adv, eta, kl, ref)
            jumps, total = [j for j in jumps if channel == "jump" or j.logp_pixels is not None], 0
            mean_sigma = sum(j.sigma.sum() for j in jumps) / 12 / len(jumps)
            for j in jumps:
                if channel == "jump":
                    logp = Normal(policy(j.k, j.x_t), 0.1).log_prob(j.u)
                    total = total - (adv * logp[:, rl.acting(j.k, 3)].sum(1)).sum()
                else:
                    now, start = (Normal(self.means(some, j, 12, eta), j.sigma[:, None, None, None])
                                  for some in (nets, ref))
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
        ref, zero = [copy.deepcopy(self.net)] * 3, torch.zeros(12)
        randomised(self.net, 9)
        for channel, eta in (("jump", 0.0), ("pixels", 0.0), ("pixels", 0.3)):
            played = self.play(channel, eta)
            self.assertEqual(self.update(*played, zero, eta)[0]["grad_norm"], 0)
        kl = [self.update(*played, zero, 0.3, 1.0, ref, 1e-5)[0]["kl"] for _ in range(4)]
        self.assertTrue(all(a > b > 0 for a, b in zip(kl, kl[1:])), kl)

    def test_the_landings_gradient_is_that_of_the_reward_through_the_last_jump(self):
        nets, policy, jumps = self.play("pixels", group=4000, z=noise(2))
        target = images(2)
        score = minus_mse(jumps[2].x_next, target.repeat_interleave(4000, 0))[0].reshape(2, -1)
        adv = (score - score.mean(1, keepdim=True)).reshape(-1)
        _, trained = self.update(nets, policy, jumps, adv)
        loss = -minus_mse(self.means(nets, jumps[2], 2, 0.0), target)[0].mean()
        got, exact = (torch.cat([g.flatten() for g in some]) for some in (
            [p.grad for p in trained], torch.autograd.grad(loss, trained)))
        # the log-density is a mean over 192 dimensions, so its gradient is 192 times too small
        self.assertGreater(F.cosine_similarity(got, exact, 0), 0.9)
        self.close(192 * (got @ exact) / (exact @ exact), 1.0, 0.1)

    def test_it_finds_the_optimum_of_a_known_reward(self):
        """The landing of jump 1 must move from 667 to 300, the lean of jump 2 from 0 to 0.7."""
        nets, g = [Toy()] * 3, rng()
        policy = rl.by_hand(nets, "DDIM", "uniform")
        optimizer = torch.optim.Adam(policy.parameters(), 0.05)
        for _ in range(50):
            _, jumps = rl.rollout(nets, policy, noise(4, 2), AB, "jump", 8, 0.1, 0.0, g)
            score = -((jumps[0].t_next - 300) / 300) ** 2 - (jumps[1].u[:, 1] - 0.7) ** 2
            adv = rl.advantages(score, 8)
            rl.policy_update(lambda: rl.jump_losses(policy, jumps, adv, 0.1), 96, optimizer, 0.2, 4)
        _, jumps = rl.rollout(nets, policy, noise(4, 2), AB)
        self.close(jumps[0].t_next / 1000, full(4, 0.3), 0.05)
        self.close(jumps[1].u[:, 1], full(4, 0.7), 0.1)

    def test_a_group_shares_a_noise_and_its_target(self):
        """Through real updates. A network that says v = 0 only scales its noise, so each image
        must point where the noise points that its own target is."""
        z = 0.3 * noise(6, 2)
        for channel, eta, group in (("jump", "0", 4), ("pixels", "0", 64), ("pixels", "0.01", 4)):
            seen, words = [], ["--channel", channel, "--group", "4", "--updates", "2"]
            with mock.patch.object(rl, "advantages", mock.Mock(side_effect=rl.advantages)) as adv:
                self.train(*words, *["--eta", eta] * (channel == "pixels"), z=z, target=z,
                           nets=[Toy(0.0, 0.0)] * 3, score=lambda x, y: (
                               seen.append((x, y)), minus_mse(x, y))[1])
            self.assertEqual([call[0][1] for call in adv.call_args_list], [group] * 2)
            for x, y in seen:
                self.assertGreater(F.cosine_similarity(x.flatten(1), y.flatten(1)).min(), 0.9)
            for _, y in seen[::2]:
                self.assertEqual(len(y.reshape(6, group, 12)[:, 0].unique(dim=0)), 6)
                self.close(y.reshape(6, group, 12).std(1), torch.zeros(6, 12), 1e-6)

    def test_channels_take_turns_at_rates_that_fall_to_0(self):
        first, toy, moved, update, play, std = Toy(), Toy(), [], rl.policy_update, rl.rollout, []

        def watched(losses, actions, optimizer, *more):
            before = [copy.deepcopy(part.state_dict()) for part in (first, toy)]
            jump = [p.clone() for p in optimizer.param_groups[0]["params"]]
            result = update(losses, actions, optimizer, *more)
            group = optimizer.param_groups[0]
            moved.append((group["lr"], *(part.state_dict() != old for part, old in zip(
                (first, toy), before)), any((p != q).any() for p, q in zip(group["params"], jump))))
            return result
        self.patch(rl, policy_update=watched,
                   rollout=lambda *a: (std.extend(a[6:7]), play(*a))[1])
        log, policy = self.train("--channel", "both", "--updates", "4", "--lr-jump", "0.04",
                                 "--lr-pixels", "0.004", nets=[first, toy, toy])
        self.assertEqual([row["channel"] for row in log], ["jump", "pixels"] * 2)
        self.assertEqual([m[1:] for m in moved], [(False, False, True), (False, True, True)] * 2)
        self.close([m[0] for m in moved], [0.04, 0.003, 0.02, 0.001], 1e-9)
        (high, low), left = rl.STD, (1, 0.75, 0.5, 0.25)
        self.close(std, [low + (high - low) * share for share in left], 1e-9)
        self.assertGreater(high, 2 * low)

    @unittest.expectedFailure           # BUG: RuntimeError, the first network has no gradient
    def test_a_relay_explores_the_pixels_of_the_network_that_learns(self):
        self.train("--channel", "pixels", "--eta", "0.3", "--updates", "2", "--relay",
                   nets=[Toy().requires_grad_(False)] + [Toy()] * 2)


class Results(Working):
    def test_training_monitor_and_table_share_no_noise(self):
        spies = {name: mock.Mock(side_effect=getattr(rl, name)) for name in
                 ("best_by_hand", "train", "final_table", "seeded_noise")}
        self.patch(rl, **spies)
        self.run_main(rl, *self.job)
        base, train, table = (spies[n].call_args[0] for n in [*spies][:3])
        drawn = [set(call[0][0]) for call in spies["seeded_noise"].call_args_list]
        for one, other in itertools.combinations(drawn, 2):
            self.assertFalse(one & other)
        for z, n, trains in ((train[2][0], 4, True), (base[1], 4, True), (table[4][0], 8, False),
                             (train[3][0], rl.MONITOR, False)):
            seeds, = [s for s in drawn if torch.equal(seeded_noise(sorted(s), (3, 8, 8)), z)]
            self.assertEqual(len(seeds), n)
            self.assertTrue(max(seeds) < student.CLONE_SEEDS if trains else
                            min(seeds) >= student.HELD_OUT)

    def test_the_printed_gain_is_right(self):
        n, g, best = 40, np.random.default_rng(0), "teacher, DPM++ quadratic"
        common = 3 * g.normal(size=n) - 10                 # hard noises are hard for everybody
        s = {"target": np.zeros(n), "teacher, DDIM uniform": common - 2.5,
             best: common - 1.5 + 0.1 * g.normal(size=n), "policy": common - 1 + g.normal(size=n),
             "before, DDIM logsnr": common - 1.7 + 0.1 * g.normal(size=n)}
        s["teacher, DDIM uniform"][0] = 5                  # the best image is not the best row
        rows = {name: dict(reward=torch.tensor(x), raw=dict(mse=torch.tensor(2 * x)), images=i,
                           times=torch.tensor([[1000, 400 + i, 0]] * n),
                           leans=torch.tensor([[0.0, 0.25]] * n))
                for i, (name, x) in enumerate(s.items())}
        self.patch(rl, judged=lambda x, *judge: dict(frechet=1.5 * x))
        result, text = quiet(rl.print_result, rows, (None, None))
        gains = s["policy"] - s[best]
        gain, error = gains.mean(), gains.std(ddof=1) / math.sqrt(n)
        closed = gain / (s["target"] - s[best]).mean()
        self.assertEqual((result["best_hand"], result["times"], result["leans"]),
                         (best, [1000, 403, 0], [0, 0.25]))
        for key, value in dict(gain=gain, gain_error=error, closed=closed).items():
            self.close(result[key], value, 1e-6, key)
        line = next(line for line in text.splitlines() if "gain" in line)
        for part in (best, f"{gain:.4f} ± {error:.4f}", f"{100 * closed:.0f} %"):
            self.assertIn(part, line)
        for i, (name, x) in enumerate(s.items()):
            line = next(line for line in text.splitlines() if line.startswith(name))
            error = x.std(ddof=1) / math.sqrt(n)
            self.assertRegex(line, rf" {x.mean():.4f} ± +{error:.4f} .* {1.5 * i:.3f}$")

    def test_a_saved_policy_comes_back_as_it_was(self):
        first, net = self.first, randomised(self.net, 5, 1e-6)         # too little for fp16
        for nets, half in itertools.product(
                ([net] * 3, [first, net, net], [first] * 3), (True, False)):
            policy = randomised(rl.by_hand(nets, "DPM++", "uniform"), 1, 0.3)
            rl.save_policy("p.pt", nets, policy, dict(a=1), half)
            back, again, content = rl.load_policy("p.pt")
            self.assertEqual([(back.index(n), type(n)) for n in back],
                             [(nets.index(n), type(n)) for n in nets])
            self.close(again.shift, policy.shift.detach(), 0)
            self.assertFalse(any(n.training or p.requires_grad for n in back
                                 for p in n.parameters()))
            x, y = (rl.rollout(*pair, noise(2), AB)[0] for pair in ((nets, policy), (back, again)))
            self.close(x, y, 0.01 if half else 0)
            self.assertEqual({w.dtype for n in content["nets"] for w in n["weights"].values()},
                             {torch.float16 if half else torch.float32})
        content["order"] = [0, 0]
        save_checkpoint("q.pt", **{k: v for k, v in content.items() if k != "format"})
        self.bad_input("2 networks for 3 jumps", rl.load_policy, "q.pt")

    def test_who_jumps_is_the_teachers_copy_the_student_or_a_relay(self):
        for more, kinds in (([], "UUU"), (["--init", "student"], "JJJ"), (["--relay"], "JUU")):
            net, nets, _, _ = rl.load_inputs(
                rl.parse_args(self.job + ["--steps", "3", *more]), CPU)
            self.assertEqual("".join(type(n).__name__[0] for n in nets), kinds)
            self.assertEqual((len(set(nets)), net in nets), (len(set(kinds)), False))


# ==== sample.py ==============================================================================

class Samples(Working):
    def models(self):
        """(nets, policy) of a teacher, a student, and a relay of four jumps from its file."""
        nets = [self.first, self.net, self.net, self.net]
        policy = randomised(rl.by_hand(nets, "DPM++", "quadratic"), 0, 0.2)
        rl.save_policy("policy.pt", nets, policy, {})
        return (self.net, None), (self.first, None), sample.load_model("policy.pt", CPU)[:2]

    def test_an_image_is_the_same_in_any_batch(self):
        solver, seeds = hand_solver("DDIM", "quadratic", 3), range(5, 10)
        z = seeded_noise(seeds, (3, 8, 8))
        for (nets, policy), eta in itertools.product(self.models(), (0.0, 0.7)):
            many = sample.draw(nets, policy, solver, z, AB, eta, seeds)
            with mock.patch.object(sample, "chunk_size", lambda device: 2):
                self.close(sample.draw(nets, policy, solver, z, AB, eta, seeds), many)
            self.close(sample.draw(nets, policy, solver, z[2:3], AB, eta, seeds[2:3]), many[2:3])
            self.assertLessEqual(many.abs().max(), 1)

    def test_eta_1_is_ancestral_sampling(self):
        """A thousand steps of DDPM's posterior (Eqs. 6-7, Ho et al.) by hand, of a toy."""
        z, solver = seeded_noise([1, 2], (3, 2, 2)), hand_solver("DDIM", "uniform", ddpm.T)
        x, ab = z.double(), AB.double()
        for k, t in enumerate(range(ddpm.T, 0, -1), start=1):
            a, b, v = ab[t], ab[t - 1], 0.2 * x - 0.1
            x0, beta = a.sqrt() * x - (1 - a).sqrt() * v, 1 - a / b
            x = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * x) / (1 - a)
            x = x + ((1 - b) / (1 - a) * beta).sqrt() * seeded_noise([1, 2], (3, 2, 2), k)
        got = sample.draw(Toy(), None, solver, z, AB, 1.0, [1, 2])
        self.close(got, x.clamp(-1, 1), 2e-3)
        self.assertGreater((got - sample.draw(Toy(), None, solver, z, AB)).abs().max(), 0.1)

    def test_the_path_goes_from_noise_to_image_in_11_states(self):
        cases, z, real = [(*model, 3) for model in self.models()], noise(2), sample.sample
        for nets, policy, K in cases + [(Toy(), None, K) for K in (10, 12, 1000)]:
            solver = hand_solver("DDIM", "uniform", K)
            with mock.patch.object(sample, "sample", mock.Mock(side_effect=real)) as spy:
                path = sample.draw_path(nets, policy, solver, z, AB, 0.0, range(2))
            self.assertEqual(path.shape, (2, 5 if policy else min(K + 1, 11), 3, 8, 8))
            self.close(path[:, 0], z, 0)
            self.close(path[:, -1].clamp(-1, 1), sample.draw(nets, policy, solver, z, AB), 1e-6)
            if not policy:
                self.assertEqual(len(set(spy.call_args[0][-1])), path.shape[1])
                self.close(path[:, 1], real(nets, z, solver, AB, keep=[round(K / 10) or 1])[0], 0)

    @unittest.expectedFailure           # BUG: [:most] keeps the first eleven states, not the last
    def test_the_path_of_a_long_policy_ends_at_the_image_too(self):
        policy, z = rl.by_hand([Toy()] * 12, "DDIM", "uniform"), noise(2)
        path = sample.draw_path([Toy()] * 12, policy, None, z, AB, 0.0, None)
        self.close(path[:, -1].clamp(-1, 1), sample.draw([Toy()] * 12, policy, None, z, AB))

    def test_everything_a_checkpoint_can_do_is_compared(self):
        self.models()
        names = [(f"{kind} {grid}", K) for K in (2, 5) for kind in ddpm.SOLVERS
                 for grid in ddpm.GRIDS]
        for path, expected in ((self.tiny / "teacher.pt", names + [("the target", 3)]),
                               (self.tiny / "student.pt", names[:3] + names[6:9]),
                               ("policy.pt", [("learned", 4)])):
            found = [(c[0].split(", ")[1], *c[1:]) for c in sample.contenders(path, [2, 5], CPU)]
            self.assertEqual([c[:2] for c in found], expected)
            for name, K, _, _, solver in [c for c in found if c[1] in (2, 5)]:
                self.assertEqual(solver, hand_solver(*name.split(), K))

    def test_the_npz_is_what_fid_tools_read(self):
        teacher.save_teacher("big.pt", randomised(ddpm.UNet(**{**TINY, "image_size": 32})), {})
        words = shlex.split("--model big.pt --steps 2 --n 3 --npz new/a.npz --seed 7")
        self.run_main(sample, *words)
        with np.load("new/a.npz") as file:
            array = file["arr_0"]
        self.assertEqual((array.shape, array.dtype), ((3, 32, 32, 3), np.uint8))
        x = sample.draw(teacher.load_teacher("big.pt")[0], None, hand_solver(
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


def same(a, b):
    """Are nested values the same, tensors to the bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        parts = [*a.values(), *b.values()] if isinstance(a, dict) else [*a, *b]
        return len(a) == len(b) and all(map(same, parts[:len(a)], parts[len(a):]))
    return a == b


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

    def resumes(self, module, *words, state="state.pt"):
        """Run to `a`, and to `b` with a kill after the first checkpoint: the same bits."""
        def killed(*args):
            save(*args)
            raise KeyboardInterrupt
        save, text = module.save_state, self.run_main(module, *words, "--out", "a")
        with mock.patch.object(module, "save_state", killed), \
                self.assertRaises(KeyboardInterrupt):
            self.run_main(module, *words, "--out", "b")
        self.assertNotEqual(*(Path(f, state).read_bytes() for f in "ab"))
        self.assertIn("resumed at", self.run_main(module, *words, "--out", "b", "--resume"))
        self.assertTrue(same(*(load_checkpoint(f"{f}/{state}", "state")["parts"] for f in "ab")))
        self.assertEqual(*([{**row, "seconds": 0} for row in read_log(f)] for f in "ab"))
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
        self.assertLessEqual(len(parser_of(rl)._actions) - 1, 22)
        self.assertLessEqual(Path(rl.__file__).read_text(encoding="utf-8").count("p.error("), 4)

    def test_importing_prints_nothing_and_optimised_python_parses_from_any_folder(self):
        names = [module.__name__ for module in MODULES]
        done = subprocess.run(
            [sys.executable, "-OO", "-c", f"import {', '.join(names)}\n"
             f"for m in {', '.join(names)}: m.parse_args([])"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_bundled_files_are_found_from_another_folder(self):
        rl.load_inputs(rl.parse_args(["--relay"]), CPU)
        path, = sample.parse_args([]).model
        here = (HERE / path).exists()
        nets, policy, _ = sample.load_model(path if here else "checkpoints/teacher.pt", CPU)
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

    def test_the_student_clones_and_resumes_to_the_same_bits(self):
        self.patch(student, SAVE_EVERY=1, LOG_EVERY=1, STUDENT_UNET=TINY)
        self.assertIn("3-step image", self.resumes(student, *self.words[:2], "--smoke"))
        self.run_main(student, *self.words[:2], "--smoke", "--init", "teacher", "--out", "c")
        self.assertEqual(student.load_student("c/student.pt")[0].config, TINY)

    def test_the_encoders_train_and_resume_to_the_same_bits(self):
        x, labels = pictures.shapes_images(60, 8)
        self.patch(reward, SAVE_EVERY=1, LOG_EVERY=1, load_images=lambda *a, **k: (x, labels))
        self.assertIn("judge: ", self.resumes(reward, "--smoke", state="state-coach.pt"))
        for role in ("coach", "judge"):
            a, b = (reward.load_encoder(f"{f}/{role}.pt", role)[0].state_dict() for f in "ab")
            self.assertTrue(all(torch.equal(a[key], b[key]) for key in a))

    def test_the_main_job_resumes_to_the_same_bits_and_its_policy_is_sampled_and_evaluated(self):
        self.patch(rl, SAVE_EVERY=1)
        text = self.resumes(rl, *self.job, "--channel", "both", "--relay", "--kl", "0.1")
        self.assertRegex(text, r"1\.000000 [^@]*gain over [^@]*wrote a/policy.pt")
        for name in re.search(r"wrote (.*)", text)[1].removeprefix("a/").split(", "):
            self.assertTrue(Path("a", name).exists(), name)
        kept = load_checkpoint("a/policy.pt", "policy")["nets"]
        self.assertEqual({w.dtype for net in kept for w in net["weights"].values()},
                         {torch.float32})
        text = self.run_main(sample, "--model", "a/policy.pt", "--n", "5", "--npz", "n/i.npz")
        self.assertIn("5 images", text)
        text = self.run_main(sample, "--evaluate", "--n", "8", "--steps", "2", *self.words, "--out",
                             "e", "--model", "a/policy.pt", self.tiny / "teacher.pt")
        self.assertRegex(text, r"a/policy, learned +4 [^@]*the target +3 +-?0\.0000 ± 0\.0000")
        self.assertTrue(Path("e/frontier.png").exists())

    def test_bad_input_is_one_sentence_and_code_2_and_touches_nothing(self):
        Path("cut.pt").write_bytes((self.tiny / "student.pt").read_bytes()[:5000])
        Path("empty").mkdir()
        Samples.models(self)
        relay, coach, plain = [*self.job, "--relay"], f"{self.tiny}/coach.pt", self.words[1]
        for expected, module, *words in [
                ("no checkpoint", rl, *relay, "--student", "none.pt"),
                ("cannot be read", rl, *relay, "--student", "cut.pt"),
                ("a student is needed", rl, *relay, "--student", coach),
                ("no checkpoint empty", rl, *self.job, "--encoders", "empty"),
                ("'clip' is unknown", rl, *self.job, "--reward", "clip+mse"),
                ("must be even", rl, *self.words, "--group", "3"),
                ("leaves no jump", rl, *self.job, "--steps", "1"),
                ("belong to the pixels", rl, *self.job, "--kl", "1"),
                ("--relay needs", rl, *relay, "--init", "student"),
                ("is not empty", rl, *self.job, "--out", "."),
                ("--resume needs", rl, *self.job, "--resume"),
                ("no checkpoint", sample, "--model", "none.pt"),
                ("student or policy is needed", sample, "--model", coach),
                ("act without noise", sample, "--model", "policy.pt", "--eta", "1"),
                ("go with --evaluate", sample, "--model", plain, "--steps", "1", "2"),
                ("at least 8", sample, "--evaluate", "--model", plain, "--n", "7"),
                ("no such folder", teacher, "--data", "nowhere"),
                ("--updates: must be", student, "--updates", "0"),
                ("invalid choice", student, "--init", "nobody"),
                ("--resume goes with", reward, "--resume")]:
            with self.subTest(expected=expected, words=words[-2:]):
                self.assertTrue(expected)
                self.assertIn(expected, self.fails(module, *words))


# ==== PLANTED MISTAKES: each is put into the source, and a test must notice ==================

PLANTED_2 = [  # (module, what the source says, the mistake, the test that notices)
    (rl, "z.repeat_interleave(group, 0) if", "z.repeat(group, 1, 1, 1) if",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "target_all[pick].repeat_interleave(group, 0)", "target_all[pick].repeat(group, 1, 1, 1)",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "s.repeat_interleave(copies, 0) for s in", "torch.cat([s] * copies) for s in",
     "Loop.test_a_group_shares_a_noise_and_its_target"),
    (rl, "clipped = ratio.clamp(1 - clip_range, 1 + clip_range)", "clipped = ratio",
     "Surrogate.test_it_is_eq_7_and_the_policy_gradient_without_a_clip_range"),
    (rl, "return -torch.minimum(ratio * adv,", "return torch.minimum(ratio * adv,",
     "Loop.test_it_finds_the_optimum_of_a_known_reward"),
    (rl, "return max(policies.items()", "return min(policies.items()",
     "Deployment.test_the_base_is_the_best_hand_solver"),
    (rl, "logp_pixels = pixel_logp(mean, x_next, sigma)",
     "logp_pixels = pixel_logp(mean, mean, sigma)",
     "Loop.test_the_ratio_is_1_from_what_is_stored"),
    (rl, "logp = jump_logp(mean_u, u, std, acts)", "logp = jump_logp(u, u, std, acts)",
     "Loop.test_the_ratio_is_1_from_what_is_stored"),
    (rl, "groups.mean(1, keepdim=True)", "groups.mean(0, keepdim=True)",
     "Advantages.test_they_are_centred_by_group_and_scaled_by_batch"),
    (rl, "loss = loss + kl_weight * kl", "loss = loss + kl_weight * kl.detach()",
     "Loop.test_without_advantage_the_kl_alone_pulls_back"),
    (rl, "noise[1::2] = -noise[0::2]", "pass",
     "Loop.test_exploration_is_antithetic_and_of_the_right_spread"),
    (rl, "sigma = sigma.clamp(min=SIGMA_FLOOR) if last else sigma", "sigma = sigma + 1e-9",
     "Loop.test_exploration_is_antithetic_and_of_the_right_spread"),
    (rl, "torch.tensor([k < steps - 1, k > 0]", "torch.tensor([k < steps - 1, k >= 0]",
     "LogProbabilities.test_a_decision_is_a_gaussian_of_what_acts"),
    (rl, ".clamp(min=n - 1), t - 1)", ".clamp(min=n - 2), t - 1)",
     "Deployment.test_landing_leaves_room_and_ends_at_0"),
    (rl, "std = STD[1] + (STD[0] - STD[1]) * left", "std = STD[0]",
     "Loop.test_channels_take_turns_at_rates_that_fall_to_0"),
    (rl, 'g["lr"] = g["peak"] * left', 'g["lr"] = g["peak"]',
     "Loop.test_channels_take_turns_at_rates_that_fall_to_0"),
    (rl, "noise_and_targets(teacher, HELD_OUT, args", "noise_and_targets(teacher, 2, args",
     "Results.test_training_monitor_and_table_share_no_noise"),
    (rl, 'best = best_of(rows, ",")', 'best = best_of(rows, "DDIM")',
     "Results.test_the_printed_gain_is_right"),
    (rl, "gain_error=standard_error(gain)", 'gain_error=standard_error(rows[best]["reward"])',
     "Results.test_the_printed_gain_is_right"),
    (rl, 'if channel == "pixels" and (eta > 0 or last):', "if eta > 0 or last:",
     "Deployment.test_a_very_sharp_policy_is_the_deployment"),
    (rl, "s.unflatten(0, (-1, copies)) for s", "s.unflatten(0, (copies, -1)).transpose(0, 1) for s",
     "Loop.test_the_first_gradient_is_reinforces_row_by_row"),
    (rl, "loss * sigma / mean_sigma,", "loss,",
     "Loop.test_the_first_gradient_is_reinforces_row_by_row"),
    (sample, "seeds[i:i + size] if seeds", "seeds[:size] if seeds",
     "Samples.test_an_image_is_the_same_in_any_batch"),
    (sample, "torch.linspace(0, K, min(K + 1, most))", "torch.arange(min(K + 1, most))",
     "Samples.test_the_path_goes_from_noise_to_image_in_11_states"),
    (sample, "permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)",
     "Samples.test_the_npz_is_what_fid_tools_read"),
]
PLANTED = PLANTED_2


class PlantedMistakes(Case):
    def test_every_planted_mistake_is_noticed_by_a_failed_assertion(self):
        for module, right, wrong, test in PLANTED:
            with self.subTest(test=test, wrong=wrong):
                source = Path(module.__file__).read_text(encoding="utf-8")
                self.assertEqual(source.count(right), 1,
                                 f"'{right}' must stand once in {module.__name__}.py")
                result = self.with_mistake(module, source.replace(right, wrong), test)
                self.assertEqual(result.errors, [], "a crash does not count as noticed")
                self.assertNotEqual(result.failures, [], "the mistake went unnoticed")

    def with_mistake(self, module, source, test):
        """Result of one test while `module`, and what others imported from it, is this source."""
        result, (case, method) = unittest.TestResult(), test.split(".")
        before = {m: dict(vars(m)) for m in MODULES}
        try:
            exec(compile(source, module.__file__, "exec"), vars(module))
            for m, name in itertools.product(MODULES, before[module]):
                if not name.startswith("__") and before[m].get(name) is before[module][name]:
                    setattr(m, name, vars(module)[name])
            unittest.TestSuite([globals()[case](method)]).run(result)    # with its setUpClass
        finally:
            for m in MODULES:
                vars(m).update(before[m])
        return result


# ==== MAIN: the tests of the folders run too; the closing line counts ========================

if __name__ == "__main__":
    def load_tests(loader, tests, pattern):
        for path in ("harness/test_harness.py", "assignments/test_assignments.py",
                     "study/test_study.py"):
            if (HERE / path).exists():
                folder, file = (HERE / path).parent, Path(path).name
                tests.addTests(loader.discover(str(folder), file, str(folder)))
        return tests

    outcome = unittest.main(exit=False, verbosity=2 if "-v" in sys.argv else 1).result
    failed = len(outcome.failures) + len(outcome.errors) + len(outcome.unexpectedSuccesses)
    print(f"{max(0, outcome.testsRun - failed)} passed, {failed} failed")
    sys.exit(1 if failed or not outcome.testsRun else 0)
