"""The maths of the losses as pure functions of tensors; `schoolhouse.losses` holds the modules of the same names."""

from schoolhouse.functional.causal_lm import causal_lm, causal_lm_mean, causal_positions
from schoolhouse.functional.features import (
    attention_transfer,
    hidden_cosine,
    hidden_mse,
    mgd,
    rkd_angle,
    rkd_distance,
)
from schoolhouse.functional.logits import dkd, jsd, logits_distillation, mft, reverse_kl, skewed_kl

__all__ = [
    "attention_transfer",
    "causal_lm",
    "causal_lm_mean",
    "causal_positions",
    "dkd",
    "hidden_cosine",
    "hidden_mse",
    "jsd",
    "logits_distillation",
    "mft",
    "mgd",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "skewed_kl",
]
