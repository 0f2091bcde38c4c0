"""A free query against a pool; lives in elva_core/apps/answers.py."""

from elva_core.apps.answers import Answers, search
from elva_core.retrieval.pool import Pool, of_unit

__all__ = ["Answers", "Pool", "of_unit", "search"]
