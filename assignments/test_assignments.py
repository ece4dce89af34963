"""The specification of assignments/: the handout, the silent bugs, and the grader graded.

    python assignments/test_assignments.py          # under half a minute on one CPU core
"""
import ast
import contextlib
import importlib
import io
import itertools
import re
import subprocess
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddpm
import reward
import rl_distill
import student
from assignments import bugs, grade, handout, loop, measure, yours
from harness.checkpoints import save_network

MODULES = {m.__name__: m for m in (ddpm, student, rl_distill, yours)}
torch.set_num_threads(1)            # small tensors: threads would wait for each other
TOP = ("ddpm", "teacher", "student", "reward", "rl_distill", "sample")

# ==============================================================================================
# MISTAKES: exercise, then (module, what the source says, the mistake)
# ==============================================================================================

Q = "return ab.sqrt() * x0 + (1 - ab).sqrt() * eps"
LOSS = "F.mse_loss(eps_hat, eps)"
NET = "eps_hat = x0_and_eps(x_t, t, net(x_t, t).float(), alpha_bar)"
SIGMA = "return eta * ((1 - ab_next) / (1 - ab)).sqrt() * (1 - ab / ab_next).sqrt()"
DIRECTION = "(1 - ab_next - expand_like(sigma, x_t) ** 2).clamp(min=0).sqrt()"
D = "D = x0_hat if lean is None else x0_hat + expand_like(lean, x_t) * (x0_hat - x0_last)"
EPS = "eps = (x_t - ab.sqrt() * D) / (1 - ab).sqrt()"
MEAN = "return ab_next.sqrt() * D + direction * eps, sigma"
LEVELS = "now, then, last = (half_log_snr(alpha_bar[s]) for s in (t, t_next, t_last))"
LEAN = ("return torch.where((t_last > t) & (t_next > 0), (then - now) / (2 * (now - last)), 0.0)")
PAIR = "return ab.sqrt() * x_t - (1 - ab).sqrt() * v, (1 - ab).sqrt() * x_t + ab.sqrt() * v"
VELOCITY = "return (d.cos() * x_t - x_next) / d.sin()"
ANGLE = "d = angle(t, alpha_bar, x_t) - angle(t_next, alpha_bar, x_t)"
CENTRED = "centred = groups - groups.mean(1, keepdim=True)"
ROUNDING = "rounding = 1e-6 * groups.abs().max()"
KEPT = "centred = torch.where(centred.abs() > rounding, centred, 0.0)"
SCALED = "return (centred / centred.square().mean().sqrt().clamp(min=1e-30)).reshape(-1)"
GROUPS = "groups = reward.reshape(-1, group)"
LANDING = "return -((x_next - mean) / expand_like(sigma, mean)).square().mean((1, 2, 3)) / 2"
PICK, SIGNS = ".repeat_interleave(2)\n        noise", "torch.stack([noise, -noise], 1)"
MASKED = "* action_mask(len(mean), 0)"
REWARDED = "R = -(x_0 - target[pick]).square().sum(1)"
LESS = "A = R - R.reshape(-1, 2).mean(1).repeat_interleave(2)"
MOVED = "mean = mean + rate * std * (A[:, None, None] * noise).mean(0)"
STUB = 'raise NotImplementedError("exercise 8: paired_advantages, see its docstring")'
SCORE, EXPECTED = (STUB.replace("paired_advantages", name) for name in ("score", "expected"))
DERIVED = "return (x2 - theta * x1) * x1 / s2 ** 2"
MEANS = ("own = -2 * (theta * (mu ** 2 + s1 ** 2) - c * mu)\n"
         "    partner = 2 * (theta * (mu ** 2 - s1 ** 2) - c * mu)\n"
         "    return own - (own + partner) / group, own")
RIGHT = ("pairs = reward.reshape(-1, group // 2, 2) if group % 2 == 0 else reward\n"
         "    if group % 2 or group < 4:\n        raise ValueError\n"
         "    others = (pairs.sum((1, 2))[:, None] - pairs.sum(2)) / (group - 2)\n"
         "    return (pairs - others[:, :, None]).reshape(-1)")
RATIO = "ratio = (logp - logp_old).clamp(-20, 20).exp()"
PPO = "return -torch.minimum(ratio * adv, clipped * adv), ratio.detach()"

MISTAKES = {
    1: [
        (ddpm, Q, "return ab.sqrt() * x0 - (1 - ab).sqrt() * eps"),
        (ddpm, Q, "return ab * x0 + (1 - ab) * eps"),
        (ddpm, Q, "return ab.sqrt() * eps + (1 - ab).sqrt() * x0"),
        (ddpm, "ab = expand_like(alpha_bar[t], x0)\n    " + Q,
         "ab = expand_like(alpha_bar[t - 1], x0)\n    " + Q),
        (ddpm, "ab = expand_like(alpha_bar[t], x0)\n    " + Q,
         "ab = expand_like(alpha_bar[t[:1]], x0)\n    " + Q),
        (ddpm, Q, "return x0.mul_(ab.sqrt()).add_((1 - ab).sqrt() * eps)"),          # in place
        (ddpm, LOSS, "F.mse_loss(eps_hat, eps, reduction='sum')"),
        (ddpm, LOSS, "F.l1_loss(eps_hat, eps)"),
        (ddpm, LOSS, "F.mse_loss(eps_hat, x0)"),
        (ddpm, LOSS, "F.mse_loss(eps_hat.detach(), eps)"),
        (ddpm, "_, " + NET, "eps_hat, _" + NET.removeprefix("eps_hat")),
        (ddpm, "_, " + NET, "eps_hat = net(x_t, t).float()"),
        (ddpm, NET, NET.replace("net(x_t, t)", "net(x0, t)")),
        (ddpm, NET, NET.replace("net(x_t, t)", "net(x_t, t - 1)")),
        (ddpm, NET, NET.replace("and_eps(x_t,", "and_eps(x0,")),
    ],
    2: [
        (ddpm, SIGMA, SIGMA.replace("eta * ", "")),
        (ddpm, SIGMA, SIGMA.replace("(1 - ab_next) / (1 - ab)", "(1 - ab) / (1 - ab_next)")),
        (ddpm, SIGMA, SIGMA.replace("/ (1 - ab)).sqrt()", "/ (1 - ab))")),
        (ddpm, SIGMA, SIGMA.replace("(1 - ab / ab_next)", "(1 - ab)")),
        (ddpm, SIGMA, SIGMA.replace("(1 - ab / ab_next).sqrt()", "(1 - ab / ab_next)")),
        (ddpm, DIRECTION, DIRECTION.replace(".clamp(min=0)", "")),
        (ddpm, DIRECTION, DIRECTION.replace(" - expand_like(sigma, x_t) ** 2", "")),
        (ddpm, DIRECTION, DIRECTION.replace(" ** 2", "")),
        (ddpm, DIRECTION, DIRECTION.replace("- expand", "+ expand")),
        (ddpm, EPS, EPS.replace("ab.sqrt() * D", "D")),
        (ddpm, EPS, EPS.replace("(1 - ab).sqrt()", "(1 - ab_next).sqrt().clamp(min=1e-2)")),
        (ddpm, MEAN, MEAN.replace("ab_next.sqrt() * D", "ab_next * D")),
        (ddpm, MEAN, MEAN.replace("+ direction", "- direction")),
    ],
    3: [
        (ddpm, D, "D = x0_hat"),
        (ddpm, D, D.replace("(x0_hat - x0_last)", "(x0_last - x0_hat)")),
        (ddpm, D, D.replace("else x0_hat +", "else")),
        (ddpm, D, D.replace("expand_like(lean, x_t)", "lean[0]")),
        (ddpm, EPS, EPS.replace("* D", "* x0_hat")),
        (ddpm, MEAN, MEAN.replace("ab_next.sqrt() * D", "ab_next.sqrt() * x0_hat")),
        (ddpm, LEAN, LEAN.replace("2 * (now", "(now")),
        (ddpm, LEAN, LEAN.replace("(then - now)", "(now - then)")),
        (ddpm, LEAN, LEAN.replace("(now - last)", "(then - last)")),
        (ddpm, LEAN, LEAN.replace(" & (t_next > 0)", "")),
        (ddpm, LEAN, LEAN.replace("(t_last > t) & ", "")),
        (ddpm, LEVELS, LEVELS.replace("half_log_snr(alpha_bar[s])", "s.float()")),
    ],
    4: [
        (ddpm, PAIR, PAIR.replace("x_t - (1", "x_t + (1")),
        (ddpm, PAIR, PAIR.replace("x_t + ab", "x_t - ab")),
        (ddpm, PAIR, PAIR.replace(".sqrt()", "")),
        (ddpm, "ab = expand_like(alpha_bar[t], x_t)\n    " + PAIR,
         "ab = alpha_bar[t].view(-1, 1, 1, 1)\n    " + PAIR),
        (student, VELOCITY, "return (x_t - x_next) / d"),
        (student, VELOCITY, "return (x_next - d.cos() * x_t) / d.sin()"),
        (student, VELOCITY, "return d.cos() * x_t - x_next"),
        (student, VELOCITY, "return (x_t - x_next) / d.sin()"),
        (student, VELOCITY, "return (d.cos() * x_t - x_next) / d"),
        (student, ANGLE, "d = angle(t_next, alpha_bar, x_t)"),
        (student, ANGLE, ANGLE + "\n    d = -d"),
    ],
    5: [
        (rl_distill, CENTRED, "groups -= groups.mean(1, keepdim=True)\n    centred = groups"),
        (rl_distill, CENTRED, "centred = groups - groups.mean(0, keepdim=True)"),
        (rl_distill, CENTRED, "centred = groups"),
        (rl_distill, CENTRED, "centred = groups - groups.mean()"),
        (rl_distill, CENTRED, "centred = groups.mean(1, keepdim=True) - groups"),
        (rl_distill, KEPT, "pass"),
        (rl_distill, ROUNDING, ROUNDING.replace("1e-6", "1e-2")),
        (rl_distill, ROUNDING, "rounding = 1e-6"),
        (rl_distill, SCALED, SCALED.replace("centred.square().mean().sqrt()", "centred.std()")),
        (rl_distill, SCALED, SCALED.replace(".mean().sqrt()", ".mean()")),
        (rl_distill, SCALED, SCALED.replace(".mean()", ".mean(1, keepdim=True)")),
        (rl_distill, SCALED, SCALED.replace(".clamp(min=1e-30)", "")),
        (rl_distill, SCALED, SCALED.replace(".clamp(min=1e-30)", ".add(1e-2)")),
        (rl_distill, SCALED, SCALED.replace(".clamp(min=1e-30)", ".add(1e-12)")),
        (rl_distill, GROUPS, "groups = reward.reshape(group, -1).T"),
    ],
    6: [
        (rl_distill, LANDING, LANDING.replace("- mean)", "- mean.detach())")),
        (rl_distill, LANDING, LANDING.replace(".mean(", ".sum(")),
        (rl_distill, LANDING, LANDING.replace(".square()", ".abs()")),
        (rl_distill, LANDING, LANDING.replace("(sigma, mean)", "(sigma.square(), mean)")),
        (rl_distill, LANDING, LANDING.replace(" / 2", "")),
        (rl_distill, LANDING, LANDING.replace("-(", "(")),
        (rl_distill, PPO, PPO.replace("minimum", "maximum")),
        (rl_distill, PPO, "return -(ratio * adv), ratio.detach()"),
        (rl_distill, PPO, "return -(clipped * adv), ratio.detach()"),
        (rl_distill, PPO, PPO.replace("-torch", "torch")),
        (rl_distill, PPO, PPO.replace(".detach()", "")),
        (rl_distill, RATIO, "ratio = (logp - logp.detach()).exp()"),
        (rl_distill, RATIO, "ratio = logp - logp_old"),
    ],
    7: [
        (ddpm, PICK, PICK.replace("_interleave", "")),
        (ddpm, SIGNS, "torch.stack([noise, noise], 1)"),
        (ddpm, MASKED, ""),
        (ddpm, REWARDED, REWARDED.replace("-(", "(")),
        (ddpm, REWARDED, REWARDED.replace("target[pick]", "target[pick.flip(0)]")),
        (ddpm, LESS, "A = R"),
        (ddpm, LESS, "A = R - R.mean()"),
        (ddpm, "A = A / A.square().mean().sqrt()", "A = A / A.square().mean()"),
        (ddpm, MOVED, MOVED.replace("+ rate", "- rate")),
        (ddpm, MOVED, MOVED.replace("std * ", "")),
        (ddpm, MOVED, MOVED.replace(".mean(0)", ".sum(0)")),
        (ddpm, "return solver_of(mean)", "return start"),
    ],
    8: [
        (yours, DERIVED, DERIVED.replace("theta * x1", "x1")),
        (yours, DERIVED, DERIVED.replace(" * x1 /", " /")),
        (yours, DERIVED, DERIVED.replace("** 2", "")),
        (yours, MEANS, MEANS.replace("/ group", "/ 2")),
        (yours, MEANS, MEANS.replace(" + partner", "")),
        (yours, MEANS, MEANS.replace("(mu ** 2 - s1 ** 2)", "(mu ** 2 + s1 ** 2)")),
        (yours, MEANS, MEANS.replace("/ group, own", "/ group, -own")),
        (yours, RIGHT, RIGHT.replace("group - 2", "group - 1")),
        (yours, RIGHT, RIGHT.replace(" - pairs.sum(2)", "")),
        (yours, RIGHT, RIGHT.replace("pairs.sum(2)", "pairs.sum((0, 2))")),
        (yours, RIGHT, RIGHT.replace("(pairs - others", "(others")),
        (yours, RIGHT, RIGHT.replace(" or group < 4", "")),
        (yours, RIGHT, "return reward - reward.reshape(-1, group).mean(1).repeat_interleave(group)"),
        (yours, RIGHT, "g = reward.reshape(-1, group)\n"
         "    return ((g - (g.sum(1, keepdim=True) - g) / (group - 1))).reshape(-1)"),
        (yours, RIGHT, "if group % 2 and group > 3:\n        return reward\n    " + RIGHT),
    ],
}


def source(module):
    return vars(module).get("text") or Path(module.__file__).read_text(encoding="utf-8")


def variant(module, text):
    """A module made from other source, in the place of `module`."""
    made = types.ModuleType(module.__name__)
    made.__file__, made.text = module.__file__, text
    exec(compile(text, module.__file__, "exec"), made.__dict__)
    return made


MODULES[yours.__name__] = variant(yours, source(yours).replace(STUB, RIGHT).replace(
    SCORE, DERIVED).replace(EXPECTED, MEANS))


def verdicts(number, *changed, seeds=(0, 1)):
    """Of an exercise, in the repository's modules but for those `changed`."""
    modules = {**MODULES, **{module.__name__: module for module in changed}}
    chosen = [modules[name] for name in grade.EXERCISES[number][0]]
    return [grade.judge(chosen, number, seed)["verdict"] for seed in seeds]


def quiet(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


class Grader(unittest.TestCase):
    def test_the_reference_passes_and_the_handout_is_not_attempted(self):
        for number, (names, _) in grade.EXERCISES.items():
            self.assertEqual(verdicts(number, seeds=range(8)), ["passes"] * 8)
            for module in (MODULES[name] for name in names):
                empty = yours if number == 8 else variant(
                    module, handout.blank(source(module), {number}))
                self.assertEqual(set(verdicts(number, empty)), {"not attempted"})

    def test_no_exercise_waits_for_another(self):
        for number in grade.EXERCISES:
            others = set(grade.EXERCISES) - {number}
            alone = [variant(m, handout.blank(source(m), others & {*handout.EXERCISES},
                                              handout.EXERCISES.get(number, ())))
                     for m in MODULES.values()]
            self.assertEqual(set(verdicts(number, *alone)), {"passes"}, number)

    def test_every_mistake_is_rejected_with_tolerances_a_hundred_times_wider(self):
        """And none because it crashes: a wrong value or shape is shown. NaN never passes."""
        real = grade.same

        def lenient(theirs, wanted, rule, tolerance=1e-4, **inputs):
            return real(theirs, wanted, rule, 100 * tolerance, **inputs)
        for number, mistakes in MISTAKES.items():
            self.assertGreaterEqual(len(mistakes), 5)
            for module, right, wrong in mistakes:
                with self.subTest(exercise=number, wrong=wrong):
                    self.assertEqual(source(MODULES[module.__name__]).count(right), 1, right)
                    self.assertNotEqual(right, wrong)
                    solved = MODULES[module.__name__]
                    broken = variant(module, source(solved).replace(right, wrong))
                    with mock.patch.object(grade, "same", lenient):
                        self.assertTrue({"wrong value", "wrong shape"}
                                        >= set(verdicts(number, broken)), right)

    def test_what_is_nearly_right_is_rejected_too(self):
        """Not by the width of a tolerance: these are right for most inputs."""
        for number, module, right, wrong in (
                (1, ddpm, NET, "eps_hat = x0_and_eps(x_t, t, torch.no_grad()(net)(x_t, t).float(), "
                               "alpha_bar)"),
                (1, ddpm, "x_t = q_sample(x0, t, eps, alpha_bar)", "x_t = q_sample(x0, t, eps, "
                 "linear_alpha_bar())"),
                (2, ddpm, D, D.replace("= x0", "= x0_hat.detach() if lean is None else x0")),
                (2, ddpm, "ab, ab_next = alpha_bar[t], alpha_bar[t_next]",
                 "ab, ab_next = (linear_alpha_bar()[s] for s in (t, t_next))"),
                (3, ddpm, LEAN, LEAN.replace("(t_last > t) & (t_next > 0)",
                                             "((t_last > t) & (t_next > 0)).all()")),
                (3, ddpm, D, D.replace("x0_last)", "x0_last).detach()")),
                (4, ddpm, PAIR, PAIR.replace("* v, (", "* v.detach(), (")),
                (4, ddpm, PAIR, "a = ab.sqrt() * x_t - (1 - ab).sqrt() * v\n"
                                "    return a, (x_t - ab.sqrt() * a) / (1 - ab).sqrt()"),
                (6, rl_distill, RATIO, "ratio = logp.exp() / logp_old.exp()"),
                (6, rl_distill, PPO, "limit = torch.where(adv > 0, 1 + clip_range, 1 - clip_range)"
                 "\n    return -torch.minimum(ratio * adv, limit * adv), ratio.detach()"),
                (7, ddpm, "A = A / A.square().mean().sqrt()", "A = A / A.std()"),
                (7, ddpm, "return solver_of(mean)",
                 "start.leans[0] = 1\n    return solver_of(mean)"),
                (7, ddpm, "return solver_of(mean)",
                 "torch.manual_seed(0)\n    return solver_of(mean)")):
            with self.subTest(exercise=number, wrong=wrong):
                self.assertEqual(source(MODULES[module.__name__]).count(right), 1, right)
                broken = variant(module, source(module).replace(right, wrong))
                self.assertEqual(set(verdicts(number, broken, seeds=range(4))), {"wrong value"})

    def test_zeros_a_constant_and_a_copy_of_the_input_never_pass(self):
        def copy(like, inputs):
            return next((x.to(like.dtype) for x in inputs if isinstance(x, torch.Tensor)
                         and x.shape == like.shape), torch.zeros_like(like))

        def faked(function, fake):
            def instead(*args, **kw):
                result = function(*args, **kw)
                return (tuple(fake(r, args[i:] + args[:i]) for i, r in enumerate(result))
                        if isinstance(result, tuple) else fake(result, args))
            return instead
        fakes = lambda like, _: torch.zeros_like(like), lambda like, _: 0 * like + 0.5, copy
        for number, (names, _) in grade.EXERCISES.items():
            if number == 7:                                    # its result is no tensor
                continue
            for module, fake in itertools.product((MODULES[name] for name in names), fakes):
                mine = [name for name in handout.EXERCISES.get(
                    number, ["score", "expected", "paired_advantages"])
                        if hasattr(module, name)
                        and getattr(module, name).__module__ == module.__name__]
                self.assertGreater(len(mine), 0)
                for name in mine:
                    cheat = variant(module, source(module))
                    setattr(cheat, name, faked(getattr(module, name), fake))
                    self.assertEqual(set(verdicts(number, cheat)), {"wrong value"}, name)

    def test_whatever_the_code_does_the_grader_goes_on(self):
        cases = {
            "while True: pass": "no end after", "import sys; sys.exit(0)": "importing",
            "import os; os._exit(3)": "no answer", "def broken(:": "importing",
            "import os; os.write(2, b'\\xff'); os._exit(3)": r"no answer: \xff",
            "def q_sample(*a): raise ValueError('\\ud800')": "ValueError",
            "class E(Exception):\n def __str__(self): raise self\ndef q_sample(*a): raise E()":
                "E: <exception",
            "def q_sample(*a): raise SystemExit(0)": "SystemExit",
            "while True: print(9 * '9999999999')": "File too large",
            "import sys, atexit; atexit.register(lambda: open(sys.argv[-1], 'w').write('{'))":
                "no answer"}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("ddpm", "student"):
                Path(folder, f"{name}.py").write_text("")
            for code, expected in cases.items():
                Path(folder, "ddpm.py").write_text(code)
                result = grade.grade(folder, 1, 0, seconds=5 if code.endswith("pass") else 60)
                self.assertEqual(result["verdict"], "error", code)
                self.assertIn(expected, result["property"])
            mark = Path(folder, "mark")             # a child of it grows this file, on and on
            child = f"import time\nwhile True: open({str(mark)!r}, 'a').write('x'); time.sleep(0.1)"
            Path(folder, "ddpm.py").write_text(
                f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
                f"while not os.path.exists({str(mark)!r}): pass")
            grade.grade(folder, 1, 0)
            before = mark.stat().st_size
            time.sleep(1)
            self.assertEqual(mark.stat().st_size, before, "what it has started must end with it")
            Path(folder, "student.py").unlink()
            self.assertIn("No module named 'student'", grade.grade(folder, 4, 0)["property"])
            Path(folder, "ddpm.py").write_text("")            # and it falls back to nothing
            self.assertIn("no attribute 'q_sample'", grade.grade(folder, 1, 0)["property"])


class Guide(unittest.TestCase):
    def test_the_reading_guide_names_functions_classes_and_pictures_that_are_there(self):
        rows = [line.split("|")[1:-1] for line in (ROOT / "assignments/reading.md").read_text(
            encoding="utf-8").splitlines() if line.startswith("| ") and "| step |" not in line]
        self.assertGreater(len(rows), 10)
        tests = (ROOT / "test_all.py").read_text(encoding="utf-8")
        for _, _, functions, shown, _ in rows:
            for name in re.findall(r"`(\w+)\.(\w+)`", functions):
                self.assertTrue(hasattr(importlib.import_module(name[0]), name[1]), name)
            for name in re.findall(r"`([A-Z]\w+)`", shown):
                self.assertIn(f"class {name}(", tests)
            for name in re.findall(r"`(\w+/[\w.]+)`", functions + shown):
                self.assertTrue((ROOT / name).exists(), name)


class Projector(unittest.TestCase):
    def test_the_page_shows_what_the_policy_does(self):
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(loop, "draw", side_effect=loop.draw) as spy:
                net = ddpm.UNet(width=8, mults=[1], blocks=1, attention=[])
                torch.nn.init.normal_(net.conv_out.weight, std=0.1)
                made = rl_distill.JumpPolicy(ddpm.baseline_solver("AB2", "quadratic", 2),
                                             len(net.branches))
                torch.nn.init.normal_(made.gains, std=0.3)
                save_network(folder + "/policy.pt", "policy", net, {}, network="UNet",
                             solver=list(made.solver()))
                quiet(loop.main, ["--policy", folder + "/policy.pt", "--out", folder + "/loop.png"])
            self.assertTrue(Path(folder, "loop.png").exists())
            net, solver, teacher, rewarding, seed, _ = spy.call_args[0]
            shown = loop.draw(*spy.call_args[0][:5], folder + "/again.png")
        self.assertEqual(solver, made.solver())
        z, target = loop.noise_and_targets(teacher, seed, 1, torch.device("cpu"))
        _, R = reward.deploy(net, solver, z, rewarding.view(target), rewarding,
                            ddpm.linear_alpha_bar())
        self.assertAlmostEqual(shown, R.item(), places=4)


class Measured(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.policy = rl_distill.JumpPolicy(ddpm.baseline_solver("AB2", "quadratic", 3), 3)
        self.slope = torch.randn(3, 5) * self.policy.mask
        self.std, self.generator = torch.full((5,), 0.1), torch.Generator().manual_seed(0)
        patched = mock.patch.object(measure, "scored", lambda net, u, *_: (
            u * self.slope).sum((1, 2)) - 30 * (u - self.policy.mean()).square().sum((1, 2)))
        patched.start()
        self.addCleanup(patched.stop)
        self.rest = self.std, torch.zeros(9), None, None

    def test_the_cosine_that_is_printed_is_that_with_the_true_gradient(self):
        estimates = [measure.gradient(None, self.policy, *self.rest, 16, self.generator)
                     for _ in range(400)]
        true = torch.stack([torch.cosine_similarity(g.flatten(), self.slope.flatten(), 0)
                            for g in estimates]).mean().item()
        self.assertTrue(0.5 < true < 0.9, true)
        with contextlib.redirect_stdout(io.StringIO()) as text, \
                mock.patch.object(measure, "REPEATS", {16: 400}):
            measure.cosine(None, self.policy, *self.rest, self.generator)
        numbers, shown = re.findall(r"[0-9.]+", text.getvalue())[0], re.search(
            r"rollouts: ([0-9.]+) ± ([0-9.]+)", text.getvalue())
        self.assertEqual(int(numbers), self.policy.mask.sum())
        self.assertAlmostEqual(float(shown[1]), true, delta=0.03)
        self.assertLess(float(shown[2]), 0.05)

    def test_the_search_climbs_and_leaves_what_does_not_act(self):
        mean = measure.cross_entropy(None, self.policy, *self.rest, self.generator, 20)
        gain = (mean - self.policy.mean().detach()) * self.slope
        best = self.slope.square() / 60                        # where the reward is highest
        self.assertGreater(gain.sum(), 0.7 * best.sum())
        self.assertEqual(gain[~self.policy.mask].abs().max(), 0)


class Handout(unittest.TestCase):
    def test_the_handout_is_the_repository_with_blanks_and_runs(self):
        self.assertEqual([*handout.EXERCISES, 8], [*MISTAKES])
        found = [f for name in TOP for f in handout.functions(
            (ROOT / f"{name}.py").read_text(encoding="utf-8"))]
        self.assertEqual({*found}, {f for names in handout.EXERCISES.values() for f in names})
        self.assertEqual(len(found), len({*found}))
        with tempfile.TemporaryDirectory() as folder:
            quiet(handout.main, [folder + "/all"])
            quiet(handout.main, [folder + "/some", "--only", "2"])
            copied = {p.relative_to(folder + "/all") for p in Path(folder, "all").rglob("*.py")}
            self.assertFalse([p for p in copied if p.name.startswith("test")])   # have answers
            ours = [path for pattern in "*.py harness/*.py figures/*.png checkpoints/*.pt".split()
                    for path in ROOT.glob(pattern) if not path.name.startswith("test")]
            self.assertEqual({p.relative_to(ROOT).as_posix() for p in ours} - {*handout.COPIED},
                             set(), "forgotten in COPIED, or lies about: remove it")
            for name in (f"{name}.py" for name in TOP):
                ours = (ROOT / name).read_text(encoding="utf-8")
                both = [Path(folder, which, name).read_text(encoding="utf-8")
                        for which in ("all", "some")]
                nodes = handout.functions(ours)
                for _, given, instead in (veil for veil in handout.VEILED if veil[0] == name):
                    ours = ours.replace(given, instead)
                self.assertEqual(both[0] != ours, bool(nodes))
                self.assertEqual(both[1] != ours, any(f in nodes for f in handout.EXERCISES[2]))
                for text in both:
                    compile(text, name, "exec")
                for node in nodes.values():
                    body = ours.splitlines()[node.body[0].end_lineno:node.end_lineno]
                    self.assertNotIn("\n".join(body), both[0])
                    self.assertNotIn(ast.get_docstring(node), both[0])
                    self.assertLessEqual(len(body), 18)
                    new = {*both[0].splitlines()} - {*ours.splitlines()}
                    self.assertLessEqual(max(map(len, new)), 100)
                    told = node.body[0].value.value.splitlines()
                    for line in {line.strip().removeprefix("return ") for line in body + told}:
                        if set("=()+-*/") & {*line} and len(line) > 12:
                            for page in ("README.md", "assignments/README.md"):
                                self.assertNotIn(line, Path(folder, "all", page).read_text(
                                    encoding="utf-8"))
            for file, given, instead in handout.VEILED:
                ours = (ROOT / file).read_text(encoding="utf-8")
                text = Path(folder, "all", file).read_text(encoding="utf-8")
                self.assertNotIn(given, text)
                if file != "README.md" or given in ours:
                    self.assertIn(given, ours)
                    self.assertIn(instead, text)
            with self.assertRaises(SystemExit):
                quiet(handout.main, [folder + "/all"])
            done = subprocess.run([sys.executable, "-c", "import sample; print(sample.__file__)"],
                                  cwd=folder + "/all", capture_output=True, text=True)
            self.assertEqual(Path(done.stdout.strip()).resolve(),
                             Path(folder, "all", "sample.py").resolve(), done.stderr)

    def test_silent_bugs_and_variants_are_planted_compile_and_know_their_flags(self):
        for which, name in itertools.product(bugs.VARIANTS, ("ddpm", "rl_distill")):
            text = bugs.changed(which, f"{name}.py")
            self.assertEqual(text != source(MODULES[name]), f"{name}.py" in {
                line[0] for line in bugs.VARIANTS[which]}, which)
            variant(MODULES[name], text)
        args = rl_distill.parse_args(bugs.JOB)
        self.assertEqual((args.learn, args.init, args.steps), ("jumps", ["teacher"], 3))
        self.assertLessEqual({*bugs.SHORTER}, {*vars(rl_distill)})
        self.assertLessEqual(args.noises, bugs.SHORTER["NOISES"])
        with mock.patch.object(sys, "exit", side_effect=SystemExit), \
                mock.patch.object(bugs, "VARIANTS", {"a": [("ddpm.py", "no such line", "")]}):
            self.assertRaises(SystemExit, bugs.changed, "a", "ddpm.py")


if __name__ == "__main__":
    unittest.main()
