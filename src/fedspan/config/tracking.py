"""The settings of trackers of experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    WithJsonSchema,
    create_model,
)

from fedspan.config.values import (
    Section,
    as_name,
    as_tuple,
)

Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
TrackerNames = Annotated[
    tuple[Tracker, ...],
    BeforeValidator(as_tuple),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(get_args(Tracker))},
                {"type": "array", "items": {"enum": list(get_args(Tracker))}},
            ]
        }
    ),
]
TrackerLabel = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\w[\w .-]*$")]
"""A name that is safe in a path and in a tracker's query."""

if TYPE_CHECKING:
    _WithTrackers = Section
else:
    # `with` is a word of Python, which a class cannot declare.
    _WithTrackers = create_model(
        "_WithTrackers",
        __base__=Section,
        **{
            "with": (
                TrackerNames,
                Field(
                    default=(),
                    description="Trackers that get the figures of every round: `tensorboard`, `mlflow`, `wandb`, "
                    "`trackio`, `comet_ml`, `aim`, `clearml`, `dvclive` or `swanlab`, each of which has to be "
                    "installed. Empty: none.",
                ),
            )
        },
    )


class TrackingConfig(_WithTrackers):
    """Trackers of experiments, which show the figures of many runs. They change no result."""

    project: TrackerLabel = "fedspan"
    """Project (of MLflow: experiment) that the run is filed under."""
    group: Annotated[TrackerLabel | None, Field(examples=["ranks"])] = None
    """Group of runs that belong together, such as those of one comparison. Unset: none."""
    name: Annotated[TrackerLabel | None, Field(examples=["glora rank 8"])] = None
    """Name of the run. Unset: that of its folder; in a comparison, its condition, arm and seed."""
    folder: Annotated[
        Annotated[str, Field(min_length=1)] | None, BeforeValidator(as_name), Field(examples=["logs"])
    ] = None
    """Folder for what trackers write on this machine, such as one that several runs share. Unset: `tracking` in the run
    folder."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names under `with`, each once."""
        return tuple(dict.fromkeys(getattr(self, "with")))
