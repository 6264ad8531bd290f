"""Draw a sentence's graph as one static SVG document: image latents, text latents, the sentence.

Text is escaped, nothing is loaded, and there is no script: the document can be shown as an image.
"""

import textwrap
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_maira.attribution.edges import Node, SentenceGraph

WIDTH, ROW, TOP, BOX, GAP = 900, 46, 34, 36, 10
COLUMNS = (10, 330, 650)
"""Left edges of the three columns."""
BOX_WIDTH = 230
LABEL = 30
"""Characters of a latent's name that fit into its box; the whole name is its tooltip."""
STYLE = (
    ":root{color-scheme:light dark}text{font:12px system-ui,sans-serif;fill:#1d1d1b}.soft{fill:#67675f}"
    "rect{fill:#fff;stroke:#bdbdb4}path{fill:none;stroke:#ea580c}.less{stroke:#0e7490;stroke-dasharray:5 3}"
    "@media(prefers-color-scheme:dark){text{fill:#ecece6}.soft{fill:#a3a399}rect{fill:#20201e;stroke:#55554f}}"
)


def draw(graph: "SentenceGraph") -> str:
    """The kept edges of a graph as an SVG document; nodes without one are left out, but counted in its caption."""
    kept = [edge for edge in graph.edges if edge.kept]
    image = [node for node in graph.image if any(edge.source == node.latent for edge in kept)]
    text = [node for node in graph.text if node.drop > 0]
    places = [{node.latent: _y(i) for i, node in enumerate(nodes)} for nodes in (image, text)]
    rows = max(len(image), len(text), 3)
    height = _y(rows) + 22
    middle = (TOP + _y(rows - 1) + BOX) / 2
    lines = []
    for edge in kept:
        if edge.target in places[1]:
            label = f"{100 * edge.measured:.0f} % of text latent {edge.target}"
            start, end = places[0][edge.source] + BOX / 2, places[1][edge.target] + BOX / 2
            lines.append(_line(0, start, end, edge.measured, abs(edge.measured), label))
    largest = max([node.drop for node in text], default=1.0)
    for node in text:
        label = f"{node.drop:.2f} nats of the sentence"
        lines.append(_line(1, places[1][node.latent] + BOX / 2, middle, 1.0, node.drop / largest, label))
    boxes = [_box(COLUMNS[0], places[0][node.latent], node, "patches") for node in image]
    boxes += [_box(COLUMNS[1], places[1][node.latent], node, "tokens") for node in text]
    words = textwrap.wrap(graph.sentence, 34)[:6]
    sentence = "".join(
        f'<text x="{COLUMNS[2]}" y="{middle + 16 * (i - (len(words) - 1) / 2):.0f}">{escape(line)}</text>'
        for i, line in enumerate(words)
    )
    heads = (f"image latents, {graph.image_hook}", f"text latents, {graph.text_hook}", "sentence")
    titles = "".join(
        f'<text class="soft" x="{x}" y="18">{escape(head)}</text>'
        for x, head in zip(COLUMNS, heads, strict=True)
    )
    caption = f"{len(kept)} of {len(graph.edges)} measured edges passed their check"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">'
        f"<title>{escape(summary(graph))}</title><style>{STYLE}</style>{titles}{''.join(lines)}{''.join(boxes)}"
        f'{sentence}<text class="soft" x="{COLUMNS[0]}" y="{height - 6:.0f}">{caption}</text></svg>'
    )


def summary(graph: "SentenceGraph") -> str:
    """The kept edges in words, strongest first, for readers that do not see the drawing."""
    kept = sorted((edge for edge in graph.edges if edge.kept), key=lambda edge: -abs(edge.measured))
    parts = [
        f"image latent {e.source} gives {100 * e.measured:.0f} % of text latent {e.target}" for e in kept
    ]
    return f"Graph of the sentence {graph.sentence!r}: " + ("; ".join(parts) or "no edge passed its check")


def _y(row: int) -> float:
    return TOP + row * ROW


def _line(column: int, start: float, end: float, sign: float, size: float, label: str) -> str:
    x0, x1 = COLUMNS[column] + BOX_WIDTH, COLUMNS[column + 1] - GAP
    middle = (x0 + x1) / 2
    width = 1 + 7 * min(1.0, size)
    return (
        f'<path class="{"more" if sign > 0 else "less"}" stroke-width="{width:.1f}" stroke-opacity="0.6" '
        f'd="M{x0} {start:.0f}C{middle} {start:.0f} {middle} {end:.0f} {x1} {end:.0f}">'
        f"<title>{escape(label)}</title></path>"
    )


def _box(x: float, y: float, node: "Node", unit: str) -> str:
    name = node.name if len(node.name) <= LABEL else node.name[: LABEL - 1] + "…"
    label = f"{node.latent} · {node.positions} {unit} · {node.drop:.2f} nats (random {node.drop_random:.2f})"
    return (
        f'<g><title>{escape(node.name or str(node.latent))}</title><rect x="{x}" y="{y:.0f}" width="{BOX_WIDTH}" '
        f'height="{BOX}" rx="5"/><text x="{x + 8}" y="{y + 15:.0f}">{escape(name or "no name")}</text>'
        f'<text class="soft" x="{x + 8}" y="{y + 30:.0f}">{escape(label)}</text></g>'
    )
