"""The specification of study/. Test names are sentences; no network, no GPU, seconds.

    python study/test_study.py
"""
import importlib
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms                                     # puts the repository on the path   # noqa: E402
import report                                                                  # noqa: E402
import run                                                                     # noqa: E402
import stress                                                                  # noqa: E402
# From the repository:
import rl_distill                                                              # noqa: E402
from ddpm import (MixtureNet, Solver, T, UNet, hand_solver, linear_alpha_bar,  # noqa: E402
                  power_grid, sample, seeded_noise)
from student import JumpUNet                                                   # noqa: E402

ALPHA_BAR, TINY = linear_alpha_bar(), dict(width=8, mults=[1], blocks=1, attention=[], image_size=4)


def toy_reward(images, targets):
    score = -100 * (images - targets).square().flatten(1).mean(1)
    return score, dict(toy=score.detach())


class Toy:
    """Points in the plane, two clusters; the targets are what the hand solver, moved by `best`,
    makes of 64 noises: the largest reward is 0, at `best`. Counts the rows of all evaluations."""
    clip = False

    def __init__(self, K=3):
        means = torch.tensor([[0.5, -0.3], [-0.4, 0.1]])
        self.perfect = MixtureNet(means, 0.2, arms.SmoothSchedule(ALPHA_BAR))
        self.policy = rl_distill.JumpPolicy(hand_solver("DPM++", "quadratic", K))
        best, z = torch.tensor([0.5, -0.3]) * arms.mask(self.policy), seeded_noise(range(64), (2,))
        self.train_set, self.count = (z, z), 0
        self.score(best)
        self.train_set = z, rl_distill.rollout(self, self.policy, z, ALPHA_BAR)[0]
        self.start, self.count = self.score(torch.zeros(K, 2)), 0

    def __call__(self, x, t, t_next):
        self.count += len(x)
        return self.perfect(x, t)

    def score(self, shift):
        return arms.mean_reward(self, self.policy, shift, *self.train_set, toy_reward,
                                ALPHA_BAR)

    def search(self, method, rollouts):
        return method(self, self.policy, self.train_set, toy_reward, rollouts, ALPHA_BAR, 0)


class Counting(JumpUNet):
    """Counts the rows it sees, thrice where a gradient will come back."""
    rows = 0

    def forward(self, x, t, t_next=None):
        Counting.rows += len(x) * (3 if torch.is_grad_enabled() else 1)
        return super().forward(x, t, t_next)


class Competitors(unittest.TestCase):
    def test_each_finds_most_of_what_a_toy_problem_holds_and_spends_what_the_policy_gradient_does(
            self):
        args = rl_distill.parse_args(["--steps", "3"])
        self.assertEqual(arms.evaluations(args), args.updates * 16 * 2 * 3)
        for name, method in list(arms.COMPETITORS.items())[1:-1]:
            toy = Toy()
            found, spent = toy.search(method, arms.evaluations(args) // args.steps)
            self.assertEqual(spent, toy.count * (3 if name == "own" else 1), name)
            self.assertLessEqual(spent, arms.evaluations(args))
            self.assertGreater(spent, arms.evaluations(args) - 16 * 3 * 3, name)   # < one batch
            self.assertEqual(toy.policy.shift.abs().max(), 0)            # the start is left alone
            self.assertEqual(found.shift.data[~arms.mask(found)].abs().max(), 0)
            self.assertLess(toy.start, -0.5)
            self.assertGreater(toy.score(found.shift.data), 0.25 * toy.start, name)

    def test_two_numbers_are_the_best_pair_of_twelve(self):
        toy = Toy()
        found, spent = toy.search(arms.two_numbers, 0)
        self.assertEqual((spent, toy.count), (12 * 64 * 3,) * 2)
        scores = {}
        for power in arms.POWERS:
            for lean in arms.LEANS:
                solver = Solver(power_grid(3, power), [0.0, lean, lean])
                x = sample(toy, toy.train_set[0], solver, ALPHA_BAR).clamp(-1, 1)
                scores[toy_reward(x, toy.train_set[1])[0].mean().item()] = solver
        grid, leans = scores[max(scores)]
        self.assertEqual(found.solver().grid, grid)
        self.assertEqual(found.solver().leans, torch.tensor(leans).tolist())

    def test_the_evaluations_of_a_run_are_those_that_its_network_sees(self):
        for words in ("", "--channel pixels", "--channel pixels --eta 0.3 --epochs 2 --kl 1"):
            args = rl_distill.parse_args([*words.split(), "--steps", "3", "--updates", "2",
                                          "--noises", "4", "--group", "2"])
            net, z, Counting.rows = Counting(**TINY).eval(), seeded_noise(range(4), (3, 4, 4)), 0
            policy = rl_distill.JumpPolicy(hand_solver("DDIM", "uniform", 3))
            with tempfile.TemporaryDirectory() as out, mock.patch("builtins.print"):
                rl_distill.train(net, policy, (z, z), (z[:1], z[:1]), toy_reward, args,
                                 Path(out), torch.device("cpu"))
            self.assertEqual(Counting.rows - 3, arms.evaluations(args), words)


class HandSolvers(unittest.TestCase):
    def test_ipndm_is_ddim_where_it_remembers_nothing(self):
        net, z = MixtureNet(torch.tensor([[0.5, -0.3]]), 0.2, ALPHA_BAR), seeded_noise([1, 2], (2,))
        for order, same in ((1, True), (2, False)):
            solver = hand_solver("DDIM", "quadratic", 4)
            off = arms.Ipndm(solver.grid, order)(net, z, ALPHA_BAR) - sample(
                net, z, solver, ALPHA_BAR).clamp(-1, 1)
            self.assertEqual(off.abs().max().item() < 1e-4, same)

    def test_its_weights_are_exact_for_polynomials_of_their_order(self):
        for weights in arms.ADAMS_BASHFORTH:               # at 0, -1, -2, ..; the mean over 0..1
            for power in range(len(weights)):
                found = sum(w * (-j) ** power for j, w in enumerate(weights))
                self.assertAlmostEqual(found, 1 / (power + 1))


class OwnGradient(unittest.TestCase):
    def test_the_smooth_schedule_is_alpha_bar_at_integers_and_falls_between_them(self):
        t, schedule = torch.arange(T + 1).float().requires_grad_(), arms.SmoothSchedule(ALPHA_BAR)
        self.assertTrue(torch.equal(schedule[t], ALPHA_BAR))
        slope, = torch.autograd.grad(schedule[t].sum(), t)
        self.assertLess((slope[:-1] / (ALPHA_BAR[1:] - ALPHA_BAR[:-1]) - 1).abs().max(), 0.02)
        between = schedule[torch.arange(T) + 0.5]
        self.assertTrue(((between < ALPHA_BAR[:-1]) & (between > ALPHA_BAR[1:])).all())

    def test_its_rollout_is_that_of_the_policy_gradient(self):
        torch.manual_seed(0)
        net = UNet(**TINY).eval()
        torch.nn.init.normal_(net.conv_out.weight, std=0.1)
        policy = rl_distill.JumpPolicy(hand_solver("DPM++", "quadratic", 4))
        policy.shift.data.normal_(0, 0.1)
        z, acts = seeded_noise(range(3), (3, 4, 4)), arms.mask(policy)
        images = arms.smooth_rollout(net, policy, z, arms.SmoothSchedule(ALPHA_BAR))
        played = rl_distill.rollout(net, policy, z, ALPHA_BAR)[0]
        self.assertLess((images - played).abs().max(), 1e-5)
        images.square().sum().backward()
        self.assertTrue((policy.shift.grad[acts] != 0).all() and policy.shift.grad.isfinite().all())
        self.assertEqual(policy.shift.grad[~acts].abs().max(), 0)

    def test_its_gradient_is_the_slope_of_the_reward(self):
        toy, h = Toy(), 0.1                     # of logit rho: many t, so that rounding is small
        images = arms.smooth_rollout(toy, toy.policy, toy.train_set[0], toy.perfect.alpha_bar)
        toy_reward(images, toy.train_set[1])[0].mean().backward()
        gradient = toy.policy.shift.grad.clone()
        for k, i in arms.mask(toy.policy).nonzero().tolist():
            step = torch.zeros_like(gradient)
            step[k, i] = h
            slope = (toy.score(step) - toy.score(-step)) / (2 * h)
            self.assertLess(abs(gradient[k, i] - slope), 0.05 * abs(slope), (k, i))


class Variants(unittest.TestCase):
    def test_changes_are_of_things_that_are_there_and_half_an_action_explores_half(self):
        for change in arms.CHANGES.values():
            self.assertTrue(all(hasattr(rl_distill, name) for name in change))
        policy, z = rl_distill.JumpPolicy(hand_solver("AB2", "uniform", 3)), seeded_noise([1], (2,))
        generator = torch.Generator().manual_seed(0)
        for name, moves in (("", [1, 1]), ("rho", [1, 0]), ("lean", [0, 1])):
            with mock.patch.dict(vars(rl_distill), arms.CHANGES[name]):
                _, jumps = rl_distill.rollout(Toy(), policy, z, ALPHA_BAR, "jump", 8, 0.1,
                                              0.0, generator)
            off = (jumps[1].u - policy(1)).detach()
            self.assertEqual((off.abs().max(0).values > 0).tolist(), [bool(m) for m in moves])
            self.assertLess(off.sum(0).abs().max(), 1e-5)

    def test_one_baseline_for_all_knows_no_groups(self):
        r = torch.tensor([1.0, 2, 5, 8])
        self.assertLess((arms.batch_advantages(r, 2) - (r - 4) / r.std()).abs().max(), 1e-6)

    def test_a_shared_policy_learns_for_all_numbers_of_evaluations(self):
        toy, args = Toy(), rl_distill.parse_args(["--updates", "15"])
        hand = {K: hand_solver("DPM++", "quadratic", K) for K in (2, 3)}
        found = arms.learn_shared(toy, hand, toy.train_set, toy_reward, args, ALPHA_BAR)
        before, after = (sum(toy_reward(sample(toy, toy.train_set[0], solver, ALPHA_BAR),
                                        toy.train_set[1])[0].mean().item()
                             for solver in some.values()) for some in (hand, found))
        self.assertLess(before, -0.5)
        self.assertGreater(after, 0.7 * before)
        lean = [found[K].leans[-1] - hand[K].leans[-1] for K in hand]
        self.assertAlmostEqual(*lean, places=5)            # one evaluation left: the same shift

    def test_the_gradient_of_the_weights_moves_the_network_towards_the_target(self):
        torch.manual_seed(0)
        net, z = Counting(**TINY).eval(), seeded_noise(range(8), (3, 4, 4))
        policy = rl_distill.JumpPolicy(hand_solver("DDIM", "uniform", 2))
        train_set, Counting.rows = (z, torch.full_like(z, 0.5)), 0
        solver = policy.solver()

        def score():
            return toy_reward(sample(net, z, solver, ALPHA_BAR), train_set[1])[0].mean().item()
        start = score()
        with mock.patch.object(arms, "WEIGHTS_LR", 0.01):
            _, spent = arms.own_weights(net, policy, train_set, toy_reward, 480, ALPHA_BAR, 0)
        self.assertEqual(spent, 20 * 8 * 3 * 2)
        self.assertGreater(score(), 0.5 * start)
        self.assertEqual(policy.shift.abs().max(), 0)

    def test_the_bootstraps_error_is_the_spread_over_new_images(self):
        generator = torch.Generator().manual_seed(0)
        content = dict(mean=torch.zeros(4), covariance=torch.eye(4))
        draws = [0.3 + torch.randn(300, 4, generator=generator) for _ in range(60)]
        spread = torch.tensor([run.judged_frechet(x, content) for x in draws]).std().item()
        error = run.frechet_error(draws[0], content)
        self.assertLess(abs(error / spread - 1), 0.4, (error, spread))


class Readme(unittest.TestCase):
    LABELS = {                                  # {first words of a line: (init, group, names)}
        "DDIM": ("teacher", "hand", "DDIM"), "DPM-Solver++(2M)": ("teacher", "hand", "DPM++"),
        "iPNDM": ("teacher", "hand", "iPNDM-3", "iPNDM-4"),
        "AB2": ("teacher", "hand", "AB2"), "two numbers": ("teacher", "two", "two numbers"),
        "random search": ("teacher", "search", "random search"),
        "cross-entropy": ("teacher", "cem", "cross-entropy method"),
        "the reward's own": ("teacher", "own", "own gradient"),
        "**policy gradient**": ("teacher", "jump", "policy gradient"),
        "student from scratch": ("student", "hand", "DDIM"),
        "student from a copy": ("copy", "hand", "DDIM"),
        "the same, **policy": ("copy", "student", "policy gradient")}

    def test_its_table_is_what_the_rows_say(self):
        text = (run.ROOT / "README.md").read_text(encoding="utf-8")
        head, _, *lines = text[text.index("| reward on 256"):].split("\n\n")[0].splitlines()
        counts, rows = [int(k) for k in re.findall(r"K = (\d+)", head)], run.read_log(run.RESULTS)
        rows = [*filter(run.current, rows)]
        for line, (label, (init, group, *names)) in zip(lines, self.LABELS.items(), strict=True):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            self.assertTrue(first.startswith(label), (first, label))
            for K, cell in zip(counts, cells, strict=True):
                found = [row["reward"] for row in rows if row["name"] in names and
                         (row["init"], row["group"], row["steps"]) == (init, group, K)]
                if group == "hand":                                # no seeds; the best of its kind
                    found = [max(found)] if found else []
                self.assertEqual(cell, report.mean_std(found, ".3f") if found else "", (first, K))


class Stress(unittest.TestCase):
    def test_its_sizes_are_of_flags_and_constants_that_are_there(self):
        with mock.patch.object(sys, "path", [*sys.path, str(stress.ROOT / "checkpoints")]):
            for script, sizes in stress.SIZES.items():
                module = importlib.import_module(script)
                for name in sizes:
                    self.assertTrue(hasattr(module if name.isupper() else module.parse_args([]),
                                            name), (script, name))


class Books(unittest.TestCase):
    def setUp(self):
        keep = tempfile.TemporaryDirectory()
        self.addCleanup(keep.cleanup)
        self.folder = Path(keep.name)

    def test_the_start_of_an_arm_is_its_best_hand_solver_and_is_kept(self):
        world, z = run.World.__new__(run.World), torch.zeros(4, 3, 4, 4)
        world.home, world.alpha_bar, world.noises = self.folder, ALPHA_BAR, lambda *a: (z, z)
        hand = {f"{kind} uniform": hand_solver(kind, "uniform", 3) for kind in ("AB2", "DDIM")}
        with mock.patch.object(run, "best_by_hand", return_value=hand) as spy:
            for name, words in (("AB2 uniform", []), ("DDIM uniform", ["--channel", "pixels",
                                                                      "--eta", "0.3"])):
                args = rl_distill.parse_args(["--steps", "3", *words])
                self.assertEqual(world.start("teacher", None, None, args, 3), (name, hand[name]))
            self.assertEqual(spy.call_count, 1)
            world.start("teacher", None, None, rl_distill.parse_args(["--reward", "mse"]), 3)
            self.assertEqual(spy.call_count, 2)

    def row(self, arm, seed=0, weights=None):
        key = dict(zip(run.KEY, (*arm[:4], seed, 8, 9, weights or run.weights(arm.init))))
        reward = -1.0 - 2 * seed
        return dict(key, reward=reward, gain=0.5, gain_error=0.1, closed=0.5 / (0.5 - reward),
                    frechet=2.0, frechet_error=0.1, frechet_held=3.0, train_nfe=2000, minutes=1.0,
                    device="cpu", torch="2", commit="c")

    def test_every_arm_is_there_once_and_its_command_parses(self):
        found, world = arms.arms(), SimpleNamespace(folder=self.folder.joinpath, code="c")
        self.assertEqual({arm.group for arm in found}, set(arms.GROUPS))
        self.assertEqual(len({arm[:4] for arm in found}), len(found))
        self.assertEqual(len({run.place(a, s, world) for a in found for s in (0, 1)}),
                         2 * len(found))
        for arm in (arm for arm in found if arm.group != "hand"):
            args = rl_distill.parse_args(run.command(arm, 2))
            init = dict(copy="student", earlier="teacher").get(arm.init, arm.init)
            self.assertEqual((args.steps, args.seed, args.init), (arm.steps, 2, init))

    def test_a_row_is_not_made_again_and_a_torn_line_is_no_row(self):
        world = SimpleNamespace(results=self.folder / "r.jsonl", n=8, images=lambda arm: 9)
        args = SimpleNamespace(only=None, seeds=[0, 1])
        everything = run.todo(args, world)
        (first, _), (second, _), (third, _) = everything[:3]
        run.log_line(world.results, **self.row(first))
        with open(world.results, "a") as file:
            file.write(json.dumps(self.row(second))[:-9])
        self.assertEqual(run.todo(args, world), everything[1:])
        run.log_line(world.results, **self.row(second))
        run.log_line(world.results, **self.row(third, weights="other"))
        self.assertEqual(run.todo(args, world), everything[2:])

    def test_an_arm_is_claimed_once_and_a_dead_claim_is_taken_over(self):
        code, path = "import sys, run; print(run.claim(sys.argv[1]), flush=True); input()", str(
            self.folder / "arm.claim")
        other = subprocess.Popen([sys.executable, "-c", code, path], cwd=Path(run.__file__).parent,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.assertEqual((other.stdout.readline(), run.claim(path)), ("True\n", False))
        other.kill()
        other.communicate()
        for dead in "1 12345678901", "":            # a number that was given again; died writing
            Path(f"{path}-b.0").write_text(dead)
            for same in path, path + "-b":          # this process has it as often as it asks
                self.assertEqual((run.claim(same), run.claim(same)), (True, True))
                self.assertEqual(len([*self.folder.glob(f"{Path(same).name}.*")]), 2)

    def test_a_run_that_another_process_plays_is_waited_for(self):
        arm, world = run.jump_arm(arms.Arm("pixels", "a", "teacher", 3)), SimpleNamespace(
            folder=lambda init: self.folder, code="c", smoke=[], device=torch.device("cpu"))
        out, solver = run.place(arm, 0, world), hand_solver("AB2", "uniform", 3)

        def play(seconds):
            rl_distill.save_policy(out / "policy.pt", UNet(**TINY), solver, dict(minutes=7.0))
        with mock.patch.object(run, "claim", return_value=False) as spy, mock.patch.object(
                run.time, "sleep", side_effect=play):
            self.assertEqual(run.learned(arm, 0, world)[1:], (solver, 7.0))
        spy.assert_called_once_with(f"{out}.claim")
        new = self.folder / "new"
        self.assertTrue(run.mine(new, new) and run.mine(new, new))      # mine until it is there
        new.touch()
        self.assertFalse(run.mine(new, new))

    def test_tables_stand_between_the_markers_and_nothing_else_changes(self):
        path, (begin, end) = self.folder / "README.md", report.MARKERS
        arm = next(arm for arm in arms.arms() if arm.group == "jump")
        path.write_text(f"above\n{begin}\nold\n{end}\nbelow é\n", encoding="utf-8")
        with mock.patch("builtins.print"):
            report.write([self.row(arm), self.row(arm, seed=1)], 2, path, self.folder / "a.png")
        self.assertTrue((self.folder / "a.png").exists())
        text = path.read_text(encoding="utf-8")
        self.assertRegex(text, rf"^above\n{begin}\n\*\*Not complete yet: 2 .*")
        self.assertTrue(text.endswith(f"\n{end}\nbelow é\n") and "old" not in text)
        self.assertIn("| teacher, policy gradient | -2.000 ± 1.414 |", text)
        self.assertIn("| teacher, policy gradient | 24 ± 13 (4.8) |", text)


if __name__ == "__main__":
    unittest.main()
