"""Packed forms are checked before they are used: a peer may have sent anything."""

import dataclasses
import math

import pytest
import schoolhouse as sh
import torch
from schoolhouse.sparse import decode
from schoolhouse.teachers.encoder import encode
from schoolhouse_wire.encodings import Sampled, TopK
from schoolhouse_wire.errors import CorruptPayloadError, ProtocolError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.v1 import values_pb2
from schoolhouse_wire.values import codec
from test_codec import trip
from test_encodings import MASK, some


def fields_of(packed):
    return {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}


TOP = encode(some(2, 9), TopK(k=3))
DRAWN = encode(some(2, 9), Sampled(n=5, seed=0))
NO_ROWS = encode(some(0, 9), Sampled(n=5, seed=0))
CAST = encode(some(2, 9), sh.encodings.bf16)
ROWS = encode(some(2, 9), sh.encodings.int8)
PLACED = encode(some(2, 3, 9), sh.encodings.at_positions(), MASK)


@pytest.mark.parametrize(
    ("packed", "changed"),
    [
        (TOP, {"classes": 2}),
        (TOP, {"classes": 3, "indices": torch.full((2, 3), 3, dtype=torch.uint16)}),
        (TOP, {"indices": torch.full((2, 3), -1, dtype=torch.int32)}),
        (TOP, {"indices": TOP.indices.long()}),
        (TOP, {"indices": TOP.indices[:1]}),
        (TOP, {"tail": TOP.tail[:1]}),
        (TOP, {"tail": None}),
        (TOP, {"values": TOP.values.long()}),
        (TOP, {"values": torch.tensor(1.0)}),
        (TOP, {"classes": "9"}),
        (TOP, {"classes": True}),
        (TOP, {"classes": 1 << 31}),
        (NO_ROWS, {"classes": -5}),
        (TOP, {"temperature": 10**400}),
        (TOP, {"temperature": 0.0}),
        (TOP, {"temperature": math.nan}),
        (TOP, {"temperature": None}),
        (DRAWN, {"n": 0}),
        (DRAWN, {"n": 6}),
        (DRAWN, {"n": 2.0}),
        (DRAWN, {"counts": DRAWN.counts.int()}),
        (DRAWN, {"counts": DRAWN.counts[:1]}),
        (DRAWN, {"log_probs": DRAWN.log_probs[:, :1]}),
        (DRAWN, {"log_probs": DRAWN.counts}),
        (DRAWN, {"classes": 1}),
        (DRAWN, {"indices": torch.tensor(1, dtype=torch.uint16)}),
        (CAST, {"values": some(2, 9)}),
        (CAST, {"dtype": values_pb2.BFLOAT16}),
        (CAST, {"dtype": values_pb2.INT64}),
        (CAST, {"dtype": 99}),
        (CAST, {"dtype": None}),
        (ROWS, {"values": some(2, 9)}),
        (ROWS, {"values": torch.tensor(1, dtype=torch.int8)}),
        (ROWS, {"scales": ROWS.scales[:1]}),
        (ROWS, {"scales": ROWS.scales.double()}),
        (ROWS, {"scales": torch.zeros(2, 1)}),
        (ROWS, {"scales": torch.full((2, 1), math.nan)}),
        (PLACED, {"mask": MASK.long()}),
        (PLACED, {"mask": torch.tensor(True)}),
        (PLACED, {"mask": torch.ones_like(MASK)}),
        (PLACED, {"values": PLACED}),
        (PLACED, {"values": 3}),
        (PLACED, {"values": TOP}),
        (PLACED, {"values": DRAWN}),
        (PLACED, {"values": ROWS}),
    ],
)
def test_packed_forms_that_do_not_fit_together_are_refused(packed, changed):
    decode(packed)
    with pytest.raises(CorruptPayloadError, match=r"arrived"):
        decode(trip([type(packed)(**{**fields_of(packed), **changed})]))


@pytest.mark.parametrize("packed", [TOP, DRAWN, CAST, ROWS, PLACED], ids=lambda packed: type(packed).__name__)
def test_packed_forms_travel_by_their_numbers(packed):
    header = codec.pack([packed]).header
    assert b"schoolhouse" not in header  # where a class stands in Python is not the wire's
    bundle = values_pb2.Bundle.FromString(header)
    [node] = bundle.root.list.items

    def received():
        layout = codec.read_layout(bundle.SerializeToString(), Limits())
        return codec.unpack(layout, bytearray(4096), Limits())

    assert type(received()[0]) is type(packed)
    del node.packed.fields[0]
    with pytest.raises(CorruptPayloadError, match=f"a {type(packed).__name__} arrived with"):
        received()
    node.packed.form = 99
    with pytest.raises(ProtocolError, match="form 99 arrived"):
        received()


def test_forms_that_nobody_checked_are_refused():
    form = decode(TOP)
    with pytest.raises(ProtocolError, match="TopKLogits arrived, which is not a form"):
        decode(trip({"a": form}))
