"""Tables of the study, from the rows of results.jsonl, into study/README.md between two markers,
and figures/study.png.

Called by study/run.py. A line is a sampler, a column a number of evaluations K.
"""
import itertools
import re
import statistics

import arms                                     # puts the repository on the path
# From the repository:
from harness.figures import plot_panels
from harness.runs import ROOT, BadInput, write_whole

COMPARED = "hand", "jump", "two", "search", "cem", "own", "student", "all"
DRAWN = [("DDIM", "teacher"), ("DPM++", "teacher"), ("AB2", "teacher"),
         ("policy gradient", "teacher"), ("DDIM", "student"), ("DDIM", "copy"),
         ("policy gradient", "copy")]
STYLES = ":", "--", "-."
FIGURE = ROOT / "figures" / "study.png"
MARKERS = "<!-- tables: begin -->", "<!-- tables: end -->"

# ==== TABLES ==================================================================================


def mean_std(values, form):
    """'mean ± std' over seeds in a format such as '.3f'; one value alone without a spread."""
    std = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{std}"


def lines_of(rows):
    """{(group, name, init): its rows}, in the order of arms.py."""
    found = {}
    for row in rows:
        found.setdefault((row["group"], row["name"], row["init"]), []).append(row)
    return {arm: found[arm] for arm in dict.fromkeys(arm[:3] for arm in arms.arms())
            if arm in found}


def table(rows, cell):
    """Lines of markdown; cell: the text for the rows of all seeds of a sampler at one K."""
    counts = sorted({row["steps"] for row in rows})
    lines = ["| who jumps, sampler | " + " | ".join(f"K = {k}" for k in counts) + " |",
             "|---|" + "---|" * len(counts)]
    for (_, name, init), mine in lines_of(rows).items():
        at = {k: [row for row in mine if row["steps"] == k] for k in counts}
        cells = [cell(at[k]) if at[k] else "" for k in counts]
        lines.append(f"| {init}, {name} | " + " | ".join(cells) + " |")
    return lines


def reward(same):
    """Mean reward ± its spread over seeds."""
    return mean_std([row["reward"] for row in same], ".3f")


def held(same):
    """Fréchet distance of the held-out noises alone ± its spread over seeds."""
    return mean_std([row["frechet_held"] for row in same], ".2f")


def frechet(same):
    """Fréchet distance ± spread over seeds (bootstrap error of one)."""
    return (mean_std([row["frechet"] for row in same], ".2f")
            + f" ({statistics.fmean(row['frechet_error'] for row in same):.2f})")


def closed(same):
    """Per cent closed ± spread over seeds (standard error over noises)."""
    errors = [100 * row["gain_error"] / (row["gain"] - row["reward"]) for row in same]
    return (mean_std([100 * row["closed"] for row in same], ".0f")
            + f" ({statistics.fmean(errors):.1f})")


def cost(same):
    """'thousands of evaluations, minutes' of one sampler at one K."""
    return (f"{same[0]['train_nfe'] / 1000:.0f} k, "
            f"{statistics.fmean(row['minutes'] for row in same):.1f} min")


def tables(rows, missing):
    """All that stands between the markers, as lines; missing: runs that have no row yet."""
    lines = [f"**Not complete yet: {missing} runs are still to do.**", ""] if missing else []
    if not rows:
        return lines
    compared = [row for row in rows if row["group"] in COMPARED]
    judged = [row for row in compared if row["images"] > row["n"]]
    others = [row for row in rows if row["group"] not in COMPARED
              or row["group"] == "jump" and row["steps"] == 4]          # to compare them with
    learned = [row for row in compared if row["group"] != "hand"]

    def words(name):
        return ", ".join(sorted({str(row[name]) for row in rows}))
    lines += [f"Made with {words('device')}; torch {words('torch')}; commits {words('commit')}; "
              f"checkpoints {words('weights')}. Rewards of {words('n')} held-out noises. ± is the "
              "standard deviation over training seeds.", "", "Reward `feature+perceptual`; 0 is "
              "the target itself. Hand solvers on the grid that is best on these very noises:", "",
              *table(compared, reward), "",
              "Fréchet distance in the judge's features of "
              f"{max(row['images'] for row in rows)} images to all training images; in brackets "
              "its bootstrap error:", "", *table(judged, frechet)]
    if learned:
        lines += ["", "Per cent closed of what the best hand solver leaves to the target; in "
                  "brackets the standard error over noises, paired:", "", *table(learned, closed),
                  "", "Network evaluations it learned from (a backward pass counts two), and "
                  "minutes:", "", *table(learned, cost)]
    if others:
        lines += ["", "Variants:", "", "| who jumps, sampler | K | reward | closed, % | Fréchet "
                  f"of {words('n')} images | learned from |", "|---|---|---|---|---|---|"]
        for (_, name, init), mine in lines_of(others).items():
            for k in sorted({row["steps"] for row in mine}):
                same = [row for row in mine if row["steps"] == k]
                cells = (str(k), *(cell(same) for cell in (reward, closed, held, cost)))
                lines.append(f"| {init}, {name} | " + " | ".join(cells) + " |")
    return lines


def picture(rows, path):
    """Reward and Fréchet distance against evaluations, of DRAWN."""
    lines = {arm: mine for arm, mine in lines_of(rows).items() if arm[1:] in DRAWN}

    def curve(arm, style, column, sign):
        group, name, init = arm
        at = {k: sign * statistics.fmean(row[column] for row in lines[arm] if row["steps"] == k)
              for k in sorted({row["steps"] for row in lines[arm]})}
        at = {k: y for k, y in at.items() if y > 1e-4}          # no place for 0 on a log axis
        return (f"{init}, {name}", [*at], [*at.values()],
                style if (group, init) == ("hand", "teacher") else "o-")
    if lines:
        plot_panels([("network evaluations", label, [
            curve(arm, style, column, sign) for arm, style in zip(lines, itertools.cycle(STYLES))])
            for label, column, sign in (("distance to the target, -reward", "reward", -1),
                                        ("Fréchet distance, judge", "frechet", 1))],
            path, xscale="log", yscale="log")


# ==== INTO THE README =========================================================================

def write(rows, missing, path, figure=FIGURE):
    """Print the tables, and put them between the markers of `path`, if any, and the picture into
    `figure`; BadInput where there are no markers."""
    text = "\n".join(tables(rows, missing))
    print(text)
    if path is None:
        return
    old = path.read_text(encoding="utf-8")
    between = re.compile(f"(?<={MARKERS[0]}).*?(?={MARKERS[1]})", re.DOTALL)
    if not between.search(old):
        raise BadInput(f"{path} has no markers {' and '.join(MARKERS)}; put them back")
    write_whole(path, between.sub(lambda _: f"\n{text}\n", old, count=1).encode())
    picture(rows, figure)
    print(f"wrote {path}")
