"""Values as messages and bytes.

`codec` packs a nested value into a message and a payload, and unpacks it. `layouts` checks what a received message
declares, `records` are objects with named fields, `packed` the forms of encoded tensors, `tensors` is about their
memory, and `tree` walks through nested values.
"""
