"""Command lines made of frozen dataclasses: a field is a flag, its help text and its default included."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from paged.errors import InvalidRequestError
from paged.no_pytorch import import_transformers_alone

import_transformers_alone()  # a command line has its process for itself

from transformers.hf_argparser import HfArgumentParser  # noqa: E402

METAVARS = {int: "N", float: "X"}


def parse_args(
    prog: str, description: str, *dataclass_types: type, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Parses `argv` (sys.argv[1:] if None) into one instance of each dataclass.

    A field `max_num_seqs: int` is the flag --max-num-seqs (--max_num_seqs is understood too), a bool gets a --no-
    form, a Literal's values are the choices, `tuple[str, ...]` takes several words. A field with metadata
    {"positional": True} is a positional argument. Flags are grouped by the dataclasses' `_argument_group_name`.

    Exits with status 2 and a message, as argparse does, on bad arguments, among them those that the dataclasses
    refuse with InvalidRequestError.
    """
    parser = _Parser(dataclass_types, prog=prog, description=description)
    argv = parser.with_dashes(sys.argv[1:] if argv is None else argv)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except InvalidRequestError as e:
        parser.error(_with_flag(str(e), e.param))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


class _Parser(HfArgumentParser):
    def __init__(self, dataclass_types: Sequence[type], prog: str, description: str):
        positionals = [f.name for t in dataclass_types for f in dataclasses.fields(t) if f.metadata.get("positional")]
        super().__init__(
            dataclass_types,
            prog=prog,
            description=f"{description} Defaults are in [brackets].",
            usage=" ".join(["%(prog)s", "[options]", *(name.upper() for name in positionals)]),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Overrides what the base class makes of a field; `field.type` is resolved already."""
        kind = next((t for t in get_args(field.type) if t is not type(None)), None) if _optional(field) else field.type
        required = field.default is dataclasses.MISSING
        kwargs: dict[str, Any] = {"help": _help(field, kind), "default": None if required else field.default}
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            kwargs |= {"choices": get_args(kind), "metavar": "NAME"}
        elif get_origin(kind) is tuple:
            of = get_args(kind)[0]
            kwargs |= {"type": of, "nargs": "+", "action": _StoreTuple, "metavar": METAVARS.get(of, "TEXT")}
        else:
            kwargs |= {"type": kind, "metavar": METAVARS.get(kind, "TEXT")}  # type: ignore[arg-type]
        if field.metadata.get("positional"):
            kwargs |= {"metavar": field.name.upper()} | ({} if required else {"nargs": "?"})
            parser.add_argument(field.name, **kwargs)
        else:
            parser.add_argument(_flag(field.name), dest=field.name, required=required, **kwargs)

    def with_dashes(self, argv: Sequence[str]) -> list[str]:
        """Flags in their one spelling; an unknown one is an error before its value is taken for something else."""
        known = [flag for action in self._actions for flag in action.option_strings]
        words = list(argv)
        for i, word in enumerate(words):
            if word == "--":
                break
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                flag = flag.replace("_", "-")
                words[i] = flag + equals + value
                if flag not in known:
                    close = difflib.get_close_matches(flag, known, n=1)
                    self.error(f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        return words

    def error(self, message: str) -> NoReturn:
        print(f"{self.format_usage()}error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class _HelpFormatter(argparse.HelpFormatter):
    """One line an option on a terminal of 100 columns."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, max_help_position=34, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{_flag(action.dest)[2:]}"
        return super()._format_action_invocation(action)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


class _StoreTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _optional(field: dataclasses.Field) -> bool:
    return type(None) in get_args(field.type)


def _help(field: dataclasses.Field, kind: Any) -> str:
    """choices; explanation [default]"""
    choices = "|".join(get_args(kind)) + "; " if get_origin(kind) is Literal else ""
    default = field.default
    if default is True or default is False:
        shown = "on" if default else "off"
    elif isinstance(default, tuple):
        shown = " ".join(map(str, default))
    else:
        shown = "" if default in (None, dataclasses.MISSING) else str(default)
    return (choices + field.metadata.get("help", "") + (f" [{shown}]" if shown else "")).replace("%", "%%")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_flag(message: str, param: str | None) -> str:
    """The Python name that an error message begins with, as the flag that was typed."""
    return message.replace(param, _flag(param), 1) if param and message.startswith(param) else message
