"""A free query against a pool: the best candidates, as a table and as a sheet of pictures.

candidates = pool.of_unit(encoder, mbeir.Root(ROOT), "emoji_task0", batch=64)
answers.search(encoder, candidates, "woman running", k=10)  # last in a cell: JupyterLab shows the sheet
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.experiments import figures
from elva_core.models.encoder import Encoder
from elva_core.retrieval import retriever
from elva_core.retrieval import search as searching
from elva_core.retrieval.pool import Pool


@dataclass(frozen=True, repr=False)
class Answers:
    """The best candidates of a pool, best first.

    summary: what the model wrote for the query, "" for one pass.
    """

    query: Item
    summary: str
    found: Sequence[mbeir.Candidate]
    scores: Sequence[float]
    pool: Pool

    def table(self) -> pd.DataFrame:
        """rank, score (cosine), did, text, image (relative to the root) and caption, a row per answer."""
        ranked = enumerate(zip(self.found, self.scores, strict=True), 1)
        rows = [(n, score, c.did, c.text, c.image, mbeir.caption(c)) for n, (c, score) in ranked]
        return pd.DataFrame(rows, columns=["rank", "score", "did", "text", "image", "caption"])

    def sheet(self) -> Figure:
        """The query and its answers; rank, score and id under each."""
        root, cards = self.pool.root, []
        for rank, (candidate, score) in enumerate(zip(self.found, self.scores, strict=True), 1):
            image = root.image_path(candidate.image) if candidate.image and root else None
            text = candidate.text or ("" if image else candidate.image or "")
            cards.append((text, image, f"{rank}   {score:.3f}   {candidate.did}"))
        pool = f"{len(self.pool.candidates):,} candidates, cosine ({self.pool.unit}, {self.pool.kind} pool)"
        query = (self.query.text, self.query.image, "query")
        return figures.contact_sheet([query, *cards], f"Best {len(self.found)} of {pool}")

    def file_name(self) -> str:
        """A name for the sheet, from the query."""
        words = re.findall(r"\w+", f"{self.query.text} {self.query.image.stem if self.query.image else ''}")
        return f"search_{'_'.join(words)[:60].lower()}.png"

    def save(self, folder: Path) -> Path:
        """Writes the sheet as PNG; a sheet of the same query is replaced."""
        path = folder / self.file_name()
        path.write_bytes(self._repr_png_())
        return path

    def __repr__(self) -> str:
        return f"best {len(self.found)} of {len(self.pool.candidates):,} for {self.query.text!r}"

    def _repr_png_(self) -> bytes:
        """What JupyterLab shows."""
        out = io.BytesIO()
        self.sheet().savefig(out, format="png", dpi=150)
        return out.getvalue()


def search(
    loaded: Encoder,
    pool: Pool,
    text: str = "",
    image: Path | None = None,
    *,
    k: int = 10,
    template: str | None = None,
) -> Answers:
    """The k best candidates for a text, an image, or both; the whole pool where it has fewer.

    Args:
        template: how the query is read; None reads it as the pool was.

    Raises:
        ValueError: no text and no image, a text that is no Unicode, or k below 1.
        ElvaDataError: an image that cannot be read.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} of the text {text!r} is no Unicode; leave it out"
        ) from None
    query = Item(mbeir.normalise(text), image)
    if not query.text and image is None:
        raise ValueError("nothing to search for: give a text, an image, or both")
    if k < 1:
        raise ValueError(f"k = {k}; ask for at least one answer")
    vector, (summary,) = retriever.encode(loaded, [query], batch=1, template=template or pool.template)
    depth = min(k, len(pool.candidates))
    ranking = searching.exact(vector, pool.vectors, depth, device=loaded.device)
    candidates = [pool.candidates[int(row)] for row in ranking.rows[0]]
    return Answers(query, summary, candidates, ranking.scores[0].tolist(), pool)
