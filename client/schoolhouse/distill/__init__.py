"""Distillation: a student, a teacher and a config become a meta-model, and its steps.

A batch's way: `convert` has made a `model` of the student, as its `config` says. `prefetch` takes the batch from the
loader and asks the teacher ahead (`look_ahead`); the model's forward begins a `step`, finds the answer that belongs
to its inputs (`batch_identity`, `question`) or asks for it, and runs the student; `compute_kd_loss` waits for the
teacher's features and gives them to the losses (`loss_arguments`). `layerwise` is the other meta-model; `parallel` is
what DistributedDataParallel and FSDP2 need; `unseen` warns of arguments that a teacher would ignore.
"""
