"""Runs that prove where units come, for one set of them or for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_plasticity.units.channels import Layer, Site
from lightning_plasticity.units.in_turn import ProofsInTurn
from lightning_plasticity.units.network import Network
from lightning_plasticity.units.runs import Escape, FindGates, Noise, Proof, SharedProof


class Prover:
    """Proves where units come in a network, of which is known what each site reads. Sets of units are masks."""

    def __init__(
        self, network: Network, layers: Sequence[Layer], units: Mapping[Site, Tensor], gates: FindGates
    ) -> None:
        self.network = network
        self.layers = layers
        self.units = units
        self.gates = gates

    def escape(self, members: Tensor) -> Proof:
        """Runs the proof for the units of a mask."""
        proof = Proof(self.network, members, self.units, self.gates)
        proof.run()
        return proof

    def escapes(self, sets: Sequence[Tensor]) -> list[Escape | None]:
        """The first escape of each of several sets of units. Those that cannot meet share their runs."""
        reaches = [self.reach(members) for members in sets]
        found: list[Escape | None] = [None] * len(sets)

        def prove(batch: list[int]) -> None:
            if len(batch) == 1:
                found[batch[0]] = self.escape(sets[batch[0]]).escape
                return
            proof = SharedProof(self.network, torch.stack([sets[i] for i in batch]).any(0), self.units, self.gates)
            proof.run()
            nobodys = proof.stopped
            for escape in proof.escapes:
                site = 1 if escape.at is None else escape.at.site
                whose = [i for i in batch if reaches[i] & site]
                nobodys |= not whose
                for i in whose:
                    found[i] = found[i] or escape
            open_ones = [i for i in batch if found[i] is None] if nobodys else []
            for part in (open_ones[: len(open_ones) // 2], open_ones[len(open_ones) // 2 :]):
                if part:
                    prove(part)

        for batch in apart(reaches):
            prove(batch)
        return found

    def escapes_in_turn(self, sets: Sequence[Tensor]) -> list[Escape | None]:
        """Like ``escapes``, for sets of which most escape: then one run is enough for many that meet."""
        found: list[Escape | None] = [None] * len(sets)
        waiting = list(range(len(sets)))
        while waiting:
            proofs = ProofsInTurn(self.network, [sets[i] for i in waiting], self.units, self.gates)
            proofs.run()
            for place, escape in proofs.told.items():
                found[waiting[place]] = escape
            waiting = [i for place, i in enumerate(waiting) if proofs.told and place not in proofs.told]
        return found

    def reach(self, members: Tensor) -> int:
        """The layers that units may come to, as bits."""
        reach = 0
        for layer in self.layers:
            if bool(members[layer.numbers].any()):
                reach |= layer.reach
        return reach

    def same_with_noise(self, members: Tensor) -> bool:
        """Whether all that counts is the same to the last bit whatever these units carry."""
        runs = [Noise(self.network, members, self.units, seed) for seed in (0, 1)]
        for noise in runs:
            noise.run()
        return runs[0].seen == runs[1].seen and not any(noise.refused for noise in runs)


def apart(reaches: Sequence[int]) -> list[list[int]]:
    """Puts numbers that have no bit in common together, in as few batches as come of it by taking each as it comes."""
    batches: list[list[int]] = []
    taken: list[int] = []
    for place, reach in enumerate(reaches):
        batch = next((i for i, bits in enumerate(taken) if not bits & reach), len(batches))
        if batch == len(batches):
            batches.append([])
            taken.append(0)
        batches[batch].append(place)
        taken[batch] |= reach
    return batches
