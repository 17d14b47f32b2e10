"""Text encoders: each maps token numbers (N, L) of `refract.models.multimodal.tokens` to features (N, width). Independent of images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.modalities import HASHING
from refract.models.multimodal.tokens import HashedNgrams, TokenizerTokens, Tokens

POOLINGS = ("auto", "mean", "cls", "last")

EXCLUDED_KEYS = ("auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of a `config.json` that a bundle excludes. The dtype is among them because a bundle's weights are always float32."""


class BagOfNgrams(nn.Module):
    """Average the n-grams' vectors, normalise, apply a hidden layer. It needs no download. (N, L) → (N, width).

    Source: Joulin et al. 2017, arXiv:1607.01759.
    """

    def __init__(self, buckets: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.vectors = nn.EmbeddingBag(buckets + 1, width, mode="mean", padding_idx=0)
        self.hidden = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)
        )

    def forward(self, texts: Tensor) -> Tensor:
        features: Tensor = self.hidden(self.vectors(texts))
        return features


class Transformer(nn.Module):
    """A Hugging Face encoder (such as BERT) or decoder (such as GPT). (N, L) → (N, width).

    pooling: `mean` of the tokens' hidden states, the state of the first token (`cls`), or of the last token (`last`).
    """

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network, self.pooling = network, pooling
        config: Any = network.config
        self.width = int(getattr(config, "hidden_size", None) or config.d_model)

    def forward(self, texts: Tensor) -> Tensor:
        mask = texts > 0
        # A missing text keeps one token, so that no division by zero occurs; `Reader` replaces its features.
        mask = torch.cat([mask[:, :1] | ~mask.any(dim=1, keepdim=True), mask[:, 1:]], dim=1)
        ids = (texts - 1).clamp(min=0)
        states = self.network(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


@dataclass(frozen=True)
class TextSpec:
    """The text encoder as a bundle stores it.

    - name: `hashing`, or the name of the model
    - max_length: the longest text, in words for hashing, else in tokens
    - pooling: one of POOLINGS except auto
    - args: arguments of BagOfNgrams
    - config: the `config.json` of a transformer, plain values
    """

    name: str
    max_length: int
    pooling: str
    args: Mapping[str, Any]
    config: Mapping[str, Any]

    def tokens(self, files: Mapping[str, bytes]) -> Tokens:
        """Build the tokenizer. files: the bundle's tokenizer files, name → bytes. ValueError for a missing or invalid file."""
        if self.name == HASHING:
            return HashedNgrams(self.max_length, self.args.get("buckets", HashedNgrams.buckets))
        if TokenizerTokens.FILE not in files:
            raise ValueError(f"the tokenizer's file {TokenizerTokens.FILE} is missing; save the bundle again")
        return TokenizerTokens(files[TokenizerTokens.FILE], self.max_length)

    def network(self) -> nn.Module:
        """Build the encoder with fresh weights. Downloads nothing and executes no code of the model. ValueError for bad args or config."""
        if self.name == HASHING:
            args = {"buckets": HashedNgrams.buckets, **self.args}
            try:
                return BagOfNgrams(**args)
            except TypeError as error:
                raise ValueError(f"text.args: {dict(self.args)}: {error}") from error
        from transformers import AutoConfig, AutoModel

        plain = dict(self.config)
        kind = plain.pop("model_type", None)
        if not isinstance(kind, str) or "auto_map" in plain:
            raise ValueError(
                "text.config: expected the values of a config.json with a model_type, and without auto_map"
            )
        try:
            config = AutoConfig.for_model(kind, **plain)
            return Transformer(AutoModel.from_config(config, dtype=torch.float32), self.pooling)
        except Exception as error:  # transformers raises many kinds of exceptions for inconsistent values
            raise ValueError(f"text.config: {_line(error)}") from error


def make_text_encoder(
    name: str, *, weights: str, max_length: int, pooling: str, args: Mapping[str, Any]
) -> tuple[TextSpec, Tokens, nn.Module]:
    """Build the text encoder at the start of training. Returns (its spec, its tokenizer, its network).

    name: `hashing`, or a transformer's folder or hub name; weights: `default` for pretrained weights, which are read only from safetensors,
    `none` for fresh weights. ValueError for a model that cannot be loaded or does not read texts.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"text.pooling: {pooling!r}: expected one of {', '.join(POOLINGS)}")
    if name == HASHING:
        spec = TextSpec(HASHING, max_length, "mean", dict(args), {})
        return spec, spec.tokens({}), spec.network()
    if args:
        raise ValueError(f"text.args: {dict(args)}: only {HASHING} takes arguments; remove them for {name}")
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"text.name: {name} needs the extra text: pip install 'refract[text]' ({error})") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        if weights == "default":
            network = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        else:
            network = AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError and exceptions of the hub's client
        folder = " (a folder needs config.json, model.safetensors and tokenizer.json)" if Path(name).is_dir() else ""
        raise ValueError(f"text.name: {name} cannot be loaded{folder}: {_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"text.name: {name}: its tokenizer cannot be stored as tokenizer.json; choose another model")
    file = tokenizer.backend_tokenizer.to_str().encode()
    tokens = TokenizerTokens(file, max_length)
    _check_reads(name, network, tokens)
    if pooling == "auto":
        pooling = "last" if _is_causal(network) else "mean"
    plain = json.loads(config.to_json_string(use_diff=False)) | {"model_type": config.model_type}
    plain = {key: value for key, value in plain.items() if key not in EXCLUDED_KEYS}
    return TextSpec(name, max_length, pooling, {}, plain), tokens, Transformer(network, pooling)


def _check_reads(name: str, network: nn.Module, tokens: TokenizerTokens) -> None:
    """Raise ValueError for a network that does not read texts, has too few positions, or a smaller vocabulary than its tokenizer."""
    positions = _positions(network)
    if positions is not None and tokens.max_length > positions:
        raise ValueError(f"text.max_length: {tokens.max_length}: expected at most {positions}, the limit of {name}")
    try:
        vocabulary = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
        with torch.no_grad():
            Transformer(network.eval(), "mean")(torch.ones(1, tokens.max_length, dtype=torch.int32))
    except Exception as error:  # of any kind: the network may read images, or need more inputs than a text
        kind = type(network).__name__
        raise ValueError(f"text.name: {name} is a {kind}, which does not read a text alone: {_line(error)}") from error
    if tokens.vocabulary > vocabulary:
        raise ValueError(
            f"text.name: {name}: its tokenizer has {tokens.vocabulary} tokens, its network only {vocabulary}; take both "
            "from one model, or enlarge the network (resize_token_embeddings)"
        )


def _positions(network: nn.Module) -> int | None:
    """Return the longest text in tokens, None without a limit.

    A position table with a padding index, as RoBERTa's, does not use the positions up to that index.
    """
    config: Any = network.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions if isinstance(positions, int) else None


def _is_causal(network: nn.Module) -> bool:
    """Return whether later tokens do not change a token's state, as in decoders: test the first state with two second tokens."""
    with torch.no_grad():
        state, changed = (network(input_ids=torch.tensor([[0, k]])).last_hidden_state[0, 0] for k in (0, 1))
    return torch.allclose(state, changed, rtol=1e-4, atol=1e-6)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
