"""What both sides of the wire must agree on: messages, codec, channel options, errors. Imports neither side."""
