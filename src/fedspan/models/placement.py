"""A base whose layers lie on several devices: the device of each, and the way of a pass from one to the next.

accelerate says which block goes where; a hook before every module's pass brings what the module is given to its device.
Whatever belongs to a layer (its adapter, a patch on it, its gradients, the optimizer's state) then lies beside it.

accelerate's own `dispatch_model` is not used. It puts another `forward` into every module, as evaluation does with
adapters folded into copies of the layers and training with products in bfloat16: a copy would go on computing with the
weight of the layer that it was copied from. And beside a GPU it takes `cpu` for weights that are fetched for every
pass, which cannot be trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedspan.support.errors import FedspanError, first_line
from fedspan.support.seeding import generator
from fedspan.support.suggest import nearest

DeviceMap = Literal["none", "auto"] | Mapping[str, int | str]
"""`engine.device_map`."""
Places = Mapping[str, torch.device]
"""Device by the name of a module or a tensor of the base; of two names that fit, the longer one counts."""
_NUMBERED = re.compile(r"(.+)\.(\d+)")
_NUMBERED_CPU = re.compile(r"^cpu:\d+$")  # which torch takes too, and there is only one


def usable_device(setting: str, name: str) -> torch.device:
    """Return the device of this name.

    Parameters
    ----------
    setting
        Where the name stands, for the message.

    Raises
    ------
    FedspanError
        When this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values to give
    except (RuntimeError, AssertionError, ImportError) as error:
        raise FedspanError(f"{setting} = {name!r} cannot be used here ({first_line(error)})") from None
    return device


def device_name(device: int | str) -> str:
    """Return the name of a device; a number is that of a GPU, `cuda` the first one, and there is one `cpu`."""
    if isinstance(device, int):
        return f"cuda:{device}"
    return "cuda:0" if device == "cuda" else _NUMBERED_CPU.sub("cpu", device)


def is_spread(device_map: DeviceMap) -> bool:
    """Return whether a base lies on several devices here: by a table, or by `auto` where there are several GPUs."""
    return device_map != "none" and (device_map != "auto" or torch.cuda.device_count() > 1)


def places_for(base: nn.Module, device_map: DeviceMap) -> dict[str, torch.device]:
    """Return the device of every part of a base that is in memory; nothing, where all of it lies on one.

    Raises
    ------
    FedspanError
        For a table that does not fit the base or this machine, and for a base that its GPUs do not hold.
    """
    if not is_spread(device_map):
        return {}
    if isinstance(device_map, str):
        places = balanced(base, {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())})
        return places if len(set(places.values())) > 1 else {}
    return _checked(base, device_map)


def balanced(base: nn.Module, free: Mapping[int, int]) -> dict[str, torch.device]:
    """Return a map of the base's modules, in their order, that gives every GPU about the same number of bytes.

    A block that adds its input to its output (`_no_split_modules`, as transformers has them) stays in one piece.

    Parameters
    ----------
    free
        Bytes by the number of the GPU.

    Raises
    ------
    FedspanError
        When they do not hold the base, or it does not say which modules these are.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = sorted(_unsplit(base))
    if not whole:
        raise FedspanError(
            f"engine.device_map = 'auto': {type(base).__name__} does not say which of its modules must stay in one "
            "piece; expected a table of modules and devices"
        )
    limits = get_balanced_memory(base, dict(free), no_split_module_classes=whole)
    found: Mapping[str, int | str] = infer_auto_device_map(base, limits, no_split_module_classes=whole)
    left = [name for name, device in found.items() if device not in free]
    if left:
        room = " + ".join(_size(size) for size in free.values())
        raise FedspanError(
            f"engine.device_map = 'auto': the base ({_size(sum(map(_bytes, _tensors(base))))}) does not fit into "
            f"{room} of free GPU memory, from {left[0]} on; expected more GPUs, or model.quantise = 'int8' or 'nf4'"
        )
    return {name: torch.device("cuda", int(number)) for name, number in found.items()}


def _checked(base: nn.Module, table: Mapping[str, int | str]) -> dict[str, torch.device]:
    """Return a user's table with its devices, which exist, once its names are found to cover the base."""
    modules = {name for name, _ in base.named_modules()}
    known = modules | {name for name, _ in chain(base.named_parameters(remove_duplicate=False), base.named_buffers())}
    for name in table:
        if name not in known:
            inside = [n for n in modules if n.endswith(f".{name}")]  # named as in the model below the head
            hint = nearest(name, inside or (n for n in modules if n.count(".") <= max(1, name.count("."))))
            raise FedspanError(f"engine.device_map: the base has no module {name!r}{hint}")
    devices = {device: usable_device("engine.device_map", device_name(device)) for device in table.values()}
    places = {name: devices[device] for name, device in table.items()}
    chosen = _device_by_weight(base, places)
    for name, module in base.named_modules():
        own = {chosen[id(parameter)] for parameter in module.parameters()}
        if type(module).__name__ in _unsplit(base) and len(own) > 1:
            where = " and ".join(sorted(map(str, own)))
            raise FedspanError(
                f"engine.device_map puts {name} ({type(module).__name__}) on {where}: its parts are added up; expected "
                "one device for all of it"
            )
    return places


def _unsplit(base: Any) -> Collection[str]:
    """Return the classes of modules that must stay in one piece, as transformers names them."""
    return frozenset(getattr(base, "_no_split_modules", None) or ())


def _device_of(name: str, places: Places) -> torch.device | None:
    """Return the device of a tensor or module by the longest name that it is in."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places.get(name)


def _device_by_weight(base: nn.Module, places: Places) -> dict[int, torch.device]:
    """Return the device of every parameter by its `id`; names that share a weight share its device.

    Raises
    ------
    FedspanError
        For a parameter without a device, and for one that two names put on different devices.
    """
    found: dict[int, tuple[str, torch.device]] = {}
    named = dict(base.named_parameters(remove_duplicate=False))
    for name, tensor in named.items():
        device = _device_of(name, places)
        if device is None:
            continue
        other, first = found.setdefault(id(tensor), (name, device))
        if first != device:
            raise FedspanError(
                f"engine.device_map: {other} and {name} are one weight, on {first} and on {device}: "
                "expected one device for both"
            )
    missing = [name for name, tensor in named.items() if id(tensor) not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FedspanError(
            f"engine.device_map has no device for {missing[0]}{more}: expected one for every parameter of the base"
        )
    return {key: device for key, (_, device) in found.items()}


def place(base: nn.Module, places: Places) -> torch.device:
    """Move every tensor of a base to its device, and let passes follow them; return the device that batches go to.

    That is the device of the input embeddings, as it is of buffers that the map does not cover.
    """
    chosen = _device_by_weight(base, places)
    embeddings = _embeddings(base)
    first = chosen[id(next((embeddings if embeddings is not None else base).parameters()))]
    # Tensor by tensor, so that no more than one is in memory twice. Not `module.to`, which on some devices would make
    # two weights of one that is shared.
    for (_, device), slots in _slots(base, places, chosen, first).items():
        table, name = slots[0]
        moved = _moved(table[name], device)
        for table, name in slots:
            table[name] = moved
    skipped = tuple(_as_names(getattr(base, "_skip_keys_device_placement", None)))
    for module in base.modules():
        devices = {tensor.device for tensor in _tensors(module)}
        if len(devices) == 1:
            bring_inputs(module, devices.pop(), skipped)
    return first


def _slots(
    base: nn.Module, places: Places, chosen: Mapping[int, torch.device], otherwise: torch.device
) -> dict[tuple[int, torch.device], list[tuple[dict[str, Any], str]]]:
    """Return where each tensor is held, by its `id` and the device that it goes to there."""
    slots: dict[tuple[int, torch.device], list[tuple[dict[str, Any], str]]] = {}
    tables: tuple[dict[str, Any], ...]
    for module_name, module in base.named_modules(remove_duplicate=False):
        tables = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    # A buffer that layers on several devices share, such as a table of levels, has a copy on each.
                    own = chosen.get(id(tensor)) or _device_of(f"{module_name}.{name}", places) or otherwise
                    slots.setdefault((id(tensor), own), []).append((table, name))
    return slots


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _embeddings(base: Any) -> nn.Module | None:
    """Return the module that reads a batch first; None where the base does not name one with weights."""
    try:
        found: nn.Module | None = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if found is not None and next(found.parameters(), None) is not None else None


def _as_names(given: str | Iterable[str] | None) -> Iterable[str]:
    return [given] if isinstance(given, str) else given or ()


def bring_inputs(module: nn.Module, device: torch.device, skipped: tuple[str, ...] = ()) -> None:
    """Bring the tensors that a module is called with to its device, before every pass.

    Parameters
    ----------
    skipped
        Names of arguments that stay where they are, such as a cache whose layers lie on devices of their own.
    """
    from accelerate.utils import send_to_device

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=list(skipped))

    module.register_forward_pre_hook(hook, with_kwargs=True)


def checkpoint_in_place(base: nn.Module) -> None:
    """Bring a block's input to its device before the block is checkpointed, not inside.

    torch keeps the state of random numbers of the devices that it sees among a block's arguments: dropout of a block
    whose input comes from another device would draw other masks when the block is computed again.
    """
    for module in base.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            vars(module)["_gradient_checkpointing_func"] = partial(_checkpointed, checkpoint)


def _checkpointed(checkpoint: Callable[..., Any], block: Any, *args: Any, **options: Any) -> Any:
    """Checkpoint a block, which is given as one of its methods or as a partial of one."""
    from accelerate.utils import send_to_device

    owner = getattr(getattr(block, "func", block), "__self__", None)
    held = next(_tensors(owner), None) if isinstance(owner, nn.Module) else None
    return checkpoint(block, *(args if held is None else send_to_device(args, held.device)), **options)


def seed_each_gpu(places: Places, *key: object) -> None:
    """Let every GPU draw random numbers of its own: torch's global seed is the same for all of them."""
    for device in {device for device in places.values() if device.type == "cuda"}:
        number = generator(*key, str(device)).initial_seed()
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


def described(base: nn.Module, places: Places) -> str:
    """Return one line on what lies on each device, with its bytes: those of the base, without adapters."""
    parts = []
    for device in dict.fromkeys(places.values()):
        size = sum(_bytes(t) for t in _tensors(base) if t.device == device)
        names = _runs([name or "all else" for name, own in places.items() if own == device])
        parts.append(f"{device}: {', '.join(names)} ({_size(size)})")
    return "; ".join(parts)


def _runs(names: Iterable[str]) -> list[str]:
    """Return the names, those with consecutive numbers at their ends as one: `layers.0-3`."""
    runs: list[tuple[str, int, int] | str] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        last = runs[-1] if runs else ""
        if match is None:
            runs.append(name)
        elif isinstance(last, tuple) and (last[0], last[2] + 1) == (match[1], int(match[2])):
            runs[-1] = (last[0], last[1], int(match[2]))
        else:
            runs.append((match[1], int(match[2]), int(match[2])))
    return [
        run if isinstance(run, str) else f"{run[0]}.{run[1]}" + (f"-{run[2]}" if run[2] > run[1] else "")
        for run in runs
    ]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
