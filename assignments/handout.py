"""Make the handout: a copy of the repository in which the functions of the exercises are blank.

    python assignments/handout.py OUT_DIR              # all exercises blank
    python assignments/handout.py OUT_DIR --only 1 3   # these; the others stay solved

Of each function below the signature stays. Its docstring becomes the statement here, which says
what must hold and not how; its body raises NotImplementedError. Everything else is copied, but for
the tests and the lecturer's pages, which quote the answers, and the study's code.
"""
import argparse
import ast
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = """ddpm.py teacher.py student.py reward.py rl_distill.py sample.py requirements.txt
README.md LICENSE harness/__init__.py harness/checkpoints.py harness/images.py
harness/runs.py checkpoints/README.md checkpoints/coach.pt checkpoints/judge.pt
checkpoints/policy.pt checkpoints/student.pt checkpoints/student_copy.pt checkpoints/teacher.pt
checkpoints/teacher_earlier.pt checkpoints/train_encoders.py figures/ddpm.png figures/estimators.png
figures/images.png figures/learned.png figures/loop.png figures/paper.png figures/student.png
figures/study.png figures/study_budgets.png figures/study_images.png figures/study_sizes.png
figures/teacher.png figures/teacher_loss.png
study/README.md assignments/README.md assignments/reading.md assignments/grade.py
assignments/bugs.py assignments/measure.py assignments/yours.py""".split()
JUMP = """Mean (B, ...) and sigma (B,) of the jump t -> t_next.

Without lean (exercise 2): if x0_hat is right, so that x_t is q_sample of it with some eps, then
mean + sigma N(0, I), its mean made of x0_hat and of that same eps, must be distributed as q_sample
at t_next, for any sigma up to sqrt(1 - ab'); sigma is ddim_sigma's. With lean (exercise 3) the same
of D, and of the eps that belongs to it, in the place of x0_hat: D lies as far beyond x0_hat as
`lean` times the way from x0_last to x0_hat. x_t, x0_hat, x0_last: (B, ...); lean, t, t_next: (B,),
t > t_next."""
EXERCISES = {                           # {number: {function: statement}}
    1: {"q_sample": """x_t of x0 and eps (B, ...) at t (B,), integers in 0..T.

A mixture of the two: x0 and eps of variance 1 make an x_t of variance 1, of which alpha_bar[t]
is x0's share; at t = 0 it is x0. alpha_bar: (T + 1,). Images and points (B, 2) alike.""",
        "simple_loss": """How far off the network is about the noise mixed into x0. A scalar.

The mean over everything of the squared error of eps_hat. The network, net(x_t, t) -> v, is asked
once, about q_sample's x_t; x0_and_eps makes eps_hat of its answer, in float32 (autocast gives
bf16)."""},
    2: {"ddim_sigma": """Standard deviation (B,) of the noise that a jump t -> t_next adds.

eta times that of x_next when x_t and x0 are known, in DDPM's forward process: by Bayes' rule from
x_next given x0, and x_t given x_next, whose share of signal is alpha_bar[t] / alpha_bar[t_next].
t, t_next: (B,) integers, t > t_next.""", "jump": JUMP},
    3: {"dpm_lean": """The lean (B,) that makes the jump one of second order, DPM-Solver++(2M).

Were the estimate known all along the jump, which single value of it, taken for D, would leave the
least error, to first order in the jump's length in lambda (half_log_snr)? Nobody has it: D is where
the straight line through the estimates at t_last and t passes that point. 0 where there is none: at the first jump (t_last = t), and into t = 0, where lambda is
infinite. All times: (B,) integers, t_last >= t > t_next.""", "jump": JUMP},
    4: {"x0_and_eps": """The two things that v says about x_t: x0_hat and eps_hat, (B, ...) each.

With sqrt(alpha_bar) = cos(phi), x_t lies at angle phi on the way from x0 to eps, and v is its
derivative with respect to phi, both held fixed. x_t, v: (B, ...), images or points; t: (B,).""",
        "average_velocity": """The v whose one jump from x_t at t to t_next lands exactly at x_next.

A jump without noise keeps x0_hat and eps_hat, so that it turns x_t by d = phi_t - phi_next.
x_t, x_next, v: (B, ...); t, t_next: (B,) integers, t > t_next; angle() gives phi."""},
    5: {"advantages": """How much better than its group each rollout was: (M * group,) -> same.

Members of a group stand side by side. From each reward goes the mean of its group; then all are
divided by one number, so that the mean square over the whole batch is 1. Rewards that are equal,
all of them or within one group, have advantages of exactly 0 there, and not scaled rounding."""},
    6: {"landing_logp": """log density of x_next under N(mean, sigma^2 I), per dimension. (B,).

The mean over dimensions, not their sum, and without what does not depend on the mean.
mean, x_next: (B, C, H, W), sigma: (B,).""",
        "clipped_surrogate": """PPO's loss of each action, and its ratio, detached: (B,) twice.

Eq. 7, Schulman et al. 2017, with its sign turned. A better action may become more likely, and a
worse one less, until the ratio has moved by clip_range; from there on the gradient is 0.
clip_range = inf does not clip at all. logp, logp_old, adv: (B,)."""},
    7: {"policy_gradient": """Times and leans that bring points to their targets, by REINFORCE.

The action is u (K, 2) of start.action(0), the logit of rho and the lean of every jump; the
policy is Normal(mean, std^2), independent for each entry, and its mean, which starts at `start`'s
u, is all that learns. Entries that do not act (action_mask) are not explored and do not move. Of
`generator` each update takes first 64 indices of x_T (torch.randint), then 64 standard normal
(K, 2) (torch.randn): each of these points is rolled out twice, by that noise and by its opposite.
The reward is minus the squared distance of where sample() ends to the target; advantages are as
in exercise 5 (written again here: this file imports none; nothing ties), the two of a point being
the group. The mean goes by rate std^2 times the average over all 128 of advantage times score, so
that a step is in units of what was explored. Returned is solver_of(mean). x_T, target: (N, 2)."""}}


# (file, what would give an answer away, instead); in README.md where it stands there
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDY = (ROOT / "study" / "README.md").read_text(encoding="utf-8")
TWENTY_LINES = README.split("```python\n")[1].split("```")[0]
BASELINES = "**Which baseline?**" + STUDY.split("**Which baseline?**")[1].split("```bash")[0]
VEILED = (
    ("ddpm.py", "x_t = sqrt(ab) x0 + sqrt(1 - ab) eps, and\n"
     "#            v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022, appendix D)",
     "see exercise 4 (Salimans & Ho 2022, appendix D)"),
    ("ddpm.py", "The loss is\n    theirs: of eps, ab |v - v_hat|^2.", "The loss is\n    theirs, of eps."),
    ("student.py", "turns x_t by d = phi_t - phi_next:   x_next = cos(d) x_t - sin(d) v",
     "is a rotation (exercise 4)"),
    ("rl_distill.py", "opposite pairs have no unbiased mean\n    after the first landing, where "
     "their states differ (study/bias.py).", "opposite pairs: exercise 8."),
    ("README.md", ", (R+ - R-) noise, and Adam", " (exercise 7)"),
    ("README.md", "(reward - mean of the pair) / rms over the batch", "... (exercise 5)"),
    ("README.md", TWENTY_LINES, "(exercise 7)\n"),
    ("README.md", "python test_all.py          # that the code does what it says, two to five minutes\n",
     ""),
    ("README.md", "min(ratio A, clip(ratio, 0.8, 1.2) A)", "... (exercise 6)"),
    ("study/README.md", BASELINES, ""),
    ("assignments/README.md", "python assignments/handout.py ../my_redif         # by the lecturer:"
     " the repository with the exercises blank\ncd ../my_redif && ", ""))


def functions(source):
    """{name: node} of the functions of the exercises that stand in a source."""
    names = {name for statements in EXERCISES.values() for name in statements}
    return {f.name: f for f in ast.parse(source).body
            if isinstance(f, ast.FunctionDef) and f.name in names}


def blank(source, only, keep=()):
    """The source text with the functions of exercises `only`, but for those in `keep`, replaced by
    stubs."""
    lines, found = source.splitlines(keepends=True), functions(source)
    stubs = {name: (number, text) for number in sorted(only, reverse=True)
             for name, text in EXERCISES[number].items() if name in found and name not in keep}
    for name in sorted(stubs, key=lambda name: -found[name].lineno):
        number, text = stubs[name]
        head, _, body = text.partition("\n\n")
        stub = (f'"""{head}\n\n{textwrap.fill(" ".join(body.split()), 96)}\n"""\n'
                f'raise NotImplementedError("exercise {number}: {name}, see its docstring")\n')
        lines[found[name].body[0].lineno - 1:found[name].end_lineno] = [
            textwrap.indent(stub, "    ")]
    return "".join(lines)


def make(out, only):
    """Write the handout to folder `out`, which must be new or empty. Returns the blank files."""
    out, blanked = Path(out), []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; give a new one")
    for path, target in ((ROOT / name, out / name) for name in COPIED):
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in (".py", ".md"):
            shutil.copyfile(path, target)
            continue
        text = path.read_text(encoding="utf-8")
        for file, given, instead in VEILED:
            text = text.replace(given, instead) if path == ROOT / file else text
        if path.parent == ROOT and path.suffix == ".py":
            whole, text = text, blank(text, only)
            blanked += [path.name] * (text != whole)
        target.write_text(text, encoding="utf-8")
    return blanked


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", help="new folder of the handout")
    p.add_argument("--only", type=int, nargs="+", choices=[*EXERCISES], help="exercises to blank")
    args = p.parse_args(argv)
    try:
        blanked = make(args.out, set(args.only or EXERCISES))
    except (ValueError, OSError) as error:
        sys.exit(p.error(str(error)))
    print("copied", *COPIED)
    print(f"wrote {args.out}; blank in {', '.join(blanked)}. Start with assignments/README.md")


if __name__ == "__main__":
    main()
