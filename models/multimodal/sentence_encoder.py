"""Sentence embeddings by a pretrained encoder."""

from collections.abc import Sequence
from typing import Any


class SentenceEncoder:
    """Embed sentences with a Hugging Face encoder, as the mean of the tokens' last hidden states.

    name: a local folder or a hub name. ValueError if the encoder cannot be loaded.
    Source: Reimers & Gurevych 2019, arXiv:1908.10084, section 3.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoModel, AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
        except (ImportError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{name}: cannot be loaded as a sentence encoder ({reason})") from error

    def cosine(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """Compute the cosine similarity, in −1…1, of each text and the element of `others` with the same index."""
        import torch

        return torch.nn.functional.cosine_similarity(self._vectors(texts), self._vectors(others)).tolist()

    def _vectors(self, texts: Sequence[str]) -> Any:
        import torch

        batch = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)
