"""Payloads and messages between processes of one machine: shared memory and its blocks, and pipes."""
