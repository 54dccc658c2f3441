"""Distillation: a student, a teacher and a config become a meta-model, which takes training steps.

How a batch passes through: `convert` has turned the student into a `model`, as its `config` and `mode` say. `prefetch`
takes the batch from the loader and asks the teacher for it ahead of time (`look_ahead`). The model's forward begins a
`step`, finds the `answer` that belongs to its inputs (`batch_identity`) or asks the teacher (`question`), and runs the
student. `compute_kd_loss` waits for the teacher's features and gives them to the losses (`loss_arguments`).
`layerwise` is the other meta-model; `parallel` holds what DistributedDataParallel and FSDP2 need; `unseen` warns of
arguments that a teacher would ignore.
"""
