"""FP8 copies of weights, written by the optimizer that updates the weight and has it in registers anyway.

A layer's GEMMs read W and Wᵀ in FP8. Cast by the layer they cost two passes over the weight a step: one for its amax, one for the
cast. The optimizer's kernel knows both sooner, but for the scale, which is the history's (`scaling.py`). So:

* a layer that casts its weights keeps the copies as `Held`, by which a parameter leads to them;
* an optimizer asks for the copies of what it updates (`writable`), begins (`begin`), writes them, and says so (`finish`);
* the layer finds copies of the very versions that its parameters have (`are_of`), or casts again.

Several parameters may be stacked in one pair of copies, and be updated at different times, or not all of them. Whoever is the
first to write begins a round: the scale is renewed for all, and copies count again once every parameter's part is written. What a
graph has saved of the copies is then of another version, and its backward an error instead of a product with newer weights.

No layer is known here: a parameter without copies, or of a layer that wants another scale, is just updated.
"""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from nvfp8.reference_optim import Copies
from nvfp8.scaling import Scaling, Site, owner

_Version = tuple[int, int, int]


def _version(parameter: Tensor) -> _Version:
    return id(parameter), parameter.data_ptr(), parameter._version


class Held:
    """The FP8 copies of one parameter, or of several stacked.

    Attributes:
        q: (N, K), or None where no GEMM reads it.
        t: (K, N), or None.
        scale: 0-D fp32 they were multiplied by, theirs alone.
        inverse: 0-D fp32, 1 / scale.
        site: where they are cast.
        serial: no other's.
    """

    _serials = itertools.count()

    def __init__(
        self, parameters: Sequence[Tensor], site: Site, q: Tensor | None, t: Tensor | None, scale: Tensor, inverse: Tensor
    ) -> None:
        """Hold copies that were just cast at `site`, from parameters (Nᵢ, K)."""
        self.q, self.t, self.scale, self.inverse, self.site = q, t, scale, inverse, site
        # Of which version of each parameter its part is a copy: None from the beginning of a round until it is written.
        self._of: list[_Version | None] = [_version(p) for p in parameters]
        self._places = {id(p): place for place, p in enumerate(parameters)}
        self.serial = next(self._serials)
        if site.kind == "copies" and q is not None and t is not None:
            sizes = [len(p) for p in parameters]
            self._parts = list(zip(q.split(sizes), t.split(sizes, 1), strict=True))
            self._shapes = [q.shape for q, _ in self._parts]
            self._parameters = [weakref.ref(p) for p in parameters]
            for p in parameters:
                _HELD[id(p)] = self

    def are_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are copies of `parameters` as they are now."""
        return self._of == [_version(p) for p in parameters]

    @property
    def within(self) -> bool:
        """Whether a round has begun, and not every parameter's part is written."""
        return None in self._of

    def holds(self, parameter: Tensor) -> bool:
        """Whether copies of `parameter` are here, not of another that had its id before."""
        return self._parameters[self._places[id(parameter)]]() is parameter

    def writable(self, updated: AbstractSet[int]) -> bool:
        """Whether an optimizer that updates those of the ids `updated` may write these copies."""
        if not self.site.ready or not self._places.keys() <= updated:
            return False
        parameters = [p for reference in self._parameters if (p := reference()) is not None]
        shaped = [p.shape for p in parameters] == self._shapes
        # Emulation is for a GPU that cannot cast, too.
        return shaped and not (self.site.emulated and parameters[0].is_cuda)

    def begin(self, parameter: Tensor) -> bool:
        """Expect `parameter` to be written; whether that begins a round."""
        begins = self._of[self._places[id(parameter)]] is not None
        if begins:
            self._of = [None] * len(self._of)
        return begins

    def part(self, parameter: Tensor) -> Copies:
        """Where `parameter` is written."""
        return Copies(*self._parts[self._places[id(parameter)]], self.scale, self.site.amax)

    def finish(self, parameter: Tensor) -> None:
        """Count its part as a copy of `parameter` as it is now."""
        self._of[self._places[id(parameter)]] = _version(parameter)

    @property
    def scaling(self) -> Scaling:
        """Where the scale of the next copies comes from."""
        return owner(self.site)


_HELD: "weakref.WeakValueDictionary[int, Held]" = weakref.WeakValueDictionary()  # by a parameter's id
Found = list[tuple[Tensor, Held]]  # parameters, and where their copies are


def writable(parameters: Iterable[Tensor], updated: Iterable[Tensor]) -> Found:
    """The copies that an update may write; parameters that are not in it have none, or their layer casts them.

    Args:
        parameters: what is to be updated now.
        updated: all that this optimizer updates. Copies that it could write a part of alone are left to their layer.
    """
    ids = {id(p) for p in updated}
    held = [(p, held) for p in parameters if (held := _HELD.get(id(p))) is not None and held.holds(p)]
    possible = {each.serial for each in {h.serial: h for _, h in held}.values() if each.writable(ids)}
    return [(p, each) for p, each in held if each.serial in possible]


def begin(found: Found) -> list[Held]:
    """Expect all of `found` to be written, and return what that begins a round of: its scales are to be renewed (`renew`)."""
    return [held for p, held in found if held.begin(p)]


def renew(rounds: Sequence[Held]) -> None:
    """Give copies the scale that their history says, and forget the amax of the copies before. Launches, and decides nothing."""
    for scaling in {id(held.scaling): held.scaling for held in rounds}.values():
        own = [held for held in rounds if held.scaling is scaling]
        scales = scaling.scales_of_copies()
        new = [scales.unbind(), scales.reciprocal().unbind()]
        to = [*(held.scale for held in own), *(held.inverse for held in own)]
        torch._foreach_copy_(to, [each[held.site.index] for each in new for held in own])
        torch._foreach_zero_([held.site.amax for held in own])


def finish(found: Found) -> None:
    """After parameters and the copies of them that `writable` found were written, and the parameters' versions raised."""
    changed = {held.serial: held for _, held in found}.values()
    torch.autograd.graph.increment_version([x for held in changed for x in (held.q, held.t) if x is not None])
    for p, held in found:
        held.finish(p)


def fixed(found: Found) -> object:
    """What launches that renew and write copies go by: as long as it is the same, so are the launches."""
    scalings = {id(held.scaling): held.scaling for _, held in found}.values()
    places = [0 if x is None else x.data_ptr() for scaling in scalings for x in (scaling.amax, scaling.scale)]
    return [held.serial for _, held in found], places
