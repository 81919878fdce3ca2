"""What an experiment asserts, fixed before it runs: the sentence, the effect that is measured, and what counts."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, astuple, dataclass, is_dataclass
from functools import cache, partial
from types import FunctionType

import xarray as xr

KINDS = ("above", "below", "equal", "exact")
CONSTANTS = (bool, int, float, str, tuple, list, dict)  # the types of the constants that an effect may depend on


@dataclass(frozen=True)
class Compared:
    """An effect: the values of one arm against those of another, seed by seed and cell by cell.

    Attributes:
      values: values(results) -> array with `axis` among its axes.
      arm: the value of `axis` that is looked at.
      against: the one it is held against.
      axis: name of the arms' axis.
      ratio: whether the effect is arm / against, else arm - against.
    """

    values: Callable[[xr.Dataset], xr.DataArray]
    arm: str = "batch norm"
    against: str = "plain"
    axis: str = "arm"
    ratio: bool = False

    def __call__(self, results: xr.Dataset) -> xr.DataArray:
        """The effect."""
        values = self.values(results)
        first, second = (values.sel({self.axis: arm}, drop=True) for arm in (self.arm, self.against))
        return first / second if self.ratio else first - second

    @property
    def words(self) -> str:
        """What is compared."""
        return f"{self.arm} {'over' if self.ratio else 'minus'} {self.against}"

    def found(self, results: xr.Dataset) -> str:
        """The mean of both arms over the cells that are known."""
        both = self.values(results).sel({self.axis: [self.arm, self.against]})
        known = both.notnull().all([axis for axis in both.dims if axis in (self.axis, "seed", "round")])
        if not known.any():
            return ""
        first, second = (f"{float(both.where(known).sel({self.axis: a}).mean()):.4g}" for a in (self.arm, self.against))
        return f"Mean {first} ({self.arm}) against {second} ({self.against})."


@dataclass(frozen=True)
class Least:
    """An effect: the least of all cells, seed by seed, for what is claimed to hold everywhere.

    Attributes:
      values: values(results) -> array with the axes `over` and `by`; a cell that no seed has is left out.
      by: the axis along which a reader is shown where it holds less.
      over: the axis of independent repetitions.
    """

    values: Callable[[xr.Dataset], xr.DataArray]
    by: str
    over: str = "seed"

    def __call__(self, results: xr.Dataset) -> xr.DataArray:
        """The effect; nan for a seed that lacks a cell which others have."""
        values = self.values(results)
        return self._least(values, [axis for axis in values.dims if axis != self.over])

    def _least(self, values: xr.DataArray, axes: Sequence[Hashable]) -> xr.DataArray:
        lacking = values.isnull() & values.notnull().any(self.over)
        return values.min(axes).where(~lacking.any(axes))

    def found(self, results: xr.Dataset) -> str:
        """The mean over seeds of the least, for each value of `by`."""
        values = self.values(results)
        least = self._least(values, [axis for axis in values.dims if axis not in (self.over, self.by)]).mean(self.over)
        cells = (f"{value} {float(least.sel({self.by: value})):.4g}" for value in least[self.by].values)
        return f"Least by {self.by}: {'; '.join(cells)}."


@dataclass(frozen=True)
class Claim:
    """One sentence that the data can support or not; exactly one of `above`, `below`, `equal` and `exact` is given.

    Attributes:
      sentence: the claim, as a person would say it.
      effect: effect(results) -> array with the axis `over`; its other axes are the claim's cells. The verdict is that
        of the mean over all cells, taken separately for every seed; a reader is shown every cell.
      measures: what the effect is, in words: "final test accuracy, batch norm minus plain, rates 1 and 2".
      unit: of the effect, such as "test accuracy gained".
      above: supported if the 95% interval of the mean lies above this.
      below: supported if it lies below this.
      equal: supported if it lies within this distance of 0 (of 1 for a ratio): "both learn alike".
      exact: supported if no value of the effect is further from 0 than this; no interval.
      ratio: the effect is a positive ratio; means are geometric.
      over: the axis of independent repetitions, from which the interval comes.
      precision: half-width of the interval that the planned number of seeds should reach; half the distance of the
        threshold from no effect where not given.
      source: where the claim is made, if that is not the experiment's source.
      found: found(results) -> a sentence with the figures behind the effect; no part of the criterion.
      standalone: the sentence where it is read alone, if `sentence` refers to one before it ("And it is faster."); no
        part of the criterion.
      dispute: the question on which sources contradict each other, such as "Does noise help?". The report puts the
        claims of all experiments that name the same one side by side; no part of the criterion.
    """

    sentence: str
    effect: Callable[[xr.Dataset], xr.DataArray]
    _: KW_ONLY
    measures: str
    unit: str
    above: float | None = None
    below: float | None = None
    equal: float | None = None
    exact: float | None = None
    ratio: bool = False
    over: str = "seed"
    precision: float | None = None
    source: str = ""
    found: Callable[[xr.Dataset], str] | None = None
    standalone: str = ""
    dispute: str = ""

    def __post_init__(self):
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.sentence!r} has {given or 'none'} of {', '.join(KINDS)}; give exactly one.")
        if isinstance(self.effect, Compared) and self.effect.ratio:
            object.__setattr__(self, "ratio", True)

        if self.ratio and self.threshold <= 0:
            raise ValueError(
                f"{self.sentence!r} is about a ratio; its threshold of {self.threshold:g} is not positive."
            )

    @property
    def kind(self) -> str:
        """Which of KINDS was given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def threshold(self) -> float:
        """The number that was given with the kind."""
        return getattr(self, self.kind)

    @property
    def neutral(self) -> float:
        """The value of no effect."""
        return 1.0 if self.ratio else 0.0

    @property
    def criterion(self) -> str:
        """The rule in words."""
        measures = self.measures[:1].upper() + self.measures[1:]
        if isinstance(self.effect, Compared):
            measures += f": {self.effect.words}"
        if isinstance(self.effect, Least):
            measures += ", the least of all cells"
        if self.kind == "exact":
            return f"{measures}; supported if the largest is at most {self.threshold:g}."
        mean = "geometric mean" if self.ratio else "mean"
        rule = {
            "above": f"above {self.threshold:g}",
            "below": f"below {self.threshold:g}",
            "equal": f"within {self.threshold:g} of {self.neutral:g}",
        }[self.kind]
        return f"{measures}; supported if the 95% interval of the {mean} over {self.over}s is {rule}."

    def in_figures(self, results: xr.Dataset) -> str:
        """The figures behind the effect, in a sentence; empty if there is none."""
        if self.found is not None:
            return self.found(results)
        return self.effect.found(results) if isinstance(self.effect, Compared | Least) else ""


def fingerprint(claims: Sequence[Claim]) -> str:
    """SHA-256 of what fixes the claims: sentence, kind, threshold, unit, and the source of the effect.

    The source is that of the effect's function and of the functions of the same module that it calls, with the
    constants that they use; layout and comments do not count.
    """
    parts = [(c.sentence, c.kind, c.threshold, c.unit, c.ratio, c.over, *source_of(c.effect)) for c in claims]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def source_of(effect: Callable) -> list[str]:
    """The code of an effect and of the functions of its module that it uses, each without layout and comments."""
    found: dict[str, str] = {}
    waiting: list = [effect]
    while waiting:
        one = waiting.pop()
        if is_dataclass(one):
            found[f"{type(one).__name__}:{id(one)}"] = repr([v for v in astuple(one) if not callable(v)])
            waiting += [v for v in astuple(one) if callable(v)]
        elif isinstance(one, partial):
            waiting += [one.func]
            found[f"partial:{id(one)}"] = repr((one.args, one.keywords))
        elif (name := _name(one)) and name not in found:
            found[name] = _code(one)
            used = {used: one.__globals__[used] for used in sorted({*_names(one.__code__)}) if used in one.__globals__}
            waiting += [v for v in used.values() if isinstance(v, FunctionType) and v.__module__ == one.__module__]
            found[f"{name} uses"] = repr({used: _plain(v) for used, v in used.items() if isinstance(v, CONSTANTS)})
            inner = [cell.cell_contents for cell in one.__closure__ or ()]
            waiting += [v for v in inner if isinstance(v, FunctionType)]
            found[f"{name} closes over"] = repr([v for v in inner if not callable(v)])
    return sorted(found.values())


def _plain(value):
    """A constant without what has no lasting `repr`, such as a function in a dictionary."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, CONSTANTS) else type(value).__name__


def _name(function) -> str | None:
    code = getattr(function, "__code__", None)
    return None if code is None else f"{function.__qualname__}:{code.co_firstlineno}:{next(_columns(code))}"


def _columns(code):
    return (place[2] for place in code.co_positions() if place[2])


def _names(code) -> list[str]:
    """The global names that a function uses, those of functions inside it included."""
    inner = [name for constant in code.co_consts if inspect.iscode(constant) for name in _names(constant)]
    return [*code.co_names, *inner]


@cache
def _code(function) -> str:
    """The definition as `ast` writes it; a lambda is found by the place at which its code begins."""
    if function.__name__ != "<lambda>":
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    places = [(place[0], place[2]) for place in function.__code__.co_positions() if place[0] and place[2]]
    tree = ast.parse("".join(inspect.findsource(function)[0]))
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    around = [n for n in lambdas if (n.lineno, n.col_offset) <= min(places) <= (n.end_lineno, n.end_col_offset)]
    return ast.unparse(max(around, key=lambda node: (node.lineno, node.col_offset)))
