"""Runs in repositories of the Hugging Face hub: push, pull, load. Only plain data goes either way."""

import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import yaml
from torch import nn

from sightline import data, runs
from sightline.data.hugging_face import ALIASES

PREFIX = "hub:"
_WEIGHTS = "model.safetensors"
_FACTS = ("recipe.yaml", "metrics.csv", "run.json")
_LISTED = 30  # classes named in the card
_READS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options by which timm reads files, or writes them, where a recipe says; a file might be a pickle."""


def load(source: Path | str) -> nn.Module:
    """The trained model of a run folder or a hub repository, a plain module in eval mode on the CPU.

    Args:
        source: a run folder, or "hub:OWNER/NAME", or "hub:OWNER/NAME@REVISION" with a branch, tag or commit.

    Raises:
        OSError: the folder or repository is missing or is no run, or its weights are missing or damaged.
        ValueError: the weights are those of another model, or a file is damaged.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return runs.load(fetch(source))
    return runs.load(source)


def push(folder: Path | str, name: str, private: bool = False) -> str:
    """Put a run into a repository of the hub, which is made where it is missing, and return its address.

    What goes there: model.safetensors, recipe.yaml, run.json, metrics.csv and README.md, a model card written from the
    run and its evaluation.json. Of paths (data, options, weights, teacher, command) only the last part is published,
    and the list of unreadable images is left out.

    Args:
        folder: the run.
        name: OWNER/NAME.
        private: make the repository private; one that is there already must be.

    Raises:
        ValueError: no such name, or the repository is public though `private`, or holds something else.
        OSError: the folder is no run, nobody is logged in, or the hub refuses or cannot be reached.
    """
    name, revision = _split(name)
    if revision:
        raise ValueError(
            f"expected OWNER/NAME, got the revision {revision!r} too; leave it out, pushing makes a new one"
        )
    run = runs.open_run(folder)
    _refuse_files(run)
    runs.load(folder)
    hub = _library()
    if hub.get_token() is None:
        raise PermissionError("expected a Hugging Face token to push, found none; log in: hf auth login")
    public = _public(run)
    readme = card(public, name, _evaluation(run.folder))
    api = hub.HfApi()
    with _told(name), tempfile.TemporaryDirectory() as temporary:
        if api.repo_exists(name):
            _check_target(name, api.model_info(name), private)
        else:
            api.create_repo(name, private=private or None, exist_ok=True)
        runs.save(replace(public, folder=Path(temporary)))
        files = {file: Path(temporary, file) for file in _FACTS} | {_WEIGHTS: run.folder / _WEIGHTS}
        adding = [hub.CommitOperationAdd(file, content) for file, content in files.items()]
        adding.append(hub.CommitOperationAdd("README.md", readme.encode()))
        api.create_commit(name, adding, commit_message="A run of sightline")
    return f"{api.endpoint}/{name}"


def pull(name: str, out: Path | str) -> runs.Run:
    """Copy the run of a hub repository into a new folder.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        out: the folder, new or empty.

    Raises:
        OSError: `out` holds something, or the repository is missing, is no run, or cannot be reached.
        ValueError: no such name, or the run is damaged.
    """
    out = Path(out)
    runs.check_writable(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new folder")
    folder = fetch(name)
    runs.load(folder)
    for file in (_WEIGHTS, *_FACTS):  # run.json last: half a copy is no run
        runs.write(out / file, (folder / file).read_bytes())
    return runs.open_run(out)


def fetch(name: str) -> Path:
    """The run of a hub repository as a folder in the cache; without network, what is there already.

    Only the four data files of a run are fetched, the weights after the others are found to be a run.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        OSError: the repository is missing, is no run, or cannot be reached.
        ValueError: no such name, or the run is damaged.
    """
    repository, revision = _split(name)
    hub = _library()
    with _told(name):
        folder = Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=[*_FACTS]))
    _check_there(folder, _FACTS, name)
    _refuse_files(runs.open_run(folder))
    with _told(f"weights of {name}"):  # the folder is named by its commit
        hub.snapshot_download(repository, revision=folder.name, allow_patterns=[_WEIGHTS])
        if not (folder / _WEIGHTS).is_file():
            hub.HfApi().file_exists(repository, _WEIGHTS, revision=folder.name)  # raises without network
    _check_there(folder, (_WEIGHTS,), name)
    return folder


def card(run: runs.Run, name: str, evaluation: dict[str, Any] | None) -> str:
    """The model card of a run: front matter for the hub, then what a user of the weights needs to know.

    Args:
        run: as it is published.
        name: OWNER/NAME.
        evaluation: what evaluation.json holds.
    """
    wanted, source = run.recipe, run.recipe.data.source
    size = "{} x {}".format(*run.preprocess.size)
    parameters = f", {run.info['parameters']} parameters" if "parameters" in run.info else ""
    more = f" and {len(run.classes) - _LISTED} more, see run.json" if len(run.classes) > _LISTED else ""
    measured = _accuracy(run, evaluation)
    front: dict[str, Any] = {
        "library_name": "sightline",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "attention", "explainability", wanted.model.name],
    }
    if source in ALIASES or source.startswith(PREFIX):
        front["datasets"] = [_id(source)]
    if measured is not None:
        front["metrics"] = ["accuracy"]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": measured[0], "type": _id(measured[0]), "split": measured[1]},
            "metrics": [{"type": "accuracy", "value": round(measured[2], 4)}],
        }
        front["model-index"] = [{"name": name.partition("/")[2], "results": [result]}]
    facts = {"data": f"`{source}`", "seed": str(run.seed)}
    facts |= {key: f"`{value}`" if key == "command" else value for key, value in run.info.items()}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name.partition('/')[2]}",
        f"An image classifier: `{wanted.model.name}`{parameters}, trained with sightline. "
        f"{len(run.classes)} classes: {', '.join(run.classes[:_LISTED])}{more}.",
        "## Load it",
        f'```python\nimport sightline as sl\n\nmodel = sl.load("{PREFIX}{name}")  # normalized images to logits\n```',
        f"```bash\nsightline pull {name} --out run\nsightline explain run photo.jpg --methods grad_cam --out maps\n```",
        f"The input is the whole image in red, green and blue, resized to {size} pixels (height x width), divided by "
        f"255, less {[*run.preprocess.mean]}, divided by {[*run.preprocess.std]}. The logits are in the order of the "
        "classes.",
        "## How good it is",
        "Its accuracy was not measured." if measured is None else measured[3],
        "\n".join(f"- {sentence}" for sentence in (evaluation or {}).get("summary", ())),
        "## How it was made",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        "`recipe.yaml` has every field of the training, `metrics.csv` its course. Paths are shortened to their last "
        "part.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _id(source: str) -> str:
    """What the hub calls a set, where the hub has it."""
    return ALIASES[source].hub if source in ALIASES else source.removeprefix(PREFIX).partition(":")[0]


def _accuracy(run: runs.Run, evaluation: dict[str, Any] | None) -> tuple[str, str, float, str] | None:
    """Data, split, share of right answers, and the sentence that says so; None where there is no figure."""
    found = (evaluation or {}).get("accuracy")
    if evaluation is not None and found is not None:
        source, split, unit = _last_part(evaluation["data"]), evaluation["split"], evaluation["unit"]
        value, low, high = (100 * found[key] for key in ("value", "low", "high"))
        units = f"{found['n']:,} images" if unit == "images" else f"{found['n']:,} groups ({unit})"
        text = f"Accuracy {value:.1f} % [{low:.1f}, {high:.1f}] on {source}, split {split}: 95 % interval over {units}."
        return source, split, found["value"], text
    seen = [row["val_accuracy"] for row in run.history if not math.isnan(row["val_accuracy"])]
    if not seen:
        return None
    value = seen[-1] if run.recipe.optim.patience is None else max(seen)
    text = f"Accuracy {100 * value:.1f} % on validation images. It was not evaluated on test images."
    return run.recipe.data.source, "val", value, text


def _evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("data", "split", "unit", "accuracy", "summary")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version; evaluate the run again, or delete it") from error


def _public(run: runs.Run) -> runs.Run:
    """The run without what a machine or its owner is known by: folders, names of single files."""
    wanted = run.recipe
    source = wanted.data.source if wanted.data.source in data.DATASETS else _last_part(wanted.data.source)
    hidden = replace(
        wanted,
        data=replace(wanted.data, source=source),
        model=replace(
            wanted.model,
            options=_last_parts(wanted.model.options),
            weights=wanted.model.weights and _last_part(wanted.model.weights),
        ),
        optim=replace(wanted.optim, teacher=wanted.optim.teacher and _last_part(wanted.optim.teacher)),
    )
    info = dict(run.info)
    if "command" in info:
        info["command"] = shlex.join(map(_last_part, shlex.split(info["command"])))
    return replace(run, recipe=hidden, info=info, skipped=[], notices=[])


def _last_part(word: str) -> str:
    r"""A path without its folders, also after `--flag=`; the name of a hub repository stays.

    >>> [_last_part(word) for word in ("/a/b/c", "--data=C:\\a\\b", "hub:owner/name", "--lr")]
    ['c', '--data=b', 'hub:owner/name', '--lr']
    """
    flag, equals, value = word.partition("=") if re.match(r"-[^/]*=", word) else ("", "", word)
    if re.fullmatch(PREFIX + r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", value):
        return word
    return flag + equals + re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _last_parts(value: Any) -> Any:
    """Every string in plain data by its last part.

    >>> _last_parts({"a": ["/x/y", 1], "b": {"c": "x/z"}})
    {'a': ['y', 1], 'b': {'c': 'z'}}
    """
    if isinstance(value, dict):
        return {_last_parts(key): _last_parts(inner) for key, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_last_parts(inner) for inner in cast(list[Any], value)]
    return _last_part(value) if isinstance(value, str) else value


def _refuse_files(run: runs.Run) -> None:
    """No recipe of a stranger may have timm read or write files of this machine."""
    if found := [option for option in _READS if option in run.recipe.model.options]:
        raise ValueError(
            f"expected a run whose weights are in model.safetensors, got one with the option {found[0]}; "
            "leave it out of the recipe"
        )


def _check_target(name: str, there: Any, private: bool) -> None:
    if private and not there.private:
        raise ValueError(
            f"expected {name} to be private, it is public; make it private on the hub or choose another name"
        )
    files = {file.rfilename for file in there.siblings or ()} - {".gitattributes", "README.md", "LICENSE"}
    if files and not {"recipe.yaml", "run.json"} <= files:
        raise ValueError(
            f"expected a new repository or one of a run, got {name}, which holds {min(files)}; choose another name"
        )


def _check_there(folder: Path, files: tuple[str, ...], name: str) -> None:
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{name} is not a run, it has no {missing[0]}; expected a repository that `sightline push` wrote"
        )


def _split(name: str) -> tuple[str, str]:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"expected OWNER/NAME of a hub repository, got {name!r}; write for example jane/birds")
    return repository, revision


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "sharing needs the library huggingface_hub; install it: pip install huggingface_hub"
        ) from None
    return huggingface_hub


@contextmanager
def _told(name: str) -> Generator[None]:
    """What the hub or the way to it does not allow, in one line; bars of progress on terminals alone."""
    from huggingface_hub import errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such repository on the hub, or none that you may see; check the name, or log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: the repository has no such branch, tag or commit; check the part after @"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"{name}: the hub refuses this login ({status}); log in with a token that may do this: hf auth login"
            ) from error
        raise OSError(f"{name}: the hub answers {status}: {_reason(error)}; try again later") from error
    except ValueError:
        raise
    # what can go wrong between here and the hub has dozens of types
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            raise OSError(f"{name}: not in the cache, and HF_HUB_OFFLINE is set; unset it and connect once") from error
        raise OSError(f"{name}: cannot exchange files with the hub: {_reason(cause)}; check the network") from error
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
