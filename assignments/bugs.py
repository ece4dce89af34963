"""Exercises 9 and 10: the main job, shortened, in groups of eight, a line changed.

    python assignments/bugs.py none       # as it should be
    python assignments/bugs.py a          # with silent mistake a (or b .. f)
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
# Constants of rl_distill.py:
SHORTER = dict(NOISES=64, HELD_NOISES=64, VALIDATION_NOISES=32, BASELINE_NOISES=32, LOG_EVERY=1)
MASK = "action_mask(len(u), n_gains)"
# (file, what stands in it, what the variant puts there)
VARIANTS = {
    "none": [],
    "a": [("rl_distill.py", "policy.logp(u, std), logp_old",
           "policy.logp(u, vars(policy).setdefault('first_std', std)), logp_old"),
          ("rl_distill.py", "policy.logp(u, std).detach() - logp_old",
           "policy.logp(u, vars(policy)['first_std']).detach() - logp_old")],
    "b": [("rl_distill.py", "repeat_interleave(args.group)\n    u = policy",
           "repeat(args.group)\n    u = policy")],
    "c": [("rl_distill.py", "    # ADVANTAGES\n    R = rewards(reward, images, target, rows)",
           "    # ADVANTAGES\n    R = rewards(reward, images, target, rows.flip(0))")],
    "d": [("rl_distill.py", "noise = torch.randn(mean.shape, generator=generator)",
           "noise = torch.randn(z.shape, generator=generator).repeat_interleave(group, 0)")],
    "e": [("ddpm.py", "h = (1 + gain)[:, :, None, None] * h", "h = gain[:, :, None, None] * h")],
    "f": [("rl_distill.py", "torch.randn(n // 2, *self.mask.shape, generator=generator)",
           "torch.randn(1, *self.mask.shape, generator=generator).expand(n // 2, -1, -1)")],
    "wide": [("rl_distill.py", "std * (0.2", "10 * std * (0.2")],
    "rho": [("rl_distill.py", MASK, MASK + " & (torch.arange(2 + n_gains) == 0)")],
    "lean": [("rl_distill.py", MASK, MASK + " & (torch.arange(2 + n_gains) == 1)")],
    "gains": [("rl_distill.py", MASK, MASK + " & (torch.arange(2 + n_gains) > 1)")],
}


def changed(which, name):
    """Source of the file `name` with the lines of a variant."""
    source = (ROOT / name).read_text(encoding="utf-8")
    for _, right, wrong in (line for line in VARIANTS[which] if line[0] == name):
        if source.count(right) != 1:
            sys.exit(f"bugs.py: '{right}' must stand once in {name}; use the unchanged file")
        source = source.replace(right, wrong)
    return source


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("which", choices=VARIANTS)
    p.add_argument("--show", action="store_true", help="print what was changed, run nothing")
    args, more = p.parse_known_args(argv)
    if args.show:
        for name, right, wrong in VARIANTS[args.which]:
            print(f"{name}\n- {right}\n+ {wrong}")
        return
    from harness.runs import run_main
    for name in ("ddpm", "rl_distill"):                         # the one imports the other
        module = sys.modules[name] = types.ModuleType(name)
        module.__file__ = str(ROOT / f"{name}.py")
        exec(compile(changed(args.which, f"{name}.py"), module.__file__, "exec"), vars(module))
    vars(module).update(SHORTER)
    run_main(lambda: module.main([*JOB, *MORE.get(args.which, []), *more]))


if __name__ == "__main__":
    main()
