"""Exercises 9 and 10: the main job, shortened, in groups of eight, a line changed.

    python assignments/bugs.py none       # as it should be
    python assignments/bugs.py a          # with silent mistake a (or b, c, d)
    python assignments/bugs.py a --show   # the changed line: after you have made up your mind
    python assignments/bugs.py wide       # ten times the exploration; 'rho', 'lean', 'gains': of
                                          # one alone
"""
import argparse
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

JOB = ["--init", "teacher", "--steps", "3", "--updates", "12", "--group", "8"]
MORE = {"d": ["--learn", "weights", "--group", "32"]}                # of the paper's action
SHORTER = dict(NOISES=64, HELD=64, MONITOR=32, BASELINE_NOISES=32, LOG_EVERY=1)   # of rl_distill.py
MASK = "action_mask(len(u), n_gains)"
# (what stands in rl_distill.py, what the variant puts there)
VARIANTS = {
    "none": [],
    "a": [("policy.logp(u, std), logp_old",
           "policy.logp(u, vars(policy).setdefault('first_std', std)), logp_old")],
    "b": [("repeat_interleave(args.group)\n    u = policy", "repeat(args.group)\n    u = policy")],
    "c": [("    # ADVANTAGES\n    R = rewards(reward, images, target, rows)",
           "    # ADVANTAGES\n    R = rewards(reward, images, target, rows.flip(0))")],
    "d": [("noise = torch.randn(mean.shape, generator=generator)",
           "noise = torch.randn(z.shape, generator=generator).repeat_interleave(group, 0)")],
    "wide": [("std * (0.2", "10 * std * (0.2")],
    "rho": [(MASK, MASK + " & (torch.arange(2 + n_gains) == 0)")],
    "lean": [(MASK, MASK + " & (torch.arange(2 + n_gains) == 1)")],
    "gains": [(MASK, MASK + " & (torch.arange(2 + n_gains) > 1)")],
}


def changed(which):
    """Source of rl_distill.py with the lines of a variant."""
    source = (ROOT / "rl_distill.py").read_text(encoding="utf-8")
    for right, wrong in VARIANTS[which]:
        if source.count(right) != 1:
            sys.exit(f"bugs.py: '{right}' must stand once in rl_distill.py; use the unchanged file")
        source = source.replace(right, wrong)
    return source


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("which", choices=VARIANTS)
    p.add_argument("--show", action="store_true", help="print what was changed, run nothing")
    args, more = p.parse_known_args(argv)
    source = changed(args.which)
    if args.show:
        for right, wrong in VARIANTS[args.which]:
            print(f"- {right}\n+ {wrong}")
        return
    from harness.runs import run_main
    module = types.ModuleType("rl_distill")
    module.__file__ = str(ROOT / "rl_distill.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    vars(module).update(SHORTER)
    run_main(lambda: module.main([*JOB, *MORE.get(args.which, []), *more]), "--group")


if __name__ == "__main__":
    main()
