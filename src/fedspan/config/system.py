"""The settings of what carries a run: messages, deployments, engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedspan.config.values import (
    Parallel,
    PositiveFloat,
    PositiveInt,
    Section,
)

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")]


class WireConfig(Section):
    """The types in which tensors travel. Everything computed from them is float32."""

    up: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type from clients to server; `int8` has one scale per row. Secure sums send 64-bit integers instead."""
    down: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type from server to clients."""
    keep_mb: Annotated[int, Field(ge=0, le=2**30)] = 1024
    """Space on a site's disk, in MiB, for what it was sent and may need again, such as bases that stay the same: the
    server then sends a digest in its place. 0: nothing is kept."""


class DeploymentConfig(Section):
    """A federation of real sites. Without effect where all clients are simulated in one process."""

    wait: PositiveFloat = 300.0
    """Longest wait for enough sites before a round, in seconds."""
    deadline: PositiveFloat = 600.0
    """Time that a site has for one answer, in seconds."""
    oversample: Annotated[float, Field(ge=0.0, le=4.0)] = 0.0
    """Extra clients asked in a round, as a share of those that it needs; the round does not wait for the last ones."""
    order: Literal["sorted", "arrival"] = "sorted"
    """`sorted`: updates are added in the order of the clients' ids, which gives the same bits every time. `arrival`:
    as they arrive."""
    patience: PositiveInt = 2
    """Consecutive missed answers after which a site is left out for `quarantine` rounds."""
    quarantine: PositiveInt = 3
    """Number of rounds for which an unresponsive site is left out."""
    poll: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Seconds between two looks for answers."""
    same_libraries: bool = False
    """Refuse sites whose torch, transformers, peft or flwr is of another version than the server's, which may change
    results in the last bits; otherwise the difference is reported. fedspan's own version must be the same anyway."""
    regions: dict[_Name, tuple[_Name, ...]] = Field(default={}, examples=[{"north": ["client-0", "client-1"]}])
    """Region -> the clients behind its server, each in one region. A region's server sums the answers of its sites and
    sends the sum up; needs `privacy.secure_sums` or `privacy.fixed_point`. Empty: every site answers this server."""

    @field_validator("regions")
    @classmethod
    def _one_region_each(cls, regions: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        seen: dict[str, str] = {}
        named = {client.casefold(): client for clients in regions.values() for client in clients}
        for region, clients in regions.items():
            if not clients:
                raise ValueError(f"{region} has no clients: expected one or more")
            if region.casefold() in named:
                raise ValueError(f"the region {region} has the name of the client {named[region.casefold()]}")
            for client in clients:
                if client in seen:
                    where = f"in {seen[client]} and in {region}" if seen[client] != region else f"in {region} twice"
                    raise ValueError(f"{client} is {where}: expected one region for each client")
                seen[client] = region
        return regions


class EngineConfig(Section):
    """The way the work is done on this machine. Engines agree up to rounding; the number of workers changes nothing."""

    name: Literal["auto", "cohort", "sequential"] = "auto"
    """`cohort`: many clients in one batched pass over the shared frozen base. `sequential`: one client after the
    other. `auto`: the cohort where the method allows it and it is faster: on a GPU, and on a CPU for small models."""
    cohort_size: PositiveInt | Literal["auto"] = "auto"
    """Clients in one pass; `auto`: as many as fit into `memory` and are fastest, which on a GPU is measured."""
    memory: PositiveFloat | Literal["auto"] = "auto"
    """Memory that one process's passes over a cohort may take in addition to the base, in GiB. `auto`: 2 on a CPU, half
    of a GPU's."""
    workers: Parallel | Literal["auto"] = "auto"
    """Number of processes, of `threads` threads each; `auto`: one for each GPU, or for as many as there are cores."""
    device_map: Literal["none", "auto"] | dict[str, int | str] = "none"
    """Devices of a base's layers, for a base that no single one can hold. `none`: all on `device`. `auto`: its blocks
    over all GPUs of this machine, about as many bytes on each; with one GPU or none it means `none`. A table of module
    names and devices, as transformers takes it: `{"model.embed_tokens" = 0, "model.layers.0" = "cuda:1"}`; every weight
    must be covered. The devices work in turn, and clients one after the other: for memory, not for speed."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: a third more work, and memory for
    the activations of one block instead of all. Clients are then trained one after the other."""
    prefix_cache: Annotated[int, Field(ge=0)] = 512
    """Memory of one process for the output of the lowest layers, in MiB; 0: none. Where no layer below the first
    with an adapter (`adapter.layers`) trains or drops anything, they are computed once for each example. On a CPU."""
    round_memory: PositiveFloat | Literal["auto"] = "auto"
    """Memory for the updates of a round, where the method needs all of them at once, in GiB; those beyond it wait in
    files in the run's folder, and the results have the same bits. `auto`: half of the memory that is free. The same
    holds for the answers of sites that come before it is their turn to be added."""
    compile: bool = False
    """Compile the base's forward and backward passes: half a minute at the start, faster steps afterwards."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Matrix products of a float32 base in training. `float32`: results that compare with those of other machines.
    `bfloat16`: of its frozen layers in bfloat16, where adapters, gradients, optimizer and loss stay in float32. `auto`:
    on a GPU that has it TF32 (10 bits of mantissa, sums in float32); on a CPU `bfloat16` where it is measured to be
    faster. The choice is recorded. Evaluation and the server's algebra are always `float32`."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Type of the base's matrix products in training; worthwhile for wide models (hidden size 512 and more)."""

    @field_validator("device_map", mode="before")
    @classmethod
    def _modules_and_devices(cls, value: object) -> object:
        table = isinstance(value, dict) and all(
            isinstance(name, str) and (isinstance(device, str) or (type(device) is int and device >= 0))
            for name, device in value.items()
        )
        if not table and value not in ("none", "auto"):
            raise ValueError(
                "expected none, auto, or a table of module names in quotes, each with a device, the number of a GPU or "
                'a name; in TOML such as {"model.embed_tokens" = 0, "lm_head" = "cuda:1"}'
            )
        return value
