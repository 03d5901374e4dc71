"""Tiny diffusion transformers of the diffusers library with random weights, and example calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import normal

CONFIGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 32,
        "caption_channels": 24,
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 4,
        "sample_size": 8, "patch_size": 2, "cross_attention_dim": 24, "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 24, "hidden_size": 32, "text_len": 5, "text_len_t5": 6,
        "use_style_cond_and_image_meta_size": False,
    },
    "SD3Transformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 24, "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1,
        "num_single_layers": 1, "patch_size": 1, "joint_attention_dim": 24,
        "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8),
    },
}  # fmt: skip
"""The config of each model by the name of its class."""


def diffusers_model(name: str) -> nn.Module:
    """Return a model with fixed random weights, zeros of fresh layers among them made random."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**CONFIGS[name]).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def diffusers_call(name: str) -> dict[str, Any]:
    """Return the keyword arguments of an example call."""
    return {"return_dict": False, **_CALLS[name]()}


def _latent() -> dict[str, Any]:
    return {"hidden_states": normal(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}


def _dit() -> dict[str, Any]:
    return {**_latent(), "class_labels": torch.tensor([1, 4])}


def _pixart() -> dict[str, Any]:
    text = {"encoder_hidden_states": normal(2, 7, 24), "encoder_attention_mask": torch.ones(2, 7)}
    sizes = {"resolution": None, "aspect_ratio": None}
    return {**_latent(), **text, "added_cond_kwargs": sizes}


def _hunyuan() -> dict[str, Any]:
    angles = normal(16, 16, seed=5)
    return {
        **_latent(),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": normal(2, 5, 24),
        "text_embedding_mask": torch.ones(2, 5, dtype=torch.int64),
        "encoder_hidden_states_t5": normal(2, 6, 24),
        "text_embedding_mask_t5": torch.ones(2, 6, dtype=torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _sd3() -> dict[str, Any]:
    text = {"encoder_hidden_states": normal(2, 7, 24), "pooled_projections": normal(2, 24)}
    return {**_latent(), **text}


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": normal(2, 16, 4),
        "encoder_hidden_states": normal(2, 7, 24),
        "pooled_projections": normal(2, 24),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": normal(16, 3).abs(),
        "txt_ids": torch.zeros(7, 3),
    }


_CALLS = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "HunyuanDiT2DModel": _hunyuan,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
