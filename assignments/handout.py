"""Make the handout: a copy of the repository in which the bodies of the exercises are blank.

    python assignments/handout.py OUT_DIR              # all exercises blank
    python assignments/handout.py OUT_DIR --only 1 3   # these; the others stay solved

The body of each function below is replaced by a NotImplementedError; formula and shapes are in its
docstring, which stays. Everything else is copied, but for the tests, which quote the answers, and
the code of the study.
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {1: ("q_sample", "simple_loss"), 2: ("ddim_sigma", "jump"),
             3: ("x0_and_eps", "secant_velocity"), 4: ("advantages",),
             5: ("jump_logp", "pixel_logp", "clipped_surrogate"), 6: ("gaussian_kl",)}
COPIED = ("*.py", "harness/*.py", "requirements.txt", "README.md", "LICENSE", "checkpoints/*",
          "figures/*", "study/README.md", "assignments/README.md", "assignments/reading.md",
          "assignments/grade.py", "assignments/bugs.py")


def bodies(source):
    """{exercise: [(first line, line after the last)]} of the bodies in a source, counted from 0."""
    found = {f.name: (f.body[0].end_lineno, f.end_lineno) for f in ast.parse(source).body
             if isinstance(f, ast.FunctionDef)}
    return {number: [found[name] for name in names if name in found]
            for number, names in EXERCISES.items()}


def blank(source, only):
    """The source text with the functions of exercises `only` replaced by stubs."""
    lines = source.splitlines(keepends=True)
    places = [(*place, number) for number in only for place in bodies(source)[number]]
    for first, end, number in sorted(places, reverse=True):
        lines[first:end] = [f'    raise NotImplementedError("exercise {number}: see the docstring '
                            'above")\n']
    return "".join(lines)


def make(out, only):
    """Write the handout to folder `out`, which must be new or empty. Returns the blank files."""
    out, blanked = Path(out), []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; give a new one")
    for pattern in COPIED:
        for path in sorted(p for p in ROOT.glob(pattern) if not p.name.startswith("test")):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".py" or path.parent != ROOT:
                shutil.copyfile(path, target)
                continue
            source = path.read_text(encoding="utf-8")
            target.write_text(blank(source, only), encoding="utf-8")
            if blank(source, only) != source:
                blanked.append(path.name)
    return blanked


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", help="new folder of the handout")
    p.add_argument("--only", type=int, nargs="+", choices=[*EXERCISES], help="exercises to blank")
    args = p.parse_args(argv)
    try:
        blanked = make(args.out, set(args.only or list(EXERCISES)))
    except (ValueError, OSError) as error:
        sys.exit(p.error(str(error)))
    print(f"wrote {args.out}; blank in {', '.join(blanked)}. Start with assignments/README.md")


if __name__ == "__main__":
    main()
