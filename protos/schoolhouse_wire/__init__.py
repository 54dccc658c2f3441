"""What both sides of the wire must agree on: messages, codec, channel options, errors. It imports neither side."""
