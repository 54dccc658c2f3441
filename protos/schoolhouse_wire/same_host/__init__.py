"""Payloads and messages between processes of one machine.

Payloads go through blocks (`blocks`) of a memory segment that both map (`shared_memory`), and messages through two
pipes (`pipes`) instead of the stream.
"""
