"""Tables of the study, from the rows of results.jsonl, into study/README.md between two markers.

Called by study/run.py. A line is a sampler, a column a number of evaluations K.
"""
import re
import statistics

import arms                                     # puts the repository on the path
# From the repository:
from harness.runs import BadInput, write_whole

MARKERS = "<!-- second version: begin -->", "<!-- second version: end -->"

# ==== TABLES ==================================================================================


def mean_std(values, form):
    """'mean ± std' over seeds in a format such as '.3f'; one value alone without a spread."""
    std = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{std}"


def table(rows, cell):
    """Lines of markdown; cell: the text for the rows of all seeds of a sampler at one K."""
    found, counts = {}, sorted({row["steps"] for row in rows})
    for row in rows:
        found.setdefault((row["group"], row["name"], row["init"]), []).append(row)
    lines = ["| who jumps, sampler | " + " | ".join(f"K = {k}" for k in counts) + " |",
             "|---|" + "---|" * len(counts)]
    for arm in dict.fromkeys(arm[:3] for arm in arms.arms()):
        if arm in found:
            cells = [cell([r for r in found[arm] if r["steps"] == k]) if k in
                     [r["steps"] for r in found[arm]] else "" for k in counts]
            lines.append(f"| {arm[2]}, {arm[1]} | " + " | ".join(cells) + " |")
    return lines


def cost(same):
    """'thousands of evaluations, minutes' of one sampler at one K."""
    return (f"{same[0]['train_nfe'] / 1000:.0f} k, "
            f"{statistics.fmean(row['minutes'] for row in same):.1f} min")


def tables(rows, missing):
    """All that stands between the markers, as lines; missing: runs that have no row yet."""
    lines = [f"**Not complete yet: {missing} runs are still to do.**", ""] if missing else []
    if not rows:
        return lines
    learned = [row for row in rows if row["group"] != "hand"]

    def words(name):
        return ", ".join(sorted({row[name] for row in rows}))
    lines += [f"Made with {words('device')}; torch {words('torch')}; commits {words('commit')}; "
              f"checkpoints {words('weights')}. Held-out noise, n = {rows[0]['n']}. "
              "± is the standard deviation over training seeds.", "",
              "Reward `feature+perceptual`; 0 is the target itself:", "",
              *table(rows, lambda same: mean_std([r["reward"] for r in same], ".3f")), "",
              f"Fréchet distance, judge's features; the target: {rows[0]['target_frechet']:.2f}:",
              "", *table(rows, lambda same: mean_std([r["frechet"] for r in same], ".2f"))]
    if learned:
        lines += ["", "Per cent closed of what the hand solver that is best on these very noises "
                  "leaves to the target; in brackets the standard error over noises, paired:", "",
                  *table(learned, lambda same: mean_std([100 * r["closed"] for r in same], ".0f")
                         + " ({:.1f})".format(statistics.fmean(
                             abs(100 * r["closed"] * r["gain_error"] / (r["gain"] or 1))
                             for r in same))),
                  "", "Network evaluations it learned from (a backward pass counts two), and "
                  "minutes:", "", *table(learned, cost)]
    return lines


# ==== INTO THE README =========================================================================

def write(rows, missing, path):
    """Print the tables, and put them between the markers of `path`, if any; BadInput where these
    are missing."""
    text = "\n".join(tables(rows, missing))
    print(text)
    if path is None:
        return
    old = path.read_text(encoding="utf-8")
    between = re.compile(f"(?<={MARKERS[0]}).*?(?={MARKERS[1]})", re.DOTALL)
    if not between.search(old):
        raise BadInput(f"{path} has no markers {' and '.join(MARKERS)}; put them back")
    write_whole(path, between.sub(lambda _: f"\n{text}\n", old, count=1).encode())
    print(f"wrote {path}")
