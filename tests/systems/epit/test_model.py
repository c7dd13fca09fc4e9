"""What the network and the operations around it compute, as facts that hold for any weights."""

from pathlib import Path

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from gridattn.layers.epipolar import AlternatingFilter, EpipolarTransformer
from gridattn.models.state import CheckpointError
from gridattn.systems.epit import build_epit, super_resolve, view_psnr, view_ssim
from gridattn.systems.epit.convert import convert_official, start_from
from gridattn.systems.epit.fields import (
    bicubic_down,
    bicubic_matrix,
    bicubic_up,
    central_views,
    rgb_to_ycbcr,
    shear,
    ycbcr_to_rgb,
)
from gridattn.systems.epit.tiles import divide, integrate, tile_counts


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _field(*shape: int) -> Tensor:
    return torch.rand(*(shape or (1, 3, 3, 3, 9, 13)))


def _tiny(scale: int = 2, **changes: int) -> nn.Module:
    return build_epit(scale, **{"channels": 8, "blocks": 2} | changes).eval()


def test_the_networks_have_as_many_parameters_as_the_published_ones() -> None:
    counts = {scale: sum(p.numel() for p in build_epit(scale).parameters()) for scale in (2, 4)}
    assert counts == {2: 1_420_928, 4: 1_470_080}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_without_weights_the_network_is_bicubic_upsampling(scale: int) -> None:
    network = _tiny(scale)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    field = _field()
    assert (network(field) - bicubic_up(field, scale)).abs().max() < 1e-6


def test_colour_differences_are_bicubic_whatever_the_weights() -> None:
    network, field = _tiny(), _field()
    ours, bicubic = rgb_to_ycbcr(network(field)), bicubic_up(rgb_to_ycbcr(field), 2)
    assert (ours[:, 1:] - bicubic[:, 1:]).abs().max() < 1e-6
    assert (ours[:, 0] - bicubic[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("views", [1, 2, 5, 9])
def test_the_same_weights_serve_any_number_of_views(views: int) -> None:
    assert _tiny(blocks=1)(_field(1, 3, views, views, 6, 7)).shape == (1, 3, views, views, 12, 14)


def test_views_need_not_form_a_square_and_batches_are_independent() -> None:
    network, fields = _tiny(), _field(2, 3, 1, 4, 7, 5)
    both = network(fields)
    assert torch.allclose(both[1:], network(fields[1:]), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 3, 8, 8), (1, 1, 3, 3, 8, 8), (1, 3, 3, 3, 0, 8)])
def test_what_is_no_light_field_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="field has shape"):
        _tiny()(torch.zeros(shape))


def test_half_precision_changes_little() -> None:
    network, field = _tiny(), _field()
    expected = network(field)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(field) - expected).abs().max() < 1e-2
    whole = network.to(torch.bfloat16)(field.bfloat16())
    assert whole.dtype == torch.bfloat16
    assert (whole - expected).abs().max() < 2e-2


def test_one_compiled_network_takes_views_of_any_number_and_size() -> None:
    torch.compiler.reset()
    network = _tiny(blocks=1)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for shape in ((1, 3, 3, 3, 12, 9), (2, 3, 2, 3, 10, 9)):
        field = torch.rand(shape)
        torch.testing.assert_close(compiled(field), network(field), atol=1e-5, rtol=1e-4)


def test_a_query_sees_five_pixels_to_each_side_in_all_views_and_no_more() -> None:
    layer = EpipolarTransformer(4, 16, 8, (2**15, 11)).eval()
    plane = torch.randn(1, 3, 16, 4)
    before = layer(plane)[0, 0, 8]
    for view in range(3):
        for pixel in range(16):
            moved = plane.clone()
            moved[0, view, pixel] += 1
            changed = not torch.allclose(layer(moved)[0, 0, 8], before, atol=1e-7)
            assert changed == (abs(pixel - 8) <= 5), (view, pixel)


def test_planes_may_be_permuted_and_their_axes_reversed() -> None:
    layer = EpipolarTransformer(4, 16, 8, (2**15, 11)).eval()
    planes = torch.randn(3, 3, 14, 4)
    y = layer(planes)
    assert torch.allclose(layer(planes[[2, 0, 1]]), y[[2, 0, 1]], atol=1e-6)
    for axis in (1, 2):
        assert torch.allclose(layer(planes.flip(axis)), y.flip(axis), atol=1e-6)


def test_the_order_of_the_two_passes_matters() -> None:
    layer = AlternatingFilter(4, (2**15, 11), 4).eval()
    field = torch.randn(1, 3, 3, 8, 8, 4)

    def swap(t: Tensor) -> Tensor:
        return t.transpose(1, 2).transpose(3, 4)

    expected = layer(field)
    assert not torch.allclose(swap(layer(swap(field))), expected, atol=1e-4)
    other = AlternatingFilter(4, (2**15, 11), 4).eval()
    turned = {k: t.mT.contiguous() if k.startswith("conv") else t for k, t in layer.state_dict().items()}
    other.load_state_dict(turned)
    # With its passes exchanged and its kernels transposed the filter acts on the swapped light field as before.
    b, u, v, h, w, _ = field.shape
    z = swap(field)
    first = other.transformer(z.permute(0, 1, 3, 2, 4, 5).reshape(b * u * h, v, w, 4))
    a = other._filter(first.view(b, u, h, v, w, 4).permute(0, 1, 3, 2, 4, 5)) + z
    second = other.transformer(a.permute(0, 2, 4, 1, 3, 5).reshape(b * v * w, u, h, 4))
    y = other._filter(second.view(b, v, w, u, h, 4).permute(0, 3, 1, 4, 2, 5)) + z
    assert torch.allclose(swap(y), expected, atol=1e-5)


def test_without_transformers_far_pixels_of_other_views_are_out_of_reach() -> None:
    field = _field(1, 3, 3, 3, 24, 24)
    moved = field.clone()
    moved[:, :, 0, 0] = moved[:, :, 0, 0].flip(-1, -2)
    reach = {}
    for epipolar in (True, False):
        network = _tiny(blocks=1, epipolar=epipolar)
        with torch.no_grad():
            difference = (network(moved) - network(field)).abs()
        reach[epipolar] = float(difference[:, :, 0, 2, 4:-4, 4:-4].max())
    assert reach[False] == 0.0
    assert reach[True] > 0.0


def test_colours_come_back() -> None:
    field = _field()
    assert (ycbcr_to_rgb(rgb_to_ycbcr(field)) - field).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_bicubic_reduction_keeps_constants(size: int, scale: int) -> None:
    assert torch.allclose(bicubic_matrix(size, scale).sum(1), torch.ones(-(-size // scale)).double())
    down = bicubic_down(torch.full((3, 2, 2, size, size + 1), 0.3), scale)
    assert torch.allclose(down, torch.tensor(0.3))


def test_equal_images_have_infinite_psnr_and_an_ssim_of_one() -> None:
    views = torch.rand(2, 3, 16, 20)
    assert torch.isposinf(view_psnr(views, views)).all()
    assert torch.allclose(view_ssim(views, views), torch.ones(2, 3).double())
    assert torch.allclose(view_psnr(views + 0.1, views), torch.tensor(20.0).double(), atol=1e-5)
    with pytest.raises(ValueError, match="too small for SSIM"):
        view_ssim(views[..., :10], views[..., :10])


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_that_of_scikit_image(data_range: float) -> None:
    x, y = torch.rand(2, 1, 1, 17, 23).double()
    options = {"gaussian_weights": True, "data_range": data_range}
    expected = structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), **options)
    assert float(view_ssim(x, y, data_range)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (32, 33), (48, 16)])
def test_tiles_of_a_network_that_looks_at_single_pixels_give_the_untiled_result(size: tuple[int, int]) -> None:
    field = _field(3, 2, 2, *size)

    def nearest(fields: Tensor) -> Tensor:
        return fields.repeat_interleave(2, -1).repeat_interleave(2, -2)

    assert torch.equal(super_resolve(nearest, field, 2), nearest(field))
    assert torch.equal(super_resolve(nearest, field, 2, tile=0), nearest(field))
    tiles = divide(field)
    assert len(tiles) == ((size[0] + 15) // 16) * ((size[1] + 15) // 16)
    assert tile_counts(size) == ((size[0] + 15) // 16, (size[1] + 15) // 16)
    assert torch.equal(integrate(tiles, size, 16), field)


@pytest.mark.parametrize(("tile", "stride"), [(8, 16), (32, 0), (32, 15)])
def test_tiles_that_leave_gaps_are_refused(tile: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"tile={tile} with stride={stride}"):
        divide(_field(3, 1, 1, 8, 8), tile, stride)


def test_shearing_moves_views_by_whole_pixels() -> None:
    ramp = torch.arange(20.0).expand(1, 3, 3, 20, 20)
    sheared = shear(ramp, 2)
    assert sheared.shape == (1, 3, 3, 16, 16)
    assert torch.equal(sheared[0, 0, :, 0, 0], torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(shear(shear(ramp, 1), -1), ramp[..., 2:-2, 2:-2])
    for views, pixels in ((3, 0.5), (2, 1)):
        with pytest.raises(ValueError, match="whole pixels"):
            shear(torch.zeros(1, views, views, 20, 20), pixels)  # pyright: ignore
    with pytest.raises(ValueError, match="leaves nothing"):
        shear(ramp, 10)


def test_the_central_views_are_those_in_the_middle() -> None:
    field = torch.arange(49.0).view(7, 7, 1, 1)
    assert central_views(field, 3)[..., 0, 0].tolist() == [[16, 17, 18], [23, 24, 25], [30, 31, 32]]
    with pytest.raises(ValueError, match="ang_res=9"):
        central_views(field, 9)


def _published(network: nn.Module) -> dict[str, Tensor]:
    """Our weights under the published names."""
    names = {
        "conv_first.": "conv_init0.0.",
        "expand.": "upsampling.0.",
        "conv_last.": "upsampling.3.",
        "filters.": "altblock.",
        ".transformer.": ".epi_trans.",
        ".qkv.weight": ".attention.in_proj_weight",
        ".proj.weight": ".attention.out_proj.weight",
        ".mlp.0.": ".feed_forward.0.",
        ".mlp.1.": ".feed_forward.1.",
        ".mlp.3.": ".feed_forward.4.",
    }
    state = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        flat = tensor.ndim == 4 and not name.startswith("upsampling")
        state[f"module.{name}"] = tensor.unsqueeze(2) if flat else tensor
    return state


def test_published_weights_are_loaded_strictly(tmp_path: Path) -> None:
    network, other = _tiny(), _tiny()
    state = _published(network)
    assert state["module.altblock.1.conv.4.weight"].shape == (8, 8, 1, 3, 3)
    torch.save({"epoch": 80, "state_dict": state}, tmp_path / "EPIT_5x5_2x_model.pth")
    start_from(other, tmp_path / "EPIT_5x5_2x_model.pth")
    field = _field()
    assert torch.equal(other(field), network(field))
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert convert_official(plain).keys() == network.state_dict().keys()
    with pytest.raises(CheckpointError, match=r"weights=.*expand\.weight"):
        start_from(_tiny(4), tmp_path / "EPIT_5x5_2x_model.pth")
    with pytest.raises(CheckpointError, match="missing"):
        start_from(other, tmp_path / "none.pth")
    torch.save({"state_dict": state, "options": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        start_from(other, tmp_path / "code.pth")
