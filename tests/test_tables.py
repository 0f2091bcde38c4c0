"""Tables in Markdown."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from conftest import ODD_NAMES
from elva_core import tables


def test_markdown_rounds_fractions_alone_and_leaves_holes_empty():
    table = pd.DataFrame({"a": ["x", "y"], "n": [3, 4], "share": [0.25, np.nan]})
    assert tables.markdown_table(table) == "| a | n | share |\n| -- | -- | -- |\n| x | 3 | 0.2 |\n| y | 4 |  |\n"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_read_back_as_it_was_written_and_numbers_are_numbers(name, tmp_path):
    written = pd.DataFrame({"model": [name, ""], "unit": ["x", name], "value": [0.25, np.nan], "n": [3, 4], "reported": [True, False]})
    written.to_csv(tmp_path / "x.csv", index=False)
    table = tables.read_table(tmp_path / "x.csv")
    pd.testing.assert_frame_equal(table, written, check_dtype=False)
    assert table["value"].dtype == float and table["n"].dtype == int and table["reported"].dtype == bool
