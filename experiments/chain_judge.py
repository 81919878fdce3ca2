"""The claims of the experiment `chain` and how each is judged; every criterion stood before the committed run."""

import numpy as np

from experiments import chain_rows
from experiments.chain_rows import ARITHMETIC, ARMS, CHANGES, FAILS, HOLDS, MAIN_RATE, RATES, SCALES
from experiments.framework.verdict import Verdict, verdict

PLAIN, NORMALIZED, WITH_EPSILON, THROUGHOUT = ARMS
EXACT, FLOAT32 = ARITHMETIC
MAIN = RATES.index(MAIN_RATE)


def pick(rows: list[dict], name: str, **labels: object) -> np.ndarray:
    """Entry `name` of the rows that carry all `labels`, stacked: [rows, ..., seeds]."""
    return np.array([row[name] for row in rows if all(row.get(key) == value for key, value in labels.items())])


def growth(rows: list[dict], settings: dict, scale: str) -> np.ndarray:
    """Factor per layer, [seeds], by which the second-order term of the plain chain grows over the forecast.

    From the shallowest to the deepest chain. That there are also l - 1 times as many such terms is divided out.
    """
    ends = settings["depths"][0], settings["depths"][-1]
    first, last = (pick(rows, "second", arm=PLAIN, scale=scale, depth=depth)[0] / (depth - 1) for depth in ends)
    return (last / first) ** (1 / (ends[1] - ends[0]))


def judge(settings: dict, rows: list[dict]) -> list[Verdict]:
    """The claims of the book one by one, then what they need to be true of the library's batch norm."""
    return [
        *judge_plain(settings, rows),
        *judge_step(settings, rows),
        *judge_below(settings, rows),
        judge_corners(rows),
    ]


def judge_plain(settings: dict, rows: list[dict]) -> list[Verdict]:
    """What the book says of the chain without normalization."""
    shallow, deep = settings["depths"][0], settings["depths"][-1]

    def at(name: str, scale: str, depth: int = deep) -> np.ndarray:
        return pick(rows, name, arm=PLAIN, scale=scale, depth=depth)[0]

    errors = {scale: (at("error", scale, shallow)[MAIN], at("error", scale)[MAIN]) for scale in SCALES}
    seen = "; ".join(f"{scale} {percent(few)} and {percent(many)}" for scale, (few, many) in errors.items())
    apart = at("usable", "around 0.9") / at("usable", "around 1.1")
    orders = at("orders", "around 1.1")
    rising, falling = growth(rows, settings, "around 1.1"), 1 / growth(rows, settings, "around 0.9")
    return [
        verdict(
            "In a deep chain a gradient step does not do what its first-order forecast says.",
            errors["around 1.0"][1] - errors["around 1.0"][0],
            threshold=FAILS,
            unit="relative error",
            criterion=f"Weights around 1.0, rate {MAIN_RATE:g}: |true - forecast| / |forecast| of the deepest chain"
            f" less that of the shallowest; support above {FAILS:g}.",
            sentence=f"Off at depth {shallow} and at depth {deep}, by weights: {seen}.",
        ),
        verdict(
            "Where weights exceed 1 the second-order term grows exponentially with depth.",
            rising,
            threshold=1.05,
            unit="times per layer",
            ratio=True,
            criterion="Weights around 1.1: growth per layer of |second-order term / forecast|, the number of such terms"
            " divided out; support above 1.05 (1.1 is expected).",
            sentence=f"It grows {np.mean(rising):.3f} times with each layer.",
        ),
        verdict(
            "Where weights are below 1 the second-order term dies out exponentially.",
            falling,
            threshold=1.05,
            unit="times per layer",
            ratio=True,
            criterion="Weights around 0.9: shrinking per layer, measured likewise; support above 1.05 (1 / 0.9 = 1.11"
            " is expected).",
            sentence=f"It shrinks {np.mean(falling):.3f} times with each layer.",
        ),
        verdict(
            "A second-order method would not be enough: still higher orders matter.",
            orders,
            threshold=2,
            unit="orders",
            criterion=f"Weights around 1.1, deepest chain, rate {MAIN_RATE:g}: the lowest order whose partial sums, and"
            f" all later ones, come within {FAILS:g} of the true change; support above 2.",
            sentence=f"{np.mean(orders):.0f} orders out of {deep} are needed.",
        ),
        verdict(
            "The weights decide which learning rate is usable.",
            apart,
            threshold=100,
            unit="times the rate",
            ratio=True,
            criterion=f"Deepest chain: the largest rate whose forecast is within {FAILS:g}, with weights around 0.9"
            " over the same around 1.1; support above 100.",
            sentence=f"At depth {deep} the largest usable rate is {np.mean(at('usable', 'around 0.9')):.2g} around 0.9"
            f" and {np.mean(at('usable', 'around 1.1')):.2g} around 1.1.",
        ),
    ]


def judge_step(settings: dict, rows: list[dict]) -> list[Verdict]:
    """What normalizing does to a step: as in the book, with the library's epsilon, and in every layer."""
    claims = {
        NORMALIZED: "With h normalized, a gradient step does what was forecast, whatever the depth and the weights.",
        WITH_EPSILON: f"The same with the library's default epsilon, {chain_rows.DEFAULT:g}.",
        THROUGHOUT: "The same with the default epsilon and every layer normalized, as networks have it.",
    }
    verdicts = []
    for arm in settings["arms"][1:]:
        holds = {scale: pick(rows, "holds", arm=arm, scale=scale)[:, MAIN].min(axis=0) for scale in SCALES}
        verdicts.append(
            verdict(
                claims[arm],
                np.min(list(holds.values()), axis=0),
                threshold=0.99,
                unit="share of draws",
                criterion=f"Share of draws whose true change is within {HOLDS:g} of the forecast (rate {MAIN_RATE:g}),"
                " at the worst depth and weights; support above 0.99.",
                sentence="At the worst depth, by weights: "
                + "; ".join(f"{scale} {percent(share)}" for scale, share in holds.items())
                + ".",
            )
        )
    top = pick(rows, "top", arm=NORMALIZED).min(axis=0)
    rest = verdict(
        "Under the normalization nothing is left to learn: y = w_l h_hat, and all of the gradient is that of w_l.",
        top,
        threshold=0.999,
        unit="share of the squared gradient",
        criterion="Share of w_l in the squared gradient, at the worst depth and weights; support above 0.999.",
        sentence=f"The lower layers' share is {np.max(1 - top):.1g} at most: h_hat does not depend on the size of any"
        " lower weight. Learning is simple because the lower layers have become useless.",
    )
    return [*verdicts, rest]


def judge_below(settings: dict, rows: list[dict]) -> list[Verdict]:
    """What the last weight sees when the layers below it change."""
    regular = [change for change in CHANGES if change != "one set to zero"]

    def unit(arithmetic: str, scale: str) -> np.ndarray:
        cells = [pick(rows, "unit", arithmetic=arithmetic, scale=scale, change=change) for change in regular]
        return np.concatenate(cells).min(axis=0)

    claims = {
        EXACT: "h_hat stays a unit Gaussian whatever happens below, short of a weight of 0.",
        FLOAT32: f"The same in float32 with the default epsilon, {chain_rows.DEFAULT:g}.",
    }
    verdicts = []
    for arithmetic in settings["arithmetics"]:
        shares = {scale: unit(arithmetic, scale) for scale in SCALES}
        gaussian = pick(rows, "gaussian", arithmetic=arithmetic, change="none").mean()
        verdicts.append(
            verdict(
                claims[arithmetic],
                np.min(list(shares.values()), axis=0),
                threshold=0.99,
                unit="share of draws",
                criterion="Share of draws with mean 0 and variance 1 to"
                f" {chain_rows.CLOSE:g}, after the worst change at the worst depth and weights; support above 0.99.",
                sentence="After the worst change at the worst depth, by weights: "
                + "; ".join(f"{scale} {percent(share)}" for scale, share in shares.items())
                + f". Before any change {percent(gaussian)} pass a 5% test for a Gaussian.",
            )
        )
    updated = {"arithmetic": EXACT, "change": "gradient step"}
    doubled = pick(rows, "doubled", **updated).mean(axis=0)
    deepest = {scale: pick(rows, "doubled", scale=scale, depth=settings["depths"][-1], **updated) for scale in SCALES}
    verdicts.append(
        verdict(
            "Without normalization nearly every update has an extreme effect on the statistics of h.",
            doubled,
            threshold=0.9,
            unit="share of draws",
            criterion=f"Share of draws, all depths and weights, in which a gradient step at rate {MAIN_RATE:g} makes"
            " the variance of h more than double or less than half; support above 0.9.",
            sentence=f"It does so in {percent(doubled)} of the draws. In the deepest chain, by weights: "
            + "; ".join(f"{scale} {percent(share)}" for scale, share in deepest.items())
            + ".",
        )
    )
    return verdicts


def judge_corners(rows: list[dict]) -> Verdict:
    """The cases in which the layers below do matter."""
    expected = {"one set to zero": "collapsed", "one sign flipped": "opposite", "two signs flipped": "same"}

    def share(change: str, name: str) -> np.ndarray:
        return pick(rows, name, arithmetic=EXACT, change=change)

    shares = {change: share(change, name).min(axis=0) for change, name in expected.items()}
    others = [change for change in CHANGES if change not in expected]
    either = [(share(change, "same") + share(change, "opposite")).min(axis=0) for change in others]
    turned = "; ".join(f"{change} {percent(share(change, 'opposite'))}" for change in others if change != "none")
    return verdict(
        "The lower layers have an effect in corner cases only: a weight of 0, or an odd number of signs flipped.",
        np.min([*shares.values(), *either], axis=0),
        threshold=0.99,
        unit="share of draws",
        criterion="Share of draws in which h_hat vanishes with a weight of 0, turns into -h_hat with one sign flipped"
        " and stays with two, and is h_hat or -h_hat after every other change, at the worst depth and weights; support"
        " above 0.99.",
        sentence="; ".join(f"{change}: h_hat {expected[change]} in {percent(seen)}" for change, seen in shares.items())
        + f". Signs turn without being asked to, too: {turned}.",
    )


def percent(values: np.ndarray) -> str:
    """The mean of shares as a percentage of three digits."""
    return f"{100 * np.mean(values):.3g}%"
