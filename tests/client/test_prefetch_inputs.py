"""Look-ahead: what of a batch the forward takes, kinds of loaders and batches, and settings."""

import pytest
import schoolhouse as sh
import torch
from looking_ahead import batches, distilled, expected_loss
from models import Net, converted
from schoolhouse.errors import ConfigError, FeatureMismatchError
from schoolhouse_server import serve
from schoolhouse_wire.values.tree import tensors_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def test_inputs_say_what_the_forward_gets(teach):
    model = distilled(teach)
    for inputs in (
        lambda b: b["a"] * 2,
        lambda b: (b["a"] * 2,),
        lambda b: {"x": b["a"] * 2},
        lambda b: ((), {"x": b["a"] * 2}),
    ):
        for batch in model.prefetch([{"a": x} for x, _ in batches(2)], inputs=inputs):
            assert set(batch) == {"a"}
            model(batch["a"] * 2)
            loss = model.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), batch["a"] * 2), rel=1e-4)
    with pytest.raises(ConfigError, match=r"takes \['x'\], and the batch has \['a'\]: give prefetch inputs="):
        next(model.prefetch([{"a": torch.ones(2, 8)}]))


class Many(nn.Module):
    """A forward like those of language models."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = Net(seed=seed)

    def forward(self, input_ids=None, scale=None, labels=None):
        out = self.net(input_ids) * (1 if scale is None else scale)
        return out if labels is None else out + labels.sum()


def test_default_inputs_take_what_the_forward_takes():
    model = converted(Many(1), Many())
    x = torch.ones(2, 8)
    for batch in model.prefetch([{"input_ids": x, "scale": torch.tensor(2.0), "id": "a"}]):
        model(input_ids=batch["input_ids"], scale=batch["scale"])
        model.compute_kd_loss()
    for batch in model.prefetch([(x, torch.ones(2)), [x], x]):  # the first argument alone, since none is needed
        model(batch if isinstance(batch, torch.Tensor) else batch[0])
        model.compute_kd_loss()
    next(loop := iter(model.prefetch([{"input_ids": x, "scale": torch.ones(2, dtype=torch.int64)}])))
    with pytest.raises(FeatureMismatchError, match=r"scale=int64\[2\]"):
        model(input_ids=x)
    loop.close()


class Listens(sh.LocalTeacher):
    """A teacher in this process that writes down the names of what it was asked with."""

    def __init__(self, module):
        super().__init__(module)
        self.names = []

    def submit(self, args, kwargs, taps, **more):
        self.names.append(sorted(kwargs))
        return super().submit(args, kwargs, taps, **more)


def labelled(count=3):
    return [{"input_ids": x, "labels": y} for x, y in batches(count)]


@pytest.mark.parametrize("given", ["with", "without"])
def test_labels_stay_with_the_student(given):
    teacher = Listens(Many())
    model = converted(Many(1), teacher)
    for batch in model.prefetch(labelled()):
        own = dict(batch) if given == "with" else {"input_ids": batch["input_ids"]}
        out = model(**own)
        assert torch.equal(out, Many(1)(**own))
        want = sh.LogitsDistillationLoss()(out, Many()(batch["input_ids"]))
        assert torch.equal(model.compute_kd_loss(), want)
    assert teacher.names == [["input_ids"]] * 3


def test_inputs_may_give_the_teacher_labels():
    teacher = Listens(Many())
    model = converted(Many(1), teacher)
    for batch in model.prefetch(labelled(), inputs=dict):
        out = model(**batch)
        assert torch.equal(model.compute_kd_loss(), sh.LogitsDistillationLoss()(out, Many()(**batch)))
    assert teacher.names == [["input_ids", "labels"]] * 3


class NeedsLabels(Many):
    def forward(self, input_ids, labels):
        return super().forward(input_ids, labels=labels)


class Decodes(Many):
    """Makes the decoder's inputs of labels, as T5 does."""

    def forward(self, input_ids=None, decoder_input_ids=None, labels=None):
        decoder_input_ids = labels.flip(0) if decoder_input_ids is None else decoder_input_ids
        return super().forward(input_ids) * decoder_input_ids.sum()


@pytest.mark.parametrize("kind", [NeedsLabels, Decodes])
def test_labels_that_a_forward_needs_are_the_teachers_too(kind):
    teacher = Listens(kind())
    model = converted(kind(1), teacher)
    for batch in model.prefetch(labelled()):
        out = model(**batch)
        assert torch.equal(model.compute_kd_loss(), sh.LogitsDistillationLoss()(out, kind()(**batch)))
    assert teacher.names == [["input_ids", "labels"]] * 3
    decoded = [{**batch, "decoder_input_ids": batch["labels"].flip(0)} for batch in labelled()]
    for batch in model.prefetch(decoded) if kind is Decodes else ():
        model(**batch)
        model.compute_kd_loss()
        assert teacher.names.pop() == ["decoder_input_ids", "input_ids"]


def test_positions_may_be_made_of_labels():
    def some(input_ids, labels, **_):
        assert len(labels) == len(input_ids)
        return torch.ones(len(input_ids), 5, dtype=torch.bool)

    more = {"encodings": sh.encodings.at_positions(sh.encodings.fp16), "positions": some}
    model = converted(Positioned(1), Positioned(), Away(), **more)
    for batch in model.prefetch(labelled()):
        model(**batch)
        assert model.compute_kd_loss() > 0


class Positioned(Many):
    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids).unsqueeze(-1).expand(-1, -1, 4)


class Away(nn.Module):
    def forward(self, student, teacher):
        return (student.sum() - sum(tensor.float().sum() for tensor in tensors_of(teacher))).abs()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # nothing to pin for on this machine
def test_a_data_loader_with_workers():
    data = TensorDataset(torch.randn(20, 8), torch.arange(20))
    with serve(Net(32)) as server, sh.connect(server.url) as teacher:
        model = converted(Net(seed=1), teacher)
        loader = DataLoader(data, batch_size=4, num_workers=2, pin_memory=True, multiprocessing_context="spawn")
        seen = []
        for x, y in model.prefetch(loader, depth=2):
            model(x)
            loss = model.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
            seen += y.tolist()
    assert seen == list(range(20))
    assert len(model.prefetch(loader)) == 5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"depth": True}, "depth is True"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"inputs": "x"}, "inputs is a str"),
        ({"progress": 3}, "progress is a int"),
    ],
)
def test_wrong_settings(wrong, says):
    model = converted(Net(seed=1), Net(32))
    with pytest.raises(ConfigError, match=says):
        model.prefetch(batches(1), **wrong)
    with pytest.raises(ConfigError, match="loader is a int"):
        model.prefetch(3)


class Image(torch.Tensor):
    """A tensor that knows more, as torchvision's."""


class Graph:
    """A batch of a user's own."""

    def __init__(self, x):
        self.x = x


class OfGraph(Net):
    def forward(self, graph):
        return super().forward(graph.x)


def test_a_tensor_of_a_subclass_is_known_by_its_values(teach):
    model = distilled(teach)
    image = torch.zeros(4, 8).as_subclass(Image)

    def reused():
        for i in range(4):
            image.data.fill_(i)  # unseen by version counters
            yield image

    for x in model.prefetch([x.as_subclass(Image) for x, _ in batches(3)], depth=2):
        model(x.clone())
        loss = model.compute_kd_loss().item()
        assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x.as_subclass(torch.Tensor)), rel=1e-4)
    next(loop := iter(model.prefetch(reused(), depth=2)))
    with pytest.raises(FeatureMismatchError, match="with other values"):
        model(image)
    loop.close()


@pytest.mark.parametrize("make", [Graph, lambda x: {"graph": {x}}, lambda x: torch.nested.nested_tensor([x])])
def test_a_batch_whose_changes_cannot_be_seen_is_refused(make):
    """One that is written into and yielded again would get the features of what it was."""
    model = converted(OfGraph(seed=1), sh.LocalTeacher(OfGraph(32)))
    loop = iter(model.prefetch([make(torch.ones(2, 8))]))
    with pytest.raises(ConfigError, match="written into .* cannot be told: give prefetch inputs="):
        next(loop)


def test_inputs_that_raise_stop_iteration_do_not_end_the_loop():
    some = iter([1])
    model = converted(Net(seed=1), Net(32))
    loop = iter(model.prefetch(batches(3), inputs=lambda batch: (next(some), batch[0])[1]))
    next(loop)
    with pytest.raises(RuntimeError, match="inputs raised StopIteration"):
        next(loop)


class Images(Net):
    def forward(self, images):
        return super().forward(torch.cat(images))


def test_inputs_that_make_a_list_make_one_argument():
    model = converted(Images(seed=1), Images(32))
    for images in model.prefetch([[torch.ones(2, 8), torch.ones(1, 8)]], inputs=lambda batch: batch):
        model(images)
        model.compute_kd_loss()


class Sums(Net):
    def forward(self, **parts):
        return super().forward(parts["a"] + parts["b"])


def test_keyword_arguments_in_any_order():
    model = converted(Sums(seed=1), Sums(32))
    for batch in model.prefetch([{"a": torch.ones(2, 8), "b": torch.ones(2, 8)}]):
        model(b=batch["b"], a=batch["a"])
        model.compute_kd_loss()


class First(Net):
    def forward(self, x, /, scale=None):
        return super().forward(x)


def test_a_positional_only_argument_cannot_be_taken_by_name():
    model = converted(First(seed=1), First(32))
    with pytest.raises(ConfigError, match="give prefetch inputs="):
        next(iter(model.prefetch([{"x": torch.ones(2, 8), "scale": torch.ones(2)}])))
