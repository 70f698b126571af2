"""A masked autoencoder (He et al. 2022, arXiv 2111.06377): most patches are hidden, and told from the others.

inputs -> the patches that are seen -> encoder (the backbone, a ViT) -> decoder with a token for every hidden patch
       -> pixels of every patch

Which patches are hidden comes with the images: see `data.masks`. What is pre-trained is the backbone; a later run
begins with it (`run.start RUN`, `run.start_with backbone`).
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mtl_dist.model_config import MaskedConfig
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.vit import LAYER_NORM, ViT, init_like_mae, sine_positions
from mtl_dist.tasks import Reconstruction


class MaskedAutoencoder(nn.Module):
    """`backbone`, which must be one of our ViTs, with a decoder of the width and depth of `masked`."""

    def __init__(self, backbone: Backbone, *, masked: MaskedConfig, input_size: int):
        super().__init__()
        assert isinstance(backbone, ViT)  # the configuration takes no other
        self.backbone, self.patch, self.share_hidden = backbone, backbone.patch, masked.share
        cells, width = input_size // backbone.patch, masked.decoder_width
        backbone.net.model.pos_embed.requires_grad_(False)
        self.decoder_embed = nn.Linear(backbone.num_channels, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sine_positions(width, cells), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(width, masked.decoder_heads, mlp_ratio=4, qkv_bias=True, norm_layer=LAYER_NORM)
                for _ in range(masked.decoder_depth)
            )
        )
        self.decoder_norm = LAYER_NORM(width)
        self.decoder_pred = nn.Linear(width, 3 * self.patch**2)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_like_mae(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, inputs: Tensor, valid: Tensor) -> Reconstruction:
        """Reconstruct the n valid frames of (B, T, 4, H, W): normalised images, and the places of `data.masks`."""
        # A sample has a frame at least: of single images there is nothing to look for, which a GPU would wait for.
        images, places = split_places(inputs[:, 0] if inputs.shape[1] == 1 else inputs[valid], self.patch)
        patches = cut_patches(images, self.patch)
        num_seen = int(patches.shape[1] * (1 - self.share_hidden))
        hidden = places >= num_seen
        if not len(images):
            nothing = sum(parameter.sum() for parameter in self.parameters())  # every one has a gradient: zero
            return Reconstruction(patches + nothing, patches, hidden)
        return Reconstruction(self._decode(self._encode(images, places, num_seen), places), patches, hidden)

    def _encode(self, images: Tensor, places: Tensor, num_seen: int) -> Tensor:
        """Return the tokens of the class and of the patches that are seen, (n, 1 + num_seen, width)."""
        vit = self.backbone.net.model
        tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        seen = places.argsort(1)[:, :num_seen, None].expand(-1, -1, tokens.shape[-1])
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first, tokens.gather(1, seen)], dim=1)))

    def _decode(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Return the pixels of all patches, (n, L, 3pp)."""
        tokens = self.decoder_embed(tokens)
        first, seen = tokens[:, :1], tokens[:, 1:]
        hidden = self.mask_token.expand(len(tokens), places.shape[1] - seen.shape[1], -1)
        # A patch's place is also where its token stands among those seen and, behind them, hidden.
        both = torch.cat([seen, hidden.to(seen.dtype)], dim=1)
        ordered = both.gather(1, places[:, :, None].expand(-1, -1, both.shape[-1]))
        tokens = torch.cat([first, ordered], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]


def split_places(inputs: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Part (n, 4, H, W) into images (n, 3, H, W) and the places of their patches (n, L) int64."""
    return inputs[:, :3], inputs[:, 3, ::patch, ::patch].flatten(1).long()


def cut_patches(images: Tensor, patch: int) -> Tensor:
    """Cut (n, 3, H, W) into patches (n, L, 3pp), rows of patches one after another."""
    parts = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (n, 3, h, w, p, p)
    return parts.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
