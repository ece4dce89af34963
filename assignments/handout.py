"""Make the handout: a copy of the repository in which the bodies of the exercises are blank.

    python assignments/handout.py OUT_DIR              # all exercises blank
    python assignments/handout.py OUT_DIR --only 1 3   # these; the others stay solved

In the sources an exercise stands between the lines '# -- exercise N' and '# --'. What stands there
is replaced by a NotImplementedError; formula and shapes are in the docstring above it. Everything
else is copied, but for the tests, which quote the answers, and the code of the study.
"""
import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"^( +)# -- exercise (\d+)\n(.*?)^ +# --\n", re.M | re.S)
COPIED = ("*.py", "harness/*.py", "requirements.txt", "README.md", "LICENSE", "checkpoints/*",
          "figures/*", "study/README.md", "assignments/README.md", "assignments/reading.md",
          "assignments/grade.py", "assignments/bugs.py")


def blank(source, only):
    """The source text with the regions of exercises `only` replaced by stubs."""
    def stub(match):
        indent, number, body = match.groups()
        if int(number) not in only:
            return match.group(0)
        return (f"{indent}# -- exercise {number}\n{indent}raise NotImplementedError("
                f'"exercise {number}: see the docstring above")\n{indent}# --\n')
    return REGION.sub(stub, source)


def numbers(root=ROOT):
    """The exercises that are marked in the sources, sorted."""
    return sorted({int(m.group(2)) for path in root.glob("*.py")
                   for m in REGION.finditer(path.read_text(encoding="utf-8"))})


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
    p.add_argument("--only", type=int, nargs="+", choices=numbers(), help="exercises to blank")
    args = p.parse_args(argv)
    try:
        blanked = make(args.out, set(args.only or numbers()))
    except (ValueError, OSError) as error:
        sys.exit(p.error(str(error)))
    print(f"wrote {args.out}; blank in {', '.join(blanked)}. Start with assignments/README.md")


if __name__ == "__main__":
    main()
