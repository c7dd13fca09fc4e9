"""Continuing texts and completing images with a trained model: JSON and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gridattn.data.images import read_image
from gridattn.systems.base import pick_device
from gridattn.systems.output import atomic, write_json
from gridattn.systems.routing_transformer.attention import PaperAttention
from gridattn.systems.routing_transformer.generate import generate
from gridattn.systems.routing_transformer.model import SequenceModel, shift_right
from gridattn.systems.routing_transformer.pictures import draw_completions, draw_text
from gridattn.systems.routing_transformer.recall import is_answer
from gridattn.systems.routing_transformer.run import held_out, load_model, load_own_data
from gridattn.systems.routing_transformer.task import measure
from gridattn.systems.routing_transformer.text import Codec, stored_codec
from gridattn.systems.settings import check_least
from gridattn.systems.trained import Trained

HELD_OUT_IMAGES = 6
MAPPED = 1024
"""Longest text whose attention is drawn."""


def predict(
    inputs: list[str] | None = None,
    checkpoint: str = "runs/latest",
    output: str = "predictions",
    *,
    count: int = 200,
    samples: int = 3,
    keep: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    cache: bool = True,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Continues texts or completes images, and writes predictions.json and predictions.png.

    Bits are those of the whole sequence at once; with recall, those of the answers.

    Args:
        inputs: beginnings of texts, or names of text files; for an image generator image files. None takes held-out
            sequences of the data that the model was trained on.
        checkpoint: run folder, or folder of an exported model.
        output: folder to write to.
        count: new symbols of a text; for recall one, the answer.
        samples: completions of every image.
        keep: part of an image's rows, from the top, that is given; the rest is made.
        temperature: 0 takes the most probable symbol, 1 draws from the model's own distribution.
        top_k: draws from the k most probable symbols.
        top_p: draws from the most probable symbols up to this sum of probabilities.
        cache: keeps what earlier positions gave; without it every new symbol runs the whole sequence again. See
            `generate` for what that changes.
        seed: of the draws.
        device: such as "cpu" or "cuda:0"; None takes the accelerator where there is one.

    Returns:
        `predictions`, one a text or image, and `output`. Of a text: prompt, continuation, bits of every symbol of the
        prompt and (held-out) `truth`. Of an image: its name, bits_per_dim of the whole, and files of the completions.

    Raises:
        ValueError: a checkpoint or input that cannot be used, or a setting that is not allowed.
    """
    for name, value, least in (("count", count, 1), ("samples", samples, 1), ("seed", seed, 0)):
        check_least(name, value, least)
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep!r} is not allowed; it must be at least 0 and below 1")
    trained = load_model(checkpoint)
    where = pick_device(device)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "cache": cache,
        "generator": torch.Generator().manual_seed(seed),
    }
    make = _images if trained.network["kind"] == "image" else _texts
    predictions, draw = make(trained, inputs, where, Path(output), count, samples, keep, options)
    result = {"checkpoint": checkpoint, "output": output, "predictions": predictions}
    write_json(Path(output) / "predictions.json", result)
    draw(Path(output) / "predictions.png")
    return result


def _texts(
    trained: Trained,
    inputs: Sequence[str] | None,
    where: torch.device,
    output: Path,
    count: int,
    samples: int,
    keep: float,
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], Any]:
    codec, length = stored_codec(trained.about["codec"]), trained.about["length"]
    if codec is None:
        raise ValueError("the model has no vocabulary: it was converted without one")
    recall = trained.about["data"] == "recall"
    truths: list[str | None]
    if inputs is None:
        whole = held_out(load_own_data(trained), 1)
        cut = length - 1 if recall else length // 2
        prompts, count = [whole[0, :cut]], min(count, length - cut)
        truths = [codec.decode(whole[0, cut : cut + count].tolist())]
    else:
        prompts = [torch.from_numpy(codec.encode(_text(text))) for text in inputs]
        count, truths = (1 if recall else count), [None] * len(prompts)
    for text, prompt in zip(inputs or [], prompts):
        if not len(prompt):
            raise ValueError(f"input {text!r} is empty")
    model = trained.model.to(where)
    assert isinstance(model, SequenceModel)
    predictions, drawn = [], []
    for prompt, truth in zip(prompts, truths):
        symbols = generate(model, prompt[None].to(where), count, limit=length, **options)
        shown = symbols[:, -length:]
        bits = _bits(model, shown)[0].cpu()
        if recall:  # nothing but answers can be foreseen
            bits = bits * is_answer(shown[0].cpu())
        given = max(0, shown.shape[1] - count)
        prediction = {
            "prompt": codec.decode(prompt.tolist()),
            "continuation": codec.decode(symbols[0, len(prompt) :].tolist()),
            "prompt_bits": [round(b, 4) for b in bits[:given].tolist()],
        }
        if truth is not None:
            prediction["truth"] = truth
        predictions.append(prediction)
        drawn.append((_pieces(codec, shown[0]), bits.numpy(), given))
    maps = _attention(model, shift_right(shown), max(0, given)) if shown.shape[1] <= MAPPED else None
    return predictions, lambda path: draw_text(drawn, maps, path)


def _text(text: str) -> str:
    """The content of a text file, or the text itself."""
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        is_file = False
    if not is_file:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"input {text!r} is not UTF-8: {error}") from None


def _pieces(codec: Codec, symbols: Tensor) -> list[str]:
    return codec.pieces(symbols.tolist())


@torch.no_grad()
def _bits(model: SequenceModel, symbols: Tensor) -> Tensor:
    """Bits of every symbol given those before it, (B, T)."""
    nats, _ = measure(model(shift_right(symbols))[0], symbols, torch.ones_like(symbols, dtype=torch.bool))
    return nats / np.log(2)


def _attention(model: SequenceModel, previous: Tensor, place: int) -> list[tuple[np.ndarray, list[str]]]:
    """Weights of one position in every block, (heads, T), and the kind of every head."""
    inputs: list[Tensor] = []
    layers: list[Any] = [block.attention for block in model.stack.blocks]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    try:
        with torch.no_grad():
            model(previous)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for layer, x in zip(layers, inputs):
        kinds = ["local"] * layer.local_heads, ["routing"] * layer.routing_heads
        first, second = reversed(kinds) if isinstance(layer, PaperAttention) else kinds
        maps.append((layer.attention_map(x, (place,))[0].cpu().numpy(), [*first, *second]))
    return maps


def _images(
    trained: Trained,
    inputs: Sequence[str] | None,
    where: torch.device,
    output: Path,
    count: int,
    samples: int,
    keep: float,
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], Any]:
    image, levels = tuple(trained.network["image"]), trained.network["symbols"]
    if inputs is None:
        whole = held_out(load_own_data(trained), HELD_OUT_IMAGES)
        names = [f"held out {i}" for i in range(len(whole))]
    else:
        if not inputs:
            raise ValueError("inputs is empty; name image files")
        whole, names = torch.stack([_image(name, image, levels) for name in inputs]), list(inputs)
    model = trained.model.to(where)
    assert isinstance(model, SequenceModel)
    total = whole.shape[1]
    given = round(keep * image[0]) * image[1] * image[2]
    prompt = whole[:, :given].repeat_interleave(samples, 0).to(where)
    made = generate(model, prompt, total - given, limit=total, **options).cpu()
    bits = torch.cat([_bits(model, part.to(where)).mean(1).cpu() for part in whole.split(8)])
    predictions = []
    for i, name in enumerate(names):
        files = []
        for j in range(samples):
            path = output / f"completion_{i}_{j}.png"
            with atomic(path) as temporary:
                _picture(made[i * samples + j], image, levels).save(temporary, format="png")
            files.append(path.name)
        predictions.append({"image": name, "bits_per_dim": round(float(bits[i]), 4), "completions": files})
    rows = [
        [_picture(t, image, levels) for t in (whole[i], *made[i * samples : (i + 1) * samples])]
        for i in range(len(names))
    ]
    return predictions, lambda path: draw_completions(rows, given / total, path)


def _image(name: str, image: Sequence[int], levels: int) -> Tensor:
    """Symbols of an image file, scaled to the model's size."""
    height, width, channels = image
    picture = read_image(name).convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BOX)
    values = np.asarray(picture, np.float64).reshape(-1) * (levels - 1) / 255
    return torch.from_numpy(values.round().astype(np.int64))


def _picture(symbols: Tensor, image: Sequence[int], levels: int) -> Image.Image:
    values = (symbols.double() * 255 / (levels - 1)).round().to(torch.uint8).view(*image).numpy()
    return Image.fromarray(values[..., 0] if image[2] == 1 else values)
