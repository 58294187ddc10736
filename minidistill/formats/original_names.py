"""The tensor names of single files, which come from the original latent-diffusion code: one table per network.

A table maps the beginning of our name to the beginning of theirs; the rest of the name is the same. The first entry
that matches applies.
"""

from minidistill.config import UNetConfig, VAEConfig

Table = dict[str, str]

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
OUTER = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.attentions.0.": "middle_block.1.",
}
PIXEL_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "self_attn.q_proj.": "attn.in_proj_",  # q, k and v are stacked in one matrix: see FUSED
    "self_attn.k_proj.": "attn.in_proj_",
    "self_attn.v_proj.": "attn.in_proj_",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
FUSED = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")  # in the order they are stacked


def translate(name: str, table: Table) -> str:
    """Our name -> theirs; a name that is in no entry stays the same."""
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def submodule(ours: str, theirs: str, table: Table) -> Table:
    """``table`` for a submodule that we call ``ours`` and they call ``theirs``."""
    return {ours + a: theirs + b for a, b in table.items()}


def unet_names(config: UNetConfig) -> Table:
    """They number blocks across all levels: ``layers`` blocks per level, then one more for the downsampling."""
    table = dict(OUTER)
    table |= submodule("mid_block.resnets.0.", "middle_block.0.", RESNET)
    table |= submodule("mid_block.resnets.1.", "middle_block.2.", RESNET)
    n = config.layers + 1
    for i, depth in enumerate(config.depth):
        for j in range(config.layers):
            block = f"input_blocks.{1 + i * n + j}."
            table |= submodule(f"down_blocks.{i}.resnets.{j}.", f"{block}0.", RESNET)
            if depth:
                table[f"down_blocks.{i}.attentions.{j}."] = f"{block}1."
        table[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{(i + 1) * n}.0.op."
    for i, depth in enumerate(reversed(config.depth)):
        for j in range(n):
            block = f"output_blocks.{i * n + j}."
            table |= submodule(f"up_blocks.{i}.resnets.{j}.", f"{block}0.", RESNET)
            if depth:
                table[f"up_blocks.{i}.attentions.{j}."] = f"{block}1."
        table[f"up_blocks.{i}.upsamplers.0."] = f"{block}{2 if depth else 1}."  # the end of the level's last block
    return table


def vae_names(config: VAEConfig) -> Table:
    """They number the decoder's levels from the finest."""
    levels = len(config.widths)
    table = {}
    for i in range(levels):
        for ours, theirs, layers in (
            (f"encoder.down_blocks.{i}.", f"encoder.down.{i}.", config.layers),
            (f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.", config.layers + 1),
        ):
            for j in range(layers):
                table[f"{ours}resnets.{j}.conv_shortcut."] = f"{theirs}block.{j}.nin_shortcut."
                table[f"{ours}resnets.{j}."] = f"{theirs}block.{j}."
            table[f"{ours}downsamplers.0."] = f"{theirs}downsample."
            table[f"{ours}upsamplers.0."] = f"{theirs}upsample."
    for side in ("encoder.", "decoder."):
        table[f"{side}mid_block.resnets.0."] = f"{side}mid.block_1."
        table[f"{side}mid_block.resnets.1."] = f"{side}mid.block_2."
        table |= submodule(f"{side}mid_block.attentions.0.", f"{side}mid.attn_1.", PIXEL_ATTENTION)
        table[f"{side}conv_norm_out."] = f"{side}norm_out."
    return table


# The text encoder of SD 1.x, the first of XL, with the names of older transformers.
CLIP_NAMES = {"embeddings.": "text_model.embeddings.", "encoder.": "text_model.encoder.", "final_": "text_model.final_"}


def openclip_names(layers: int) -> Table:
    """The text encoder of SD 2.x, the second of XL, with OpenCLIP's names."""
    table = {
        "embeddings.token_embedding.": "token_embedding.",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        "text_projection.weight": "text_projection",  # transposed
    }
    for i in range(layers):
        table |= submodule(f"encoder.layers.{i}.", f"transformer.resblocks.{i}.", CLIP_LAYER)
    return table
