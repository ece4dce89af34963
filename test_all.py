"""The specification, in the order of the files. Plain unittest; no network, GPU, data set or checkpoint needed.

    python test_all.py            # under 90 seconds on two CPU cores; the last line counts

Test names are sentences. The last class plants known mistakes into the sources, one at a time, and
shows that a test notices each of them.
"""
import contextlib
import copy
import hashlib
import io
import math
import os
import pickle
import subprocess
import sys
import tempfile
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


class Case(unittest.TestCase):
    def close(self, a, b, tol=1e-5, msg=None):
        """Same shape, same dtype kind, no NaN, every difference below tol."""
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        self.assertEqual(a.shape, b.shape, msg)
        self.assertFalse(torch.isnan(a.double()).any() or torch.isnan(b.double()).any(), "NaN never passes")
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
            ddpm.save_checkpoint(cls.folder / "coach.pt", "coach", config=dict(classes=10), weights=ddpm.half_weights(c),
                                 provenance=dict(accuracy=0.1), scales=reward.term_scales(c, x))
            mean, cov = reward.moments(reward.encode(j, x))
            ddpm.save_checkpoint(cls.folder / "judge.pt", "judge", config=dict(classes=10), weights=ddpm.half_weights(j),
                                 provenance=dict(accuracy=0.1), mean=mean, covariance=cov, features=reward.encode(j, x))
        return cls.folder


def inputs(*names):
    """['--teacher', path, ...] of the tiny checkpoints."""
    return [part for n in names for part in (f"--{n}", str(Workshop.get() / f"{n}.pt"))]


# ┌───────────────────────────────────────────────────────────────────────────────────────────────┐
# │ ddpm.py                                                                                       │
# └───────────────────────────────────────────────────────────────────────────────────────────────┘

class Schedule(Case):
    ab = ddpm.linear_alpha_bar()

    def test_alpha_bar_starts_at_one_and_equals_the_loop(self):
        self.assertEqual(self.ab.shape, (ddpm.T + 1,))
        product, expected = 1.0, [1.0]
        for i in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
            expected.append(product)
        self.close(self.ab, torch.tensor(expected), 1e-6)

    def test_q_sample_is_eq_4_for_every_element(self):
        x0, eps, t = images(4), torch.randn(4, 3, 8, 8, generator=rng(1)), torch.tensor([0, 1, 500, 1000])
        out = ddpm.q_sample(x0, t, eps, self.ab)
        for b in range(4):
            a = self.ab[t[b]].item()
            self.close(out[b], math.sqrt(a) * x0[b] + math.sqrt(1 - a) * eps[b], 1e-5)

    def test_simple_loss_is_the_mean_over_every_element_and_reaches_the_network(self):
        x0, t, eps = images(2), torch.tensor([100, 900]), torch.randn(2, 3, 8, 8, generator=rng(2))
        w = torch.tensor(0.3, requires_grad=True)
        loss = ddpm.simple_loss(lambda x, t: w * x, x0, t, eps, self.ab)
        x = ddpm.q_sample(x0, t, eps, self.ab)
        self.close(loss.detach(), torch.tensor([(0.3 * a - b) ** 2 for a, b in zip(x.flatten().tolist(), eps.flatten().tolist())]).mean())
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
            posterior = math.sqrt(a1) * beta / (1 - a) * x0 + math.sqrt(alpha) * (1 - a1) / (1 - a) * x_t
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
        x_t, t, eps = torch.randn(3, 3, 8, 8, generator=rng(4)), torch.tensor([1, 400, 1000]), torch.randn(3, 3, 8, 8, generator=rng(5))
        for clip in (False, True):
            x0_hat, eps_hat = ddpm.predict_x0(x_t, t, eps, self.ab, clip)
            self.close(ddpm.q_sample(x0_hat, t, eps_hat, self.ab), x_t, 2e-4)
            self.assertEqual(clip, x0_hat.abs().max().item() <= 1)

    def test_every_grid_decreases_from_T_to_0(self):
        for name in ("uniform", "quadratic"):
            for steps in (1, 2, 3, 50, 999, 1000):
                grid = ddpm.make_grid(name, steps)
                self.assertEqual((len(grid), grid[0], grid[-1]), (steps + 1, ddpm.T, 0))
                self.assertTrue(all(a > b for a, b in zip(grid, grid[1:])))
        self.assertEqual(ddpm.make_grid("quadratic", 4), [1000, 562, 250, 62, 0])

    def test_a_grid_that_cannot_be_is_refused(self):
        self.bad_input("number of steps", ddpm.make_grid, "uniform", 0)
        self.bad_input("unknown grid", ddpm.make_grid, "cubic", 4)
        self.bad_input("must decrease", ddpm.sample, None, images(1), [1000, 500, 600, 0], self.ab)


class Sampler(Case):
    ab = ddpm.linear_alpha_bar()

    def gaussian(self, x, t):
        return ddpm.mixture_eps(x, t, torch.tensor([[0.4, -0.2]]), 0.3, self.ab)

    def test_ddim_on_a_gaussian_follows_the_exact_recursion_and_converges_to_the_flow(self):
        x_T, mean = torch.randn(200, 2, generator=rng()), torch.tensor([[0.4, -0.2]])
        exact = ddpm.gaussian_flow(x_T, mean, 0.3, self.ab)
        errors = [(ddpm.sample(self.gaussian, x_T, ddpm.make_grid("uniform", k), self.ab, clip=False) - exact).abs().max().item()
                  for k in (10, 100, 1000)]
        self.assertLess(errors[2], 0.02)
        self.assertTrue(errors[0] > 5 * errors[1] > 25 * errors[2], errors)

    def test_ddpm_on_a_gaussian_gives_its_mean_and_spread(self):
        x_T = torch.randn(300, 2, generator=rng())
        end = ddpm.sample(self.gaussian, x_T, ddpm.make_grid("uniform", 200), self.ab, 1.0, seeds=range(300), clip=False)
        variance = 1.0                                    # exact recursion of the variance, same grid
        grid = ddpm.make_grid("uniform", 200)
        for t, t_next in zip(grid, grid[1:]):
            a, b = self.ab[t].item(), self.ab[t_next].item()
            sigma2 = ddpm.ddim_sigma(torch.tensor([t]), torch.tensor([t_next]), 1.0, self.ab).item() ** 2
            gain = (1 - a) ** 0.5 / (a * 0.09 + 1 - a)    # d eps* / d x
            slope = b ** 0.5 * (1 - (1 - a) ** 0.5 * gain) / a ** 0.5 + max(1 - b - sigma2, 0) ** 0.5 * gain
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
        self.assertGreater((b - ddpm.seeded_noise([5], (3, 8, 8), stream=1)).abs().max(), 0.5)

    def test_samples_do_not_depend_on_the_batch_even_with_noise(self):
        x_T, grid = ddpm.seeded_noise(range(4), (2,)), ddpm.make_grid("uniform", 20)
        together = ddpm.sample(self.gaussian, x_T, grid, self.ab, 1.0, seeds=range(4))
        alone = torch.cat([ddpm.sample(self.gaussian, x_T[i:i + 1], grid, self.ab, 1.0, seeds=[i]) for i in range(4)])
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
        out = net(x, torch.tensor([499, 500, 501])).detach() - (1 - net.alpha_bar[[499, 500, 501]]).sqrt()[:, None, None, None] * x
        self.assertGreater((out[0] - out[1]).abs().max(), 1e-5)
        self.assertGreater((out[1] - out[2]).abs().max(), 1e-5)
        net(torch.randn(2, 3, 8, 8, generator=rng()), torch.tensor([10, 900])).square().sum().backward()
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
        ddpm.save_checkpoint(self.folder / "a.pt", "teacher", config=net.config, weights=ddpm.half_weights(net), provenance={})
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
        torch.save({"weights": torch.zeros(1)}, path)
        self.bad_input("not a checkpoint of this project", ddpm.load_checkpoint, path, "teacher")
        torch.save({"format": ddpm.FORMAT, "kind": "teacher", "object": Path("x")}, path)
        self.bad_input("cannot be read", ddpm.load_checkpoint, path, "teacher")
        path.write_bytes(pickle.dumps({"format": ddpm.FORMAT}))
        self.bad_input("", ddpm.load_checkpoint, path, "teacher")

    def test_a_truncated_checkpoint_is_refused_at_every_length(self):
        whole = (Workshop.get() / "teacher.pt").read_bytes()
        for i in range(20):
            (self.folder / "cut.pt").write_bytes(whole[:len(whole) * i // 20])
            self.bad_input("cannot be read", ddpm.load_teacher, self.folder / "cut.pt")

    def test_kinds_configs_and_shapes_must_fit(self):
        self.bad_input("a student is needed", ddpm.load_checkpoint, Workshop.get() / "teacher.pt", "student")
        net = ddpm.UNet(**TINY)
        ddpm.save_checkpoint(self.folder / "b.pt", "teacher", config={**TINY, "width": 32}, weights=ddpm.half_weights(net))
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
                (made / "f").write_text("")

    def test_an_unusable_device_is_refused(self):
        self.bad_input("cannot be used here", ddpm.pick_device, "warp-drive")


# ┌───────────────────────────────────────────────────────────────────────────────────────────────┐
# │ teacher.py                                                                                    │
# └───────────────────────────────────────────────────────────────────────────────────────────────┘

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
        self.assertEqual((data.shape, data.dtype, labels.tolist()), ((2, 3, 32, 32), torch.uint8, [0, 1]))
        self.assertEqual(data[0, :, 5, 5].tolist(), [200, 0, 0])
        self.assertEqual(data[1, :, 5, 5].tolist(), [50, 50, 50])
        self.assertIn("skipped 1", text)
        self.assertIn("3.png", text)

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
        with mock.patch.multiple(CIFAR10, train_list=[["batch", hashlib.md5(blob).hexdigest()]], test_list=[],
                                 meta=dict(filename="meta", key="label_names", md5=hashlib.md5(names).hexdigest())):
            data, labels = teacher.cifar10_images(str(self.folder / "data"))
        self.assertTrue(torch.equal(data, torch.from_numpy(pixels.reshape(4, 3, 32, 32))))
        self.assertEqual(labels.tolist(), [3, 1, 0, 2])

    def test_no_network_for_the_download_is_one_sentence(self):
        from torchvision.datasets import CIFAR10
        with mock.patch.object(CIFAR10, "download", side_effect=OSError("unreachable")), inside(self.folder):
            self.bad_input("could not be downloaded", quiet, teacher.load_images, "cifar10")


class TeacherTraining(Case):
    def test_times_are_uniform_from_1_to_T_and_both_ends_are_drawn(self):
        t = teacher.draw_times(200_000, rng())
        self.assertEqual((t.min().item(), t.max().item()), (1, ddpm.T))
        self.close(torch.bincount(t, minlength=1001)[1:].reshape(10, 100).sum(1) / 200_000, torch.full((10,), 0.1), 0.005)

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
            loss = ddpm.simple_loss(net, x0, teacher.draw_times(16, g), torch.randn(x0.shape, generator=g), ab)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.assertLess(np.mean(losses[-10:]), 0.6 * np.mean(losses[:10]))


# ┌───────────────────────────────────────────────────────────────────────────────────────────────┐
# │ student.py                                                                                    │
# └───────────────────────────────────────────────────────────────────────────────────────────────┘

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
        end = ddpm.sample(self.teacher, self.z, ddpm.make_grid("uniform", student.TEACHER_STEPS), self.ab)
        self.close(self.paths[:, -1], end, 0)
        self.close(self.paths[:, 0], self.z, 0)

    def test_states_on_the_grid_are_the_paths_own_and_between_them_ddims(self):
        for k in (0, 1, 25, 49, 50):
            self.close(student.state_at(self.paths, full(4, 1000 - 20 * k), self.ab), self.paths[:, k], 1e-5)
        t, t_mid = full(4, 600), full(4, 587)
        x0_hat, eps_hat = ddpm.predict_x0(self.paths[:, 20], t, self.teacher(self.paths[:, 20], t), self.ab)
        self.close(student.state_at(self.paths, t_mid, self.ab), ddpm.ddim_step(x0_hat, eps_hat, t, t_mid, 0.0, self.ab)[0], 2e-4)

    def test_drawn_jumps_go_down_far_enough_and_reach_both_ends(self):
        t, t_next = student.draw_jumps(20_000, rng())
        self.assertTrue((t - t_next >= student.SHORTEST_JUMP).all())
        self.assertTrue((t_next >= 0).all() and (t <= ddpm.T).all())
        self.assertAlmostEqual((t == ddpm.T).float().mean().item(), student.START_SHARE, delta=0.02)
        self.assertAlmostEqual((t_next == 0).float().mean().item(), student.LAND_SHARE, delta=0.05)
        self.assertEqual(set(range(10, 1001)) - set(t.tolist()), set())

    def test_the_secant_target_is_the_landing_point_in_v_space(self):
        class Cheat(student.JumpUNet):                                     # knows the paths by heart
            def forward(net, x, t, t_next, with_features=False):
                target = student.state_at(self.paths, t_next, self.ab)
                return student.secant_velocity(x, target, t, t_next, self.ab)
        t, t_next = torch.tensor([1000, 1000, 700, 333]), torch.tensor([0, 400, 13, 0])
        self.assertLess(student.clone_loss(Cheat(**TINY), self.paths, t, t_next, self.ab).item(), 1e-8)
        zero = student.JumpUNet(**TINY)                                    # conv_out is zero: predicts v = 0
        x, y = student.state_at(self.paths, t, self.ab), student.state_at(self.paths, t_next, self.ab)
        d = student.angle(t, self.ab, x) - student.angle(t_next, self.ab, x)
        landing = ((d.cos() * x - y) ** 2 / d.sin() ** 2).mean()
        self.close(student.clone_loss(zero, self.paths, t, t_next, self.ab).detach(), landing, 1e-4 * landing.item())

    def test_the_eps_target_is_the_teachers_own_epsilon(self):
        copy_of_teacher = student.student_from_teacher(self.teacher)
        with mock.patch.object(ddpm.predict_x0, "__defaults__", (True,)):
            t = torch.tensor([400, 300, 200, 100])
            x_t = student.state_at(self.paths, t, self.ab)
            own = self.teacher(x_t, t)
            clipped = ddpm.predict_x0(x_t, t, own, self.ab)[1]
            loss = student.clone_loss(copy_of_teacher, self.paths, t, t - 50, self.ab).item()
        self.close(loss, F.mse_loss(own, clipped).item(), 1e-4)

    def test_a_copy_of_the_teacher_is_the_teacher(self):
        copied = student.student_from_teacher(self.teacher)
        t = torch.tensor([1000, 700, 40, 1])
        for t_next in (full(4, 0), t - 1):
            self.close(copied(self.z, t, t_next), self.teacher(self.z, t), 1e-6)
        grid = ddpm.make_grid("quadratic", 5)
        out, times = student.deploy(copied, self.z, 5, self.ab, grid=grid)
        self.close(out, ddpm.sample(self.teacher, self.z, grid, self.ab), 1e-5)
        self.assertEqual(times[0].tolist(), grid)

    def test_a_scratch_student_sees_both_times(self):
        net = randomised(student.JumpUNet(**TINY))
        a, b, c = (net(self.z[:1], torch.tensor([t]), torch.tensor([s])).detach() for t, s in ((900, 100), (900, 101), (901, 100)))
        self.assertGreater((a - b).abs().max(), 1e-6)
        self.assertGreater((a - c).abs().max(), 1e-6)

    def test_the_pool_keeps_the_newest_paths(self):
        pool = student.PathPool(self.teacher, 4, 0, self.ab, CPU, fp32=True)
        pool.add(2)
        first = pool.paths[0].clone()
        self.assertTrue(all(torch.equal(p, pool.paths[0]) or torch.equal(p, pool.paths[1]) for p in pool.draw(10, rng())))
        pool.add(3)
        self.assertEqual(pool.made, 5)
        self.assertFalse(torch.equal(pool.paths[0], first))


class Policy(Case):
    ab = ddpm.linear_alpha_bar()

    def test_it_starts_at_the_hand_grid_with_the_named_concentration(self):
        net = student.JumpUNet(**TINY)
        for base in ("uniform", "quadratic"):
            policy = student.StepPolicy(net.features, base)
            _, times = student.deploy(net, torch.randn(3, 3, 8, 8, generator=rng()), 4, self.ab, policy)
            self.close(times[0].float(), torch.tensor(ddpm.make_grid(base, 4)).float(), 1)
            _, concentration, _ = policy(full(2, 500), full(2, 3), torch.zeros(2, net.features))
            self.close(concentration.detach(), torch.full((2,), student.CONCENTRATION), 1e-4)

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
        self.assertEqual(student.land(full(1, 500), torch.tensor([0.9]), full(1, 3), torch.tensor([True])).item(), 0)

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
        _, times = student.deploy(net, z, 4, self.ab, policy, may_stop=True)
        self.assertEqual((times[:, :-1] > 0).sum(1).tolist(), [1, 1, 1])
        _, times = student.deploy(net, z, 4, self.ab, policy, may_stop=False)
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
            self.close(student.deploy(net2, z, 3, self.ab, policy2)[0], student.deploy(net, z, 3, self.ab, policy)[0], 0)
            self.assertEqual(content["steps"], 3)

    def test_held_out_noise_is_disjoint_from_training_noise(self):
        with mock.patch("student.seeded_noise") as draw:
            student.held_out_noise(300, 8, CPU)
        self.assertGreaterEqual(min(draw.call_args[0][0]), student.HELD_OUT)


# ┌───────────────────────────────────────────────────────────────────────────────────────────────┐
# │ reward.py                                                                                     │
# └───────────────────────────────────────────────────────────────────────────────────────────────┘

class Rewards(Case):
    def setUp(self):
        self.coach, content = reward.load_encoder(Workshop.get() / "coach.pt", "coach")
        self.scales = content["scales"]

    def test_the_teachers_own_image_gets_the_best_value_and_others_stay_in_range(self):
        x, y = images(6), images(6, seed=1)
        for name, term in reward.TERMS.items():
            self.close(term.function(x, x, self.coach), torch.full((6,), float(term.best)), 1e-5, name)
            other = term.function(y, x, self.coach)
            self.assertTrue((other < term.best).all() and (other >= term.worst).all(), name)

    def test_no_reward_depends_on_the_batch_it_is_computed_in(self):
        x, y = images(5), images(5, seed=1)
        for name, term in reward.TERMS.items():
            alone = torch.cat([term.function(x[i:i + 1], y[i:i + 1], self.coach) for i in range(5)])
            self.close(term.function(x, y, self.coach), alone, 1e-5, name)

    def test_the_registry_says_rightly_where_gradients_reach_the_pixels(self):
        for name, term in reward.TERMS.items():
            x = images(2).requires_grad_(True)
            value = term.function(x, images(2, seed=1), self.coach).sum()
            self.assertEqual(value.requires_grad, term.differentiable, name)
            if term.differentiable:
                value.backward()
                self.assertGreater(x.grad.abs().max().item(), 1e-8, name)
        self.assertFalse(any(p.requires_grad for p in self.coach.parameters()))

    def test_mse_and_histogram_agree_with_loops(self):
        x, y = images(2), images(2, seed=1)
        self.close(reward.mse_reward(x, y), -torch.stack([((a - b) ** 2).mean() for a, b in zip(x, y)]))
        for b in range(2):
            kl = 0.0
            for c in range(3):
                p, q = (np.histogram(s[b, c].numpy(), bins=reward.BINS, range=(-1, 1))[0] + 1.0 for s in (y, x))
                p, q = p / p.sum(), q / q.sum()
                kl += (p * np.log(p / q)).sum() / 3
            self.close(reward.histogram_reward(x, y)[b], -kl, 1e-4)

    def test_weights_and_scales_enter_as_written(self):
        x, y = images(3), images(3, seed=1)
        total, raw = reward.Reward("feature:2+mse", self.coach, self.scales)(x, y)
        expected = 2 * (raw["feature"] - 1) / self.scales["feature"] + raw["mse"] / self.scales["mse"]
        self.close(total, expected, 1e-4)
        self.assertEqual(list(raw), ["feature", "mse"])
        self.close(reward.Reward("mse", self.coach, self.scales)(x, x)[0], torch.zeros(3), 1e-6)

    def test_what_is_no_reward_is_refused(self):
        self.bad_input("unknown reward 'clip'", reward.parse_reward, "clip")
        self.bad_input("must be a number", reward.parse_reward, "mse:much")
        self.bad_input("positive and finite", reward.parse_reward, "mse:-1")
        self.bad_input("positive and finite", reward.parse_reward, "mse:nan")

    def test_more_distortion_means_less_reward(self):
        x = images(16, size=32)
        for kind in ("noise", "wrong", "blur"):
            values = [reward.mse_reward(reward.distort(x, kind, level, rng()), x).mean().item() for level in (0, 0.25, 0.5, 1)]
            self.assertTrue(all(a > b for a, b in zip(values, values[1:])), (kind, values))
        self.close(reward.distort(x, "shift", 0.5, rng())[..., 4:], x[..., :-4], 0)


class Metrics(Case):
    def test_frechet_distance_of_known_gaussians(self):
        m1, m2 = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        c1, c2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
        self.assertAlmostEqual(reward.frechet_distance(m1, c1, m2, c2), 4 + (1 - 3) ** 2 + (2 - 1) ** 2, places=6)

    def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product(self):
        a, b = torch.randn(200, 5, generator=rng(1)).double(), 0.5 * torch.randn(300, 5, generator=rng(2)).double() + 1
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
        real, fake, k = torch.randn(30, 2, generator=rng(1)), torch.randn(25, 2, generator=rng(2)) + 0.7, 3
        def radius(points, i):
            return sorted((points[i] - p).norm().item() for p in points)[k]
        r_real, r_fake = [radius(real, i) for i in range(30)], [radius(fake, j) for j in range(25)]
        inside_real = [[(real[i] - fake[j]).norm().item() <= r_real[i] for i in range(30)] for j in range(25)]
        expected = dict(precision=np.mean([any(row) for row in inside_real]), density=np.sum(inside_real) / (k * 25),
                        recall=np.mean([any((real[i] - fake[j]).norm().item() <= r_fake[j] for j in range(25)) for i in range(30)]),
                        coverage=np.mean([min((real[i] - fake[j]).norm().item() for j in range(25)) <= r_real[i] for i in range(30)]))
        for name, value in reward.precision_recall(real, fake, k).items():
            self.assertAlmostEqual(value, expected[name], places=5, msg=name)

    def test_precision_takes_any_ball_not_the_nearest_neighbours(self):
        tight = torch.tensor([[0.0, 0], [0.01, 0], [0, 0.01]])
        wide = torch.tensor([[3.0, 0], [6, 0], [3, 3.0]])
        fake = torch.cat([torch.tensor([[0.5, 0.0]]), torch.full((3, 2), 99.0) + torch.arange(3)[:, None]])
        self.assertEqual(reward.precision_recall(torch.cat([tight, wide]), fake, k=1)["precision"], 0.25)

    def test_the_crop_shifts_images_and_nothing_else(self):
        x = images(50, size=32)
        y = reward.random_crop(x, rng())
        self.assertEqual(y.shape, x.shape)
        for i in range(5):
            padded = F.pad(x[i:i + 1], [4] * 4, mode="reflect")[0]
            self.assertTrue(any(torch.equal(y[i], padded[:, a:a + 32, b:b + 32]) for a in range(9) for b in range(9)))
