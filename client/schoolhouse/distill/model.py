"""DistillationModel: a student whose forward also asks the teacher, and which computes the losses between the two."""

import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from schoolhouse_wire.torch_private import children_of
from torch import nn

from schoolhouse.distill.mode import BALANCER, EXTRAS, LOSSES, TEACHER, KDMode
from schoolhouse.distill.parallel import as_forward, check_data_parallel, check_loss_sharding, unshard_in_backward
from schoolhouse.distill.prefetch import Prefetch, prefetch
from schoolhouse.distill.step import Distillation, Step, eager, on_device_of
from schoolhouse.errors import ConfigError, FeatureMismatchError
from schoolhouse.losses.balancers import STUDENT_LOSS_KEY, DistillationLossBalancer
from schoolhouse.taps import Tap


class DistillationModel(nn.Module):
    """Mixin of the dynamic subclass that `convert` gives a student.

    It adds `_loss_modules` (the losses with parameters or buffers), `_loss_balancer`, and, if the teacher lives in this
    process, `_teacher_model` to the module tree. The mixin comes before the student's own class in the method
    resolution order, so its attributes, apart from ModelOpt's names, begin with `_schoolhouse`: other names could hide
    some of the student's.
    """

    _schoolhouse: Distillation
    _schoolhouse_mode: KDMode = KDMode()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        kind = type(self).__bases__[0]
        if make is copyreg.__newobj__ and issubclass(kind, DistillationModel):  # type: ignore[attr-defined]
            return (_new, (kind, self._schoolhouse.original_cls, *args[1:]), *rest)
        return (make, args, *rest)

    def _get_name(self) -> str:
        """The name that `print(model)` shows; the name of the class stays the student's own."""
        return f"Distillation{super()._get_name()}"  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> Any:
        raise ConfigError(
            "DataParallel runs copies of the student whose outputs would be lost; use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """The student's own, and the losses by their layers, since losses without state are not in the module tree."""
        pairs = self._schoolhouse.criterion.items()
        return "\n".join([*filter(None, [super().extra_repr()]), *(f"{pair}: {loss!r}" for pair, loss in pairs)])

    @property
    def original_cls(self) -> type[nn.Module]:
        """The student's own class."""
        return self._schoolhouse.original_cls

    @property
    def teacher_model(self) -> Any:
        """The teacher's module if it lives in this process, otherwise the Teacher, such as a RemoteTeacher."""
        return children_of(self).get(TEACHER, self._schoolhouse.teacher)

    @property
    def loss_modules(self) -> nn.ModuleList:
        """The losses that have parameters or buffers, in the order of the criterion."""
        return cast(nn.ModuleList, children_of(self)[LOSSES])

    @property
    def loss_balancer(self) -> DistillationLossBalancer | None:
        """The balancer, if any."""
        return cast("DistillationLossBalancer | None", children_of(self)[BALANCER])

    def hide_teacher_model(self, enable: bool = True) -> Any:
        """Context in which the teacher's module, if it lives in this process, is not in the module tree."""
        return _hidden(self, TEACHER, nn.Module, enable)

    def hide_loss_modules(self, enable: bool = True) -> Any:
        """Context in which the losses are not in the module tree."""
        return _hidden(self, LOSSES, nn.ModuleList, enable)

    @contextmanager
    def only_teacher_forward(self, enable: bool = True) -> Iterator[None]:
        """Context in which a forward runs only the teacher and returns its output, as it arrives in its encoding.

        A forward of the student on the same batch, within `only_student_forward`, completes the step.
        """
        state = self._schoolhouse
        before, state.only_teacher = state.only_teacher, enable or state.only_teacher
        try:
            yield
        finally:
            state.only_teacher = before

    @contextmanager
    def only_student_forward(self, enable: bool = True) -> Iterator[None]:
        """Context in which a forward runs only the student, as for validation."""
        state = self._schoolhouse
        before, state.only_student = state.only_student, enable or state.only_student
        try:
            yield
        finally:
            state.only_student = before

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; the teacher stays in eval mode, and a change of mode drops the step that is open."""
        if mode != self.training:
            self._schoolhouse.drop_step()
        super().train(mode)
        if (teacher := children_of(self).get(TEACHER)) is not None:
            teacher.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As `nn.Module.requires_grad_`; the teacher stays frozen."""
        super().requires_grad_(requires_grad)
        if (teacher := children_of(self).get(TEACHER)) is not None:
            teacher.requires_grad_(False)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.state_dict`, without the teacher if `expose_minimal_state_dict`."""
        with self._schoolhouse.lock, self.hide_teacher_model(self._schoolhouse.minimal_state_dict):
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; a checkpoint may hold the student alone.

        Teacher, losses and balancer stay as they are if the checkpoint does not contain them; with
        `expose_minimal_state_dict` the teacher always stays as it is.
        """

        def absent(name: str) -> bool:
            return not any(key.startswith(f"{name}.") for key in state_dict)

        with (
            self._schoolhouse.lock,
            self.hide_teacher_model(self._schoolhouse.minimal_state_dict or absent(TEACHER)),
            self.hide_loss_modules(absent(LOSSES)),
            _hidden(self, BALANCER, lambda: None, absent(BALANCER)),
        ):
            return super().load_state_dict(state_dict, *args, **kwargs)

    def prefetch(
        self,
        loader: Iterable[Any],
        depth: int = 4,
        inputs: Callable[[Any], Any] | None = None,
        *,
        max_bytes: int = 1 << 30,
        progress: Any = None,
    ) -> Prefetch:
        """Iterate over the batches of `loader` while the teacher already works on the next ones.

        Each forward gets the features of its own batch. In training, while a yielded batch waits for its forward, a
        forward on any other batch raises `FeatureMismatchError`; in eval mode it works as without look-ahead. For a
        batch on a GPU, other values are noticed only in `compute_kd_loss`, so that no forward waits for the device.

        Args:
            loader: any iterable of batches. It is read in this thread, up to `depth` batches ahead; an error that it
                raises is raised after the batches before it. For a DataLoader the result is a DataLoader too, of the
                same class and with the same attributes; with several ranks and a sampler that does not shard the data,
                a pass over it warns.
            depth: how many batches ahead of the yielded one the teacher is asked for, and how many yielded batches may
                wait for their forward, such as micro-batches that are taken together. A forward on a batch that was
                dropped for this bound raises `FeatureMismatchError`, which says what depth was needed.
            inputs: a function from a batch to the arguments of the model: `(args, kwargs)`, a tuple of positional
                arguments, a dict of keyword arguments, or a single argument. Without it, the student's forward takes
                the parts of the batch that have the names of its parameters, or as many leading items as it needs; and
                `labels` among them are not sent to the teacher, unless they have no default or the decoder's inputs are
                made from them.
            max_bytes: bound of what is held ahead, in bytes of inputs and features; features that have not arrived yet
                are estimated from earlier batches. One batch is always allowed.
            progress: called after each step with the seconds that it waited for the teacher; or a progress bar with
                `set_postfix`, such as tqdm's.

        Raises:
            ConfigError: for an invalid setting; or, from the loop, if it is unclear what the forward takes of a batch,
                or if a later write into the batch could not be noticed, as for an object of a type that cannot travel.
        """
        return prefetch(self._schoolhouse, loader, depth=depth, inputs=inputs, max_bytes=max_bytes, progress=progress)

    def export(self) -> nn.Module:
        """Give the plain student back: this object, of its own class, without hooks."""
        state = self._schoolhouse
        plain = _without_meta(type(self), state.original_cls)
        _detach(self)
        self.__class__ = plain  # type: ignore[assignment]
        object.__delattr__(self, "_schoolhouse")
        if state.own_forward is not None:
            self.forward = state.own_forward
        if state.owns_teacher:
            state.teacher.close()
        return self

    def compute_kd_loss(
        self,
        student_loss: torch.Tensor | None = None,
        loss_reduction_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        skip_balancer: bool = False,
        **loss_fn_kwargs: Any,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Wait for the teacher's features of the last forward's batch, compute the losses, and reduce them to a scalar.

        Args:
            student_loss: the student's own loss; needs a balancer.
            loss_reduction_fn: applied to each distillation loss before balancing, such as a masked mean.
            skip_balancer: return the losses by name instead: `ClassName_i` in the order of the criterion, and
                `STUDENT_LOSS_KEY`.
            **loss_fn_kwargs: passed to each loss whose forward has a parameter of that name, or `**kwargs`.

        Raises:
            ConfigError: for a student_loss without a balancer.
            UsageError: if there was no forward since the last call, if it ran in another thread, or for a keyword
                argument that no loss takes.
            FeatureMismatchError: if student and teacher did not run on the same batch, or if the forward ran on a batch
                that `prefetch` did not yield and this could not be noticed earlier.
            SchoolhouseError: whatever kept the teacher from answering.
        """
        state = self._schoolhouse
        balancer: Any = children_of(self)[BALANCER]
        if student_loss is not None and balancer is None:
            raise ConfigError("student_loss needs a loss_balancer; give one to convert, such as StaticLossBalancer()")
        arguments = state.loss_arguments.of_each(loss_fn_kwargs)
        step = state.complete_step()
        try:
            step.confirm()
            features = step.features()
        finally:
            state.step = state.alone = state.ended = None  # also after an error, with which the step is lost
        if step.match is not None:
            step.match.ahead.used(step.match.answer)
        losses: dict[str, torch.Tensor] = {} if student_loss is None else {STUDENT_LOSS_KEY: student_loss}
        layers = [layer for layer, _ in state.criterion]
        for name, loss in as_forward(self, layers, lambda: _losses(self, step, features, arguments)).items():
            losses[name] = loss if loss_reduction_fn is None else loss_reduction_fn(loss)
        self._schoolhouse_mode.mark(state, step, losses)
        if skip_balancer:
            return losses
        if balancer is None:
            return next(iter(losses.values()))
        total: torch.Tensor = balancer(losses)
        return total


def _detach(model: DistillationModel) -> None:
    """Undo what `KDMode.attach` has set up."""
    state = model._schoolhouse
    for handle in state.handles:
        handle.remove()
    for undo in state.undo:
        undo()
    state.drop_step()
    for ahead in [*state.loops.open]:
        ahead.close()
    for name in EXTRAS:
        children_of(model).pop(name, None)


@contextmanager
def _hidden(
    model: DistillationModel, name: str, stand_in: Callable[[], nn.Module | None], enable: bool
) -> Iterator[None]:
    children = children_of(model)
    enable = enable and name in children
    module = children.get(name)
    if enable:
        children[name] = stand_in()
    try:
        yield
    finally:
        if enable:
            children[name] = module


def run_forward(model: DistillationModel, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted student, which also asks the teacher for the batch."""
    state = model._schoolhouse
    if state.only_teacher and not state.only_student:
        return _ask_alone(model, args, kwargs)
    extras = _enter(model, args, kwargs)
    try:
        if state.own_forward is not None:
            output = state.own_forward(*args, **kwargs)
        else:
            output = state.original_cls.forward(model, *args, **kwargs)
        if extras is not None:
            _end(model, output)
    finally:
        _leave(model, extras)
    return output


def _losses(
    model: DistillationModel, step: Step, features: Mapping[Tap, Any], arguments: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    losses = {}
    for i, ((student_layer, teacher_layer), loss_fn) in enumerate(model._schoolhouse.criterion.items()):
        if student_layer not in step.outputs:
            raise FeatureMismatchError(f"the student's layer {student_layer!r} did not run in the last forward")
        output = step.outputs[student_layer]
        unshard_in_backward(model, student_layer, output)
        target = on_device_of(output, features[Tap(teacher_layer)])
        losses[f"{type(loss_fn).__name__}_{i}"] = loss_fn(output, target, **arguments[i])
    return losses


@eager
def _enter(model: DistillationModel, args: Any, kwargs: Any) -> dict[str, nn.Module | None] | None:
    """Begin a forward, and take the modules that `convert` added out of the module tree; returns them by name.

    A forward that runs all child modules, such as that of nn.Sequential, must not run those. None if this forward is
    within another one.
    """
    state = model._schoolhouse
    if not state.enter():
        return None
    try:
        children = children_of(model)
        losses = children[LOSSES]
        check_data_parallel(model, losses)
        check_loss_sharding(model, losses)
        state.begin(args, kwargs, model.training)
        return {name: children.pop(name) for name in EXTRAS if name in children}
    except BaseException:
        state.leave()
        raise


@eager
def _end(model: DistillationModel, output: Any) -> None:
    model._schoolhouse.end(output)


@eager
def _leave(model: DistillationModel, extras: dict[str, nn.Module | None] | None) -> None:
    children_of(model).update(extras or {})
    model._schoolhouse.leave()


@eager
def _ask_alone(model: DistillationModel, args: Any, kwargs: Any) -> Any:
    model._schoolhouse.enter()
    try:
        return model._schoolhouse.ask_alone(args, kwargs)
    finally:
        model._schoolhouse.leave()


def _new(kind: type[DistillationModel], student_class: type[nn.Module], *args: Any) -> Any:
    made = student_class.__new__(student_class, *args)
    object.__setattr__(made, "__class__", meta_class(kind, student_class))
    return made


_classes: dict[tuple[type, type], Any] = {}


def meta_class(kind: type[DistillationModel], student_class: type[nn.Module]) -> Any:
    """The dynamic subclass for students of `student_class`; the same one at each call."""

    @functools.wraps(student_class.forward)
    def forward(self: DistillationModel, *args: Any, **kwargs: Any) -> Any:
        return run_forward(self, *args, **kwargs)

    def new(_cls: type, *args: Any, **kwargs: Any) -> Any:
        return student_class(*args, **kwargs)

    # Under the student's own name and module, since other libraries look these up: transformers finds by them which
    # outputs it records and which architecture it saves. Calling the class makes a plain student.
    names = {name: getattr(student_class, name) for name in ("__module__", "__qualname__")}
    if (kind, student_class) not in _classes:
        space = {"forward": forward, "__new__": new, **names}
        _classes[kind, student_class] = type(student_class.__name__, (kind, student_class), space)
    return _classes[kind, student_class]


def _without_meta(converted: type, student_class: type[nn.Module]) -> type[nn.Module]:
    """The class without the mixin; a class that was added after `convert`, as by `fully_shard`, is kept."""
    if issubclass(converted.__bases__[0], DistillationModel):
        return student_class
    above, *rest = converted.__bases__
    if not rest or not issubclass(rest[-1], DistillationModel):
        raise ConfigError(f"the class of the model was changed to {converted.__name__} after convert; undo that first")
    own = {key: value for key, value in vars(converted).items() if key not in ("__dict__", "__weakref__")}
    return type(converted.__name__, (above, *rest[:-1], student_class), own)
