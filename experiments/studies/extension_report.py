"""Tables and plots of experiments/extension.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.report.figures import plt, save_figure, use_length_axis, use_log_values
from eval.report.markdown import markdown_table


def as_markdown(results: Sequence[dict[str, Any]], lengths: Sequence[int]) -> str:
    """Format a table of perplexity, retrieval and cost, and a second one of pseudo-perplexity if it was measured.

    Args:
        results: of `extension.compare`.
        lengths: at which perplexity was measured, in tokens.
    """
    tasks = list(dict.fromkeys(task for result in results for task in result["retrieval"]))
    scores = [score for score in ("masked", "pseudo") if any(score in result["perplexity"] for result in results)]
    tables = []
    for score in scores:
        first = score == scores[0]
        heading = ["", *(f"{length:,}" for length in lengths)]
        heading += [*tasks, "training tokens", "minutes", "peak GiB"] if first else []
        rows = []
        for result in results:
            cells = [_value(result["perplexity"].get(score, {}).get(str(length))) for length in lengths]
            if first:
                cells += [_number(result["retrieval"].get(task), ".1f") for task in tasks]
                cost = result["training"] or {}
                cells += [_number(cost.get(name), form) for name, form in COST.items()]
            rows.append([result["title"], *cells])
        tables.append(f"{TITLES[score]}\n\n{markdown_table(heading, rows)}")
    return "\n".join(tables)


COST = {"tokens": ",d", "minutes": ".1f", "peak_memory_gib": ".1f"}

TITLES = {
    "masked": "Masked perplexity (15% of the tokens masked at once) by tokens read; then retrieval; then training",
    "pseudo": "Pseudo-perplexity (each token masked alone) by tokens read",
}


def _value(point: dict[str, Any] | None) -> str:
    if point is None:
        return "–"
    error = "" if point["error"] is None else f" ± {float(format(point['error'], '.2g')):g}"  # 120, not 1.2e+02
    return f"{point['value']:.4g}{error}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw perplexity against length (left) and held-out loss against training tokens (right).

    Args:
        results: of `extension.compare`; each is a line.
        path: the PNG file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    score = next((s for s in ("masked", "pseudo") if any(s in result["perplexity"] for result in results)), "masked")
    handles = []
    for number, result in enumerate(results):
        # Colours repeat after ten; trained rows have solid lines.
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o" if number < 10 else "s", "markersize": 4}
        style["linestyle"] = "-" if result["training"] else "--"
        points = [(int(length), point) for length, point in result["perplexity"].get(score, {}).items()]
        lengths, values = [length for length, _ in points], [point["value"] for _, point in points]
        errors = [point["error"] or 0.0 for _, point in points]
        handles.append(left.errorbar(lengths, values, errors, capsize=3, label=result["title"], **style))
        if result["training"] and result["row"] != "base":
            right.plot(*zip(*result["training"]["curve"], strict=True), **style)
        elif result["training"]:
            right.axhline(result["training"]["curve"][-1][1], linestyle=":", color=style["color"])
    ticks = {int(length) for result in results for length in result["perplexity"].get(score, {})}
    use_length_axis(left, ticks, "context length (tokens)")
    use_log_values(left)
    left.set_title(TITLES[score].split(" (")[0])
    right.set_xlabel("training tokens")
    right.set_title("loss on the first tokens of held-out documents (dotted: base)")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)
