"""The distribution that a parameter started from, to draw fresh values from it later."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_plasticity import checks
from lightning_plasticity.editing.editable import check_finite
from lightning_plasticity.layer_views import LayerView, layers_of, view_of
from lightning_plasticity.names import submodule
from lightning_plasticity.shards.parts import part_of
from lightning_plasticity.shards.tensors import whole


class Initializer(Protocol):
    """A function that fills a tensor with initial values, like those of ``torch.nn.init``."""

    def __call__(self, tensor: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return initial values of the given tensor's shape; the tensor itself may be filled and returned.

        Args:
            tensor: Zeros of the whole parameter's shape, on the generator's device, in float32 (in float64 for a
                parameter that is).
            generator: The only source of randomness to use.
        """


InitName: TypeAlias = Literal["empirical", "quantiles", "kaiming_uniform", "reset_parameters"]
Init: TypeAlias = InitName | Initializer
_QUANTILES = 257  # a table of them, whatever the parameter's size


def check_init(init: Init) -> Init:
    """Raise unless ``init`` names a distribution or is a function.

    Example:
        >>> check_init("empirical")
        'empirical'
    """
    if isinstance(init, str) or not callable(init):
        return checks.choice("init", init, get_args(InitName), other="a function or ")
    return init


class InitialDistribution:
    r"""The distributions that parameters started from.

    The mean :math:`\mu` and standard deviation :math:`\sigma` of each parameter are recorded when this is made: before
    training, and in a distributed run after the ranks have got equal weights. Later draws follow ``init``:

    - ``"empirical"``: :math:`\mathcal{N}(\mu, \sigma^2)`, whatever initialised the model. A parameter that was constant
      gets that constant.
    - ``"quantiles"``: as the values recorded are distributed, up to a table of 257 quantiles: a uniform distribution
      stays uniform, and nothing lies beyond the smallest and the largest value.
    - ``"kaiming_uniform"``: as PyTorch initialises linear and convolution layers, weights and biases alike:
      :math:`\mathcal{U}(-1/\sqrt{f}, 1/\sqrt{f})`, where :math:`f` is the fan-in of the module's weight.
    - ``"reset_parameters"``: what the module's own ``reset_parameters()`` gives, called on a copy on the CPU.
    - a function, called as ``init(tensor, generator=generator)`` (see :class:`Initializer`): one of ``torch.nn.init``
      such as ``torch.nn.init.xavier_uniform_``, bare or with other arguments bound by ``functools.partial``.

    Draws depend on the generator alone. For parameters in half precision they are made in float32 and rounded.

    Args:
        model: The network. Parameters are looked up in it again for each draw, so it may move to another device.
        parameters: Qualified names of parameters in it.
        init: How to draw.

    Raises:
        ValueError: If there is no parameter of a name, or ``init`` is unknown or does not apply to a parameter.

    Example:
        >>> layer = nn.Linear(100, 50)
        >>> initial = InitialDistribution(layer, ["weight"])
        >>> generator = torch.Generator().manual_seed(0)
        >>> initial.draw("weight", generator).shape, initial.draw("weight", generator, rows=torch.tensor([3, 7])).shape
        (torch.Size([50, 100]), torch.Size([2, 100]))
    """

    def __init__(self, model: nn.Module, parameters: Iterable[str], init: Init = "empirical") -> None:
        self._model = model
        self._init = check_init(init)
        self._moments: dict[str, tuple[float, ...]] = {}
        self._known: dict[str, tuple[float, ...]] = {}  # from a checkpoint, of parameters that are still to be added
        self.add(parameters)

    def add(self, parameters: Iterable[str]) -> None:
        """Records more parameters; those that are recorded already stay as they are."""
        for name in parameters:
            if name in self._moments:
                continue
            parameter = self._parameter(name)
            if self._init == "kaiming_uniform":
                self._fan_in(name)
            elif self._init == "reset_parameters":
                self._check_reset(name)
            elif callable(self._init):
                self._try(name)
            if name in self._known:
                self._moments[name] = self._known.pop(name)
                continue
            # Together, for the same numbers on any number of ranks; one tensor of one layer at a time.
            values = whole(parameter.detach())
            std, mean = torch.std_mean(values.to(_drawn_in(parameter)), correction=0)
            if not math.isfinite(std.item()):
                check_finite({name: parameter}, "An initial distribution needs")
            table = _quantiles(values) if self._init == "quantiles" else ()
            self._moments[name] = (mean.item(), std.item(), *table)

    def draw(
        self, name: str, generator: torch.Generator, rows: Tensor | None = None, layer: LayerView | None = None
    ) -> Tensor:
        """Draw initial values of a parameter, in its dtype and on its device: of rows, or of the part on this rank.

        What is drawn does not depend on the number of ranks: where parameters are shared out, each rank draws the rows,
        or the whole of this one tensor, and takes its part.

        Args:
            name: One of the parameters recorded.
            generator: Where randomness comes from. Draws are made on its device and moved to the parameter's, so that a
                CPU generator gives the same values on any device. (``"reset_parameters"`` waits for a CUDA generator.)
            rows: Draw what makes these outputs of a layer (the first dimension; in transposed convolutions the
                second), whole, instead of the parameter. The values have outputs in the first dimension.
            layer: Whose outputs these are, where the module holds several layers.

        Raises:
            KeyError: If the parameter was not recorded.
            ValueError: If a function given as ``init`` returns another shape.
        """
        mean, std, *table = self._moments[name]
        parameter = self._parameter(name)
        by_output = self._by_output(name, parameter) if layer is None else layer.by_output
        of_all = torch.empty(parameter.shape, device="meta")
        shape = of_all.shape if rows is None else torch.Size((len(rows), *by_output(of_all).shape[1:]))
        options: dict[str, Any] = {"device": generator.device, "dtype": _drawn_in(parameter)}
        if self._init == "empirical":
            values = torch.randn(shape, generator=generator, **options).mul_(std).add_(mean)
        elif self._init == "quantiles":
            quantiles = torch.tensor(table, **options)
            places = torch.rand(shape, generator=generator, **options).mul_(len(table) - 1)
            below = places.long()  # there is one above: draws are less than 1, and their product with 256 is exact
            values = quantiles[below].lerp_(quantiles[below + 1], places.sub_(below))
        elif self._init == "kaiming_uniform":
            bound = 1 / math.sqrt(self._fan_in(name))
            values = torch.empty(shape, **options).uniform_(-bound, bound, generator=generator)
        else:
            all_values = self._draw_whole(name, generator, torch.zeros(parameter.shape, **options))
            values = all_values if rows is None else by_output(all_values)[rows.to(all_values.device)]
        values = values.to(parameter.device, parameter.dtype)
        return part_of(parameter).take(values) if rows is None else values

    def mean(self, name: str) -> float:
        """The mean of the distribution that a parameter started from: 0 for ``"kaiming_uniform"``.

        Otherwise it is told from the values recorded: 0 if their mean is no further from it than chance explains, which
        is five standard errors.
        """
        if self._init == "kaiming_uniform":
            return 0.0
        mean, std, *_ = self._moments[name]
        return 0.0 if abs(mean) <= 5 * std / math.sqrt(self._parameter(name).numel()) else mean

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for a checkpoint."""
        return {"moments": {**self._known, **self._moments}}

    def load_state_dict(self, state_dict: dict[str, Any], *, partial: bool = False) -> None:
        """Put back what was recorded when the run began, in place of what the resumed model has now.

        Args:
            state_dict: What :meth:`state_dict` gave.
            partial: Whether the checkpoint may have other parameters than this; what it knows of them is kept until
                they are added.

        Raises:
            ValueError: If the checkpoint has other parameters than this.
        """
        moments: dict[str, tuple[float, ...]] = state_dict["moments"]
        if partial:
            self._known = {name: values for name, values in moments.items() if name not in self._moments}
            self._moments |= {name: values for name, values in moments.items() if name in self._moments}
            return
        if moments.keys() != self._moments.keys():
            raise ValueError(
                "The checkpoint must hold the initial distribution of the same parameters, but only one of them has "
                f"{sorted(moments.keys() ^ self._moments.keys())}. Resume with the model and the settings of the run."
            )
        self._moments = {name: tuple(values) for name, values in moments.items()}

    def _parameter(self, name: str) -> nn.Parameter:
        try:
            return self._model.get_parameter(name)
        except AttributeError as error:
            raise ValueError(
                f"The name of a parameter in {type(self._model).__name__} is needed, but there is no {name!r}. "
                "Take a name from model.named_parameters()."
            ) from error

    def _owner(self, name: str) -> tuple[str, nn.Module]:
        owner = name.rpartition(".")[0]
        return owner, submodule(self._model, owner)

    def _by_output(self, name: str, parameter: Tensor) -> Callable[[Tensor], Tensor]:
        _, owner = self._owner(name)
        view = view_of(owner)
        return view.by_output if view is not None and parameter is view.weight else lambda tensor: tensor

    def _fan_in(self, name: str) -> int:
        _, owner = self._owner(name)
        own = name.rpartition(".")[2]
        view = next((v for v in layers_of(owner).values() if own in (v.weight_name, v.bias_name)), None)
        weight = getattr(owner, "weight", None) if view is None else view.weight
        if not isinstance(weight, Tensor) or weight.dim() < 2 or (view is None and own not in ("weight", "bias")):
            raise ValueError(
                "init='kaiming_uniform' needs the weight or bias of a layer with inputs and outputs, but "
                f"{name!r} belongs to a {type(owner).__name__}. Use init='empirical' or leave the parameter out."
            )
        if view is not None and view.transposed and weight.dim() == 2:
            return view.inputs
        return math.prod(weight.shape[1:])

    def _check_reset(self, name: str) -> None:
        _, owner = self._owner(name)
        if not callable(getattr(owner, "reset_parameters", None)):
            raise ValueError(
                f"init='reset_parameters' needs a module with reset_parameters(), but {name!r} belongs to a "
                f"{type(owner).__name__}, which has none. Add one, use init='empirical', or leave the parameter out."
            )

    def _try(self, name: str) -> None:
        """Draws once with a function of the user's, so that one that cannot serve is found before training."""
        parameter = self._parameter(name)
        zeros = torch.zeros(parameter.shape, dtype=_drawn_in(parameter), device=parameter.device)
        try:
            values = self._init(zeros, generator=torch.Generator(parameter.device))  # type: ignore[operator]
        except Exception as error:
            raise ValueError(
                f"The function given as init must fill {name!r} of shape {tuple(parameter.shape)}, called as "
                f"init(tensor, generator=generator), but it raised {error!r}. Give one that takes every shape, or "
                "leave the parameter out."
            ) from error
        if not _with_shape_of(zeros, values, name).isfinite().all():
            raise ValueError(
                f"The function given as init must give finite values, but for {name!r} of shape "
                f"{tuple(parameter.shape)} it gave NaN or infinity. Give one that fills all entries."
            )

    def _draw_whole(self, name: str, generator: torch.Generator, zeros: Tensor) -> Tensor:
        if callable(self._init):
            return _with_shape_of(zeros, self._init(zeros, generator=generator), name).detach().clone()
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        twin = copy_to_cpu(self._owner(name)[1])
        reset_on_cpu(twin, int(seed))
        return twin.get_parameter(name.rpartition(".")[2]).detach()


def _with_shape_of(zeros: Tensor, values: object, name: str) -> Tensor:
    """What a function of the user's has returned, if it is what was asked for."""
    if isinstance(values, Tensor) and values.shape == zeros.shape:
        return values
    got = tuple(values.shape) if isinstance(values, Tensor) else checks.shown(values)
    raise ValueError(
        f"The function given as init must return a tensor of shape {tuple(zeros.shape)} for {name!r}, but returned "
        f"{got}. Let it fill and return the tensor that it is given."
    )


def _quantiles(parameter: Tensor) -> list[float]:
    """From the smallest to the largest value, evenly spaced in between."""
    values = parameter.detach().flatten().to(_drawn_in(parameter)).sort().values
    if not len(values):
        return []
    places = torch.linspace(0, len(values) - 1, _QUANTILES, device=values.device, dtype=torch.float64)
    below = places.long()
    above = (below + 1).clamp_(max=len(values) - 1)
    table: list[float] = torch.lerp(values[below], values[above], (places - below).to(values.dtype)).tolist()
    return table


def copy_to_cpu(module: nn.Module) -> nn.Module:
    """Copy a module and its tensors, whole, to the CPU, at least in float32.

    ``copy.deepcopy`` would copy whatever the module's hooks refer to as well, up to a whole Trainer.
    """

    def copied(tensor: Tensor) -> Tensor:
        dtype = _drawn_in(tensor) if tensor.is_floating_point() else tensor.dtype
        return whole(tensor.detach()).to("cpu", dtype, copy=True)

    twin = copy.copy(module)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(copied(parameter), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    twin._buffers = {name: None if buffer is None else copied(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {name: None if child is None else copy_to_cpu(child) for name, child in module._modules.items()}
    return twin


def reset_on_cpu(twin: nn.Module, seed: int) -> None:
    """Call ``reset_parameters()`` of a module from :func:`copy_to_cpu`, with this seed.

    The user's random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed every accelerator, too.
        torch.default_generator.manual_seed(seed)
        twin.reset_parameters()  # type: ignore[operator]


def _drawn_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
