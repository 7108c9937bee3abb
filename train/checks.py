"""Settings of objective and target that are each right but do not fit together."""

from __future__ import annotations

from mdm.errors import ConfigError, check_known

from .losses import check_tail
from .objective import ObjectiveSettings
from .targets import TargetSettings
from .teachers.foreign import FOREIGN
from .teachers.kinds import SAMPLED, TARGETS


def check_objective(objective: ObjectiveSettings, target: TargetSettings) -> None:
    """Settings that are each right but do not fit together: raise ConfigError."""
    check_known("target.kind", target.kind, (*TARGETS, *FOREIGN))
    if objective.kd_lambda > 0:
        # `mapped` leaves a single token where only one can go on, with nothing outside.
        truncated = target.kind != "left" or target.top_p < 1
        if target.kind in FOREIGN and target.infill:
            raise ConfigError(
                f"target.infill={target.infill} with target.kind={target.kind}: a teacher with another"
                " tokenizer reads the text from the left only; leave target.infill out"
            )
        if target.kind in SAMPLED:
            _check_sampled(objective, target.kind)
        _check_distance(objective, target.kind)
        if target.kind != "embedding":
            check_tail(objective.divergence, objective.tail, truncated=truncated)


def _check_distance(objective: ObjectiveSettings, kind: str) -> None:
    """States have a distance, distributions a divergence: the settings of the other mean nothing."""
    others = ("distance",) if kind != "embedding" else (
        "divergence", "jsd_beta", "tail", "kd_temperature"
    )  # fmt: skip
    for name in others:
        value = getattr(objective, name)
        if value != getattr(ObjectiveSettings(), name):
            compared = "states by objective.distance" if kind == "embedding" else "distributions"
            raise ConfigError(
                f"objective.{name}={value} means nothing with target.kind={kind}, which compares"
                f" {compared}; leave it out"
            )


def _check_sampled(objective: ObjectiveSettings, kind: str) -> None:
    """A random target is right on average, so the loss has to be linear in it."""
    if objective.kd_temperature != 1:
        raise ConfigError(
            f"objective.kd_temperature={objective.kd_temperature} with target.kind={kind}: the mean of"
            " tempered draws is not the tempered mean, so the student would learn something else; set"
            " objective.kd_temperature=1, or target.kind to left or suffix"
        )
    if objective.divergence != "forward_kl" or objective.tail == "renormalise":
        raise ConfigError(
            f"objective.divergence={objective.divergence} and tail={objective.tail} with"
            f" target.kind={kind}: its draws are right on average only in a loss that is linear in them;"
            " set objective.divergence=forward_kl and objective.tail=bucket"
        )
