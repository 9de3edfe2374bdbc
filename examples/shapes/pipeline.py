"""The parts put together: an SDXL pipeline of the real classes, and its noise schedule."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from examples.shapes.text import POOLED, WIDTH, Texts

SIZE_WIDTH = 16  # of the embedding of each of the six size conditions
# DDPM's own: it ends in noise alone, where SDXL's leaves a trace of the ground's brightness
SCHEDULE = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
}


def new_unet() -> UNet2DConditionModel:
    """SDXL's blocks, three levels: no attention at the first, most weights at the last."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 3, 4),  # which is the number of heads
        transformer_layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=6 * SIZE_WIDTH + POOLED,
    )


def assemble(
    texts: Texts, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> StableDiffusionXLPipeline:
    """The pipeline; an empty prompt is encoded as any other, as it was in training."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=texts.first,
        text_encoder_2=texts.second,
        tokenizer=texts.tokenizer,
        tokenizer_2=texts.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
