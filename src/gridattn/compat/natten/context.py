"""Switches of NATTEN that are global to the process.

They can be set, read back, and refuse what NATTEN refuses. The backends here have no KV parallelism and no variant that
trades memory for speed, and they compile nothing by themselves, so no switch changes how anything is computed.
"""

from dataclasses import dataclass

from gridattn.ops.common import check_choice

MEMORY_PREFERENCES = ("default", "strict", "unrestricted")


@dataclass
class _Switches:
    deterministic: bool = False
    kv_parallelism: bool = True
    memory_preference: str = "default"
    flex_compile: bool = False
    flex_compile_backprop: bool = False


_switches = _Switches()


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Asks for deterministic backward passes, which turns KV parallelism off and keeps it off until `mode=False`.

    PyTorch's own kernels follow `torch.use_deterministic_algorithms`, which this does not touch.

    Example:
        >>> use_deterministic_algorithms(True)
        >>> is_kv_parallelism_in_fused_na_enabled()
        False
        >>> use_deterministic_algorithms(False)
        >>> use_kv_parallelism_in_fused_na(True)
    """
    _switches.deterministic = bool(mode)
    if mode:
        _switches.kv_parallelism = False


def are_deterministic_algorithms_enabled() -> bool:
    """Whether deterministic backward passes were asked for."""
    return _switches.deterministic


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Allows backward passes that split the keys over workers.

    Raises:
        RuntimeError: allowed while deterministic algorithms are on, with which it cannot be combined.
    """
    if mode and _switches.deterministic:
        raise RuntimeError(
            "KV parallelism is not deterministic and deterministic algorithms are enabled; "
            "call use_deterministic_algorithms(False) first"
        )
    _switches.kv_parallelism = bool(mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether KV parallelism is allowed."""
    return _switches.kv_parallelism


def set_memory_usage_preference(pref: str = "default") -> None:
    """Says how much memory backward passes may take: "default", "strict" or "unrestricted".

    Raises:
        ValueError: another name.
    """
    check_choice("pref", pref, MEMORY_PREFERENCES)
    _switches.memory_preference = pref


def get_memory_usage_preference() -> str:
    """The memory preference, by name."""
    return _switches.memory_preference


def is_memory_usage_default() -> bool:
    """Whether the memory preference is "default"."""
    return _switches.memory_preference == "default"


def is_memory_usage_strict() -> bool:
    """Whether the memory preference is "strict"."""
    return _switches.memory_preference == "strict"


def is_memory_usage_unrestricted() -> bool:
    """Whether the memory preference is "unrestricted"."""
    return _switches.memory_preference == "unrestricted"


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Allows (or not) compiled Flex Attention, and its compiled backward pass.

    Example:
        >>> allow_flex_compile()
        >>> is_flex_compile_allowed(), is_flex_compile_backprop_allowed()
        (True, False)
        >>> disable_flex_compile()
    """
    _switches.flex_compile = bool(mode)
    _switches.flex_compile_backprop = bool(backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Allows (or not) the compiled backward pass of Flex Attention."""
    _switches.flex_compile_backprop = bool(mode)


def disable_flex_compile() -> None:
    """Takes back `allow_flex_compile`, the backward pass included."""
    allow_flex_compile(mode=False, backprop=False)


def disable_flex_compile_backprop() -> None:
    """Takes back `allow_flex_compile_backprop`."""
    allow_flex_compile_backprop(mode=False)


def is_flex_compile_allowed() -> bool:
    """Whether compiled Flex Attention is allowed."""
    return _switches.flex_compile


def is_flex_compile_backprop_allowed() -> bool:
    """Whether the compiled backward pass of Flex Attention is allowed."""
    return _switches.flex_compile_backprop
