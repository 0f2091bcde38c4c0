"""Tables in Markdown."""

from __future__ import annotations

import numpy as np
import pandas as pd

from elva_core import tables


def test_markdown_rounds_fractions_alone_and_leaves_holes_empty():
    table = pd.DataFrame({"a": ["x", "y"], "n": [3, 4], "share": [0.25, np.nan]})
    assert tables.markdown_table(table) == "| a | n | share |\n| -- | -- | -- |\n| x | 3 | 0.2 |\n| y | 4 |  |\n"
