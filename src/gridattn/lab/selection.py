"""From what a user writes to what the lab works on: attentions by name or pattern, and options of single attentions."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gridattn.layers import attention_info, list_attentions
from gridattn.layers.raster import runs_on


def select_attentions(names: str | Sequence[str], rank: int = 2) -> list[str]:
    """Registered attentions by name, shell pattern or "all", each once, in the order asked for.

    Args:
        names: names or patterns, in one string with commas between or as a sequence of such strings.
        rank: number of grid axes; patterns match only what works on it.

    Raises:
        ValueError: nothing asked for, an unknown name, a pattern without a match, or a named attention of other rank.

    Example:
        >>> select_attentions("global,*lobal")
        ['global']
    """
    wanted = [part.strip() for text in ([names] if isinstance(names, str) else names) for part in text.split(",")]
    wanted = [part for part in wanted if part]
    if not wanted:
        raise ValueError("attention names nothing; give names with commas between, a pattern, or 'all'")
    chosen: list[str] = []
    for part in wanted:
        if part == "all" or any(sign in part for sign in "*?["):
            found = [name for name in list_attentions("*" if part == "all" else part) if runs_on(name, rank)]
            if not found:
                raise ValueError(f"attention={part!r} matches nothing; known: {', '.join(list_attentions())}")
            chosen += found
        else:
            if not runs_on(part, rank):
                raise ValueError(
                    f"attention={part!r} works on grids of {attention_info(part).ranks} axes, not on {rank}"
                )
            chosen.append(part)
    return list(dict.fromkeys(chosen))


def parse_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of single attentions from `name.key=value` texts; the value is read as YAML.

    Raises:
        ValueError: a text of another form, an unknown attention or an option that it does not have.

    Example:
        >>> parse_options(["global.qkv_bias=false"])
        {'global': {'qkv_bias': False}}
    """
    options: dict[str, dict[str, Any]] = {}
    for target, value in parse_values(texts).items():
        name, dot, key = target.partition(".")
        if not (dot and name and key):
            raise ValueError(f"option={target!r} is not of the form NAME.KEY, such as neighborhood.kernel_size=7")
        options.setdefault(name, {})[key] = value
    check_options(options)
    return options


def parse_values(texts: Sequence[str]) -> dict[str, Any]:
    """Values by key from `key=value` texts; the value is read as YAML.

    Raises:
        ValueError: a text of another form.

    Example:
        >>> parse_values(["lr=0.01", "seeds=[0, 1]"])
        {'lr': 0.01, 'seeds': [0, 1]}
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"{text!r} is not of the form KEY=VALUE")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r} has a value that cannot be read: {' '.join(str(error).split())}") from None
    return values


def parse_ints(name: str, text: str) -> list[int]:
    """Ints from a text with commas between.

    Raises:
        ValueError: a part that is not an int of at least 0.

    Example:
        >>> parse_ints("seeds", "0,1,2")
        [0, 1, 2]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}={text!r} is not allowed; ints of at least 0 with commas between")
    return [int(part) for part in parts]


def parse_query(text: str) -> tuple[float, float]:
    """ROW,COLUMN of a query: fractions of the image where written with a point, pixels otherwise.

    Raises:
        ValueError: a text of another form.

    Example:
        >>> parse_query("0.5,0.25"), parse_query("100,20")
        ((0.5, 0.25), (100, 20))
    """
    parts = text.split(",")
    kind = float if "." in text else int
    try:
        row, column = (kind(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"query={text!r} is not of the form ROW,COLUMN, in pixels such as 120,80 or as fractions such as 0.5,0.25"
        ) from None
    return row, column


def check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError for an unknown attention, or an option that it does not have."""
    for name, given in options.items():
        info = attention_info(name)
        for key in given:
            if key not in info.options:
                raise ValueError(f"attention {name!r} has no option {key!r}; allowed: {', '.join(info.options)}")
