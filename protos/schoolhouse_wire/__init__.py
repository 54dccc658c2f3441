"""What both sides of the wire must agree on: messages, codec, channel options, errors. Imports neither side."""

from schoolhouse_wire import forks as forks  # before gRPC, which then reads the environment
