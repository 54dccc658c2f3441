"""Values as messages and bytes: `codec` on `layouts`, `records`, `tensors` and the `tree` of nested values."""
