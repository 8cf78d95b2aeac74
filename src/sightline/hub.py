"""Runs in repositories of the Hugging Face hub: push, pull, load. Only plain data is exchanged, no code."""

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
from typing import Any, cast

from torch import nn

from sightline import data, runs
from sightline.data.hugging_face import ALIASES

PREFIX = "hub:"
_WEIGHTS = "model.safetensors"
_FACTS = ("recipe.yaml", "metrics.csv", "run.json")
_MORE = (runs.BASE_LEARNER,)
"""Files that only some runs have."""
_EXPLAIN = "sightline explain run photo.jpg --methods grad_cam --out maps"
_LISTED = 30  # classes named in the card
_READS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options that make timm read or write the files a recipe names, which might be pickles."""


def load(source: Path | str, model: runs.Own | None = None) -> nn.Module:
    """The trained model of a run folder or a hub repository, a plain module in eval mode on the CPU.

    Args:
        source: a run folder, or "hub:OWNER/NAME", or "hub:OWNER/NAME@REVISION" with a branch, tag or commit.
        model: for a run of a network of your own, the module or what builds it (see `sightline.runs.build`). A run
            holds data and no code, so nothing else can build it; the module itself is not changed.

    Raises:
        OSError: the folder or repository is missing or is no run, or its weights are missing or damaged.
        ValueError: the weights are those of another model, or a file is damaged.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        return runs.load_model(fetch(source), model)
    return runs.load_model(source, model)


def push(folder: Path | str, name: str, private: bool = False) -> str:
    """Upload a run to a repository of the hub, which is created if it is missing, and return its address.

    Uploaded are model.safetensors, recipe.yaml, run.json, metrics.csv, base_learner.safetensors if there is one, and
    README.md, a model card written from the run and its evaluation.json. Paths (data, class lists, options, weights,
    teacher, command) are shortened to their last part, and the list of unreadable images is left out.

    Args:
        folder: the run.
        name: OWNER/NAME.
        private: make the repository private; an existing one must be private already.

    Raises:
        ValueError: no such name, or the repository is public though `private`, or holds something else.
        OSError: the folder is no run, no token is found, or the hub refuses or cannot be reached.
    """
    import huggingface_hub

    name, revision = _split(name)
    if revision:
        raise ValueError(
            f"expected OWNER/NAME, got the revision {revision!r} too; leave it out, pushing makes a new one"
        )
    run = runs.open_run(folder)
    _refuse_files(run)
    _check_weights(run)
    if huggingface_hub.get_token() is None:
        raise PermissionError("expected a Hugging Face token to push, found none; log in: hf auth login")
    public = _public(run)
    readme = card(public, name, _evaluation(run.folder))
    api = huggingface_hub.HfApi()
    with _errors_of(name), tempfile.TemporaryDirectory() as temporary:
        if api.repo_exists(name):
            _check_target(name, api.model_info(name), private)
        else:
            api.create_repo(name, private=private or None, exist_ok=True)
        runs.save(replace(public, folder=Path(temporary)))
        files = {file: Path(temporary, file) for file in _FACTS}
        files |= {file: run.folder / file for file in (_WEIGHTS, *_MORE) if (run.folder / file).is_file()}
        contents = {**files, "README.md": readme.encode()}
        changes: list[Any] = [huggingface_hub.CommitOperationAdd(file, content) for file, content in contents.items()]
        left = [file for file in _MORE if file not in files and api.file_exists(name, file)]  # of an earlier run
        changes += [huggingface_hub.CommitOperationDelete(file) for file in left]
        api.create_commit(name, changes, commit_message="A run of sightline")
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
    _check_weights(runs.open_run(folder))
    more = [file for file in _MORE if (folder / file).is_file()]
    for file in (_WEIGHTS, *more, *_FACTS):  # run.json last: an incomplete copy is no run
        runs.write(out / file, (folder / file).read_bytes())
    return runs.open_run(out)


def fetch(name: str) -> Path:
    """Download the run of a hub repository into the cache and return its folder; without network, the cached one.

    Only the data files of a run are downloaded, the weights only if the others are those of a run.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        OSError: the repository is missing, is no run, or cannot be reached.
        ValueError: no such name, or the run is damaged.
    """
    import huggingface_hub

    repository, revision = _split(name)
    with _errors_of(name):
        cached = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=[*_FACTS])
        folder = Path(cached)
    _check_files(folder, _FACTS, name)
    _refuse_files(runs.open_run(folder))
    with _errors_of(f"weights of {name}"):  # the folder is named by its commit
        huggingface_hub.snapshot_download(repository, revision=folder.name, allow_patterns=[_WEIGHTS, *_MORE])
        if not (folder / _WEIGHTS).is_file():
            huggingface_hub.HfApi().file_exists(repository, _WEIGHTS, revision=folder.name)  # raises without network
    _check_files(folder, (_WEIGHTS,), name)
    return folder


def card(run: runs.Run, name: str, evaluation: dict[str, Any] | None) -> str:
    """The model card of a run: metadata for the hub, then what a user of the weights needs to know.

    Args:
        run: the run as it is published.
        name: OWNER/NAME.
        evaluation: content of evaluation.json.
    """
    from huggingface_hub import EvalResult, ModelCardData

    network, source, title = run.recipe.model.name, run.recipe.data.source, name.partition("/")[2]
    own = ", model=..." if network.startswith(runs.OWN) else ""
    network = network.removeprefix(runs.OWN)
    parameters = f", {run.info['parameters']} parameters" if "parameters" in run.info else ""
    more = f" and {len(run.classes) - _LISTED} more, see run.json" if len(run.classes) > _LISTED else ""
    accuracy = _accuracy(run, evaluation)
    results = None
    if accuracy is not None:
        measured = EvalResult(
            task_type="image-classification",
            dataset_type=_id(accuracy[0]),
            dataset_name=accuracy[0],
            dataset_split=accuracy[1],
            metric_type="accuracy",
            metric_value=round(accuracy[2], 4),
        )
        results = [measured]
    metadata = ModelCardData(
        library_name="sightline",
        pipeline_tag="image-classification",
        tags=["image-classification", "attention", "explainability", network],
        datasets=[_id(source)] if source in ALIASES or source.startswith(PREFIX) else None,
        metrics=None if accuracy is None else ["accuracy"],
        model_name=title,
        eval_results=results,
    )
    facts = {"data": f"`{source}`", "seed": str(run.seed)}
    facts |= {key: f"`{value}`" if key == "command" else value for key, value in run.info.items()}
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"An image classifier: `{network}`{parameters}, trained with sightline. "
        f"{len(run.classes)} classes: {', '.join(run.classes[:_LISTED])}{more}.",
        "## Load it",
        f'```python\nimport sightline as sl\n\nmodel = sl.load("{PREFIX}{name}"{own})  # images to logits\n```',
        "" if own else f"```bash\nsightline pull {name} --out run\n{_EXPLAIN}\n```",
        f"The input is the image in red, green and blue, {run.preprocess}, divided by 255, minus "
        f"{[*run.preprocess.mean]}, divided by {[*run.preprocess.std]}. The logits are in the order of the classes.",
        "## How good it is",
        "Its accuracy was not measured." if accuracy is None else accuracy[3],
        "\n".join(f"- {sentence}" for sentence in (evaluation or {}).get("summary", ())),
        "## How it was made",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        "`recipe.yaml` has every setting of the training, `metrics.csv` its history. Paths are shortened to their last "
        "part.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _id(source: str) -> str:
    """The name of a data set on the hub, if the hub has it."""
    return ALIASES[source].hub if source in ALIASES else source.removeprefix(PREFIX).partition(":")[0]


def _accuracy(run: runs.Run, evaluation: dict[str, Any] | None) -> tuple[str, str, float, str] | None:
    """Data, split, accuracy, and the sentence that reports it; None if it was not measured."""
    interval = (evaluation or {}).get("accuracy")
    if evaluation is not None and interval is not None:
        source, split, unit = _last_part(evaluation["data"]), evaluation["split"], evaluation["unit"]
        value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
        units = f"{interval['n']:,} images" if unit == "images" else f"{interval['n']:,} groups ({unit})"
        text = f"Accuracy {value:.1f} % [{low:.1f}, {high:.1f}] on {source}, split {split}: 95 % interval over {units}."
        return source, split, interval["value"], text
    accuracies = [row["val_accuracy"] for row in run.history if not math.isnan(row["val_accuracy"])]
    if not accuracies:
        return None
    value = accuracies[-1] if run.recipe.optim.patience is None else max(accuracies)
    text = f"Accuracy {100 * value:.1f} % on validation images. It was not evaluated on test images."
    return run.recipe.data.source, "val", value, text


def _evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("data", "split", "unit", "accuracy", "summary")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version; evaluate the run again, or delete it") from error


def _public(run: runs.Run) -> runs.Run:
    """The run without what identifies a machine or its owner: folders, names of single files."""
    recipe = run.recipe
    source = recipe.data.source if recipe.data.source in data.DATASETS else _last_part(recipe.data.source)
    classes = recipe.data.classes and _last_part(recipe.data.classes)
    shortened = replace(
        recipe,
        data=replace(recipe.data, source=source, classes=classes),
        model=replace(
            recipe.model,
            options=_last_parts(recipe.model.options),
            weights=recipe.model.weights and _last_part(recipe.model.weights),
        ),
        optim=replace(recipe.optim, teacher=recipe.optim.teacher and _last_part(recipe.optim.teacher)),
    )
    info = dict(run.info)
    if "command" in info:
        info["command"] = shlex.join(map(_last_part, shlex.split(info["command"])))
    return replace(run, recipe=shortened, info=info, skipped=[], notices=[])


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
    """Plain data with every string shortened to its last part.

    >>> _last_parts({"a": ["/x/y", 1], "b": {"c": "x/z"}})
    {'a': ['y', 1], 'b': {'c': 'z'}}
    """
    if isinstance(value, dict):
        return {_last_parts(key): _last_parts(inner) for key, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_last_parts(inner) for inner in cast(list[Any], value)]
    return _last_part(value) if isinstance(value, str) else value


def _refuse_files(run: runs.Run) -> None:
    """Refuse recipes that make timm read or write files of this machine."""
    if options := [option for option in _READS if option in run.recipe.model.options]:
        raise ValueError(
            f"expected a run whose weights are in model.safetensors, got one with the option {options[0]}; "
            "leave it out of the recipe"
        )


def _check_weights(run: runs.Run) -> None:
    """Refuse weights that are missing or damaged, or those of another network if this package can build the run's."""
    if run.recipe.model.name.startswith(runs.OWN) and (run.folder / _WEIGHTS).is_file():
        runs.unpack(run.folder / _WEIGHTS)
    else:
        runs.load_model(run.folder)


def _check_target(name: str, repository: Any, private: bool) -> None:
    if private and not repository.private:
        raise ValueError(
            f"expected {name} to be private, it is public; make it private on the hub or choose another name"
        )
    files = {file.rfilename for file in repository.siblings or ()} - {".gitattributes", "README.md", "LICENSE"}
    if files and not {"recipe.yaml", "run.json"} <= files:
        raise ValueError(
            f"expected a new repository or one of a run, got {name}, which holds {min(files)}; choose another name"
        )


def _check_files(folder: Path, files: tuple[str, ...], name: str) -> None:
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{name} is not a run, it has no {missing[0]}; expected a repository that `sightline push` wrote"
        )


def _split(name: str) -> tuple[str, str]:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"expected OWNER/NAME of a hub repository, got {name!r}; write for example jane/birds")
    return repository, revision


@contextmanager
def _errors_of(name: str) -> Generator[None]:
    """Errors of the hub and the network in one line; progress bars on terminals only."""
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
    # network errors have dozens of types
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
