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

import weakref
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
    """

    def __init__(
        self, parameters: Sequence[Tensor], site: Site, q: Tensor | None, t: Tensor | None, scale: Tensor, inverse: Tensor
    ) -> None:
        """Hold copies that were just cast at `site`, from parameters (Nᵢ, K)."""
        self.q, self.t, self.scale, self.inverse, self.site = q, t, scale, inverse, site
        # Of which version of each parameter its part is a copy: None from the beginning of a round until it is written.
        self._of: list[_Version | None] = [_version(p) for p in parameters]
        self._places = {id(p): place for place, p in enumerate(parameters)}
        if site.kind == "copies" and q is not None and t is not None:
            sizes = [len(p) for p in parameters]
            self._parts = list(zip(q.split(sizes), t.split(sizes, 1), strict=True))
            for p in parameters:
                _HELD[p] = weakref.ref(self)

    def are_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are copies of `parameters` as they are now."""
        return self._of == [_version(p) for p in parameters]

    def writable(self, parameter: Tensor, updated: AbstractSet[int]) -> bool:
        """Whether an optimizer that updates those of the ids `updated` may write the copies of `parameter`."""
        # Emulation is for a GPU that cannot cast, too.
        possible = self.site.ready and not (self.site.emulated and parameter.is_cuda)
        return possible and self._places.keys() <= updated and parameter.shape == self._parts[self._places[id(parameter)]][0].shape

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


_HELD: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # weak references to Held, by parameter


def _held(parameter: Tensor) -> Held | None:
    reference = _HELD.get(parameter)
    return None if reference is None else reference()


def writable(parameters: Iterable[Tensor], updated: Iterable[Tensor]) -> dict[Tensor, Held]:
    """The copies that an update may write, by parameter; others have none, or are cast by their layer.

    Args:
        parameters: what is to be updated now.
        updated: all that this optimizer updates. Copies that it could write a part of alone are left to their layer.
    """
    ids = {id(p) for p in updated}
    return {p: held for p in parameters if (held := _held(p)) is not None and held.writable(p, ids)}


def begin(found: Mapping[Tensor, Held]) -> list[Held]:
    """Expect all of `found` to be written, and return what that begins a round of: its scales are to be renewed (`renew`)."""
    return [held for p, held in found.items() if held.begin(p)]


def renew(rounds: Sequence[Held]) -> None:
    """Give copies the scale that their history says, and forget the amax of the copies before. Launches, and decides nothing."""
    for scaling in {id(held.scaling): held.scaling for held in rounds}.values():
        own = [held for held in rounds if held.scaling is scaling]
        scales = scaling.scales_of_copies()
        new = [scales.unbind(), scales.reciprocal().unbind()]
        to = [*(held.scale for held in own), *(held.inverse for held in own)]
        torch._foreach_copy_(to, [each[held.site.index] for each in new for held in own])
        torch._foreach_zero_([held.site.amax for held in own])


def finish(found: Mapping[Tensor, Held]) -> None:
    """After parameters and the copies of them that `writable` found were written, and the parameters' versions raised."""
    changed = {id(held): held for held in found.values()}.values()
    torch.autograd.graph.increment_version([x for held in changed for x in (held.q, held.t) if x is not None])
    for p, held in found.items():
        held.finish(p)


def fixed(found: Mapping[Tensor, Held]) -> object | None:
    """What launches that renew and write copies go by; None within a round. While it stays the same, so do the launches."""
    if any(None in held._of for held in found.values()):
        return None
    seen = {id(held): held for held in found.values()}
    tensors = [(h.q, h.t, h.scale, h.inverse, h.site.amax, h.scaling.amax, h.scaling.scale) for h in seen.values()]
    return [id(p) for p in found], list(seen), [None if x is None else x.data_ptr() for each in tensors for x in each]
