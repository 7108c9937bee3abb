"""What `mdm train --dry-run` says of rollouts: how many, how long, what is assumed of them."""

from __future__ import annotations

from mdm.config import require

from .flops import ASSUMED_ACCEPTED, rollout_batches, writing_of
from .outlines import Outline, prompt_lengths, rows_have_prompts
from .recipe import Recipe
from .run import require_rollout_room


def describe_rollouts(
    recipe: Recipe, student: Outline, teacher: Outline | None, processes: int
) -> list[str]:
    """Lines about the student's own text, with what is assumed of it; none if there is none.

    Raises ConfigError for what cannot be written so.
    """
    settings, batches = recipe.on_policy, rollout_batches(recipe)
    if not settings.active:
        return []
    if not batches:
        return [
            f"rollouts    none: on_policy.start_step={settings.start_step} is not before the last step"
        ]
    require_decodable(recipe, student)
    longest = prompt_lengths(recipe)[1]
    unknown = rows_have_prompts(recipe)
    contexts = {"student": student.max_length} | (
        {"teacher": teacher.max_length} if teacher else {}
    )
    require_rollout_room(recipe, 1 if unknown else longest, student.block_size or 1, contexts)
    rows, all_rows = settings.rows(recipe.train.batch_rows), recipe.train.batch_rows
    count = sum(batch.count for batch in batches)
    mean = sum(batch.count * batch.limit for batch in batches) / count
    first, last = batches[0].limit, batches[-1].limit
    prompt = prompt_lengths(recipe)[0]
    forwards = sum(
        -(-batch.count // processes // settings.decode_rows)
        * writing_of(settings, student, prompt, batch.limit).forwards
        for batch in batches
    )
    spread = f"{first}" if first == last else f"{first} to {last}"
    growth = f" ({settings.length_growth}, mean {mean:.1f})" if first != last else ""
    began = f" from step {settings.start_step + 1} on" if settings.start_step else ""
    lines = [
        f"rollouts    {rows} of {all_rows} rows a step{began}; {len(batches)} batches of"
        f" {batches[-1].count}, {count:,} in all, each batch for {settings.steps_per_batch} steps",
        f"            of at most {spread} tokens{growth}: {count * mean:,.0f} tokens, if none ends before",
        f"            {told_prompts(recipe)}",
        f"            {told_pace(recipe, student)}",
        f"            in {forwards:,.0f} forwards one after another, of at most"
        f" {settings.decode_rows} rows each",
    ]
    if settings.replay:
        lines.append(
            f"            {rows - settings.new_rows(rows)} of the {rows} from the last"
            f" {settings.max_staleness} batches, once there are some; their length is taken to be the same"
        )
    shortest = min(contexts, key=lambda who: contexts[who])
    block = student.block_size or 1
    room = contexts[shortest] // block * block - settings.length
    if unknown and longest > room:
        lines.append(
            f"            prompts of more than {room} tokens would not fit into the context of the"
            f" {shortest}: set on_policy.max_prompt_tokens={room}"
        )
    return lines


def told_prompts(recipe: Recipe) -> str:
    """What is known of the prompts' lengths, or taken for it."""
    mean, longest = prompt_lengths(recipe)
    names = ", ".join(recipe.on_policy.prompts or recipe.data.sources)
    if not rows_have_prompts(recipe):
        return f"behind prompts of {mean} tokens from {names}"
    return (
        f"behind prompts from {names}, whose lengths are not known: {mean} tokens are assumed"
        f" (on_policy.prompt_tokens, a start token), {longest} at most (max_prompt_tokens)"
    )


def told_pace(recipe: Recipe, student: Outline) -> str:
    """How many tokens a forward writes, or is taken to write."""
    settings = recipe.on_policy
    if settings.threshold is None:
        return f"written in {settings.tokens_per_step} tokens a forward"
    if student.block_size == 1:
        return "written in 1 token a forward, as blocks have no more"
    return (
        f"written in {ASSUMED_ACCEPTED} tokens a forward: assumed (OPDLM reports 1.5 to 1.9 with"
        " threshold 0.9 and blocks of 4; an untrained student is nearer to 1)"
    )


def require_decodable(recipe: Recipe, student: Outline) -> None:
    """Raise ConfigError if the sampler would refuse the settings."""
    block, length = student.block_size, recipe.on_policy.block_length
    require(
        block is None or length is None or block % length == 0,
        f"on_policy.block_length={length}, but the student has blocks of {block} tokens; leave it out, or"
        f" give a divisor of {block} to decode a block in parts",
    )
