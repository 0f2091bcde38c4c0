"""Human verification of sampled queries: a sheet of buttons, the share that was accepted, and the stop rule.

sheet(rows, root, path, wanted=0.9)  # in JupyterLab; every answer goes to `path` at once
agreement(answers(rows, path), wanted=0.9)
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from elva_core import files
from elva_core.data import images, mbeir
from elva_core.data.benchmark_files import read_csv

ERROR_RATE = 0.05  # of every interval and of the stop rule
KEY = ["unit", "qid", "grains"]  # what an answer is about; other grains of the query are another question


def answers(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The sheet with the answers that `path` holds; those to other queries or other grains are left out.

    Raises:
        ElvaDataError: a file that is no such sheet, or a row of it with more or fewer cells than the header.
    """
    if not path.is_file():
        return rows.assign(accept="")
    known = read_csv(path, [*KEY, "accept"]).drop_duplicates(KEY)
    accept = rows[KEY].astype(str).merge(known, how="left", on=KEY)["accept"]
    return rows.assign(accept=accept.fillna("").to_numpy())


def agreement(table: pd.DataFrame, wanted: float) -> dict[str, object]:
    """Share of the sampled queries that a person accepted.

    Args:
        table: `accept` holds yes, no, or nothing where nobody has looked yet.
        wanted: the share that verification is to show.

    Returns:
        checked, accepted, precision; low and high, a 95 % interval that holds at every look
        (`lasting_interval`); wanted; decision (`decision`). Shares are NaN while nothing is filled in.

    Raises:
        ElvaDataError: another word in `accept`.
    """
    given = table["accept"].fillna("").astype(str).str.strip().str.lower()
    if odd := sorted(set(given) - {"", "yes", "no"}):
        raise files.ElvaDataError(f'verification sheet: accept holds {odd}; write "yes", "no" or nothing')
    n, accepted = int((given != "").sum()), int((given == "yes").sum())
    low, high = lasting_interval(accepted, n)
    return {
        "checked": n,
        "accepted": accepted,
        "precision": accepted / n if n else math.nan,
        "low": low,
        "high": high,
        "wanted": wanted,
        "decision": decision(accepted, n, len(table), wanted),
    }


def evidence(accepted: int, checked: int, precision: float) -> float:
    """Log-likelihood ratio of the answers: a Jeffreys mixture of every precision against one `precision`.

    Above stands the likelihood averaged over a Jeffreys prior, Beta(1/2, 1/2), below that of `precision`.
    Where `precision` is true the ratio is a martingale that starts at 1, so the chance that it ever reaches 1
    / 0.05 is at most 0.05 (Ville's inequality; Robbins 1970), however often one looks and whenever one stops.
    A Wilson or exact interval gives no such promise: looked at after each of 100 answers it misses far more
    often than in 5 % of the runs (tests/mrbench/test_verify.py). Wald's test of two precisions would need a
    second one that nobody has a value for, and gives no interval.
    """
    refused = checked - accepted
    beta = math.lgamma(accepted + 0.5) + math.lgamma(refused + 0.5) - math.lgamma(checked + 1)
    mixture = beta - math.log(math.pi)
    return mixture - accepted * math.log(precision) - refused * math.log1p(-precision)


def lasting_interval(accepted: int, checked: int) -> tuple[float, float]:
    """Confidence sequence: every precision that `evidence` does not rule out, 95 % for all looks together.

    NaN for nothing checked.
    """
    if not checked:
        return math.nan, math.nan
    share = accepted / checked

    def end(edge: float) -> float:
        inside, outside = share, edge
        for _ in range(50):
            middle = (inside + outside) / 2
            ruled_out = 0 < middle < 1 and evidence(accepted, checked, middle) >= -math.log(ERROR_RATE)
            inside, outside = (inside, middle) if ruled_out else (middle, outside)
        return inside

    return end(0.0), end(1.0)


def decision(accepted: int, checked: int, sampled: int, wanted: float) -> str:
    """The stop rule: "above" or "below" the wanted precision, as soon as `evidence` rules it out.

    Else "not verified" before the first answer, "go on" after it, "undecided" at the end of the sheet.
    It errs in at most 5 % of all verifications, and less still where the sample is a large part of the
    benchmark.
    """
    if checked and evidence(accepted, checked, wanted) >= -math.log(ERROR_RATE):
        return "above" if accepted > wanted * checked else "below"
    return "not verified" if not checked else "undecided" if checked >= sampled else "go on"


def sheet(rows: pd.DataFrame, root: mbeir.Root, path: Path, *, wanted: float):
    """A widget that shows one sampled query after another and goes on where `path` ends.

    Args:
        rows: unit, qid, text, image (relative to `root`, or empty) and grains, in the order they are asked.
        path: CSV of the rows with `accept`: yes, no or nothing; each answer is written at once, whole.

    Returns:
        an ipywidgets box. Accept and Reject are off once the stop rule has decided; Back leads to an answer
        to correct.
    """
    import ipywidgets

    table = answers(rows, path).reset_index(drop=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, question, progress = ipywidgets.Image(format="png"), ipywidgets.HTML(), ipywidgets.HTML()
    styles = {"Accept": "success", "Reject": "danger", "Back": "", "Skip": ""}
    buttons = {
        name: ipywidgets.Button(description=name, button_style=style) for name, style in styles.items()
    }
    opened = table.index[table["accept"] == ""]
    place = int(opened[0]) if len(opened) else max(0, len(table) - 1)

    def show() -> None:
        row, state = table.iloc[place], agreement(table, wanted)
        if row["image"]:
            picture.value = thumbnail(root.image_path(row["image"]))
        picture.layout.display = "" if row["image"] else "none"
        given = f", your answer: {row['accept']}" if row["accept"] else ""
        heading = f"{place + 1} of {len(table)}: {row['unit']} {row['qid']}{given}"
        lines = (heading, row["text"], row["grains"])
        question.value = "<br>".join(html.escape(line) for line in lines if line)
        progress.value = "Is the query made of these grains? " + _progress(state, len(table))
        done = state["decision"] in ("above", "below") and not row["accept"]
        buttons["Accept"].disabled = buttons["Reject"].disabled = done
        buttons["Back"].disabled, buttons["Skip"].disabled = place == 0, place == len(table) - 1

    def act(answer: str | None, step: int) -> Callable[[object], None]:
        def clicked(_) -> None:
            nonlocal place
            if answer:
                table.loc[place, "accept"] = answer
                files.write_whole(path, table.to_csv(index=False))
            place = min(max(place + step, 0), len(table) - 1)
            show()

        return clicked

    answers_and_steps = {"Accept": ("yes", 1), "Reject": ("no", 1), "Back": (None, -1), "Skip": (None, 1)}
    for name, (answer, step) in answers_and_steps.items():
        buttons[name].on_click(act(answer, step))
    show()
    return ipywidgets.VBox([question, picture, ipywidgets.HBox(list(buttons.values())), progress])


def _progress(state: dict[str, object], sampled: int) -> str:
    if not state["checked"]:
        return f"0 of {sampled} checked."
    share, low, high = (f"{100 * state[name]:.1f}" for name in ("precision", "low", "high"))
    endings = {"above": "Stop: the wanted precision is shown.", "below": "Stop: it is not reached."}
    counts = f"{state['checked']} of {sampled} checked, {share} % accepted, at every look {low} to {high}."
    return f"{counts} {endings.get(str(state['decision']), '')}"


def thumbnail(path: Path, side: int = 320) -> bytes:
    """An image as PNG, no longer than `side` pixels. Raises ElvaDataError as `images.open_image`."""
    image, file = images.open_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "PNG")
    return file.getvalue()
