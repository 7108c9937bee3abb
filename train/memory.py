"""What the models of a recipe take on one process's device, in bytes, by purpose; for `--dry-run`.

Parameters are counted, activations a rule of thumb. A row is read once by a model that sees the full
canvas, [x_t ; x_0] by one with blocks (outlines.py). While the student writes rollouts there are no
gradients and no activations, so of those and what rollouts take the larger one counts.
"""

from __future__ import annotations

from mdm.denoiser import CHUNK_BYTES
from mdm.proposals import CHUNK_TOKENS

from .on_policy import batch_size
from .outlines import (
    Outline,
    RowShape,
    data_rows,
    prompt_lengths,
    read_by_teacher,
    rollout_length,
    rows_have_prompts,
)
from .recipe import Recipe
from .teachers.denoised import DENOISED, SEES_MASKS
from .teachers.foreign import FOREIGN

# nf4: half a byte, and a float32 scale for each 64 weights.
BYTES = {"bf16": 2.0, "fp32": 4.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}


# What there is in the course of a step only.
OF_A_STEP = (
    "gradients",
    "activations",
    "attention mask",
    "logits",
    "teacher's forward",
    "teacher's mask",
    "teacher's answers",
    "teacher's logits",
    "teacher's branches",
)


def rows_at_once(recipe: Recipe, rows: RowShape, processes: int) -> int:
    """Rows of a micro-batch of one process, before they are copied."""
    return min(recipe.train.micro_rows, rows.count // processes)


def noisy_tokens(recipe: Recipe, rows: RowShape, processes: int) -> int:
    """Tokens of a micro-batch that can be masked, each copy for itself."""
    return rows_at_once(recipe, rows, processes) * rows.length * rows.copies


def copies_trained(recipe: Recipe) -> int:
    """float32 values kept for a weight that is trained: itself, gradient, two moments, average."""
    return 4 + (1 if recipe.train.ema_decay else 0)


def student_bytes(
    recipe: Recipe, student: Outline, processes: int, rows: RowShape | None = None
) -> dict[str, int]:
    """Estimated bytes of the student by purpose, when it learns from such rows (null = from the data).

    Activations of a layer: about 16 values of the model width and 4 of the feed-forward width a
    token (inputs of every matrix product, norms, residuals), half of it in bf16.
    """
    settings, size, rows = recipe.train, student.size, rows or data_rows(recipe)
    assert size is not None
    full = settings.sharding == "full" and processes > 1
    parts = processes if full else 1
    mixed = settings.precision == "bf16"
    trained = size.adapters or size.parameters
    weights = size.parameters + size.adapters
    memory = {
        "weights": 4 * weights // parts,
        "gradients": 4 * trained // parts,
        "moments, average": 4 * trained * (copies_trained(recipe) - 2) // parts,
    }
    if (
        full
    ):  # two layers at a time, in half precision, and what is no layer all the time; and gradients
        layers, halves = 2 * 2 * size.layer, 2 * size.matrix if mixed else 0
        memory["gathered weights"] = (2 if mixed else 4) * layers + 4 * 2 * size.ends + halves
    elif mixed:
        memory["bf16 copies"] = 2 * (size.linear + size.matrix)
    if not full and processes > 1:
        memory["gradient exchange"] = 4 * trained
    at_once = rows_at_once(recipe, rows, processes)
    tokens = at_once * rows.length * student.streams(rows)
    value = 3 if mixed else 4
    layer = tokens * value * (16 * student.width + 4 * student.inner)
    checkpointed = settings.gradient_checkpointing
    if checkpointed:
        memory["activations"] = layer + student.layers * tokens * 4 * student.width
    else:
        memory["activations"] = student.layers * layer
    # One float32 mask for all layers; autocast makes a bf16 copy for each, kept for the backward pass.
    mask = 4 + (2 * (1 if checkpointed else student.layers) if mixed else 0)
    memory["attention mask"] = at_once * student.pairs(rows) * mask
    # Logits, log-probabilities and their gradients; never more than a chunk of rows at a time.
    chunk = min(CHUNK_BYTES, 4 * scored_tokens(recipe, rows, processes) * student.rows)
    return memory | {"logits": 4 * chunk}


def scored_tokens(recipe: Recipe, rows: RowShape, processes: int) -> int:
    """Most tokens of a micro-batch that need logits: the masked ones, and clean ones of an AR loss."""
    noisy = noisy_tokens(recipe, rows, processes)
    return noisy + (noisy // rows.copies if recipe.objective.ar_weight else 0)


def teacher_bytes(
    recipe: Recipe, teacher: Outline, processes: int, rows: RowShape | None = None
) -> dict[str, int]:
    """Estimated bytes of the teacher by purpose: weights, one forward, what its answers need."""
    settings, size, rows = recipe.teacher, teacher.size, rows or data_rows(recipe)
    assert size is not None
    value = BYTES[settings.dtype]
    if settings.offload:  # one matrix at a time
        weights = value * size.matrix
    elif settings.quantization:  # and one layer's matrix in full while it is used
        few = BYTES[settings.quantization]
        weights = few * size.linear + value * (size.parameters - size.linear)
    elif recipe.train.sharding == "full" and processes > 1:
        weights = value * (size.layers / processes + 2 * size.layer + size.ends)
    else:
        weights = value * size.parameters
    at_once = rows_at_once(recipe, rows, processes)
    tokens = at_once * rows.length * teacher.streams(read_by_teacher(recipe, rows))
    forward = tokens * value * (8 * teacher.width + 4 * teacher.inner)
    memory = {"teacher": int(weights), "teacher's forward": int(forward)}
    kind = recipe.target.kind
    asked = noisy_tokens(recipe, rows, processes)
    chunk = min(CHUNK_BYTES, 4 * asked * teacher.rows)
    if kind in SEES_MASKS:
        # Who sees whom, as numbers and, while they are made, as a few tables of bools.
        memory["teacher's mask"] = int(at_once * teacher.pairs(rows) * (value + 3))
        memory["teacher's logits"] = 3 * chunk
    elif kind not in ("left", *FOREIGN):
        memory["teacher's branches"] = branch_bytes(recipe, teacher)
    if gives_whole(recipe):  # inputs of its head, of both passes; logits, mixture and gradients
        passes = 2 if recipe.target.comp_demo else 1
        memory["teacher's answers"] = int(passes * asked * value * teacher.width)
        memory["teacher's logits"] = 7 * chunk
    return memory


def gives_whole(recipe: Recipe) -> bool:
    """Are the targets whole distributions, kept as inputs of the teacher's head?"""
    return recipe.target.kind == DENOISED or recipe.target.top_k == 0


def branch_bytes(recipe: Recipe, teacher: Outline) -> int:
    """Estimated bytes of the branches of a soft target: keys and values, and what a layer needs."""
    # Kept once, read once by a layer, and once more while they grow.
    memory = 3 * 2 * teacher.layers * teacher.keys
    value = BYTES[recipe.teacher.dtype]
    return int(
        recipe.target.branch_tokens * value * (memory + 8 * teacher.width + 4 * teacher.inner)
    )


def rollout_bytes(recipe: Recipe, student: Outline, processes: int) -> dict[str, int]:
    """Estimated bytes of the longest rollouts while they are written, by purpose.

    Keys and values are there three times at most: in the buffer, in the one before it while rows are moved,
    and those of a forward; in float32, also under autocast. Most is read at once when a row begins that
    others have left room for: they are padded to its prompt. Tokens are drawn for a chunk of positions.
    """
    settings, block = recipe.on_policy, student.block_size
    count = batch_size(settings, settings.rows(recipe.train.batch_rows), 0)
    rows = min(settings.decode_rows, -(-count // processes))
    prompt = prompt_lengths(recipe)[1]
    longest = rollout_length(student, prompt, settings.length)
    read = longest if block is None else prompt + block
    # A full canvas has a mask only where rows are padded.
    masked = block is not None or rows_have_prompts(recipe)
    mask = rows * read * (longest + (0 if block is None else read)) * (4 + 3) if masked else 0
    group = min(settings.block_length or block or settings.length, settings.length)
    memory = {}
    if block is not None:
        memory["rollouts' cache"] = 3 * rows * longest * 2 * student.layers * student.keys * 4
    value = 3 if recipe.train.precision == "bf16" else 4
    layer = rows * read * value * (8 * student.width + 4 * student.inner)
    words = -(-student.rows // CHUNK_TOKENS) * CHUNK_TOKENS  # as a draw pads them
    chunk = min(rows * group, max(1, CHUNK_BYTES // (4 * student.rows)))
    logits = chunk * words * 8 * 4
    memory["rollouts' forward"] = max(layer + mask, logits)
    return memory
