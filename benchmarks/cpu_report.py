"""What helps on a CPU, for people: a table of times, one of what they cost, the record as a last line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdm.record import to_json

MIB = 2**20
NOTES = (
    "Times faster: float32's time of the same repeat, threads and model, run eagerly, through this one's;"
    " medians of repeats ± the standard error of their mean. The first forward reads the prompt.",
    "Against the same model in float32, on files of the standard library: KL and the rise of the"
    " cross-entropy in nats a token (mean over texts ± its standard error), how often the likeliest token"
    " is the same, the largest change of a logit.",
)


def describe(record: dict[str, Any]) -> str:
    """The page and, last, the record as one JSON line."""
    return "\n".join([page(record), to_json(record)])


def page(record: dict[str, Any]) -> str:
    """All of it as Markdown."""
    results = record["results"]
    parts = [title(record), table_of_times(results["times"]), NOTES[0]]
    if any(results["price"].values()):
        parts += [table_of_prices(results), NOTES[1]]
    return "\n\n".join(parts)


def title(record: dict[str, Any]) -> str:
    """What all numbers have in common."""
    models, settings, device = record["results"]["models"], record["settings"], record["device"]
    told = []
    for who, model in models.items():
        blocks = f", blocks of {model['block_size']}" if model["block_size"] else ""
        told.append(
            f"{who} {model['source']} ({model['parameters'] / 1e6:.0f}M{blocks}) after {model['kept']}"
            " tokens"
        )
    return (
        f"{device['cpu']}, {device['cores']} cores; {'; '.join(told)}; {settings['repeats']} repeats in"
        " turn."
    )


def table_of_times(lines: Sequence[dict[str, Any]]) -> str:
    """A row for every side and number of threads."""
    rows = [
        _row(["model", "threads", "numbers", "run", "tokens read", "ms a forward", "times faster",
              "first, ms"]),
        _row(["---", "--:", "---", "---", *["--:"] * 4]),
    ]  # fmt: skip
    for line in lines:
        first = line["first_seconds"]
        rows.append(
            _row([
                line["who"],
                str(line["threads"]),
                line["numbers"],
                line["mode"],
                str(line["tokens_read"]),
                _with_error(1e3 * line["median_seconds"], line["std_err"], ".1f", 1e3),
                _with_error(line["times_faster"], line["times_faster_std_err"], ".2f"),
                "–" if first is None else f"{1e3 * first:.0f}",
            ])
        )  # fmt: skip
    return "\n".join(rows)


def table_of_prices(results: dict[str, Any]) -> str:
    """A row for every model and number type but float32."""
    rows = [
        _row(["model", "numbers", "weights, MiB", "KL", "cross-entropy", "same argmax", "largest"]),
        _row(["---", "---", *["--:"] * 5]),
    ]
    for who, prices in results["price"].items():
        sizes = results["models"][who]["weight_bytes"]
        rows.append(_row([who, "float32", f"{sizes['float32'] / MIB:.0f}", *["–"] * 4]))
        for number, price in prices.items():
            kl, rise, same = (price[name] for name in ("kl", "cross_entropy", "same_argmax"))
            rows.append(
                _row([
                    who,
                    number,
                    f"{sizes[number] / MIB:.0f}",
                    _with_error(kl["mean"], kl["std_err"], ".4f"),
                    _with_error(rise["mean"], rise["std_err"], "+.4f"),
                    f"{same['mean']:.1%}",
                    f"{price['largest']:.2f}",
                ])
            )  # fmt: skip
    return "\n".join(rows)


def _with_error(value: float, error: float | None, form: str, scale: float = 1.0) -> str:
    told = f"{value:{form}}"
    return told if error is None else f"{told} ± {scale * error:{form.lstrip('+')}}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
