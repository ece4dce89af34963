"""The specification, in the order of the files. Plain unittest; no network, GPU, data set or
checkpoint needed.

    python test_all.py            # under 90 seconds on two CPU cores; the last line counts

Test names are sentences. The last class plants known mistakes into the sources, one at a time, and
shows that a test notices each of them.
"""
import contextlib
import copy
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import ddpm
import reward
import rl_distill
import sample
import student
import teacher

HERE = Path(__file__).resolve().parent
MODULES = [ddpm, teacher, student, reward, rl_distill, sample]
TINY = dict(width=16, mults=[1, 2], blocks=1, attention=[4], dropout=0.0, image_size=8)
CPU = torch.device("cpu")
ROWS = torch.arange(4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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


@contextlib.contextmanager
def inside(folder):
    """Work in another folder for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def full(n, t):
    return torch.full((n,), t)


def modules_of(folder, *names):
    """The modules of these names in a folder of the repository."""
    path = str(Path(__file__).resolve().parent / folder)
    sys.path.insert(0, path)
    found = [importlib.import_module(name) for name in names]
    sys.path.remove(path)
    return found


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
        self.assertEqual(a.shape, b.shape, msg)
        self.assertFalse(torch.isnan(a.double()).any() or torch.isnan(b.double()).any(),
                         "NaN never passes")
        worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        self.assertLessEqual(worst, tol, msg)

    def bad_input(self, text, function, *args, **kw):
        with self.assertRaises(ddpm.BadInput) as caught:
            function(*args, **kw)
        self.assertIn(text, str(caught.exception))


def quiet(function, *args, **kw):
    """Call with the output caught; returns (result, what was printed)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        result = function(*args, **kw)
    return result, text.getvalue()


class Workshop:
    """Tiny checkpoints of every kind in a temporary folder, made once."""
    folder = None

    @classmethod
    def get(cls):
        if cls.folder is None:
            cls.keep = tempfile.TemporaryDirectory()
            cls.folder = Path(cls.keep.name)
            torch.manual_seed(0)
            t = randomised(ddpm.UNet(**TINY))
            ddpm.save_checkpoint(cls.folder / "teacher.pt", "teacher", config=t.config,
                                 weights=ddpm.half_weights(t), provenance=dict(seed=0))
            s = randomised(student.JumpUNet(**TINY), 1)
            student.save_student(cls.folder / "student.pt", s, None, dict(seed=0))
            c, j = reward.Coach().eval(), reward.Judge().eval()
            x = images(64)
            ddpm.save_checkpoint(cls.folder / "coach.pt", "coach", config=dict(classes=10),
                                 weights=ddpm.half_weights(c), provenance=dict(accuracy=0.1),
                                 scales=reward.term_scales(c, x))
            mean, cov = reward.moments(reward.encode(j, x))
            ddpm.save_checkpoint(cls.folder / "judge.pt", "judge", config=dict(classes=10),
                                 weights=ddpm.half_weights(j), provenance=dict(accuracy=0.1),
                                 mean=mean, covariance=cov, features=reward.encode(j, x))
        return cls.folder


def inputs(*names):
    """['--teacher', path, ...] of the tiny checkpoints."""
    return [part for n in names for part in (f"--{n}", str(Workshop.get() / f"{n}.pt"))]


# ==============================================================================================
# ddpm.py
# ==============================================================================================

class Schedule(Case):
    ab = ddpm.linear_alpha_bar()

    def test_alpha_bar_starts_at_one_and_equals_the_loop(self):
        ab = ddpm.linear_alpha_bar()
        self.assertEqual(ab.shape, (ddpm.T + 1,))
        product, expected = 1.0, [1.0]
        for i in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
            expected.append(product)
        self.close(ab, torch.tensor(expected), 1e-6)

    def test_q_sample_is_eq_4_for_every_element(self):
        x0, eps, t = (images(4), torch.randn(4, 3, 8, 8, generator=rng(1)),
                      torch.tensor([0, 1, 500, 1000]))
        out = ddpm.q_sample(x0, t, eps, self.ab)
        for b in range(4):
            a = self.ab[t[b]].item()
            self.close(out[b], math.sqrt(a) * x0[b] + math.sqrt(1 - a) * eps[b], 1e-5)

    def test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network(self):
        x0, t, eps = images(2), torch.tensor([100, 900]), torch.randn(2, 3, 8, 8, generator=rng(2))
        w = torch.tensor(0.3, requires_grad=True)
        loss = ddpm.simple_loss(lambda x, t: w * x, x0, t, eps, self.ab)
        x = ddpm.q_sample(x0, t, eps, self.ab)
        self.close(loss.detach(), torch.tensor([(0.3 * a - b) ** 2 for a, b in
                                                zip(x.flatten().tolist(),
                                                    eps.flatten().tolist())]).mean())
        loss.backward()
        self.assertGreater(w.grad.abs().item(), 1e-3)

    def test_images_become_bytes_and_units_with_clipping(self):
        x = torch.tensor([-2.0, -1, 0, 1, 2]).reshape(1, 1, 1, 5)
        self.assertEqual(ddpm.to_uint8(x).flatten().tolist(), [0, 0, 128, 255, 255])
        self.close(ddpm.to_unit(x).flatten(), [0, 0, 0.5, 1, 1])


class ReverseStep(Case):
    ab = ddpm.linear_alpha_bar()

    def test_eta_1_one_step_apart_is_ddpms_posterior(self):
        for t in (2, 10, 500, 1000):
            x0, x_t = images(3), torch.randn(3, 3, 8, 8, generator=rng(t))
            tt = full(3, t)
            eps = (x_t - self.ab[t].sqrt() * x0) / (1 - self.ab[t]).sqrt()
            mean, sigma = ddpm.ddim_step(x0, eps, tt, tt - 1, 1.0, self.ab.double())
            a, a1 = self.ab.double()[t].item(), self.ab.double()[t - 1].item()
            alpha, beta = a / a1, 1 - a / a1
            posterior = (math.sqrt(a1) * beta / (1 - a) * x0
                         + math.sqrt(alpha) * (1 - a1) / (1 - a) * x_t)
            self.close(mean.float(), posterior, 2e-5)
            self.close(sigma ** 2, torch.full((3,), (1 - a1) / (1 - a) * beta).double(), 1e-8)

    def test_eta_0_lands_exactly_on_the_forward_process(self):
        x0, eps = images(4), torch.randn(4, 3, 8, 8, generator=rng(3))
        t, t_next = torch.tensor([1000, 800, 500, 20]), torch.tensor([700, 1, 0, 10])
        mean, sigma = ddpm.ddim_step(x0, eps, t, t_next, 0.0, self.ab)
        self.close(mean, ddpm.q_sample(x0, t_next, eps, self.ab), 1e-5)
        self.close(sigma, torch.zeros(4), 0)

    def test_sigma_is_eq_16_and_zero_on_the_jump_into_0(self):
        t, t_next = torch.tensor([1000, 500]), torch.tensor([500, 0])
        a, b = self.ab[1000].item(), self.ab[500].item()
        self.close(ddpm.ddim_sigma(t, t_next, 0.5, self.ab),
                   [0.5 * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b), 0], 1e-6)

    def test_the_estimate_and_its_epsilon_explain_x_t(self):
        x_t, t, eps = (torch.randn(3, 3, 8, 8, generator=rng(4)), torch.tensor([1, 400, 1000]),
                       torch.randn(3, 3, 8, 8, generator=rng(5)))
        for clip in (False, True):
            x0_hat, eps_hat = ddpm.predict_x0(x_t, t, eps, self.ab, clip)
            self.close(ddpm.q_sample(x0_hat, t, eps_hat, self.ab), x_t, 2e-4)
            self.assertEqual(clip, x0_hat.abs().max().item() <= 1)

    def test_every_grid_decreases_from_T_to_0(self):
        for name in ddpm.GRIDS:
            for steps in (1, 2, 3, 50, 999, 1000):
                grid = ddpm.make_grid(name, steps)
                self.assertEqual((len(grid), grid[0], grid[-1]), (steps + 1, ddpm.T, 0))
                self.assertTrue(all(a > b for a, b in zip(grid, grid[1:])))
        self.assertEqual(ddpm.make_grid("quadratic", 4), [1000, 562, 250, 62, 0])
        grid = ddpm.make_grid("logsnr", 8)               # equal steps in lambda, but for the last
        level = 0.5 * torch.log(self.ab[grid[:-1]] / (1 - self.ab[grid[:-1]]))
        self.close(level.diff() / level.diff()[0], torch.ones(7), 0.05)

    def test_a_grid_that_cannot_be_is_refused(self):
        self.bad_input("number of steps", ddpm.make_grid, "uniform", 0)
        self.bad_input("unknown grid", ddpm.make_grid, "cubic", 4)
        for solver in (ddpm.sample, ddpm.dpm_solver):
            self.bad_input("must decrease", solver, None, images(1), [1000, 500, 600, 0], self.ab)


class Sampler(Case):
    ab = ddpm.linear_alpha_bar()

    def gaussian(self, x, t):
        return ddpm.mixture_eps(x, t, torch.tensor([[0.4, -0.2]]), 0.3, self.ab)

    def test_ddim_on_a_gaussian_follows_the_exact_recursion_and_converges_to_the_flow(self):
        x_T, mean = torch.randn(200, 2, generator=rng()), torch.tensor([[0.4, -0.2]])
        exact = ddpm.gaussian_flow(x_T, mean, 0.3, self.ab)
        errors = [(ddpm.sample(self.gaussian, x_T, ddpm.make_grid("uniform", k), self.ab,
                               clip=False) - exact).abs().max().item() for k in (10, 100, 1000)]
        self.assertLess(errors[2], 0.02)
        self.assertTrue(errors[0] > 5 * errors[1] > 25 * errors[2], errors)

    def test_the_second_order_solver_converges_with_the_square_and_starts_as_ddim(self):
        x_T, mean = torch.randn(200, 2, generator=rng()), torch.tensor([[0.4, -0.2]])
        exact = ddpm.gaussian_flow(x_T, mean, 0.3, self.ab)

        def end(solver, steps):
            return solver(self.gaussian, x_T, ddpm.make_grid("logsnr", steps), self.ab, clip=False)
        errors = {k: (end(ddpm.dpm_solver, k) - exact).square().mean().sqrt().item()
                  for k in (16, 32, 64)}
        self.assertTrue(errors[16] > 3 * errors[32] > 9 * errors[64], errors)
        ddim = (end(ddpm.sample, 32) - exact).square().mean().sqrt().item()
        self.assertLess(5 * errors[32], ddim)
        for steps in (1, 2):                      # no earlier estimate, or the jump into t = 0
            self.close(end(ddpm.dpm_solver, steps), end(ddpm.sample, steps), 1e-5)

    def test_ddpm_on_a_gaussian_gives_its_mean_and_spread(self):
        x_T = torch.randn(300, 2, generator=rng())
        end = ddpm.sample(self.gaussian, x_T, ddpm.make_grid("uniform", 200), self.ab, 1.0,
                          seeds=range(300), clip=False)
        variance = 1.0                                  # exact recursion of the variance, same grid
        grid = ddpm.make_grid("uniform", 200)
        for t, t_next in zip(grid, grid[1:]):
            a, b = self.ab[t].item(), self.ab[t_next].item()
            sigma2 = ddpm.ddim_sigma(torch.tensor([t]), torch.tensor([t_next]),
                                     1.0, self.ab).item() ** 2
            gain = (1 - a) ** 0.5 / (a * 0.09 + 1 - a)  # d eps* / d x
            slope = (b ** 0.5 * (1 - (1 - a) ** 0.5 * gain) / a ** 0.5
                     + max(1 - b - sigma2, 0) ** 0.5 * gain)
            variance = slope ** 2 * variance + sigma2
        self.close(end.mean(0), [0.4, -0.2], 4 * 0.3 / math.sqrt(300))
        self.close(end.std(0) / math.sqrt(variance), [1.0, 1.0], 4 / math.sqrt(600))

    def test_the_optimal_epsilon_of_a_mixture_agrees_with_a_brute_force_average(self):
        means, x = torch.tensor([[0.5, 0.0], [-0.5, 0.2]]), torch.tensor([[0.3, -0.1]])
        n, t = 400_000, 300
        centre = means[torch.randint(2, (n,), generator=rng(1))]
        x0 = centre + 0.2 * torch.randn(n, 2, generator=rng(2))
        a = self.ab[t]
        weight = torch.softmax(-((x - a.sqrt() * x0) ** 2).sum(1) / (2 * (1 - a)), 0)
        eps = (weight[:, None] * (x - a.sqrt() * x0) / (1 - a).sqrt()).sum(0)
        self.close(ddpm.mixture_eps(x, torch.tensor([t]), means, 0.2, self.ab)[0], eps, 0.01)

    def test_a_seed_is_the_same_image_in_any_batch_and_stream_numbers_differ(self):
        a, b = ddpm.seeded_noise([3, 4, 5], (3, 8, 8)), ddpm.seeded_noise([5], (3, 8, 8))
        self.close(a[2], b[0], 0)
        self.assertGreater((a[0] - a[1]).abs().max(), 0.5)
        for seed in (5, 6):
            self.assertGreater((ddpm.seeded_noise([seed], (3, 8, 8))
                                - ddpm.seeded_noise([5], (3, 8, 8), stream=1)).abs().max(), 0.5)

    def test_samples_do_not_depend_on_the_batch_even_with_noise(self):
        x_T, grid = ddpm.seeded_noise(range(4), (2,)), ddpm.make_grid("uniform", 20)
        together = ddpm.sample(self.gaussian, x_T, grid, self.ab, 1.0, seeds=range(4))
        alone = torch.cat([ddpm.sample(self.gaussian, x_T[i:i + 1], grid, self.ab, 1.0, seeds=[i])
                           for i in range(4)])
        self.close(together, alone, 1e-5)

    def test_nothing_adds_noise_at_the_last_step(self):
        x_T = torch.randn(2, 2, generator=rng())
        one = ddpm.sample(self.gaussian, x_T, [1000, 0], self.ab, 1.0, seeds=[1, 2])
        two = ddpm.sample(self.gaussian, x_T, [1000, 0], self.ab, 1.0, seeds=[3, 4])
        self.close(one, two, 0)

    def test_energy_distance_is_zero_for_equal_and_large_for_shifted_samples(self):
        x, y = torch.randn(500, 2, generator=rng(1)), torch.randn(500, 2, generator=rng(2))
        self.assertLess(abs(ddpm.energy_distance(x, y)), 0.02)
        self.assertGreater(ddpm.energy_distance(x, y + 1), 0.3)


class Network(Case):
    def test_the_papers_shape_has_35_7_million_parameters(self):
        self.assertEqual(ddpm.parameter_count(ddpm.UNet(**ddpm.PAPER_UNET)), 35_746_307)

    def test_an_untrained_network_is_right_at_the_highest_noise(self):
        net, ab = ddpm.UNet(**TINY), ddpm.linear_alpha_bar()
        x, t = torch.randn(2, 3, 8, 8, generator=rng()), torch.tensor([1000, 300])
        self.close(net(x, t).detach(), (1 - ab[t]).sqrt()[:, None, None, None] * x, 1e-6)

    def test_a_batch_is_the_same_as_one_by_one(self):
        net = randomised(ddpm.UNet(**TINY))
        x, t = torch.randn(5, 3, 8, 8, generator=rng()), torch.tensor([1, 100, 500, 900, 1000])
        with torch.no_grad():
            self.close(net(x, t), torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(5)]), 1e-5)

    def test_every_time_gives_another_output_and_every_parameter_a_gradient(self):
        net = randomised(ddpm.UNet(**TINY))
        x = images(1).expand(3, 3, 8, 8)
        out = (net(x, torch.tensor([499, 500, 501])).detach()
               - (1 - net.alpha_bar[[499, 500, 501]]).sqrt()[:, None, None, None] * x)
        self.assertGreater((out[0] - out[1]).abs().max(), 1e-5)
        self.assertGreater((out[1] - out[2]).abs().max(), 1e-5)
        net(torch.randn(2, 3, 8, 8, generator=rng()),
            torch.tensor([10, 900])).square().sum().backward()
        for name, p in net.named_parameters():
            self.assertGreater(p.grad.abs().max().item(), 0, name)

    def test_attention_is_softmax_of_qk_over_sqrt_c_times_v(self):
        block = randomised(ddpm.Attention(16))
        x = torch.randn(2, 16, 4, 4, generator=rng())
        h = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, 1e-6)
        expected = torch.empty_like(x)
        for b in range(2):
            tokens = h[b].reshape(16, 16).T
            q, k, v = (tokens @ block.qkv.weight.T + block.qkv.bias).split(16, 1)
            mixed = torch.softmax(q @ k.T / math.sqrt(16), 1) @ v
            expected[b] = x[b] + (mixed @ block.out.weight.T + block.out.bias).T.reshape(16, 4, 4)
        self.close(block(x).detach(), expected.detach(), 1e-5)

    def test_folded_upsampling_is_doubling_and_convolving_with_the_same_gradient(self):
        for channels in (16, 128):
            layer = ddpm.Upsample(channels, channels, 3, padding=1)
            x = torch.randn(2, channels, 3, 4, generator=rng())
            plain = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias,
                             padding=1)
            self.close(layer(x).detach(), plain.detach(), 1e-5)
            gradients = [torch.autograd.grad(y.square().sum(), layer.weight)[0]
                         for y in (layer(x), plain)]
            self.close(gradients[0], gradients[1], 1e-3)

    def test_the_schedule_is_no_parameter_and_in_no_checkpoint(self):
        self.assertNotIn("alpha_bar", ddpm.UNet(**TINY).state_dict())


class Checkpoints(Case):
    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)

    def test_saving_and_loading_returns_the_very_same_outputs(self):
        net = randomised(ddpm.UNet(**TINY))
        with torch.no_grad():                          # what fp16 can hold is held exactly
            for p in net.parameters():
                p.copy_(p.half().float())
        ddpm.save_checkpoint(self.folder / "a.pt", "teacher", config=net.config,
                             weights=ddpm.half_weights(net), provenance={})
        again, _ = ddpm.load_teacher(self.folder / "a.pt")
        x, t = torch.randn(2, 3, 8, 8, generator=rng()), torch.tensor([5, 900])
        self.close(again(x, t), net(x, t).detach(), 0)
        self.assertFalse(any(p.requires_grad for p in again.parameters()))

    def test_a_checkpoint_that_is_none_is_refused_with_a_sentence(self):
        path = self.folder / "a.pt"
        self.bad_input("there is no checkpoint", ddpm.load_checkpoint, path, "teacher")
        path.write_bytes(b"not a checkpoint")
        self.bad_input("cannot be read", ddpm.load_checkpoint, path, "teacher")
        path.write_bytes(b"")
        self.bad_input("cannot be read", ddpm.load_checkpoint, path, "teacher")
        torch.save({"format": ddpm.FORMAT, "kind": "teacher"}, path)
        self.bad_input("checksum", ddpm.load_checkpoint, path, "teacher")
        with mock.patch.object(ddpm, "FORMAT", "redif-0"):
            ddpm.save_checkpoint(path, "teacher")
        self.bad_input("not a checkpoint of this project", ddpm.load_checkpoint, path, "teacher")
        ddpm.save_checkpoint(path, "teacher", object=Path("x"))
        self.bad_input("as plain data", ddpm.load_checkpoint, path, "teacher")
        path.write_bytes(pickle.dumps({"format": ddpm.FORMAT}))
        self.bad_input("", ddpm.load_checkpoint, path, "teacher")

    def test_a_truncated_checkpoint_is_refused_at_every_length(self):
        whole = (Workshop.get() / "teacher.pt").read_bytes()
        for i in range(20):
            (self.folder / "cut.pt").write_bytes(whole[:len(whole) * i // 20])
            self.bad_input("cannot be read", ddpm.load_teacher, self.folder / "cut.pt")

    def test_a_changed_byte_anywhere_is_noticed_and_torch_alone_still_reads_the_file(self):
        whole, path = (Workshop.get() / "teacher.pt").read_bytes(), self.folder / "changed.pt"
        generator = np.random.default_rng(0)
        for where in [0, len(whole) - 1, len(whole) - 70, *generator.integers(len(whole), size=40)]:
            data = bytearray(whole)
            data[where] ^= 1 << int(generator.integers(8))
            path.write_bytes(data)
            self.bad_input("checksum", ddpm.load_teacher, path)
        path.write_bytes(whole + b" ")
        self.bad_input("checksum", ddpm.load_teacher, path)
        content = torch.load(Workshop.get() / "teacher.pt", weights_only=True)
        self.assertEqual(content["kind"], "teacher")

    def test_weights_that_are_not_finite_and_impossible_sizes_are_refused(self):
        net = ddpm.UNet(**TINY)
        weights = ddpm.half_weights(net)
        weights["conv_in.bias"][0] = math.nan
        ddpm.save_checkpoint(self.folder / "n.pt", "teacher", config=TINY, weights=weights)
        self.bad_input("not finite", ddpm.load_teacher, self.folder / "n.pt")
        for name, value in (("width", 10 ** 9), ("blocks", -1), ("mults", []), ("width", "8"),
                            ("image_size", 0.5), ("attention", None)):
            ddpm.save_checkpoint(self.folder / "s.pt", "teacher", config={**TINY, name: value},
                                 weights=weights)
            self.bad_input("s.pt" if name in ("mults", "attention") else "sizes",
                           ddpm.load_teacher, self.folder / "s.pt")

    def test_kinds_configs_and_shapes_must_fit(self):
        self.bad_input("a student is needed", ddpm.load_checkpoint, Workshop.get() / "teacher.pt",
                       "student")
        net = ddpm.UNet(**TINY)
        ddpm.save_checkpoint(self.folder / "b.pt", "teacher", config={**TINY, "width": 32},
                             weights=ddpm.half_weights(net))
        self.bad_input("does not fit", ddpm.load_teacher, self.folder / "b.pt")
        ddpm.save_checkpoint(self.folder / "c.pt", "teacher", config=dict(depth=3), weights={})
        self.bad_input("no usable U-Net config", ddpm.load_teacher, self.folder / "c.pt")

    def test_a_failed_save_leaves_the_old_file_and_no_debris(self):
        path = self.folder / "a.pt"
        ddpm.save_checkpoint(path, "teacher", config={})
        before = path.read_bytes()
        with mock.patch("torch.save", side_effect=OSError("disk full")), self.assertRaises(OSError):
            ddpm.save_checkpoint(path, "teacher", config={})
        self.assertEqual(path.read_bytes(), before)
        self.assertEqual(os.listdir(self.folder), ["a.pt"])

    def test_no_run_lands_in_the_folder_of_another(self):
        (self.folder / "x").mkdir()
        (self.folder / "x" / "file").write_text("mine")
        self.bad_input("not empty", ddpm.output_folder, self.folder / "x", "run")
        self.bad_input("is a file", ddpm.output_folder, self.folder / "x" / "file", "run")
        self.bad_input("no run to resume", ddpm.output_folder, self.folder / "y", "run", True)
        with inside(self.folder):
            for expected in ("run", "run-2", "run-3"):
                made = ddpm.output_folder(None, "run")
                self.assertEqual(made, Path("runs") / expected)
                made.mkdir(parents=True)
                (made / "f").write_text("")

    def test_a_folder_belongs_to_one_process_at_a_time(self):
        ddpm.claim_folder(self.folder / "run")
        ddpm.claim_folder(self.folder / "run")                      # mine already
        code = ("import sys, ddpm\nfrom pathlib import Path\n"
                "ddpm.run_main(lambda: ddpm.claim_folder(Path(sys.argv[1])))")
        words = [sys.executable, "-c", code, str(self.folder / "run")]
        here = Path(__file__).resolve().parent
        second = subprocess.run(words, capture_output=True, text=True, cwd=here)
        self.assertEqual(second.returncode, 2)
        self.assertIn("another process is writing", second.stderr)
        ddpm.release_folders()
        self.assertEqual(subprocess.run(words, capture_output=True, cwd=here).returncode, 0)
        self.assertEqual(os.listdir(self.folder / "run"), [])

    def test_a_run_stops_after_the_update_at_hand_once_it_is_saved(self):
        saved, seen = [], []
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            def main():
                for update in ddpm.until_stopped(range(9), "runs/x"):
                    seen.append(update)
                    if update == 3:
                        os.kill(os.getpid(), number)
                    if ddpm.due(update + 1, 100, 9):
                        saved.append(update + 1)
            before, text = signal.getsignal(number), io.StringIO()
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(text):
                ddpm.run_main(main)
            self.assertEqual(caught.exception.code, code)
            self.assertIn("--out runs/x --resume", text.getvalue())
            self.assertEqual(signal.getsignal(number), before)
        self.assertEqual((seen, saved), ([0, 1, 2, 3] * 2, [4, 4]))
        ddpm.STOP["signal"] = None

    def test_running_out_of_memory_is_one_sentence_and_other_errors_are_not_hidden(self):
        for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory")):
            text = io.StringIO()
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(text):
                ddpm.run_main(mock.Mock(side_effect=error), "--this-flag")
            self.assertEqual(caught.exception.code, 2)
            self.assertIn("lower --this-flag", text.getvalue())
        with self.assertRaises(RuntimeError):
            ddpm.run_main(mock.Mock(side_effect=RuntimeError("a bug")))

    def test_a_number_that_is_not_finite_stops_before_the_step(self):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer, wrong = torch.optim.AdamW([p], 0.1, fused=True), {}
        p.grad = torch.ones(2)
        ddpm.careful_step(optimizer, wrong, 1, loss=torch.tensor(1.0))
        before = p.detach().clone()
        with self.assertRaises(ddpm.BadInput) as caught:
            ddpm.careful_step(optimizer, wrong, 7, loss=torch.tensor(1.0),
                              gradient=torch.tensor(math.inf))
        self.assertIn("gradient was not finite at update 7", str(caught.exception))
        self.close(p.detach(), before, 0)

    def test_an_unusable_device_is_refused(self):
        self.bad_input("cannot be used here", ddpm.pick_device, "warp-drive")


# ==============================================================================================
# teacher.py
# ==============================================================================================

class Images(Case):
    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)

    def write(self, name, array):
        from PIL import Image
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    def test_a_batch_holds_images_of_the_set_half_of_them_mirrored(self):
        data = torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).reshape(3, 3, 2, 2) * 7
        x = teacher.draw_batch(data, 2000, rng())
        scaled = data.float() / 127.5 - 1
        plain = [(x == s).flatten(1).all(1) for s in scaled]
        mirror = [(x == s.flip(-1)).flatten(1).all(1) for s in scaled]
        self.assertTrue(torch.stack(plain + mirror).any(0).all())
        for kind in plain + mirror:
            self.assertAlmostEqual(kind.float().mean().item(), 1 / 6, delta=0.04)

    def test_a_folder_is_read_in_order_and_bad_files_are_named(self):
        red = np.zeros((40, 60, 3), np.uint8)
        red[..., 0] = 200
        self.write("a/1.png", red)
        self.write("b/2.png", np.full((32, 32), 50, np.uint8))              # grey
        (self.folder / "b" / "3.png").write_bytes(b"no image")
        (self.folder / "b" / "notes.txt").write_text("not an image either")
        (data, labels), text = quiet(teacher.load_images, str(self.folder))
        self.assertEqual((data.shape, data.dtype, labels.tolist()),
                         ((2, 3, 32, 32), torch.uint8, [0, 1]))
        self.assertEqual(data[0, :, 5, 5].tolist(), [200, 0, 0])
        self.assertEqual(data[1, :, 5, 5].tolist(), [50, 50, 50])
        self.assertIn("skipped 1", text)
        self.assertIn("3.png", text)

    def test_hostile_files_are_skipped_and_sound_ones_upright_and_opaque(self):
        from PIL import Image
        red_left = np.zeros((40, 40, 3), np.uint8)
        red_left[:, :20, 0] = 255
        exif = Image.Exif()
        exif[0x0112] = 6                                            # show turned clockwise
        (self.folder / "a").mkdir()
        Image.fromarray(red_left).save(self.folder / "a" / "1.jpg", exif=exif, quality=95)
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(self.folder / "a" / "2.png")
        Image.new("1", (9000, 9000)).save(self.folder / "a" / "huge.png")
        Image.new("RGB", (1, 3000), (9, 9, 9)).save(self.folder / "a" / "thin.png")
        (self.folder / "a" / "empty.png").write_bytes(b"")
        (self.folder / "a" / "folder.png").mkdir()
        with contextlib.suppress(OSError):
            (self.folder / "a" / "circle").symlink_to(self.folder, target_is_directory=True)
            (self.folder / "a" / "gone.png").symlink_to(self.folder / "nowhere")
        (data, _), text = quiet(teacher.load_images, str(self.folder))
        self.assertEqual(len(data), 3)
        self.assertGreater(data[0, 0, 4, 16], 200)                  # red is above now
        self.assertLess(data[0, 0, 28, 16], 50)
        self.assertEqual(data[1].unique().tolist(), [255])          # clear: white paper
        self.assertIn("skipped 3", text)

    def test_folders_without_images_are_refused(self):
        self.bad_input("no such folder", teacher.load_images, str(self.folder / "none"))
        self.bad_input("no class subfolders", teacher.load_images, str(self.folder))
        (self.folder / "a").mkdir()
        self.bad_input("no readable image", teacher.load_images, str(self.folder))

    def test_shapes_need_nothing_and_repeat(self):
        (a, labels), (b, _) = teacher.shapes_images(30), teacher.shapes_images(30)
        self.assertTrue(torch.equal(a, b))
        self.assertEqual((a.shape, set(labels.tolist())), ((30, 3, 32, 32), {0, 1, 2}))

    def test_an_existing_copy_of_cifar10_is_read_by_torchvision_in_its_own_format(self):
        from torchvision.datasets import CIFAR10
        base = self.folder / "data" / CIFAR10.base_folder
        base.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        blob = pickle.dumps({"data": pixels, "labels": [3, 1, 0, 2]})
        names = pickle.dumps({"label_names": list("abcd")})
        (base / "batch").write_bytes(blob)
        (base / "meta").write_bytes(names)
        with mock.patch.multiple(CIFAR10, train_list=[["batch", hashlib.md5(blob).hexdigest()]],
                                 test_list=[], meta=dict(filename="meta", key="label_names",
                                                         md5=hashlib.md5(names).hexdigest())):
            data, labels = teacher.cifar10_images(str(self.folder / "data"))
        self.assertTrue(torch.equal(data, torch.from_numpy(pixels.reshape(4, 3, 32, 32))))
        self.assertEqual(labels.tolist(), [3, 1, 0, 2])

    def test_no_network_for_the_download_is_one_sentence(self):
        from torchvision.datasets import CIFAR10
        with mock.patch.object(CIFAR10, "download", side_effect=OSError("unreachable")), \
                inside(self.folder):
            self.bad_input("could not be downloaded", quiet, teacher.load_images, "cifar10")


class TeacherTraining(Case):
    def test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn(self):
        t = teacher.draw_times(200_000, rng())
        self.assertEqual((t.min().item(), t.max().item()), (1, ddpm.T))
        self.close(torch.bincount(t, minlength=1001)[1:].reshape(10, 100).sum(1) / 200_000,
                   torch.full((10,), 0.1), 0.005)

    def test_ema_averages_parameters(self):
        net, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        expected = 0.9 * ema.weight.detach() + 0.1 * net.weight.detach()
        teacher.ema_update(ema, net, 0.9)
        self.close(ema.weight.detach(), expected, 1e-6)

    def test_the_learning_rate_warms_up_and_falls_to_zero(self):
        rates = [teacher.learning_rate(i, 1000, 1e-3) for i in range(1000)]
        self.assertAlmostEqual(rates[0], 1e-3 / teacher.WARMUP, delta=1e-7)
        self.assertLess(rates[-1], 1e-8)
        self.assertEqual(rates.index(max(rates)), teacher.WARMUP - 1)

    def test_a_picture_leaves_the_random_numbers_of_training_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(5)
            net = ddpm.UNet(**TINY)
            before = torch.get_rng_state()
            teacher.save_samples(Path(folder) / "s.png", net, CPU, n=2)
            self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_a_few_updates_lower_the_loss_on_one_image(self):
        torch.manual_seed(0)
        net, ab, g = ddpm.UNet(**TINY), ddpm.linear_alpha_bar(), rng()
        optimizer, losses = torch.optim.AdamW(net.parameters(), 2e-3), []
        for _ in range(60):
            x0 = images(1).expand(16, 3, 8, 8)
            loss = ddpm.simple_loss(net, x0, teacher.draw_times(16, g),
                                    torch.randn(x0.shape, generator=g), ab)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.assertLess(np.mean(losses[-10:]), 0.6 * np.mean(losses[:10]))


# ==============================================================================================
# student.py
# ==============================================================================================

class Jumps(Case):
    ab = ddpm.linear_alpha_bar()

    def setUp(self):
        self.teacher, _ = ddpm.load_teacher(Workshop.get() / "teacher.pt")
        self.z = ddpm.seeded_noise(range(4), (3, 8, 8))
        self.paths = student.teacher_paths(self.teacher, self.z, self.ab, CPU, fp32=True)

    def test_a_jump_with_the_secant_velocity_lands_where_it_should(self):
        x, y = torch.randn(4, 3, 8, 8, generator=rng(1)), torch.randn(4, 3, 8, 8, generator=rng(2))
        t, t_next = torch.tensor([1000, 900, 500, 20]), torch.tensor([0, 100, 490, 0])
        v = student.secant_velocity(x, y, t, t_next, self.ab)
        x0_hat, eps_hat = student.v_to_x0_eps(x, t, v, self.ab)
        self.close(ddpm.ddim_step(x0_hat, eps_hat, t, t_next, 0.0, self.ab)[0], y, 1e-3)

    def test_v_is_the_fields_velocity(self):
        x0, eps, t = images(2), torch.randn(2, 3, 8, 8, generator=rng(3)), torch.tensor([300, 1000])
        x_t, a = ddpm.q_sample(x0, t, eps, self.ab), ddpm.at(self.ab, t, x0)
        a0, e = student.v_to_x0_eps(x_t, t, a.sqrt() * eps - (1 - a).sqrt() * x0, self.ab)
        self.close(a0, x0, 1e-4)
        self.close(e, eps, 1e-4)

    def test_the_path_ends_where_the_sampler_ends_and_starts_at_the_noise(self):
        end = ddpm.sample(self.teacher, self.z, ddpm.make_grid("uniform", student.TEACHER_STEPS),
                          self.ab)
        self.close(self.paths[:, -1], end, 0)
        self.close(self.paths[:, 0], self.z, 0)

    def test_states_on_the_grid_are_the_paths_own_and_between_them_ddims(self):
        for k in (0, 1, 25, 49, 50):
            self.close(student.state_at(self.paths, ROWS, full(4, 1000 - 20 * k), self.ab),
                       self.paths[:, k], 1e-5)
        t, t_mid = full(4, 600), full(4, 587)
        x0_hat, eps_hat = ddpm.predict_x0(self.paths[:, 20], t, self.teacher(self.paths[:, 20], t),
                                          self.ab)
        self.close(student.state_at(self.paths, ROWS, t_mid, self.ab),
                   ddpm.ddim_step(x0_hat, eps_hat, t, t_mid, 0.0, self.ab)[0], 2e-4)

    def test_drawn_jumps_go_down_far_enough_and_reach_both_ends(self):
        t, t_next = student.draw_jumps(20_000, rng())
        self.assertTrue((t - t_next >= student.SHORTEST_JUMP).all())
        self.assertTrue((t_next >= 0).all() and (t <= ddpm.T).all())
        self.assertAlmostEqual((t == ddpm.T).float().mean().item(), student.START_SHARE, delta=0.02)
        self.assertAlmostEqual((t_next == 0).float().mean().item(), student.LAND_SHARE, delta=0.05)
        self.assertEqual(set(range(10, 1001)) - set(t.tolist()), set())

    def test_the_secant_target_is_the_landing_point_in_v_space(self):
        class Cheat(student.JumpUNet):                         # knows the paths by heart
            def forward(net, x, t, t_next, with_features=False):
                target = student.state_at(self.paths, ROWS, t_next, self.ab)
                return student.secant_velocity(x, target, t, t_next, self.ab)
        t, t_next = torch.tensor([1000, 1000, 700, 333]), torch.tensor([0, 400, 13, 0])
        cheat = Cheat(**TINY)
        self.assertLess(student.clone_loss(cheat, self.paths, ROWS, t, t_next, self.ab).item(),
                        1e-8)
        zero = student.JumpUNet(**TINY)                        # conv_out is zero: predicts v = 0
        x, y = (student.state_at(self.paths, ROWS, t, self.ab),
                student.state_at(self.paths, ROWS, t_next, self.ab))
        d = student.angle(t, self.ab, x) - student.angle(t_next, self.ab, x)
        landing = ((d.cos() * x - y) ** 2 / d.sin() ** 2).mean()
        self.close(student.clone_loss(zero, self.paths, ROWS, t, t_next, self.ab).detach(), landing,
                   1e-4 * landing.item())

    def test_the_eps_target_is_the_teachers_own_epsilon(self):
        copy_of_teacher = student.student_from_teacher(self.teacher)
        with mock.patch.object(ddpm.predict_x0, "__defaults__", (True,)):
            t = torch.tensor([400, 300, 200, 100])           # where the teacher was itself
            x_t = student.state_at(self.paths, ROWS, t, self.ab)
            own = self.teacher(x_t, t)
            clipped = ddpm.predict_x0(x_t, t, own, self.ab)[1]
            loss = student.clone_loss(copy_of_teacher, self.paths, ROWS, t, t - 50, self.ab).item()
        self.close(loss, F.mse_loss(own, clipped).item(), 1e-4)

    def test_a_copy_of_the_teacher_is_the_teacher(self):
        copied = student.student_from_teacher(self.teacher)
        t = torch.tensor([1000, 700, 40, 1])
        for t_next in (full(4, 0), t - 1):
            self.close(copied(self.z, t, t_next), self.teacher(self.z, t), 1e-6)
        grid = ddpm.make_grid("quadratic", 5)
        out, times, _ = student.deploy(copied, self.z, 5, self.ab, grid=grid)
        self.close(out, ddpm.sample(self.teacher, self.z, grid, self.ab), 1e-5)
        self.assertEqual(times[0].tolist(), grid)

    def test_a_scratch_student_sees_both_times(self):
        net = randomised(student.JumpUNet(**TINY))
        a, b, c = (net(self.z[:1], torch.tensor([t]), torch.tensor([s])).detach()
                   for t, s in ((900, 100), (900, 101), (901, 100)))
        self.assertGreater((a - b).abs().max(), 1e-6)
        self.assertGreater((a - c).abs().max(), 1e-6)

    def test_the_pool_keeps_the_newest_paths(self):
        pool = student.PathPool(self.teacher, 8, 0, self.ab, CPU, fp32=True)
        self.assertEqual((pool.chunk, pool.size), (2, 8))
        pool.grow(3)
        self.assertEqual(pool.made, 4)
        self.assertEqual(set(pool.draw(50, rng()).tolist()), {0, 1, 2, 3})
        first = pool.paths[:4].clone()
        pool.grow(10)
        self.assertFalse(torch.equal(pool.paths[0], first[0]))
        self.assertTrue(torch.equal(pool.paths[2], first[2]))

    def test_the_pool_comes_back_from_its_noise_alone_to_the_same_bits(self):
        pool = student.PathPool(self.teacher, 8, 0, self.ab, CPU)
        pool.grow(10)
        again = student.PathPool(self.teacher, 8, 5, self.ab, CPU)
        again.load_state_dict(pool.state_dict())
        pool.grow(12)
        again.grow(12)
        self.assertTrue(torch.equal(pool.paths, again.paths))


class Policy(Case):
    ab = ddpm.linear_alpha_bar()

    def test_it_starts_at_the_hand_grid_with_the_named_concentration(self):
        net = student.JumpUNet(**TINY)
        for base in ddpm.GRIDS:
            policy = student.StepPolicy(net.features, base)
            _, times, _ = student.deploy(net, torch.randn(3, 3, 8, 8, generator=rng()), 4, self.ab,
                                      policy)
            self.close(times[0].float(), torch.tensor(ddpm.make_grid(base, 4)).float(), 1)
            _, concentration, _ = policy(full(2, 500), full(2, 3), torch.zeros(2, net.features))
            self.close(concentration.detach(), torch.full((2,), student.CONCENTRATION), 1e-4)

    def test_no_parameter_is_out_of_reach_or_out_of_bounds(self):
        for shift in (-1e4, -30.0, 30.0, 1e4):
            policy = student.StepPolicy(8)
            with torch.no_grad():
                policy.head.bias[:2] = shift
            ratio, _ = policy.distribution(full(2, 500), full(2, 3), torch.zeros(2, 8))
            self.assertTrue(torch.isfinite(ratio.log_prob(torch.tensor(0.5))).all())
        x = torch.tensor([2.5], requires_grad=True)              # a clamp at 2 has no gradient here
        student.bounded(x, 2).backward()
        self.assertGreater(x.grad.item(), 0.1)

    def test_landing_always_leaves_room_for_the_steps_to_come(self):
        g = rng()
        for _ in range(20):
            t, n = full(100, ddpm.T), 8
            while n > 0:
                rho, stop = torch.rand(100, generator=g) ** 3, torch.rand(100, generator=g) < 0.0
                t_next = student.land(t, rho, full(100, n), stop)
                self.assertTrue((t_next < t).all() and (t_next >= n - 1).all())
                t, n = t_next, n - 1
            self.assertTrue((t == 0).all())
        self.assertEqual(student.land(full(1, 500), torch.tensor([0.0]), full(1, 3),
                                      torch.tensor([False])).item(), 2)
        self.assertEqual(student.land(full(1, 500), torch.tensor([0.9]), full(1, 3),
                                      torch.tensor([True])).item(), 0)

    def test_deciding_sends_no_gradient_into_the_features(self):
        policy = student.StepPolicy(8)
        torch.nn.init.normal_(policy.head.weight)
        features = torch.randn(2, 8, generator=rng(), requires_grad=True)
        mean, concentration, _ = policy(full(2, 500), full(2, 3), features)
        (mean.sum() + concentration.sum()).backward()
        self.assertIsNone(features.grad)
        self.assertGreater(policy.head.weight.grad.abs().max().item(), 0)

    def test_stopping_early_saves_evaluations(self):
        net = student.JumpUNet(**TINY)
        policy = student.StepPolicy(net.features)
        with torch.no_grad():
            policy.head.bias[2] = 10.0
        z = torch.randn(3, 3, 8, 8, generator=rng())
        _, times, _ = student.deploy(net, z, 4, self.ab, policy, may_stop=True)
        self.assertEqual((times[:, :-1] > 0).sum(1).tolist(), [1, 1, 1])
        _, times, _ = student.deploy(net, z, 4, self.ab, policy, may_stop=False)
        self.assertEqual((times[:, :-1] > 0).sum(1).tolist(), [4, 4, 4])

    def test_a_student_comes_back_from_its_file_as_it_was(self):
        with tempfile.TemporaryDirectory() as folder:
            net, policy = randomised(student.JumpUNet(**TINY)), student.StepPolicy(32, "quadratic")
            with torch.no_grad():
                for p in [*net.parameters(), *policy.parameters()]:
                    p.copy_(p.half().float())
            student.save_student(Path(folder) / "s.pt", net, policy, dict(seed=1), steps=3)
            net2, policy2, content = student.load_student(Path(folder) / "s.pt")
            z = torch.randn(2, 3, 8, 8, generator=rng())
            self.close(student.deploy(net2, z, 3, self.ab, policy2)[0],
                       student.deploy(net, z, 3, self.ab, policy)[0], 0)
            self.assertEqual(content["steps"], 3)

    def test_held_out_noise_is_disjoint_from_training_noise(self):
        with mock.patch("student.seeded_noise") as draw:
            student.held_out_noise(300, 8, CPU)
        self.assertGreaterEqual(min(draw.call_args[0][0]), student.HELD_OUT)


# ==============================================================================================
# reward.py
# ==============================================================================================

class Rewards(Case):
    def setUp(self):
        self.coach, content = reward.load_encoder(Workshop.get() / "coach.pt", "coach")
        self.scales = content["scales"]

    def view(self, x):
        return reward.look(self.coach, x)

    def test_the_teachers_own_image_gets_the_best_value_and_others_stay_in_range(self):
        x, y = images(6), images(6, seed=1)
        for name, term in reward.TERMS.items():
            best = torch.full((6,), float(term.best))
            self.close(term.function(self.view(x), self.view(x)), best, 1e-5,
                       name)
            other = term.function(self.view(y), self.view(x))
            self.assertTrue((other < term.best).all() and (other >= term.worst).all(), name)

    def test_no_reward_depends_on_the_batch_it_is_computed_in(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            alone = torch.cat([term.function(self.view(x[i:i + 1]), self.view(y[i:i + 1]))
                               for i in range(5)])
            self.close(term.function(self.view(x), self.view(y)), alone, 1e-5, name)

    def test_the_registry_says_rightly_where_gradients_reach_the_pixels(self):
        for name, term in reward.TERMS.items():
            x = images(2).requires_grad_(True)
            value = term.function(self.view(x), self.view(images(2, seed=1))).sum()
            self.assertEqual(value.requires_grad, term.differentiable, name)
            if term.differentiable:
                value.backward()
                self.assertGreater(x.grad.abs().max().item(), 1e-8, name)
        self.assertFalse(any(p.requires_grad for p in self.coach.parameters()))

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
        self.close(reward.Reward("mse", self.coach, self.scales)(x, x)[0], torch.zeros(3), 1e-6)

    def test_what_is_no_reward_is_refused(self):
        self.bad_input("unknown reward 'clip'", reward.parse_reward, "clip")
        self.bad_input("named twice", reward.parse_reward, "mse:1+mse:2")
        self.bad_input("must be a number", reward.parse_reward, "mse:much")
        self.bad_input("positive and finite", reward.parse_reward, "mse:-1")
        self.bad_input("positive and finite", reward.parse_reward, "mse:nan")

    def test_more_distortion_means_less_reward(self):
        x = images(16, size=32)
        for kind in ("noise", "wrong", "blur"):
            values = [-F.mse_loss(reward.distort(x, kind, level, rng()), x).item()
                      for level in (0, 0.25, 0.5, 1)]
            self.assertTrue(all(a > b for a, b in zip(values, values[1:])), (kind, values))
        self.close(reward.distort(x, "shift", 0.5, rng())[..., 4:], x[..., :-4], 0)


class Metrics(Case):
    def test_frechet_distance_of_known_gaussians(self):
        m1, m2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        c1, c2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
        self.assertAlmostEqual(reward.frechet_distance(m1, c1, m2, c2),
                               4 + (1 - 3) ** 2 + (2 - 1) ** 2, places=6)

    def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product(self):
        a, b = (torch.randn(200, 5, generator=rng(1)).double(),
                0.5 * torch.randn(300, 5, generator=rng(2)).double() + 1)
        (m1, c1), (m2, c2) = reward.moments(a), reward.moments(b)
        cross = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
        expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross
        self.assertAlmostEqual(reward.frechet_distance(m1, c1, m2, c2), expected.item(), places=6)
        self.close(c1, torch.from_numpy(np.cov(a.numpy().T)), 1e-9)

    def test_frechet_distance_stands_a_rank_deficient_covariance(self):
        x = torch.randn(5, 20, generator=rng())
        m, c = reward.moments(x)
        self.assertAlmostEqual(reward.frechet_distance(m, c, m, c), 0, places=5)
        self.assertAlmostEqual(reward.frechet_distance(m, c, m + 1, c), 20, places=4)

    def test_precision_and_recall_agree_with_loops(self):
        real, fake, k = (torch.randn(30, 2, generator=rng(1)),
                         torch.randn(25, 2, generator=rng(2)) + 0.7, 3)
        def radius(points, i):
            return sorted((points[i] - p).norm().item() for p in points)[k]
        r_real, r_fake = [radius(real, i) for i in range(30)], [radius(fake, j) for j in range(25)]
        inside_real = [[(real[i] - fake[j]).norm().item() <= r_real[i] for i in range(30)]
                       for j in range(25)]
        expected = dict(precision=np.mean([any(row) for row in inside_real]),
                        density=np.sum(inside_real) / (k * 25),
                        recall=np.mean([any((real[i] - fake[j]).norm().item() <= r_fake[j]
                                            for j in range(25)) for i in range(30)]),
                        coverage=np.mean([min((real[i] - fake[j]).norm().item() for j in range(25))
                                          <= r_real[i] for i in range(30)]))
        for name, value in reward.precision_recall(real, fake, k).items():
            self.assertAlmostEqual(value, expected[name], places=5, msg=name)

    def test_precision_takes_any_ball_not_the_nearest_neighbours(self):
        tight = torch.tensor([[0.0, 0], [0.01, 0], [0, 0.01]])
        wide = torch.tensor([[3.0, 0], [6, 0], [3, 3.0]])
        fake = torch.cat([torch.tensor([[0.5, 0.0]]),
                          torch.full((3, 2), 99.0) + torch.arange(3)[:, None]])
        self.assertEqual(reward.precision_recall(torch.cat([tight, wide]), fake, k=1)["precision"],
                         0.25)

    def test_the_crop_shifts_images_and_nothing_else(self):
        x = images(50, size=32)
        y = reward.random_crop(x, rng())
        self.assertEqual(y.shape, x.shape)
        for i in range(5):
            padded = F.pad(x[i:i + 1], [4] * 4, mode="reflect")[0]
            self.assertTrue(any(torch.equal(y[i], padded[:, a:a + 32, b:b + 32])
                                for a in range(9) for b in range(9)))


# ==============================================================================================
# rl_distill.py
# ==============================================================================================

def rl_args(*words):
    """Arguments with four rollouts of each noise."""
    args = rl_distill.parse_args(["--learn", "steps", "--steps", "4", "--noises", "8",
                                  "--noises-per-update", "4", *words])
    args.group = args.draws = 4
    return args


class Toy(torch.nn.Module):
    """Linear student: velocity w x + b, one feature. Small enough for exact answers."""
    predicts, features, order = "v", 1, 1

    def __init__(self):
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(torch.tensor(0.2)),
                          torch.nn.Parameter(torch.tensor(-0.1)))

    def forward(self, x, t, t_next, with_features=False):
        return self.w * x + self.b, torch.zeros(len(x), 1)


class LogProbabilities(Case):
    def test_a_step_is_a_beta_and_with_a_cost_a_bernoulli_before_it(self):
        policy = student.StepPolicy(4)
        torch.nn.init.normal_(policy.head.weight, std=0.3, generator=rng())
        t, n, features = full(3, 700), full(3, 4), torch.randn(3, 4, generator=rng())
        rho, stop = torch.tensor([0.3, 0.8, 0.99]), torch.tensor([False, True, False])
        mean, concentration, logit = policy(t, n, features)
        a, b = mean * concentration, (1 - mean) * concentration
        beta = ((a - 1) * rho.log() + (b - 1) * (1 - rho).log()
                - (a.lgamma() + b.lgamma() - (a + b).lgamma()))
        self.close(rl_distill.step_logp(policy, t, n, features, rho, stop, False).detach(),
                   beta.detach(), 1e-3)
        p = torch.sigmoid(logit)
        with_stop = torch.where(stop, p.log(), (1 - p).log() + beta)
        self.close(rl_distill.step_logp(policy, t, n, features, rho, stop, True).detach(),
                   with_stop.detach(), 1e-3)

    def test_a_landing_is_a_gaussian_averaged_over_dimensions(self):
        mean, x, sigma = images(3), images(3, seed=1), torch.tensor([0.1, 0.5, 1.0])
        normal = torch.distributions.Normal(mean, sigma[:, None, None, None])
        constant = -(sigma.log() + 0.5 * math.log(2 * math.pi))
        self.close(rl_distill.pixel_logp(mean, x, sigma),
                   normal.log_prob(x).mean((1, 2, 3)) - constant, 1e-4)

    def test_the_closed_form_kl_is_torchs(self):
        a, b, sigma = images(3), images(3, seed=1), torch.tensor([0.1, 0.5, 1.0])
        s = sigma[:, None, None, None]
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(a, s),
                                               torch.distributions.Normal(b, s))
        self.close(rl_distill.gaussian_kl(a, b, sigma), kl.mean((1, 2, 3)), 1e-4)

    def test_drawn_ratios_have_the_mean_and_spread_of_their_beta(self):
        a, b = torch.full((40_000,), 6.0), torch.full((40_000,), 2.0)
        rho = rl_distill.draw_rho(a, b, rng())
        self.assertAlmostEqual(rho.mean().item(), 0.75, delta=0.004)
        self.assertAlmostEqual(rho.var().item(), 12 / (64 * 9), delta=0.001)


class Advantages(Case):
    reward = torch.randn(24, generator=rng()) + torch.arange(24) // 4 * 10

    def test_groups_hold_one_noise_each(self):
        index = rl_distill.draw_groups(50, 5, 4, rng()).reshape(5, 4)
        self.assertTrue((index == index[:, :1]).all())
        self.assertEqual(len(set(index[:, 0].tolist())), 5)

    def test_global_and_group_and_batch_agree_with_loops(self):
        r = self.reward.tolist()
        groups = [r[i:i + 4] for i in range(0, 24, 4)]
        centred = [x - np.mean(g) for g in groups for x in g]
        self.close(rl_distill.advantages(self.reward, 4, "global"),
                   np.array(centred) / np.std(centred), 1e-4)
        self.close(rl_distill.advantages(self.reward, 4, "group"),
                   np.array([(x - np.mean(g)) / np.std(g) for g in groups for x in g]), 1e-4)
        self.close(rl_distill.advantages(self.reward, 4, "batch"),
                   (np.array(r) - np.mean(r)) / np.std(r), 1e-4)

    def test_a_shift_of_the_reward_changes_nothing(self):
        for how in ("global", "group", "batch"):
            self.close(rl_distill.advantages(self.reward + 5, 4, how),
                       rl_distill.advantages(self.reward, 4, how), 1e-4)

    def test_equal_rewards_give_zero_and_never_scaled_noise(self):
        flat = torch.full((8,), -0.7) + 2e-7 * torch.randn(8, generator=rng())
        for how in ("global", "group", "batch"):
            self.close(rl_distill.advantages(flat, 4, how), torch.zeros(8), 0)
        mixed = torch.cat([flat[:4], torch.tensor([0.0, 1, 2, 3])])
        for how in ("global", "group"):
            self.close(rl_distill.advantages(mixed, 4, how)[:4], torch.zeros(4), 1e-5)


class Surrogate(Case):
    logp_old, adv = torch.zeros(6), torch.tensor([1.0, 1, 1, -1, -1, -1])
    logp = torch.tensor([-0.5, 0.0, 0.5, -0.5, 0.0, 0.5])

    def test_it_is_eq_7_of_ppo_case_by_case(self):
        loss, ratio = rl_distill.clipped_surrogate(self.logp, self.logp_old, self.adv, 0.2)
        self.close(ratio, self.logp.exp(), 1e-6)
        e = math.exp
        self.close(loss, [-e(-0.5), -1, -1.2, 0.8, 1, e(0.5)], 1e-6)

    def test_gradients_vanish_where_clipped_and_only_there(self):
        logp = self.logp.clone().requires_grad_(True)
        rl_distill.clipped_surrogate(logp, self.logp_old, self.adv, 0.2)[0].sum().backward()
        self.assertEqual((logp.grad != 0).tolist(), [True, True, False, False, True, True])

    def test_an_infinite_clip_range_is_the_plain_policy_gradient(self):
        a, b = (torch.zeros(6, requires_grad=True) for _ in range(2))
        rl_distill.clipped_surrogate(a, self.logp_old, self.adv, math.inf)[0].sum().backward()
        rl_distill.channel_loss(b, self.logp_old, self.adv, 0.2, "reinforce")[0].sum().backward()
        self.close(a.grad, b.grad, 1e-6)
        self.close(a.grad, -self.adv, 1e-6)

    def test_the_score_function_gradient_agrees_with_the_pathwise_one(self):
        """Linear-Gaussian toy with a quadratic reward: both estimate the same number, within 4
        standard errors."""
        net, n, ab = Toy(), 40_000, ddpm.linear_alpha_bar()
        x = torch.randn(1, 3, 2, 2, generator=rng(1)).expand(n, 3, 2, 2)
        goal, sigma = torch.full((3, 2, 2), 0.3), torch.full((n,), 0.4)
        mean, _, _ = student.jump(net, x, full(n, 800), full(n, 300), ab)
        x_next = (mean + 0.4 * torch.randn(mean.shape, generator=rng(2))).detach()
        score = -((x_next - goal) ** 2).sum((1, 2, 3))
        logp = rl_distill.pixel_logp(mean, x_next, sigma)
        loss, _ = rl_distill.channel_loss(logp, logp.detach(), score - score.mean(), math.inf,
                                          "ppo")
        estimate, = torch.autograd.grad(loss.mean(), net.b, retain_graph=True)
        slope, = torch.autograd.grad(mean[0].sum(), net.b)  # d mean / d b, summed over 12
        # exact dR/db = -2 (mu - goal) slope/12
        pathwise = (2 * (mean[0] - goal)).sum().detach() * slope / 12
        per_sample = (-(score - score.mean())
                      * ((x_next - mean) / 0.16 * slope / 12).sum((1, 2, 3)).detach() / 12)
        error = per_sample.std().item() / math.sqrt(n)
        self.assertLess(abs(estimate.item() - pathwise.item() / 12), 4 * error)
        self.assertGreater(abs(pathwise.item() / 12), 25 * error)


class Loop(Case):
    ab = ddpm.linear_alpha_bar()

    def parts(self, args):
        """Net, reference, policy, optimizers and one rollout's worth of data on tiny models."""
        folder = Workshop.get()                 # before the seed: made on the first call
        torch.manual_seed(0)
        net, _, _ = student.load_student(folder / "student.pt")
        policy = student.StepPolicy(net.features)
        optimizer = (torch.optim.Adam(policy.parameters(), args.lr_steps) if args.learn == "steps"
                     else torch.optim.SGD(net.parameters(), args.lr_pixels))
        z = ddpm.seeded_noise(range(4), (3, 8, 8)).repeat_interleave(4, 0)
        return net, copy.deepcopy(net).requires_grad_(False), policy, optimizer, z

    def play(self, net, policy, z, args, g=None):
        return rl_distill.rollout(net, policy, z, args.learn, args, self.ab, g or rng())

    def update(self, net, ref, policy, optimizer, steps, adv, args):
        return rl_distill.policy_update(net, ref, policy, args.learn, optimizer, steps, adv, args,
                                        self.ab)

    def test_the_ratio_is_one_before_the_first_step_in_both_channels(self):
        for learn, eta in (("steps", 0), ("pixels", 0), ("pixels", 0.3)):
            args = rl_args("--learn", learn, "--eta", str(eta))
            net, ref, policy, optimizer, z = self.parts(args)
            _, _, steps = self.play(net, policy, z, args)
            adv = torch.randn(16, generator=rng())
            d = self.update(net, ref, policy, optimizer, steps, adv, args)
            self.assertAlmostEqual(d["ratio_t0"], 1.0, places=5)
            self.assertGreater(d["grad_norm"], 0)

    def test_each_channel_trains_its_own_parameters_only(self):
        for learn in ("steps", "pixels"):
            args = rl_args("--learn", learn, "--lr-pixels", "0.1")
            net, ref, policy, optimizer, z = self.parts(args)
            before = copy.deepcopy(policy)
            _, _, steps = self.play(net, policy, z, args)
            self.update(net, ref, policy, optimizer, steps, torch.randn(16, generator=rng()), args)
            self.assertEqual(rl_distill.drift(net, ref) > 0, learn == "pixels")
            self.assertEqual(any(not torch.equal(p, q) for p, q in zip(policy.parameters(),
                                                                       before.parameters())),
                             learn == "steps")

    def test_zero_advantage_gives_zero_gradient_and_the_kl_alone_pulls_back(self):
        for learn in ("steps", "pixels"):
            args = rl_args("--learn", learn)
            net, ref, policy, optimizer, z = self.parts(args)
            _, _, steps = self.play(net, policy, z, args)
            d = self.update(net, ref, policy, optimizer, steps, torch.zeros(16), args)
            self.assertEqual(d["grad_norm"], 0)
        args = rl_args("--learn", "pixels", "--kl", "1", "--inner-epochs", "1",
                       "--lr-pixels", "1e-3")
        net, ref, policy, optimizer, z = self.parts(args)
        randomised(net, 9, 0.01)
        _, _, steps = self.play(net, policy, z, args)
        kl = [self.update(net, ref, policy, optimizer, steps, torch.zeros(16), args)["kl"]
              for _ in range(5)]
        self.assertTrue(all(a > b > 0 for a, b in zip(kl, kl[1:])), kl)

    def test_ppos_first_gradient_is_reinforces(self):
        grads = []
        for learn, estimator in itertools.product(("steps", "pixels"), ("ppo", "reinforce")):
            args = rl_args("--learn", learn, "--estimator", estimator)
            args.inner_epochs = 1
            net, ref, policy, optimizer, z = self.parts(args)
            _, _, steps = self.play(net, policy, z, args)
            self.update(net, ref, policy, optimizer, steps, torch.randn(16, generator=rng()), args)
            grads.append([p.grad for p in (policy if learn == "steps" else net).parameters()])
        for a, b in (*zip(*grads[:2]), *zip(*grads[2:])):
            self.close(a, b, 1e-5 * (1 + b.abs().max().item()))

    def test_a_rollout_without_exploration_is_the_deployment(self):
        args = rl_args("--learn", "pixels", "--eta", "1e-9")
        net, _, policy, _, z = self.parts(args)
        with mock.patch.object(rl_distill, "SIGMA_FLOOR", 0.0):
            played, nfe, steps = self.play(net, policy, z, args)
        deployed, times, _ = student.deploy(net, z, args.steps, self.ab, policy)
        self.close(played, deployed, 1e-5)
        self.assertEqual(nfe.tolist(), [4] * 16)
        self.assertEqual(torch.stack([s["t_next"] for s in steps], 1).tolist(),
                         times[:, 1:].tolist())

    def test_a_teachers_copy_of_order_2_is_the_second_order_solver(self):
        plain, _ = ddpm.load_teacher(Workshop.get() / "teacher.pt")
        z = ddpm.seeded_noise(range(3), (3, 8, 8))
        for name in ddpm.GRIDS:
            grid = ddpm.make_grid(name, 5)
            net = student.student_from_teacher(plain, order=2).eval()
            ends = student.deploy(net, z, 5, self.ab, grid=grid)[0]
            self.close(ends, ddpm.dpm_solver(plain, z, grid, self.ab), 1e-5)
            self.assertGreater((ends - ddpm.sample(plain, z, grid, self.ab)).abs().max(), 1e-3)

    def test_a_second_order_rollout_without_exploration_is_the_deployment(self):
        plain, _ = ddpm.load_teacher(Workshop.get() / "teacher.pt")
        net = student.student_from_teacher(plain, order=2).eval()
        policy, z = student.StepPolicy(net.features), ddpm.seeded_noise([5] * 4, (3, 8, 8))
        args = rl_args("--init", "teacher", "--learn", "pixels", "--eta", "1e-9")
        with mock.patch.object(rl_distill, "SIGMA_FLOOR", 0.0):
            played, _, steps = self.play(net, policy, z, args)
        self.close(played, student.deploy(net, z, args.steps, self.ab, policy)[0], 1e-5)
        self.assertEqual([s["last"]["t_last"][0].item() for s in steps],
                         [1000] + [s["t"][0].item() for s in steps[:-1]])

    def test_the_old_log_probability_is_recomputed_from_what_was_seen(self):
        """ratio_t0 is 1 for a second-order student too, and is not once its memory is lost."""
        plain, _ = ddpm.load_teacher(Workshop.get() / "teacher.pt")
        net = student.student_from_teacher(plain, order=2).eval()
        policy, z = student.StepPolicy(net.features), ddpm.seeded_noise([5] * 4, (3, 8, 8))
        args = rl_args("--init", "teacher", "--learn", "pixels", "--eta", "0.3")
        _, _, steps = self.play(net, policy, z, args)

        def ratio(s):
            return rl_distill.pixel_surrogate(net, net, s, torch.arange(4), torch.ones(4), 1.0,
                                              args, self.ab)[1]
        self.close(ratio(steps[1]), torch.ones(4), 1e-5)
        lost = dict(steps[1], last=student.nothing_seen(net, z))
        self.assertGreater((ratio(lost) - 1).abs().max(), 1e-3)

    def test_training_explores_the_last_jump_too_and_in_antithetic_pairs(self):
        args = rl_args("--learn", "pixels", "--eta", "0.3")
        net, _, policy, _, z = self.parts(args)
        _, _, steps = self.play(net, policy, z, args)
        self.assertTrue((steps[-1]["sigma"] == rl_distill.SIGMA_FLOOR).all())
        s = steps[0]
        mean, _, _ = student.jump(net, s["x_t"], s["t"], s["t_next"], self.ab, args.eta)
        noise = (s["x_next"] - mean).detach()
        self.close(noise[0::2], -noise[1::2], 1e-4)
        self.assertGreater((noise[0] - noise[2]).abs().max(), 0.01)

    def test_with_eta_0_only_the_landing_explores_and_a_group_shares_its_network_calls(self):
        args = rl_args("--learn", "pixels")
        net, _, policy, _, z = self.parts(args)
        seen = []
        with mock.patch.object(rl_distill, "jump", side_effect=lambda net, x, *a: (
                seen.append(len(x)), student.jump(net, x, *a))[1]):
            images, _, steps = self.play(net, policy, z, args)
        self.assertEqual(seen, [4] * 4)                     # 16 rollouts, 4 noises, 4 steps
        self.assertEqual([len(s["explored"]) for s in steps], [0, 0, 0, 16])
        clean = student.deploy(net, z, 4, self.ab, policy)[0]
        off = (images - clean).reshape(4, 4, -1).std(2)
        self.assertGreater(off.min(), 0.2 * rl_distill.SIGMA_FLOOR)
        self.assertLess(off.max(), 1.5 * rl_distill.SIGMA_FLOOR)

    def test_backprop_last_is_the_gradient_that_the_landings_estimate(self):
        """Mean of the policy gradient over many draws against the exact one, same noises."""
        args = rl_args("--learn", "pixels", "--inner-epochs", "1", "--steps", "2")
        args.draws = 4000
        net, ref, policy, _, _ = self.parts(args)
        randomised(net, 3, 0.1)
        z = ddpm.seeded_noise([1, 2], (3, 8, 8)).repeat_interleave(4000, 0)
        target = images(2).repeat_interleave(4000, 0)

        def score(x, y):
            return -(x - y).square().mean((1, 2, 3)), {}
        still = torch.optim.SGD(net.parameters(), 0.0)
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", return_value=torch.ones(())):
            x, _, steps = self.play(net, policy, z, args)
            adv = score(x, target)[0].reshape(2, -1)
            adv = (adv - adv.mean(1, keepdim=True)).reshape(-1)
            self.update(net, ref, policy, still, steps, adv, args)
            estimate = torch.cat([p.grad.flatten() for p in net.parameters()])
            args.estimator = "backprop-last"
            rl_distill.backprop_update(net, policy, still, z, target, score, args, self.ab)
        exact = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                           for p in net.parameters()])
        # the log-density is a mean over 192 dimensions, so its gradient is 192 times too small
        ratio = 192 * (estimate @ exact) / (exact @ exact)
        self.assertGreater(F.cosine_similarity(estimate, exact, 0), 0.9)
        self.close(ratio, 1.0, 0.1)

    def test_the_channels_take_turns_with_groups_of_their_own(self):
        seen, changed = [], []
        real, before = rl_distill.advantages, {}

        def advantages(r, group, baseline):
            seen.append((len(r), group))
            return real(r, group, baseline)

        def update(net, ref, policy, channel, *more):
            before.update(steps=copy.deepcopy(policy.state_dict()),
                          pixels=copy.deepcopy(net.state_dict()))
            result = real_update(net, ref, policy, channel, *more)
            now = dict(steps=policy.state_dict(), pixels=net.state_dict())
            changed.append([c for c in now if any(not torch.equal(now[c][k], before[c][k])
                                                  for k in now[c])])
            return result
        real_update = rl_distill.policy_update
        with mock.patch.object(rl_distill, "advantages", advantages), \
                mock.patch.object(rl_distill, "policy_update", update), \
                tempfile.TemporaryDirectory() as folder:
            quiet(rl_distill.main, [*inputs("teacher", "student", "coach"), "--smoke", "--learn",
                                    "both", "--group", "4", "--draws", "6", "--out", folder + "/o"])
            log = ddpm.read_log(folder + "/o")
        self.assertEqual(seen, [(8, 4), (12, 6)])
        self.assertEqual(changed, [["steps"], ["pixels"]])
        self.assertEqual([r["channel"] for r in log], ["steps", "pixels"])
        self.assertEqual([r["rollouts"] for r in log], [8, 20])

    def test_sharing_changes_no_gradient(self):
        for eta in ("0", "0.3"):
            grads, adv = [], torch.randn(16, generator=rng())
            for separate in (False, True):
                args = rl_args("--learn", "pixels", "--eta", eta, "--inner-epochs", "1", "--kl",
                               "0.1", "--minibatch", "3")
                net, ref, policy, optimizer, z = self.parts(args)
                randomised(ref, 9, 0.01)
                _, _, steps = self.play(net, policy, z, args)
                for s in steps:
                    s["shared"] = 1 if separate else s["shared"]
                self.update(net, ref, policy, optimizer, steps, adv, args)
                grads.append([p.grad.clone() for p in net.parameters()])
            for a, b in zip(*grads):
                self.close(a, b, 1e-4 * (1e-3 + b.abs().max().item()))
            self.assertGreater(max(g.abs().max() for g in grads[0]), 1e-3)

    def test_where_evaluations_cost_and_bring_nothing_the_policy_learns_to_stop(self):
        args = rl_args("--step-cost", "0.1")
        net, ref, policy, optimizer, z = self.parts(args)
        g, saved = rng(), []
        for _ in range(20):                     # as many updates as an arm of the study has
            _, nfe, steps = self.play(net, policy, z, args, g)
            saved.append(nfe.float().mean().item())
            adv = rl_distill.advantages(-args.step_cost * nfe, 4, "global")
            self.update(net, ref, policy, optimizer, steps, adv, args)
        self.assertGreater(sum(saved[:5]) / 5, 3)
        _, times, _ = student.deploy(net, z, 4, self.ab, policy, may_stop=True)
        self.assertEqual((times[:, :-1] > 0).sum(1).tolist(), [1] * 16)

    def test_where_steps_cost_some_rollouts_stop_early_and_their_rows_are_kept_apart(self):
        args = rl_args("--step-cost", "0.1")
        net, _, policy, _, z = self.parts(args)
        with torch.no_grad():
            policy.head.bias[2] = -student.STOP_LOGIT / student.STOP_GAIN           # a coin flip
        _, nfe, steps = self.play(net, policy, z, args)
        self.assertGreater(len(set(nfe.tolist())), 1)
        self.assertEqual(sum(len(s["rows"]) for s in steps), nfe.sum().item())
        for s in steps:
            self.assertTrue((s["t"] > 0).all())

    def test_the_step_policy_finds_the_optimum_of_a_known_reward(self):
        """Two steps, reward -(t_1 - 300)^2: the mean step must move from 500 to near 300."""
        args = rl_args("--steps", "2", "--lr-steps", "0.03")
        net, ref, policy, optimizer, z = self.parts(args)
        g = rng()
        for _ in range(60):
            _, _, steps = self.play(net, policy, z, args, g)
            score = -((steps[0]["t_next"] - 300) / 100.0) ** 2
            adv = rl_distill.advantages(score, 4, "global")
            self.update(net, ref, policy, optimizer, steps, adv, args)
        _, times, _ = student.deploy(net, z, 2, self.ab, policy)
        self.assertLess(abs(times[0, 1].item() - 300), 60)

    def test_direct_backpropagation_raises_a_differentiable_reward(self):
        args = rl_args("--learn", "pixels", "--estimator", "backprop", "--steps", "2",
                       "--lr-pixels", "1e-3")
        net, _, policy, _, z = self.parts(args)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        coach, content = reward.load_encoder(Workshop.get() / "coach.pt", "coach")
        score, target = reward.Reward("mse+feature", coach, content["scales"]), images(16)
        def now():
            return score(student.deploy(net, z, 2, self.ab, policy)[0], target)[0].mean().item()
        first = now()
        for _ in range(5):
            rl_distill.backprop_update(net, policy, optimizer, z, target, score, args, self.ab)
        self.assertGreater(now(), first + 0.01)

    def test_noise_for_training_monitoring_and_the_table_is_disjoint(self):
        drawn = []
        real = rl_distill.seeded_noise
        with mock.patch("rl_distill.seeded_noise", side_effect=lambda seeds, *a, **k:
                        (drawn.append(set(seeds)), real(seeds, *a, **k))[1]), \
                tempfile.TemporaryDirectory() as folder:
            quiet(rl_distill.main,
                  [*inputs("teacher", "student", "coach"), "--smoke", "--out", folder + "/o"])
        self.assertEqual(len(drawn), 3)
        for i in range(3):
            for j in range(i):
                self.assertFalse(drawn[i] & drawn[j])


# ==============================================================================================
# sample.py
# ==============================================================================================

class Samples(Case):
    ab = ddpm.linear_alpha_bar()

    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)

    def test_teacher_and_student_start_from_the_same_noise_in_any_batch(self):
        for name in ("teacher", "student"):
            net, policy, _ = sample.load_model(Workshop.get() / f"{name}.pt", CPU)
            grid = ddpm.make_grid("uniform", 3)
            many, _ = sample.generate(net, policy, range(5, 9), 3, grid, 0.0, False, self.ab, CPU)
            one, _ = sample.generate(net, policy, [7], 3, grid, 0.0, False, self.ab, CPU)
            self.close(many[2], one[0], 1e-5)

    def test_eta_1_is_the_samplers_ancestral_sampling(self):
        net, _, _ = sample.load_model(Workshop.get() / "teacher.pt", CPU)
        plain, _ = ddpm.load_teacher(Workshop.get() / "teacher.pt")
        z, grid = ddpm.seeded_noise([1, 2], (3, 8, 8)), ddpm.make_grid("uniform", 6)
        for eta in (0.3, 1.0):
            noisy, _ = sample.generate(net, None, [1, 2], 6, grid, eta, False, self.ab, CPU)
            self.close(noisy, ddpm.sample(plain, z, grid, self.ab, eta, seeds=[1, 2]), 1e-4)

    def test_the_path_starts_at_the_noise_and_ends_at_the_image(self):
        net, _, _ = sample.load_model(Workshop.get() / "student.pt", CPU)
        grid = ddpm.make_grid("uniform", 3)
        x, path = sample.generate(net, None, [1, 2], 3, grid, 0.0, False, self.ab, CPU)
        self.close(path[:, 0], ddpm.seeded_noise([1, 2], (3, 8, 8)), 0)
        self.close(path[:, -1].clamp(-1, 1), x, 0)
        t, t_next = full(2, grid[1]), full(2, grid[2])
        self.close(student.jump(net, path[:, 1], t, t_next, self.ab)[0].detach(), path[:, 2], 1e-5)

    def test_the_npz_is_what_fid_tools_read_and_overwrites_nothing(self):
        x = images(3)
        sample.write_npz(self.folder / "a.npz", x)
        with np.load(self.folder / "a.npz") as file:
            array = file["arr_0"]
        self.assertEqual((array.shape, array.dtype), ((3, 8, 8, 3), np.uint8))
        self.assertEqual(array[1, 2, 3].tolist(), ddpm.to_uint8(x)[1, :, 2, 3].tolist())
        self.bad_input("exists already", sample.check_new, self.folder / "a.npz", None)
        with self.assertRaises(FileExistsError):
            sample.write_npz(self.folder / "a.npz", x)
        sample.write_pngs(self.folder / "png", x, 40)
        self.assertEqual(sorted(os.listdir(self.folder / "png")),
                         ["0000000040.png", "0000000041.png", "0000000042.png"])
        self.bad_input("not an empty folder", sample.check_new, None, self.folder / "png")

    def test_the_search_never_returns_less_than_the_best_hand_grid(self):
        net, _, _ = sample.load_model(Workshop.get() / "teacher.pt", CPU)
        z = ddpm.seeded_noise(range(6), (3, 8, 8))
        target = ddpm.sample(net_as_eps(net), z, ddpm.make_grid("uniform", 50), self.ab)

        def score(x, y):
            return -(x - y).square().mean((1, 2, 3)), {}
        grid = sample.search_grid(net, z, target, score, 3, 15, self.ab)
        def value(g):
            return score(student.deploy(net, z, 3, self.ab, grid=g)[0], target)[0].mean().item()
        self.assertTrue(grid[0] == 1000 and grid[-1] == 0
                        and all(a > b for a, b in zip(grid, grid[1:])))
        self.assertGreater(value(grid),
                           max(value(ddpm.make_grid(n, 3)) for n in ddpm.GRIDS))


def net_as_eps(net):
    return lambda x, t: net(x, t, t)


# ==============================================================================================
# COMMANDS: every script end to end, tiny; resume; bad input
# ==============================================================================================

class Commands(Case):
    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)
        working = inside(self.folder)
        working.__enter__()
        self.addCleanup(working.__exit__, None, None, None)

    def run_main(self, module, *words):
        try:
            return quiet(module.main, [str(w) for w in words])[1]
        finally:
            ddpm.release_folders()

    def fails(self, module, *words):
        """The command must end with code 2 and one sentence, and write nothing. Returns the
        sentence."""
        before = sorted(self.folder.rglob("*"))
        sentence = self.fails_after_start(module, *words)
        self.assertEqual(sorted(self.folder.rglob("*")), before, "a refused command writes nothing")
        return sentence

    def test_every_script_explains_itself(self):
        for module in MODULES:
            text = io.StringIO()
            with self.assertRaises(SystemExit) as caught, contextlib.redirect_stdout(text):
                module.parse_args(["--help"])
            self.assertEqual(caught.exception.code, 0)
            self.assertIn("example: python", text.getvalue())
            self.assertGreater(len(text.getvalue()), 500)

    def test_every_flag_is_read_somewhere(self):
        for module in MODULES:
            source = Path(module.__file__).read_text(encoding="utf-8")
            for name in vars(module.parse_args([])):
                read = re.search(rf"args\.{name}\b", source)
                self.assertTrue(read, f"{module.__name__} --{name}")

    def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(self):
        """A real process and SIGKILL; study/stress.py does it many times, to every script."""
        stress, = modules_of("study", "stress")

        def start(out, *more):
            return stress.launch("teacher", "--data", "shapes", "--out", self.folder / out, *more,
                                 sizes=dict(updates=40, save_every=8, log_every=1))
        alone, killed = start("a"), start("b")
        while killed.poll() is None and not (self.folder / "b" / "state.pt").exists():
            time.sleep(0.01)
        killed.kill()
        killed.communicate()
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        again = start("b", "--resume")
        text = again.communicate()[0]
        alone.communicate()
        self.assertEqual((alone.returncode, again.returncode), (0, 0), text)
        self.assertIn("resumed at update", text)
        self.assertEqual((self.folder / "a" / "log.jsonl").read_text().count("\n"), 40)
        self.assertEqual((self.folder / "b" / "log.jsonl").read_text().count("\n"), 40)
        a, b = (ddpm.load_checkpoint(self.folder / f / "state.pt", "teacher-state") for f in "ab")
        for part in ("net", "ema"):
            for name, value in a["parts"][part].items():
                self.assertTrue(torch.equal(value, b["parts"][part][name]), name)

    def test_a_reward_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(self):
        real, calls = rl_distill.rollout, []

        def poisoned(*args):
            images, nfe, steps = real(*args)
            calls.append(1)
            return (images * math.nan if len(calls) == 2 else images), nfe, steps
        with mock.patch.object(rl_distill, "rollout", side_effect=poisoned):
            text = self.fails_after_start(rl_distill, *inputs("teacher", "student", "coach"),
                                          "--smoke", "--save-every", "1", "--out", "poisoned")
        self.assertIn("the reward was not finite at update 2", text)
        state = ddpm.load_checkpoint("poisoned/state.pt", "rl-state")
        self.assertEqual(state["update"], 1)

    def fails_after_start(self, module, *words):
        """Like fails(), for a run that had begun and so has written something."""
        text = io.StringIO()
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(text), \
                contextlib.redirect_stdout(text):
            ddpm.run_main(lambda: module.main([str(w) for w in words]))
        self.assertEqual(caught.exception.code, 2)
        self.assertNotIn("Traceback", text.getvalue())
        return text.getvalue().strip().splitlines()[-1]

    def test_numbers_out_of_range_are_refused_as_they_are_read(self):
        """Every numeric flag of every script, with random and with impossible values."""
        generator = np.random.default_rng(0)
        for module in MODULES:
            parser = []
            with mock.patch("argparse.ArgumentParser.parse_args", autospec=True,
                            side_effect=lambda self, argv: parser.append(self) or exit(3)), \
                    self.assertRaises(SystemExit):
                module.parse_args([])
            flags = [a for a in parser[0]._actions if a.type is not None and not a.choices]
            self.assertGreater(len(flags), 0)
            for action in flags:
                values = ["nan", "inf", "-inf", "-1", "1e400", "x", "", "1e-400j"]
                values += [str(v) for v in generator.normal(0, 1e6, 3)]
                for value in values:
                    text = io.StringIO()
                    try:
                        with contextlib.redirect_stderr(text):
                            module.parse_args([f"{action.option_strings[0]}={value}"])
                    except SystemExit as stopped:
                        self.assertEqual(stopped.code, 2)
                        self.assertIn("error:", text.getvalue())
                    else:                                           # then it was in range
                        self.assertTrue(math.isfinite(float(value)) and float(value) >= 0,
                                        f"{module.__name__} {action.option_strings[0]} {value}")

    def test_importing_prints_nothing_and_a_script_runs_as_a_process(self):
        done = subprocess.run([sys.executable, "-c", "import sample, sys; sys.stdout.flush()"],
                              cwd=HERE, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        done = subprocess.run([sys.executable, HERE / "rl_distill.py", "--steps", "0"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--steps: must be between", done.stderr)

    def test_the_teacher_trains_resumes_to_the_same_bits_and_keeps_what_is_there(self):
        words = ["--data", "shapes", "--smoke", "--device", "cpu"]
        text = self.run_main(teacher, *words, "--out", "a")
        self.assertIn("wrote a/teacher.pt", text)
        self.assertEqual({p.name for p in Path("a").iterdir()},
                         {"teacher.pt", "state.pt", "samples.png", "loss.png", "log.jsonl"})
        real = teacher.save_state

        def stop_after_two(*a, **k):
            real(*a, **k)
            raise KeyboardInterrupt
        def every_two(argv):
            args = real_parse(argv)
            args.save_every = 2
            return args
        real_parse = teacher.parse_args
        with mock.patch.object(teacher, "save_state", stop_after_two), \
                mock.patch.object(teacher, "parse_args", every_two), \
                self.assertRaises(KeyboardInterrupt):
            self.run_main(teacher, *words, "--out", "b")
        self.run_main(teacher, *words, "--out", "b", "--resume")
        a, b = (ddpm.load_checkpoint(f"{f}/state.pt", "teacher-state") for f in "ab")
        for part in ("net", "ema"):
            for key, value in a["parts"][part].items():
                self.assertTrue(torch.equal(value, b["parts"][part][key]), key)
        self.assertIn("not empty", self.fails(teacher, *words, "--out", "a"))
        net, content = ddpm.load_teacher("a/teacher.pt")
        self.assertEqual(content["provenance"]["images"], 16)

    def test_the_student_clones_and_resumes_to_the_same_bits(self):
        words = [*inputs("teacher"), "--smoke", "--device", "cpu"]
        shape = mock.patch.object(student, "STUDENT_UNET",
                                  {k: v for k, v in TINY.items() if k != "image_size"})
        shape.start()
        self.addCleanup(shape.stop)
        text = self.run_main(student, *words, "--out", "a")
        self.assertIn("MSE to the teacher's 50-step result", text)
        self.assertTrue(Path("a/samples.png").exists() and Path("a/loss.png").exists())
        real = student.save_student
        def stop(*_, **__):
            raise KeyboardInterrupt
        with mock.patch.object(student, "save_student", stop), self.assertRaises(KeyboardInterrupt):
            self.run_main(student, *words, "--out", "b")  # killed after its first checkpoint
        self.assertEqual(ddpm.load_checkpoint("b/state.pt", "student-state")["update"], 1)
        self.run_main(student, *words, "--out", "b", "--resume")
        a, b = (ddpm.load_checkpoint(f"{f}/state.pt", "student-state") for f in "ab")
        for key, value in a["parts"]["net"].items():
            self.assertTrue(torch.equal(value, b["parts"]["net"][key]), key)
        self.run_main(student, *words, "--init", "teacher", "--out", "c")
        self.assertEqual(student.load_student("c/student.pt")[0].predicts, "eps")
        self.assertIn("had --clone secant, not eps", self.fails(
            student, *words, "--clone", "eps", "--out", "a", "--resume"))
        self.run_main(student, *words, "--clone", "eps", "--out", "d")

    def test_the_encoders_train_and_the_rewards_are_shown(self):
        with mock.patch.object(teacher, "shapes_images",
                               lambda n=2000, size=32, seed=0: real_shapes(200, 32, seed)):
            text = self.run_main(reward, "--smoke", "--out", "a")
        self.assertIn("judge: ", text)
        self.assertEqual(ddpm.load_checkpoint("a/coach.pt", "coach")["config"], dict(classes=3))
        text = self.run_main(reward, *inputs("teacher", "coach", "judge"), "--n", "3", "--out", "b")
        self.assertIn("standardised reward", text)
        self.assertTrue(Path("b/rewards.png").exists())

    def test_the_main_job_runs_resumes_and_its_student_can_be_sampled_and_evaluated(self):
        words = [*inputs("teacher", "student", "coach"), "--smoke", "--device", "cpu"]
        text = self.run_main(rl_distill, *words, "--learn", "both", "--save-every", "1",
                             "--out", "a")
        self.assertIn("1.000000", text)
        self.assertIn("gain over 'student before", text)
        for name in ("student.pt", "state.pt", "alignment.png", "grid.png", "curves.png",
                     "result.json", "log.jsonl"):
            self.assertTrue(Path("a", name).exists(), name)
        real = rl_distill.save_state

        def stop(*a, **k):
            real(*a, **k)
            raise KeyboardInterrupt
        with mock.patch.object(rl_distill, "save_state", stop), \
                self.assertRaises(KeyboardInterrupt):
            self.run_main(rl_distill, *words, "--learn", "both", "--save-every", "1", "--out", "b")
        self.run_main(rl_distill, *words, "--learn", "both", "--save-every", "1", "--out", "b",
                      "--resume")
        a, b = (ddpm.load_checkpoint(f"{f}/state.pt", "rl-state") for f in "ab")
        for channel, rate in (("steps", 2e-3), ("pixels", 1.5e-6)):     # update 2 of 2: half left
            self.assertAlmostEqual(a["parts"][channel]["param_groups"][0]["lr"], rate, 12)
        for part in ("net", "policy"):
            for key, value in a["parts"][part].items():
                self.assertTrue(torch.equal(value, b["parts"][part][key]), key)
        for extra in (["--init", "teacher"], ["--learn", "pixels", "--estimator", "backprop"],
                      ["--step-cost", "0.1"], ["--estimator", "reinforce", "--baseline", "batch"],
                      ["--reward", "histogram:2+mse", "--kl", "0.1", "--learn", "pixels"]):
            with mock.patch.object(rl_distill, "plot_curves"):
                self.run_main(rl_distill, *words, *extra, "--steps", "2",
                              "--out", "x" + "".join(extra).replace(":", ""))
        self.run_main(sample, "--model", "a/student.pt", "--n", "5", "--npz", "n/i.npz",
                      "--png-dir", "p", "--out", "s")
        self.assertEqual(len(os.listdir("p")), 5)
        text = self.run_main(sample, "--evaluate", "--model", "a/student.pt",
                             Workshop.get() / "teacher.pt", "--steps", "2", "4", "--search", "2",
                             *inputs("teacher", "coach", "judge"), "--smoke", "--out", "e")
        self.assertIn("learned", text)
        self.assertIn("searched", text)
        self.assertTrue(Path("e/frontier.png").exists())

    def test_the_closed_form_demonstration_runs(self):
        with mock.patch.object(ddpm, "PAPER_UNET", ddpm.SMALL_UNET), \
                mock.patch.object(ddpm, "DEMO_POINTS", 20):
            text = self.run_main(ddpm, "--batch", "1", "--out", "d", "--device", "cpu")
        self.assertIn("energy distance", text)
        self.assertTrue(Path("d/ddpm.png").exists())

    def test_bad_input_is_one_sentence_and_code_2_and_touches_nothing(self):
        good = inputs("teacher", "student", "coach")
        Path("foreign.pt").write_bytes(b"GIF89a")
        Path("cut.pt").write_bytes((Workshop.get() / "student.pt").read_bytes()[:5000])
        Path("empty").mkdir()
        for expected, module, *words in [
                ("no checkpoint", rl_distill, *good, "--student", "none.pt"),
                ("cannot be read", rl_distill, *good, "--student", "foreign.pt"),
                ("cannot be read", rl_distill, *good, "--student", "cut.pt"),
                ("a student is needed", rl_distill, *good,
                 "--student", Workshop.get() / "coach.pt"),
                ("--steps: must be", rl_distill, *good, "--steps", "0"),
                ("unknown reward", rl_distill, *good, "--reward", "clip+mse"),
                ("differentiable reward", rl_distill, *good, "--learn", "pixels",
                 "--estimator", "backprop", "--reward", "histogram"),
                ("needs --learn pixels", rl_distill, *good, "--estimator", "backprop"),
                ("must be even", rl_distill, *good, "--learn", "pixels", "--draws", "3"),
                ("fixed steps use --draws", rl_distill, *good, "--learn", "pixels", "--group", "4"),
                ("uses a batch once", rl_distill, *good, "--estimator", "reinforce",
                 "--inner-epochs", "2"),
                ("all landings are equal", rl_distill, *good, "--learn", "steps", "--draws", "4"),
                ("--resume needs", rl_distill, *good, "--resume"),
                ("no run to resume", rl_distill, *good, "--resume", "--out", "nowhere"),
                ("cannot be used", rl_distill, *good, "--device", "warp-drive"),
                ("belong to the pixel channel", rl_distill, *good, "--learn", "steps", "--kl", "1"),
                ("leaves no step size", rl_distill, *good, "--steps", "1"),
                ("no exploration", rl_distill, *good, "--learn", "pixels", "--estimator",
                 "backprop", "--kl", "0.1"),
                ("nothing to --resume", student, "--updates", "0", "--resume", "--out", "empty"),
                ("no checkpoint", student, "--teacher", "none.pt"),
                ("no checkpoint", sample, "--model", "none.pt"),
                ("--steps: must be", sample, "--steps", "0"),
                ("no step policy", sample, "--model", Workshop.get() / "student.pt",
                 "--grid", "policy"),
                ("go with --evaluate", sample, "--steps", "1", "2"),
                ("no checkpoint", reward, "--coach", "none.pt"),
                ("no class subfolders", teacher, "--data", "empty"),
                ("no such folder", teacher, "--data", "nowhere"),
                ("--updates: must be", teacher, "--updates", "0"),
                ("invalid choice", teacher, "--width", "20")]:
            with self.subTest(expected=expected, words=words[-2:]):
                self.assertIn(expected, self.fails(module, *words))

    def test_the_download_without_network_leaves_nothing_behind(self):
        from torchvision.datasets import CIFAR10
        with mock.patch.object(CIFAR10, "download", side_effect=OSError("unreachable")):
            self.assertIn("could not be downloaded", self.fails(teacher))


real_shapes = teacher.shapes_images


# ==============================================================================================
# study/: its bookkeeping
# ==============================================================================================

class Study(Case):
    @classmethod
    def setUpClass(cls):
        cls.study, cls.report = modules_of("study", "run", "report")

    def world(self, folder, smoke=True, weights="w"):
        return types.SimpleNamespace(folder=Path(folder), smoke=smoke, weights=weights)

    def test_every_arm_is_there_once_and_its_command_parses(self):
        arms = self.study.arms()
        self.assertEqual(len({arm[:4] for arm in arms}), len(arms))
        self.assertEqual({arm.group for arm in arms}, set(self.study.GROUPS))
        for arm in arms:
            if arm.flags:
                words, args = self.study.arguments(arm, 2, self.world("x", False))
                self.assertEqual((args.seed, args.steps), (2, arm.steps))
                again = rl_distill.parse_args(words)
                self.assertEqual(dict(vars(again), out=None), dict(vars(args), out=None))
        folders = {self.study.folder(a, s, self.world("x")) for a in arms for s in (0, 1)}
        self.assertEqual(len(folders), 2 * len(arms))

    def test_a_run_is_found_again_until_its_code_changes(self):
        with tempfile.TemporaryDirectory() as folder:
            texts = ['"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n',
                     'def f(x):\n    """Other."""\n    return x + 1\n',
                     'def f(x):\n    return x + 2\n']
            for i, text in enumerate(texts):
                (Path(folder) / f"{i}.py").write_text(text)
            prints = [self.study.fingerprint(f"{folder}/{i}.py") for i in range(3)]
        self.assertEqual(prints[0], prints[1])
        self.assertNotEqual(prints[1], prints[2])

    def test_an_arm_is_claimed_once_until_its_worker_lets_go(self):
        with tempfile.TemporaryDirectory() as folder:
            first = ddpm.lock_file(f"{folder}/a.lock")
            self.assertIsNone(ddpm.lock_file(f"{folder}/a.lock"))
            first.close()
            ddpm.lock_file(f"{folder}/a.lock").close()

    def test_rows_that_are_there_are_not_done_again_and_a_torn_line_is_no_row(self):
        study = self.study
        args = study.parse_args(["--seeds", "0", "1", "--workers", "1"])
        again = study.parse_args(["--seeds", "0", "1", "--workers", "1", "--again"])
        with tempfile.TemporaryDirectory() as folder:
            path, world = Path(folder) / "rows.jsonl", self.world(folder)
            with mock.patch.object(study, "results_file", lambda smoke: path):
                everything = study.todo(args, world)
                (arm, seed), (other, _) = everything[:2]
                row = dict(group=arm.group, name=arm.name, init=arm.init, steps=arm.steps,
                           seed=seed, weights="w", n=args.held_out)
                path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
                self.assertEqual(study.read_results(), [row])
                self.assertEqual(study.todo(args, world), everything[1:])
                self.assertEqual(study.todo(args, self.world(folder, weights="v")), everything)
                self.assertEqual(study.todo(again, world), everything)   # another machine's row
                study.append([dict(row, name=other.name)], other, 0, world)
                self.assertEqual(study.todo(again, world), [everything[0], *everything[2:]])
                study.append([dict(row, ms=1.0)], arm, seed, world)
                self.assertEqual(study.todo(again, world), everything[2:])
                study.tidy(False)                                        # the newest row stays
                self.assertEqual([r.get("ms") for r in map(json.loads, path.read_text()
                                                           .splitlines())], [1.0, None])

    def test_training_cost_counts_what_an_update_really_evaluates(self):
        for words in (["--learn", "steps"], ["--learn", "pixels"], ["--learn", "both"],
                      ["--learn", "pixels", "--estimator", "backprop"],
                      ["--learn", "pixels", "--estimator", "backprop-last"]):
            args = rl_distill.parse_args([*words, "--smoke", "--steps", "3", "--inner-epochs", "2"])
            net, policy, _ = student.load_student(Workshop.get() / "student.pt")
            policy, ref, optimizers = rl_distill.learners(net, with_base(args))
            coach, content = reward.load_encoder(Workshop.get() / "coach.pt", "coach")
            score, z = reward.Reward("mse", coach, content["scales"]), images(8)
            cost = dict(forward=0, backward=0)

            def count(net, x, *a, **k):
                out = student.jump(net, x, *a, **k)
                cost["forward"] += len(x)
                cost["backward"] += len(x) * out[0].requires_grad
                return out
            with mock.patch.object(rl_distill, "jump", side_effect=count), \
                    tempfile.TemporaryDirectory() as folder:
                quiet(rl_distill.train, net, ref, policy, optimizers, (z, z), (z[:2], z[:2]),
                      score, args, Path(folder), CPU)
            spent = cost["forward"] + 2 * cost["backward"]
            self.assertEqual(self.study.training_cost(args), spent, words)

    def test_only_a_gain_that_all_seeds_share_beyond_their_spread_is_called_one(self):
        def rows(*gains):
            return [dict(gain=g, gain_error=0.01) for g in gains]
        verdict = self.report.verdict
        self.assertEqual(verdict(rows(0.05, 0.06, 0.055))[2], "better")
        self.assertEqual(verdict(rows(-0.05, -0.06, -0.055))[2], "worse")
        for gains in ((0.05, 0.06, 0.015), (0.05, -0.06, 0.05), (0.03, 0.2, 0.9), (0.5,)):
            self.assertEqual(verdict(rows(*gains))[2], "not told apart", gains)
        self.assertEqual(self.report.mean_std([1.0, 2.0, 3.0], 1), "2.0 ± 1.0")

    def test_the_figure_of_grids_needs_no_row_and_no_run(self):
        row = dict(group="steps", name="RL steps", init="student", steps=4, seed=1,
                   grids=[[1000, 600, 300, 90, 0], [1000, 590, 280, 80, 0]])
        with tempfile.TemporaryDirectory() as folder:
            for rows in ([], [row], [row, dict(row, init="teacher")]):
                path = Path(folder) / f"{len(rows)}.png"
                self.report.plot_grids(rows, path)
                self.assertGreater(path.stat().st_size, 1000)

    def test_the_readme_prints_what_the_rows_say(self):
        rows, root = self.study.read_results(), Path(ddpm.__file__).parent
        self.assertEqual(len({(r["weights"], r["n"]) for r in rows}), 1)
        text = (root / "README.md").read_text(encoding="utf-8")
        for key, digits in (("reward", 3), ("frechet", 2)):
            for line in self.report.brief(rows, key, digits):
                self.assertTrue(line + "\n" in text, f"not in README: {line}")
        spent = {(r["init"], r["steps"]): r["train_nfe"] for r in rows if r["group"] == "steps"}
        for row in rows:
            if row["group"] == "search":                # the fair duel
                self.assertEqual(row["train_nfe"], spent[row["init"], row["steps"]])
            self.assertRegex(row["command"], r"^python (rl_distill|study/run)\.py ")
            self.assertRegex(row["commit"], "^[0-9a-f]{7,}")


def with_base(args):
    args.base = "uniform" if args.base == "auto" else args.base
    return args


# ==============================================================================================
# assignments/: the handout, and the grader graded
# ==============================================================================================

MISTAKES = {
    1: (ddpm, [
        ("ab.sqrt() * x0 + (1 - ab).sqrt() * eps", "ab.sqrt() * x0 - (1 - ab).sqrt() * eps"),
        ("ab.sqrt() * x0 + (1 - ab).sqrt() * eps", "ab * x0 + (1 - ab) * eps"),
        ("ab.sqrt() * x0 + (1 - ab).sqrt() * eps", "ab.sqrt() * eps + (1 - ab).sqrt() * x0"),
        ("ab = at(alpha_bar, t, x0)\n    return", "ab = at(alpha_bar, t - 1, x0)\n    return"),
        ("ab = at(alpha_bar, t, x0)\n    return", "ab = at(alpha_bar, t[:1], x0)\n    return"),
        ("F.mse_loss(eps_hat.float(), eps)", "F.mse_loss(eps_hat.float(), eps, reduction='sum')"),
        ("F.mse_loss(eps_hat.float(), eps)", "F.l1_loss(eps_hat.float(), eps)"),
        ("F.mse_loss(eps_hat.float(), eps)", "F.mse_loss(eps_hat.float(), x0)"),
        ("F.mse_loss(eps_hat.float(), eps)", "F.mse_loss(eps_hat.detach().float(), eps)"),
        ("net(q_sample(x0, t, eps, alpha_bar), t)", "net(x0, t)"),
        ("net(q_sample(x0, t, eps, alpha_bar), t)", "net(q_sample(x0, t, eps, alpha_bar), t - 1)"),
    ]),
    2: (ddpm, [
        (".clamp(min=0).sqrt()\n    return ab_next.sqrt()", ".sqrt()\n    return ab_next.sqrt()"),
        ("return eta * ((1 - ab_next) / (1 - ab))", "return ((1 - ab_next) / (1 - ab))"),
        ("eta * ((1 - ab_next) / (1 - ab)).sqrt()", "eta * ((1 - ab) / (1 - ab_next)).sqrt()"),
        ("eta * ((1 - ab_next) / (1 - ab)).sqrt()", "eta * ((1 - ab_next) / (1 - ab))"),
        ("* (1 - ab / ab_next).sqrt()\n    # --", "* (1 - ab).sqrt()\n    # --"),
        ("* (1 - ab / ab_next).sqrt()\n    # --", "* (1 - ab / ab_next)\n    # --"),
        ("(1 - ab_next - sigma.reshape(ab_next.shape) ** 2)", "(1 - ab_next)"),
        ("(1 - ab_next - sigma.reshape(ab_next.shape) ** 2)",
         "(1 - ab_next - sigma.reshape(ab_next.shape))"),
        ("(1 - ab_next - sigma.reshape(ab_next.shape) ** 2)",
         "(1 - ab_next + sigma.reshape(ab_next.shape) ** 2)"),
        ("return ab_next.sqrt() * x0_hat + direction", "return ab_next * x0_hat + direction"),
        ("ab_next.sqrt() * x0_hat + direction", "ab_next.sqrt() * x0_hat - direction"),
    ]),
    3: (student, [
        ("return phi.cos() * x_t - phi.sin() * v,", "return phi.cos() * x_t + phi.sin() * v,"),
        ("phi.sin() * x_t + phi.cos() * v", "phi.sin() * x_t - phi.cos() * v"),
        ("return (d.cos() * x_t - x_next) / d.sin()", "return (x_next - d.cos() * x_t) / d.sin()"),
        ("return (d.cos() * x_t - x_next) / d.sin()", "return d.cos() * x_t - x_next"),
        ("return (d.cos() * x_t - x_next) / d.sin()", "return (x_t - x_next) / d.sin()"),
        ("return (d.cos() * x_t - x_next) / d.sin()", "return (d.cos() * x_t - x_next) / d"),
        ("d = angle(t, alpha_bar, x_t) - angle(t_next", "d = angle(t_next"),
    ]),
    4: (rl_distill, [
        ("groups - groups.mean(1, keepdim=True)", "groups - groups.mean(0, keepdim=True)"),
        ("groups - groups.mean(1, keepdim=True)", "groups"),
        ("groups = reward.double()", "groups = reward"),
        ("groups - groups.mean(1, keepdim=True)", "groups.mean(1, keepdim=True) - groups"),
        ("                 centred.std(correction=0))", "                 centred.std())"),
        ("centred.square().mean(1, keepdim=True).sqrt()", "centred.std(1, keepdim=True)"),
        ("centred.square().mean(1, keepdim=True).sqrt()", "centred.square().mean(1, keepdim=True)"),
        ("torch.where(scale > noise_level, centred / scale.clamp(min=noise_level), 0.0)",
         "(centred / scale)"),
        ("torch.where(scale > noise_level, centred / scale.clamp(min=noise_level), 0.0)",
         "(centred / (scale + 1e-8) + 1e-2)"),
        ('if baseline == "batch":', 'if baseline == "group":'),
        ("groups = reward.double().reshape(-1, group) ",
         "groups = reward.double().reshape(group, -1).T "),
    ]),
    5: (rl_distill, [
        ("return -((x_next - mean)", "return -((x_next - mean.detach())"),
        ("return -((x_next - mean).square() / (2 * sigma.square()[:, None, None, None])).mean",
         "return -((x_next - mean).square() / (2 * sigma.square()[:, None, None, None])).sum"),
        ("return -((x_next - mean).square() / (2 * sigma.square()",
         "return -((x_next - mean).square() / (2 * sigma"),
        ("return -((x_next - mean).square() / (2 *", "return -((x_next - mean).square() / ("),
        ("return -((x_next - mean)", "return ((x_next - mean)"),
        ("-torch.minimum(ratio * adv, clipped", "-torch.maximum(ratio * adv, clipped"),
        ("-torch.minimum(ratio * adv, clipped * adv)", "-(ratio * adv)"),
        ("-torch.minimum(ratio * adv, clipped * adv)", "-(clipped * adv)"),
        ("-torch.minimum(ratio * adv, clipped * adv)", "torch.minimum(ratio * adv, clipped * adv)"),
        ("ratio = (logp - logp_old).exp()\n    clipped", "ratio = (logp - logp.detach()).exp()\n"
         "    clipped"),
        ("ratio = (logp - logp_old).exp()\n    clipped", "ratio = (logp - logp_old)\n    clipped"),
        ("clipped * adv), ratio.detach()", "clipped * adv), ratio"),
        ("torch.where(stop, torch.zeros_like(logp), logp)", "logp"),
        ("stopping.log_prob(stop.float()) +", "stopping.log_prob(1 - stop.float()) +"),
        ("logp = ratio.log_prob(rho)", "logp = ratio.log_prob(1 - rho)"),
    ]),
    6: (rl_distill, [
        ("((mean - mean_ref).square() / (2 *", "((mean - mean_ref).square() / ("),
        ("(mean - mean_ref).square() / (2 * sigma.square()",
         "(mean - mean_ref).square() / (2 * sigma"),
        ("((mean - mean_ref).square() /", "((mean - mean_ref).abs() /"),
        ("((mean - mean_ref).square() /", "((mean - mean_ref).detach().square() /"),
        ("((mean - mean_ref).square() /", "(-(mean - mean_ref).square() /"),
        ("return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).mean((1,",
         "return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).sum((1,"),
        ("return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).mean((1",
         "return ((mean - mean_ref).square() / (2 * sigma.square()[:, None, None, None])).mean((0"),
    ]),
}


class Assignments(Case):
    @classmethod
    def setUpClass(cls):
        cls.grade, cls.handout, cls.bugs = modules_of("assignments", "grade", "handout", "bugs")

    def verdicts(self, number, module, seeds=(0, 1)):
        return [self.grade.judge(module, number, seed)["verdict"] for seed in seeds]

    def source(self, module):
        return Path(module.__file__).read_text(encoding="utf-8")

    def test_the_reference_passes_and_the_handout_is_not_attempted(self):
        for number, (module, _) in MISTAKES.items():
            self.assertEqual(self.verdicts(number, module, range(8)), ["passes"] * 8)
            empty = variant(module, self.handout.blank(self.source(module), {number}))
            self.assertEqual(set(self.verdicts(number, empty)), {"not attempted"})

    def test_every_mistake_is_rejected_with_tolerances_a_hundred_times_wider(self):
        """And none because it crashes: a wrong value or shape is shown. NaN never passes."""
        real = self.grade.same

        def lenient(theirs, wanted, rule, tolerance=1e-4, **inputs):
            return real(theirs, wanted, rule, 100 * tolerance, **inputs)
        for number, (module, mistakes) in MISTAKES.items():
            self.assertGreaterEqual(len(mistakes), 5)
            source = self.source(module)
            for right, wrong in mistakes:
                with self.subTest(exercise=number, wrong=wrong):
                    self.assertEqual(source.count(right), 1, right)
                    broken = variant(module, source.replace(right, wrong))
                    with mock.patch.object(self.grade, "same", lenient):
                        self.assertTrue({"wrong value", "wrong shape"}
                                        >= set(self.verdicts(number, broken)), right)

    def test_zeros_never_pass(self):
        for number, (module, _) in MISTAKES.items():
            names = [n for n, f in vars(module).items() if callable(f) and f"# -- exercise {number}"
                     in (inspect.getsource(f) if inspect.isfunction(f) else "")]
            self.assertGreater(len(names), 0)
            zeros = variant(module, self.source(module))

            def empty(function):
                def zero(*args, **kw):
                    result = function(*args, **kw)
                    return (tuple(torch.zeros_like(r) for r in result)
                            if isinstance(result, tuple) else torch.zeros_like(result))
                return zero
            for name in names:
                setattr(zeros, name, empty(getattr(module, name)))
            self.assertTrue({"wrong value"} >= set(self.verdicts(number, zeros)))

    def test_the_handout_is_the_repository_with_blanks(self):
        self.assertEqual(self.handout.numbers(), list(MISTAKES))
        with tempfile.TemporaryDirectory() as folder:
            quiet(self.handout.main, [folder + "/all"])
            quiet(self.handout.main, [folder + "/some", "--only", "2"])
            self.assertFalse(Path(folder, "all", "test_all.py").exists())       # it has answers
            for module in MODULES:
                name, ours = Path(module.__file__).name, self.source(module)
                both = [Path(folder, which, name).read_text(encoding="utf-8")
                        for which in ("all", "some")]
                marked = self.handout.REGION.findall(ours)
                self.assertEqual(both[0] != ours, bool(marked))
                self.assertEqual(both[1] != ours, any(m[1] == "2" for m in marked))
                for text in both:
                    compile(text, name, "exec")
                for body in (m[2] for m in marked):
                    self.assertNotIn(body, both[0])
                    self.assertLessEqual(len(body.splitlines()), 15)
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                self.handout.main([folder + "/all"])

    def test_the_silent_bugs_are_planted_and_compile(self):
        ours = self.source(rl_distill)
        self.assertEqual(self.bugs.changed("none"), ours)
        for which in ("a", "b"):
            self.assertNotEqual(self.bugs.changed(which), ours)
            variant(rl_distill, self.bugs.changed(which))

    def test_whatever_the_code_does_the_grader_goes_on(self):
        cases = {"while True: pass": "no end after", "import sys; sys.exit(0)": "importing",
                 "import os; os._exit(3)": "its process ended",
                 "print('hello'); 1 / 0": "importing", "def broken(:": "importing"}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("ddpm", "student", "rl_distill"):
                Path(folder, f"{name}.py").write_text("")
            for code, expected in cases.items():
                Path(folder, "ddpm.py").write_text(code)
                result = self.grade.grade(folder, 1, 0, seconds=6)
                self.assertEqual(result["verdict"], "error", code)
                self.assertIn(expected, result["property"])
            Path(folder, "ddpm.py").write_text("")            # and it falls back to nothing
            result = self.grade.grade(folder, 1, 0)
            self.assertIn("no attribute 'q_sample'", result["property"])


# ==============================================================================================
# PLANTED MISTAKES: each is put into the source, and a test must notice
# ==============================================================================================

PLANTED = [  # (module, what the source says, the mistake, the test that notices)
    (ddpm, "return ab.sqrt() * x0 + (1 - ab).sqrt() * eps",
     "return ab.sqrt() * x0 - (1 - ab).sqrt() * eps",
     "Schedule.test_q_sample_is_eq_4_for_every_element"),
    (ddpm,
     "alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])",
     "alpha_bar = torch.cumprod(1 - torch.cat([beta, beta[-1:]]), 0)",
     "Schedule.test_alpha_bar_starts_at_one_and_equals_the_loop"),
    (ddpm, "return F.mse_loss(eps_hat.float(), eps)",
     "return F.mse_loss(eps_hat.float(), eps, reduction='sum')",
     "Schedule.test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network"),
    (ddpm, "return F.mse_loss(eps_hat.float(), eps)",
     "return F.mse_loss(eps_hat.float().detach(), eps)",
     "Schedule.test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network"),
    (ddpm, "return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()",
     "return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab).sqrt()",
     "ReverseStep.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, "- sigma.reshape(ab_next.shape) ** 2).clamp", ").clamp",
     "ReverseStep.test_eta_1_one_step_apart_is_ddpms_posterior"),
    (ddpm, "        eps_hat = (x_t - ab.sqrt() * x0_hat) / (1 - ab).sqrt()\n", "",
     "ReverseStep.test_the_estimate_and_its_epsilon_explain_x_t"),
    (ddpm, "int(s) * 1009 + stream", "int(s) + stream",
     "Sampler.test_a_seed_is_the_same_image_in_any_batch_and_stream_numbers_differ"),
    (teacher, "torch.randint(1, T + 1,", "torch.randint(0, T,",
     "TeacherTraining.test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn"),
    (teacher, "p_ema.lerp_(p, 1 - decay)", "p_ema.lerp_(p, decay)",
     "TeacherTraining.test_ema_averages_parameters"),
    (teacher, "mirror[:, None, None, None], x.flip(-1)", "mirror[:, None, None, None], x.flip(-2)",
     "Images.test_a_batch_holds_images_of_the_set_half_of_them_mirrored"),
    (student, "return (d.cos() * x_t - x_next) / d.sin()",
     "return (x_next - d.cos() * x_t) / d.sin()",
     "Jumps.test_a_jump_with_the_secant_velocity_lands_where_it_should"),
    (student, "self.normalise(features.detach())", "self.normalise(features)",
     "Policy.test_deciding_sends_no_gradient_into_the_features"),
    (student, "nn.init.zeros_(student.jump_mlp[-1].weight)", "pass",
     "Jumps.test_a_copy_of_the_teacher_is_the_teacher"),
    (student, "(rho * t).round().long(), n - 1), t - 1)", "(rho * t).round().long(), n), t - 1)",
     "Policy.test_landing_always_leaves_room_for_the_steps_to_come"),
    (student, "u[0] < START_SHARE, T,", "u[0] < START_SHARE, T - 1,",
     "Jumps.test_drawn_jumps_go_down_far_enough_and_reach_both_ends"),
    (reward, "return -(p * (p / q).log()).sum(2).mean(1)",
     "return -(q * (q / p).log()).sum(2).mean(1)",
     "Rewards.test_mse_and_histogram_agree_with_loops"),
    (reward, "- F.normalize(b, dim=1)).square()", "- F.normalize(b, dim=0)).square()",
     "Rewards.test_no_reward_depends_on_the_batch_it_is_computed_in"),
    (reward, "in_real.any(0)", "in_real[distance.argmin(0), torch.arange(len(fake))]",
     "Metrics.test_precision_takes_any_ball_not_the_nearest_neighbours"),
    (reward, "kthvalue(k + 1, dim=1).values  # k + 1", "kthvalue(k, dim=1).values  # k + 1",
     "Metrics.test_precision_and_recall_agree_with_loops"),
    (reward, "- 2 * cross).item()", "- cross).item()",
     "Metrics.test_frechet_distance_of_known_gaussians"),
    (rl_distill, ".repeat_interleave(size)", ".repeat(size)",
     "Advantages.test_groups_hold_one_noise_each"),
    (rl_distill, "groups = reward.double().reshape(-1, group) ",
     "groups = reward.double().reshape(group, -1).T.contiguous().flip(0)[:, :group] ",
     "Advantages.test_global_and_group_and_batch_agree_with_loops"),
    (rl_distill, "centred = groups - groups.mean(1, keepdim=True)",
     "centred = groups - groups.mean(0, keepdim=True)",
     "Advantages.test_global_and_group_and_batch_agree_with_loops"),
    (rl_distill, "noise_level = 1e-6 * (1 + groups.abs().max())",
     "noise_level = torch.tensor(1e-12)",
     "Advantages.test_equal_rewards_give_zero_and_never_scaled_noise"),
    (rl_distill, "return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()",
     "return torch.minimum(ratio * adv, clipped * adv), ratio.detach()",
     "Surrogate.test_it_is_eq_7_of_ppo_case_by_case"),
    (rl_distill, "return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()",
     "return -ratio * adv, ratio.detach()",
     "Surrogate.test_gradients_vanish_where_clipped_and_only_there"),
    (rl_distill, "return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()",
     "return -clipped * adv, ratio.detach()", "Surrogate.test_it_is_eq_7_of_ppo_case_by_case"),
    (rl_distill, "return -((x_next - mean).square() / (2 *",
     "return -((x_next - mean).square() / (",
     "LogProbabilities.test_a_landing_is_a_gaussian_averaged_over_dimensions"),
    (rl_distill, 's["logp_pixel"] = pixel_logp(mean, s["x_next"], sigma)',
     's["logp_pixel"] = pixel_logp(mean, s["x_t"], sigma)',
     "Loop.test_the_ratio_is_one_before_the_first_step_in_both_channels"),
    (rl_distill, "return loss + args.kl * kl, ratio", "return loss + args.kl * kl.detach(), ratio",
     "Loop.test_zero_advantage_gives_zero_gradient_and_the_kl_alone_pulls_back"),
    (rl_distill, "noise[1::2] = -noise[0::2]", "pass",
     "Loop.test_training_explores_the_last_jump_too_and_in_antithetic_pairs"),
    (rl_distill, "sigma.clamp(min=SIGMA_FLOOR), sigma)", "sigma, sigma)",
     "Loop.test_training_explores_the_last_jump_too_and_in_antithetic_pairs"),
    (rl_distill, "step_surrogate(policy, s, a, args)", "step_surrogate(policy, s, -a, args)",
     "Loop.test_the_step_policy_finds_the_optimum_of_a_known_reward"),
    (rl_distill, "one, size = i[::s[\"shared\"]], s[\"shared\"]",
     "one, size = i[::s[\"shared\"]].flip(0), s[\"shared\"]",
     "Loop.test_sharing_changes_no_gradient"),
    (rl_distill, "if args.eta > 0:                   # with", "if False:  # with",
     "Loop.test_sharing_changes_no_gradient"),
    (student, "if net.order == 2 and last is not None", "if net.order == 3",
     "Loop.test_a_teachers_copy_of_order_2_is_the_second_order_solver"),
    (rl_distill, "(HELD_OUT, args.held_out, \"held-out\")", "(2, args.held_out, \"held-out\")",
     "Loop.test_noise_for_training_monitoring_and_the_table_is_disjoint"),
]


class PlantedMistakes(Case):
    def test_every_planted_mistake_is_noticed(self):
        for module, right, wrong, test in PLANTED:
            with self.subTest(test=test, wrong=wrong):
                source = Path(module.__file__).read_text(encoding="utf-8")
                self.assertEqual(source.count(right), 1,
                                 f"'{right}' must stand once in {module.__name__}.py")
                broken = variant(module, source.replace(right, wrong))
                self.assertFalse(self.passes(test, module, broken), "the mistake went unnoticed")

    def passes(self, test, module, broken):
        """Run one test with each function and class of `module` replaced by the broken module's."""
        swaps = []
        for name, old in list(vars(module).items()):
            if name == "TERMS" or (callable(old)
                                   and getattr(old, "__module__", None) == module.__name__):
                swaps += [(m, name, old) for m in MODULES if getattr(m, name, None) is old]
        try:
            for m, name, _ in swaps:
                setattr(m, name, getattr(broken, name))
            case, method = test.split(".")
            result = unittest.TestResult()
            globals()[case](method).run(result)
            self.assertEqual(result.testsRun, 1)
            return result.wasSuccessful()
        finally:
            for m, name, old in swaps:
                setattr(m, name, old)


# ==============================================================================================
# MAIN: the closing line counts
# ==============================================================================================

if __name__ == "__main__":
    outcome = unittest.main(exit=False, verbosity=2 if "-v" in sys.argv else 1).result
    failed = len(outcome.failures) + len(outcome.errors)
    print(f"{max(0, outcome.testsRun - failed)} passed, {failed} failed")
    sys.exit(1 if failed or not outcome.testsRun else 0)
