"""Networks that read texts, each int rows (N, L) of `refract.models.multimodal.tokens` → features (N, width). Knows nothing of images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.multimodal.tokens import HashedNgrams, TokenizerTokens, Tokens

HASHING = "hashing"
POOLINGS = ("auto", "mean", "cls", "last")

NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of a `config.json` that a bundle leaves out: its weights are float32, whatever the model was stored in."""


class BagOfNgrams(nn.Module):
    """The mean of the n-grams' vectors, normalised, then a hidden layer (Joulin et al. 2017, arXiv:1607.01759). It needs no download."""

    def __init__(self, buckets: int, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.vectors = nn.EmbeddingBag(buckets + 1, width, mode="mean", padding_idx=0)
        self.hidden = nn.Sequential(
            nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)
        )

    def forward(self, texts: Tensor) -> Tensor:
        found: Tensor = self.hidden(self.vectors(texts))
        return found


class Transformer(nn.Module):
    """An encoder (as BERT) or decoder (as GPT) of Hugging Face. pooling: mean of the tokens' states, the first's (cls), or the last's."""

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        self.network, self.pooling = network, pooling
        config: Any = network.config
        self.width = int(getattr(config, "hidden_size", None) or config.d_model)

    def forward(self, texts: Tensor) -> Tensor:
        mask = texts > 0
        # Of a text that is missing one token is read, so that nothing is divided by nothing; what comes of it is not used.
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
class TextPart:
    """What a bundle says of the network that reads texts. name: `hashing`, or the model's; max_length: of a text, in words for hashing,
    else in tokens; pooling: of POOLINGS but auto; args: of BagOfNgrams; config: of a transformer, plain values, its `config.json`."""

    name: str
    max_length: int
    pooling: str
    args: Mapping[str, Any]
    config: Mapping[str, Any]

    def tokens(self, files: Mapping[str, bytes]) -> Tokens:
        """files: those that the bundle carries. ValueError."""
        if self.name == HASHING:
            return HashedNgrams(self.max_length, self.args.get("buckets", HashedNgrams.buckets))
        if TokenizerTokens.FILE not in files:
            raise ValueError(f"the tokenizer's file {TokenizerTokens.FILE} is missing")
        return TokenizerTokens(files[TokenizerTokens.FILE], self.max_length)

    def network(self) -> nn.Module:
        """With fresh weights; downloads nothing and runs no code of the model's own. ValueError."""
        if self.name == HASHING:
            own = {"buckets": HashedNgrams.buckets, **self.args}
            try:
                return BagOfNgrams(**own)
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
        except Exception as error:  # of many kinds, for values that do not go together
            raise ValueError(f"text.config: {_line(error)}") from error


def make_text_part(
    name: str, *, weights: str, max_length: int, pooling: str, args: Mapping[str, Any]
) -> tuple[TextPart, Tokens, nn.Module]:
    """What reads texts as training begins with it. name: `hashing`, or a transformer's folder or hub name; weights: `default`, its own, or
    `none`, fresh ones. Weights are read from safetensors alone. ValueError for what cannot be had, or does not read texts."""
    if pooling not in POOLINGS:
        raise ValueError(f"text.pooling: {pooling!r} is none of {', '.join(POOLINGS)}")
    if name == HASHING:
        part = TextPart(HASHING, max_length, "mean", dict(args), {})
        return part, part.tokens({}), part.network()
    if args:
        raise ValueError(f"text.args: {dict(args)} are for {HASHING}; {name} has its own config")
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
            own = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        else:
            own = AutoModel.from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError and those of the hub
        folder = " (a folder needs config.json, model.safetensors and tokenizer.json)" if Path(name).is_dir() else ""
        raise ValueError(f"text.name: {name} cannot be loaded{folder}: {_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"text.name: {name}: its tokenizer has no form that is stored in one file (tokenizer.json)")
    file = tokenizer.backend_tokenizer.to_str().encode()
    tokens = TokenizerTokens(file, max_length)
    _check_reads(name, own, tokens)
    if pooling == "auto":
        pooling = "last" if _is_causal(own) else "mean"
    plain = json.loads(config.to_json_string(use_diff=False)) | {"model_type": config.model_type}
    plain = {key: value for key, value in plain.items() if key not in NOT_KEPT}
    return TextPart(name, max_length, pooling, {}, plain), tokens, Transformer(own, pooling)


def _check_reads(name: str, network: nn.Module, tokens: TokenizerTokens) -> None:
    """ValueError for what is no network of texts, has fewer positions than a text has tokens, or knows fewer tokens than there are."""
    most = _positions(network)
    if most is not None and tokens.max_length > most:
        raise ValueError(f"text.max_length: {tokens.max_length} is more than the {most} tokens that {name} reads")
    try:
        known = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
        with torch.no_grad():
            Transformer(network.eval(), "mean")(torch.ones(1, tokens.max_length, dtype=torch.int32))
    except Exception as error:  # of any kind: it may be a network of images, or one that wants more than a text
        kind = type(network).__name__
        raise ValueError(f"text.name: {name} is a {kind}, which does not read a text alone: {_line(error)}") from error
    if tokens.vocabulary > known:
        raise ValueError(
            f"text.name: {name}: its tokenizer numbers {tokens.vocabulary} tokens, its network knows {known}: take the two from one "
            "model, or enlarge the network (resize_token_embeddings)"
        )


def _positions(network: nn.Module) -> int | None:
    """The longest text, in tokens, None where nothing bounds it. As RoBERTa numbers positions, those up to the filling's are not used."""
    config: Any = network.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return most if isinstance(most, int) else None


def _is_causal(network: nn.Module) -> bool:
    """Whether a token's state is made of those before it alone, as in decoders: what follows the first does not change its state."""
    with torch.no_grad():
        one, other = (network(input_ids=torch.tensor([[0, k]])).last_hidden_state[0, 0] for k in (0, 1))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
