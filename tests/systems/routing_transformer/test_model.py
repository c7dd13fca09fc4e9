"""Facts of the models: causality, caches, parameters, the package's options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gridattn.models.state import CheckpointError, load_strict
from gridattn.systems.routing_transformer.blocks import shift_channels
from gridattn.systems.routing_transformer.convert import (
    convert_package_checkpoint,
    convert_package_state,
    package_network,
)
from gridattn.systems.routing_transformer.generate import filter_logits, generate, stepwise_logits
from gridattn.systems.routing_transformer.model import SequenceModel, build_model, shift_right
from gridattn.systems.routing_transformer.run import load_model
from gridattn.systems.routing_transformer.variants import VARIANTS

LENGTH = 24
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "num_heads": 4, "local_heads": 2, "window_size": 5, "num_clusters": 3}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"gated": True, "shift": True, "norm": "scale", "head_dim": 6, "num_memory": 2, "tied": True},
    "own keys": {"shared_qk": False, "embedding": 8},
    "rezero reversible": {"norm": "rezero", "reversible": True, "shift": True},
    "routing only": {"local_heads": 0},
    "paper": {"flavour": "paper", "reach": 4},
    "paper mixed layers": {"flavour": "paper", "local_heads": [4, 1], "embedding": 8},
}
# Parameters as counted for the published configurations; those of the paper's program include the centroids.
COUNTED = {
    "wikitext103": 195_219_200 + 267_735 * 513,
    "enwik8_8k": 171_810_050,
    "enwik8_12k": 168_860_930,
    "pg19": 380_330_184 + 32_768 * 2065,
    "imagenet64": 203_088_128,
    "cifar10": 102_228_224,
    "mnist": 38_313_216,
    "package_enwik8_simple": 18_779_136,
    "package_readme": 57_265_568,
    "recall": 62_826,
}


def text_model(cluster_size: int, **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = build_model("text", 30, **{**SMALL, "cluster_size": cluster_size, **options}).double().eval()
    with torch.no_grad():  # gains that start at 0 hide everything
        for name, parameter in model.named_parameters():
            if name.endswith("_gain"):
                parameter.fill_(0.7)
    return model


def text(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 30, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_published_configurations_have_the_parameters_that_were_counted(name: str) -> None:
    with torch.device("meta"):
        model = build_model(**VARIANTS[name])
    count = sum(p.numel() for p in model.parameters())
    if VARIANTS[name].get("flavour") == "paper":
        count += sum(b.numel() for n, b in model.named_buffers() if n.endswith("kmeans.means"))
    assert count == COUNTED[name]


@pytest.mark.parametrize("form", FORMS)
def test_with_room_for_all_positions_steps_equal_the_whole_sequence_at_once(form: str) -> None:
    model, symbols = text_model(LENGTH, **FORMS[form]), text()
    at_once = model(shift_right(symbols))[0]
    by_steps = torch.stack(list(stepwise_logits(model, symbols)), 1)
    torch.testing.assert_close(by_steps, at_once, atol=1e-9, rtol=0)


# Shifted channels bring in the position before, whose own output may have changed.
@pytest.mark.parametrize("form", [form for form, options in FORMS.items() if not options.get("shift")])
def test_a_step_equals_the_last_position_of_the_whole_in_the_first_block_whatever_the_clusters_hold(form: str) -> None:
    model, symbols = text_model(6, **{**FORMS[form], "depth": 1, "local_heads": 1}), text()
    previous = shift_right(symbols)
    for place, logits in enumerate(stepwise_logits(model, symbols)):
        torch.testing.assert_close(logits, model(previous[:, : place + 1])[0][:, -1], atol=1e-9, rtol=0)


def test_small_clusters_let_a_later_symbol_change_an_earlier_output_but_not_in_steps() -> None:
    model, symbols = text_model(4, local_heads=0), text(1)
    other = symbols.clone()
    other[:, LENGTH // 2 :] = (other[:, LENGTH // 2 :] + 7) % 29 + 1
    half = LENGTH // 2
    assert not torch.allclose(model(shift_right(symbols))[0][:, :half], model(shift_right(other))[0][:, :half])
    steps = [torch.stack(list(stepwise_logits(model, s)), 1)[:, :half] for s in (symbols, other)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("form", ["plain", "paper", "options"])
def test_generation_with_a_cache_gives_what_running_the_whole_prefix_gives(form: str) -> None:
    model, prompt = text_model(LENGTH, **FORMS[form]), text(2, 7)
    made = [generate(model, prompt, 12, limit=LENGTH, temperature=0, cache=cache) for cache in (True, False)]
    assert torch.equal(*made)
    assert made[0].shape == (2, 19)
    assert torch.equal(made[0][:, :7], prompt)


def test_generation_goes_on_beyond_the_longest_sequence_and_from_nothing() -> None:
    model = text_model(4)
    made = generate(model, text(1, 3)[:, :0], 40, limit=10, generator=torch.Generator().manual_seed(0))
    assert made.shape == (1, 40)
    again = generate(model, text(1, 3)[:, :0], 40, limit=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made, again)


def test_an_image_model_tells_positions_their_channel_row_and_column() -> None:
    model = build_model("image", 5, image=(2, 3, 3), flavour="paper", cluster_size=18, **SMALL).double().eval()
    values = torch.zeros(1, 18, dtype=torch.int64)
    vectors = model.embed(values, 0)[0]
    assert len(torch.unique(vectors, dim=0)) == 18
    assert torch.equal(model.embed(values[:, :4], 7)[0], vectors[7:11])
    by_steps = torch.stack(list(stepwise_logits(model, values)), 1)
    torch.testing.assert_close(by_steps, model(values)[0], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="no more than 18"):
        model.embed(values, 1)


def test_shifted_channels_come_from_the_neighbours() -> None:
    x = torch.arange(1.0, 13.0).view(1, 3, 4)
    causal = shift_channels(x, True)
    assert torch.equal(causal[..., :2], x[..., :2])
    assert torch.equal(causal[:, 1:, 2:], x[:, :-1, 2:])
    assert (causal[:, 0, 2:] == 0).all()
    both = shift_channels(x, False)
    assert torch.equal(both[:, :-1, 0], x[:, 1:, 0])
    assert torch.equal(both[..., 1], x[..., 1])
    assert torch.equal(both[:, 1:, 2], x[:, :-1, 2])
    assert torch.equal(both[..., 3], x[..., 3])


def test_filters_keep_the_best_symbols() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert torch.isfinite(filter_logits(logits, top_k=1)).tolist() == [[True, False, False]]
    assert torch.isfinite(filter_logits(logits, top_p=0.5)).tolist() == [[True, False, False]]
    assert torch.isfinite(filter_logits(logits, top_p=0.6001)).tolist() == [[True, True, False]]
    assert torch.isfinite(filter_logits(logits, top_p=0.0)).tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match=r"top_p=2"):
        filter_logits(logits, top_p=2)
    with pytest.raises(ValueError, match=r"top_k=0"):
        filter_logits(logits, top_k=0)


def test_evaluation_never_moves_centroids_and_an_update_does() -> None:
    for flavour in ("package", "paper"):
        model = text_model(8, flavour=flavour).float()
        means = {name: b.clone() for name, b in model.named_buffers() if name.endswith("means")}
        model(shift_right(text()))
        model.update_centroids()
        assert all(torch.equal(model.get_buffer(name), before) for name, before in means.items())
        model.train()(shift_right(text()))
        model.update_centroids()
        assert not any(torch.equal(model.get_buffer(name), before) for name, before in means.items())


def test_the_commitment_loss_reaches_the_weights_of_the_queries() -> None:
    model = text_model(8)
    model(shift_right(text()))[1].backward()
    block: Any = model.stack.blocks[1]
    assert block.attention.to_q.weight.grad.abs().max() > 0
    assert block.attention.to_v.weight.grad is None or (block.attention.to_v.weight.grad == 0).all()


def _package_state(network: dict[str, Any], model: SequenceModel) -> dict[str, Tensor]:
    """The names under which the package stores the same model."""
    state: dict[str, Tensor] = {}
    shift = "fn." if network.get("shift") else ""
    inner = "routing_transformer." + ("fn." if network.get("embedding") else "")
    outer = {"tokens": "token_emb", "project_in": "routing_transformer.project_in"}
    outer |= {"project_out": "routing_transformer.project_out"}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] != "stack":
            state[".".join([outer.get(parts[0], parts[0]), *parts[1:]])] = tensor
            continue
        kind, rest = parts[3].split("_")[0], ".".join(parts[4:])
        branch = f"{inner}layers.layers.{parts[2]}.{'01'[kind == 'feed']}."
        if parts[3].endswith("_norm"):
            state[f"{branch}norm.{rest.replace('gain', 'g')}"] = tensor
        elif kind == "feed":
            state[f"{branch}fn.{shift}fn.{rest.replace('fc', 'w')}"] = tensor
        else:
            routed = rest.startswith(("kmeans", "mem_"))
            state[f"{branch}fn.{shift}{'global_attn.' if routed else ''}{rest}"] = tensor
    return state


@pytest.mark.parametrize("form", ["plain", "options", "own keys"])
def test_a_checkpoint_of_the_package_gives_the_same_model(form: str, tmp_path: Any) -> None:
    model = text_model(6, **FORMS[form]).float()
    state = _package_state(FORMS[form], model)
    network = package_network(state, 6, 5)
    twin = build_model(**network).eval()
    load_strict(twin, convert_package_state(state))
    previous = shift_right(text())
    torch.testing.assert_close(twin(previous)[0], model(previous)[0])
    torch.save(state, tmp_path / "package.pt")
    convert_package_checkpoint(tmp_path / "package.pt", tmp_path / "ours", 6, local_window=5)
    loaded: Any = load_model(str(tmp_path / "ours")).model
    torch.testing.assert_close(loaded(previous)[0], model(previous)[0])


def test_other_checkpoints_are_refused_in_one_line(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"pkm\.keys.*no counterpart"):
        convert_package_state({"pkm.keys": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not that of a language model"):
        package_network({"token_emb.weight": torch.zeros(3, 2)}, 4)
    torch.save({"model": torch.nn.Linear(2, 3)}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        convert_package_checkpoint(tmp_path / "code.pt", tmp_path / "ours", 4)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sound"}, "kind='sound'"),
        ({"flavour": "jax"}, "flavour='jax'"),
        ({"flavour": "paper"}, "cluster_size=None"),
        ({"kind": "image"}, "image=None"),
        ({"local_heads": [1, 2, 3]}, "local_heads"),
        ({"local_heads": 5}, "local_heads=5"),
        ({"norm": "batch"}, "norm='batch'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**{"kind": "text", "symbols": 9, **SMALL, **options})


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["package", "paper"])
def test_a_model_compiles_whole_and_takes_bfloat16(flavour: str) -> None:
    model = text_model(6, flavour=flavour, depth=1).float()
    previous = shift_right(text(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(previous)[0], model(previous)[0], atol=1e-5, rtol=1e-4)
    assert torch.isfinite(model.bfloat16()(previous)[0]).all()
