"""Tiny runs, in this process or in all processes of a `torchrun`, and what they come to.

    python -m torch.distributed.run … tests/two_processes.py CASES.json FOLDER

CASES.json is a list of cases, each the arguments of `play` but for the folder. The first process writes
what a case came to into FOLDER/<name>.json and .safetensors; a test plays the same cases by itself.
`launch` is the `torchrun` of tests.
"""

import contextlib
import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import tiny_run
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mdm.config import build
from mdm.errors import CheckpointError
from mdm.train import processes, sharding, state, supervision, trainer
from mdm.train.recipe import Recipe
from mdm.train.run import averaged_weights, evaluate, save, start
from mdm.train.state import load_state, saved_steps
from mdm.train.targets import ChunkTargets, HeadTargets, StateTargets


def launch(*arguments, number=2, timeout=240):
    """`torchrun` with this many processes on this machine; none of them outlives the call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={number}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=tiny_run.environment(), **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def play(folder, name, tree, *, steps, resume="", half_hidden=False):
    """Train up to `steps` from the beginning, or from the newest checkpoint of the run folder `resume`.

    Leaves a checkpoint in `folder`/`name`. With `half_hidden` every other row, which are all rows of the
    first of two processes, has no masks. Returns (numbers of this process, whole tensors).
    """
    run_folder = Path(folder) / name
    run_folder.mkdir(parents=True, exist_ok=True)
    run = start(build(Recipe, tree), run_folder)
    first = 0
    if resume:
        parts = (run.denoiser, run.optimizer, run.average)
        first = load_state(
            saved_steps(Path(resume) / "checkpoints")[-1], *parts, data=run.data_identity
        )
    with without_masks_in_even_rows() if half_hidden else contextlib.nullcontext():
        numbers = {"targets": teacher_says(run), "metrics": [], "held_out": []}
        run.denoiser.train()
        for step in range(first, steps):
            numbers["metrics"].append(trainer.train_step(run, step))
            # After each step, so that averaged weights that stayed behind would be seen in the next.
            numbers["held_out"].append(evaluate(run).values_R4.tolist())
    numbers["rollouts"] = [
        [number, rollout.tokens_L.tolist(), rollout.step_L.tolist()]
        for number, rollouts in sorted(run.rollouts.items())
        for rollout in rollouts
    ]
    save(run, steps)
    numbers["full_disk"] = on_a_full_disk(run, steps)
    numbers["student_bytes"] = own_bytes(run.denoiser)
    if run.ask and run.denoiser.projection is None:
        numbers["teacher_bytes"] = own_bytes(
            supervision.open_teacher(run.recipe, run.denoiser.vocab).model
        )
    tensors = whole("model", run.denoiser.named_parameters())
    if run.average is not None:
        tensors |= whole("ema", run.average.values.items())
    with averaged_weights(run):
        tensors |= whole("final", sharding.whole_state(run.denoiser.model).items())
    return numbers, tensors


def own_bytes(module):
    """What this process holds of the parameters."""
    own = [getattr(p, "_local_tensor", p) for p in module.parameters()]
    return sum(tensor.nbytes for tensor in own)


def on_a_full_disk(run, step):
    """What is said, and what is left, when the last process cannot write."""

    def write_data(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = state.dcp.HuggingFaceStorageWriter
    last = processes.rank() == processes.world_size() - 1
    with mock.patch.object(writer, "write_data", write_data if last else writer.write_data):
        try:
            save(run, step + 1)
        except CheckpointError as error:
            processes.barrier()
            return [str(error), *(p.name for p in (run.folder / "checkpoints").iterdir())]
    return ["written"]


def whole(kind, named):
    return {f"{kind}/{name}": sharding.whole(tensor.detach()).clone() for name, tensor in named}


def teacher_says(run):
    """[sample, a number made of the teacher's answer] for each row of this process in the first step."""
    found = []
    for batch in trainer.micro_batches(run, 0) if run.ask else []:
        answer = run.ask(batch, run.denoiser)
        if isinstance(answer, StateTargets | HeadTargets):
            value_N = answer.tensors[0].abs().sum(1)
        elif isinstance(answer, ChunkTargets):
            value_N = torch.zeros(len(answer.chunk_N))
            value_N[answer.first_C] = answer.log_likelihood_C
        else:
            value_N = (answer.log_probs_NK.exp() * (answer.token_ids_NK + 1)).sum(1)
        sums_B = torch.zeros(len(batch.keys))
        sums_B.index_add_(0, batch.distilled_BL.nonzero()[:, 0], value_N)
        found += [[key[-1], value] for key, value in zip(batch.keys, sums_B.tolist(), strict=True)]
    return found


@contextlib.contextmanager
def without_masks_in_even_rows():
    real = trainer.micro_batches

    def micro_batches(run, step):
        return [hidden_in_odd_rows(batch) for batch in real(run, step)]

    with mock.patch.object(trainer, "micro_batches", micro_batches):
        yield


def hidden_in_odd_rows(batch):
    odd_B1 = torch.tensor([[key[-1] % 2 == 1] for key in batch.keys])
    return dataclasses.replace(
        batch,
        xt_BL=torch.where(odd_B1, batch.xt_BL, batch.x0_BL),
        masked_BL=batch.masked_BL & odd_B1,
        distilled_BL=batch.distilled_BL & odd_B1,
    )


def main(cases, folder):
    with processes.process_group():
        for case in json.loads(Path(cases).read_text(encoding="utf-8")):
            numbers, tensors = play(folder, **case)
            gathered = [None] * processes.world_size()
            dist.all_gather_object(gathered, numbers)
            if processes.rank() == 0:
                out = Path(folder) / case["name"]
                out.with_suffix(".json").write_text(json.dumps(gathered), encoding="utf-8")
                save_file(tensors, out.with_suffix(".safetensors"))
        dist.barrier()  # nobody takes the group down while another still writes


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
