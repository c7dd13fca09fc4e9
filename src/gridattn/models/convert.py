"""A published checkpoint as one of ours, with an account of what became of every tensor in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gridattn.models.checkpoint import save_model
from gridattn.models.registry import create_model
from gridattn.models.state import CheckpointError, load_checkpoint, load_strict, official_state, with_own_head


@dataclass(frozen=True)
class Conversion:
    """A model with the weights of a published file, and what became of the file's tensors.

    Attributes:
        model: built by `create_model`, in eval mode.
        used: name in the file -> names of ours that hold it, whole or in part.
        resized: name of ours -> shapes of what it was interpolated from, and its own.
        ignored: name in the file -> why nothing was loaded from it.
        kept: names of ours that the file has nothing for, such as counters of batches; they keep their initial values.
    """

    model: Any
    used: dict[str, list[str]]
    resized: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]]
    ignored: dict[str, str]
    kept: list[str]


def convert_checkpoint(
    path: str | PathLike[str],
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> Conversion:
    """Loads a published checkpoint, or one of ours, into a new model; no tensor is lost without a stated reason.

    Position embeddings and tables of relative position biases are interpolated where the image size or the window
    differs. Tensors that hold nothing to load are those that the family names in `official_ignored`.

    Args:
        path: the weight file, see `load_checkpoint`.
        name: one of `list_models()`.
        img_size: nominal image size of the model; None takes the variant's own.
        num_classes: classes of the head. Where the file's head has another number, the model's own stays as it is
            initialised; 0 leaves the head out. None takes the variant's own number, which must be that of the file.
        **options: further keywords of the family.

    Returns:
        The model and the account.

    Raises:
        ValueError: an unknown name, or an option that the family refuses.
        CheckpointError: a file that cannot be read or is of another model; a tensor that is neither used nor ignored.

    Example:
        >>> import tempfile
        >>> path = save_model(create_model("grid_vit_micro", num_classes=3), tempfile.mkdtemp())
        >>> done = convert_checkpoint(path, "grid_vit_micro", num_classes=5)
        >>> sorted(done.ignored), done.ignored["head.bias"]
        (['head.bias', 'head.weight'], 'head for other classes than num_classes=5')
    """
    model = create_model(name, num_classes=num_classes, img_size=img_size, **options)
    state = load_checkpoint(path)
    ours = own_head = {}
    try:
        with _Lineage(state) as lineage:
            ours = official_state(model, state)
        own_head = with_own_head(ours, model.state_dict())
        chosen = ours if num_classes is None else own_head
        load_strict(model, chosen)
    except CheckpointError as error:
        hint = ""
        if num_classes is None and any(own_head.get(key) is not tensor for key, tensor in ours.items()):
            hint = "; give num_classes where only the head differs"
        raise CheckpointError(f"checkpoint {str(path)!r}: {error}{hint}") from None

    used: dict[str, list[str]] = {}
    for ours_name, tensor in chosen.items():
        for source in lineage.sources(tensor):
            used.setdefault(source, []).append(ours_name)
    heads = {s for key, tensor in ours.items() if chosen.get(key) is not tensor for s in lineage.sources(tensor)}
    why = "num_classes=0 leaves the head out" if num_classes == 0 else f"head for other classes than {num_classes=}"
    ignored = {key: why for key in state if key in heads and key not in used}
    ignored |= {key: reason for key in state if (reason := model.ignored_reason(key)) is not None}
    lost = [key for key in state if key not in used and key not in ignored]
    if lost:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: {type(model).__name__} neither uses nor ignores {_names(lost)} for a reason"
        )
    resized = {
        key: ([tuple(state[source].shape) for source in sorted(lineage.sources(tensor))], tuple(tensor.shape))
        for key, tensor in chosen.items()
        if lineage.is_resized(tensor)
    }
    kept = [key for key, tensor in chosen.items() if not lineage.sources(tensor)]
    return Conversion(model.eval(), used, resized, ignored, kept)


def convert(
    official: str | PathLike[str],
    name: str,
    output: str | PathLike[str],
    *,
    img_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Conversion:
    """Converts a checkpoint, see `convert_checkpoint`, and saves it, see `save_model`.

    Args:
        official: the weight file.
        name: one of `list_models()`.
        output: the `*.safetensors` file to write; the call that rebuilds the model is put beside it as `*.json`.
        img_size: as in `convert_checkpoint`.
        num_classes: as in `convert_checkpoint`.

    Raises:
        ValueError: an output with another suffix, or one that is the input; and as `convert_checkpoint`.
        CheckpointError: as `convert_checkpoint`. Nothing is written then.
    """
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ValueError(f"output={str(path)!r} is not allowed; a file *.safetensors is")
    if path.exists() and Path(official).exists() and path.samefile(official):
        raise ValueError(f"output={str(path)!r} is the checkpoint that is read; give another file")
    done = convert_checkpoint(official, name, img_size=img_size, num_classes=num_classes)
    save_model(done.model, path)
    return done


def summary(done: Conversion) -> list[str]:
    """What became of the tensors, a line each kind."""
    lines = [f"used: {len(done.used)} tensors, for {len({n for names in done.used.values() for n in names})} of ours"]
    for name, (old, new) in done.resized.items():
        lines.append(f"resized: {name} {' and '.join(map(str, old))} -> {new}")
    for reason in dict.fromkeys(done.ignored.values()):
        lines.append(f"ignored: {_names(key for key, why in done.ignored.items() if why == reason)}: {reason}")
    if done.kept:
        lines.append(f"kept as initialised: {_names(done.kept)}: not in the file")
    return lines


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


class _Lineage(TorchFunctionMode):
    """Watches the functions that tensors go through, and knows from which named ones a result was made."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        # The tensors are held, so that no other one is given the id of one that is gone.
        self._known = {id(tensor): (tensor, frozenset([name]), False) for name, tensor in named.items()}

    def sources(self, tensor: Tensor) -> frozenset[str]:
        """Names of the tensors that `tensor` was made from."""
        return self._known[id(tensor)][1] if id(tensor) in self._known else frozenset()

    def is_resized(self, tensor: Tensor) -> bool:
        """Whether an interpolation lies on the way."""
        return id(tensor) in self._known and self._known[id(tensor)][2]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parents = [self._known[id(t)] for t in _tensors([args, kwargs]) if id(t) in self._known]
        if parents:
            sources = frozenset().union(*(names for _, names, _ in parents))
            resized = func is F.interpolate or any(flag for *_, flag in parents)
            for tensor in _tensors(result):
                self._known[id(tensor)] = tensor, sources, resized
        return result


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
