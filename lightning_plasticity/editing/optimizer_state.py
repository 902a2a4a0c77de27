"""What becomes of an optimizer's memory of the entries of a parameter that get new values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer, Rprop

from lightning_plasticity.editing.entry_ages import AGE, Follower, count_ages, may_overshoot
from lightning_plasticity.notices import warn
from lightning_plasticity.shards.sums import sum_over_shards
from lightning_plasticity.shards.tensors import is_shared_out, local

OptimizerState: TypeAlias = Literal["survivors", "reset", "keep"]
OPTIMIZER_STATES: tuple[OptimizerState, ...] = get_args(OptimizerState)

# One value per tensor whatever the tensor's shape, so that a parameter without dimensions is no exception.
_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
# Copies of the weight, or averages that start from it; 0 would pull the weight towards 0. In this order of: ASGD,
# Schedule-Free, MADGRAD, timm's Lookahead.
_COPIES_OF_THE_WEIGHT = frozenset({"ax", "z", "x0", "lookahead_slow_buff"})
# How large gradients have been, by which updates are divided. In this order of: Adam and most of its kin, AdaBelief,
# Adamax, RMSprop and Adadelta, Adadelta, Adagrad, MADGRAD, AdaHessian.
_SIZES_OF_GRADIENTS = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "exp_inf", "square_avg"}
) | {"acc_delta", "sum", "grad_sum_sq", "exp_hessian_diag_sq"}
_Index: TypeAlias = tuple[Tensor | slice, ...]


class EntryState:
    r"""Renews the state that optimizers have for the entries of a parameter, when these entries get new values.

    State of an entry is what has the parameter's shape, found by the parameter's identity. Momentum goes back to where
    it starts, in most optimizers to 0. How large gradients have been is what updates are divided by, and there the
    modes differ:

    - ``"survivors"``: it becomes the mean over the entries of the tensor that are not renewed. Adam's first updates are
      then :math:`(1 - \beta_1^a) |g| / \sqrt{\beta_2^a \overline v + \dots}` learning rates at age :math:`a`: for
      gradients of the usual size at most what a fresh Adam's would be, one learning rate, and less for smaller ones.
    - ``"reset"``: it starts from 0, as if the entry were new to the optimizer. Where an optimizer counts steps by
      tensor, that alone would make the first updates too large, with Adam up to 6.6 learning rates: so with PyTorch's
      Adam, AdamW, Adamax, NAdam and RAdam each entry's age is kept beside, and its steps are made those of a fresh
      optimizer (``docs/optimizer_state.md`` says how, and how nearly). Optimizers that do not count (SGD, RMSprop,
      Adagrad, Adadelta, Rprop) need no more than to be cleared; for others that do count ``"survivors"`` is better.
    - ``"keep"``: nothing is touched.

    LBFGS remembers how gradients change along its own steps, for all of its parameters together. A weight that somebody
    else has changed makes that wrong, and later steps may then be of any size: it begins anew, with every mode.

    A whole tensor that is renewed has no survivors: with both modes it starts as in a fresh optimizer, its count of
    steps too.

    Args:
        optimizers: Where to look. Optimizers that hold another one (Lightning's and Fabric's wrappers,
            ``ZeroRedundancyOptimizer``, Lookahead, SAM) are looked into.
        mode: What happens to the state.

    Raises:
        ValueError: If there is no such mode.

    Example:
        >>> weight = nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
        >>> EntryState([optimizer], "survivors").renew_masked(weight, torch.tensor([True, False, False, False]))
        >>> optimizer.state[weight]["sum"]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, optimizers: Iterable[Optimizer], mode: OptimizerState) -> None:
        if mode not in OPTIMIZER_STATES:
            raise ValueError(f"optimizer_state must be one of {OPTIMIZER_STATES}, but is {mode!r}.")
        every = [level for optimizer in optimizers for level in levels(optimizer)]
        self._lbfgs = [level for level in every if isinstance(level, LBFGS)]
        # Without any where state is kept: it is asked first, for some methods write all tensors at every step.
        self._optimizers = [] if mode == "keep" else every
        self._followers: list[Follower] = []
        self._mode = mode
        self._warned: set[str] = set()

    def follow(self) -> None:
        """Begin to look after entries whose state starts from 0, until :meth:`close`."""
        self._followers = [Follower(optimizer) for optimizer in self._optimizers if self._mode == "reset"]

    def close(self) -> None:
        """Leave the optimizers alone."""
        for follower in self._followers:
            follower.remove()
        self._followers = []

    def renew(self, parameter: Tensor, index: _Index, count: int, view: Callable[[Tensor], Tensor]) -> None:
        """Renew the entries at an index of what ``view`` makes of a tensor of the parameter's shape.

        Args:
            parameter: whose state.
            index: of entries of the part that this rank holds.
            count: how many entries are renewed on all ranks.
            view: how the index counts.
        """
        self._begin_to_renew(parameter)
        for key, state, initial in self.of(parameter):
            entries = view(state)
            if not self._follows_survivors(key):
                write_at(entries, index, initial if initial.ndim == 0 else view(initial)[index])
                continue
            survivors = parameter.numel() - count
            of_all = None if survivors else _sum(entries[index])  # there is nobody else
            write_at(entries, index, 0.0)
            [total] = sum_over_shards([_sum(state) if of_all is None else of_all], [parameter])
            write_at(entries, index, _finite(total / (survivors or count)))

    def renew_masked(self, parameter: Tensor, mask: Tensor) -> None:
        """Renew the entries where a mask of the shape of the part that this rank holds is true."""
        self._begin_to_renew(parameter)
        for key, state, initial in self.of(parameter):
            if self._follows_survivors(key):
                total = _sum(state)
                torch.where(mask, torch.zeros_like(total, dtype=state.dtype), state, out=state)
                survivors = torch.count_nonzero(~mask)
                sums = sum_over_shards([total, _sum(state), survivors.double()], [parameter] * 3)
                mean_of_all, mean = sums[0] / parameter.numel(), sums[1] / sums[2].to(total)
                initial = _finite(torch.where(sums[2] > 0, mean, mean_of_all)).to(state.dtype)
            torch.where(mask, initial, state, out=state)

    def renew_whole(self, parameters: Sequence[Tensor]) -> None:
        """Renew all entries of parameters, and the counts that belong to them."""
        self.restart_lbfgs(parameters)
        for parameter in parameters if self._optimizers else ():
            for _, state, initial in self.of(parameter):
                state.copy_(initial)
            for optimizer in self._optimizers:
                if not isinstance(optimizer, LBFGS):
                    restart_counts(optimizer, parameter)

    @property
    def has_lbfgs(self) -> bool:
        """Whether there is an optimizer that must know of every change."""
        return bool(self._lbfgs)

    def restart_lbfgs(self, parameters: Sequence[Tensor]) -> None:
        """Let LBFGS begin anew, where it trains one of these parameters."""
        for optimizer in self._lbfgs:
            if optimizer.state and any(_group(optimizer, parameter) is not None for parameter in parameters):
                optimizer.state.clear()  # it is kept with the first parameter, for all

    def _begin_to_renew(self, parameter: Tensor) -> None:
        self.restart_lbfgs([parameter])
        for optimizer in self._optimizers if self._mode == "reset" else ():
            count_ages(optimizer, parameter)
            if may_overshoot(optimizer, parameter):
                self._warn_once(
                    "count of steps",
                    f"optimizer_state='reset' clears what {type(optimizer).__name__} remembers of new weights, but it "
                    "counts steps by tensor. If it makes up for averages that began at 0, as Adam does, the first "
                    "steps of new weights are several times too large. Use optimizer_state='survivors', or an "
                    "optimizer of PyTorch.",
                )

    def _follows_survivors(self, key: str) -> bool:
        return self._mode == "survivors" and key in _SIZES_OF_GRADIENTS

    def of(self, parameter: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each such state, the part on this rank, with its name and initial value.

        The initial value is one for all entries, or may be a view of the parameter: use it at once.
        State that has no value for each entry is left out, and a warning says so the first time.
        """
        for optimizer in self._optimizers:
            if isinstance(optimizer, LBFGS):
                continue
            for key, state in optimizer.state.get(parameter, {}).items():
                if key in _COUNTERS:
                    continue
                if key == AGE and self._mode == "survivors":  # their second moment needs no making up for
                    yield key, local(state), local(state).new_full((), torch.inf)
                elif has_the_entries_of(parameter, state):
                    yield key, local(state), _initial(optimizer, key, local(parameter), parameter, local(state))
                elif holds_many_values(state):
                    self._warn_once(
                        "state of another form",
                        f"The state {key!r} of {type(optimizer).__name__} has no entry for each weight: it cannot be "
                        "reset for the weights that are edited, and stays as it is. Use an optimizer whose state has "
                        "the shape of the weights, such as AdamW, or accept this with optimizer_state='keep'.",
                    )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warn(message)


def levels(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer after those that it holds, for either may have state."""
    held = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "base_optimizer", "_base_optimizer"))
    return [level for inner in held if isinstance(inner, Optimizer) for level in levels(inner)] + [optimizer]


def _group(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    return next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), None)


def _lr(optimizer: Optimizer, parameter: Tensor) -> float | Tensor:
    group = _group(optimizer, parameter)
    assert group is not None, "an optimizer has state for its own parameters only"
    lr: float | Tensor = group["lr"]
    return lr


def has_the_entries_of(parameter: Tensor, state: Any) -> bool:
    """Whether a state has a value for each entry of a parameter."""
    if not isinstance(state, Tensor) or is_shared_out(state) != is_shared_out(parameter):
        return False
    # Quantised state, whether integers or a tensor subclass, has no entries that can be set one by one.
    is_plain = type(local(state)) in (Tensor, nn.Parameter) and state.is_floating_point()
    return is_plain and state.shape == parameter.shape and local(state).shape == local(parameter).shape


def holds_many_values(state: Any) -> bool:
    """Whether a state is more than one number."""
    if isinstance(state, Tensor):
        return state.numel() > 1
    parts = list(state.values()) if isinstance(state, dict) else state
    return isinstance(parts, list | tuple) and any(holds_many_values(part) for part in parts)


def _initial(optimizer: Optimizer, key: str, held: Tensor, parameter: Tensor, state: Tensor) -> Tensor:
    if key in _COPIES_OF_THE_WEIGHT:
        return held.detach().to(state.dtype)
    start: Tensor | float = 0.0
    if isinstance(optimizer, Adagrad) and key == "sum":
        start = optimizer.defaults["initial_accumulator_value"]
    elif isinstance(optimizer, Rprop) and key == "step_size":
        start = _lr(optimizer, parameter)
    return start.detach().to(state).reshape(()) if isinstance(start, Tensor) else state.new_full((), start)


def restart_counts(optimizer: Optimizer, parameter: Tensor) -> int:
    """Put the counts that belong to a whole parameter back to their start, and return how many there are."""
    known = optimizer.state.get(parameter, {})
    known.pop(AGE, None)  # all are as old as the tensor again
    counts = sorted(_COUNTERS & known.keys())
    for key in counts:
        # ASGD's step size starts from its learning rate, and products start from 1.
        start = 0.0 if key == "step" else _lr(optimizer, parameter) if key == "eta" else 1.0
        if isinstance(known[key], Tensor):
            local(known[key]).copy_(torch.as_tensor(start))
        else:
            known[key] = type(known[key])(start)
    return len(counts)


def write_at(tensor: Tensor, index: tuple[Tensor | slice, ...], values: Tensor | float) -> None:
    """Writes values, or one for all, to the places of an index, without waiting for the device.

    Example:
        >>> rows = torch.zeros(2, 3)
        >>> write_at(rows, (slice(None), torch.tensor([1])), 1.0)
        >>> rows.tolist()
        [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    *before, last = index
    if isinstance(values, Tensor):
        tensor[index] = values.to(tensor.dtype)
    elif isinstance(last, Tensor) and all(isinstance(part, slice) for part in before):
        tensor.index_fill_(len(before), last, values)  # of whole slices
    else:
        tensor[index] = tensor.new_full((), values)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _finite(mean: Tensor) -> Tensor:
    return torch.where(torch.isfinite(mean), mean, torch.zeros_like(mean))
