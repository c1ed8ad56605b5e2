"""The shape of a decoder, as every family reads it from its `config.json` (`retool.model.families`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rope scaling (Meta's `apply_scaling`).

    Low frequencies are divided by `factor`, high ones are kept, with a ramp between the two.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071), with transformers' names.

    Pairs that turn more than `beta_fast` times within the original length are kept, those below
    `beta_slow` turns are divided by `factor`, with a ramp between. `truncate`: the ramp's ends are
    whole channels. `attention_factor`: what cos and sin are multiplied with.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_position: int


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: theta grows with a document that is longer than the original length."""

    factor: float
    original_max_position: int


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (Ding et al., arXiv 2402.13753): each pair of channels has a divisor of its own.

    Documents longer than the original length have those of `long`, others those of `short`. cos and
    sin are multiplied with `attention_factor` in both.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    original_max_position: int


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling | DynamicScaling | LongScaling


@dataclass(frozen=True)
class Experts:
    """A layer's experts: gated MLPs of `width` channels, `per_token` of `count` for each token.

    `normalised`: the weights of a token's experts add up to 1. `balance_coefficient` weighs the
    load-balance loss (`retool.model.experts.balance`); 0 where `config.json` asks for none.
    """

    count: int
    per_token: int
    width: int
    normalised: bool
    balance_coefficient: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder.

    `family` is a key of `retool.model.catalogue.families.FAMILIES`. `tied`: the vocabulary matrix is the
    embedding. The biases and `qk_norm` are what the family and its file say.

    `experts`: of every layer, which then has no MLP beside them.

    `rotary_dim`: how many of a head's channels rope turns, the first ones; 0 means all of them.
    `unrotated`: numbers of the layers without rope. `windows`: of each layer, how many tokens a query
    sees, itself the last of them; 0 means all before it, and no windows at all are (). `window_rope`:
    theta and scaling of the layers with a window (None: those of all). `norms_less_one`: a norm's
    weight is stored less 1.

    The scales multiply what the embedding gives (`rounded_embedding_scale`: in the weights' dtype),
    what attention and the MLP add to the residual stream, attention's scores (beside 1/√H) and the
    logits. The caps c make c · tanh(x / c) of scaled scores and of logits x; 0: they are as they are.
    """

    family: str
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position: int
    rotary_dim: int = 0
    windows: tuple[int, ...] = ()
    window_rope: tuple[float, RopeScaling | None] | None = None
    norms_less_one: bool = False
    rounded_embedding_scale: bool = False
    unrotated: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    score_scale: float = 1.0
    logits_scale: float = 1.0
    score_cap: float = 0.0
    logits_cap: float = 0.0
    experts: Experts | None = None

    @property
    def query_width(self) -> int:
        """Channels of all query heads, and of attention's result."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads; of all value heads too."""
        return self.kv_heads * self.head_dim

    @property
    def windowed(self) -> bool:
        """Whether a layer sees a part of a long document only."""
        return any(self.windows)

    def window(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself the last of them; 0: all before it."""
        return self.windows[layer] if self.windows else 0

    @property
    def turned_channels(self) -> int:
        """Channels of a head that rope turns."""
        return self.rotary_dim or self.head_dim

    @property
    def steady_length(self) -> int:
        """The longest document whose rope is that of every shorter one; 0: there is no longest.

        A cache of keys can't go beyond: one token more turns all of them by other angles.
        """
        match self.rope_scaling:
            case DynamicScaling() as scaling:
                return scaling.original_max_position
            case LongScaling() as scaling if scaling.short != scaling.long:
                return scaling.original_max_position
            case _:
                return 0
