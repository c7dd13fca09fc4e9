"""The names, signatures and switches of NATTEN 0.21."""

import importlib
import inspect
from collections.abc import Iterator

import pytest
import torch

import gridattn.compat.natten as natten

NEIGHBORHOOD = (
    "query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None, "
    "additional_values=None, attention_kwargs=None, backend=None, q_tile_shape=None, kv_tile_shape=None, "
    "backward_q_tile_shape=None, backward_kv_tile_shape=None, backward_kv_splits=None, "
    "backward_use_pt_reduction=False, run_persistent_kernel=True, kernel_schedule=None, torch_compile=False, "
    "return_lse=False"
)
ATTENTION = (
    "query, key, value, is_causal=False, scale=None, seqlens_Q=None, seqlens_KV=None, cumulative_seqlen_Q=None, "
    "cumulative_seqlen_KV=None, max_seqlen_Q=None, max_seqlen_KV=None, backend=None, q_tile_size=None, "
    "kv_tile_size=None, backward_q_tile_size=None, backward_kv_tile_size=None, backward_kv_splits=None, "
    "backward_use_pt_reduction=False, run_persistent_kernel=True, kernel_schedule=None, torch_compile=False, "
    "return_lse=False"
)
MODULE = (
    "embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True, qk_scale=None, "
    "proj_drop=0.0"
)
SIGNATURES = {
    "na1d": NEIGHBORHOOD,
    "na2d": NEIGHBORHOOD,
    "na3d": NEIGHBORHOOD,
    "functional.neighborhood_attention_generic": NEIGHBORHOOD,
    "attention": ATTENTION,
    "merge_attentions": "outputs, lse_tensors, torch_compile=True, use_autograd_fix=True",
    "NeighborhoodAttention1D": MODULE,
    "NeighborhoodAttention2D": MODULE,
    "NeighborhoodAttention3D": MODULE,
    "token_permute.token_permute_operation": "tensor, tile_shape, dilation=None, flip_tiled_dims=True",
    "token_permute.token_unpermute_operation": (
        "tensor, token_layout_shape, tile_shape, dilation=None, flip_tiled_dims=True"
    ),
    "utils.varlen.generate_varlen_parameters": "query, key, value, seqlens_Q, seqlens_KV",
    "use_deterministic_algorithms": "mode=True",
    "are_deterministic_algorithms_enabled": "",
    "use_kv_parallelism_in_fused_na": "mode=True",
    "is_kv_parallelism_in_fused_na_enabled": "",
    "set_memory_usage_preference": "pref='default'",
    "get_memory_usage_preference": "",
    "is_memory_usage_default": "",
    "is_memory_usage_strict": "",
    "is_memory_usage_unrestricted": "",
    "allow_flex_compile": "mode=True, backprop=False",
    "allow_flex_compile_backprop": "mode=True",
    "disable_flex_compile": "",
    "disable_flex_compile_backprop": "",
    "is_flex_compile_allowed": "",
    "is_flex_compile_backprop_allowed": "",
}
CUTLASS_KERNELS = [
    f"cutlass_{generation}{kind}" for generation in ("", "hopper_", "blackwell_") for kind in ("fmha", "fna")
]


@pytest.fixture
def switches() -> Iterator[None]:
    yield
    natten.use_deterministic_algorithms(False)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference()
    natten.disable_flex_compile()


def resolve(path: str) -> object:
    found: object = natten
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_have_nattens_order_and_defaults(path: str) -> None:
    parameters = inspect.signature(resolve(path)).parameters.values()  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert ", ".join(map(str, bare)) == SIGNATURES[path]


def test_every_public_name_exists() -> None:
    assert all(hasattr(natten, name) for name in natten.__all__)
    assert {path for path in SIGNATURES if "." not in path} <= set(natten.__all__)


@pytest.mark.parametrize("name", ["functional", "modules", "context", "token_permute", "utils.varlen"])
def test_submodules_are_reached_as_attributes_and_by_import(name: str) -> None:
    assert resolve(name) is importlib.import_module(f"gridattn.compat.natten.{name}")


def test_version_tells_the_interface_and_that_no_compiled_kernels_are_present() -> None:
    assert natten.__version__.startswith("0.21.")
    assert natten.HAS_LIBNATTEN is False


@pytest.mark.parametrize(
    "name",
    [
        *(f"get_configs_for_{kernel}" for kernel in (*CUTLASS_KERNELS, "flex_fmha", "flex_fna")),
        *(f"get_bwd_configs_for_{kernel}" for kernel in CUTLASS_KERNELS),
    ],
)
def test_kernels_that_are_not_here_have_no_configurations(name: str) -> None:
    x = torch.randn(1, 8, 8, 2, 8)
    assert getattr(natten, name)(x, x, x) == []
    assert name in natten.__all__


def test_deterministic_mode_turns_kv_parallelism_off_and_forbids_it(switches: None) -> None:
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    with pytest.raises(RuntimeError, match="deterministic"):
        natten.use_kv_parallelism_in_fused_na(True)
    natten.use_kv_parallelism_in_fused_na(False)
    natten.use_deterministic_algorithms(False)
    natten.use_kv_parallelism_in_fused_na()
    assert natten.is_kv_parallelism_in_fused_na_enabled()


@pytest.mark.parametrize("preference", ["default", "strict", "unrestricted"])
def test_exactly_one_memory_preference_holds(preference: str, switches: None) -> None:
    natten.set_memory_usage_preference(preference)
    assert natten.get_memory_usage_preference() == preference
    holding = [name for name in ("default", "strict", "unrestricted") if getattr(natten, f"is_memory_usage_{name}")()]
    assert holding == [preference]


def test_an_unknown_memory_preference_is_refused_and_changes_nothing(switches: None) -> None:
    natten.set_memory_usage_preference("strict")
    with pytest.raises(ValueError, match="pref='fast'"):
        natten.set_memory_usage_preference("fast")
    assert natten.is_memory_usage_strict()


def test_compiling_the_backward_pass_is_allowed_separately(switches: None) -> None:
    def allowed() -> tuple[bool, bool]:
        return natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()

    assert allowed() == (False, False)
    natten.allow_flex_compile()
    assert allowed() == (True, False)
    natten.allow_flex_compile_backprop()
    assert allowed() == (True, True)
    natten.disable_flex_compile_backprop()
    assert allowed() == (True, False)
    natten.allow_flex_compile(backprop=True)
    natten.disable_flex_compile()
    assert allowed() == (False, False)


def test_switches_change_no_result(switches: None) -> None:
    q, k, v = torch.randn(3, 1, 6, 7, 2, 8)
    expected = natten.na2d(q, k, v, 3)
    natten.use_deterministic_algorithms()
    natten.set_memory_usage_preference("unrestricted")
    natten.allow_flex_compile(backprop=True)
    assert torch.equal(natten.na2d(q, k, v, 3), expected)
