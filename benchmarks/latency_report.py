"""What `mdm bench latency` found, for people: a card, Markdown tables, and two records side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mdm.errors import ConfigError, DataError
from mdm.record import to_json

from .latency_batches import crossover

Line = dict[str, Any]
MIB = 2**20


def describe(record: dict[str, Any]) -> str:
    """The page for people and, last, the record as one JSON line."""
    return "\n".join([page(record), "", to_json(record)])


def page(record: dict[str, Any]) -> str:
    """All of it as Markdown."""
    results = record["results"]
    parts = [title(record), sides_table(results), ratios_text(results)]
    if results["quality"]:
        parts.append(quality_table(results))
    if results["batches"]:
        parts.append(batches_table(record))
    if results["contexts"]:
        parts.append(contexts_table(results["contexts"]))
    if results["overhead"]:
        parts.append(overhead_line(results["overhead"]))
    parts += [
        f"Left out: {one['who']} {one['mode']}: {one['reason']}" for one in results["left_out"]
    ]
    parts += [
        f"Run eagerly in {one['who']} {one['mode']}: {one['forwards']} forwards ({one['reason']})"
        for one in results["fallbacks"]
    ]
    return "\n\n".join(parts)


def title(record: dict[str, Any]) -> str:
    """What all numbers have in common."""
    settings, results, device = record["settings"], record["results"], record["device"]
    place = device["gpu"] if results["device"] == "cuda" else device["cpu"]
    models = results["models"]
    told = " and ".join(
        f"{who} `{models[who]['source']}` ({models[who]['parameters'] / 1e6:.1f}M parameters"
        + (f", blocks of {models[who]['block_size']}" if models[who]["block_size"] else "")
        + (", random weights" if models[who]["weights"] == "random" else "")
        + ")"
        for who in ("student", "teacher")
    )
    numbers = settings["dtype"] + (f", {settings['quantization']}" * bool(settings["quantization"]))
    ends = (
        "nobody may end a text" if settings["ends"] == "suppressed" else "texts end where they end"
    )
    return (
        f"{told}, {numbers}, on {place}, {device['threads']} threads. The student decodes"
        f" {reading(settings, models['student'])}. {settings['texts']} prompts of"
        f" HumanEval (at most {settings['prompt_length']} tokens"
        + ("" if results["shared_vocabulary"] else "; each side by its own tokenizer")
        + f"), {settings['gen_length']} new tokens at batch 1, {settings['repeats']} times; {ends}."
        " Greedy. Visible tokens; prefill is in the time, encoding is not. ± standard error over"
        f" prompts. Memory was read at {results['bytes_per_s'] / 1e9:.1f} GB/s."
    )


def reading(settings: Line, student: Line) -> str:
    """What the student decodes together and what it keeps meanwhile."""
    length = settings["block_length"] or student["block_size"]
    together = f"{length} tokens together" if length else "all tokens together"
    if settings["cache"] != "none":
        refresh = settings["refresh"]
        anew = f"every {refresh} steps" if refresh else "for each block"
        return f"{together} with the approximate cache `{settings['cache']}`, made anew {anew}"
    return f"{together} with " + (
        "the exact cache of its blocks" if student["block_size"] else "no cache"
    )


# --- the table -------------------------------------------------------------------------------------

COLUMNS = (
    "side", "mode", "texts", "params", "peak MiB", "latency s", "p50", "p95", "first s", "tokens/s",
    "tokens/forward", "forwards", "positions", "ms/forward", "× floor",
)  # fmt: skip


def sides_table(results: Line) -> str:
    """A line a side; forwards are prefill + store + all others, a text."""
    rows = []
    for line in results["sides"]:
        rows.append([
            side_name(line),
            line["mode"],
            str(line["n"]),
            f"{line['parameters'] / 1e6:.1f}M",
            f"{line['peak_bytes'] / MIB:.0f}",
            with_error(line["latency_s"], line["latency_s_std_err"], ".3g"),
            f"{line['latency_p50_s']:.3g}",
            f"{line['latency_p95_s']:.3g}",
            f"{line['first_p50_s']:.2g}",
            with_error(line["tokens_per_s"], line["tokens_per_s_std_err"], ".1f"),
            with_error(line["tokens_per_forward"], line["tokens_per_forward_std_err"], ".2f"),
            forwards_text(line),
            f"{line['token_forwards'] / line['timed']:.0f}",
            f"{1000 * line['forward_s']:.2f}",
            f"{line['times_floor']:.1f}",
        ])  # fmt: skip
    differ = [
        f"{side_name(line)} {line['mode']}: {line['texts_differ']} of {line['texts_compared']}"
        for line in results["sides"]
        if line["texts_differ"]
    ]
    notes = "Forwards: prefill + store + others, a text. `plain` is the published loop: no cache, the whole"
    notes += " canvas in every step"
    block = results["models"]["student"]["block_size"]
    if block and any(line["who"] == "plain" for line in results["sides"]):
        notes += " (of a model with blocks its text means nothing, only its time)"
    notes += "."
    if differ:
        notes += (
            f" Texts that are not those of the first mode or the other loop: {'; '.join(differ)}."
        )
    return table(COLUMNS, rows) + f"\n\n{notes}"


def side_name(line: Line) -> str:
    """As in the table."""
    return f"{line['who']} {line['decoding']}".strip()


def forwards_text(line: Line) -> str:
    """Prefill + store + all others, a text."""
    own, timed = line["forwards"], line["timed"]
    others = sum(count for kind, count in own.items() if kind not in ("prefill", "store"))
    return " + ".join(f"{count / timed:.4g}" for count in (own["prefill"], own["store"], others))


def ratios_text(results: Line) -> str:
    """Each decoding against what there is to compare it with."""
    against = list(
        dict.fromkeys((one["against"], one["against_mode"]) for one in results["ratios"])
    )
    own = {
        (one["decoding"], one["mode"], one["against"], one["against_mode"]): one
        for one in results["ratios"]
    }
    rows = []
    for decoding, mode in dict.fromkeys(
        (one["decoding"], one["mode"]) for one in results["ratios"]
    ):
        cells = []
        for other in against:
            one = own.get((decoding, mode, *other))
            cells.append(with_error(one["ratio"], one["std_err"], ".2f") if one else "")
        rows.append([decoding, mode, *cells])
    counts = {(one["against"], one["against_mode"]): one["n"] for one in results["ratios"]}
    most = max(counts.values(), default=0)
    heads = [
        f"/ {who} {mode}" + (f" ({counts[who, mode]} of {most} texts)" * (counts[who, mode] < most))
        for who, mode in against
    ]
    return "Times the tokens a second:\n\n" + table(["student", "mode", *heads], rows)


# --- the other parts --------------------------------------------------------------------------------


def quality_table(results: Line) -> str:
    """What each decoding's text is worth, and the holes."""
    found = results["quality"]
    filled = {line["decoding"]: line for line in (found["infilling"] or {"lines": []})["lines"]}
    if not found["texts"]:
        told = f"Texts were not judged: {found.get('texts_left_out') or 'there are none'}."
        if not filled:
            return told
        heads = ["student", *hole_heads(found)]
        rows = [[name, *hole_cells(hole)] for name, hole in filled.items()]
        return f"{table(heads, rows)}\n\n{told}{holes_text(found)}"
    rows = []
    for line in found["texts"]:
        hole = filled.get(line["decoding"])
        cells = [
            side_name(line),
            with_error(line["log_likelihood"], line["log_likelihood_std_err"], ".3f"),
            with_error(line["minus_reference"], line["minus_reference_std_err"], "+.3f"),
            with_error(line["distinct_grams"], line["distinct_grams_std_err"], ".2f"),
            f"{line['repetitive']:.0%}",
        ]
        if filled:
            cells += hole_cells(hole) if hole else ["", "", ""]
        rows.append(cells)
    heads = ["side", "teacher's nats a token", f"minus {found['reference']}",
             f"different {found['gram']}-grams", "repetitive"]  # fmt: skip
    told = (
        f"Repetitive: fewer than {found['repetitive_below']:.0%} of a text's {found['gram']}-grams are"
        " different."
    )
    if filled:
        heads += hole_heads(found)
        told += holes_text(found)
    return table(heads, rows) + f"\n\n{told}"


def hole_heads(found: Line) -> list[str]:
    """Of the columns of hole_cells."""
    return ["holes: right", f"minus {found['reference']}", "tokens/forward there"]


def hole_cells(hole: Line) -> list[str]:
    """Right tokens, the same minus the reference, tokens a forward."""
    return [
        with_error(hole["right"], hole["right_std_err"], ".1%"),
        with_error(hole["minus_reference"], hole["minus_reference_std_err"], "+.1%"),
        with_error(hole["tokens_per_forward"], hole["tokens_per_forward_std_err"], ".2f"),
    ]


def holes_text(found: Line) -> str:
    """What the holes are, behind another sentence."""
    infilling = found["infilling"]
    return (
        f" Holes: {infilling['lines'][0]['n']} spans of {infilling['span']} tokens in solutions of"
        " HumanEval, share of tokens that are right."
    )


def batches_table(record: dict[str, Any]) -> str:
    """Tokens a second of both sides by batch, and where the teacher overtakes."""
    found = record["results"]["batches"]
    own = {(line["mode"], line["batch"], line["who"]): line for line in found["lines"]}
    rows = []
    points: dict[str, list[tuple[int, float, float]]] = {}
    for mode, size in dict.fromkeys((line["mode"], line["batch"]) for line in found["lines"]):
        student, teacher = (own[mode, size, who]["tokens_per_s"] for who in ("student", "teacher"))
        points.setdefault(mode, []).append((size, student, teacher))
        ratio = student / teacher if teacher else None  # nothing visible, nothing to compare
        rows.append(
            [mode, str(size), f"{student:.1f}", f"{teacher:.1f}", with_error(ratio, None, ".2f")]
        )
    heads = [
        "mode",
        "batch",
        f"student {found['decoding']}, tokens/s",
        "teacher, tokens/s",
        "ratio",
    ]
    # Older records tell of the first crossing alone: the lines are asked again.
    told = " ".join(
        crossover_text({**one, **crossover(points[one["mode"]])}) for one in found["crossovers"]
    )
    length = record["settings"]["batch_length"]
    return f"{length} new tokens a row, all rows together:\n\n{table(heads, rows)}\n\n{told}"


def crossover_text(one: Line) -> str:
    """Where the teacher overtakes, in a sentence."""
    if one["batch"] is not None:
        return f"{one['mode']}: the teacher overtakes at a batch of about {one['batch']:.1f}."
    leads = {
        "student": "the student is ahead at every batch that was measured",
        "teacher": "the teacher is ahead at every batch that was measured",
        "teacher first": "the teacher is ahead at first and falls back later",
        "changing": f"the leads change more than once ({one.get('changes')} times)",
    }
    return f"{one['mode']}: {leads[one['leads']]}."


def contexts_table(found: Line) -> str:
    """Peak above idle by context."""
    rows = [
        [
            f"{line['who']} {line['mode']}",
            str(line["context"]),
            f"{line['growth_bytes'] / MIB:.1f}",
            f"{line['kept_bytes'] / MIB:.1f}",
        ]
        for line in found["lines"]
    ]
    heads = ["side", "context", "peak above idle, MiB", "of it keys and values by shape, MiB"]
    left = found["left_out"]
    told = f"\n\nLonger than a model was built for: {', '.join(map(str, left))}." if left else ""
    return f"{found['new_tokens']} new tokens behind a context:\n\n{table(heads, rows)}{told}"


# --- two records --------------------------------------------------------------------------------------


def last_record(path: Path) -> dict[str, Any]:
    """The last record of this benchmark in a JSONL file. Raises DataError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read records from {path}: {error}") from error
    own = [record for record in records if record.get("kind") == "bench latency"]
    if not own:
        raise DataError(f"{path} has no record of `mdm bench latency`")
    return dict(own[-1])


ALIKE = (
    "dtype", "threads", "quantization", "gen_length", "prompt_length", "ends", "texts", "seed",
    "cache", "refresh", "block_length", "random_teacher",
)  # fmt: skip


def require_comparable(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ConfigError unless two records were made on one device, against one teacher, under one meaning
    of the numbers."""
    facts = {
        "metric version": [record["results"]["metrics"] for record in (one, other)],
        "device": [
            {**record["device"], "type": record["results"]["device"]} for record in (one, other)
        ],
        "teacher": [told_teacher(record) for record in (one, other)],
        **{name: [record["settings"].get(name) for record in (one, other)] for name in ALIKE},
    }
    if one["settings"]["ends"] == "natural":  # else no text ends, whatever an end is
        facts["meaning of tokens"] = [
            record["results"]["definitions"]["tokens"] for record in (one, other)
        ]
    for what, (first, second) in facts.items():
        if to_json(first) != to_json(second):
            raise ConfigError(
                f"these records cannot be compared: {what} is {first} in one and {second} in the other;"
                " measure both in the same way on the same machine"
            )


def told_teacher(record: dict[str, Any]) -> dict[str, Any]:
    """The hash of its weights; its source, too, where that says nothing."""
    teacher = record["results"]["models"]["teacher"]
    own = {"weights": teacher["weights"]}
    return own if own["weights"] not in (None, "random") else {**own, "source": teacher["source"]}


def compared(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Tokens a second of every side that both records have. Raises ConfigError as require_comparable."""
    require_comparable(now, before)
    old = {
        (line["who"], line["mode"], line["decoding"]): line for line in before["results"]["sides"]
    }
    rows = []
    for line in now["results"]["sides"]:
        was = old.get((line["who"], line["mode"], line["decoding"]))
        if was:
            rows.append([
                side_name(line),
                line["mode"],
                with_error(was["tokens_per_s"], was["tokens_per_s_std_err"], ".1f"),
                with_error(line["tokens_per_s"], line["tokens_per_s_std_err"], ".1f"),
                with_error(
                    line["tokens_per_s"] / was["tokens_per_s"] if was["tokens_per_s"] else None,
                    None, ".2f",
                ),
            ])  # fmt: skip
    old_name, new_name = (
        f"of `{record['results']['models']['student']['source']}` at {record['commit']}"
        for record in (before, now)
    )
    heads = ["side", "mode", f"tokens/s {old_name}", new_name, "ratio"]
    return table(heads, rows)


# --- Markdown ----------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_error(value: float | None, error: float | None, form: str) -> str:
    """`1.23 ± 0.04`; the error is left out where there is none (one text), a value that is none is –."""
    if value is None or math.isnan(value):
        return "–"
    if error is None or math.isnan(error):
        return f"{value:{form}}"
    return f"{value:{form}} ± {error:{form.removeprefix('+')}}"


def overhead_line(found: dict[str, Any]) -> str:
    """What the loop takes beside the model."""
    return (
        f"The loop beside the bare calls of the model, in turn, {found['decoding']}: a step takes"
        f" {found['step_s_median'] * 1e3:.1f} ms, the call {found['bare_s_median'] * 1e3:.1f} (medians);"
        f" {found['median_share']:+.1%} in the middle of {found['steps']} steps, {found['share']:+.1%} ±"
        f" {found['share_std_err']:.1%} of the time of {found['texts']} texts."
    )
