"""A causal language model: a small transformer learns from a larger one, token by token.

The teacher sends hidden states instead of logits, and only for tokens that the loss counts; the student fetches the
teacher's head once and computes the logits itself. Meanwhile the teacher works on the next batches.

It needs `transformers`, which the student side of Schoolhouse does not require. Both models start from random weights;
the teacher is first trained for a few seconds on the descriptions of scikit-learn's data sets, letter by letter.
"""

from collections.abc import Iterator

import schoolhouse as sh
import torch
from common import standing, start
from sklearn import datasets
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, IGNORED = 32, 8  # tokens in a sequence, and how many at its start are a prompt, which the loss leaves out


def main() -> None:
    """Train the teacher, then distil."""
    where = start(__doc__)
    tokens, vocabulary = text()
    held_out, tokens = tokens[:4000].unfold(0, LENGTH, LENGTH), tokens[4000:]
    teacher = train(language_model(vocabulary, width=64, layers=2), tokens, steps=200)
    print(f"teacher: next letter right {right(teacher, held_out)}")

    student = language_model(vocabulary, width=32, layers=1)
    print(f"student: next letter right {right(student, held_out)}")
    with standing(teacher, where) as teacher_model:
        config = {
            "teacher_model": teacher_model,
            "criterion": sh.CausalLMLoss(sh.SkewedKLLoss(alpha=0.1)),
            "encodings": sh.encodings.at_positions(sh.encodings.hidden("lm_head")),
            "positions": lambda ids: sh.functional.causal_positions(labels_of(ids)),
        }
        model = sh.convert(student, mode=[("kd_loss", config)])
        student = sh.export(train(model, tokens, steps=200))
    print(f"student, distilled: next letter right {right(student, held_out)}")
    with torch.no_grad():
        same = student(held_out).logits.argmax(-1) == teacher(held_out).logits.argmax(-1)
    print(f"agreement with the teacher: {same.float().mean():.3f}")


def train(model: nn.Module, tokens: torch.Tensor, steps: int) -> nn.Module:
    """Train on next-token prediction, or, for a converted model, on the teacher's distribution over the next token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    batches = sequences(tokens, steps)
    if isinstance(model, sh.DistillationModel):
        batches = model.prefetch(batches)
    for ids in batches:
        labels = labels_of(ids)
        logits = model(ids).logits
        if isinstance(model, sh.DistillationModel):
            loss = model.compute_kd_loss(labels=labels)  # labels are not shifted, as CausalLMLoss does that
        else:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sequences(tokens: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Yield `count` batches of token ids `[16, length]`."""
    for _ in range(count):
        begin = torch.randint(len(tokens) - LENGTH, (16, 1))
        yield tokens[begin + torch.arange(LENGTH)]


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The labels of a batch: its tokens, with -100 for those of the prompt."""
    labels = ids.clone()
    labels[:, :IGNORED] = -100
    return labels


def text() -> tuple[torch.Tensor, int]:
    """Tokens `[n]`, one for each letter, and how many different ones there are."""
    names = ("iris", "wine", "breast_cancer", "diabetes", "digits", "linnerud")
    letters = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    known = sorted(set(letters))
    return torch.tensor([known.index(letter) for letter in letters]), len(known)


def language_model(vocabulary: int, width: int, layers: int) -> nn.Module:
    """A small transformer with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


@torch.no_grad()
def right(model: nn.Module, ids: torch.Tensor) -> str:
    """The share of next letters that a plain model predicts correctly, as text."""
    return f"{(model.eval()(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean():.3f}"


if __name__ == "__main__":
    main()
