"""lm-eval's tasks by name, with local data where there is some, and errors that say what is missing.

A task keeps its own prompts, filters and metrics; only where its data set comes from is changed,
through a generated YAML file that includes the task's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import logging
import re
import socket
import tempfile
import urllib.parse
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mdm.errors import ConfigError, DataError, MdmError

from .code_eval import in_place_of_code_eval
from .local_data import HUMAN_EVAL

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

REACH_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """`--data task=path` or `--data task:split=path`."""

    task: str
    split: str
    path: Path


def parse_data(text: str) -> LocalFile:
    """Read one `--data` option. Raises ConfigError if it has no such form, DataError without a file."""
    name, equals, path = text.partition("=")
    task, colon, split = name.partition(":")
    if not equals or not task or not path or (colon and not split):
        raise ConfigError(f"cannot read --data {text!r}; write task=FILE or task:split=FILE")
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"--data {text}: there is no file or folder at {path!r}")
    return LocalFile(task, split or "*", place.resolve())


def load_tasks(
    names: Sequence[str],
    data: Sequence[LocalFile],
    *,
    include_path: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[TaskManager, dict[str, Any]]:
    """lm-eval's task manager and the loaded tasks and groups of these names.

    `overrides` replaces keys of a task's configuration. Raises ConfigError for an unknown name,
    DataError if a data set is neither local nor reachable.
    """
    manager = task_manager(include_path)
    for name in [*names, *(file.task for file in data)]:
        if name not in manager.task_index:
            if not Path(name).is_file():
                raise ConfigError(_unknown_task(name, manager.all_tasks))
            manager.task_index[name] = _entry_of_file(Path(name))
    asked = {leaf for name in names for leaf in leaves(manager, name)}
    files: dict[str, dict[str, str]] = {}
    for file in data:
        own = [leaf for leaf in leaves(manager, file.task) if leaf in asked]
        if not own:
            raise ConfigError(
                f"--data {file.task}=…: this task is not among --tasks {','.join(names)}"
            )
        for leaf in own:
            files.setdefault(leaf, {})[file.split] = str(_part_of(manager, leaf, file.path))
    with tempfile.TemporaryDirectory(prefix="mdm-tasks-") as folder:
        for leaf in sorted(asked & set(manager.task_index)):
            entry = manager.task_index[leaf]
            config = entry.cfg or {}
            source = config.get("dataset_path")
            changes = dict((overrides or {}).get(leaf, {}))
            if leaf in files or source == HUMAN_EVAL:
                changes["custom_dataset"] = "mdm.eval.local_data.dataset"
                changes["dataset_kwargs"] = {
                    "mdm_files": files.get(leaf, {}),
                    "mdm_source": source,
                    "mdm_split": config.get("test_split") or config.get("validation_split"),
                }
            if changes:
                entry.yaml_path = _derived(Path(folder), entry.name, entry.yaml_path, changes)
        with in_place_of_code_eval(), _quiet(), offline_unless_reachable():
            return manager, _load(manager, names, files)


def task_manager(include_path: str | None) -> TaskManager:
    """A fresh manager of lm-eval's tasks and those in `include_path`; its index may be changed."""
    from lm_eval.tasks import TaskManager

    # Reading the index takes ten seconds and gives the same each time; a copy is changed instead.
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"--include-path: there is no folder at {include_path!r}")
    with _quiet():
        manager = TaskManager(include_path=include_path, include_defaults=False)
    own = dict(manager.task_index)
    manager.task_index.update(
        {name: dataclasses.replace(entry) for name, entry in _built_in().items() if name not in own}
    )
    manager._all_tasks = sorted(manager.task_index)
    return manager


@functools.cache
def _built_in() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager().task_index


def _entry_of_file(path: Path) -> Any:
    """The index' entry of a task or group in a YAML file of its own."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        entry = TaskIndex.entry_from_path(path)
        config = load_yaml(path, resolve_func=False)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no task file: {' '.join(str(error).split())}") from error
    return dataclasses.replace(entry, cfg=config)


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The single tasks behind the name of a task, group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return [name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    return _members(manager, (entry.cfg or {}).get("task", []))


def _members(manager: TaskManager, members: Sequence[Any]) -> list[str]:
    """Of a group: names, tasks with changes, or groups written out on the spot."""
    found = []
    for member in members:
        name = member if isinstance(member, str) else member.get("group") or member.get("task")
        inline = not isinstance(member, str) and name not in manager.task_index
        inner = member.get("task") if inline else None
        found += _members(manager, inner) if isinstance(inner, list) else leaves(manager, name)
    return found


def _part_of(manager: TaskManager, leaf: str, path: Path) -> Path:
    """The file of one task: the path itself, or the one named after its subset in a folder."""
    entry = manager.task_index.get(leaf)
    subset = (entry.cfg or {}).get("dataset_name") if entry else None
    if path.is_dir() and subset:
        places = [
            path / subset,
            *(path / f"{subset}{end}" for end in (".jsonl", ".json", ".parquet", ".csv")),
        ]
        for place in places:
            if place.exists():
                return place
    return path


def _derived(folder: Path, leaf: str, origin: Path | None, changes: Mapping[str, Any]) -> Path:
    """A YAML file that includes the task's own and changes these keys."""
    text = yaml.safe_dump({"include": str(origin), "task": leaf, **changes}, allow_unicode=True)
    # The function has to be named by a tag, which a plain dump cannot write.
    text = re.sub(r"^custom_dataset: (\S+)$", r"custom_dataset: !function \1", text, flags=re.M)
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _load(manager: TaskManager, names: Sequence[str], given: Collection[str]) -> dict[str, Any]:
    """Each name by itself, so that an error can say whose it is."""
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            part = manager.load([name])
        except MdmError:
            raise
        except (ModuleNotFoundError, AssertionError) as error:
            raise ConfigError(
                f"task {name} needs a package that is missing: {' '.join(str(error).split())}"
            ) from error
        except Exception as error:
            raise DataError(_missing_data(manager, name, error, given)) from error
        for key, values in part.items():
            loaded[key].update(values)
    return loaded


def _missing_data(manager: TaskManager, name: str, error: Exception, given: Collection[str]) -> str:
    """What the task would need, from its configuration; `given`: tasks that have a local file."""
    first = next((leaf for leaf in leaves(manager, name) if leaf in manager.task_index), name)
    entry = manager.task_index.get(first)
    config = (entry.cfg or {}) if entry else {}
    reason = " ".join(str(error).split())[:200]
    source, subset = config.get("dataset_path"), config.get("dataset_name")
    if source is None:
        return f"task {name} cannot be loaded ({type(error).__name__}: {reason})"
    templates = [
        str(config.get(key, "")) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")
    ]
    # A template names fields in braces; a bare word is a field itself.
    fields = {field for text in templates for field in re.findall(r"{{\s*([a-z_]\w*)", text)}
    fields |= {text for text in templates if text.isidentifier()}
    if any(leaf in given for leaf in leaves(manager, name)):
        return (
            f"the data given with --data does not fit task {name} ({type(error).__name__}: {reason});"
            f" its rows need the fields {', '.join(sorted(fields)) or 'of ' + str(source)}"
        )
    split = config.get("test_split") or config.get("validation_split")
    shots = config.get("fewshot_split") or config.get("training_split")
    text = (
        f"task {name} needs the data set {source}{f' ({subset})' if subset else ''}, split {split},"
        f" which is not on this machine and cannot be fetched ({type(error).__name__}: {reason});"
        f" give it as a file: --data {first}=FILE.jsonl"
    )
    if fields:
        text += f", rows with the fields {', '.join(sorted(fields))}"
    if shots and shots != split and config.get("num_fewshot") != 0:
        text += f"; examples for the prompt: --data {first}:{shots}=FILE.jsonl, or --num-fewshot 0"
    if len(leaves(manager, name)) > 1:
        text += f"; for all of {name}: --data {name}=FOLDER with one file or folder a subset"
    return text


def _unknown_task(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"unknown task {name!r}{hint} (`mdm eval lm-eval ls tasks` lists all {len(known)})"


@contextlib.contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """Without a network, look for data sets in the local cache only: asking takes half a minute each."""
    import datasets
    import huggingface_hub.constants as hub

    if _reachable(hub.ENDPOINT):
        yield
        return
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    place = urllib.parse.urlparse(address)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        with socket.create_connection((place.hostname or "", port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notices of lm-eval while it loads; what matters among them is checked by us."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
