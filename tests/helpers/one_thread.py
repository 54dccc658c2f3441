"""Imported first: torch has one thread here, and in the processes that tests start.

What is compared to the bit must have as many: with another number, some processors' kernels add in another order.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
