"""The figure of `decode.py`: tokens a second by batch and by length of the prompt, with the machine's limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLES: dict[str, dict[str, Any]] = {
    "limit": {"label": "what the machine allows", "color": "black", "linestyle": "--"},
    "halfbyte": {"label": "halfbyte NF4", "color": "tab:blue", "marker": "o", "linewidth": 2.2},
    "llama.cpp": {"label": "llama.cpp Q4_0", "color": "tab:orange", "marker": "o"},
    "bitsandbytes": {"label": "bitsandbytes NF4", "color": "tab:green", "marker": "o"},
    "dense": {"label": "dense bf16", "color": "tab:red", "marker": "o"},
}


def curves(results: dict[str, Any], kind: str) -> dict[str, list[tuple[int, float]]]:
    """Contender, or "limit", -> (size, tokens a second) of one kind of work, by size.

    Args:
        results: what the last line of `decode.py` says.
        kind: "decode" or "prefill".
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for work, rates in results["tokens_per_second"].items():
        name, size = work.split()
        if name == kind:
            for contender, rate in {**rates, "limit": results["limit"][work]}.items():
                found.setdefault(contender, []).append((int(size), rate))
    return {contender: sorted(points) for contender, points in found.items()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG.

    Args:
        results: what the last line of `decode.py` says.
        path: where to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"decode": ("answers at once", "decoding"), "prefill": ("tokens of the prompt", "reading a prompt")}
    for position, (kind, (label, title)) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, position + 1, xlabel=label, ylabel="tokens a second", title=title)
        axes.set(xscale="log", yscale="log")
        lines = curves(results, kind)
        for contender, style in STYLES.items():
            if contender in lines:
                axes.plot(*zip(*lines[contender], strict=True), **style)
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        if not position:  # the other has the same lines, and no room
            axes.legend()
    figure.suptitle(
        f"A Llama of 399 M parameters · {results['machine']} · {results['date']}\nmemory read at "
        f"{results['read_bytes_per_second'] / 1e9:.0f} GB/s, dense bf16 products at "
        f"{results['multiply_flops'] / 1e9:.0f} GFLOP/s",
        fontsize=9,
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
