"""A view of denoising in the terminal: open positions as shaded cells, confidence as colour."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from .canvas import Canvas
from .sampler import DenoisingStep
from .vocab import Vocab

OPEN = "░"


class DenoisingView:
    """Draws the first canvas after every step: in place on a terminal, one picture a step elsewhere."""

    def __init__(self, vocab: Vocab, console: Console) -> None:
        self.vocab, self.console = vocab, console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.confidence: dict[int, float] = {}

    def __enter__(self) -> DenoisingView:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, step: DenoisingStep, canvases: list[Canvas]) -> None:
        for commit in step.commits:
            if commit.row == 0:
                where = commit.positions_k.tolist()
                self.confidence.update(zip(where, commit.confidence_k.tolist(), strict=True))
        picture = self.draw(canvases[0], step.step)
        if self.live is not None:
            self.live.update(picture, refresh=True)
        else:
            self.console.print(picture)

    def draw(self, canvas: Canvas, step: int) -> Text:
        """The canvas as text: given tokens dim, decided ones from red (unsure) to green (sure)."""
        left = int(canvas.open_L.sum())
        text = Text(f"── step {step + 1}, {left} open ──\n", style="bold")
        ids, open_, given = canvas.ids_L.tolist(), canvas.open_L.tolist(), canvas.given_L.tolist()
        start = 0
        while start < len(ids):
            end = start + 1
            kind = (open_[start], given[start])
            while (
                end < len(ids) and kind == (open_[end], given[end]) and (given[end] or open_[end])
            ):
                end += 1
            if open_[start]:
                text.append(OPEN * (end - start), style="bright_black")
            elif given[start]:
                text.append(self.vocab.decode(ids[start:end]), style="dim")
            else:
                text.append(self.vocab.decode(ids[start:end]), style=self.colour(start))
            start = end
        return text

    def colour(self, position: int) -> str:
        """Red to green by confidence; random remasking has none that means anything."""
        share = min(1.0, max(0.0, self.confidence.get(position, 0.0)))
        return f"rgb({round(220 * (1 - share))},{round(180 * share) + 40},60)"
