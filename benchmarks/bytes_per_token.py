"""Bytes per token, errors and client memory of every encoding of a language model's logits.

The teacher is SmolLM2-135M in float32, served by a replica in its own process. The student is the same model with a
third of its layers left out, and the text is the licence. For each encoding a client process of its own gets the
features, and computes KL(teacher || student) and its gradient with respect to the student's logits. Errors are relative
to the same values computed in float64 from the plain logits. `peak_client_mb` is the peak memory of that process beyond
the student's logits; it includes the gradient and, for hidden states, the head.
`python benchmarks/bytes_per_token.py --json`
"""

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes
import schoolhouse as sh
import torch
from schoolhouse import encodings
from schoolhouse_server import serve
from smollm2 import VOCABULARY, load_model, tokens, untrained_model
from torch import nn
from torch.nn import functional as F

HEAD = "lm_head"
ENCODINGS: dict[str, encodings.Encoding | None] = {
    "plain": None,
    "bf16": encodings.bf16,
    "int8": encodings.int8,
    "topk64": encodings.topk(64),
    "sampled64": encodings.sampled(64, seed=0),
    "hidden_fp32": encodings.hidden(HEAD),
    "hidden_bf16": encodings.hidden(HEAD, encodings.bf16),
}


def _serve(ready: Connection, untrained: bool) -> None:
    teacher = untrained_model() if untrained else load_model()
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[: len(student.model.layers) * 2 // 3])
    with serve({"teacher": teacher, "student": student}, allow_head=True) as server:
        ready.send(server.urls)
        with contextlib.suppress(EOFError):
            ready.recv()


def ask(url: str, ids: torch.Tensor, encoding: encodings.Encoding | None, folder: Path | None) -> tuple[Any, int]:
    """The logits of a model in an encoding, and how many bytes were transferred for them."""
    with sh.connect(url, head_folder=folder, transport=sh.Transport(shared_memory=False)) as teacher:
        if isinstance(encoding, encodings.Hidden):  # fetches the head first, as it is transferred only once
            teacher.submit((), {"input_ids": ids[:, :1]}, [HEAD], encodings={HEAD: encoding}).result()
        before = teacher.traffic().received_bytes
        features = teacher.submit((), {"input_ids": ids}, [HEAD], encodings={HEAD: encoding}).result()
        return features[HEAD], teacher.traffic().received_bytes - before


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def _client(results: Connection, name: str, url: str, folder: Path) -> None:
    """Do one student step with one encoding; sends its bytes, loss and peak memory, and saves its gradient."""
    torch.set_num_threads(1)
    ids = torch.load(folder / "ids.pt")
    logits = torch.load(folder / "student.pt").requires_grad_()
    loss_fn = sh.LogitsDistillationLoss(reduction="sum")
    tiny = logits.detach()[:1, :2].clone().requires_grad_()
    loss_fn(tiny, tiny.detach()).backward()  # what a first backward loads must not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_kb = _kilobytes("VmRSS")
    features, nbytes = ask(url, ids, ENCODINGS[name], folder / name)
    loss = loss_fn(logits, features) / ids.numel()
    loss.backward()
    peak_mb = (_kilobytes("VmHWM") - before_kb) / 1024
    torch.save(logits.grad, folder / f"{name}.grad.pt")
    results.send((nbytes, loss.item(), peak_mb))


def reference(logits_s: torch.Tensor, logits_t: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean over tokens of KL(teacher || student), and its gradient by the student's logits, in float64."""
    log_t = F.log_softmax(logits_t.double(), dim=-1)
    log_s = F.log_softmax(logits_s.double(), dim=-1)
    count = logits_s.shape[:-1].numel()
    return ((log_t.exp() * (log_t - log_s)).sum() / count).item(), (log_s.exp() - log_t.exp()) / count


def measure(names: list[str], rows: int, length: int, *, untrained: bool) -> dict[str, Any]:
    """The results for these encodings."""
    ids = torch.randint(VOCABULARY, (rows, length)) if untrained else tokens(rows, length)
    server, _ = processes.start(_serve, untrained)
    urls = server.recv()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(ids, folder / "ids.pt")
        logits_s = ask(urls["student"], ids, None, None)[0]
        torch.save(logits_s.clone(), folder / "student.pt")
        logits_t, plain_bytes = ask(urls["teacher"], ids, None, None)
        exact, gradient = reference(logits_s, logits_t)
        figures = {}
        for encoding in names:
            client, _ = processes.start(_client, encoding, urls["teacher"], folder)
            nbytes, loss, peak_mb = client.recv()
            found = torch.load(folder / f"{encoding}.grad.pt").double().reshape(gradient.shape)
            figures[encoding] = {
                "bytes_per_token": round(nbytes / ids.numel(), 1),
                "kl_error": abs(loss - exact) / exact,
                "grad_error": ((found - gradient).norm() / gradient.norm()).item(),
                "peak_client_mb": round(peak_mb, 1),
            }
    return {"plain_bytes_per_token": round(plain_bytes / ids.numel(), 1), "encodings": figures}


def main() -> None:
    """Measure all encodings, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=4, help="number of texts in the batch")
    parser.add_argument("--length", type=int, default=256, help="number of tokens in each text")
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--untrained", action="store_true", help="a small model with random weights, to try this out")
    options = parser.parse_args()
    figures = measure(options.encodings, options.rows, options.length, untrained=options.untrained)
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(f"{'':12} bytes/token  KL error  gradient error  peak client MB\n")
    for name, row in figures["encodings"].items():
        sys.stdout.write(
            f"{name:12} {row['bytes_per_token']:11,.0f} {row['kl_error']:9.1e} {row['grad_error']:15.1e} "
            f"{row['peak_client_mb']:15,.0f}\n"
        )


if __name__ == "__main__":
    main()
