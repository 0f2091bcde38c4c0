"""Human verification: the stop rule keeps its error rate, the buttons write what they say, the sheet goes on where it was."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from elva_core import files
from elva_core.data import mbeir
from elva_core.mrbench import verify

ROWS = 120
WANTED = 0.9


def test_agreement_and_its_interval():
    got = verify.agreement(pd.DataFrame({"accept": ["yes"] * 8 + ["No", "no ", "", None]}), WANTED)
    assert (got["checked"], got["accepted"], got["precision"], got["decision"]) == (10, 8, 0.8, "go on")
    # wider than Wilson's interval of 8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half-width 0.22656
    assert got["low"] < 0.4902 < 0.9433 < got["high"]
    nothing = verify.agreement(pd.DataFrame({"accept": ["", ""]}), WANTED)
    assert np.isnan(nothing["precision"]) and np.isnan(nothing["high"]) and nothing["decision"] == "not verified"
    with pytest.raises(files.ElvaDataError, match="maybe"):
        verify.agreement(pd.DataFrame({"accept": ["maybe"]}), WANTED)


@pytest.fixture(scope="module")
def decided():
    """[accepted, checked] -> whether the stop rule has decided, and whether Wilson's interval would have, for a wanted 0.9."""
    ours, wilson = np.zeros((2, ROWS + 1, ROWS + 1), dtype=bool)
    for n in range(1, ROWS + 1):
        for accepted in range(n + 1):
            ours[accepted, n] = verify.decision(accepted, n, ROWS, WANTED) in ("above", "below")
            wilson[accepted, n] = abs(accepted / n - WANTED) > 1.959964 * np.sqrt(WANTED * (1 - WANTED) / n)  # its score test
    return ours, wilson


def wrong_stops(table: np.ndarray, answers: np.ndarray) -> float:
    """Share of the runs (rows) that decide at some look although the wanted precision is the true one."""
    accepted = answers.cumsum(1)
    return float(table[accepted, np.arange(1, answers.shape[1] + 1)].any(1).mean())


def test_looking_after_each_answer_keeps_the_error_rate_and_wilson_would_not(decided):
    # 4,000 runs: the standard error of 5 % is 0.34 points
    answers, rng = np.random.default_rng(1).random((4000, ROWS)) < WANTED, np.random.default_rng(2)
    # without replacement, a benchmark of 1,000 of which exactly 900 are right
    finite = np.stack([rng.permutation(1000)[:ROWS] < 900 for _ in range(4000)])
    assert wrong_stops(decided[0], answers) <= 0.05 and wrong_stops(decided[0], finite) <= 0.05
    assert wrong_stops(decided[1], answers) > 0.15


def test_a_precision_far_from_the_wanted_one_is_seen_early(decided):
    ours, rng = decided[0], np.random.default_rng(3)
    for true, at_most in ((0.99, 90), (0.6, 25)):
        accepted = (rng.random((500, ROWS)) < true).cumsum(1)
        stops = ours[accepted, np.arange(1, ROWS + 1)]
        assert stops.any(1).mean() > 0.9 and np.median(stops.argmax(1) + 1) < at_most


def test_the_lasting_interval_ends_where_the_stop_rule_decides():
    for accepted, n in ((0, 1), (5, 5), (40, 60), (59, 60), (60, 60), (3, 60)):
        low, high = verify.lasting_interval(accepted, n)
        assert 0 <= low <= accepted / n <= high <= 1
        for wanted in (0.05, 0.3, 0.6, 0.9, 0.97):
            expected = "above" if low > wanted else "below" if high < wanted else "go on"
            assert verify.decision(accepted, n, ROWS, wanted) == expected
    assert verify.decision(50, 60, 60, 0.85) == "undecided"


@pytest.fixture
def sampled(tmp_path):
    """A root with one image and three sampled queries."""
    folder = tmp_path / "root"
    folder.mkdir()
    Image.new("RGB", (900, 300), "red").save(folder / "a.png")
    grains = ["entity: dog", "entity: <b>cat</b>; attribute: big", "action: run"]
    table = pd.DataFrame(
        {"unit": "u", "qid": ["9:1", "9:2", "9:3"], "text": ["a, dog", "b", ""], "image": ["", "", "a.png"], "grains": grains}
    )
    return table, mbeir.Root(folder), tmp_path / "answers" / "verification.csv"


def opened(sampled, wanted=WANTED):
    """(click(name), texts of the widget, the widget)"""
    box = verify.sheet(*sampled, wanted=wanted)
    question, picture, row, progress = box.children
    buttons = {b.description: b for b in row.children}
    return lambda *names: [buttons[n].click() for n in names], buttons, question, picture, progress


def accepted(path) -> list[str]:
    return pd.read_csv(path, keep_default_na=False)["accept"].tolist()


def test_buttons_write_answers_and_walk_through_the_sheet(sampled):
    rows, _, path = sampled
    click, buttons, question, picture, progress = opened(sampled)
    assert "1 of 3" in question.value and "a, dog" in question.value and buttons["Back"].disabled and not path.exists()
    assert picture.layout.display == "none"
    click("Accept")
    assert accepted(path) == ["yes", "", ""] and "2 of 3" in question.value and "1 of 3 checked" in progress.value
    assert "&lt;b&gt;cat" in question.value  # data is text, never markup
    click("Skip")
    assert accepted(path) == ["yes", "", ""] and buttons["Skip"].disabled
    shown = Image.open(io.BytesIO(picture.value))
    assert picture.layout.display == "" and max(shown.size) == 320 and shown.getpixel((5, 5)) == (255, 0, 0)
    click("Reject", "Back", "Back")
    assert "your answer: yes" in question.value
    click("Reject")  # a correction
    assert accepted(path) == ["no", "", "no"]
    assert verify.answers(rows, path)["accept"].tolist() == ["no", "", "no"]


def test_the_sheet_goes_on_at_the_first_open_row_and_forgets_answers_to_other_grains(sampled):
    rows, root, path = sampled
    opened(sampled)[0]("Accept", "Reject")
    assert "3 of 3" in opened(sampled)[2].value
    changed = rows.assign(grains=["entity: wolf", *rows["grains"][1:]])
    assert verify.answers(changed, path)["accept"].tolist() == ["", "no", ""]
    assert "1 of 3" in opened((changed, root, path))[2].value
    path.write_text(path.read_text().replace(",no", ",no,or yes"))
    with pytest.raises(files.ElvaDataError, match=r":3: \d cells, the header has"):
        verify.answers(rows, path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(files.ElvaDataError, match="accept"):
        verify.answers(rows, path)


def test_an_answer_is_written_whole_or_not_at_all(sampled, interrupted):
    path = sampled[2]
    click = opened(sampled)[0]
    click("Accept")
    with interrupted(files, "write_whole", 1):
        click("Reject")
    assert accepted(path) == ["yes", "", ""]


def test_the_stop_rule_ends_the_questions_but_not_the_corrections(sampled):
    click, buttons, _, _, progress = opened(sampled, wanted=0.01)
    click("Accept")
    assert verify.decision(1, 1, 3, 0.01) == "above" and "Stop" in progress.value
    assert buttons["Accept"].disabled and buttons["Reject"].disabled
    click("Back")
    assert not buttons["Reject"].disabled
