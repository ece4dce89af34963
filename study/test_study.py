"""The specification of study/. Test names are sentences; tiny networks, no GPU, seconds.

    python study/test_study.py
"""
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms                                     # puts the repository on the path   # noqa: E402
import bias                                                                    # noqa: E402
import estimators                                                              # noqa: E402
import fresh                                                                   # noqa: E402
import losses                                                                  # noqa: E402
import report                                                                  # noqa: E402
import run                                                                     # noqa: E402
# From the repository:
import rl_distill                                                              # noqa: E402
from ddpm import (T, MixtureNet, UNet, action_mask, baseline_solver, linear_alpha_bar,  # noqa: E402
                  sample, seeded_noise, solver_of)
from harness.runs import checksum, read_log                                    # noqa: E402
from reward import Judge, View, frechet_distance, moments                      # noqa: E402
from teacher import TARGET, draw, noise_and_targets                            # noqa: E402

ALPHA_BAR, CPU = linear_alpha_bar(), torch.device("cpu")
TINY = dict(width=8, mults=[1], blocks=1, attention=[], image_size=4)


def tiny():
    """A tiny U-Net that does something."""
    torch.manual_seed(0)
    net = UNet(**TINY).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if "conv2.weight" in name or "conv_out.weight" in name:
            torch.nn.init.normal_(p, std=0.1)
    return net


@contextlib.contextmanager
def counted():
    """Within: a list of how many rows each forward pass of any U-Net sees, thrice with a gradient."""
    def count(net, inputs):
        if isinstance(net, UNet):
            rows.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
    rows, hook = [], torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


def view(images):
    return View(images, [], images.flatten(1))


def toy_reward(images, target):
    return -100 * (images - target.images).square().flatten(1).mean(1)


def arguments(*words, noises=8, updates=24):
    args = rl_distill.parse_args([*words, "--updates", str(updates)])
    args.noises = noises
    return args


class Competitors(unittest.TestCase):
    def problem(self):
        """A network, a start, and targets that other numbers u reach."""
        net, z, start = tiny(), seeded_noise(range(16), (3, 4, 4)), baseline_solver(
            "AB2", "quadratic", 3)
        u = start.action(len(net.branches))
        best = u + action_mask(*u[:, 2:].shape) * torch.tensor(
            [0.5, -0.3] + [0.4] * len(net.branches))
        images = sample(net, z, solver_of(best[None]), ALPHA_BAR).clamp(-1, 1)
        return net, start, (z, view(images))

    def test_each_gains_on_a_toy_problem_within_the_policy_gradients_budget(self):
        def score(net, solver, z, target):
            return toy_reward(sample(net, z, solver, ALPHA_BAR).clamp(-1, 1), target).mean().item()
        for name, method in arms.COMPETITORS.items():
            net, start, train_set = self.problem()
            paths, updates = 0, 24
            if method.__module__ == "losses":                  # learn from the teacher's paths
                images = draw(net, TARGET, train_set[0], ALPHA_BAR)
                start, train_set = baseline_solver("DDIM", "quadratic", 3), (
                    train_set[0], view(images))
                paths, updates = 50 * len(images), 80
            args, before = arguments("--steps", "3", updates=updates), score(
                net, start, *train_set)
            budget = rl_distill.training_evaluations(args, 8)
            args.lr = 3e-3                                             # of weights
            with counted() as rows, mock.patch.object(arms, "POPULATION", 8), \
                    mock.patch.object(losses, "BATCH", 4), mock.patch.object(
                        losses, "RATES", dict.fromkeys(losses.RATES, 3e-3)):
                found, spent, *other = method(net, start, train_set, toy_reward, args, budget)
            self.assertEqual(spent, sum(rows) - paths, name)
            self.assertTrue(0.7 * budget < spent <= budget, name)
            after = score(other[0] if other else net, found, *train_set)
            self.assertGreater(after, 0.9 * before, (name, before))
            self.assertEqual((found.times[-1], found.leans[0]), (0, 0.0))
            self.assertTrue("weights" not in name or found == start)

    def test_the_evaluations_of_the_policy_gradient_are_those_that_its_network_sees(self):
        for words in ([], ["--learn", "weights"], ["--paper"]):
            net, start, train_set = self.problem()
            args = arguments("--steps", "3", "--group", "4", *words, updates=2)
            with tempfile.TemporaryDirectory() as out, mock.patch("builtins.print"), \
                    counted() as rows, mock.patch.object(rl_distill, "LOG_EVERY", 2):
                rl_distill.train(net, start, train_set, (train_set[0][:1], view(
                    train_set[1].images[:1])), toy_reward, args, Path(out))
            self.assertEqual(sum(rows) - 2 * 3, rl_distill.training_evaluations(args, 8), words)


class Pathwise(unittest.TestCase):
    def test_the_smooth_schedule_is_alpha_bar_at_integers_and_falls_between_them(self):
        t, schedule = torch.arange(T + 1).float().requires_grad_(), arms.SmoothSchedule(ALPHA_BAR)
        self.assertTrue(torch.equal(schedule[t], ALPHA_BAR))
        slope, = torch.autograd.grad(schedule[t].sum(), t)
        self.assertLess((slope[:-1] / (ALPHA_BAR[1:] - ALPHA_BAR[:-1]) - 1).abs().max(), 0.02)

    def test_its_rollout_is_that_of_sample_and_reaches_every_number_that_acts(self):
        net, z = tiny(), seeded_noise(range(3), (3, 4, 4))
        u = baseline_solver("DPM++", "quadratic", 4).action(len(net.branches))
        u = (u + 0.1 * torch.randn(u.shape)).requires_grad_()
        images = arms.smooth_rollout(net, u, z, arms.SmoothSchedule(ALPHA_BAR))
        played = sample(net, z, solver_of(u.detach()[None]), ALPHA_BAR).clamp(-1, 1)
        self.assertLess((images - played).abs().max(), 1e-5)
        images.square().sum().backward()
        self.assertTrue(torch.equal(u.grad != 0, action_mask(*u[:, 2:].shape)))

    def test_its_gradient_is_the_slope_of_the_reward(self):
        net = MixtureNet(torch.tensor([[0.5, -0.3], [-0.4, 0.1]]), 0.2,
                         arms.SmoothSchedule(ALPHA_BAR))
        z, h = seeded_noise(range(64), (2,)), 0.1   # of logit rho: many t, so rounding is small
        u = baseline_solver("DPM++", "quadratic", 3).action(0).requires_grad_()
        arms.smooth_rollout(net, u, z, net.alpha_bar).square().mean().backward()
        for k, i in action_mask(3, 0).nonzero().tolist():
            step = torch.zeros(3, 2)
            step[k, i] = h
            up, down = (sample(net, z, solver_of((u + s).detach()[None]), ALPHA_BAR).clamp(
                -1, 1).square().mean() for s in (step, -step))
            slope = (up - down) / (2 * h)
            self.assertLess(abs(u.grad[k, i] - slope), 0.05 * abs(slope) + 1e-4, (k, i))


class Arms(unittest.TestCase):
    def test_every_arm_is_there_once_and_its_command_parses(self):
        found = arms.arms()
        self.assertEqual(len({arm[:4] for arm in found}), len(found))
        self.assertEqual(len({(arm.init, arm.name, arm.steps) for arm in found}), len(found))
        for arm in found:
            args = run.arguments(arm, 2)
            self.assertEqual((args.steps, args.seed, args.init),
                             (arm.steps, 2, [arms.INIT[arm.init]]))
            self.assertIn(arm.method, {"train", "placebo", "preferences", *arms.COMPETITORS,
                                       *arms.PARTS})
            self.assertEqual(run.arm_before(arm) in found, arm.start in arms.LEARNED)

    def test_gains_of_blocks_given_to_channels_change_no_image(self):
        net, z = tiny(), seeded_noise(range(2), (3, 4, 4))
        solver = baseline_solver("AB2", "quadratic", 3)._replace(
            gains=torch.randn(3, len(net.branches)).tolist())
        wide = arms.channel_gains(solver, net.branches)
        self.assertEqual(len(wide.gains[0]), sum(net.branches))
        self.assertTrue(torch.allclose(*(sample(net, z, s, ALPHA_BAR) for s in (solver, wide)),
                                       atol=1e-5))

    def test_of_a_part_only_that_learns(self):
        for what, columns in arms.PARTS.items():
            with arms.within(what, 0):
                policy = rl_distill.JumpPolicy(baseline_solver("AB2", "uniform", 3), 4)
            u = policy.draw(2, torch.ones(6), torch.Generator().manual_seed(0))[0]
            self.assertEqual({*(u != policy.mean()).nonzero()[:, 1].clamp(max=2).tolist()},
                             {*columns}, what)
            self.assertTrue(((u != policy.mean()) <= action_mask(3, 4)).all())

    def test_preferences_say_which_of_a_pair_is_better_and_no_more(self):
        R = torch.tensor([3.0, 1.0, -7.0, 2.0, 5.0, 5.0])
        with arms.within("preferences", 0):
            self.assertEqual(rl_distill.advantages(R, 2).tolist(), [1, -1, -1, 1, 0, 0])

    def test_shuffled_advantages_are_those_of_other_draws(self):
        R, real = torch.randn(64), rl_distill.advantages
        with arms.shuffled(0):
            found = rl_distill.advantages(R, 2)
        self.assertIs(rl_distill.advantages, real)
        self.assertFalse(torch.equal(found, real(R, 2)))
        self.assertTrue(torch.equal(found.sort().values, real(R, 2).sort().values))


class Books(unittest.TestCase):
    def setUp(self):
        keep, here = tempfile.TemporaryDirectory(), os.getcwd()
        self.addCleanup(keep.cleanup)
        self.addCleanup(os.chdir, here)
        os.chdir(keep.name)

    def world(self):
        """A World of a tiny teacher."""
        def small(*arm, real=run.arguments):
            args = real(*arm)
            args.updates, args.group = 2, min(args.group, 4)
            return args
        for module, name, value in ((run, "N", 4), (rl_distill, "NOISES", 4),
                                    (run, "arguments", small)):
            patch = mock.patch.object(module, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        judge = Judge().eval(), (torch.zeros(160), torch.eye(160))
        toy_reward.view, toy_reward.scales = view, dict(feature=1.0, perceptual=1.0)
        with mock.patch.object(run, "load_inputs", return_value=(tiny(), [], toy_reward, judge)):
            return run.World(CPU)

    def test_an_arm_from_learned_jumps_plays_these_first_and_is_not_played_again(self):
        world = self.world()
        done = {arm.group + arm.name: arm for arm in arms.arms() if arm.steps == 3
                and arm.init == "teacher" and arm.name != "DPM++"}
        for name in ("baselineDDIM", "weightspolicy gradient, weights, from learned jumps",
                     "searchcross-entropy, times, leans, gains",
                     "channelpolicy gradient, channel gains, from block gains",
                     "placeboplacebo: shuffled advantages", "fixedcloning",
                     "fixedregression, weights", "fixedregression, times, leans, gains"):
            row = json.loads(json.dumps(run.row_of(done[name], 0, world, "c")))
            self.assertLessEqual(set(run.KEY), set(row))
            self.assertLessEqual(row["start_reward"], 0)
            folder = run.place(done[name], 0, world)
            self.assertEqual((folder / "policy.pt").exists(), not name.startswith("baseline"))
            if name.startswith("fixed"):
                self.assertEqual(row["numbers"] > 1000, "leans" not in name)
                self.assertFalse(row["needs_gradient"] or row["calls"])
            elif not name.startswith("baseline"):
                self.assertGreater(row["calls"], 0)
            if name.startswith("weights"):
                jumps = run.place(run.arm_before(done[name]), 0, world) / "policy.pt"
                self.assertIn("--only weights --seeds 0", row["command"])
                content = rl_distill.load_model(jumps)[1]
                parameters = sum(p.numel() for p in world.teacher.parameters())
                self.assertEqual(row["numbers"], parameters + content["study"]["numbers"])
                self.assertGreater(row["trained"], content["study"]["trained"])
                self.assertEqual(content["provenance"]["teacher"], checksum(world.teacher))
                with mock.patch.object(rl_distill, "train", side_effect=AssertionError):
                    self.assertEqual(run.play(done[name], 0, world), folder / "policy.pt")

    def test_the_headline_on_fresh_noises_is_paired_with_regression(self):
        world = self.world()
        names = "regression, weights, unknown", "regression, weights", "pathwise, weights", "target"

        def whole(images):                                      # tiny: an image is one patch
            return images.flatten(1)[:, None]
        with mock.patch.multiple(fresh, N=9, RESAMPLED=4, NAMES=names, SHOWN=names[1:],
                                 patches=whole), mock.patch("builtins.print"), \
                mock.patch.multiple(report, FRESH=Path("fresh.jsonl"), FIGURE=Path("a/a.png")), \
                mock.patch.object(run, "World", lambda *_: world):
            Path("a").mkdir()
            fresh.main(["--steps", "3"])
            fresh.main(["--steps", "3"])                               # nothing is made again
        first, *_ = rows = read_log("fresh.jsonl")
        self.assertEqual([row["name"] for row in rows], [*names[1:]])
        self.assertTrue(Path("a/study_images.png").exists())
        self.assertEqual([row["cost"] > 0 for row in rows], [True, True, False])
        self.assertAlmostEqual(rows[-1]["reward"] + rows[-1]["likeness"], 2, places=4)
        for kind in ("reward", "likeness", "frechet", "patches"):
            self.assertEqual((first[f"more_{kind}"], first[f"more_{kind}_error"]), (0, 0))
            self.assertNotEqual(rows[1][f"more_{kind}_error"], 0)
        z, target = noise_and_targets(world.teacher, fresh.FIRST, 9, CPU)
        self.assertAlmostEqual(rows[-1]["patches"], frechet_distance(
            *moments(target[:4].flatten(1)), *moments(target[4:].flatten(1))), places=4)
        found = [(draw(net, solver, z, ALPHA_BAR) - target).square().flatten(1).mean(1)
                 for net, solver in [(world.teacher, world.start("teacher", 3, "best")[1])] + [
                     run.load_model(run.play(arm, 0, world))[::2] for name in names[1:3]
                     for arm in arms.arms() if (arm.name, arm.init, arm.steps) == (
                         name, "teacher", 3)]]                        # toy_reward is -100 of this
        for row, error in zip(rows, found[1:]):
            more = (found[1] - error) / found[0].mean()
            for key, value in (("mse", error.mean()), ("reward", 1 - error.mean() / found[0].mean()),
                               ("more_reward", more.mean()),
                               ("more_reward_error", more.std() / 3)):
                self.assertAlmostEqual(row[key], value.item(), places=4, msg=key)

    def test_patches_are_all_crops_whose_corner_is_a_multiple_of_four(self):
        images = torch.randn(2, 3, 32, 32)
        found = fresh.patches(images).reshape(2, 7, 7, 3, 8, 8)
        self.assertTrue(torch.equal(found[1, 2, 6], images[1, :, 8:16, 24:32]))

    def row(self, arm, seed=0):
        return dict(zip(run.KEY, (*arm[:4], seed)), n=8, nfe=arm.steps, reward=-1.0 - 2 * seed,
                    reward_error=0.1, start="a", start_reward=-4.0, closed=0.5 - 0.2 * seed,
                    closed_error=0.05, mse=0.1, frechet=2.0, trained=2000, cloned=0, calls=1000,
                    numbers=35, needs_gradient=False, minutes=1.0, device="cpu", torch="2",
                    commit="c")

    def test_a_row_is_not_made_again_and_a_torn_line_is_no_row(self):
        everything, path = run.todo({}, [0, 1]), Path("r.jsonl")
        self.assertEqual({seed for arm, seed in everything if arm.group == "baseline"}, {0})
        run.log_line(path, **self.row(everything[0][0]))
        with open(path, "a") as file:
            file.write(json.dumps(self.row(everything[1][0]))[:-9])
        for left in (1, 2):                         # the first of these ends the torn line, for good
            run.log_line(path, **self.row(everything[1][0]))
            self.assertEqual(run.todo(run.read_rows(path), [0, 1]), everything[left:])

    def test_tables_stand_between_the_markers_and_nothing_else_changes(self):
        path, marks = Path("README.md"), [f"<!-- {name}: {word} -->" for name in (
            "summary", "fresh", "tables") for word in ("begin", "end")]
        jumps, target = (next(a for a in arms.arms() if a.name == name and a.steps in (3, 50))
                         for name in (f"{arms.GRADIENT}, {arms.ALL}", "target"))
        base = next(arm for arm in arms.arms() if arm.name == "AB2" and arm.steps == 3)
        path.write_text("above é\n{}\nold\n{}\na{}old{}b\n{}{}\nbelow\n".format(*marks),
                        encoding="utf-8")
        new = dict(name=jumps.name, steps=3, seed=0, cost=7, mse=0.1, frechet=2.0, patches=3.0,
                   reward=0.5, likeness=0.4, **{f"more_{kind}{error}": -0.25 for kind in (
                       "reward", "likeness", "frechet", "patches") for error in ("", "_error")})
        run.log_line("fresh.jsonl", **new)
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(
                report, "FRESH", Path("fresh.jsonl")):
            report.write([self.row(jumps), self.row(jumps, 1), self.row(base), self.row(target)], 2,
                         path, Path("a.png"))
            text = path.read_text(encoding="utf-8")
            self.assertTrue(Path("a.png").exists() and "old" not in text)
            start, *_, last = text.splitlines()
            self.assertEqual((start, last), ("above é", "below"))
            self.assertEqual([text.count(mark) for mark in marks], [1] * 6)
            Path("none.md").write_text(text.replace(marks[-1], ""))
            with self.assertRaises(report.BadInput):
                report.write([self.row(base)], 0, Path("none.md"))
        self.assertEqual(Path("none.md").read_text(), text.replace(marks[-1], ""))
        for line in ("| policy gradient, times, leans, gains | 2 | 2 | 40 ± 14 | 40 | 2.00 ± 0.00 | "
                     "0.1000 |",
                     "| 3 | 0 | policy gradient, times, leans, gains | 7 | 50.0 (-25.0 ± -25.0) | "
                     "40.0 (-25.0 ± -25.0) | 2.00 (-0.25 ± -0.25) | 3.00 (-0.25 ± -0.25) |",
                     "| teacher, policy gradient, times, leans, gains | -2.000 ± 1.414 (0.100) |",
                     "gains | 40 ± 14 (5) |", "The target itself, 50 evalu",
                     "| teacher, policy gradient, times, leans, gains | 3 | 2.0 | 0 | 1.0 | 1.0 | 35 "
                     "| no |"):
            self.assertIn(line, text)


class Estimators(unittest.TestCase):
    def test_the_derivatives_of_the_toy_are_right_and_its_baselines_leave_what_they_should(self):
        mu, theta = (torch.tensor(value, requires_grad=True) for value in (bias.MU, bias.THETA))
        mean = -((theta * mu - bias.C) ** 2 + theta ** 2 * bias.S ** 2 + bias.S ** 2)
        for slope, true in zip(torch.autograd.grad(mean, (mu, theta)), bias.TRUE):
            self.assertAlmostEqual(slope.item(), true, places=5)
        for (name, how), expected in zip(bias.BASELINES.items(), (
                (0.75, 0.75), (1, 1), (1, 1 / 3), (1, 1))):
            found = bias.left(*how, 4, torch.Generator().manual_seed(1))
            for share, right in zip(found, expected):
                self.assertAlmostEqual(share, right, delta=0.04, msg=name)

    def test_both_policy_gradients_point_along_the_pathwise_one(self):
        net, z = tiny(), seeded_noise(range(4), (3, 4, 4))
        goal = view(sample(net, z, baseline_solver("DDIM", "uniform", 20), ALPHA_BAR).clamp(-1, 1))
        start = baseline_solver("AB2", "quadratic", 3)
        u = start.action(len(net.branches))
        std, generator = torch.full((u.shape[1],), 0.05), torch.Generator().manual_seed(0)
        std[0] = 1e-3                               # of rho: times this near round to the same
        exact = estimators.pathwise_jumps(net, u, z, goal, toy_reward)
        few, many = (estimators.cosine(estimators.pair_estimates(
            net, u, std, z, goal, toy_reward, pairs, generator).mean(0)[:, 1:], exact[:, 1:])
            for pairs in (4, 2000))
        self.assertTrue(few < many and many > 0.9, (few, many))
        self.assertEqual((exact != 0).tolist(), action_mask(3, len(net.branches)).tolist())
        net.requires_grad_(True)
        few, many = (estimators.cosine(*estimators.weights_gradients(
            net, start, z, goal, toy_reward, group, generator)) for group in (4, 1024))
        self.assertTrue(few < many and many > 0.9, (few, many))


if __name__ == "__main__":
    unittest.main()
