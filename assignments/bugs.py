"""Exercise 8: the main job, shortened, with one silent mistake in it.

    python assignments/bugs.py none       # as it should be
    python assignments/bugs.py a          # with mistake a (or b)
    python assignments/bugs.py a --show   # the changed lines: after you have made up your mind
"""
import argparse
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

JOB = ["--steps", "4", "--updates", "12", "--noises", "64", "--held-out", "64"]
# (what stands in rl_distill.py, what the mistake puts there)
MISTAKES = {
    "none": [],
    "a": [("z.repeat_interleave(group, 0)", "z.repeat(group, 1, 1, 1)")],
    "b": [("clipped_surrogate(logp, j.logp, adv, CLIP_JUMP)",
           "clipped_surrogate(logp, logp.detach(), adv, CLIP_JUMP)")],
}


def changed(which):
    """Source of rl_distill.py with a mistake planted."""
    source = (ROOT / "rl_distill.py").read_text(encoding="utf-8")
    for right, wrong in MISTAKES[which]:
        if source.count(right) != 1:
            sys.exit(f"bugs.py: '{right}' must stand once in rl_distill.py; use the unchanged file")
        source = source.replace(right, wrong)
    return source


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("which", choices=MISTAKES)
    p.add_argument("--show", action="store_true", help="print what was changed, run nothing")
    args, more = p.parse_known_args(argv)
    source = changed(args.which)
    if args.show:
        for right, wrong in MISTAKES[args.which]:
            print(f"- {right}\n+ {wrong}")
        return
    from harness.runs import run_main
    module = types.ModuleType("rl_distill")
    module.__file__ = str(ROOT / "rl_distill.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    run_main(lambda: module.main([*JOB, *more]), "--group")


if __name__ == "__main__":
    main()
