"""Other people's denoisers, tiny and random: how each is built, and how its own pipeline calls it."""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from tdq_utils import full_precision, quantized_layers


@dataclass(frozen=True)
class Denoiser:
    """A family.

    Attributes:
        kind: class in diffusers. config: of a tiny one. call: keyword arguments for ``batch`` samples, less the time step.
        times: three time steps as the family's pipeline gives them, noise first. time: name of that argument.
        carries_t: names of layers that must be kept because they carry t. batch: samples.
    """

    kind: str
    config: dict[str, Any]
    call: Any
    times: tuple[float, ...] = (999, 500, 1)
    time: str = "timestep"
    carries_t: tuple[str, ...] = ()
    batch: int = 2

    def build(self, **changed):
        """A random model, the same every time; ``changed``: in its config."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(diffusers, self.kind)(**self.config | changed).eval().requires_grad_(False)


def unchanged(model, run):
    """Quantized layers that ``run``, which calls the model, leaves out, or whose output is that of the full-precision layer."""
    seen, layers = {}, quantized_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
    run()
    for layer in layers.values():
        layer._forward_hooks.clear()
    with full_precision(model):
        # some layers start at zero
        return [name for name, layer in layers.items()
                if name not in seen or (layer.weight.any() and torch.equal(layer(seen[name][0]), seen[name][1]))]  # fmt: skip


def ids(n, width=3):
    return torch.arange(n * width, dtype=torch.float32).view(n, width) % 4


SMALL_UNET = dict(sample_size=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16), attention_head_dim=4)
SIGMA, UNIT = (1000.0, 749.25, 20.0), (1.0, 0.74925, 0.02)

ZOO = {
    "UNet2D, additive": Denoiser(
        "UNet2DModel",
        dict(**SMALL_UNET, in_channels=1, out_channels=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda n: dict(sample=torch.randn(n, 1, 8, 8)),
        carries_t=("down_blocks.0.resnets.0.time_emb_proj", "time_embedding.linear_1"),
    ),
    "UNet2D, classes": Denoiser(
        "UNet2DModel",
        dict(**SMALL_UNET, in_channels=1, out_channels=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10, resnet_time_scale_shift="scale_shift"),
        lambda n: dict(sample=torch.randn(n, 1, 8, 8), class_labels=torch.arange(n)),
        carries_t=("down_blocks.0.resnets.0.time_emb_proj",),
    ),
    "Stable Diffusion": Denoiser(
        "UNet2DConditionModel",
        dict(**SMALL_UNET, in_channels=4, out_channels=4, cross_attention_dim=12,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        lambda n: dict(sample=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12)),
        carries_t=("down_blocks.0.resnets.0.time_emb_proj", "time_embedding.linear_2"),
    ),
    "SDXL": Denoiser(
        "UNet2DConditionModel",
        dict(**SMALL_UNET, in_channels=4, out_channels=4, cross_attention_dim=12, use_linear_projection=True,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
             addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12),
        lambda n: dict(sample=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12),
                       added_cond_kwargs=dict(text_embeds=torch.randn(n, 12), time_ids=torch.ones(n, 6))),
        carries_t=("add_embedding.linear_1", "time_embedding.linear_1"),
    ),
    "DiT": Denoiser(
        "DiTTransformer2DModel",
        dict(sample_size=8, in_channels=2, out_channels=4, patch_size=2, num_layers=1, num_attention_heads=2,
             attention_head_dim=8, norm_num_groups=2, num_embeds_ada_norm=10),
        lambda n: dict(hidden_states=torch.randn(n, 2, 8, 8), class_labels=torch.arange(n)),
        carries_t=("transformer_blocks.0.norm1.linear",),
    ),
    "PixArt": Denoiser(
        "PixArtTransformer2DModel",
        dict(sample_size=8, in_channels=4, out_channels=8, patch_size=2, num_layers=1, num_attention_heads=2,
             attention_head_dim=8, norm_num_groups=2, num_embeds_ada_norm=1000, caption_channels=12, cross_attention_dim=16,
             use_additional_conditions=False),
        lambda n: dict(hidden_states=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12),
                       added_cond_kwargs=dict(resolution=None, aspect_ratio=None)),
        carries_t=("adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_1"),
    ),
    "SD 3": Denoiser(
        "SD3Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
             joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8),
        lambda n: dict(hidden_states=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12),
                       pooled_projections=torch.randn(n, 10)),
        SIGMA,
        carries_t=("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear"),
    ),
    "Flux": Denoiser(
        "FluxTransformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8)),
        lambda n: dict(hidden_states=torch.randn(n, 16, 4), encoder_hidden_states=torch.randn(n, 5, 12),
                       pooled_projections=torch.randn(n, 10), img_ids=ids(16), txt_ids=ids(5), guidance=torch.full((n,), 3.5)),
        UNIT,
        carries_t=("transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"),
    ),
    "Flux 2": Denoiser(
        "Flux2Transformer2DModel",
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda n: dict(hidden_states=torch.randn(n, 16, 4), encoder_hidden_states=torch.randn(n, 5, 12),
                       img_ids=ids(16, 4), txt_ids=ids(5, 4), guidance=torch.full((n,), 3.5)),
        UNIT,
        carries_t=("double_stream_modulation_img.linear", "single_stream_modulation.linear"),
    ),
    "Qwen-Image": Denoiser(
        "QwenImageTransformer2DModel",
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=12, axes_dims_rope=(8, 4, 4)),
        lambda n: dict(hidden_states=torch.randn(n, 16, 16), encoder_hidden_states=torch.randn(n, 5, 12),
                       encoder_hidden_states_mask=torch.ones(n, 5, dtype=torch.bool), img_shapes=[[(1, 4, 4)]] * n),
        UNIT,
        carries_t=("transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1"),
    ),
    "Z-Image": Denoiser(
        "ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
             n_kv_heads=2, cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[64, 64, 64]),
        lambda n: dict(x=[torch.randn(4, 1, 8, 8) for _ in range(n)], cap_feats=[torch.randn(5, 12) for _ in range(n)]),
        (0.0, 0.25075, 0.98),
        time="t",
        carries_t=("layers.0.adaLN_modulation.0",),
    ),
    "Lumina 2": Denoiser(
        "Lumina2Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
             num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0,
             axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=12),
        lambda n: dict(hidden_states=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12),
                       encoder_attention_mask=torch.ones(n, 5, dtype=torch.bool)),
        (0.0, 0.25075, 0.98),
        carries_t=("layers.0.norm1.linear",),
    ),
    "Sana": Denoiser(
        "SanaTransformer2DModel",
        dict(sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
             num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
             caption_channels=12),
        lambda n: dict(hidden_states=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12)),
        SIGMA,
        carries_t=("time_embed.linear", "time_embed.emb.timestep_embedder.linear_1"),
    ),
    "AuraFlow": Denoiser(
        "AuraFlowTransformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
             num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64),
        lambda n: dict(hidden_states=torch.randn(n, 4, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12)),
        UNIT,
        carries_t=("joint_transformer_blocks.0.norm1.linear",),
    ),
    "Wan": Denoiser(
        "WanTransformer3DModel",
        dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
             freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32),
        lambda n: dict(hidden_states=torch.randn(n, 4, 2, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12)),
        SIGMA,
        carries_t=("condition_embedder.time_proj",),
    ),
    "LTX": Denoiser(
        "LTXVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
             caption_channels=12),
        lambda n: dict(hidden_states=torch.randn(n, 8, 4), encoder_hidden_states=torch.randn(n, 5, 12),
                       encoder_attention_mask=torch.ones(n, 5, dtype=torch.bool), num_frames=2, height=2, width=2),
        SIGMA,
        carries_t=("time_embed.linear",),
    ),
    "HunyuanVideo": Denoiser(
        "HunyuanVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=12,
             pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)),
        lambda n: dict(hidden_states=torch.randn(n, 4, 1, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12),
                       encoder_attention_mask=torch.ones(n, 5), pooled_projections=torch.randn(n, 8),
                       guidance=torch.full((n,), 6000.0)),
        SIGMA,
        carries_t=("transformer_blocks.0.norm1.linear",),
    ),
    "UNet3D": Denoiser(
        "UNet3DConditionModel",
        dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
             cross_attention_dim=12, attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        lambda n: dict(sample=torch.randn(n, 4, 3, 8, 8), encoder_hidden_states=torch.randn(n, 5, 12)),
        carries_t=("time_embedding.linear_1",),
    ),
    "SVD": Denoiser(
        "UNetSpatioTemporalConditionModel",
        dict(sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
             cross_attention_dim=12, num_attention_heads=2, addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        lambda n: dict(sample=torch.randn(n, 3, 8, 8, 8), encoder_hidden_states=torch.randn(n, 1, 12),
                       added_time_ids=torch.ones(n, 3)),
        (1.6377, 0.5, -1.5),
        carries_t=("time_embedding.linear_1",),
    ),
    "UNet1D": Denoiser(
        "UNet1DModel",
        dict(sample_size=16, in_channels=2, out_channels=2, block_out_channels=(8, 8, 16), time_embedding_type="positional",
             use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0, extra_in_channels=0, layers_per_block=1,
             down_block_types=("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"),
             up_block_types=("UpResnetBlock1D", "UpResnetBlock1D"), mid_block_type="MidResTemporalBlock1D",
             out_block_type="OutConv1DBlock", act_fn="swish"),
        lambda n: dict(sample=torch.randn(n, 2, 16)),
        carries_t=("time_mlp.linear_1",),
    ),
}  # fmt: skip
