"""Measurements on a GPU: what `make gpu` wrote to outputs/gpu, or run 1 from before there was `make gpu`.

`plan` takes share of the peak and seconds per layer from the newest file of its card; README's section is
generated here. Results of a simulated device count for neither.

    measured.applied(sizes.known(), "H100")[0].assumed.utilisation
"""

from __future__ import annotations

import json
from collections.abc import Callable

from elva_core import files
from elva_core.experiments.sizes import Known, Run1, Sizes, of_model
from elva_core.tables import markdown_rows

FOLDER = files.REPOSITORY / "outputs/gpu"
MFU, LAYER = "stage 2, EOL step", "48 summaries of 64 tokens"  # sections that the plan's values come from
COLUMNS = ("what", "measured", "should be", "GPU busy", "MFU", "peak, GB")


def results() -> list[dict]:
    """Results of `make gpu` for each real card, newest first."""
    made = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    return sorted((r for r in made if not r["simulated"]), key=lambda r: r["date"], reverse=True)


def run1() -> dict[str, dict]:
    """Lines of run 1 by what they measured."""
    lines = (FOLDER / "run1.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["what"]: line for line in map(json.loads, lines)}


def applied(table: Known, gpu: str) -> tuple[Known, str | None]:
    """The table with what was measured on a card of that name for what it assumes; card, date and commit.

    Without a measurement the table as it is, and None.
    """
    share = layer = source = None
    if made := next((r for r in results() if gpu in r["card"].replace("-", " ").split()), None):
        parts, source = made["sections"], _source(made["card"], made["date"], made["commit"])
        share, layer = parts.get(MFU, {}).get("mfu"), parts.get(LAYER, {}).get("seconds_per_layer")
    elif gpu == table.run1.gpu and (FOLDER / "run1.jsonl").is_file():
        lines, sizes = run1(), of_model(table.run1.model, table.architectures)
        source = _source(lines["start"]["gpu"], table.run1.date, table.run1.commit)
        rate = step_flops(sizes, table.run1) / min(lines["stage stage2"]["step_times"])
        share = rate / (table.gpus[gpu].tflops * 1e12)
        layer = min(lines["generating"]["ours"]) / (table.run1.summary + 1) / sizes.layers
    changes = {"utilisation": share} if share else {}
    if layer:
        changes["seconds_per_layer"] = table.assumed.seconds_per_layer | {"cuda": layer}
    return table.model_copy(update={"assumed": table.assumed.model_copy(update=changes)}), source


def _source(card: str, date: str, commit: str) -> str:
    return f"{card}, {date}, commit {commit}"


def step_flops(sizes: Sizes, step: Run1) -> float:
    """FLOPs of run 1's EOL step of stage 2, which read every row twice and computed its layers once more."""
    tokens = step.rows * step.tokens
    language = 3 * sizes.forward(tokens, step.tokens, step.rank)
    language += sizes.backward(tokens, step.tokens, step.rank)
    return language + 2 * sizes.vision(step.rows * step.images, sizes.image_tokens(step.image_pixels))


def readme_block(table: Known) -> str:
    """README's section: a table for every card, else run 1's and since when nothing was measured."""
    if made := results():
        return "\n\n".join(_of_card(result, table.gpu_goals) for result in made)
    start, goals, rows = run1()["start"], table.gpu_goals, []
    for what, (line, unit, number) in RUN1_ROWS.items():
        entry = run1()[line]
        if what == MFU:
            entry["mfu"] = applied(table, table.run1.gpu)[0].assumed.utilisation
        rows.append((what, f"{number(entry):.3g} {unit}", goals.get(what, ""), entry))
    stopped = run1()["stage stage1"]["error"].partition(";")[0]
    head = (
        f"**Last measured on a card on {table.run1.date}** (run 1, commit {table.run1.commit}): "
        f"one {start['gpu']}, torch {start['torch']}, transformers {start['transformers']}, bfloat16, "
        f"Qwen2-VL-2B at its real sizes with random weights. Stage 1 stopped ({stopped}). "
        "`make gpu` on a machine with a card measures anew and replaces this table. This code has never "
        "taught a backbone or run study or chain of the laptop profile on a card (`device: cuda`); it passes "
        "the tests of a simulated one. "
        "The small backbone was taught on an H100, as its card says; every other result comes from CPUs."
    )
    return f"{head}\n\n{markdown_rows(COLUMNS, [(a, b, c, *_load(d)) for a, b, c, d in rows])}"


# row of the table -> line of run 1, unit, its number
RUN1_ROWS: dict[str, tuple[str, str, Callable[[dict], float]]] = {
    "stage 2, EOL step": ("stage stage2", "s", lambda line: min(line["step_times"])),
    "stage 2, [RET] step": ("stage stage2", "s", lambda line: max(line["step_times"])),
    "embedding images at EOL": ("embedding image", "a second", lambda line: line["eol"]["per_s"]),
    "embedding images with a summary": ("embedding image", "a second", lambda line: line["summary"]["per_s"]),
    "embedding texts at EOL": ("embedding text", "a second", lambda line: line["eol"]["per_s"]),
    "embedding texts with a summary": ("embedding text", "a second", lambda line: line["summary"]["per_s"]),
    "48 summaries of 64 tokens": ("generating", "s", lambda line: min(line["ours"])),
    "RL step": ("rl_ours", "rollouts a second", lambda line: line["rollouts_per_s"]),
}


def _load(entry: dict) -> tuple[str, str, str]:
    busy, mfu, peak = entry.get("util"), entry.get("mfu"), entry.get("peak_gb")
    shown = ("" if busy is None else f"{busy:.0f} %", "" if mfu is None else f"{mfu:.0%}")
    return (*shown, "" if peak is None else f"{peak:.1f}")


def _of_card(result: dict, goals: dict[str, str]) -> str:
    """Table of one card's sections, what was wrong and what was left out."""
    head = (
        f"{_source(result['card'], result['date'], result['commit'])}: torch {result['torch']}, "
        f"transformers {result['transformers']}, Qwen2-VL at its real sizes with random weights (`make gpu`)."
    )
    rows, notes = [], []
    for name, entry in result["sections"].items():
        if reason := entry.get("skipped") or entry.get("error"):
            notes.append(f"* {name}: {'skipped' if 'skipped' in entry else 'failed'}, {reason}")
        elif "value" in entry:
            number = f"{entry['value']:.3g} {entry['unit']}"
            if "ratio" in entry:
                number += f"; {entry['against']} {entry['ratio']:.2g} times as long"
            rows.append((name, number, goals.get(name, ""), *_load(entry)))
        else:
            wrong = f"**differs from the CPU**: {', '.join(entry.get('differs', [])) or 'see the file'}"
            rows.append((name, "as on the CPU" if entry["ok"] else wrong, "", *_load(entry)))
    return "\n\n".join(part for part in (head, markdown_rows(COLUMNS, rows), "\n".join(notes)) if part)
