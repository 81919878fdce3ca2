"""A claim drawn as SVG: the effect and its interval against the threshold, and every cell."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from experiments.framework.report.words import SHORT, interval_in_words, threshold_in_words
from experiments.framework.verdict import IN_PART, INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict, cell_in_words

WIDTH, HEIGHT, MARGIN = 320, 46, 12
LINE = 24  # y of the effect
AT = 0.34  # where the threshold stands, as a share of the width; the claim holds to the right of it
CLASSES = {SUPPORTED: "held", IN_PART: "part", NOT_SUPPORTED: "failed", INCONCLUSIVE: "open"}
SMALLEST = 1e-300  # below which an exact effect counts as this, on its logarithmic scale


@dataclass(frozen=True)
class Scale:
    """From values to x.

    Attributes:
      to_line: value -> position on a line on which effects average, growing to the side where the claim holds.
      first: position at the left edge.
      last: at the right edge.
    """

    to_line: Callable[[float], float]
    first: float
    last: float

    def x(self, value: float) -> float:
        """Where a value is drawn; what lies beyond an edge is drawn at it."""
        share = (self.to_line(value) - self.first) / (self.last - self.first)
        return round(MARGIN + (WIDTH - 2 * MARGIN) * min(max(share, 0.0), 1.0), 1)


def drawn(verdict: Verdict) -> Markup:
    """The claim as an inline SVG with an alternative text; without numbers there is only the threshold."""
    scale = scale_of(verdict)
    parts = [*_zone(verdict, scale), *_cells(verdict, scale), *_effect(verdict, scale)]
    words = escape(alternative(verdict))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="strip {CLASSES[verdict.outcome]}">'
        f"<title>{words}</title>{''.join(parts)}</svg>"
    )


def alternative(verdict: Verdict) -> str:
    """What is to be seen, in words."""
    effect = "unknown" if math.isnan(verdict.effect) else f"{verdict.effect:.3g}"
    bounds = "" if verdict.kind == "exact" else f" ({interval_in_words(verdict.low, verdict.high)})"
    return f"{SHORT[verdict.outcome]}: effect {effect} {verdict.unit}{bounds}; {threshold_in_words(verdict)}"


def limits_of(verdict: Verdict) -> tuple[float, ...]:
    """The thresholds: two for what is claimed to be equal, else one."""
    limit = verdict.threshold
    if verdict.kind == "equal":
        return (1 / (1 + limit), 1 + limit) if verdict.ratio else (-limit, limit)
    return (limit,)


def scale_of(verdict: Verdict) -> Scale:
    """A scale on which everything finite about the claim has room, the threshold at the same place in every drawing.

    Effects on which more is worse (`below`, `exact`) grow to the left. Ratios and exact effects are logarithmic.
    """
    logarithmic = verdict.ratio or verdict.kind == "exact"
    sign = -1.0 if verdict.kind in ("below", "exact") else 1.0

    def to_line(value: float) -> float:
        value = abs(value) if verdict.kind == "exact" else value
        return sign * (math.log(max(value, SMALLEST)) if logarithmic else value)

    limits = [to_line(limit) for limit in limits_of(verdict) if limit or not logarithmic] or [0.0]
    held = [value for value in _numbers(verdict) if not logarithmic or value]
    line = [to_line(value) for value in held] + limits
    if verdict.kind == "equal":
        reach = 1.25 * max(abs(position) for position in line) or 1.0
        return Scale(to_line, -reach, reach)
    right = max(position - limits[0] for position in line)
    left = max(limits[0] - position for position in line)
    reach = 1.12 * max(right / (1 - AT), left / AT) or 1.0
    return Scale(to_line, limits[0] - AT * reach, limits[0] + (1 - AT) * reach)


def _numbers(verdict: Verdict) -> Iterable[float]:
    neutral = [] if verdict.kind == "exact" else [1.0 if verdict.ratio else 0.0]
    bounds = [verdict.effect] if verdict.kind == "exact" else [verdict.effect, verdict.low, verdict.high]
    return [value for value in [*neutral, *bounds, *(cell.effect for cell in verdict.cells)] if math.isfinite(value)]


def _zone(verdict: Verdict, scale: Scale) -> list[str]:
    """The region in which the claim holds, its threshold, and where no effect lies."""
    limits = limits_of(verdict)
    places = [scale.x(limit) for limit in limits]
    end = places[1] if verdict.kind == "equal" else WIDTH
    parts = [f'<rect class="zone" x="{places[0]}" y="6" width="{end - places[0]:.1f}" height="28"/>']
    parts += [f'<line class="limit" x1="{x}" x2="{x}" y1="3" y2="35"/>' for x in places]
    if len(limits) == 2 and places[1] - places[0] < 44:  # two labels would run into each other
        parts.append(_label(sum(places) / 2, f"within {verdict.threshold:g}", "limit"))
    else:
        parts += [_label(x, f"{limit:.4g}", "limit") for x, limit in zip(places, limits, strict=True)]
    neutral = 1.0 if verdict.ratio else 0.0
    at = scale.x(neutral)
    if verdict.kind != "exact" and neutral not in limits:
        parts.append(f'<line class="neutral" x1="{at}" x2="{at}" y1="6" y2="34"/>')
        if all(abs(at - x) > 26 for x in places):
            parts.append(_label(at, f"{neutral:g}", "neutral"))
    return parts


def _label(x: float, words: str, kind: str) -> str:
    place = min(max(x, 16), WIDTH - 16)
    return f'<text class="{kind}" x="{place}" y="45" text-anchor="middle">{escape(words)}</text>'


def _cells(verdict: Verdict, scale: Scale) -> list[str]:
    """A small mark for every cell, filled where the claim holds there."""
    if len(verdict.cells) < 2:
        return []
    return [
        f'<circle class="cell {CLASSES[cell.outcome]}" cx="{scale.x(cell.effect)}" cy="12" r="2.6">'
        f"<title>{escape(f'{cell_in_words(cell)}: {cell.effect:.3g} ({interval_in_words(cell.low, cell.high)})')}"
        "</title></circle>"
        for cell in verdict.cells
        if math.isfinite(cell.effect)
    ]


def _effect(verdict: Verdict, scale: Scale) -> list[str]:
    """The interval as a bar with ends, and the effect as a mark whose shape tells the outcome."""
    if not math.isfinite(verdict.effect):
        return [f'<text class="nothing" x="{WIDTH - MARGIN}" y="{LINE + 4}" text-anchor="end">not measured</text>']
    parts = []
    if verdict.kind != "exact" and math.isfinite(verdict.low) and math.isfinite(verdict.high):
        ends = scale.x(verdict.low), scale.x(verdict.high)
        parts += [f'<line class="bar" x1="{min(ends)}" x2="{max(ends)}" y1="{LINE}" y2="{LINE}"/>']
        parts += [f'<line class="end" x1="{x}" x2="{x}" y1="{LINE - 4}" y2="{LINE + 4}"/>' for x in ends]
    return [*parts, mark(verdict.outcome, scale.x(verdict.effect), LINE)]


def mark(outcome: str, x: float, y: float, size: float = 5.0) -> str:
    """A shape for each outcome, so that they are told apart without colour: disc, half disc, cross, ring."""
    kind = f'class="mark {CLASSES[outcome]}"'
    if outcome == SUPPORTED:
        return f'<circle {kind} cx="{x}" cy="{y}" r="{size}"/>'
    if outcome == IN_PART:
        half = f"M{x},{y - size:g}a{size:g},{size:g} 0 0 0 0,{2 * size:g}z"
        return f'<circle {kind} cx="{x}" cy="{y}" r="{size}"/><path class="half" d="{half}"/>'
    if outcome == NOT_SUPPORTED:
        side = f"{2 * size:g}"
        return f'<path {kind} d="M{x - size:g},{y - size:g}l{side},{side}m0,-{side}l-{side},{side}"/>'
    return f'<circle {kind} cx="{x}" cy="{y}" r="{size - 0.5:g}"/>'


def legend_mark(outcome: str) -> Markup:
    """The mark of an outcome for use beside its name."""
    return Markup(
        f'<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{mark(outcome, 7, 7)}</svg>'
    )


def beyond(verdict: Verdict) -> float:
    """How far the effect lies beyond its threshold, in half-widths of its interval; for sorting.

    Negative where it lies on the other side. An exact effect: in powers of ten. -inf where nothing was measured.
    """
    if not math.isfinite(verdict.effect):
        return -math.inf
    scale = scale_of(verdict)
    effect = scale.to_line(verdict.effect)
    if verdict.kind == "exact":
        return (effect - scale.to_line(verdict.threshold)) / math.log(10)
    if verdict.kind == "equal":
        distance = scale.to_line(limits_of(verdict)[1]) - abs(effect)
    else:
        distance = effect - scale.to_line(verdict.threshold)
    if not (math.isfinite(verdict.low) and math.isfinite(verdict.high)):
        return 0.0
    half = abs(scale.to_line(verdict.high) - scale.to_line(verdict.low)) / 2
    return distance / half if half else math.copysign(math.inf, distance)
