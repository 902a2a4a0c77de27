"""From runs to sets of units: decode what each column spelled, join what belongs together, prove each set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_plasticity.units.channels import NOBODY, Layer, Site
from lightning_plasticity.units.examining import ForwardError
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.probing import Watch, describe
from lightning_plasticity.units.proving import Prover, apart
from lightning_plasticity.units.runs import FindGates, ReadCodes, Seen
from lightning_plasticity.units.survey import Decisions, Rehearsal, Survey

T = TypeVar("T")


@dataclass(eq=False)
class Group:
    """Units of one layer that are wired alike: ``roots`` are their numbers.

    ``exact`` is whether no norm that mixes channels stands on the way.
    """

    layer: Layer
    roots: Tensor
    exact: bool = True


def codewords(count: int) -> Tensor:
    """``count`` different words of as few bits as possible, half of which are one in each, in ascending order."""
    bits = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= count)
    words, word = [], (1 << bits // 2) - 1
    for _ in range(count):
        words.append(word)
        lowest = word & -word  # the next number with as many ones: a run of ones is carried up, its rest moved down
        carried = word + lowest
        word = (carried ^ word) >> lowest.bit_length() + 1 | carried
    return torch.tensor(words, dtype=torch.int64)


class Wiring:
    """Which unit feeds which column, norm entry, activation and product of a network.

    Units are numbers of output channels. ``units[site]`` holds for each channel of a site the unit that alone feeds it,
    or ``NOBODY``. ``root[unit]`` is the unit that this one belongs to: itself, or the one whose value it gates.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.layers = self._survey()
        self.count = sum(layer.size for layer in self.layers)
        self.units: dict[Site, Tensor] = {}
        self.prover = Prover(network, self.layers, self.units, FindGates(network, torch.zeros(0, dtype=torch.bool)))
        self.root = torch.arange(self.count)
        self.is_gate = torch.zeros(self.count, dtype=torch.bool)
        self.proven: list[Group] = []
        if self.count:
            self._find()

    def _find(self) -> None:
        """Reads, proves, and settles which depthwise convolutions are passed.

        The channels of a depthwise convolution belong to the units that feed it, if each of its inputs is fed by one
        unit and the two together prove valid. Otherwise it is a layer like any other.
        """
        depthwise = [layer for layer in self.layers if layer.depthwise]
        if depthwise:
            self._bearing(self._guess_passed)
        self._bearing(self._read)
        while True:
            self.proven = self._prove(self.groups())
            members = self.members(self.proven)
            failed = [layer for layer in depthwise if layer.passes and not bool(members[layer.numbers].all())]
            if not failed:
                return
            for layer in failed:
                layer.passes = False
            self._bearing(self._read)

    # ---- reading

    def _survey(self) -> list[Layer]:
        """Calls each layer once; returns the usable ones in the order of their calls, numbered."""
        survey = self._first_survey()
        if survey.nan_outputs:
            raise ValueError(
                f"lightning_plasticity cannot examine {self.network}, for its output is NaN for the example input, so "
                "that its units cannot be told apart by NaN. Give an example (and parameters) for which the output is "
                "finite, or name a part of the network with module=."
            )
        survey.mark()
        self.foreign, self.norm_sites = survey.foreign, survey.norm_sites
        self._try_stand_ins(survey)
        layers = [layer for layer in survey.order if layer.reason is None]
        first = 0
        for layer in layers:
            layer.first = first
            first += layer.size
        return layers

    def _try_stand_ins(self, survey: Survey) -> None:
        """Does without stand-ins where the network decides anything by what they stand in for."""
        decisions, rehearsal = Decisions(self.network), Rehearsal(self.network, survey.calls)
        decisions.run()
        if decisions.taken is None:
            rehearsal.run()
        if decisions.taken is not None or not rehearsal.succeeds:
            self.network.stand_ins.clear()

    def _first_survey(self) -> Survey:
        """A run of evaluation's path, or of training's where that calls more layers, such as auxiliary heads."""
        evaluation, training = Survey(self.network), Survey(self.network)
        failure = self._try(evaluation)
        if failure is None and len(evaluation.order) == len(self.network.layers):
            return evaluation
        self.network.training_path = True
        # training may want what no example has, for instance targets
        if self._try(training) is None and (failure is not None or set(training.calls) > set(evaluation.calls)):
            return training
        self.network.training_path = False
        if failure is not None:
            raise ForwardError(
                f"lightning_plasticity cannot examine {self.network}, which does not run on the example input: "
                f"{describe(failure)}. Give what it is called with, as in find_units(model, *inputs), or name a part "
                "that runs with module=."
            ) from failure
        return evaluation

    def _try(self, watch: Watch) -> Exception | None:
        """Runs the network; returns what its own code raises."""
        try:
            watch.run()
        except Exception as error:
            return error
        return None

    def _bearing(self, read: Callable[[], None]) -> None:
        """Reads; units that the network's own code refuses as NaN stay numbers."""
        try:
            read()
        except Exception as first:
            bearable = _largest_part(self.layers, lambda layers: self._refusal(layers) is None, known_to_fail=True)
            for layer in self.layers:
                if layer not in bearable:
                    refusal = self._refusal([layer]) or first
                    layer.unmarked = f"the network stops when its units are NaN ({describe(refusal)})"
            try:
                read()
            except Exception as error:
                raise ValueError(
                    f"lightning_plasticity cannot examine {self.network}, which stops with NaN in place of its units: "
                    f"{describe(error)}. Name a part of it that does not check values with module=."
                ) from error

    def _refusal(self, layers: Sequence[Layer]) -> Exception | None:
        """What the network's own code raises where all units of these layers are NaN."""
        marked = torch.zeros(self.count, dtype=torch.bool)
        for layer in layers:
            marked[layer.numbers] = True
        return self._try(FindGates(self.network, marked))

    def _guess_passed(self) -> None:
        """Sets which depthwise convolutions have inputs that are fed by one unit each.

        Units are NaN in two random halves and in what these leave. A channel of one unit is NaN in one run of each
        pair; one of several units is not, by chance, in a quarter of cases, so that all channels of a layer together
        tell. Should they not, the proof does.
        """
        generator = torch.Generator().manual_seed(0)
        halves = [torch.rand(self.count, generator=generator) < 0.5 for _ in range(2)]
        _, seen = self._see([marked for half in halves for marked in (half, ~half)])
        for layer in (layer for layer in self.layers if layer.depthwise):
            a, not_a, b, not_b = (seen[Site("column", layer.name)] >> bit & 1 for bit in range(4))
            layer.passes = bool(((a ^ not_a) & (b ^ not_b)).all())

    def _see(self, marks: Iterable[Tensor]) -> tuple[FindGates, Seen]:
        """Where NaN comes of these units in turn, and the gates on their way."""
        found = FindGates(self.network, torch.arange(self.count) % 2 == 0)
        found.run()
        seen = Seen()
        for bit, marked in enumerate(marks):
            ReadCodes(self.network, marked, bit, found, seen).run()
        return found, seen

    def _read(self) -> None:
        """Reads which unit feeds what."""
        words = codewords(self.count)
        found, seen = self._see((words >> bit & 1).bool() for bit in range(int(words.max()).bit_length()))
        self.units = {}
        unusable = {Site("column", layer.name) for layer in self.network.layers if layer.reason is not None}
        for site, on_device in seen.items():
            code = on_device.cpu()
            place = torch.searchsorted(words, code).clamp(max=self.count - 1)
            known = (words[place] == code) & (site not in unusable)
            self.units[site] = torch.where(known, place, NOBODY)
        self._join(found)
        self.prover = Prover(self.network, self.layers, self.units, found)

    def _join(self, found: FindGates) -> None:
        """Gives each unit that belongs to another its root.

        These are the channels of passed depthwise convolutions, units that go on from the state of others, and gates. A
        gate that would belong to two units, or that meets nobody's value, belongs to none: the proof then sees it
        escape. So does a state.
        """
        root = list(range(self.count))
        self.is_gate = torch.zeros(self.count, dtype=torch.bool)

        def find(unit: int) -> int:
            while root[unit] != unit:
                unit = root[unit]
            return unit

        for layer in self.layers:
            if layer.passes:
                feeding = (
                    self.units[Site("depthwise", layer.name)].repeat_interleave(layer.size // layer.columns).tolist()
                )
                for unit, feeds in zip(layer.numbers.tolist(), feeding, strict=True):
                    root[unit] = feeds if feeds >= 0 else unit
            elif layer.joins is not None:
                root[layer.first : layer.first + layer.size] = layer.joins.numbers.tolist()
        for layer in self.layers:
            states = self.units.get(Site("state", layer.name), torch.zeros(0))
            for unit, state in zip(layer.numbers.tolist(), states.tolist(), strict=False):
                if state >= 0 and find(state) != find(unit):
                    root[unit] = find(state)
        for event in sorted(event for event, gate in found.gates.items() if gate.dim is not None):
            gates, values = self.units[Site("gate", str(event))], self.units[Site("value", str(event))]
            for channel, (gate, value) in enumerate(zip(gates.tolist(), values.tolist(), strict=True)):
                if gate < 0:
                    continue
                if value < 0 or (root[gate] != gate and find(gate) != find(value)):
                    gates[channel] = NOBODY
                elif find(value) != gate:
                    root[gate] = find(value)
                    self.is_gate[gate] = True
        self.root = torch.tensor(root, dtype=torch.int64)
        while not torch.equal(self.root, self.root[self.root]):
            self.root = self.root[self.root]

    # ---- grouping

    def groups(self) -> list[Group]:
        """The units that have a column somewhere, by layer and by how they are wired."""
        wired = torch.zeros(self.count, dtype=torch.bool)
        # Adding one large odd number per use: equal sums are equally wired units (up to a chance of 2^-60).
        generator = torch.Generator().manual_seed(0)
        signature = torch.zeros(self.count, dtype=torch.int64)

        def add(units: Tensor) -> None:
            multiplier = torch.randint(1 << 62, (), generator=generator)
            units = self.root[units[units >= 0]]
            signature.index_add_(0, units, multiplier.expand(len(units)))

        for layer in self.layers:
            add(layer.numbers)
        for site, units in self.units.items():
            if site.role in ("column", "norm", "activation"):
                add(units)
            if site.role == "column":
                wired[self.root[units[units >= 0]]] = True
        found = []
        for layer in self.layers:
            numbers = layer.numbers
            numbers = numbers[wired[numbers] & (self.root[numbers] == numbers)]
            for value in _unique_in_order(signature[numbers]):
                found.append(Group(layer, numbers[signature[numbers] == value]))
        return found

    def members(self, groups: Sequence[Group]) -> Tensor:
        """Which units belong to the groups, as a mask."""
        roots = torch.zeros(self.count, dtype=torch.bool)
        for group in groups:
            roots[group.roots] = True
        return roots[self.root]

    # ---- proof

    def _prove(self, groups: Sequence[Group]) -> list[Group]:
        """The groups whose units reach their own columns and nothing else."""
        proven = list(groups)
        if not self._none_escapes(groups):
            escapes = self.prover.escapes([self.members([group]) for group in groups])
            proven = [group for group, escape in zip(groups, escapes, strict=True) if escape is None]
            if not self._none_escapes(proven):  # units have come where the survey did not see their way
                proven = _largest_part(groups, self._none_escapes)
        for group in proven:
            group.exact = not self._is_read_at_mixing_norm(group)
        candidates = [group for group in proven if group.exact]
        if not self._nothing_hears_noise(candidates):
            # A mixing norm may see the units where others' are in the same channel of another position.
            for group in self._that_pass_mixing_norms(candidates):
                group.exact = False
            candidates = [group for group in candidates if group.exact]
            silent = _largest_part(candidates, self._nothing_hears_noise)
            for group in candidates:
                if group not in silent:
                    group.exact = False
                    if not self.prover.escape(self.members([group])).mixing_norms:
                        proven.remove(group)
        return proven

    def _that_pass_mixing_norms(self, groups: Sequence[Group]) -> list[Group]:
        """The groups whose units come to a norm that mixes. Those that cannot meet share their runs."""
        members = [self.members([group]) for group in groups]
        reaches = [self.prover.reach(own) for own in members]
        found = []
        for batch in apart(reaches):
            norms = self.prover.escape(torch.stack([members[i] for i in batch]).any(0)).mixing_norms
            sites = [self.norm_sites[name] for name in norms]
            found += [groups[i] for i in batch if any(reaches[i] & site for site in sites)]
        return found

    def _is_read_at_mixing_norm(self, group: Group) -> bool:
        return any(
            bool(torch.isin(self.root[units[units >= 0]], group.roots).any())
            for site, units in self.units.items()
            if site.role == "norm" and site.name in self.network.mixing
        )

    def _none_escapes(self, groups: Sequence[Group]) -> bool:
        return self.prover.escape(self.members(groups)).escape is None

    def _nothing_hears_noise(self, groups: Sequence[Group]) -> bool:
        """Whether all that counts is the same to the last bit whatever half of the units carry, and then the others."""
        members = self.members(groups)
        half = torch.rand(self.count, generator=torch.Generator().manual_seed(0)) < 0.5
        return all(self.prover.same_with_noise(members & chosen[self.root]) for chosen in (half, ~half))


def _unique_in_order(values: Tensor) -> list[int]:
    return list(dict.fromkeys(values.tolist()))


def _largest_part(groups: Sequence[T], holds: Callable[[Sequence[T]], bool], known_to_fail: bool = False) -> list[T]:
    """All groups for which ``holds``: tested together, and only a failure is split up."""
    if not groups or (not known_to_fail and holds(groups)):
        return list(groups)
    if len(groups) == 1:
        return []
    half = len(groups) // 2
    left = _largest_part(groups[:half], holds)
    return left + _largest_part(groups[half:], holds, known_to_fail=len(left) == half)
