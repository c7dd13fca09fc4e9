"""Facts about neighborhood attention inside models of diffusers: tiny ones with random weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gridattn.compat.diffusers import NeighborhoodProcessor, replace_attention
from gridattn.ops.neighborhood import make_plan

diffusers = pytest.importorskip("diffusers")

TEXT = 5


class Case:
    """A model, its inputs, the grids of its image tokens and where its text stands."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], grids: list[tuple[int, ...]], modules: Any = "*", text: str = ""
    ) -> None:
        self.model, self.inputs, self.grids = model.eval(), inputs, grids
        self.options = {"grids": grids, "modules": modules}
        self.text = text

    def __call__(self, **changes: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**{**self.inputs, **changes}, return_dict=False)[0]


def unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = {"sample": torch.randn(2, 4, 8, 12), "timestep": 10, "encoder_hidden_states": torch.randn(2, TEXT, 12)}
    return Case(model, inputs, [(8, 12), (4, 6)])


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(2, 48, 4),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.9, 0.9]),
        "img_ids": torch.stack([torch.zeros(48), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return Case(model, inputs, [(6, 8)], text="first")


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    return Case(model, inputs, [(8, 6)], text="last")


def hunyuan_video() -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 12, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * 3 + [0] * (TEXT - 3)]),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return Case(model, inputs, [(4, 6, 4)], ["transformer_blocks.*", "single_transformer_blocks.*"], text="last")


def cog_video() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=8,
        sample_height=12,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=TEXT,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 12, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 12),
        "timestep": torch.tensor([500, 500]),
    }
    return Case(model, inputs, [(3, 6, 4)], text="first")


def cosmos() -> Case:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, TEXT, 12),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 8, 12),
    }
    return Case(model, inputs, [(3, 4, 6)])


MODELS: list[Callable[[], Case]] = [unet, flux, sd3, hunyuan_video, cog_video, cosmos]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return request.param()


def processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


class Masked(TorchFunctionMode):
    """Dense attention under the explicit mask of a window per image token; text sees and is seen by everything."""

    def __init__(self, case: Case, *window: Any) -> None:
        super().__init__()
        self.text, self.masks = case.text, {}
        for grid in case.grids:
            mask = np.ones((1, 1), dtype=bool)
            for axis in make_plan(grid, *window).axes:
                mask = np.kron(mask, axis.mask)
            self.masks[len(mask)] = torch.from_numpy(mask)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        options = dict(kwargs or {})
        query, key, value = args if args else (options.pop(name) for name in ("query", "key", "value"))
        given, tokens = options.pop("attn_mask", None), query.shape[-2]
        image = next((n for n in self.masks if tokens in (n, n + TEXT)), None)
        if image is not None and tokens == key.shape[-2]:
            mask = torch.ones(tokens, tokens, dtype=torch.bool)
            begin = tokens - image if self.text == "first" else 0
            mask[begin : begin + image, begin : begin + image] = self.masks[image]
            given = mask if given is None else mask & given
        return func(query, key, value, attn_mask=given, **options)


def test_a_window_as_large_as_the_grid_changes_nothing(case: Case) -> None:
    before = case()
    with replace_attention(case.model, {grid: grid for grid in case.grids}, **case.options) as replaced:
        torch.testing.assert_close(case(), before, rtol=1e-5, atol=1e-5)
    assert replaced.calls["neighborhood"] == len(replaced.modules)


@pytest.mark.parametrize("kind", ["window", "strided", "blocked", "dilated"])
def test_every_image_token_sees_its_window_and_all_text(case: Case, kind: str) -> None:
    rank = len(case.grids[0])
    small = {2: (3, 2), 3: (2, 3, 2)}[rank]
    size, stride, dilation = {
        "window": (small, 1, 1),
        "strided": ({2: (4, 3), 3: (3, 3, 4)}[rank], 2, 1),
        "blocked": (small, small, 1),
        "dilated": (2, 1, {2: (2, 3), 3: (1, 2, 1)}[rank]),
    }[kind]
    plain = case()
    with Masked(case, size, stride, dilation):
        expected = case()
    with replace_attention(case.model, size, stride, dilation, **case.options):
        torch.testing.assert_close(case(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_restoring_gives_back_the_original_processors_and_results(case: Case) -> None:
    before, original = case(), processors(case.model)
    replaced = replace_attention(case.model, 2, **case.options)
    swapped = {name for name, p in processors(case.model).items() if isinstance(p, NeighborhoodProcessor)}
    assert swapped == set(replaced.modules)
    assert not torch.equal(case(), before)
    replaced.restore()
    replaced.restore()
    assert processors(case.model) == original
    assert torch.equal(case(), before)


@pytest.mark.parametrize("make", [unet, cosmos])
def test_cross_attention_is_left_alone(make: Callable[[], Case]) -> None:
    case = make()
    original = processors(case.model)
    with replace_attention(case.model, 2, grids=case.grids):
        now = processors(case.model)
    cross = [name for name in original if name.endswith("attn2")]
    assert cross
    assert all(now[name] is original[name] for name in cross)
    assert all(isinstance(now[name], NeighborhoodProcessor) for name in original if name.endswith("attn1"))


def image_model() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ).eval()


def test_chosen_modules_and_resolutions_alone_are_swapped() -> None:
    case = unet()
    options = {"grids": [(8, 12)], "modules": ["down_blocks.*", "up_blocks.*"], "unmatched": "dense"}
    with replace_attention(case.model, 3, **options) as replaced:
        case()
    assert all(name.startswith(("down_blocks", "up_blocks")) for name in replaced.modules)
    assert replaced.calls == {"neighborhood": 3, "dense": 3}


def test_each_grid_may_have_its_own_window() -> None:
    case = unet()
    with replace_attention(case.model, {(8, 12): (8, 12), (4, 6): 2}, {(8, 12): 1, (4, 6): 2}):
        mixed = case()
    with replace_attention(case.model, 2, 2, grids=[(4, 6)], unmatched="dense"):
        torch.testing.assert_close(case(), mixed, rtol=1e-5, atol=1e-5)


def test_the_first_steps_of_every_sampling_stay_dense() -> None:
    model = image_model()
    pipeline = diffusers.DDIMPipeline(model, diffusers.DDIMScheduler(num_train_timesteps=100))
    pipeline.set_progress_bar_config(disable=True)
    with replace_attention(model, 2, grids=[(8, 8), (4, 4)], dense_steps=3) as replaced:
        attentions = len(replaced.modules)
        for sampling in (1, 2):
            pipeline(num_inference_steps=5, output_type="np")
            assert replaced.step == 4
            assert replaced.calls == {"dense": 3 * attentions * sampling, "neighborhood": 2 * attentions * sampling}


def test_two_calls_at_one_timestep_are_one_step() -> None:
    model = image_model()
    with replace_attention(model, 2, grids=[(8, 8), (4, 4)], dense_steps=1) as replaced:
        for timestep in (9, 9, 5, 5, 1):
            model(torch.randn(1, 3, 8, 8), timestep)
    assert replaced.calls == {"dense": 2 * len(replaced.modules), "neighborhood": 3 * len(replaced.modules)}


def test_gradients_reach_the_weights_and_half_precision_works() -> None:
    model = image_model()
    with replace_attention(model, 3, 2, grids=[(8, 8), (4, 4)]) as replaced:
        model(torch.randn(1, 3, 8, 8), 5).sample.square().mean().backward()
        first = model.get_submodule(replaced.modules[0])
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in first.to_q.parameters() if p.ndim > 1)
        assert model.bfloat16()(torch.randn(1, 3, 8, 8).bfloat16(), 5).sample.dtype == torch.bfloat16


def test_a_compiled_model_computes_the_same() -> None:
    model, image = image_model(), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), replace_attention(model, 3, 2, grids=[(8, 8), (4, 4)]):
        expected = model(image, 5).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image, 5).sample, expected)


def test_samples_may_see_different_numbers_of_text_tokens() -> None:
    case = hunyuan_video()
    nothing = torch.tensor([[1] * TEXT, [1] + [0] * (TEXT - 1)])
    with Masked(case, (2, 3, 2), 1, 1):
        expected = case(encoder_attention_mask=nothing)
    with replace_attention(case.model, (2, 3, 2), **case.options):
        torch.testing.assert_close(case(encoder_attention_mask=nothing), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": (9, 12)}, r"attn1 attends to 96 tokens; grids=\(9, 12\) with 108 image tokens are allowed"),
        ({"grids": [(8, 12)]}, r"attends to 24 tokens; grids=\(8, 12\) with 96 image tokens"),
    ],
)
def test_an_undeclared_number_of_tokens_is_named_when_the_model_runs(change: dict, message: str) -> None:
    case = unet()
    with replace_attention(case.model, 2, **change), pytest.raises(ValueError, match=message):
        case()


def test_a_turned_grid_is_noticed_where_the_attention_sees_the_image() -> None:
    model = image_model()
    with (
        replace_attention(model, 2, grids=[(4, 16), (2, 8)]),
        pytest.raises(ValueError, match=r"64 tokens of a grid \(8, 8\); grids=\(4, 16\)"),
    ):
        model(torch.randn(1, 3, 8, 8), 5)


def test_text_of_unknown_place_or_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flux()
    monkeypatch.setattr("gridattn.compat.diffusers.processors.TEXT_PLACES", {})
    with replace_attention(case.model, 2, **case.options), pytest.raises(ValueError, match="text='auto' does not know"):
        case()
    single = ["single_transformer_blocks.*"]
    options = {**case.options, "modules": single, "text": "first"}
    expected = case()
    with replace_attention(case.model, (6, 8), **options, text_tokens=TEXT):
        torch.testing.assert_close(case(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 9}, "exceeds the grid"),
        ({"kernel_size": 2, "stride": 3}, "stride=.* exceeds kernel_size"),
        ({"kernel_size": 2, "grids": None}, "grids=None is allowed only where kernel_size names the grids"),
        ({"kernel_size": {(8, 8): 4}}, r"kernel_size=.* names no value for the grid \(4, 4\)"),
        ({"kernel_size": 2, "grids": [(8, 8), (4, 16)]}, r"grids=\(8, 8\) and \(4, 16\) have 64 tokens each"),
        ({"kernel_size": 2, "grids": []}, r"grids=\[\] is not allowed"),
        ({"kernel_size": 2, "grids": "8x8"}, "grids='8x8' is not allowed"),
        ({"kernel_size": 2, "grids": [(8, 8.0)]}, "is not allowed; a grid such as"),
        ({"kernel_size": 2, "modules": "attn3.*"}, "matches none of the"),
        ({"kernel_size": 2, "dense_steps": -1}, "dense_steps=-1 is not allowed"),
        ({"kernel_size": 2, "dense_steps": None}, "dense_steps=None is not allowed"),
        ({"kernel_size": 2, "text_tokens": 1.5}, "text_tokens=1.5 is not allowed"),
        ({"kernel_size": 2, "text": "left"}, "text='left' is not known"),
        ({"kernel_size": 2, "unmatched": "skip"}, "unmatched='skip' is not known"),
        ({"kernel_size": 2, "backend": "magic"}, "backend='magic' is not known"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_swapped(arguments: dict, message: str) -> None:
    model = image_model()
    before = processors(model)
    with pytest.raises(ValueError, match=message):
        replace_attention(model, **{"grids": [(8, 8), (4, 4)], **arguments})
    assert processors(model) == before


def test_models_without_such_attention_are_named() -> None:
    with pytest.raises(ValueError, match="model=Linear has no attention with a processor"):
        replace_attention(nn.Linear(2, 2), 2, grids=(8, 8))


def test_a_replaced_attention_is_not_replaced_again_nor_restored_over_another_processor() -> None:
    model = image_model()
    replaced = replace_attention(model, 2, grids=[(8, 8), (4, 4)])
    with pytest.raises(ValueError, match="restore it first"):
        replace_attention(model, 3, grids=[(8, 8), (4, 4)])
    first = model.get_submodule(replaced.modules[0])
    mine = first.processor
    first.set_processor(mine.original)
    with pytest.raises(ValueError, match="was set after replace_attention"):
        replaced.restore()
    first.set_processor(mine)
    replaced.restore()
    assert not any(isinstance(p, NeighborhoodProcessor) for p in processors(model).values())


def test_a_processor_that_computes_attention_by_itself_is_named() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = image_model()
    for name in processors(model):
        model.get_submodule(name).set_processor(AttnProcessor())
    with (
        replace_attention(model, 2, grids=[(8, 8), (4, 4)]),
        pytest.raises(ValueError, match=r"processor=AttnProcessor of .* did not call scaled_dot_product_attention"),
    ):
        model(torch.randn(1, 3, 8, 8), 5)


def test_different_timesteps_in_a_batch_have_no_step() -> None:
    model = image_model()
    with (
        replace_attention(model, 2, grids=[(8, 8), (4, 4)], dense_steps=2),
        pytest.raises(ValueError, match=r"timestep=\[5.0, 7.0\] is not allowed with dense_steps"),
    ):
        model(torch.randn(2, 3, 8, 8), torch.tensor([5, 7]))
