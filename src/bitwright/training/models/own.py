"""A network from the user's own Python: `FILE.py:NAME` or `MODULE:NAME`."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError
from bitwright.training.lookup import close_matches, first_line

FROM_DATA = ("num_classes", "in_channels", "image_size")


def own_model(
    name: str, *, num_classes: int, in_channels: int, image_size: int | None, options: dict[str, Any]
) -> nn.Module:
    """The network that a class or function of the user's makes, in training mode.

    name: `FILE.py:NAME`, the file relative to the present folder, or `MODULE:NAME`, importable from there. The file's
    folder joins `sys.path`, so that it can import its neighbours. NAME is called with `options` and with those of
    num_classes, in_channels and image_size that it has parameters for.

    The network is tried on one black image, in evaluation mode and without moving random states: one that does not
    fit the data is refused before anything is trained.

    Raises: BitwrightError for a file or name that is not there, for code that raises, and for a network whose output
        is not one number a class.
    """
    where, _, inner = name.rpartition(":")
    if not where or not inner:
        raise BitwrightError(f"model {name!r}: use FILE.py:NAME, a class or function of a Python file")
    module = _import(where, name)
    if not hasattr(module, inner):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise BitwrightError(f"model {name!r}: {inner!r} is not in the file; {close_matches(inner, known)}")
    maker = getattr(module, inner)
    wanted = "use a class or function that returns a torch.nn.Module"
    if not callable(maker):
        raise BitwrightError(f"model {name!r}: {inner!r} is a {type(maker).__name__}; {wanted}")
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    arguments = _arguments(maker, given, options, name)
    try:
        model = maker(**arguments)
    except Exception as error:
        raise BitwrightError(f"model {name!r}: cannot be made ({_said(error, module)})") from error
    if not isinstance(model, nn.Module):
        raise BitwrightError(f"model {name!r}: returned a {type(model).__name__}; {wanted}")
    if image_size is not None:
        _try(model, (1, in_channels, image_size, image_size), num_classes, name, module)
    return model.train()


def fingerprint(name: str, model: nn.Module) -> str | None:
    """Names what a network of `own_model` computes: a hash of its file and of its modules; None for other names."""
    where = name.rpartition(":")[0]
    if not where:
        return None
    source = _import(where, name).__file__
    code = Path(source).read_bytes() if source else b""
    return hashlib.sha256(code + repr(model).encode()).hexdigest()


def _import(where: str, name: str) -> ModuleType:
    """The module in a file or of a name; one that was imported before is not run again."""
    path = Path(where).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise BitwrightError(f"model {name!r}: no such file; paths start at the folder that the command runs in")
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(where)
        known = sys.modules.get(path.stem)
        if known is not None and Path(known.__file__ or "").resolve() == path.resolve():
            return known
        # Under its own name where that is free, as `import` would: pickles and its neighbours find it.
        key = path.stem if known is None else f"{path.stem} in {folder}"
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
        return module
    except (Exception, SystemExit) as error:
        raise BitwrightError(f"model {name!r}: cannot be imported ({_said(error, None)})") from error


def _arguments(maker: Any, given: dict[str, Any], options: dict[str, Any], name: str) -> dict[str, Any]:
    """What `maker` is called with: the options, and what it asks for of the data."""
    try:
        parameters = inspect.signature(maker).parameters
    except ValueError:  # compiled code need not have a signature
        return options
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in named and not any_name:
            accepted = [n for n in named if n not in FROM_DATA]
            hint = close_matches(option, accepted) if accepted else "it takes none"
            raise BitwrightError(f"unknown option {option!r} for model {name!r}; {hint}")
    found = {k: v for k, v in given.items() if k in named} | options
    for needed in named:
        if parameters[needed].default is inspect.Parameter.empty and needed not in found:
            raise BitwrightError(f"model {name!r}: needs the option {needed!r}; give model.options.{needed}")
    return found


def _try(model: nn.Module, shape: tuple[int, ...], num_classes: int, name: str, module: ModuleType) -> None:
    """One forward pass, whose output must be one row of at least `num_classes` numbers."""
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(torch.zeros(shape))
    except Exception as error:
        raise BitwrightError(f"model {name!r}: fails on images of shape {shape} ({_said(error, module)})") from error
    if not isinstance(output, Tensor):
        raise BitwrightError(
            f"model {name!r}: its output is a {type(output).__name__}; one tensor (images, classes) is accepted"
        )
    if output.ndim != 2 or len(output) != 1 or output.shape[1] < num_classes:
        raise BitwrightError(
            f"model {name!r}: its output has shape {tuple(output.shape)}; the data has {num_classes} classes, "
            f"(1, {num_classes}) is accepted"
        )


def _said(error: BaseException, module: ModuleType | None) -> str:
    """Kind and first line of an error, and the last line of the user's code that it passed."""
    text = first_line(error)
    kind = type(error).__name__
    text = text if text.startswith(kind) else f"{kind}: {text}"
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg}; {error.filename}, line {error.lineno}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if module is None or f.filename == module.__file__]
    inside = [f for f in own if "importlib" not in f.filename and f.filename != __file__]
    return f"{text}; {inside[-1].filename}, line {inside[-1].lineno}" if inside else text
