"""Sentences as vectors, by an encoder that was trained for it."""

from collections.abc import Sequence
from typing import Any


class SentenceEncoder:
    """An encoder of Hugging Face by a local folder or its name; a sentence is the mean of its tokens' last states (Reimers & Gurevych
    2019, arXiv:1908.10084, section 3). ValueError where it cannot be loaded."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
        except (ImportError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{name}: cannot be loaded as an encoder of sentences ({reason})") from error

    def cosine(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """Of each text with the other at its place, in −1…1."""
        import torch

        one, other = self._vectors(texts), self._vectors(others)
        return torch.nn.functional.cosine_similarity(one, other).tolist()

    def _vectors(self, texts: Sequence[str]) -> Any:
        import torch

        given = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            states = self._model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
