"""Compare a student's function with a reference on hidden inputs; say in one sentence what is wrong, never by a traceback."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]  # arguments by the names that messages use, in the order in which they are passed


class Wrong(Exception):
    """What is wrong with an answer, as the rest of a sentence that begins with "it"."""


class Unfinished(Exception):
    """The stub is still there."""


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns."""
    return function(*arguments)


@dataclass(frozen=True)
class Check:
    """The judge of one exercise: call it with the function that was written, and it prints one sentence.

    Attributes:
        reference: the right answer, by the kit, torch or diffusers; takes the arguments of a case.
        cases: makes the hidden inputs, the same at every call; messages name their arguments by the keys.
        right: what a right answer is told.
        mistakes: ``{sentence: function}``: known ways to go wrong, each with a function that gives the same wrong answer.
        seen: what is compared, ``seen(function, *arguments)``; default: what the function returns.
        gives: type that the function must return, where ``seen`` goes on with it.
        tolerance: largest accepted difference, as a share of the largest expected magnitude.
    """

    reference: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    right: str = "the same as the kit's own."
    mistakes: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    seen: Callable[..., Any] = plainly
    gives: type = object
    tolerance: float = 1e-4

    def __call__(self, yours: Any) -> None:
        """Print the verdict on the function ``yours``."""
        print(self.verdict(yours))

    def verdict(self, yours: Any) -> str:
        """One sentence that begins with "right", "not yet" or "not right". Raises nothing that ``yours`` does wrong."""
        if not callable(yours):
            return f"not right: pass the function itself, without calling it; got {_kind(yours)}."
        try:
            self._judge(yours)
        except Unfinished:
            return "not yet: replace the line that raises NotImplementedError, run that cell, then this one."
        except Wrong as wrong:
            return f"not right: {wrong}."
        return f"right: {self.right}"

    def _judge(self, yours):
        cases = self.cases()
        found = [self._answer(yours, case) for case in cases]
        for case, answer in zip(cases, found, strict=True):
            try:
                compare(self._seen(self.reference, case), answer, case, self.tolerance)
            except Wrong as wrong:
                known = next((sentence for sentence, mistake in self.mistakes.items() if self._same(mistake, cases, found)), None)
                raise Wrong(f"{known}; {wrong}" if known else wrong) from None

    def _answer(self, yours, case):
        """What is seen of ``yours``, on copies of the inputs."""
        given = deepcopy(case)
        try:
            found = self._seen(_guarded(yours, self.gives), given)
        except (Wrong, Unfinished):
            raise
        except Exception as error:
            raise Wrong(f"what it returns cannot be used: {_first_line(error)}") from None
        for name, value in case.items():
            if isinstance(value, Tensor) and not torch.equal(value, given[name]):
                raise Wrong(f"it changes its argument {name} in place; work on a copy")
        return found

    def _seen(self, function, case):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.seen(function, *case.values())

    def _same(self, mistake, cases, found):
        """Whether a known mistake gives these answers."""
        try:
            for case, answer in zip(cases, found, strict=True):
                compare(self._seen(mistake, deepcopy(case)), answer, case, self.tolerance)
        except Exception:
            return False
        return True


def _guarded(yours, gives):
    """``yours``, whose exceptions become sentences."""

    def call(*arguments):
        try:
            found = yours(*arguments)
        except NotImplementedError as error:
            if error.args:  # torch's own: an operation that a dtype lacks
                raise Wrong(f"it raises NotImplementedError: {_first_line(error)}") from None
            raise Unfinished from None
        except Exception as error:
            raise Wrong(f"it raises {type(error).__name__}: {_first_line(error)}") from None
        if found is None:
            raise Wrong("it returns nothing; end the function with return")
        if not isinstance(found, gives):
            raise Wrong(f"it returns {_kind(found)}; expected {_named(gives)}")
        return found

    return call


def compare(expected: Any, found: Any, case: Case, tolerance: float = 1e-4, place: str = "") -> None:
    """Wrong: ``found`` differs from ``expected`` in kind, number, shape or value. ``place``: of both in a larger answer."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise Wrong(f"{place}it returns {_kind(found)}; expected a dict")
        if list(found) != list(expected):
            raise Wrong(f"{place}its keys are {_listed(found)}; expected {_listed(expected)}")
        for key, value in expected.items():
            compare(value, found[key], case, tolerance, f"{place}{key if isinstance(key, str) else f'at {_short(key)}'}: ")
    elif isinstance(expected, (tuple, list)):
        if not isinstance(found, (tuple, list)):
            raise Wrong(f"{place}it returns {_kind(found)}; expected {len(expected)} values")
        if len(found) != len(expected):
            raise Wrong(f"{place}it returns {len(found)} values; expected {len(expected)}")
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            compare(one, other, case, tolerance, f"{place}value {i}: ")
    elif isinstance(expected, Tensor):
        _compare_tensors(expected, found, case, tolerance, place)
    elif isinstance(expected, Real) and not isinstance(expected, bool):
        number = _number(found)
        if number is None:
            raise Wrong(f"{place}it returns {_kind(found)}; expected a number")
        if number != expected and not abs(number - expected) <= tolerance * abs(expected) + 1e-9:
            raise Wrong(f"{place}{_at(case)}it gives {_short(number)}, expected {_short(expected)}")
    elif type(found := _plain(found)) is not type(expected):
        raise Wrong(f"{place}it returns {_kind(found)}; expected {_kind(expected)}")
    elif found != expected:
        raise Wrong(f"{place}{_at(case)}it gives {_short(found)}, expected {_short(expected)}")


def _compare_tensors(expected, found, case, tolerance, place):
    if expected.dim() == 0 and _number(found) is not None:
        found = torch.as_tensor(_number(found), dtype=expected.dtype)
    if not isinstance(found, Tensor):
        raise Wrong(f"{place}it returns {_kind(found)}; expected a tensor of shape {list(expected.shape)}")
    if found.shape != expected.shape:
        raise Wrong(f"{place}it returns shape {list(found.shape)}; expected {list(expected.shape)}")
    exact = not expected.is_floating_point()
    if found.dtype != expected.dtype if exact else not found.is_floating_point():
        raise Wrong(f"{place}it returns {found.dtype}; expected {expected.dtype}")
    off = (found.detach().double() - expected.detach().double()).abs().nan_to_num(torch.inf)
    if off.numel() and off.max() > (0 if exact else tolerance * expected.detach().double().abs().max()):
        at = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
        where = _at(case, expected.shape, at)
        raise Wrong(f"{place}{where}it gives {_short(found[*at].item())}, expected {_short(expected[*at].item())}")


def _at(case, shape=None, at=None):
    """Where an answer is wrong: the arguments that are numbers, and the entry of those that are shaped as the answer."""
    own = {name: v[*at] for name, v in case.items() if at and isinstance(v, Tensor) and v.shape == shape}
    index = "" if own or not at else f"at index {at} "
    shown = own | {name: v for name, v in case.items() if _number(v) is not None or isinstance(v, (str, bool))}
    told = ", ".join(f"{name} = {_short(_number(v) if _number(v) is not None else v)}" for name, v in shown.items())
    return f"{index}for {told} " if told else index


def _plain(value):
    """A truth value as Python has it, whatever library it is from."""
    return value.item() if hasattr(value, "dtype") and getattr(value, "shape", None) == () else value


def _number(value):
    """A number as a float, whatever library it is from; ``None``: it is none."""
    value = _plain(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _listed(values):
    return ", ".join(map(_short, values)) or "none"


def _named(kind):
    article = "an" if kind.__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {kind.__name__}"


def _kind(value):
    return _named(type(value))


def _first_line(error):
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")
