"""Options of the command line that take several values after one flag."""

from __future__ import annotations

from typer.core import TyperCommand


class ManyValues(TyperCommand):
    """A command whose repeatable options take several values after one flag: `--unit a b`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        words, flag = [], None
        for word in args:
            if word.startswith("-"):
                flag = word if word in repeatable else None
            if flag is None:
                words.append(word)
            elif word != flag:
                words += [flag, word]
        return super().parse_args(ctx, words)
