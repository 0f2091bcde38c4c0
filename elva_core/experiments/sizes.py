"""What a Qwen2-VL of given sizes costs: parameters, floating-point operations, bytes. Pure arithmetic, nothing is loaded.

Linear layers cost 2 operations per weight and token, attention 4 per unit of width, token and position attended to (the
whole square: a mask saves nothing here). Letters: r rank of the adapter.

    sizes = of_tiny(settings.backbone.tiny)
    sizes.forward(tokens=64 * 200, context=200)
"""

from __future__ import annotations

from dataclasses import dataclass

from elva_core.config import ProfileError, TinySettings

MASTER_BYTES = 16  # of a trained parameter: float32 weight, gradient and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths and depths; `intermediate` is the width inside an MLP, `patch` in pixels, `tied` whether lm_head is the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_layers: int
    vision_intermediate: int
    patch: int
    merge: int = 2  # patches per side that become one token
    patch_frames: int = 2  # an image is repeated into that many
    channels: int = 3

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linear(self) -> int:
        """Weights of the language model's linear layers: what a token is multiplied with, and what decoding reads per step."""
        return self.layers * self.hidden * (2 * self.hidden + 2 * self.kv_width + 3 * self.intermediate)

    @property
    def language_parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return (
            embeddings
            + self.linear
            + self.layers * (self.hidden + 2 * self.kv_width + 2 * self.hidden)
            + self.hidden
        )

    @property
    def _patch_weights(self) -> int:
        return self.channels * self.patch_frames * self.patch**2 * self.vision_hidden

    @property
    def _block_weights(self) -> int:
        return 4 * self.vision_hidden**2 + 2 * self.vision_hidden * self.vision_intermediate

    @property
    def _merger_weights(self) -> int:
        merged = self.vision_hidden * self.merge**2
        return merged**2 + merged * self.hidden

    @property
    def vision_parameters(self) -> int:
        biases_and_norms = (
            4 * self.vision_hidden + self.vision_intermediate + self.vision_hidden + 4 * self.vision_hidden
        )
        merger = (
            self._merger_weights + self.vision_hidden * self.merge**2 + self.hidden + 2 * self.vision_hidden
        )
        return self._patch_weights + self.vision_layers * (self._block_weights + biases_and_norms) + merger

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision_parameters

    def adapter(self, rank: int) -> int:
        """LoRA weights on every linear layer of the language model."""
        h, kv, inner = self.hidden, self.kv_width, self.intermediate
        return self.layers * rank * (2 * (h + h) + 2 * (h + kv) + 3 * (h + inner))

    def image_tokens(self, pixels: float) -> float:
        """Tokens that an image of that many pixels becomes."""
        return pixels / (self.patch * self.merge) ** 2

    def forward(self, tokens: float, context: float, rank: int = 0) -> float:
        """FLOPs of the language model's layers on `tokens` that each attend to `context` positions."""
        return (
            2 * (self.linear + self.adapter(rank)) * tokens + 4 * self.layers * self.hidden * tokens * context
        )

    def backward(self, tokens: float, context: float, rank: int) -> float:
        """FLOPs of the way back: once the forward for frozen weights, whose own gradient nobody needs, twice for the rest."""
        return (
            2 * (self.linear + 2 * self.adapter(rank)) * tokens
            + 2 * 4 * self.layers * self.hidden * tokens * context
        )

    def vision(self, images: float, tokens_per_image: float) -> float:
        """FLOPs of the tower on images of equal size; always forward only, the tower is frozen."""
        per_image = tokens_per_image * self.merge**2
        blocks = self.vision_layers * (2 * self._block_weights + 4 * self.vision_hidden * per_image)
        return images * (
            per_image * (2 * self._patch_weights + blocks) + tokens_per_image * 2 * self._merger_weights
        )

    def logits(self, positions: float) -> float:
        """FLOPs of the output layer."""
        return 2 * self.hidden * self.vocabulary * positions

    def kv_bytes(self, width: int, *, repeated: bool = False) -> int:
        """Bytes that one token keeps in the key/value cache, `width` bytes a number.

        Repeated, for every head of the queries, are those that the way back needs: SDPA takes no fewer heads beside a padding mask.
        """
        return 2 * self.layers * (self.hidden if repeated else self.kv_width) * width

    def training_bytes(self, rank: int) -> int:
        """Adapter and [RET] row with gradient and AdamW's moments; PEFT keeps them in float32."""
        return MASTER_BYTES * (self.adapter(rank) + self.hidden)

    def shared_bytes(self, rank: int, processes: int) -> float:
        """The same where zero.py shares moments, a float32 copy and the summed gradient; weight and own gradient stay whole."""
        return (8 + 16 / processes) * (self.adapter(rank) + self.hidden)

    def activation_bytes(self, width: int, rank: int, *, dropout: bool, checkpointing: bool = False) -> float:
        """Bytes that one token keeps for the way back (autograd's saved tensors), `width` bytes a number.

        A bfloat16 model keeps a float32 copy of every adapter's input; dropout makes a copy and a mask of a byte whatever the dtype.
        With checkpointing only the input of each layer stays, and one layer at a time is computed again.
        """
        h, inner = self.hidden, self.intermediate
        inputs = 6 * h + inner  # of the adapters of q, k, v, o, gate, up and of down
        plain = 4 * inputs if width < 4 else 4 * (2 * h + inner)  # in one dtype the norms' outputs are shared
        copies = (4 + 1) * inputs if dropout else plain
        norms, attention, mlp = (
            4 * 2 * h,
            width * 4 * h,
            width * 3 * inner,
        )  # queries, repeated keys and values, result
        layer = copies + 4 * 7 * rank + norms + attention + mlp
        return width * h * self.layers + layer if checkpointing else self.layers * layer


def of_tiny(tiny: TinySettings, tokens_added: int) -> Sizes:
    """Sizes of the small backbone; its vocabulary may end up smaller, if the texts hold fewer words."""
    return Sizes(
        hidden=tiny.hidden,
        layers=tiny.layers,
        heads=tiny.heads,
        kv_heads=tiny.heads,
        intermediate=tiny.intermediate,
        vocabulary=tiny.vocabulary + tokens_added + tiny.spare_rows,
        tied=True,
        vision_hidden=tiny.vision_hidden,
        vision_layers=tiny.vision_layers,
        vision_intermediate=4 * tiny.vision_hidden,
        patch=tiny.patch,
    )


def of_config(config) -> Sizes:
    """Sizes of a transformers configuration.

    Raises:
        ProfileError: another family; its tower or layers are counted differently.
    """
    if config.model_type != "qwen2_vl":
        raise ProfileError(
            f"plan knows the sizes of Qwen2-VL, not of {config.model_type}; add like ones to params/plan.yaml: architectures"
        )
    text, vision = config.get_text_config(), config.vision_config
    return Sizes(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,
        vision_hidden=vision.embed_dim,
        vision_layers=vision.depth,
        vision_intermediate=vision.embed_dim * vision.mlp_ratio,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        patch_frames=vision.temporal_patch_size,
        channels=vision.in_channels,
    )
