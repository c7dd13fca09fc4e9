"""Processors that answer a model's own self-attention by neighborhood attention.

The original processor of an attention still does its projections, norms, rotary embeddings and reshapes. Only its call
of `torch.nn.functional.scaled_dot_product_attention` is answered by `neighborhood_attention`, so that any model whose
processors make that call can be changed.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gridattn.ops.neighborhood import Plan, neighborhood_attention

HIDDEN = -1e4
"""An additive mask hides a key by this number or less."""
TEXT_PLACES = {
    **dict.fromkeys(
        (
            "AuraFlowAttnProcessor2_0",
            "BriaAttnProcessor",
            "BriaFiboAttnProcessor",
            "CogVideoXAttnProcessor2_0",
            "CogView4AttnProcessor",
            "Flux2AttnProcessor",
            "Flux2ParallelSelfAttnProcessor",
            "FluxAttnProcessor",
            "GlmImageAttnProcessor",
            "LongCatImageAttnProcessor",
            "OvisImageAttnProcessor",
            "QwenDoubleStreamAttnProcessor2_0",
        ),
        "first",
    ),
    **dict.fromkeys(
        (
            "FusedJointAttnProcessor2_0",
            "HunyuanImageAttnProcessor",
            "HunyuanVideo15AttnProcessor2_0",
            "HunyuanVideoAttnProcessor2_0",
            "JointAttnProcessor2_0",
        ),
        "last",
    ),
}
"""Where processors of joint attention put the text tokens."""


@dataclass
class Setting:
    """What the processors of one replacement share.

    Attributes:
        plans: neighborhood attention by the number of image tokens.
        step: of the sampling, from 0.
        timestep: of the last call of the model.
        text_seen: text tokens of the last attention that was given them apart from the image.
        calls: how many attentions were computed in which way.
    """

    plans: Mapping[int, Plan]
    dense_steps: int
    unmatched: str
    text: str
    text_tokens: int | None
    backend: str
    step: int = 0
    timestep: float | None = None
    text_seen: int | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def begin(self, timestep: Any) -> None:
        """Notes a call of the model: the next step where the timestep fell, a new sampling where it rose."""
        values = torch.as_tensor(timestep).detach().flatten().float()
        if len(values) == 0 or (values != values[0]).any():
            raise ValueError(f"timestep={values.tolist()} is not allowed with dense_steps; all samples must share one")
        now = values[0].item()
        if self.timestep is None or now > self.timestep:
            self.step = 0
        elif now < self.timestep:
            self.step += 1
        self.timestep = now


@functools.cache
def processor_class(original: type) -> "type[NeighborhoodProcessor]":
    """A processor whose call has the signature of the original's: attentions drop the arguments that are not in it."""

    @functools.wraps(original.__call__)
    def call(self: "NeighborhoodProcessor", attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.attend(attn, hidden_states, *args, **kwargs)

    return type(f"Neighborhood{original.__name__}", (NeighborhoodProcessor,), {"__call__": call})


class NeighborhoodProcessor:
    """Runs a processor whose self-attention is answered by neighborhood attention.

    Args:
        original: the processor.
        name: of the attention, for messages.
        setting: of the replacement.
    """

    def __init__(self, original: Any, name: str, setting: Setting) -> None:
        self.original = original
        self.name = name
        self.setting = setting

    def attend(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the original processor returns; arguments are its own."""
        if self.setting.step < self.setting.dense_steps:
            return self._attend_densely(attn, hidden_states, *args, **kwargs)
        text = kwargs.get("encoder_hidden_states", args[0] if args else None)
        if text is not None:
            self.setting.text_seen = text.shape[1]
        redirect = _Redirect(self, None if text is None else text.shape[1], hidden_states)
        with redirect:
            result = self.original(attn, hidden_states, *args, **kwargs)
        if not redirect.answered:
            raise ValueError(
                f"processor={type(self.original).__name__} of {self.name} did not call scaled_dot_product_attention "
                "on as many queries as keys, so nothing was replaced; set such a processor (AttnProcessor2_0), the "
                "attention backend 'native', or leave this module out by modules="
            )
        return result

    def _attend_densely(self, *args: Any, **kwargs: Any) -> Any:
        self.setting.calls["dense"] += 1
        return self.original(*args, **kwargs)


class _Redirect(TorchFunctionMode):
    """Answers the calls of `scaled_dot_product_attention` in which as many queries as keys take part.

    Attributes:
        answered: whether there was one.
    """

    def __init__(self, processor: NeighborhoodProcessor, text: int | None, hidden_states: Tensor) -> None:
        super().__init__()
        self.processor = processor
        self.setting = processor.setting
        self.text = text
        self.image_shape = tuple(hidden_states.shape[2:]) if hidden_states.ndim == 4 else None
        self.answered = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._answer(*args, **(kwargs or {}))

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        dense = functools.partial(F.scaled_dot_product_attention, attn_mask=attn_mask, **options)
        if query.shape[-2] != key.shape[-2]:
            return dense(query, key, value, dropout_p=dropout_p, is_causal=is_causal)
        self.answered = True
        found = self._match(query.shape[-2])
        self.setting.calls["dense" if found is None else "neighborhood"] += 1
        if found is None:
            return dense(query, key, value, dropout_p=dropout_p, is_causal=is_causal)
        if dropout_p or is_causal:
            raise ValueError(
                f"dropout_p={dropout_p}, is_causal={is_causal} of {self.processor.name} is not allowed; 0, False is"
            )
        plan, text = found
        first = text > 0 and self._text_place() == "first"
        image = slice(text, None) if first else slice(None, prod(plan.grid))
        others = slice(None, text) if first else slice(prod(plan.grid), None)
        visible = _visible_keys(attn_mask, query, self.processor.name)
        out = _attend_image(query, key, value, plan, image, others, visible, options.get("scale"), self.setting.backend)
        if not text:
            return out
        of_text = dense(query[..., others, :], key, value)
        return torch.cat((of_text, out) if first else (out, of_text), dim=-2)

    def _match(self, tokens: int) -> tuple[Plan, int] | None:
        """The plan for so many tokens and how many of them are text; None where they stay dense."""
        setting = self.setting
        counts = [self.text] if self.text is not None else [0, setting.text_tokens or setting.text_seen or 0]
        for text in counts:
            plan = setting.plans.get(tokens - text)
            if plan is not None and self.image_shape in (None, plan.grid):
                return plan, text
        if setting.unmatched == "dense":
            return None
        text = f", {counts[-1]} of them text" if counts[-1] else ""
        shape = "" if self.image_shape is None else f" of a grid {self.image_shape}"
        declared = ", ".join(f"{plan.grid} with {count}" for count, plan in setting.plans.items())
        raise ValueError(
            f"{self.processor.name} attends to {tokens} tokens{shape}{text}; grids={declared} image tokens are "
            "allowed. Declare the grid, or keep others dense by unmatched='dense'"
        )

    def _text_place(self) -> str:
        if self.setting.text != "auto":
            return self.setting.text
        name = type(self.processor.original).__name__
        if name not in TEXT_PLACES:
            raise ValueError(
                f"text='auto' does not know where {name} of {self.processor.name} puts the text tokens; 'first' and "
                "'last' are allowed"
            )
        return TEXT_PLACES[name]


def _attend_image(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, image: slice, others: slice, visible: Tensor | None,
    scale: float | None, backend: str,
) -> Tensor:  # fmt: skip
    """The image tokens' part of the result: each sees its window and all others.

    Args:
        query, key, value: (B, heads, N, channels).
        plan: of the image tokens.
        image, others: where those and the other tokens stand among the N.
        visible: (B or 1, N) bool, the keys that may be seen; all when None.
    """
    q, k, v = (t[..., image, :].transpose(1, 2).unflatten(1, plan.grid) for t in (query, key, value))
    more_k, more_v = (t[..., others, :].transpose(1, 2) for t in (key, value))
    setting = (plan.kernel_size, plan.stride, plan.dilation)
    attend = functools.partial(_neighborhood, setting=setting, scale=scale, backend=backend)
    if visible is None:
        out = attend(q, k, v, None, more_k, more_v)
    else:
        masks = visible.expand(len(q), -1)
        parts = []
        for i, mask in enumerate(masks):  # samples may see different numbers of other tokens
            one, seen = slice(i, i + 1), mask[others]
            on_grid = mask[None, image].unflatten(1, plan.grid)
            parts.append(attend(q[one], k[one], v[one], on_grid, more_k[one, seen], more_v[one, seen]))
        out = torch.cat(parts)
    return out.flatten(1, plan.rank).transpose(1, 2)


def _neighborhood(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, more_k: Tensor, more_v: Tensor, *,
    setting: tuple, scale: float | None, backend: str,
) -> Tensor:  # fmt: skip
    if mask is not None and mask.all():
        mask = None  # a mask that hides nothing would only choose slower kernels
    extra = {} if more_k.shape[1] == 0 else {"additional_keys": more_k, "additional_values": more_v}
    return neighborhood_attention(q, k, v, *setting, scale=scale, key_mask=mask, backend=backend, **extra)


def _visible_keys(mask: Tensor | None, query: Tensor, name: str) -> Tensor | None:
    """(B or 1, N) bool, the keys that a mask shows; None where there is no mask.

    Raises:
        ValueError: a mask that differs between queries or heads, or does more than hide keys.
    """
    if mask is None:
        return None
    shown = mask if mask.dtype == torch.bool else mask > HIDDEN
    if mask.dtype != torch.bool and (mask[shown] != 0).any():
        raise ValueError(f"the mask of {name} adds other numbers than 0 and at most {HIDDEN}; only hiding is allowed")
    shown = shown.reshape((1,) * (4 - shown.ndim) + tuple(shown.shape))
    keys = shown[:, :1, :1]
    if (shown != keys).any():
        raise ValueError(
            f"the mask of {name} has shape {tuple(mask.shape)} and differs between queries or heads; one that hides "
            "the same keys from all is allowed"
        )
    return keys[:, 0, 0].expand(-1, query.shape[-2])
