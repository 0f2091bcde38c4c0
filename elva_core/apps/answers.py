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

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from elva_core import files
from elva_core.data import mbeir
from elva_core.data.items import Item
from elva_core.experiments import pictures
from elva_core.models.encoder import Encoder
from elva_core.retrieval import retriever
from elva_core.retrieval import search as searching
from elva_core.retrieval.pool import Pool

WORD = re.compile(r"\w+")
UNSAID = re.compile(r"[^\w\s!-~]")  # neither words nor marks of ASCII: an emoji, for instance


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
        return pictures.contact_sheet([query, *cards], f"Best {len(self.found)} of {pool}")

    def file_name(self) -> str:
        """A name for the sheet, from the words of the query; with a hash where they do not say all of it."""
        query = f"{self.query.text} {self.query.image.stem if self.query.image else ''}"
        words = "_".join(WORD.findall(query)).lower()
        if words and len(words) <= 60 and not UNSAID.search(query):
            return f"search_{words}.png"
        return f"search_{words[:50]}_{mbeir.stable_hash(self.query.text, self.query.image):015x}.png"

    def save(self, folder: Path | str) -> Path:
        """Writes the sheet as PNG; a sheet of the same query is replaced."""
        path = Path(folder) / self.file_name()
        with files.whole(path) as partial:
            partial.write_bytes(self._repr_png_())
        return path

    def __repr__(self) -> str:
        return f"best {len(self.found)} of {len(self.pool.candidates):,} for {self.query.text!r}"

    def _repr_png_(self) -> bytes:
        """The sheet of pictures that JupyterLab shows."""
        out = io.BytesIO()
        self.sheet().savefig(out, format="png", dpi=150)
        return out.getvalue()


def search(
    loaded: Encoder,
    pool: Pool,
    text: str = "",
    image: Path | str | None = None,
    *,
    k: int = 10,
    template: str | None = None,
) -> Answers:
    """The k best candidates for a text, an image, or both; the whole pool where it has fewer.

    Args:
        image: the path of a file.
        template: how the query is read; None reads it as the pool was.

    Raises:
        ValueError: no text and no image, an image that is no path, a text that is no Unicode, or k below 1.
        ElvaDataError: an image that cannot be read.
    """
    if not isinstance(image, Path | str | None):
        raise ValueError(f"an image is {type(image).__name__}; give the path of a file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start + 1} of the text {text!r} is no Unicode"
        raise ValueError(f"{problem}; leave it out") from None
    query = Item(mbeir.normalise(text), Path(image) if image else None)
    if not query.text and not query.image:
        raise ValueError("nothing to search for: give a text, an image, or both")
    if k < 1:
        raise ValueError(f"k = {k}; ask for at least one answer")
    vector, (summary,) = retriever.encode(loaded, [query], batch=1, template=template or pool.template)
    if (dim := pool.vectors[:1].shape[1]) < vector.shape[1]:  # the pool keeps less of a vector
        vector = searching.Prefixes(vector, dim)[:]
    depth, vectors, rows = min(k, len(pool.candidates)), pool.vectors, np.arange(len(pool.candidates))
    if pool.first:
        (rows,) = pool.first(vector, depth)
        vectors = pool.vectors[rows]
    ranking = searching.exact(vector, vectors, depth, device=loaded.device)
    candidates = [pool.candidates[int(rows[place])] for place in ranking.rows[0]]
    return Answers(query, summary, candidates, ranking.scores[0].tolist(), pool)
