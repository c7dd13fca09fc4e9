"""Calls a function with command line arguments, by its signature."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import jsonargparse

from gridattn.systems.settings import check_names


def call(function: Callable[..., Any], argv: Sequence[str], prog: str) -> Any:
    """Calls `function` with `--name value` arguments; what stands alone goes, as a list, to its first parameter.

    Args:
        function: annotated and documented; its docstring is the help text.
        argv: the arguments. `--help` prints the help and exits.
        prog: name of the program in the help.

    Returns:
        What the function returns.

    Raises:
        ValueError: an unknown name, a missing argument or a value of the wrong type.

    Example:
        >>> def total(numbers: list[int], scale: int = 1) -> int:
        ...     return scale * sum(numbers)
        >>> call(total, ["1", "2", "--scale", "10"], "total")
        30
    """
    parameters = inspect.signature(function).parameters
    named, alone = _split(argv)
    check_names("setting", named, {*parameters, "help"})
    if alone:
        first = next(iter(parameters))
        if first in named or not str(parameters[first].annotation).startswith("list"):
            raise ValueError(f"argument {alone[0]!r} belongs to no setting; allowed: {_names(parameters)}")
        named[first] = json.dumps(alone)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_function_arguments(function)
    try:
        values = parser.parse_args(
            [f"--{name}={value}" if name != "help" else "--help" for name, value in named.items()]
        )
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    missing = [name for name, p in parameters.items() if p.default is p.empty and values.get(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing; {prog} --help lists the settings")
    return function(**values.as_dict())


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Values by name, and what stands alone; a name without a value means true."""
    named: dict[str, str] = {}
    alone: list[str] = []
    waiting: str | None = None
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            named[name] = value if equals else "true"
            waiting = None if equals else name
        elif waiting is not None:
            named[waiting], waiting = argument, None
        else:
            alone.append(argument)
    return named, alone


def _names(parameters: Any) -> str:
    return ", ".join(f"--{name}" for name in parameters)
